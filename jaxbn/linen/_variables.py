"""What every Linen layer does: own the variables, and call `batch_norm` on them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax.typing import ArrayLike

from jaxbn._batch_norm import batch_norm
from jaxbn._checks import axis_hint, check_bool, checked_axis, statistics_dtype
from jaxbn._moments import batch_moments
from jaxbn._normalize import normalize
from jaxbn._stats import BatchStats, init_batch_stats


def check_channels(module: nn.Module, shape: tuple[int, ...], num_features: int) -> None:
    axis = module.axis
    channels = shape[checked_axis(shape, axis)]
    if channels != num_features:
        raise ValueError(
            f"{type(module).__name__} of {num_features} channels expected as many at axis={axis} "
            f"of its input; got {channels}, x.shape={shape}."
            + axis_hint(shape, axis, (num_features,))
        )


def training_mode(module: nn.Module, use_running_average: bool | jax.Array | None) -> Any:
    inference: Any = nn.merge_param(
        "use_running_average", module.use_running_average, use_running_average
    )
    check_bool(inference, "use_running_average")
    return jnp.logical_not(inference) if isinstance(inference, jax.core.Tracer) else not inference


def running_statistics(
    module: nn.Module, num_features: int, dtype: Dtype, names: tuple[str, ...], train: Any
) -> dict[str, nn.Variable[jax.Array]]:
    given = module.has_variable("batch_stats", "mean") or module.is_initializing()
    if not given and train is False:
        raise ValueError(
            f"{type(module).__name__} normalizes by running statistics in inference, and the "
            "collection `batch_stats` was not given to `apply`. Pass it beside `params`."
        )

    def initial(name: str) -> jax.Array:
        value: jax.Array = getattr(init_batch_stats(num_features, statistics_dtype(dtype)), name)
        return value

    return {name: module.variable("batch_stats", name, initial, name) for name in names}


def scale_and_bias(
    module: nn.Module, num_features: int, use_scale: bool, use_bias: bool
) -> tuple[jax.Array | None, jax.Array | None]:
    shape, dtype = (num_features,), module.param_dtype
    scale = module.param("scale", module.scale_init, shape, dtype) if use_scale else None
    bias = module.param("bias", module.bias_init, shape, dtype) if use_bias else None
    return scale, bias


def normalize_with(
    module: nn.Module,
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    running: dict[str, nn.Variable[jax.Array]],
    train: Any,
    *,
    dtype: Dtype,
    epsilon: float,
    mask: ArrayLike | None,
    residual: ArrayLike | None,
    momentum: float | None,
    unbiased: bool,
    update: bool = True,
) -> jax.Array:
    """Runs `batch_norm` on the module's variables and stores the new statistics in `running`."""
    fixed: dict[str, Any] = {
        "axis": module.axis,
        "epsilon": epsilon,
        "dtype": dtype,
        "mask": mask,
        "activation": module.activation,
        "residual": residual,
    }
    if module.is_initializing() and (train is not False or not running):
        # Neither counts as a batch nor asks for more than one value per channel, nor for devices.
        moments = batch_moments(x, axis=module.axis, mask=mask)
        return normalize(x, moments.mean, moments.var, scale, bias, **fixed)
    y, stats = batch_norm(
        x,
        _batch_stats(running),
        scale,
        bias,
        train=train,
        momentum=momentum,
        unbiased=unbiased,
        axis_name=module.axis_name,
        axis_index_groups=module.axis_index_groups,
        num_groups=module.num_groups,
        virtual_batch_size=module.virtual_batch_size,
        skip_nonfinite=module.skip_nonfinite,
        **fixed,
    )
    if update and train is not False:
        for name, variable in running.items():
            variable.value = getattr(stats, name)
    return y


def _batch_stats(running: dict[str, nn.Variable[jax.Array]]) -> BatchStats | None:
    if not running:
        return None
    values = {name: jnp.asarray(variable.value) for name, variable in running.items()}
    for name in ("mean", "var"):  # a checkpoint may hold them in half precision
        values[name] = values[name].astype(statistics_dtype(values[name].dtype))
    # A missing count (Flax keeps none) is not needed where momentum is a number.
    return BatchStats(**{"count": jnp.zeros((), jnp.int32)} | values)
