"""The Linen layers where Flax's have been: Flax's transforms, metadata, checkpoints, inputs."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx as flax_nnx
from flax import serialization
from flax.core import meta
from helpers.compare import assert_close
from helpers.numpy_reference import sample
from jax.sharding import PartitionSpec as P

from jaxbn import linen, nnx

KEY = jax.random.key(0)
LAYERS = {
    "BatchNorm": linen.BatchNorm,
    "BatchNorm1d": functools.partial(linen.BatchNorm1d, 4, axis=-1),
}
NAMES = {"BatchNorm": {"mean", "var"}, "BatchNorm1d": {"mean", "var", "count"}}


def batch(step=0, shape=(8, 4), dtype=np.float32):
    return jnp.asarray(sample(shape, step, dtype=dtype))


def shapes(tree):
    return jax.tree.map(lambda v: (v.shape, v.dtype), tree)


def train(module, variables, x, **options):
    y, updates = module.apply(variables, x, mutable=["batch_stats"], **options)
    return y, {**variables, **updates}


def test_one_layer_called_twice():
    class Twice(nn.Module):
        norm: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            norm = self.norm(use_running_average=False, axis_name="batch", name="norm")
            return norm(x), norm(2 * x)

    x = batch()
    ours, theirs = Twice(linen.BatchNorm), Twice(nn.BatchNorm)
    (first, second), variables = ours.init_with_output(KEY, x)
    np.testing.assert_allclose(first, second, atol=1e-4)
    both = [
        jax.vmap(functools.partial(train, module, variables), axis_name="batch", out_axes=(0, None))
        for module in (ours, theirs)
    ]
    assert_close(*(run(x[:, None]) for run in both))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("box", [nn.Partitioned, nn.LogicallyPartitioned])
def test_partitioning_metadata(name, box):
    names = ("model",)
    annotate = nn.with_partitioning if box is nn.Partitioned else nn.with_logical_partitioning
    module = LAYERS[name](
        use_running_average=False, scale_init=annotate(nn.initializers.ones, names)
    )
    variables = module.init(KEY, batch())
    scale = variables["params"]["scale"]
    assert isinstance(scale, box)
    assert scale.names == names
    assert nn.get_partition_spec(variables)["params"]["scale"] == P("model")
    y, after = train(module, variables, batch())
    plain, plain_after = train(module, meta.unbox(variables), batch())
    np.testing.assert_array_equal(y, plain)
    assert isinstance(after["params"]["scale"], box)
    assert_close(meta.unbox(after), plain_after, 0)
    grads = jax.grad(lambda v: jnp.sin(train(module, v, batch())[0]).sum(), allow_int=True)(
        variables
    )
    assert isinstance(grads["params"]["scale"], box)


@pytest.mark.parametrize("name", LAYERS)
def test_vmap_of_models(name):
    layer = LAYERS[name](
        use_running_average=False,
        scale_init=nn.with_partitioning(nn.initializers.normal(1.0), (None,)),
    )
    models = nn.vmap(
        type(layer),
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        metadata_params={nn.PARTITION_NAME: "models"},
    )
    fields = [f.name for f in dataclasses.fields(layer) if f.name not in ("parent", "name")]
    module = models(**{field: getattr(layer, field) for field in fields})
    xs = batch(0, (3, 8, 4))
    variables = module.init(KEY, xs)
    assert variables["params"]["scale"].names == ("models", None)
    assert set(variables["batch_stats"]) == NAMES[name]
    ys, after = train(module, variables, xs)
    for i in range(3):
        one = jax.tree.map(lambda v, i=i: v[i], meta.unbox(variables))
        y, one_after = train(layer, one, xs[i])
        np.testing.assert_allclose(ys[i], y, rtol=1e-5, atol=1e-6)
        assert_close(jax.tree.map(lambda v, i=i: v[i], meta.unbox(after)), one_after)
    assert (variables["params"]["scale"].value[0] != variables["params"]["scale"].value[1]).all()


class Block(nn.Module):
    """A residual block for `nn.scan`."""

    norm: str = "BatchNorm"
    train: bool = True

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Dense(4, use_bias=False)(x)
        y = LAYERS[self.norm](use_running_average=not self.train, name="norm")(y)
        return x + nn.relu(y), None


def sine(y, after):
    """A sum to differentiate, and what else a call makes."""
    return jnp.sin(y).sum(), (y, after)


def gradients(function, variables):
    """Of the sum that `function` begins with; then the rest of what it makes."""
    return jax.jit(jax.grad(function, has_aux=True, allow_int=True))(variables)


@functools.cache
def variables_of(name, blocks=None):
    """The variables of a block, or of several, stacked."""
    init = jax.jit(Block(name).init)
    if blocks is None:
        return init(KEY, batch())
    return jax.vmap(init, (0, None))(jax.random.split(KEY, blocks), batch())


@functools.cache
def three_blocks_in_a_loop(name):
    def loop(variables):
        x, layers = batch(), []
        for i in range(3):
            (x, _), after = train(Block(name), jax.tree.map(lambda v, i=i: v[i], variables), x)
            layers.append(after)
        return sine(x, jax.tree.map(lambda *v: jnp.stack(v), *layers))

    return gradients(loop, variables_of(name, 3))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("wrap", [lambda block: block, nn.remat], ids=["plain", "remat"])
def test_scan_over_layers(name, wrap):
    def stack(train):
        scanned = nn.scan(
            wrap(Block),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        )
        return scanned(name, train)

    def run(variables):
        (y, _), after = train(stack(True), variables, batch())
        return sine(y, after)

    variables = variables_of(name, 3)
    assert shapes(jax.eval_shape(stack(True).init, KEY, batch())) == shapes(variables)
    grads, results = gradients(run, variables)
    expected_grads, expected = three_blocks_in_a_loop(name)
    assert_close(results, expected)
    assert_close(grads["params"], expected_grads["params"], 1e-4)
    (y, _) = stack(False).apply(results[1], batch())  # nothing is mutable in inference
    assert np.isfinite(y).all()


@pytest.mark.parametrize("name", LAYERS)
def test_scan_over_batches_carries_the_statistics(name):
    class Step(nn.Module):
        @nn.compact
        def __call__(self, carry, x):
            return carry, LAYERS[name](use_running_average=False, name="norm")(x)

    scanned = nn.scan(
        Step,
        variable_broadcast="params",
        variable_carry="batch_stats",
        split_rngs={"params": False},
    )()
    xs = batch(0, (5, 8, 4))
    layer = LAYERS[name](use_running_average=False)
    one = layer.init(KEY, xs[0])
    variables = {collection: {"norm": v} for collection, v in one.items()}
    (_, ys), after = scanned.apply(variables, 0, xs, mutable=["batch_stats"])
    for x, y in zip(xs, ys, strict=True):
        expected, one = train(layer, one, x)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    assert_close(after["batch_stats"]["norm"], one["batch_stats"])


@functools.cache
def one_block(name, transform=lambda block: block):
    """The shapes of a block's variables; gradients and results of a step."""
    module = transform(Block)(name)

    def run(variables):
        (y, _), after = train(module, variables, batch())
        return sine(y, after)

    return shapes(jax.eval_shape(module.init, KEY, batch())), gradients(run, variables_of(name))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("transform", [nn.jit, nn.remat])
