"""What a small layer costs beside its arithmetic: compilation, calls, the size of the program.

    python -m benchmarks.timing.small_layers  # results/small_layers.csv

jaxbn beside Flax, Linen and NNX; on a layer of 8 channels and 32 samples, forward and backward: the
time to trace, to lower and to compile (caches cleared, in turns), the time of a call of the
compiled function, and of the layer without `jax.jit`; the time of a call on batches of larger dense
layers, too. Of a network of 50 dense layers with batch norm and ReLU: the equations of its jaxpr,
forward and with gradients, inner ones included, those of functions that are used again counted
once, and the lines of StableHLO that it lowers to; and the time to its first step. Ratios over 1
mean that jaxbn is faster or smaller.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

import jaxbn.linen
import jaxbn.nnx
from benchmarks import measuring

CHANNELS, SAMPLES, DEPTH = 8, 32, 50
DENSE = ((128, 64), (256, 256), (1024, 1024), (1000, 1000), (65536, 64))  # samples, channels
Step = Callable[..., Any]


class Dense(nn.Module):
    """Dense layers, each with a batch norm and ReLU; `norm` makes the batch norm."""

    norm: Callable[..., nn.Module]
    depth: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The network in training mode."""
        for _ in range(self.depth):
            x = nn.Dense(x.shape[-1])(x) if self.depth > 1 else x
            x = nn.relu(self.norm(use_running_average=False)(x))
        return x


def linen(norm: Callable[..., nn.Module], depth: int, channels: int) -> tuple[Step, Any]:
    """`(variables, x) -> (y, new statistics)`, and the variables."""
    module = Dense(norm, depth)

    def forward(variables: Any, x: jax.Array) -> Any:
        return module.apply(variables, x, mutable=["batch_stats"])

    return forward, jax.jit(module.init)(jax.random.key(0), jnp.ones((SAMPLES, channels)))


