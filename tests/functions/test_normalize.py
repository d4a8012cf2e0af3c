"""`normalize` and `batch_normalize` against the float64 referee, over layouts, dtypes and data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.numpy_reference import error, evaluate, normalized, problem, sample, tolerance, train

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
    ((32, 16, 24, 24), 1),  # summed by the compiler, not in two parts
    ((32, 24, 24, 16), -1),
]
DTYPES = ["float32", "bfloat16", "float16", "float64"]


def gradients(function, *arguments, dy):
    """Output, and gradients with respect to every argument."""
    y, pullback = jax.vjp(function, *arguments)
    return y, *pullback(jnp.asarray(dy, y.dtype))


def problem_in(dtype, shape, axis):
    """A problem rounded to `dtype`, its parameters in the dtype of the statistics, and that."""
    x, scale, bias, dy = (jnp.asarray(v, dtype) for v in problem(shape, axis))
    wide = "float64" if dtype == "float64" else "float32"
    return x, scale.astype(wide), bias.astype(wide), dy, wide


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_training(shape, axis, dtype):
    x, scale, bias, dy, wide = problem_in(dtype, shape, axis)
    expected = train(x, scale, bias, dy, axis)

    def function(x, scale, bias):
        return jaxbn.batch_normalize(x, scale, bias, axis=axis)[0]

    y, dx, dscale, dbias = gradients(function, x, scale, bias, dy=dy)
    moments = jaxbn.batch_normalize(x, axis=axis)[1]
    n = expected.count
    assert y.dtype == dx.dtype == jnp.dtype(dtype)
    assert moments.mean.dtype == moments.var.dtype == jnp.dtype(wide)
    assert moments.count == n
    for actual, name, kind in [
        (y, "y", dtype),
        (dx, "dx", dtype),
        (dscale, "dscale", wide),
        (dbias, "dbias", wide),
        (moments.mean, "mean", wide),
        (moments.var, "var", wide),
    ]:
        assert error(actual, getattr(expected, name)) <= tolerance(kind, n), name


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis"), LAYOUTS)
def test_inference(shape, axis, dtype):
    x, scale, bias, dy, wide = problem_in(dtype, shape, axis)
    mean, var = bias + 2.5, jnp.abs(scale) + 1.0
    expected = evaluate(x, mean, var, scale, bias, dy, axis)

    def function(x, scale, bias):
        return jaxbn.normalize(x, mean, var, scale, bias, axis=axis)

    y, dx, dscale, dbias = gradients(function, x, scale, bias, dy=dy)
    n = x.size // x.shape[axis]
    assert y.dtype == dx.dtype == jnp.dtype(dtype)
    for actual, name, kind in [
        (y, "y", dtype),
        (dx, "dx", dtype),
        (dscale, "dscale", wide),
        (dbias, "dbias", wide),
    ]:
        assert error(actual, getattr(expected, name)) <= tolerance(kind, n), name


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("std", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize(("shape", "axis"), [((256, 8), 1), ((16, 24, 24, 8), -1)])
def test_no_cancellation_under_a_large_mean(shape, axis, mean, std):
    # At mean 1e4 and std 1, E[x²] − E[x]² is wrong in every digit.
    x, scale, bias, dy = problem(shape, axis, mean=mean, std=std)
    expected = train(x, scale, bias, dy, axis)

    def function(x, scale, bias):
        return jaxbn.batch_normalize(x, scale, bias, axis=axis)[0]

    y, dx, dscale, dbias = gradients(function, x, scale, bias, dy=dy)
    moments = jaxbn.batch_moments(x, axis=axis)
    limit = tolerance(np.float32, expected.count)
    assert error(y, expected.y) <= limit
    assert error(dx, expected.dx) <= limit
    assert error(dscale, expected.dscale) <= limit
    assert error(dbias, expected.dbias) <= limit
    np.testing.assert_allclose(moments.var, expected.var, rtol=limit)


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_the_float32_result_rounded_once(dtype):
    x, scale, bias, _ = problem((16, 9, 9, 6), -1)
    low = jnp.asarray(x, dtype)
    y, moments = jaxbn.batch_normalize(low, scale, bias)
    wide_y, wide_moments = jaxbn.batch_normalize(low.astype(jnp.float32), scale, bias)
    np.testing.assert_array_equal(y, wide_y.astype(dtype))
    np.testing.assert_array_equal(moments.var, wide_moments.var)
    y = jaxbn.normalize(low, moments.mean, moments.var, scale, bias)
    wide_y = jaxbn.normalize(low.astype(jnp.float32), moments.mean, moments.var, scale, bias)
    np.testing.assert_array_equal(y, wide_y.astype(dtype))


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
    _, dmean, dvar = gradients(
        lambda mean, var: jaxbn.normalize(x, mean, var, scale, bias), mean, var, dy=dy
    )
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


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("input_dtype", ["bfloat16", "float32"])
def test_output_dtype(input_dtype, dtype):
    x, scale, bias, _ = problem((16, 9, 9, 6), -1)
    x = jnp.asarray(x, input_dtype)
    wide, moments = jaxbn.batch_normalize(x.astype(jnp.float32), scale, bias)
    y, _ = jaxbn.batch_normalize(x, scale, bias, dtype=dtype)
    assert y.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(y, wide.astype(dtype))
    y = jaxbn.normalize(x, *moments[:2], scale, bias, dtype=dtype)
    wide = jaxbn.normalize(x.astype(jnp.float32), *moments[:2], scale, bias)
    np.testing.assert_array_equal(y, wide.astype(dtype))


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
