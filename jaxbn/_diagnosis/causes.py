"""Faults that turn the moments of the batches into the running statistics of a model."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxbn._diagnosis.layers import TINY, Known, Layer
from jaxbn._diagnosis.misfits import level, misfits, noise

# A fault explains a layer if it leaves at most a quarter of the distance, or as much as chance or
# moving weights explain, but never more than half of it.
LEFT, LEFT_BY_DRIFT, LEFT_BY_CHANCE = 0.25, 0.2, 1.5
# The same fault in all layers is more certain. It may leave this part of the distance.
LEFT_IN_ALL = 0.5
# The first of few steps saw other weights, so more is left.
LEFT_BY_STEPS, LEFT_BY_STEPS_AT_MOST = 0.5, 0.5
# A fault with a free number must be nearer by this much than one without.
FREE = 0.03
WITH_A_NUMBER = ("too_few_steps", "variance_ratio", "input_scale", "input_shift", "channel_order")
# With fewer channels, a fault with a free number fits anything.
FEWEST_CHANNELS = 4
# Parts of a mixture that can be distinguished from no mixture.
PARTS = np.linspace(0.3, 0.97, 68)
# A ratio of variances is the same for all channels if its logarithm scatters less than this.
SCATTER = 0.2
# Ratios of variances above this, or below its inverse, do not occur in healthy training.
LARGE = 4.0
# If channels are reordered, nearly all have different nearest channels; otherwise two in three.
DIFFERENT = 0.8
# Range of the multiples of the variance that a count or a scale of pixels can cause.
RATIOS = (1e-7, 1e7)
# Padding must move means and variances by PADDED, and explain all but LEFT of the variances.
PADDED, LEFT_BY_PADDING, LEFT_BY_PADDING_AT_MOST = 0.25, 0.55, 0.25
# A damaged channel is this far off, in standard deviations, and the other channels are right.
DAMAGED = 1.5
# At most this part of the channels is damaged. With more, all are wrong.
MINORITY = 0.34


class Cause(NamedTuple):
    """A fault, the statistics that it predicts, and its numbers."""

    kind: str
    prediction: Known
    numbers: dict[str, float | str]


def cause_of(layer: Layer, others: Sequence[Layer], first: bool) -> Cause | None:
    """The fault that best explains why the running statistics differ from those of the batches."""
    assert layer.training is not None
    apart = level(layer.running, layer.training, layer.settings.epsilon)
    candidates = [*_candidates(layer, layer.training, others, first)]
    lefts = [_left(cause, layer) + FREE * (cause.kind in WITH_A_NUMBER) for cause in candidates]
    told = [pair for pair in zip(lefts, candidates, strict=True) if explains(pair[1], layer, apart)]
    if not told:
        return None
    _, best = min(told, key=lambda pair: pair[0])
    best.numbers["apart"] = apart
    return best


def explains(cause: Cause, layer: Layer, apart: float) -> bool:
    """Whether the fault leaves little of the distance unexplained."""
    chance = LEFT_BY_CHANCE * noise(layer)
    return _left(cause, layer) < min(apart / 2, max(LEFT * apart, LEFT_BY_DRIFT, chance))


def _left(cause: Cause, layer: Layer) -> float:
    """The distance that a fault leaves, in standard deviations of the batches."""
    return level(layer.running, cause.prediction, layer.settings.epsilon, _batch(layer).var)


def _candidates(
    layer: Layer, batch: Known, others: Sequence[Layer], first: bool
) -> Iterator[Cause]:
    running, epsilon = layer.running, layer.settings.epsilon
    if layer.evaluation is not None:
        yield Cause("evaluation_statistics", layer.evaluation, {})
    for words, known in _other_quantities(layer, batch).items():
        yield Cause("other_quantity", known, {"what": words})
    yield from _other_layers(layer, others)
    if len(running.mean) >= FEWEST_CHANNELS:
        yield from _reordered(running, batch, epsilon)
        yield too_few_steps([layer])[0]
        yield from rescaled(running, batch, epsilon)
        if first:
            yield from _shifted(running, batch, epsilon)


def in_all(layers: Sequence[Layer], limit: float) -> list[tuple[Layer, Cause]]:
    """The layers with the one fault that explains all of them, if there is one.

    Only layers that the fault brings nearer are returned. They must be the majority.
    """
    apart = _distance(layers, [_batch(layer) for layer in layers])
    options = [
        [Cause("other_quantity", known, {"what": words}) for known in predictions]
        for words, predictions in _quantities_of_all(layers).items()
    ]
    lefts = [_distance(layers, [cause.prediction for cause in causes]) for causes in options]
    bounds = [LEFT_IN_ALL * apart] * len(options)
    if (multiple := _multiple_in_all(layers)) is not None:
        options, bounds = [*options, multiple], [*bounds, LEFT * apart]
        lefts.append(_distance(layers, [cause.prediction for cause in multiple]) + FREE)
    if apart > limit:
        steps = too_few_steps(layers)
        left = _distance(layers, [cause.prediction for cause in steps])
        options, lefts = [*options, steps], [*lefts, left + FREE]
        bounds.append(min(LEFT_BY_STEPS * apart, LEFT_BY_STEPS_AT_MOST))
    best = int(np.argmin(lefts))
    chance = max(LEFT_BY_CHANCE * noise(layer) for layer in layers)
    if lefts[best] > bounds[best] or apart < max(chance, LEFT_BY_DRIFT / 2):
        return []
    told = [pair for pair in zip(layers, options[best], strict=True) if _nearer(*pair)]
    return told if 2 * len(told) > len(layers) else []


def _batch(layer: Layer) -> Known:
    assert layer.training is not None
    return layer.training


def _nearer(layer: Layer, cause: Cause) -> bool:
    return _distance([layer], [cause.prediction]) < _distance([layer], [_batch(layer)])


def _distance(layers: Sequence[Layer], known: Sequence[Known]) -> float:
    """The root mean square over the layers, in standard deviations of the batches."""
    levels = [
        level(layer.running, k, layer.settings.epsilon, _batch(layer).var)
        for layer, k in zip(layers, known, strict=True)
    ]
    return float(np.sqrt(np.mean(np.square(levels))))


def _quantities_of_all(layers: Sequence[Layer]) -> dict[str, list[Known]]:
    """The prediction of each faulty conversion for all layers, if it applies to all."""
    each = [_other_quantities(layer, _batch(layer)) for layer in layers]
    return {
        words: [known[words] for known in each]
        for words in each[0]
        if all(words in known for known in each)
    }


def _multiple_in_all(layers: Sequence[Layer]) -> list[Cause] | None:
    """The same multiple of all variances; in a single layer, the input scale would explain it."""
    logs = [np.log((v.running.var + TINY) / (_batch(v).var + TINY)) for v in layers]
    ratio = float(np.exp(np.median(np.concatenate(logs))))
    if len(layers) < 2 or not RATIOS[0] < ratio < RATIOS[1]:
        return None
    known = [_batch(layer) for layer in layers]
    what = f"{ratio:.3g} times the variance"
    return [
        Cause("other_quantity", Known(k.mean, ratio * k.var, None), {"what": what}) for k in known
    ]


def _other_quantities(layer: Layer, batch: Known) -> dict[str, Known]:
    """What a faulty conversion may have stored instead of the mean and the variance."""
    mean, var, count = batch
    root = np.sqrt(var + layer.settings.epsilon)
    zeros, ones = np.zeros_like(mean), np.ones_like(var)
    quantities = {
        "the standard deviation instead of the variance": (mean, np.sqrt(var)),
        "1/std instead of the variance": (mean, 1 / (root + TINY)),
        "1/variance instead of the variance": (mean, 1 / (np.square(root) + TINY)),
        "E[x²], from which the squared mean was not taken away": (mean, var + np.square(mean)),
        "the square of the variance": (mean, np.square(var)),
        "the logarithm of the variance": (mean, np.log(var + TINY)),
        "sums instead of means": (mean * (count or 1), var * (count or 1)),
        "the sum of squares instead of the variance": (mean, var * (count or 1)),
        "the mean and the variance interchanged": (var, np.abs(mean)),
        "the mean with the other sign": (-mean, var),
        "the variance, and no mean": (zeros, var),
        "the mean, and no variance": (mean, ones),
    }
    if layer.scale is not None and layer.bias is not None:
        quantities["`bias` and `scale` instead of mean and variance"] = (layer.bias, layer.scale)
    # A negative variance is a finding of its own.
    known = {words: Known(m, v, None) for words, (m, v) in quantities.items() if (v >= 0).all()}
    scatter = _scatter(layer.running, batch)
    return {words: k for words, k in known.items() if _scatter(layer.running, k) <= scatter + FREE}


def _scatter(running: Known, known: Known) -> float:
    """How much the ratio of variances differs between channels. The right conversion reduces it."""
    return float(np.std(np.log((running.var + TINY) / (known.var + TINY))))


def _other_layers(layer: Layer, others: Sequence[Layer]) -> Iterator[Cause]:
    """The statistics of another layer with as many channels."""
    for other in others:
        if other.training is not None and len(other.running.mean) == len(layer.running.mean):
            yield Cause("other_layer", other.training, {"layer": other.path})


def _reordered(running: Known, batch: Known, epsilon: float) -> Iterator[Cause]:
    """Each channel has the statistics of another: the nearest, and a different one for each."""
    order = nearest(running, batch, epsilon)
    if len(set(order)) >= DIFFERENT * len(order):
        moved = float(np.sum(order != np.arange(len(order))))
        prediction = Known(batch.mean[order], batch.var[order], None)
        if level(running, prediction, epsilon) < LEFT_BY_DRIFT:
            yield Cause("channel_order", prediction, {"channels": moved})


def nearest(
    running: Known, batch: Known, epsilon: float
) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
    """For each channel of `running`, the most similar channel of `batch`."""
    return np.array(
        [
            np.argmin(misfits(Known(mean, var, None), batch, epsilon))
            for mean, var in zip(running.mean[:, None], running.var[:, None], strict=True)
        ]
    )


def too_few_steps(layers: Sequence[Layer]) -> list[Cause]:
    """The part of the way from mean 0 and variance 1 to the batches that fits best, one for all."""
    ways, gone = [], []
    for layer in layers:
        mean, var, _ = _batch(layer)
        weights = 1 / np.sqrt(var + layer.settings.epsilon), 1 / np.maximum(var, 1)
        ways += [mean * weights[0], (var - 1) * weights[1]]
        gone += [layer.running.mean * weights[0], (layer.running.var - 1) * weights[1]]
    way, covered = np.concatenate(ways), np.concatenate(gone)
    part = float(np.clip(way @ covered / max(float(way @ way), TINY), 0, 1))
    known = [_batch(layer) for layer in layers]
    return [
        Cause("too_few_steps", Known(part * k.mean, 1 + part * (k.var - 1), None), {"part": part})
        for k in known
    ]


def rescaled(running: Known, batch: Known, epsilon: float) -> Iterator[Cause]:
    """All variances have one ratio to those of the batch. The means stay, follow, or both."""
    ratio = _common_ratio(running, batch, epsilon)
    if ratio is None or 1 / (1 + SCATTER) < ratio < 1 + SCATTER:
        return
    numbers: dict[str, float | str] = {"ratio": ratio, "scale": float(np.sqrt(ratio))}
    if 1 / LARGE < ratio < LARGE:
        yield Cause("variance_ratio", Known(batch.mean, batch.var / ratio, None), numbers)
    means = [batch.mean / np.sqrt(ratio)]
    if ratio > LARGE:  # a bias after the input is not scaled
        means.append(running.mean)
    yield from (Cause("input_scale", Known(m, batch.var / ratio, None), numbers) for m in means)


def _shifted(running: Known, batch: Known, epsilon: float) -> Iterator[Cause]:
    """The variances equal those of the batch, and the means differ."""
    ratio = _common_ratio(running, batch, epsilon)
    if ratio is not None and 1 / (1 + SCATTER) < ratio < 1 + SCATTER:
        yield Cause("input_shift", Known(running.mean, batch.var / ratio, None), {})


def _common_ratio(running: Known, batch: Known, epsilon: float) -> float | None:
    """The ratio of the batch variances to the running ones, if all channels share one ratio."""
    logs = np.log((batch.var + TINY) / (running.var + TINY))[batch.var > epsilon]
    if len(logs) < FEWEST_CHANNELS or logs.std() > SCATTER:
        return None
    ratio = float(np.exp(np.median(logs)))
    return ratio if RATIOS[0] < ratio < RATIOS[1] else None


def of_data(training: Known, evaluation: Known, epsilon: float) -> Iterator[Cause]:
    """Changes of the evaluation data that the training data do not have."""
    if len(training.mean) >= FEWEST_CHANNELS:
        yield from rescaled(training, evaluation, epsilon)
        yield from _shrunk(training, evaluation, epsilon)
        yield from _shifted(training, evaluation, epsilon)
        yield from _reordered(training, evaluation, epsilon)


def _shrunk(training: Known, evaluation: Known, epsilon: float) -> Iterator[Cause]:
    """The evaluation data are far smaller. Running statistics look so after an extreme batch."""
    ratio = _common_ratio(training, evaluation, epsilon)
    if ratio is not None and ratio < 1 / LARGE:
        prediction = Known(training.mean, evaluation.var / ratio, None)
        yield Cause("input_scale", prediction, {"scale": float(np.sqrt(ratio))})


def mask_between(running: Known, batch: Known, epsilon: float) -> Cause | None:
    """Padding in either the running statistics or the batch, but not in both."""
    if len(running.mean) < FEWEST_CHANNELS:
        return None
    return _padded("mask", running, batch, epsilon) or _padded(
        "mask_of_batches", batch, running, epsilon
    )


def _padded(kind: str, mixed: Known, alone: Known, epsilon: float) -> Cause | None:
    """Statistics of samples and padding together, against those of the samples alone.

    A part p of the values are samples. The rest is one number c for each channel:
    `mean = p·m + (1 − p)·c` and `var = p·v + p·(1 − p)·(m − c)²`. Eliminating c gives
    `var = p·v + p/(1 − p)·(mean − m)²`, which one p must satisfy in all channels.
    """
    apart = np.square(mixed.mean - alone.mean)
    variances = PARTS[:, None] * alone.var + (PARTS / (1 - PARTS))[:, None] * apart
    errors = np.square(np.log((variances + epsilon) / (mixed.var + epsilon))).mean(1)
    best = int(np.argmin(errors))
    before = np.square(np.log((alone.var + epsilon) / (mixed.var + epsilon))).mean()
    moved = np.mean(apart / (np.minimum(alone.var, mixed.var) + epsilon))
    left = min(LEFT_BY_PADDING**2 * before, LEFT_BY_PADDING_AT_MOST**2)
    if min(before, moved) < PADDED**2 or errors[best] > left:
        return None
    prediction = Known(mixed.mean, variances[best], None)
    return Cause(kind, prediction, {"part": float(1 - PARTS[best])})


def of_some_channels(layer: Layer) -> Cause | None:
    """A few channels are wrong, and all others are right."""
    batch = _batch(layer)
    distances = misfits(layer.running, batch, layer.settings.epsilon)
    off = distances > max(DAMAGED, 6 * noise(layer))
    numbers: dict[str, float | str] = {
        "channels": float(off.sum()),
        "which": ", ".join(map(str, np.flatnonzero(off)[:5])),
    }
    rest = np.sqrt(np.mean(np.square(distances[~off]))) if (~off).any() else np.inf
    if off.any() and off.mean() <= MINORITY and rest < DAMAGED / 4:
        return Cause("damaged_channels", batch, numbers)
    return None


def of_variances(layer: Layer) -> Cause | None:
    """The variances are far too large or far too small in most channels."""
    batch = _batch(layer)
    epsilon = layer.settings.epsilon
    ratio = (layer.running.var + epsilon) / (batch.var + epsilon)
    number: dict[str, float | str] = {"ratio": float(np.median(ratio))}
    if np.mean(ratio > LARGE) > 1 - MINORITY:
        return Cause("extreme_batch", batch, number)
    if np.mean(ratio < 1 / LARGE) > 1 - MINORITY:
        return Cause("small_variance", batch, number)
    return None
