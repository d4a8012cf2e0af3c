"""The functions that can be applied to the normalized values."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxbn._checks import check_known_bool
from jaxbn._core.moments import where_valid

Activation = Callable[..., jax.Array]

ACTIVATIONS: dict[str, Activation] = {
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,
}
# Linear on either side of zero: the sign of the output determines the derivative.
PIECEWISE_LINEAR = (jax.nn.relu, jax.nn.leaky_relu)


def _inverse_leaky_relu(y: jax.Array) -> jax.Array:
    """`y`, or `y / 0.01` if it is negative. A CPU would write the result of a `where` to memory."""
    return y - jax.nn.relu(-y) * (1 / 0.01 - 1)


INVERSES: dict[Activation | None, Activation] = {
    None: lambda y: y,
    jax.nn.leaky_relu: _inverse_leaky_relu,
}


def is_own(activation: object) -> bool:
    """Whether this is the user's own function. The functions in `ACTIVATIONS` are elementwise."""
    return callable(activation) and all(activation is not known for known in ACTIVATIONS.values())


def checked_activation(
    activation: str | Activation | None, example: jax.ShapeDtypeStruct | None
) -> tuple[Activation | None, tuple[jax.Array, ...]]:
    """The function `(z, *constants) -> array` for an argument like `example`, and its constants.

    The constants are the arrays of the activation's closure. As arguments, they have derivatives.
    The user's own function is called once.
    """
    if isinstance(activation, str) and activation in ACTIVATIONS:
        return ACTIVATIONS[activation], ()
    if activation is None or (callable(activation) and not is_own(activation)):
        return activation, ()
    if not callable(activation):
        kind = ValueError if isinstance(activation, str) else TypeError
        raise kind(
            f"`activation` must be None, a function, or one of {', '.join(ACTIVATIONS)}; "
            f"got {activation!r}."
        )
    # Wrapped in a function, since `activation` may not be hashable.
    function, constants = jax.closure_convert(lambda z: activation(z), example)
    _check_output(jax.eval_shape(function, example, *constants), example)
    return function, tuple(constants)


def check_keep_output(
    keep_output: object, activation: object, residual: object, *, by_sample: bool
) -> None:
    """Refuses `keep_output` if the input cannot be computed from the output."""
    check_known_bool(keep_output, "keep_output")
    if not keep_output:
        return
    function = ACTIVATIONS.get(activation) if isinstance(activation, str) else activation
    if not any(function is known for known in INVERSES):
        raise ValueError(
            "`keep_output` takes an activation that has an inverse, None or 'leaky_relu'; "
            f"got {activation!r}. Choose one of these, or keep the input."
        )
    if residual is not None:
        raise ValueError(
            "`keep_output` takes no `residual`, which would have to be kept beside the output. "
            "Add it to the output, or keep the input."
        )
    if by_sample:
        raise ValueError(
            "`keep_output` takes a `scale` and a `bias` of shape [C]; got [N, C], one row per "
            "sample. Keep the input."
        )


def after(
    activation: Activation, z: jax.Array, mask: jax.Array | None, dtype: DTypeLike
) -> jax.Array:
    """`activation(z)` of a whole batch, rounded to `dtype`; zero where masked."""
    y = activation(z)
    _check_output(y, z)
    return where_valid(mask, y).astype(dtype)


def _check_output(output: Any, argument: Any) -> None:
    fits = getattr(output, "shape", None) == argument.shape
    if not fits or not jnp.issubdtype(output.dtype, jnp.floating):
        got, example = jax.eval_shape(lambda: (output, argument))
        raise ValueError(
            "`activation` must return a real array of the shape of its argument; "
            f"got {got} for {example}."
        )
