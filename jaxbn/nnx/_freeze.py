"""Freezing of the batch norms of a model, whatever mode the model is in."""

from typing import Any

from flax import nnx

from jaxbn.nnx._variables import chosen_layers


def freeze(model: nnx.Module, where: Any = ..., *, affine: bool = True) -> None:
    """Freezes batch norms of a model: they stay in inference mode, even after `model.train()`.

        y = (x − mean) · scale / √(var + epsilon) + bias

    A frozen layer does not update its running statistics, and has the gradient of inference mode.

    Args:
      model: a module, which is changed, or a batch norm itself.
      where: which batch norms to freeze, a filter of NNX: `nnx.PathContains("backbone")`, a class,
        a function `(path, layer) -> bool`, or `...` for all.
      affine: whether to stop the gradients of `scale` and `bias`, too.

    Raises:
      ValueError: `where` chooses no batch norm of `jaxbn.nnx`.

    Examples:
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
    """Undoes `freeze`: the layers follow the mode of the model again, and `scale` and `bias` train.

    Args:
      model: a module, which is changed, or a batch norm itself.
      where: which batch norms to unfreeze, as for `freeze`.

    Raises:
      ValueError: `where` chooses no batch norm of `jaxbn.nnx`.

    Examples:
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
