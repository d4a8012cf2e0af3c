"""Diagnosis of the batch norms of a trained network."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from batches import Batch, Feed, batch_at, plan
from jax.sharding import PartitionSpec
from model import Layers, norm_layers
from records import Epoch, mean_drift, var_drift
from rich.table import Table
from steps import REPLICATED, Variables

from jaxbn import Explanation
from jaxbn.linen import explain_gap

LOOKED_AT = 1024  # images
BATCHES = 6  # of each data set, for an explanation


class Layer(NamedTuple):
    """One batch norm.

    Attributes:
      name: its path in the network.
      channels: the number of channels.
      mean_drift: from running to batch means: `√E[(m' − m)²/v']`.
      var_drift: from running to batch variances: `√E[(v'/v − 1)²]`.
      dead: the number of channels that the ReLU sets to zero for every image.
      offset: the largest |mean|/std of a channel; `E[x²] − E[x]²` loses digits if it is large.
    """

    name: str
    channels: int
    mean_drift: float
    var_drift: float
    dead: int
    offset: float


@functools.partial(jax.jit, static_argnames="model", out_shardings=REPLICATED)
def _batch_statistics(variables: Variables, batches: Any, pool: Any, *, model: Layers) -> Any:
    """The statistics of a batch, and the channels that are not dead, by block."""
    batch: Batch = batch_at(jax.tree.map(lambda leaf: leaf[0], batches), pool)
    mask = batch.mask[:, None, None, None]
    whole = dataclasses.replace(model.norm, momentum=1.0)  # keeps nothing of the old ones
    _, updates = model.clone(norm=whole).apply(
        variables, batch.images, mask=mask, train=True, mutable=["batch_stats", "intermediates"]
    )
    alive = {name: block["alive"][0] for name, block in updates["intermediates"].items()}
    return updates["batch_stats"], alive


def inspected(model: Layers, variables: Variables, feed: Feed, multiple: int) -> list[Layer]:
    """The batch norms of the network, on one batch of the first images of a set."""
    images = min(LOOKED_AT, len(feed.images))
    batches = feed.batches(plan(np.arange(images), [images], multiple))
    batch_stats, alive = jax.device_get(
        _batch_statistics(variables, batches, feed.pool, model=model)
    )
    running = dict(norm_layers(jax.device_get(variables["batch_stats"])))
    return [
        Layer(
            name,
            len(stats["mean"]),
            mean_drift(running[name], stats),
            var_drift(running[name], stats),
            int(np.sum(~alive[name.partition("/")[0]])),
            float(np.max(np.abs(stats["mean"]) / np.sqrt(np.maximum(stats["var"], 1e-30)))),
        )
        for name, stats in norm_layers(batch_stats)
    ]


def layer_table(layers: list[Layer], images: int) -> Table:
    """The layers as a table."""
    table = Table(title=f"batch norm over {images} training images, against running statistics")
    for heading in ("layer", "channels", "mean drift", "variance drift", "dead", "|mean|/std"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for layer in layers:
        drifts = f"{layer.mean_drift:.3f} std", f"{layer.var_drift:.1%}"
        numbers = f"{layer.channels}", *drifts, f"{layer.dead}", f"{layer.offset:.1f}"
        table.add_row(layer.name.partition("/")[0], *numbers)
    return table


def explanation(
    model: Layers,
    variables: Variables,
    feeds: tuple[Feed, Feed],
    rows: int,
    multiple: int,
    scores: tuple[float, float],
) -> Explanation:
    """Why inference mode differs from training mode, by batches of training and test set."""

    def apply(variables: Variables, batch: Any, train: bool, mutable: list[str]) -> Any:
        images, _, mask = batch_at(*batch)
        mask = mask[:, None, None, None]
        outputs, new = model.apply(variables, images, mask=mask, train=train, mutable=mutable)
        return outputs, jax.lax.with_sharding_constraint(new, PartitionSpec())

    def batches(feed: Feed) -> list[Any]:
        size = min(rows, len(feed.images))
        count = min(BATCHES, len(feed.images) // size)
        order = np.random.default_rng(0).permutation(len(feed.images))[: count * size]
        stacked = feed.batches(plan(order, [size] * count, multiple))
        each = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(count)]
        return [(batch, feed.pool) for batch in each]

    train, test = map(batches, feeds)
    return explain_gap(apply, variables, train, test, scores=scores)


def told_apart(first: float, second: float, samples: int) -> bool:
    """Whether two accuracies differ by more than two standard errors."""
    variance = (first * (1 - first) + second * (1 - second)) / samples
    return abs(first - second) > 2 * float(np.sqrt(variance))


def comparison_table(histories: dict[str, list[Epoch]]) -> Table:
    """The last epoch of each variant, side by side."""
    table = Table(title="after the last epoch")
    for heading in ("norm", "train loss", "accuracy", "test loss", "accuracy", "s/epoch"):
        table.add_column(heading, justify="left" if heading == "norm" else "right")
    for norm, history in histories.items():
        seconds = float(np.median([epoch.seconds for epoch in history]))
        table.add_row(norm, *str(history[-1]._replace(seconds=seconds)).split())
    return table
