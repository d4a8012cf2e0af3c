"""One batch norm layer alone, library beside library: milliseconds, and percent of copy speed.

    python -m benchmarks.timing.bench_layer  # results/bench_layer.csv, .png
    python -m benchmarks.timing.bench_layer --quick --csv q.csv  # three shapes, batch 8, a minute
    python -m benchmarks.timing.bench_layer --warm --csv w.csv   # three sets of inputs that rotate

The shapes are those of ResNet-50. All libraries and a copy of the input take turns on the same
data; JAX libraries compile one function for the pass. *Torch's best* is the fastest of torch's
ways, shape by shape. Inputs rotate among copies that together are four times as large as the cache,
64 at most, and a time is the median. Under `--warm` they are three, and a time is the minimum.
*Percent of copy speed* is the time in which the bytes of the two-pass algorithm are copied within
memory that is there already, over the time taken: it reads the input for the statistics, and reads
and writes it to normalize; backward it reads input and cotangent twice, and writes the gradient.
Every row is checked against float64 NumPy, in up to eight channels: `error` is the difference of
output and input gradient over their largest magnitude. Ratios over 1 mean that jaxbn is faster.
"""

import argparse
import functools
import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks import libraries, measuring
from benchmarks.timing import layer_tables, peer_torch
from benchmarks.timing.layer_problems import (
    DTYPES,
    LAYOUTS,
    PASSES,
    RESNET50,
    Problem,
    arrays,
    error,
)
from benchmarks.timing.layer_tables import Row

CACHES = pathlib.Path("/sys/devices/system/cpu/cpu0/cache")
SHAPES = {f"{side}x{channels}": (side, channels) for side, channels in RESNET50}
QUICK = {
    "shapes": ["56x64", "14x256", "7x2048"],
    "batch": [8],
    "layouts": ["NHWC"],
    "repetitions": 10,
}


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


def jax_inputs(problem: Problem, given: dict[str, jax.Array]) -> tuple[Any, ...]:
    """The arguments of `in_jax`."""
    residuals = [given["residual"]] if problem.added else []
    return (*(given[k] for k in ("x", "scale", "bias", "mean", "var")), residuals, given["dy"])


def rotating(function: Callable[[Any], Any], inputs: list[Any]) -> Callable[[], Any]:
    """A run of the function on the next of the inputs every time."""
    turn = itertools.cycle(inputs)
    return lambda: function(next(turn))


def copying(problem: Problem, sets: int) -> Callable[[], Any]:
    """A run that reads an input and writes as much into the same memory; none is allocated."""
    negative = jax.jit(jnp.negative, donate_argnums=0)
    x = arrays(problem, 0)["x"]
    held = [jnp.copy(x) for _ in range(sets)]
    turn = itertools.cycle(range(sets))

    def run() -> None:
        i = next(turn)
        held[i] = jax.block_until_ready(negative(held[i]))

    return run


def copies_of(problem: Problem, megabytes: float) -> int:
    """How many sets of inputs it takes to be four times as large as the cache, at most 64."""
    return min(64, max(2, int(np.ceil(4 * megabytes / problem.megabytes))))


def last_level_cache() -> float | None:
    """Megabytes of the largest cache of the first processor, where Linux tells."""
    sizes = [int(path.read_text().strip().removesuffix("K")) for path in CACHES.glob("*/size")]
    return max(sizes) * 1024 / 1e6 if sizes else None


def measure(problem: Problem, chosen: Sequence[str], options: argparse.Namespace) -> list[Row]:
    """The rows of one problem: the libraries in turns, after their outputs were checked."""
    sets = 3 if options.warm else copies_of(problem, options.cache)
    given = [arrays(problem, 0)]
    given += [jax.tree.map(jnp.copy, given[0]) for _ in range(sets - 1)]
    inputs = [jax_inputs(problem, one) for one in given]
    runs: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    for name in chosen:
        if name in libraries.LIBRARIES:
            compiled = in_jax(libraries.LIBRARIES[name], problem).lower(*inputs[0]).compile()
            function, sets_ = functools.partial(_ready, compiled), inputs
        else:
            function, sets_ = peer_torch.layer(name, problem, given)
        errors[name] = error(problem, function(sets_[0])[0], given[0])
        runs[name] = rotating(function, sets_)
    runs["copy"] = copying(problem, sets)
    seconds = measuring.take_turns(runs, options.repetitions)
    statistic = np.min if options.warm else np.median
    copied = 1e3 * float(statistic(seconds.pop("copy")))
    return [
        row(problem, name, taken, 1e3 * float(statistic(taken)), copied, errors[name])
        | {"warm": options.warm}
        for name, taken in seconds.items()
    ]


def row(
    problem: Problem, library: str, seconds: Any, ms: float, copy_ms: float, error: float
) -> Row:
    """What is written of the times of one library."""
    lower, _, upper = measuring.quartiles(1e3 * np.array(seconds))
    return problem._asdict() | {
        "library": library,
        "lower_ms": round(lower, 4),
        "ms": round(ms, 4),
        "upper_ms": round(upper, 4),
        "copy_ms": round(copy_ms, 4),
        "percent_of_copy_speed": round(50 * problem.transfers * copy_ms / ms, 1),
        "error": f"{error:.1e}",
    }


def _ready(compiled: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return jax.block_until_ready(compiled(*arguments))


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The options; `--quick` changes the defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    available = [*libraries.installed(), *peer_torch.installed()]

    def several(name: str, choices: Sequence[str], default: Sequence[str]) -> None:
        about = {"metavar": "NAME", "help": ", ".join(choices)}
        parser.add_argument(name, nargs="+", choices=choices, default=default, **about)

    several("--cases", libraries.CASES, ["BN+ReLU"])
    several("--passes", PASSES, PASSES)
    several("--dtypes", DTYPES, DTYPES[:2])
    several("--layouts", list(LAYOUTS), list(LAYOUTS))
    several("--shapes", list(SHAPES), list(SHAPES))
    several("--libraries", available, available)
    parser.add_argument("--batch", type=int, nargs="+", default=[32])
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument(
        "--cache", type=float, default=last_level_cache(), help="MB of the last-level cache"
    )
    parser.add_argument("--warm", action="store_true", help="three sets of inputs, minimum times")
    parser.add_argument("--csv", default=str(measuring.RESULTS / "bench_layer.csv"))
    parser.add_argument("--plot", default=str(measuring.RESULTS / "bench_layer.png"))
    parser.add_argument("--quick", action="store_true")
    if parser.parse_args(arguments).quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    if "jaxbn" not in options.libraries:
        parser.error("--libraries must name jaxbn too: the others are compared with it")
    if options.cache is None:
        parser.error("the size of the cache is not to be found on this system: give it as --cache")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Prints the tables; writes the rows and the plot."""
    options = parsed(arguments)
    problems = [
        Problem(case, passes, *SHAPES[shape], batch, dtype, layout)
        for case, batch, dtype, layout, passes, shape in itertools.product(
            options.cases,
            options.batch,
            options.dtypes,
            options.layouts,
            options.passes,
            options.shapes,
        )
    ]
    rows = []
    for problem in track(problems, "measuring"):
        rows += measure(problem, options.libraries, options)
        measuring.write_csv(options.csv, rows, measuring.machine())
    console = Console(width=260)
    for group in layer_tables.groups(rows):
        console.print(layer_tables.table(group))
    console.print(layer_tables.summary(rows))
    layer_tables.plot(rows, options.plot)


if __name__ == "__main__":
    main()
