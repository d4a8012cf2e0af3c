"""Running statistics: the state of a model, and the only place that knows about momentum."""

import functools
import numbers
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxbn._checks import (
    check_bool,
    check_known_bool,
    check_momentum,
    checked_array,
    checked_epsilon,
)
from jaxbn._core.devices import placed_like
from jaxbn._moments import Moments, checked_moments
from jaxbn._types import Bool, Flag, Integer, Number

Tree = TypeVar("Tree")


class BatchStats(NamedTuple):
    """Running mean and variance of training batches, and the number of these batches.

    Attributes:
      mean: running mean, shape `[C]`, float32 or float64 (torch `running_mean`).
      var: running variance, shape `[C]`, dtype of `mean`; unbiased in torch's convention (torch
        `running_var`).
      count: number of batches, shape `[]`, int32 (torch `num_batches_tracked`).

    Examples:
      >>> import jaxbn
      >>> jaxbn.init_batch_stats(2)
      BatchStats(mean=Array([0., 0.], dtype=float32), var=Array([1., 1.], dtype=float32), \
count=Array(0, dtype=int32))

    References:
      `torch.nn.BatchNorm2d`: `running_mean`, `running_var`, `num_batches_tracked`.
    """

    mean: jax.Array
    var: jax.Array
    count: jax.Array | Integer  # type: ignore[assignment]  # shadows tuple.count, as documented

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, ArrayLike]) -> "BatchStats":
        """Makes statistics from named arrays, such as a checkpoint restored without a target.

        `stats._asdict()` is the inverse.

        Args:
          mapping: `mean` and `var` of shape `[C]`, float32 or float64, and an integer `count`: a
            dict, or an archive that `numpy.load` opens.

        Returns:
          `BatchStats` with the same values; `count` is int32.

        Raises:
          TypeError: an array has another dtype, or is float64 while 64-bit types are disabled in
            JAX.
          ValueError: a name is missing or unknown, or a shape does not fit.

        Examples:
          >>> import jax.numpy as jnp, jaxbn
          >>> saved = {"mean": jnp.zeros(2), "var": jnp.ones(2), "count": 7}
          >>> int(jaxbn.BatchStats.from_mapping(saved).count)
          7
          >>> jaxbn.BatchStats.from_mapping({"running_mean": jnp.zeros(2)})
          Traceback (most recent call last):
          ...
          ValueError: BatchStats has the names mean, var, count; missing: mean, var, count; \
unknown: running_mean. For torch's names use `jaxbn.torch.from_state_dict`.
        """
        _check_names(mapping)
        if not isinstance(mapping["count"], jax.core.Tracer):
            _check_count(mapping["count"])
        stats = cls(*(checked_array(mapping[name], name) for name in cls._fields))
        shapes = [jnp.shape(value) for value in stats]
        if len(shapes[0]) != 1 or shapes != [shapes[0], shapes[0], ()]:
            raise ValueError(
                "`mean` and `var` must be vectors of the same channels, and `count` a scalar; got "
                "the shapes {}, {} and {}.".format(*shapes)
            )
        stats = checked_stats(stats)
        for name in ("mean", "var"):
            given, kept = getattr(mapping[name], "dtype", None), getattr(stats, name).dtype
            if given == jnp.float64 and kept != given:
                raise TypeError(
                    f"`{name}` is float64, which would be rounded to {kept}. Enable 64-bit types "
                    'with jax.config.update("jax_enable_x64", True), or convert it with '
                    ".astype(jnp.float32)."
                )
        dtype = stats.mean.dtype  # an explicit dtype makes weak types strong
        return cls(stats.mean.astype(dtype), stats.var.astype(dtype), jnp.int32(stats.count))


jax.export.register_namedtuple_serialization(BatchStats, serialized_name="jaxbn.BatchStats")


def init_batch_stats(
    num_features: Integer, dtype: DTypeLike = jnp.float32, *, num_domains: Integer | None = None
) -> BatchStats:
    """Makes the running statistics before the first batch.

        mean = 0        var = 1        count = 0

    Args:
      num_features: number of channels, C ≥ 1.
      dtype: float32, or float64 if 64-bit types are enabled.
      num_domains: number k of sets of statistics, for `domain` of `batch_norm`; None for one set.

    Returns:
      `BatchStats` with vectors of shape `[C]`. With domains, mean and var have shape `[k, C]`, and
        count has shape `[k]`.

    Raises:
      TypeError: a number is not an int, or `dtype` is narrower than float32.
      ValueError: a number is less than 1.

    Examples:
      >>> import jaxbn
      >>> jaxbn.init_batch_stats(3).var
      Array([1., 1., 1.], dtype=float32)

    References:
      `torch.nn.BatchNorm2d.reset_running_stats`.
    """
    check_number("num_features", num_features, "channels")
    if num_domains is not None:
        check_number("num_domains", num_domains, "domains")
    stats = BatchStats(
        jnp.zeros(int(num_features), dtype),
        jnp.ones(int(num_features), dtype),
        jnp.zeros((), jnp.int32),
    )
    return stacked(checked_stats(stats), num_domains)


