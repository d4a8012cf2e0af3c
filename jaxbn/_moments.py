"""Moments of a set of samples, computed without cancellation and merged exactly."""

import functools
import math
from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxbn._checks import checked_axis_name, checked_input, checked_mask, statistics_dtype
from jaxbn._sums import SMALL, AxisName, across, device_count, expand, means, reduced_axes, sum_over


class Moments(NamedTuple):
    """Mean, biased variance and number of the samples of one set, per channel.

    Moments are a monoid: `merge_moments` gives those of the union of disjoint sets exactly, so
    shards, micro-batches and whole data sets are all handled by the one operation.

    Attributes:
      mean: `E[x]`, shape `[C]`, float32 or float64.
      var: `E[(x − mean)²]`, the variance divided by `count`, shape `[C]`, dtype of `mean`.
      count: samples per channel, shape `[]`, or `[C]` under a mask, dtype of `mean`: in float32 a
        count above 2²⁴ is rounded, and is as good a weight as before.

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> jaxbn.batch_moments(jnp.array([[1.0, 10.0], [3.0, 10.0]]))
      Moments(mean=Array([ 2., 10.], dtype=float32), var=Array([1., 0.], dtype=float32), \
count=Array(2., dtype=float32))
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as documented


jax.export.register_namedtuple_serialization(Moments, serialized_name="jaxbn.Moments")


def batch_moments(
    x: ArrayLike,
    *,
    axis: int = -1,
    axis_name: AxisName = None,
    mask: ArrayLike | None = None,
) -> Moments:
    """Mean and biased variance of `x` over every axis but the channel axis.

        mean = E[x]        var = E[(x − mean)²]

    Computed from `d = x − K` as `mean = K + E[d]`, `var = E[d²] − E[d]²`, with `K` the mean of a
    sixteenth of the batch or more (of all of it where it is small or masked): little cancels,
    however large the mean is beside the standard deviation and whatever the data.

    Args:
      x: samples, `[..., C]` or any layout with the channels at `axis`; float16, bfloat16, float32
        or float64.
      axis: the channel axis of `x`.
      axis_name: name of a mapped axis, or a tuple of names, of `jax.vmap`, `jax.pmap` or
        `jax.shard_map`: the moments are those of the samples on all its devices.
      mask: True, or 1, where a value counts; broadcasts against `x`. What stands elsewhere, NaN and
        infinity included, is not looked at.

    Returns:
      `Moments` of shape `[C]`, in float32, or float64 where `x` is. A channel without values has
      zeros. They are differentiable with respect to `x`, in forward and reverse mode.

    Raises:
      TypeError: `x` is not real floating point, `axis` is not an int, or `mask` is complex.
      ValueError: `axis` is out of range, `x` has no channels, `mask` does not broadcast to the
        shape of `x` or holds other values than 0 and 1 (NaN results where it is traced).
      NameError: `axis_name` is not bound.

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> x = 1e6 + jnp.array([[-1.0], [0.0], [1.0], [2.0]])
      >>> moments = jaxbn.batch_moments(x)
      >>> float(moments.mean[0]), float(moments.var[0])
      (1000000.5, 1.25)
      >>> padded = jnp.array([[1.0], [3.0], [jnp.nan]])
      >>> moments = jaxbn.batch_moments(padded, mask=jnp.array([[True], [True], [False]]))
      >>> float(moments.mean[0]), float(moments.var[0]), float(moments.count[0])
      (2.0, 1.0, 2.0)

    References:
      Chan, Golub and LeVeque, "Algorithms for computing the sample variance", The American
      Statistician 37 (1983).
    """
    x, axis = checked_input(x, axis)
    x, mask = checked_mask(mask, x)
    axis_name = checked_axis_name(axis_name)
    dtype = statistics_dtype(x.dtype)
    shift, delta, var, count = shifted_moments(x, mask, axis, axis_name, dtype)
    return Moments(shift + delta, var, count)


def merge_moments(first: Moments, *others: Moments) -> Moments:
    """Moments of the union of disjoint sets, from the moments of each.

    For two sets a and b, with `n = n_a + n_b`, `w = n_b / n` and `δ = mean_b − mean_a`:

        mean = mean_a + w·δ        var = (1 − w)·var_a + w·var_b + w·(1 − w)·δ²

    Args:
      first: moments with `mean` and `var` of shape `[C]`.
      *others: any number more, of the same shape and dtype. A set with `count` 0 changes nothing.

    Returns:
      `Moments` of all samples together, in the dtype of the arguments.

    Raises:
      ValueError: the shapes of the means and variances differ.

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> x = jnp.array([[1.0], [2.0], [6.0]])
      >>> merged = jaxbn.merge_moments(jaxbn.batch_moments(x[:1]), jaxbn.batch_moments(x[1:]))
      >>> float(merged.mean[0]), round(float(merged.var[0]), 5), float(merged.count)
      (3.0, 4.66667, 3.0)

    References:
      Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
      variances", COMPSTAT 1982.
    """
    shapes = {v.shape for moments in (first, *others) for v in (moments.mean, moments.var)}
    if len(shapes) > 1:
        raise ValueError(
            "Merged moments must describe the same channels; got vectors of the shapes "
            f"{', '.join(map(str, sorted(shapes)))}."
        )
    return functools.reduce(_merge_two, others, first)


def _merge_two(a: Moments, b: Moments) -> Moments:
    count = a.count + b.count
    weight = b.count / jnp.where(count > 0, count, 1)
    delta = b.mean - a.mean
    between = weight * (1 - weight) * jnp.square(delta)
    var = (1 - weight) * a.var + weight * b.var + between
    return Moments(a.mean + weight * delta, var, count)


def shifted_moments(
    x: jax.Array, mask: jax.Array | None, axis: int, axis_name: AxisName, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """`(shift, delta, var, count)` with `mean = shift + delta`, in `dtype`.

    The parts of the mean are kept apart: their sum would round `delta` away where the mean is
    large, and with it the exactness of `x − shift − delta`. The shift is a constant to
    differentiation: mean and variance do not depend on it, so their derivatives of every order are
    right without it.
    """
    shift, missing, count = _shifts(jax.lax.stop_gradient(x), mask, axis, axis_name, dtype)
    deviation = centered(x, mask, axis, shift)
    square = jnp.square(centered(x, mask, axis, shift, missing))
    delta, mean_square = means((deviation, square), count, axis, axis_name)
    var = mean_square - jnp.square(delta - missing)
    # Rounding may leave a constant channel just below zero; the derivative is that of `var`.
    var = var + jax.lax.stop_gradient(jnp.maximum(-var, 0))
    return shift, delta, var, count


def centered(x: jax.Array, mask: jax.Array | None, axis: int, *shifts: jax.Array) -> jax.Array:
    """`x` less each of the shifts, in their dtype; zero where masked, whatever stands there."""
    deviation = x.astype(shifts[0].dtype)
    for shift in shifts:
        deviation = deviation - expand(shift, x.shape, axis)
    return where_valid(mask, deviation)


def where_valid(mask: jax.Array | None, x: jax.Array) -> jax.Array:
    """`x`, and zero where masked."""
    return x if mask is None else jnp.where(mask, x, jnp.zeros((), x.dtype))


def _shifts(
    x: jax.Array, mask: jax.Array | None, axis: int, axis_name: AxisName, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """An estimate of the mean, what is known to be missing from it, and each channel's count.

    On a CPU the estimate is corrected by the mean of what it leaves, and what its rounding loses of
    that is missing. This costs a pass over `x`, which a GPU or TPU, held up by memory, cannot
    afford; there the estimate stands, and nothing is known to be missing.
    """
    if mask is None:
        part = _corner(x, axis)
        devices = device_count(axis_name)
        count, part_count = (
            jnp.asarray(v.size // v.shape[axis] * devices, dtype) for v in (x, part)
        )
        (shift,) = means((part.astype(dtype),), part_count, axis, axis_name)
    else:
        sums = sum_over(where_valid(mask, x.astype(dtype)), axis)
        total, count = across((sums, _valid_count(mask, x, axis, dtype)), axis_name)
        shift = total / jnp.maximum(count, 1)

    shift = _rounded(shift)

    def left() -> jax.Array:
        return sum_over(centered(x, mask, axis, shift), axis)

    left_over = jax.lax.platform_dependent(cpu=left, default=lambda: jnp.zeros_like(left()))
    (total_left,) = across((left_over,), axis_name)
    correction = _rounded(total_left / jnp.maximum(count, 1))
    corrected = _rounded(shift + correction)
    return corrected, correction - (corrected - shift), count


def _rounded(x: jax.Array) -> jax.Array:
    """`x` with one bit less, so that compilers cannot fuse what it is made of into what uses it.

    A product fused with the next difference is not rounded, and the shift would be another number
    at each place where it comes off.
    """
    info = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant - 1)


def _valid_count(mask: jax.Array, x: jax.Array, axis: int, dtype: DTypeLike) -> jax.Array:
    """How many values of each channel the mask leaves, counted before it is broadcast: `[C]`."""
    axes = reduced_axes(x.ndim, axis)
    repeats = math.prod(x.shape[i] for i in axes if mask.shape[i] == 1 != x.shape[i])
    count = mask.sum(axes, dtype=jnp.int32).astype(dtype) * repeats
    return jnp.broadcast_to(count, (x.shape[axis],))


def _corner(x: jax.Array, axis: int) -> jax.Array:
    """A corner of `x` with a sixteenth of each channel's values or more; `x` itself where small.

    The mean K of a fraction f obeys (E[x] − K)² ≤ Var[x]·(1 − f)/f on any data. E[(x − K)²] is then
    at most 1/f times the variance, which loses four bits to it. The corner is cut out of every
    sample where a sample has sixteen positions, so that batches spread over devices stay in place.
    """
    samples, positions = reduced_axes(x.ndim, axis)[:1], reduced_axes(x.ndim, axis)[1:]
    if not isinstance(x.size, int) or x.size <= SMALL:
        return x
    corner = positions if math.prod(x.shape[i] for i in positions) >= 16 else samples
    if any(jax.typeof(x).sharding.spec[i] is not None for i in corner):
        return x  # a cut through devices costs more than reading everything
    limits = list(x.shape)
    left = math.prod(x.shape[i] for i in corner)
    wanted = -(-left // 16)
    for i in corner:
        left //= x.shape[i]
        limits[i] = -(-wanted // left)
        wanted = -(-wanted // limits[i])
    return jax.lax.slice(x, [0] * x.ndim, limits)
