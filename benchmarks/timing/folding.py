"""MobileNetV2 with its batch norms folded into its convolutions beside the network as it was.

    export PYTHONPATH=examples/import_torch
    python -m benchmarks.timing.folding                     # on the CPU, batches 1 and 8
    python -m benchmarks.timing.folding --csv folding.csv   # and the time of every run

Both networks are compiled, variables being arguments, and take turns. Times are medians and
quartiles in milliseconds; the ratio is the median, over the turns, of folded over unfolded time.
From the compiled modules: the bytes that the compiler's cost analysis counts, and the fusions. The
difference is the largest of the outputs over the largest output. Weights are random.

A second table has the rounding errors of one dense layer and its batch norm, before and after
folding, against float64: the largest difference over the largest magnitude.
"""

import argparse
import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mobilenet
import numpy as np
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

import jaxbn
from benchmarks import measuring


class Compiled(NamedTuple):
    """A network, compiled for its variables and one batch."""

    run: Callable[[], jax.Array]
    megabytes: float  # that cross memory
    fusions: int


def variables_of(network: mobilenet.MobileNetV2, x: jax.Array, seed: int = 0) -> Any:
    """Variables with random statistics and batch norms, none of them at 0 or 1."""
    variables = jax.jit(network.init)(jax.random.key(seed), x)
    leaves, treedef = jax.tree.flatten_with_path(variables)
    key = jax.random.key(seed + 1)
    drawn = []
    for i, (path, leaf) in enumerate(leaves):
        noise = jax.random.normal(jax.random.fold_in(key, i), leaf.shape)
        values = {
            "mean": 0.2 * noise,
            "var": jnp.exp(0.3 * noise),
            "scale": 1.5 + 0.2 * noise,
            "bias": 0.3 + 0.2 * noise,
        }
        drawn.append(values.get(path[-1].key, leaf))
    return jax.tree.unflatten(treedef, drawn)


def compiled(network: mobilenet.MobileNetV2, variables: Any, x: jax.Array) -> Compiled:
    """The network in inference mode, and what its compiled module says of itself."""
    executable = jax.jit(network.apply).lower(variables, x).compile()
    megabytes = executable.cost_analysis()["bytes accessed"] / 1e6
    fusions = executable.as_text().count(" fusion(")
    return Compiled(lambda: executable(variables, x), megabytes, fusions)


def measure(batch: int, size: int, repetitions: int, table: Table) -> list[dict[str, Any]]:
    """Adds the rows of one batch size to the table; a row for each time that was taken."""
    x = jax.random.normal(jax.random.key(2), (batch, size, size, 3))
    unfolded, folded = (mobilenet.MobileNetV2(folded=folded) for folded in (False, True))
    variables = variables_of(unfolded, x)
    less = jaxbn.fold_variables(variables, mobilenet.conv_norm_pairs())
    networks = {"unfolded": compiled(unfolded, variables, x), "folded": compiled(folded, less, x)}
    expected, actual = (np.asarray(network.run()) for network in networks.values())
    difference = np.abs(actual - expected).max() / np.abs(expected).max()
    runs = {
        name: lambda n=network: n.run().block_until_ready() for name, network in networks.items()
    }
    seconds = measuring.take_turns(runs, repetitions)
    taken = {name: 1e3 * values for name, values in seconds.items()}
    ratio = np.median(taken["folded"] / taken["unfolded"])
    for name, network in networks.items():
        lower, median, upper = measuring.quartiles(taken[name])
        table.add_row(
            f"batch {batch}, {name}",
            f"{median:.1f}",
            f"{lower:.1f} – {upper:.1f}",
            "1" if name == "unfolded" else f"{ratio:.3f}",
            f"{network.megabytes:.1f}",
            str(network.fusions),
            "" if name == "unfolded" else f"{difference:.1e}",
        )
    return [
        {"batch": batch, "network": name, "turn": i, "milliseconds": t}
        for name, values in taken.items()
        for i, t in enumerate(values)
    ]


def errors() -> Table:
    """One layer on inputs of large means and small deviations, in float32 and in bfloat16.

    The referee computes in float64 from the same rounded input and kernel. In bfloat16 the input,
    the kernel and what the layers put out are rounded to it, whereas parameters are float32.
    """
    columns = ("", "float32", "folded", "bfloat16", "folded")
    table = Table(*columns, title="Error of a dense layer and batch norm", box=MARKDOWN)
    random = np.random.RandomState(0)
    noise, weights = random.standard_normal((512, 64)), random.standard_normal((64, 64)) / 8
    scale, bias = 1 + 0.5 * random.standard_normal(64), random.standard_normal(64)
    for mean, std in ((0, 1), (10, 1), (100, 1), (1e4, 1), (0, 1e-6)):
        cells = []
        for dtype in (jnp.float32, jnp.bfloat16):
            x, kernel = (jnp.asarray(v, dtype) for v in (mean + std * noise, weights))
            exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
            statistics = exact.mean(0), exact.var(0)
            norm = [jnp.asarray(v, jnp.float32) for v in (*statistics, scale, bias)]
            exact = (exact - statistics[0]) / np.sqrt(statistics[1] + 1e-5) * scale + bias
            folded, shift = jaxbn.fold_into_dense(kernel.astype(jnp.float32), None, *norm)
            folded, shift = folded.astype(dtype), shift.astype(dtype)
            for y in (jaxbn.normalize(x @ kernel, *norm), x @ folded + shift):
                error = np.abs(np.asarray(y, np.float64) - exact).max() / np.abs(exact).max()
                cells.append(f"{error:.1e}")
        table.add_row(f"input of mean {mean:g}, std {std:g}", *cells)
    return table


def main() -> None:
    """Prints the table; writes the times where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="batch sizes")
    parser.add_argument("--size", type=int, default=224, help="pixels of an edge")
    parser.add_argument("--repetitions", type=int, default=30, help="turns of each network")
    parser.add_argument("--csv", help="file for batch, network, turn and milliseconds of every run")
    options = parser.parse_args()
    columns = ("", "ms", "quartiles", "ratio", "MB accessed", "fusions", "difference")
    table = Table(*columns, title=f"MobileNetV2, {options.size}×{options.size}", box=MARKDOWN)
    rows = []
    with jax.default_device(jax.devices("cpu")[0]):
        for batch in options.batches:
            rows += measure(batch, options.size, options.repetitions, table)
        rounding = errors()
    console = Console(width=120)
    console.print(f"jax {jax.__version__}, {platform.machine()}, {options.repetitions} repetitions")
    console.print(table)
    console.print(rounding)
    if options.csv:
        measuring.write_csv(options.csv, rows, measuring.machine())


if __name__ == "__main__":
    main()
