"""Moments and running statistics of whole Linen models."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.typing import ArrayLike

from jaxbn._checks import check_momentum
from jaxbn._flax.layer import Vectors
from jaxbn._flax.moments import Layers, empty_moments, updated
from jaxbn._flax.recalibrate import Callback, check_mode, listed, recalibrated
from jaxbn._moments import Moments
from jaxbn._stats import BatchStats
from jaxbn._types import Number
from jaxbn.linen._modes import is_call, normalizes_by_batch

# `apply(variables, batch, train, mutable)` returns the output and the updates, as `model.apply`.
Apply = Callable[[dict[str, Any], Any, bool, list[str]], tuple[Any, Mapping[str, Any]]]


def init_batch_moments(batch_stats: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the collection `batch_moments` before the first batch: moments of no samples.

        mean = 0        var = 0        count = 0

    A batch norm of `jaxbn.linen` with moments in the variables merges each batch into them, in
    training mode and in inference mode. Its `batch_stats` do not change until `update_batch_stats`.

    Args:
      batch_stats: the collection of this name. A node with `mean` and `var` is a batch norm.

    Returns:
      A nested dict with `mean`, `var` and `count` for each batch norm, in the shape of its `mean`;
        float32, or float64 if `mean` is.

    Raises:
      ValueError: `batch_stats` has no batch norm.

    Examples:
      >>> import jax.numpy as jnp, jaxbn.linen
      >>> jaxbn.linen.init_batch_moments({"norm": {"mean": jnp.ones(1), "var": jnp.ones(1)}})
      {'norm': {'mean': Array([0.], dtype=float32), 'var': Array([0.], dtype=float32), \
'count': Array([0.], dtype=float32)}}

    References:
      `jaxbn.Moments`, `jaxbn.merge_moments`.
    """
    layers = layers_in(batch_stats)
    if not layers:
        raise ValueError(
            "`batch_stats` must have a batch norm, a dict with `mean` and `var`; got none in "
            f"{listed(batch_stats)}."
        )
    return _nested({name: empty_moments(v) for name, v in layers.items()})


def update_batch_stats(
    batch_stats: Mapping[str, Any],
    batch_moments: Mapping[str, Any],
    *,
    momentum: ArrayLike | None = 0.1,
    std_epsilon: Number | None = None,
) -> dict[str, Any]:
    """Updates the running statistics of a model with its moments, as for one batch.

        count' = count + 1
        mean'  = (1 − momentum)·mean + momentum·moments.mean
        var'   = (1 − momentum)·var  + momentum·moments.var·n/(n − 1)       n = moments.count

    `momentum` is the weight of the **new** batch. It is one minus the momentum of Flax and of
    `jaxbn.linen.BatchNorm`: 0.01 if theirs is 0.99. A layer with a `count`, as in torch, keeps the
    unbiased variance above. A layer without one, as in Flax, keeps the biased variance, without
    `n/(n − 1)`. A layer with empty moments does not change.

    Args:
      batch_stats: the collection of this name.
      batch_moments: the collection of this name that `model.apply` returned.
      momentum: weight of the new batch, in [0, 1]: a number, or a scalar array, traced or not. None
        for the cumulative average, which needs a `count` in each layer.
      std_epsilon: epsilon of layers with `Renorm(average_std=True)`; see
        `jaxbn.update_batch_stats`.

    Returns:
      The new `batch_stats`, without gradient.

    Raises:
      TypeError: `momentum` is not a number.
      ValueError: `momentum` is outside [0, 1], or is None without a `count`; there are no moments,
        or they belong to other layers.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxbn.linen
      >>> layer = jaxbn.linen.BatchNorm(use_running_average=False)
      >>> x = jnp.array([[1.0], [2.0], [4.0], [5.0]])
      >>> variables = layer.init(jax.random.key(0), x)
      >>> moments = jaxbn.linen.init_batch_moments(variables["batch_stats"])
      >>> for micro_batch in (x[:2], x[2:]):
      ...     given = {**variables, "batch_moments": moments}
      ...     y, updates = layer.apply(given, micro_batch, mutable=["batch_moments"])
      ...     moments = updates["batch_moments"]
      >>> jaxbn.linen.update_batch_stats(variables["batch_stats"], moments, momentum=0.5)
      {'mean': Array([1.5], dtype=float32), 'var': Array([1.75], dtype=float32)}

    References:
      `jaxbn.update_batch_stats`.
    """
    check_momentum(momentum)
    running, moments = layers_in(batch_stats), layers_in(batch_moments)
    unfit = [name for name, v in moments.items() if not _fits(v, running.get(name))]
    if unfit or not moments:
        raise ValueError(
            "`batch_moments` must hold mean, var and count of layers in `batch_stats`, each of the "
            f"shape of the mean there; got others for {listed(unfit or batch_moments)}. Start with "
            "init_batch_moments(batch_stats)."
        )
    if momentum is None and not all("count" in running[name] for name in moments):
        raise ValueError(
            "`momentum` must be a number for layers that keep no `count`, as BatchNorm; got None."
        )
    new = {name: updated(running[name], v, momentum, std_epsilon) for name, v in moments.items()}
    collection: dict[str, Any] = _with(batch_stats, new)
    return collection


