"""Explains why a model is worse in inference mode than in training mode."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxbn._diagnosis.causes import (
    Cause,
    cause_of,
    explains,
    in_all,
    mask_between,
    of_data,
    of_some_channels,
    of_variances,
)
from jaxbn._diagnosis.layers import Known, Layer, Settings, gathered
from jaxbn._diagnosis.misfits import LIMIT, level, noise
from jaxbn._diagnosis.report import is_initial
from jaxbn._diagnosis.texts import TEXTS

NAMED = 4  # number of layers that a finding names
FEW_SAMPLES = 4  # with fewer, means are off by half a standard deviation or more
# From this weight on, a new batch counts more than all batches before it.
WRONG_WAY_ROUND = 0.5
# The running statistics are those of one batch if their distance to it is this part of others.
NEARER = 0.4
# With fewer channels, one of several batches is that near by chance.
TELLING_CHANNELS = 6
# Variance between batches: chance explains one part in `samples`, and more with few batches.
BETWEEN, DEVIATIONS = 0.03, 3.0
# Factor of the limit if the scores of the modes differ: smaller distances then count, too.
SUSPECTED = 0.5
# Small errors grow from layer to layer. In healthy networks at large learning rates, they reach
# this multiple of the limit of one layer.
GROWN = 2.0
# Kinds that a wrong epsilon in the layer before imitates.
BY_EPSILON_TOO = ("input_scale", "variance_ratio", "extreme_batch", "small_variance", "other_model")
# Part of the divisor that is epsilon. Trained networks stay below.
BY_EPSILON, BY_EPSILON_ALONE = 0.02, 0.1
# Dropout with rate 1/4 leaves less of the variance. Healthy networks measure 0.98 or more.
LOST = 0.8
# Test data of the same domain are nearer than this, even if the network is overfitted.
OTHER_DATA = 0.5


class Finding(NamedTuple):
    """One cause of a gap between the modes.

    Attributes:
      kind: short name of the cause, such as "momentum". `docs/evaluation.md#symptoms` lists all.
      layers: paths of the layers that show it.
      numbers: measured values, by name.
      problem: what is wrong.
      remedy: what to do.

    Examples:
      >>> import jax, jaxbn
      >>> batches = [jaxbn.batch_moments(3 + jax.random.normal(jax.random.key(0), (64, 4)))]
      >>> (finding,) = jaxbn.explain_gap(jaxbn.init_batch_stats(4), batches)
      >>> finding.problem
      'The running statistics are those before the first batch: mean 0 and variance 1.'
    """

    kind: str
    layers: tuple[str, ...]
    numbers: dict[str, float | str]
    problem: str
    remedy: str

    def __str__(self) -> str:
        """The problem, the remedy and the layers, in words."""
        named = [path or "the layer" for path in self.layers[:NAMED]]
        more = len(self.layers) - len(named)
        where = ", ".join(named) + (f" and {more} more" if more else "")
        return f"{self.kind}: {self.problem}\n  What to do: {self.remedy}\n  Layers: {where}"


class Explanation(tuple[Finding, ...]):
    """The findings of `explain_gap`: a tuple, empty if nothing is wrong. `str` prints them.

    Attributes:
      scores: accuracy or loss in training mode and in inference mode, or None.

    Examples:
      >>> import jaxbn
      >>> print(jaxbn.Explanation())
      nothing found: the running statistics are those of the batches
    """

    scores: tuple[float, float] | None = None

    @property
    def kinds(self) -> list[str]:
        """The names of the causes."""
        return [finding.kind for finding in self]

    def __str__(self) -> str:
        """The findings in words."""
        lines = [str(finding) for finding in self]
        if not self:
            lines = ["nothing found: the running statistics are those of the batches"]
        if self.scores is not None:
            training, inference = self.scores
            lines.insert(0, f"{training:.4g} in training mode, {inference:.4g} in inference mode")
            if not self and training != inference:
                lines.append(
                    "Compare both modes on the same data: a gap between training data and others "
                    "is overfitting, which batch norm does not cause."
                )
        return "\n".join(lines)


def explain_gap(
    variables: Any,
    batches: Any,
    *,
    inference: Any = (),
    evaluation: Any = (),
    settings: Settings | Mapping[str, Settings] | None = None,
    scores: tuple[float, float] | None = None,
) -> Explanation:
    """Explains why a model differs between training mode and inference mode, and what to do.

    Compares the running statistics of each layer with the moments of training batches, and with
    what known faults would make of these moments. `jaxbn.linen.explain_gap` and
    `jaxbn.nnx.explain_gap` collect all arguments from a model.

    Args:
      variables: as for `report`.
      batches: moments of training batches in training mode, one tree for each batch, as for
        `report`. Some faults show only between batches, so give five or more, in the order of
        training.
      inference: moments of the same batches in inference mode, if known.
      evaluation: moments of evaluation batches in inference mode, if known.
      settings: `Settings` of all layers, or of each layer by path, in the order of the network.
      scores: accuracy or loss in training mode and in inference mode. They appear in the text, and
        a difference between them makes the search more sensitive.

    Returns:
      An `Explanation`, a tuple of `Finding`, empty if nothing is wrong. `str` gives it in words.

    Raises:
      ValueError: see `report`.

    Examples:
      >>> import jax, jaxbn
      >>> x = 3 + 2 * jax.random.normal(jax.random.key(0), (8, 64, 4))
      >>> batches = [jaxbn.batch_moments(batch) for batch in x]
      >>> jaxbn.explain_gap(jaxbn.init_batch_stats(4), batches).kinds
      ['not_written_back']
      >>> stats = jaxbn.init_batch_stats(4)
      >>> for moments in batches:
      ...     stats = jaxbn.update_batch_stats(stats, moments, momentum=0.1)
      >>> jaxbn.explain_gap(stats, batches).kinds
      ['too_few_steps']
      >>> for moments in 8 * batches:
      ...     stats = jaxbn.update_batch_stats(stats, moments, momentum=0.1)
      >>> print(jaxbn.explain_gap(stats, batches))
      nothing found: the running statistics are those of the batches

    References:
      Li et al., "Understanding the disharmony between dropout and batch normalization by variance
      shift", CVPR 2019; Izmailov et al., "Averaging weights leads to wider optima and better
      generalization", UAI 2018, section 3.2.
    """
    layers = gathered(variables, batches, inference, evaluation, settings)
    limit = LIMIT * (SUSPECTED if _differ(scores, 0.1) else 1)
    found = [*explained(layers, limit)]
    if not found and _differ(scores, 0.02):
        found = [*_grouped(_behind(layers))]
    explanation = Explanation(found)
    explanation.scores = scores
    return explanation


def explained(layers: Sequence[Layer], limit: float) -> Iterator[Finding]:
    """The findings. Causes come before their effects."""
    found = [(layer, cause) for layer in layers for cause in _plain(layer)]
    blamed = {layer.path for layer, cause in found if cause.kind != "half_precision"}
    sound = [v for v in layers if v.path not in blamed and v.training is not None]
    if not (of_batches := [*_of_batches(sound)]):
        found += _of_statistics(sound, layers, limit, bool(blamed))
    found += of_batches
    if not found:
        found += _of_modes(sound, limit)
    found += _of_evaluation(sound)
    yield from _grouped(found)


Found = tuple[Layer, Cause]


def _differ(scores: tuple[float, float] | None, part: float) -> bool:
    """Whether accuracy or loss differs between the modes by more than this part of it."""
    return scores is not None and abs(scores[0] - scores[1]) > part * max(map(abs, scores))


def _behind(layers: Sequence[Layer]) -> Iterator[Found]:
    """Layers whose statistics are slightly off, but by more than chance explains."""
    for layer in layers:
        if layer.training is not None:
            apart = level(layer.running, layer.training, layer.settings.epsilon)
            if apart > noise(layer):
                yield layer, _cause("behind", layer, apart=apart, chance=noise(layer))


def _cause(kind: str, layer: Layer, **numbers: float | str) -> Cause:
    return Cause(kind, layer.running, numbers)


def _grouped(found: Iterable[Found]) -> Iterator[Finding]:
    """One finding for each kind and its details in words, with the numbers of the first layer."""
    groups: dict[tuple[str, ...], list[Found]] = {}
    for layer, cause in found:
        words = [v for v in cause.numbers.values() if isinstance(v, str)]
        groups.setdefault((cause.kind, *words), []).append((layer, cause))
    for group in groups.values():
        kind, numbers = group[0][1].kind, group[0][1].numbers
        problem, remedy = (text.format(**numbers) for text in TEXTS[kind])
        yield Finding(kind, tuple(layer.path for layer, _ in group), numbers, problem, remedy)


def _plain(layer: Layer) -> Iterator[Cause]:
    """Faults that show whatever the batches are, and whatever else is wrong."""
    running, settings = layer.running, layer.settings
    in_training, in_inference = settings.by_batch
    if in_inference:
        yield _cause("batch_in_inference", layer)
    if layer.narrow is not None:
        yield _cause("half_precision", layer, dtype=layer.narrow)
    finite = np.isfinite(running.mean) & np.isfinite(running.var)
    if not finite.all():
        yield _cause("non_finite", layer, channels=float(np.sum(~finite)))
    elif not running.finite.all():
        yield _cause("negative_variance", layer, channels=float(np.sum(running.var < 0)))
    elif layer.training is not None and not layer.training.finite.all():
        channels = float(np.sum(~layer.training.finite))
        yield _cause("non_finite_batches", layer, channels=channels)
    elif in_training is False and not settings.frozen:
        yield _cause("inference_in_training", layer)
    elif is_initial(running):
        if settings.momentum == 0 and not settings.frozen:
            yield _cause("momentum_of_zero", layer)
        else:
            left = settings.frozen or not settings.updates
            yield _cause("frozen" if left else "not_written_back", layer)


def _of_batches(layers: Sequence[Layer]) -> Iterator[Found]:
    """Batches that no statistics fit, and statistics of a single batch."""
    small = [v for v in layers if v.samples < FEW_SAMPLES]
    unlike = [v for v in layers if _between(v)[0] > _between(v)[1]]
    newest = [v for v in layers if (v.settings.momentum or 0) >= WRONG_WAY_ROUND]
    if small:
        for v in small:
            kind = "batch_of_one" if v.samples <= 1 else "small_batches"
            yield v, _cause(kind, v, samples=v.samples)
    elif unlike:
        for v in sorted(unlike, key=lambda v: -_between(v)[0]):
            share, chance = _between(v)
            yield v, _cause("unlike_batches", v, share=share, chance=chance)
    elif newest:
        for v in newest:
            yield v, _cause("momentum", v, weight=v.settings.momentum or 0.0)
    else:
        yield from _of_one_batch(layers)


def _between(layer: Layer) -> tuple[float, float]:
    """The part of the variance that is between the batches, and the most that chance explains."""
    shares, samples = [], max(layer.samples, 1.0)
    for batches in (layer.batches, layer.in_inference):
        if len(batches) > 1:
            within = np.mean([batch.var for batch in batches], axis=0)
            between = np.var([batch.mean for batch in batches], axis=0, ddof=1)
            total = within + between
            moving = total > layer.settings.epsilon / 100
            if moving.any():
                shares.append(np.mean(between[moving] / total[moving]))
    chance = 1 / samples * (1 + DEVIATIONS * np.sqrt(2 / max(len(layer.batches) - 1, 1)))
    return float(max(shares, default=0.0)), float(chance + BETWEEN)


def _of_one_batch(layers: Sequence[Layer]) -> Iterator[Found]:
    """Running statistics of one batch of several, the same batch in most layers."""
    nearest = {}  # the batch and its weight, by path
    for layer in layers:
        apart = [level(layer.running, b, layer.settings.epsilon) for b in layer.batches]
        enough = len(apart) > 2 and len(layer.running.mean) >= TELLING_CHANNELS
        if enough and min(apart) < NEARER * np.median(apart):
            place = int(np.argmin(apart))
            if (weight := newest_weight(layer, place)) >= WRONG_WAY_ROUND:
                nearest[layer.path] = place, weight
    if 2 * len(nearest) > len(layers) and len({place for place, _ in nearest.values()}) == 1:
        for layer in layers:
            if layer.path in nearest:
                yield layer, _cause("momentum", layer, weight=nearest[layer.path][1])


def newest_weight(layer: Layer, place: int) -> float:
    """The weight of one batch against the average of all, by least squares over the channels."""
    one, all_ = layer.batches[place], layer.training
    assert all_ is not None
    way, gone = one.mean - all_.mean, layer.running.mean - all_.mean
    return float(np.clip(way @ gone / max(float(way @ way), 1e-300), 0, 1))


def _of_statistics(
    layers: Sequence[Layer], all_layers: Sequence[Layer], limit: float, blamed: bool
) -> Iterator[Found]:
    """Layers whose running statistics differ from those of the batches.

    Unexplained layers are reported only if there is no other finding.
    """
    if not layers:
        return
    if left := [v for v in layers if not v.settings.updates and not fits(v, limit)]:
        yield from ((v, _other_model(v)._replace(kind="not_updated")) for v in left)
        return
    if common := in_all(layers, limit):
        yield from ((layer, _with_steps(cause, layer)) for layer, cause in common)
        return
    if padded := next(_masks(layers), None):
        yield padded
        return
    causes = [None if fits(v, limit) else _explained(v, all_layers) for v in layers]
    for i, layer in enumerate(layers):
        before = layers[i - 1] if i else layer
        cause = causes[i]
        if cause and cause.kind in BY_EPSILON_TOO and _near_epsilon(before, causes[i - 1]):
            yield before, _epsilon(before, f" The next layer, {layer.path}, does not fit.")
            return
    known = [(v, cause) for v, cause in zip(layers, causes, strict=True) if cause]
    certain = [(v, cause) for v, cause in known if cause.kind != "other_model"]
    yield from certain or (() if blamed else known)
    if not known and not blamed:
        yield from ((v, _epsilon(v, "")) for v in layers if by_epsilon(v) > BY_EPSILON_ALONE)


def _masks(layers: Sequence[Layer]) -> Iterator[Found]:
    """Layers with padding, unless the epsilon of the layer before explains as much."""
    for before, v in zip([None, *layers], layers, strict=False):
        by_layer_before = before is not None and by_epsilon(before) > BY_EPSILON
        if v.training is None or by_layer_before:
            continue
        if cause := mask_between(v.running, v.training, v.settings.epsilon):
            yield v, cause


def _near_epsilon(layer: Layer, cause: Cause | None) -> bool:
    return cause is None and by_epsilon(layer) > BY_EPSILON


def fits(layer: Layer, limit: float) -> bool:
    """Whether the running statistics are those of the training batches, in either mode."""
    if of_some_channels(layer):
        return False
    known = [v for v in (layer.training, layer.inference) if v is not None]
    nearest = min(level(layer.running, v, layer.settings.epsilon) for v in known)
    return nearest < limit + noise(layer)


def _explained(layer: Layer, all_layers: Sequence[Layer]) -> Cause:
    """The cause for a layer that does not fit; by default, statistics of other weights."""
    others = [v for v in all_layers if v is not layer]
    cause = of_some_channels(layer) or cause_of(layer, others, layer is all_layers[0])
    return _with_steps(cause or of_variances(layer) or _other_model(layer), layer)


def _other_model(layer: Layer) -> Cause:
    known = layer.training
    assert known is not None
    return _cause("other_model", layer, apart=level(layer.running, known, layer.settings.epsilon))


def _with_steps(cause: Cause, layer: Layer) -> Cause:
    if cause.kind == "too_few_steps":
        cause.numbers["steps"] = _steps(layer)
    return cause


def _steps(layer: Layer) -> str:
    """The number of steps done, and the number that the momentum needs, if these are known."""
    weight, count = layer.settings.momentum, layer.running.count
    if not weight or weight >= 1:
        return ""
    needed = int(np.ceil(np.log(0.01) / np.log(1 - weight)))
    were = f" There were {count:.0f}." if count else ""
    return (
        f"{were} With a weight of {weight:.2g} for each batch, 99 % of the way take {needed} steps."
    )


def by_epsilon(layer: Layer) -> float:
    """The part of the divisor of a layer that is epsilon, in channels that are not constant."""
    var, epsilon = layer.running.var, layer.settings.epsilon
    moving = var > epsilon / 100
    return float(np.mean(epsilon / (var[moving] + epsilon))) if moving.any() else 0.0


def _epsilon(layer: Layer, behind: str) -> Cause:
    epsilon = layer.settings.epsilon
    return _cause("epsilon", layer, epsilon=epsilon, share=by_epsilon(layer), behind=behind)


def _of_modes(layers: Sequence[Layer], limit: float) -> Iterator[Found]:
    """Inputs that differ in inference mode, though the statistics of each layer fit.

    Small errors of the layers before multiply, and are divided out. The rest does not come from
    statistics. Without such a rest, the errors themselves may have grown large.
    """
    carried = 1.0
    for layer in layers:
        if layer.inference is None or layer.training is None:
            continue
        epsilon = layer.settings.epsilon
        ratio = _ratio(layer.inference, layer.running, epsilon)
        carried *= min(_ratio(layer.training, layer.running, epsilon), 1.0)
        if ratio < LOST * carried:
            yield layer, _cause("dropout", layer, ratio=ratio)
            return
        if level(layer.running, layer.inference, epsilon) > GROWN * limit + noise(layer):
            yield layer, _other_model(layer)
            return


def _ratio(one: Known, other: Known, epsilon: float) -> float:
    return float(np.median((one.var + epsilon) / (other.var + epsilon)))


def _of_evaluation(layers: Sequence[Layer]) -> Iterator[Found]:
    """The first layer in which evaluation data differ from training data. Later ones follow it."""
    for layer in layers:
        training = layer.inference or layer.training
        if layer.evaluation is None or training is None:
            continue
        if not layer.evaluation.finite.all():
            channels = float(np.sum(~layer.evaluation.finite))
            yield layer, _cause("non_finite_batches", layer, channels=channels)
            return
        if cause := _of_data(layer, training, layer.evaluation):
            yield layer, cause
            return


def _of_data(layer: Layer, training: Known, evaluation: Known) -> Cause | None:
    epsilon = layer.settings.epsilon
    if cause := mask_between(training, evaluation, epsilon):
        return cause
    apart = level(training, evaluation, epsilon)
    if apart < OTHER_DATA + noise(layer):
        return None
    causes = of_data(training, evaluation, epsilon)
    compared = layer._replace(running=training, training=evaluation)
    cause = next((cause for cause in causes if explains(cause, compared, apart)), None)
    cause = cause or _cause("other_data", layer)
    cause.numbers["apart"] = apart
    return cause
