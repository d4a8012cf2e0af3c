"""The derivative rule against plain autodiff, and what the conformance table has no cell for."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compare import assert_close
from helpers.numpy_reference import error, problem, sample, tolerance, train
from jax.experimental import jet
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import jaxbn
from jaxbn import linen

SHAPES = [((6, 3), 1), ((2, 3, 2, 2), 1), ((2, 2, 2, 3), -1)]


def plain(x, scale, bias, axis):
    """Batch norm from the definition, with JAX's own derivatives."""
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    mean, var = x.mean(others, keepdims=True), x.var(others, keepdims=True)
    scale, bias = jnp.expand_dims(scale, others), jnp.expand_dims(bias, others)
    return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias


def ours(x, scale, bias, axis):
    return jaxbn.batch_normalize(x, scale, bias, axis=axis)[0]


def everything(x, scale, bias, axis):
    """A scalar in which the output and both moments are entangled."""
    y, moments = jaxbn.batch_normalize(x, scale, bias, axis=axis)
    return (jnp.sin(y) * y).sum() + (moments.mean * jnp.cos(moments.var)).sum()


def everything_plainly(x, scale, bias, axis):
    others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    y = plain(x, scale, bias, axis)
    return (jnp.sin(y) * y).sum() + (x.mean(others) * jnp.cos(x.var(others))).sum()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_derivatives_of_first_and_second_order(shape, axis):
    x, scale, bias, dy = problem(shape, axis, dtype=np.float64)
    arguments = x, scale, bias
    tangents = tuple(sample(v.shape, 7, 0.3, 1.0) for v in arguments)
    y, dy_forward = jax.jvp(lambda *a: ours(*a, axis), arguments, tangents)
    expected, dy_expected = jax.jvp(lambda *a: plain(*a, axis), arguments, tangents)
    assert_close((y, dy_forward), (expected, dy_expected), 1e-10)
    _, pullback = jax.vjp(lambda *a: ours(*a, axis), *arguments)
    _, pullback_expected = jax.vjp(lambda *a: plain(*a, axis), *arguments)
    assert_close(pullback(dy), pullback_expected(dy), 1e-10)
    for derivative in (jax.grad, jax.jacfwd, jax.hessian):
        actual, expected = (
            jax.jit(derivative(function, (0, 1, 2)), static_argnums=3)(*arguments, axis)
            for function in (everything, everything_plainly)
        )
        assert_close(actual, expected, 1e-8)


@pytest.mark.usefixtures("x64")
def test_derivatives_agree_with_finite_differences():
    x, scale, bias, _ = problem((5, 3), 1, dtype=np.float64)
    check_grads(lambda *a: everything(*a, 1), (x, scale, bias), order=2, modes=("fwd", "rev"))


@pytest.mark.usefixtures("x64")
def test_third_derivative():
    x, scale, bias, _ = problem((4, 2), 1, dtype=np.float64)
    direction = sample((4, 2), 8, 0.3, 1.0)

    def along(function):
        return jax.grad(
            lambda t: jax.hessian(lambda s: function(x + s * direction, scale, bias, 1))(t)
        )

    assert_close(along(everything)(0.0), along(everything_plainly)(0.0), 1e-8)


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_second_order_in_float32(mode):
    x, scale, bias, _ = problem((6, 2), 1)
    stats = jaxbn.BatchStats(bias + 2, jnp.abs(scale) + 1, jnp.int32(0))

    def loss(x, scale, bias):
        y, _ = jaxbn.batch_norm(x, stats, scale, bias, train=mode == "train")
        return (jnp.sin(y) * y).sum()

    def loss_plainly(x, scale, bias):
        mean, var, scale, bias = (v[None] for v in (stats.mean, stats.var, scale, bias))
        y = (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias
        y = plain(x, scale[0], bias[0], 1) if mode == "train" else y
        return (jnp.sin(y) * y).sum()

    actual = jax.jit(jax.hessian(loss, (0, 1, 2)))(x, scale, bias)
    expected = jax.jit(jax.hessian(loss_plainly, (0, 1, 2)))(x, scale, bias)
    scale_of = max(np.abs(v).max() for v in jax.tree.leaves(expected))
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, atol=1e-5 * scale_of), actual, expected
    )