def recalibrate(
    apply: Apply,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    where: Callable[[str], bool] = lambda path: True,
    sequential: bool = False,
    average: bool = False,
    prior: Number = 0,
    callback: Callback | None = None,
) -> dict[str, Any]:
    """Replaces the running statistics with those of a data set: precise batch norm.

        mean' = E[x]        var' = Var[x]·n/(n − 1)        count' = number of batches

    Mean and variance are those of all n values that a layer gets from all batches, merged by
    `merge_moments`. Batches count by their number of values, masked entries do not count, and the
    variance includes the variance between batches. A layer without a `count`, as in Flax, keeps
    `Var[x]`.

    The input of a layer depends on how the layers below it normalize:

    - By default, each batch normalizes itself there, as in training mode, and needs two values per
      channel. One pass over the data serves all layers.
    - With `sequential`, the new statistics normalize, as later in inference mode. Each pass makes
      one more layer of the longest chain exact, and a last pass finds that nothing changes. For a
      layer that is called at several depths, each pass is one step toward a fixed point.

    Args:
      apply: function `(variables, batch, train, mutable)` that returns the result of `model.apply`:
        `lambda variables, batch, train, mutable: model.apply(variables, batch["image"],
        use_running_average=not train, mutable=mutable)`. It is traced and compiled once for each
        shape of a batch. The same function is not compiled again. `train` is a Python bool.
      variables: the collections of the model.
      batches: an iterable of batches, which are trees of arrays. `sequential` takes several passes,
        and needs a list, or an object that can be iterated again.
      where: which batch norms to recalibrate, by their paths:
        `lambda path: path.startswith("backbone/")`. The others keep their statistics. By default,
        all.
      sequential: whether the layers below normalize by the new statistics.
      average: whether to average the statistics of the single batches, as torch's `update_bn` does
        for layers with torch's conventions, instead of computing those of all samples.
      prior: number of batches that the old statistics count as, a Python number: a mixture, for
        test-time adaptation. With one batch, 1 takes half of each in all layers, however many
        values they get.
      callback: called after each batch with the number of batches done in this pass and the number
        of passes done: `(1, 0)` after the first batch.

    Returns:
      `variables` with new `batch_stats`. All else is unchanged. Under `jax.jit`, where `batches` is
        a list of traced arrays, statistics that would raise an error are NaN.

    Raises:
      TypeError: `batches` is not iterable, or can be iterated only once but `sequential` is given.
      ValueError: there are no batches or no batch norms, a batch norm gets fewer than two values
        per channel or values that are not finite, `prior` is negative or given with `average`, or
        `apply` runs a batch norm in another mode than `train`.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxbn.linen
      >>> layer = jaxbn.linen.BatchNorm()
      >>> batches = [jnp.array([[0.0], [2.0]]), jnp.array([[10.0], [12.0]])]
      >>> variables = layer.init(jax.random.key(0), batches[0], True)
      >>> def apply(variables, batch, train, mutable):
      ...     return layer.apply(variables, batch, not train, mutable=mutable)
      >>> jaxbn.linen.recalibrate(apply, variables, batches)["batch_stats"]
      {'mean': Array([6.], dtype=float32), 'var': Array([26.], dtype=float32)}

    References:
      - Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, https://arxiv.org/abs/2105.07576
      - `torch.optim.swa_utils.update_bn`
      - `prior`: Schneider et al., "Improving robustness against common corruptions by covariate
        shift adaptation", 2020, https://arxiv.org/abs/2006.16971
    """
    running = layers_in(variables.get("batch_stats", {}))
    chosen = {name: v for name, v in running.items() if where(name)}
    if not chosen:
        raise ValueError(
            f"`where` must choose at least one batch norm; got none of {listed(running)}."
        )

    new = recalibrated(
        partial(_of_batch, apply, not sequential, variables),
        None,
        chosen,
        batches,
        sequential=sequential,
        average=average,
        prior=prior,
        callback=callback,
    )
    return {**variables, "batch_stats": _with(variables["batch_stats"], new)}


