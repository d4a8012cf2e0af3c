"""Docstrings, from which the reference is made: all that is public has one, and it is complete."""

import functools
import inspect
import re

import flax.linen
import pytest
from flax import nnx

import jaxbn
import jaxbn.linen
import jaxbn.nnx

MODULES = [jaxbn, jaxbn.interop, jaxbn.torch, jaxbn.linen, jaxbn.nnx]


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
    """The names of the arguments of a function, or of a constructor."""
    if value in (jaxbn.Report, jaxbn.Explanation):  # made by functions alone
        return set()
    if isinstance(value, type) and issubclass(value, nnx.Module):  # whose metaclass hides it
        value = functools.partial(value.__init__, None)
    linen = isinstance(value, type) and issubclass(value, flax.linen.Module)
    return inspect.signature(value).parameters.keys() - ({"parent", "name"} if linen else set())


@pytest.mark.parametrize("value", [*public()])
def test_what_is_public_is_documented(value):
    docstring = inspect.getdoc(value)
    assert "\nExamples:\n  >>> " in docstring
    if "are those of `BatchNorm1d`" not in docstring:  # of BatchNorm2d and BatchNorm3d
        told = section(docstring, "Args", "Attributes")
        assert told.keys() >= parameters(value)
        assert all(text.endswith(".") for text in told.values())
