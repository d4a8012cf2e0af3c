"""What float32 input is worth: the guaranteed errors, whatever the mean, the data and the size."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.numpy_reference import error, per_channel, problem, sample, train

import jaxbn
from jaxbn._shifted import _part, _some_sixteenth
from jaxbn._sums import flattened

# Largest error over the largest magnitude; of the variance, per channel.
GUARANTEE = {"y": 1e-6, "var": 2e-6, "dx": 1e-6, "dbias": 1e-6, "dscale": 2e-6}
# The unit of rounding over the fraction of the batch that the shift is made of.
BOUND = {"CPU": 2.0**-23, "GPU and TPU": 16 * 2.0**-23}

LAYOUTS = [
    ((32, 28, 28, 16), 3),
    ((32, 16, 28, 28), 1),
    ((20000, 16), 1),
    ((32, 1000, 8), 2),
    ((256, 8), 1),
    ((4, 6, 7, 7), 1),
    ((10, 300), 1),
]


@pytest.fixture(params=BOUND, scope="module")
def platform(request):
    """The form of the moments for one kind of platform, whatever platform this is."""

    def choose(*operands, default, **_):
        return default(*operands)

    with pytest.MonkeyPatch.context() as patch:
        if request.param != "CPU":
            patch.setattr(jax.lax, "platform_dependent", choose)
        jax.clear_caches()  # of what was traced for the other
        yield request.param
    jax.clear_caches()


@functools.cache
def compiled_step(axis, platform, epsilon):
    def step(x, scale, bias, dy):
        def function(x, scale, bias):
            return jaxbn.batch_normalize(x, scale, bias, axis=axis, epsilon=epsilon)

        y, pullback, moments = jax.vjp(function, x, scale, bias, has_aux=True)
        return y, moments.var, *pullback(dy)

    return jax.jit(step)


def errors(x, axis, platform, epsilon=1e-5):
    """The error of every quantity for the batch `x`, with random parameters and cotangents.

    The error of `dscale` is also given over the sum of the magnitudes of its terms, which is what
    sums in float32 can promise where the terms cancel.
    """
    _, scale, bias, dy = problem(x.shape, axis, 1)
    expected = train(x, scale, bias, dy, axis, epsilon)
    y, var, dx, dscale, dbias = compiled_step(axis, platform, epsilon)(x, scale, bias, dy)
    parts = (expected.y - per_channel(bias, x.ndim, axis)) / per_channel(scale, x.ndim, axis) * dy
    others = tuple(i for i in range(x.ndim) if i != axis)
    return {
        "y": error(y, expected.y),
        "var": np.max(np.abs(np.float64(var) - expected.var) / expected.var),
        "dx": error(dx, expected.dx),
        "dbias": error(dbias, expected.dbias),
        "dscale": error(dscale, expected.dscale),
        "dscale over its parts": np.max(np.abs(dscale - expected.dscale))
        / np.abs(parts).sum(others).max(),
    }


def assert_within(actual, limits):
    assert {name: actual[name] for name, limit in limits.items() if actual[name] > limit} == {}


@pytest.mark.parametrize("ratio", [0, 1e2, 1e4, 1e6, 1e7])
@pytest.mark.parametrize("std", [1.0, 1e-2, 1e4])
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_whatever_the_mean(shape, axis, std, ratio, platform):
    x = sample(shape, 0, ratio * std, std, np.float32)
    # At 1e7 the input itself has hardly a bit to each standard deviation, nor has the mean.
    beyond = {"dscale": 4e-6} if ratio > 1e6 else {}
    assert_within(errors(x, axis, platform), GUARANTEE | beyond)


def hard_data(kind, shape, axis):
    """Batches that an estimate from their first values is wrong about, channels at `axis`."""
    x = np.moveaxis(sample(shape, 0, 3.0, 1.0, np.float32), axis, -1)
    first = (slice(0, max(1, len(x) // 16)),) if x.ndim == 2 else (slice(None), slice(0, 2))
    if kind == "first samples constant":
        x[first] = 7.0
    elif kind == "first samples outliers":
        x[first] += 1e4
    elif kind == "half the batch zero":
        x[: len(x) // 2] = 0.0
    elif kind == "half the batch zero, the other far away":
        x[len(x) // 2 :] += 1e4
        x[: len(x) // 2] = 0.0
    elif kind == "first spike":
        x[...] = 0.0
        x[(0,) * (x.ndim - 1)] = 1e18
    elif kind == "last spike":
        x[...] = 0.0
        x[(-1,) * (x.ndim - 1)] = 1e18
    elif kind == "std 1e-14":
        x = (x - 3) * np.float32(1e-14)
    elif kind == "std 1e14":
        x = (x - 3) * np.float32(1e14)
    return np.ascontiguousarray(np.moveaxis(x, -1, axis))


@pytest.mark.parametrize("kind", ["constant", "outliers", "spike"])
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS[:4])  # of the others, the part is all
def test_a_part_that_misleads_the_estimate(shape, axis, kind, platform):
    indices = jnp.arange(math.prod(shape)).reshape(shape)
    flat, flat_axis = flattened(indices, axis)
    part = _part(flat, flat_axis, 4 if platform == "CPU" else _some_sixteenth(flat, flat_axis))
    assert part.size < indices.size / 2
    x = sample(shape, 0, 3.0, 1.0, np.float32)
    if kind == "spike":
        x[...] = 0.0
        x.flat[np.moveaxis(part, flat_axis, -1).reshape(-1, shape[axis])[0]] = 1e18
    else:
        x.flat[np.ravel(part)] = 7.0 if kind == "constant" else x.flat[np.ravel(part)] + 1e4
    limit = 4 * max(BOUND[platform], GUARANTEE["var"] / 4)
    quantities = ("y", "var", "dx", "dbias", "dscale over its parts")
    assert_within(errors(x, axis, platform), dict.fromkeys(quantities, limit))


@pytest.mark.parametrize(
    "kind",
    [
        "first samples constant",
        "first samples outliers",
        "half the batch zero",
        "half the batch zero, the other far away",
        "first spike",
        "last spike",
        "std 1e-14",
        "std 1e14",
    ],
)
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_whatever_the_data(shape, axis, kind, platform):
    # Four roundings, each within the bound.
    limit = 4 * max(BOUND[platform], GUARANTEE["var"] / 4)
    quantities = ("y", "var", "dx", "dbias", "dscale over its parts")
    actual = errors(hard_data(kind, shape, axis), axis, platform)
    assert_within(actual, dict.fromkeys(quantities, limit))


@pytest.mark.parametrize(("shape", "axis"), [((20_000_000, 1), 1), ((2, 1, 10_000_000), 1)])
def test_whatever_the_size(shape, axis):
    x = sample(shape, 0, 1e3, 1.0, np.float32)
    assert_within(errors(x, axis, "CPU"), GUARANTEE)


@pytest.mark.parametrize("value", [1e6 / 3, -1e-3 / 7, 0.0, 1e18, 1e-30])
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_constant_channels(shape, axis, value, platform):
    x = np.full(shape, value, np.float32)
    _, scale, bias, dy = problem(shape, axis, 1)
    y, var, *gradients = compiled_step(axis, platform, 1e-5)(x, scale, bias, dy)
    assert (np.asarray(var) >= 0).all()
    assert (np.asarray(var, np.float64) <= 1e-12 * np.float64(x).max() ** 2).all()
    assert all(np.isfinite(v).all() for v in (y, *gradients))
    if abs(value) < 1:
        np.testing.assert_allclose(y, np.broadcast_to(per_channel(bias, x.ndim, axis), shape), 1e-6)


def test_moments_alone_are_as_exact():
    for ratio in (0, 1e4, 1e6):
        x = sample((32, 28, 28, 16), 0, ratio, 1.0, np.float32)
        moments = jaxbn.batch_moments(x)
        np.testing.assert_allclose(moments.var, np.float64(x).var((0, 1, 2)), rtol=2e-6)
        np.testing.assert_allclose(moments.mean, np.float64(x).mean((0, 1, 2)), 2e-7, 2e-7)
