"""Batch renormalization against its definition in float64, Keras and batch norm itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from helpers.compare import assert_close
from helpers.numpy_reference import error, masked_train, problem, sample, tolerance
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import linen, nnx

SHAPE = (16, 3, 4)
X, SCALE, BIAS, DY = problem(SHAPE, -1)
MASK = np.arange(48).reshape(16, 3, 1) % 5 != 0
STATS = jaxbn.BatchStats(jnp.linspace(1.0, 6.0, 4), jnp.linspace(1.0, 9.0, 4), jnp.int32(7))
LIMITS = [(1.0, 0.0), (1.3, 0.2), (3.0, 5.0), (np.inf, np.inf)]


def reference(x, scale, bias, dy, r_max, d_max, mask=True, epsilon=1e-5):
    """Output and gradients: those of batch norm with the scale and bias of the correction."""
    stats, ones = (np.asarray(v, np.float64) for v in STATS[:2]), np.ones(4)
    plain = masked_train(x, ones, 0 * ones, dy, -1, mask, epsilon)
    mean, std = next(stats), np.sqrt(next(stats) + epsilon)
    r = np.clip(np.sqrt(plain.var + epsilon) / std, 1 / r_max, r_max)
    d = np.clip((plain.mean - mean) / std, -d_max, d_max)
    one = masked_train(x, scale * r, bias + scale * d, dy, -1, mask, epsilon)
    return one.y, one.dx, one.dscale * r + one.dbias * d, one.dbias


@functools.partial(jax.jit, static_argnames=("average_std", "virtual_batch_size", "axis_name"))
def run(r_max, d_max, x, scale, bias, dy, mask=True, average_std=False, **options):
    """Output, gradients and statistics."""
    renorm = jaxbn.Renorm(r_max, d_max, average_std)

    def forward(*operands):
        return jaxbn.batch_norm(
            operands[0], STATS, *operands[1:], train=True, mask=mask, renorm=renorm, **options
        )

    y, backward, stats = jax.vjp(forward, x, scale, bias, has_aux=True)
    return (y, *backward(dy)), stats


@pytest.mark.parametrize("mask", [True, MASK], ids=["whole", "masked"])
@pytest.mark.parametrize("limits", LIMITS)
def test_the_definition(limits, mask):
    actual, stats = run(*limits, X, SCALE, BIAS, DY, mask)
    for value, expected in zip(actual, reference(X, SCALE, BIAS, DY, *limits, mask), strict=True):
        assert error(value, expected) <= tolerance(np.float32, X.size)
    assert_close(stats, jaxbn.batch_norm(X, STATS, train=True, mask=jnp.asarray(mask))[1], 1e-6)


def test_no_correction_is_batch_norm():
    _, plain = jaxbn.batch_norm(X, STATS, SCALE, BIAS, train=True)
    (y, *_), stats = run(1.0, 0.0, X, SCALE, BIAS, DY)
    assert_close(y, jaxbn.batch_normalize(X, SCALE, BIAS)[0], 1e-6)
    assert_close(stats, plain, 1e-6)


def test_no_limits_are_inference():
    (y, *_), _ = run(np.inf, np.inf, X, SCALE, BIAS, DY)
    assert_close(y, jaxbn.normalize(X, STATS.mean, STATS.var, SCALE, BIAS), 2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    x, dy = (v.astype(dtype) for v in (X, DY))
    rounded = (np.asarray(v, np.float64) for v in (x, dy))
    actual, _ = run(1.3, 0.2, x, SCALE, BIAS, dy)
    expected = reference(next(rounded), SCALE, BIAS, next(rounded), 1.3, 0.2)
    for value, right in zip(actual, expected, strict=True):
        assert error(value, right) <= tolerance(value.dtype, X.size)


def test_each_group_is_corrected():
    (y, dx, *_), _ = run(1.3, 0.2, X, SCALE, BIAS, DY, virtual_batch_size=4)
    for i in range(0, 16, 4):
        part = slice(i, i + 4)
        expected = reference(X[part], SCALE, BIAS, DY[part], 1.3, 0.2)
        assert error(y[part], expected[0]) <= tolerance(np.float32, X.size)
        assert error(dx[part], expected[1]) <= tolerance(np.float32, X.size)


@pytest.mark.parametrize("transform", ["vmap", "shard_map"])
def test_devices_share_the_correction(transform):
    expected, stats = run(1.3, 0.2, X, SCALE, BIAS, DY)
    over = functools.partial(run, 1.3, 0.2, axis_name="devices")
    if transform == "vmap":
        parts = X.reshape(4, 4, 3, 4), SCALE, BIAS, DY.reshape(4, 4, 3, 4)
        mapped = jax.vmap(over, (0, None, None, 0), (0, None), axis_name="devices")
        (y, dx, dscale, dbias), same = mapped(*parts)
        y, dx = y.reshape(SHAPE), dx.reshape(SHAPE)
        dscale, dbias = dscale.sum(0), dbias.sum(0)
    else:
        mesh = jax.make_mesh((4,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
        split, whole = P("devices"), P()
        mapped = jax.shard_map(
            over,
            mesh=mesh,
            in_specs=(split, whole, whole, split),
            out_specs=((split, split, whole, whole), whole),
        )
        (y, dx, dscale, dbias), same = jax.jit(mapped)(X, SCALE, BIAS, DY)
    assert_close((y, dx, dscale, dbias), expected, 1e-5)
    assert_close(same, stats, 1e-6)


def test_the_average_of_standard_deviations():
    _, stats = run(2.0, 1.0, X, SCALE, BIAS, DY, average_std=True)
    var = X.reshape(-1, 4).astype(np.float64).var(0, ddof=1)
    std = 0.9 * np.sqrt(np.asarray(STATS.var) + 1e-5) + 0.1 * np.sqrt(var + 1e-5)
    np.testing.assert_allclose(stats.var, std**2 - 1e-5, rtol=1e-6)
    np.testing.assert_allclose(stats.mean, 0.9 * STATS.mean + 0.1 * X.mean((0, 1)), rtol=1e-6)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of Keras
def test_a_training_loop_of_keras(monkeypatch):
    """Gradient descent on one layer, small batches of drifting data: the same at every step."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras", reason="keras is not installed")
    clipping = {"rmax": 1.5, "rmin": 1 / 1.5, "dmax": 0.5}
    layer = keras.layers.BatchNormalization(
        momentum=0.9, renorm=True, renorm_clipping=clipping, renorm_momentum=0.9
    )
    layer.build((4, 4))
    renorm = jaxbn.Renorm(1.5, 0.5, average_std=True)
    ours = jnp.asarray(SCALE), jnp.asarray(BIAS)
    for variable, value in zip(layer.trainable_variables, ours, strict=True):
        variable.assign(value)
    theirs = [v.value for v in layer.trainable_variables]
    fixed = [v.value for v in layer.non_trainable_variables]
    # The deviation of Keras, epsilon included, starts at 1.
    stats = jaxbn.init_batch_stats(4)._replace(var=jnp.full(4, 1 - 1e-3))

    @jax.jit
    def step(theirs, fixed, ours, stats, x, dy):
        def keras_loss(theirs):
            y, new = layer.stateless_call(theirs, fixed, x, training=True)
            return (y * dy).sum(), (y, new)

        def loss(ours):
            y, new = jaxbn.batch_norm(
                x, stats, *ours, train=True, unbiased=False, epsilon=1e-3, renorm=renorm
            )
            return (y * dy).sum(), (y, new)

        expected, (y, fixed) = jax.grad(keras_loss, has_aux=True)(theirs)
        actual, (same, stats) = jax.grad(loss, has_aux=True)(ours)
        theirs, ours = (
            jax.tree.map(lambda p, g: p - 0.01 * g, parameters, gradients)
            for parameters, gradients in ((theirs, expected), (ours, actual))
        )
        return theirs, fixed, ours, stats, y, same

    for i in range(40):
        x = sample((4, 4), i, 1 + 0.05 * i, 2.0, np.float32)
        dy = sample((4, 4), 100 + i, 0.3, 1.0, np.float32)
        theirs, fixed, ours, stats, y, same = step(theirs, fixed, ours, stats, x, dy)
        assert_close(same, y, 1e-5)
    assert_close(list(ours), list(theirs), 1e-5)
    values = {v.name: value for v, value in zip(layer.non_trainable_variables, fixed, strict=True)}
    assert_close([stats.mean, stats.var], [values["moving_mean"], values["moving_variance"]], 1e-5)


