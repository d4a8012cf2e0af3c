"""What Griffe, which reads the sources without running them, does not know about classes."""

from typing import Any

import griffe


class Fields(griffe.Extension):
    """The fields of Linen modules and of named tuples are arguments, as those of dataclasses."""

    def on_class_instance(self, *, cls: griffe.Class, **_: Any) -> None:
        """Marks such a class as a dataclass is marked."""
        base = str(cls.bases[0]) if cls.bases else ""
        linen = cls.path.startswith("jaxbn.linen.") and base in ("nn.Module", "_TorchBatchNorm")
        if linen or base == "NamedTuple":
            dataclass = griffe.ExprName("dataclasses.dataclass")
            cls.decorators.append(griffe.Decorator(dataclass, lineno=None, endlineno=None))
