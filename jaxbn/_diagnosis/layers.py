"""The layers of a model for a diagnosis: statistics, moments of batches, settings."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from jaxbn._checks import statistics_dtype
from jaxbn._moments import Moments, merge_moments
from jaxbn._stats import BatchStats
from jaxbn._weight_decay import names_on

Array = NDArray[np.float64]

TINY = float(np.finfo(np.float32).tiny)


class Settings(NamedTuple):
    """Settings of a layer that a diagnosis uses.

    Attributes:
      epsilon: added to the variance inside the square root.
      momentum: weight of the **new** batch in the running statistics, in
        `new = (1 − momentum)·old + momentum·batch`; None if unknown.
      samples: number of samples in a batch, which is less than the number of values per channel if
        samples have several positions; None if unknown.
      frozen: whether the layer normalizes by its running statistics and never updates them, in
        either mode.
      updates: whether a batch updates the running statistics.
      by_batch: whether the layer normalizes by the batch, in training mode and in inference mode;
        None if unknown.

    Examples:
      >>> import jaxbn
      >>> jaxbn.Settings(epsilon=1e-3).momentum is None
      True
    """

    epsilon: float = 1e-5
    momentum: float | None = None
    samples: int | None = None
    frozen: bool = False
    updates: bool = True
    by_batch: tuple[bool | None, bool | None] = (None, None)


class Known(NamedTuple):
    """Mean and variance of each channel in float64, and the number of values per channel.

    For running statistics, `count` is the number of batches, or None if it is not kept.
    """

    mean: Array
    var: Array
    count: float | None  # type: ignore[assignment]  # shadows tuple.count, as documented

    @property
    def finite(self) -> NDArray[np.bool_]:
        """Where the mean is finite, and the variance is finite and not negative."""
        return np.isfinite(self.mean) & np.isfinite(self.var) & (self.var >= 0)


class Layer(NamedTuple):
    """One batch norm.

    Attributes:
      path: its place in the model, with "/" between the names.
      running: running statistics.
      narrow: dtype of the running statistics if it is narrower than float32, else None.
      batches: moments of each training batch in training mode.
      training: their merged moments.
      in_inference: moments of each of the same batches in inference mode.
      inference: their merged moments; None if unknown.
      evaluation: merged moments of the evaluation batches in inference mode; None if unknown.
      scale: the parameter γ, if there is one.
      bias: the parameter β, if there is one.
      settings: the settings of the layer.
    """

    path: str
    running: Known
    narrow: str | None
    batches: list[Known]
    training: Known | None
    in_inference: list[Known]
    inference: Known | None
    evaluation: Known | None
    scale: Array | None
    bias: Array | None
    settings: Settings

    @property
    def samples(self) -> float:
        """Number of samples in a batch, at most the number of values in a channel."""
        count = min((b.count or 0.0 for b in self.batches), default=0.0)
        return min(count, self.settings.samples or count)


def gathered(
    variables: Any,
    batches: Any,
    inference: Any = (),
    evaluation: Any = (),
    settings: Settings | Mapping[str, Settings] | None = None,
) -> list[Layer]:
    """The layers in the order of `settings`, if these are given by path; else sorted by path."""
    whole = isinstance(variables, Mapping) and "batch_stats" in variables
    stats = _layers(variables["batch_stats"] if whole else variables, "`variables`")
    parameters = _parameters(variables.get("params", {}) if whole else {})
    kinds = [_by_layer(stats, trees) for trees in (batches, inference, evaluation)]
    given = settings if isinstance(settings, Mapping) else {}
    each = settings if isinstance(settings, Settings) else Settings()
    order = {path: place for place, path in enumerate(given)}
    paths = sorted(stats, key=lambda path: (order.get(path, len(order)), _natural(path)))
    return [
        Layer(
            path,
            _known(stats[path]),
            _narrow(stats[path]),
            [_known(moments) for moments in kinds[0][path]],
            _merged(kinds[0][path]),
            [_known(moments) for moments in kinds[1][path]],
            _merged(kinds[1][path]),
            _merged(kinds[2][path]),
            _vector(parameters.get((path, "scale"))),
            _vector(parameters.get((path, "bias"))),
            given.get(path, each),
        )
        for path in paths
    ]


def _layers(tree: Any, name: str) -> dict[str, dict[str, Any]]:
    """The arrays of each node that has a mean and a variance, by path."""
    found = {}
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_layer):
        if _is_layer(node):
            arrays = node._asdict() if isinstance(node, (BatchStats, Moments)) else node
            values = {key: jax.tree.leaves(arrays[key])[0] for key in arrays}  # unwraps NNX
            found["/".join(names_on(path))] = values
    if not found:
        raise ValueError(
            f"{name} must hold mean and var of at least one batch norm: BatchStats, Moments, or "
            f"nested dicts such as the collection `batch_stats`; got {type(tree).__name__}."
        )
    return found


def _is_layer(node: Any) -> bool:
    return isinstance(node, (BatchStats, Moments)) or (
        isinstance(node, Mapping) and "mean" in node and "var" in node
    )


def _parameters(params: Any) -> dict[tuple[str, str], Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    named = ((names_on(path), leaf) for path, leaf in leaves)
    return {("/".join(names[:-1]), names[-1]): leaf for names, leaf in named if names}


def _by_layer(
    stats: Mapping[str, Mapping[str, Any]], trees: Any
) -> dict[str, list[dict[str, Any]]]:
    """The moments of each layer, for one batch or several."""
    several = isinstance(trees, Sequence) and not isinstance(trees, Moments)
    found = [_layers(tree, "`batches`") for tree in (trees if several else [trees])]
    for moments in found:
        if moments.keys() != stats.keys():
            raise ValueError(
                "The moments of a batch must be those of the layers with running statistics, "
                f"{', '.join(stats)}; got {', '.join(moments)}."
            )
        for path, arrays in moments.items():
            if "count" not in arrays:
                raise ValueError(f"The moments of {path!r} must have a count; got mean and var.")
            shapes = [np.shape(v) for v in (stats[path]["mean"], arrays["mean"])]
            if np.prod(shapes[0], dtype=int) != np.prod(shapes[1], dtype=int):
                raise ValueError(
                    f"Statistics and moments of {path!r} must describe the same channels; got the "
                    f"shapes {shapes[0]} and {shapes[1]}. Of statistics that are replicated over "
                    "devices take one: jax.tree.map(lambda v: v[0], batch_stats)."
                )
    return {path: [moments[path] for moments in found] for path in stats}


def _vector(value: Any) -> Array | None:
    return None if value is None else np.asarray(value, np.float64).reshape(-1)


def _known(arrays: Mapping[str, Any]) -> Known:
    mean, var = (np.asarray(arrays[name], np.float64).reshape(-1) for name in ("mean", "var"))
    count = arrays.get("count")
    return Known(mean, var, None if count is None else float(np.max(np.asarray(count))))


def _narrow(arrays: Mapping[str, Any]) -> str | None:
    dtype = np.asarray(arrays["mean"]).dtype
    return str(dtype) if dtype.itemsize < 4 else None


def _merged(several: Sequence[Mapping[str, Any]]) -> Known | None:
    """The merged moments of all batches; None if the layer saw no values."""
    vectors = []
    for arrays in several:
        dtype = statistics_dtype(np.asarray(arrays["mean"]).dtype)
        mean, var, count = (np.ravel(np.asarray(arrays[v], dtype)) for v in Moments._fields)
        each = mean, var, np.broadcast_to(count, mean.shape)
        vectors.append(Moments(*map(jax.device_put, each)))
    if not any(np.any(np.asarray(v.count) > 0) for v in vectors):
        return None
    return _known(merge_moments(*vectors)._asdict())


def _natural(path: str) -> list[tuple[int, str]]:
    return list(_parts(path))


def _parts(path: str) -> Iterator[tuple[int, str]]:
    """The words and numbers of a path, so that layer 10 comes after layer 2."""
    for number, word in re.findall(r"(\d+)|(\D+)", path):
        yield int(number or 0), word
