"""The mapping of entries of a `state_dict` to variables of a Flax model, and their shapes."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxbn.torch._tensors import torch_axes

Shape = tuple[int, ...]
Path = tuple[Any, ...]  # of names, and numbers in lists of NNX

# In torch's order: the collection of each entry, and the names that its variable may have.
ENTRIES = {
    "weight": ("params", ("scale", "kernel", "embedding", "negative_slope")),
    "bias": ("params", ("bias",)),
    "running_mean": ("batch_stats", ("mean",)),
    "running_var": ("batch_stats", ("var",)),
    "num_batches_tracked": ("batch_stats", ("count",)),
}
DIMENSIONS = {"kernel": (2, 5), "embedding": (2, 2), "negative_slope": (0, 0), "count": (0, 0)}
# Layers that a weight of 1, 2 or 3 dimensions may belong to. A bias settles 1 and 2, but not 3.
AMBIGUOUS = {
    1: "a norm without bias or a PReLU",
    2: "a dense layer without bias or an embedding",
    3: "a Conv1d, a ConvTranspose1d that `transposed` lacks or a Bilinear",
}


class NamedLayer(NamedTuple):
    """A torch module and its Flax module."""

    name: str  # in `names`
    prefix: str  # of its keys
    path: tuple[str, ...]  # in each collection
    transposed: bool


class Slot(NamedTuple):
    """The variable for an entry."""

    path: Path  # collection, modules, variable
    shape: Shape  # in torch's layout
    transposed: bool


def named_layers(
    prefix: str, names: Mapping[str, str] | None, transposed: Collection[str]
) -> list[NamedLayer]:
    """The layers listed in `names`, or the only layer, which has no name."""
    names, transposed = {"": ""} if names is None else names, set(transposed)
    if not isinstance(names, Mapping) or not all(isinstance(p, str) for p in names.values()):
        raise TypeError(
            "`names` must map torch module names to paths of Flax modules, for example "
            f"{{'layer1.0.bn1': 'layer1_0/bn1'}}; got {names!r}."
        )
    unknown = sorted(transposed - names.keys())
    if unknown:
        raise ValueError(f"`transposed` must hold keys of `names`; got {unknown}.")
    if wrong := [name for name in names if name.endswith(".")]:
        raise ValueError(f"The keys of `names` must not end in a dot; got {wrong}.")
    paths = list(names.values())
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise ValueError(
            f"`names` must give each layer a path of its own; got twice: {twice}. Of modules that "
            "share their weights name one, and leave the entries of the others out."
        )
    return [
        NamedLayer(
            name,
            prefix + name + "." if name else prefix,
            tuple(path.split("/")) if path else (),
            name in transposed,
        )
        for name, path in names.items()
    ]


def leaves(tree: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The paths and values of the variables."""
    for name, value in tree.items():
        inner = (*path, name)
        if isinstance(value, Mapping):
            yield from leaves(value, inner)
        elif hasattr(value, "unbox"):
            raise TypeError(
                f"`{joined(inner)}` must be an array; got {type(value).__name__}, a box. Take all "
                "out of their boxes first, with flax.linen.meta.unbox(variables)."
            )
        else:
            yield inner, value


def joined(path: Path) -> str:
    """A path in the form that `names` uses."""
    return "/".join(map(str, path))


def checked_collections(variables: Any) -> dict[str, Mapping[Any, Any]]:
    """The collections `params` and `batch_stats` of the variables that a model's `init` returns."""
    mapping = isinstance(variables, Mapping)
    if not mapping or (variables and not {"params", "batch_stats"} & variables.keys()):
        given = sorted(map(str, variables)) if mapping else type(variables).__name__
        raise (ValueError if mapping else TypeError)(
            "`variables` must be what the model's init returns, with the collections params and "
            f"batch_stats; got {given}. Of an NNX model pass {{'params': nnx.state(model, "
            "nnx.Param), 'batch_stats': nnx.state(model, nnx.BatchStat)}."
        )
    trees = {name: variables.get(name, {}) for name in ("params", "batch_stats")}
    for name, tree in trees.items():
        if not isinstance(tree, Mapping):
            raise TypeError(f"`{name}` must be nested dicts of arrays; got {type(tree).__name__}.")
    return trees


