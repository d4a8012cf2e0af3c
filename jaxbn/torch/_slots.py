"""Which entry of a `state_dict` is which variable of a Flax model, and in what shape."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxbn.torch._tensors import torch_axes

Shape = tuple[int, ...]
Path = tuple[str, ...]

# In torch's order: the collection of each entry, and the names that its variable may have.
ENTRIES = {
    "weight": ("params", ("scale", "kernel")),
    "bias": ("params", ("bias",)),
    "running_mean": ("batch_stats", ("mean",)),
    "running_var": ("batch_stats", ("var",)),
    "num_batches_tracked": ("batch_stats", ("count",)),
}


class NamedLayer(NamedTuple):
    """A torch module and its Flax module."""

    prefix: str  # of its keys
    path: Path  # in each collection
    transposed: bool


class Slot(NamedTuple):
    """The variable of an entry."""

    path: Path  # collection, modules, variable
    shape: Shape  # in torch's layout
    transposed: bool


def named_layers(
    prefix: str, names: Mapping[str, str] | None, transposed: Collection[str]
) -> list[NamedLayer]:
    """The layers that `names` lists, or the only one, which has no name."""
    names, transposed = {"": ""} if names is None else names, set(transposed)
    if not isinstance(names, Mapping) or not all(isinstance(p, str) for p in names.values()):
        raise TypeError(
            "`names` must map torch module names to paths of Flax modules, for example "
            f"{{'layer1.0.bn1': 'layer1_0/bn1'}}; got {names!r}."
        )
    unknown = sorted(transposed - names.keys())
    if unknown:
        raise ValueError(f"`transposed` must hold keys of `names`; got {unknown}.")
    paths = list(names.values())
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise ValueError(f"`names` must give each layer a path of its own; got twice: {twice}.")
    return [
        NamedLayer(
            prefix + name + "." if name else prefix,
            tuple(path.split("/")) if path else (),
            name in transposed,
        )
        for name, path in names.items()
    ]


def leaves(tree: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The paths and values of the variables."""
    for name, value in tree.items():
        inner = (*path, str(name))  # a number in lists of nnx
        if isinstance(value, Mapping):
            yield from leaves(value, inner)
        else:
            yield inner, value


def slots_of_variables(
    layers: list[NamedLayer], variables: Mapping[str, Any]
) -> tuple[dict[str, Slot], list[str]]:
    """What a model asks for, and the paths of the variables that no layer has."""
    trees = {name: variables.get(name, {}) for name in ("params", "batch_stats")}
    if variables and not any(name in variables for name in trees):
        raise ValueError(
            "`variables` must be what the model's init returns, with the collections params and "
            f"batch_stats; got {sorted(variables)}."
        )
    shapes = {path: np.shape(value) for path, value in leaves(trees)}
    slots = {}
    for layer in layers:
        for entry, (collection, names) in ENTRIES.items():
            paths = [(collection, *layer.path, name) for name in names]
            for path in [path for path in paths if path in shapes][:1]:
                shape = shapes[path]
                _check_dimensions("/".join(path), path[-1], len(shape), layer.transposed)
                if path[-1] == "kernel":
                    shape = tuple(shape[i] for i in torch_axes(len(shape), layer.transposed))
                slots[layer.prefix + entry] = Slot(path, shape, layer.transposed)
    covered = {slot.path for slot in slots.values()}
    return slots, [f'"{"/".join(path)}"' for path in shapes if path not in covered]


def slots_of_entries(layers: list[NamedLayer], entries: Mapping[str, Any]) -> dict[str, Slot]:
    """What a dict asks of itself: each layer has entries, and they are of one module of torch."""
    slots = {}
    for layer in layers:
        shapes = {
            entry: entries[layer.prefix + entry].shape
            for entry in ENTRIES
            if layer.prefix + entry in entries
        }
        for entry, shape in _shapes_of_module(shapes, layer.transposed).items():
            collection, names = ENTRIES[entry]
            name = names[-1] if len(shape) > 1 else names[0]
            if entry in shapes:
                _check_dimensions(layer.prefix + entry, name, len(shape), layer.transposed)
            path = (collection, *layer.path, name)
            slots[layer.prefix + entry] = Slot(path, shape, layer.transposed)
    paths = {slot.path for slot in slots.values()}
    inside = ["/".join(p) for p in paths if any(p[:i] in paths for i in range(len(p)))]
    if inside:
        raise ValueError(f"`names` must not put a layer inside of a variable; got {inside}.")
    return slots


def _shapes_of_module(shapes: Mapping[str, Shape], transposed: bool) -> dict[str, Shape]:
    """The entries, and their shapes, of the torch module that comes closest to these."""
    demanded = {"weight"} if "bias" in shapes or not shapes else set()
    if shapes.keys() & {"running_mean", "running_var", "num_batches_tracked"}:
        demanded |= {"running_mean", "running_var"}
        vector = next((shape[:1] for shape in shapes.values() if shape), (1,))
        expected = dict.fromkeys(ENTRIES, vector) | {"num_batches_tracked": ()}
    else:
        weight = shapes.get("weight", ())
        bias = weight[1:2] if transposed else weight[:1]
        expected = {"weight": weight, "bias": bias if weight else shapes.get("bias", ())}
    return {entry: expected[entry] for entry in ENTRIES if entry in demanded | shapes.keys()}


def _check_dimensions(owner: str, name: str, ndim: int, transposed: bool) -> None:
    fewest, most = {"kernel": (2, 5), "count": (0, 0)}.get(name, (1, 1))
    if transposed and name in ("scale", "kernel"):
        fewest, most = 3, 5
    if not fewest <= ndim <= most:
        kind = "the weight of a transposed convolution" if transposed else f"a {name}"
        needed = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        raise ValueError(f"`{owner}` must have ndim {needed} as {kind}; got {ndim}.")
