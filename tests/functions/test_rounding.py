"""Low precision: what is computed in float32 is rounded once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.numpy_reference import problem, sample

import jaxbn

pytestmark = pytest.mark.optimized

LOW = ["bfloat16", "float16"]
ACTIVATIONS = {
    **{name: name for name in ("relu", "leaky_relu", "silu", "gelu")},
    "exact gelu": functools.partial(jax.nn.gelu, approximate=False),
    "tanh": jnp.tanh,
    "softmax over channels": lambda z: jax.nn.softmax(z, axis=-1),
    None: None,
}


@functools.partial(jax.jit, static_argnames=("mode", "activation", "dtype"))
def in_mode(mode, x, scale, bias, residual=None, activation=None, dtype=None):
    """Output, and in training the moments."""
    options = {"activation": ACTIVATIONS[activation], "residual": residual, "dtype": dtype}
    if mode == "train":
        return jaxbn.batch_normalize(x, scale, bias, **options)
    return jaxbn.normalize(x, bias + 3, jnp.abs(scale) + 1, scale, bias, **options), None


def low(x, dtype):
    """`x` rounded to `dtype`, and what it is then in float32."""
    x = x.astype(jnp.dtype(dtype))
    return x, x.astype(np.float32)


def assert_rounded_once(y, wide):
    """`y` is `wide` rounded to nearest, give or take the error of float32."""
    exact = np.asarray(wide, np.float64)
    half = np.float64(np.spacing(np.abs(np.asarray(wide).astype(y.dtype)))) / 2
    assert (np.abs(np.float64(y) - exact) <= half + 1e-6 * np.abs(exact).max()).all()


@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize(
    ("input_dtype", "dtype"),
    [
        *((low, out) for low in LOW for out in (None, *LOW, "float32")),
        *(("float32", out) for out in LOW),
    ],
)
def test_input_and_output(input_dtype, dtype, mode):
    x, scale, bias, _ = problem((16, 9, 9, 6), -1)
    x, same = low(x, input_dtype)
    y, moments = in_mode(mode, x, scale, bias, dtype=dtype)
    wide, wide_moments = in_mode(mode, same, scale, bias)
    assert y.dtype == jnp.dtype(input_dtype if dtype is None else dtype)
    np.testing.assert_array_equal(y, np.asarray(wide).astype(y.dtype))
    jax.tree.map(np.testing.assert_array_equal, moments, wide_moments)


@pytest.mark.parametrize(
    ("activation", "mode", "dtype"),
    [
        (activation, mode, LOW[(i + j) % 2])
        for i, activation in enumerate(ACTIVATIONS)
        for j, mode in enumerate(("train", "inference"))
    ],
)
def test_activation_and_residual(activation, mode, dtype):
    x, scale, bias, _ = problem((16, 6, 5, 8), -1)
    residual = sample(x.shape, 9, 0.2, 1.0, np.float32)
    (x, same), (residual, same_residual) = low(x, dtype), low(residual, dtype)
    y, _ = in_mode(mode, x, scale, bias, residual, activation)
    wide, _ = in_mode(mode, same, scale, bias, same_residual, activation)
    assert_rounded_once(y, wide)
