"""Argument checks: each error names the requirement, what arrived and the fix.

They look only at shapes, dtypes and Python numbers, never at the values of traced arrays. They
therefore run at trace time and cost nothing in compiled code.
"""

import math
import numbers
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jaxbn._core.devices import Devices, placed_like
from jaxbn._types import Integer, Number

FLOAT_DTYPES = ("bfloat16", "float16", "float32", "float64")


def statistics_dtype(*dtypes: DTypeLike) -> np.dtype[Any]:
    """The dtype to compute in for data of these dtypes: float64 if one of them is, else float32."""
    wide = any(dtype == np.float64 for dtype in dtypes)
    return np.dtype(np.float64 if wide else np.float32)


def checked_array(value: ArrayLike, name: str) -> jax.Array:
    """`value` as an array."""
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        given = repr(value)
        given = given if len(given) <= 80 else f"a {type(value).__name__}"
        raise TypeError(f"`{name}` must be an array; got {given}.") from error


def checked_float(value: ArrayLike, name: str) -> jax.Array:
    """`value` as an array of real floating point."""
    array = checked_array(value, name)
    if array.dtype.name not in FLOAT_DTYPES:
        raise TypeError(
            f"`{name}` must have one of the dtypes {', '.join(FLOAT_DTYPES)}; got {array.dtype}. "
            f"Convert it first, for example with {name}.astype(jnp.float32)."
        )
    return array


def checked_dtype(dtype: DTypeLike | None, x: jax.Array) -> np.dtype[Any]:
    """The dtype of the output: `dtype`, or the dtype of `x` if it is None."""
    chosen = jax.dtypes.canonicalize_dtype(x.dtype if dtype is None else dtype)
    if chosen.name not in FLOAT_DTYPES:
        raise TypeError(f"`dtype` must be one of {', '.join(FLOAT_DTYPES)}, or None; got {chosen}.")
    return np.dtype(chosen)


def checked_axis(shape: tuple[int, ...], axis: Integer) -> int:
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


def checked_input(x: ArrayLike, axis: Integer) -> tuple[jax.Array, int]:
    """`x` as an array, and its channel axis counted from the front."""
    x = checked_float(x, "x")
    return x, checked_axis(x.shape, axis)


def checked_vector(value: ArrayLike, name: str, x: jax.Array, axis: int) -> jax.Array:
    """`value` as an array with one number for each channel of `x`."""
    vector = checked_float(value, name)
    if vector.shape != (x.shape[axis],):
        raise ValueError(
            f"`{name}` must have shape ({x.shape[axis]},), the size of `x` along axis={axis}; "
            f"got {vector.shape} for x.shape={x.shape}.{axis_hint(x.shape, axis, vector.shape)}"
        )
    return vector


def axis_hint(shape: tuple[int, ...], axis: int, expected: tuple[int, ...]) -> str:
    """A hint at the axis that the caller may have meant: the other usual one, if its size fits."""
    last = axis % len(shape) == len(shape) - 1
    other, layout = (1, "channels-first") if last else (-1, "channels-last")
    if len(shape) < 2 or expected != (shape[other],):
        return ""
    return f" For {layout} inputs pass axis={other}."


def checked_epsilon(epsilon: Number, dtype: np.dtype[Any], *, train: bool) -> float:
    """`epsilon` as a float in the range of `dtype`: positive in training, else non-negative."""
    if not isinstance(epsilon, numbers.Real):
        raise TypeError(
            "`epsilon` must be a Python number, known when the function is traced; "
            f"got {type(epsilon).__name__}. Outside jit, pass float(epsilon)."
        )
    try:
        epsilon = float(epsilon)
    except OverflowError:
        epsilon = math.inf
    if not math.isfinite(epsilon) or epsilon < 0 or (train and epsilon == 0):
        requirement = "positive during training" if train else "non-negative"
        raise ValueError(f"`epsilon` must be finite and {requirement}; got {epsilon}.")
    low, high = float(np.finfo(dtype).tiny), float(np.finfo(dtype).max)
    if not low <= epsilon <= high and epsilon != 0:
        raise ValueError(
            f"`epsilon` must be in the range of {dtype}, {low:.1e} to {high:.1e}; got {epsilon}."
        )
    return epsilon


def check_momentum(momentum: ArrayLike | None) -> None:
    """Accepts None, a number in [0, 1], or a floating scalar array of any value."""
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


