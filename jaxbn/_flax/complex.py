"""Batch norm of complex numbers, composed from their real and imaginary parts.

    y = (x − E[x]) · scale / √(Var[x] + epsilon) + bias        Var[x] = E[|x − E[x]|²]

The variance is real.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxbn._checks import check_values_per_channel, checked_mask
from jaxbn._core.axes import reduced_axes
from jaxbn._core.devices import AxisIndexGroups, AxisName, checked_devices
from jaxbn._moments import Moments, batch_moments
from jaxbn._normalize import normalize
from jaxbn._stats import BatchStats, update_batch_stats
from jaxbn._types import Flag, Number


def complex_moments(x: jax.Array, **options: Any) -> Moments:
    """The complex mean of `x`, its real variance, and the number of its values."""
    real, imag = (batch_moments(part, **options) for part in (x.real, x.imag))
    return Moments(jax.lax.complex(real.mean, imag.mean), real.var + imag.var, real.count)


def complex_normalize(
    x: jax.Array,
    mean: jax.Array,
    var: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    axis: int,
    epsilon: Number,
    dtype: DTypeLike,
    mask: ArrayLike | None,
) -> jax.Array:
    """`normalize` for a complex `x`; scale and bias may be complex."""
    x, mask = checked_mask(mask, x, axis % x.ndim)
    real, imag = (
        normalize(part, by, var, axis=axis, epsilon=epsilon, mask=mask)
        for part, by in ((x.real, mean.real), (x.imag, mean.imag))
    )
    y = jax.lax.complex(real, imag).astype(dtype)
    others = reduced_axes(x.ndim, axis % x.ndim)
    if scale is not None:
        y = y * jnp.expand_dims(scale.astype(dtype), others)
    if bias is not None:
        y = y + jnp.expand_dims(bias.astype(dtype), others)
    return y if mask is None else jnp.where(mask, y, jnp.zeros((), dtype))


def complex_batch_norm(
    x: jax.Array,
    stats: BatchStats,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    train: Any,
    momentum: ArrayLike,
    unbiased: bool,
    axis_name: AxisName,
    axis_index_groups: AxisIndexGroups,
    skip_nonfinite: Flag,
    **fixed: Any,
) -> tuple[jax.Array, BatchStats]:
    """`batch_norm` for a complex `x`. The running mean is complex from the first batch on."""
    if train is False:
        return complex_normalize(x, stats.mean, stats.var, scale, bias, **fixed), stats
    axis, mask = fixed["axis"], fixed["mask"]
    check_values_per_channel(x, axis, checked_devices(axis_name, axis_index_groups))
    moments = complex_moments(
        x, axis=axis, mask=mask, axis_name=axis_name, axis_index_groups=axis_index_groups
    )
    real, imag = (
        update_batch_stats(
            stats._replace(mean=part(stats.mean)),
            moments._replace(mean=part(moments.mean)),
            momentum=momentum,
            unbiased=unbiased,
            skip_nonfinite=skip_nonfinite,
        )
        for part in (jnp.real, jnp.imag)
    )
    updated = real._replace(mean=jax.lax.complex(real.mean, imag.mean))
    old = stats._replace(mean=stats.mean.astype(updated.mean.dtype))
    mean, var = (
        jnp.where(train, new, running)
        for new, running in ((moments.mean, old.mean), (moments.var, old.var))
    )
    stats = jax.tree.map(lambda new, kept: jnp.where(train, new, kept), updated, old)
    return complex_normalize(x, mean, var, scale, bias, **fixed), stats
