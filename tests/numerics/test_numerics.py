"""What float32 input is worth: the guaranteed errors, whatever the mean, the data and the size."""

import contextlib
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.numpy_reference import error, evaluate, per_channel, problem, sample, train
from helpers.steps import train_step

import jaxbn
from jaxbn._core import moments
from jaxbn._core.compilers import _pieces, flattened
from jaxbn._core.moments import _part, _some_sixteenth

# Largest error over the largest magnitude; of the variance, per channel.
GUARANTEE = {"y": 1e-6, "var": 2e-6, "dx": 1e-6, "dbias": 1e-6, "dscale": 2e-6}
# The unit of rounding over the fraction of the batch that the shift is made of.
BOUND = {"CPU": 2.0**-23, "GPU and TPU": 16 * 2.0**-23}

pytestmark = pytest.mark.optimized

# Shape and channel axis.
LAYOUTS = {
    "NHWC": ((32, 28, 28, 16), 3),
    "NC of many samples": ((20000, 16), 1),
    "NC": ((256, 8), 1),
    "NCHW": ((32, 16, 28, 28), 1),
    "NLC": ((32, 1000, 8), 2),
    "tiny NCHW": ((4, 6, 7, 7), 1),
    "NC of few samples": ((10, 300), 1),
}


def cases(*factors):
    """`(platform, layout, *kind)`: everything for three layouts, of the other layouts less.

    Each of these meets every platform and every value of every factor.
    """
    all_of_three = itertools.product(BOUND, list(LAYOUTS)[:3], *factors)
    others = [
        (
            list(BOUND)[(i + k) % 2],
            layout,
            *(f[(i * j + k) % len(f)] for j, f in enumerate(factors)),
        )
        for i, layout in enumerate(list(LAYOUTS)[3:])
        for k in range(max(2, *map(len, factors)))
    ]
    return [*all_of_three, *others]


@functools.cache
def steps(platform):
    """`train_step` of every layout, in the form for one kind of platform, whatever this one is."""

    def choose(*operands, default, **_):
        return default(*operands)

    with pytest.MonkeyPatch.context() as patch:
        if platform != "CPU":
            patch.setattr(jax.lax, "platform_dependent", choose)
        jax.clear_caches()  # of what was traced for the other
        compiled = {
            (shape, axis): train_step.lower(
                np.float32(normal(shape)), *parameters(shape, axis), axis=axis
            ).compile()
            for shape, axis in LAYOUTS.values()
        }
    jax.clear_caches()
    return compiled


@functools.cache
def parameters(shape, axis):
    """Parameters and cotangents for batches of this shape."""
    return problem(shape, axis, 1)[1:]


@functools.cache
def normal(shape):
    return sample(shape, 0, 0.0, 1.0)


def errors(x, axis, step):
    """The error of every quantity for the batch `x`, with random parameters and cotangents.

    The error of `dscale` is also given over the sum of the magnitudes of its terms, which is what
    sums in float32 can promise where the terms cancel.
    """
    scale, bias, dy = parameters(x.shape, axis)
    expected = train(x, scale, bias, dy, axis)
    y, found, dx, dscale, dbias, _ = step(x, scale, bias, dy)
    parts = (expected.y - per_channel(bias, x.ndim, axis)) / per_channel(scale, x.ndim, axis) * dy
    others = tuple(i for i in range(x.ndim) if i != axis)
    # Of a constant channel the variance must be zero.
    size = np.maximum(expected.var, np.finfo(np.float32).tiny)
    return {
        "y": error(y, expected.y),
        "var": np.max(np.abs(np.float64(found.var) - expected.var) / size),
        "dx": error(dx, expected.dx),
        "dbias": error(dbias, expected.dbias),
        "dscale": error(dscale, expected.dscale),
        "dscale over its parts": np.max(np.abs(dscale - expected.dscale))
        / np.abs(parts).sum(others).max(),
    }


def assert_within(actual, limits):
    assert {name: actual[name] for name, limit in limits.items() if actual[name] > limit} == {}


@pytest.mark.parametrize(
    ("platform", "layout", "std", "ratio"),
    [
        *cases((1.0, 1e-2, 1e4), (0, 1e2, 1e4, 1e6, 1e7)),
        # Nearly all values are equal, and the others differ by a unit in the last place.
        ("CPU", "NHWC", 1e-2, 1e8),
        ("CPU", "NC", 1e-2, 1e8),
    ],
)
def test_whatever_the_mean(platform, layout, std, ratio):
    shape, axis = LAYOUTS[layout]
    x = (normal(shape) * std + ratio * std).astype(np.float32)
    # At 1e7 the input itself has hardly a bit to each standard deviation, nor has the mean.
    beyond = {"dscale": 4e-6} if ratio > 1e6 else {}
    assert_within(errors(x, axis, steps(platform)[shape, axis]), GUARANTEE | beyond)


