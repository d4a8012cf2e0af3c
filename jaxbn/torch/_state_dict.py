"""Conversion of a `state_dict` of torch to Flax variables, and back. torch is never imported."""

import contextlib
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from jaxbn._checks import FLOAT_DTYPES
from jaxbn._checks import statistics_dtype as dtype_of_statistics
from jaxbn.torch._causes import check_not_nested, check_supported, hints, hints_of_names
from jaxbn.torch._slots import (
    ENTRIES,
    NamedLayer,
    Slot,
    leaves,
    named_layers,
    slots_of_entries,
    slots_of_variables,
)
from jaxbn.torch._tensors import (
    Array,
    as_array,
    check_statistics,
    opened,
    to_flax,
    to_torch,
    unwrapped,
)

Tree = dict[str, Any]


def from_state_dict(
    state_dict: Mapping[str, Any] | str | os.PathLike[str],
    prefix: str = "",
    *,
    names: Mapping[str, str] | None = None,
    variables: Mapping[str, Any] | None = None,
    transposed: Collection[str] = (),
) -> tuple[Tree, Tree]:
    """Converts the `state_dict` of a torch model to the variables of a Flax model, or of one layer.

        normalization  scale = weight    bias = bias    mean = running_mean    var = running_var
                       count = num_batches_tracked
        dense          kernel[i, o] = weight[o, i]
        convolution    kernel[h, w, i, o] = weight[o, i, h, w], and so for 1 and 3 spatial axes
        transposed     kernel[h, w, i, o] = weight[i, o, H − 1 − h, W − 1 − w]
        embedding      embedding[n, f] = weight[n, f]
        PReLU          negative_slope = weight[0]

    Without `names`, the dict, or its part under `prefix`, belongs to one layer, and the results are
    the collections of a `jaxbn.linen.BatchNorm2d`. With `names`, it belongs to a model.

    Values keep their dtype and every bit, also in float64 and bfloat16. The exceptions are values
    of batch norm that training changes: a mean or a variance in half precision becomes float32,
    exactly, and `count` changes from int64 to int32. Entries that the dict lacks (`affine=False`,
    `bias=False`, `track_running_stats=False`) are missing in the results, too.

    Additions of wrappers to the keys are removed, unless `prefix` or a name contains them:

    - `module.` in front of all keys (`DataParallel`, `DistributedDataParallel`, and
      `AveragedModel`, whose `n_averaged` is ignored);
    - `_orig_mod.` (`torch.compile`), `_fsdp_wrapped_module.` (FSDP) and
      `_checkpoint_wrapped_module.` (activation checkpointing), anywhere.

    Args:
      state_dict: a mapping of torch tensors, NumPy or JAX arrays, or the path of a `.safetensors`
        file, which needs the package safetensors.
      prefix: beginning of the keys, such as `"backbone.bn1."`. Other keys are ignored.
      names: the torch module names, after the prefix, of all layers with entries in the dict, and
        the paths of the Flax modules: `{"layer1.0.bn1": "layer1_0/bn1"}`. `match_names` finds them.
      variables: variables that the Flax model's `init` returns, or `jax.eval_shape` of it. For an
        NNX model, pass `{"params": nnx.state(model, nnx.Param), "batch_stats": nnx.state(model,
        nnx.BatchStat)}`. The dict must then have every variable of the model in `params` and
        `batch_stats`, in its shape. `count` is dropped if the model has none, and is 0 if the dict
        has none (`FrozenBatchNorm2d`, files older than torch 0.4.1). Without `variables`, a weight
        that may belong to layers of two kinds is refused: of 1 dimension without bias (a norm, a
        PReLU), of 2 without bias (dense, an embedding) and of 3 (`Conv1d`, `Bilinear`).
      transposed: names of the transposed convolutions, which the dict does not tell. Their Flax
        module is `flax.linen.ConvTranspose(transpose_kernel=False)`, with one group. Pass them to
        `match_names`, too.

    Returns:
      `(params, batch_stats)`, nested dicts of NumPy arrays that share no memory with the dict. They
        have the keys of `variables`, so `nnx.update(model, params, batch_stats)` sets an NNX model.

    Raises:
      TypeError: `state_dict` is neither a mapping nor a path, `variables` has another type, a
        weight is not float16, bfloat16, float32 or float64, or a count is not an integer.
      ValueError: entries are missing, unexpected or of another shape (in torch's words, all at
        once), a module cannot be imported (recurrent, attention, parametrized), `state_dict` is a
        checkpoint with the dict inside, running statistics are not finite, a variance is negative,
        a count does not fit into int32, two names have one path, a name ends in a dot, `transposed`
        has another name or lacks a `ConvTranspose_0`, or only `variables` could tell the kind of a
        weight.
      ImportError: a path is given and safetensors is not installed.

    Examples:
      >>> import numpy as np
      >>> from jaxbn.torch import from_state_dict
      >>> state_dict = {
      ...     "conv.weight": np.zeros((8, 3, 5, 5), np.float32),
      ...     "bn.weight": np.ones(8, np.float32),
      ...     "bn.bias": np.zeros(8, np.float32),
      ...     "bn.running_mean": np.zeros(8, np.float32),
      ...     "bn.running_var": np.ones(8, np.float32),
      ...     "bn.num_batches_tracked": np.array(7),
      ... }
      >>> params, batch_stats = from_state_dict(
      ...     state_dict, names={"conv": "Conv_0", "bn": "BatchNorm2d_0"}
      ... )
      >>> params["Conv_0"]["kernel"].shape, batch_stats["BatchNorm2d_0"]["count"]
      ((5, 5, 3, 8), array(7, dtype=int32))
      >>> params, batch_stats = from_state_dict(state_dict, "bn.")
      >>> sorted(params), sorted(batch_stats)
      (['bias', 'scale'], ['count', 'mean', 'var'])

    References:
      `torch.nn.Module.load_state_dict`, `flax.linen.Conv`, `flax.linen.Dense`.
    """
    layers = named_layers(prefix, names, transposed)
    tensors = unwrapped(opened(state_dict), [layer.prefix for layer in layers])
    keys = {layer.prefix + entry for layer in layers for entry in ENTRIES}
    if not keys & tensors.keys():
        check_not_nested(tensors)
    entries = {
        key: as_array(value, key) if key in keys else value
        for key, value in tensors.items()
        if key.startswith(prefix)
    }
    check_supported(entries)
    slots, uncovered = (
        (slots_of_entries(layers, entries), [])
        if variables is None
        else slots_of_variables(layers, variables)
    )
    _agree_on_counts(layers, slots, entries)
    problems = _problems(entries, slots, uncovered)
    if problems:
        model = "BatchNorm" if names is None else "the model"
        problems += hints(slots, entries, tensors, prefix, names, variables)
        raise ValueError("\n\t".join([f"Error(s) in loading state_dict for {model}:", *problems]))
    trees: dict[str, Tree] = {"params": {}, "batch_stats": {}}
    for key, slot in slots.items():
        tree: Tree = trees
        for name in slot.path[:-1]:
            tree = tree.setdefault(name, {})
        name, array = slot.path[-1], entries[key]
        wide = dtype_of_statistics(array.dtype)
        dtype = {"mean": wide, "var": wide, "count": np.dtype(np.int32)}.get(name)
        tree[name] = _converted(array, key, slot, to_flax, dtype)
    return trees["params"], trees["batch_stats"]


