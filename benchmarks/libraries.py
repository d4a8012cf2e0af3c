"""Batch norm in every JAX library that is installed, called alike."""

import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import jaxbn

os.environ["KERAS_BACKEND"] = "jax"  # is read where Keras is imported
CASES = ("BN", "BN+ReLU", "BN+add+ReLU")
EPSILON, MOMENTUM = 1e-5, 0.1
Layer = Callable[..., Any]


class Library(NamedTuple):
    """What makes a layer of a case, given the channel axis; and the package it needs.

    `training(case, axis)` is `(x, scale, bias, *residual) -> (y, (mean, var))` with the new running
    statistics, that were 0 and 1 before, and `inference(case, axis)` is
    `(x, scale, bias, mean, var, *residual) -> y`.
    """

    package: str
    training: Callable[[str, int], Layer]
    inference: Callable[[str, int], Layer]


def fresh(scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Running statistics of a layer that has seen nothing."""
    return jnp.zeros_like(scale), jnp.ones_like(scale)


def library(package: str, made: Callable[[str, int], Layer]) -> Library:
    """From `made(case, axis)`: `(x, scale, bias, mean, var, residual, train) -> (y, (mean, var))`.

    `residual` is a tuple of one array, or of none.
    """

    def training(case: str, axis: int) -> Layer:
        whole = made(case, axis)

        def layer(x: jax.Array, scale: jax.Array, bias: jax.Array, *residual: jax.Array) -> Any:
            y, stats = whole(x, scale, bias, *fresh(scale), residual, True)
            return y, jax.lax.stop_gradient(stats)

        return layer

    def inference(case: str, axis: int) -> Layer:
        whole = made(case, axis)

        def layer(
            x: jax.Array,
            scale: jax.Array,
            bias: jax.Array,
            mean: jax.Array,
            var: jax.Array,
            *residual: jax.Array,
        ) -> jax.Array:
            return whole(x, scale, bias, mean, var, residual, False)[0]

        return layer

    return Library(package, training, inference)


def fused(case: str, axis: int) -> Layer:
    """jaxbn: activation and residual are part of the call."""

    def whole(x, scale, bias, mean, var, residual, train):  # type: ignore[no-untyped-def]
        stats = jaxbn.BatchStats(mean, var, jnp.zeros((), jnp.int32))
        y, stats = jaxbn.batch_norm(
            x,
            stats,
            scale,
            bias,
            train=train,
            momentum=MOMENTUM,
            unbiased=False,
            axis=axis,
            epsilon=EPSILON,
            activation="relu" if "ReLU" in case else None,
            residual=residual[0] if residual else None,
        )
        return y, (stats.mean, stats.var)

    return whole


def peer(package: str, normalizer: Callable[[int], Callable[..., Any]]) -> Library:
    """From a batch norm alone, `(x, scale, bias, mean, var, train) -> (y, (mean, var))`."""

    def followed(case: str, axis: int) -> Layer:
        normalized = normalizer(axis)

        def whole(x, scale, bias, mean, var, residual, train):  # type: ignore[no-untyped-def]
            y, stats = normalized(x, scale, bias, mean, var, train)
            return finished(case, y, residual), stats

        return whole

    return library(package, followed)


def finished(case: str, y: jax.Array, residual: tuple[jax.Array, ...]) -> jax.Array:
    """Residual and activation, as users of a layer without them write it."""
    y = y + residual[0] if residual else y
    return jax.nn.relu(y) if "ReLU" in case else y


def linen(axis: int, momentum: float = MOMENTUM, fast: bool = True) -> Callable[..., Any]:
    """`flax.linen.BatchNorm`; `fast` is its default way to the variance."""
    options: dict[str, Any] = {"axis": axis, "epsilon": EPSILON, "momentum": 1 - momentum}

    def normalized(x, scale, bias, mean, var, train):  # type: ignore[no-untyped-def]
        module = nn.BatchNorm(not train, dtype=x.dtype, use_fast_variance=fast, **options)
        stats = {"mean": mean, "var": var}
        variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
        y, updates = module.apply(variables, x, mutable=["batch_stats"])
        return y, tuple(updates["batch_stats"].values())

    return normalized


def with_nnx(axis: int) -> Callable[..., Any]:
    """`flax.nnx.BatchNorm`."""

    def normalized(x, scale, bias, mean, var, train):  # type: ignore[no-untyped-def]
        options = {"axis": axis, "epsilon": EPSILON, "momentum": 1 - MOMENTUM}
        module = nnx.BatchNorm(scale.size, dtype=x.dtype, rngs=nnx.Rngs(0), **options)
        for variable, value in zip(
            (module.scale, module.bias, module.mean, module.var),
            (scale, bias, mean, var),
            strict=True,
        ):
            variable.set_value(value)
        y = module(x, use_running_average=not train)
        return y, (module.mean.get_value(), module.var.get_value())

    return normalized


def with_haiku(axis: int, momentum: float = MOMENTUM) -> Callable[..., Any]:
    """`haiku.BatchNorm`, with scale and offset handed in at the call."""
    import haiku as hk

    names = [f"norm/~/{name}_ema" for name in ("mean", "var")]

    @hk.transform_with_state
    def function(x: jax.Array, scale: jax.Array, bias: jax.Array, train: bool) -> jax.Array:
        form = "N...C" if axis in (-1, x.ndim - 1) else "NC..."
        module = hk.BatchNorm(
            False, False, 1 - momentum, eps=EPSILON, data_format=form, name="norm"
        )
        return module(x, is_training=train, scale=scale, offset=bias)

    def normalized(x, scale, bias, mean, var, train):  # type: ignore[no-untyped-def]
        shape = [1] * x.ndim
        shape[axis] = scale.size
        scale, bias = (v.reshape(shape).astype(x.dtype) for v in (scale, bias))
        state = {
            name: {"counter": jnp.zeros((), jnp.int32), "hidden": 0 * v, "average": v}
            for name, v in zip(names, (v.reshape(shape) for v in (mean, var)), strict=True)
        }
        y, state = function.apply({}, state, None, x, scale, bias, train)
        return y.astype(x.dtype), tuple(state[name]["average"].ravel() for name in names)

    return normalized


def with_equinox(axis: int, momentum: float = MOMENTUM) -> Callable[..., Any]:
    """`equinox.nn.BatchNorm`, which wants the channels first in each sample."""
    import equinox as eqx

    def normalized(x, scale, bias, mean, var, train):  # type: ignore[no-untyped-def]
        module, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
            scale.size, axis_name="batch", eps=EPSILON, momentum=1 - momentum, mode="batch"
        )
        module = eqx.tree_at(lambda m: (m.weight, m.bias), module, (scale, bias))
        hidden = state.get(module.batch_state_index)
        counter = jnp.ones_like(hidden[0]) if len(hidden) > 2 else None
        state = state.set(
            module.batch_state_index, (counter, mean, var) if len(hidden) > 2 else (mean, var)
        )
        module = eqx.nn.inference_mode(module, not train)
        channels_first = jnp.moveaxis(x, axis, 1)
        mapped = jax.vmap(module, (0, None), (0, None), axis_name="batch")
        y, state = mapped(channels_first.astype(jnp.float32), state)
        y = jnp.moveaxis(y.astype(x.dtype), 1, axis)
        return y, tuple(state.get(module.batch_state_index)[-2:])

    return normalized


def with_keras(axis: int, momentum: float = MOMENTUM) -> Callable[..., Any]:
    """`keras.layers.BatchNormalization` on JAX."""
    import keras

    def normalized(x, scale, bias, mean, var, train):  # type: ignore[no-untyped-def]
        module = keras.layers.BatchNormalization(
            axis=axis, momentum=1 - momentum, epsilon=EPSILON, dtype=policy(x.dtype)
        )
        module.build(x.shape)
        y, stats = module.stateless_call([scale, bias], [mean, var], x, training=train)
        return y, tuple(stats)

    def policy(dtype: Any) -> Any:
        return keras.DTypePolicy("float32" if dtype == jnp.float32 else f"mixed_{dtype.name}")

    return normalized


LIBRARIES = {
    "jaxbn": library("jaxbn", fused),
    "flax.linen": peer("flax", linen),
    "flax.nnx": peer("flax", with_nnx),
    "haiku": peer("haiku", with_haiku),
    "equinox": peer("equinox", with_equinox),
    "keras": peer("keras", with_keras),
}


def installed() -> dict[str, Library]:
    """The libraries whose package is there; a line is printed for each of the others."""
    found = {}
    for name, library in LIBRARIES.items():
        if importlib.util.find_spec(library.package) is None:
            print(f"{name} is left out: the package {library.package} is not installed.")
        else:
            found[name] = library
    return found
