"""What holds for any rank, axis, dtype, mask and split of the batch, by hypothesis.

The shapes are few, so that examples share what is compiled; all else is drawn freely.
"""

import hypothesis
import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.numpy_reference import masked_train, per_channel, sample, tolerance
from helpers.steps import train_step
from hypothesis import strategies as st

import jaxbn

SETTINGS = hypothesis.settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
LIMITS = {"float64": 1e-11, "float32": 3e-6, "bfloat16": 1e-2, "float16": 2e-3}
EPSILON = 1e-3
# Shape, channel axis, the axis that is split into parts, and the shape of the mask.
POOL = [
    ((6, 3), 1, 0, (6, 1)),
    ((3, 5), -2, 1, (3, 5)),
    ((4, 3, 2), 1, 0, (4, 3, 2)),
    ((1, 4, 3), -1, 1, (4, 1)),
    ((2, 3, 2, 4), -3, 3, (2, 1, 2, 4)),
    ((3, 1, 2, 4), 3, 0, (3, 1, 1, 4)),
    ((2, 1, 2, 1, 3), 1, 4, (2, 1, 2, 1, 3)),
    ((2, 2, 3, 1, 2), 2, 1, (3, 1, 2)),
]
batch_moments = jax.jit(jaxbn.batch_moments, static_argnames="axis")
merge_moments = jax.jit(jaxbn.merge_moments)


@pytest.fixture(autouse=True)
def _in_float64(x64):
    """Every dtype is there."""


@st.composite
def batches(draw, dtypes=tuple(LIMITS)):
    """`(x, axis, split, mask)`: a batch and its channel axis, where to split it, a mask or None."""
    shape, axis, split, extents = draw(st.sampled_from(POOL))
    mean = draw(st.sampled_from([0.0, 3.0, -40.0, 1e4]))
    x = sample(shape, draw(st.integers(0, 10**6)), mean, draw(st.sampled_from([0.5, 4.0])))
    # The parts differ in mean, too, so that averaging them would be wrong.
    x += draw(st.sampled_from([0.0, 1.0])) * per_channel(np.arange(shape[split]), x.ndim, split)
    mask = draw(arrays.arrays(bool, extents)) if draw(st.booleans()) else None
    return x.astype(jnp.dtype(draw(st.sampled_from(dtypes)))), axis, split, mask


def parameters(x, axis):
    """A scale, a bias and cotangents in float64."""
    features = x.shape[axis]
    return sample(features, 7, 1.0, 0.5), sample(features, 8, -0.5), sample(x.shape, 9, 0.3)


def step(x, scale, bias, dy, axis, mask):
    """Output, moments and gradients."""
    wide = np.float64 if x.dtype == np.float64 else np.float32
    scale, bias, dy = scale.astype(wide), bias.astype(wide), dy.astype(x.dtype)
    return train_step(x, scale, bias, dy, mask, axis=axis, epsilon=EPSILON)


def kept(mask, x):
    return np.broadcast_to(True if mask is None else mask, x.shape)


def assert_moments(actual, expected, merged=False):
    """To a few roundings; means that were rounded before a merge show in the variance."""
    dtype, std = actual.var.dtype, np.sqrt(expected.var.max())
    rtol = tolerance(dtype, max(1, expected.count.max()))
    atol = 2 * std * np.abs(expected.mean).max() * jnp.finfo(dtype).eps if merged else 1e-30
    np.testing.assert_allclose(actual.var, expected.var, rtol, atol)
    np.testing.assert_allclose(actual.mean, expected.mean, rtol, rtol * std)
    count = np.broadcast_to(actual.count, expected.count.shape)
    np.testing.assert_array_equal(count, expected.count)


@SETTINGS
@hypothesis.given(batches())
def test_against_float64(batch):
    x, axis, _, mask = batch
    scale, bias, dy = parameters(x, axis)
    y, moments, dx, dscale, dbias, _ = step(x, scale, bias, dy, axis, mask)
    expected = masked_train(np.float64(x), scale, bias, dy, axis, kept(mask, x), EPSILON)
    wide = np.float64 if x.dtype == np.float64 else np.float32
    assert y.dtype == dx.dtype == x.dtype
    assert {v.dtype for v in (*moments, dscale, dbias)} == {np.dtype(wide)}
    assert_moments(moments, expected)
    limit = LIMITS[x.dtype.name]
    np.testing.assert_allclose(np.float64(y), expected.y, limit, 10 * limit)
    # Rounded to a low precision, `dy` is another one than the referee's.
    for actual, name in [(dx, "dx"), (dscale, "dscale"), (dbias, "dbias")]:
        reference = getattr(expected, name)
        size = max(1.0, np.abs(reference).max())
        np.testing.assert_allclose(np.float64(actual), reference, 0, 30 * limit * size)