def test_jit_and_remat_change_nothing(name, transform):
    variables, (grads, results) = one_block(name, transform)
    expected_variables, (expected_grads, expected) = one_block(name)
    assert variables == expected_variables
    assert_close(results, expected)
    assert_close(grads["params"], expected_grads["params"], 1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_initialization_without_data(name):
    module = LAYERS[name](use_running_average=False)
    x = batch()
    variables = module.init(KEY, x)
    lazy = module.lazy_init(KEY, jax.ShapeDtypeStruct(x.shape, x.dtype))
    jax.tree.map(np.testing.assert_array_equal, lazy, variables)
    assert shapes(jax.eval_shape(module.init, KEY, x)) == shapes(variables)
    table = module.tabulate(KEY, x, console_kwargs={"width": 200})
    assert "batch_stats" in table


def test_checkpoints_of_flax_go_both_ways(tmp_path):
    class Network(nn.Module):
        norm: type[nn.Module]

        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(8)(x)
            x = self.norm(use_running_average=not train, momentum=0.9, name="norm")(x)
            return nn.Dense(3)(nn.relu(x))

    x = batch()
    models = [Network(nn.BatchNorm), Network(linen.BatchNorm)]
    for writer, reader in (models, models[::-1]):
        _, variables = train(writer, writer.init(KEY, x, train=False), x, train=True)
        path = tmp_path / writer.norm.__module__
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, variables)
        blank = reader.init(jax.random.key(7), x, train=False)
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(path, blank)
        jax.tree.map(np.testing.assert_array_equal, restored, variables)
        from_bytes = serialization.from_bytes(blank, serialization.to_bytes(variables))
        jax.tree.map(np.testing.assert_array_equal, from_bytes, variables)
        expected = writer.apply(variables, x, train=False)
        np.testing.assert_allclose(reader.apply(restored, x, train=False), expected, atol=1e-5)
        further = train(reader, restored, x, train=True)
        assert_close(further, train(writer, variables, x, train=True))


