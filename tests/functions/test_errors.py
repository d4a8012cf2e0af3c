"""Bad input: each case names the requirement, what arrived and the fix."""

import re

import jax
import jax.export
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


def on_devices(groups):
    return lambda x: jaxbn.batch_moments(x, axis_name="i", axis_index_groups=groups)


def layer(module, x, train=True):
    return module.init(jax.random.key(0), x, not train)


def trained_layer(module, x, other):
    variables = layer(module, x)
    return module.apply(variables, other, False, mutable=["batch_stats"])


CASES = {
    "unbiased that is traced": (
        lambda: jax.jit(lambda flag: train(unbiased=flag))(jnp.array(True)),
        TypeError,
        "`unbiased` must be True or False, known when traced; got",
    ),
    "unbiased that is no bool": (
        lambda: train(unbiased="no"),
        TypeError,
        "`unbiased` must be True or False, known when traced; got 'no'.",
    ),
    "count of other channels": (
        lambda: jaxbn.update_batch_stats(STATS, MOMENTS._replace(count=jnp.ones(2))),
        ValueError,
        "`moments` must have a mean and a variance of shape [C], and a count of shape [] or [C]; "
        "got (3,), (3,) and (2,).",
    ),
    "complex moments": (
        lambda: jaxbn.update_batch_stats(STATS, MOMENTS._replace(mean=jnp.ones(3, complex))),
        TypeError,
        f"`moments.mean` {FLOATS}; got complex64.",
    ),
    "stacked statistics": (
        lambda: jaxbn.update_batch_stats(jax.tree.map(lambda v: v[None], STATS), MOMENTS),
        ValueError,
        "Running statistics must be vectors, one number for each channel; got stats.mean of shape "
        "(1, 3).",
    ),
    "merging statistics": (
        lambda: jaxbn.merge_moments(MOMENTS, STATS),
        TypeError,
        "`argument 2` must be Moments of mean, var and count; got BatchStats.",
    ),
    "merging stacks": (
        lambda: jaxbn.merge_moments(jax.tree.map(lambda v: v[None], MOMENTS)),
        ValueError,
        "got (1, 3), (1, 3) and (1,). For several sets use jax.vmap.",
    ),
    "features that are no int": (
        lambda: jaxbn.init_batch_stats(2.5),
        TypeError,
        "`num_features` must be an int, the number of channels; got 2.5.",
    ),
    "epsilon beyond all floats": (
        lambda: train(epsilon=10**400),
        ValueError,
        "`epsilon` must be finite and positive during training; got inf.",
    ),
    "epsilon that float16 rounds": (
        lambda: train(epsilon=np.float16(-1e-5)),
        ValueError,
        "`epsilon` must be finite and positive during training; got -1",
    ),
    "layer, numbers in the place of the mode": (
        lambda: linen.BatchNorm().init(jax.random.key(0), X, jnp.ones((8, 4, 4, 1))),
        ValueError,
        "`use_running_average` must be one bool, for all samples; got float32 of shape "
        "(8, 4, 4, 1). Pass a mask by name: mask=….",
    ),
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
        "`stats.mean` must have shape (4,), the size of `x` along axis=3; got (3,) for "
        "x.shape=(8, 3, 4, 4). For channels-first inputs pass axis=1.",
    ),
    "channels first, in training": (
        lambda: train(jnp.ones((8, 3, 4, 4))),
        ValueError,
        "`stats.mean` must have shape (4,), the size of `x` along axis=3; got (3,) for "
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
        "`stats.mean` must have shape (3,), the size of `x` along axis=3; got (4,)",
    ),
    "moments of another size": (
        lambda: jaxbn.update_batch_stats(jaxbn.init_batch_stats(4), jaxbn.batch_moments(X)),
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
    "epsilon that float32 rounds to zero": (
        lambda: train(epsilon=1e-50),
        ValueError,
        "`epsilon` must be in the range of float32, 1.2e-38 to 3.4e+38; got 1e-50.",
    ),
    "epsilon that float32 does not have": (lambda: infer(epsilon=1e39), ValueError, "got 1e+39."),
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
    "momentum in words": (
        lambda: train(momentum="0.1"),
        TypeError,
        "`momentum` must be an array; got '0.1'.",
    ),
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
        "BatchNorm2d expected 3 channels at axis=1 of its input; got 4, "
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
        "BatchNorm expected 3 channels at axis=-1 of its input; got 4, "
        "x.shape=(8, 3, 4, 4). For channels-first inputs pass axis=1.",
    ),
    "layer, integer input": (
        lambda: layer(linen.BatchNorm1d(3), jnp.ones((8, 3), int)),
        TypeError,
        f"`x` {FLOATS}; got int32.",
    ),
    "layer, complex input": (
        lambda: layer(linen.BatchNorm2d(3, axis=-1), X.astype(jnp.complex64)),
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
    "axis_name that is not bound": (
        lambda: train(axis_name="batch"),
        NameError,
        "`axis_name` must name axes of an enclosing jax.vmap, jax.pmap or jax.shard_map; got "
        "'batch', which is not bound here. Outside of them leave it at None",
    ),
    "one of two axis names that is not bound": (
        lambda: jax.vmap(lambda x: jaxbn.batch_moments(x, axis_name=("i", "j")), axis_name="i")(X),
        NameError,
        "got ('i', 'j'), which is not bound here.",
    ),
    "axis name given twice": (
        lambda: jax.vmap(lambda x: jaxbn.batch_moments(x, axis_name=("i", "i")), axis_name="i")(X),
        ValueError,
        "`axis_name` must name each axis once; got ('i', 'i').",
    ),
    "groups of devices without devices": (
        lambda: train(axis_index_groups=[[0, 1], [2, 3]]),
        ValueError,
        "`axis_index_groups` splits the indices along one axis, which `axis_name` must name; got "
        "axis_name=None.",
    ),
    "groups of devices along an axis of vmap": (
        lambda: jax.vmap(on_devices([[0, 1], [2, 3]]), axis_name="i")(X[:4]),
        NotImplementedError,
        "`axis_index_groups` needs an axis of jax.pmap or jax.shard_map",
    ),
    "groups of devices, an index missing": (
        lambda: jax.pmap(on_devices([[0, 1], [2, 4]]), axis_name="i")(X[:4]),
        ValueError,
        "`axis_index_groups` must hold each index from 0 to 3 once, in groups of the same size; "
        "got [[0, 1], [2, 4]].",
    ),
    "groups of devices, an index twice": (
        lambda: jax.pmap(on_devices([[0, 1], [1, 2]]), axis_name="i")(X[:4]),
        ValueError,
        "`axis_index_groups` must hold each index from 0 to 3 once",
    ),
    "groups of devices of two sizes": (
        lambda: jax.pmap(on_devices([[0, 1, 2], [3]]), axis_name="i")(X[:4]),
        ValueError,
        "`axis_index_groups` must hold each index from 0 to 3 once, in groups of the same size",
    ),
    "no groups of devices": (
        lambda: jax.pmap(on_devices([]), axis_name="i")(X[:4]),
        ValueError,
        "`axis_index_groups` must hold each index from 0 to 3 once",
    ),
    "groups of devices that are none": (
        lambda: jax.pmap(on_devices([0.5, 1.5]), axis_name="i")(X[:4]),
        ValueError,
        "`axis_index_groups` must hold each index from 0 to 3 once",
    ),
    "layer, groups of devices without devices": (
        lambda: trained_layer(linen.BatchNorm(axis_index_groups=[[0], [1]]), X, X),
        ValueError,
        "`axis_index_groups` splits the indices along one axis, which `axis_name` must name",
    ),
    "virtual batch that does not divide the samples": (
        lambda: train(virtual_batch_size=3),
        ValueError,
        "`virtual_batch_size` must divide the number of samples; got 3 for x.shape=(8, 4, 4, 3), 8 "
        "samples. Pad the batch and mask the padding.",
    ),
    "virtual batch without samples": (
        lambda: jaxbn.batch_normalize(V3, virtual_batch_size=3),
        ValueError,
        "`virtual_batch_size` must divide the number of samples; got 3 for x.shape=(3,), 1 samples",
    ),
    "virtual batch larger than the batch": (
        lambda: train(virtual_batch_size=16),
        ValueError,
        "`virtual_batch_size` must divide the number of samples; got 16",
    ),
    "virtual_batch_size 0": (
        lambda: train(virtual_batch_size=0),
        ValueError,
        "`virtual_batch_size` must be an int of at least 1; got 0.",
    ),
    "virtual_batch_size as a bool": (
        lambda: train(virtual_batch_size=True),
        ValueError,
        "`virtual_batch_size` must be an int of at least 1; got True.",
    ),
    "virtual_batch_size as a float": (
        lambda: train(virtual_batch_size=2.0),
        ValueError,
        "`virtual_batch_size` must be an int of at least 1; got 2.0.",
    ),
    "groups of one value per channel": (
        lambda: jaxbn.batch_normalize(X[:, 0, 0], virtual_batch_size=1),
        ValueError,
        "Expected more than 1 value per channel when training, got input size (1, 3)",
    ),
    "mask of one value per sample without the other axes": (
        lambda: jaxbn.batch_moments(X, mask=jnp.ones(8, bool)),
        ValueError,
        "`mask` must broadcast against `x`; got shape (8,) for x.shape=(8, 4, 4, 3). A mask of "
        "one value per sample has shape (8, 1, 1, 1), of one per position (8, 4, 4, 1).",
    ),
    "mask of one value per position without the channels": (
        lambda: jaxbn.batch_moments(jnp.ones((2, 5, 3)), mask=jnp.ones((2, 5), bool)),
        ValueError,
        "A mask of one value per sample has shape (2, 1, 1), of one per position (2, 5, 1).",
    ),
    "masked array": (
        lambda: train(np.ma.masked_array(np.ones((8, 4, 4, 3)), np.zeros((8, 4, 4, 3), bool))),
        TypeError,
        "`x` must be an array; got a MaskedArray.",
    ),
    "mode of several samples": (
        lambda: jaxbn.batch_norm(X, STATS, train=jnp.array([True])),
        ValueError,
        "`train` must be one bool, for all samples; got bools of shape (1,).",
    ),
    "mode of several samples, traced": (
        lambda: jax.jit(lambda train: jaxbn.batch_norm(X, STATS, train=train))(jnp.array([True])),
        ValueError,
        "`train` must be one bool, for all samples; got bools of shape (1,).",
    ),
    "skip_nonfinite of several channels": (
        lambda: train(skip_nonfinite=jnp.ones(3, bool)),
        ValueError,
        "`skip_nonfinite` must be one bool, for all samples; got bools of shape (3,).",
    ),
    "count of a replicated checkpoint": (
        lambda: train(stats=STATS._replace(count=jnp.zeros(8, jnp.int32))),
        ValueError,
        "`stats.count` must be a scalar, the number of batches of all channels; got shape (8,). "
        "From replicated statistics, take one: count[0].",
    ),
    "virtual batches of a batch of unknown size": (
        lambda: jax.eval_shape(
            lambda x: jaxbn.batch_normalize(x, virtual_batch_size=2),
            jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 3"), jnp.float32),
        ),
        ValueError,
        "`virtual_batch_size` must divide the number of samples, which is not known here; got 2",
    ),
    "mask with an axis too many": (
        lambda: train(mask=jnp.ones((1, 8, 4, 4, 3), bool)),
        ValueError,
        "got shape (1, 8, 4, 4, 3) for x.shape=(8, 4, 4, 3).",
    ),
    "mask that would stretch `x`": (
        lambda: train(X[:, :1], mask=jnp.ones((8, 4, 4, 3), bool)),
        ValueError,
        "got shape (8, 4, 4, 3) for x.shape=(8, 1, 4, 3).",
    ),
    "mask that fits both ends": (
        lambda: infer(jnp.ones((3, 3)), mask=jnp.ones(3, bool)),
        ValueError,
        "`mask` of shape (3,) fits both the first and the last axes of x.shape=(3, 3). Give it 2 "
        "dimensions: (3, 1) for the first, (1, 3) for the last.",
    ),
    "mask of samples or of positions": (
        lambda: train(jnp.ones((5, 5, 3)), mask=jnp.ones((5, 1), bool)),
        ValueError,
        "`mask` of shape (5, 1) fits both the first and the last axes of x.shape=(5, 5, 3). Give "
        "it 3 dimensions: (5, 1, 1) for the first, (1, 5, 1) for the last.",
    ),
    "mask of positions or of elements": (
        lambda: infer(jnp.ones((2, 3, 3)), mask=jnp.ones((1, 3), bool)),
        ValueError,
        "`mask` of shape (1, 3) fits both the first and the last axes of x.shape=(2, 3, 3). Give "
        "it 3 dimensions: (1, 3, 1) for the first, (1, 1, 3) for the last.",
    ),
    "complex mask": (
        lambda: train(mask=jnp.ones((8, 1, 1, 1), jnp.complex64)),
        TypeError,
        "`mask` must be bool, or hold 0 and 1 as real numbers; got complex64.",
    ),
    "weights for a mask": (
        lambda: train(mask=jnp.full((8, 1, 1, 1), 0.5)),
        ValueError,
        "`mask` must be True or 1 where `x` counts and False or 0 elsewhere; got other values.",
    ),
    "gray values for a mask": (
        lambda: infer(mask=np.full((8, 1, 1, 1), 255, np.uint8)),
        ValueError,
        "got other values. Compare first, for example mask > 0.5; weights are not supported.",
    ),
    "words for a mask": (
        lambda: train(mask="all"),
        TypeError,
        "`mask` must be an array; got 'all'.",
    ),
    "unknown activation": (
        lambda: infer(activation="elu"),
        ValueError,
        "`activation` must be None, a function, or one of relu, leaky_relu, silu, gelu; got 'elu'.",
    ),
    "activation that is no function": (
        lambda: train(activation=1),
        TypeError,
        "`activation` must be None, a function, or one of relu, leaky_relu, silu, gelu; got 1.",
    ),
    "activation that reduces": (
        lambda: train(activation=jnp.sum),
        ValueError,
        "`activation` must return a real array of the shape of its argument; got",
    ),
    "activation that compares": (
        lambda: infer(activation=lambda z: z > 0),
        ValueError,
        "`activation` must return a real array of the shape of its argument; got",
    ),
    "activation that returns two arrays": (
        lambda: infer(activation=lambda z: (z, z)),
        ValueError,
        "`activation` must return a real array of the shape of its argument; got",
    ),
    "residual of another shape": (
        lambda: train(residual=X[:1]),
        ValueError,
        "`residual` must have the shape of `x`, (8, 4, 4, 3); got (1, 4, 4, 3).",
    ),
    "residual of another dtype": (
        lambda: infer(residual=X.astype(jnp.bfloat16)),
        TypeError,
        "`residual` must have the dtype of the output, float32; got bfloat16. Use "
        "residual.astype(jnp.float32).",
    ),
    "residual of the dtype of the input, not of the output": (
        lambda: train(X.astype(jnp.bfloat16), residual=X.astype(jnp.bfloat16), dtype=jnp.float32),
        TypeError,
        "`residual` must have the dtype of the output, float32; got bfloat16.",
    ),
    "integer residual": (
        lambda: train(residual=X.astype(int)),
        TypeError,
        f"`residual` {FLOATS}; got int32.",
    ),
    "skip_nonfinite in words": (
        lambda: train(skip_nonfinite="yes"),
        TypeError,
        "`skip_nonfinite` must be True, False or a traced bool; got 'yes'.",
    ),
    "skip_nonfinite as a number, in inference": (
        lambda: infer(skip_nonfinite=1),
        TypeError,
        "`skip_nonfinite` must be True, False or a traced bool; got 1.",
    ),
    "skip_nonfinite as a number": (
        lambda: jaxbn.update_batch_stats(STATS, MOMENTS, skip_nonfinite=0),
        TypeError,
        "`skip_nonfinite` must be True, False or a traced bool; got 0.",
    ),
    "integer mean": (
        lambda: jaxbn.normalize(X, jnp.ones(3, int), V3),
        TypeError,
        f"`mean` {FLOATS}; got int32.",
    ),
    "complex variance": (
        lambda: jaxbn.normalize(X, V3, V3.astype(jnp.complex64)),
        TypeError,
        f"`var` {FLOATS}; got complex64.",
    ),
    "integer bias": (
        lambda: jaxbn.batch_normalize(X, V3, jnp.ones(3, int)),
        TypeError,
        f"`bias` {FLOATS}; got int32.",
    ),
    "integer statistics": (
        lambda: train(X, STATS._replace(mean=jnp.ones(3, int))),
        TypeError,
        "Running statistics must be float32 or float64; got stats.mean of dtype int32",
    ),
    "statistics of another size, in inference": (
        lambda: infer(X, jaxbn.init_batch_stats(4)),
        ValueError,
        "`stats.mean` must have shape (3,), the size of `x` along axis=3; got (4,)",
    ),
    "mean and variance of different sizes": (
        lambda: infer(X, STATS._replace(var=jnp.ones(4))),
        ValueError,
        "`stats.var` must have shape (3,), the size of `x` along axis=3; got (4,)",
    ),
    "statistics that are no triple": (
        lambda: train(X, {"mean": V3, "var": V3}),
        TypeError,
        "`stats` must be a BatchStats of mean, var and count, or None where none are kept; "
        "got dict.",
    ),
    "moments in place of statistics": (
        lambda: infer(X, MOMENTS),
        TypeError,
        "or None where none are kept; got Moments.",
    ),
    "statistics in place of moments": (
        lambda: jaxbn.update_batch_stats(STATS, STATS),
        TypeError,
        "`moments` must be Moments of mean, var and count; got BatchStats.",
    ),
    "axis as a float": (
        lambda: jaxbn.batch_moments(X, axis=1.0),
        TypeError,
        "`axis` must be one int, the channel axis of `x`; got 1.0.",
    ),
    "no input": (lambda: train(None), TypeError, "`x` must be an array; got None."),
    "scale alone of another size, no statistics": (
        lambda: jaxbn.batch_norm(X, None, jnp.ones(4), train=True),
        ValueError,
        "`scale` must have shape (3,)",
    ),
    "layer in evaluation without statistics, one value per channel": (
        lambda: linen.BatchNorm1d(3, track_running_stats=False).apply(
            {"params": {"scale": V3, "bias": V3}}, jnp.ones((1, 3)), True
        ),
        ValueError,
        "got input size (1, 3)",
    ),
    "layer in evaluation whose statistics are not given": (
        lambda: linen.BatchNorm1d(3).apply(
            {"params": {"scale": V3, "bias": V3}}, jnp.ones((8, 3)), True
        ),
        ValueError,
        "BatchNorm1d normalizes by running statistics in inference, and the collection "
        "`batch_stats` was not given to `apply`.",
    ),
    "layer, axis_name that is not bound": (
        lambda: trained_layer(linen.BatchNorm(axis_name="i"), X, X),
        NameError,
        "got 'i', which is not bound here.",
    ),
    "layer, mask of another shape": (
        lambda: linen.BatchNorm().init(jax.random.key(0), X, False, mask=jnp.ones(8, bool)),
        ValueError,
        "`mask` must broadcast against `x`; got shape (8,)",
    ),
    "layer, mask in the place of the mode": (
        lambda: linen.BatchNorm().init(jax.random.key(0), X, jnp.ones((8, 1, 1, 1), bool)),
        ValueError,
        "`use_running_average` must be one bool, for all samples; got bools of shape (8, 1, 1, 1). "
        "Pass a mask by name: mask=….",
    ),
    "layer, unknown activation": (
        lambda: layer(linen.BatchNorm2d(3, axis=-1, activation="swish"), X),
        ValueError,
        "got 'swish'.",
    ),
    "layer, residual of another dtype": (
        lambda: linen.BatchNorm().init(jax.random.key(0), X, False, residual=X.astype(jnp.float16)),
        TypeError,
        "`residual` must have the dtype of the output, float32; got float16.",
    ),
    "layer, skip_nonfinite as a number": (
        lambda: trained_layer(linen.BatchNorm(skip_nonfinite=1), X, X),
        TypeError,
        "`skip_nonfinite` must be True, False or a traced bool; got 1.",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case):
    call, kind, message = CASES[case]
    with pytest.raises(kind, match=re.escape(message)):
        call()


def test_the_cause_of_an_error_is_told():
    with pytest.raises(TypeError, match="must be an array") as caught:
        train(np.ma.masked_array(np.ones((8, 3))))
    assert "asked arrays" in str(caught.value.__cause__)


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
