"""Sums over everything but the channels, and their transpose: handing a vector to every position.

JAX turns each into the other when it transposes, so the sums of a backward pass are these too.

A compiler sums a small array one element after the other, and in float32 the rounding errors of a
few hundred additions show. A small array is therefore summed in two parts: `high`, which is `x`
rounded to five significant bits, and `low = x − high`. Sums of `high` are nearly exact, having
nineteen bits to spare, and sums of `low` lose 2⁵ times less than sums of `x`. Larger arrays are
left to the compiler, which adds those in blocks.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxbn._devices import ALONE, Devices, summed

# Elements. XLA:CPU adds in blocks from some 2¹³ on, products later; this size costs little yet.
SMALL = 2**16


def reduced_axes(ndim: int, axis: int) -> tuple[int, ...]:
    """Every axis but the channel axis."""
    return tuple(i for i in range(ndim) if i != axis)


def sum_over(x: jax.Array, axis: int) -> jax.Array:
    """Sum of `x` over every axis but `axis`: shape `[C]`."""
    axes = reduced_axes(x.ndim, axis)
    if not _in_two_parts(x.shape, x.dtype):
        return x.sum(axes)
    high = _high(x)
    return high.sum(axes) + (x - high).sum(axes)


def means(
    arrays: Sequence[jax.Array], count: jax.Array, axis: int, devices: Devices = ALONE
) -> tuple[jax.Array, ...]:
    """`sum_over` of each array on all devices, over `count`; zero where there is nothing."""
    sums = [sum_over(x, axis) for x in arrays]
    if devices.names:
        sums = list(summed(jnp.stack(sums), devices))
    return tuple(total / jnp.maximum(count, 1) for total in sums)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def expand(vector: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """`vector` along `axis`, broadcastable to `shape`; in reverse mode it becomes `sum_over`."""
    if _in_two_parts(shape, vector.dtype):
        return jax.lax.broadcast_in_dim(vector, shape, (axis,))
    return jnp.expand_dims(vector, reduced_axes(len(shape), axis))


@expand.defjvp
def _expand_jvp(
    shape: tuple[int, ...],
    axis: int,
    primals: tuple[jax.Array],
    tangents: tuple[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    return expand(*primals, shape, axis), expand_tangent(*tangents, shape, axis)


def expand_tangent(vector: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
    """`expand` of a vector that is itself a tangent: linear, with `sum_over` as its transpose."""
    if not _in_two_parts(shape, vector.dtype):
        return jnp.expand_dims(vector, reduced_axes(len(shape), axis))
    # Two broadcasts, for two sums when transposed: of _high(cotangent), and of the rest.
    once, again = (jax.lax.broadcast_in_dim(vector, shape, (axis,)) for _ in range(2))
    return _high(once) + (again - _high(again))


def _high(x: jax.Array) -> jax.Array:
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=4)


def _in_two_parts(shape: tuple[int, ...], dtype: jnp.dtype) -> bool:
    size = math.prod(shape)  # no int where the shape is symbolic, as `jax.export` has them
    return dtype == jnp.float32 and isinstance(size, int) and size <= SMALL
