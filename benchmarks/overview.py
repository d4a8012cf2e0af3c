"""Draws the figure of the README: errors under large means, and memory traffic, beside the peers.

    python -m benchmarks.overview  # torch, dm-haiku, equinox and keras where installed

Errors are computed as `accuracy.numerics` does, and traffic is read from `results/traffic.csv`,
which `compiled.traffic` writes.
"""

import argparse
import warnings

import matplotlib.pyplot as plt
import numpy as np

from benchmarks import libraries, measuring
from benchmarks.accuracy import numerics

MEANS = (0, 1, 10, 100, 1e3, 1e4, 1e5, 1e6)  # in standard deviations
# Colors, by the names of `numerics.METHODS`.
COLORS = {"jaxbn": "C0", "Flax": "C1", "torch": "C3", "haiku": "C5", "equinox": "C2", "keras": "C4"}


def errors(ax: plt.Axes) -> None:
    """Error of the output over the mean of the data; NaN breaks the line."""
    methods = {k: method for k, method in numerics.installed().items() if k in COLORS}
    data = {f"{mean:g}": numerics.sample(mean, 1.0) for mean in MEANS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = numerics.output_errors(methods, data)
    for i, name in enumerate(methods):
        line = [row[i] for row in rows.values()]
        label = name.capitalize() if name in ("haiku", "equinox", "keras") else name
        style = {"color": COLORS[name], "lw": 3 if name == "jaxbn" else 1.5, "label": label}
        ax.plot([max(m, 0.1) for m in MEANS], line, "o-", **style)
    ax.set(xscale="log", yscale="log")
    ax.set_xticks([0.1, 1, 100, 1e4, 1e6], ["0", "1", "10²", "10⁴", "10⁶"])
    ax.minorticks_off()
    ax.set_xlabel("mean of the input, in standard deviations")
    ax.set_title("Error of the output, float32", size=11)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, loc="upper left")


def traffic(ax: plt.Axes) -> None:
    """Bytes of forward and backward pass, channels last, on an H100 in bfloat16."""
    rows, _ = measuring.read_csv(measuring.RESULTS / "traffic.csv")
    chosen = {("device", "H100"), ("dtype", "bfloat16"), ("layout", "NHWC")}
    for i, (name, library) in enumerate((("jaxbn", "jaxbn"), ("Flax", "flax.linen"))):
        wanted = chosen | {("library", library)}
        found = {row["case"]: row for row in rows if wanted <= set(row.items())}
        heights = [
            float(found[c]["forward"]) + float(found[c]["backward"]) for c in libraries.CASES
        ]
        bars = ax.bar(np.arange(3) + 0.4 * i, heights, 0.38, color=COLORS[name], label=name)
        ax.bar_label(bars, fmt="%.0f", size=9)
    ax.set_xticks(np.arange(3) + 0.2, [case.replace("+", " + ") for case in libraries.CASES])
    ax.set_title("Bytes moved per element, bfloat16, H100", size=11)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, loc="upper left")


def main(arguments: list[str] | None = None) -> None:
    """Writes the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", default=str(measuring.RESULTS / "overview.png"))
    options = parser.parse_args(arguments)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    errors(left)
    traffic(right)
    figure.tight_layout()
    figure.savefig(options.plot, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
