"""What devices tell each other in a training step of a batch norm layer, by compiled modules.

    python -m benchmarks.compiled.collectives  # on 1, 2, 4, … 256 devices that are simulated

The collectives of the forward and of the backward pass, and the bytes that one device puts into
them and gets out of them.
"""

import os

if __name__ == "__main__":
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=256"

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

import jaxbn
from benchmarks.compiled import h100, hlo

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHAPE = (64, 32, 32, 64)  # on one device: images, channels last

Layer = Callable[..., Any]


def ours(axis_name: str | None = None, **options: Any) -> Layer:
    """`y` and new running statistics."""

    def layer(x: jax.Array, scale: jax.Array, bias: jax.Array) -> Any:
        stats = jaxbn.BatchStats(jnp.zeros_like(bias), jnp.ones_like(scale), jnp.int32(0))
        options_ = {"train": True, "activation": "relu", "axis_name": axis_name, **options}
        return jaxbn.batch_norm(x, stats, scale, bias, **options_)

    return layer


def flax(axis_name: str | None = None) -> Layer:
    """The same with `flax.linen.BatchNorm`."""
    module = nn.BatchNorm(use_running_average=False, axis_name=axis_name)

    def layer(x: jax.Array, scale: jax.Array, bias: jax.Array) -> Any:
        stats = {"mean": jnp.zeros_like(bias), "var": jnp.ones_like(scale)}
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
        y, updates = module.apply(variables, x, mutable=["batch_stats"])
        return nn.relu(y), updates

    return layer


class Step(NamedTuple):
    """The collectives of one training step."""

    forward: list[hlo.Collective]
    backward: list[hlo.Collective]

    def describe(self) -> tuple[str, str]:
        """How many of which kind, forward and backward."""
        kinds = (Counter(c.opcode for c in half) for half in self)
        forward, backward = (
            ", ".join(f"{n} {kind}" for kind, n in half.items()) or "none" for half in kinds
        )
        return forward, backward

    @property
    def sent(self) -> int:
        """Bytes that a device puts in."""
        return sum(c.sent for half in self for c in half)

    @property
    def received(self) -> int:
        """Bytes that a device gets out."""
        return sum(c.received for half in self for c in half)


def measure(
    layer: Layer,
    mesh: Mesh,
    spec: PartitionSpec,
    shape: tuple[int, ...],
    check_vma: bool | None = None,
) -> Step:
    """Compiles the forward pass, and both, of a layer on an input of this shape, channels last.

    `spec` says how the input is spread over the mesh. With `check_vma` given, the layer runs under
    `jax.shard_map`, its parameters alike on all devices.
    """
    vector_spec = PartitionSpec(spec[-1] if len(spec) == len(shape) else None)
    if check_vma is not None:
        layer = jax.shard_map(
            layer,
            mesh=mesh,
            in_specs=(spec, vector_spec, vector_spec),
            out_specs=(spec, PartitionSpec()),
            check_vma=check_vma,
        )

    def argument(shape: tuple[int, ...], spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    x, vector = argument(shape, spec), argument(shape[-1:], vector_spec)

    def both(
        x: jax.Array, scale: jax.Array, bias: jax.Array, dy: jax.Array
    ) -> tuple[jax.Array, ...]:
        y, pullback, stats = jax.vjp(layer, x, scale, bias, has_aux=True)
        return y, stats, *pullback(dy)

    def compiled(function: Layer, *arguments: jax.ShapeDtypeStruct) -> list[hlo.Collective]:
        with jax.set_mesh(mesh):
            return hlo.collectives(jax.jit(function).lower(*arguments).compile().as_text())

    forward = compiled(layer, x, vector, vector)
    total = compiled(both, x, vector, vector, x)
    return Step(forward, list((Counter(total) - Counter(forward)).elements()))


def mesh_of(devices: list[Any], axis_type: AxisType = AxisType.Auto) -> Mesh:
    """A mesh of one axis."""
    return Mesh(np.array(devices), ("devices",), axis_types=(axis_type,))


BATCH = PartitionSpec("devices")
CHANNELS = PartitionSpec(None, None, None, "devices")


def ways(devices: list[Any]) -> dict[str, Callable[[Callable[..., Layer]], Step]]:
    """The ways to distribute a layer: each takes what makes the layer from an axis name."""
    auto, explicit = mesh_of(devices), mesh_of(devices, AxisType.Explicit)
    shape = (SHAPE[0] * len(devices), *SHAPE[1:])
    return {
        "shard_map": lambda make: measure(make("devices"), auto, BATCH, shape, check_vma=True),
        "shard_map without check_vma": lambda make: measure(
            make("devices"), auto, BATCH, shape, check_vma=False
        ),
        "jit, explicit mesh": lambda make: measure(make(), explicit, BATCH, shape),
        "jit, automatic mesh": lambda make: measure(make(), auto, BATCH, shape),
        "jit, channels over devices": lambda make: measure(make(), auto, CHANNELS, shape),
    }


def counts(title: str, devices: list[Any]) -> Table:
    """Collectives in each way of distributing, jaxbn beside Flax."""
    table = Table("", "forward", "backward", "sent", "received", title=title, box=MARKDOWN)
    for name, way in ways(devices).items():
        for make, library in ((ours, "jaxbn"), (flax, "Flax")):
            step = way(make)
            table.add_row(
                f"{name}, {library}", *step.describe(), str(step.sent), str(step.received)
            )
    return table


def growth() -> Table:
    """Bytes in and out for each device and channel, for more and more devices."""
    columns = ("devices", "shard_map: sent", "received", "jit, automatic mesh: sent", "received")
    table = Table(*columns, title="Bytes for each device and channel", box=MARKDOWN)
    for count in COUNTS:
        cells = [str(count)]
        mesh = mesh_of(jax.devices()[:count])
        for layer, check_vma in ((ours("devices"), True), (ours(), None)):
            per_channel = set()
            for samples, channels in ((64, 64), (128, 64), (64, 256)):
                shape = (samples * count, *SHAPE[1:3], channels)
                step = measure(layer, mesh, BATCH, shape, check_vma)
                per_channel.add((step.sent / channels, step.received / channels))
            ((sent, received),) = per_channel  # whatever the batch and the channels
            cells += [f"{sent:g}", f"{received:g}"]
        table.add_row(*cells)
    return table


def main() -> None:
    """Prints the collectives on 8 devices, on H100s where their compiler is, and their growth."""
    console = Console(width=140)
    console.print(f"jax {jax.__version__}; bytes for one device, 64 channels")
    console.print(counts("8 CPU devices", jax.devices("cpu")[:8]))
    if h100.available():
        console.print(counts("8 H100s", h100.devices(8)))
    else:
        console.print("No table for H100s: the package jax-cuda13-plugin is not installed.")
    console.print(growth())


if __name__ == "__main__":
    main()
