"""Running statistics: momentum, Bessel's correction, the count, and what leaves them alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.numpy_reference import channel_moments, running, sample

import jaxbn
from jaxbn import linen


def test_initial_statistics():
    stats = jaxbn.init_batch_stats(3)
    np.testing.assert_array_equal(stats.mean, np.zeros(3, np.float32))
    np.testing.assert_array_equal(stats.var, np.ones(3, np.float32))
    assert stats.mean.dtype == stats.var.dtype == jnp.float32
    assert stats.count == 0
    assert stats.count.dtype == jnp.int32


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.5, 1.0, 0.0, 1, 0])
def test_momentum(momentum, unbiased):
    stats = jaxbn.init_batch_stats(4, jnp.float64)
    expected = np.zeros(4), np.ones(4)
    for step in range(3):
        x = sample((6, 4), step)
        expected = running(*expected, *channel_moments(x, 1), momentum, unbiased)
        moments = jaxbn.batch_moments(x)
        stats = jaxbn.update_batch_stats(stats, moments, momentum=momentum, unbiased=unbiased)
        np.testing.assert_allclose(stats[:2], expected, rtol=1e-13, atol=1e-13)
        assert stats.count == step + 1  # also with momentum 0


@pytest.mark.usefixtures("x64")
def test_no_momentum_is_the_average_over_batches():
    batches = sample((5, 6, 4), 0)
    stats = jaxbn.init_batch_stats(4, jnp.float64)
    for x in batches:
        stats = jaxbn.update_batch_stats(stats, jaxbn.batch_moments(x), momentum=None)
    np.testing.assert_allclose(stats.mean, batches.mean(1).mean(0), rtol=1e-13)
    np.testing.assert_allclose(stats.var, batches.var(1, ddof=1).mean(0), rtol=1e-13)


def test_momentum_may_be_traced():
    moments = jaxbn.batch_moments(sample((6, 4), 0, dtype=np.float32))
    update = jax.jit(
        lambda m: jaxbn.update_batch_stats(jaxbn.init_batch_stats(4), moments, momentum=m)
    )
    expected = jaxbn.update_batch_stats(jaxbn.init_batch_stats(4), moments, momentum=0.3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), update(0.3), expected)


def test_an_empty_batch_moves_the_count_alone():
    stats = jaxbn.BatchStats(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]), jnp.int32(7))
    empty = jaxbn.batch_moments(jnp.zeros((0, 2)))
    for momentum in (0.1, 1.0, None):
        new = jaxbn.update_batch_stats(stats, empty, momentum=momentum)
        np.testing.assert_array_equal(new.mean, stats.mean)
        np.testing.assert_array_equal(new.var, stats.var)
        assert new.count == 8


def test_a_single_sample_has_a_mean_but_no_unbiased_variance():
    stats = jaxbn.BatchStats(jnp.array([1.0]), jnp.array([3.0]), jnp.int32(0))
    single = jaxbn.batch_moments(jnp.array([[5.0]]))
    new = jaxbn.update_batch_stats(stats, single, momentum=0.5)
    assert (new.mean[0], new.var[0], new.count) == (3.0, 3.0, 1)
    biased = jaxbn.update_batch_stats(stats, single, momentum=0.5, unbiased=False)
    assert biased.var[0] == 1.5


def test_no_gradient_flows_through():
    x = sample((6, 2), 0, dtype=np.float32)
    old = jaxbn.init_batch_stats(2)

    def total(x, mean, train):
        _, stats = jaxbn.batch_norm(x, old._replace(mean=mean), train=train)
        return stats.mean.sum() + stats.var.sum()

    for train in (True, False):
        for gradient in jax.grad(total, (0, 1))(x, old.mean, train):
            np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("stats_dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_statistics_keep_their_dtype(dtype, stats_dtype):
    x = jnp.asarray(sample((6, 2), 0), dtype)
    old = jaxbn.init_batch_stats(2, stats_dtype)
    traced = jax.jit(lambda train: jaxbn.batch_norm(x, old, train=train))
    for y, stats in (
        jaxbn.batch_norm(x, old, train=True),
        jaxbn.batch_norm(x, old, train=False),
        traced(True),
    ):
        assert y.dtype == dtype
        assert stats.mean.dtype == stats.var.dtype == stats_dtype
        assert stats.count.dtype == jnp.int32


def batch_with(value, channels=(1,)):
    x = sample((6, 3), 0, dtype=np.float32)
    x[2, list(channels)] = value
    return x


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_nonfinite_channels_can_be_skipped(value, momentum):
    old = jaxbn.BatchStats(jnp.full(3, 2.0), jnp.full(3, 3.0), jnp.int32(4))
    moments, clean = jaxbn.batch_moments(batch_with(value)), jaxbn.batch_moments(batch_with(0.0))
    assert not np.isfinite(moments.var[1])
    poisoned = jaxbn.update_batch_stats(old, moments, momentum=momentum)
    assert not np.isfinite(poisoned.var[1])
    expected = jaxbn.update_batch_stats(old, clean, momentum=momentum)
    for update in (jaxbn.update_batch_stats, jax.jit(jaxbn.update_batch_stats)):
        for skip in (True, jnp.array(True)):
            stats = update(old, moments, momentum=momentum, skip_nonfinite=skip)
            for name in ("mean", "var"):
                actual, plain = getattr(stats, name), getattr(expected, name)
                assert actual[1] == getattr(old, name)[1]
                others = jnp.array([0, 2])
                np.testing.assert_allclose(actual[others], plain[others], rtol=1e-6)
            assert stats.count == 5
        off = update(old, moments, momentum=momentum, skip_nonfinite=jnp.array(False))
        np.testing.assert_allclose(off.var, poisoned.var, rtol=1e-6)


def test_a_batch_that_is_skipped_everywhere_is_not_counted():
    # Else the next batch of the cumulative average would count for less than it is.
    moments = jaxbn.batch_moments(batch_with(np.nan, (0, 1, 2)))
    old = jaxbn.init_batch_stats(3)
    stats = jaxbn.update_batch_stats(old, moments, momentum=None, skip_nonfinite=True)
    jax.tree.map(np.testing.assert_array_equal, stats, old)
    good = jaxbn.batch_moments(batch_with(0.0))
    stats = jaxbn.update_batch_stats(stats, good, momentum=None, skip_nonfinite=True)
    np.testing.assert_allclose(stats.mean, good.mean, rtol=1e-6)


def test_a_finite_batch_is_never_skipped():
    x = sample((6, 3), 0, dtype=np.float32)
    old = jaxbn.init_batch_stats(3)
    for train in (True, False):
        expected = jaxbn.batch_norm(x, old, train=train)
        actual = jaxbn.batch_norm(x, old, train=train, skip_nonfinite=True)
        # Two programs, which a compiler may round differently.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7), actual, expected)


@pytest.mark.parametrize("module", [linen.BatchNorm, lambda **kw: linen.BatchNorm1d(3, **kw)])
def test_layers_can_skip_nonfinite_channels(module):
    x = batch_with(np.inf)
    variables = module().init(jax.random.key(0), x, True)
    for skip in (False, True):
        _, updates = module(skip_nonfinite=skip).apply(variables, x, False, mutable=["batch_stats"])
        stats = updates["batch_stats"]
        assert np.isfinite(stats["mean"][1]) == np.isfinite(stats["var"][1]) == skip
        assert np.isfinite(stats["mean"][jnp.array([0, 2])]).all()


def test_the_count_stays_at_its_largest():
    largest = jnp.iinfo(jnp.int32).max
    moments = jaxbn.batch_moments(jnp.ones((4, 3)))
    for count, expected in ((largest - 1, largest), (largest, largest)):
        stats = jaxbn.init_batch_stats(3)._replace(count=jnp.int32(count))
        assert jaxbn.update_batch_stats(stats, moments).count == expected


@pytest.mark.parametrize("count", [np.int64(2**31), 2**31, -1, np.uint32(2**32 - 1)])
def test_a_count_that_int32_does_not_hold_is_refused(count):
    moments, stats = jaxbn.batch_moments(jnp.ones((4, 2))), jaxbn.init_batch_stats(2)
    message = "`count` must be from 0 to 2147483647, as int32 holds it; got"
    with pytest.raises(ValueError, match=message):
        jaxbn.update_batch_stats(stats._replace(count=count), moments)
    with pytest.raises(ValueError, match=message):
        jaxbn.BatchStats.from_mapping({**stats._asdict(), "count": np.asarray(count)})


def test_unsigned_counts_stay_at_their_largest():
    moments, stats = jaxbn.batch_moments(jnp.ones((4, 2))), jaxbn.init_batch_stats(2)
    for start, after in ((5, 6), (2**32 - 2, 2**32 - 1), (2**32 - 1, 2**32 - 1)):
        given = stats._replace(count=jnp.uint32(start))
        assert int(jaxbn.update_batch_stats(given, moments).count) == after
