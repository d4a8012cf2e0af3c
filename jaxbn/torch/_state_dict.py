"""PyTorch's `state_dict`s as Flax variables, and back, bit for bit. torch is never imported."""

import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

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
    kernel_to_flax,
    kernel_to_torch,
    onnx_hint,
    opened,
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
    """The variables of a Flax model, or of one layer, from the `state_dict` of a torch model.

        normalization  scale = weight    bias = bias    mean = running_mean    var = running_var
                       count = num_batches_tracked
        dense          kernel[i, o] = weight[o, i]
        convolution    kernel[h, w, i, o] = weight[o, i, h, w], and so for 1 and 3 spatial axes
        transposed     kernel[h, w, i, o] = weight[i, o, H − 1 − h, W − 1 − w]

    Without `names` the dict, or what it has under `prefix`, is that of one layer, and the results
    are the collections of a `jaxbn.linen.BatchNorm2d`. With `names` it is that of a model.

    Values keep their dtype and every bit, float64 and bfloat16 included; only `count` turns from
    int64 into int32. What the dict lacks (`affine=False`, `bias=False`,
    `track_running_stats=False`) the results lack. What wrappers put before every key, `module.`
    (`DataParallel`, `DistributedDataParallel`) and `_orig_mod.` (`torch.compile`), is taken off,
    unless `prefix` or a name begins with it.

    Args:
      state_dict: a mapping of torch tensors, NumPy or JAX arrays, or the path of a `.safetensors`
        file, for which the package safetensors must be installed.
      prefix: what the keys begin with, `"backbone.bn1."`; others are not looked at.
      names: the torch module names, after the prefix, of all layers with entries in the dict, and
        the paths of the Flax modules: `{"layer1.0.bn1": "layer1_0/bn1"}`. Layers are those that
        normalize (a weight of 1 dimension or none), dense ones (2) and convolutions (3 to 5).
      variables: what the Flax model's `init` returns, or `jax.eval_shape` of it. Then the dict must
        have every variable of the model in `params` and `batch_stats`, in its shape; `count` is
        left out where the model has none, and 0 where the dict has none (`FrozenBatchNorm2d`,
        files older than torch 0.4.1). Without it the dict is judged by itself.
      transposed: the names of transposed convolutions, which nothing in the dict tells. Their Flax
        module is `flax.linen.ConvTranspose(transpose_kernel=False)`, with one group.

    Returns:
      `(params, batch_stats)`, nested dicts of NumPy arrays that share no memory with the dict.

    Raises:
      TypeError: `state_dict` is neither mapping nor path, a weight is not float16, bfloat16,
        float32 or float64, or a count not an integer.
      ValueError: entries are missing, unexpected or of another shape (in torch's words, all at
        once), running statistics are not finite, a variance is negative, a count does not fit into
        int32, two names have one path, `transposed` names something else.
      ImportError: a path is given and safetensors is not installed.

    Example:
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
    keys = {layer.prefix + entry for layer in layers for entry in ENTRIES}
    entries = {
        key: as_array(value, key) if key in keys else value
        for key, value in unwrapped(opened(state_dict), [layer.prefix for layer in layers]).items()
        if key.startswith(prefix)
    }
    slots, uncovered = (
        (slots_of_entries(layers, entries), [])
        if variables is None
        else slots_of_variables(layers, variables)
    )
    _agree_on_counts(layers, slots, entries)
    _check_entries("BatchNorm" if names is None else "the model", entries, slots, uncovered)
    trees: dict[str, Tree] = {"params": {}, "batch_stats": {}}
    for key, slot in slots.items():
        tree: Tree = trees
        for name in slot.path[:-1]:
            tree = tree.setdefault(name, {})
        tree[slot.path[-1]] = _converted(entries[key], key, slot, kernel_to_flax, np.int32)
    return trees["params"], trees["batch_stats"]


def to_state_dict(
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    prefix: str = "",
    *,
    names: Mapping[str, str] | None = None,
    transposed: Collection[str] = (),
) -> dict[str, Array]:
    """The `state_dict` of a torch model from the variables of a Flax model: the way back.

    It inverts `from_state_dict`, with its formulas, and gives the bits back that came in. To load
    the result, `model.load_state_dict({k: torch.from_numpy(v) for k, v in result.items()})`.

    Args:
      params: the collection `params`: nested dicts of NumPy or JAX arrays.
      batch_stats: the collection `batch_stats`, `{}` where there is none.
      prefix: what the keys shall begin with: `"module."` for a `DistributedDataParallel` model.
      names: see `from_state_dict`. They must cover all variables; the result is in their order.
      transposed: see `from_state_dict`.

    Returns:
      NumPy arrays, contiguous, writable and sharing no memory with the variables, in the order
      of each torch module: weight, bias, running_mean, running_var, num_batches_tracked (int64).

    Raises:
      TypeError: a variable is not float16, bfloat16, float32 or float64, or a count not an integer.
      ValueError: no name covers a variable, a variable has another number of dimensions than its
        kind, running statistics are not finite, a variance or a count is negative, two names have
        one path, `transposed` names something else.

    Example:
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
        raise ValueError(
            "`names` must cover every variable, so that none is lost; it lacks "
            f"{', '.join(uncovered)}."
        )
    values = dict(leaves(variables))
    return {
        key: _converted(as_array(values[slot.path], key), key, slot, kernel_to_torch, np.int64)
        for key, slot in slots.items()
    }


def _agree_on_counts(layers: list[NamedLayer], slots: dict[str, Slot], entries: Tree) -> None:
    """A model that keeps no count needs none; that of an old file begins at 0."""
    for layer in layers:
        key = layer.prefix + "num_batches_tracked"
        if key in slots:
            entries.setdefault(key, np.zeros((), np.int64))
        elif layer.prefix + "running_mean" in slots:
            entries.pop(key, None)


def _check_entries(model: str, entries: Tree, slots: dict[str, Slot], uncovered: list[str]) -> None:
    """Raises torch's error, with all that does not fit."""
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
    if problems:
        title = f"Error(s) in loading state_dict for {model}:"
        raise ValueError("\n\t".join([title, *problems, *onnx_hint(entries)]))


def _converted(
    array: Array,
    key: str,
    slot: Slot,
    layout: Callable[[Array, bool], Array],
    integer: type[np.signedinteger[Any]],
) -> Array:
    """A copy in another layout, contiguous and in the byte order of the machine."""
    name = slot.path[-1]
    check_statistics(array, key, name)
    if name == "kernel":
        array = layout(array, slot.transposed)
    dtype = np.dtype(integer) if name == "count" else array.dtype.newbyteorder("=")
    return np.array(array, dtype, order="C")
