"""Converts running statistics of Haiku, Equinox and Keras to `BatchStats`, and back.

The functions take and return arrays, tuples and dicts, outside of `jit`. They import none of the
libraries. Inference mode with the converted statistics gives the same output. Statistics in half
precision become float32, exactly, since training keeps them in float32.

Bessel's correction and momentum belong to updates, not to values. With m for the weight of the
**old** statistics, which these libraries call `momentum` or `decay_rate`, `jaxbn.batch_norm`
continues the updates of each library with these arguments:

    Flax, Keras 3, Equinox "ema", ONNX momentum=1 − m,                                unbiased=False
    Keras 2, images                    momentum=1 − m,                                unbiased=True
    Haiku, Equinox "batch"             momentum=(1 − m) / (1 − m**(stats.count + 1)), unbiased=False

Haiku and Equinox's mode "batch" average from zero, and divide by the sum of the weights. Flax needs
no converter: use `BatchStats.from_mapping({**batch_stats, "count": 0})`.

References:
  `haiku.BatchNorm` of dm-haiku 0.0.17, `equinox.nn.BatchNorm` of equinox 0.13.8,
  `keras.layers.BatchNormalization` of keras 3.15.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jaxbn._stats import BatchStats, checked_stats, sum_of_weights


def from_haiku(state: Mapping[str, Any], module: str = "batch_norm") -> BatchStats:
    """Returns the statistics of a `haiku.BatchNorm` for inference mode (`is_training=False`).

        mean = mean_ema.average        var = var_ema.average        count = counter

    The parameters have the layout of the averages, with a 1 for each axis but the channel axis:
    `params[module]["scale"].ravel()` is the scale, and `params[module]["offset"].ravel()` the bias.

    Args:
      state: state that `apply` of `haiku.transform_with_state` returns.
      module: name of the layer in it, such as "resnet/~/batch_norm".

    Returns:
      `BatchStats` of shape `[C]`.

    Raises:
      ValueError: the layer is not in `state`, has seen no batch, or keeps more than one axis.

    Examples:
      >>> import jax.numpy as jnp; from jaxbn import interop
      >>> ema = {"average": jnp.array([[3.0, 4.0]]), "counter": jnp.array(5)}
      >>> interop.from_haiku({"batch_norm/~/mean_ema": ema, "batch_norm/~/var_ema": ema}).mean
      Array([3., 4.], dtype=float32)

    References:
      `haiku.BatchNorm`, `haiku.ExponentialMovingAverage`.
    """
    mean, var = (state[name] for name in _names(state, module))
    if mean["average"].size != max(mean["average"].shape):
        raise ValueError(
            "The averages must have one axis longer than 1, the channel axis; got shape "
            f"{mean['average'].shape}."
        )
    if mean["counter"] != var["counter"] or mean["counter"] < 1:
        raise ValueError(
            "`mean_ema` and `var_ema` must have averaged the same number of batches, at least 1; "
            f"got {mean['counter']} and {var['counter']}. Before the first, use init_batch_stats."
        )
    return _stats([ema["average"].ravel() for ema in (mean, var)], mean["counter"])


def to_haiku(
    stats: BatchStats, state: Mapping[str, Any], module: str = "batch_norm", *, decay_rate: float
) -> dict[str, Any]:
    """Returns a `haiku` state with these statistics in the layer of this name.

        average = mean, var        hidden = average·(1 − decay_rate**count)        counter = count

    Args:
      stats: statistics of shape `[C]`, of at least 1 batch.
      state: a state with the layer, such as `init` returns. It determines the layout.
      module: name of the layer in it.
      decay_rate: decay rate of the layer, in [0, 1).

    Returns:
      A new state, of which `from_haiku` is the inverse. Haiku's own `hidden` is matched up to
        rounding.

    Raises:
      TypeError: `stats` is not BatchStats.
      ValueError: `stats` has no batches or other channels, or the layer is not in `state`.

    Examples:
      >>> import jax.numpy as jnp; from jaxbn import BatchStats, interop
      >>> ema = {"average": jnp.zeros((1, 2)), "hidden": jnp.zeros((1, 2)), "counter": jnp.array(0)}
      >>> state = {"batch_norm/~/mean_ema": ema, "batch_norm/~/var_ema": ema}
      >>> stats = BatchStats(jnp.array([1.0, 2.0]), jnp.array([4.0, 8.0]), jnp.array(1))
      >>> interop.to_haiku(stats, state, decay_rate=0.75)["batch_norm/~/var_ema"]["hidden"]
      Array([[1., 2.]], dtype=float32)

    References:
      `haiku.BatchNorm`, `haiku.ExponentialMovingAverage`.
    """
    stats = checked_stats(stats)
    weights = sum_of_weights(stats, decay_rate)
    if not stats.count:
        raise ValueError("`stats` must have at least 1 batch; got 0. Use stats._replace(count=…).")
    emas: dict[str, Any] = {}
    for name, average in zip(_names(state, module), stats[:2], strict=True):
        shape = state[name]["average"].shape
        if not average.size == max(shape) == state[name]["average"].size:
            raise ValueError(
                f"`stats` must have the channels of {name}, which has shape {shape}; got "
                f"{average.size} channels."
            )
        hidden = (average * weights).reshape(shape)
        emas[name] = {"average": average.reshape(shape), "hidden": hidden, "counter": stats.count}
    return {**state, **emas}


def from_equinox(
    counter: ArrayLike, averages: Sequence[ArrayLike], *, momentum: float | None = None
) -> BatchStats:
    """Returns the statistics of an `equinox.nn.BatchNorm` for inference mode.

        mode="ema"      mean, var = averages                               count = 0: none is kept
        mode="batch"    mean, var = averages / (1 − momentum**counter)     count = counter

    In mode "ema", Equinox normalizes by these statistics in training mode, too. `jaxbn.batch_norm`
    normalizes by those of the batch. In mode "batch", Equinox's variance starts at 1 instead of 0.
    Divided by `1 − momentum**counter`, it is too large for hundreds of batches. It is converted as
    it is. `jaxbn.equinox.BatchNorm` keeps the same state, and has neither fault.

    Args:
      counter: `state.get` of the layer's `ema_first_time_index` or `batch_counter`.
      averages: `state.get` of its `ema_state_index` or `batch_state_index`.
      momentum: momentum of the layer, in [0, 1), in mode "batch"; None in mode "ema".

    Returns:
      `BatchStats` of shape `[C]`.

    Raises:
      ValueError: `momentum` belongs to the other mode, or nothing has been averaged in mode "ema".

    Examples:
      >>> import jax.numpy as jnp; from jaxbn import interop
      >>> hidden = jnp.array([3.0]), jnp.array([1.0])
      >>> interop.from_equinox(jnp.array(1), hidden, momentum=0.75).mean
      Array([12.], dtype=float32)

    References:
      `equinox.nn.BatchNorm`.
    """
    kind = np.asarray(counter).dtype.kind
    if (kind == "b") != (momentum is None):
        raise ValueError(
            '`momentum` must be None in mode "ema", where `counter` is a bool, and that of the '
            f'layer in mode "batch", where it is an integer; got {momentum} beside {counter}.'
        )
    if kind == "b" and counter:
        raise ValueError("Equinox has set no averages before a batch; use init_batch_stats.")
    stats = _stats(averages, 0 if kind == "b" else counter)
    weights = 1 if momentum is None else sum_of_weights(stats, momentum)
    return stats._replace(mean=stats.mean / weights, var=stats.var / weights)


def to_equinox(
    stats: BatchStats, *, momentum: float | None = None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Returns the state of an `equinox.nn.BatchNorm` with these statistics: inverts `from_equinox`.

        mode="ema"      counter = False    averages = mean, var
        mode="batch"    counter = count    averages = (mean, var)·(1 − momentum**count)

    Args:
      stats: statistics of shape `[C]`; in mode "ema" with a count of 0, since no count is kept.
      momentum: momentum of the layer, in [0, 1), in mode "batch"; None in mode "ema".

    Returns:
      `(counter, averages)`, for `state.set` with the indices that `from_equinox` names. In mode
        "batch", the inverse is exact up to rounding.

    Raises:
      TypeError: `stats` is not BatchStats.
      ValueError: the count would be lost, the count is 0 in mode "batch" but the statistics are not
        those of `init_batch_stats`, or `momentum` is out of range.

    Examples:
      >>> import jax.numpy as jnp; from jaxbn import BatchStats, interop
      >>> stats = BatchStats(jnp.array([12.0]), jnp.array([4.0]), jnp.array(1))
      >>> interop.to_equinox(stats, momentum=0.75)[1]
      (Array([3.], dtype=float32), Array([1.], dtype=float32))

    References:
      `equinox.nn.BatchNorm`.
    """
    if momentum is None:
        mean, var, _ = _uncounted(stats, 'Equinox in mode "ema"')
        return jnp.array(False), (mean, var)
    stats = checked_stats(stats)
    weights = sum_of_weights(stats, momentum)
    if not stats.count and ((stats.mean != 0) | (stats.var != 1)).any():
        raise ValueError(
            "`stats` of 0 batches must have mean 0 and variance 1; got other values. Use "
            "stats._replace(count=…)."
        )
    return jnp.array(int(stats.count)), (stats.mean * weights, stats.var * weights)


