"""Batch renormalization: a correction of scale and bias toward the running statistics.

    r = clip(σ_batch / σ, 1/r_max, r_max)        d = clip((mean_batch − mean) / σ, −d_max, d_max)
    x̂·r + d  replaces  x̂, so  scale·r  replaces scale and  bias + scale·d  replaces bias

Here `σ = √(var + epsilon)`. No gradient flows through r and d.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxbn._core.moments import Shifted


class Limits(NamedTuple):
    """The running statistics of each channel, and the limits of the correction toward them."""

    mean: jax.Array
    rstd: jax.Array
    r_max: jax.Array
    d_max: jax.Array


Correction = tuple[jax.Array, jax.Array]


def correction(limits: Limits | None, moments: Shifted, rstd: jax.Array) -> Correction | None:
    """The factor r and the shift d for a batch with these moments."""
    if limits is None:
        return None
    distance = (moments.shift - limits.mean) + moments.delta
    r = jnp.clip(limits.rstd / rstd, 1 / limits.r_max, limits.r_max)
    d = jnp.clip(distance * limits.rstd, -limits.d_max, limits.d_max)
    # Without a correction, running statistics that are NaN have no effect.
    r, d = jnp.where(limits.r_max == 1, 1, r), jnp.where(limits.d_max == 0, 0, d)
    return jax.lax.stop_gradient((r, d))


def corrected(
    scale: jax.Array, bias: jax.Array, correction: Correction | None
) -> tuple[jax.Array, jax.Array]:
    """Scale and bias, or their tangents, after the correction."""
    if correction is None:
        return scale, bias
    r, d = correction
    return scale * r, bias + scale * d