def to_state_dict(
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    prefix: str = "",
    *,
    names: Mapping[str, str] | None = None,
    transposed: Collection[str] = (),
    statistics_dtype: DTypeLike | None = None,
) -> dict[str, Array]:
    """Converts the variables of a Flax model to the `state_dict` of a torch model.

    It inverts `from_state_dict`, with its formulas, and returns the bits that came in. To load the
    result, use `model.load_state_dict({k: torch.from_numpy(v) for k, v in result.items()})`, which
    rounds float32 statistics for a module in half precision.

    Args:
      params: the collection `params`: nested dicts of NumPy or JAX arrays.
      batch_stats: the collection `batch_stats`; `{}` if there is none.
      prefix: beginning of the keys: `"module."` for a `DistributedDataParallel` model.
      names: as for `from_state_dict`. They must cover all variables. The result has their order.
      transposed: as for `from_state_dict`.
      statistics_dtype: dtype of running means and variances, for a file of a module in half
        precision: float16, bfloat16, float32 or float64. None keeps the dtype of the variables.

    Returns:
      NumPy arrays, contiguous, writable and sharing no memory with the variables, in the order of
        each torch module: `weight`, `bias`, `running_mean`, `running_var`, `num_batches_tracked`
        (int64).

    Raises:
      TypeError: a variable or `statistics_dtype` is not float16, bfloat16, float32 or float64, a
        count is not an integer, or a collection is not a mapping.
      ValueError: no name covers a variable, a variable has another number of dimensions than its
        kind, running statistics are not finite or do not fit into `statistics_dtype`, a variance or
        a count is negative, two names have one path, a name ends in a dot, or `transposed` has
        another name or lacks a `ConvTranspose_0`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxbn.linen import BatchNorm1d
      >>> from jaxbn.torch import to_state_dict
      >>> variables = BatchNorm1d(2).init(jax.random.key(0), jnp.ones((3, 2)), False)
      >>> for key, value in to_state_dict(variables["params"], variables["batch_stats"]).items():
      ...     print(key, value)
      weight [1. 1.]
      bias [0. 0.]
      running_mean [0. 0.]
      running_var [1. 1.]
      num_batches_tracked 0

    References:
      `torch.nn.Module.state_dict`.
    """
    variables = {"params": params, "batch_stats": batch_stats}
    slots, uncovered = slots_of_variables(named_layers(prefix, names, transposed), variables)
    if uncovered:
        problems = [
            "`names` must cover every variable, so that none is lost; it lacks "
            f"{', '.join(uncovered)}.",
            *hints_of_names(names or {}, (), prefix),
        ]
        if isinstance(params.get("params"), Mapping):
            problems += ['`params` has all collections: pass variables["params"] in its place.']
        if names is None:
            problems += ["`names` is missing: of a model pass those of its import."]
        raise ValueError("\n\t".join(problems))
    values = dict(leaves(variables))
    dtype = None
    if statistics_dtype is not None:
        with contextlib.suppress(TypeError):  # no dtype of NumPy
            dtype = np.dtype(statistics_dtype)
        if dtype is None or dtype.name not in FLOAT_DTYPES:
            raise TypeError(
                f"`statistics_dtype` must be one of {', '.join(FLOAT_DTYPES)}, or None; got "
                f"{dtype or statistics_dtype}."
            )
    dtypes = {"mean": dtype, "var": dtype, "count": np.dtype(np.int64)}
    return {
        key: _converted(
            as_array(values[slot.path], key), key, slot, to_torch, dtypes.get(slot.path[-1])
        )
        for key, slot in slots.items()
    }


