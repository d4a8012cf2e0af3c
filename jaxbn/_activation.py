"""The functions that may be applied to the normalized values."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Activation = Callable[..., jax.Array]

ACTIVATIONS: dict[str, Activation] = {
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
}
# Linear on either side of zero: the sign of the output tells the derivative.
PIECEWISE_LINEAR = (jax.nn.relu, jax.nn.leaky_relu)


def checked_activation(
    activation: str | Activation | None, shape: tuple[int, ...], dtype: DTypeLike
) -> tuple[Activation | None, tuple[jax.Array, ...]]:
    """The function `(z, *constants) -> array`, and the arrays that a closure held.

    Taking the arrays out of the closure is what makes the result differentiable with respect to
    them.
    """
    if isinstance(activation, str):
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"`activation` must be None, a function, or one of {', '.join(ACTIVATIONS)}; "
                f"got {activation!r}."
            )
        return ACTIVATIONS[activation], ()
    if activation is None or activation in PIECEWISE_LINEAR:
        return activation, ()
    if not callable(activation):
        raise TypeError(
            f"`activation` must be None, a function, or one of {', '.join(ACTIVATIONS)}; "
            f"got {activation!r}."
        )
    example = jax.ShapeDtypeStruct(shape, dtype)
    output = jax.eval_shape(activation, example)
    if getattr(output, "shape", None) != shape or not jnp.issubdtype(output.dtype, jnp.floating):
        raise ValueError(
            "`activation` must return a real array of the shape of its argument; "
            f"got {output} for {example}."
        )
    function, constants = jax.closure_convert(activation, example)
    return function, tuple(constants)
