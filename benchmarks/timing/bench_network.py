"""Whole training steps of residual networks, library beside library: milliseconds and memory.

    python -m benchmarks.timing.bench_network  # results/bench_network.csv and .png
    python -m benchmarks.timing.bench_network --quick --csv q.csv

A step computes the loss, its gradients, the new statistics and new parameters (SGD), compiled,
with donated parameters. The networks: 20 layers for 32×32 images, and four bottleneck blocks of
ResNet-50 at 56×56×256 and 14×14×1024, one by one and under `lax.scan`. `none` is the network
without batch norm; what a library takes more is its batch norm. Memory is what the compiled module
reserves: arguments, results that do not replace them, and temporaries. Ratios over 1 mean that
jaxbn is faster or smaller.
"""

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import libraries, measuring, networks

NETWORKS = ("resnet20", "56×56×256", "56×56×256, scan", "14×14×1024", "14×14×1024, scan")
RATE = 1e-3


def arguments(name: str, dtype: Any, batch: int, depth: int) -> tuple[networks.Params, jax.Array]:
    """Parameters and input of one of `NETWORKS`; `depth` is that of the stages of resnet20."""
    key, key_x = jax.random.split(jax.random.key(0))
    if name == "resnet20":
        x = jax.random.normal(key_x, (8 * batch, 32, 32, 3), dtype)
        return networks.resnet_params(key, depth), x
    side, _, channels = map(int, name.split(",")[0].split("×"))
    params = jax.vmap(lambda k: networks.bottleneck_params(k, channels))(jax.random.split(key, 4))
    return params, jax.random.normal(key_x, (batch, side, side, channels), dtype)


def training_step(
    name: str, layers: networks.Layers, policy: networks.Policy | None = None
) -> Callable[..., Any]:
    """`(params, x) -> (params, loss, stats)`; the loss is a fixed function of the output.

    With a `policy`, each bottleneck block is under `jax.checkpoint`.
    """

    def loss(params: networks.Params, x: jax.Array) -> tuple[jax.Array, Any]:
        if name == "resnet20":
            logits, stats = networks.resnet(params, x, layers)
            labels = jnp.arange(len(x)) % 10
            return -jax.nn.log_softmax(logits)[jnp.arange(len(x)), labels].mean(), stats
        y, stats = networks.blocks(params, x, layers, "scan" in name, policy)
        weights = jnp.cos(jnp.arange(y.shape[-1], dtype=jnp.float32))
        return (y.mean((0, 1, 2)).astype(jnp.float32) * weights).sum(), stats

    def step(params: networks.Params, x: jax.Array) -> Any:
        (value, stats), gradients = jax.value_and_grad(loss, has_aux=True)(params, x)
        return jax.tree.map(lambda p, g: p - RATE * g, params, gradients), value, stats

    return step


def layers_of(name: str) -> networks.Layers:
    """The training layers of a library, channels last; `none` has none."""
    if name == "none":
        return networks.without
    return lambda case: libraries.LIBRARIES[name].training(case, -1)


def compiled(step: Callable[..., Any], params: Any, x: jax.Array) -> tuple[Callable[[], Any], int]:
    """A run of one training step after another, and the bytes that it reserves."""
    executable = jax.jit(step, donate_argnums=0).lower(params, x).compile()
    memory = executable.memory_analysis()
    reserved = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    params = jax.tree.map(jnp.copy, params)

    def run() -> Any:
        nonlocal params
        params, loss, _ = jax.block_until_ready(executable(params, x))
        return loss

    return run, reserved


def measure(
    name: str, dtype: str, chosen: list[str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of one network in one dtype."""
    given = arguments(name, dtype, options.batch, options.depth)
    steps = {
        library: compiled(training_step(name, layers_of(library)), *given)
        for library in ("none", *chosen)
    }
    runs = {library: run for library, (run, _) in steps.items()}
    losses = {library: float(run()) for library, run in runs.items()}
    assert np.isfinite(list(losses.values())).all(), losses
    rows = []
    for library, taken in measuring.take_turns(runs, options.repetitions).items():
        lower, median, upper = measuring.quartiles(1e3 * taken)
        rows.append(
            {
                "network": name,
                "dtype": dtype,
                "batch": 8 * options.batch if name == "resnet20" else options.batch,
                "library": library,
                "lower_ms": round(lower, 2),
                "median_ms": round(median, 2),
                "upper_ms": round(upper, 2),
                "megabytes": round(steps[library][1] / 1e6, 2),
                "first_loss": losses[library],
            }
        )
    return rows


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """Time and memory, a line for each network and dtype and a column for each library."""
    names = list(dict.fromkeys(row["library"] for row in rows))
    made = []
    for quantity, title in (("median_ms", "ms of a training step"), ("megabytes", "MB reserved")):
        table = Table("", *names, title=title, box=MARKDOWN)
        shares: dict[str, list[float]] = {name: [] for name in names}
        for (net, dtype), same in itertools.groupby(rows, lambda r: (r["network"], r["dtype"])):
            values = {row["library"]: row[quantity] for row in same}
            table.add_row(f"{net}, {dtype}", *(f"{values[name]:.1f}" for name in names))
            for name in names:
                shares[name].append(values[name] / values["jaxbn"])
        means = (measuring.geometric_mean(shares[name]) for name in names)
        table.add_row("over jaxbn, geometric mean", *(f"{mean:.2f}" for mean in means))
        made.append(table)
    return made


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Bars of time for each network and dtype."""
    labels = list(dict.fromkeys(f"{row['network']}\n{row['dtype']}" for row in rows))
    names = list(dict.fromkeys(row["library"] for row in rows))
    figure, ax = plt.subplots(figsize=(1.2 * len(labels) + 2, 4))
    for i, name in enumerate(names):
        mine = [row for row in rows if row["library"] == name]
        ax.bar(
            np.arange(len(mine)) + 0.8 * (i / len(names) - 0.5),
            [row["median_ms"] for row in mine],
            0.8 / len(names),
            label=name,
        )
    ax.set_xticks(range(len(labels)), labels, fontsize=7)
    ax.set_ylabel("ms of a training step")
    ax.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The options; `--quick` changes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=8, help="images; resnet20 takes eight times")
    parser.add_argument("--depth", type=int, default=3, help="blocks of a stage of resnet20")
    parser.add_argument("--libraries", nargs="+", help="default: all that are installed")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--csv", default=str(measuring.RESULTS / "bench_network.csv"))
    parser.add_argument("--plot", default=str(measuring.RESULTS / "bench_network.png"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    if options.quick:
        options.batch, options.depth, options.repetitions = 1, 1, 3
        options.dtypes = options.dtypes[:1]
    return options


def main(arguments: list[str] | None = None) -> None:
    """Prints the tables; writes the rows and the plot."""
    options = parsed(arguments)
    chosen = options.libraries or list(libraries.installed())
    rows = []
    for dtype, name in track(list(itertools.product(options.dtypes, options.networks))):
        rows += measure(name, dtype, chosen, options)
        measuring.write_csv(options.csv, rows, measuring.machine())
    console = Console(width=160)
    for table in tables(rows):
        console.print(table)
    plot(rows, options.plot)


if __name__ == "__main__":
    main()
