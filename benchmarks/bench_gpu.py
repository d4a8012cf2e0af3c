"""Batch norm layers on a GPU, timed on the device: the twelve shapes of ResNet-50, and copies.

    benchmarks/gpu.sh                                             # all GPU benchmarks, 8 minutes
    python benchmarks/bench_gpu.py --batch 256                    # this one alone
    python benchmarks/bench_gpu.py --device cpu --quick           # a trial of the program

A JAX library runs in a chain, each layer on the output of the one before, in one compiled loop; the
time of a layer is the difference of two lengths of the chain, so that what it takes to start them
does not count. torch runs in a CUDA graph between CUDA events: its own kernels for bfloat16,
channels last; cuDNN's for float16 with float32 parameters; and what torch.compile makes. A row
names the share of the copy speed of a tensor of the same bytes, measured in the same way.
"""

import argparse
import itertools
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import layer_problems
import libraries
import measuring
import peer_torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"
JAX_LIBRARIES = ("jaxbn", "flax.linen")


def chained(step: Callable[[Any], Any], start: Any, lengths: tuple[int, int]) -> float:
    """Seconds of one step, from the best times of two chains of steps in compiled loops."""

    def chain(length: int) -> Callable[[Any], Any]:
        return jax.jit(lambda carry: jax.lax.fori_loop(0, length, lambda _, c: step(c), carry))

    best = []
    for length in lengths:
        run = chain(length)
        jax.block_until_ready(run(start))
        taken = []
        for _ in range(5):
            begin = time.perf_counter()
            jax.block_until_ready(run(start))
            taken.append(time.perf_counter() - begin)
        best.append(min(taken))
    return max(best[1] - best[0], 0.0) / (lengths[1] - lengths[0])


def jax_step(name: str, problem: layer_problems.Problem) -> tuple[Callable[[Any], Any], Any]:
    """A step from `(x, dy)` to the next, and the first."""
    given = layer_problems.arrays(problem, 0)
    x, dy, residual = (jnp.asarray(given[k]) for k in ("x", "dy", "residual"))
    scale, bias, mean, var = (jnp.asarray(given[k]) for k in ("scale", "bias", "mean", "var"))
    axis = layer_problems.LAYOUTS[problem.layout]
    extra = (residual,) if "add" in problem.case else ()
    library = libraries.LIBRARIES[name]
    training = library.training(problem.case, axis)

    def inference(carry: Any) -> Any:
        layer = library.inference(problem.case, axis)
        return layer(carry[0], scale, bias, mean, var, *extra), carry[1]

    def forward(carry: Any) -> Any:
        y, _ = training(carry[0], scale, bias, *extra)
        return y, carry[1]

    def both(carry: Any) -> Any:
        y, pullback, _ = jax.vjp(training, carry[0], scale, bias, *extra, has_aux=True)
        dx, *others = pullback(carry[1])
        # Everything that a step computes is used, or a compiler leaves it out.
        used = sum(jnp.sum(v[:1] if v.ndim == 1 else v[:1, :1, :1, :1]) for v in others)
        return y, dx + (0 * used).astype(dx.dtype)

    return {"inference": inference, "forward": forward}.get(problem.passes, both), (x, dy)


def torch_seconds(name: str, problem: layer_problems.Problem, repetitions: int) -> float:
    """Seconds of one step in a replayed CUDA graph, between events."""
    import torch

    run, inputs = peer_torch.layer(name, problem, [layer_problems.arrays(problem, 0)], "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(inputs[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(inputs[0])
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    taken = []
    for _ in range(5):
        start.record()
        for _ in range(repetitions):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end) / 1e3 / repetitions)
    return min(taken)


def measure(
    problem: layer_problems.Problem, names: list[str], lengths: tuple[int, int]
) -> list[dict[str, Any]]:
    """The rows of one problem."""
    start = jnp.asarray(layer_problems.arrays(problem, 0)["x"])
    copied = chained(lambda x: -x, start, lengths)
    rows = []
    for name in names:
        if name.startswith("torch"):
            seconds = torch_seconds(name, problem, lengths[1] - lengths[0])
        else:
            seconds = chained(*jax_step(name, problem), lengths)
        bound = copied * problem.transfers / 2
        share = round(100 * bound / seconds, 1) if seconds else None
        times = {"ms": round(1e3 * seconds, 4), "copy_ms": round(1e3 * copied, 4)}
        rows.append(
            problem._asdict() | {"library": name} | times | {"percent_of_copy_speed": share}
        )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """A line for each shape, a column for each library, and ResNet-50's 53 layers together."""
    names = list(dict.fromkeys(row["library"] for row in rows))
    title = ", ".join(rows[0][k] for k in ("case", "passes", "dtype", "layout"))
    table = Table("", *names, title=f"{title}: ms (percent of copy speed)", box=MARKDOWN)
    totals = dict.fromkeys(names, 0.0)
    for (side, channels), same in itertools.groupby(rows, lambda r: (r["side"], r["channels"])):
        cells = []
        for row in same:
            cells.append(f"{row['ms']:.3f} ({row['percent_of_copy_speed']})")
            totals[row["library"]] += row["ms"] * layer_problems.RESNET50[side, channels]
        table.add_row(f"{side}, {channels}", *cells)
    table.add_row("weighted by ResNet-50", *(f"{total:.2f}" for total in totals.values()))
    return table


def clocks() -> str:
    """What the driver says of clocks, power and temperature."""
    command = ["nvidia-smi", f"--query-gpu=name,{CLOCKS}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main(arguments: list[str] | None = None) -> None:
    """Prints the tables and writes the rows, after every table those so far."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--cases", nargs="+", choices=libraries.CASES, default=["BN+ReLU"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--quick", action="store_true", help="three shapes, batch 2")
    parser.add_argument("--csv", default=str(measuring.RESULTS / "gpu_layer.csv"))
    options = parser.parse_args(arguments)
    on_gpu = options.device == "gpu"
    names = [*JAX_LIBRARIES, *(peer_torch.installed()[1:] if on_gpu else [])]
    shapes = list(layer_problems.RESNET50)[:: 5 if options.quick else 1]
    batch, lengths = (2, (2, 4)) if options.quick else (options.batch, (10, 40))
    about = measuring.machine() | ({"clocks before": clocks()} if on_gpu else {})
    rows: list[dict[str, Any]] = []
    passes = ("forward+backward", "forward", "inference")
    with jax.default_device(jax.devices(options.device)[0]):
        for dtype, case, way in itertools.product(options.dtypes, options.cases, passes):
            new = []
            for shape in shapes:
                problem = layer_problems.Problem(case, way, *shape, batch, dtype, "NHWC")
                new += measure(problem, names, lengths)
            Console(width=160).print(table(new))
            rows += new
            after = {"clocks after": clocks()} if on_gpu else {}
            measuring.write_csv(options.csv, rows, about | after)
    shares = [row["percent_of_copy_speed"] for row in rows if row["library"] == "jaxbn"]
    print("median percent of copy speed, jaxbn:", statistics.median(filter(None, shares)))


if __name__ == "__main__":
    main()
