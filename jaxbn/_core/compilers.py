"""Forms of the computation that suit one compiler, each with its reason.

XLA's CPU compiler fuses a sum with the float32 arithmetic in front of it into one fast loop. It
writes some intermediate results to memory: selections, conversions from float16 and bfloat16, and
values that a sum shares with other code. `benchmarks/README.md` has the measurements, on the oldest
and the newest JAX.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.custom_batching
import jax.numpy as jnp

from jaxbn._core.axes import expand, reduced_axes, total
from jaxbn._core.devices import spread

# Number of elements up to which memory traffic does not matter. One form serves all platforms.
SMALL = 2**15

# A sum over every axis but one.
Total = Callable[[jax.Array, int], jax.Array]


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


def total_in_pieces(x: jax.Array, axis: int) -> jax.Array:
    """Sum of `x` over every axis but `axis`, fast on a CPU however `x` is computed.

    One elementwise pass adds up pieces, `x[:, :p] + x[:, p:2p] + …`, together with the computation
    of `x`, and leaves only a fraction to XLA's reduction.
    """
    pieces = _pieces(jax.typeof(x), axis)
    if pieces == 1:
        return total(x, axis)
    x, axis = flattened(x, axis)
    split = 3 - axis
    size = x.shape[split] // pieces
    parts = (jax.lax.slice_in_dim(x, i * size, (i + 1) * size, axis=split) for i in range(pieces))
    # Rounded, since the compiler would otherwise merge the additions into its reduction.
    return total(rounded(functools.reduce(jnp.add, parts)), axis)


def expand_tangent(vector: jax.Array, like: Any, axis: int, obstructed: bool) -> jax.Array:
    """`expand` for a tangent. Its transpose is a sum, on a CPU in pieces if that is faster."""
    if not sums_in_pieces(like, axis, obstructed):
        return expand(vector, like, axis)
    pieces = _pieces(like, axis)

    def whole(vector: jax.Array) -> jax.Array:
        return jax.lax.broadcast_in_dim(vector, like.shape, (axis,))

    def in_pieces(vector: jax.Array) -> jax.Array:
        shape, flat_axis = _flat(like.shape, axis)
        split = 3 - flat_axis
        shape[split] //= pieces
        piece = rounded(jax.lax.broadcast_in_dim(vector, shape, (flat_axis,)))
        return jnp.concatenate([piece] * pieces, split).reshape(like.shape)

    expanded: jax.Array = jax.lax.platform_dependent(
        spread(vector, like), cpu=in_pieces, default=whole
    )
    return expanded


def sums_in_pieces(x: Any, axis: int, obstructed: bool) -> bool:
    """Whether a CPU sums values computed from a batch of this type faster in pieces.

    A sum is obstructed if XLA's fast loop cannot compute it: under a mask, in `jax.vmap` over
    groups, or if the input is computed from the output.
    """
    return (obstructed or x.dtype.itemsize <= 2) and _pieces(x, axis) > 1


def _pieces(x: Any, axis: int) -> int:
    """Number of pieces into which a sum splits the positions of each sample; 1 for a single sum.

    Samples stay whole, since they may be spread over devices. Nothing is split if the type of `x`
    says that it is spread.
    """
    if is_small(x) or not _is_flat_in_place(x, axis):
        return 1
    shape, axis = _flat(x.shape, axis)
    return next((n for n in range(8, 1, -1) if shape[3 - axis] % n == 0), 1)


def flattened(x: jax.Array, axis: int) -> tuple[jax.Array, int]:
    """`x` with the positions of each sample on one axis, if that moves no data, and its `axis`."""
    if not _is_flat_in_place(jax.typeof(x), axis):
        return x, axis
    shape, axis = _flat(x.shape, axis)
    return x.reshape(shape), axis


def _is_flat_in_place(x: Any, axis: int) -> bool:
    """Whether the positions of each sample are neighbors in memory, on one device."""
    return x.ndim > 1 and axis in (1, x.ndim - 1) and not is_placed(x)


def _flat(shape: tuple[int, ...], axis: int) -> tuple[list[int], int]:
    """The shape of a batch with the positions of each sample along one axis, and its `axis`.

    If a sample has one position, 8 neighbors count as one sample. Their number must be a multiple
    of 64, so that neighbors stay together on up to 8 devices.
    """
    if len(shape) == 2:
        neighbors = 1 if shape[0] % 64 else 8
        return [shape[0] // neighbors, neighbors, shape[1]], 2
    positions = math.prod(shape[i] for i in reduced_axes(len(shape), axis)[1:])
    if axis == 1:
        return [shape[0], shape[1], positions], 1
    return [shape[0], positions, shape[axis]], 2


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
