"""Batch norms of a model that stay as they are, whatever mode the model is in."""

from typing import Any

from flax import nnx

from jaxbn.nnx._variables import chosen_layers


def freeze(model: nnx.Module, where: Any = ..., *, affine: bool = True) -> None:
    """Freezes batch norms of a model: they stay in inference, also after `model.train()`.

        y = (x − mean) · scale / √(var + epsilon) + bias

    A frozen layer leaves its running statistics, and its gradient is that of inference.

    Args:
      model: a module, or a batch norm itself. It is changed.
      where: which of its batch norms, a filter of NNX: `nnx.PathContains("backbone")`, a class, a
        function `(path, layer) -> bool`, or `...` for all.
      affine: whether to stop the gradients of `scale` and `bias` too.

    Raises:
      ValueError: no batch norm of `jaxbn.nnx` is chosen.

    Example:
      >>> import jax.numpy as jnp, jaxbn.nnx
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> norm = jaxbn.nnx.BatchNorm(3, rngs=rngs)
      >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), norm)
      >>> jaxbn.nnx.freeze(model)
      >>> model.train()
      >>> y = model(jnp.ones((2, 4)))
      >>> norm.mean[...]
      Array([0., 0., 0.], dtype=float32)

    References:
      `torchvision.ops.FrozenBatchNorm2d`.
    """
    for layer in chosen_layers(model, where).values():
        layer.frozen = True
        layer.train_affine = not affine


def unfreeze(model: nnx.Module, where: Any = ...) -> None:
    """Undoes `freeze`: the layers follow the mode of the model again, `scale` and `bias` train.

    Args:
      model: as for `freeze`.
      where: as for `freeze`.

    Raises:
      ValueError: no batch norm of `jaxbn.nnx` is chosen.

    Example:
      >>> import jaxbn.nnx
      >>> from flax import nnx
      >>> layer = jaxbn.nnx.BatchNorm(3, frozen=True, rngs=nnx.Rngs(0))
      >>> jaxbn.nnx.unfreeze(layer)
      >>> layer.frozen, layer.train_affine
      (False, True)
    """
    for layer in chosen_layers(model, where).values():
        layer.frozen = False
        layer.train_affine = True
