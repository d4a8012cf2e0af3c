"""Batches of one shape, spread over devices: the last is padded, and a mask says what counts."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from numpy.typing import NDArray


class Batch(NamedTuple):
    """Images `[N, H, W, C]`, labels `[N]`, and a mask `[N]`: True = counts."""

    images: jax.Array
    labels: jax.Array
    mask: jax.Array


def batches(
    images: NDArray[np.float32],
    labels: NDArray[np.int32],
    order: NDArray[np.integer],
    size: int,
    sharding: NamedSharding,
) -> Iterator[Batch]:
    """The samples in this order, each exactly once, `size` to a batch.

    A batch has as many rows as `size` rounded up to a multiple of the devices. What the samples
    leave free holds samples again, which do not count. A process reads the rows of its own devices.
    """
    rows = -(-size // sharding.num_devices) * sharding.num_devices
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        mask = np.arange(rows) < len(indices)
        indices = np.resize(indices, rows)
        yield Batch(
            spread(images, indices, sharding),
            spread(labels, indices, sharding),
            spread(mask, np.arange(rows), sharding),
        )


def spread(
    array: NDArray[np.generic], indices: NDArray[np.integer], sharding: NamedSharding
) -> jax.Array:
    """`array[indices]` over the devices, of which each process reads its part."""
    shape = (len(indices), *array.shape[1:])
    return jax.make_array_from_callback(
        shape,
        sharding,
        lambda part: array[indices[part[0]]],  # type: ignore[index]  # never None
    )
