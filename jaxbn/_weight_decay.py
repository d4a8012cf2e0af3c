"""A mask of the parameters that weight decay applies to."""

import re
from typing import Any

import jax

# Names that libraries give to parameters of normalization layers, and to no others.
AFFINE = ("scale", "offset", "gamma", "beta")


def weight_decay_mask(params: Any) -> Any:
    """Marks the parameters to decay: False for those of normalization layers, True for most others.

    Decaying the `scale` and `bias` of a normalization layer shrinks the output of the layer, and
    does not keep weights small. The rule looks at the name of a leaf, the last one on its path:

        scale, offset, gamma, beta   False
        weight          True unless it is a vector, or has the shape of the bias beside it, as in
                        normalization layers of Equinox
        bias            True if a kernel or a weight to decay stands beside it, and False if not
        any other       True

    A `bias` beside a `kernel` belongs to a dense layer or a convolution. To decay no vectors at
    all, use `jax.tree.map(lambda p: p.ndim > 1, params)` instead.

    Args:
      params: a pytree of parameters: of Linen, NNX (`nnx.state(model, nnx.Param)`), Equinox, Haiku
        or Keras, or any nesting of dicts, lists, tuples and dataclasses with these names. Keys may
        be whole paths: tuples, or strings with "/" or "." between the names.

    Returns:
      A tree of bools with the structure of `params`. The function itself can be the `mask` in
        optax.

    Raises:
      ValueError: a node of the tree does not name its children.

    Examples:
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
    shapes = {p: getattr(leaf, "shape", ()) for p, (_, leaf) in zip(paths, leaves, strict=True)}
    vectors = {
        path
        for path, shape in shapes.items()
        if len(shape) < 2 or shape == shapes.get((*path[:-1], "bias"))
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
        return name not in AFFINE and (name != "bias" or path[:-1] in kernels)

    return jax.tree_util.tree_unflatten(treedef, map(decays, paths))


def names_on(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The keys of a path as names, without the key that NNX puts between variable and array."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    names: list[str] = []
    for entry in path:
        if isinstance(entry, jax.tree_util.FlattenedIndexKey):
            raise ValueError(
                "`params` must tell the names of its leaves; got a node that numbers its children, "
                "as nnx.to_flat_state does. Pass the nested tree: nnx.state(model, nnx.Param)."
            )
        key = getattr(entry, "key", None)
        parts = key if isinstance(key, tuple) else (jax.tree_util.keystr((entry,), simple=True),)
        names += [name for part in parts for name in re.split(r"[/.]", str(part))]
    return tuple(names)
