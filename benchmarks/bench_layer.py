"""One batch norm layer alone, library beside library: milliseconds, and percent of copy speed.

    python benchmarks/bench_layer.py                             # results/bench_layer.csv, .png
    python benchmarks/bench_layer.py --quick --csv q.csv         # three shapes, batch 8, a minute
    python benchmarks/bench_layer.py --warm --dtypes float32     # the same arrays every time

The shapes are those of ResNet-50. All libraries and a copy of the input take turns on the same
data; JAX libraries compile one function for the pass. Inputs rotate, so that they are not in the
cache, unless `--warm`. *Percent of copy speed* is the time in which the bytes of the two-pass
algorithm are copied within memory that is there already, over the time taken: it reads the input
for the statistics, and reads and writes it to normalize; backward it reads input and cotangent
twice, and writes the gradient.
Every row is checked against float64 NumPy, in up to eight channels: `error` is the difference of
output and input gradient over their largest magnitude. Ratios over 1 mean that jaxbn is faster.
"""

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import libraries
import matplotlib.pyplot as plt
import measuring
import numpy as np
import peer_torch
from numpy.typing import NDArray
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table

# (height and width, channels): how many batch norms of ResNet-50 have them, 53 in all, at 224×224
# with the stride in the 3×3 convolution. He et al., https://arxiv.org/abs/1512.03385, table 1.
RESNET50 = {
    (112, 64): 1,
    (56, 64): 6,
    (56, 256): 4,
    (56, 128): 1,
    (28, 128): 7,
    (28, 512): 5,
    (28, 256): 1,
    (14, 256): 11,
    (14, 1024): 7,
    (14, 512): 1,
    (7, 512): 5,
    (7, 2048): 4,
}
PASSES = ("inference", "forward", "forward+backward")
LAYOUTS = {"NHWC": -1, "NCHW": 1}


