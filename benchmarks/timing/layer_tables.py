"""What the rows of `bench_layer.py` say: tables with geometric means, torch's best, and a plot."""

import itertools
from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
from rich.box import MARKDOWN
from rich.table import Table

from benchmarks import measuring
from benchmarks.timing import peer_torch
from benchmarks.timing.layer_problems import RESNET50

BEST = "torch's best"
Row = dict[str, Any]


def groups(rows: list[Row]) -> Iterator[list[Row]]:
    """The rows that differ in shape and library alone."""

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row[k] for k in ("case", "passes", "batch", "dtype", "layout"))

    for _, group in itertools.groupby(rows, key):
        yield list(group)


def by_shape(group: list[Row]) -> dict[tuple[int, int], dict[str, Row]]:
    """The rows of a group by shape and library, torch's best among them where there is torch."""
    shapes: dict[tuple[int, int], dict[str, Row]] = {}
    for row in group:
        shapes.setdefault((row["side"], row["channels"]), {})[row["library"]] = row
    for named in shapes.values():
        torches = [row for name, row in named.items() if name in peer_torch.NAMES]
        if torches:
            named[BEST] = min(torches, key=lambda row: row["ms"])
    return shapes


def over_jaxbn(group: list[Row]) -> dict[str, str]:
    """For each library the geometric mean of its times over jaxbn's, smallest and largest."""
    ratios: dict[str, list[float]] = {}
    for named in by_shape(group).values():
        for name, row in named.items():
            ratios.setdefault(name, []).append(row["ms"] / named["jaxbn"]["ms"])
    return {
        name: f"{measuring.geometric_mean(r):.2f} ({min(r):.2f} – {max(r):.2f})"
        for name, r in ratios.items()
    }


def title(row: Row) -> str:
    """What the rows of a group have in common."""
    return ", ".join(
        [*(row[k] for k in ("passes", "case", "dtype", "layout")), f"batch {row['batch']}"]
    )


def table(group: list[Row]) -> Table:
    """A line for each shape, a column for each library; ResNet-50 and geometric means below."""
    shapes, means = by_shape(group), over_jaxbn(group)
    heading = f"{title(group[0])}: ms (percent of copy speed)"
    table = Table("height, channels", "layers", *means, title=heading, box=MARKDOWN)
    totals = dict.fromkeys(means, 0.0)
    for (side, channels), named in shapes.items():
        layers = RESNET50[side, channels]
        for name, row in named.items():
            totals[name] += layers * row["ms"]
        cells = (f"{r['ms']:.2f} ({r['percent_of_copy_speed']:.0f})" for r in named.values())
        table.add_row(f"{side}, {channels}", str(layers), *cells)
    if len(shapes) == len(RESNET50):
        layers = sum(RESNET50.values())
        table.add_row("ResNet-50", str(layers), *(f"{t:.1f}" for t in totals.values()))
    table.add_row("over jaxbn", "", *means.values())
    return table


def summary(rows: list[Row]) -> Table:
    """A line for each table."""
    lines = {title(group[0]): over_jaxbn(group) for group in groups(rows)}
    names = [name for name in next(iter(lines.values())) if name != "jaxbn"]
    heading = "Time over jaxbn's: geometric mean (smallest – largest)"
    table = Table("", *names, title=heading, box=MARKDOWN)
    for what, means in lines.items():
        table.add_row(what, *(means[name] for name in names))
    return table


def plot(rows: list[Row], path: str) -> None:
    """Percent of copy speed over shapes, a panel for each table."""
    panels = list(groups(rows))
    figure, axes = plt.subplots(len(panels), 1, figsize=(9, 2.8 * len(panels)), squeeze=False)
    for ax, group in zip(axes[:, 0], panels, strict=True):
        for name in dict.fromkeys(row["library"] for row in group):
            mine = [row for row in group if row["library"] == name]
            labels = [f"{row['side']}\n{row['channels']}" for row in mine]
            ax.plot(labels, [row["percent_of_copy_speed"] for row in mine], "o-", label=name, ms=3)
        ax.set_title(title(group[0]), size=9)
        ax.set_ylabel("% of copy speed", size=8)
        ax.set_ylim(bottom=0)
    axes[0, 0].legend(fontsize=7, ncols=4)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
