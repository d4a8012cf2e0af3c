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
    "scalar input": (lambda: train(1.0), ValueError, "for x.shape=()."),
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
        "`epsilon` must be a Python number",
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
    "momentum above 1, traced mode": (
        lambda: jaxbn.batch_norm(X, STATS, train=jnp.array(True), momentum=2),
        ValueError,
        "got 2.",
    ),
    "momentum above 1, in inference": (lambda: infer(momentum=2), ValueError, "got 2."),
    "mode in words": (
        lambda: jaxbn.batch_norm(X, STATS, train="no"),
        TypeError,
        "`train` must be a bool, traced or not; got 'no'.",
    ),
    "mode as a number": (
        lambda: jaxbn.batch_norm(X, STATS, train=jnp.ones(())),
        TypeError,
        "`train` must be a bool",
    ),
    "mask, in inference": (lambda: infer(mask=X > 0), NotImplementedError, "`mask` is not"),
    "moments of different channels": (
        lambda: jaxbn.merge_moments(MOMENTS, jaxbn.batch_moments(jnp.ones((4, 2)))),
        ValueError,
        "must describe the same channels; got means of shape (3,) and (2,).",
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
        "`activation` is not implemented yet; leave it at None. Got 'relu'.",
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
        "got 1.5.",
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
        lambda: trained_layer(linen.BatchNorm2d(3, axis=-1, axis_name="i"), X, X),
        NotImplementedError,
        "`axis_name` is not",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case):
    call, kind, message = CASES[case]
    with pytest.raises(kind, match=re.escape(message)):
        call()


def test_checks_are_not_confused_by_good_input():
    train(X, STATS, V3, V3, momentum=np.float32(0.1), epsilon=np.float32(1e-5), axis=np.int64(3))
    infer(jnp.ones((1, 3)), epsilon=0.0)  # one value per channel is enough to infer
    train(jnp.ones((1, 5, 3)), axis=-1)  # (1, L, C) has L values per channel
    jaxbn.batch_norm(X, STATS, train=np.bool_(True))
    infer(jnp.ones(3))  # one sample without a batch axis, as under vmap