def test_gradients_at_extreme_scales_do_not_underflow():
    # rstd³, which autodiff of rsqrt forms, is zero in float32 at std 1e14.
    for std in (1e-2, 1e6, 1e14):
        x, scale, bias, dy = problem((32, 3), 1, mean=0.0, std=std)
        _, pullback = jax.vjp(lambda *a: ours(*a, 1), x, scale, bias)
        expected = train(x, scale, bias, dy, 1)
        assert error(pullback(dy)[0], expected.dx) <= tolerance(np.float32, 32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "axis"), [((16, 8, 12, 12), 1), ((16, 24, 24, 8), -1)])
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_the_backward_pass_keeps_the_input_and_vectors(mode, shape, axis, dtype):
    x, scale, bias, _ = problem(shape, axis)
    x, stats = jnp.asarray(x, dtype), jaxbn.init_batch_stats(shape[axis])

    def function(x, scale, bias):
        return jaxbn.batch_norm(x, stats, scale, bias, train=mode == "train", axis=axis)[0]

    check_kept(function, x, axis, scale, bias)


@pytest.mark.parametrize("module", [linen.BatchNorm(), linen.BatchNorm2d(8, axis=-1)])
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_the_backward_pass_of_a_layer_keeps_no_wider_input(mode, module):
    x, *_ = problem((16, 24, 24, 8), -1)
    x = jnp.asarray(x, jnp.bfloat16)

    def function(x, params):
        variables = {**others, "params": params}
        return module.apply(variables, x, mode != "train", mutable=["batch_stats"])[0]

    with jax.numpy_dtype_promotion("standard"):  # by which Flax's layer puts out float32
        others = module.init(jax.random.key(0), x, True)
        check_kept(function, x, -1, others["params"])


def check_kept(function, x, axis, *parameters):
    _, pullback = jax.vjp(function, x, *parameters)
    kept = sum(v.nbytes for v in jax.tree.leaves(pullback) if v.shape)
    assert x.nbytes <= kept <= x.nbytes + 8 * 4 * x.shape[axis]


