"""The `names` of a model, found by comparing both sides."""

import os
import re
from collections import defaultdict
from collections.abc import Collection, Container, Mapping
from typing import Any

import numpy as np

from jaxbn.torch._causes import check_not_nested, check_supported, onnx_hint, statistics_hint
from jaxbn.torch._matching import (
    Kind,
    Layer,
    Layers,
    agreeing,
    anchored,
    kinds,
    orders,
    unoriented,
    ways,
)
from jaxbn.torch._slots import (
    ENTRIES,
    Shape,
    checked_collections,
    joined,
    leaves,
    named_layers,
    slots_of_variables,
)
from jaxbn.torch._tensors import opened, unwrapped


class Names(dict[str, str]):
    """The `names` of a model: a dict of torch module names and paths of Flax modules.

    Attributes:
      guessed: the items that were found by shape and order, not by name.
    """

    guessed: dict[str, str]

    def __init__(self, names: Mapping[str, str], guessed: Collection[tuple[str, str]]) -> None:
        """`guessed` are items of `names`."""
        super().__init__(names)
        self.guessed = {name: path for name, path in names.items() if (name, path) in guessed}


def match_names(
    state_dict: Mapping[str, Any] | str | os.PathLike[str],
    variables: Mapping[str, Any],
    prefix: str = "",
    *,
    known: Mapping[str, str] | None = None,
    transposed: Collection[str] | None = None,
) -> Names:
    """Finds the `names` for `from_state_dict`: the path of the Flax module of each torch module.

    Names come first. They agree if their words and numbers agree: `layer1.0.bn1` is `layer1_0/bn1`,
    `layer1/0/bn1` (a list of NNX) or `layer1/layers_0/bn1` (`nn.Sequential`). A common beginning of
    all names of one side, such as `model.`, is ignored. A number agrees only if both sides have the
    same numbers in its place: 0, 2, 4 do not agree with 0, 1, 2.

    All other pairs are guesses between layers of equal shapes, and are listed in `guessed`. A guess
    assumes these rules:

    - Modules that contain layers correspond if their names agree, whatever is inside.
    - The layers of a Flax module are neighbors in torch. No torch module has some of them together
      with other layers.
    - Flax calls modules that differ in a number (`Conv_0`, `Conv_1`) in the order in which torch
      registers its modules, and each in a statement of its own. In `nn.Dense(4)(nn.Dense(4)(x))`,
      the outer one, which is called last, is `Dense_0`, since Flax numbers modules where they are
      constructed. If the shapes contradict the order (a shortcut that is called first), only shapes
      decide on these modules, and on all between the first and the last of them in torch.
    - A convolution and a batch norm whose names differ in nothing else (`Conv_1` and `BatchNorm_1`,
      `conv_proj` and `norm_proj`) are neighbors, if all numbers of the one have a partner among the
      other.

    If more than one way fits, an error is raised instead of a guess. The order of keys in
    `variables` does not matter. The order of keys in `state_dict` is that of torch's modules,
    unless it is alphabetical, as in `.safetensors` files. Only numbers then tell an order.

    Args:
      state_dict: as for `from_state_dict`. All its layers must be in the Flax model.
      variables: variables that the Flax model's `init` returns, or `jax.eval_shape` of it.
      prefix: as for `from_state_dict`. Needed only if some layers do not begin with it.
      known: pairs that you know, such as `{"layer1.0.downsample.0": "Block_0/Conv_0"}`. They are
        not checked against the rules.
      transposed: as for `from_state_dict`; `[]` if no convolution is transposed. None means that
        you do not know. Without a bias, a weight of 8 and 4 channels may then belong to a
        convolution from 4 to 8 channels, or to a transposed one from 8 to 4. Both are tried, and
        refused if they fit in different ways.

    Returns:
      A dict of all layers, in torch's order. Its attribute `guessed` is a dict of the layers that
        were not found by name. It does not tell which convolutions are `transposed`.

    Raises:
      TypeError: `state_dict` is neither a mapping nor a path.
      ValueError: the layers of the two sides differ in shape or number, or none or several ways of
        matching fit (the message lists both sides); `known` has a name or a path that does not
        exist, `transposed` has a name that is not of a convolution, or no key begins with `prefix`.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, numpy as np
      >>> from jaxbn.torch import from_state_dict, match_names
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         x = nn.relu(nn.Dense(4)(x))
      ...         x = nn.relu(nn.Dense(4)(x))
      ...         return nn.Dense(2, name="head")(x)
      >>> x = jnp.ones((1, 4))
      >>> variables = jax.eval_shape(Net().init, jax.random.key(0), x)
      >>> random = np.random.default_rng(0)
      >>> shapes = {"body.0": (4, 4), "body.2": (4, 4), "head": (2, 4)}
      >>> state_dict = {}
      >>> for name, shape in shapes.items():
      ...     state_dict[f"model.{name}.weight"] = random.uniform(size=shape).astype(np.float32)
      ...     state_dict[f"model.{name}.bias"] = random.uniform(size=shape[:1]).astype(np.float32)
      >>> names = match_names(state_dict, variables)
      >>> names
      {'model.body.0': 'Dense_0', 'model.body.2': 'Dense_1', 'model.head': 'head'}
      >>> names.guessed
      {'model.body.0': 'Dense_0', 'model.body.2': 'Dense_1'}
      >>> params, _ = from_state_dict(state_dict, names=names, variables=variables)
      >>> y = np.asarray(x)
      >>> for name in shapes:  # what torch computes; all values are positive
      ...     y = y @ state_dict[f"model.{name}.weight"].T + state_dict[f"model.{name}.bias"]
      >>> bool(jnp.allclose(Net().apply({"params": params}, x), y, rtol=1e-5))
      True

    References:
      `torch.nn.Module.state_dict`, `flax.linen.compact`.
    """
    tensors = unwrapped(opened(state_dict), [prefix])
    check_not_nested(tensors)
    entries = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    if prefix and not entries:
        raise ValueError(f"`prefix` must be what keys of `state_dict` begin with; got {prefix!r}.")
    check_supported(entries)
    theirs = _shapes_of_entries(entries)
    convolutions = {name for name, side in theirs.items() if len(side.get("weight", ())) > 2}
    if unknown := sorted({*(transposed or ())} - convolutions):
        raise ValueError(f"`transposed` must hold names of torch's convolutions; got {unknown}.")
    ours, numbered = _shapes_of_variables(variables)
    torch = _layers(theirs, ".", transposed or ())
    flax = _layers(ours, "/", () if transposed is None else numbered)
    known = known or {}
    _check_known(known, torch, flax)
    taken = set(known.values())
    rest = (
        tuple(layer for layer in torch if layer.name not in known),
        tuple(layer for layer in flax if layer.name not in taken),
    )
    paths = {layer.parts: layer.name for layer in rest[1]}
    agreed = agreeing(*rest)
    by_name = {t.name: paths[agreed[t.parts]] for t in rest[0] if agreed.get(t.parts) in paths}
    given = {**known}
    if len(by_name) == len(rest[0]) == len(rest[1]):  # the import will check their shapes
        given |= by_name
    exact = anchored(given, torch, flax)
    readings = [exact]
    if transposed is None:
        readings = [unoriented(*exact, cautious) for cautious in (False, True)]
    names = _only_way(readings, entries, variables)
    ordered = {layer.name: names[layer.name] for layer in torch}
    return Names(ordered, ordered.items() - {**by_name, **known}.items())


