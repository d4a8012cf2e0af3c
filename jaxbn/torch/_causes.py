"""Causes of a `state_dict` that does not fit, where more is known than which keys are missing."""

import contextlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxbn.torch._slots import ENTRIES, Slot
from jaxbn.torch._tensors import as_array

BY_HAND = "Leave it out of the dict and of `variables`, and convert its weights by hand."
# Names of entries without a variable in Flax, and a description of their modules.
UNSUPPORTED = {
    r"(weight|bias)_(ih|hh|hr)(_l\d+)?(_reverse)?": (
        f"a recurrent layer (LSTM, GRU, RNN), which is not converted. {BY_HAND}"
    ),
    r"in_proj_(weight|bias)|[qkv]_proj_weight|bias_[kv]": (
        f"attention (MultiheadAttention), which is not converted. {BY_HAND}"
    ),
    r"weight_g": (
        "a module with weight_norm. Remove it first: torch.nn.utils.remove_weight_norm(module)."
    ),
    r"weight_u": (
        "a module with spectral_norm. Remove it first: torch.nn.utils.remove_spectral_norm(module)."
    ),
    r"weight_mask": (
        'a pruned module. Make that final first: torch.nn.utils.prune.remove(module, "weight").'
    ),
    r"parametrizations\.(?P<tensor>\w+)\..+": (
        "a parametrized module. Remove that first: torch.nn.utils.parametrize."
        'remove_parametrizations(module, "{tensor}").'
    ),
    r"_?flat_param(_\d+)?": (
        "a module of FSDP whose weights are flattened. Save the whole ones: "
        "torch.distributed.checkpoint.state_dict.get_model_state_dict(model, "
        "options=StateDictOptions(full_state_dict=True))."
    ),
    r"_packed_params(\..+)?": "a quantized module. Import the weights that it was made of.",
}


def check_not_nested(state_dict: Mapping[str, Any]) -> None:
    """Refuses a checkpoint with state_dicts inside, and the state of an optimizer."""
    if {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            "`state_dict` must be that of a model; got that of an optimizer, with state and "
            "param_groups."
        )
    if inside := list(_inside(state_dict, "state_dict")):
        raise ValueError(
            f"`state_dict` must map names to arrays; got a checkpoint of {sorted(state_dict)}. "
            f"Pass {' or '.join(inside)}."
        )


def _inside(checkpoint: Mapping[str, Any], path: str) -> Iterator[str]:
    """The expressions for the state_dicts inside a checkpoint."""
    for key, value in checkpoint.items():
        here = f"{path}[{key!r}]"
        if hasattr(value, "named_parameters"):
            yield f"{here}.state_dict()"
        elif isinstance(value, Mapping) and all(isinstance(name, str) for name in (key, *value)):
            if any(getattr(array, "shape", ()) for array in value.values()):
                yield here
            else:
                yield from _inside(value, here)


def check_supported(keys: Iterable[str]) -> None:
    """Refuses modules that Flax has no equivalent of, by the names of their entries."""
    modules = {}
    for key in keys:
        for pattern, what in UNSUPPORTED.items():
            if found := re.fullmatch(rf"(?:(?P<module>.+?)\.)?(?:{pattern})", key):
                name = f'"{found["module"]}"' if found["module"] else "The layer"
                modules[name] = f"{name} is {what.format(**found.groupdict())}"
    if modules:
        raise ValueError(
            "`state_dict` has modules that cannot be imported:\n\t" + "\n\t".join(modules.values())
        )


def hints(
    slots: Mapping[str, Slot],
    entries: Mapping[str, Any],
    keys: Collection[str],
    prefix: str,
    names: Mapping[str, str] | None,
    variables: Mapping[str, Any] | None,
) -> list[str]:
    """Advice on entries that are missing, left over or of another shape.

    `keys` are those of the whole dict. `entries` are those that begin with `prefix`.
    """
    return [
        *_of_beginnings(slots, keys, prefix),
        *hints_of_names(names, entries, prefix),
        *statistics_hint(entries, variables),
        *_of_transposed(slots, entries, prefix, getattr(names, "guessed", ())),
        *_of_kinds(slots, entries),
        *_of_tied(slots, entries),
        *onnx_hint(entries),
    ]


def onnx_hint(keys: Iterable[str]) -> list[str]:
    """Advice on keys with names of an ONNX file: onnx::Conv_123, /conv1/Conv."""
    return [
        f'"{key}" is a name from an ONNX file, whose nodes tell what belongs to which layer: read '
        "it as docs/onnx.md shows."
        for key in keys
        if key.startswith(("onnx::", "/"))
    ][:1]


def statistics_hint(keys: Iterable[str], variables: Mapping[str, Any] | None) -> list[str]:
    """Advice if only the dict has statistics."""
    if variables is None or variables.get("batch_stats"):
        return []
    if not any(key.rpartition(".")[2] in ("running_mean", "running_var") for key in keys):
        return []
    return [
        "`variables` has no statistics. If the model keeps some, pass the collection batch_stats, "
        "too."
    ]