@SETTINGS
@hypothesis.given(batches(dtypes=("float32", "float64")), st.data())
def test_parts_merged_are_the_whole(batch, data):
    x, axis, split, mask = batch
    # Always five parts, of which several may be empty.
    cuts = sorted(data.draw(st.tuples(*[st.integers(0, x.shape[split])] * 4)))
    full = kept(mask, x)
    parts = [
        batch_moments(values, axis=axis, mask=None if mask is None else keep)
        for values, keep in zip(np.split(x, cuts, split), np.split(full, cuts, split), strict=True)
    ]
    scale, bias, dy = parameters(x, axis)
    expected = masked_train(np.float64(x), scale, bias, dy, axis, full)
    assert_moments(merge_moments(*parts), expected, merged=True)
    assert_moments(batch_moments(x, axis=axis, mask=mask), expected)


@SETTINGS
@hypothesis.given(batches(dtypes=("float64",)), st.randoms(use_true_random=False))
def test_the_order_of_samples_and_channels_does_not_matter(batch, random):
    x, axis, _, mask = batch
    scale, bias, dy = parameters(x, axis)
    y, moments, *_ = step(x, scale, bias, dy, axis, mask)
    for along in range(-x.ndim, 0):
        order = list(range(x.shape[along]))
        random.shuffle(order)
        alike = mask is None or -along > mask.ndim or mask.shape[along] == 1
        permuted = mask if alike else np.take(mask, order, along)
        channels = order if along % x.ndim == axis % x.ndim else slice(None)
        other_y, other, *_ = step(
            np.take(x, order, along), scale[channels], bias[channels], dy, axis, permuted
        )
        np.testing.assert_allclose(other_y, np.take(y, order, along), 1e-9, 1e-9)
        for actual, expected in zip(other[:2], moments[:2], strict=True):
            np.testing.assert_allclose(actual, np.asarray(expected)[channels], 1e-10, 1e-10)


@SETTINGS
@hypothesis.given(
    batches(dtypes=("float64",)), st.floats(-1e6, 1e6), st.floats(1e-3, 1e3), st.booleans()
)
def test_translation_and_scale(batch, offset, factor, negative):
    x, axis, _, mask = batch
    factor = -factor if negative else factor
    operands = np.ones(x.shape[axis]), np.zeros(x.shape[axis]), x
    y, moments, *_ = step(x, *operands, axis, mask)
    other, moved, *_ = step(x * factor + offset, *operands, axis, mask)
    seen = np.broadcast_to(np.asarray(moments.count) > 0, moments.mean.shape)
    size = abs(offset) + abs(factor) * 100
    np.testing.assert_allclose(
        moved.mean, np.where(seen, moments.mean * factor + offset, 0), 1e-12, 1e-13 * size
    )
    var = np.asarray(moments.var)
    np.testing.assert_allclose(moved.var, var * factor**2, 1e-8, 1e-12 * size * abs(factor))
    # Epsilon is the same, while the variance grows with the square of the factor.
    rest = np.sqrt((var + EPSILON / factor**2) / (var + EPSILON))
    other = other * per_channel(rest, x.ndim, axis)
    np.testing.assert_allclose(other, y * np.sign(factor), 0, 1e-13 * size / abs(factor))


@SETTINGS
@hypothesis.given(batches(dtypes=("float32", "bfloat16")))
def test_the_output_has_the_moments_asked_for(batch):
    x, axis, _, mask = batch
    x = x.astype(np.float32)
    operands = np.ones(x.shape[axis]), np.zeros(x.shape[axis]), x
    y, moments, *_ = step(x, *operands, axis, mask)
    _, again, *_ = step(np.asarray(y), *operands, axis, mask)
    var = np.asarray(moments.var)
    spread = var > 1e-3
    np.testing.assert_allclose(np.asarray(again.mean)[spread], 0, atol=1e-5)
    expected = var / (var + EPSILON)
    np.testing.assert_allclose(np.asarray(again.var)[spread], expected[spread], rtol=1e-5)
