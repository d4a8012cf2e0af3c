"""Residual networks as pure functions of their parameters, with any library's batch norm.

`layers(case)` is a training layer of `libraries`, `(x, scale, bias, *residual) -> (y, stats)`, for
a case; None leaves batch norm out, which is the floor of what a network with it can cost.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import libraries

Layers = Callable[[str], libraries.Layer]
Params = dict[str, Any]
Policy = Callable[..., bool]


def without(case: str) -> libraries.Layer:
    """No batch norm: what follows it in a case, with the bias alone."""

    def layer(x: jax.Array, scale: jax.Array, bias: jax.Array, *residual: jax.Array) -> Any:
        bias = jnp.expand_dims(bias.astype(x.dtype), range(x.ndim - 1))
        return libraries.finished(case, x + bias, residual), None

    return layer


def convolved(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Convolution of images, channels last, in the dtype of the images."""
    return jax.lax.conv_general_dilated(
        x, kernel.astype(x.dtype), (stride,) * 2, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def conv_norm(key: jax.Array, size: int, channels: int, features: int) -> Params:
    """Parameters of a convolution and its batch norm."""
    deviation = (2 / (size * size * channels)) ** 0.5
    kernel = deviation * jax.random.normal(key, (size, size, channels, features))
    return {"kernel": kernel, "scale": jnp.ones(features), "bias": jnp.zeros(features)}


def bottleneck_params(key: jax.Array, channels: int) -> Params:
    """Of a block of ResNet-50 that keeps the size: 1×1 to a quarter of the channels, 3×3, 1×1."""
    inner = channels // 4
    sizes = ((1, channels, inner), (3, inner, inner), (1, inner, channels))
    keys = jax.random.split(key, 3)
    return {str(i): conv_norm(keys[i], *size) for i, size in enumerate(sizes)}


def basic_params(key: jax.Array, channels: int, features: int) -> Params:
    """Of a block of two 3×3 convolutions; with a shortcut where the number of channels changes."""
    keys = jax.random.split(key, 3)
    params = {
        "0": conv_norm(keys[0], 3, channels, features),
        "1": conv_norm(keys[1], 3, features, features),
    }
    if channels != features:
        params["shortcut"] = conv_norm(keys[2], 1, channels, features)
    return params


def block(params: Params, x: jax.Array, layers: Layers, stride: int = 1) -> tuple[jax.Array, Any]:
    """Convolutions with batch norm and ReLU, the last one added to the shortcut before its ReLU."""
    shortcut, stats = x, []
    if "shortcut" in params:
        p = params["shortcut"]
        projected = convolved(x, p["kernel"], stride)
        shortcut, new = layers("BN")(projected, p["scale"], p["bias"])
        stats.append(new)
    names = sorted(name for name in params if name != "shortcut")
    for name in names:
        p = params[name]
        x = convolved(x, p["kernel"], stride if name == "0" else 1)
        if name == names[-1]:
            x, new = layers("BN+add+ReLU")(x, p["scale"], p["bias"], shortcut)
        else:
            x, new = layers("BN+ReLU")(x, p["scale"], p["bias"])
        stats.append(new)
    return x, stats


def blocks(
    params: Params, x: jax.Array, layers: Layers, scan: bool, policy: Policy | None = None
) -> tuple[jax.Array, Any]:
    """Alike blocks, whose parameters are stacked, in a loop of the compiler or one by one.

    With a `policy`, each is under `jax.checkpoint`.
    """

    def one(x: jax.Array, p: Params) -> tuple[jax.Array, Any]:
        return block(p, x, layers)

    if policy is not None:
        one = jax.checkpoint(one, policy=policy, prevent_cse=not scan)
    if scan:
        return jax.lax.scan(one, x, params)
    stats = []
    for i in range(jax.tree.leaves(params)[0].shape[0]):
        x, new = one(x, jax.tree.map(lambda v, i=i: v[i], params))
        stats.append(new)
    return x, stats


def resnet_params(key: jax.Array, depth: int = 3, width: int = 16) -> Params:
    """Of the residual network for 32×32 images with three stages of `depth` blocks (3: 20 layers).

    He et al., "Deep residual learning", 2015, section 4.2, https://arxiv.org/abs/1512.03385, with
    projections for shortcuts.
    """
    keys = iter(jax.random.split(key, 3 * depth + 2))
    params: Params = {"stem": conv_norm(next(keys), 3, 3, width)}
    channels = width
    for stage in range(3):
        for i in range(depth):
            features = width * 2**stage
            params[f"block{stage}{i}"] = basic_params(next(keys), channels, features)
            channels = features
    params["head"] = jax.random.normal(next(keys), (channels, 10)) / channels**0.5
    return params


def resnet(params: Params, x: jax.Array, layers: Layers) -> tuple[jax.Array, Any]:
    """Logits of images, and the new statistics."""
    stem = params["stem"]
    x, stats = layers("BN+ReLU")(convolved(x, stem["kernel"]), stem["scale"], stem["bias"])
    collected = [stats]
    for name in sorted(name for name in params if name.startswith("block")):
        stage, i = name[-2:]
        x, stats = block(params[name], x, layers, 2 if i == "0" and stage != "0" else 1)
        collected.append(stats)
    return x.mean((1, 2)).astype(jnp.float32) @ params["head"], collected