def test_a_collection_of_other_names_is_refused():
    x = batch()
    for name, layer in LAYERS.items():
        variables = layer().init(KEY, x, True)
        other = {**variables, "batch_stats": {"running_mean": x[0], "running_var": x[0]}}
        for inference in (True, False):
            with pytest.raises(
                ValueError,
                match=r"must hold `mean` and `var`; got running_mean, running_var.*from_state_dict",
            ):
                layer().apply(other, x, inference, mutable=["batch_stats"])
        assert NAMES[name] == set(variables["batch_stats"])


def test_a_checkpoint_without_a_count_is_read():
    x = batch()
    layer = LAYERS["BatchNorm1d"]()
    variables = layer.init(KEY, x, True)
    stats = {"mean": batch(1)[0], "var": batch(2)[0] ** 2}
    given = {**variables, "batch_stats": stats}
    y = layer.apply(given, x, True)
    mean, var = (np.asarray(stats[name]) for name in ("mean", "var"))
    expected = (np.asarray(x) - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    _, after = train(layer, given, x, use_running_average=False)
    assert after["batch_stats"]["count"] == 1


@pytest.mark.parametrize("axis", [(1, 3), (-1, 1), (2,)])
def test_several_channel_axes_are_flax_s(axis):
    x = batch(0, (8, 3, 5, 2))
    mask = jnp.arange(8)[:, None, None, None] < 5

    @functools.partial(jax.jit, static_argnums=0)
    def run(module, variables):
        y, after = train(module, variables, x, mask=mask)
        return y, after, module.clone(use_running_average=True).apply(after, x)

    ours, theirs = (
        module(axis=axis, use_running_average=False, bias_init=nn.initializers.normal(1.0))
        for module in (linen.BatchNorm, nn.BatchNorm)
    )
    variables = ours.init(KEY, x)
    jax.tree.map(np.testing.assert_array_equal, variables, theirs.init(KEY, x))
    y, after, inferred = run(ours, variables)
    expected, expected_after, expected_inferred = run(theirs, variables)
    np.testing.assert_allclose(y[:5], expected[:5], rtol=1e-4, atol=1e-5)
    assert (y[5:] == 0).all()
    assert_close(after, expected_after)
    np.testing.assert_allclose(inferred, expected_inferred, rtol=1e-4, atol=1e-5)


def test_several_channel_axes_of_a_fused_layer():
    x = batch(0, (8, 3, 5, 2))
    fused = linen.BatchNorm(axis=[1, 3], use_running_average=False, activation="relu")
    variables = fused.init(KEY, x)
    y, _ = train(fused, variables, x, residual=-x)
    plain, _ = train(fused.clone(axis=(1, 3), activation=None), variables, x)
    np.testing.assert_allclose(y, np.maximum(plain - x, 0), atol=1e-5)
    with pytest.raises(ValueError, match="`axis` must name at least one channel axis"):
        linen.BatchNorm(axis=()).init(KEY, x, False)
    with pytest.raises(ValueError, match=r"expected \(3, 2\) channels at axis=\(1, 3\)"):
        fused.apply(variables, batch(0, (8, 2, 5, 2)), mutable=["batch_stats"])


def complex_batch(step=0, shape=(64, 4)):
    value = sample(shape, step) + 1j * sample(shape, step + 1, mean=-2.0, std=0.5)
    return value.astype(np.complex64)


def complex_reference(x, mask, scale, bias):
    x, scale, bias = (np.asarray(v, np.complex128) for v in (x, scale, bias))
    mean = x.mean(0, where=mask)
    var = (np.abs(x - mean) ** 2).mean(0, where=mask)
    return mean, var, np.where(mask, (x - mean) / np.sqrt(var + 1e-5) * scale + bias, 0)


@pytest.mark.parametrize("complex_parameters", [True, False])
def test_complex_input(complex_parameters):
    x = complex_batch()
    mask = np.arange(64)[:, None] < 50
    dtype = jnp.complex64 if complex_parameters else jnp.float32
    module = linen.BatchNorm(
        momentum=0.9,
        use_running_average=False,
        dtype=jnp.complex64,
        param_dtype=dtype,
        scale_init=nn.initializers.normal(1.0),
        bias_init=nn.initializers.normal(1.0),
    )
    variables = module.init(KEY, x)
    scale, bias = variables["params"]["scale"], variables["params"]["bias"]
    assert scale.dtype == dtype
    mean, var, expected = complex_reference(x, mask, scale, bias)
    y, after = train(module, variables, x, mask=mask)
    assert y.dtype == jnp.complex64
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    stats = after["batch_stats"]
    assert (stats["mean"].dtype, stats["var"].dtype) == (jnp.complex64, jnp.float32)
    np.testing.assert_allclose(stats["mean"], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * var, rtol=1e-5)

    inference = module.clone(use_running_average=True).apply(after, x)
    by = (x - np.asarray(stats["mean"])) / np.sqrt(np.asarray(stats["var"]) + 1e-5)
    np.testing.assert_allclose(
        inference, by * np.asarray(scale) + np.asarray(bias), rtol=1e-4, atol=1e-5
    )
    for known in (True, False):  # a traced mode
        y, updated = jax.jit(
            lambda inference: train(
                module.clone(use_running_average=None), after, x, use_running_average=inference
            )
        )(jnp.array(known))
        if known:
            np.testing.assert_allclose(y, inference, rtol=1e-5, atol=1e-6)
            assert_close(updated, after, 0)
        else:
            np.testing.assert_allclose(
                y, complex_reference(x, np.ones_like(mask), scale, bias)[2], rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("options", [{}, {"use_scale": False}, {"axis": (1, 2), "use_bias": False}])
def test_complex_input_as_flax_has_it(options):
    x = complex_batch(0, (8, 4, 3))
    ours, theirs = (
        module(use_running_average=False, dtype=jnp.complex64, **options)
        for module in (linen.BatchNorm, nn.BatchNorm)
    )
    variables = jax.jit(ours.init)(KEY, x)

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.grad, argnums=1, has_aux=True)
    def step(module, x):
        y, after = train(module, variables, x)
        return jnp.sum(jnp.sin(y.real) + jnp.cos(2 * y.imag)), (y, after)

    dx, results = step(ours, x)
    with jax.numpy_dtype_promotion("standard"):
        expected_dx, expected = step(theirs, x)
    assert_close(results, expected, 1e-4)
    np.testing.assert_allclose(dx, expected_dx, rtol=1e-3, atol=1e-5)


def test_complex_input_on_devices():
    x = complex_batch(0, (8, 4, 3))
    spread = linen.BatchNorm(use_running_average=False, dtype=jnp.complex64, axis_name="i")
    alone = spread.clone(axis_name=None)
    variables = alone.init(KEY, x)
    mapped = jax.vmap(
        functools.partial(train, spread, variables), axis_name="i", out_axes=(0, None)
    )
    assert_close(jax.jit(mapped)(x), train(alone, variables, x))


def test_what_complex_input_does_not_take():
    x = complex_batch()
    for options, call in (
        ({"activation": "relu"}, {}),
        ({}, {"residual": x}),
        ({"virtual_batch_size": 4}, {}),
    ):
        module = linen.BatchNorm(use_running_average=False, dtype=jnp.complex64, **options)
        with pytest.raises(NotImplementedError, match="complex numbers takes no"):
            module.init(KEY, x, **call)
    module = linen.BatchNorm(use_running_average=False, dtype=jnp.complex64)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        train(module, module.init(KEY, x), x[:1])
    with pytest.raises(TypeError, match=r"must have one of the dtypes.*got complex64"):
        linen.BatchNorm(dtype=jnp.float32).init(KEY, x, False)


def test_layers_cross_the_bridge_between_linen_and_nnx():
    x = batch()
    module = linen.BatchNorm(use_running_average=False)
    as_nnx = flax_nnx.bridge.ToNNX(module, rngs=flax_nnx.Rngs(0))
    as_nnx.lazy_init(x)
    y = as_nnx(x, mutable=["batch_stats"])
    y = y[0] if isinstance(y, tuple) else y
    np.testing.assert_array_equal(y, train(module, module.init(KEY, x), x)[0])

    as_linen = flax_nnx.bridge.to_linen(nnx.BatchNorm, 4)
    variables = as_linen.init(KEY, x)
    y, after = as_linen.apply(variables, x, mutable=["batch_stats"])
    layer = nnx.BatchNorm(4, rngs=flax_nnx.Rngs(0))
    np.testing.assert_array_equal(y, layer(x))
    assert "batch_stats" in after
