"""The channel axis and the reduced axes: sums over these, and the way back."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Sums of arrays over every axis but one.
Totals = Callable[[Sequence[jax.Array], int], list[jax.Array]]


def reduced_axes(ndim: int, axis: int) -> tuple[int, ...]:
    """Every axis but the channel axis."""
    return tuple(i for i in range(ndim) if i != axis)


def total(x: jax.Array, axis: int) -> jax.Array:
    """Sum of `x` over every axis but `axis`: shape `[C]`."""
    return x.sum(reduced_axes(x.ndim, axis))


def totals(arrays: Sequence[jax.Array], axis: int) -> list[jax.Array]:
    """The `total` of each array."""
    return [total(x, axis) for x in arrays]


def expand(vector: jax.Array, like: Any, axis: int) -> jax.Array:
    """`vector` along `axis`, shaped to broadcast against arrays of the type `like`."""
    return jnp.expand_dims(vector, reduced_axes(like.ndim, axis))