def check_bool(value: Any, name: str) -> None:
    """Accepts a bool of Python, NumPy or JAX, traced or not, without dimensions."""
    if shape := getattr(value, "shape", ()):
        kind = "bools" if value.dtype == bool else value.dtype
        raise ValueError(
            f"`{name}` must be one bool, for all samples; got {kind} of shape {shape}. Pass a mask "
            "by name: mask=…."
        )
    if not isinstance(value, bool) and str(getattr(value, "dtype", None)) != "bool":
        raise TypeError(f"`{name}` must be True, False or a traced bool; got {value!r}.")


def check_known_bool(value: object, name: str) -> None:
    """Accepts a bool that is known when the function is traced."""
    if not isinstance(value, bool | np.bool_):
        given = type(value).__name__ if isinstance(value, jax.Array) else repr(value)
        raise TypeError(f"`{name}` must be True or False, known when traced; got {given}.")


def check_collections(variables: Mapping[str, Any]) -> None:
    """Accepts the variables of a Flax model with batch norms."""
    for name in ("params", "batch_stats"):
        if not isinstance(variables.get(name), Mapping):
            raise ValueError(
                "`variables` must have the collections params and batch_stats, as `model.init` "
                f"returns them; got {', '.join(map(repr, variables)) or 'none'}."
            )


def check_values_per_channel(x: jax.Array, axis: int, devices: Devices) -> None:
    """Refuses one value per channel on all devices together: it has no variance to divide by."""
    if x.size == x.shape[axis] and devices.size == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.shape}"
        )


def checked_mask(
    mask: ArrayLike | None, x: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array | None]:
    """`x`, and `mask` as bools with as many dimensions as `x`, on the same devices.

    Known numbers other than 0 and 1 are refused. If they are traced, their values in `x` become
    NaN.
    """
    if mask is None:
        return x, None
    mask = checked_array(mask, "mask")
    if jnp.issubdtype(mask.dtype, jnp.complexfloating):
        raise TypeError(f"`mask` must be bool, or hold 0 and 1 as real numbers; got {mask.dtype}.")
    _check_mask_shape(mask.shape, x.shape, axis)
    mask = placed_like(jnp.expand_dims(mask, range(x.ndim - mask.ndim)), x)
    if mask.dtype == bool:
        return x, mask
    valid, proper = mask != 0, (mask == 0) | (mask == 1)
    if not isinstance(mask, jax.core.Tracer):
        if not proper.all():
            raise ValueError(
                "`mask` must be True or 1 where `x` counts and False or 0 elsewhere; got other "
                "values. Compare first, for example mask > 0.5; weights are not supported."
            )
        return x, valid
    return jnp.where(proper, x, jnp.asarray(jnp.nan, x.dtype)), valid


def _check_mask_shape(mask: tuple[int, ...], x: tuple[int, ...], axis: int) -> None:
    """Refuses a mask that does not broadcast against `x`, or could mean two different axes."""
    ndim = len(mask)

    def fits(axes: tuple[int, ...]) -> bool:
        return all(m in (1, n) for m, n in zip(mask, axes, strict=True))

    if ndim > len(x) or not fits(x[len(x) - ndim :]):
        raise ValueError(
            f"`mask` must broadcast against `x`; got shape {mask} for x.shape={x}. A mask of one "
            f"value per sample has shape {(x[0],) + (1,) * (len(x) - 1)}"
            + (f", of one per position {(*x[:axis], 1, *x[axis + 1 :])}." if len(x) > 2 else ".")
        )
    if ndim < len(x) and fits(x[:ndim]) and math.prod(mask) != 1:
        raise ValueError(
            f"`mask` of shape {mask} fits both the first and the last axes of x.shape={x}. Give it "
            f"{len(x)} dimensions: {mask + (1,) * (len(x) - ndim)} for the first, "
            f"{(1,) * (len(x) - ndim) + mask} for the last."
        )


def checked_residual(
    residual: ArrayLike | None, x: jax.Array, dtype: np.dtype[Any]
) -> jax.Array | None:
    """`residual` as an array that can be added to an output of this dtype and the shape of `x`."""
    if residual is None:
        return None
    residual = checked_float(residual, "residual")
    if residual.shape != x.shape:
        raise ValueError(f"`residual` must have the shape of `x`, {x.shape}; got {residual.shape}.")
    if residual.dtype != dtype:
        raise TypeError(
            f"`residual` must have the dtype of the output, {dtype}; got {residual.dtype}. "
            f"Use residual.astype(jnp.{dtype})."
        )
    return placed_like(residual, x)
