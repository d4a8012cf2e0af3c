"""Conversion of the batch norms of a model to another class, in place: the variables stay."""

import inspect
import warnings
from collections.abc import Collection
from typing import Any, TypeVar

import flax.nnx
import jax.numpy as jnp
from flax.nnx.nn import dtypes

from jaxbn._flax.layer import name_of
from jaxbn.nnx._flax import BatchNorm
from jaxbn.nnx._torch import BatchNorm1d, BatchNorm2d, BatchNorm3d

Model = TypeVar("Model")
Fields = dict[str, Any]

TORCH = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
OWN = (BatchNorm, *TORCH)
CONSUMED = {  # by a constructor, which does not keep them
    *("self", "rngs", "bias", "scale_init", "bias_init", "scale_metadata", "bias_metadata")
}
# Flax and torch name these differently, or one of them does not need them.
WITHOUT_EFFECT = {
    *("epsilon", "eps", "use_scale", "use_bias", "affine", "track_running_stats"),
    "use_fast_variance",
}
# These fields determine the variables. An existing layer keeps its variables.
OF_VARIABLES = {
    *("num_features", "param_dtype", "use_scale", "use_bias", "affine"),
    *("track_running_stats", "num_domains", "shared_affine"),
}


def convert(
    model: Model,
    *,
    to: type[flax.nnx.Module] | None = None,
    classes: Collection[type] = (flax.nnx.BatchNorm,),
    **fields: Any,
) -> Model:
    """Converts every `flax.nnx.BatchNorm` of a model to a `jaxbn.nnx.BatchNorm`, in place.

    Each layer remains the same object, and changes its class. Its variables remain, with their
    values, metadata and sharding, and so do references to them, such as those of an optimizer. Its
    fields carry over. One line makes an existing model synchronize its statistics:
    `convert(model, axis_name="batch")`.

    Layers of `jaxbn.nnx` in the model keep their class unless `to` is given, and get the `fields`.
    If a layer changes to torch's conventions, `momentum` becomes `1 − momentum`, and `count` starts
    at 0. The running variance keeps its value, and new batches contribute the unbiased variance. On
    the way back, `count` is dropped.

    Args:
      model: a module, which is changed, or a batch norm itself.
      to: class to convert to: `BatchNorm`, `BatchNorm1d`, `BatchNorm2d` or `BatchNorm3d` of
        `jaxbn.nnx`, or `flax.nnx.BatchNorm` for the way back. None for `BatchNorm`.
      classes: classes to convert; by default, `flax.nnx.BatchNorm`. They may be Flax's own class,
        copies of it, and subclasses that change nothing but defaults. A layer is converted if its
        class is exactly one of these.
      **fields: fields of the class `to` to set in all layers, such as `axis_name`,
        `virtual_batch_size`, `skip_nonfinite` or `renorm`.

    Returns:
      The model.

    Raises:
      ValueError: the model has no batch norm of these classes, the class `to` lacks one of `fields`
        or a field that a layer has set, or a layer lacks statistics that it would need.

    Warns:
      UserWarning: subclasses of `classes` are not converted.

    Examples:
      >>> import jaxbn.nnx
      >>> from flax import nnx
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Linear(4, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs))
      >>> scale = model.layers[1].scale
      >>> model = jaxbn.nnx.convert(model, axis_name="batch")
      >>> type(model.layers[1]).__module__, model.layers[1].axis_name
      ('jaxbn.nnx._flax', 'batch')
      >>> model.layers[1].scale is scale
      True

    References:
      `torch.nn.SyncBatchNorm.convert_sync_batchnorm`.
    """
    if to not in (None, flax.nnx.BatchNorm, *OWN):
        raise ValueError(
            "`to` must be BatchNorm, BatchNorm1d, BatchNorm2d or BatchNorm3d of jaxbn.nnx, or "
            f"flax.nnx.BatchNorm; got {to!r}."
        )
    found, left = _batch_norms(model, {*classes, *OWN})
    if not found:
        raise ValueError(
            f"`model` must have a batch norm of the classes {', '.join(map(name_of, classes))}; "
            f"got {type(model).__name__} with {', '.join(left) or 'none'}. List other classes in "
            "`classes`."
        )
    kinds = [to or (type(layer) if type(layer) in OWN else BatchNorm) for layer in found]
    changes = [
        _fields_in(layer, kind) | _checked(fields, kind)
        for layer, kind in zip(found, kinds, strict=True)
    ]
    for layer, kind, change in zip(found, kinds, changes, strict=True):
        _become(layer, kind, change)
    if left:
        warnings.warn(
            f"Subclasses that are not in `classes` stay as they are: {', '.join(left)}.",
            stacklevel=2,
        )
    return model


