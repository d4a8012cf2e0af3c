"""Memory traffic of a batch norm layer in training, read off the compiled modules.

    python -m benchmarks.compiled.traffic  # results/traffic.csv

For the CPU, and for an H100 and a TPU where their compilers are installed.

Per element of the input: bytes that cross memory in the forward and in the backward module, and
bytes kept from the one to the other. For both modules: kernels and collectives. Whole training
steps, in one module, are in `network_traffic.py`.
"""

import argparse
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.extend.core import Literal, jaxpr_as_fun
from jax.sharding import SingleDeviceSharding
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from benchmarks import libraries, measuring
from benchmarks.compiled import h100, hlo, tpu

SHAPES = {"NHWC": ((128, 56, 56, 64), 3), "NCHW": ((128, 64, 56, 56), 1)}
DTYPES = (jnp.bfloat16, jnp.float32)


class Traffic(NamedTuple):
    """What one training step of one layer costs; bytes are per element of the input."""

    forward: float
    backward: float
    kept: float
    kernels: int
    collectives: int


def measure(
    layer: Callable[..., Any], case: str, shape: tuple[int, ...], axis: int, dtype: Any, device: Any
) -> Traffic:
    """Compiles the forward and the backward pass of a layer apart, as a network runs them."""

    def spec(array: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=device)

    x = spec(jax.ShapeDtypeStruct(shape, dtype))
    vector = spec(jax.ShapeDtypeStruct((shape[axis],), jnp.float32))
    arguments = (x, vector, vector, *([x] if "add" in case else []))

    def with_pullback(*arguments: jax.Array) -> Any:
        y, pullback, aux = jax.vjp(layer, *arguments, has_aux=True)
        return pullback, (y, aux)

    traced, (pullback, _) = jax.make_jaxpr(with_pullback, return_shape=True)(*arguments)
    jaxpr, treedef = traced.jaxpr, jax.tree.structure(pullback)
    leaves = jaxpr.outvars[: treedef.num_leaves]
    # An argument or an array handed on twice neither crosses memory again nor is kept twice.
    held = list(dict.fromkeys(v for v in leaves if not isinstance(v, Literal)))
    produced = [i for i, v in enumerate(jaxpr.outvars) if v not in jaxpr.outvars[:i] + jaxpr.invars]

    def forward(*arguments: jax.Array) -> Any:
        outputs = jaxpr_as_fun(traced)(*arguments)
        return [outputs[i] for i in produced]

    def backward(arrays: list[jax.Array], dy: jax.Array) -> Any:
        values = [v.val if isinstance(v, Literal) else arrays[held.index(v)] for v in leaves]
        return jax.tree.unflatten(treedef, values)(dy)

    modules = [
        jax.jit(forward).lower(*arguments),
        jax.jit(backward).lower([spec(v.aval) for v in held], x),
    ]
    costs = [hlo.cost(module.compile().as_text()) for module in modules]
    parameters = jaxpr.invars[1:3]
    kept = sum(v.aval.size * v.aval.dtype.itemsize for v in held if v not in parameters)
    return Traffic(
        forward=costs[0].bytes / math.prod(shape),
        backward=costs[1].bytes / math.prod(shape),
        kept=kept / math.prod(shape),
        kernels=sum(cost.kernels for cost in costs),
        collectives=sum(cost.collectives for cost in costs),
    )


def compilers() -> dict[str, Any]:
    """The devices that can be compiled for; a line is printed for each of the others."""
    devices: dict[str, Any] = {"CPU": SingleDeviceSharding(jax.devices("cpu")[0])}
    for name, module in (("H100", h100), ("TPU v5e", tpu)):
        if module.available():
            devices[name] = module.sharding()
        else:
            print(f"No table for {name}: the package {module.PACKAGE} is not installed.")
    return devices


def layer_rows(name: str, device: Any) -> list[dict[str, Any]]:
    """Every case, dtype and layout on one device, library beside library."""
    rows = []
    chosen = libraries.installed()
    for dtype, (layout, (shape, axis)), case in itertools.product(
        DTYPES, SHAPES.items(), libraries.CASES
    ):
        for library, made in chosen.items():
            # Compiled as one function, no layer hands constants from one pass to the other.
            cost = measure(jax.jit(made.training(case, axis)), case, shape, axis, dtype, device)
            what = {"device": name, "case": case, "dtype": jnp.dtype(dtype).name, "layout": layout}
            numbers = {k: round(v, 2) for k, v in cost._asdict().items()}
            rows.append(what | {"library": library} | numbers)
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows of one device."""
    columns = ("", "forward", "backward", "sum", "kept", "kernels", "collectives")
    title = f"{rows[0]['device']}: bytes per element of the input"
    table = Table(*columns, title=title, box=MARKDOWN)
    for row in rows:
        both = row["forward"] + row["backward"]
        table.add_row(
            ", ".join(row[k] for k in ("case", "dtype", "layout", "library")),
            *(f"{v:.2f}" for v in (row["forward"], row["backward"], both, row["kept"])),
            str(row["kernels"]),
            str(row["collectives"]),
        )
    return table


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Bytes of forward and backward pass, a panel for each device."""
    devices = list(dict.fromkeys(row["device"] for row in rows))
    names = list(dict.fromkeys(row["library"] for row in rows))
    figure, axes = plt.subplots(len(devices), 1, figsize=(11, 3 * len(devices)), squeeze=False)
    for ax, device in zip(axes[:, 0], devices, strict=True):
        for i, name in enumerate(names):
            mine = [row for row in rows if (row["device"], row["library"]) == (device, name)]
            places = np.arange(len(mine)) + 0.8 * i / len(names)
            ax.bar(
                places, [r["forward"] + r["backward"] for r in mine], 0.8 / len(names), label=name
            )
        labels = [f"{r['case']}\n{r['dtype']}\n{r['layout']}" for r in mine]
        ax.set_xticks(np.arange(len(mine)) + 0.3, labels, fontsize=6)
        ax.set_title(device, size=9)
        ax.set_ylabel("bytes per element", size=8)
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Prints a table for each device that can be compiled for; writes the rows and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", default=str(measuring.RESULTS / "traffic.csv"))
    parser.add_argument("--plot", default=str(measuring.RESULTS / "traffic.png"))
    options = parser.parse_args(arguments)
    console = Console(width=120)
    rows = [row for name, device in compilers().items() for row in layer_rows(name, device)]
    for _, same in itertools.groupby(rows, lambda row: row["device"]):
        console.print(table(list(same)))
    measuring.write_csv(options.csv, rows, measuring.machine())
    plot(rows, options.plot)


if __name__ == "__main__":
    main()
