"""The variables of the Linen layers: where they are stored, and when they are created."""

import math
from collections.abc import Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import Scope
from flax.typing import Dtype

from jaxbn._activation import Activation, is_own
from jaxbn._checks import statistics_dtype
from jaxbn._flax.layer import EFFECTS, Kept, Vectors, affine_shape, collects, modes
from jaxbn._moments import Moments
from jaxbn._stats import init_batch_stats, stacked
from jaxbn._types import Flag

Variables = dict[str, nn.Variable[jax.Array]]


def training_mode(module: nn.Module, use_running_average: Flag | None) -> tuple[Any, Any]:
    """Whether a batch normalizes itself, and whether it updates the running statistics."""
    return modes(
        module,
        nn.merge_param("use_running_average", module.use_running_average, use_running_average),
    )


def running_statistics(
    module: nn.Module,
    shape: Sequence[int],
    dtype: Dtype,
    names: Sequence[str],
    train: Any,
    update: Any,
) -> Variables:
    """The running statistics of a layer, created if they may be."""
    if not module.is_initializing():
        held = module.variables.get("batch_stats", {})
        _check_collection(module, held, train)
        if update is False:  # creates nothing, and needs no count
            names = [name for name in names if name in held]

    def initial(name: str) -> jax.Array:
        stats = init_batch_stats(math.prod(shape), statistics_dtype(dtype))
        value: jax.Array = getattr(stats, name)
        return stacked(value.reshape(shape) if value.ndim else value, module.num_domains)

    return {name: module.variable("batch_stats", name, initial, name) for name in names}


def _check_collection(module: nn.Module, held: Any, train: Any) -> None:
    """Refuses a collection without mean and var, and inference mode without a collection."""
    if {"mean", "var"} <= set(held) or (not held and train is not False):
        return
    name = type(module).__name__
    if not held:
        raise ValueError(
            f"{name} normalizes by running statistics in inference, and the collection "
            "`batch_stats` was not given to `apply`. Pass it beside `params`."
        )
    raise ValueError(
        f"The collection `batch_stats` of {name} must hold `mean` and `var`; got "
        f"{', '.join(sorted(held))}. For a state_dict use jaxbn.torch.from_state_dict."
    )


def scale_and_bias(
    module: nn.Module, shape: Sequence[int], use_scale: bool, use_bias: bool
) -> tuple[jax.Array | None, jax.Array | None]:
    """The parameters of a layer, None for those that it does not have."""
    shape = affine_shape(*shape, num_domains=module.num_domains, shared=module.shared_affine)
    dtype = module.param_dtype
    scale = module.param("scale", module.scale_init, shape, dtype) if use_scale else None
    bias = module.param("bias", module.bias_init, shape, dtype) if use_bias else None
    return scale, bias


def activation(module: nn.Module, shape: tuple[int, ...]) -> str | Activation | None:
    """The layer's activation, which may read variables of the model, but not write any.

    It is traced on its own, so values that it writes would be tracers of that trace.
    """
    if not is_own(module.activation):
        return cast(str | None, module.activation)
    if module.is_initializing():  # creates the variables of modules in it
        module.activation(jnp.zeros(shape))

    root = cast(Scope, module.scope).root

    def reading(z: jax.Array) -> jax.Array:
        before = jax.tree.leaves(root.mutable_variables())
        y: jax.Array = module.activation(z)
        after = jax.tree.leaves(root.mutable_variables())
        if len(before) != len(after) or any(a is not b for a, b in zip(before, after, strict=True)):
            raise ValueError(EFFECTS)
        return y

    return reading


def moments_of(module: nn.Module) -> Variables:
    """The moments that the layer merges batches into, if the model was given any."""
    if not collects(module) or not module.has_variable("batch_moments", "mean"):
        return {}
    return {name: module.variable("batch_moments", name, _missing) for name in Moments._fields}


def _missing() -> jax.Array:
    raise ValueError("`batch_moments` must hold mean, var and count of each layer; one is missing.")


def values(running: Variables, moments: Variables) -> Kept:
    """The arrays in the variables."""

    def arrays(variables: Variables) -> Vectors:
        return {name: variable.value for name, variable in variables.items()}

    return Kept(arrays(running), arrays(moments))


def store(variables: Variables, new: Vectors) -> None:
    """Writes the arrays to the variables."""
    for name, variable in variables.items():
        variable.value = new[name]
