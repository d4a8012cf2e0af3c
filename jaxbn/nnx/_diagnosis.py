"""Diagnosis of NNX models: batches run through copies in both modes, whose layers merge moments."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxbn._diagnosis.gap import Explanation
from jaxbn._diagnosis.gap import explain_gap as _explain_gap
from jaxbn._diagnosis.layers import Settings
from jaxbn._diagnosis.report import Report
from jaxbn._diagnosis.report import report as _report
from jaxbn._flax.diagnosis import as_list, settings_of
from jaxbn.nnx._recalibrate import attach_moments
from jaxbn.nnx._variables import (
    chosen_layers,
    keeps_statistics,
    layers_in,
    moments_in,
    running_in,
    watch_modes,
)

Call = Callable[[Any, Any], Any]
# Whether a layer, by path, normalizes by the batch in training mode (True) or inference mode.
Modes = dict[tuple[str, bool], bool | None]


def _called(model: Any, batch: Any) -> Any:
    return model(batch)


def report(model: nnx.Module, batches: Any, *, call: Call = _called) -> Report:
    """Compares the running statistics of each batch norm of a model with batches.

    Args:
      model: a module, which does not change.
      batches: training batches: a list or another iterable of batches, or one batch, which is an
        array, a tuple or a dict. Each runs through a copy of the model in training mode.
      call: function `(model, batch)` that calls the model as training does, with masks. The mode is
        already set. The default calls `model(batch)`.

    Returns:
      A `Report`: for each path a `LayerReport`, in the order of the model. `str` makes a table.

    Raises:
      ValueError: the model has no batch norm with running statistics, or `batches` are empty.

    Examples:
      >>> import jax, jaxbn.nnx
      >>> from flax import nnx
      >>> model = nnx.Sequential(jaxbn.nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
      >>> x = 3 + jax.random.normal(jax.random.key(0), (64, 2))
      >>> jaxbn.nnx.report(model, x)["layers/0"].never_updated
      True

    References:
      `jaxbn.report`.
    """
    batches = as_list(batches)
    moments = _moments(model, batches, call, train=True)
    variables, settings = _variables(model, batches, {})
    return _report(variables, moments, settings=settings)


def explain_gap(
    model: nnx.Module,
    batches: Any,
    evaluation: Any = None,
    *,
    call: Call = _called,
    scores: tuple[float, float] | None = None,
) -> Explanation:
    """Explains why a model differs between training mode and inference mode, and what to do.

    Args:
      model: a module, which does not change.
      batches: as for `report`. Some faults show only between batches, so give five or more, in the
        order of training and with the newest last.
      evaluation: batches of the evaluation, if they differ from `batches`.
      call: as for `report`.
      scores: accuracy or loss in training mode and in inference mode. They appear in the text, and
        a difference between them makes the search more sensitive.

    Returns:
      An `Explanation`, a tuple of `Finding`, empty if nothing is wrong. `str` gives it in words.

    Raises:
      ValueError: see `report`.

    Examples:
      >>> import jax, jaxbn.nnx
      >>> from flax import nnx
      >>> model = nnx.Sequential(jaxbn.nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
      >>> x = 3 + jax.random.normal(jax.random.key(0), (8, 64, 2))
      >>> jaxbn.nnx.explain_gap(model, list(x)).kinds
      ['not_written_back']

    References:
      `jaxbn.explain_gap`.
    """
    batches = as_list(batches)
    modes: Modes = {}
    training, inference = (
        _moments(model, batches, call, train=train, modes=modes) for train in (True, False)
    )
    others = [] if evaluation is None else _moments(model, evaluation, call, train=False)
    variables, settings = _variables(model, batches, modes)
    return _explain_gap(
        variables,
        training,
        inference=inference,
        evaluation=others,
        settings=settings,
        scores=scores,
    )


def _layers(model: nnx.Module) -> dict[str, Any]:
    """The batch norms with running statistics, by path."""
    if not any(map(keeps_statistics, layers_in(model).values())):
        raise ValueError("`model` must have a batch norm of jaxbn.nnx with running statistics.")
    return {v: m for v, m in chosen_layers(model, ...).items() if keeps_statistics(m)}


def _variables(
    model: nnx.Module, batches: list[Any], modes: Modes
) -> tuple[Any, dict[str, Settings]]:
    """The collections of a model, and the settings of its layers."""
    layers = _layers(model)
    stats = {path: running_in(layer) for path, layer in layers.items()}
    params = {
        path: {n: v[...] for n in ("scale", "bias") if (v := getattr(layer, n)) is not None}
        for path, layer in layers.items()
    }
    settings = {
        path: settings_of(layer, batches[0], (modes.get((path, True)), modes.get((path, False))))
        for path, layer in layers.items()
    }
    return {"params": params, "batch_stats": stats}, settings


def _moments(
    model: nnx.Module, batches: Any, call: Call, *, train: bool, modes: Modes | None = None
) -> list[Any]:
    """The moments of each batch, by the path of the layer. Records the modes of the layers."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def collect(state: Any, batch: Any) -> Any:
        copy = nnx.merge(graphdef, state)
        copy.train() if train else copy.eval()
        layers = _layers(copy)
        for path, layer in layers.items():
            attach_moments(layer)
            if modes is not None:
                watch_modes(layer, functools.partial(modes.__setitem__, (path, train)))
            if layer.update_stats is False:  # would merge no batch
                layer.update_stats = None
        call(copy, batch)
        return {path: moments_in(layer) for path, layer in layers.items()}

    found = [collect(state, batch) for batch in as_list(batches)]
    if not found:
        raise ValueError("`batches` must have at least one batch; got none.")
    return found
