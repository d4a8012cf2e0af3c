"""Memory traffic of a batch norm layer in training, read off the compiled modules.

    python benchmarks/traffic.py            # for the CPU, and for an H100 where its compiler is

Per element of the input: bytes that cross memory in the forward and in the backward module, and
bytes kept from the one to the other. For both modules: kernels and collectives.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import h100
import hlo
import jax
import jax.numpy as jnp
from jax.extend.core import Literal, jaxpr_as_fun
from jax.sharding import SingleDeviceSharding
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

import jaxbn

SHAPES = {"NHWC": ((128, 56, 56, 64), 3), "NCHW": ((128, 64, 56, 56), 1)}
CASES = ("BN", "BN+ReLU", "BN+add+ReLU")
DTYPES = (jnp.bfloat16, jnp.float32)


class Traffic(NamedTuple):
    """What one training step of one layer costs; bytes are per element of the input."""

    forward: float
    backward: float
    kept: float
    kernels: int
    collectives: int


def ours(case: str, axis: int) -> Callable[..., Any]:
    """`y` and the moments, with everything in one call."""

    def layer(x: jax.Array, scale: jax.Array, bias: jax.Array, *residual: jax.Array) -> Any:
        y, moments = jaxbn.batch_normalize(
            x,
            scale,
            bias,
            axis=axis,
            activation="relu" if "ReLU" in case else None,
            residual=residual[0] if residual else None,
        )
        return y, jax.lax.stop_gradient(moments)

    return layer


def flax(case: str, axis: int) -> Callable[..., Any]:
    """The same with `flax.linen.BatchNorm`."""
    module = nn.BatchNorm(use_running_average=False, axis=axis)

    def layer(x: jax.Array, scale: jax.Array, bias: jax.Array, *residual: jax.Array) -> Any:
        stats = {"mean": jnp.zeros_like(bias), "var": jnp.ones_like(scale)}
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
        y, updates = module.clone(dtype=x.dtype).apply(variables, x, mutable=["batch_stats"])
        y = y + residual[0] if residual else y
        return nn.relu(y) if "ReLU" in case else y, jax.lax.stop_gradient(updates)

    return layer


LIBRARIES = {ours: "jaxbn", flax: "Flax"}


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


def table(title: str, device: Any) -> Table:
    """Every case, dtype and layout on one device, jaxbn beside Flax."""
    columns = ("", "forward", "backward", "sum", "kept", "kernels", "collectives")
    table = Table(*columns, title=title, box=MARKDOWN)
    for dtype, (layout, (shape, axis)), case in itertools.product(DTYPES, SHAPES.items(), CASES):
        for layer in (ours, flax):
            cost = measure(layer(case, axis), case, shape, axis, dtype, device)
            numbers = (cost.forward, cost.backward, cost.forward + cost.backward, cost.kept)
            table.add_row(
                f"{case}, {jnp.dtype(dtype).name}, {layout}, {LIBRARIES[layer]}",
                *(f"{number:.2f}" for number in numbers),
                str(cost.kernels),
                str(cost.collectives),
            )
    return table


def main() -> None:
    """Prints a table for each device that can be compiled for."""
    console = Console(width=120)
    console.print(f"jax {jax.__version__}, shapes {SHAPES}")
    if h100.available():
        console.print(table("H100: bytes per element of the input", h100.sharding()))
    else:
        console.print("No table for an H100: the package jax-cuda13-plugin is not installed.")
    cpu = SingleDeviceSharding(jax.devices("cpu")[0])
    console.print(table("CPU: bytes per element of the input", cpu))


if __name__ == "__main__":
    main()
