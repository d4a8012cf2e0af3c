"""A small CNN of conv-BN-ReLU blocks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from jaxbn.linen import BatchNorm2d


class Block(nn.Module):
    """3×3 convolution, batch norm, ReLU. Batch norm's bias stands for the convolution's."""

    features: int
    batch_norm: bool
    momentum: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Images `[N, H, W, C]` to `[N, H, W, features]`."""
        x = nn.Conv(self.features, (3, 3), use_bias=not self.batch_norm, dtype=self.dtype)(x)
        if self.batch_norm:
            norm = BatchNorm2d(self.features, momentum=self.momentum, axis=-1, activation="relu")
            return norm(x, use_running_average=not train)
        return nn.relu(x)


class CNN(nn.Module):
    """Blocks with pooling between them, the mean over positions, and a linear classifier.

    Attributes:
      classes: the number of classes.
      batch_norm: False leaves batch norm out, for the contrast.
      momentum: weight of the new batch in the running statistics.
      dtype: dtype of the computation; parameters and statistics are float32.
      features: the channels of each block.
    """

    classes: int
    batch_norm: bool = True
    momentum: float = 0.1
    dtype: Dtype = jnp.float32
    features: tuple[int, ...] = (32, 64, 64)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Images `[N, H, W, C]` to logits `[N, classes]` in float32."""
        for i, features in enumerate(self.features):
            if i and min(x.shape[1:3]) > 1:
                x = nn.max_pool(x, (2, 2), (2, 2))
            x = Block(features, self.batch_norm, self.momentum, self.dtype)(x, train)
        return nn.Dense(self.classes)(x.mean((1, 2)).astype(jnp.float32))
