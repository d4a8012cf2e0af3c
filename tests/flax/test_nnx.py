"""The NNX modules: variables, modes, NNX's transforms, and Flax's own layer beside ours."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx as flax_nnx
from helpers.compare import assert_close
from helpers.numpy_reference import error, sample, tolerance, train
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxbn import linen, nnx

SHAPE = (8, 5, 4, 6)
HAS_VIEW = hasattr(flax_nnx, "view")


def rngs():
    return flax_nnx.Rngs(0)


def batch(step=0, shape=SHAPE, mean=0.3):
    return jnp.asarray(sample(shape, step, mean=mean, std=1.0, dtype=np.float32))


def arrays(module, *kinds):
    return flax_nnx.to_pure_dict(flax_nnx.state(module, *kinds))


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    equal = functools.partial(np.testing.assert_array_equal, strict=True)
    jax.tree.map(equal, actual, expected)


class Block(flax_nnx.Module):
    """A network that names neither library."""

    def __init__(self, norm, rngs):
        self.conv = flax_nnx.Conv(6, 8, (3, 3), use_bias=False, rngs=rngs)
        self.norm = norm(8, momentum=0.9, rngs=rngs)
        self.head = flax_nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(jax.nn.relu(self.norm(self.conv(x))).mean((1, 2)))


def test_the_constructor_has_every_argument_of_flax_with_its_default():
    theirs = inspect.signature(flax_nnx.BatchNorm.__init__).parameters
    ours = inspect.signature(nnx.BatchNorm.__init__).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default, name
        assert ours[name].kind == parameter.kind, name
    call = inspect.signature(flax_nnx.BatchNorm.__call__).parameters
    assert list(inspect.signature(nnx.BatchNorm.__call__).parameters)[: len(call)] == list(call)


def test_attributes_are_those_of_flax():
    theirs, ours = flax_nnx.BatchNorm(4, rngs=rngs()), nnx.BatchNorm(4, rngs=rngs())
    for name in vars(theirs):
        if name.startswith("_"):
            continue
        value = getattr(theirs, name)
        assert type(getattr(ours, name)) is type(value), name
        if not isinstance(value, flax_nnx.Variable):
            assert getattr(ours, name) == value, name


FLAGS = {
    "default": {},
    "momentum": {"momentum": 0.8},
    "channels first": {"axis": 1, "num_features": 5},
    "epsilon": {"epsilon": 0.1},
    "no bias": {"use_bias": False},
    "no scale": {"use_scale": False},
    "slow variance": {"use_fast_variance": False},
    "initializers": {
        "scale_init": flax_nnx.initializers.normal(1.0),
        "bias_init": flax_nnx.initializers.uniform(),
    },
    "half precision parameters": {"param_dtype": jnp.bfloat16},
    "half precision output": {"dtype": jnp.float16},
}


@pytest.mark.parametrize("flags", FLAGS)
def test_a_model_changes_one_import(flags):
    options = {"num_features": 6} | FLAGS[flags]
    theirs = flax_nnx.BatchNorm(**options, rngs=rngs())
    ours = nnx.BatchNorm(**options, rngs=rngs())
    assert_equal(arrays(ours), arrays(theirs))
    limit = 1e-2 if "half" in flags else 1e-5
    with jax.numpy_dtype_promotion("standard"):
        for step in range(3):
            y, expected = ours(batch(step)), theirs(batch(step))
            assert y.dtype == expected.dtype
            np.testing.assert_allclose(y, expected, atol=limit)
        assert_close(arrays(ours), arrays(theirs), limit)
        for layer in (ours, theirs):
            layer.eval()
        np.testing.assert_allclose(ours(batch(9)), theirs(batch(9)), atol=limit)
        y, expected = ours(batch(9), False), theirs(batch(9), use_running_average=False)
        np.testing.assert_allclose(y, expected, atol=limit)


@pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("input_dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_output_dtype_is_flax_s(dtype, input_dtype):
    x = (3 * batch()).astype(input_dtype)
    with jax.numpy_dtype_promotion("standard"):
        for options in ({}, {"param_dtype": jnp.bfloat16}):
            layers = [
                module(6, dtype=dtype, **options, rngs=rngs())
                for module in (nnx.BatchNorm, flax_nnx.BatchNorm)
            ]
            y, expected = (layer(x) for layer in layers)
            assert y.dtype == expected.dtype
            np.testing.assert_allclose(
                y.astype(jnp.float32), expected.astype(jnp.float32), atol=0.05
            )


def test_promote_dtype_is_asked():
    def promote(values, dtype=None):
        x, mean, var, scale, bias = values
        return x.astype(jnp.bfloat16), mean, var, 2 * scale, bias + 1

    layer = nnx.BatchNorm(6, promote_dtype=promote, rngs=rngs())
    y = layer(batch())
    assert y.dtype == jnp.bfloat16
    plain = nnx.BatchNorm(6, rngs=rngs())
    expected = 2 * plain(batch().astype(jnp.bfloat16).astype(jnp.float32)) + 1
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=0.03)
    assert_equal(layer.mean[...], plain.mean[...])


def test_metadata_of_parameters():
    layer = nnx.BatchNorm(
        4, scale_metadata={"tag": "s"}, bias_metadata={"tag": "b", "frozen": True}, rngs=rngs()
    )
    assert layer.scale.tag == "s"
    assert layer.bias.tag == "b"
    assert layer.bias.frozen is True
    layer(batch(shape=(8, 4)))
    assert layer.scale.tag == "s"


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_partitioned_parameters_are_spread_as_flax_spreads_them(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    partitioned = flax_nnx.with_partitioning(flax_nnx.initializers.ones, ("model",))
    layers = {
        "initializer": functools.partial(nnx.BatchNorm, scale_init=partitioned),
        "torch's": functools.partial(nnx.BatchNorm1d, scale_init=partitioned),
        "Flax's": functools.partial(flax_nnx.BatchNorm, scale_init=partitioned),
    }
    x = batch(0, (16, 8))
    with jax.set_mesh(mesh):
        for name, create in layers.items():
            layer = create(8, rngs=rngs())
            y = flax_nnx.jit(lambda layer, x: layer(x))(layer, x)
            assert layer.scale[...].sharding.spec == P("model"), name
            np.testing.assert_allclose(
                jax.device_get(y), nnx.BatchNorm(8, rngs=rngs())(x), rtol=1e-5, atol=1e-6
            )


def test_where_flax_is_wrong_we_differ():
    x = sample((256, 2), 0, mean=1e4, std=1.0, dtype=np.float32)
    expected = train(x, np.ones(2), np.zeros(2), x, 1).y
    assert error(nnx.BatchNorm(2, rngs=rngs())(x), expected) <= tolerance(np.float32, 256)
    assert error(flax_nnx.BatchNorm(2, rngs=rngs())(x), expected) > 0.1


PAIRS = {
    "BatchNorm": (nnx.BatchNorm, (8, 4, 6), {}),
    "BatchNorm, first": (
        nnx.BatchNorm,
        (8, 6, 4),
        {"axis": 1, "momentum": 0.8, "use_bias": False, "use_fast_variance": False},
    ),
    "BatchNorm, half": (
        nnx.BatchNorm,
        (8, 6),
        {"dtype": jnp.float16, "param_dtype": jnp.bfloat16, "epsilon": 0.1},
    ),
    "BatchNorm, plain": (nnx.BatchNorm, (8, 6), {"use_scale": False, "use_bias": False}),
    "BatchNorm1d": (nnx.BatchNorm1d, (8, 6), {"dtype": jnp.bfloat16}),
    "BatchNorm1d, cumulative": (nnx.BatchNorm1d, (8, 6, 3), {"momentum": None}),
    "BatchNorm2d": (nnx.BatchNorm2d, (4, 3, 2, 6), {"axis": -1, "eps": 0.1, "momentum": 0.3}),
    "BatchNorm2d, untracked": (nnx.BatchNorm2d, (4, 6, 3, 2), {"track_running_stats": False}),
    "BatchNorm3d": (nnx.BatchNorm3d, (4, 6, 2, 3, 2), {"affine": False}),
    "BatchNorm3d, no bias": (nnx.BatchNorm3d, (4, 6, 2, 3, 2), {"bias": False}),
    "BatchNorm, complex": (nnx.BatchNorm, (8, 6), {"dtype": jnp.complex64}),
}


def half_of(x):
    return jnp.cos(jnp.arange(x.size)).reshape(x.shape)[..., :1] > 0


# Fields of the layer, and arguments of a call on `x` whose output is of `dtype`.
CALLS = {
    "plain": ({}, lambda x, dtype: {}),
    "masked": ({"skip_nonfinite": True}, lambda x, dtype: {"mask": half_of(x)}),
    "fused": (
        {"activation": "silu", "virtual_batch_size": 2},
        lambda x, dtype: {"residual": jnp.cos(x).astype(dtype)},
    ),
    "groups": ({"virtual_batch_size": 4}, lambda x, dtype: {}),
}
CASES = [
    (pair, call) for i, pair in enumerate(PAIRS) for call in ("plain", ("masked", "fused")[i % 2])
] + [("BatchNorm", "groups"), ("BatchNorm1d", "groups")]


def as_nnx(layer, params, stats, x, inference, **arguments):
    """The output and the statistics after it of a copy of the layer with these variables."""
    layer = flax_nnx.clone(layer)
    flax_nnx.update(layer, params | stats)
    return layer(x, inference, **arguments), arrays(layer, flax_nnx.BatchStat)


def as_linen(layer, params, stats, x, inference, **arguments):
    variables = {"params": params, "batch_stats": stats}
    y, updates = layer.apply(variables, x, inference, mutable=["batch_stats"], **arguments)
    return y, updates.get("batch_stats", {})


def train_and_infer(apply, params, stats, x, arguments):
    """Output, new statistics and gradients of one training step; inference after it."""

    def loss(params, x):
        y, new = apply(params, stats, x, False, **arguments)
        return jnp.sin(y.real).sum(), (y, new)

    gradients, (y, new) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    return new, y, gradients, apply(params, new, x, True, **arguments)


def inputs(shape, dtype):
    """Three batches, of which the last has a NaN in its first channel."""
    xs = [batch(step, shape) for step in range(2)]
    if jnp.issubdtype(dtype, jnp.complexfloating):
        xs = [jax.lax.complex(x, xs[1]) for x in xs]
    return *xs, xs[0].at[(0,) * len(shape)].set(jnp.nan)


def bits(tree):
    return jax.tree.map(lambda v: (v.shape, v.dtype.name, np.asarray(v).tobytes()), tree)


@pytest.mark.parametrize(("pair", "call"), CASES)
def test_linen_and_nnx_agree_bit_for_bit(pair, call):
    kind, shape, options = PAIRS[pair]
    fields, arguments = CALLS[call]
    dtype = options.get("dtype", jnp.float32)
    random = jax.nn.initializers.normal(1.0)
    options = options | fields | {"scale_init": random, "bias_init": random}
    layer = kind(6, **options, rngs=rngs())
    features = {} if kind is nnx.BatchNorm else {"num_features": 6}
    twin = getattr(linen, kind.__name__)(**features, **options)

    @jax.jit
    def run(params, stats, x):
        return [
            train_and_infer(functools.partial(apply, module), params, stats, x, arguments(x, dtype))
            for apply, module in ((as_nnx, layer), (as_linen, twin))
        ]

    params, stats = arrays(layer, flax_nnx.Param), arrays(layer, flax_nnx.BatchStat)
    with jax.numpy_dtype_promotion("standard"):
        for x in inputs(shape, dtype):
            actual, expected = run(params, stats, x)
            assert bits(actual) == bits(expected)
            stats = actual[0]


def test_arguments_of_torch_in_torch_order():
    layer = nnx.BatchNorm2d(8, 1e-3, None, False, False, rngs=rngs())
    assert (layer.num_features, layer.eps, layer.momentum) == (8, 1e-3, None)
    assert (layer.affine, layer.track_running_stats) == (False, False)
    assert arrays(layer) == {}


def test_statistics_that_are_there_are_used_but_not_updated_when_untracked():
    layer = nnx.BatchNorm1d(4, rngs=rngs())
    layer(batch(0, (6, 4)))
    before = arrays(layer)
    layer.track_running_stats = False
    layer(batch(1, (6, 4)))
    assert_equal(arrays(layer), before)
    layer.eval()
    y = layer(batch(2, (6, 4)))
    mean, var = (np.asarray(before[name]) for name in ("mean", "var"))
    expected = (np.asarray(batch(2, (6, 4))) - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_modes():
    for kind in (nnx.BatchNorm, nnx.BatchNorm1d):
        layer, x = kind(4, rngs=rngs()), batch(0, (6, 4))
        inference = kind(4, use_running_average=True, rngs=rngs())
        np.testing.assert_array_equal(inference(x), layer(x, True))
        assert layer.use_running_average is False
        layer.eval()
        before = arrays(layer)
        layer(x)
        assert_equal(arrays(layer), before)
        layer.train()
        layer(x)
        assert (arrays(layer)["mean"] != before["mean"]).all()
        layer.use_running_average = None
        with pytest.raises(ValueError, match=r"needs `use_running_average`.*train\(\) or eval\(\)"):
            layer(x)
        np.testing.assert_array_equal(layer(x, True), layer(x, use_running_average=np.bool_(True)))


def test_a_view_shares_the_variables_and_has_its_own_mode():
    model = Block(nnx.BatchNorm, rngs())
    view = flax_nnx.view if HAS_VIEW else flax_nnx.set_mode
    inference = view(model, use_running_average=True)
    assert inference.norm.use_running_average is True
    assert model.norm.use_running_average is False
    model(batch())
    np.testing.assert_array_equal(inference.norm.mean[...], model.norm.mean[...])
    assert (model.norm.mean[...] != 0).all()
    assert model.norm.set_mode(use_running_average=True, deterministic=True) == {
        "deterministic": True
    }
    only = view(model, only=nnx.BatchNorm, use_running_average=False)
    assert only.norm.use_running_average is False


@pytest.mark.usefixtures("x64")
def test_float64_layers_keep_float64_statistics():
    layer = nnx.BatchNorm1d(4, param_dtype=jnp.float64, rngs=rngs())
    assert layer(sample((6, 4), 0)).dtype == jnp.float64
    assert layer.mean.dtype == layer.var.dtype == layer.scale.dtype == jnp.float64


def test_inference_writes_nothing():
    x = batch(0, (6, 4))
    for layer in (nnx.BatchNorm(4, rngs=rngs()), nnx.BatchNorm1d(4, rngs=rngs())):
        layer.eval()
        layer.set_view()  # chooses nothing
        before = arrays(layer)
        y = jax.jit(lambda x, layer=layer: layer(x))(x)
        assert_close(y, layer(x), 1e-6)  # compiled with constants, a last bit may differ
        assert_equal(arrays(layer), before)


def test_the_mode_may_be_traced():
    for layer in (nnx.BatchNorm(4, rngs=rngs()), nnx.BatchNorm1d(4, rngs=rngs())):

        @flax_nnx.jit
        def run(layer, x, inference):
            return layer(x, inference)

        x = batch(0, (6, 4))
        for inference in (False, True):
            known = flax_nnx.clone(layer)
            expected = known(x, inference)
            np.testing.assert_allclose(run(layer, x, jnp.array(inference)), expected, atol=1e-6)
            assert_close(arrays(layer), arrays(known), 1e-6)


def train_step(model, optimizer, x, y):
    def loss(model):
        return jnp.mean((model(x) - y) ** 2)

    value, grads = flax_nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def test_training_under_jit_equals_flax():
    target = batch(20, (8, 3))
    states, losses = [], []
    for norm in (nnx.BatchNorm, flax_nnx.BatchNorm):
        model = Block(norm, rngs())
        optimizer = flax_nnx.Optimizer(model, optax.sgd(0.1), wrt=flax_nnx.Param)
        step = flax_nnx.jit(train_step)
        losses.append([step(model, optimizer, batch(i), target) for i in range(4)])
        states.append(arrays(model))
    assert_close(*losses, 1e-4)
    assert_close(*states, 1e-4)
    assert losses[0][-1] < losses[0][0]


def test_no_gradient_reaches_the_statistics():
    def statistic(layer, x):
        layer(x)
        return layer.mean[...].sum() + layer.var[...].sum()

    layer = nnx.BatchNorm(4, rngs=rngs())
    dx = flax_nnx.grad(statistic, argnums=1)(layer, batch(0, (6, 4)))
    np.testing.assert_array_equal(dx, np.zeros((6, 4)))


def test_split_merge_clone_and_shapes_without_arrays():
    def create():
        return Block(functools.partial(nnx.BatchNorm2d, axis=-1), rngs())

    model = create()
    graphdef, params, stats = flax_nnx.split(model, flax_nnx.Param, flax_nnx.BatchStat)
    assert sorted(flax_nnx.to_pure_dict(stats)["norm"]) == ["count", "mean", "var"]
    assert sorted(flax_nnx.to_pure_dict(params)["norm"]) == ["bias", "scale"]
    merged = flax_nnx.merge(graphdef, params, stats)
    np.testing.assert_array_equal(merged(batch()), flax_nnx.clone(model)(batch()))
    shapes = jax.tree.map(lambda v: (v.shape, v.dtype), arrays(flax_nnx.eval_shape(create)))
    assert shapes == jax.tree.map(lambda v: (v.shape, v.dtype), arrays(model))


def test_models_in_vmap():
    @flax_nnx.split_rngs(splits=3)
    @flax_nnx.vmap
    def create(rngs):
        return nnx.BatchNorm(4, scale_init=flax_nnx.initializers.normal(1.0), rngs=rngs)

    models = create(rngs())
    xs = batch(0, (3, 8, 4))
    separate = [jax.tree.map(lambda v, i=i: v[i], flax_nnx.state(models)) for i in range(3)]
    ys = flax_nnx.vmap(lambda model, x: model(x))(models, xs)
    for i, state in enumerate(separate):
        model = flax_nnx.merge(flax_nnx.graphdef(models), state)
        np.testing.assert_allclose(ys[i], model(xs[i]), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(models.mean[...][i], model.mean[...], rtol=1e-6)


def test_one_batch_over_a_mapped_axis():
    x = batch(0, (4, 6, 5))
    layer = nnx.BatchNorm(5, axis_name="i", rngs=rngs())
    whole = nnx.BatchNorm(5, rngs=rngs())
    axes = flax_nnx.StateAxes({...: None})
    y = flax_nnx.vmap(lambda layer, x: layer(x), in_axes=(axes, 0), out_axes=0, axis_name="i")(
        layer, x
    )
    np.testing.assert_allclose(y, whole(x), rtol=1e-5, atol=1e-6)
    assert_close(arrays(layer), arrays(whole))


def test_layers_in_scan_carry_their_statistics():
    layer, loop = nnx.BatchNorm(4, rngs=rngs()), nnx.BatchNorm(4, rngs=rngs())
    xs = batch(0, (5, 8, 4))
    axes = (flax_nnx.Carry, 0)
    _, ys = flax_nnx.scan(lambda layer, x: (layer, layer(x)), in_axes=axes, out_axes=axes)(
        layer, xs
    )
    expected = jnp.stack([loop(x) for x in xs])
    np.testing.assert_allclose(ys, expected, rtol=1e-5, atol=1e-6)
    assert_close(arrays(layer), arrays(loop), 1e-6)


def test_remat():
    layer, plain = nnx.BatchNorm(4, rngs=rngs()), nnx.BatchNorm(4, rngs=rngs())
    x = batch(0, (8, 4))

    def loss(layer, x):
        return jnp.sin(layer(x)).sum()

    grads = flax_nnx.grad(flax_nnx.remat(loss))(layer, x)
    assert_close(
        flax_nnx.to_pure_dict(grads), flax_nnx.to_pure_dict(flax_nnx.grad(loss)(plain, x)), 1e-5
    )
    assert_close(arrays(layer), arrays(plain), 1e-6)


def test_orbax_checkpoints_of_flax_go_both_ways(tmp_path):
    for name, (writer, reader) in {
        "in": (flax_nnx.BatchNorm, nnx.BatchNorm),
        "out": (nnx.BatchNorm, flax_nnx.BatchNorm),
    }.items():
        model = Block(writer, rngs())
        model(batch())
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / name, flax_nnx.state(model))
        other = Block(reader, flax_nnx.Rngs(5))
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(tmp_path / name, flax_nnx.state(other))
        flax_nnx.update(other, restored)
        assert_equal(arrays(other), arrays(model))
        for each in (model, other):
            each.eval()
        np.testing.assert_allclose(other(batch(7)), model(batch(7)), rtol=1e-5, atol=1e-5)


def test_several_channel_axes_have_one_vector():
    x = batch(0, (8, 3, 5, 2))
    layer, plain = nnx.BatchNorm(6, axis=(1, 3), rngs=rngs()), nnx.BatchNorm(6, rngs=rngs())
    y = layer(x)
    expected = plain(x.transpose(0, 2, 1, 3).reshape(8, 5, 6))
    np.testing.assert_array_equal(y, expected.reshape(8, 5, 3, 2).transpose(0, 2, 1, 3))
    assert_equal(arrays(layer), arrays(plain))
    with pytest.raises(ValueError, match="expected 6 channels at axis="):
        layer(batch(0, (8, 4, 5, 2)))
