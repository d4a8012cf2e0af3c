"""MobileNetV2 without its classifier, images `[N, H, W, 3]` to features `[N, 1280]`.

M. Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018,
https://arxiv.org/abs/1801.04381, table 2, at width 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax

from jaxbn.linen import BatchNorm2d

STAGES = (  # expansion of the channels, output channels, blocks, stride of the first block
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM, HEAD = 32, 1280


class Shape(NamedTuple):
    """The shape of an inverted residual."""

    channels: int
    hidden: int
    features: int
    stride: int

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its convolutions, without the first one if that expands nothing."""
        return ("expand", "depthwise", "project")[self.hidden == self.channels :]


def blocks() -> list[Shape]:
    """The 17 inverted residuals, first to last."""
    shapes, channels = [], STEM
    for expansion, features, repeats, stride in STAGES:
        for i in range(repeats):
            shapes.append(Shape(channels, expansion * channels, features, 1 if i else stride))
            channels = features
    return shapes


class ConvNorm(nn.Module):
    """Convolution, batch norm and ReLU6. If folded, a convolution with bias and ReLU6."""

    features: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    activation: Callable[[jax.Array], jax.Array] | None = jax.nn.relu6
    folded: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, residual: jax.Array | None = None) -> jax.Array:
        """Images `[N, H, W, C]` to `activation(norm(conv(x)) + residual)`."""
        x = nn.Conv(
            self.features,
            (self.kernel, self.kernel),
            self.stride,
            padding=self.kernel // 2,  # on both sides, as in torch; "SAME" differs at stride 2
            feature_group_count=self.groups,
            use_bias=self.folded,
            name="conv",
        )(x)
        if not self.folded:
            norm = BatchNorm2d(self.features, axis=-1, activation=self.activation, name="norm")
            return norm(x, use_running_average=not train, residual=residual)
        x = x if residual is None else x + residual
        return x if self.activation is None else self.activation(x)


class InvertedResidual(nn.Module):
    """Expands the channels, filters each one alone, and projects them to few without activation.

    The input is added if the number of channels is the same, which is so only at stride 1.
    """

    shape: Shape
    folded: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images `[N, H, W, channels]` to `[N, H / stride, W / stride, features]`."""
        channels, hidden, features, stride = self.shape
        residual = x if channels == features else None
        if "expand" in self.shape.parts:
            x = ConvNorm(hidden, folded=self.folded, name="expand")(x, train)
        x = ConvNorm(hidden, 3, stride, hidden, folded=self.folded, name="depthwise")(x, train)
        project = ConvNorm(features, activation=None, folded=self.folded, name="project")
        return project(x, train, residual)


class MobileNetV2(nn.Module):
    """The network. `folded` replaces its batch norms by biases of the convolutions."""

    folded: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images `[N, H, W, 3]`, normalized, to features `[N, 1280]`: means over positions."""
        x = ConvNorm(STEM, 3, 2, folded=self.folded, name="stem")(x, train)
        for i, shape in enumerate(blocks(), 1):
            x = InvertedResidual(shape, self.folded, name=f"block_{i}")(x, train)
        x = ConvNorm(HEAD, folded=self.folded, name="head")(x, train)
        return x.mean((1, 2))


def layers() -> dict[str, tuple[str, int]]:
    """The path of each `ConvNorm` -> its `torch.nn.Sequential` and its first index there."""
    shapes = blocks()
    convolutions = {
        f"block_{i}/{part}": (f"features.{i}.conv", 3 * j)
        for i, shape in enumerate(shapes, 1)
        for j, part in enumerate(shape.parts)
    }
    return {"stem": ("features.0", 0), **convolutions, "head": (f"features.{len(shapes) + 1}", 0)}


def names() -> dict[str, str]:
    """The name of each convolution and batch norm in torch -> the path of its variables here."""
    return {
        f"{sequential}.{index + k}": f"{path}/{kind}"
        for path, (sequential, index) in layers().items()
        for k, kind in enumerate(("conv", "norm"))
    }


def conv_norm_pairs() -> list[tuple[str, str]]:
    """The paths of each convolution and of the batch norm that follows it."""
    return [(f"{path}/conv", f"{path}/norm") for path in layers()]
