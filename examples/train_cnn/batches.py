"""Batches of one shape, spread over the devices. The last one is padded, and a mask marks padding.

If the images fit into a device's memory, they stay there and indices select a batch. Otherwise, a
thread reads batches ahead while the device computes.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from numpy.typing import NDArray

Integers = NDArray[np.integer]
SHARE = 0.25  # the fraction of a device's memory that the images may take
ASSUMED = 16 * 2**30  # bytes of memory, if a device does not report it


class Pool(NamedTuple):
    """All images `[N, H, W, C]` and labels `[N]`, on every device."""

    images: jax.Array
    labels: jax.Array


class Batch(NamedTuple):
    """Images `[N, H, W, C]`, labels `[N]` and a mask `[N]`, which is False for padding."""

    images: jax.Array
    labels: jax.Array
    mask: jax.Array


class Indices(NamedTuple):
    """Indices of images in a pool `[N]` and a mask `[N]`, which is False for padding."""

    places: jax.Array
    mask: jax.Array


def batch_at(batch: Batch | Indices, pool: Pool | None) -> Batch:
    """The batch itself, or the images of the pool that its indices select."""
    if isinstance(batch, Batch):
        return batch
    assert pool is not None
    return Batch(pool.images[batch.places], pool.labels[batch.places], batch.mask)


class Plan(NamedTuple):
    """The samples of each batch: indices and mask, `[batches, rows]`."""

    indices: Integers
    mask: NDArray[np.bool_]

    def parts(self, bounds: Sequence[int]) -> list["Plan"]:
        """The batches between consecutive `bounds`."""
        cuts = [slice(*pair) for pair in itertools.pairwise(bounds)]
        return [Plan(self.indices[cut], self.mask[cut]) for cut in cuts]


def plan(order: Integers, sizes: Sequence[int], multiple: int) -> Plan:
    """The samples in this order, each exactly once, in batches of these sizes.

    Each batch has the rows of the largest size, rounded up to a multiple. Repeated samples pad it.
    """
    rows = -(-max(sizes) // multiple) * multiple
    parts = np.split(order, np.cumsum(sizes)[:-1])
    indices = np.stack([np.resize(part, rows) for part in parts])
    return Plan(indices, np.arange(rows) < np.array(sizes)[:, None])


def training_sizes(images: int, size: int) -> list[int]:
    """Batches of `size`, and a last one of the rest."""
    return [size] * (images // size) + [images % size] * (images % size > 0)


def even_sizes(images: int, largest: int) -> list[int]:
    """The fewest batches of at most `largest`, of nearly equal sizes."""
    return [len(part) for part in np.array_split(np.arange(images), -(-images // largest))]


class Feed:
    """A data set as batches on the devices."""

    def __init__(
        self,
        images: NDArray[np.float32],
        labels: NDArray[np.int32],
        sharding: NamedSharding,
        stream: bool | None = None,
    ) -> None:
        """`stream` reads batches from the host; None: only if the images do not fit."""
        self.images, self.labels = images, labels
        self.sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
        if stream is None:
            stream = images.nbytes > SHARE * memory(sharding)
        replicated = NamedSharding(sharding.mesh, PartitionSpec())
        self.pool = None if stream else Pool(spread(images, replicated), spread(labels, replicated))

    def batches(self, plan: Plan) -> Batch | Indices:
        """The batches of a plan, stacked. Each process reads the rows of its own devices."""
        mask = spread(plan.mask, self.sharding)
        if self.pool is not None:
            return Indices(spread(plan.indices, self.sharding), mask)
        return Batch(
            spread(self.images, self.sharding, plan.indices),
            spread(self.labels, self.sharding, plan.indices),
            mask,
        )

    def ahead(self, plans: Sequence[Plan]) -> Iterator[tuple[Batch | Indices, float]]:
        """Yields the batches of each plan, read ahead, and the seconds waited for them."""

        def ready(plan: Plan) -> Batch | Indices:
            batches = self.batches(plan)
            jax.block_until_ready(batches)
            return batches

        with ThreadPoolExecutor(1) as executor:
            futures = [executor.submit(ready, plan) for plan in plans[:1]]
            for i in range(len(plans)):
                start = time.perf_counter()
                batches = futures.pop().result()
                waited = time.perf_counter() - start
                futures += [executor.submit(ready, plan) for plan in plans[i + 1 : i + 2]]
                yield batches, waited


def memory(sharding: NamedSharding) -> float:
    """Bytes of memory that a device of this process may use."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":  # the devices share the host's memory
        return ASSUMED / len(sharding.addressable_devices)
    return float((device.memory_stats() or {}).get("bytes_limit", ASSUMED))


def spread(
    array: NDArray[np.generic], sharding: NamedSharding, indices: Integers | None = None
) -> jax.Array:
    """`array`, or `array[indices]`, on the devices. Each process reads its own part."""
    if indices is None:
        return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])
    shape = *indices.shape, *array.shape[1:]
    return jax.make_array_from_callback(
        shape,
        sharding,
        lambda part: array[indices[part[: indices.ndim]]],  # type: ignore[index]  # never None
    )
