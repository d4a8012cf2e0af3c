"""The computation of a layer with its variables, whether Linen or NNX owns them."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxbn._activation import Activation
from jaxbn._batch_norm import batch_norm
from jaxbn._checks import axis_hint, check_bool, checked_array, checked_axis, statistics_dtype
from jaxbn._conditional import is_conditional
from jaxbn._flax.complex import complex_batch_norm, complex_moments, complex_normalize
from jaxbn._flax.features import Features, feature_axes
from jaxbn._moments import Moments, batch_moments, merge_moments
from jaxbn._normalize import batch_normalize, normalize
from jaxbn._renorm import Renorm
from jaxbn._stats import BatchStats
from jaxbn._types import Integer, Number

Module = Any  # of Linen or NNX, which name these fields alike
Vectors = dict[str, jax.Array]


class Kept(NamedTuple):
    """The state that a layer keeps between batches, by name.

    If `moments` are kept, a batch is merged into them, and the running statistics do not change.
    """

    running: Vectors
    moments: Vectors


# Moments of a batch, normalization by given moments, and both composed.
REAL: tuple[Any, Any, Any] = (batch_moments, normalize, batch_norm)
COMPLEX: tuple[Any, Any, Any] = (complex_moments, complex_normalize, complex_batch_norm)

EFFECTS = (
    "`activation` must not write variables: it is traced on its own; got a function that writes "
    "one. Apply it to the output of the layer instead."
)


def modes(layer: Module, inference: Any) -> tuple[Any, Any]:
    """Whether a batch normalizes itself, and whether it updates the running statistics."""
    if layer.frozen:
        return False, False
    check_bool(inference, "use_running_average")
    traced = isinstance(inference, jax.core.Tracer)
    train = jnp.logical_not(inference) if traced else not inference
    update = layer.update_stats
    if update is None:
        return train, train
    check_bool(update, "update_stats")
    return train, update if isinstance(update, jax.core.Tracer) else bool(update)


def collects(layer: Module) -> bool:
    """Whether a layer merges batches into its moments, if it has any."""
    update = layer.update_stats
    return not layer.frozen and (
        update is None or isinstance(update, jax.core.Tracer) or bool(update)
    )


def check_layout(layer: Module, shape: tuple[int, ...]) -> None:
    """Refuses an input whose number of dimensions fits none of the layer's layouts."""
    checked_axis(shape, layer.axis)
    if len(shape) - 1 in map(len, layer.layouts):
        return
    layouts = []
    for letters in layer.layouts:
        if -len(letters) - 1 <= layer.axis <= len(letters):
            names = list(letters)
            names.insert(layer.axis % (len(letters) + 1), "C")
            layouts.append(f"({', '.join(names)})")
    raise ValueError(
        f"{type(layer).__name__} expected {' or '.join(f'{len(v) + 1}D' for v in layer.layouts)} "
        f"input, {' or '.join(layouts)} with axis={layer.axis}; "
        f"got {len(shape)}D input, x.shape={shape}."
    )


def check_channels(layer: Module, shape: tuple[int, ...], features: tuple[int, ...]) -> None:
    """Refuses an input with other channels than the layer's variables."""
    channels = tuple(shape[axis] for axis in feature_axes(layer.axis, shape))
    if features in (channels, (math.prod(channels),)):
        return
    expected, got = (v[0] if len(v) == 1 else v for v in (features, channels))
    raise ValueError(
        f"{type(layer).__name__} expected {expected} channels at axis={layer.axis} of its input; "
        f"got {got}, x.shape={shape}."
        + (axis_hint(shape, layer.axis, features) if len(channels) == 1 else "")
    )


def affine_shape(*features: int, num_domains: Integer | None, shared: bool) -> tuple[int, ...]:
    """The shape of scale and bias: one set for every domain, or one for all."""
    return features if num_domains is None or shared else (int(num_domains), *features)


def affine(
    layer: Module, name: str, own: jax.Array | None, given: ArrayLike | None
) -> jax.Array | None:
    """The scale or bias of a layer: its own, or the one given in the call."""
    if given is None:
        return own if layer.train_affine else jax.lax.stop_gradient(own)
    if own is not None:
        raise ValueError(
            f"`{name}` in a call needs a layer without its own; got one that has it. Make the "
            f"layer with {'affine=False' if hasattr(layer, 'affine') else f'use_{name}=False'}."
        )
    return checked_array(given, name)