def from_keras(weights: Sequence[ArrayLike]) -> BatchStats:
    """Returns the statistics of a `keras.layers.BatchNormalization` for inference mode.

        mean, var = the last two weights        count = 0: none is kept

    The weights before them are gamma (`scale`) and beta (`bias`). The default `epsilon` of
    Keras is 1e-3.

    Args:
      weights: `layer.get_weights()`.

    Returns:
      `BatchStats` of shape `[C]`.

    Raises:
      ValueError: there are not 2 to 4 weights (batch renormalization has more), or the shapes
        differ.

    Examples:
      >>> import numpy as np; from jaxbn import interop
      >>> interop.from_keras(np.float32([[1, 1], [0, 0], [2, 3], [4, 5]])).var
      Array([4., 5.], dtype=float32)

    References:
      `keras.layers.BatchNormalization`.
    """
    if not 2 <= len(weights) <= 4:
        raise ValueError(
            "`weights` must be gamma and beta, if there are any, moving_mean and "
            f"moving_variance; got {len(weights)} arrays."
        )
    return _stats(weights[-2:], 0)


def to_keras(stats: BatchStats) -> list[np.ndarray[Any, Any]]:
    """Returns the last two weights of a Keras layer with these statistics.

        moving_mean = mean        moving_variance = var

    Set them with `layer.set_weights([scale, bias, *to_keras(stats)])`.

    Args:
      stats: statistics of shape `[C]`, with a count of 0, since no count is kept.

    Returns:
      `[moving_mean, moving_variance]`, NumPy arrays of shape `[C]`.

    Raises:
      TypeError: `stats` is not BatchStats.
      ValueError: the count is not 0, and would be lost.

    Examples:
      >>> import jax.numpy as jnp; from jaxbn import BatchStats, interop
      >>> interop.to_keras(BatchStats(jnp.array([2.0]), jnp.array([4.0]), jnp.array(0)))
      [array([2.], dtype=float32), array([4.], dtype=float32)]

    References:
      `keras.layers.BatchNormalization`.
    """
    return [np.asarray(vector) for vector in _uncounted(stats, "Keras")[:2]]


def _names(state: Mapping[str, Any], module: str) -> tuple[str, str]:
    """The names of both averages of a layer, which must be in the state."""
    names = f"{module}/~/mean_ema", f"{module}/~/var_ema"
    if not set(names) <= set(state):
        raise ValueError(f"`state` must have {' and '.join(names)}; it has {', '.join(state)}.")
    return names


def _stats(averages: Sequence[ArrayLike], count: ArrayLike) -> BatchStats:
    """Statistics from a mean and a variance, with half precision converted to float32."""
    mean, var = (
        jnp.asarray(vector, jnp.float32)
        if str(getattr(vector, "dtype", None)) in ("bfloat16", "float16")
        else vector
        for vector in averages
    )
    return BatchStats.from_mapping({"mean": mean, "var": var, "count": count})


def _uncounted(stats: BatchStats, library: str) -> BatchStats:
    """`stats`, which must have a count of 0."""
    stats = checked_stats(stats)
    if stats.count:
        raise ValueError(
            f"{library} keeps no count of batches: {stats.count}, that of `stats`, would be lost. "
            "To drop it, pass stats._replace(count=jnp.int32(0))."
        )
    return stats
