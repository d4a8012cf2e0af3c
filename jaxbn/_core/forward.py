"""Normalization, once its moments are known: coefficients of each channel, and their application.

    factor = scale·rstd          offset = bias − delta·factor
    y      = activation((x − shift)·factor + offset + residual)

Inference is these two steps. Training comes to them by the moments of the batch, under the one
derivative rule of `derivative.py`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbn._activation import ACTIVATIONS, Activation
from jaxbn._core.compilers import apart, written_out
from jaxbn._core.devices import ALONE, Devices
from jaxbn._core.moments import centered, expand, where_valid


class Form(NamedTuple):
    """What is known when the function is traced."""

    axis: int
    epsilon: float
    dtype: np.dtype[Any]  # of the output
    devices: Devices = ALONE
    activation: Activation | None = None
    differentiated: bool = False


class Operands(NamedTuple):
    """What is differentiated, but for the mask; where something is None it is left out."""

    x: jax.Array
    mask: jax.Array | None
    scale: jax.Array
    bias: jax.Array
    residual: jax.Array | None
    constants: tuple[jax.Array, ...]  # of the activation


class Coefficients(NamedTuple):
    """What a channel is normalized by: `(x − shift)·factor + offset`."""

    shift: jax.Array
    factor: jax.Array
    offset: jax.Array


def coefficients(
    shift: jax.Array, delta: jax.Array | None, rstd: jax.Array, scale: jax.Array, bias: jax.Array
) -> Coefficients:
    """Those of a mean `shift + delta`; without `delta` the mean is `shift` itself."""
    factor = scale * rstd
    return Coefficients(shift, factor, bias if delta is None else bias - delta * factor)


def applied(coefficients: Coefficients, operands: Operands, form: Form) -> jax.Array:
    """`(x − shift)·factor + offset + residual`, in the dtype of the coefficients.

    The shift comes off first: `x·factor + (offset − shift·factor)` cancels where the mean is large.
    """
    x, mask, _, _, residual, _ = operands
    vectors = written_out(x, *coefficients[1:])
    factor, offset = (expand(v, jax.typeof(x), form.axis) for v in vectors)
    z = centered(x, mask, form.axis, coefficients.shift) * factor + offset
    return z if residual is None else z + _as_rounded(where_valid(mask, residual)).astype(z.dtype)


def activated(z: jax.Array, operands: Operands, form: Form) -> jax.Array:
    """The output `activation(z)`, rounded to its dtype; zero where masked."""
    y = z if form.activation is None else form.activation(z, *operands.constants)
    return where_valid(operands.mask, y).astype(form.dtype)


def normalize_by_statistics(
    operands: Operands, mean: jax.Array, var: jax.Array, form: Form
) -> jax.Array:
    """Batch norm in inference mode. Only its arguments are kept for the backward pass."""

    def output(operands: Operands, mean: jax.Array, rstd: jax.Array) -> jax.Array:
        by_statistics = coefficients(mean, None, rstd, operands.scale, operands.bias)
        return activated(applied(by_statistics, operands, form), operands, form)

    rstd = jax.lax.rsqrt(var + form.epsilon)
    y: jax.Array = jax.checkpoint(output, prevent_cse=False)(operands, mean, rstd)
    return y


def traced_once(function: Callable[..., Any], form: Form) -> Callable[..., Any]:
    """`function(…, form=form)`, which all layers that are alike share, in its trace and compiled.

    Not so for activations of the user's own, which may be another function object in every call.
    """
    if form.activation is None or form.activation in ACTIVATIONS.values():
        return functools.partial(_jitted(function), form=form)
    return functools.partial(function, form=form)


@functools.cache
def _jitted(function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.jit(function, static_argnames="form")


def _as_rounded(residual: jax.Array) -> jax.Array:
    """The residual in its own dtype, of which XLA:GPU is not to read the float32 values instead.

    It may drop a rounding to bfloat16 and back, and then computes those values once more, or writes
    them to memory too: compiled for an H100, four bottleneck blocks moved 34.9 bytes per element
    with that, and 32.5 without. A TPU moves more without it.
    """
    return residual if residual.dtype.itemsize >= 4 else apart(residual, "cuda", "rocm")
