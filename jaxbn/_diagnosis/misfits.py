"""How far two sets of moments are apart, and how far they may be by chance."""

import numpy as np

from jaxbn._diagnosis.layers import TINY, Array, Known, Layer

# A layer is off from this distance on, in standard deviations, beside what chance explains:
# healthy networks whose weights still move measure up to 0.2.
LIMIT = 0.35
# Distances of a channel count at most so much, lest one channel decides for all.
CLIPPED = 3.0
# What a running average by the common momentum of 0.1 has left of the noise of one batch:
# momentum/(2 − momentum) of its variance.
AVERAGED = 0.05


def misfits(claimed: Known, actual: Known, epsilon: float, unit: Array | None = None) -> Array:
    """The distance of each channel: of the means in standard deviations, and of log deviations.

    The deviation is the smaller one, or that of the variance `unit`. A channel that is constant has
    none: there the mean alone counts.
    """
    smaller = np.minimum(claimed.var, actual.var) if unit is None else unit
    deviation = smaller + epsilon + TINY
    logs = np.log((claimed.var + epsilon + TINY) / (actual.var + epsilon + TINY)) / 2
    means = claimed.mean - actual.mean
    constant = actual.var < epsilon / 10
    by_both = np.square(means) / deviation + np.square(logs)
    by_mean = np.square(means) / (claimed.var + epsilon + TINY)
    return np.sqrt(np.where(constant, by_mean, by_both))


def level(claimed: Known, actual: Known, epsilon: float, unit: Array | None = None) -> float:
    """The distance of a whole layer: the root of the mean square over channels, each clipped."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        distances = misfits(claimed, actual, epsilon, unit)
    distances = np.where(np.isfinite(distances), distances, CLIPPED)
    return float(np.sqrt(np.mean(np.square(np.minimum(distances, CLIPPED)))))


def noise(layer: Layer) -> float:
    """The distance that chance alone gives between running statistics and those of the batches.

    A mean of n samples varies by 1/n of their variance, and the logarithm of their standard
    deviation by 1/2n. All positions of a sample are taken to be alike, the worst case.
    """
    samples = max(layer.samples, 1.0)
    return float(np.sqrt(1.5 / samples * (1 / max(len(layer.batches), 1) + AVERAGED)))