def _shapes_of_entries(entries: Mapping[str, Any]) -> dict[str, dict[str, Shape]]:
    """The shapes of the entries of each torch module."""
    shapes: dict[str, dict[str, Shape]] = {}
    for key, value in entries.items():
        name, _, entry = key.rpartition(".")
        if entry in ENTRIES:
            shapes.setdefault(name, {})[entry] = tuple(np.shape(value))
    return shapes


def _shapes_of_variables(
    variables: Mapping[str, Any],
) -> tuple[dict[str, dict[str, Shape]], list[str]]:
    """The shapes in torch's layout, and the modules that are transposed by their names."""
    leaf_paths = (path for path, _ in leaves(checked_collections(variables)))
    paths = dict.fromkeys(joined(path[1:-1]) for path in leaf_paths)
    transposed = [path for path in paths if re.search(r"(^|/)ConvTranspose_\d+$", path)]
    slots, _ = slots_of_variables(named_layers("", {p: p for p in paths}, transposed), variables)
    shapes: dict[str, dict[str, Shape]] = {}
    for key, slot in slots.items():
        path, _, entry = key.rpartition(".")
        shapes.setdefault(path, {})[entry] = slot.shape
    return shapes, transposed


def _layers(side: Mapping[str, Mapping[str, Shape]], mark: str, swapped: Collection[str]) -> Layers:
    """The layers of one side, with `swapped` ones in the layout of ordinary convolutions."""

    def kind(name: str, shapes: Mapping[str, Shape]) -> Kind:
        if name in swapped and "weight" in shapes:
            outputs, inputs, *spatial = shapes["weight"]
            shapes = {**shapes, "weight": (inputs, outputs, *spatial)}
        return tuple((e, shapes[e]) for e in ENTRIES if e in shapes and e != "num_batches_tracked")

    return tuple(
        Layer(name, tuple(name.split(mark)), kind(name, shapes)) for name, shapes in side.items()
    )


