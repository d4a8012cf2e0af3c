"""What is asked of one batch norm layer: the shapes of ResNet-50, inputs, and the right answers."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy import referee

# (height and width, channels): how many batch norms of ResNet-50 have them, 53 in all, at 224×224
# with the stride in the 3×3 convolution. He et al., https://arxiv.org/abs/1512.03385, table 1.
RESNET50 = {
    (112, 64): 1,
    (56, 64): 6,
    (56, 256): 4,
    (56, 128): 1,
    (28, 128): 7,
    (28, 512): 5,
    (28, 256): 1,
    (14, 256): 11,
    (14, 1024): 7,
    (14, 512): 1,
    (7, 512): 5,
    (7, 2048): 4,
}
PASSES = ("inference", "forward", "forward+backward")
LAYOUTS = {"NHWC": -1, "NCHW": 1}
DTYPES = ("float32", "bfloat16", "float16")


class Problem(NamedTuple):
    """What is measured together."""

    case: str
    passes: str
    side: int
    channels: int
    batch: int
    dtype: str
    layout: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the input, in its layout."""
        sides = (self.side, self.side)
        if self.layout == "NHWC":
            return (self.batch, *sides, self.channels)
        return (self.batch, self.channels, *sides)

    @property
    def added(self) -> bool:
        """Whether there is a residual."""
        return "add" in self.case

    @property
    def backward(self) -> bool:
        """Whether there is a backward pass."""
        return self.passes == "forward+backward"

    @property
    def transfers(self) -> int:
        """How often the two-pass algorithm moves a tensor as large as the input."""
        alone = {"inference": 2, "forward": 3, "forward+backward": 8}[self.passes]
        return alone + self.added * (3 if self.backward else 1)

    @property
    def megabytes(self) -> float:
        """Of the large inputs: `x`, and where the pass has them, residual and cotangent."""
        tensors = 1 + self.added + self.backward
        return tensors * int(np.prod(self.shape)) * jnp.dtype(self.dtype).itemsize / 1e6


def arrays(problem: Problem, seed: int) -> dict[str, jax.Array]:
    """Inputs with mean ≠ 0 and deviation ≠ 1, the large ones in the dtype of the problem."""
    keys = iter(jax.random.split(jax.random.key(seed), 7))
    dtype, vector = jnp.dtype(problem.dtype), (problem.channels,)

    def normal(mean: float, std: float, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        return _normal(next(keys), mean, std, shape, dtype)

    return {
        "x": normal(1.5, 2.0, problem.shape, dtype),
        "scale": normal(1.0, 0.2, vector),
        "bias": normal(0.1, 0.3, vector),
        "mean": normal(1.4, 0.1, vector),
        "var": normal(4.0, 0.2, vector),
        "residual": normal(0.2, 1.0, problem.shape, dtype),
        "dy": normal(0.3, 1.0, problem.shape, dtype),
    }


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(key: jax.Array, mean: float, std: float, shape: Any, dtype: Any) -> jax.Array:
    return (mean + std * jax.random.normal(key, shape)).astype(dtype)


def looked_at(problem: Problem, array: Any) -> NDArray[np.float64]:
    """Up to eight of the channels, the first and the last among them, in float64 and last."""
    array = np.asarray(array)
    if array.ndim > 1:
        array = np.moveaxis(array, LAYOUTS[problem.layout], -1)
    chosen = np.linspace(0, problem.channels - 1, min(8, problem.channels)).astype(int)
    return array[..., chosen].astype(np.float64)


def error(problem: Problem, outputs: Sequence[Any], given: dict[str, jax.Array]) -> float:
    """The larger error of `y` and, where there is a backward pass, `dx`: `outputs` are these."""
    y, *dx = (looked_at(problem, output) for output in outputs)
    a = {name: looked_at(problem, array) for name, array in given.items()}
    after = {"residual": a["residual"] if problem.added else 0.0, "relu": "ReLU" in problem.case}
    if problem.passes == "inference":
        expected = [
            referee.inference(*(a[k] for k in ("x", "scale", "bias", "mean", "var")), **after)
        ]
    else:
        right = referee.training(*(a[k] for k in ("x", "scale", "bias", "dy")), **after, y=y)
        expected = [right.y, right.dx] if problem.backward else [right.y]
    # Of a NaN and a number, NumPy's maximum is NaN.
    return float(np.max([referee.error(*pair) for pair in zip([y, *dx], expected, strict=True)]))