def test_named_values_keep_one_tensor_a_layer_and_repeat_no_reduction():
    x = sample((2, 8, 8, 4), 0, dtype=np.float32)
    kernels = sample((3, 3, 3, 4, 4), 1, 0.0, 0.2, np.float32)

    def network(x, kernels, scale):
        for kernel in kernels:
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jaxbn.batch_normalize(x, scale, activation="relu")[0]
        return x

    policy = jax.checkpoint_policies.save_only_these_names(*jaxbn.CHECKPOINT_NAMES)
    arguments = x, kernels, np.ones(4, np.float32)

    def reductions(network):
        gradient = jax.grad(lambda *a: jnp.square(network(*a)).sum(), (1, 2))
        return jax.jit(gradient).lower(*arguments).compile().as_text().count(" reduce(")

    assert reductions(jax.checkpoint(network, policy=policy)) == reductions(network)
    assert reductions(jax.checkpoint(network)) > reductions(network)

    def tensors_kept(network):
        _, pullback = jax.vjp(lambda kernels: network(x, kernels, arguments[2]), kernels)
        return sum(leaf.shape == x.shape for leaf in jax.tree.leaves(pullback))

    # The input of the network, and one tensor for each layer; plainly, two.
    assert tensors_kept(jax.checkpoint(network, policy=policy)) == 1 + 3
    assert tensors_kept(network) == 1 + 3 + 2


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P(None, "devices"), P(None, None, "devices")])
def test_a_sharded_input_is_one_batch(spec, axis_type):
    x, scale, bias, dy = problem((16, 8, 4, 4), 1)

    stats = jaxbn.init_batch_stats(8)

    @jax.jit
    def run(x, dy):
        def forward(x, scale, bias):
            return jaxbn.batch_norm(x, stats, scale, bias, train=True, axis=1)

        y, pullback, new = jax.vjp(forward, x, scale, bias, has_aux=True)
        return y, pullback(dy), new

    expected = run(x, dy)
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        actual = run(*(jax.device_put(v, NamedSharding(mesh, spec)) for v in (x, dy)))
    assert [shard.data.size for shard in actual[0].addressable_shards] == [x.size // 4] * 4
    assert_close(actual, expected, 1e-5)


def test_while_loop_over_the_statistics():
    x = sample((8, 3), 0, dtype=np.float32)
    start = jaxbn.init_batch_stats(3)
    body = lambda stats: jaxbn.batch_norm(x, stats, train=True)[1]  # noqa: E731
    stats = jax.lax.while_loop(lambda stats: stats.count < 4, body, start)
    expected = start
    for _ in range(4):
        expected = body(expected)
    assert_close(stats, expected, 1e-6)


def test_huge_and_symbolic_shapes():
    moments = jax.eval_shape(jaxbn.batch_moments, jax.ShapeDtypeStruct((2**31, 1), jnp.bfloat16))
    assert moments.mean.shape == (1,)
    x = sample((7, 4, 3), 0, dtype=np.float32)
    for mode, constraint in ((False, ()), (True, ("2 <= batch", "batch <= 4096"))):
        (batch,) = jax.export.symbolic_shape("batch", constraints=constraint)
        stats = jaxbn.init_batch_stats(3)
        function = jax.jit(lambda x, mode=mode, stats=stats: jaxbn.batch_norm(x, stats, train=mode))
        shape = jax.ShapeDtypeStruct((batch, 4, 3), jnp.float32)
        y, _ = jax.export.export(function)(shape).call(x)
        np.testing.assert_allclose(y, function(x)[0], atol=1e-6)


@pytest.mark.optimized
def test_a_scan_differentiates_what_was_rounded():
    """XLA may drop the rounding of `x` in the forward pass of a scan, which the other reads."""
    inputs = jnp.asarray(sample((256, 16), 0, 30.0, 1.0), jnp.bfloat16)
    target = sample((256, 16), 1, 0.3, 1.0, np.float32)
    weight = sample((1, 16, 16), 2, 0.0, 0.25, np.float32)

    def layer(norm, x, weight):
        y = norm(x @ weight.astype(x.dtype))
        return y, None

    def loss(weight, norm, scanned):
        x = jnp.asarray(inputs, jnp.float32 if norm is from_definition else jnp.bfloat16)
        body = functools.partial(layer, norm)
        y = jax.lax.scan(body, x, weight)[0] if scanned else body(x, weight[0])[0]
        return jnp.square(y.astype(jnp.float32) - target).mean()

    def from_definition(x):
        return plain(x, jnp.ones(16), jnp.zeros(16), -1)

    def by_jaxbn(x):
        return jaxbn.batch_normalize(x)[0]

    def by_flax(x):
        layer = nn.BatchNorm(False, dtype=x.dtype)
        with jax.numpy_dtype_promotion("standard"):
            variables = layer.init(jax.random.key(0), x)
            return layer.apply(variables, x, mutable=["batch_stats"])[0]

    gradient = jax.jit(jax.grad(loss), static_argnums=(1, 2))
    scanned, alone = (gradient(weight, by_jaxbn, s) for s in (True, False))
    assert error(scanned, alone) <= 1e-3
    expected = gradient(weight, from_definition, False)
    assert error(scanned, expected) <= error(gradient(weight, by_flax, True), expected)


@pytest.mark.parametrize("samples", [6, 2**14])
def test_inference_has_taylor_coefficients(samples):
    """`jet` knows neither `jax.checkpoint` nor functions with a derivative rule of their own."""
    x, scale, bias, _ = problem((samples, 4), -1, dtype=np.float32)
    mean, var = bias + 2, np.abs(scale) + 1
    series = [np.cos(x), np.sin(x), np.ones_like(x)]

    def normalized(x):
        return jax.nn.silu(jaxbn.normalize(x, mean, var, scale, bias))

    def plain(x):
        factor = scale / np.sqrt(var + 1e-5)
        return jax.nn.silu((x - mean[None]) * factor[None] + bias[None])

    actual, expected = (jet.jet(f, (x,), (series,)) for f in (normalized, plain))
    assert_close(actual, expected, 1e-5)
