"""Masks: what they leave out reaches no value and no derivative, and what is left is exact."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compare import assert_close
from helpers.numpy_reference import error, masked_train, problem, running, sample, tolerance, train
from helpers.steps import train_step
from jax.experimental import checkify

import jaxbn
from jaxbn import linen
from jaxbn._core import moments

SHAPE = (8, 5, 6, 4)
# The shapes of masks, all of which broadcast against `SHAPE`.
EXTENTS = {
    "one value per sample": (8, 1, 1, 1),
    "one value per position": (8, 5, 6, 1),
    "one value per position, the same in all samples": (5, 6, 1),
    "one value per element": (8, 5, 6, 4),
    "one value per sample and channel": (8, 1, 1, 4),
}
FILLINGS = [np.nan, np.inf, -np.inf, 3e38]


def random_mask(shape, seed=5):
    """About two thirds True."""
    return np.random.RandomState(seed).random_sample(shape) > 0.35


def filled(x, mask, value):
    return np.where(mask, x, np.asarray(value, x.dtype))


def assert_as_expected(actual, expected, limit):
    y, moments, dx, dscale, dbias, _ = actual
    np.testing.assert_array_equal(moments.count, expected.count)
    for value, name in [
        (moments.mean, "mean"),
        (moments.var, "var"),
        (y, "y"),
        (dx, "dx"),
        (dscale, "dscale"),
        (dbias, "dbias"),
    ]:
        assert error(value, getattr(expected, name)) <= limit, name


@pytest.mark.parametrize("value", [0.0, *FILLINGS])
@pytest.mark.parametrize("extent", EXTENTS)
def test_equals_the_values_that_count_alone(extent, value):
    x, scale, bias, dy = problem(SHAPE, -1, mean=50.0)
    mask = random_mask(EXTENTS[extent])
    expected = masked_train(x, scale, bias, dy, -1, mask)
    actual = train_step(filled(x, mask, value), scale, bias, dy, mask)
    assert_as_expected(actual, expected, tolerance(np.float32, expected.count.max()))
    left_out = ~np.broadcast_to(mask, SHAPE)
    assert (np.asarray(actual[0])[left_out] == 0).all()
    assert (np.asarray(actual[2])[left_out] == 0).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_every_channel_axis_in_float64(axis):
    x, scale, bias, dy = problem(SHAPE, axis, dtype=np.float64, mean=50.0)
    for shape in (SHAPE, [n if i == axis else 1 for i, n in enumerate(SHAPE)], SHAPE[2:]):
        mask = random_mask(shape)
        expected = masked_train(x, scale, bias, dy, axis, mask)
        actual = train_step(filled(x, mask, np.nan), scale, bias, dy, mask, axis=axis)
        assert_as_expected(actual, expected, 1e-12)


@pytest.mark.parametrize(("shape", "axis"), [((64, 24, 24, 8), -1), ((64, 8, 24, 24), 1)])
def test_large_batches_under_a_large_mean(shape, axis):
    # Summed by the compiler; the values that count may all lie in a corner, or out of one.
    x, scale, bias, dy = problem(shape, axis, mean=1e5)
    for kept in (slice(0, 3), slice(40, None)):
        mask = np.zeros((64, 1, 1, 1), bool)
        mask[kept] = True
        expected = train(x[kept], scale, bias, dy[kept], axis)
        y, moments, dx, dscale, dbias, _ = train_step(
            filled(x, mask, np.nan), scale, bias, dy, mask, axis=axis
        )
        assert error(y[kept], expected.y) <= 1e-6
        np.testing.assert_allclose(moments.var, expected.var, rtol=2e-6)
        assert error(dx[kept], expected.dx) <= 1e-6
        assert error(dbias, expected.dbias) <= 1e-6
        assert error(dscale, expected.dscale) <= 2e-6


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "silu", "gelu", jnp.tanh])
@pytest.mark.parametrize("value", FILLINGS)
def test_padding_touches_nothing(value, activation):
    x, scale, bias, dy = problem(SHAPE, -1)
    residual, mask = (
        sample(SHAPE, 9, dtype=np.float32),
        random_mask(EXTENTS["one value per position"]),
    )
    options = {"activation": activation}
    expected = train_step(x, scale, bias, dy, mask, residual, **options)
    padded = train_step(
        filled(x, mask, value),
        scale,
        bias,
        filled(dy, mask, value),
        mask,
        filled(residual, mask, value),
        **options,
    )
    jax.tree.map(np.testing.assert_array_equal, padded, expected)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(padded))


@functools.partial(jax.jit, static_argnames="mode")
def second_derivatives(mode, operands, tangents, mask, dy):
    """A loss, its derivative in the direction of `tangents`, and its Hessian."""
    _, scale, bias, _ = operands
    stats = jaxbn.BatchStats(bias + 3, jnp.abs(scale) + 1, jnp.int32(0))
    options = {"train": mode == "train", "mask": mask, "activation": "silu"}

    def loss(x, scale, bias, residual):
        y, _ = jaxbn.batch_norm(x, stats, scale, bias, residual=residual, **options)
        return (jnp.sin(y) * jnp.where(mask, dy, 0)).sum()

    return jax.jvp(loss, operands, tangents), jax.hessian(loss, (0, 1, 2, 3))(*operands)


@pytest.mark.parametrize("value", FILLINGS)
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_padding_touches_no_second_derivative_and_no_tangent(mode, value):
    x, scale, bias, dy = problem((4, 3, 2), -1)
    mask = random_mask((4, 3, 1))
    residual, tangent = (sample(x.shape, seed, dtype=np.float32) for seed in (9, 10))

    def results(x, residual, tangent):
        operands, tangents = (x, scale, bias, residual), (tangent, scale, bias, tangent)
        return second_derivatives(mode, operands, tangents, mask, dy)

    expected = results(x, residual, tangent)
    padded = results(*(filled(v, mask, value) for v in (x, residual, tangent)))
    jax.tree.map(np.testing.assert_array_equal, padded, expected)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(padded))


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_no_operation_makes_nan_of_padding(mode):
    x, scale, bias, dy = problem((4, 3, 2), -1)
    mask = random_mask((4, 3, 1))
    stats = jaxbn.BatchStats(bias + 3, np.abs(scale) + 1, jnp.int32(0))

    @jax.jit
    def step(x, scale, bias):
        y, new = jaxbn.batch_norm(
            x, stats, scale, bias, train=mode == "train", mask=mask, activation="silu", residual=x
        )
        return (y * dy).sum(), (y, new)

    padded = filled(x, mask, np.nan)
    with_gradients = jax.value_and_grad(step, (0, 1, 2), has_aux=True)
    with jax.debug_nans(True):
        results = with_gradients(padded, scale, bias)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(results))
    # Where `debug_nans` looks at results, this looks at every operation.
    checked = checkify.checkify(with_gradients, errors=checkify.nan_checks)
    checked(padded, scale, bias)[0].throw()


def test_a_padded_batch_is_the_batch():
    x, scale, bias, dy = problem((6, 5, 4), -1, mean=50.0)
    padded_x, padded_dy = (
        np.concatenate([v, np.full((3, 5, 4), np.nan, np.float32)]) for v in (x, dy)
    )
    stats = jaxbn.init_batch_stats(4)

    @jax.jit
    def step(x, dy, mask):
        y, pullback, new = jax.vjp(
            lambda x, scale, bias: jaxbn.batch_norm(
                x, stats, scale, bias, train=True, mask=mask, activation="relu"
            ),
            x,
            scale,
            bias,
            has_aux=True,
        )
        return y, new, *pullback(dy)

    y, new, dx, dscale, dbias = step(padded_x, padded_dy, np.arange(9).reshape(9, 1, 1) < 6)
    assert_close((y[:6], new, dx[:6], dscale, dbias), step(x, dy, None), 2e-6)
    assert (y[6:] == 0).all()


def test_bessels_correction_counts_what_counts():
    x, mask = sample((6, 3), 0, dtype=np.float32), random_mask((6, 3), 2)
    counts = mask.sum(0)
    assert len(set(counts)) > 1
    expected = masked_train(x, np.ones(3), np.zeros(3), x, 1, mask)
    stats = jaxbn.init_batch_stats(3)
    _, stats = jaxbn.batch_norm(x, stats, train=True, mask=mask, momentum=0.3)
    mean, var = running(np.zeros(3), np.ones(3), expected.mean, expected.var, counts, 0.3)
    np.testing.assert_allclose(stats.mean, mean, rtol=1e-6)
    np.testing.assert_allclose(stats.var, var, rtol=1e-6)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_nothing_counts_in_a_channel_or_at_all(momentum):
    x, scale, bias, dy = problem((6, 3), 1)
    old = jaxbn.BatchStats(bias + 2, np.abs(scale) + 1, np.int32(4))

    @jax.jit
    def step(x, mask):
        def function(x):
            options = {"mask": mask, "momentum": momentum, "activation": "gelu"}
            return jaxbn.batch_norm(x, old, scale, bias, train=True, **options)

        y, pullback, stats = jax.vjp(function, x, has_aux=True)
        return y, *pullback(dy), stats

    for empty in ([1], [0, 1, 2]):
        mask = np.ones((6, 3), bool)
        mask[:, empty] = False
        y, dx, stats = jax.tree.map(np.asarray, step(filled(x, mask, np.nan), mask))
        assert np.isfinite(y).all()
        assert np.isfinite(dx).all()
        np.testing.assert_array_equal(y[:, empty], 0)
        np.testing.assert_array_equal(dx[:, empty], 0)
        np.testing.assert_array_equal(stats.mean[empty], old.mean[empty])
        np.testing.assert_array_equal(stats.var[empty], old.var[empty])
        full = [c for c in range(3) if c not in empty]
        assert (stats.mean[full] != old.mean[full]).all()
        assert stats.count == 5


def test_one_value_that_counts_gives_the_bias_and_keeps_the_variance():
    x, scale, bias, _ = problem((6, 3), 1)
    mask = np.arange(6).reshape(6, 1) == 2
    old = jaxbn.init_batch_stats(3)
    y, stats = jaxbn.batch_norm(x, old, scale, bias, train=True, mask=mask, momentum=0.5)
    np.testing.assert_allclose(y[2], bias, rtol=1e-6)
    np.testing.assert_allclose(stats.mean, x[2] / 2, rtol=1e-6)
    np.testing.assert_array_equal(stats.var, old.var)


normalized = jax.jit(lambda x, mask: jaxbn.batch_normalize(x, mask=mask))


@pytest.mark.parametrize("dtype", ["bool", "int32", "uint8", "float32", "bfloat16"])
def test_zeros_and_ones_in_any_dtype(dtype):
    x = sample((6, 4, 3), 0, dtype=np.float32)
    mask = random_mask((6, 4, 1))
    expected = normalized(x, mask)
    given = mask.astype(jnp.dtype(dtype))
    for actual in (jaxbn.batch_normalize(x, mask=given), normalized(x, given)):
        assert_close(actual, expected, 1e-6)


def test_a_traced_mask_of_other_numbers_shows():
    x = sample((6, 3), 0, dtype=np.float32)
    by_statistics = jax.jit(lambda mask: jaxbn.normalize(x, x[0], x[1] ** 2, mask=mask))
    for value in (2.0, 0.5, -1.0, np.nan):
        mask = np.ones((6, 3), np.float32)
        mask[4, 1] = value
        y, moments = normalized(x, mask)
        assert np.isnan(moments.mean[1])
        assert np.isnan(y[:, 1]).all()
        assert np.isfinite(np.asarray(y)[:, [0, 2]]).all()
        assert np.isnan(by_statistics(mask)[4, 1])


def test_inference_takes_the_mask_too():
    x, scale, bias, _ = problem((6, 4, 3), -1)
    mask = random_mask((6, 1, 1))
    stats = jaxbn.BatchStats(bias + 2, np.abs(scale) + 1, jnp.int32(0))
    plain, _ = jaxbn.batch_norm(x, stats, scale, bias, train=False)
    for padded in (x, filled(x, mask, np.nan)):
        y, new = jaxbn.batch_norm(padded, stats, scale, bias, train=False, mask=mask)
        np.testing.assert_array_equal(y, np.where(mask, plain, 0))
        assert new is stats or jax.tree.all(jax.tree.map(np.array_equal, new, stats))


@pytest.mark.parametrize(
    "module",
    [
        linen.BatchNorm(momentum=0.7),
        linen.BatchNorm2d(4, axis=-1, momentum=0.3),
        linen.BatchNorm2d(4, axis=-1, momentum=0.3, track_running_stats=False),
    ],
    ids=["BatchNorm", "BatchNorm2d", "no statistics"],
)
def test_layers(module):
    x, mask = sample(SHAPE, 0, dtype=np.float32), random_mask(EXTENTS["one value per position"])
    padded = filled(x, mask, np.nan)
    variables = module.init(jax.random.key(0), padded, False, mask=mask)
    y, updates = module.apply(variables, padded, False, mask=mask, mutable=["batch_stats"])
    expected = masked_train(x, np.ones(4), np.zeros(4), x, -1, mask)
    assert error(y, expected.y) <= 1e-6
    if updates:
        unbiased = isinstance(module, linen.BatchNorm2d)
        mean, var = running(
            np.zeros(4), np.ones(4), expected.mean, expected.var, expected.count, 0.3, unbiased
        )
        np.testing.assert_allclose(updates["batch_stats"]["mean"], mean, rtol=1e-5)
        np.testing.assert_allclose(updates["batch_stats"]["var"], var, rtol=1e-5)
    y = module.apply(variables, padded, True, mask=mask)
    assert np.isfinite(y).all()
    assert (np.asarray(y)[~np.broadcast_to(mask, SHAPE)] == 0).all()


def test_more_entries_than_an_int32_counts(monkeypatch):
    x, mask = jnp.ones((8, 5, 6, 4)), random_mask((8, 5, 6, 1))
    expected = jaxbn.batch_moments(x, mask=mask).count
    monkeypatch.setattr(moments, "COUNTED", 100)
    jax.clear_caches()
    found = jaxbn.batch_moments(x, mask=mask).count
    jax.clear_caches()
    np.testing.assert_array_equal(found, expected)

    # One value of the mask may stand for more than an int32 counts.
    huge = jax.ShapeDtypeStruct((2, 70000, 70000, 1), jnp.bfloat16)
    small = jax.ShapeDtypeStruct((2, 1, 1, 1), bool)
    shapes = jax.eval_shape(lambda x, mask: jaxbn.batch_normalize(x, mask=mask), huge, small)
    assert shapes[1].count.shape == (1,)
