"""What holds for any rank, axis, dtype, mask and split of the batch, by hypothesis."""

import hypothesis
import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.numpy_reference import masked_train, sample
from hypothesis import strategies as st

import jaxbn

SETTINGS = hypothesis.settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
LIMITS = {"float64": 1e-11, "float32": 3e-6, "bfloat16": 1e-2, "float16": 2e-3}


@pytest.fixture(autouse=True)
def _in_float64(x64):
    """Every dtype is there."""


@st.composite
def batches(draw, dtypes=tuple(LIMITS)):
    """`(x, axis, mask)`: any rank from 2 to 5, channel axis and dtype, and a mask or None."""
    rank = draw(st.integers(2, 5))
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank)))
    axis = draw(st.integers(-rank, rank - 1))
    hypothesis.assume(np.prod(shape) // shape[axis] > 1)
    mean = draw(st.sampled_from([0.0, 3.0, -40.0]))
    std = draw(st.sampled_from([0.5, 4.0]))
    x = jnp.asarray(
        sample(shape, draw(st.integers(0, 99)), mean, std), draw(st.sampled_from(dtypes))
    )
    mask = None
    if draw(st.booleans()):
        extents = draw(st.tuples(*(st.sampled_from(sorted({1, n})) for n in shape)))
        mask = draw(arrays.arrays(bool, extents))
    return x, axis, mask


def parameters(x, axis):
    features = x.shape[axis]
    return sample(features, 7, 1.0, 0.5), sample(features, 8, -0.5, 1.0)


def masked(mask, x):
    return np.ones((1,) * x.ndim, bool) if mask is None else mask


@SETTINGS
@hypothesis.given(batches())
def test_against_float64(batch):
    x, axis, mask = batch
    scale, bias = parameters(x, axis)
    dy = sample(x.shape, 9, 0.3, 1.0)
    expected = masked_train(np.asarray(x, np.float64), scale, bias, dy, axis, masked(mask, x), 1e-3)
    wide = "float64" if x.dtype == "float64" else "float32"

    def function(x, scale, bias):
        return jaxbn.batch_normalize(x, scale, bias, axis=axis, mask=mask, epsilon=1e-3)

    y, pullback, moments = jax.vjp(function, x, scale.astype(wide), bias.astype(wide), has_aux=True)
    dx, dscale, dbias = pullback(jnp.asarray(dy, y.dtype))
    np.testing.assert_array_equal(
        np.broadcast_to(moments.count, expected.count.shape), expected.count
    )
    limit = LIMITS[x.dtype.name]
    for actual, name, kind in [
        (y, "y", x.dtype),
        (moments.mean, "mean", wide),
        (moments.var, "var", wide),
    ]:
        assert actual.dtype == kind
        np.testing.assert_allclose(
            np.asarray(actual, np.float64), getattr(expected, name), limit, 10 * limit
        )
    # Rounded to a low precision, `dy` is another one than the referee's.
    for actual, name in [(dx, "dx"), (dscale, "dscale"), (dbias, "dbias")]:
        reference = getattr(expected, name)
        size = max(1.0, np.abs(reference).max())
        np.testing.assert_allclose(np.asarray(actual, np.float64), reference, 0, 30 * limit * size)


@SETTINGS
@hypothesis.given(batches(dtypes=("float32", "float64")), st.data())
def test_parts_merged_are_the_whole(batch, data):
    x, axis, mask = batch
    rank, channel = x.ndim, axis % x.ndim
    split = data.draw(st.sampled_from([i for i in range(rank) if i != channel]))
    size = x.shape[split]
    cuts = data.draw(st.lists(st.integers(0, size), max_size=4).map(sorted))
    full = np.broadcast_to(masked(mask, x), x.shape)
    parts = [
        jaxbn.batch_moments(values, axis=axis, mask=keep)
        for values, keep in zip(jnp.split(x, cuts, split), np.split(full, cuts, split), strict=True)
    ]
    merged = jaxbn.merge_moments(*parts)
    whole = jaxbn.batch_moments(x, axis=axis, mask=full)
    limit = LIMITS[x.dtype.name]
    np.testing.assert_array_equal(merged.count, whole.count)
    np.testing.assert_allclose(merged.mean, whole.mean, limit, 10 * limit)
    np.testing.assert_allclose(merged.var, whole.var, limit, 100 * limit)


@SETTINGS
@hypothesis.given(batches(dtypes=("float64",)), st.randoms(use_true_random=False))
def test_the_order_of_the_samples_does_not_matter(batch, random):
    x, axis, mask = batch
    scale, bias = parameters(x, axis)
    channel = axis % x.ndim
    full = np.broadcast_to(masked(mask, x), x.shape)
    y, moments = jaxbn.batch_normalize(x, scale, bias, axis=axis, mask=full)
    for along in range(x.ndim):
        order = list(range(x.shape[along]))
        random.shuffle(order)
        permuted = [np.take(v, order, along) for v in (x, full)]
        channels = order if along == channel else list(range(x.shape[channel]))
        other_y, other = jaxbn.batch_normalize(
            permuted[0],
            scale[channels],
            bias[channels],
            axis=axis,
            mask=permuted[1],
        )
        np.testing.assert_allclose(other_y, np.take(y, order, along), 1e-9, 1e-9)
        np.testing.assert_allclose(other.mean, moments.mean[jnp.array(channels)], 1e-10, 1e-10)
        np.testing.assert_allclose(other.var, moments.var[jnp.array(channels)], 1e-10, 1e-10)


@SETTINGS
@hypothesis.given(
    batches(dtypes=("float64",)),
    st.floats(-1e6, 1e6),
    st.floats(1e-3, 1e3),
    st.booleans(),
)
def test_translation_and_scale(batch, offset, factor, negative):
    x, axis, mask = batch
    factor = -factor if negative else factor
    moments = jaxbn.batch_moments(x, axis=axis, mask=mask)
    moved = jaxbn.batch_moments(x * factor + offset, axis=axis, mask=mask)
    seen = np.broadcast_to(np.asarray(moments.count) > 0, moments.mean.shape)
    size = abs(offset) + abs(factor) * 100
    np.testing.assert_allclose(
        moved.mean, np.where(seen, moments.mean * factor + offset, 0), 1e-12, 1e-13 * size
    )
    np.testing.assert_allclose(moved.var, moments.var * factor**2, 1e-8, 1e-12 * size * abs(factor))
    y, _ = jaxbn.batch_normalize(x, axis=axis, mask=mask, epsilon=1e-3)
    # The variance grows with the square of the factor, and so must epsilon.
    other, _ = jaxbn.batch_normalize(
        x * factor + offset, axis=axis, mask=mask, epsilon=1e-3 * factor**2
    )
    np.testing.assert_allclose(other, y * np.sign(factor), 0, 1e-13 * size / abs(factor))


@SETTINGS
@hypothesis.given(batches(dtypes=("float32", "bfloat16")))
def test_the_output_has_the_moments_asked_for(batch):
    x, axis, mask = batch
    y, moments = jaxbn.batch_normalize(x.astype(jnp.float32), axis=axis, mask=mask, epsilon=1e-12)
    again = jaxbn.batch_moments(y, axis=axis, mask=mask)
    spread = np.asarray(moments.var) > 1e-3
    np.testing.assert_allclose(np.asarray(again.mean)[spread], 0, atol=1e-5)
    np.testing.assert_allclose(np.asarray(again.var)[spread], 1, rtol=1e-5)