def _agree_on_counts(layers: list[NamedLayer], slots: dict[str, Slot], entries: Tree) -> None:
    """Drops the count for a model without one, and starts that of an old file at 0."""
    for layer in layers:
        key = layer.prefix + "num_batches_tracked"
        if key in slots:
            entries.setdefault(key, np.zeros((), np.int64))
        elif layer.prefix + "running_mean" in slots:
            entries.pop(key, None)


def _problems(entries: Tree, slots: dict[str, Slot], uncovered: list[str]) -> list[str]:
    """Everything that does not fit, in torch's words."""
    problems = [
        f"{what}: {', '.join(names)}. "
        for what, names in (
            ("Missing key(s) in state_dict", [f'"{key}"' for key in slots if key not in entries]),
            ("Unexpected key(s) in state_dict", [f'"{k}"' for k in entries if k not in slots]),
            ("Variable(s) of the model that `names` lacks", uncovered),
        )
        if names
    ]
    for key, slot in slots.items():
        if key in entries and entries[key].shape != slot.shape:
            problems.append(
                f"size mismatch for {key}: copying a param with shape "
                f"torch.Size({list(entries[key].shape)}) from checkpoint, the shape in current "
                f"model is torch.Size({list(slot.shape)})."
            )
    return problems


def _converted(
    array: Array,
    key: str,
    slot: Slot,
    layout: Callable[[Array, str, bool], Array],
    dtype: np.dtype[Any] | None,
) -> Array:
    """A contiguous copy in another layout, in this dtype or its own in native byte order."""
    name = slot.path[-1]
    check_statistics(array, key, name)
    array = layout(array, name, slot.transposed)
    with np.errstate(over="ignore"):
        converted = np.array(array, dtype or array.dtype.newbyteorder("="), order="C")
    if dtype and np.isinf(converted).any():
        raise ValueError(f"`{key}` must fit into {dtype}; got {np.abs(array).max()}.")
    return converted
