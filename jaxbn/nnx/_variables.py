"""The variables of the NNX layers, and the modes that all of them have."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
from flax import nnx
from flax.errors import TraceContextError
from flax.typing import Dtype, Initializer

from jaxbn._activation import Activation, is_own
from jaxbn._flax.layer import EFFECTS, Kept, Vectors, collects, modes
from jaxbn._moments import Moments
from jaxbn._stats import BatchStats
from jaxbn._types import Flag


def parameter(
    used: bool,
    initializer: Initializer,
    shape: tuple[int, ...],
    dtype: Dtype,
    rngs: nnx.Rngs,
    metadata: Mapping[str, Any],
) -> Any:
    """A `Param`, or a placeholder in a layer without it."""
    if not used:
        return nnx.data(None)
    return nnx.Param(initializer(rngs.params(), shape, dtype), **metadata)


def value(variable: Any) -> Any:
    """The array in a variable, or None without a variable."""
    return None if variable is None else variable[...]


class BatchMoments(nnx.Variable[Moments]):
    """Merged moments of batches that have not yet updated the running statistics."""


class BatchNormLayer(nnx.Module):
    """The base of all layers: chooses the mode, and stores the running statistics."""

    use_running_average: Flag | None
    activation: str | Activation | None
    update_stats: Flag | None
    train_affine: bool
    frozen: bool
    moments: BatchMoments | None

    def set_view(
        self, use_running_average: Flag | None = None, update_stats: Flag | None = None
    ) -> None:
        """Sets the mode of a layer, for `nnx.view`.

        Args:
          use_running_average: whether to normalize by the running statistics; None to leave it
            unchanged.
          update_stats: whether the batch updates the running statistics; None to leave it
            unchanged.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        if update_stats is not None:
            self.update_stats = update_stats

    def set_mode(
        self,
        use_running_average: Flag | None = None,
        update_stats: Flag | None = None,
        **others: Any,
    ) -> dict[str, Any]:
        """Sets the mode of a layer, for `nnx.set_mode`, the predecessor of `nnx.view`.

        Args:
          use_running_average: whether to normalize by the running statistics; None to leave it
            unchanged.
          update_stats: whether the batch updates the running statistics; None to leave it
            unchanged.
          **others: settings of other layers.

        Returns:
          `others`.
        """
        self.set_view(use_running_average, update_stats)
        return others

    def _modes(self, use_running_average: Flag | None) -> tuple[Any, Any]:
        chosen = self.use_running_average if use_running_average is None else use_running_average
        if chosen is None and not self.frozen:
            name = type(self).__name__
            raise ValueError(
                f"{name} needs `use_running_average`, True for inference, False for training; got "
                f"None. Give it to the call or to {name}, or call train() or eval() on the model."
            )
        return modes(self, chosen)

    def _activation(self) -> str | Activation | None:
        """The layer's activation, which may read variables of modules, but not write any."""
        if not is_own(self.activation):
            return self.activation
        own = cast(Activation, self.activation)

        def reading(z: jax.Array) -> jax.Array:
            try:
                return own(z)
            except TraceContextError as error:
                raise ValueError(EFFECTS) from error

        return reading

    def _kept(self, names: tuple[str, ...]) -> Kept:
        variables = {name: getattr(self, name) for name in names}
        running = {name: value(v) for name, v in variables.items() if v is not None}
        if self.moments is None or not collects(self):
            return Kept(running, {})
        return Kept(running, moments_in(self))

    def _store(self, new: Kept, updated: bool) -> None:
        """Stores the moments, if there are any; else the running statistics, if `updated`."""
        if self.moments is not None and new.moments:
            self.moments.set_value(Moments(**new.moments))
        elif updated:
            self._set_running(new.running)

    def _set_running(self, running: Vectors) -> None:
        for name, array in running.items():
            getattr(self, name).set_value(array)


def running_in(layer: Any) -> Vectors:
    """The running statistics of a layer, by name. `BatchNorm` has no count."""
    variables = {name: getattr(layer, name, None) for name in BatchStats._fields}
    return {name: value(v) for name, v in variables.items() if v is not None}


def moments_in(layer: Any) -> Vectors:
    """The moments of a layer, by name."""
    moments: Moments = layer.moments.get_value()
    return moments._asdict()


def keeps_statistics(module: Any) -> bool:
    """Whether this is a batch norm with running statistics, of any library."""
    return all(isinstance(getattr(module, v, None), nnx.BatchStat) for v in ("mean", "var"))


def watch_modes(layer: BatchNormLayer, seen: Callable[[bool | None], None]) -> None:
    """Calls `seen` in each call with whether the layer normalizes by the batch; None if traced."""
    modes = layer._modes

    def watched(use_running_average: Flag | None) -> tuple[Any, Any]:
        by_batch, update = modes(use_running_average)
        seen(by_batch if isinstance(by_batch, bool) else None)
        return by_batch, update

    object.__setattr__(layer, "_modes", watched)


def layers_in(model: nnx.Module) -> dict[str, BatchNormLayer]:
    """All batch norms of jaxbn in a model, by path."""
    return {
        "/".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, BatchNormLayer)
    }


def chosen_layers(model: nnx.Module, where: Any) -> dict[str, BatchNormLayer]:
    """The batch norms that a filter chooses, by path. Those of other libraries are refused."""
    chooses = nnx.filterlib.to_predicate(where)
    modules = [(path, v) for path, v in nnx.iter_modules(model) if chooses(path, v)]
    foreign = [
        repr("/".join(map(str, path)))
        for path, module in modules
        if not isinstance(module, BatchNormLayer) and keeps_statistics(module)
    ]
    if foreign:
        raise ValueError(
            "The batch norms must be those of jaxbn.nnx; got layers of another library: "
            f"{', '.join(foreign)}. Convert the model with jaxbn.nnx.convert, or exclude them with "
            "`where`."
        )
    chosen = {"/".join(map(str, p)): v for p, v in modules if isinstance(v, BatchNormLayer)}
    if not chosen:
        paths = ", ".join(path or "the model itself" for path in layers_in(model))
        raise ValueError(
            "`where` must choose at least one batch norm of jaxbn.nnx; got "
            f"{where!r} for a model with {paths or 'none'}."
        )
    return chosen
