"""Batch norms and kernels to fold, and batch norm in NumPy as their referee."""

import numpy as np
from helpers.numpy_reference import error, normalized, sample


def batch_norm(channels, seed=0, dtype=np.float64):
    """`mean`, `var`, `scale` and `bias`; the scale has both signs, and a zero."""
    scale = sample(channels, seed + 2, 0.0, 1.0, dtype)
    scale[:2] = -1.5, 0.0
    return (
        sample(channels, seed, 3.0, 2.0, dtype),
        sample(channels, seed + 1, 0.0, 2.0, dtype) ** 2 + dtype(0.05),
        scale,
        sample(channels, seed + 3, -0.5, 1.0, dtype),
    )


def applied(x, mean, var, scale, bias, axis=1):
    """Batch norm in NumPy, where None stands for 1 or 0."""
    scale = np.ones_like(mean) if scale is None else scale
    bias = np.zeros_like(mean) if bias is None else bias
    return normalized(np.asarray(x), mean, var, scale, bias, axis)


def kernel_of(layout, inputs, outputs, size=3, seed=5, dtype=np.float64):
    sizes = {"I": inputs, "O": outputs}
    return sample([sizes.get(letter, size) for letter in layout], seed, 0.2, 0.5, dtype)


def assert_same(actual, expected):
    assert error(actual, expected) <= 1e-12
