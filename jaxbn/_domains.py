"""Several sets of running statistics, one of which is chosen for each batch or each sample."""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbn._activation import Activation, after, is_own
from jaxbn._checks import (
    checked_array,
    checked_dtype,
    checked_input,
    checked_mask,
    checked_residual,
    statistics_dtype,
)
from jaxbn._core.axes import reduced_axes
from jaxbn._core.devices import checked_devices, summed
from jaxbn._core.moments import where_valid
from jaxbn._stats import BatchStats
from jaxbn._types import Flag

# Batch norm of one domain: `(x, stats, scale, bias, update_stats=…, **options) -> (y, stats)`.
Run = Callable[..., tuple[jax.Array, BatchStats]]
Vectors = tuple[ArrayLike | None, ArrayLike | None]


def by_domain(
    run: Run,
    x: ArrayLike,
    stats: BatchStats | None,
    vectors: Vectors,
    domain: ArrayLike,
    update_stats: Flag,
    options: dict[str, Any],
    by_moments: bool,
) -> tuple[jax.Array, BatchStats]:
    """Batch norm with the statistics of a domain, and with its own scale and bias, if any.

    The output is NaN for a domain that does not exist. Without `by_moments`, in inference mode, no
    device axis needs to be bound.
    """
    x, axis = checked_input(x, options["axis"])
    x, mask = checked_mask(options["mask"], x, axis)
    options = options | {"axis": axis, "mask": mask}
    stats = _checked_stack(stats, vectors)
    number = len(stats.mean)
    domain = _checked_domain(domain, number, x, axis)
    valid = (domain >= 0) & (domain < number)
    if domain.ndim:
        y, stats = _of_samples(run, x, stats, vectors, domain, update_stats, options, by_moments)
    else:
        index = jnp.clip(domain, 0, number - 1)
        if by_moments:
            valid &= _shared(domain, options)
        update = jnp.logical_and(update_stats, valid) if by_moments else False
        y, new = run(x, *_chosen(index, stats, vectors), update_stats=update, **options)
        stats = jax.tree.map(lambda old, one: old.at[index].set(one), stats, new)
    missing = where_valid(mask, _along_samples(~valid, x, axis))
    return jnp.where(missing, jnp.array(jnp.nan, y.dtype), y), stats


def _shared(domain: jax.Array, options: dict[str, Any]) -> jax.Array | bool:
    """Whether all devices of a batch name the same domain: equal numbers have variance zero."""
    devices = checked_devices(options["axis_name"], options["axis_index_groups"])
    if not devices.names:
        return True
    number = domain.astype(jnp.int32)
    total, squares = summed(jnp.stack([number, number * number]), devices)
    same: jax.Array = total * total == devices.size * squares
    return same


def _of_samples(
    run: Run,
    x: jax.Array,
    stats: BatchStats,
    vectors: Vectors,
    domain: jax.Array,
    update_stats: Flag,
    options: dict[str, Any],
    by_moments: bool,
) -> tuple[jax.Array, BatchStats]:
    """Runs each domain with all other samples masked, and adds up the outputs."""
    axis, mask, number = options["axis"], options["mask"], len(stats.mean)
    own, dtype = options["activation"], checked_dtype(options["dtype"], x)
    if is_own(own):  # sees the whole batch
        residual = checked_residual(options["residual"], x, dtype)
        wide = statistics_dtype(x.dtype, dtype)
        residual = None if residual is None else residual.astype(wide)
        options = options | {"activation": None, "dtype": wide, "residual": residual}
    inside = [_along_samples(domain == i, x, axis) for i in range(number)]
    inside = [here if mask is None else here & mask for here in inside]
    present = _present(inside, stats, options) if by_moments else [False] * number
    outcomes = [
        run(
            x,
            *_chosen(i, stats, vectors),
            update_stats=jnp.logical_and(update_stats, present[i]) if by_moments else False,
            **options | {"mask": inside[i]},
        )
        for i in range(number)
    ]
    y = functools.reduce(jnp.add, (y for y, _ in outcomes))
    if is_own(own):
        y = after(cast(Activation, own), y, mask, dtype)
    return y, jax.tree.map(lambda *v: jnp.stack(v), *(new for _, new in outcomes))


def _present(inside: list[jax.Array], stats: BatchStats, options: dict[str, Any]) -> jax.Array:
    """Whether each domain has values, on any device."""
    values = jnp.stack([here.any() for here in inside]).astype(stats.mean.dtype)
    devices = checked_devices(options["axis_name"], options["axis_index_groups"])
    return (summed(values, devices) if devices.names else values) > 0


def _along_samples(value: jax.Array, x: jax.Array, axis: int) -> jax.Array:
    """One number for each sample, or one for all, shaped to broadcast against `x`."""
    others = reduced_axes(x.ndim, axis)[1:] if value.ndim else reduced_axes(x.ndim, axis)
    return jnp.expand_dims(value, sorted((*others, axis)))


def _chosen(
    index: int | jax.Array, stats: BatchStats, vectors: Vectors
) -> tuple[BatchStats, ArrayLike | None, ArrayLike | None]:
    """The statistics of one domain, and its scale and bias, own or shared."""
    scale, bias = (v if v is None or jnp.ndim(v) == 1 else jnp.asarray(v)[index] for v in vectors)
    return jax.tree.map(lambda v: v[index], stats), scale, bias


def _checked_stack(stats: BatchStats | None, vectors: Vectors) -> BatchStats:
    """The statistics of k domains. Scale and bias must be stacked in the same way, or shared."""
    shapes = [] if stats is None else [jnp.shape(v) for v in stats]
    if stats is None or len(shapes[0]) != 2 or shapes != [shapes[0], shapes[0], shapes[0][:1]]:
        raise ValueError(
            "With `domain`, `stats` must be BatchStats of k domains, mean and var of shape [k, C] "
            "and count of shape [k], as `init_batch_stats(C, num_domains=k)` makes them; got "
            f"{' and '.join(map(str, shapes)) or 'None'}."
        )
    for name, vector in zip(("scale", "bias"), vectors, strict=True):
        shape = () if vector is None else jnp.shape(vector)
        if vector is not None and len(shape) != 1 and shape != shapes[0]:
            raise ValueError(
                f"With `domain`, `{name}` must have shape [C], shared, or [k, C]; got {shape} for "
                f"stats.mean of shape {shapes[0]}."
            )
    arrays: BatchStats = jax.tree.map(jnp.asarray, stats)
    return arrays


def _checked_domain(domain: ArrayLike, number: int, x: jax.Array, axis: int) -> jax.Array:
    """One index, or one for each sample, as an array. Known indices must be in range."""
    indices = checked_array(domain, "domain")
    samples = tuple(x.shape[i] for i in reduced_axes(x.ndim, axis)[:1])
    if not jnp.issubdtype(indices.dtype, jnp.integer) or indices.shape not in ((), samples):
        raise ValueError(
            "`domain` must be an integer, or one for each sample, of shape "
            f"{samples}; got {indices.dtype} of shape {indices.shape}."
        )
    known = not isinstance(domain, jax.Array)
    if known and not ((np.asarray(domain) >= 0) & (np.asarray(domain) < number)).all():
        raise ValueError(f"`domain` must be from 0 to {number - 1}; got {domain}.")
    return indices
