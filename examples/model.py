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
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        """Images `[N, H, W, C]` to `[N, H, W, features]`."""
        x = nn.Conv(
            self.features,
            (3, 3),
            use_bias=not self.batch_norm,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )(x)
        if self.batch_norm:
            norm = BatchNorm2d(
                self.features,
                momentum=self.momentum,
                axis=-1,
                activation="relu",
                param_dtype=self.param_dtype,
            )
            return norm(x, use_running_average=not train, mask=mask)
        return nn.relu(x)


class CNN(nn.Module):
    """Blocks with pooling between them, the mean over positions, and a linear classifier.

    Attributes:
      classes: the number of classes.
      batch_norm: False leaves batch norm out, for the contrast.
      momentum: weight of the new batch in the running statistics.
      dtype: dtype of the computation; parameters, statistics and logits are at least float32.
      features: the channels of each block.
    """

    classes: int
    batch_norm: bool = True
    momentum: float = 0.1
    dtype: Dtype = jnp.float32
    features: tuple[int, ...] = (32, 64, 64)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, mask: jax.Array | None = None) -> jax.Array:
        """Images `[N, H, W, C]` to logits `[N, classes]`; `mask` says which count: batch norm's."""
        wide = jnp.promote_types(self.dtype, jnp.float32)
        for i, features in enumerate(self.features):
            if i and min(x.shape[1:3]) > 1:
                x = nn.max_pool(x, (2, 2), (2, 2))
            x = Block(features, self.batch_norm, self.momentum, self.dtype, wide)(x, mask, train)
        return nn.Dense(self.classes, param_dtype=wide)(x.mean((1, 2)).astype(wide))