class NnxDense(nnx.Module):
    """The same for NNX."""

    def __init__(self, norm: Callable[..., nnx.Module], depth: int, channels: int) -> None:
        """Makes the layers."""
        rngs = nnx.Rngs(0)
        self.norms = nnx.List([norm(channels, rngs=rngs) for _ in range(depth)])
        count = depth if depth > 1 else 0
        self.dense = nnx.List([nnx.Linear(channels, channels, rngs=rngs) for _ in range(count)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """The network in training mode."""
        for i, norm in enumerate(self.norms):
            x = self.dense[i](x) if self.dense else x
            x = nnx.relu(norm(x, use_running_average=False))
        return x


def with_nnx(norm: Callable[..., nnx.Module], depth: int, channels: int) -> tuple[Step, Any]:
    """`(state, x) -> (y, new state)`, and the state."""
    graph, state = nnx.split(NnxDense(norm, depth, channels))

    def forward(state: Any, x: jax.Array) -> Any:
        module = nnx.merge(graph, state)
        y = module(x)
        return y, nnx.state(module)

    return forward, state


def models(depth: int, channels: int = CHANNELS) -> dict[str, tuple[Step, Any]]:
    """The networks by the library of their batch norm."""
    return {
        "jaxbn.linen": linen(jaxbn.linen.BatchNorm, depth, channels),
        "flax.linen": linen(nn.BatchNorm, depth, channels),
        "jaxbn.nnx": with_nnx(jaxbn.nnx.BatchNorm, depth, channels),
        "flax.nnx": with_nnx(nnx.BatchNorm, depth, channels),
    }


def with_gradients(forward: Step) -> Step:
    """`(variables, x, dy) -> (statistics, gradients)`."""

    def step(variables: Any, x: jax.Array, dy: jax.Array) -> Any:
        def loss(variables: Any, x: jax.Array) -> Any:
            y, new = forward(variables, x)
            return (y * dy).sum(), new

        gradients, new = jax.grad(loss, (0, 1), has_aux=True, allow_int=True)(variables, x)
        return new, gradients

    return step


def equations(jaxpr: Any) -> int:
    """Equations of a jaxpr and of those within; one that stands in several places, once."""
    seen: set[int] = set()

    def count(jaxpr: Any) -> int:
        if id(jaxpr) in seen:
            return 0
        seen.add(id(jaxpr))
        return len(jaxpr.eqns) + sum(map(count, inner(jaxpr)))

    return count(jaxpr)


def inner(jaxpr: Any) -> list[Any]:
    """The jaxprs in the parameters of the equations."""
    leaves = jax.tree.leaves(
        [list(eqn.params.values()) for eqn in jaxpr.eqns],
        is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr"),
    )
    return [getattr(v, "jaxpr", v) for v in leaves if hasattr(v, "eqns") or hasattr(v, "jaxpr")]


def sizes(depth: int = DEPTH) -> list[dict[str, Any]]:
    """Equations and lines of StableHLO of the deep network, forward and with gradients."""
    x = jnp.ones((SAMPLES, CHANNELS))
    rows = []
    for name, (forward, variables) in models(depth).items():
        both = with_gradients(forward)
        for what, function, arguments in (
            ("forward", forward, (variables, x)),
            ("forward + backward", both, (variables, x, x)),
        ):
            count = equations(jax.make_jaxpr(function)(*arguments).jaxpr)
            lines = jax.jit(function).lower(*arguments).as_text().count("\n")
            rows.append(_row(f"equations, {what}", name, count, count, count))
            rows.append(_row(f"lines of StableHLO, {what}", name, lines, lines, lines))
    return rows


def _row(what: str, name: str, lower: float, median: float, upper: float) -> dict[str, Any]:
    return {"what": what, "library": name, "lower": lower, "median": median, "upper": upper}


def first_steps(depth: int, label: str, repetitions: int) -> list[dict[str, Any]]:
    """Milliseconds to trace, lower, compile and run for the first time, caches cleared."""
    random = np.random.default_rng(0)
    x, dy = (jnp.asarray(random.standard_normal((SAMPLES, CHANNELS), np.float32)) for _ in "xd")
    taken: dict[str, list[float]] = {}
    for _ in range(repetitions):
        for name, (forward, variables) in models(depth).items():
            jax.clear_caches()
            start = time.perf_counter()
            jax.block_until_ready(jax.jit(with_gradients(forward))(variables, x, dy))
            taken.setdefault(name, []).append(1e3 * (time.perf_counter() - start))
    return [_row(label, name, *measuring.quartiles(values)) for name, values in taken.items()]


def calls(
    samples: int, channels: int, label: str, repetitions: int, *, jit: bool = True
) -> list[dict[str, Any]]:
    """Microseconds of a call of one layer."""
    random = np.random.default_rng(0)
    x, dy = (jnp.asarray(random.standard_normal((samples, channels), np.float32)) for _ in "xd")
    runs = {}
    for name, (forward, variables) in models(1, channels).items():
        step = with_gradients(forward)
        function = jax.jit(step) if jit else step
        runs[name] = lambda f=function, v=variables: jax.block_until_ready(f(v, x, dy))
    taken = measuring.take_turns(runs, repetitions)
    return [_row(label, name, *measuring.quartiles(1e6 * v)) for name, v in taken.items()]


def table(rows: list[dict[str, Any]]) -> Table:
    """Medians, a column for each library, and Flax over jaxbn."""
    names = list(dict.fromkeys(row["library"] for row in rows))
    table = Table("", *names, "linen / jaxbn", "nnx / jaxbn", box=MARKDOWN)
    for what in dict.fromkeys(row["what"] for row in rows):
        values = {row["library"]: row["median"] for row in rows if row["what"] == what}
        ratios = (values[f"flax.{k}"] / values[f"jaxbn.{k}"] for k in ("linen", "nnx"))
        table.add_row(what, *(f"{v:.0f}" for v in values.values()), *(f"{r:.2f}" for r in ratios))
    return table


def main(arguments: list[str] | None = None) -> None:
    """Prints the table and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=1000, help="of a compiled call")
    parser.add_argument("--compilations", type=int, default=7)
    parser.add_argument("--depth", type=int, default=DEPTH, help="layers of the deep network")
    parser.add_argument("--csv", default=str(measuring.RESULTS / "small_layers.csv"))
    options = parser.parse_args(arguments)
    depth, compilations, repetitions = options.depth, options.compilations, options.repetitions
    rows = sizes(depth)
    rows += calls(SAMPLES, CHANNELS, "µs of a compiled call", repetitions)
    fewer = max(repetitions // 20, 3)
    for samples, channels in DENSE:
        rows += calls(samples, channels, f"µs of a compiled call, {samples} × {channels}", fewer)
    rows += calls(SAMPLES, CHANNELS, "µs of a call without jit", fewer, jit=False)
    rows += first_steps(1, "ms to the first step, one layer", compilations)
    rows += first_steps(depth, f"ms to the first step, {depth} layers", max(compilations // 2, 1))
    Console(width=160).print(table(rows))
    measuring.write_csv(options.csv, rows, measuring.machine())


if __name__ == "__main__":
    main()
