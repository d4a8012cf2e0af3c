"""Passes over a data set that replace running statistics, whether Linen or NNX owns them."""

import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxbn._flax.moments import Layers, as_samples, averaged, replaced, total
from jaxbn._types import Number

# The moments of a batch in the layers with these running statistics. The second argument and result
# is the state that the model carries from batch to batch.
Collect = Callable[[Layers, Any, Any], tuple[Layers, Any]]
Callback = Callable[[int, int], object]


def recalibrated(
    collect: Collect,
    carry: Any,
    old: Layers,
    batches: Iterable[Any],
    *,
    sequential: bool,
    average: bool,
    prior: Number,
    callback: Callback | None,
) -> Layers:
    """The running statistics of each layer over a data set."""
    _check_options(batches, sequential, average, prior)
    passes = 1
    if sequential:  # one for each layer, stacked or not; a last one finds that nothing changes
        passes += sum(math.prod(jnp.shape(v["mean"])[:-1]) for v in old.values())
    new = old
    for i in range(passes):
        parts = _of_batches(collect, carry, new, batches, callback, i)
        if average:
            parts = map(partial(_samples, new), parts)
        whole, number = total(parts)
        if not number:
            raise ValueError("`batches` must hold at least one batch; got none.")
        last, new = new, _statistics(old, whole, number, average=average, prior=prior)
        if sequential and not _traced(new) and _equal(last, new):
            break
    if not _traced(new):
        _check_known(new, whole, least=1 if average else 2)
    return new


def _of_batches(
    collect: Collect,
    carry: Any,
    running: Layers,
    batches: Iterable[Any],
    callback: Callback | None,
    passes: int,
) -> Iterator[Layers]:
    """The moments of each batch, in one pass over the data set."""
    last: Layers = {}
    for done, batch in enumerate(batches, 1):
        moments, carry = collect(running, carry, batch)
        yield moments
        if not _traced(last):
            jax.block_until_ready(last)  # so that at most two batches are on the device
        last = moments
        if callback:
            callback(done, passes)


@jax.jit
def _samples(running: Layers, moments: Layers) -> Layers:
    return {name: as_samples(running[name], v) for name, v in moments.items()}


@partial(jax.jit, static_argnames=("average", "prior"))
def _statistics(
    old: Layers, whole: Layers, batches: int, *, average: bool, prior: Number
) -> Layers:
    replace = averaged if average else partial(replaced, prior=prior)
    return {name: replace(old[name], v, batches) for name, v in whole.items()}


def _traced(tree: Any) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


@jax.jit
def _equal(first: Layers, second: Layers) -> jax.Array:
    """Whether statistics are equal to the last bit."""
    same = [
        jnp.array_equal(first[layer][name], second[layer][name], equal_nan=True)
        for layer in first
        for name in ("mean", "var")
    ]
    return jnp.stack(same).all()


@jax.jit
def _complete(new: Layers, whole: Layers, least: int) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Whether each layer's statistics are finite, and whether each channel had enough values."""
    return {
        name: (
            jnp.isfinite(v["mean"]).all() & jnp.isfinite(v["var"]).all(),
            (whole[name]["count"] >= least).all(),
        )
        for name, v in new.items()
    }


def _check_options(batches: Any, sequential: bool, average: bool, prior: Number) -> None:
    """Refuses options and batches that do not fit together."""
    if not isinstance(prior, numbers.Real) or not 0 <= prior < math.inf:
        raise ValueError(
            "`prior` must be a number of batches, at least 0, that the old statistics count as; "
            f"got {prior!r}."
        )
    if average and prior:
        raise ValueError(
            "`prior` mixes the moments of all samples with the old statistics, and average=True "
            f"keeps no moments; got prior={prior}. Leave one of them out."
        )
    if isinstance(batches, Mapping) or hasattr(batches, "shape"):
        raise TypeError(
            "`batches` must be an iterable of batches; got one batch, a "
            f"{type(batches).__name__}. Pass it in a list."
        )
    if not isinstance(batches, Iterable):
        raise TypeError(f"`batches` must be iterable; got {type(batches).__name__}.")
    if sequential and isinstance(batches, Iterator):
        raise TypeError(
            "`batches` must start anew for each pass with sequential=True; got a "
            f"{type(batches).__name__}, which runs once. Pass a list, or an object whose __iter__ "
            "makes a new iterator."
        )


def _check_known(new: Layers, whole: Layers, least: int) -> None:
    """Refuses statistics that the data set does not determine."""
    complete = _complete(new, whole, least)
    bad = {name: enough for name, (finite, enough) in complete.items() if not finite}
    few = [name for name, enough in bad.items() if not enough]
    if few:
        raise ValueError(
            "Each batch norm must get at least two values per channel; got fewer for "
            f"{listed(few)}. Use `where` to exclude layers that are frozen, have "
            "update_stats=False, are not called, or belong to another library. In `nn.scan` and "
            'other lifted transforms, name the collection: variable_axes={"batch_moments": 0}.'
        )
    if bad:
        raise ValueError(
            "Each batch norm must get finite values; got NaN or infinity in the input of "
            f"{listed(bad)}. With skip_nonfinite=True, a layer ignores such batches."
        )


def check_mode(name: str, by_batch: bool | None, train: bool) -> None:
    """Refuses a model that chooses the mode of a batch norm itself."""
    if by_batch is not None and by_batch != train:
        asked, got = ("training", "inference") if train else ("inference", "training")
        raise ValueError(
            f"A model must be in {asked} mode to be recalibrated with sequential={not train}; "
            f"{listed([name])} was called in {got} mode. Pass the mode on to its batch norms."
        )


def listed(names: Iterable[str]) -> str:
    """The names of layers in a message."""
    return ", ".join(repr(name) if name else "the model itself" for name in names) or "none"