class Problem(NamedTuple):
    """What is measured together."""

    case: str
    passes: str
    side: int
    channels: int
    batch: int
    dtype: str
    layout: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the input, in its layout."""
        sides = (self.side, self.side)
        if self.layout == "NHWC":
            return (self.batch, *sides, self.channels)
        return (self.batch, self.channels, *sides)

    @property
    def transfers(self) -> int:
        """How often the two-pass algorithm moves a tensor as large as the input."""
        added = "add" in self.case
        return {"inference": 2, "forward": 3, "forward+backward": 8 + 2 * added}[
            self.passes
        ] + added


def arrays(problem: Problem, seed: int) -> dict[str, NDArray[Any]]:
    """Inputs with mean ≠ 0 and deviation ≠ 1, the large ones in the dtype of the problem."""
    random = np.random.default_rng(seed)
    dtype, vector = jnp.dtype(problem.dtype), problem.channels

    def normal(mean: float, std: float, shape: Any, dtype: Any = np.float32) -> NDArray[Any]:
        return (mean + std * random.standard_normal(shape, np.float32)).astype(dtype)

    return {
        "x": normal(1.5, 2.0, problem.shape, dtype),
        "scale": normal(1.0, 0.2, vector),
        "bias": normal(0.1, 0.3, vector),
        "mean": normal(1.4, 0.1, vector),
        "var": normal(4.0, 0.2, vector),
        "residual": normal(0.2, 1.0, problem.shape, dtype),
        "dy": normal(0.3, 1.0, problem.shape, dtype),
    }


def looked_at(problem: Problem, array: Any) -> NDArray[np.float64]:
    """Up to eight of the channels, spread over them, in float64 and last."""
    array = np.moveaxis(np.asarray(array), LAYOUTS[problem.layout], -1)
    return array[..., :: -(-problem.channels // 8)].astype(np.float64)


def referee(problem: Problem, given: dict[str, NDArray[Any]]) -> list[NDArray[np.float64]]:
    """`y` and, where there is a backward pass, `dx`, in float64 from the definition."""
    step, others = -(-problem.channels // 8), (0, 1, 2)
    x, dy, residual = (looked_at(problem, given[k]) for k in ("x", "dy", "residual"))
    scale, bias, mean, var = (
        given[k][::step].astype(np.float64) for k in ("scale", "bias", "mean", "var")
    )
    if problem.passes != "inference":
        mean, var = x.mean(others), x.var(others)
    factor = 1 / np.sqrt(var + libraries.EPSILON)
    normalized = (x - mean) * factor
    y = normalized * scale + bias + (residual if "add" in problem.case else 0)
    dz = np.where(y > 0, dy, 0) if "ReLU" in problem.case else dy
    y = np.maximum(y, 0) if "ReLU" in problem.case else y
    if problem.passes != "forward+backward":
        return [y]
    inner = dz.mean(others) + normalized * (dz * normalized).mean(others)
    return [y, scale * factor * (dz - inner)]


def error(problem: Problem, outputs: Any, expected: list[NDArray[np.float64]]) -> float:
    """The difference over the largest magnitude, the largest but for one element in ten thousand.

    Where the input of ReLU rounds to the other side of zero, a cotangent is passed on or not.
    """
    worst = 0.0
    for actual, wanted in zip(outputs, expected, strict=True):
        difference = np.abs(looked_at(problem, actual) - wanted)
        worst = max(worst, float(np.quantile(difference, 0.9999) / np.abs(wanted).max()))
    return worst


def in_jax(library: libraries.Library, problem: Problem) -> Callable[..., Any]:
    """The compiled pass `(inputs) -> (y, dx)` or `(y,)`, first, and what else training gives."""
    axis = LAYOUTS[problem.layout]

    def inference(x, scale, bias, mean, var, residual, dy):  # type: ignore[no-untyped-def]
        layer = library.inference(problem.case, axis)
        return (layer(x, scale, bias, mean, var, *residual),), None

    def forward(x, scale, bias, mean, var, residual, dy):  # type: ignore[no-untyped-def]
        y, stats = library.training(problem.case, axis)(x, scale, bias, *residual)
        return (y,), stats

    def both(x, scale, bias, mean, var, residual, dy):  # type: ignore[no-untyped-def]
        layer = library.training(problem.case, axis)
        y, pullback, stats = jax.vjp(layer, x, scale, bias, *residual, has_aux=True)
        dx, *others = pullback(dy)
        return (y, dx), (stats, others)

    return jax.jit({"inference": inference, "forward": forward}.get(problem.passes, both))


def jax_inputs(problem: Problem, given: dict[str, NDArray[Any]]) -> tuple[Any, ...]:
    """The arguments of `in_jax`, on the device."""
    placed = {k: jnp.asarray(v) for k, v in given.items()}
    residual = [placed.pop("residual")] if "add" in problem.case else []
    dy = placed.pop("dy")
    placed.pop("residual", None)
    return (*placed.values(), residual, dy)


def rotating(function: Callable[[Any], Any], inputs: list[Any]) -> Callable[[], Any]:
    """A run of the function on the next of the inputs every time."""
    turn = itertools.cycle(inputs)
    return lambda: function(next(turn))


def copying(problem: Problem, sets: int) -> Callable[[], Any]:
    """A run that reads an input and writes as much into the same memory; none is allocated."""
    negative = jax.jit(jnp.negative, donate_argnums=0)
    x = arrays(problem, 0)["x"]
    held = [jnp.asarray(x) + 0 for _ in range(sets)]
    turn = itertools.cycle(range(sets))

    def run() -> None:
        i = next(turn)
        held[i] = jax.block_until_ready(negative(held[i]))

    return run


def copies_of(problem: Problem, warm: bool, cache: int) -> int:
    """How many sets of inputs it takes to be four times as large as the cache, at most 64."""
    used = 3 if "add" in problem.case else 2
    size = used * int(np.prod(problem.shape)) * jnp.dtype(problem.dtype).itemsize
    return 1 if warm else min(64, max(2, -(-4 * cache // size)))


def measure(
    problem: Problem, chosen: list[str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of one problem: the libraries in turns, after their outputs were checked."""
    sets = copies_of(problem, options.warm, options.cache << 20)
    given = [arrays(problem, 0)]
    given += [{k: v.copy() for k, v in given[0].items()} for _ in range(sets - 1)]
    expected = referee(problem, given[0])
    inputs = [jax_inputs(problem, arrays) for arrays in given]
    runs: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    for name in chosen:
        if name.startswith("torch"):
            function, sets_ = peer_torch.layer(name, problem, given)
        else:
            compiled = in_jax(libraries.LIBRARIES[name], problem).lower(*inputs[0]).compile()
            function, sets_ = functools.partial(_ready, compiled), inputs
        errors[name] = error(problem, function(sets_[0])[0], expected)
        runs[name] = rotating(function, sets_)
    runs["copy"] = copying(problem, sets)
    seconds = measuring.take_turns(runs, options.repetitions)
    copied = float(np.median(seconds.pop("copy")))
    rows = []
    for name, taken in seconds.items():
        lower, median, upper = measuring.quartiles(1e3 * taken)
        bound = 1e3 * copied * problem.transfers / 2
        rows.append(
            problem._asdict()
            | {
                "library": name,
                "lower_ms": round(lower, 4),
                "median_ms": round(median, 4),
                "upper_ms": round(upper, 4),
                "copy_ms": round(1e3 * copied, 4),
                "percent_of_copy_speed": round(100 * bound / median, 1),
                "error": f"{errors[name]:.1e}",
                "warm": options.warm,
            }
        )
    return rows