def torch_layer(
    layer: Module,
    x: jax.Array,
    kept: Kept,
    scale: jax.Array | None,
    bias: jax.Array | None,
    train: Any,
    update: Any,
    *,
    activation: str | Activation | None,
    mask: ArrayLike | None,
    residual: ArrayLike | None,
    domain: ArrayLike | None,
    initializing: bool = False,
) -> tuple[jax.Array, Kept]:
    """The output of a layer with torch's fields, and its state after this batch."""
    return _layer(
        layer,
        x,
        kept,
        scale,
        bias,
        train=train,
        update=update,
        axis=layer.axis,
        dtype=jnp.dtype(layer.dtype or x.dtype),
        momentum=layer.momentum,
        unbiased=True,
        epsilon=layer.eps,
        activation=activation,
        mask=mask,
        residual=residual,
        domain=domain,
        initializing=initializing,
    )


def flax_layer(
    layer: Module,
    x: jax.Array,
    kept: Kept,
    scale: jax.Array | None,
    bias: jax.Array | None,
    train: Any,
    update: Any,
    *,
    dtype: DTypeLike,
    activation: str | Activation | None,
    mask: ArrayLike | None,
    residual: ArrayLike | None,
    domain: ArrayLike | None,
    initializing: bool = False,
) -> tuple[jax.Array, Kept]:
    """The output of a layer with Flax's fields, and its state after this batch."""
    traced = isinstance(layer.momentum, jax.Array)
    if layer.momentum is None or (not traced and not 0 <= layer.momentum <= 1):
        raise ValueError(
            "`momentum` of BatchNorm must be between 0 and 1, the weight of the old statistics "
            f"in momentum * old + (1 - momentum) * batch; got {layer.momentum}."
        )
    if jnp.issubdtype(x.dtype, jnp.integer):
        x = x.astype(jnp.float32)
    run = functools.partial(
        _layer,
        layer,
        train=train,
        update=update,
        dtype=dtype,
        momentum=1 - layer.momentum,
        unbiased=False,
        epsilon=layer.epsilon,
        domain=domain,
        initializing=initializing,
    )
    axes = feature_axes(layer.axis, x.shape)
    fused: dict[str, Any]
    if len(axes) == 1:
        fused = {"activation": activation, "mask": mask, "residual": residual}
        return run(x, kept, scale, bias, axis=axes[0], **fused)
    several = Features(x.shape, axes)
    mask, residual = (None if v is None else several.flat(v) for v in (mask, residual))
    fused = {"activation": several.wrapped(activation), "mask": mask, "residual": residual}
    scale, bias = (None if v is None else several.flat_vector(v) for v in (scale, bias))
    vectors = jax.tree.map(several.flat_vector, kept)
    y, new = run(several.flat(x), vectors, scale, bias, axis=-1, **fused)
    return several.restored(y), jax.tree.map(lambda v, old: v.reshape(old.shape), new, kept)


def _layer(
    layer: Module,
    x: jax.Array,
    kept: Kept,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    train: Any,
    update: Any,
    axis: int,
    dtype: DTypeLike,
    epsilon: Number,
    momentum: Any,
    unbiased: bool,
    activation: str | Activation | None,
    mask: ArrayLike | None,
    residual: ArrayLike | None,
    domain: ArrayLike | None,
    initializing: bool,
) -> tuple[jax.Array, Kept]:
    fixed: dict[str, Any] = {"axis": axis, "epsilon": epsilon, "dtype": dtype, "mask": mask}
    fused: dict[str, Any] = {"activation": activation, "residual": residual}
    _check_domain(layer, domain, kept)
    devices: dict[str, Any] = {
        "axis_name": layer.axis_name,
        "axis_index_groups": layer.axis_index_groups,
    }
    of_training: dict[str, Any] = {
        "virtual_batch_size": layer.virtual_batch_size,
        "renorm": _renorm(layer, kept),
        "keep_output": layer.keep_output,
    }
    real_only: dict[str, Any] = {
        "domain": domain,
        "update_stats": None if update is train or initializing else update,
    }
    of_batch, normalized, whole = REAL
    if jnp.issubdtype(dtype, jnp.complexfloating):
        given = {
            "keep_output": layer.keep_output or None,
            "batch_moments": kept.moments or None,
            "scale or bias of each sample": True if is_conditional(scale, bias) else None,
        }
        _check_real_only(fused | of_training | real_only | given)
        x, fused, of_training, real_only = x.astype(dtype), {}, {}, {}
        of_batch, normalized, whole = COMPLEX
    if initializing and (train is not False or not kept.running):
        # Not a batch: it does not count, and needs neither two values per channel nor devices.
        moments = of_batch(x, axis=axis, mask=mask)
        if domain is not None:  # gives the output of the first domain
            scale, bias = (v if v is None or v.ndim == 1 else v[0] for v in (scale, bias))
        return normalized(x, moments.mean, moments.var, scale, bias, **fixed, **fused), kept
    stats = batch_stats_of(kept.running)
    run = functools.partial(
        whole,
        x,
        stats,
        scale,
        bias,
        train=train,
        momentum=momentum,
        unbiased=unbiased,
        skip_nonfinite=layer.skip_nonfinite,
        **devices,
        **fixed,
        **fused,
        **of_training,
    )
    if not kept.moments:
        y, new = run(**real_only)
        return y, Kept({name: getattr(new, name) for name in kept.running}, {})
    if train is True:
        options = of_training | devices | fixed | fused
        y, moments = batch_normalize(x, scale, bias, stats=stats, **options)
    else:
        y, _ = run(update_stats=False)
        moments = of_batch(x, axis=axis, mask=mask, **devices)
    return y, kept._replace(moments=_with(kept.moments, moments, layer))


