"""Batch norm in float64 NumPy, written from the definition: what the benchmarks check against."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.libraries import EPSILON


class Result(NamedTuple):
    """What one training step of one layer gives: output, biased variance and gradients."""

    y: Any
    var: Any
    dx: Any
    dscale: Any
    dbias: Any


def inference(
    x: Any, scale: Any, bias: Any, mean: Any, var: Any, residual: Any = 0.0, relu: bool = False
) -> NDArray[np.float64]:
    """The output by given statistics, channels last."""
    x, scale, bias, mean, var = (np.asarray(v, np.float64) for v in (x, scale, bias, mean, var))
    y = (x - mean) / np.sqrt(var + EPSILON) * scale + bias + residual
    return np.maximum(y, 0) if relu else y


def training(
    x: Any, scale: Any, bias: Any, dy: Any, residual: Any = 0.0, relu: bool = False, y: Any = None
) -> Result:
    """Output and gradients, channels last.

    ReLU passes a cotangent on where the output is positive: that of the referee, or the `y` given,
    since one that is nearly zero may be rounded to either side.
    """
    x, scale, dy = (np.asarray(v, np.float64) for v in (x, scale, dy))
    others, count = tuple(range(x.ndim - 1)), x.size // scale.size
    mean, var = x.mean(others), x.var(others)
    exact = inference(x, scale, bias, mean, var, residual, relu)
    dz = np.where((exact if y is None else y) > 0, dy, 0) if relu else dy
    deviation = np.sqrt(var + EPSILON)
    normalized = (x - mean) / deviation
    dbias, dscale = dz.sum(others), (dz * normalized).sum(others)
    dx = scale / deviation * (dz - dbias / count - normalized * dscale / count)
    return Result(exact, var, dx, dscale, dbias)


def error(actual: Any, expected: NDArray[np.float64]) -> float:
    """Largest difference over the largest expected magnitude; NaN where there is a NaN."""
    actual = np.asarray(actual, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