def warm_up(count):
    return jnp.where(count < 2, 1.0, 2.0)


RENORM = jaxbn.Renorm(warm_up, lambda count: count.astype("float32") / 4)


def test_schedules_see_the_batches_before():
    stats = jaxbn.init_batch_stats(4)
    for r_max, d_max in ((1.0, 0.0), (1.0, 0.25), (2.0, 0.5)):
        constant = jaxbn.Renorm(r_max, d_max)
        expected = jaxbn.batch_norm(X, stats, SCALE, BIAS, train=True, renorm=constant)
        actual = jaxbn.batch_norm(X, stats, SCALE, BIAS, train=True, renorm=RENORM)
        assert_close(actual, expected, 0)
        _, stats = actual


def test_a_traced_limit_out_of_range_shows():
    (y, *_), _ = run(0.5, 1.0, X, SCALE, BIAS, DY)
    assert np.isnan(y).all()
    (y, *_), _ = run(2.0, -1.0, X, SCALE, BIAS, DY)
    assert np.isnan(y).all()


def test_without_correction_running_statistics_have_no_effect():
    lost = STATS._replace(mean=jnp.full(4, jnp.nan), var=jnp.full(4, jnp.nan))
    y, _ = jaxbn.batch_norm(X, lost, train=True, renorm=jaxbn.Renorm(1.0, 0.0))
    assert_close(y, jaxbn.batch_normalize(X)[0], 1e-6)


