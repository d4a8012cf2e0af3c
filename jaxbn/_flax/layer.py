"""What a layer does with its variables, whether Linen or NNX owns them."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jaxbn._activation import Activation
from jaxbn._batch_norm import batch_norm
from jaxbn._checks import axis_hint, check_bool, checked_axis, statistics_dtype
from jaxbn._flax.complex import complex_batch_norm, complex_moments, complex_normalize
from jaxbn._flax.features import Features, feature_axes
from jaxbn._moments import batch_moments
from jaxbn._normalize import normalize
from jaxbn._stats import BatchStats
from jaxbn._types import Number

Module = Any  # of Linen or of NNX, with the fields of the same names that are read here
Running = dict[str, jax.Array]

# The moments of a batch, normalization by given ones, and the two composed.
REAL: tuple[Any, Any, Any] = (batch_moments, normalize, batch_norm)
COMPLEX: tuple[Any, Any, Any] = (complex_moments, complex_normalize, complex_batch_norm)

EFFECTS = (
    "`activation` must not write variables: it is traced on its own; got a function that writes "
    "some. Apply it to the output of the layer instead."
)


def modes(layer: Module, inference: Any) -> tuple[Any, Any]:
    """Whether a batch normalizes itself, and whether it goes into the running statistics."""
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


def check_layout(layer: Module, shape: tuple[int, ...]) -> None:
    """Refuses an input whose number of dimensions is in none of the layer's layouts."""
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
    """Refuses an input of other channels than the layer's variables are for."""
    channels = tuple(shape[axis] for axis in feature_axes(layer.axis, shape))
    if features in (channels, (math.prod(channels),)):
        return
    expected, got = (v[0] if len(v) == 1 else v for v in (features, channels))
    raise ValueError(
        f"{type(layer).__name__} of {expected} channels expected as many at axis={layer.axis} of "
        f"its input; got {got}, x.shape={shape}."
        + (axis_hint(shape, layer.axis, features) if len(channels) == 1 else "")
    )


def torch_layer(
    layer: Module,
    x: jax.Array,
    running: Running,
    scale: jax.Array | None,
    bias: jax.Array | None,
    train: Any,
    update: Any,
    *,
    activation: str | Activation | None,
    mask: ArrayLike | None,
    residual: ArrayLike | None,
    initializing: bool = False,
) -> tuple[jax.Array, Running]:
    """The output of a layer with torch's fields, and the running statistics after this batch."""
    return _layer(
        layer,
        x,
        running,
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
        initializing=initializing,
    )


def flax_layer(
    layer: Module,
    x: jax.Array,
    running: Running,
    scale: jax.Array | None,
    bias: jax.Array | None,
    train: Any,
    update: Any,
    *,
    dtype: DTypeLike,
    activation: str | Activation | None,
    mask: ArrayLike | None,
    residual: ArrayLike | None,
    initializing: bool = False,
) -> tuple[jax.Array, Running]:
    """The output of a layer with Flax's fields, and the running statistics after this batch."""
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
        initializing=initializing,
    )
    axes = feature_axes(layer.axis, x.shape)
    fused: dict[str, Any]
    if len(axes) == 1:
        fused = {"activation": activation, "mask": mask, "residual": residual}
        return run(x, running, scale, bias, axis=axes[0], **fused)
    several = Features(x.shape, axes)
    mask, residual = (None if v is None else several.flat(v) for v in (mask, residual))
    fused = {"activation": several.wrapped(activation), "mask": mask, "residual": residual}
    scale, bias = (None if v is None else v.reshape(-1) for v in (scale, bias))
    vectors = {name: value.reshape(-1) for name, value in running.items()}
    y, new = run(several.flat(x), vectors, scale, bias, axis=-1, **fused)
    return several.restored(y), {name: v.reshape(running[name].shape) for name, v in new.items()}


def _layer(
    layer: Module,
    x: jax.Array,
    running: Running,
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
    initializing: bool,
) -> tuple[jax.Array, Running]:
    fixed: dict[str, Any] = {"axis": axis, "epsilon": epsilon, "dtype": dtype, "mask": mask}
    fused: dict[str, Any] = {"activation": activation, "residual": residual}
    real_only: dict[str, Any] = {
        "virtual_batch_size": layer.virtual_batch_size,
        "update_stats": None if update is train or initializing else update,
    }
    if not layer.train_affine:
        scale, bias = jax.lax.stop_gradient((scale, bias))
    of_batch, normalized, whole = REAL
    if jnp.issubdtype(dtype, jnp.complexfloating):
        _check_real_only(fused | real_only)
        x, fused, real_only = x.astype(dtype), {}, {}
        of_batch, normalized, whole = COMPLEX
    if initializing and (train is not False or not running):
        # Neither counts as a batch nor asks for more than one value per channel, nor for devices.
        moments = of_batch(x, axis=axis, mask=mask)
        return normalized(x, moments.mean, moments.var, scale, bias, **fixed, **fused), running
    y, stats = whole(
        x,
        _batch_stats(running),
        scale,
        bias,
        train=train,
        momentum=momentum,
        unbiased=unbiased,
        axis_name=layer.axis_name,
        axis_index_groups=layer.axis_index_groups,
        skip_nonfinite=layer.skip_nonfinite,
        **fixed,
        **fused,
        **real_only,
    )
    return y, {name: getattr(stats, name) for name in running}


def _check_real_only(options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise NotImplementedError(
            f"Batch norm of complex numbers takes no {', '.join(given)}. Apply an activation or "
            "add a residual to its output."
        )


def _batch_stats(running: Running) -> BatchStats | None:
    if not running:
        return None
    values = {name: jnp.asarray(value) for name, value in running.items()}
    for name in ("mean", "var"):  # a checkpoint may hold them in half precision
        if jnp.issubdtype(values[name].dtype, jnp.floating):
            values[name] = values[name].astype(statistics_dtype(values[name].dtype))
    # A missing count (Flax keeps none) is not needed where momentum is a number.
    return BatchStats(**{"count": jnp.zeros((), jnp.int32)} | values)
