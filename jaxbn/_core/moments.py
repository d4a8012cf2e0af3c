"""Mean and variance of each channel without cancellation, on one device or several."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jaxbn._core.axes import Totals, expand, reduced_axes, totals
from jaxbn._core.compilers import (
    everywhere,
    flattened,
    is_small,
    may_be_spread,
    rounded,
    totals_in_pieces,
    written_out,
)
from jaxbn._core.devices import ALONE, Devices, gathered, names_in, spread, summed

# Number of devices up to which one gather replaces two sums. It waits once, but grows with them.
GATHERED = 16
# Number of entries of a mask that an int32 can count.
COUNTED = 2**31 - 1
# Stands for the first sample, among the parts of a batch.
FIRST = 0


class Shifted(NamedTuple):
    """Moments with the mean `shift + delta`.

    The two stay apart. If the mean is large, adding them would round `delta` away, and
    `x − shift − delta` would no longer be exact.
    """

    shift: jax.Array
    delta: jax.Array
    var: jax.Array
    count: jax.Array  # type: ignore[assignment]  # shadows tuple.count


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4, 5))
def shifted_moments(
    x: jax.Array,
    mask: jax.Array | None,
    axis: int,
    devices: Devices,
    dtype: DTypeLike,
    differentiated: bool = False,
) -> Shifted:
    """Moments of `x` on all devices, in `dtype`; one collective on at most `GATHERED` devices.

    Derivatives need an exact `delta`, since they add up `x − shift − delta` over the whole batch.
    """
    masked, sharding = mask is not None, jax.typeof(x).sharding
    mesh, spec, vector = sharding.mesh, sharding.spec, PartitionSpec(sharding.spec[axis])
    split = names_in(spec[i] for i in reduced_axes(x.ndim, axis))

    def local(x: jax.Array, mask: jax.Array | None) -> Shifted:
        moments = _local_moments(x, mask, axis, dtype, differentiated)
        # In the order of the mesh: every process must compile the same program.
        names = tuple(name for name in mesh.axis_names if name in split)
        return _merged_across(moments, masked, Devices(names))

    if split:  # The type of `x` says how it is split. Each device takes its own part.
        local = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(spec, jax.typeof(mask).sharding.spec if masked else None),
            out_specs=Shifted._make([vector] * 3 + [vector if masked else PartitionSpec()]),
            axis_names=names_in(spec),
        )
    return _merged_across(local(x, mask), masked, devices)


@shifted_moments.defjvp
def _shifted_moments_jvp(
    axis: int,
    devices: Devices,
    dtype: DTypeLike,
    differentiated: bool,
    primals: tuple[jax.Array, jax.Array | None],
    tangents: tuple[jax.Array, object],
) -> tuple[Shifted, Shifted]:
    x, mask = primals
    moments = shifted_moments(x, mask, axis, devices, dtype, True)
    dx = where_valid(mask, tangents[0]).astype(dtype)
    deviation = centered(x, mask, axis, moments.shift)
    mean_dx, mean_product = means((dx, dx * deviation), moments.count, axis, devices)
    covariance = mean_product - moments.delta * mean_dx
    constant = jax.tree.map(jnp.zeros_like, moments)
    return moments, constant._replace(delta=mean_dx, var=2 * covariance)


def _local_moments(
    x: jax.Array, mask: jax.Array | None, axis: int, dtype: DTypeLike, differentiated: bool
) -> Shifted:
    """Moments of one device's part, in the form that suits its size, its dtype and the platform."""
    count = _count(x, mask, axis, dtype)
    about = functools.partial(_about_estimate, axis=axis)
    if is_small(x):
        return about(x, mask, count, parts=(FIRST, 1), totals=totals_by_sample)
    on_a_cpu = functools.partial(about, parts=(16, 4), totals=totals_in_pieces)
    if not differentiated and mask is None and x.dtype.itemsize > 2 and not may_be_spread(x):
        on_a_cpu = functools.partial(_about_zero, axis=axis, otherwise=on_a_cpu)
    elsewhere = functools.partial(about, parts=(_some_sixteenth(x, axis),), totals=totals)
    choose: Callable[..., Shifted] = jax.lax.platform_dependent
    return choose(x, mask, count, cpu=on_a_cpu, default=elsewhere)


