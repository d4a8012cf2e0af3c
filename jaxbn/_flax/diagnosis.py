"""What a diagnosis needs of a model, whether Linen or NNX owns its layers."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxbn._diagnosis.layers import Settings

Module = Any  # of Linen or of NNX, with the fields of the same names that are read here


def settings_of(layer: Module, batch: Any, by_batch: tuple[bool | None, bool | None]) -> Settings:
    """The settings of a layer, momentum as the weight of the new batch."""
    torchs = hasattr(layer, "eps")
    momentum = layer.momentum
    if isinstance(momentum, jax.Array):
        momentum = None
    elif momentum is not None and not torchs:
        momentum = 1 - momentum
    return Settings(
        epsilon=float(layer.eps if torchs else layer.epsilon),
        momentum=None if momentum is None else float(momentum),
        samples=samples_in(batch),
        frozen=getattr(layer, "frozen", False),
        updates=getattr(layer, "update_stats", None) is not False,
        by_batch=by_batch,
    )


def samples_in(batch: Any) -> int | None:
    """The first dimension of the first array in a batch that has one."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
    return next((shape[0] for shape in shapes if shape), None)


def as_list(batches: Any) -> list[Any]:
    """The batches: an array, a tuple, a mapping or what is no iterable at all is one batch."""
    one = isinstance(batches, (tuple, Mapping)) or hasattr(batches, "shape")
    return [batches] if one or not isinstance(batches, Iterable) else list(batches)
