"""Which parameters weight decay leaves alone."""

from typing import Any

import jax


def weight_decay_mask(params: Any) -> Any:
    """True for the parameters to decay, False for those of normalization layers.

    Behind a normalization, decaying `scale` and `bias` pulls a layer towards zero instead of
    making its weights small. A leaf is told by its name, the last one on its path:

        scale, offset   False
        weight          True unless it is a vector, as in normalization layers of Equinox
        bias            True if a `kernel` or a `weight` to decay stands beside it, and False if not
        any other       True

    A `bias` beside a `kernel` is one of a dense layer or a convolution. To decay no vector at all,
    use `jax.tree.map(lambda p: p.ndim > 1, params)` instead.

    Args:
      params: any pytree of parameters: of Linen, NNX (`nnx.state(model, nnx.Param)`), Equinox,
        Haiku, or any nesting of dicts, lists, tuples and dataclasses with these names.

    Returns:
      A tree of bools in the structure of `params`; the function itself may be `mask` in optax.

    Example:
      >>> import jax.numpy as jnp, jaxbn
      >>> dense = {"kernel": jnp.ones((4, 2)), "bias": jnp.zeros(2)}
      >>> norm = {"scale": jnp.ones(2), "bias": jnp.zeros(2)}
      >>> jaxbn.weight_decay_mask({"dense": dense, "norm": norm})
      {'dense': {'bias': True, 'kernel': True}, 'norm': {'bias': False, 'scale': False}}

    References:
      `mask` of `optax.adamw` and `optax.add_decayed_weights`.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = [names_on(path) for path, _ in leaves]
    vectors = {
        path for path, (_, leaf) in zip(paths, leaves, strict=True) if getattr(leaf, "ndim", 0) < 2
    }
    kernels = {
        path[:i]
        for path in paths
        for i, name in enumerate(path)
        if name == "kernel" or (name == "weight" and path not in vectors)
    }

    def decays(path: tuple[str, ...]) -> bool:
        name = path[-1] if path else ""
        if name == "weight":
            return path not in vectors
        return name not in ("scale", "offset") and (name != "bias" or path[:-1] in kernels)

    return jax.tree_util.tree_unflatten(treedef, map(decays, paths))


def names_on(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The keys of a path as names, without the one that NNX puts between variable and array."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
