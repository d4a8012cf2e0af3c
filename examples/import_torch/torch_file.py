"""Reads the state_dict in a file of `torch.save`'s legacy format, with NumPy alone.

Such a file is a row of pickles: a magic number, the version of the format, the sizes of C types,
the state_dict, whose tensors name the storages that hold their elements, and the names of all
storages. The storages follow: the number of elements as int64, and the elements.

A pickle is a program for a small machine, which may call any function there is. `pickle.Unpickler`
can be kept from that, but some bytes can still make it crash or take gigabytes. So this module
has a machine of its own, which knows what a state_dict needs, and refuses everything else.
"""

import hashlib
import io
import math
import os
import pathlib
import pickletools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001
UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, OverflowError)


class TorchFileError(Exception):
    """A file that cannot be used: says which, what is wrong with it and what to do."""


class Storage(NamedTuple):
    """A row of numbers in the file, of which tensors are views."""

    dtype: np.dtype[Any]
    key: str
    size: int


class Tensor(NamedTuple):
    """A view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read(path: str | os.PathLike[str], sha256: str | None = None) -> dict[str, Array]:
    """The arrays of a file by their names, in its order; they are read-only views of its bytes.

    Args:
      path: the file.
      sha256: in hexadecimal; a file with another digest is refused before it is looked into.

    Raises:
      TorchFileError: the file is not the one that was meant, or broken, or holds anything but a
        state_dict in the legacy format.
      OSError: it cannot be read.
    """
    content = pathlib.Path(path).read_bytes()
    arrived = hashlib.sha256(content).hexdigest()
    if sha256 not in (None, arrived):
        raise TorchFileError(
            f"{path}: its SHA-256 must be {sha256}; got {arrived}, of {len(content)} bytes"
        )
    if content.startswith(b"PK"):
        raise TorchFileError(
            f"{path}: must be in the legacy format; got the zip format that torch.save writes "
            "since torch 1.6. Read it with torch.load, or write it again with "
            "safetensors.torch.save_file or torch.save(..., _use_new_zipfile_serialization=False)"
        )
    try:
        return _state_dict(io.BytesIO(content))
    except UNREADABLE as error:
        raise TorchFileError(
            f"{path}: not a state_dict in torch's legacy format that can be read: {error}"
        ) from None


def _state_dict(file: io.BytesIO) -> dict[str, Array]:
    storages: dict[str, Storage] = {}
    magic, version, _, tensors, keys = (_unpickle(file, storages) for _ in range(5))
    if (magic, version) != (MAGIC, VERSION):
        raise ValueError(f"it must begin with torch's magic number and version {VERSION}")
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError("it must hold one dict, of names and tensors; got something else")
    strings = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not strings or set(keys) != set(storages):
        raise ValueError("the storages that follow must be those that the tensors name")
    contents = {}
    for key in keys:
        dtype, _, size = storages[key]
        count, content = file.read(8), file.read(size * dtype.itemsize)
        if int.from_bytes(count, "little") != size or len(content) != size * dtype.itemsize:
            raise ValueError(f"the {size} elements of storage {key} are cut off, or something else")
        contents[key] = content
    return {name: _view(tensor, contents[tensor.storage.key]) for name, tensor in tensors.items()}


def _view(tensor: Tensor, content: bytes) -> Array:
    dtype = tensor.storage.dtype
    steps = [step * dtype.itemsize for step in tensor.strides]
    return np.ndarray(tensor.shape, dtype, content, tensor.offset * dtype.itemsize, steps)


def _storage(saved_id: object, storages: dict[str, Storage]) -> Storage:
    match saved_id:
        case ("storage", np.dtype() as dtype, str(key), str(), int(size), None) if size >= 0:
            storage = Storage(dtype, key, size)
            if storages.setdefault(key, storage) == storage:
                return storage
    raise ValueError("a storage must have one dtype, name, device and size")


def _tensor(storage: Storage, offset: int, shape: Any, strides: Any, *_: object) -> Tensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ValueError("a tensor must have a storage, an offset, a shape and strides")
    end = offset + 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if math.prod(shape) > storage.size or (end > storage.size and 0 not in shape):
        raise ValueError(f"a tensor reaches beyond the {storage.size} elements of its storage")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


def _ordered_dict() -> dict[str, Tensor]:
    return {}


GLOBALS: Mapping[str, Any] = {
    "collections OrderedDict": _ordered_dict,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch DoubleStorage": np.dtype("<f8"),
    "torch FloatStorage": np.dtype("<f4"),
    "torch HalfStorage": np.dtype("<f2"),
    "torch LongStorage": np.dtype("<i8"),
    "torch IntStorage": np.dtype("<i4"),
    "torch ShortStorage": np.dtype("<i2"),
    "torch CharStorage": np.dtype("i1"),
    "torch ByteStorage": np.dtype("u1"),
    "torch BoolStorage": np.dtype("?"),
}
NEW: Mapping[str, Any] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NEWFALSE": bool,
    "NEWTRUE": lambda: True,
    "NONE": lambda: None,
}
# How many values an opcode takes off the stack; 0: those since the last MARK.
TAKEN = {"TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "APPENDS": 0}
TAKEN |= {"SETITEM": 2, "SETITEMS": 0, "REDUCE": 1, "BUILD": 1, "BINPERSID": 1}


def _items(taken: list[Any]) -> dict[str, Any]:
    if not all(isinstance(key, str) for key in taken[::2]):
        raise ValueError("the keys of a dict must be strings")
    return dict(zip(taken[::2], taken[1::2], strict=True))


def _unpickle(file: io.BytesIO, storages: dict[str, Storage]) -> Any:
    """Runs the pickle that comes next; `storages` gains those that it names."""
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks under each MARK
    memo: dict[Any, Any] = {}
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in TAKEN:
            if count := TAKEN[opcode.name]:
                taken = [stack.pop() for _ in range(count)][::-1]
            else:
                taken, stack = stack, below.pop()
        match opcode.name:
            case "STOP":
                return stack.pop()
            case "MARK":
                below.append(stack)
                stack = []
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE":
                stack.append(argument)
            case name if name in NEW:
                stack.append(NEW[name]())
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(taken))
            case "APPEND" | "APPENDS":
                stack[-1].extend(taken)
            case "SETITEM" | "SETITEMS":
                stack[-1].update(_items(taken))
            case "GLOBAL" if argument in GLOBALS:
                stack.append(GLOBALS[str(argument)])
            case "REDUCE":
                stack.append(stack.pop()(*taken[0]))
            case "BINPERSID":
                stack.append(_storage(taken[0], storages))
            case "PROTO" | "BUILD":  # BUILD sets attributes: the versions of torch's modules
                pass
            case name:
                raise ValueError(f"a state_dict needs no {name} {argument or ''}".rstrip())
