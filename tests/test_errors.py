"""Bad input: each case names the requirement, what arrived and the fix."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbn
from jaxbn import linen

X = jnp.ones((8, 4, 4, 3))
V3 = jnp.ones(3)
STATS = jaxbn.init_batch_stats(3)
MOMENTS = jaxbn.batch_moments(X)
FLOATS = "must have one of the dtypes bfloat16, float16, float32, float64"


def train(x=X, stats=STATS, *arguments, **options):
    return jaxbn.batch_norm(x, stats, *arguments, train=True, **options)


def infer(x=X, stats=STATS, *arguments, **options):
    return jaxbn.batch_norm(x, stats, *arguments, train=False, **options)


def layer(module, x, train=True):
    return module.init(jax.random.key(0), x, not train)


def trained_layer(module, x, other):
    variables = layer(module, x)
    return module.apply(variables, other, False, mutable=["batch_stats"])


CASES = {
    "integer input": (lambda: train(X.astype(int)), TypeError, f"`x` {FLOATS}; got int32."),
    "bool input": (lambda: train(X > 0), TypeError, f"`x` {FLOATS}; got bool."),
    "complex input": (
        lambda: infer(X.astype(jnp.complex64)),
        TypeError,
        f"`x` {FLOATS}; got complex64.",
    ),
    "fix for the dtype": (lambda: train(X.astype(int)), TypeError, "x.astype(jnp.float32)"),
    "integer scale": (
        lambda: train(X, STATS, jnp.ones(3, int)),
        TypeError,
        f"`scale` {FLOATS}; got int32.",
    ),
    "axis too large": (
        lambda: train(axis=4),
        ValueError,
        "`axis` must name an axis of `x`, from -4 to 3; got axis=4 for x.shape=(8, 4, 4, 3).",
    ),
    "axis too small": (lambda: jaxbn.batch_moments(X, axis=-5), ValueError, "got axis=-5"),
    "several axes": (
        lambda: infer(axis=(1, 2)),
        TypeError,
        "`axis` must be one int, the channel axis of `x`; got (1, 2).",
    ),
    "scalar input": (
        lambda: train(1.0),
        ValueError,
        "`x` must have at least 1 dimension, the channels; got a scalar.",
    ),
    "no channels": (
        lambda: train(jnp.ones((4, 0)), STATS),
        ValueError,
        "`x` must have at least 1 channel; got 0 at axis=-1 for x.shape=(4, 0).",
    ),
    "channels first": (
        lambda: infer(jnp.ones((8, 3, 4, 4))),
        ValueError,
        "`mean` must have shape (4,), the size of `x` along axis=3; got (3,) for "
        "x.shape=(8, 3, 4, 4). For channels-first inputs pass axis=1.",
    ),
    "channels last": (
        lambda: infer(X, axis=1),
        ValueError,
        "For channels-last inputs pass axis=-1.",
    ),
    "scale of another size": (
        lambda: train(X, STATS, jnp.ones(5)),
        ValueError,
        "`scale` must have shape (3,), the size of `x` along axis=3; got (5,) for "
        "x.shape=(8, 4, 4, 3).",
    ),
    "scale with axes of its own": (
        lambda: train(X, STATS, jnp.ones((1, 1, 1, 3))),
        ValueError,
        "got (1, 1, 1, 3)",
    ),
    "bias of another size": (
        lambda: jaxbn.batch_normalize(X, V3, jnp.ones(1)),
        ValueError,
        "`bias` must have shape (3,)",
    ),
    "scalar variance": (
        lambda: jaxbn.normalize(X, V3, 1.0),
        ValueError,
        "`var` must have shape (3,)",
    ),
    "statistics of another size": (
        lambda: train(X, jaxbn.init_batch_stats(4)),
        ValueError,
        "must describe the same channels; got stats.mean (4,), stats.var (4,), "
        "moments.mean (3,), moments.var (3,).",
    ),
    "half-precision statistics": (
        lambda: train(X, STATS._replace(var=V3.astype(jnp.bfloat16))),
        TypeError,
        "Running statistics must be float32 or float64; got stats.var of dtype bfloat16",
    ),
    "half-precision statistics, in inference": (
        lambda: infer(X, STATS._replace(mean=V3.astype(jnp.float16))),
        TypeError,
        "got stats.mean of dtype float16",
    ),
    "output of whole numbers": (
        lambda: train(dtype=jnp.int32),
        TypeError,
        "`dtype` must be one of bfloat16, float16, float32, float64, or None; got int32.",
    ),
    "float count": (
        lambda: train(X, STATS._replace(count=1.0)),
        TypeError,
        "`stats.count` must be an integer array, the number of batches; got float32.",
    ),
    "half-precision initial statistics": (
        lambda: jaxbn.init_batch_stats(3, jnp.float16),
        TypeError,
        "got stats.mean of dtype float16",
    ),
    "no features": (
        lambda: jaxbn.init_batch_stats(0),
        ValueError,
        "`num_features` must be at least 1; got 0.",
    ),
    "one value per channel": (
        lambda: train(jnp.ones((1, 3))),
        ValueError,
        "Expected more than 1 value per channel when training, got input size (1, 3)",
    ),
    "one value per channel, no statistics": (
        lambda: infer(jnp.ones((1, 3)), None),
        ValueError,
        "got input size (1, 3)",
    ),
    "one value per channel, train traced": (
        lambda: jax.jit(lambda t: jaxbn.batch_norm(jnp.ones((1, 3)), STATS, train=t))(False),
        ValueError,
        "got input size (1, 3)",
    ),
    "epsilon 0 in training": (
        lambda: train(epsilon=0.0),
        ValueError,
        "`epsilon` must be finite and positive during training; got 0.0.",
    ),
    "negative epsilon": (
        lambda: infer(epsilon=-1e-3),
        ValueError,
        "`epsilon` must be finite and non-negative; got -0.001.",
    ),
    "infinite epsilon": (lambda: train(epsilon=np.inf), ValueError, "got inf."),
    "NaN epsilon": (lambda: infer(epsilon=np.nan), ValueError, "got nan."),
    "traced epsilon": (
        lambda: jax.jit(lambda e: train(epsilon=e))(1e-5),
        TypeError,
        "`epsilon` must be a Python number, known when the function is traced",
    ),
    "momentum above 1": (
        lambda: train(momentum=1.5),
        ValueError,
        "`momentum` must be None or between 0 and 1, the weight of the new batch",
    ),
    "negative momentum": (lambda: train(momentum=-0.1), ValueError, "got -0.1."),
    "NumPy momentum above 1": (
        lambda: train(momentum=np.float32(2)),
        ValueError,
        "`momentum` must be None or between 0 and 1",
    ),
    "NaN momentum": (lambda: train(momentum=float("nan")), ValueError, "got nan."),
    "momentum for each channel": (
        lambda: train(momentum=jnp.full(3, 0.1)),
        ValueError,
        "`momentum` must be a scalar, the same for all channels; got shape (3,).",
    ),
    "momentum in words": (lambda: train(momentum="0.1"), TypeError, "0.1"),
    "momentum above 1, traced mode": (
        lambda: jax.jit(lambda t: jaxbn.batch_norm(X, STATS, train=t, momentum=2))(True),
        ValueError,
        "got 2.",
    ),
    "momentum above 1, in inference": (lambda: infer(momentum=2), ValueError, "got 2."),
    "mode in words": (
        lambda: jaxbn.batch_norm(X, STATS, train="no"),
        TypeError,
        "`train` must be True, False or a traced bool; got 'no'.",
    ),
    "mode as a number": (
        lambda: jaxbn.batch_norm(X, STATS, train=jnp.ones(())),
        TypeError,
        "`train` must be True, False or a traced bool",
    ),
    "mask, in inference": (lambda: infer(mask=X > 0), NotImplementedError, "`mask` is not"),
    "moments of different channels": (
        lambda: jaxbn.merge_moments(MOMENTS, jaxbn.batch_moments(jnp.ones((4, 2)))),
        ValueError,
        "must describe the same channels; got vectors of the shapes (2,), (3,).",
    ),
    "moments of a mean and a variance of different channels": (
        lambda: jaxbn.merge_moments(MOMENTS, MOMENTS._replace(var=jnp.ones(1))),
        ValueError,
        "got vectors of the shapes (1,), (3,).",
    ),
    "axis_name": (lambda: train(axis_name="i"), NotImplementedError, "`axis_name` is not"),
    "mask": (
        lambda: jaxbn.batch_moments(X, mask=jnp.ones(8, bool)),
        NotImplementedError,
        "`mask` is not implemented yet; leave it at None.",
    ),
    "activation": (
        lambda: infer(activation="relu"),
        NotImplementedError,
        "`activation` is not implemented yet; leave it at None.",
    ),
    "residual": (lambda: train(residual=X), NotImplementedError, "`residual` is not"),
    "1d layer, images": (
        lambda: layer(linen.BatchNorm1d(3), X),
        ValueError,
        "BatchNorm1d expected 2D or 3D input, (N, C) or (N, C, L) with axis=1; got 4D input, "
        "x.shape=(8, 4, 4, 3).",
    ),
    "2d layer, vectors": (
        lambda: layer(linen.BatchNorm2d(3, axis=-1), jnp.ones((8, 3))),
        ValueError,
        "BatchNorm2d expected 4D input, (N, H, W, C) with axis=-1; got 2D input, x.shape=(8, 3).",
    ),
    "3d layer, images": (
        lambda: layer(linen.BatchNorm3d(3), X),
        ValueError,
        "BatchNorm3d expected 5D input, (N, C, D, H, W) with axis=1; got 4D input",
    ),
    "2d layer, channels last": (
        lambda: layer(linen.BatchNorm2d(3), X),
        ValueError,
        "BatchNorm2d of 3 channels expected as many at axis=1 of its input; got 4, "
        "x.shape=(8, 4, 4, 3). For channels-last inputs pass axis=-1.",
    ),
    "2d layer, channels first": (
        lambda: layer(linen.BatchNorm2d(3, axis=-1), jnp.ones((8, 3, 4, 4))),
        ValueError,
        "For channels-first inputs pass axis=1.",
    ),
    "layer, other channel count": (
        lambda: trained_layer(linen.BatchNorm(), X, jnp.ones((8, 3, 4, 4))),
        ValueError,
        "BatchNorm of 3 channels expected as many at axis=-1 of its input; got 4, "
        "x.shape=(8, 3, 4, 4). For channels-first inputs pass axis=1.",
    ),
    "layer, integer input": (
        lambda: layer(linen.BatchNorm1d(3), jnp.ones((8, 3), int)),
        TypeError,
        f"`x` {FLOATS}; got int32.",
    ),
    "layer, complex input": (
        lambda: layer(linen.BatchNorm(), X.astype(jnp.complex64)),
        TypeError,
        f"`x` {FLOATS}; got complex64.",
    ),
    "layer, one value per channel": (
        lambda: trained_layer(linen.BatchNorm(), X, jnp.ones((1, 3))),
        ValueError,
        "got input size (1, 3)",
    ),
    "layer, momentum above 1": (
        lambda: layer(linen.BatchNorm(momentum=1.5), X),
        ValueError,
        "`momentum` of BatchNorm must be between 0 and 1, the weight of the old statistics in "
        "momentum * old + (1 - momentum) * batch; got 1.5.",
    ),
    "layer, no momentum": (
        lambda: layer(linen.BatchNorm(momentum=None), X),
        ValueError,
        "`momentum` of BatchNorm must be between 0 and 1",
    ),
    "torch layer, momentum above 1": (
        lambda: trained_layer(linen.BatchNorm2d(3, momentum=1.5, axis=-1), X, X),
        ValueError,
        "the weight of the new batch in (1 - momentum) * old + momentum * batch; got 1.5.",
    ),
    "layer, several axes": (
        lambda: layer(linen.BatchNorm2d(3, axis=(1,)), X),
        TypeError,
        "`axis` must be one int, the channel axis of `x`; got (1,).",
    ),
    "layer, axis out of range": (
        lambda: layer(linen.BatchNorm2d(3, axis=4), X),
        ValueError,
        "`axis` must name an axis of `x`, from -4 to 3; got axis=4 for x.shape=(8, 4, 4, 3).",
    ),
    "1d layer, axis of one layout": (
        lambda: layer(linen.BatchNorm1d(3, axis=2), X),
        ValueError,
        "BatchNorm1d expected 2D or 3D input, (N, L, C) with axis=2; got 4D input",
    ),
    "layer, mode in words": (
        lambda: linen.BatchNorm1d(3).init(jax.random.key(0), jnp.ones((8, 3)), "no"),
        TypeError,
        "`use_running_average` must be True, False or a traced bool; got 'no'.",
    ),
    "layer, mode missing": (
        lambda: linen.BatchNorm2d(3, axis=-1).init(jax.random.key(0), X),
        ValueError,
        '"use_running_average" must be passed to the constructor or at call time',
    ),
    "layer, mode twice": (
        lambda: layer(linen.BatchNorm(use_running_average=True), X),
        ValueError,
        '"use_running_average" was passed to the constructor and at call time',
    ),
    "layer, mask": (
        lambda: linen.BatchNorm().init(jax.random.key(0), X, False, mask=X > 0),
        NotImplementedError,
        "`mask` is not",
    ),
    "layer, axis_index_groups": (
        lambda: layer(linen.BatchNorm(axis_index_groups=[[0], [1]]), X),
        NotImplementedError,
        "`axis_index_groups` is not",
    ),
    "layer, axis_name": (
        lambda: layer(linen.BatchNorm2d(3, axis=-1, axis_name="i"), X, train=False),
        NotImplementedError,
        "`axis_name` is not",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case):
    call, kind, message = CASES[case]
    with pytest.raises(kind, match=re.escape(message)):
        call()


@pytest.mark.usefixtures("x64")
def test_statistics_of_two_dtypes():
    stats = jaxbn.init_batch_stats(3)
    stats = stats._replace(mean=stats.mean.astype(jnp.float64))
    with pytest.raises(TypeError, match="must have the same dtype; got float64 and float32"):
        train(jnp.ones((4, 3), jnp.float32), stats)


def test_checks_are_not_confused_by_good_input():
    x = X + jnp.arange(8.0).reshape(8, 1, 1, 1)
    expected = train(x, STATS, V3, V3, momentum=0.1)
    for number, mode in ((np.float32, np.bool_(True)), (jnp.float32, True)):
        epsilon = np.float32(1e-5)
        actual = jaxbn.batch_norm(
            x, STATS, V3, V3, train=mode, momentum=number(0.1), epsilon=epsilon, axis=np.int64(3)
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), actual, expected)
    # One value per channel is enough to infer, without a batch axis too, and (1, L, C) to train.
    np.testing.assert_array_equal(infer(jnp.ones((1, 3)), epsilon=0.0)[0], np.ones((1, 3)))
    np.testing.assert_array_equal(infer(jnp.ones(3), epsilon=0.0)[0], np.ones(3))
    np.testing.assert_array_equal(train(jnp.ones((1, 5, 3)))[0], np.zeros((1, 5, 3)))