def stacked(tree: Tree, num_domains: Integer | None) -> Tree:
    """A copy of each array for each domain, stacked along a new first axis."""
    if num_domains is None:
        return tree
    copies: Tree = jax.tree.map(lambda v: jnp.tile(v, (int(num_domains), *[1] * v.ndim)), tree)
    return copies


def update_batch_stats(
    stats: BatchStats,
    moments: Moments,
    *,
    momentum: ArrayLike | None = 0.1,
    unbiased: Bool = True,
    skip_nonfinite: Flag = False,
    std_epsilon: Number | None = None,
) -> BatchStats:
    """Updates the running statistics with the moments of one batch.

        count' = count + 1
        mean'  = (1 − momentum)·mean + momentum·moments.mean
        var'   = (1 − momentum)·var  + momentum·moments.var·n/(n − 1)       n = moments.count

    `momentum` is the weight of the **new** batch, as in torch; Flax's `momentum` is one minus it.
    None weights all batches alike: `momentum = 1/count'`, the cumulative average. An empty or fully
    masked batch (n = 0) has no mean, and a single sample has no unbiased variance. The old values
    then stay, and `count` increases anyway. No gradient flows through the result.

    NaN or infinity in a batch makes the statistics of its channel NaN forever, as in torch. With
    `skip_nonfinite`, a channel whose batch mean or variance is not finite keeps its old values. The
    batch counts only if it changes at least one channel.

    Args:
      stats: running statistics, vectors of shape `[C]`.
      moments: moments of the batch, vectors of shape `[C]`.
      momentum: weight of the new batch, in [0, 1]: a number, or a scalar array, traced or not; None
        for the cumulative average.
      unbiased: True to keep the variance divided by n − 1 (torch), False for n (Flax, Keras, ONNX).
      skip_nonfinite: whether a channel keeps its running statistics if the batch has NaN or
        infinity in it; a bool, traced or not.
      std_epsilon: if given, averages the standard deviation `√(var + std_epsilon)` instead of the
        variance, as batch renormalization may; None averages the variance.

    Returns:
      New `BatchStats`, in the dtypes and the device layout of `stats`.

    Raises:
      TypeError: `stats` or `moments` has another type, `stats` is narrower than float32, its count
        is not an integer, `momentum` is not a number, or `skip_nonfinite` is not a bool.
      ValueError: the shapes differ, or `momentum` is a number outside [0, 1].

    Examples:
      >>> import jax.numpy as jnp, jaxbn
      >>> moments = jaxbn.batch_moments(jnp.array([[1.0, 2.0], [3.0, 6.0]]))
      >>> moments.mean, moments.var
      (Array([2., 4.], dtype=float32), Array([1., 4.], dtype=float32))
      >>> stats = jaxbn.update_batch_stats(jaxbn.init_batch_stats(2), moments, momentum=0.5)
      >>> stats.mean, stats.var, int(stats.count)
      (Array([1., 2.], dtype=float32), Array([1.5, 4.5], dtype=float32), 1)

    References:
      `torch.nn.BatchNorm2d`: `running_mean`, `running_var`, `num_batches_tracked`.
    """
    check_momentum(momentum)
    check_bool(skip_nonfinite, "skip_nonfinite")
    check_known_bool(unbiased, "unbiased")
    moments = checked_moments(moments, "moments")
    stats, moments = jax.lax.stop_gradient((checked_stats(stats), moments))
    _check_shapes(stats, moments)
    skip = None if skip_nonfinite is False else skip_nonfinite
    if std_epsilon is not None:
        std_epsilon = checked_epsilon(std_epsilon, stats.mean.dtype, train=False)
    updated: BatchStats = _updated(
        stats, moments, momentum, skip, unbiased=unbiased, std_epsilon=std_epsilon
    )
    return updated


@functools.partial(jax.jit, static_argnames=("unbiased", "std_epsilon"))
def _updated(
    stats: BatchStats,
    moments: Moments,
    momentum: ArrayLike | None,
    skip_nonfinite: Flag | None,
    *,
    unbiased: bool,
    std_epsilon: float | None,
) -> BatchStats:
    dtype, count = stats.mean.dtype, jnp.asarray(stats.count)
    # The count stays at the largest integer, where adding one would overflow.
    counted = count < jnp.array(jnp.iinfo(count.dtype).max, count.dtype)
    kept: jax.Array | None = None  # None where every channel is kept
    if skip_nonfinite is not None:  # `any` needs all channels, on all devices
        finite = jnp.isfinite(moments.mean) & jnp.isfinite(moments.var)
        kept = finite | jnp.logical_not(skip_nonfinite)
        counted &= kept.any()
    count += counted.astype(count.dtype)
    if momentum is None:
        factor = 1 / jnp.maximum(count, 1).astype(dtype)
    else:
        factor = jnp.asarray(momentum, dtype)
    n = moments.count.astype(dtype)
    mean = moments.mean.astype(dtype)
    var = moments.var.astype(dtype)
    if unbiased:
        var = var * (n / jnp.maximum(n - 1, 1))

    def folded(old: jax.Array, new: jax.Array, above: int = 0) -> jax.Array:
        valid = n > above if kept is None else kept & (n > above)
        # Not a `where` of old and new: their channels may be on different devices.
        weight = factor * valid.astype(dtype)
        both = (1 - weight) * old + weight * jnp.where(valid, new, jnp.zeros((), dtype))
        return placed_like(both, old)

    above = int(unbiased)
    new_mean = folded(stats.mean, mean)
    if std_epsilon is None:
        return BatchStats(new_mean, folded(stats.var, var, above), count)
    std = folded(jnp.sqrt(stats.var + std_epsilon), jnp.sqrt(var + std_epsilon), above)
    return BatchStats(new_mean, jnp.maximum(jnp.square(std) - std_epsilon, 0), count)