def _check_known(known: Mapping[str, str], torch: Layers, flax: Layers) -> None:
    """Refuses known names and paths that do not exist, or occur twice."""
    there = [{layer.name for layer in side} for side in (torch, flax)]
    strange = sorted({*known} - there[0]) + sorted({*known.values()} - there[1])
    if strange or len({*known.values()}) < len(known):
        raise ValueError(
            "`known` must map torch modules to Flax modules, each with layers in it and once; got "
            f"{', '.join(map(repr, strange or known.values()))}."
        )


def _alphabetical(entries: Mapping[str, Any]) -> bool:
    """Whether the keys of each dtype are sorted, so that `bias` comes before `weight`."""
    keys = defaultdict(list)
    for key, value in entries.items():
        keys[str(getattr(value, "dtype", ""))].append(key)
    return all(some == sorted(some) for some in keys.values())


def _only_way(
    readings: list[tuple[Layers, Layers]], entries: Mapping[str, Any], variables: Mapping[str, Any]
) -> dict[str, str]:
    """The only way to match the layers. Otherwise an error shows both sides."""
    torch, flax = readings[-1]  # in which most layers are alike
    theirs, ours = kinds(torch), kinds(flax)
    if theirs != ours:
        title = (
            "The torch model and the Flax model must have the same layers; leave out those that "
            "take no part. They differ in these (shapes in torch's layout):"
        )
        lines = _both_sides(torch, flax, (theirs - ours) | (ours - theirs))
        lines += [*statistics_hint(entries, variables), *onnx_hint(entries)]
        theirs, ours = map(kinds, unoriented(torch, flax, False))
        if len(readings) == 1 and theirs == ours:
            lines += ["They fit with others in `transposed`, which are shown as ordinary ones."]
        raise ValueError("\n\t".join([title, *lines]))
    alphabetical = _alphabetical(entries)
    found: list[dict[str, str]] = []
    for torch, flax in readings:
        before = len(found)
        for order in orders(torch) if alphabetical else [torch]:
            found += [way for way in ways(order, flax) if way not in found]
    if len(found) == 1:
        return found[0]
    if found:
        title = "The layers match in more than one way, in these two among others."
        lines = [
            f"{layer.name}, {_text(layer.kind)}: {found[0][layer.name]} or {found[1][layer.name]}"
            for layer in readings[0][0]
            if found[0][layer.name] != found[1][layer.name]
        ]
    else:
        title = (
            "The torch model and the Flax model have the same layers, but nested or ordered in "
            "other ways."
        )
        lines = _both_sides(torch, flax, ours)
    title += " Pass those that you know as `known`, or name the Flax modules as in torch."
    if len(readings) > 1 and len(found) > before:
        title += " Which are transposed may tell: pass `transposed`, [] if none is."
    if alphabetical:
        title += " The keys are in alphabetical order; that of model.state_dict() tells more."
    raise ValueError("\n\t".join([title, *lines]))


def _both_sides(torch: Layers, flax: Layers, shown: Container[Kind]) -> list[str]:
    """A line for each kind, with its layers on both sides."""

    def names(side: Layers, kind: Kind) -> str:
        return ", ".join(layer.name or "(itself)" for layer in side if layer.kind == kind) or "none"

    return [
        f"{_text(kind)}: torch {names(torch, kind)}; Flax {names(flax, kind)}"
        for kind in dict.fromkeys(layer.kind for layer in (*torch, *flax))
        if kind in shown
    ]


def _text(kind: Kind) -> str:
    """A kind in words."""
    return ", ".join(f"{entry} {list(shape)}" for entry, shape in kind if entry in ENTRIES)
