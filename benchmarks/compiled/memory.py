"""What a layer keeps from its forward for its backward pass, library beside library.

    python -m benchmarks.compiled.memory  # results/memory.csv and .png

Bytes per element of the input, forward and backward pass compiled apart, without parameters. In
*kept* the input counts, which the layer before could hand on, and so does the output, where a layer
keeps it: the next one keeps it anyway. *Beside both* is the rest. For torch, the tensors that
autograd saves. Then of three layers of convolution, batch norm and ReLU, for each: the bytes kept
plainly and where `jax.checkpoint` keeps what `jaxbn.CHECKPOINT_NAMES` name.
"""

import argparse
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

import jaxbn
from benchmarks import libraries, measuring, networks

SHAPE = (8, 28, 28, 32)
DTYPES = ("float32", "bfloat16")


def held(function: Callable[..., Any], *arguments: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    """The output of a compiled forward pass, and the distinct arrays for its backward pass."""

    @jax.jit
    def forward(*arguments: jax.Array) -> Any:
        return jax.vjp(function, *arguments, has_aux=True)

    y, pullback, _ = forward(*arguments)
    # What is an argument comes back as another array: equal ones of a shape are one.
    distinct: list[jax.Array] = []
    for leaf in jax.tree.leaves(pullback):
        if not any(leaf.shape == v.shape and bool(jnp.array_equal(leaf, v)) for v in distinct):
            distinct.append(leaf)
    return y, distinct


def kept_in_jax(library: libraries.Library, case: str, dtype: str) -> tuple[float, float]:
    """Bytes per element: of all that is kept, and of what is neither input nor output."""
    keys = jax.random.split(jax.random.key(0), 2)
    x, residual = (1 + jax.random.normal(key, SHAPE, dtype) for key in keys)
    scale, bias = (jnp.full(SHAPE[-1], v, jnp.float32) for v in (1.5, 0.1))
    arguments = (x, scale, bias, *([residual] if "add" in case else []))
    layer = library.training(case, -1)
    y, kept = held(layer, *arguments)
    arrays = [v for v in kept if v.size > scale.size]
    rest = [v for v in arrays if not any(_same(v, known) for known in (x, y))]
    return sum(v.nbytes for v in arrays) / x.size, sum(v.nbytes for v in rest) / x.size


def _same(a: jax.Array, b: jax.Array) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(jnp.array_equal(a, b))


def kept_in_torch(case: str, dtype: str) -> tuple[float, float]:
    """The same of the tensors that torch saves, by their storage."""
    import torch

    x, residual = (
        torch.randn(8, 32, 28, 28, dtype=getattr(torch, dtype)).requires_grad_() for _ in range(2)
    )
    scale, bias = (torch.ones(32, requires_grad=True) for _ in range(2))
    saved: dict[int, Any] = {}

    def pack(value: Any) -> Any:
        saved[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        y = torch.nn.functional.batch_norm(
            x, torch.zeros(32), torch.ones(32), scale, bias, True, libraries.MOMENTUM
        )
        if "add" in case:
            y = y + residual
        y = torch.nn.functional.relu(y) if "ReLU" in case else y
    large = {pointer: v for pointer, v in saved.items() if v.numel() > 32}
    known = {v.untyped_storage().data_ptr() for v in (x, y)}
    rest = sum(v.nbytes for pointer, v in large.items() if pointer not in known)
    return sum(v.nbytes for v in large.values()) / x.numel(), rest / x.numel()


def kept_in_blocks(library: libraries.Library, dtype: str, policy: bool) -> float:
    """Bytes per element and layer that three convolutions with batch norm and ReLU keep."""
    keys = jax.random.split(jax.random.key(0), 4)
    channels = SHAPE[-1]
    params = [networks.conv_norm(key, 3, channels, channels) for key in keys[:3]]
    x = jax.random.normal(keys[3], SHAPE, dtype)
    layer = library.training("BN+ReLU", -1)

    def network(x: jax.Array, params: Any) -> tuple[jax.Array, Any]:
        stats = []
        for p in params:
            x, new = layer(networks.convolved(x, p["kernel"]), p["scale"], p["bias"])
            stats.append(new)
        return x, stats

    if policy:
        names = jax.checkpoint_policies.save_only_these_names(*jaxbn.CHECKPOINT_NAMES)
        network = jax.checkpoint(network, policy=names)
    _, kept = held(network, x, params)
    return sum(v.nbytes for v in kept if v.size >= x.size) / x.size / 3


def rows() -> list[dict[str, Any]]:
    """Every case and dtype of every library, then the blocks."""
    found = []
    chosen = libraries.installed()
    for dtype, case in itertools.product(DTYPES, libraries.CASES):
        for name, library in chosen.items():
            kept, rest = kept_in_jax(library, case, dtype)
            found.append(_row(case, dtype, name, kept, rest))
        if importlib.util.find_spec("torch") is not None:
            found.append(_row(case, dtype, "torch", *kept_in_torch(case, dtype)))
    for dtype, (name, library) in itertools.product(DTYPES, chosen.items()):
        kept = kept_in_blocks(library, dtype, policy=False)
        found.append(_row("three conv+BN+ReLU", dtype, name, kept, None))
    for dtype in DTYPES:
        kept = kept_in_blocks(chosen["jaxbn"], dtype, policy=True)
        found.append(_row("three conv+BN+ReLU", dtype, "jaxbn, names kept", kept, None))
    return found


def _row(case: str, dtype: str, library: str, kept: float, rest: float | None) -> dict[str, Any]:
    numbers = {"kept": round(kept, 2), "beside_both": None if rest is None else round(rest, 2)}
    return {"case": case, "dtype": dtype, "library": library} | numbers


def table(rows: list[dict[str, Any]]) -> Table:
    """A line for each case and dtype, a column for each library."""
    names = list(dict.fromkeys(row["library"] for row in rows))
    table = Table(
        "", *names, title="bytes kept per element (beside input and output)", box=MARKDOWN
    )
    for (case, dtype), same in itertools.groupby(rows, lambda row: (row["case"], row["dtype"])):
        cells = dict.fromkeys(names, "")
        for row in same:
            rest = "" if row["beside_both"] is None else f" ({row['beside_both']:.1f})"
            cells[row["library"]] = f"{row['kept']:.1f}{rest}"
        table.add_row(f"{case}, {dtype}", *cells.values())
    return table


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Bars of what is kept."""
    labels = list(dict.fromkeys(f"{row['case']}\n{row['dtype']}" for row in rows))
    names = list(dict.fromkeys(row["library"] for row in rows))
    figure, ax = plt.subplots(figsize=(10, 4))
    for i, name in enumerate(names):
        mine = [row for row in rows if row["library"] == name]
        places = [
            labels.index(f"{row['case']}\n{row['dtype']}") + 0.8 * i / len(names) for row in mine
        ]
        ax.bar(places, [row["kept"] for row in mine], 0.8 / len(names), label=name)
    ax.set_xticks(np.arange(len(labels)) + 0.35, labels, fontsize=7)
    ax.set_ylabel("bytes kept per element")
    ax.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Prints the table; writes the rows and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", default=str(measuring.RESULTS / "memory.csv"))
    parser.add_argument("--plot", default=str(measuring.RESULTS / "memory.png"))
    options = parser.parse_args(arguments)
    found = rows()
    Console(width=180).print(table(found))
    measuring.write_csv(options.csv, found, measuring.machine())
    plot(found, options.plot)


if __name__ == "__main__":
    main()