def _about_estimate(
    x: jax.Array,
    mask: jax.Array | None,
    count: jax.Array,
    *,
    axis: int,
    parts: tuple[int, ...],
    totals: Totals,
) -> Shifted:
    """Moments about an estimate K of the mean: `E[x − K]` and `E[(x − K)²] − E[x − K]²`.

    K is the mean of the first of the `parts`, and each further part corrects it. With a mask, every
    part consists of all valid entries.
    """
    if mask is None:
        x, axis = flattened(x, axis)

    def mean_of(part: int, shift: jax.Array | None = None) -> jax.Array:
        some = x if mask is not None else _part(x, axis, part)
        some_count = count if mask is not None else _count(some, None, axis, count.dtype)
        if shift is None:
            values = widened(where_valid(mask, some), count.dtype)
        else:
            values = centered(some, mask, axis, shift)
        return rounded(means((values,), some_count, axis, totals=totals)[0])

    (estimate,) = written_out(x, mean_of(parts[0]))
    for part in parts[1:]:
        (estimate,) = written_out(x, rounded(estimate + mean_of(part, estimate)))
    deviation = centered(x, mask, axis, estimate)
    delta, mean_square = means((deviation, jnp.square(deviation)), count, axis, totals=totals)
    # Rounding may leave the variance of a constant channel just below zero.
    var = jnp.maximum(mean_square - jnp.square(delta), 0)
    if parts[-1] == 1:
        return Shifted(estimate, delta, var, count)
    # The mean itself is the better shift from here on.
    (shift,) = written_out(x, rounded(estimate + rounded(delta)))
    return Shifted(shift, (estimate - shift) + delta, var, count)


def _about_zero(
    x: jax.Array, mask: None, count: jax.Array, *, axis: int, otherwise: Callable[..., Shifted]
) -> Shifted:
    """Moments by `E[x²] − E[x]²` if that loses at most two bits, `E[x]² ≤ 3·var`, in all channels.

    If it loses more, or if squares leave the range of floats, `otherwise` computes the moments.
    `delta` is zero, so the mean is rounded.
    """
    wide = x.astype(count.dtype)
    mean, mean_square = means((wide, jnp.square(wide)), count, axis)
    var = mean_square - jnp.square(mean)
    safe = (jnp.square(mean) <= 3 * var) & (var > 1e-25) & (var < 1e25)
    plain = Shifted(mean, spread(jnp.zeros_like(mean), jax.typeof(mean)), var, count)
    moments: Shifted = jax.lax.cond(
        everywhere(safe), lambda x: plain, lambda x: otherwise(x, mask, count), x
    )
    return moments


def merged(
    sets: Shifted, totals: Callable[..., Sequence[jax.Array]], about: jax.Array | None = None
) -> Shifted:
    """Moments of the union of sets; `totals` adds up arrays over the sets.

        shift' ≈ Σ w·(shift + delta)    delta' = Σ w·d    var' = Σ w·(var + d²) − delta'²

    Here `w = count / Σ count` and `d = (shift − shift') + delta`. Nothing cancels: `delta'` is only
    the rounding error of the mean. With `about`, the variance of a large set, variances are summed
    as differences from it. The rounding error of that set's weight, which all channels share and
    which adds up over many merges, then has no effect.
    """
    shift, delta, var, count = sets
    weight = count.reshape(count.shape + (1,) * (shift.ndim - count.ndim))
    total, joint_count = totals(weight * (shift + delta), count)
    divisor = jnp.where(joint_count > 0, joint_count, 1)
    joint = rounded(jax.lax.stop_gradient(total / divisor))
    # An empty set contributes nothing, not even 0 · ∞.
    distance = jnp.where(weight > 0, (shift - _of_rank(shift.ndim, joint)) + delta, 0)
    weight = weight / _of_rank(weight.ndim, divisor)
    var = var if about is None else var - _of_rank(var.ndim, about)
    joint_delta, mean_square = totals(weight * distance, weight * (var + jnp.square(distance)))
    joint_var = mean_square - jnp.square(joint_delta)
    joint_var = joint_var if about is None else about + joint_var
    # Rounding may leave the variance just below zero. The derivative is not clipped.
    joint_var = joint_var + jax.lax.stop_gradient(jnp.maximum(-joint_var, 0))
    return Shifted(joint, joint_delta, joint_var, joint_count)


def _of_rank(ndim: int, array: jax.Array) -> jax.Array:
    """`array` with leading axes of size 1, up to `ndim` dimensions."""
    return jnp.expand_dims(array, range(ndim - array.ndim))


def added(*stacks: jax.Array) -> list[jax.Array]:
    """The totals over sets that are stacked along the first axis of each array."""
    return [stack.sum(0) for stack in stacks]


def _merged_across(local: Shifted, masked: bool, devices: Devices) -> Shifted:
    """The moments of all devices: gathered from a few in one step, summed twice over many."""
    if not devices.names:
        return local
    if devices.size > GATHERED and devices.groups is None:
        vectors = local._replace(count=jnp.broadcast_to(local.count, local.var.shape))
        moments = merged(vectors, lambda *v: list(summed(jnp.stack(v), devices)))
        return moments if masked else moments._replace(count=local.count * devices.size)
    # Without a mask all devices have the same count, so it need not be sent.
    stacked = gathered(jnp.stack(local if masked else local[:3]), devices)
    counts = () if masked else (jnp.broadcast_to(local.count, (devices.size,)),)
    return merged(Shifted(*jnp.moveaxis(stacked, 1, 0), *counts), added)


