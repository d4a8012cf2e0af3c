"""Conditional batch norm: a scale and a bias for each sample."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn._activation import Activation, checked_activation, is_own
from jaxbn._checks import checked_float, checked_vector
from jaxbn._core.axes import reduced_axes
from jaxbn._core.moments import where_valid


def is_conditional(*vectors: ArrayLike | None) -> bool:
    """Whether scale or bias has shape `[N, C]`."""
    return any(vector is not None and jnp.ndim(vector) == 2 for vector in vectors)


def conditional(
    x: jax.Array,
    axis: int,
    scale: ArrayLike | None,
    bias: ArrayLike | None,
    mask: jax.Array | None,
    residual: jax.Array | None,
    activation: str | Activation | None,
) -> Activation:
    """The function after normalization: `activation(z · scale + bias + residual)` by sample."""
    own = is_own(activation)
    function = activation if own else checked_activation(activation, None)[0]
    factor, offset = _of_samples(scale, "scale", x, axis), _of_samples(bias, "bias", x, axis)
    addend = None if residual is None else where_valid(mask, residual)

    def after(z: jax.Array) -> jax.Array:
        if factor is not None:
            z = z * factor.astype(z.dtype)
        for term in (offset, addend):
            z = z if term is None else z + term.astype(z.dtype)
        if own:
            z = where_valid(mask, z)
        return function(z) if callable(function) else z

    return after


def _of_samples(value: ArrayLike | None, name: str, x: jax.Array, axis: int) -> jax.Array | None:
    """`value`, of shape `[N, C]` or `[C]`, with as many dimensions as `x`."""
    if value is None:
        return None
    samples = reduced_axes(x.ndim, axis)[:1]
    if jnp.ndim(value) != 2:
        vector = checked_vector(value, name, x, axis)
        return jnp.expand_dims(vector, reduced_axes(x.ndim, axis))
    matrix, expected = checked_float(value, name), tuple(x.shape[i] for i in (*samples, axis))
    if matrix.shape != expected:
        raise ValueError(
            f"`{name}` of each sample must have shape [N, C], {expected} for x.shape={x.shape} and "
            f"axis={axis}; got {matrix.shape}."
        )
    if axis < samples[0]:
        matrix = matrix.T
    return jnp.expand_dims(matrix, [i for i in range(x.ndim) if i not in (*samples, axis)])
