"""Forms of the computation that suit one compiler, each with its reason.

XLA's CPU compiler makes no loop with two results. It writes to memory what two sums share, and most
values that a sum needs: selections, conversions from float16 and bfloat16. `benchmarks/README.md`
has the measurements, on the oldest and the newest JAX.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.custom_batching
import jax.numpy as jnp

from jaxbn._core.axes import expand, totals
from jaxbn._core.devices import spread

# Number of elements up to which memory traffic does not matter. One form serves all platforms.
SMALL = 2**15
# Largest number of pieces of a sum. XLA's CPU compiler fuses a value into a loop that uses it in up
# to 15 places. Two sums use it twice per piece.
PIECES = 7


def is_small(x: Any) -> bool:
    """Whether memory traffic does not matter, or the size is a symbol of `jax.export`."""
    return not isinstance(x.size, int) or x.size <= SMALL


def rounded(x: jax.Array) -> jax.Array:
    """`x` with one bit less.

    A compiler may fuse the product that yields a shift with the subtraction that uses the shift.
    The product is then not rounded, and the shift has another value at each use. The explicit
    rounding prevents this.
    """
    info = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant - 1)


def apart(x: jax.Array, *platforms: str) -> jax.Array:
    """`x`, as an array that compilers for these platforms do not recognize as the same."""
    barriers = dict.fromkeys(platforms, jax.lax.optimization_barrier)
    copy: jax.Array = jax.lax.platform_dependent(x, **barriers, default=lambda x: x)
    return copy


@jax.custom_batching.custom_vmap
def everywhere(condition: jax.Array) -> jax.Array:
    """Whether a condition holds in every channel; False under `jax.vmap`.

    Under `jax.vmap`, a conditional would compute both branches.
    """
    return condition.all()


@everywhere.def_vmap
def _(axis_size: int, in_batched: Any, condition: jax.Array) -> tuple[jax.Array, bool]:
    return jnp.array(False), False


def written_out(like: Any, *vectors: jax.Array) -> tuple[jax.Array, ...]:
    """The vectors, each computed only once on a CPU, and so are their cotangents.

    XLA would recompute them for every element in the loops over large arrays that use them. It
    never fuses a reduction into a loop, so each vector is summed with zeros.
    """
    if is_small(like) or any(is_placed(jax.typeof(v)) for v in (like, *vectors)):
        return vectors

    def by_reduction(stack: jax.Array) -> jax.Array:
        zeros = ((0, 1, 0), (0, 0, 0), (0, 0, 0))
        summed = jax.lax.pad(stack[None], jnp.zeros((), stack.dtype), zeros).sum(0)
        return jax.lax.broadcast_in_dim(summed, (2, *summed.shape), (1, 2))[0]

    stack = jax.lax.platform_dependent(
        jnp.stack(vectors), cpu=by_reduction, default=lambda stack: stack
    )
    return tuple(stack)


def totals_in_pieces(arrays: Sequence[jax.Array], axis: int) -> list[jax.Array]:
    """The sum of each array over every axis but `axis`: on a CPU, all of them in one loop."""
    like = jax.typeof(arrays[0])
    if not _is_summed_in_pieces(like, axis):
        return totals(arrays, axis)
    zeros = [spread(jnp.zeros(like.shape[axis], x.dtype), jax.typeof(x)) for x in arrays]
    expanded = functools.partial(_expanded_in_pieces, like=like, axis=axis)
    return list(jax.linear_transpose(expanded, *zeros)(tuple(arrays)))


def expand_tangents(vectors: Sequence[jax.Array], like: jax.Array, axis: int) -> list[jax.Array]:
    """The vectors in the shape of `like`. On a CPU, one loop computes all their cotangents."""
    given = jax.typeof(like)
    if is_placed(given):
        return [expand(v, given, axis) + jnp.zeros_like(like) for v in vectors]

    def whole(*vectors: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jax.lax.broadcast_in_dim(v, like.shape, (axis,)) for v in vectors)

    vectors = [spread(v, given) for v in vectors]
    if not _is_summed_in_pieces(given, axis):
        return list(whole(*vectors))
    in_pieces = functools.partial(_expanded_in_pieces, like=given, axis=axis)
    return list(jax.lax.platform_dependent(*vectors, cpu=in_pieces, default=whole))


def _expanded_in_pieces(*vectors: jax.Array, like: Any, axis: int) -> tuple[jax.Array, ...]:
    """The vectors, expanded to the shape of `like` so that the transpose is fast on a CPU.

    In the transpose, one elementwise loop computes the cotangents and adds up the pieces of each.
    Its single result holds the partial sums side by side. XLA's reduction adds up these.
    """
    neighbors, parts = _pieces(like.shape, axis)
    groups, size = like.shape[0] // neighbors, _positions(like.shape, axis) // parts
    channels, number = like.shape[axis], len(vectors)
    if axis == like.ndim - 1:
        stack, dimensions, split = jnp.stack(vectors), (2, 3), 1
        shape: tuple[int, ...] = groups, size, number, channels
    else:
        stack, dimensions, split = jnp.stack(vectors, 1), (1, 2), 2
        shape = groups, channels, number, size
    # Rounded, since the compiler would otherwise merge the additions into its reduction.
    stack = rounded(jax.lax.broadcast_in_dim(stack, shape, dimensions))
    expanded = []
    for i in range(number):
        piece = jax.lax.index_in_dim(stack, i, 2, keepdims=False)
        sample = jnp.concatenate([piece] * parts, split).reshape(groups, *like.shape[1:])
        expanded.append(jnp.stack([sample] * neighbors, 1).reshape(like.shape))
    return tuple(expanded)


def _is_summed_in_pieces(x: Any, axis: int) -> bool:
    """Whether a CPU sums a batch of this type in pieces."""
    return _is_in_place(x, axis) and not is_small(x) and math.prod(_pieces(x.shape, axis)) > 1


def _pieces(shape: tuple[int, ...], axis: int) -> tuple[int, int]:
    """Number of neighboring samples, and of parts of their positions, that are added up.

    Neighbors stay together if the samples are spread over up to 8 devices.
    """
    samples, positions = shape[0] // math.gcd(8, shape[0]), _positions(shape, axis)
    if axis == len(shape) - 1:
        parts = _largest_divisor(positions, PIECES)
        return _largest_divisor(samples, PIECES // parts), parts
    neighbors = _largest_divisor(samples, PIECES)
    return neighbors, _largest_divisor(positions, PIECES // neighbors)


def _largest_divisor(size: int, limit: int) -> int:
    return next(n for n in range(limit, 0, -1) if size % n == 0)


def flattened(x: jax.Array, axis: int) -> tuple[jax.Array, int]:
    """`x` with the positions of each sample on one axis, if that moves no data, and its `axis`."""
    if x.ndim < 3 or not _is_in_place(jax.typeof(x), axis):
        return x, axis
    samples, positions, channels = x.shape[0], _positions(x.shape, axis), x.shape[axis]
    if axis == 1:
        return x.reshape(samples, channels, positions), 1
    return x.reshape(samples, positions, channels), 2


def _is_in_place(x: Any, axis: int) -> bool:
    """Whether the positions of each sample are neighbors in memory, on one device."""
    return x.ndim > 1 and axis in (1, x.ndim - 1) and not is_placed(x)


def _positions(shape: tuple[int, ...], axis: int) -> int:
    """Number of positions of a sample."""
    return math.prod(n for i, n in enumerate(shape) if i not in (0, axis))


def is_placed(x: Any) -> bool:
    """Whether the type `x` says that its arrays are spread over devices."""
    return any(x.sharding.spec)


def may_be_spread(x: jax.Array) -> bool:
    """Whether the current mesh, or the type of `x`, has devices to spread `x` over.

    A condition on all channels would then need one more collective.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = (mesh.shape[name] for name in mesh.axis_names if name not in mesh.manual_axes)
    return math.prod(sizes) > 1 or is_placed(jax.typeof(x))
