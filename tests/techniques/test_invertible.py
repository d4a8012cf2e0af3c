"""`keep_output`: the backward pass computes the input from the output, up to a known error."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from helpers.compare import assert_close
from helpers.numpy_reference import EPSILON, error, masked_train, problem, sample, tolerance

import jaxbn
from benchmarks.compiled import h100
from jaxbn import linen, nnx

SHAPE = (8, 6, 5, 4)
ACTIVATIONS = (None, "leaky_relu")
OPTIONS = {
    "plain": {},
    "mask": {"mask": np.arange(8 * 6 * 5).reshape(8, 6, 5, 1) % 3 > 0},
    "ghost batches": {"virtual_batch_size": 2},
    "channels first": {"axis": 1},
    "to bfloat16": {"dtype": jnp.bfloat16},
}


def slope(activation, z):
    return np.where((z >= 0) | (activation is None), 1, 0.01)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def step(keep_output, activation, name, x, scale, bias, dy):
    options = OPTIONS[name] | {"activation": activation, "keep_output": keep_output}
    forward = functools.partial(jaxbn.batch_normalize, **options)
    y, pullback, moments = jax.vjp(forward, x, scale, bias, has_aux=True)
    return forward(x, scale, bias), (y, moments), pullback(dy.astype(y.dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", OPTIONS)
def test_values_are_the_same_and_gradients_agree(name, activation):
    arguments = problem(SHAPE, OPTIONS[name].get("axis", -1))
    *values, gradients = step(True, activation, name, *arguments)
    *same, expected = step(False, activation, name, *arguments)
    assert_close(values, same, 0)
    for actual, other in zip(gradients, expected, strict=True):
        assert error(actual, other) <= (0.02 if "bfloat16" in name else 1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["plain", "mask"])
def test_gradients_against_the_definition(name, activation):
    x, scale, bias, dy = problem(SHAPE, -1, dtype=np.float64)
    mask = OPTIONS[name].get("mask", True)
    z = masked_train(x, scale, bias, dy, -1, mask).y
    expected = masked_train(x, scale, bias, dy * slope(activation, z), -1, mask)
    _, _, (dx, dscale, dbias) = step(True, activation, name, x, scale, bias, dy)
    for actual, other in ((dx, expected.dx), (dscale, expected.dscale), (dbias, expected.dbias)):
        assert error(actual, other) <= 1e-12


# The unit of rounding, that of what is kept, and half the distance of the smallest numbers.
ROUNDING = {
    "float64": (2.0**-53, 2.0**-52, 0.0),
    "float32": (2.0**-24, 2.0**-23, 0.0),
    "bfloat16": (2.0**-8, 2.0**-8, 0.0),
    "float16": (2.0**-11, 2.0**-11, 2.0**-25),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_error_is_bounded_at_small_scales(dtype, activation):
    """x̂ is off by the rounding of `y`, over the scale; the gradients follow from it."""
    wide = "float64" if dtype == "float64" else "float32"
    scale, bias = (
        v.ravel().astype(wide) for v in np.meshgrid([1, -1, 0.1, 1e-2, 1e-3, 1e-4], [0, 0.3, -1, 2])
    )
    shape = (16, 20, 24)
    x, dy = (sample(shape, i, 0.3).astype(jnp.dtype(dtype)) for i in (0, 1))
    with jax.enable_x64(dtype == "float64"):
        _, _, gradients = step(True, activation, "plain", x, scale, bias, dy)

    x, dy, dx, dscale, dbias = (np.asarray(v).astype(np.float64) for v in (x, dy, *gradients))
    rstd = 1 / np.sqrt(x.var((0, 1)) + EPSILON)
    normalized = (x - x.mean((0, 1))) * rstd
    dz = dy * slope(activation, normalized * scale + bias)
    mean, product = dz.mean((0, 1)), (dz * normalized).mean((0, 1))

    unit, unit_kept, smallest = ROUNDING[dtype]
    off = unit_kept * (np.abs(normalized) + np.abs(bias / scale))
    off = off + smallest / 0.01 / np.abs(scale)
    off_product = (np.abs(dz) * off).mean((0, 1))
    plain = (np.abs(dz) * (1 + np.abs(normalized))).mean((0, 1)) * tolerance(wide, 320)
    limit = off_product + plain
    assert (np.abs(dscale / 320 - product) <= limit).all()
    assert (np.abs(dbias / 320 - mean) <= plain).all()
    off_dx = off * np.abs(product) + (np.abs(normalized) + off) * limit + 2 * plain
    k = np.abs(scale * rstd)
    expected = scale * rstd * (dz - mean - normalized * product)
    assert (np.abs(dx - expected) <= k * off_dx + unit * np.abs(expected) + smallest).all()
    # It does grow so.
    grown = np.abs(dscale / 320 - product).reshape(4, 6).max(0)
    assert grown[-1] > 100 * grown[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_scale_of_zero_gives_no_finite_gradient(dtype):
    x, scale, bias, dy = problem((16, 4), -1)
    x, scale = jnp.asarray(x, dtype), scale * np.array([1, 0, 1, 1], np.float32)
    _, (y, _), (dx, dscale, dbias) = step(True, "leaky_relu", "plain", x, scale, bias, dy)
    _, (same, _), expected = step(False, "leaky_relu", "plain", x, scale, bias, dy)
    np.testing.assert_array_equal(y, same)
    assert not np.isfinite(dx[:, 1].astype(np.float32)).any()
    assert not np.isfinite(dscale[1])
    others = np.array([0, 2, 3])
    for actual, other in ((dx, expected[0]), (dscale, expected[1])):
        assert error(actual[..., others], other[..., others]) <= 0.02
    assert error(dbias, expected[2]) <= 1e-6


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_of_higher_order(activation):
    """Also where an output is zero, at the corner of the activation."""
    x, scale, bias, dy = problem((5, 2), -1, dtype=np.float64)
    x[:, 0], bias[0] = [-2, -1, 0, 1, 2], 0

    @functools.partial(jax.jit, static_argnums=0)
    def derivatives(keep_output, *arguments):
        def loss(x, scale, bias):
            y, moments = jaxbn.batch_normalize(
                x, scale, bias, activation=activation, keep_output=keep_output
            )
            return jnp.sin(y * dy).sum() + (moments.var * bias).sum()

        along = tuple(map(jnp.cos, arguments))
        second = functools.partial(jax.jvp, jax.grad(loss, (0, 1, 2)))
        third = jax.jvp(lambda *a: second(a, along), arguments, along)
        return jax.jvp(loss, arguments, along), jax.hessian(loss, (0, 1, 2))(*arguments), third

    arguments = (x, scale, bias)
    assert_close(derivatives(True, *arguments), derivatives(False, *arguments), 1e-9)


def network(keep_output):
    """Layers under `lax.scan`: batch norm, leaky ReLU, and a product that keeps its input."""

    def body(x, layer):
        kernel, scale, bias = layer
        x, _ = jaxbn.batch_normalize(
            x, scale, bias, activation="leaky_relu", keep_output=keep_output
        )
        return x @ kernel.astype(x.dtype), None

    return lambda x, layers: jax.lax.scan(body, x, layers)[0]


def layers_of(number, channels, dtype=np.float32):
    kernels = sample((number, channels, channels), 1, 0.0, channels**-0.5, dtype)
    scale, bias = (sample((number, channels), i, 1.0, 0.2, dtype) for i in (2, 3))
    return kernels, scale, bias


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("policy", ["none", "names", "everything_saveable"])
def test_layers_under_scan_and_remat(policy):
    x, layers = sample((32, 6), 0), layers_of(4, 6, np.float64)
    names = jax.checkpoint_policies.save_only_these_names(*jaxbn.CHECKPOINT_NAMES)
    policies = {"names": names, "everything_saveable": jax.checkpoint_policies.everything_saveable}

    def gradients(keep_output):
        function = network(keep_output)
        if policy != "none":
            function = jax.checkpoint(function, policy=policies[policy])
        return jax.jit(jax.grad(lambda *a: jnp.square(function(*a)).mean(), (0, 1)))(x, layers)

    assert_close(gradients(True), gradients(False), 1e-9)


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_backward_pass_keeps_the_output_alone(activation, dtype):
    x = jnp.asarray(sample(SHAPE, 0), jnp.bfloat16)
    forward = functools.partial(
        jaxbn.batch_normalize, activation=activation, keep_output=True, dtype=dtype
    )
    y, pullback, _ = jax.vjp(forward, x, jnp.ones(4), jnp.ones(4), has_aux=True)
    (kept,) = {id(v): v for v in jax.tree.leaves(pullback) if v.size > 4}.values()
    assert kept.dtype == y.dtype
    np.testing.assert_array_equal(kept, y)


NUMBER, BATCH = 32, (16, 16, 16, 32)


def compiled(function, device="cpu"):
    placed = {"sharding": h100.sharding()} if device == "h100" else {}
    vectors = jax.ShapeDtypeStruct((NUMBER, 32), jnp.float32, **placed)
    kernels = jax.ShapeDtypeStruct((NUMBER, 32, 32), jnp.float32, **placed)
    x = jax.ShapeDtypeStruct(BATCH, jnp.bfloat16, **placed)
    executable = jax.jit(function).lower(x, (kernels, vectors, vectors)).compile()
    return executable.memory_analysis(), NUMBER * np.prod(BATCH)


@pytest.mark.parametrize(("keep_output", "limit"), [(True, 2.1), (False, 4.1)])
def test_bytes_that_a_scan_hands_to_its_backward_pass(keep_output, limit):
    """Per element and layer, in what is compiled of the forward pass."""
    memory, elements = compiled(lambda *a: jax.vjp(network(keep_output), *a)[1])
    assert limit - 0.2 < memory.output_size_in_bytes / elements <= limit


BEFORE_11 = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="XLA for CPUs kept float32 copies of bfloat16 arrays"
)
NO_COMPILER = pytest.mark.skipif(not h100.available(), reason="needs the package jax-cuda13-plugin")


@pytest.mark.optimized
@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=BEFORE_11),
        pytest.param("h100", marks=[NO_COMPILER, pytest.mark.slow]),
    ],
)
def test_bytes_of_a_whole_gradient_under_scan(device):
    """Per element and layer, with the temporary arrays of one layer."""

    def temporary(keep_output):
        function = network(keep_output)

        def loss(x, layers):
            return jnp.square(function(x, layers).astype(jnp.float32)).sum()

        memory, elements = compiled(jax.grad(loss, 1), device)
        return memory.temp_size_in_bytes / elements

    assert temporary(True) <= 3.2 < 4 < temporary(False)


@pytest.mark.parametrize(
    "create",
    [
        functools.partial(linen.BatchNorm, False),
        functools.partial(linen.BatchNorm2d, 4, axis=-1, use_running_average=False),
        functools.partial(nnx.BatchNorm, 4, rngs=flax_nnx.Rngs(0)),
        functools.partial(nnx.BatchNorm2d, 4, axis=-1, rngs=flax_nnx.Rngs(0)),
    ],
    ids=["linen.BatchNorm", "linen.BatchNorm2d", "nnx.BatchNorm", "nnx.BatchNorm2d"],
)
def test_layers(create):
    x = sample(SHAPE, 0, dtype=np.float32)

    def output(keep_output):
        layer = create(activation="leaky_relu", keep_output=keep_output)
        if isinstance(layer, flax_nnx.Module):
            parts = flax_nnx.split(layer)
            return lambda x: flax_nnx.merge(*parts, copy=True)(x)
        variables = layer.init(jax.random.key(0), x)
        return lambda x: layer.apply(variables, x, mutable=["batch_stats"])[0]

    y, pullback = jax.vjp(output(True), x)
    same, expected = jax.vjp(output(False), x)
    np.testing.assert_array_equal(y, same)
    assert_close(pullback(y), expected(y), 1e-4)
    assert any(np.array_equal(v, y) for v in jax.tree.leaves(pullback))
    assert not any(np.array_equal(v, x) for v in jax.tree.leaves(pullback))


INVERSE = "`keep_output` takes an activation that has an inverse, None or 'leaky_relu'; got "
REFUSED = {
    "relu": ({"activation": "relu"}, ValueError, INVERSE + "'relu'. Choose one of these"),
    "gelu": ({"activation": jax.nn.gelu}, ValueError, INVERSE),
    "own function": ({"activation": lambda z: 2 * z}, ValueError, INVERSE),
    "own function of ghost batches": (
        {"activation": jnp.tanh, "virtual_batch_size": 2},
        ValueError,
        INVERSE,
    ),
    "residual": (
        {"residual": np.ones((4, 3), np.float32)},
        ValueError,
        "`keep_output` takes no `residual`",
    ),
    "no bool": (
        {"keep_output": 1},
        TypeError,
        "`keep_output` must be True or False, known when traced; got 1.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    options, kind, message = REFUSED[case]
    options = {"keep_output": True} | options
    x = sample((4, 3), 0, dtype=np.float32)
    with pytest.raises(kind, match=re.escape(message)):
        jaxbn.batch_normalize(x, **options)
    for train in (True, False):
        with pytest.raises(kind, match=re.escape(message)):
            jaxbn.batch_norm(x, jaxbn.init_batch_stats(3), train=train, **options)


def test_layers_refuse_the_same():
    x = sample((4, 3), 0, dtype=np.float32)
    layer = linen.BatchNorm(activation="silu", keep_output=True)
    variables = linen.BatchNorm().init(jax.random.key(0), x, False)
    with pytest.raises(ValueError, match=re.escape(INVERSE + "'silu'")):
        layer.apply(variables, x, False, mutable=["batch_stats"])
    with pytest.raises(NotImplementedError, match="complex numbers takes no keep_output"):
        linen.BatchNorm(keep_output=True).init(jax.random.key(0), x.astype(np.complex64), False)
