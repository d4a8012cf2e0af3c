"""Normalization, and the one derivative rule that serves every mode of differentiation."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxbn._checks import (
    check_implemented,
    check_values_per_channel,
    checked_dtype,
    checked_epsilon,
    checked_input,
    checked_vector,
    statistics_dtype,
)
from jaxbn._moments import Moments, shifted_moments
from jaxbn._sums import expand, expand_tangent, mean_over


def normalize(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
    activation: Any = None,
    residual: ArrayLike | None = None,
) -> jax.Array:
    """Normalizes `x` by a given mean and variance: batch norm in inference mode.

        y = (x − mean) · scale / √(var + epsilon) + bias

    Args:
      x: input, channels at `axis`; float16, bfloat16, float32 or float64.
      mean: shape `[C]`, usually `BatchStats.mean`.
      var: shape `[C]`, usually `BatchStats.var`.
      scale: γ, shape `[C]`; None means 1.
      bias: β, shape `[C]`; None means 0.
      axis: the channel axis of `x`.
      epsilon: added to the variance inside the square root; a Python number ≥ 0.
      dtype: the dtype of `y`; None for that of `x`.
      activation: reserved for a fused activation.
      residual: reserved for a fused residual input.

    Returns:
      `y`, of the shape of `x`, computed in at least float32 and rounded once. For the backward
      pass only `x` is kept, in its own dtype, beside vectors of shape `[C]`.

    Raises:
      TypeError: an array is not real floating point, or `axis` is not an int.
      ValueError: a vector is not of shape `[C]`, `axis` is out of range, `epsilon` is negative.
      NotImplementedError: `activation` or `residual` is given.

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> x = jnp.array([[1.0, 2.0], [5.0, 6.0]])
      >>> jaxbn.normalize(x, mean=jnp.array([3.0, 3.0]), var=jnp.array([4.0, 1.0]), epsilon=0.0)
      Array([[-1., -1.],
             [ 1.,  3.]], dtype=float32)

    References:
      Ioffe and Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167;
      `torch.nn.functional.batch_norm` with `training=False`.
    """
    check_implemented(activation=activation, residual=residual)
    epsilon = checked_epsilon(epsilon, train=False)
    x, axis = checked_input(x, axis)
    dtype = checked_dtype(dtype, x)
    mean = checked_vector(mean, "mean", x, axis)
    var = checked_vector(var, "var", x, axis)
    wide = statistics_dtype(x.dtype, mean.dtype, var.dtype, dtype)
    scale, bias = _scale_and_bias(scale, bias, x, axis, wide)
    factor = jax.lax.rsqrt(var.astype(wide) + epsilon) * scale
    affine = _recomputed(_affine, axis=axis, dtype=dtype)
    y: jax.Array = affine(x, mean.astype(wide), factor, bias)
    return y


def batch_normalize(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
    axis_name: Any = None,
    mask: ArrayLike | None = None,
    activation: Any = None,
    residual: ArrayLike | None = None,
) -> tuple[jax.Array, Moments]:
    """Normalizes `x` by its own mean and biased variance: batch norm in training mode.

        y = (x − E[x]) · scale / √(Var[x] + epsilon) + bias

    Between the forward and the backward pass only `x` is kept, in its own dtype, beside a few
    vectors of shape `[C]`.

    Args:
      x: input, channels at `axis`; float16, bfloat16, float32 or float64.
      scale: γ, shape `[C]`; None means 1.
      bias: β, shape `[C]`; None means 0.
      axis: the channel axis of `x`; every other axis is reduced.
      epsilon: added to the variance inside the square root; a Python number > 0.
      dtype: the dtype of `y`; None for that of `x`.
      axis_name: reserved for moments across devices.
      mask: reserved for samples that do not count.
      activation: reserved for a fused activation.
      residual: reserved for a fused residual input.

    Returns:
      `(y, moments)`: `y` in the shape of `x`, computed in at least float32 and rounded
      once; `moments` as `batch_moments(x)` gives them, for `update_batch_stats`. Both are
      differentiable to any order, in forward and reverse mode.

    Raises:
      TypeError: an array is not real floating point, or `axis` is not an int.
      ValueError: there is one value per channel, a vector is not of shape `[C]`, `axis` is out of
        range, or `epsilon` is not positive.
      NotImplementedError: a reserved argument is given.

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> y, moments = jaxbn.batch_normalize(jnp.array([[0.0, 1.0], [4.0, 5.0]]))
      >>> y.round(3)
      Array([[-1., -1.],
             [ 1.,  1.]], dtype=float32)
      >>> moments.mean
      Array([2., 3.], dtype=float32)

    References:
      Ioffe and Szegedy, "Batch Normalization", 2015, https://arxiv.org/abs/1502.03167;
      `torch.nn.functional.batch_norm` with `training=True`.
    """
    check_implemented(axis_name=axis_name, mask=mask, activation=activation, residual=residual)
    epsilon = checked_epsilon(epsilon, train=True)
    x, axis = checked_input(x, axis)
    dtype = checked_dtype(dtype, x)
    check_values_per_channel(x, axis)
    scale, bias = _scale_and_bias(scale, bias, x, axis, statistics_dtype(x.dtype, dtype))
    y, shift, delta, var, _ = _normalize_by_batch(x, scale, bias, axis, epsilon, dtype)
    count = jnp.asarray(x.size // x.shape[axis], var.dtype)
    return y, Moments(shift + delta, var, count)


def _scale_and_bias(
    scale: ArrayLike | None, bias: ArrayLike | None, x: jax.Array, axis: int, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    scale = jnp.ones(x.shape[axis]) if scale is None else checked_vector(scale, "scale", x, axis)
    bias = jnp.zeros(x.shape[axis]) if bias is None else checked_vector(bias, "bias", x, axis)
    return scale.astype(dtype), bias.astype(dtype)


def _recomputed(function: Callable[..., Any], **static: Any) -> Callable[..., Any]:
    """`function` keeping its arguments for the backward pass: `x` in its own dtype and vectors."""
    return jax.checkpoint(functools.partial(function, **static), prevent_cse=False)


def _affine(
    x: jax.Array,
    shift: jax.Array,
    factor: jax.Array,
    offset: jax.Array,
    *,
    axis: int,
    dtype: DTypeLike,
) -> jax.Array:
    # The shift comes off first: x·factor + (offset − shift·factor) cancels where the mean is large.
    shift, factor, offset = (expand(v, x.shape, axis) for v in (shift, factor, offset))
    return ((x.astype(shift.dtype) - shift) * factor + offset).astype(dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5))
def _normalize_by_batch(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    axis: int,
    epsilon: float,
    dtype: DTypeLike,
) -> tuple[jax.Array, ...]:
    """`(y, shift, delta, var, rstd)` with `mean = shift + delta`, in the dtype of `scale`."""
    shift, delta, var = shifted_moments(x.astype(scale.dtype), axis)
    rstd = jax.lax.rsqrt(var + epsilon)
    factor = scale * rstd
    y = _affine(x, shift, factor, bias - delta * factor, axis=axis, dtype=dtype)
    return y, shift, delta, var, rstd


@_normalize_by_batch.defjvp
def _normalize_by_batch_jvp(
    axis: int,
    epsilon: float,
    dtype: DTypeLike,
    primals: tuple[jax.Array, ...],
    tangents: tuple[jax.Array, ...],
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    x, scale, bias = primals
    outputs = _normalize_by_batch(x, scale, bias, axis, epsilon, dtype)
    _, shift, delta, _, rstd = outputs
    tangent = _recomputed(_tangent, axis=axis, dtype=dtype)
    dy, ddelta, dvar, drstd = tangent(tangents, x, shift, delta, rstd, scale)
    return outputs, (dy, jnp.zeros_like(shift), ddelta, dvar, drstd)


def _tangent(
    tangents: tuple[jax.Array, ...],
    x: jax.Array,
    shift: jax.Array,
    delta: jax.Array,
    rstd: jax.Array,
    scale: jax.Array,
    *,
    axis: int,
    dtype: DTypeLike,
) -> tuple[jax.Array, ...]:
    """Tangents of `(y, delta, var, rstd)`, linear in those of `(x, scale, bias)`.

        dy = k·dx + p + x̂·q    with  p = dbias − k·E[dx],  q = dscale − k·E[dx·x̂],  k = scale·rstd

    The vectors p and q are collected first so that, transposed, bias and E[dx] share the one
    reduction of the cotangent, and scale and E[dx·x̂] the other. No power of rstd above the first
    appears but in drstd, where it is what the result is made of: rstd³ would underflow.
    """
    dx, dscale, dbias = tangents
    dx = dx.astype(rstd.dtype)
    normalized = _affine(x, shift, rstd, -delta * rstd, axis=axis, dtype=rstd.dtype)
    mean_dx = mean_over(dx, axis)
    mean_dx_normalized = mean_over(dx * normalized, axis)
    k = scale * rstd
    p, q = dbias - k * mean_dx, dscale - k * mean_dx_normalized
    k = expand(k, x.shape, axis)
    p, q = (expand_tangent(v, x.shape, axis) for v in (p, q))
    dy = (k * dx + p + normalized * q).astype(dtype)
    return dy, mean_dx, 2 * mean_dx_normalized / rstd, -(rstd * mean_dx_normalized) * rstd
