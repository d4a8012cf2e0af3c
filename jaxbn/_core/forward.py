"""Normalization by known moments: the coefficients of each channel, and their application.

    factor = scale·rstd          offset = bias − delta·factor
    y      = activation((x − shift)·factor + offset + residual)

Inference mode consists of these two steps. Training mode first computes the moments of the batch,
and applies the derivative rule of `derivative.py` to all three.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxbn._activation import INVERSES, Activation, is_own
from jaxbn._core.axes import expand
from jaxbn._core.compilers import apart, written_out
from jaxbn._core.devices import ALONE, Devices
from jaxbn._core.moments import centered, where_valid, widened
from jaxbn._core.renorm import Limits


class Form(NamedTuple):
    """Everything that is known when the function is traced."""

    axis: int
    epsilon: float
    dtype: np.dtype[Any]  # of the output
    devices: Devices = ALONE
    activation: Activation | None = None
    differentiated: bool = False
    keep_output: bool = False  # for the backward pass, instead of the input


class Operands(NamedTuple):
    """The arrays to differentiate with respect to, and the mask. None means absent."""

    x: jax.Array
    mask: jax.Array | None
    scale: jax.Array
    bias: jax.Array
    residual: jax.Array | None
    constants: tuple[jax.Array, ...]  # of the activation
    limits: Limits | None = None  # of batch renormalization


# Shift, factor and offset of each channel.
Coefficients = tuple[jax.Array, jax.Array, jax.Array]


def coefficients(
    shift: jax.Array, delta: jax.Array | None, rstd: jax.Array, operands: Operands
) -> Coefficients:
    """The coefficients for the mean `shift + delta`, or for the mean `shift` without `delta`."""
    factor = operands.scale * rstd
    offset = operands.bias if delta is None else operands.bias - delta * factor
    return shift, factor, offset


def applied(coefficients: Coefficients, operands: Operands, form: Form) -> jax.Array:
    """`(x − shift)·factor + offset + residual`, in the dtype of the coefficients.

    The shift is subtracted first. With a large mean, `x·factor + (offset − shift·factor)` cancels.
    """
    x, mask, _, _, residual, *_ = operands
    shift, *vectors = coefficients
    factor, offset = (expand(v, jax.typeof(x), form.axis) for v in written_out(x, *vectors))
    z = centered(x, mask, form.axis, shift) * factor + offset
    if residual is None:
        return z
    residual = where_valid(mask, residual)
    # XLA may drop a rounding to bfloat16 and back. XLA:GPU then recomputes the float32 values, or
    # writes them to memory, too. Compiled for an H100, four bottleneck blocks moved 34.9 bytes per
    # element, and 32.5 with the barrier. On a TPU, the barrier costs four bytes.
    if residual.dtype.itemsize == 2:
        residual = apart(residual, "cuda", "rocm")
    return z + residual.astype(z.dtype)


def activated(z: jax.Array, operands: Operands, form: Form) -> jax.Array:
    """The output `activation(z)`, rounded to its dtype; zero where masked."""
    if form.activation is not None:
        z = form.activation(seen(z, operands, form), *operands.constants)
    return where_valid(operands.mask, z).astype(form.dtype)


def inverted(y: jax.Array, coefficients: Coefficients, operands: Operands, form: Form) -> jax.Array:
    """`x − shift` from an output without a residual: inverts `activated` and `applied`.

    Two calls share no array. Without the barrier, XLA keeps a copy of `y` in float32.
    """
    _, *vectors = coefficients
    y = apart(y, "cpu", "cuda", "rocm")
    factor, offset = (expand(v, jax.typeof(y), form.axis) for v in written_out(y, *vectors))
    z = widened(y, factor.dtype)
    return where_valid(operands.mask, (INVERSES[form.activation](z) - offset) / factor)


def seen(z: jax.Array, operands: Operands, form: Form) -> jax.Array:
    """The argument of the activation: zero where masked, if it may look at more than one value."""
    return where_valid(operands.mask, z) if is_own(form.activation) else z


def normalize_by_statistics(
    operands: Operands, mean: jax.Array, var: jax.Array, form: Form
) -> jax.Array:
    """Batch norm in inference mode. The backward pass keeps only the arguments."""

    def output(operands: Operands, mean: jax.Array, rstd: jax.Array) -> jax.Array:
        z = applied(coefficients(mean, None, rstd, operands), operands, form)
        return activated(z, operands, form)

    # A negative variance gives NaN, even if epsilon would make up for it.
    rstd = jax.lax.rsqrt(jnp.where(var < 0, jnp.nan, var) + form.epsilon)
    if not is_plain(operands, form, rstd.dtype):
        output = jax.checkpoint(output, prevent_cse=False)
    return output(operands, mean, rstd)


def is_plain(operands: Operands, form: Form, dtype: DTypeLike) -> bool:
    """Whether inference mode uses only JAX's standard primitives, which all interpreters know.

    The backward pass then keeps `x − mean` instead of `x`, which costs nothing.
    """
    return form.activation is None and operands.x.dtype == dtype


def traced_once(function: Callable[..., Any], form: Form) -> Callable[..., Any]:
    """`function(…, form=form)`, traced and compiled once for all layers that are alike.

    A user's own activation may be a new function object in every call, so it is left out.
    """
    if is_own(form.activation):
        return functools.partial(function, form=form)
    return functools.partial(_jitted(function), form=form)


@functools.cache
def _jitted(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled by `jax.jit`, the same object in every call."""
    return jax.jit(function, static_argnames="form")
