"""What a diagnosis needs from a model, whether Linen or NNX owns its layers."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import jax
import numpy as np

from jaxbn._diagnosis.layers import Settings
from jaxbn._flax.layer import Module, epsilon_of, weight_of_batch


def settings_of(layer: Module, batch: Any, by_batch: tuple[bool | None, bool | None]) -> Settings:
    """The settings of a layer, with momentum as the weight of the new batch."""
    momentum = weight_of_batch(layer)
    unknown = momentum is None or isinstance(momentum, jax.Array)
    return Settings(
        epsilon=float(epsilon_of(layer)),
        momentum=None if unknown else float(cast(float, momentum)),
        samples=samples_in(batch),
        frozen=getattr(layer, "frozen", False),
        updates=getattr(layer, "update_stats", None) is not False,
        by_batch=by_batch,
    )


def samples_in(batch: Any) -> int | None:
    """The first dimension of the first array in a batch that has dimensions."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
    return next((shape[0] for shape in shapes if shape), None)


def as_list(batches: Any) -> list[Any]:
    """The batches as a list. An array, a tuple, a mapping or a non-iterable is one batch."""
    one = isinstance(batches, (tuple, Mapping)) or hasattr(batches, "shape")
    return [batches] if one or not isinstance(batches, Iterable) else list(batches)