def test_layers():
    layer = linen.BatchNorm2d(4, axis=-1, renorm=RENORM)
    other = nnx.BatchNorm2d(4, axis=-1, renorm=RENORM, rngs=flax_nnx.Rngs(0))
    x = X.reshape(8, 2, 3, 4)
    variables, stats = layer.init(jax.random.key(0), x, True), jaxbn.init_batch_stats(4)
    for _ in range(3):
        expected, stats = jaxbn.batch_norm(x, stats, train=True, renorm=RENORM)
        y, updates = layer.apply(variables, x, False, mutable=["batch_stats"])
        variables = {**variables, **updates}
        assert_close([y, other(x)], [expected, expected], 1e-6)
    assert_close(variables["batch_stats"], stats._asdict(), 1e-6)
    assert_close(other.var[...], stats.var, 1e-6)
    flax = linen.BatchNorm(momentum=0.9, renorm=jaxbn.Renorm(2.0, 1.0))
    variables = flax.init(jax.random.key(0), x, True)
    y, updates = flax.apply(variables, x, False, mutable=["batch_stats"])
    expected, stats = jaxbn.batch_norm(
        x, jaxbn.init_batch_stats(4), train=True, unbiased=False, renorm=flax.renorm
    )
    assert_close(y, expected, 1e-6)
    assert_close(updates["batch_stats"]["var"], stats.var, 1e-6)


def test_what_is_kept_for_the_backward_pass():
    x = jnp.zeros((64, 64, 16), jnp.bfloat16)

    def kept(renorm):
        def forward(x):
            stats = jaxbn.init_batch_stats(16)
            return jaxbn.batch_norm(
                x, stats, SCALE.sum() + jnp.ones(16), train=True, renorm=renorm
            )[0]

        residuals = jax.eval_shape(lambda x: jax.vjp(forward, x)[1], x)
        return sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(residuals))

    assert kept(jaxbn.Renorm(2.0, 1.0)) <= kept(None) + 8 * 4 * 16


ERRORS = {
    "r_max": (lambda: jaxbn.Renorm(0.5), ValueError, "`r_max` must be at least 1; got 0.5."),
    "an array out of range": (
        lambda: jaxbn.Renorm(jnp.array(0.5)),
        ValueError,
        "`r_max` must be at least 1; got 0.5.",
    ),
    "a schedule that starts at 0": (
        lambda: jaxbn.batch_norm(X, STATS, train=True, renorm=jaxbn.Renorm(lambda count: 0.0)),
        ValueError,
        "`r_max` must be at least 1; got 0.0.",
    ),
    "no number": (
        lambda: jaxbn.Renorm("3"),
        TypeError,
        "`r_max` must be a number or a function of the count; got '3'.",
    ),
    "NaN": (lambda: jaxbn.Renorm(d_max=np.nan), ValueError, "`d_max` must be at least 0; got nan."),
    "average_std": (
        lambda: jaxbn.Renorm(average_std=1),
        TypeError,
        "`average_std` must be True or",
    ),
    "no statistics": (
        lambda: jaxbn.batch_norm(X, None, train=True, renorm=jaxbn.Renorm()),
        ValueError,
        "`renorm` needs running statistics; got stats=None. Pass `stats`.",
    ),
    "another type": (
        lambda: jaxbn.batch_norm(X, STATS, train=True, renorm=(3.0, 5.0)),
        TypeError,
        "`renorm` must be a jaxbn.Renorm or None; got tuple.",
    ),
    "per channel": (
        lambda: jaxbn.Renorm(jnp.ones(4)),
        ValueError,
        "`r_max` must be a real number, the same for all channels; got float32 of shape (4,).",
    ),
    "channels": (
        lambda: jaxbn.batch_norm(X, STATS, train=True, axis=0, renorm=jaxbn.Renorm()),
        ValueError,
        "`stats.mean` must have shape (16,)",
    ),
    "a schedule without a count": (
        lambda: linen.BatchNorm(renorm=RENORM).init_with_output(jax.random.key(0), X, False),
        ValueError,
        "A schedule of `renorm` needs the number of batches, which BatchNorm does not keep.",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, kind, words = ERRORS[case]
    with pytest.raises(kind) as caught:
        call()
    assert words in str(caught.value)
