"""Moments and running statistics of whole NNX models."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
from flax import nnx

from jaxbn._flax.layer import std_epsilon, weight_of_batch
from jaxbn._flax.moments import Layers, empty_moments, updated
from jaxbn._flax.recalibrate import Callback, check_mode, recalibrated
from jaxbn._moments import Moments
from jaxbn._types import Number
from jaxbn.nnx._variables import (
    BatchMoments,
    BatchNormLayer,
    chosen_layers,
    keeps_statistics,
    layers_in,
    moments_in,
    running_in,
    watch_modes,
)


def init_batch_moments(model: nnx.Module, where: Any = ...) -> None:
    """Lets batch norms of a model merge batches into moments, from those of no samples on.

        mean = 0        var = 0        count = 0

    From here to `update_batch_stats` they merge each batch into their attribute `moments`, in
    training and in inference, and leave their running statistics. Frozen layers leave both.

    Args:
      model: a module, or a batch norm itself. It is changed.
      where: which of its batch norms, a filter of NNX: `nnx.PathContains("backbone")`, a class, a
        function `(path, layer) -> bool`, or `...` for all.

    Raises:
      ValueError: no batch norm is chosen; a chosen one keeps no running statistics of jaxbn.

    Example:
      >>> import jaxbn.nnx
      >>> from flax import nnx
      >>> layer = jaxbn.nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> jaxbn.nnx.init_batch_moments(layer)
      >>> layer.moments.get_value()
      Moments(mean=Array([0.], dtype=float32), var=Array([0.], dtype=float32), \
count=Array([0.], dtype=float32))

    References:
      `jaxbn.Moments`, `jaxbn.merge_moments`.
    """
    for layer in _chosen(model, where).values():
        attach_moments(layer)


def update_batch_stats(model: nnx.Module) -> None:
    """Folds the moments of each batch norm into its running statistics, as those of one batch.

        count' = count + 1
        mean'  = (1 − momentum)·mean + momentum·moments.mean
        var'   = (1 − momentum)·var  + momentum·moments.var·n/(n − 1)       n = moments.count

    This is the formula of torch's classes. `BatchNorm` has Flax's `momentum`, the weight of the
    **old** statistics, and keeps the variance without `n/(n − 1)`. Each layer has its own momentum.
    A layer whose moments are empty stays as it was. All are without moments afterwards, and update
    with each batch again.

    Args:
      model: a module, or a batch norm itself. It is changed.

    Raises:
      ValueError: no batch norm has moments.

    Example:
      >>> import jax.numpy as jnp, jaxbn.nnx
      >>> from flax import nnx
      >>> layer = jaxbn.nnx.BatchNorm(1, momentum=0.5, rngs=nnx.Rngs(0))
      >>> x = jnp.array([[1.0], [2.0], [4.0], [5.0]])
      >>> jaxbn.nnx.init_batch_moments(layer)
      >>> for micro_batch in (x[:2], x[2:]):
      ...     y = layer(micro_batch)
      >>> jaxbn.nnx.update_batch_stats(layer)
      >>> layer.mean[...], layer.var[...]
      (Array([1.5], dtype=float32), Array([1.75], dtype=float32))

    References:
      `jaxbn.update_batch_stats`.
    """
    layers = [v for v in layers_in(model).values() if v.moments is not None]
    if not layers:
        raise ValueError(
            "A batch norm of the model must have moments; got none. Call "
            "jaxbn.nnx.init_batch_moments before the first batch."
        )
    for layer in layers:
        weight, epsilon = weight_of_batch(layer), std_epsilon(layer)
        layer._set_running(updated(running_in(layer), moments_in(layer), weight, epsilon))
        layer.moments = nnx.data(None)


def recalibrate(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    call: Callable[[Any, Any], object] = lambda model, batch: model(batch),
    where: Any = ...,
    sequential: bool = False,
    average: bool = False,
    prior: Number = 0,
    callback: Callback | None = None,
) -> None:
    """Replaces running statistics by those of a data set: precise batch norm.

        mean' = E[x]        var' = Var[x]·n/(n − 1)        count' = number of batches

    All is as in `jaxbn.linen.recalibrate`; `BatchNorm` keeps `Var[x]`. The model is changed at the
    end, and only its running statistics: an error on the way leaves it as it was.

    Batch norms are set to the mode that they need. All other layers stay in theirs: after
    `model.eval()` dropout drops nothing, and the statistics are those of inference. A model that
    passes `use_running_average` to its layers chooses for them: let `call` ask for training mode,
    and for inference mode where `sequential` is given. Another mode is an error.

    Args:
      model: a module, or a batch norm itself. It is changed.
      batches: any iterable of batches, trees of arrays; a list, or an object that starts anew,
        where `sequential` takes several passes.
      call: how to run the model: `lambda model, batch: model(batch["image"])`. It is traced, and
        compiled once for each shape of a batch.
      where: which batch norms, a filter of NNX as for `freeze`. The others keep their statistics.
      sequential: whether the layers below normalize by the new statistics. By default each batch
        normalizes itself there, as in training.
      average: the average of what each batch alone gives, as torch's `update_bn` has it.
      prior: how many batches the old statistics count as.
      callback: called with the number of batches done in this pass and of passes done, `(1, 0)`
        after the first batch.

    Raises:
      TypeError: `batches` is not iterable, or runs once and `sequential` needs it again.
      ValueError: as `jaxbn.linen.recalibrate`; a chosen batch norm keeps no running statistics of
        jaxbn.

    Example:
      >>> import jax.numpy as jnp, jaxbn.nnx
      >>> from flax import nnx
      >>> layer = jaxbn.nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> batches = [jnp.array([[0.0], [2.0]]), jnp.array([[10.0], [12.0]])]
      >>> jaxbn.nnx.recalibrate(layer, batches)
      >>> layer.mean[...], layer.var[...]
      (Array([6.], dtype=float32), Array([26.], dtype=float32))

    References:
      As `jaxbn.linen.recalibrate`.
    """
    layers = _chosen(model, where)
    parts: Any = nnx.split(model, nnx.RngState, ...)
    graphdef, random, rest = parts
    collect = partial(_of_batch, graphdef, call, not sequential, rest)

    new = recalibrated(
        collect,
        random,
        {name: running_in(layer) for name, layer in layers.items()},
        batches,
        sequential=sequential,
        average=average,
        prior=prior,
        callback=callback,
    )
    for name, layer in layers.items():
        layer._set_running(new[name])


@partial(jax.jit, static_argnames=("graphdef", "call", "train"))
def _of_batch(
    graphdef: Any,
    call: Callable[[Any, Any], object],
    train: bool,
    rest: Any,
    running: Layers,
    random: Any,
    batch: Any,
) -> tuple[Layers, Any]:
    """The moments of one batch in the layers that have these running statistics.

    The model is a copy, and what else changes in it is lost, but for the state of random numbers.
    """
    model = nnx.merge(graphdef, random, rest)
    layers = {name: v for name, v in layers_in(model).items() if name in running}
    for name, layer in layers.items():
        layer._set_running(running[name])
        attach_moments(layer)
        layer.use_running_average = not train
        if not layer.frozen:
            watch_modes(layer, partial(check_mode, name, train=train))
    call(model, batch)
    moments = {name: moments_in(layer) for name, layer in layers.items()}
    return moments, nnx.state(model, nnx.RngState)


def _chosen(model: nnx.Module, where: Any) -> dict[str, BatchNormLayer]:
    """The chosen batch norms that keep running statistics, by path."""
    chosen = {name: v for name, v in chosen_layers(model, where).items() if keeps_statistics(v)}
    if not chosen:
        raise ValueError(
            "`where` must choose at least one batch norm that keeps running statistics; got layers "
            "with track_running_stats=False."
        )
    return chosen


def attach_moments(layer: BatchNormLayer) -> None:
    layer.moments = BatchMoments(Moments(**empty_moments(running_in(layer))))
