"""Moments of a set of samples, and the merge that makes them a monoid."""

from typing import NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn._checks import (
    checked_array,
    checked_float,
    checked_input,
    checked_mask,
    statistics_dtype,
)
from jaxbn._core.devices import AxisIndexGroups, AxisName, checked_devices
from jaxbn._core.moments import Shifted, added, merged, shifted_moments
from jaxbn._types import Integer


class Moments(NamedTuple):
    """Mean, biased variance and number of samples of one set, per channel.

    Moments are a monoid: `merge_moments` computes the moments of the union of disjoint sets
    exactly. Devices, micro-batches and whole data sets all use this one operation.

    Attributes:
      mean: `E[x]`, shape `[C]`, float32 or float64.
      var: `E[(x − mean)²]`, the variance divided by `count`, shape `[C]`, dtype of `mean`.
      count: samples per channel, shape `[]`, or `[C]` with a mask, dtype of `mean`. Above 2²⁴, a
        float32 count is rounded, which is exact enough for a weight.

    Examples:
      >>> import jax.numpy as jnp, jaxbn
      >>> jaxbn.batch_moments(jnp.array([[1.0, 10.0], [3.0, 10.0]]))
      Moments(mean=Array([ 2., 10.], dtype=float32), var=Array([1., 0.], dtype=float32), \
count=Array(2., dtype=float32))

    References:
      Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
      variances", COMPSTAT 1982.
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count, as documented


jax.export.register_namedtuple_serialization(Moments, serialized_name="jaxbn.Moments")


def batch_moments(
    x: ArrayLike,
    *,
    axis: Integer = -1,
    axis_name: AxisName = None,
    axis_index_groups: AxisIndexGroups = None,
    mask: ArrayLike | None = None,
) -> Moments:
    """Computes the mean and the biased variance of `x` over all axes but the channel axis.

        mean = E[x]        var = E[(x − mean)²]

    The sums are taken about a shift K close to the mean, with `d = x − K`:

        mean = K + E[d]    var = E[d²] − E[d]²

    At most four bits cancel, however large the mean is compared with the standard deviation.

    Args:
      x: samples, with the channels at `axis`; float16, bfloat16, float32 or float64.
      axis: channel axis of `x`; all other axes are reduced.
      axis_name: name of a mapped axis of `jax.vmap`, `jax.pmap` or `jax.shard_map`, or a tuple of
        names. The moments are then those of the samples on all devices along it.
      axis_index_groups: groups of indices along the one axis `axis_name`, such as
        `[[0, 1], [2, 3]]`. Each group is a batch of its own.
      mask: True, or 1, where a value counts; broadcasts against `x`. Masked entries, even NaN,
        never affect a result or a derivative.

    Returns:
      `Moments` of shape `[C]`, in float32, or in float64 if `x` is float64. A channel without
        values has zeros. They are differentiable with respect to `x`, in forward and reverse mode.

    Raises:
      TypeError: `x` is not real floating point, `axis` is not an int, or `mask` is complex.
      ValueError: `axis` is out of range, `x` has no channels, `mask` does not broadcast to the
        shape of `x`, or `mask` holds values other than 0 and 1 (if it is traced, the results are
        NaN).
      NameError: `axis_name` is not bound.
      NotImplementedError: `axis_index_groups` is given for an axis of `jax.vmap`, or `axis_name` is
        an axis of `jax.vmap` inside `jax.shard_map` with `check_vma=True`.

    Examples:
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
    x, mask = checked_mask(mask, x, axis)
    devices = checked_devices(axis_name, axis_index_groups)
    return unshifted(shifted_moments(x, mask, axis, devices, statistics_dtype(x.dtype)))


def merge_moments(first: Moments, *others: Moments) -> Moments:
    """Computes the moments of the union of disjoint sets from the moments of each set.

        mean = Σ w·mean_i      var = Σ w·(var_i + (mean_i − mean)²)      with  w = n_i / Σ n_i

    Args:
      first: moments with `mean` and `var` of shape `[C]`.
      *others: more moments, of the same shape and dtype. A set with a `count` of 0 changes nothing.

    Returns:
      `Moments` of all samples together, in the dtype of the arguments.

    Raises:
      TypeError: an argument is not Moments, or not real floating point.
      ValueError: the means and variances differ in shape, or are not vectors.

    Examples:
      >>> import jax.numpy as jnp, jaxbn
      >>> x = jnp.array([[1.0], [2.0], [6.0]])
      >>> merged = jaxbn.merge_moments(jaxbn.batch_moments(x[:1]), jaxbn.batch_moments(x[1:]))
      >>> float(merged.mean[0]), round(float(merged.var[0]), 5), float(merged.count)
      (3.0, 4.66667, 3.0)

    References:
      Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
      variances", COMPSTAT 1982.
    """
    sets = tuple(
        checked_moments(moments, f"argument {i}") for i, moments in enumerate((first, *others), 1)
    )
    shapes = {v.shape for moments in sets for v in (moments.mean, moments.var)}
    if len(shapes) > 1:
        raise ValueError(
            "Merged moments must describe the same channels; got vectors of the shapes "
            f"{', '.join(map(str, sorted(shapes)))}."
        )
    union: Moments = _union(sets)
    return union


@jax.jit
def _union(sets: tuple[Moments, ...]) -> Moments:
    counts = jnp.broadcast_arrays(*(moments.count for moments in sets))
    mean, var = (jnp.stack(v) for v in zip(*(moments[:2] for moments in sets), strict=True))
    count = jnp.stack(counts)
    stacked = Shifted(mean, jnp.zeros_like(mean), var, count)
    return unshifted(merged(stacked, added, _of_largest(var, count)))


def _of_largest(var: jax.Array, count: jax.Array) -> jax.Array:
    """The variance of the largest of stacked sets, without gradient."""
    count = count.reshape(count.shape + (1,) * (var.ndim - count.ndim))
    largest = (count == count.max(0, keepdims=True)) & (count > 0) & jnp.isfinite(var)
    of_largest = jnp.where(largest, var, jnp.zeros((), var.dtype)).max(0)
    return jax.lax.stop_gradient(of_largest)


def checked_moments(moments: Moments, name: str) -> Moments:
    """`moments` as arrays: real vectors, and one count for each channel or for all."""
    if not isinstance(moments, Moments):
        raise TypeError(
            f"`{name}` must be Moments of mean, var and count; got {type(moments).__name__}."
        )
    mean, var = (checked_float(getattr(moments, n), f"{name}.{n}") for n in ("mean", "var"))
    count = checked_array(moments.count, f"{name}.count")
    if jnp.issubdtype(count.dtype, jnp.integer):
        count = count.astype(mean.dtype)
    checked = Moments(mean, var, checked_float(count, f"{name}.count"))
    if checked.mean.ndim != 1 or checked.count.shape not in ((), checked.mean.shape):
        raise ValueError(
            f"`{name}` must have a mean and a variance of shape [C], and a count of shape [] or "
            f"[C]; got {mean.shape}, {var.shape} and {checked.count.shape}. For several sets use "
            "jax.vmap."
        )
    return checked


def unshifted(moments: Shifted) -> Moments:
    """Mean, variance and count, as used everywhere outside the normalization itself."""
    return Moments(moments.shift + moments.delta, moments.var, moments.count)
