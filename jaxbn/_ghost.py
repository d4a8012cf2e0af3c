"""Ghost batch norm: groups of samples, each normalized by its own moments."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax

from jaxbn._core.axes import reduced_axes
from jaxbn._core.devices import spread_over
from jaxbn._types import Integer


def checked_groups(virtual_batch_size: Integer | None, x: jax.Array, axis: int) -> int:
    """The number of groups of `virtual_batch_size` samples."""
    if virtual_batch_size is None:
        return 1
    whole = isinstance(virtual_batch_size, numbers.Integral)
    if not whole or isinstance(virtual_batch_size, bool) or virtual_batch_size < 1:
        raise ValueError(
            f"`virtual_batch_size` must be an int of at least 1; got {virtual_batch_size!r}."
        )
    value = int(virtual_batch_size)
    batch_axis = reduced_axes(x.ndim, axis)[:1]
    samples = math.prod(x.shape[i] for i in batch_axis)
    if not isinstance(samples, int):
        raise ValueError(
            "`virtual_batch_size` must divide the number of samples, which is not known here; got "
            f"{value} for x.shape={x.shape}. Export with a batch of fixed size."
        )
    if samples == 0:
        return 1
    if samples % value:
        raise ValueError(
            f"`virtual_batch_size` must divide the number of samples; got {value} for x.shape="
            f"{x.shape}, {samples} samples. Pad the batch and mask the padding."
        )
    groups = samples // value
    devices = spread_over(jax.typeof(x), batch_axis)
    if groups % devices:
        raise ValueError(
            "`virtual_batch_size` must divide the number of samples on each device if the type of "
            f"`x` spreads them over devices; got {value} for {samples // devices} samples on each "
            f"of {devices} devices. Pass a divisor of that, or use a mesh of AxisType.Auto."
        )
    return groups


def by_group(
    function: Callable[..., Any], groups: int, axis: int, x: jax.Array, *others: jax.Array | None
) -> tuple[jax.Array, Any]:
    """Calls `function(x, *others)` for each group; it returns an output like `x`, and statistics.

    The groups are blocks of neighbors along the batch axis, so samples that are spread over devices
    stay in place. An array with one entry along the batch axis belongs to all groups. The
    statistics come back stacked along a new first axis.
    """
    batch_axis = reduced_axes(x.ndim, axis)[0]

    def split(array: jax.Array | None) -> jax.Array | None:
        if array is None or array.shape[batch_axis] == 1:
            return array
        samples = array.shape[batch_axis] // groups
        shape = *array.shape[:batch_axis], groups, samples, *array.shape[batch_axis + 1 :]
        return array.reshape(shape)

    parts = tuple(map(split, (x, *others)))
    in_axes = tuple(
        None if part is whole else batch_axis
        for part, whole in zip(parts, (x, *others), strict=True)
    )
    mapped = jax.vmap(function, in_axes, (batch_axis, 0), axis_size=groups)
    y, statistics = mapped(*parts)
    return y.reshape(x.shape), statistics
