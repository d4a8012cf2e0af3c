"""Sums over everything but the channels, and their transpose: handing a vector to every position.

JAX turns each into the other when it transposes, so the sums of a backward pass are these too.

A compiler sums a tiny array one element after the other, and in float32 the rounding errors of a
few hundred additions show. A tiny array is therefore summed in two parts: `high`, which is `x`
rounded to five significant bits, and `low = x − high`. Sums of `high` are nearly exact, having
nineteen bits to spare, and sums of `low` lose 2⁵ times less than sums of `x`. Other arrays are left
to the compiler, which adds those in blocks.

On a CPU, XLA's reduction takes little but the array itself: what is computed in front of it, for
example a difference or a conversion from bfloat16, is written to memory first, which costs more
than the sum where the array is large. It is therefore added up there in pieces, `x[:, :p] +
x[:, p:2p] + …`. This is an elementwise operation, with everything in front of it in the same pass,
and leaves a fraction to the reduction.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._devices import ALONE, Devices, spread, summed

# Elements, below which XLA:CPU does not add in blocks.
TINY = 2**12
# Elements, up to which memory does not matter.
SMALL = 2**15
# Values of a channel, whose sum in one go loses no more than torch's.
FEW = 64
# Channels, below which pieces of rows are too short for loops over them.
NARROW = 32

# `sum_over`, or another way to the same sums.
Total = Callable[[jax.Array, int], jax.Array]


def is_small(x: Any) -> bool:
    """Whether an array is small enough to be handled with no regard to memory, or of unknown size.

    `jax.export` may have sizes that are no int.
    """
    return not isinstance(x.size, int) or x.size <= SMALL


def reduced_axes(ndim: int, axis: int) -> tuple[int, ...]:
    """Every axis but the channel axis."""
    return tuple(i for i in range(ndim) if i != axis)


def sum_over(x: jax.Array, axis: int) -> jax.Array:
    """Sum of `x` over every axis but `axis`: shape `[C]`."""
    return _sum(x, axis, _in_two_parts(x.size, x.dtype))


def sum_of_few(x: jax.Array, axis: int) -> jax.Array:
    """`sum_over`, in one go where a channel has few values."""
    return _sum(x, axis, _in_two_parts(x.size, x.dtype) and x.size > FEW * x.shape[axis])


def _plain_sum(x: jax.Array, axis: int) -> jax.Array:
    """The sum in one go, with the rounding errors that it may have in a tiny array."""
    return x.sum(reduced_axes(x.ndim, axis))


def _sum(x: jax.Array, axis: int, in_two_parts: bool) -> jax.Array:
    if not in_two_parts:
        return _plain_sum(x, axis)
    high = _high(x)
    return _plain_sum(high, axis) + _plain_sum(x - high, axis)


def sum_in_pieces(x: jax.Array, axis: int) -> jax.Array:
    """`sum_over`, as a CPU does it fast with what `x` is computed of."""
    pieces = _pieces(jax.typeof(x), axis)
    if pieces == 1:
        return sum_over(x, axis)
    x, axis = flattened(x, axis)
    split = 3 - axis
    size = x.shape[split] // pieces
    parts = (jax.lax.slice_in_dim(x, i * size, (i + 1) * size, axis=split) for i in range(pieces))
    # Rounded, or the compiler takes the additions for a part of its reduction.
    return _plain_sum(rounded(functools.reduce(jnp.add, parts)), axis)


def means(
    arrays: Sequence[jax.Array],
    count: jax.Array,
    axis: int,
    devices: Devices = ALONE,
    total: Total = sum_over,
) -> tuple[jax.Array, ...]:
    """The total of each array on all devices, over `count`; zero where there is nothing."""
    sums = [total(x, axis) for x in arrays]
    if devices.names:
        sums = list(summed(jnp.stack(sums), devices))
    return tuple(value / jnp.maximum(count, 1) for value in sums)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def expand(vector: jax.Array, like: Any, axis: int) -> jax.Array:
    """`vector` along `axis`, to broadcast against `like`, the type of an array.

    In reverse mode it becomes the sum over every other axis.
    """
    if _in_two_parts(like.size, vector.dtype) or _pieces(like, axis) > 1:
        return jax.lax.broadcast_in_dim(vector, like.shape, (axis,))
    return jnp.expand_dims(vector, reduced_axes(like.ndim, axis))


@expand.defjvp
def _expand_jvp(
    like: Any,
    axis: int,
    primals: tuple[jax.Array],
    tangents: tuple[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    return expand(*primals, like, axis), expand_tangent(*tangents, like, axis)


def expand_tangent(vector: jax.Array, like: Any, axis: int) -> jax.Array:
    """`expand` of a vector that is itself a tangent: linear, with a sum as its transpose."""
    pieces = _pieces(like, axis)

    def whole(vector: jax.Array) -> jax.Array:
        # The transpose is `_plain_sum`.
        return jax.lax.broadcast_in_dim(vector, like.shape, (axis,))

    def in_pieces(vector: jax.Array) -> jax.Array:
        # The transpose is `sum_in_pieces`.
        shape, flat_axis = _flat(like.shape, axis)
        split = 3 - flat_axis
        shape[split] //= pieces
        piece = rounded(jax.lax.broadcast_in_dim(vector, shape, (flat_axis,)))
        return jnp.concatenate([piece] * pieces, split).reshape(like.shape)

    if pieces > 1:
        vector = spread(vector, like)
        expanded: jax.Array = jax.lax.platform_dependent(vector, cpu=in_pieces, default=whole)
        return expanded
    if _in_two_parts(like.size, vector.dtype):
        # The transpose is a sum of _high(cotangent), and another of the rest.
        once, again = whole(vector), whole(vector)
        return _high(once) + (again - _high(again))
    return jnp.expand_dims(vector, reduced_axes(like.ndim, axis))


def written_out(x: jax.Array, *vectors: jax.Array) -> tuple[jax.Array, ...]:
    """The vectors, computed once on a CPU, and so are their cotangents.

    XLA would compute them inside of the loops over a large `x` that use them, for every element
    anew. It does not so with a reduction: of each vector and zeros, and in the transpose as well.
    """
    if is_tiny(x) or any(_is_placed(jax.typeof(v)) for v in (x, *vectors)):
        return vectors

    def by_reduction(stack: jax.Array) -> jax.Array:
        zeros = ((0, 1, 0), (0, 0, 0), (0, 0, 0))
        total = jax.lax.pad(stack[None], jnp.zeros((), stack.dtype), zeros).sum(0)
        return jax.lax.broadcast_in_dim(total, (2, *total.shape), (1, 2))[0]

    stack = jax.lax.platform_dependent(
        jnp.stack(vectors), cpu=by_reduction, default=lambda stack: stack
    )
    return tuple(stack)


def rounded(x: jax.Array) -> jax.Array:
    """`x` with one bit less, so that compilers cannot fuse what it is made of into what uses it.

    A product fused with the next difference is not rounded, and a shift would be another number
    at each place where it comes off.
    """
    info = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant - 1)


def flattened(x: jax.Array, axis: int) -> tuple[jax.Array, int]:
    """`x` with the positions of each sample along one axis, if that moves nothing; its `axis`."""
    if not _adjacent(x.ndim, axis) or _is_placed(jax.typeof(x)):
        return x, axis
    shape, axis = _flat(x.shape, axis)
    return x.reshape(shape), axis


def _adjacent(ndim: int, axis: int) -> bool:
    """Whether the samples are first and the axes of the positions neighbours."""
    return ndim > 1 and axis in (1, ndim - 1)


def _flat(shape: tuple[int, ...], axis: int) -> tuple[list[int], int]:
    """The shape of a batch with the positions of each sample along one axis; its `axis`.

    Where a sample has one position, 8 neighbours are taken for one sample; in multiples of 64, so
    that they stay together where the batch is spread over up to 8 devices.
    """
    if len(shape) == 2:
        neighbours = 1 if shape[0] % 64 else 8
        return [shape[0] // neighbours, neighbours, shape[1]], 2
    positions = math.prod(shape[i] for i in reduced_axes(len(shape), axis)[1:])
    if axis == 1:
        return [shape[0], shape[1], positions], 1
    return [shape[0], positions, shape[axis]], 2


def _pieces(x: Any, axis: int) -> int:
    """Into how many pieces the positions of each sample are split; 1 for a sum in one go.

    Samples stay together, since they may be spread over devices. Nothing is split where the type of
    `x` says that it is spread.
    """
    if is_small(x) or not _adjacent(x.ndim, axis) or _is_placed(x):
        return 1
    if x.ndim == 2 and x.shape[axis] < NARROW:
        return 1
    shape, axis = _flat(x.shape, axis)
    return next((n for n in range(8, 1, -1) if shape[3 - axis] % n == 0), 1)


def is_tiny(x: Any) -> bool:
    """Whether an array is so small, or of unknown size, that the same is done on all platforms."""
    return not isinstance(x.size, int) or x.size < TINY


def _is_placed(x: Any) -> bool:
    """Whether the type `x` says that arrays of it are spread over devices."""
    return any(x.sharding.spec)


def _high(x: jax.Array) -> jax.Array:
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=4)


def _in_two_parts(size: Any, dtype: jnp.dtype) -> bool:
    return dtype == jnp.float32 and isinstance(size, int) and size < TINY
