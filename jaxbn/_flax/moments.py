"""Moments of whole models: how they start, merge, and become running statistics."""

from collections.abc import Callable, Iterable
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn._checks import statistics_dtype
from jaxbn._flax.layer import Vectors, batch_stats_of
from jaxbn._moments import Moments, merge_moments
from jaxbn._stats import BatchStats, update_batch_stats
from jaxbn._types import Number

Layers = dict[str, Vectors]  # by path


def empty_moments(running: Vectors) -> Vectors:
    """The moments of no samples, for a layer with these running statistics."""
    mean = jnp.real(running["mean"])
    zeros = jnp.zeros_like(mean, statistics_dtype(mean.dtype))
    return Moments(zeros, zeros, zeros)._asdict()


def updated(
    running: Vectors, moments: Vectors, momentum: ArrayLike | None, std_epsilon: Number | None
) -> Vectors:
    """Running statistics after the moments of one batch, if the batch has any values."""

    def update(stats: BatchStats, moments: Moments, unbiased: bool) -> BatchStats:
        new = update_batch_stats(
            stats, moments, momentum=momentum, unbiased=unbiased, std_epsilon=std_epsilon
        )
        seen = (moments.count > 0).any()
        return BatchStats._make(map(partial(jnp.where, seen), new, stats))

    return _by_vector(update, running, moments)


def replaced(running: Vectors, moments: Vectors, batches: int, prior: Number) -> Vectors:
    """The statistics of a whole data set. The old ones count as `prior` batches of it.

    They are NaN in channels with fewer than two values, where they are unknown.
    """

    def replace(stats: BatchStats, moments: Moments, unbiased: bool) -> BatchStats:
        if prior:
            known = Moments(stats.mean, stats.var, moments.count * (prior / batches))
            moments = merge_moments(known, moments)
        new = update_batch_stats(_fresh(stats), moments, momentum=None, unbiased=unbiased)
        mean, var = (jnp.where(moments.count > 1, v, jnp.nan) for v in new[:2])
        return BatchStats(mean, var, jnp.full_like(new.count, batches))

    return _by_vector(replace, running, moments)


def as_samples(running: Vectors, moments: Vectors) -> Vectors:
    """The statistics after one batch as one sample of each. Merging them averages over batches."""

    def replace(stats: BatchStats, moments: Moments, unbiased: bool) -> BatchStats:
        return update_batch_stats(_fresh(stats), moments, momentum=None, unbiased=unbiased)

    new = _by_vector(replace, running, moments)
    samples = jnp.stack([new["mean"], new["var"]])
    enough = jnp.stack([moments["count"] > 0, moments["count"] > int("count" in running)])
    return Moments(samples, jnp.zeros_like(samples), enough.astype(samples.dtype))._asdict()


def averaged(running: Vectors, samples: Vectors, batches: int) -> Vectors:
    """The average of the statistics after each batch; NaN if there were none."""
    mean, var = jnp.where(samples["count"] > 0, samples["mean"], jnp.nan)
    count = {name: jnp.full_like(v, batches) for name, v in running.items() if name == "count"}
    return {"mean": mean, "var": var, **count}


@jax.jit
def merged(first: Layers, second: Layers) -> Layers:
    """The merged moments of each layer."""

    def merge(first: Vectors, second: Vectors) -> Vectors:
        flat = (Moments(**jax.tree.map(jnp.ravel, v)) for v in (first, second))
        new = merge_moments(*flat)._asdict()
        return {name: v.reshape(first[name].shape) for name, v in new.items()}

    return {name: merge(moments, second[name]) for name, moments in first.items()}


def total(parts: Iterable[Layers]) -> tuple[Layers, int]:
    """All moments merged, and the number of parts.

    Sums of equally many parts are merged with each other, so that each part takes few roundings.
    """
    sums: list[tuple[Layers, int]] = []  # of 2ᵏ parts each, with decreasing k
    for part in parts:
        number = 1
        while sums and sums[-1][1] == number:
            part, number = merged(sums.pop()[0], part), 2 * number
        sums.append((part, number))
    whole, number = sums.pop() if sums else ({}, 0)
    while sums:
        part, others = sums.pop()
        whole, number = merged(part, whole), number + others
    return whole, number


def _fresh(stats: BatchStats) -> BatchStats:
    """Statistics before the first batch, with the shapes and dtypes of `stats`."""
    return BatchStats._make(map(jnp.zeros_like, stats))


def _by_vector(
    function: Callable[[BatchStats, Moments, bool], BatchStats], running: Vectors, moments: Vectors
) -> Vectors:
    """Applies a function of vectors to the variables of a layer, of any shape, stacked or not."""
    if jnp.ndim(running.get("count", 0)):  # of several layers, as `nn.scan` stacks them
        return jax.vmap(partial(_by_vector, function))(running, moments)
    flat = {name: jnp.reshape(v, -1) for name, v in running.items() if name != "count"}
    stats = batch_stats_of(running | flat)
    assert stats is not None
    of_batch = Moments(**jax.tree.map(jnp.ravel, moments))
    new = function(stats, of_batch, "count" in running)._asdict()
    return {name: new[name].reshape(jnp.shape(old)) for name, old in running.items()}
