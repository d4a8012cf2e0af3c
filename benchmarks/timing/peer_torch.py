"""torch's batch norm for the benchmarks, where torch is installed."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from benchmarks import libraries

NAMES = ("torch", "torch channels_last", "torch.compile")


def installed() -> list[str]:
    """The ways to run it; a line is printed for each that cannot be."""
    if importlib.util.find_spec("torch") is None:
        print("torch is left out: the package torch is not installed.")
        return []
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        print("torch.compile is left out: it needs a C++ compiler.")
        return list(NAMES[:2])
    return list(NAMES)


def tensor(array: jax.Array, name: str, channels: int) -> Any:
    """An array as torch has it; images, channels where `channels` says, in the memory of `name`."""
    import torch

    value = torch.from_dlpack(jnp.asarray(array)).clone()
    if array.ndim < 4:
        return value
    value = value.permute(0, 3, 1, 2) if channels == -1 else value
    last = name != "torch"
    return value.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def layer(
    name: str, problem: Any, given: list[dict[str, jax.Array]]
) -> tuple[Callable[[Any], Any], list[Any]]:
    """The pass of a problem, `(y, dx)` or `(y,)` first, and its inputs."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    axis = -1 if problem.layout == "NHWC" else 1
    inputs = [{k: tensor(v, name, axis) for k, v in a.items()} for a in given]
    training, backward = problem.passes != "inference", problem.passes == "forward+backward"

    def normalized(a: dict[str, Any], x: Any, scale: Any, bias: Any, residual: Any) -> Any:
        mean, var = (a["mean"].clone(), a["var"].clone()) if training else (a["mean"], a["var"])
        y = torch.nn.functional.batch_norm(
            x, mean, var, scale, bias, training, libraries.MOMENTUM, libraries.EPSILON
        )
        if "add" in problem.case:
            y += residual
        return torch.nn.functional.relu(y, inplace=True) if "ReLU" in problem.case else y

    def arrays(value: Any) -> Any:
        return Image(value.detach(), axis)

    compiled = normalized
    if name == "torch.compile":
        torch.compiler.reset()  # or it would make one program for all shapes, a slower one
        compiled = torch.compile(normalized, dynamic=False)

    def run(a: dict[str, Any]) -> Any:
        leaves = [a[k] for k in ("x", "scale", "bias", "residual")]
        if not backward:
            with torch.no_grad():
                y = compiled(a, *leaves)
            return [arrays(y)], None
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        y = compiled(a, *leaves)
        y.backward(a["dy"])
        return [arrays(y), arrays(leaves[0].grad)], None

    return run, inputs


class Image:
    """A tensor that becomes an array, in the layout of the problem, when it is looked at."""

    def __init__(self, value: Any, axis: int) -> None:
        """Moves nothing."""
        self.value, self.axis = value, axis

    def in_jax(self) -> jax.Array:
        """The array, where the tensor is."""
        value = self.value.movedim(1, -1) if self.axis == -1 else self.value
        return jax.dlpack.from_dlpack(value.contiguous())

    def __array__(self, dtype: Any = None, copy: Any = None) -> NDArray[Any]:
        """The array, in the memory of the host."""
        return np.asarray(self.in_jax())