def _check_domain(layer: Module, domain: object, kept: Kept) -> None:
    """Refuses a `domain` without `num_domains`, the reverse, and a domain with moments."""
    if (domain is None) != (layer.num_domains is None):
        raise ValueError(
            "`domain` must be given if the layer has `num_domains`, and only then; got "
            f"domain={domain!r} for a layer with num_domains={layer.num_domains}."
        )
    if kept.moments and domain is not None:
        raise NotImplementedError(
            "Layers with `num_domains` keep no moments, so they cannot be recalibrated, "
            "accumulated or explained. Use one model per domain, or exclude them with `where`."
        )


def epsilon_of(layer: Module) -> Number:
    """The epsilon of a layer, whether its fields are torch's or Flax's."""
    epsilon: Number = layer.eps if hasattr(layer, "eps") else layer.epsilon
    return epsilon


def name_of(kind: type) -> str:
    """The full name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def weight_of_batch(layer: Module) -> ArrayLike | None:
    """The weight of the new batch: torch's `momentum`, or one minus Flax's."""
    momentum: ArrayLike | None = layer.momentum
    if momentum is None or hasattr(layer, "eps"):
        return momentum
    return 1 - momentum


def std_epsilon(layer: Module) -> Number | None:
    """The epsilon of a layer whose running variance averages standard deviations, else None."""
    averages = layer.renorm is not None and layer.renorm.average_std
    return epsilon_of(layer) if averages else None


def _renorm(layer: Module, kept: Kept) -> Renorm | None:
    """The renorm of a layer. A schedule needs a count."""
    renorm: Renorm | None = layer.renorm
    if renorm is not None and renorm.is_scheduled and kept.running.keys() == {"mean", "var"}:
        raise ValueError(
            "A schedule of `renorm` needs the number of batches, which BatchNorm does not keep. "
            "Use BatchNorm1d, BatchNorm2d or BatchNorm3d, or pass numbers or traced arrays."
        )
    return renorm


def _with(kept: Vectors, moments: Moments, layer: Module) -> Vectors:
    """The kept moments, merged with those of a batch in the channels that the layer accepts."""
    counts = jnp.asarray(True if layer.update_stats is None else layer.update_stats)
    finite = jnp.isfinite(moments.mean) & jnp.isfinite(moments.var)
    counts &= finite | jnp.logical_not(layer.skip_nonfinite)
    moments = moments._replace(count=jnp.broadcast_to(moments.count, moments.mean.shape))
    dtype = kept["mean"].dtype
    moments = jax.tree.map(lambda v: jnp.where(counts, v, 0).astype(dtype), moments)
    return merge_moments(Moments(**kept), moments)._asdict()


def _check_real_only(options: dict[str, Any]) -> None:
    """Refuses options that complex numbers do not support."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise NotImplementedError(
            f"Batch norm of complex numbers takes no {', '.join(given)}. Apply an activation or "
            "add a residual to its output."
        )


def batch_stats_of(running: Vectors) -> BatchStats | None:
    """The running statistics of a layer as `BatchStats`, in at least float32; None without any."""
    if not running:
        return None
    values = {name: jnp.asarray(value) for name, value in running.items()}
    for name in ("mean", "var"):  # a checkpoint may hold them in half precision
        if jnp.issubdtype(values[name].dtype, jnp.floating):
            values[name] = values[name].astype(statistics_dtype(values[name].dtype))
    # A missing count (Flax keeps none) is not needed if momentum is a number.
    return BatchStats(**{"count": jnp.zeros(values["mean"].shape[:-1], jnp.int32)} | values)
