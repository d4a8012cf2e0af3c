"""`normalize` and `batch_normalize` against the float64 referee, over layouts, dtypes and data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.numpy_reference import error, evaluate, normalized, problem, sample, tolerance, train
from helpers.steps import train_step

import jaxbn

LAYOUTS = [
    ((64, 8), 1),
    ((8, 5, 16), 1),
    ((8, 16, 5), -1),
    ((4, 6, 9, 9), 1),
    ((4, 9, 9, 6), -1),
    ((2, 3, 4, 5, 6), 1),
    ((2, 4, 5, 6, 3), -1),
    ((3, 8, 7), 0),
    ((32, 16, 24, 24), 1),  # more than `SMALL` elements
    ((32, 24, 24, 16), -1),
]
DTYPES = ["float32", "bfloat16", "float16", "float64"]
# Every dtype for three layouts; float32 and another one for the others.
CASES = [
    (*layout, dtype)
    for i, layout in enumerate(LAYOUTS)
    for dtype in (DTYPES if i in (3, 6, 9) else ("float32", DTYPES[1 + i % 3]))
]


def problem_in(dtype, shape, axis):
    """A problem rounded to `dtype`, its parameters in the dtype of the statistics, and that."""
    x, scale, bias, dy = (v.astype(jnp.dtype(dtype)) for v in problem(shape, axis))
    wide = np.dtype("float64" if dtype == "float64" else "float32")
    return x, scale.astype(wide), bias.astype(wide), dy, wide


def assert_expected(results, expected, n):
    for name, (actual, dtype) in results.items():
        assert actual.dtype == dtype
        assert error(actual, getattr(expected, name)) <= tolerance(dtype, n), name


@pytest.mark.parametrize("shape", [(8, 4), (1, 4), (64, 16, 16, 4)])
def test_moments_are_arrays_of_jax_outside_of_jit_too(shape):
    x = jnp.asarray(sample(shape, 0, 2.0, 3.0), jnp.float32)
    found = [jaxbn.batch_moments(x)]
    if x.size > x.shape[-1]:
        # With a function of one's own, jaxbn does not compile the layer.
        found += [jaxbn.batch_normalize(x, activation=own)[1] for own in (None, jnp.tanh)]
    for moments in found:
        assert all(isinstance(v, jax.Array) for v in moments)
        assert moments.count.dtype == np.float32
        assert moments.count == x.size // x.shape[-1]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("shape", "axis", "dtype"), CASES)
def test_training(shape, axis, dtype):
    x, scale, bias, dy, wide = problem_in(dtype, shape, axis)
    expected = train(x, scale, bias, dy, axis)
    y, moments, dx, dscale, dbias, _ = train_step(x, scale, bias, dy, axis=axis)
    assert moments.count == expected.count
    results = {"y": (y, x.dtype), "dx": (dx, x.dtype), "dscale": (dscale, wide)}
    results |= {"dbias": (dbias, wide), "mean": (moments.mean, wide), "var": (moments.var, wide)}
    assert_expected(results, expected, expected.count)


@functools.partial(jax.jit, static_argnames="axis")
def inference_step(x, mean, var, scale, bias, dy, axis):
    """Output, and the gradients of everything that is normalized by and with."""

    def function(x, mean, var, scale, bias):
        return jaxbn.normalize(x, mean, var, scale, bias, axis=axis)

    y, pullback = jax.vjp(function, x, mean, var, scale, bias)
    return y, *pullback(dy)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("shape", "axis", "dtype"), CASES)
def test_inference(shape, axis, dtype):
    x, scale, bias, dy, wide = problem_in(dtype, shape, axis)
    mean, var = bias + wide.type(2.5), np.abs(scale) + wide.type(1.0)
    expected = evaluate(x, mean, var, scale, bias, dy, axis)
    y, dx, _, _, dscale, dbias = inference_step(x, mean, var, scale, bias, dy, axis)
    results = {"y": (y, x.dtype), "dx": (dx, x.dtype), "dscale": (dscale, wide)}
    assert_expected(results | {"dbias": (dbias, wide)}, expected, x.size // x.shape[axis])


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("std", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize(("shape", "axis"), [((256, 8), 1), ((16, 24, 24, 8), -1)])
def test_no_cancellation_under_a_large_mean(shape, axis, mean, std):
    # At mean 1e4 and std 1, E[x²] − E[x]² is wrong in every digit.
    x, scale, bias, dy = problem(shape, axis, mean=mean, std=std)
    expected = train(x, scale, bias, dy, axis)
    y, moments, dx, dscale, dbias, _ = train_step(x, scale, bias, dy, axis=axis)
    limit = tolerance(np.float32, expected.count)
    assert error(y, expected.y) <= limit
    assert error(dx, expected.dx) <= limit
    assert error(dscale, expected.dscale) <= limit
    assert error(dbias, expected.dbias) <= limit
    np.testing.assert_allclose(moments.var, expected.var, rtol=limit)


def test_float16_squares_do_not_overflow():
    x = np.float16([[6e4], [-6e4], [5e4], [-5e4]])
    y, moments = jaxbn.batch_normalize(x)
    np.testing.assert_allclose(moments.var, x.astype(np.float64).var(0), rtol=1e-6)
    assert np.isfinite(np.asarray(y)).all()


def test_epsilon_is_inside_the_root():
    x = jnp.array([[-1.0], [1.0]])  # variance 1
    y, _ = jaxbn.batch_normalize(x, epsilon=3.0)
    np.testing.assert_allclose(y, x / 2, rtol=1e-6)
    y = jaxbn.normalize(x, jnp.zeros(1), jnp.ones(1), epsilon=3.0)
    np.testing.assert_allclose(y, x / 2, rtol=1e-6)


@pytest.mark.parametrize("negative", [-1e-6, -2.0])
def test_a_negative_variance_shows(negative):
    x, mean, var = jnp.ones((2, 3)), jnp.zeros(3), jnp.array([1.0, negative, 0.0])
    for function in (jaxbn.normalize, jax.jit(jaxbn.normalize)):
        y = function(x, mean, var)
        assert np.isnan(y[:, 1]).all()
        assert np.isfinite(y[:, ::2]).all()


@pytest.mark.parametrize(
    ("with_scale", "with_bias"), [(True, False), (False, True), (False, False)]
)
def test_missing_scale_and_bias(with_scale, with_bias):
    x, scale, bias, _ = problem((12, 4), 1)
    ones, zeros = np.ones(4, np.float32), np.zeros(4, np.float32)
    given = scale if with_scale else None, bias if with_bias else None
    implied = scale if with_scale else ones, bias if with_bias else zeros
    for actual, expected in (
        (jaxbn.batch_normalize(x, *given)[0], jaxbn.batch_normalize(x, *implied)[0]),
        (jaxbn.normalize(x, bias, ones, *given), jaxbn.normalize(x, bias, ones, *implied)),
    ):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.usefixtures("x64")
def test_inference_keeps_the_precision_of_float64_statistics():
    x = sample((6, 3), 0, dtype=np.float32)
    mean, var = x.mean(0).astype(np.float64) + 1e-9, np.full(3, 2.0 + 1e-12)
    y = jaxbn.normalize(x, mean, var)
    expected = normalized(x, mean, var, np.ones(3), np.zeros(3), 1).astype(np.float32)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=6e-8)


def test_inference_gradients_reach_mean_and_var():
    x, scale, bias, dy = problem((12, 4), 1)
    mean, var = bias + 2, np.abs(scale) + 1
    _, _, dmean, dvar, *_ = inference_step(x, mean, var, scale, bias, dy, axis=-1)
    rstd = 1 / np.sqrt(var.astype(np.float64) + 1e-5)
    expected_dmean = -(dy * scale * rstd).sum(0)
    expected_dvar = -0.5 * (dy * scale * (x - mean) * rstd**3).sum(0)
    assert error(dmean, expected_dmean) <= tolerance(np.float32, 12)
    assert error(dvar, expected_dvar) <= tolerance(np.float32, 12)


@pytest.mark.parametrize("rows", [32, 20_000])  # summed in two parts, and by the compiler
def test_infinite_parameters_stay_where_they_are(rows):
    x = sample((rows, 2), 0, dtype=np.float32)
    bias = jnp.array([np.inf, 3.4e38])
    for y in (
        jaxbn.normalize(x, x[0], x[1] ** 2, bias=bias),
        jaxbn.batch_normalize(x, bias=bias)[0],
    ):
        np.testing.assert_array_equal(y, np.broadcast_to(bias, x.shape))
    x[0, 0] = np.inf
    np.testing.assert_array_equal(jaxbn.batch_moments(x).mean[0], np.nan)


def test_accepts_numpy_arrays():
    x = sample((6, 3), 0, dtype=np.float32)
    y, moments = jaxbn.batch_normalize(x)
    assert isinstance(y, jax.Array)
    np.testing.assert_array_equal(y, jaxbn.batch_normalize(jnp.asarray(x))[0])
    np.testing.assert_array_equal(moments.mean, jaxbn.batch_moments(jnp.asarray(x)).mean)


def test_a_constant_channel_gives_the_bias():
    x = jnp.full((64, 2), 1e6 / 3)
    y, moments = jaxbn.batch_normalize(x, bias=jnp.array([1.0, 2.0]))
    assert (np.asarray(moments.var) <= 1e-12 * np.square(1e6 / 3)).all()
    np.testing.assert_allclose(y, np.broadcast_to([1.0, 2.0], y.shape), atol=1e-3)
