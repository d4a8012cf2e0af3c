"""Figures of a training run."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from data import Dataset
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import PowerNorm, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
    SymmetricalLogLocator,
)
from model import NORMS
from numpy.typing import NDArray
from records import Epoch
from steps import Results

Numbers = NDArray[np.float64]

# Okabe and Ito's palette suits color-blind readers; markers separate lines that coincide.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLES = ("-", "--", "-.", ":")
MISTAKES = 24
NAMED = 30  # an axis names each of up to so many classes or layers
NAME_LENGTH = 14  # characters
STILL = 1e-4  # the scale is linear below this drift


def draw_run(
    folder: pathlib.Path, title: str, history: list[Epoch], results: Results, dataset: Dataset
) -> None:
    """Writes the figures of one run into the folder, as PNG files.

    - `history.png`: loss, accuracy and, with batch norm, the gap to batch statistics in accuracy.
    - `drift.png`: the drift of each layer's running statistics, after two epochs or more.
    - `confusion.png`: true classes against predicted classes.
    - `mistakes.png`: the most confident mistakes.
    """
    drawn = {
        "history": draw_history(history),
        "confusion": draw_confusion(results, dataset),
        "mistakes": draw_mistakes(results, dataset),
    }
    if history[0].drift and len(history) > 1:
        drawn["drift"] = draw_drift(history)
    for name, figure in drawn.items():
        figure.suptitle(f"{title}: {figure.get_suptitle()}")
        figure.savefig(folder / f"{name}.png", dpi=120)


def draw_history(history: list[Epoch]) -> Figure:
    """Loss, accuracy, and the gap between batch and running statistics, by epoch."""
    with_gap = history[-1].batch_accuracy is not None
    figure = Figure(figsize=(5 + 5 * (1 + with_gap), 4), layout="constrained")
    panels = figure.subplots(1, 2 + with_gap)
    for part, color, marker in zip(("train", "test"), COLORS, MARKERS, strict=False):
        for axes, name, unit in ((panels[0], "loss", 1), (panels[1], "accuracy", 100)):
            values = [unit * getattr(epoch, f"{part}_{name}") for epoch in history]
            _line(axes, values, part, color, marker, size=7 if part == "train" else 4)
    panels[0].set(title="Loss", ylabel="cross-entropy (nats)")
    panels[1].set(title="Accuracy", ylabel="accuracy (%)")
    _logarithmic(panels[0])
    _spanning(panels[1], 1, highest=100)
    if with_gap:
        gaps = [100 * (e.test_accuracy - (e.batch_accuracy or 0.0)) for e in history]
        _line(panels[2], gaps, "test", COLORS[1], MARKERS[1])
        panels[2].axhline(0, color="black", linewidth=0.8)
        panels[2].set(title="Running against batch statistics", ylabel="gain in accuracy (points)")
        _spanning(panels[2], 1)
    figure.suptitle("training and test set")
    return _finished(figure, len(history))


def draw_drift(history: list[Epoch]) -> Figure:
    """The drift of each layer's running mean and variance over an epoch, from the second on.

    Few layers are drawn as lines, many as a map.
    """
    names = [name.partition("/")[0] for name in history[0].drift]
    drift = np.array([[*epoch.drift.values()] for epoch in history[1:]])  # [epochs, layers, 2]
    few = len(names) <= len(COLORS)
    figure = Figure(figsize=(11, 4.5 if few else 7), layout="constrained")
    panels = figure.subplots(1, 2)
    (_drift_lines if few else _drift_map)(figure, panels, names, drift)
    panels[0].set_title("Running mean: root mean square change (running std)", fontsize=10)
    panels[1].set_title("Running variance: root mean square relative change", fontsize=10)
    figure.suptitle("drift over an epoch, by layer from the first to the last")
    return figure


def _drift_lines(figure: Figure, panels: Any, names: list[str], drift: Numbers) -> None:
    for values, axes in zip(np.moveaxis(drift, 2, 0), panels, strict=True):
        for layer, name in enumerate(names):
            color, marker = COLORS[layer], MARKERS[layer]
            _line(axes, [np.nan, *values[:, layer]], name, color, marker)
        axes.set_yscale("symlog", linthresh=STILL)  # with momentum 0 nothing drifts
        axes.set_ylim(bottom=0)
        ticks = SymmetricalLogLocator(linthresh=STILL, base=10, subs=(1, 3))
        axes.yaxis.set_major_locator(ticks)
        axes.yaxis.set_major_formatter("{x:g}")
    _finished(figure, len(drift) + 1, legend=False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)


def _drift_map(figure: Figure, panels: Any, names: list[str], drift: Numbers) -> None:
    norm = SymLogNorm(linthresh=STILL, vmin=0, vmax=max(drift.max(), 10 * STILL), base=10)
    extent = (1.5, len(drift) + 1.5, len(names) - 0.5, -0.5)
    for values, axes in zip(np.moveaxis(drift, 2, 0), panels, strict=True):
        image = axes.imshow(values.T, norm=norm, extent=extent, aspect="auto", cmap="viridis")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _named(axes.yaxis, names)
    figure.colorbar(image, ax=panels, label="drift", format="{x:g}")


def draw_confusion(results: Results, dataset: Dataset) -> Figure:
    """The number of test images by true class (rows) and predicted class (columns)."""
    counts = np.zeros((dataset.classes,) * 2, int)
    np.add.at(counts, (dataset.y_test, results.predicted), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(4 + 0.45 * dataset.classes, 16)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    figure.colorbar(image, label="share of the class", shrink=0.8)
    names = [_label(name) for name in dataset.names]
    _named(axes.xaxis, names)
    _named(axes.yaxis, names)
    if dataset.classes > 10 or max(map(len, names)) > 3:
        axes.tick_params("x", rotation=90)
    for row, column in np.argwhere(counts) if dataset.classes <= NAMED else ():
        color = "white" if shares[row, column] > 0.3 else "black"
        text = f"{counts[row, column]}"
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    axes.set(xlabel="predicted class", ylabel="true class")
    figure.suptitle("test images by class")
    return figure


def draw_mistakes(results: Results, dataset: Dataset) -> Figure:
    """The misclassified test images, the most confident ones first."""
    wrong = np.flatnonzero(results.predicted != dataset.y_test)
    worst = wrong[np.argsort(-results.confidence[wrong], kind="stable")][:MISTAKES]
    found = f"{len(wrong)} mistakes on {len(dataset.x_test)} images"
    if not len(worst):
        figure = Figure(figsize=(8, 2.2), layout="constrained")
        figure.suptitle("all are right")
        figure.text(0.5, 0.4, found, ha="center", fontsize=12)
        return figure
    rows, columns = -(-len(worst) // 8), min(len(worst), 8)
    figure = Figure(figsize=(max(8, 1.5 * columns), 0.8 + 1.85 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
    low, high = dataset.x_test.min(), dataset.x_test.max()
    for axes, i in zip(panels, worst, strict=False):
        pixels = (dataset.x_test[i] - low) / (high - low)
        colored = pixels.shape[-1] == 3
        axes.imshow(pixels if colored else pixels.mean(-1), cmap=None if colored else "gray")
        said, true = (dataset.names[y] for y in (results.predicted[i], dataset.y_test[i]))
        title = f"{_label(said)}? {results.confidence[i]:.0%}\nis {_label(true)}"
        axes.set_title(title, fontsize=9)
    figure.suptitle(f"{found}, the most confident first")
    return figure


def draw_comparison(path: pathlib.Path, histories: dict[str, list[Epoch]]) -> None:
    """Writes loss and error of several runs into one PNG file."""
    comparison(histories).savefig(path, dpi=120)


def comparison(histories: dict[str, list[Epoch]]) -> Figure:
    """Loss and error by epoch, with one color per norm."""
    figure = Figure(figsize=(16, 4.5), layout="constrained")
    panels = figure.subplots(1, 3)
    values: tuple[tuple[str, str, Callable[[Epoch], float]], ...] = (
        ("Training loss", "cross-entropy (nats)", lambda epoch: epoch.train_loss),
        ("Test loss", "cross-entropy (nats)", lambda epoch: epoch.test_loss),
        ("Test error", "error (%)", lambda epoch: 100 * (1 - epoch.test_accuracy)),
    )
    for axes, (title, label, value) in zip(panels, values, strict=True):
        for norm, history in histories.items():
            i = NORMS.index(norm)
            y = list(map(value, history))
            _line(axes, y, norm, COLORS[i], MARKERS[i], STYLES[i], size=8 - 1.5 * i)
        axes.set(title=title, ylabel=label)
    _logarithmic(panels[0])
    _logarithmic(panels[1])
    _spanning(panels[2], 1, lowest=0)
    figure.suptitle("the same network and seed with each batch norm")
    return _finished(figure, max(map(len, histories.values())))


def _line(
    axes: Axes,
    values: Sequence[float],
    label: str,
    color: object,
    marker: str,
    style: str = "-",
    size: float = 4,
) -> None:
    """Draws values by epoch; different marker sizes separate lines that coincide."""
    epochs = range(1, len(values) + 1)
    axes.plot(epochs, values, style, label=label, color=color, marker=marker, markersize=size)


def _label(name: str) -> str:
    """A class name at full length or shortened, without TeX."""
    short = name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…"
    return short.replace("$", r"\$")


def _named(axis: Axis, names: Sequence[str]) -> None:
    """Puts the names at an axis, or some of them if there are many."""
    if len(names) <= NAMED:
        axis.set_ticks(range(len(names)), names)
        return

    def name(place: float, _: object) -> str:
        return names[int(place)] if 0 <= place < len(names) else ""

    axis.set_major_locator(MaxNLocator(20, integer=True))
    axis.set_major_formatter(FuncFormatter(name))


def _logarithmic(axes: Axes) -> None:
    """Makes the axis logarithmic, with a few labels among the values and a place for zero."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines])
    positive = values[values > 0]
    low, high = (positive.min(), positive.max()) if positive.size else (1.0, 1.0)
    wide = high > 10 * low
    if positive.size < values.size:
        if wide:
            axes.set_yscale("symlog", linthresh=low)
            axes.yaxis.set_major_locator(SymmetricalLogLocator(linthresh=low, base=10))
        axes.set_ylim(bottom=0, top=1.2 * high)
    else:
        axes.set_yscale("log")
        if high < 1.2 * low:
            axes.set_ylim(low / 1.2, high * 1.2)
        subs = (1, 2, 5) if high < 1000 * low else (1,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8) if wide else MaxNLocator(5))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")


def _spanning(
    axes: Axes, least: float, *, lowest: float = -np.inf, highest: float = np.inf
) -> None:
    """Makes the axis at least this long; it ends a little beyond the possible values."""
    bottom, top = axes.get_ylim()
    missing = max(0.0, least - (top - bottom)) / 2
    bottom, top = bottom - missing, top + missing
    margin = 0.05 * (top - bottom)
    axes.set_ylim(max(bottom, lowest - margin), min(top, highest + margin))


def _finished(figure: Figure, epochs: int, *, legend: bool = True) -> Figure:
    for axes in figure.axes:
        axes.set_xlabel("epoch")
        axes.set_xlim(1 - 0.03 * epochs - 0.2, epochs + 0.03 * epochs + 0.2)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        if legend:
            axes.legend()
    return figure