def slots_of_variables(
    layers: list[NamedLayer], variables: Mapping[str, Any]
) -> tuple[dict[str, Slot], list[str]]:
    """The slots of a model, and the paths of the variables that no layer has."""
    shapes = {path: np.shape(value) for path, value in leaves(checked_collections(variables))}
    paths = {tuple(map(str, path)): path for path in shapes}
    slots = {}
    for layer in layers:
        for entry, (collection, names) in ENTRIES.items():
            asked = [(collection, *layer.path, name) for name in names]
            for path in [paths[strings] for strings in asked if strings in paths][:1]:
                shape = _torch_shape(path, shapes[path], layer)
                slots[layer.prefix + entry] = Slot(path, shape, layer.transposed)
    covered = {slot.path for slot in slots.values()}
    return slots, [f'"{joined(path)}"' for path in shapes if path not in covered]


def _torch_shape(path: Path, shape: Shape, layer: NamedLayer) -> Shape:
    """The shape in torch's layout of a variable of this path and shape."""
    *_, module, name = path
    _check_dimensions(joined(path), name, len(shape), layer.transposed)
    if name == "negative_slope":
        return (1,)
    if name != "kernel":
        return shape
    if re.fullmatch(r"ConvTranspose_\d+", str(module)) and not layer.transposed:
        raise ValueError(
            f"`transposed` must hold the names of all transposed convolutions; it lacks "
            f"{layer.name!r}, whose Flax module is {module}."
        )
    return tuple(shape[i] for i in torch_axes(len(shape), layer.transposed))


def slots_of_entries(layers: list[NamedLayer], entries: Mapping[str, Any]) -> dict[str, Slot]:
    """The slots of a dict without `variables`: each layer has the entries of a torch module."""
    slots, ambiguous = {}, []
    for layer in layers:
        shapes = {
            entry: entries[layer.prefix + entry].shape
            for entry in ENTRIES
            if layer.prefix + entry in entries
        }
        for entry, shape in _shapes_of_module(shapes, layer.transposed).items():
            collection, names = ENTRIES[entry]
            name = "kernel" if entry == "weight" and len(shape) > 1 else names[0]
            if entry in shapes:
                _check_dimensions(layer.prefix + entry, name, len(shape), layer.transposed)
            path = (collection, *layer.path, name)
            slots[layer.prefix + entry] = Slot(path, shape, layer.transposed)
        ndim = len(shapes.get("weight", ()))
        of_norm = shapes.keys() - {"weight", "bias"}
        alone = "bias" not in shapes or (ndim == 3 and len(shapes["bias"]) == 1)
        if ndim in AMBIGUOUS and alone and not layer.transposed and not of_norm:
            key = f'"{layer.prefix}weight" of shape {shapes["weight"]}'
            ambiguous.append(f"{key}: {AMBIGUOUS[ndim]}")
    paths = {slot.path for slot in slots.values()}
    inside = [joined(p) for p in paths if any(p[:i] in paths for i in range(len(p)))]
    if inside:
        raise ValueError(f"`names` must not put a layer inside of a variable; got {inside}.")
    if ambiguous:
        raise ValueError(
            "Without `variables` the kinds of these layers are unknown. Pass what the model's init "
            "returns, or jax.eval_shape of it.\n\t" + "\n\t".join(ambiguous)
        )
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
    """Refuses a number of dimensions that variables of this name do not have."""
    fewest, most = DIMENSIONS.get(name, (1, 1))
    if transposed and name in ENTRIES["weight"][1]:
        fewest, most = 3, 5
    if not fewest <= ndim <= most:
        kind = "the weight of a transposed convolution" if transposed else f"a {name}"
        needed = f"{fewest}" if fewest == most else f"{fewest} to {most}"
        raise ValueError(f"`{owner}` must have ndim {needed} as {kind}; got {ndim}.")
