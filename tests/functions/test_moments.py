"""Moments of batches, and the algebra of merging them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.numpy_reference import channel_moments, sample, tolerance
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbn


def assert_moments(actual, mean, var, count, merged=False):
    """To the rounding of float32; means that were rounded before a merge show in the variance."""
    rtol = tolerance(np.float32, count)
    std = np.sqrt(var.max())
    atol = 2 * std * np.abs(mean).max() * 2.0**-23 if merged else 1e-30
    np.testing.assert_allclose(actual.var, var, rtol=rtol, atol=atol)
    np.testing.assert_allclose(actual.mean, mean, rtol=rtol, atol=rtol * std)
    np.testing.assert_array_equal(actual.count, count)


@settings(deadline=None, max_examples=20)
@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=5),
    axis=st.integers(0, 4),
    mean=st.sampled_from([0.0, 3.0, -1e4]),
    seed=st.integers(0, 10**6),
)
def test_any_layout(shape, axis, mean, seed):
    axis %= len(shape)
    x = sample(tuple(shape), seed, mean, dtype=np.float32)
    expected = channel_moments(x, axis)
    for signed in (axis, axis - len(shape)):
        actual = jaxbn.batch_moments(x, axis=signed)
        assert_moments(actual, *expected)


@settings(deadline=None, max_examples=20)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    mean=st.sampled_from([0.0, 3.0, 1e4]),
    seed=st.integers(0, 10**6),
)
def test_parts_merge_to_the_whole(sizes, mean, seed):
    # The parts differ in mean, too, so that averaging them would be wrong.
    parts = [sample((n, 3), seed + i, mean + i, dtype=np.float32) for i, n in enumerate(sizes)]
    merged = jaxbn.merge_moments(*(jaxbn.batch_moments(part) for part in parts))
    assert_moments(merged, *channel_moments(np.concatenate(parts), 1), merged=True)


@pytest.mark.usefixtures("x64")
def test_merging_is_associative_with_an_identity():
    a, b, c = (jaxbn.batch_moments(sample((n, 4), n, n)) for n in (3, 5, 8))
    empty = jaxbn.batch_moments(np.zeros((0, 4)))
    one = jaxbn.merge_moments(jaxbn.merge_moments(a, b), c)
    other = jaxbn.merge_moments(a, jaxbn.merge_moments(b, c))
    jax.tree.map(lambda v, w: np.testing.assert_allclose(v, w, rtol=1e-14), one, other)
    for merged in (jaxbn.merge_moments(empty, a), jaxbn.merge_moments(a, empty)):
        jax.tree.map(np.testing.assert_array_equal, merged, a)
    jax.tree.map(np.testing.assert_array_equal, jaxbn.merge_moments(a), a)


def test_equal_constants_have_no_negative_variance():
    state = np.random.RandomState(0)
    for _ in range(50):
        mean, counts = np.float32(state.uniform(1, 1e3)), state.randint(1, 50, state.randint(2, 6))
        sets = [jaxbn.Moments(jnp.full(2, mean), jnp.zeros(2), jnp.float32(n)) for n in counts]
        merged = jaxbn.merge_moments(*sets)
        np.testing.assert_allclose(merged.mean, mean, rtol=2.0**-22)
        assert (merged.var >= 0).all()
        assert (merged.var <= (2.0**-20 * mean) ** 2).all()


def test_an_empty_set_says_nothing_to_a_mean_whose_square_is_infinite():
    far = jaxbn.Moments(jnp.array([1e25]), jnp.array([1e36]), jnp.float32(3))
    empty = jaxbn.batch_moments(np.zeros((0, 1), np.float32))
    merged = jaxbn.merge_moments(empty, far)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-6), merged, far)


def test_nothing_has_moments_of_zero():
    empty = jaxbn.batch_moments(np.zeros((0, 4), np.float32))
    for moments in (empty, jaxbn.merge_moments(empty, empty)):
        jax.tree.map(lambda v: np.testing.assert_array_equal(v, np.zeros(v.shape)), moments)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", [jax.jacrev, jax.jacfwd])
def test_derivatives(mode):
    x, (mean, _, n) = sample((5, 2), 0), channel_moments(sample((5, 2), 0), 1)
    derivative = mode(jaxbn.batch_moments)(x)
    eye = np.eye(2)[:, None, :]
    np.testing.assert_allclose(derivative.mean, np.broadcast_to(eye / n, (2, 5, 2)), atol=1e-12)
    np.testing.assert_allclose(derivative.var, eye * 2 * (x - mean) / n, atol=1e-12)
    for point in (x, np.ones_like(x)):  # a constant channel is no exception
        second = jax.hessian(lambda x: jaxbn.batch_moments(x).var[0])(point)[:, 0, :, 0]
        np.testing.assert_allclose(second, 2 * (np.eye(n) - 1 / n) / n, atol=1e-12)


def test_streaming_over_a_scan():
    batches = sample((7, 16, 3), 0, 1e3, dtype=np.float32)
    start = jaxbn.batch_moments(jnp.zeros((0, 3)))

    def step(total, batch):
        return jaxbn.merge_moments(total, jaxbn.batch_moments(batch)), None

    total, _ = jax.jit(lambda b: jax.lax.scan(step, start, b))(batches)
    assert_moments(total, *channel_moments(batches, 2), merged=True)


@pytest.mark.parametrize("channels", [4, 2**17])
def test_one_sample_of_channels_alone(channels):
    """What is reduced may be nothing: every value is the mean of its channel."""
    x = jnp.arange(channels) / 7
    moments = jaxbn.batch_moments(x, axis=0)
    np.testing.assert_array_equal(moments.mean, x)
    np.testing.assert_array_equal(moments.var, np.zeros(channels))
    assert moments.count == 1
