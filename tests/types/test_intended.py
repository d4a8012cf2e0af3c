"""Uses that type checkers accept: the tests run them, and CI checks their types."""

from typing import assert_type

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as flax_linen
from flax import nnx as flax_nnx
from flax.nnx import Rngs

import jaxbn
from jaxbn import linen, nnx

HOST = np.arange(24, dtype=np.float32).reshape(6, 4)
VECTOR = np.ones(4, np.float32)


def test_numbers_and_flags_of_python_numpy_and_jax() -> None:
    x, stats = jnp.asarray(HOST), jaxbn.init_batch_stats(4)
    y, stats = jaxbn.batch_norm(x, stats, train=True, epsilon=np.float32(1e-5), momentum=0.1)
    y, stats = jaxbn.batch_norm(x, stats, train=np.bool_(True), momentum=np.float64(0.1))
    y, stats = jaxbn.batch_norm(x, stats, train=jnp.array(True), momentum=jnp.array(0.1))
    y, stats = jaxbn.batch_norm(x, stats, train=True, unbiased=np.bool_(False), momentum=None)
    y, stats = jaxbn.batch_norm(x, stats, train=True, skip_nonfinite=jnp.array(True))
    groups, axis = np.int64(3), np.int64(-1)
    y, stats = jaxbn.batch_norm(x, stats, train=True, axis=axis, virtual_batch_size=groups)
    assert_type(stats, jaxbn.BatchStats)
    assert_type(y, jax.Array)
    assert stats.count == 6

    y, nothing = jaxbn.batch_norm(x, None, train=True)
    assert_type(nothing, None)
    assert nothing is None


def test_arrays_of_numpy_and_statistics_with_an_int() -> None:
    y, moments = jaxbn.batch_normalize(HOST, VECTOR, dtype="bfloat16")
    y, moments = jaxbn.batch_normalize(HOST, mask=HOST[:, :1] > 0, activation="relu", residual=HOST)
    y, moments = jaxbn.batch_normalize(HOST, activation=lambda z: z * 2, dtype=jnp.float16)
    y = jaxbn.normalize(HOST, VECTOR, VECTOR, epsilon=0)
    assert_type(jaxbn.merge_moments(moments, moments), jaxbn.Moments)
    assert y.shape == HOST.shape

    kept = jaxbn.BatchStats(moments.mean, moments.var, 0)
    kept = jaxbn.update_batch_stats(kept, jaxbn.batch_moments(HOST), momentum=0.5)
    assert kept.count == 1
    assert jaxbn.init_batch_stats(np.int64(4), "float32").count == 0
    assert jaxbn.BatchStats(moments.mean, moments.var, np.int32(2)).count == 2
    kept = jaxbn.BatchStats.from_mapping({"mean": VECTOR, "var": VECTOR, "count": 7})
    assert kept.count == 7


def test_folding() -> None:
    pairs: dict[str, str] = {}
    assert jaxbn.fold_variables({"params": {}, "batch_stats": {}}, pairs)
    kernel, groups = np.ones((1, 1, 2, 4), np.float32), np.int64(1)
    folded, bias = jaxbn.fold_into_conv(kernel, None, VECTOR, VECTOR, feature_group_count=groups)
    assert_type(folded, jax.Array)
    before = np.bool_(True)
    folded, bias = jaxbn.fold_into_dense(HOST.T, None, VECTOR, VECTOR, before=before)
    assert bias.shape == (6,)


def test_converted_models_keep_their_type() -> None:
    dense = flax_linen.Sequential([flax_linen.BatchNorm(use_running_average=True)])
    assert_type(linen.convert(dense, axis_name="batch"), flax_linen.Sequential)
    model = flax_nnx.Sequential(flax_nnx.BatchNorm(4, rngs=Rngs(0)))
    assert_type(nnx.convert(model, to=nnx.BatchNorm2d, skip_nonfinite=True), flax_nnx.Sequential)
    with linen.converted(classes=[flax_linen.BatchNorm], virtual_batch_size=2):
        y = dense.init_with_output(jax.random.key(0), HOST)[0]
    assert y.shape == HOST.shape


def test_layers() -> None:
    x, epsilon = jnp.asarray(HOST), np.float32(1e-5)
    layer = linen.BatchNorm(np.bool_(False), axis=np.int64(-1), epsilon=epsilon)
    variables = layer.init(jax.random.key(0), x)
    layer.apply(variables, x, mutable=["batch_stats"])
    layer = linen.BatchNorm(axis=(-2, -1), activation=jnp.tanh, use_running_average=True)
    of_torch = linen.BatchNorm1d(4, eps=epsilon, momentum=None, axis=-1)
    assert of_torch.num_features == 4

    of_nnx = nnx.BatchNorm(4, momentum=np.float32(0.9), rngs=Rngs(0))
    inferred = of_nnx(HOST, use_running_average=np.bool_(True))
    trained = of_nnx(x, mask=HOST[:, :1] > 0, residual=HOST)
    assert_type(trained, jax.Array)
    assert inferred.shape == trained.shape
