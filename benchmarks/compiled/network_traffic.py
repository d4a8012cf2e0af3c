"""Memory traffic of whole training steps, read off the compiled modules.

    python -m benchmarks.compiled.network_traffic  # results/network_traffic.csv

For the CPU, and for an H100 and a TPU where their compilers are installed.

Four bottleneck blocks of ResNet-50 at 56×56×256 and one step of gradient descent in one module, so
that a compiler fuses batch norm with what is around it. Bytes that cross memory, for each element
of the inputs of the twelve batch norms, and those of the network without batch norm; kernels; bytes
of temporary arrays, one block after the other and under `lax.scan`, where more cannot be told.
On a TPU the bytes are those of the compiler's own analysis, on the others as in `traffic.py`.
"""

import argparse
import itertools
from typing import Any

import jax
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from benchmarks import libraries, measuring, networks
from benchmarks.compiled import hlo, traffic
from benchmarks.timing import bench_network

STAGE = "56×56×256"


def step_cost(
    layers: networks.Layers,
    dtype: str,
    scan: bool,
    device: Any,
    batch: int,
    *,
    on_a_tpu: bool = False,
    stage: str = STAGE,
    policy: networks.Policy | None = None,
) -> dict[str, float | None]:
    """What one training step costs: bytes per element that cross memory, kernels, temporaries."""
    side, _, channels = map(int, stage.split("×"))
    name = f"{stage}{', scan' if scan else ''}"
    step = bench_network.training_step(name, layers, policy)
    given = jax.eval_shape(lambda: bench_network.arguments(name, dtype, batch, 3))
    placed = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=device), given)
    executable = jax.jit(step, donate_argnums=0).lower(*placed).compile()
    elements = 4 * batch * side**2 * (channels // 4 + channels // 4 + channels)
    temporary = executable.memory_analysis().temp_size_in_bytes / elements
    if scan:
        return {"crossing": None, "kernels": None, "temporary": round(temporary, 2)}
    if on_a_tpu:
        crossing, kernels = executable.cost_analysis()["bytes accessed"], None
    else:
        crossing, kernels, _ = hlo.cost(executable.as_text())
    return {
        "crossing": round(crossing / elements, 2),
        "kernels": kernels,
        "temporary": round(temporary, 2),
    }


def rows_of(device_name: str, device: Any, batch: int) -> list[dict[str, Any]]:
    """Every dtype, plain and scanned, the network without batch norm first."""
    rows = []
    for dtype, scan in itertools.product(("bfloat16", "float32"), (False, True)):
        for library in ("none", *libraries.installed()):
            layers = bench_network.layers_of(library)
            on_a_tpu = device_name.startswith("TPU")
            cost = step_cost(layers, dtype, scan, device, batch, on_a_tpu=on_a_tpu)
            what = {"device": device_name, "dtype": dtype, "scan": scan, "library": library}
            rows.append(what | cost)
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows of one device."""
    columns = ("", "crossing", "less the network's own", "kernels", "temporary")
    table = Table(*columns, title=f"{rows[0]['device']}: bytes per element", box=MARKDOWN)
    floors = {(r["dtype"], r["scan"]): r["crossing"] for r in rows if r["library"] == "none"}
    for row in rows:
        crossing, floor = row["crossing"], floors[row["dtype"], row["scan"]]
        cells = ["", ""] if crossing is None else [f"{crossing:.2f}", f"{crossing - floor:.2f}"]
        kernels = "" if row["kernels"] is None else str(row["kernels"])
        label = f"{row['dtype']}{', scan' if row['scan'] else ''}, {row['library']}"
        table.add_row(label, *cells, kernels, f"{row['temporary']:.2f}")
    return table


def main(arguments: list[str] | None = None) -> None:
    """Prints a table for each device that can be compiled for; writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--csv", default=str(measuring.RESULTS / "network_traffic.csv"))
    options = parser.parse_args(arguments)
    console = Console(width=120)
    rows = []
    for name, device in traffic.compilers().items():
        rows += rows_of(name, device, options.batch)
        console.print(table([row for row in rows if row["device"] == name]))
        measuring.write_csv(options.csv, rows, measuring.machine())


if __name__ == "__main__":
    main()