def _batch_norms(model: Any, classes: set[type]) -> tuple[list[Any], list[str]]:
    """The layers of these classes, and the places of layers of their subclasses."""
    found, left = {}, []
    for path, module in flax.nnx.iter_modules(model):
        if type(module) in classes:
            found[id(module)] = module
        elif isinstance(module, tuple(classes)):
            place = "/".join(map(str, path)) or "the model itself"
            left.append(f"{place} ({name_of(type(module))})")
    return list(found.values()), left


def _base(layer: Any) -> type:
    """The class whose fields a layer has: one with torch's conventions, else `BatchNorm`."""
    return type(layer) if type(layer) in TORCH else BatchNorm


def _defaults(kind: type) -> Fields:
    """The arguments of a constructor that a layer keeps, and their defaults."""
    parameters = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    return {name: p.default for name, p in parameters.items() if name not in CONSUMED}


def _checked(fields: Fields, kind: type) -> Fields:
    """The fields, all of which the class must have."""
    names = [name for name in _defaults(kind) if name not in OF_VARIABLES]
    if unknown := [name for name in fields if name not in names]:
        raise ValueError(
            f"`fields` must be fields of {name_of(kind)} that do not determine its variables: "
            f"{', '.join(names)}; got {', '.join(unknown)}."
        )
    return fields


def _fields_in(layer: Any, kind: type) -> Fields:
    """The fields of a layer in the conventions of a class."""
    before, after = _defaults(_base(layer)), _defaults(kind)
    fields = {n: getattr(layer, n, default) for n, default in before.items()}
    only_before = before.keys() - after.keys() - WITHOUT_EFFECT
    lost = [name for name in only_before if fields[name] is not before[name]]
    if lost or (kind not in OWN and getattr(layer, "moments", None) is not None):
        raise ValueError(
            f"{name_of(kind)} must have all fields that a layer uses; it has no "
            f"{', '.join(sorted(lost)) or 'moments of batches'}. Set them to their defaults first."
        )
    if (_base(layer) in TORCH) != (kind in TORCH):
        fields |= _converted(layer, fields)
    return {name: fields[name] for name in after}


def _converted(layer: Any, fields: Fields) -> Fields:
    """The fields that Flax's and torch's conventions name or define differently."""
    axis, momentum, tracked = fields["axis"], fields["momentum"], layer.mean is not None
    if isinstance(axis, (tuple, list)) or momentum is None or not tracked:
        raise ValueError(
            "A layer must have one channel axis, a momentum and running statistics to change to "
            f"other conventions; got axis={axis}, momentum={momentum}, and "
            f"{'' if tracked else 'no '}statistics."
        )
    epsilon = fields.get("eps", fields.get("epsilon"))
    used = {"use_scale": layer.scale is not None, "use_bias": layer.bias is not None}
    return used | {
        "affine": any(used.values()),
        "track_running_stats": True,
        "momentum": 1 - momentum,
        "epsilon": epsilon,
        "eps": epsilon,
        "use_fast_variance": True,
        "promote_dtype": dtypes.promote_dtype,
    }


def _become(layer: Any, kind: type, fields: Fields) -> None:
    """Changes the class of a layer, and the attributes that only one of the classes has."""
    if kind in OWN and not hasattr(layer, "moments"):
        layer.moments = flax.nnx.data(None)
    if kind in TORCH and not hasattr(layer, "count"):
        layer.count = flax.nnx.BatchStat(jnp.zeros(layer.mean.shape[:-1], jnp.int32))
    for name, value in fields.items():
        setattr(layer, name, value)
    kept = {*fields, *(["moments"] if kind in OWN else []), *(["count"] if kind in TORCH else [])}
    for name in {*_defaults(_base(layer)), "moments", "count"} - kept:
        if hasattr(layer, name):
            delattr(layer, name)
    object.__setattr__(layer, "__class__", kind)
