"""Batch norm layers on a GPU, timed on the device: the twelve shapes of ResNet-50, and copies.

    benchmarks/gpu.sh                                  # all GPU benchmarks, 8 minutes
    python -m benchmarks.timing.bench_gpu --batch 256  # this one alone
    python -m benchmarks.timing.bench_gpu --device cpu --quick  # a trial of the program

A JAX library compiles five steps into one module, torch puts five into one CUDA graph: its own
kernels for bfloat16, cuDNN's for float16 with float32 parameters, and what torch.compile makes.
A time is the difference of four such runs and of the fastest single one, so that what it takes to
start them does not count. All steps are on the same data: what fits into the GPU's cache may be
there already. *Percent of copy speed* is the time in which the bytes of the two-pass algorithm are
copied, in the same way, over the time taken. Every row is checked against float64 NumPy, in two
channels: `error` is the difference of output and input gradient over their largest magnitude.
"""

import argparse
import functools
import itertools
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from benchmarks import libraries, measuring
from benchmarks.timing import bench_layer, layer_tables, peer_torch
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

CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"
STEPS = 5  # in a run
CHANNELS = 2  # are checked


def repeated(step: Callable[..., Any]) -> Callable[..., Any]:
    """`step(x, scale, …)` five times, one after the other, so that a compiler leaves none out."""

    def steps(x: jax.Array, scale: jax.Array, *others: Any) -> Any:
        results = step(x, scale, *others)
        for _ in range(STEPS - 1):
            (x, others), results = jax.lax.optimization_barrier(((x, others), results))
            firsts = (v.ravel()[0] for v in jax.tree.leaves(results))
            nothing = sum(0 * first.astype(scale.dtype) for first in firsts)
            results = step(x, scale + nothing, *others)
        return results

    return steps


def copied(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Reads and writes `x`."""
    return x - jnp.expand_dims(scale.astype(x.dtype), range(x.ndim - 1))


def compiled(name: str, problem: Problem) -> Callable[..., Any]:
    """The steps of a library, or copies."""
    inputs = jax.eval_shape(lambda: bench_layer.jax_inputs(problem, arrays(problem, 0)))
    if name == "copy":
        x, scale = inputs[0], jax.eval_shape(lambda: jnp.zeros(problem.shape[-1]))
        return jax.jit(repeated(copied)).lower(x, scale).compile()
    step = bench_layer.in_jax(libraries.LIBRARIES[name], problem)
    return jax.jit(repeated(step)).lower(*inputs).compile()


def seconds(run: Callable[[], Any], wait: Callable[[Any], Any], repetitions: int) -> list[float]:
    """Seconds of a step: of four runs in a row less the fastest one alone, over their steps."""

    def taken(runs: int) -> float:
        begin = time.perf_counter()
        for _ in range(runs):
            result = run()
        wait(result)
        return time.perf_counter() - begin

    taken(4)
    pairs = [(taken(4), taken(1)) for _ in range(repetitions)]
    once = min(one for _, one in pairs)
    return [(four - once) / (3 * STEPS) for four, _ in pairs]


def torch_run(
    name: str, problem: Problem, given: dict[str, Any]
) -> tuple[Callable[[], Any], Sequence[Any]]:
    """A replay of `STEPS` steps in a CUDA graph, and the outputs."""
    import torch

    run, inputs = peer_torch.layer(name, problem, [given])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(inputs[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(STEPS):
            outputs, _ = run(inputs[0])
    graph.replay()
    return graph.replay, outputs


def checked(problem: Problem, outputs: Sequence[Any], given: dict[str, Any]) -> float:
    """The error of the first channels."""

    def first(v: Any) -> Any:
        axis = LAYOUTS[problem.layout] if v.ndim > 1 else 0
        return jax.lax.slice_in_dim(v, 0, CHANNELS, axis=axis % v.ndim)

    few = problem._replace(channels=CHANNELS)
    return error(few, [first(v) for v in outputs], {k: first(v) for k, v in given.items()})


def measure(
    problem: Problem, names: Sequence[str], runs: dict[Any, Any], repetitions: int
) -> list[Row]:
    """The rows of one problem."""
    given = arrays(problem, 0)
    inputs = bench_layer.jax_inputs(problem, given)
    copy = functools.partial(runs["copy", problem], given["x"], jnp.ones(problem.shape[-1]))
    copy_ms = 1e3 * float(np.median(seconds(copy, jax.block_until_ready, repetitions)))
    rows = []
    for name in names:
        if name in libraries.LIBRARIES:
            run = functools.partial(runs[name, problem], *inputs)
            taken = seconds(run, jax.block_until_ready, repetitions)
            outputs = run()[0]
        else:
            import torch

            replay, images = torch_run(name, problem, given)
            taken = seconds(replay, lambda _: torch.cuda.synchronize(), repetitions)
            outputs = [image.in_jax() for image in images]
        wrong = checked(problem, outputs, given)
        ms = 1e3 * float(np.median(taken))
        rows.append(bench_layer.row(problem, name, taken, ms, copy_ms, wrong))
    return rows


def clocks() -> str:
    """What the driver says of clocks, power and temperature."""
    command = ["nvidia-smi", f"--query-gpu=name,{CLOCKS}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The options; `--quick` changes the defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    everything = ["jaxbn", "flax.linen", *peer_torch.NAMES]
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--cases", nargs="+", choices=libraries.CASES, default=["BN+ReLU"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=["NHWC"])
    parser.add_argument("--libraries", nargs="+", choices=everything, default=everything[:4])
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="three shapes, batch 2")
    parser.add_argument("--csv", default=str(measuring.RESULTS / "gpu_layer.csv"))
    if parser.parse_args(arguments).quick:
        parser.set_defaults(batch=2)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Prints the tables; writes the rows, after every shape those so far."""
    options = parsed(arguments)
    on_gpu = options.device == "gpu"
    names = [n for n in options.libraries if on_gpu or n in libraries.LIBRARIES]
    shapes = list(RESNET50)[:: 5 if options.quick else 1]
    about = measuring.machine() | ({"clocks before": clocks()} if on_gpu else {})
    rows: list[Row] = []
    groups = itertools.product(options.cases, options.dtypes, options.layouts, options.passes)
    with jax.default_device(jax.devices(options.device)[0]), ThreadPoolExecutor() as threads:
        for case, dtype, layout, passes in groups:
            problems = [
                Problem(case, passes, *shape, options.batch, dtype, layout) for shape in shapes
            ]
            in_jax = [name for name in ("copy", *names) if not name.startswith("torch")]
            pairs = list(itertools.product(in_jax, problems))
            runs = dict(zip(pairs, threads.map(lambda p: compiled(*p), pairs), strict=True))
            group: list[Row] = []
            for problem in problems:
                group += measure(problem, names, runs, options.repetitions)
                after = {"clocks after": clocks()} if on_gpu else {}
                measuring.write_csv(options.csv, rows + group, about | after)
            Console(width=200).print(layer_tables.table(group))
            rows += group
    Console(width=200).print(layer_tables.summary(rows))


if __name__ == "__main__":
    main()
