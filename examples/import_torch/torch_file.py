"""Reads a state_dict that `torch.save` wrote in its legacy format, without torch.

`torch.load` reads such files too, but torch takes gigabytes to install. A pickle can call any
function; this reader allows only the ones that a state_dict needs.

A file is a row of pickles: a magic number, a version, the sizes of C types, the state_dict, and the
keys of the storages that its tensors view. Each storage follows: its size as int64, its elements.
"""

import pickle
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def read(file: BinaryIO) -> dict[str, Array]:
    """The arrays of a state_dict by name.

    Raises:
      pickle.UnpicklingError: the file holds anything else than names and tensors.
    """
    storages: dict[str, Array] = {}
    _magic, _version, _sizes, state_dict, keys = (
        _Unpickler(file, storages).load() for _ in range(5)
    )
    for key in keys:
        file.read(8)  # the size, which the state_dict has, too
        storage = storages[key]
        storage[:] = np.frombuffer(file.read(storage.nbytes), storage.dtype)
    return dict(state_dict)


class _Unpickler(pickle.Unpickler):
    """Makes arrays of tensors: views of storages, whose elements come later."""

    def __init__(self, file: BinaryIO, storages: dict[str, Array]) -> None:
        super().__init__(file)
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        """The allowed functions, and dtypes for the storage classes of torch."""
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"a state_dict needs no {module}.{name}")
        return ALLOWED[module, name]

    def persistent_load(self, saved_id: Any) -> Array:
        """The storage of this key."""
        _, dtype, key, _device, size, _view = saved_id
        return self.storages.setdefault(key, np.zeros(size, dtype))


class _OrderedDict(dict[str, Any]):
    """Takes the attributes that torch gives a state_dict."""


def _tensor(
    storage: Array, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: object
) -> Array:
    size = storage.itemsize
    steps = [size * step for step in strides]
    return np.ndarray(shape, storage.dtype, storage, size * offset, steps)


ALLOWED: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch", "FloatStorage"): np.dtype("<f4"),
    ("torch", "LongStorage"): np.dtype("<i8"),
}
