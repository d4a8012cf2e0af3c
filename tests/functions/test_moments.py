"""Moments of batches, and the algebra of merging them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.numpy_reference import channel_moments, sample, tolerance

import jaxbn

batch_moments, merge_moments = map(jax.jit, (jaxbn.batch_moments, jaxbn.merge_moments))


@pytest.mark.usefixtures("x64")
def test_merging_is_associative_with_an_identity():
    a, b, c = (batch_moments(sample((n, 4), n, n)) for n in (3, 5, 8))
    empty = batch_moments(np.zeros((0, 4)))
    one = merge_moments(merge_moments(a, b), c)
    other = merge_moments(a, merge_moments(b, c))
    jax.tree.map(lambda v, w: np.testing.assert_allclose(v, w, rtol=1e-14), one, other)
    for merged in (merge_moments(empty, a), merge_moments(a, empty)):
        jax.tree.map(np.testing.assert_array_equal, merged, a)
    jax.tree.map(np.testing.assert_array_equal, jaxbn.merge_moments(a), a)


def test_equal_constants_have_no_negative_variance():
    state = np.random.RandomState(0)
    for _ in range(200):
        mean, counts = np.float32(state.uniform(1, 1e3)), state.randint(1, 50, state.randint(2, 6))
        vectors = np.full(2, mean), np.zeros(2, np.float32)
        merged = merge_moments(*(jaxbn.Moments(*vectors, np.float32(n)) for n in counts))
        np.testing.assert_allclose(merged.mean, mean, rtol=2.0**-22)
        var = np.asarray(merged.var)
        assert (var >= 0).all()
        assert (var <= (2.0**-20 * mean) ** 2).all()


def test_an_empty_set_says_nothing_to_a_mean_whose_square_is_infinite():
    far = jaxbn.Moments(jnp.array([1e25]), jnp.array([1e36]), jnp.float32(3))
    empty = batch_moments(np.zeros((0, 1), np.float32))
    merged = merge_moments(empty, far)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-6), merged, far)


def test_nothing_has_moments_of_zero():
    empty = batch_moments(np.zeros((0, 4), np.float32))
    for moments in (empty, merge_moments(empty, empty)):
        jax.tree.map(lambda v: np.testing.assert_array_equal(v, np.zeros(v.shape)), moments)


def test_roundings_of_weights_do_not_add_up():
    """Thousands of merges, and sets of any sizes and variances."""
    means = sample((8000, 1, 4), 1, 10.0, 5.0, np.float32)
    x = means + sample((8000, 8, 4), 0, 0.0, 1.0, np.float32)

    def merge(moments, x):
        return jaxbn.merge_moments(moments, jaxbn.batch_moments(x)), None

    moments, _ = jax.jit(lambda start, x: jax.lax.scan(merge, start, x))(batch_moments(x[0]), x[1:])
    mean, var, _ = channel_moments(x, -1)
    random = 2.0**-25 * np.sqrt(len(x))  # the results of merges are rounded, each on its own
    np.testing.assert_allclose(moments.mean, mean, rtol=2 * random)
    np.testing.assert_allclose(moments.var, var, rtol=2 * random)

    state = np.random.RandomState(0)
    for _ in range(50):
        counts = 10.0 ** state.randint(0, 6, 3)
        means, variances = 10.0 ** state.randint(-3, 4, 3), 10.0 ** state.randint(-6, 7, 3)
        sets = [
            jaxbn.Moments(*(np.full(2, v, np.float32) for v in one))
            for one in zip(means, variances, counts, strict=True)
        ]
        kept = [np.float64([getattr(one, name)[0] for one in sets]) for name in sets[0]._fields]
        weights = kept[2] / kept[2].sum()
        mean = weights @ kept[0]
        var = weights @ (kept[1] + (kept[0] - mean) ** 2)
        merged = merge_moments(*sets)
        np.testing.assert_allclose(merged.mean, np.full(2, mean), rtol=1e-6)
        np.testing.assert_allclose(merged.var, np.full(2, var), rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_derivatives():
    x, (mean, _, n) = sample((5, 2), 0), channel_moments(sample((5, 2), 0), 1)
    eye = np.eye(2)[:, None, :]

    @jax.jit
    def derivatives(x):
        modes = jax.jacrev(jaxbn.batch_moments)(x), jax.jacfwd(jaxbn.batch_moments)(x)
        return modes, jax.hessian(lambda x: jaxbn.batch_moments(x).var[0])(x)

    for derivative in derivatives(x)[0]:
        np.testing.assert_allclose(derivative.mean, np.broadcast_to(eye / n, (2, 5, 2)), atol=1e-12)
        np.testing.assert_allclose(derivative.var, eye * 2 * (x - mean) / n, atol=1e-12)
    for point in (x, np.ones_like(x)):  # a constant channel is no exception
        second = derivatives(point)[1][:, 0, :, 0]
        np.testing.assert_allclose(second, 2 * (np.eye(n) - 1 / n) / n, atol=1e-12)


def test_streaming_over_a_scan():
    batches = sample((7, 16, 3), 0, 1e3, dtype=np.float32)
    start = jaxbn.batch_moments(jnp.zeros((0, 3)))

    def step(total, batch):
        return jaxbn.merge_moments(total, jaxbn.batch_moments(batch)), None

    total, _ = jax.jit(lambda b: jax.lax.scan(step, start, b))(batches)
    mean, var, count = channel_moments(batches, 2)
    rtol, std = tolerance(np.float32, count), np.sqrt(var.max())
    # Means that were rounded before a merge show in the variance.
    np.testing.assert_allclose(total.var, var, rtol, 2 * std * np.abs(mean).max() * 2.0**-23)
    np.testing.assert_allclose(total.mean, mean, rtol, rtol * std)
    assert total.count == count


@pytest.mark.parametrize("channels", [4, 2**17])
def test_one_sample_of_channels_alone(channels):
    """What is reduced may be nothing: every value is the mean of its channel."""
    x = jnp.arange(channels) / 7
    moments = jaxbn.batch_moments(x, axis=0)
    np.testing.assert_array_equal(moments.mean, x)
    np.testing.assert_array_equal(moments.var, np.zeros(channels))
    assert moments.count == 1