def sum_of_weights(stats: BatchStats, decay: float) -> jax.Array:
    """`1 − decay**count`, rounded as by Haiku and Equinox in `jit`; 1 before the first batch."""
    if not 0 <= decay < 1:
        raise ValueError(f"The weight of the old statistics must be in [0, 1); got {decay}.")
    one = jnp.ones((), stats.mean.dtype)
    count = jnp.asarray(stats.count, one.dtype)
    weights = one - jnp.power(jnp.asarray(decay, one.dtype), count)
    return jnp.where(stats.count == 0, one, weights)


def checked_stats(stats: BatchStats) -> BatchStats:
    """`stats` as arrays: vectors of one dtype, float32 or float64, and an integer count."""
    if not isinstance(stats, BatchStats):
        raise TypeError(
            "`stats` must be a BatchStats of mean, var and count, or None where none are kept; "
            f"got {type(stats).__name__}."
        )
    if not isinstance(stats.count, jax.Array):
        _check_count(stats.count)
    stats = BatchStats(*(checked_array(v, f"stats.{n}") for n, v in stats._asdict().items()))
    if stats.mean.ndim != 1:
        raise ValueError(
            "Running statistics must be vectors, one number for each channel; got stats.mean of "
            f"shape {stats.mean.shape}. For several sets use jax.vmap."
        )
    for name, vector in (("mean", stats.mean), ("var", stats.var)):
        if vector.dtype not in (jnp.float32, jnp.float64):
            raise TypeError(
                f"Running statistics must be float32 or float64; got stats.{name} of dtype "
                f"{vector.dtype}, in which small updates are lost. Use .astype(jnp.float32)."
            )
    if stats.mean.dtype != stats.var.dtype:
        raise TypeError(
            "Running mean and variance must have the same dtype; "
            f"got {stats.mean.dtype} and {stats.var.dtype}."
        )
    count = jnp.asarray(stats.count)
    if not jnp.issubdtype(count.dtype, jnp.integer):
        raise TypeError(
            "`stats.count` must be an integer array, the number of batches; "
            f"got {count.dtype}. Use .astype(jnp.int32)."
        )
    if count.ndim:
        raise ValueError(
            "`stats.count` must be a scalar, the number of batches of all channels; got shape "
            f"{count.shape}. From replicated statistics, take one: count[0]."
        )
    return stats


def _check_names(mapping: Mapping[str, ArrayLike]) -> None:
    missing = [name for name in BatchStats._fields if name not in mapping]
    unknown = [str(name) for name in mapping if name not in BatchStats._fields]
    hint = ""
    if any(name.endswith(("running_mean", "running_var")) for name in unknown):
        hint = " For torch's names use `jaxbn.torch.from_state_dict`."
    elif missing == ["count"]:
        hint = " Where none was kept, as by Flax, add count=0."
    if missing or unknown:
        raise ValueError(
            f"BatchStats has the names {', '.join(BatchStats._fields)}; "
            f"missing: {', '.join(missing) or 'none'}; "
            f"unknown: {', '.join(unknown) or 'none'}.{hint}"
        )


def check_number(name: str, number: object, what: str) -> None:
    """Refuses anything but an int of at least 1."""
    if not isinstance(number, numbers.Integral) or isinstance(number, bool):
        raise TypeError(f"`{name}` must be an int, the number of {what}; got {number!r}.")
    if number < 1:
        raise ValueError(f"`{name}` must be at least 1; got {number}.")


def _check_count(count: object) -> None:
    """Refuses a count that does not fit into int32. Other checks refuse other types."""
    value = np.asarray(count)
    if value.dtype.kind in "iu" and ((value < 0) | (value > np.iinfo(np.int32).max)).any():
        raise ValueError(
            f"`count` must be from 0 to {np.iinfo(np.int32).max}, as int32 holds it; got {value}."
        )


def _check_shapes(stats: BatchStats, moments: Moments) -> None:
    shapes = [v.shape for v in (stats.mean, stats.var, moments.mean, moments.var)]
    if len(set(shapes)) > 1:
        raise ValueError(
            "Running statistics and moments must describe the same channels; got stats.mean "
            "{}, stats.var {}, moments.mean {}, moments.var {}.".format(*shapes)
        )
