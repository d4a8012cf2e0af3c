"""Docstrings, from which the reference is made: all that is public has one, and it is complete."""

import ast
import dataclasses
import functools
import inspect
import re

import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx

MODULES = [jaxbn, jaxbn.interop, jaxbn.torch, jaxbn.linen, jaxbn.nnx]
LINEN = {"parent", "name"}  # of every module of Linen


def public():
    for module in MODULES:
        for name, value in vars(module).items():
            own = getattr(value, "__module__", "").startswith(module.__name__)
            if own and callable(value) and not name.startswith("_"):
                yield pytest.param(value, id=f"{module.__name__}.{name}")


def section(docstring, *titles):
    """The items of a section, by name."""
    title = "|".join(titles)
    found = re.search(rf"^(?:{title}):\n((?:  .*\n|\n)+)", docstring + "\n", re.MULTILINE)
    items = re.findall(r"^  (\**\w+): ((?:.|\n    )*)", found[1] if found else "", re.MULTILINE)
    return {name.lstrip("*"): " ".join(text.split()) for name, text in items}


def parameters(value):
    if dataclasses.is_dataclass(value):
        fields = (f for f in dataclasses.fields(value) if f.init)
        return {field.name: field.default for field in fields if field.name not in LINEN}
    if value in (jaxbn.Report, jaxbn.Explanation):  # made by functions alone
        return {}
    if isinstance(value, type) and issubclass(value, nnx.Module):  # whose metaclass hides it
        value = functools.partial(value.__init__, None)
    return {name: p.default for name, p in inspect.signature(value).parameters.items()}


@pytest.mark.parametrize("value", [*public()])
def test_what_is_public_is_documented(value):
    docstring = inspect.getdoc(value)
    assert "\nExamples:\n  >>> " in docstring
    if "are those of `BatchNorm1d`" not in docstring:  # of BatchNorm2d and BatchNorm3d
        told = section(docstring, "Args", "Attributes")
        assert told.keys() >= parameters(value).keys()
        assert all(text.endswith(".") for text in told.values())


@pytest.mark.parametrize("layer", [jaxbn.linen.BatchNorm, jaxbn.linen.BatchNorm1d])
def test_defaults_of_linen_layers(layer):
    """The reference cannot read them from a signature, as it does elsewhere."""
    told = section(inspect.getdoc(layer), "Attributes")
    for name, default in parameters(layer).items():
        if default is dataclasses.MISSING:
            assert "Default" not in told[name]
            continue
        text = re.search(r"Default: (\S+)\.$", told[name])[1]
        assert text == getattr(default, "__name__", text)
        assert hasattr(default, "__name__") or ast.literal_eval(text) == default
