"""Kernels of linear layers: the order of their axes, their channels, groups and padding."""

import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxbn._checks import check_known_bool, checked_float
from jaxbn._types import Bool, Integer

# In the forms of `flax.linen.Conv`.
Padding = str | int | Sequence[int | tuple[int, int]]

FLAX_LAYOUTS = {2: "IO", 3: "WIO", 4: "HWIO", 5: "DHWIO"}
WITHOUT_ZEROS = ("VALID", "CIRCULAR", "REFLECT")
BY_SIZE = ("SAME", "SAME_LOWER", "CAUSAL")  # no padding if the kernel has one position


class LinearLayer(NamedTuple):
    """A linear layer: the shape of its kernel, a letter for each axis, and the groups of channels.

    The groups lie along the axis O, or along I in a transposed convolution.
    """

    shape: tuple[int, ...]
    layout: str
    groups: int = 1
    transposed: bool = False

    @property
    def spatial(self) -> tuple[int, ...]:
        """The sizes of the spatial axes."""
        return tuple(
            n for n, letter in zip(self.shape, self.layout, strict=True) if letter in "DHW"
        )

    @property
    def channels(self) -> tuple[int, int]:
        """The numbers of input and output channels."""
        inputs, outputs = (self.shape[axis] for axis in self._axes)
        return (
            (inputs, outputs * self.groups) if self.transposed else (inputs * self.groups, outputs)
        )

    @property
    def _axes(self) -> tuple[int, int]:
        return self.layout.index("I"), self.layout.index("O")

    def split(self, kernel: jax.Array) -> jax.Array:
        """`kernel` as `[..., groups, inputs of a group, outputs of a group]`."""
        kernel = jnp.moveaxis(kernel, self._axes, (-2, -1))
        *spatial, inputs, outputs = kernel.shape
        if self.transposed:
            return kernel.reshape(*spatial, self.groups, inputs // self.groups, outputs)
        kernel = kernel.reshape(*spatial, inputs, self.groups, outputs // self.groups)
        return jnp.moveaxis(kernel, -2, -3)

    def joined(self, parts: jax.Array) -> jax.Array:
        """The kernel from the `parts` that `split` returns."""
        parts = parts if self.transposed else jnp.moveaxis(parts, -3, -2)
        inputs, outputs = (self.shape[axis] for axis in self._axes)
        kernel = parts.reshape(*self.spatial, inputs, outputs)
        return jnp.moveaxis(kernel, (-2, -1), self._axes)


def checked_layer(
    shape: tuple[int, ...], layout: str, letters: str, groups: Integer = 1, transposed: Bool = False
) -> LinearLayer:
    """The layer with a kernel of this shape, whose spatial axes are some of `letters`."""
    letters_fit = (
        isinstance(layout, str)
        and len(layout) == len({*layout}) == len(shape)
        and {*"IO"} <= {*layout} <= {*"IO" + letters}
    )
    if not letters_fit:
        example = FLAX_LAYOUTS.get(len(shape) if letters else 2)
        raise ValueError(
            "`layout` must name each axis of `kernel` once: I for inputs, O for outputs"
            + (f", and one of {', '.join(letters)} for each axis in space" if letters else "")
            + f"; got layout={layout!r} for kernel.shape={shape}."
            + (f" Flax's is {example!r}." if example else "")
        )
    check_known_bool(transposed, "transposed")
    if not isinstance(groups, numbers.Integral) or isinstance(groups, bool) or groups < 1:
        raise ValueError(f"`feature_group_count` must be an int of at least 1; got {groups!r}.")
    letter = "I" if transposed else "O"
    size = shape[layout.index(letter)]
    if size % groups:
        raise ValueError(
            f"`feature_group_count` must divide the axis {letter} of the kernel of a "
            f"{'transposed ' if transposed else ''}convolution; got {groups} for kernel.shape="
            f"{shape}, where {letter} has size {size} in layout={layout!r}."
        )
    return LinearLayer(shape, layout, int(groups), bool(transposed))


def checked_channels(value: ArrayLike, name: str, layer: LinearLayer, before: Bool) -> jax.Array:
    """`value` as an array with one number for each input or output channel."""
    vector = checked_float(value, name)
    size, other = layer.channels if before else layer.channels[::-1]
    if vector.shape == (size,):
        return vector
    options = f"kernel.shape={layer.shape}, layout={layer.layout!r}"
    if layer.spatial:
        options += f", feature_group_count={layer.groups}, transposed={layer.transposed}"
    turned = name != "kernel_bias" and vector.shape == (other,)
    side = "before" if not before else "after"
    raise ValueError(
        f"`{name}` must have shape ({size},), one number for each channel that "
        f"{'enters' if before else 'leaves'} the linear layer; got {vector.shape} for {options}."
        + (f" For a batch norm {side} the layer pass before={not before}." if turned else "")
    )


def check_padding(padding: Padding | None, layer: LinearLayer, before: Bool) -> None:
    """Refuses padding between a batch norm and the convolution that it is folded into."""
    if padding is not None and (not before or layer.transposed):
        raise ValueError(
            "`padding` has an effect only if a batch norm comes before a convolution that is not "
            f"transposed; got padding={padding!r} with before={before}, "
            f"transposed={layer.transposed}. Leave it out."
        )
    pointwise = all(n == 1 for n in layer.spatial)
    if not before or (padding is None and pointwise):
        return
    if layer.transposed:
        raise ValueError(
            "A batch norm before a transposed convolution can be folded only into a kernel of one "
            "position (at stride 1): otherwise the number of inputs per output, and so the share "
            "of the batch norm's bias, differs between positions; got "
            f"kernel.shape={layer.shape}. Leave this batch norm as it is."
        )
    if not _without_zeros(padding, len(layer.spatial), pointwise):
        raise ValueError(
            "`padding` must be given if a batch norm comes before a convolution, and must add no "
            f"zeros: {', '.join(WITHOUT_ZEROS)} or pads of 0; got {padding!r} for "
            f"kernel.shape={layer.shape}. The layer pads normalized values. After folding, it "
            "would pad values before normalization, where zero means another value. Leave this "
            "batch norm as it is."
        )


def _without_zeros(padding: Any, rank: int, pointwise: bool) -> bool:
    if isinstance(padding, str):
        return padding.upper() in (*WITHOUT_ZEROS, *(BY_SIZE if pointwise else ()))
    pads = [padding] * rank if isinstance(padding, numbers.Integral) else padding
    if not isinstance(pads, Sequence) or len(pads) != rank:
        return False
    sides = [side for pad in pads for side in (pad if isinstance(pad, Sequence) else (pad,))]
    return all(isinstance(side, numbers.Integral) and side <= 0 for side in sides)
