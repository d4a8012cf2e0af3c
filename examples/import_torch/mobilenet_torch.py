"""The network of `mobilenet` in torch, for comparison.

`python examples/import_torch/mobilenet_torch.py` writes its features to `mobilenet_features.npz`.
It needs torch and the weights of `pretrained`.
"""

import collections
from collections.abc import Mapping
from typing import Any

import mobilenet
import numpy as np
import pretrained
import torch
from numpy.typing import NDArray
from torch import nn

CREDIT = (
    "Means over positions of the last layer of MobileNetV2 (M. Sandler et al., CVPR 2018), in "
    f"float64 by torch {torch.__version__.partition('+')[0]}, from the weights in "
    f"{pretrained.PACKAGE} (MIT, Ling Evan), of the pictures in examples/import_torch."
)


class Residual(nn.Module):
    """Layers, plus their input if the number of channels is the same."""

    def __init__(self, shape: mobilenet.Shape) -> None:
        """The names of the layers are those in the checkpoint."""
        super().__init__()
        channels, hidden, features, stride = shape
        expand = conv_norm(channels, hidden) if "expand" in shape.parts else []
        depthwise = conv_norm(hidden, hidden, 3, stride, hidden)
        self.conv = nn.Sequential(*expand, *depthwise, *conv_norm(hidden, features)[:2])
        self.added = channels == features

    def forward(self, x: torch.Tensor) -> Any:
        """Images `[N, C, H, W]` to images."""
        return self.conv(x) + x if self.added else self.conv(x)


def conv_norm(
    channels: int, features: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """Convolution, batch norm, ReLU6."""
    conv = nn.Conv2d(channels, features, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(features), nn.ReLU6()]


def network(state_dict: Mapping[str, NDArray[Any]]) -> nn.Module:
    """The network in evaluation mode, with these weights: `[N, 3, H, W]` to `[N, 1280, H', W']`.

    It has the dtype of the weights.
    """
    stem = nn.Sequential(*conv_norm(3, mobilenet.STEM, 3, 2))
    shapes = mobilenet.blocks()
    head = nn.Sequential(*conv_norm(shapes[-1].features, mobilenet.HEAD))
    features = nn.Sequential(stem, *map(Residual, shapes), head)
    model = nn.Sequential(collections.OrderedDict(features=features))
    tensors = {name: torch.tensor(array) for name, array in state_dict.items()}
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.eval()


def features(state_dict: Mapping[str, NDArray[Any]], images: NDArray[Any]) -> NDArray[Any]:
    """Features `[N, 1280]` of images `[N, H, W, 3]`, in the dtype of the images."""
    x = torch.tensor(images).permute(0, 3, 1, 2)
    with torch.no_grad():
        y = network(state_dict).to(x.dtype)(x).mean((2, 3))
    return np.asarray(y)


if __name__ == "__main__":
    recorded = features(pretrained.state_dict(), pretrained.pictures()[0])
    np.savez_compressed(pretrained.FEATURES, features=recorded, credit=CREDIT)
