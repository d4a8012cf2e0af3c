"""Diagnosis of Linen models: batches run in both modes, and layers merge their moments."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxbn._checks import check_collections
from jaxbn._diagnosis.gap import Explanation
from jaxbn._diagnosis.gap import explain_gap as _explain_gap
from jaxbn._diagnosis.layers import Settings
from jaxbn._diagnosis.report import Report
from jaxbn._diagnosis.report import report as _report
from jaxbn._flax.diagnosis import as_list, settings_of
from jaxbn.linen._recalibrate import Apply, init_batch_moments, layers_in, moments_of


def report(apply: Apply, variables: Mapping[str, Any], batches: Any) -> Report:
    """Compares the running statistics of each batch norm of a model with batches.

    Args:
      apply: function `(variables, batch, train, mutable) -> (outputs, updates)` that calls
        `model.apply` as training does, with masks and random keys: `lambda variables, batch, train,
        mutable: model.apply(variables, batch["image"], train=train, mutable=mutable)`.
      variables: the collections `params` and `batch_stats`, which do not change.
      batches: training batches: a list or another iterable of batches, or one batch, which is an
        array, a tuple or a dict. Each runs through the model in training mode.

    Returns:
      A `Report`: for each path a `LayerReport`, in the order of the network. `str` makes a table.

    Raises:
      ValueError: a collection is missing, `batches` are empty, or `apply` does not return the
        updates of the collections in `mutable`.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxbn.linen
      >>> model = jaxbn.linen.BatchNorm()
      >>> x = 3 + jax.random.normal(jax.random.key(0), (64, 2))
      >>> variables = model.init(jax.random.key(1), x, use_running_average=True)
      >>> def apply(variables, batch, train, mutable):
      ...     return model.apply(variables, batch, not train, mutable=mutable)
      >>> report = jaxbn.linen.report(apply, variables, x)
      >>> report[""].never_updated
      True

    References:
      `jaxbn.report`.
    """
    seen = _Seen(apply, variables)
    moments = seen.moments(batches, train=True)
    return _report(variables, moments, settings=seen.settings)


def explain_gap(
    apply: Apply,
    variables: Mapping[str, Any],
    batches: Any,
    evaluation: Any = None,
    *,
    scores: tuple[float, float] | None = None,
) -> Explanation:
    """Explains why a model differs between training mode and inference mode, and what to do.

    Args:
      apply: as for `report`.
      variables: as for `report`.
      batches: as for `report`. Some faults show only between batches, so give five or more, in the
        order of training and with the newest last.
      evaluation: batches of the evaluation, if they differ from `batches`.
      scores: accuracy or loss in training mode and in inference mode. They appear in the text, and
        a difference between them makes the search more sensitive.

    Returns:
      An `Explanation`, a tuple of `Finding`, empty if nothing is wrong. `str` gives it in words.

    Raises:
      ValueError: see `report`.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxbn.linen
      >>> model = jaxbn.linen.BatchNorm()
      >>> x = 3 + jax.random.normal(jax.random.key(0), (8, 64, 2))
      >>> variables = model.init(jax.random.key(1), x[0], use_running_average=True)
      >>> def apply(variables, batch, train, mutable):
      ...     return model.apply(variables, batch, not train, mutable=mutable)
      >>> jaxbn.linen.explain_gap(apply, variables, list(x)).kinds
      ['not_written_back']

    References:
      `jaxbn.explain_gap`.
    """
    seen = _Seen(apply, variables)
    batches = as_list(batches)
    training, inference = (seen.moments(batches, train=train) for train in (True, False))
    others = [] if evaluation is None else seen.moments(evaluation, train=False)
    return _explain_gap(
        variables,
        training,
        inference=inference,
        evaluation=others,
        settings=seen.settings,
        scores=scores,
    )


class _Seen:
    """What is seen of a model while batches run through it."""

    def __init__(self, apply: Apply, variables: Mapping[str, Any]) -> None:
        check_collections(variables)
        self.apply, self.variables = apply, variables
        self.by_batch: dict[tuple[str, bool], bool | None] = {}
        self.settings: dict[str, Settings] = {}  # by the order of the calls
        self.collect = jax.jit(self._collect, static_argnums=2)

    def moments(self, batches: Any, train: bool) -> list[Any]:
        """The moments of each batch."""
        found = [self.collect(self.variables, batch, train) for batch in as_list(batches)]
        if not found:
            raise ValueError("`batches` must have at least one batch; got none.")
        self._check(found)
        return found

    def _check(self, found: list[Any]) -> None:
        """Refuses layers that report no moments."""
        counts = [{k: v["count"] for k, v in layers_in(moments).items()} for moments in found]
        silent = [
            path
            for path in counts[0]
            if not any(np.any(np.asarray(each[path]) > 0) for each in counts)
            and not (path in self.settings and self.settings[path].frozen)
        ]
        if silent:
            raise ValueError(
                "Each batch norm must be one of jaxbn.linen and get values; got others or none for "
                f"{', '.join(map(repr, silent))}. Convert the model with jaxbn.linen.convert."
            )

    def _collect(self, variables: Mapping[str, Any], batch: Any, train: bool) -> Any:
        def record(layer: nn.Module, by_batch: bool | None) -> None:
            self._record(layer, by_batch, batch, train)
            if getattr(layer, "update_stats", None) is False:  # would merge no batch
                object.__setattr__(layer, "update_stats", None)

        start = init_batch_moments(variables["batch_stats"])
        given = {**variables, "batch_moments": start}
        return moments_of(self.apply, given, batch, train, record)

    def _record(self, layer: nn.Module, by_batch: bool | None, batch: Any, train: bool) -> None:
        path = "/".join(layer.path).replace(".", "/")  # paths of variables are split so
        self.by_batch[path, train] = by_batch
        both = self.by_batch.get((path, True)), self.by_batch.get((path, False))
        samples = self.settings[path].samples if path in self.settings else None
        settings = settings_of(layer, batch, both)
        self.settings[path] = settings._replace(samples=samples or settings.samples)
