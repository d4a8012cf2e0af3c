"""The contents of a `state_dict`: its source, values and layouts."""

import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbn._checks import FLOAT_DTYPES

Array = np.ndarray[Any, np.dtype[Any]]

# Parts of names that torch.compile, FSDP and activation checkpointing add.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
DATA_PARALLEL = "module."  # in front of all names; also in AveragedModel, with `n_averaged`


def opened(state_dict: Any) -> dict[str, Any]:
    """The entries of a mapping or of a `.safetensors` file, not yet checked."""
    if isinstance(state_dict, str | os.PathLike):
        return _read(os.fspath(state_dict))
    if not isinstance(state_dict, Mapping) or not all(isinstance(k, str) for k in state_dict):
        raise TypeError(
            "`state_dict` must map names to arrays, as model.state_dict() does, or be the path of "
            f"a .safetensors file; got {type(state_dict).__name__}."
        )
    return dict(state_dict)


def _read(path: str) -> dict[str, Any]:
    if not path.endswith(".safetensors"):
        raise ValueError(
            f"`state_dict` as a path must end in .safetensors; got {path!r}. For other files pass "
            "what torch.load(path, weights_only=True) returns."
        )
    try:
        from safetensors.numpy import load_file
    except ImportError as error:
        raise ImportError(
            f"Reading {path!r} takes the package safetensors: pip install safetensors"
        ) from error
    return dict(load_file(path))


def unwrapped(tensors: dict[str, Any], wanted: Iterable[str]) -> dict[str, Any]:
    """The entries without additions of wrappers to the keys, unless a wanted prefix has them."""
    prefixes = tuple(wanted)
    removed = WRAPPERS - {name for prefix in prefixes for name in prefix.split(".")}
    inner = {
        ".".join(name for name in key.split(".") if name not in removed): value
        for key, value in tensors.items()
    }
    if len(inner) < len(tensors):  # Two keys became one, and neither may be lost.
        inner = tensors
    parallel = inner.keys() - {"n_averaged"}
    if not parallel or not all(key.startswith(DATA_PARALLEL) for key in parallel):
        return inner
    inner.pop("n_averaged", None)
    if any(prefix.startswith(DATA_PARALLEL) for prefix in prefixes):
        return inner
    return unwrapped({k.removeprefix(DATA_PARALLEL): v for k, v in inner.items()}, prefixes)


def as_array(value: Any, key: str) -> Array:
    """A NumPy, JAX or torch array as a NumPy array, which may share its memory."""
    if hasattr(value, "detach"):
        try:
            value = _from_torch(value.detach().cpu())
        except (TypeError, NotImplementedError) as error:  # sparse, 8 bits, without data
            raise type(error)(f"`{key}` cannot become a NumPy array: {error}") from None
    array = np.asarray(value)
    if key.endswith("num_batches_tracked"):
        return array.reshape(()) if array.shape == (1,) else array
    if array.dtype.name not in FLOAT_DTYPES:
        raise TypeError(
            f"`{key}` must have one of the dtypes {', '.join(FLOAT_DTYPES)}; got {array.dtype}."
        )
    return array


def _from_torch(tensor: Any) -> Any:
    if str(tensor.dtype) != "torch.bfloat16":
        return tensor.numpy()
    return tensor.view(sys.modules["torch"].int16).numpy().view(jnp.bfloat16)


def check_statistics(array: Array, key: str, name: str) -> None:
    """Refuses statistics that are not finite, a negative variance, and a count not in int32."""
    if name == "count":
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(
                f"`{key}` must be an integer, the number of batches; got {array.dtype}. "
                "Use .astype(np.int64)."
            )
        if not 0 <= array <= np.iinfo(np.int32).max:
            raise ValueError(
                f"`{key}` must fit into int32 and not be negative; got {array}. Its value matters "
                "only with momentum=None; otherwise, use any number."
            )
    elif name in ("mean", "var"):
        with np.errstate(invalid="ignore"):  # a signaling NaN
            finite = np.isfinite(array).all()
        if not finite:
            raise ValueError(
                f"`{key}` must be finite; got NaN or infinity. The model diverged in training, or "
                "overflowed in half precision, before this was saved."
            )
        if name == "var" and (array < 0).any():
            raise ValueError(f"`{key}` is a variance and must not be negative; got {array.min()}.")


def torch_axes(ndim: int, transposed: bool) -> tuple[int, ...]:
    """The axes of a Flax kernel (*spatial, I, O) in the order of torch's weight, (O, I, *spatial).

    torch's transposed convolutions have (I, O, *spatial). Without spatial axes, the layer is dense.
    """
    channels = (ndim - 2, ndim - 1) if transposed else (ndim - 1, ndim - 2)
    return channels + tuple(range(ndim - 2))


def to_torch(array: Array, name: str, transposed: bool) -> Array:
    """A view in torch's layout. The kernel of a transposed convolution is flipped in space."""
    if name == "negative_slope":
        return array.reshape(1)
    if name != "kernel":
        return array
    if transposed:
        array = np.flip(array, tuple(range(array.ndim - 2)))
    return array.transpose(torch_axes(array.ndim, transposed))


def to_flax(array: Array, name: str, transposed: bool) -> Array:
    """A view in Flax's layout: inverts `to_torch`."""
    if name == "negative_slope":
        return array.reshape(())
    if name != "kernel":
        return array
    array = array.transpose(np.argsort(torch_axes(array.ndim, transposed)))
    return np.flip(array, tuple(range(array.ndim - 2))) if transposed else array