def hints_of_names(
    names: Mapping[str, str] | None, keys: Collection[str], prefix: str
) -> Iterator[str]:
    """Advice if `names` is missing, or has keys or paths that are not those of modules."""
    if names is None:
        parts = [key.rpartition(".") for key in keys]
        if len({module for module, _, entry in parts if entry in ENTRIES}) > 1:
            yield (
                "These are several layers. For a model pass names=match_names(state_dict, "
                "variables), and `variables`."
            )
        return
    entries = [name for name in names if "." in name and prefix + name in keys]
    for name in entries[:1]:
        module = name.rpartition(".")[0]
        yield f"`names` must have modules of torch as keys: {module!r} instead of {name!r}."
    whole = [path for path in names.values() if path.startswith(("params/", "batch_stats/"))]
    for path in whole[:1]:
        inside = path.partition("/")[2]
        yield f"Paths in `names` begin inside of a collection: {inside!r} instead of {path!r}."


def _of_beginnings(slots: Iterable[str], keys: Collection[str], prefix: str) -> Iterator[str]:
    """Advice if no key is found: the prefix that the keys have."""
    if not keys or any(key in keys for key in slots):
        return
    wanted = {key.removeprefix(prefix) for key in slots}
    found = Counter(
        key[:start]
        for key in keys
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", key)))
        if key[start:] in wanted
    )
    best = [before for before, times in found.items() if times == max(found.values())]
    if 0 < len(best) <= 3:
        yield f"The keys exist with {' or '.join(f'prefix={before!r}' for before in best)}."
    elif prefix and not any(key.startswith(prefix) for key in keys):
        first = list(dict.fromkeys(key.split(".")[0] for key in keys))
        yield f"No key begins with prefix={prefix!r}; they begin with {', '.join(first)}."


def _of_transposed(
    slots: Mapping[str, Slot], entries: Mapping[str, Any], prefix: str, guessed: Collection[str]
) -> Iterator[str]:
    """Advice if `transposed` lacks a convolution, or has one that is not transposed."""
    wrong: dict[bool, list[str]] = {False: [], True: []}
    for key, slot in slots.items():
        name = key.removesuffix("weight")
        if key == name or key not in entries or entries[key].ndim < 3:
            continue
        weight, bias = entries[key].shape, entries.get(name + "bias", np.zeros(0)).shape
        swapped = (weight[1], weight[0], *weight[2:]) == slot.shape != weight
        outputs, others = weight[:2][:: -1 if slot.transposed else 1]
        if swapped or (weight == slot.shape and bias == (others,) != (outputs,)):
            wrong[slot.transposed].append(name.removeprefix(prefix).removesuffix("."))
    if wrong[False]:
        listed = [key for key, slot in slots.items() if slot.transposed and key.endswith("weight")]
        listed = [key.removeprefix(prefix).removesuffix(".weight") for key in listed]
        right = [name for name in listed if name not in wrong[True]]
        yield f"These fit as transposed convolutions: pass transposed={right + wrong[False]}."
    if wrong[True]:
        yield f"These fit if `transposed` does not have them: {wrong[True]}."
    if guesses := [name for name in (*wrong[False], *wrong[True]) if name in guessed]:
        yield (
            f"match_names has guessed the Flax modules of {guesses}. Pass all transposed "
            "convolutions as `transposed` to it, too, and read `guessed`."
        )


def _of_kinds(slots: Mapping[str, Slot], entries: Mapping[str, Any]) -> Iterator[str]:
    """Advice if shapes belong to a layer that is not converted."""
    for key, slot in slots.items():
        weight, bias = entries.get(key), entries.get(key.removesuffix("weight") + "bias")
        if not key.endswith("weight") or weight is None or bias is None or weight.ndim < 2:
            continue
        if bias.shape == weight.shape == slot.shape:
            yield f'"{key}" is of a LayerNorm over several axes, which is not converted. {BY_HAND}'
        elif slot.transposed and bias.size != weight.shape[1] and bias.size % weight.shape[1] == 0:
            yield f'"{key}" is of a transposed convolution with groups, which Flax does not have.'


def _of_tied(slots: Mapping[str, Slot], entries: Mapping[str, Any]) -> Iterator[str]:
    """Advice if a module has the weight of another."""
    matrices = {
        key: entries[key]
        for key, slot in slots.items()
        if key in entries and entries[key].shape == slot.shape and len(slot.shape) > 1
    }
    for key in [key for key in entries if key not in slots]:
        with contextlib.suppress(TypeError, NotImplementedError):  # no numbers
            value = as_array(entries[key], key)
            for other, array in matrices.items():
                if np.array_equal(value, array):
                    yield f'"{key}" has the values of "{other}". If they are tied, leave it out.'
    for key, slot in slots.items():
        if key not in entries and slot.path[-1] in ("kernel", "embedding"):
            for other, array in matrices.items():
                pair = {slot.path[-1], slots[other].path[-1]}
                if array.shape == slot.shape and pair == {"kernel", "embedding"}:
                    yield f'If "{key}" is tied to "{other}", add it: a file has tied weights once.'
