"""What Griffe, which reads the sources without running them, does not know of their docstrings."""

from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Signatures made of fields; doctests under `Example:`, which Griffe calls `Examples:`."""

    def on_class_instance(self, *, cls: griffe.Class, **_: Any) -> None:
        """Marks Linen modules and named tuples as dataclasses: their fields are arguments."""
        base = str(cls.bases[0]) if cls.bases else ""
        linen = cls.path.startswith("jaxbn.linen.") and base in ("nn.Module", "_TorchBatchNorm")
        if linen or base == "NamedTuple":
            dataclass = griffe.ExprName("dataclasses.dataclass")
            cls.decorators.append(griffe.Decorator(dataclass, lineno=None, endlineno=None))
        if linen and cls.docstring:
            cls.docstring.value = cls.docstring.value.replace("\nAttributes:\n", "\nArgs:\n")

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Names the section of examples as Griffe does."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
