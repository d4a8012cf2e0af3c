"""`jaxbn.equinox` where Equinox is not installed."""

import importlib
import sys

import pytest


def test_message(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("jaxbn.equinox")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "equinox", None)
    with pytest.raises(ModuleNotFoundError, match=r"Use pip install 'jaxbn\[equinox\]'"):
        importlib.import_module("jaxbn.equinox")