@partial(jax.jit, static_argnames=("apply", "train"))
def _of_batch(
    apply: Apply,
    train: bool,
    variables: Mapping[str, Any],
    running: Layers,
    carry: None,
    batch: Any,
) -> tuple[Layers, None]:
    """The moments of one batch in the layers with these running statistics."""
    given = {
        **variables,
        "batch_stats": _with(variables["batch_stats"], running),
        "batch_moments": _nested({name: empty_moments(v) for name, v in running.items()}),
    }

    def check(module: nn.Module, by_batch: bool | None) -> None:
        name = "/".join(module.path)
        if name in running and not getattr(module, "frozen", False):
            check_mode(name, by_batch, train)

    return layers_in(moments_of(apply, given, batch, train, check)), carry


def moments_of(
    apply: Apply,
    variables: dict[str, Any],
    batch: Any,
    train: bool,
    seen: Callable[[nn.Module, bool | None], None],
) -> Mapping[str, Any]:
    """The collection `batch_moments` after a batch.

    `seen` is called for each call of a batch norm, with whether it normalizes by the batch.
    """

    def watch(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if is_call(context):
            seen(context.module, normalizes_by_batch(context.module, args, kwargs))
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        result = apply(variables, batch, train, [v for v in variables if v != "params"])
    updates = result[1] if isinstance(result, tuple) and len(result) == 2 else None
    if not isinstance(updates, Mapping) or "batch_moments" not in updates:
        raise ValueError(
            "`apply` must return the output and the updates, as model.apply(variables, …, "
            f"mutable=mutable) does; got {type(result).__name__}. Pass `mutable` on."
        )
    moments: Mapping[str, Any] = updates["batch_moments"]
    return moments


def layers_in(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Layers:
    """The variables of each batch norm in a collection, by path."""
    if {"mean", "var"} <= set(tree):
        return {"/".join(path): {name: tree[name] for name in BatchStats._fields if name in tree}}
    found: Layers = {}
    for name, node in tree.items():
        if isinstance(node, Mapping):
            found |= layers_in(node, (*path, name))
    return found


def _fits(moments: Vectors, running: Vectors | None) -> bool:
    if running is None or set(moments) != set(Moments._fields):
        return False
    return {jnp.shape(v) for v in moments.values()} == {jnp.shape(running["mean"])}


def _nested(layers: Layers) -> dict[str, Any]:
    """A collection of only these layers."""
    return dict(layers[""]) if "" in layers else unflatten_dict(layers, sep="/")


def _with(tree: Mapping[str, Any], new: Layers, path: tuple[str, ...] = ()) -> Any:
    """A collection in which some layers are replaced."""
    variables = new.get("/".join(path), {})
    nodes = {
        name: _with(node, new, (*path, name)) if isinstance(node, Mapping) else node
        for name, node in tree.items()
    }
    return type(tree)({**nodes, **variables})  # type: ignore[call-arg]  # a dict or a FrozenDict