def _ready(compiled: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return jax.block_until_ready(compiled(*arguments))


def ratios(rows: list[dict[str, Any]], name: str) -> list[float]:
    """Median time of a library over that of jaxbn, problem by problem."""
    times = {(row["side"], row["channels"], row["library"]): row["median_ms"] for row in rows}
    shapes = dict.fromkeys((row["side"], row["channels"]) for row in rows)
    return [times[*shape, name] / times[*shape, "jaxbn"] for shape in shapes]


def table(rows: list[dict[str, Any]]) -> Table:
    """A line for each shape, a column for each library; geometric means and ResNet-50 below."""
    first = rows[0]
    names = list(dict.fromkeys(row["library"] for row in rows))
    parts = [first[k] for k in ("case", "passes", "dtype", "layout")]
    title = ", ".join([*parts, f"batch {first['batch']}", "ms (percent of copy speed)"])
    table = Table("height, channels", *names, title=title, box=MARKDOWN)
    totals = dict.fromkeys(names, 0.0)
    for (side, channels), same in itertools.groupby(rows, lambda r: (r["side"], r["channels"])):
        cells = []
        for row in same:
            cells.append(f"{row['median_ms']:.2f} ({row['percent_of_copy_speed']:.0f})")
            totals[row["library"]] += row["median_ms"] * RESNET50[side, channels]
        table.add_row(f"{side}, {channels}", *cells)
    if len({(row["side"], row["channels"]) for row in rows}) == len(RESNET50):
        table.add_row("the 53 of ResNet-50", *(f"{total:.1f}" for total in totals.values()))
    means = (measuring.geometric_mean(ratios(rows, name)) for name in names)
    table.add_row("over jaxbn, geometric mean", *(f"{mean:.2f}" for mean in means))
    worst = (min(ratios(rows, name)) for name in names)
    table.add_row("over jaxbn, smallest", *(f"{ratio:.2f}" for ratio in worst))
    return table


def groups(rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The rows that differ in shape and library alone."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[k] for k in ("case", "passes", "batch", "dtype", "layout"))

    for _, group in itertools.groupby(rows, key):
        yield list(group)


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Percent of copy speed over shapes, a panel for each table."""
    panels = list(groups(rows))
    figure, axes = plt.subplots(len(panels), 1, figsize=(9, 2.8 * len(panels)), squeeze=False)
    for ax, group in zip(axes[:, 0], panels, strict=True):
        for name in dict.fromkeys(row["library"] for row in group):
            mine = [row for row in group if row["library"] == name]
            labels = [f"{row['side']}\n{row['channels']}" for row in mine]
            ax.plot(labels, [row["percent_of_copy_speed"] for row in mine], "o-", label=name, ms=3)
        ax.set_title(", ".join(group[0][k] for k in ("case", "passes", "dtype", "layout")), size=9)
        ax.set_ylabel("% of copy speed", size=8)
        ax.set_ylim(bottom=0)
    axes[0, 0].legend(fontsize=7, ncols=4)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The options; `--quick` changes the defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=libraries.CASES, default=["BN+ReLU"])
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16", "float16"])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["NHWC", "NCHW"])
    parser.add_argument(
        "--shapes", type=int, nargs="+", default=range(12), help="lines of the table"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--libraries", nargs="+", help="default: all that are installed")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--cache", type=int, default=32, help="MiB of the last-level cache")
    parser.add_argument("--warm", action="store_true", help="the same inputs every time")
    parser.add_argument("--csv", default=str(measuring.RESULTS / "bench_layer.csv"))
    parser.add_argument("--plot", default=str(measuring.RESULTS / "bench_layer.png"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    if options.quick:
        options.shapes, options.batch, options.layouts = [1, 7, 11], 8, ["NHWC"]
        options.repetitions = min(options.repetitions, 10)
    return options


def main(arguments: list[str] | None = None) -> None:
    """Prints the tables; writes the rows and the plot."""
    options = parsed(arguments)
    available = [*libraries.installed(), *peer_torch.installed()]
    chosen = options.libraries or available
    shapes = [list(RESNET50)[i] for i in options.shapes]
    problems = [
        Problem(case, passes, *shape, options.batch, dtype, layout)
        for case, dtype, layout, passes, shape in itertools.product(
            options.cases, options.dtypes, options.layouts, options.passes, shapes
        )
    ]
    rows = []
    for problem in track(problems, "measuring"):
        rows += measure(problem, chosen, options)
    console = Console(width=200)
    for group in groups(rows):
        console.print(table(group))
    measuring.write_csv(options.csv, rows, measuring.machine())
    plot(rows, options.plot)


if __name__ == "__main__":
    main()
