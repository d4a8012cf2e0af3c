"""Batch renormalization: how far a batch is corrected toward the running statistics."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxbn._checks import check_known_bool, checked_array, checked_vector
from jaxbn._core.renorm import Limits
from jaxbn._stats import BatchStats, checked_stats

LEAST = {"r_max": 1, "d_max": 0}
Limit = ArrayLike | Callable[[jax.Array], ArrayLike]


@dataclasses.dataclass(frozen=True)
class Renorm:
    """Batch renormalization: corrects training batches toward the running statistics.

        y = (x̂·r + d) · scale + bias        x̂ = (x − E[x]) / √(Var[x] + epsilon)
        r = clip(√(Var[x] + epsilon) / σ, 1/r_max, r_max)
        d = clip((E[x] − mean) / σ, −d_max, d_max)        σ = √(var + epsilon)

    `mean` and `var` are the running statistics before this batch. No gradient flows through r and
    d. Within the limits, `y` equals the output in inference mode, so small or unusual batches do
    less harm. `r_max=1` and `d_max=0` give batch norm.

    The running statistics of an untrained network mean nothing, so let the limits grow. The paper
    takes r_max = 1 and d_max = 0 for 5,000 steps, and then raises them to 3 and 5.

    Args:
      r_max: limit of r, at least 1: a number, a scalar array, or a function of `BatchStats.count`,
        the number of batches before this one, such as a schedule of optax. Infinity sets no limit.
      d_max: limit of d, at least 0, in the same forms.
      average_std: whether the running variance averages the standard deviations `√(var + epsilon)`
        of the batches, as in the paper and in Keras. False averages variances.

    Raises:
      TypeError: a limit is neither a number nor a function, or `average_std` is not a bool.
      ValueError: a limit is out of range (if it is traced, the results are NaN).

    Examples:
      >>> import jax.numpy as jnp, jaxbn
      >>> stats = jaxbn.BatchStats(jnp.array([1.0]), jnp.array([4.0]), 9)
      >>> x = jnp.array([[1.0], [5.0]])
      >>> renorm = jaxbn.Renorm(r_max=3.0, d_max=5.0)
      >>> y, _ = jaxbn.batch_norm(x, stats, train=True, renorm=renorm)
      >>> bool(jnp.allclose(y, jaxbn.normalize(x, stats.mean, stats.var), atol=1e-6))
      True

    References:
      Ioffe, "Batch Renormalization", 2017, https://arxiv.org/abs/1702.03275;
      `keras.layers.BatchNormalization(renorm=True)`.
    """

    r_max: Limit = 3.0
    d_max: Limit = 5.0
    average_std: bool = False

    def __post_init__(self) -> None:
        check_known_bool(self.average_std, "average_std")
        for name, least in LEAST.items():
            limit = getattr(self, name)
            if not callable(limit):
                _checked_limit(limit, name, least)

    @property
    def is_scheduled(self) -> bool:
        """Whether a limit depends on the number of batches."""
        return callable(self.r_max) or callable(self.d_max)


def _checked_limit(limit: ArrayLike, name: str, least: int) -> jax.Array:
    """A real number as an array. A value that is known must be in range."""
    if isinstance(limit, bool | np.bool_ | str) or limit is None:
        raise TypeError(f"`{name}` must be a number or a function of the count; got {limit!r}.")
    array = checked_array(limit, name)
    if array.ndim or jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ValueError(
            f"`{name}` must be a real number, the same for all channels; got {array.dtype} of "
            f"shape {array.shape}."
        )
    if not isinstance(limit, jax.core.Tracer) and not np.asarray(limit) >= least:
        raise ValueError(f"`{name}` must be at least {least}; got {limit}.")
    return array


def check_renorm(renorm: object) -> None:
    """Refuses anything but a `Renorm` or None."""
    if renorm is not None and not isinstance(renorm, Renorm):
        raise TypeError(f"`renorm` must be a jaxbn.Renorm or None; got {type(renorm).__name__}.")


def limits(
    renorm: Renorm | None,
    stats: BatchStats | None,
    x: jax.Array,
    axis: int,
    epsilon: float,
    dtype: DTypeLike,
) -> Limits | None:
    """The running statistics and the limits of the correction, in `dtype`."""
    check_renorm(renorm)
    if renorm is None:
        return None
    if stats is None:
        raise ValueError("`renorm` needs running statistics; got stats=None. Pass `stats`.")
    stats = jax.lax.stop_gradient(checked_stats(stats))
    mean = checked_vector(stats.mean, "stats.mean", x, axis)
    var = checked_vector(stats.var, "stats.var", x, axis)
    count = jnp.asarray(stats.count)

    def value(name: str) -> jax.Array:
        limit = getattr(renorm, name)
        limit = _checked_limit(limit(count) if callable(limit) else limit, name, LEAST[name])
        limit = limit.astype(dtype)
        return jnp.where(limit >= LEAST[name], limit, jnp.nan)

    # A negative variance gives NaN, as in inference mode.
    rstd = jax.lax.rsqrt(jnp.where(var < 0, jnp.nan, var).astype(dtype) + epsilon)
    return Limits(mean.astype(dtype), rstd, value("r_max"), value("d_max"))
