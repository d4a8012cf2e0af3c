"""Memory and traffic of training steps under `jax.checkpoint`, read off modules for an H100.

    python -m benchmarks.compiled.step_memory  # results/step_memory.csv

One step of gradient descent of four bottleneck blocks, at the sizes of ResNet-50's stages, in
bfloat16, one by one and under `lax.scan`. Each block is kept whole; or by `jax.checkpoint` with the
names of the inputs of its batch norms, their means and their `rstd`; or not at all. Flax has no
names: there the inputs of batch norm are named by hand. Bytes per element of these inputs: what
crosses memory (not known for a loop), and temporary arrays. Where no H100's compiler is installed,
for the CPU.
"""

import argparse
import itertools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

import jaxbn
from benchmarks import measuring, networks
from benchmarks.compiled import network_traffic, traffic
from benchmarks.timing import bench_network

STAGES = ("56×56×256", "28×28×512", "14×14×1024", "7×7×2048")
POLICIES = {
    "everything": None,
    "names": jax.checkpoint_policies.save_only_these_names(*jaxbn.CHECKPOINT_NAMES),
    "nothing": jax.checkpoint_policies.nothing_saveable,
}


def named(layers: networks.Layers) -> networks.Layers:
    """The layers, their inputs under the name that jaxbn gives its own."""

    def with_name(case: str) -> Any:
        layer = layers(case)
        return lambda x, *rest: layer(checkpoint_name(x, jaxbn.CHECKPOINT_NAMES[0]), *rest)

    return with_name


def rows_of(device: Any, batch: int, dtype: str, stages: tuple[str, ...]) -> list[dict[str, Any]]:
    """A row for each stage, library and policy."""
    rows = []
    for stage, scan, library, policy in itertools.product(
        stages, (False, True), ("jaxbn", "flax.linen"), POLICIES
    ):
        layers = bench_network.layers_of(library)
        if library != "jaxbn" and policy == "names":
            layers = named(layers)
        cost = network_traffic.step_cost(
            layers, dtype, scan, device, batch, stage=stage, policy=POLICIES[policy]
        )
        what = {"stage": stage, "scan": scan, "library": library, "kept": policy}
        rows.append(what | {k: cost[k] for k in ("crossing", "temporary")})
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """A line for each stage, a column for each library and policy: temporary (crossing)."""
    names = list(dict.fromkeys((r["library"], r["kept"]) for r in rows))
    heading = "bytes per element in temporary arrays (crossing memory)"
    table = Table("", *(f"{a}, {b}" for a, b in names), title=heading, box=MARKDOWN)
    for (stage, scan), same in itertools.groupby(rows, lambda r: (r["stage"], r["scan"])):
        cells = [
            f"{r['temporary']:.2f}" + ("" if r["crossing"] is None else f" ({r['crossing']:.1f})")
            for r in same
        ]
        table.add_row(stage + (", scan" if scan else ""), *cells)
    return table


def main(arguments: list[str] | None = None) -> None:
    """Prints the table and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--csv", default=str(measuring.RESULTS / "step_memory.csv"))
    options = parser.parse_args(arguments)
    devices = traffic.compilers()
    name = "H100" if "H100" in devices else next(iter(devices))
    rows = rows_of(devices[name], options.batch, options.dtype, tuple(options.stages))
    console = Console(width=160)
    console.print(f"{name}, {options.dtype}, batch {options.batch}")
    console.print(table(rows))
    measuring.write_csv(options.csv, rows, measuring.machine())


if __name__ == "__main__":
    main()