def hard_data(kind, shape, axis):
    """Batches that an estimate from their first values is wrong about, channels at `axis`."""
    x = np.moveaxis((normal(shape) + 3.0).astype(np.float32), axis, -1)
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


LARGE = ["NHWC", "NC of many samples", "NCHW", "NLC"]  # of the others, the part is all
MISLEADING = ["constant", "outliers", "spike"]


@pytest.mark.parametrize(
    ("platform", "layout", "kind"), list(itertools.product(BOUND, LARGE, MISLEADING))
)
def test_a_part_that_misleads_the_estimate(platform, layout, kind):
    shape, axis = LAYOUTS[layout]
    indices = jnp.arange(math.prod(shape)).reshape(shape)
    flat, flat_axis = flattened(indices, axis)
    part = _part(flat, flat_axis, 4 if platform == "CPU" else _some_sixteenth(flat, flat_axis))
    assert part.size < indices.size / 2
    x = (normal(shape) + 3.0).astype(np.float32)
    if kind == "spike":
        x[...] = 0.0
        x.flat[np.moveaxis(part, flat_axis, -1).reshape(-1, shape[axis])[0]] = 1e18
    else:
        x.flat[np.ravel(part)] = 7.0 if kind == "constant" else x.flat[np.ravel(part)] + 1e4
    limit = 4 * max(BOUND[platform], GUARANTEE["var"] / 4)
    quantities = ("y", "var", "dx", "dbias", "dscale over its parts")
    assert_within(errors(x, axis, steps(platform)[shape, axis]), dict.fromkeys(quantities, limit))


KINDS = (
    "first samples constant",
    "first samples outliers",
    "half the batch zero",
    "half the batch zero, the other far away",
    "first spike",
    "last spike",
    "std 1e-14",
    "std 1e14",
)


@pytest.mark.parametrize(("platform", "layout", "kind"), cases(KINDS))
def test_whatever_the_data(platform, layout, kind):
    shape, axis = LAYOUTS[layout]
    # Four roundings, each within the bound.
    limit = 4 * max(BOUND[platform], GUARANTEE["var"] / 4)
    quantities = ("y", "var", "dx", "dbias", "dscale over its parts")
    actual = errors(hard_data(kind, shape, axis), axis, steps(platform)[shape, axis])
    assert_within(actual, dict.fromkeys(quantities, limit))


