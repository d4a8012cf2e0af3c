"""Which parameters are those of batch norms."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxbn._checks import check_collections
from jaxbn._weight_decay import names_on


def batch_norm_mask(
    variables: Mapping[str, Any], where: Callable[[str], bool] = lambda path: True
) -> Any:
    """True for `scale` and `bias` of batch norms, False for all other parameters.

    A batch norm is what has `mean` and `var` in `batch_stats`. Optimizers take the mask to freeze
    these parameters: `optax.masked(optax.set_to_zero(), mask)` at the end of a chain.

    Args:
      variables: the collections `params` and `batch_stats`, as `model.init` returns them; of an NNX
        model `{"params": nnx.state(model, nnx.Param), "batch_stats": nnx.state(model,
        nnx.BatchStat)}`.
      where: which batch norms, by their paths: `lambda path: path.startswith("backbone/")`.

    Returns:
      A tree of bools in the structure of `variables["params"]`.

    Raises:
      ValueError: a collection is not there, or no batch norm is chosen.

    Example:
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
