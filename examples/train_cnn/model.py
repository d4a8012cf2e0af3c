"""A small CNN and ResNet-20, with a choice of batch norms or without."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from jaxbn import fold_variables
from jaxbn.linen import BatchNorm2d

NORMS = ("jaxbn", "flax", "ghost", "none")
EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Norm:
    """The batch norm behind each convolution.

    Attributes:
      kind: one of `NORMS`: jaxbn's, `flax.linen.BatchNorm`, jaxbn's ghost batch norm, or none, so
        that the convolution has a bias.
      momentum: weight of a new batch in the running statistics, as in torch.
      ghost_size: the samples of a ghost batch.
    """

    kind: str = "jaxbn"
    momentum: float = 0.1
    ghost_size: int = 16

    @property
    def samples(self) -> int:
        """The number of samples in a training batch must be a multiple of this."""
        return self.ghost_size if self.kind == "ghost" else 1


class Layers(nn.Module):
    """The fields that the networks share."""

    classes: int
    norm: Norm = Norm()
    dtype: Dtype = jnp.float32  # of the computation; all else is at least float32

    @property
    def wide(self) -> Any:
        """The dtype of parameters, statistics and logits."""
        return jnp.promote_types(self.dtype, jnp.float32)


class Block(nn.Module):
    """3×3 convolution, batch norm, ReLU. The convolution has no bias, since batch norm has one."""

    features: int
    norm: Norm
    dtype: Dtype
    param_dtype: Dtype
    stride: int = 1

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None, train: bool, residual: jax.Array | None = None
    ) -> jax.Array:
        """`relu(batch_norm(conv(x)) + residual)`: `[N, H, W, C]` to `[N, H', W', features]`."""
        x = nn.Conv(
            self.features,
            (3, 3),
            self.stride,
            use_bias=self.norm.kind == "none",
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )(x)
        x = self.normalized(x, mask, train, residual)
        # Whether a channel is above zero for some sample; kept only if the caller asks for it.
        self.sow("intermediates", "alive", (x > 0).any((0, 1, 2)))
        return x

    def normalized(
        self, x: jax.Array, mask: jax.Array | None, train: bool, residual: jax.Array | None
    ) -> jax.Array:
        """`relu(batch_norm(x) + residual)`; jaxbn fuses all of it."""
        if self.norm.kind in ("jaxbn", "ghost"):
            return BatchNorm2d(
                self.features,
                eps=EPSILON,
                momentum=self.norm.momentum,
                axis=-1,
                activation="relu",
                param_dtype=self.param_dtype,
                virtual_batch_size=self.norm.ghost_size if self.norm.kind == "ghost" else None,
            )(x, use_running_average=not train, mask=mask, residual=residual)
        if self.norm.kind == "flax":
            x = nn.BatchNorm(
                use_running_average=not train,
                momentum=1 - self.norm.momentum,
                epsilon=EPSILON,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
            )(x, mask=mask)
        return nn.relu(x if residual is None else x + residual)


def pooled(x: jax.Array) -> jax.Array:
    """Maximum over 2×2 positions; an odd last one is left out.

    It uses `reshape`, since XLA:CPU is twenty times slower for the gradient of `nn.max_pool`.
    """
    samples, height, width, channels = x.shape
    height, width = height // 2, width // 2
    x = x[:, : 2 * height, : 2 * width]
    return x.reshape(samples, height, 2, width, 2, channels).max((2, 4))


class CNN(Layers):
    """Blocks, the mean over positions and a linear classifier. It pools before channels grow."""

    features: tuple[int, ...] = (32, 64, 64, 128, 128)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Images `[N, H, W, C]` to logits `[N, classes]`; `mask` is batch norm's."""
        for i, features in enumerate(self.features):
            if i and features > self.features[i - 1] and min(x.shape[1:3]) > 1:
                x = pooled(x)
            x = Block(features, self.norm, self.dtype, self.wide)(x, mask, train)
        return nn.Dense(self.classes, param_dtype=self.wide)(x.mean((1, 2)).astype(self.wide))


class ResNet20(Layers):
    """The residual network of 20 layers for small images: three stages of three pairs of blocks.

    A shortcut between different shapes takes every second position and pads with zero channels.

    References:
      He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
    """

    features: tuple[int, ...] = (16, 32, 64)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Images `[N, H, W, C]` to logits `[N, classes]`; `mask` is batch norm's."""
        fields = self.norm, self.dtype, self.wide
        x = Block(self.features[0], *fields)(x, mask, train)
        for i, features in enumerate(self.features):
            for j in range(3):
                stride = 2 if i and not j else 1
                added = features - x.shape[-1]
                shortcut = jnp.pad(x[:, ::stride, ::stride], ((0, 0),) * 3 + ((0, added),))
                x = Block(features, *fields, stride)(x, mask, train)
                x = Block(features, *fields)(x, mask, train, shortcut)
        return nn.Dense(self.classes, param_dtype=self.wide)(x.mean((1, 2)).astype(self.wide))


MODELS = {"cnn": CNN, "resnet20": ResNet20}


def norm_layers(batch_stats: Any) -> Iterator[tuple[str, Any]]:
    """Path and statistics of each batch norm, in the order of the network."""
    paths = jax.tree_util.tree_leaves_with_path(batch_stats, is_leaf=lambda node: "mean" in node)
    found = {"/".join(key.key for key in path): stats for path, stats in paths}

    def place(name: str) -> int:
        return int(name.partition("/")[0].rpartition("_")[2])

    return iter(sorted(found.items(), key=lambda item: place(item[0])))


def folded(model: Layers, variables: Any) -> tuple[Layers, Any]:
    """The network with its batch norms folded into the convolutions.

    It computes the inference mode of the original network.
    """
    if "batch_stats" not in variables:
        return model, variables
    names = [name for name, _ in norm_layers(variables["batch_stats"])]
    pairs = [(f"{name.partition('/')[0]}/Conv_0", name) for name in names]
    return (model.clone(norm=Norm("none")), fold_variables(variables, pairs, epsilon=EPSILON))