@pytest.mark.parametrize("size", [4_000_000, pytest.param(20_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("samples", [None, 2])
def test_whatever_the_size(samples, size):
    shape, axis = ((size, 1) if samples is None else (samples, 1, size // samples)), 1
    x = sample(shape, 0, 1e3, 1.0, np.float32)
    step = functools.partial(train_step, axis=axis)
    assert_within(errors(x, axis, step), GUARANTEE)


@pytest.mark.parametrize(
    ("platform", "layout", "value"), cases((1e6 / 3, -1e-3 / 7, 0.0, 1e18, 1e-30))
)
def test_constant_channels(platform, layout, value):
    shape, axis = LAYOUTS[layout]
    x = np.full(shape, value, np.float32)
    scale, bias, dy = parameters(shape, axis)
    y, found, *gradients = steps(platform)[shape, axis](x, scale, bias, dy)
    var = np.asarray(found.var, np.float64)
    assert (var >= 0).all()
    assert (var <= 1e-12 * np.float64(x).max() ** 2).all()
    assert all(np.isfinite(v).all() for v in (y, *gradients[:3]))
    if abs(value) < 1:
        np.testing.assert_allclose(y, np.broadcast_to(per_channel(bias, x.ndim, axis), shape), 1e-6)


def test_moments_alone_are_as_exact():
    for ratio in (0, 1e4, 1e6):
        x = sample((32, 28, 28, 16), 0, ratio, 1.0, np.float32)
        found = jaxbn.batch_moments(x)
        np.testing.assert_allclose(found.var, np.float64(x).var((0, 1, 2)), rtol=2e-6)
        np.testing.assert_allclose(found.mean, np.float64(x).mean((0, 1, 2)), 2e-7, 2e-7)


@functools.partial(jax.jit, static_argnames=("mode", "axis"))
def one_step(x, scale, bias, mean, var, dy, mode, axis):
    """Output and gradients, by name."""

    def forward(x, scale, bias):
        if mode == "train":
            return jaxbn.batch_normalize(x, scale, bias, axis=axis)[0]
        return jaxbn.normalize(x, mean, var, scale, bias, axis=axis)

    y, pullback = jax.vjp(forward, x, scale, bias)
    return dict(zip(("y", "dx", "dscale", "dbias"), (y, *pullback(dy)), strict=True))


@pytest.mark.parametrize("mode", ["train", "evaluate"])
@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize(
    "shape", [(32, 16), (8, 6, 10), (4, 6, 7, 7), (2, 3, 4, 5, 6), (8, 16, 14, 14)]
)
def test_small_arrays(shape, axis, mode):
    for seed in range(12):
        x, scale, bias, dy = problem(shape, 1, seed)
        mean, var = sample(shape[1], seed + 4, 3, 1, np.float32), np.abs(scale) + np.float32(1)
        x, dy = (np.moveaxis(array, 1, axis) for array in (x, dy))
        if mode == "train":
            exact = train(x, scale, bias, dy, axis)
        else:
            exact = evaluate(x, mean, var, scale, bias, dy, axis)
        actual = one_step(x, scale, bias, mean, var, dy, mode, axis)
        errors = {name: error(value, getattr(exact, name)) for name, value in actual.items()}
        assert_within(errors, dict.fromkeys(errors, 1e-6))


# Shape and channel axis, by the number of neighboring samples, and of parts of their positions,
# that a CPU adds up.
PIECES = {
    (1, 7): ((8, 28, 28, 16), 3),
    (4, 1): ((32, 16, 14, 14), 1),
    (2, 3): ((16, 16, 12, 12), 1),
    (3, 2): ((24, 26, 53, 2), 3),
    (7, 1): ((4088, 16), 1),
    (1, 1): ((8, 11, 13, 31), 1),
    (2, 2): ((512, 2, 40), 2),
}


def test_pieces():
    assert {_pieces(shape, axis): (shape, axis) for shape, axis in PIECES.values()} == PIECES
    assert _pieces((32, 7, 7, 1000), 3) == (1, 7)
    assert _pieces((1000, 1000), 1) == (5, 1)
    assert _pieces((16, 64, 64, 64), 3) == (1, 4)


@pytest.mark.parametrize(
    ("ratio", "kind"),
    [
        *((ratio, "all alike") for ratio in (0.0, 1.0, 1.4, 1.9, 3.0, 3.87, 4.0, 10.0)),
        *itertools.product((0.0, 3.0), ("one far channel", "constant channel", "tiny")),
    ],
)
@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the forms are a CPU's")
def test_every_form_of_a_cpu_keeps_the_guarantee(pieces, ratio, kind):
    shape, axis = PIECES[pieces]
    x = np.moveaxis(normal(shape) + ratio, axis, -1)
    if kind == "one far channel":
        x[..., 1] += 10
    elif kind == "constant channel":
        x[..., 1] = 7
    elif kind == "tiny":
        x = x * 1e-14
    x = np.ascontiguousarray(np.moveaxis(x, -1, axis), np.float32)
    step, forward = watched_steps(shape, axis)
    EXACT.clear()
    assert_within(errors(x, axis, step), GUARANTEE)
    assert len(EXACT) == 1

    EXACT.clear()
    scale, bias, dy = parameters(shape, axis)
    y, found = jax.block_until_ready(forward(x, scale, bias))
    expected = train(x, scale, bias, dy, axis)
    assert error(y, expected.y) <= GUARANTEE["y"]
    size = np.maximum(expected.var, np.finfo(np.float32).tiny)
    assert (np.abs(found.var - expected.var) / size).max() <= GUARANTEE["var"]
    assert len(EXACT) == (ratio**2 > 3 or kind != "all alike")


# One entry for each time that moments about an estimate were computed, where that is watched.
EXACT = []


@contextlib.contextmanager
def watched():
    """What is compiled in here tells when it computes moments about an estimate."""
    original = moments._about_estimate

    def about_estimate(*arguments, **options):
        jax.debug.callback(lambda: EXACT.append(True))
        return original(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "_about_estimate", about_estimate)
        jax.clear_caches()
        yield
    jax.clear_caches()
    EXACT.clear()


@functools.cache
def watched_steps(shape, axis):
    """`train_step`, and the forward pass alone."""
    operands = np.float32(normal(shape)), *parameters(shape, axis)
    forward = jax.jit(functools.partial(jaxbn.batch_normalize, axis=axis))
    with watched():
        step = train_step.lower(*operands, axis=axis).compile()
        return step, forward.lower(*operands[:3]).compile()


@pytest.mark.parametrize("how", ["mask", "vmap", "virtual batches", "float16"])
def test_what_takes_no_plain_sums(how):
    x = normal((8, 28, 28, 16)).astype(np.float32)
    with watched():
        if how == "mask":
            jaxbn.batch_moments(x, mask=x > -1)
        elif how == "vmap":
            jax.vmap(jaxbn.batch_moments)(np.stack([x, x]))
        elif how == "virtual batches":
            jaxbn.batch_normalize(x, virtual_batch_size=4)
        else:
            jaxbn.batch_moments(x.astype(np.float16))
        jax.effects_barrier()
        assert EXACT
