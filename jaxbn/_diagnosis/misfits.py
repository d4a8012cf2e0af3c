"""The distance between two sets of moments, and the distance that chance explains."""

import numpy as np

from jaxbn._diagnosis.layers import TINY, Array, Known, Layer

# A layer is wrong above this distance, in standard deviations, plus the distance that chance
# explains. Healthy networks with moving weights measure up to 0.2.
LIMIT = 0.35
# The distance of a channel counts at most this much, so that no single channel decides.
CLIPPED = 3.0
# Part of the variance of one batch's noise that remains in a running average with the common
# momentum of 0.1: momentum/(2 − momentum).
AVERAGED = 0.05


def misfits(claimed: Known, actual: Known, epsilon: float, unit: Array | None = None) -> Array:
    """The distance of each channel, from means (in standard deviations) and log deviations.

    The unit is the smaller standard deviation, or that of the variance `unit`. A constant channel
    has none, so only its mean counts.
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
    """The distance of a whole layer: the root mean square over channels, each clipped."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        distances = misfits(claimed, actual, epsilon, unit)
    distances = np.where(np.isfinite(distances), distances, CLIPPED)
    return float(np.sqrt(np.mean(np.square(np.minimum(distances, CLIPPED)))))


def noise(layer: Layer) -> float:
    """The distance between running statistics and those of the batches that chance explains.

    A mean of n samples varies by 1/n of their variance, and the log of their standard deviation by
    1/2n. All positions of a sample are assumed to be equal, which is the worst case.
    """
    samples = max(layer.samples, 1.0)
    return float(np.sqrt(1.5 / samples * (1 / max(len(layer.batches), 1) + AVERAGED)))
