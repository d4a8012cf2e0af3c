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
    """Starts to merge batches into moments, beginning with moments of no samples.

        mean = 0        var = 0        count = 0

    From here to `update_batch_stats`, the batch norms merge each batch into their attribute
    `moments`, in training mode and in inference mode. Their running statistics do not change.
    Frozen layers change neither.

    Args:
      model: a module, which is changed, or a batch norm itself.
      where: which batch norms to start, a filter of NNX: `nnx.PathContains("backbone")`, a class, a
        function `(path, layer) -> bool`, or `...` for all.

    Raises:
      ValueError: `where` chooses no batch norm, or one without running statistics of jaxbn.

    Examples:
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
    """Updates the running statistics of each batch norm with its moments, as for one batch.

        count' = count + 1
        mean'  = (1 − momentum)·mean + momentum·moments.mean
        var'   = (1 − momentum)·var  + momentum·moments.var·n/(n − 1)       n = moments.count

    This is the formula of torch's classes. `BatchNorm` has Flax's `momentum`, the weight of the
    **old** statistics, and keeps the variance without `n/(n − 1)`. Each layer uses its own
    momentum. A layer with empty moments does not change. Afterward, no layer has moments, and each
    batch updates the running statistics again.

    Args:
      model: a module, which is changed, or a batch norm itself.

    Raises:
      ValueError: no batch norm has moments.

    Examples:
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
    """Replaces the running statistics with those of a data set: precise batch norm.

        mean' = E[x]        var' = Var[x]·n/(n − 1)        count' = number of batches

    See `jaxbn.linen.recalibrate` for details; `BatchNorm` keeps `Var[x]`. Only the running
    statistics change, and only at the end: an error leaves the model unchanged.

    Batch norms are set to the mode that they need. All other layers stay in their mode: after
    `model.eval()`, dropout drops nothing, and the statistics are those of inference mode. If a
    model passes `use_running_average` to its layers, let `call` ask for training mode, or for
    inference mode with `sequential`. Another mode is an error.

    Args:
      model: a module, which is changed, or a batch norm itself.
      batches: an iterable of batches, which are trees of arrays. `sequential` takes several passes,
        and needs a list, or an object that can be iterated again.
      call: function `(model, batch)` that runs the model:
        `lambda model, batch: model(batch["image"])`. The default calls `model(batch)`. It is traced
        and compiled once for each shape of a batch.
      where: which batch norms to recalibrate, a filter of NNX as for `freeze`. The others keep
        their statistics.
      sequential: whether the layers below normalize by the new statistics. By default, each batch
        normalizes itself there, as in training mode.
      average: whether to average the statistics of the single batches, as torch's `update_bn` does
        for layers with torch's conventions, instead of computing those of all samples.
      prior: number of batches that the old statistics count as, a Python number.
      callback: called after each batch with the number of batches done in this pass and the number
        of passes done: `(1, 0)` after the first batch.

    Raises:
      TypeError: `batches` is not iterable, or can be iterated only once but `sequential` is given.
      ValueError: a chosen batch norm has no running statistics of jaxbn; see also
        `jaxbn.linen.recalibrate`.

    Examples:
      >>> import jax.numpy as jnp, jaxbn.nnx
      >>> from flax import nnx
      >>> layer = jaxbn.nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> batches = [jnp.array([[0.0], [2.0]]), jnp.array([[10.0], [12.0]])]
      >>> jaxbn.nnx.recalibrate(layer, batches)
      >>> layer.mean[...], layer.var[...]
      (Array([6.], dtype=float32), Array([26.], dtype=float32))

    References:
      See `jaxbn.linen.recalibrate`.
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
    """The moments of one batch in the layers with these running statistics.

    The model is a copy. Other changes to it are lost, except for the state of random numbers.
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
    """The chosen batch norms with running statistics, by path."""
    chosen = {name: v for name, v in chosen_layers(model, where).items() if keeps_statistics(v)}
    if not chosen:
        raise ValueError(
            "`where` must choose at least one batch norm that keeps running statistics; got layers "
            "with track_running_stats=False."
        )
    return chosen


def attach_moments(layer: BatchNormLayer) -> None:
    """Gives a layer moments of no samples to merge batches into."""
    layer.moments = BatchMoments(Moments(**empty_moments(running_in(layer))))
