"""The history of a training run, drawn."""

import itertools
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


class Epoch(NamedTuple):
    """Loss and accuracy after one epoch, and the running statistics of every layer."""

    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    batch_stats: dict[str, Any]

    def __str__(self) -> str:
        """Loss and accuracy as the columns of a log."""
        return (
            f"{self.train_loss:12.4f}{self.train_accuracy:10.2%}"
            f"{self.test_loss:11.4f}{self.test_accuracy:10.2%}"
        )


def draw(history: list[Epoch], path: pathlib.Path) -> None:
    """Draws loss, accuracy and the drift of the running statistics into a PNG file.

    The drift takes batch norm and two epochs; without them it is left out.
    """
    with_drift = bool(history[0].batch_stats) and len(history) > 1
    figure = Figure(figsize=(11, 8 if with_drift else 4), layout="constrained")
    panels = figure.subplots(1 + with_drift, 2).ravel()
    epochs = range(1, len(history) + 1)
    for axes, name, unit in ((panels[0], "loss", 1), (panels[1], "accuracy", 100)):
        for part, color in (("train", COLORS[0]), ("test", COLORS[1])):
            values = [unit * getattr(epoch, f"{part}_{name}") for epoch in history]
            axes.plot(epochs, values, marker=".", color=color, label=part)
    panels[0].set(title="Loss", ylabel="cross-entropy (nats)", yscale="log")
    panels[1].set(title="Accuracy", ylabel="accuracy (%)")
    if with_drift:
        _draw_drift(panels[2], panels[3], history)
    for axes in panels:
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def _draw_drift(mean_axes: Axes, var_axes: Axes, history: list[Epoch]) -> None:
    layers = [_by_layer(epoch.batch_stats) for epoch in history]
    for i, name in enumerate(layers[0]):
        pairs = list(itertools.pairwise(epoch[name] for epoch in layers))
        for axes, change in ((mean_axes, mean_drift), (var_axes, var_drift)):
            values = [change(old, new) for old, new in pairs]
            axes.plot(
                range(2, len(history) + 1),
                values,
                marker=".",
                color=COLORS[i % len(COLORS)],
                label=name,
            )
    mean_axes.set(title="Drift of the running mean", ylabel="change over an epoch (running std)")
    var_axes.set(title="Drift of the running variance", ylabel="relative change over an epoch")
    for axes in (mean_axes, var_axes):
        axes.set_yscale("symlog", linthresh=1e-4)  # with momentum 0 nothing drifts


def _by_layer(batch_stats: dict[str, Any]) -> dict[str, dict[str, Any]]:
    paths = jax.tree_util.tree_leaves_with_path(batch_stats, is_leaf=lambda node: "mean" in node)
    return {"/".join(key.key for key in path): stats for path, stats in paths}


def mean_drift(old: dict[str, Any], new: dict[str, Any]) -> float:
    """How far the means of a layer moved, in running standard deviations: `√E[(m' − m)²/v']`."""
    return float(np.sqrt(np.mean(np.square(new["mean"] - old["mean"]) / new["var"])))


def var_drift(old: dict[str, Any], new: dict[str, Any]) -> float:
    """How far the variances of a layer moved, as a ratio: `√E[(v'/v − 1)²]`."""
    return float(np.sqrt(np.mean(np.square(new["var"] / old["var"] - 1))))
