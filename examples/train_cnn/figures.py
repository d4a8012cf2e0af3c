"""Figures of a training run."""

import pathlib
from collections.abc import Callable

import numpy as np
from data import Dataset
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, SymmetricalLogLocator
from records import Epoch
from steps import Results

# Okabe and Ito's palette, told apart by colour-blind readers too; markers where lines coincide.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
MARKERS = ("o", "s", "^", "D")
STYLES = ("-", "--", "-.", ":")
MISTAKES = 24


def draw_run(
    folder: pathlib.Path, title: str, history: list[Epoch], results: Results, dataset: Dataset
) -> None:
    """Draws the figures of one run into PNG files of the folder.

    `history.png` has loss, accuracy and, with batch norm, how the accuracy by batch statistics
    differs; `drift.png` the drift of the running statistics of each layer; `confusion.png` what is
    taken for what; `mistakes.png` the most confident mistakes. The drift takes two epochs.
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
            _line(axes, values, part, color, marker)
    panels[0].set(title="Loss", ylabel="cross-entropy (nats)", yscale="log")
    panels[1].set(title="Accuracy", ylabel="accuracy (%)")
    if with_gap:
        gaps = [100 * (e.test_accuracy - (e.batch_accuracy or 0.0)) for e in history]
        _line(panels[2], gaps, "test", COLORS[1], MARKERS[1])
        panels[2].axhline(0, color="black", linewidth=0.8)
        panels[2].set(title="Running against batch statistics", ylabel="gain in accuracy (points)")
    figure.suptitle("training and test set")
    return _finished(figure)


def draw_drift(history: list[Epoch]) -> Figure:
    """The drift of each layer's running mean and variance over an epoch, from the second on."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    names = list(history[0].drift)
    shades = colormaps["viridis"](np.linspace(0, 0.9, len(names)))
    for i, axes in enumerate(panels):
        for j, name in enumerate(names):
            values = [np.nan, *(epoch.drift[name][i] for epoch in history[1:])]
            marker = MARKERS[j % len(MARKERS)]
            _line(axes, values, name.partition("/")[0], shades[j], marker)
        axes.set_yscale("symlog", linthresh=1e-4)  # with momentum 0 nothing drifts
        ticks = SymmetricalLogLocator(linthresh=1e-4, base=10, subs=(1, 3))
        axes.yaxis.set_major_locator(ticks)
        axes.yaxis.set_major_formatter("{x:g}")
    panels[0].set(title="Running mean", ylabel="root mean square change (running std)")
    panels[1].set(title="Running variance", ylabel="root mean square relative change")
    figure.suptitle("drift over an epoch, by layer from the first to the last")
    _finished(figure, legend=False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def draw_confusion(results: Results, dataset: Dataset) -> Figure:
    """How many test images of each class, a row, are taken for each class, a column."""
    counts = np.zeros((dataset.classes,) * 2, int)
    np.add.at(counts, (dataset.y_test, results.predicted), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(4 + 0.45 * dataset.classes, 16)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the class", shrink=0.8)
    if dataset.classes <= 30:
        places = range(dataset.classes)
        axes.set_xticks(places, dataset.names)
        if max(map(len, dataset.names)) > 3:
            axes.tick_params("x", rotation=90)
        axes.set_yticks(places, dataset.names)
        for row, column in np.argwhere(counts):
            color = "white" if shares[row, column] > 0.5 else "black"
            text = f"{counts[row, column]}"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    axes.set(xlabel="predicted class", ylabel="true class")
    figure.suptitle("test images by class")
    return figure


def draw_mistakes(results: Results, dataset: Dataset) -> Figure:
    """The wrongly classified test images, those with the highest probability first."""
    wrong = np.flatnonzero(results.predicted != dataset.y_test)
    worst = wrong[np.argsort(-results.confidence[wrong], kind="stable")][:MISTAKES]
    rows = max(1, -(-len(worst) // 8))
    figure = Figure(figsize=(12, 0.6 + 1.85 * rows), layout="constrained")
    panels = figure.subplots(rows, 8, squeeze=False).ravel()
    for axes in panels:
        axes.set_axis_off()
    low, high = dataset.x_test.min(), dataset.x_test.max()
    for axes, i in zip(panels, worst, strict=False):
        pixels = (dataset.x_test[i] - low) / (high - low)
        colored = pixels.shape[-1] == 3
        axes.imshow(pixels if colored else pixels.mean(-1), cmap=None if colored else "gray")
        said, true = dataset.names[results.predicted[i]], dataset.names[dataset.y_test[i]]
        axes.set_title(f"{said}? {results.confidence[i]:.0%}\nis {true}", fontsize=9)
    found = f"{len(wrong)} mistakes on {len(dataset.x_test)} images"
    figure.suptitle(f"{found}, the most confident first")
    return figure


def draw_comparison(path: pathlib.Path, histories: dict[str, list[Epoch]]) -> None:
    """Draws loss and accuracy of several runs into one PNG file."""
    figure = Figure(figsize=(16, 4.5), layout="constrained")
    panels = figure.subplots(1, 3)
    values: tuple[tuple[str, str, Callable[[Epoch], float]], ...] = (
        ("Training loss", "cross-entropy (nats)", lambda epoch: epoch.train_loss),
        ("Test loss", "cross-entropy (nats)", lambda epoch: epoch.test_loss),
        ("Test error", "error (%)", lambda epoch: 100 * (1 - epoch.test_accuracy)),
    )
    for axes, (title, label, value) in zip(panels, values, strict=True):
        for i, (norm, history) in enumerate(histories.items()):
            _line(axes, list(map(value, history)), norm, COLORS[i], MARKERS[i], STYLES[i])
        axes.set(title=title, ylabel=label, yscale="log")
    figure.suptitle("the same network and seed with each batch norm")
    _finished(figure).savefig(path, dpi=120)


def _line(
    axes: Axes, values: list[float], label: str, color: object, marker: str, style: str = "-"
) -> None:
    epochs = range(1, len(values) + 1)
    axes.plot(epochs, values, style, label=label, color=color, marker=marker, markersize=4)


def _finished(figure: Figure, *, legend: bool = True) -> Figure:
    for axes in figure.axes:
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.get_yscale() == "log":  # 0.2, not 2 × 10⁻¹
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        if legend:
            axes.legend()
    return figure
