"""`jaxbn` where the libraries of its layers are not installed."""

import importlib
import re
import sys

import pytest


@pytest.mark.parametrize(
    ("namespace", "library"), [("linen", "flax"), ("nnx", "flax"), ("equinox", "equinox")]
)
def test_message(namespace, library, monkeypatch):
    name = f"jaxbn.{namespace}"
    for module in [module for module in sys.modules if f"{module}.".startswith(f"{name}.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    message = (
        f"`{name}` needs {library.title()}, which is not installed. "
        f"Use pip install 'jaxbn[{library}]'."
    )
    with pytest.raises(ModuleNotFoundError, match=f"^{re.escape(message)}$") as error:
        importlib.import_module(name)
    assert error.value.name == library
