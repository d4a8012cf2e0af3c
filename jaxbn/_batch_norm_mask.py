"""A mask of the parameters of batch norms."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxbn._checks import check_collections
from jaxbn._weight_decay import names_on


def batch_norm_mask(
    variables: Mapping[str, Any], where: Callable[[str], bool] = lambda path: True
) -> Any:
    """Marks the parameters of batch norms: True for their `scale` and `bias`, False for all others.

    A layer with `mean` and `var` in `batch_stats` is a batch norm. To freeze these parameters, end
    a chain of optax with `optax.masked(optax.set_to_zero(), mask)`.

    Args:
      variables: the collections `params` and `batch_stats`, as `model.init` returns them. For an
        NNX model, pass `{"params": nnx.state(model, nnx.Param), "batch_stats": nnx.state(model,
        nnx.BatchStat)}`.
      where: which batch norms to mark, by their paths: `lambda path: path.startswith("backbone/")`.
        By default, all.

    Returns:
      A tree of bools with the structure of `variables["params"]`.

    Raises:
      ValueError: a collection is missing, or `where` chooses no batch norm.

    Examples:
      >>> import jax.numpy as jnp, jaxbn
      >>> ones = jnp.ones(2)
      >>> params = {"dense": {"kernel": jnp.ones((4, 2))}, "norm": {"scale": ones, "bias": ones}}
      >>> variables = {"params": params, "batch_stats": {"norm": {"mean": ones, "var": ones}}}
      >>> jaxbn.batch_norm_mask(variables)
      {'dense': {'kernel': False}, 'norm': {'bias': True, 'scale': True}}

    References:
      `optax.masked`, `optax.multi_transform`.
    """
    check_collections(variables)
    stats = _paths(variables["batch_stats"])
    norms = {layer for layer, name in stats if name == "mean" and (layer, "var") in stats}
    chosen = {path for path in norms if where(path)}
    if not chosen:
        raise ValueError(
            "`where` must choose at least one batch norm; got none of "
            f"{', '.join(map(repr, sorted(norms))) or 'none'}."
        )
    treedef = jax.tree.structure(variables["params"])
    return jax.tree.unflatten(treedef, [v in chosen for v, _ in _paths(variables["params"])])


def _paths(tree: Any) -> list[tuple[str, str]]:
    """The path of the layer of each leaf, and the name of the leaf."""
    paths = []
    for path, _ in jax.tree_util.tree_leaves_with_path(tree):
        names = names_on(path)
        paths.append(("/".join(names[:-1]), "".join(names[-1:])))
    return paths
