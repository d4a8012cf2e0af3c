"""A report of the batch norms of a model: moments of batches against running statistics."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxbn._diagnosis.layers import TINY, Array, Known, Layer, Settings, gathered

DEAD_BELOW = 4.0  # standard deviations below zero: one in 30,000 normal values is positive
CONSTANT = 1e-6  # a standard deviation below this part of the mean is a float32 rounding error


class LayerReport(NamedTuple):
    """The report of one batch norm. All drifts are NaN for a layer that no batch reached.

    In the formulas, m and v are the running mean and variance of a channel, m' and v' are the mean
    and variance of the batches, and E averages over the channels with finite statistics.

    Attributes:
      channels: number of channels.
      batches: number of batches in the running statistics; None if it is not kept.
      mean_drift: distance between running and batch means, in standard deviations of the batch:
        `√E[(m − m')²/(v' + epsilon)]`.
      var_drift: distance between running and batch variances, as a factor:
        `exp √E[ln²((v + epsilon)/(v' + epsilon))]`. 1 means no drift.
      worst: largest drift of the mean of a channel: `max |m − m'|/√(v' + epsilon)`.
      dead: number of channels that are constant, or that scale and bias put more than four standard
        deviations below zero, where ReLU passes nothing.
      offset: largest `|mean|/std` of a channel. `E[x²] − E[x]²` loses digits if it is large.
      below_epsilon: part of the channels whose batch variance is below epsilon.
      non_finite: number of channels with NaN, infinity or a negative variance in their running
        statistics or in the moments of the batch.
      never_updated: whether the running statistics are those before the first batch.

    Examples:
      >>> import jax.numpy as jnp, jaxbn
      >>> moments = jaxbn.batch_moments(jnp.array([[1.0, 5.0], [3.0, 9.0]]))
      >>> layer = jaxbn.report(jaxbn.init_batch_stats(2), moments)[""]
      >>> layer.channels, layer.batches, round(layer.worst, 2)
      (2, 0, 3.5)
    """

    channels: int
    batches: int | None
    mean_drift: float
    var_drift: float
    worst: float
    dead: int
    offset: float
    below_epsilon: float
    non_finite: int
    never_updated: bool


class Report(dict[str, LayerReport]):
    """A dict with a `LayerReport` for each path; `str` makes a table of it.

    Examples:
      >>> import jax.numpy as jnp, jaxbn
      >>> moments = jaxbn.batch_moments(jnp.array([[1.0, 5.0], [3.0, 9.0]]))
      >>> report = jaxbn.report(jaxbn.init_batch_stats(2), moments)
      >>> report[""].channels, "never updated" in str(report)
      (2, True)
    """

    def __str__(self) -> str:
        """The table, with a line for each layer."""
        heads = ("layer", "channels", "batches", "mean drift", "var drift", "worst", "dead")
        rows: list[tuple[str, ...]] = [(*heads, "|mean|/std", "var < eps", "not finite", "")]
        rows += [(path or "the layer", *_cells(layer)) for path, layer in self.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(_line(row, widths).rstrip() for row in rows)


def _cells(layer: LayerReport) -> tuple[str, ...]:
    return (
        f"{layer.channels}",
        "-" if layer.batches is None else f"{layer.batches}",
        f"{layer.mean_drift:.3g} std",
        f"×{layer.var_drift:.3g}",
        f"{layer.worst:.3g} std",
        f"{layer.dead}",
        f"{layer.offset:.3g}",
        f"{layer.below_epsilon:.0%}",
        f"{layer.non_finite}",
        "never updated" if layer.never_updated else "",
    )


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    first, *others = row
    numbers = [f"{cell:>{width}}" for cell, width in zip(others[:-1], widths[1:], strict=False)]
    return "  ".join([f"{first:<{widths[0]}}", *numbers, others[-1]])


def report(
    variables: Any, batches: Any, *, settings: Settings | Mapping[str, Settings] | None = None
) -> Report:
    """Compares the running statistics of each batch norm with the moments of batches.

    Args:
      variables: `BatchStats`, a tree of them, or nested dicts with `mean` and `var`, such as the
        collection `batch_stats`; or a dict with the collections `params` and `batch_stats`.
      batches: moments of the same layers for a batch in training mode: `Moments` with the nesting
        of the statistics, or dicts with `mean`, `var` and `count`. Give a list for several batches.
      settings: `Settings` of all layers, or of each layer by path.

    Returns:
      A `Report`: for each path a `LayerReport` of plain numbers.

    Raises:
      ValueError: there are no statistics, or the moments belong to other layers or channels.

    Examples:
      >>> import jax.numpy as jnp, jaxbn
      >>> stats = {"norm": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}
      >>> x = jnp.array([[1.0, 5.0], [3.0, 5.0]])
      >>> report = jaxbn.report(stats, {"norm": jaxbn.batch_moments(x)})
      >>> report["norm"].never_updated, report["norm"].dead
      (True, 1)

    References:
      Ioffe and Szegedy, "Batch normalization", ICML 2015, section 3.1.
    """
    layers = gathered(variables, batches, settings=settings)
    return Report({layer.path: reported(layer) for layer in layers})


def reported(layer: Layer) -> LayerReport:
    """The numbers of one layer."""
    running, batch = layer.running, layer.training
    epsilon = layer.settings.epsilon
    good = running.finite if batch is None else running.finite & batch.finite
    channels = len(running.mean)
    if batch is None or not good.any():
        drifts = (np.nan,) * 3
    else:
        means = (running.mean - batch.mean)[good] / np.sqrt(
            np.maximum(batch.var[good], 0) + epsilon
        )
        variances = np.log(running.var[good] + epsilon + TINY) - np.log(
            batch.var[good] + epsilon + TINY
        )
        drifts = (_rms(means), float(np.exp(_rms(variances))), float(np.abs(means).max()))
    seen = running if batch is None else batch
    deviation = np.sqrt(np.maximum(seen.var[seen.finite], TINY))
    return LayerReport(
        channels,
        None if running.count is None else int(running.count),
        *drifts,
        int(dead_channels(layer, seen).sum()),
        float((np.abs(seen.mean[seen.finite]) / deviation).max(initial=0.0)),
        float(np.mean(seen.var < epsilon)),
        int(np.sum(~good)),
        is_initial(running),
    )


def dead_channels(layer: Layer, seen: Known) -> Any:
    """Where a channel is constant, or below zero for all but the rarest values."""
    dead = np.sqrt(np.maximum(seen.var, 0)) <= CONSTANT * np.abs(seen.mean)
    if layer.bias is not None:
        scale = 1.0 if layer.scale is None else np.abs(layer.scale)
        dead |= layer.bias + DEAD_BELOW * scale < 0
    return dead


def is_initial(running: Known) -> bool:
    """Whether running statistics are those before the first batch."""
    return bool((running.mean == 0).all() and (running.var == 1).all())


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