def totals_by_sample(arrays: Sequence[jax.Array], axis: int) -> list[jax.Array]:
    """`totals`, with each sample first. Compilers add small arrays one by one: errors add up."""
    positions = reduced_axes(arrays[0].ndim, axis)[1:]
    if positions:
        arrays = [rounded(x.sum(positions, keepdims=True)) for x in arrays]
    return totals(arrays, axis)


def means(
    arrays: Sequence[jax.Array],
    count: jax.Array,
    axis: int,
    devices: Devices = ALONE,
    totals: Totals = totals,
) -> tuple[jax.Array, ...]:
    """The total of each array on all devices, divided by `count`; zero if the count is zero."""
    sums = totals(arrays, axis)
    if devices.names:
        sums = list(summed(jnp.stack(sums), devices))
    divisor = jnp.maximum(count, 1)
    return tuple(value / divisor for value in sums)


def centered(x: jax.Array, mask: jax.Array | None, axis: int, shift: jax.Array) -> jax.Array:
    """`x − shift` in the dtype of the shift; zero where masked.

    Masked entries are replaced before any arithmetic, so that NaN in them raises no alarm.
    """
    wide = widened(where_valid(mask, x), shift.dtype)
    return where_valid(mask, wide - expand(shift, jax.typeof(x), axis))


def widened(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`x` in a wider dtype, with its rounding to bfloat16 preserved.

    XLA may drop a rounding to bfloat16 and back. In a scan it would do so in the forward pass,
    while the backward pass reads rounded values. For float16 the errors are an eighth as large, and
    the rounding would take a CPU twice the time.
    """
    wide = x.astype(dtype)
    if x.dtype != jnp.bfloat16:
        return wide
    info = jnp.finfo(jnp.bfloat16)
    return jax.lax.reduce_precision(wide, info.nexp, info.nmant)


def where_valid(mask: jax.Array | None, x: jax.Array) -> jax.Array:
    """`x`, with zeros where masked."""
    return x if mask is None else jnp.where(mask, x, jnp.zeros((), x.dtype))


def _count(x: jax.Array, mask: jax.Array | None, axis: int, dtype: DTypeLike) -> jax.Array:
    """Number of values of each channel; `[C]` with a mask, counted before it is broadcast."""
    if mask is None:
        return jnp.asarray(x.size // x.shape[axis], dtype)
    axes = reduced_axes(x.ndim, axis)
    repeats = _size(x, [i for i in axes if mask.shape[i] == 1 != x.shape[i]])
    # An int32 holds the count of one sample, if not of all samples.
    first = axes[:1] if isinstance(mask.size, int) and mask.size > COUNTED else ()
    count = mask.sum([i for i in axes if i not in first], dtype=jnp.int32, keepdims=True)
    count = count.astype(dtype).sum(axes) * jnp.asarray(repeats, dtype)
    return jnp.broadcast_to(count, (x.shape[axis],))


def _part(x: jax.Array, axis: int, part: int) -> jax.Array:
    """A `part`-th of each channel's values, or a few more; the first sample for `FIRST`.

    The mean K of a fraction f satisfies (E[x] − K)² ≤ Var[x]·(1 − f)/f for any data. E[(x − K)²] is
    then at most 1/f times the variance. This costs two bits for f = 1/4, and four for f = 1/16. A
    batch that is split over devices stays in place: the part consists of the middle positions of
    every sample, or of samples at equal distances if samples have too few positions.
    """
    if part == 1 or x.ndim == 1 or x.size == 0:
        return x
    samples, *positions = reduced_axes(x.ndim, axis)
    if part == FIRST:
        return jax.lax.slice_in_dim(x, 0, 1, axis=samples)
    if not positions or x.shape[positions[0]] < part:
        return jax.lax.slice_in_dim(x, 0, None, part, axis=samples)
    size = x.shape[positions[0]]
    number = -(-size // part)
    start = (size - number) // 2
    return jax.lax.slice_in_dim(x, start, start + number, axis=positions[0])


def _some_sixteenth(x: jax.Array, axis: int) -> int:
    """16, or less if that makes the sum of a part fast on a GPU.

    XLA:GPU adds up to 4096 values of a channel one after the other in one block of threads. It
    spreads larger sums over the whole chip (`ReductionDimensionRaceFreeBound`).
    """
    if x.ndim == 1:
        return 16
    values = x.size // x.shape[axis]
    positions = values // x.shape[reduced_axes(x.ndim, axis)[0]]
    return values // 4097 if positions >= 16 and 1024 < values // 16 <= 4096 else 16


def _size(x: jax.Array, axes: Sequence[int]) -> int:
    """Number of values along the axes."""
    return math.prod(x.shape[i] for i in axes)
