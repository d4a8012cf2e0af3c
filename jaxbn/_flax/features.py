"""Several channel axes as one, for Flax's `BatchNorm`, which accepts a tuple of axes."""

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn._activation import Activation, is_own
from jaxbn._checks import checked_axis
from jaxbn._types import Integer


def feature_axes(axis: Integer | Sequence[Integer], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The channel axes of an input of this shape, counted from the front, in ascending order."""
    axes = axis if isinstance(axis, (tuple, list)) else (axis,)
    if not axes:
        raise ValueError(f"`axis` must name at least one channel axis of `x`; got {axis!r}.")
    return tuple(sorted({checked_axis(shape, one) for one in axes}))


class Features(NamedTuple):
    """Moves the channel axes of an array to the end and merges them into one, and back."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def ends(self) -> tuple[int, ...]:
        """The places of the channel axes at the end."""
        return tuple(range(-len(self.axes), 0))

    def flat(self, value: ArrayLike) -> jax.Array:
        """`value`, which broadcasts against `shape`, with one channel axis at its end."""
        value = jnp.moveaxis(jnp.broadcast_to(jnp.asarray(value), self.shape), self.axes, self.ends)
        rest = len(self.shape) - len(self.axes)
        return value.reshape(*value.shape[:rest], math.prod(value.shape[rest:]))

    def flat_vector(self, value: jax.Array) -> jax.Array:
        """A scale or bias of the channel axes, or of each sample, with one channel axis."""
        samples = value.shape[: value.ndim - len(self.axes)]
        return value.reshape(*samples, -1)

    def wrapped(self, activation: str | Activation | None) -> str | Activation | None:
        """An activation for flat arrays; the user's own function sees the original shape."""
        if not is_own(activation):
            return activation
        own = cast(Activation, activation)
        return lambda z: self.flat(own(self.restored(z)))

    def restored(self, value: jax.Array) -> jax.Array:
        """Inverts `flat`."""
        features = [self.shape[axis] for axis in self.axes]
        return jnp.moveaxis(value.reshape(*value.shape[:-1], *features), self.ends, self.axes)
