"""The Linen modules: variables, modes, conventions, and Flax's own layer beside ours."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.numpy_reference import (
    channel_moments,
    error,
    problem,
    running,
    sample,
    tolerance,
    train,
)

import jaxbn
from jaxbn import linen

LAYERS = {
    "1d": (linen.BatchNorm1d, (6, 4)),
    "1d with length": (linen.BatchNorm1d, (6, 4, 5)),
    "2d": (linen.BatchNorm2d, (3, 4, 5, 2)),
    "3d": (linen.BatchNorm3d, (2, 4, 3, 2, 2)),
}


def shapes(tree):
    return jax.tree.map(lambda v: (v.shape, v.dtype.name), tree)


def run(module, variables, x, train=True, **options):
    inference = jnp.logical_not(train) if isinstance(train, jax.Array) else not train
    y, updates = module.apply(variables, x, inference, mutable=["batch_stats"], **options)
    return y, {**variables, **updates}


@pytest.mark.parametrize("name", LAYERS)
def test_torch_layers(name):
    layer, shape = LAYERS[name]
    x, scale, bias, dy = problem(shape, 1)
    module = layer(4, momentum=0.3)
    variables = module.init(jax.random.key(0), x, False)
    vector = ((4,), "float32")
    assert shapes(variables) == {
        "params": {"scale": vector, "bias": vector},
        "batch_stats": {"mean": vector, "var": vector, "count": ((), "int32")},
    }
    stats = variables["batch_stats"]
    for key, value in {"mean": 0, "var": 1, "count": 0}.items():
        np.testing.assert_array_equal(stats[key], np.full(stats[key].shape, value))

    expected = train(x, scale, bias, dy, 1)
    variables = {**variables, "params": {"scale": scale, "bias": bias}}
    y, after = run(module, variables, x)
    assert error(y, expected.y) <= tolerance(np.float32, expected.count)
    mean, var = running(np.zeros(4), np.ones(4), *channel_moments(x, 1), 0.3)
    np.testing.assert_allclose(after["batch_stats"]["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(after["batch_stats"]["var"], var, rtol=1e-6)
    assert after["batch_stats"]["count"] == 1

    y = module.apply(after, x, use_running_average=True)  # nothing need be mutable
    expected_y, _ = jaxbn.batch_norm(
        x, jaxbn.BatchStats(**after["batch_stats"]), scale, bias, train=False, axis=1
    )
    np.testing.assert_array_equal(y, expected_y)


def test_flags_choose_the_variables():
    x = sample((6, 4), 0, dtype=np.float32)

    def names(**flags):
        variables = linen.BatchNorm1d(4, **flags).init(jax.random.key(0), x, False)
        return {k: sorted(v) for k, v in variables.items()}

    stats = ["count", "mean", "var"]
    assert names() == {"params": ["bias", "scale"], "batch_stats": stats}
    assert names(bias=False) == {"params": ["scale"], "batch_stats": stats}
    assert names(affine=False) == {"batch_stats": stats}
    assert names(affine=False, bias=True, track_running_stats=False) == {}
    assert names(track_running_stats=False) == {"params": ["bias", "scale"]}


def test_the_constructor_takes_torch_arguments_in_torch_order():
    assert linen.BatchNorm2d(8, 1e-3, None, False, False) == linen.BatchNorm2d(
        num_features=8, eps=1e-3, momentum=None, affine=False, track_running_stats=False
    )


def test_statistics_that_are_there_are_used_but_not_updated_when_untracked():
    x = sample((6, 4), 0, dtype=np.float32)
    tracked, untracked = linen.BatchNorm1d(4), linen.BatchNorm1d(4, track_running_stats=False)
    _, variables = run(tracked, tracked.init(jax.random.key(0), x, False), x)
    y, after = run(untracked, variables, x)
    np.testing.assert_array_equal(y, run(tracked, variables, x)[0])
    jax.tree.map(np.testing.assert_array_equal, after, variables)
    np.testing.assert_array_equal(
        untracked.apply(variables, x, True), tracked.apply(variables, x, True)
    )
    without = {"params": variables["params"]}
    np.testing.assert_array_equal(untracked.apply(without, x, True), y)


@pytest.mark.parametrize("module", [linen.BatchNorm1d(4), linen.BatchNorm()])
def test_initialization_takes_one_sample_and_is_no_batch(module):
    x = 5 + sample((1, 4), 0, dtype=np.float32)
    for use_running_average in (False, True):
        y, variables = module.init_with_output(jax.random.key(0), x, use_running_average)
        assert np.isfinite(np.asarray(y)).all()
        np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(4))
        np.testing.assert_array_equal(variables["batch_stats"]["var"], np.ones(4))


@pytest.mark.parametrize("module", [linen.BatchNorm1d(4), linen.BatchNorm()])
def test_the_mode_may_be_traced(module):
    x = sample((6, 4), 0, dtype=np.float32)
    key = jax.random.key(0)
    variables = jax.jit(module.init)(key, x, jnp.array(False))
    jax.tree.map(np.testing.assert_array_equal, variables, module.init(key, x, False))
    traced = jax.jit(lambda train: run(module, variables, x, train))
    for train_ in (True, False):
        expected = run(module, variables, x, train_)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
            traced(jnp.array(train_)),
            expected,
        )


def test_a_mode_that_is_known_asks_for_nothing_mutable():
    x = sample((1, 4), 0, dtype=np.float32)
    for module in (linen.BatchNorm1d(4), linen.BatchNorm()):
        variables = module.init(jax.random.key(0), x, True)
        for mode in (np.bool_(True), jnp.array(True)):
            np.testing.assert_array_equal(
                module.apply(variables, x, mode), module.apply(variables, x, True)
            )


def test_momentum_may_be_traced():
    x = sample((6, 4), 0, dtype=np.float32)
    for layer in (functools.partial(linen.BatchNorm1d, 4), linen.BatchNorm):
        variables = layer().init(jax.random.key(0), x, False)
        traced = jax.jit(lambda m, layer=layer, v=variables: run(layer(momentum=m), v, x)[1])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
            traced(0.3),
            run(layer(momentum=0.3), variables, x)[1],
        )


@pytest.mark.parametrize(
    "module", [linen.BatchNorm1d(4, skip_nonfinite=True), linen.BatchNorm(skip_nonfinite=True)]
)
def test_channels_that_are_not_finite_are_left_out_on_demand(module):
    x = sample((6, 4), 0, dtype=np.float32)
    variables = module.init(jax.random.key(0), x, False)
    x[2, 1] = np.nan
    _, after = run(module, variables, x)
    assert (after["batch_stats"]["mean"] != 0).tolist() == [True, False, True, True]
    assert after["batch_stats"]["var"][1] == 1


def test_training_needs_mutable_statistics():
    x = sample((6, 4), 0, dtype=np.float32)
    module = linen.BatchNorm1d(4)
    variables = module.init(jax.random.key(0), x, False)
    with pytest.raises(Exception, match=r"batch_stats.*immutable"):
        module.apply(variables, x, False)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("input_dtype", [jnp.bfloat16, jnp.float32])
def test_output_dtype(input_dtype, dtype):
    x, key = jnp.asarray(sample((64, 4), 0), input_dtype), jax.random.key(0)
    wide, _ = jaxbn.batch_normalize(x.astype(jnp.float32))
    torch_like, flax_like = linen.BatchNorm1d(4, dtype=dtype), linen.BatchNorm(dtype=dtype)
    with jax.numpy_dtype_promotion("standard"):  # by which Flax finds the dtype of its output
        expected_dtype = jax.eval_shape(
            lambda: nn.BatchNorm(dtype=dtype).init_with_output(key, x, False)
        )[0].dtype
        for module, expected in ((torch_like, dtype or input_dtype), (flax_like, expected_dtype)):
            y, after = run(module, module.init(key, x, False), x)
            assert y.dtype == expected
            np.testing.assert_array_equal(y, wide.astype(expected))
            assert after["batch_stats"]["mean"].dtype == jnp.float32


@pytest.mark.usefixtures("x64")
def test_float64_layers_keep_float64_statistics():
    x = sample((6, 4), 0)
    for module in (
        linen.BatchNorm1d(4, param_dtype=jnp.float64),
        linen.BatchNorm(param_dtype=jnp.float64, force_float32_reductions=False),
    ):
        variables = module.init(jax.random.key(0), x, False)
        _, after = jax.eval_shape(functools.partial(run, module), variables, x)
        assert after["batch_stats"]["var"].dtype == jnp.float64


def test_every_field_of_flax_has_its_name_default_and_place():
    theirs, ours = nn.BatchNorm(), linen.BatchNorm()
    fields = [name for name in nn.BatchNorm.__dataclass_fields__ if name not in ("parent", "name")]
    assert [n for n in linen.BatchNorm.__dataclass_fields__ if n in fields] == fields
    for name in fields:
        assert getattr(ours, name) == getattr(theirs, name), name


FLAX_FLAGS = {
    "default": {},
    "momentum": {"momentum": 0.8},
    "channels first": {"axis": 1},
    "epsilon": {"epsilon": 0.1},
    "no bias": {"use_bias": False},
    "no scale": {"use_scale": False},
    "slow variance": {"use_fast_variance": False},
    "initializers": {
        "scale_init": nn.initializers.normal(1.0),
        "bias_init": nn.initializers.uniform(),
    },
}


@pytest.mark.parametrize("flags", FLAX_FLAGS)
def test_a_model_changes_one_import(flags):
    """The same initialization, steps and outputs as Flax's layer, where Flax's are right."""
    theirs, ours = nn.BatchNorm(**FLAX_FLAGS[flags]), linen.BatchNorm(**FLAX_FLAGS[flags])
    x = sample((8, 5, 4, 6), 0, mean=0.3, std=1.0, dtype=np.float32)
    y, variables = ours.init_with_output(jax.random.key(3), x, False)
    expected, expected_variables = theirs.init_with_output(jax.random.key(3), x, False)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert shapes(variables) == shapes(expected_variables)
    jax.tree.map(np.testing.assert_array_equal, variables, expected_variables)
    for step in range(3):
        x = sample((8, 5, 4, 6), step, mean=0.3, std=1.0, dtype=np.float32)
        y, variables = run(ours, variables, x)
        expected, expected_variables = run(theirs, expected_variables, x)
        np.testing.assert_allclose(y, expected, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        variables,
        expected_variables,
    )
    np.testing.assert_allclose(
        ours.apply(variables, x, True), theirs.apply(variables, x, True), atol=1e-5
    )


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_integer_images_are_promoted_as_flax_promotes_them(param_dtype):
    x = np.arange(960).astype(np.uint8).reshape(8, 5, 4, 6)
    ours, theirs = (module(param_dtype=param_dtype) for module in (linen.BatchNorm, nn.BatchNorm))
    with jax.numpy_dtype_promotion("standard"):
        variables = ours.init(jax.random.key(0), x, False)
        y, _ = run(ours, variables, x)
        expected, _ = run(theirs, variables, x)
    assert y.dtype == expected.dtype
    np.testing.assert_allclose(*(v.astype(jnp.float32) for v in (y, expected)), atol=2e-2)


def test_half_precision_statistics_of_a_checkpoint_are_widened():
    x = sample((8, 3), 0, dtype=np.float32)
    module = linen.BatchNorm()
    variables = module.init(jax.random.key(0), x, False)
    half = {
        **variables,
        "batch_stats": jax.tree.map(lambda v: v.astype(jnp.bfloat16), variables["batch_stats"]),
    }
    y, after = run(module, half, x)
    expected, expected_after = run(module, variables, x)
    np.testing.assert_array_equal(y, expected)
    jax.tree.map(np.testing.assert_array_equal, after, expected_after)


@pytest.mark.parametrize("train_", [True, False])
def test_initialization_without_statistics_takes_one_sample(train_):
    module = linen.BatchNorm1d(3, track_running_stats=False)
    y, _ = module.init_with_output(jax.random.key(0), np.ones((1, 3), np.float32), not train_)
    np.testing.assert_array_equal(y, np.zeros((1, 3)))


def test_the_functions_do_not_bring_flax():
    import subprocess
    import sys

    check = "import sys, jaxbn; assert 'flax' not in sys.modules, 'flax was imported'"
    subprocess.run([sys.executable, "-c", check], check=True)
