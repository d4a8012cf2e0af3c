"""The devices that share a batch, and their communication."""

import itertools
import math
import operator
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

# The name of a mapped axis of devices, or a tuple of names; None for a single device.
AxisName = Hashable | None
AxisIndexGroups = Sequence[Sequence[int]] | None


class Devices(NamedTuple):
    """Mapped axes of `jax.vmap`, `jax.pmap` or `jax.shard_map`; none for a single device.

    `groups` are indices along the one axis. The devices of each group share a batch of their own.
    """

    names: tuple[Hashable, ...] = ()
    groups: tuple[tuple[int, ...], ...] | None = None

    @property
    def size(self) -> int:
        """How many devices share a batch."""
        if self.groups is not None:
            return len(self.groups[0])
        try:
            return jax.lax.axis_size(self.names)
        except NameError:  # where `checked_devices` had found them
            raise NameError(
                "JAX must know the axes of `axis_name` where it differentiates; it has lost "
                f"{self.names!r} in a jax.jit, jax.lax.scan or jax.checkpoint around the jax.vmap "
                "that names them. Put jax.grad inside of these, or put these inside of jax.vmap."
            ) from None


ALONE = Devices()


def checked_devices(axis_name: AxisName, index_groups: AxisIndexGroups = None) -> Devices:
    """The devices along the axes, which must be bound here."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    devices = Devices(names) if axis_name is not None else ALONE
    if len({*names}) < len(names):
        raise ValueError(f"`axis_name` must name each axis once; got {axis_name!r}.")
    try:
        size = devices.size
    except NameError:
        raise NameError(
            "`axis_name` must name axes of an enclosing jax.vmap, jax.pmap or jax.shard_map; got "
            f"{axis_name!r}, which is not bound here. Outside of them leave it at None: under "
            "jax.jit the batch is the global one."
        ) from None
    inner = _mapped_by_vmap(devices.names)
    if inner and any(_varies(name) for name in jax.sharding.get_abstract_mesh().manual_axes):
        raise NotImplementedError(
            "`axis_name` must not name an axis of jax.vmap inside of jax.shard_map, where JAX "
            f"checks what varies between devices; got {axis_name!r}, with {inner[0]!r} of jax.vmap."
            " Pass check_vma=False to jax.shard_map."
        )
    if index_groups is None:
        return devices
    if len(devices.names) != 1:
        raise ValueError(
            "`axis_index_groups` splits the indices along one axis, which `axis_name` must name; "
            f"got axis_name={axis_name!r}."
        )
    if inner:
        raise NotImplementedError(
            "`axis_index_groups` needs an axis of jax.pmap or jax.shard_map: JAX has no groups "
            f"along axes of jax.vmap, as {axis_name!r} is. Map two axes and name one of them, or "
            "split the samples by `virtual_batch_size`."
        )
    return devices._replace(groups=_checked_index_groups(index_groups, size))


def _checked_index_groups(groups: Any, size: int) -> tuple[tuple[int, ...], ...]:
    """The groups as tuples. They must hold each index once and have the same size."""
    try:
        checked = tuple(tuple(map(operator.index, group)) for group in groups)
    except TypeError:
        checked = ()
    if sorted(itertools.chain(*checked)) != list(range(size)) or len({*map(len, checked)}) > 1:
        raise ValueError(
            f"`axis_index_groups` must hold each index from 0 to {size - 1} once, in groups of the "
            f"same size; got {groups!r}."
        )
    return checked


def _mapped_by_vmap(names: tuple[Hashable, ...]) -> tuple[Hashable, ...]:
    """The axes of `jax.vmap`, which live inside arrays. Collectives along them cross no device."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(name for name in names if name not in manual)


def _varies(name: Hashable) -> bool:
    """Whether types in the enclosing `jax.shard_map` tell what varies along the axis."""
    return name in jax.typeof(jax.lax.axis_index(name)).manual_axis_type.varying


def placed_like(array: jax.Array, x: jax.Array) -> jax.Array:
    """`array`, which broadcasts against `x`, on the devices with the same part of `x`."""
    old, like = jax.typeof(array).sharding, jax.typeof(x).sharding
    sizes = zip(array.shape, x.shape, like.spec, strict=True)
    spec = PartitionSpec(*(names if m == n else None for m, n, names in sizes))
    if spec == old.spec:
        return array
    mesh = old.mesh if like.mesh.empty else like.mesh
    placed: jax.Array = jax.sharding.reshard(array, NamedSharding(mesh, spec))
    return placed


def spread_over(like: Any, axes: Sequence[int]) -> int:
    """Number of devices over which the type of an array spreads these axes."""
    entries = (like.sharding.spec[axis] for axis in axes)
    names = names_in(entries)
    return math.prod(like.sharding.mesh.shape[name] for name in names)


def names_in(entries: Iterable[Any]) -> set[str]:
    """The mesh axes in entries of a `PartitionSpec`, each with none, one or several."""
    entries = (entry if isinstance(entry, tuple) else (entry,) for entry in entries)
    return {name for entry in entries for name in entry if name is not None}


def gathered(array: jax.Array, devices: Devices) -> jax.Array:
    """The arrays of all devices along a new first axis, in one collective."""
    array = array[None]
    groups = devices.groups
    if groups is not None:
        array = jax.lax.all_gather(array, devices.names, axis_index_groups=groups, tiled=True)
        return array
    inner = _mapped_by_vmap(devices.names)
    for name in inner:
        array = jax.lax.all_gather(array, name, tiled=True)
    outer = tuple(name for name in devices.names if name not in inner)
    array = jax.lax.all_gather(array, outer, tiled=True, to="invarying")
    return array


def summed(array: jax.Array, devices: Devices) -> jax.Array:
    """The sum of the arrays of all devices, in one collective."""
    if devices.groups is not None:  # not supported by `psum` if types tell what varies
        return gathered(array, devices).sum(0)
    total: jax.Array = jax.lax.psum(array, devices.names)
    return total


def spread(array: jax.Array, like: Any) -> jax.Array:
    """`array`, typed to vary between devices along the axes that `like` varies along."""
    names = like.manual_axis_type.varying - jax.typeof(array).manual_axis_type.varying
    # Sorted, since every process must compile the same program.
    return jax.lax.pcast(array, tuple(sorted(names)), to="varying") if names else array
