"""Argument checks: each error names the requirement, what arrived and the fix.

They look at shapes, dtypes and Python numbers only, never at the values of arrays, so they run
at trace time and cost nothing in compiled code.
"""

import math
import numbers
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

FLOAT_DTYPES = ("bfloat16", "float16", "float32", "float64")


def statistics_dtype(*dtypes: DTypeLike) -> np.dtype[Any]:
    """The dtype to compute in for data of these dtypes: float64 if one of them is, else float32."""
    wide = any(dtype == np.float64 for dtype in dtypes)
    return np.dtype(np.float64 if wide else np.float32)


def checked_float(value: ArrayLike, name: str) -> jax.Array:
    """`value` as an array, refused unless it is real floating point."""
    array = jnp.asarray(value)
    if array.dtype.name not in FLOAT_DTYPES:
        raise TypeError(
            f"`{name}` must have one of the dtypes {', '.join(FLOAT_DTYPES)}; got {array.dtype}. "
            f"Convert it first, for example with {name}.astype(jnp.float32)."
        )
    return array


def checked_dtype(dtype: DTypeLike | None, x: jax.Array) -> np.dtype[Any]:
    """The dtype of the output: `dtype`, or that of `x` where it is None."""
    chosen = jax.dtypes.canonicalize_dtype(x.dtype if dtype is None else dtype)
    if chosen.name not in FLOAT_DTYPES:
        raise TypeError(f"`dtype` must be one of {', '.join(FLOAT_DTYPES)}, or None; got {chosen}.")
    return np.dtype(chosen)


def checked_axis(shape: tuple[int, ...], axis: int) -> int:
    """The channel axis of an array of this shape, counted from the front."""
    try:
        index = operator.index(axis)
    except TypeError:
        raise TypeError(
            f"`axis` must be one int, the channel axis of `x`; got {axis!r}. "
            "Every other axis is reduced."
        ) from None
    if not shape:
        raise ValueError("`x` must have at least 1 dimension, the channels; got a scalar.")
    if not -len(shape) <= index < len(shape):
        raise ValueError(
            f"`axis` must name an axis of `x`, from {-len(shape)} to {len(shape) - 1}; "
            f"got axis={axis} for x.shape={shape}."
        )
    if shape[index] == 0:
        raise ValueError(
            f"`x` must have at least 1 channel; got 0 at axis={axis} for x.shape={shape}."
        )
    return index % len(shape)


def checked_input(x: ArrayLike, axis: int) -> tuple[jax.Array, int]:
    """`x` as an array, and its channel axis counted from the front."""
    x = checked_float(x, "x")
    return x, checked_axis(x.shape, axis)


def checked_vector(value: ArrayLike, name: str, x: jax.Array, axis: int) -> jax.Array:
    """`value` as an array, refused unless it holds one number for each channel of `x`."""
    vector = checked_float(value, name)
    if vector.shape != (x.shape[axis],):
        raise ValueError(
            f"`{name}` must have shape ({x.shape[axis]},), the size of `x` along axis={axis}; "
            f"got {vector.shape} for x.shape={x.shape}.{axis_hint(x.shape, axis, vector.shape)}"
        )
    return vector


def axis_hint(shape: tuple[int, ...], axis: int, expected: tuple[int, ...]) -> str:
    """Names the axis that the caller may have meant: the other usual one, if its size fits."""
    last = axis % len(shape) == len(shape) - 1
    other, layout = (1, "channels-first") if last else (-1, "channels-last")
    if len(shape) < 2 or expected != (shape[other],):
        return ""
    return f" For {layout} inputs pass axis={other}."


def checked_epsilon(epsilon: float, *, train: bool) -> float:
    """`epsilon` as a float: finite, positive in training, non-negative in inference."""
    if not isinstance(epsilon, numbers.Real):
        raise TypeError(
            "`epsilon` must be a Python number, known when the function is traced; "
            f"got {type(epsilon).__name__}. Outside jit, pass float(epsilon)."
        )
    if not math.isfinite(epsilon) or epsilon < 0 or (train and epsilon == 0):
        requirement = "positive during training" if train else "non-negative"
        raise ValueError(f"`epsilon` must be finite and {requirement}; got {epsilon}.")
    return float(epsilon)


def check_momentum(momentum: ArrayLike | None) -> None:
    """None, a number in [0, 1], or a floating scalar array, whose value is not looked at."""
    if momentum is None:
        return
    if isinstance(momentum, numbers.Real):
        if not 0 <= momentum <= 1:
            raise ValueError(
                "`momentum` must be None or between 0 and 1, the weight of the new batch in "
                f"(1 - momentum) * old + momentum * batch; got {momentum}."
            )
    elif checked_float(momentum, "momentum").ndim:
        raise ValueError(
            "`momentum` must be a scalar, the same for all channels; "
            f"got shape {jnp.shape(momentum)}."
        )


def check_bool(value: object, name: str) -> None:
    """A bool, from Python, NumPy or JAX, traced or not."""
    if not isinstance(value, bool) and str(getattr(value, "dtype", None)) != "bool":
        raise TypeError(f"`{name}` must be True, False or a traced bool; got {value!r}.")


def check_values_per_channel(x: jax.Array, axis: int) -> None:
    """One value per channel has no variance to divide by."""
    if x.size == x.shape[axis]:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.shape}"
        )


def check_implemented(**arguments: object) -> None:
    """Refuses arguments whose names are reserved but whose meaning is not there yet."""
    for name, value in arguments.items():
        if value is not None:
            raise NotImplementedError(f"`{name}` is not implemented yet; leave it at None.")
