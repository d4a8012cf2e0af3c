"""Fused activation and residual: values and derivatives of the composition, and what is kept."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.compare import assert_close
from helpers.numpy_reference import error, problem, sample, tolerance, train
from scipy.special import erf

import jaxbn
from jaxbn import linen
from jaxbn import nnx as nnx_bn

SHAPE = (16, 6, 5, 8)
# As NumPy functions of float64, in the definitions of `jax.nn`.
DEFINITIONS = {
    "relu": lambda z: np.maximum(z, 0),
    "leaky_relu": lambda z: np.where(z >= 0, z, 0.01 * z),
    "silu": lambda z: z / (1 + np.exp(-z)),
    "gelu": lambda z: z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))),
}
CALLABLES = {
    "exact gelu": functools.partial(jax.nn.gelu, approximate=False),
    "tanh": jnp.tanh,
    "softmax over channels": lambda z: jax.nn.softmax(z, axis=-1),
}
ACTIVATIONS = {None: None, **{name: name for name in DEFINITIONS}, **CALLABLES}


def unfused(activation, z):
    if activation is None:
        return z
    return (getattr(jax.nn, activation) if isinstance(activation, str) else activation)(z)


def operands(dtype=np.float64, shape=SHAPE):
    x, scale, bias, dy = problem(shape, -1, dtype=dtype)
    return (x, scale, bias, sample(shape, 9, 0.2, 1.0, dtype)), dy


def in_mode(mode, x, scale, bias, **options):
    if mode == "train":
        return jaxbn.batch_normalize(x, scale, bias, **options)[0]
    return jaxbn.normalize(x, bias + 3, jnp.abs(scale) + 1, scale, bias, **options)


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_values(name, with_residual):
    (x, scale, bias, residual), dy = operands(np.float32)
    z = train(x, scale, bias, dy, -1).y + (residual if with_residual else 0)
    y, _ = jaxbn.batch_normalize(
        x, scale, bias, activation=name, residual=residual if with_residual else None
    )
    assert error(y, DEFINITIONS[name](z)) <= tolerance(np.float32, x.size // 8)


def test_the_exact_gelu_is_a_callable():
    (x, scale, bias, _), dy = operands(np.float32)
    z = train(x, scale, bias, dy, -1).y
    y, _ = jaxbn.batch_normalize(x, scale, bias, activation=CALLABLES["exact gelu"])
    assert error(y, z / 2 * (1 + erf(z / np.sqrt(2)))) <= tolerance(np.float32, x.size // 8)


def derivatives(function, arguments, tangents, dy):
    """Output and gradients, and their derivatives in the direction of `tangents`."""

    def gradients(*arguments):
        y, pullback = jax.vjp(function, *arguments)
        return y, pullback(dy)

    return jax.jvp(function, arguments, tangents), jax.jvp(gradients, arguments, tangents)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def derivatives_fused(name, mode, with_residual, *operands):
    def fused(x, scale, bias, residual):
        residual = residual if with_residual else None
        return in_mode(mode, x, scale, bias, activation=ACTIVATIONS[name], residual=residual)

    return derivatives(fused, *operands)


@functools.partial(jax.jit, static_argnums=(0, 1))
def derivatives_composed(name, mode, with_residual, *operands):
    def composed(x, scale, bias, residual):
        return unfused(ACTIVATIONS[name], in_mode(mode, x, scale, bias) + with_residual * residual)

    return derivatives(composed, *operands)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", ["train", "inference"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_are_those_of_the_composition(name, with_residual, mode):
    arguments, dy = operands(shape=(6, 3))
    tangents = tuple(sample(v.shape, 20 + i, 0.3, 1.0) for i, v in enumerate(arguments))
    actual = derivatives_fused(name, mode, with_residual, arguments, tangents, dy)
    expected = derivatives_composed(name, mode, float(with_residual), arguments, tangents, dy)
    assert_close(actual, expected, 1e-9)


@pytest.mark.parametrize("mode", ["train", "inference"])
def test_an_activation_may_have_parameters(mode):
    (x, scale, bias, _), dy = operands(np.float32)

    def loss(fused, slope):
        def prelu(z):
            return jnp.where(z > 0, z, jnp.expand_dims(slope, (0, 1, 2)) * z)

        activation = prelu if fused else None
        y = in_mode(mode, x, scale, bias, activation=activation)
        return ((y if fused else prelu(y)) * dy).sum()

    @functools.partial(jax.jit, static_argnums=0)
    def results(fused, slopes):
        forward = functools.partial(loss, fused)
        gradient, several = jax.grad(forward), jnp.stack([slopes, 2 * slopes])
        return gradient(slopes), jax.vmap(gradient)(several), jax.vmap(forward)(several)

    slopes = jnp.linspace(0.1, 0.8, 8)
    for actual, expected in zip(results(True, slopes), results(False, slopes), strict=True):
        assert error(actual, expected) <= 1e-5


WHOLE = {
    "softmax over positions": lambda z: jax.nn.softmax(z, 1),
    "reversed samples": lambda z: z[::-1],
    "sums over all": lambda z: jnp.cumsum(z.reshape(-1)).reshape(z.shape) / z.size,
}


@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 4}, {"mask": True}, {"axis": 1}])
@pytest.mark.parametrize("name", WHOLE)
def test_a_function_sees_the_whole_output(name, options):
    """The definition is `activation(bn(x))`, of functions that are not elementwise too."""
    x, _, _, dy = problem((8, 6, 4, 6), -1, dtype=np.float32)
    scale, bias, weight = jnp.linspace(0.5, 1.5, 6), jnp.linspace(-1, 1, 6), jnp.linspace(1, 2, 6)
    if "mask" in options:
        options = {"mask": jnp.arange(8 * 6).reshape(8, 6, 1, 1) % 5 != 0}
        x = jnp.where(options["mask"], x, jnp.nan)

    def results(fused, x, scale, bias, weight):
        def loss(x, scale, bias, weight):
            def own(z):
                y = WHOLE[name](z) * jnp.expand_dims(weight, range(z.ndim - 1))
                return y if fused else jnp.where(options.get("mask", True), y, 0)

            fusion = {"activation": own} if fused else {}
            y, _ = jaxbn.batch_normalize(x, scale, bias, **options, **fusion)
            y = y if fused else own(y)
            return (y * dy).sum(), y

        gradients, y = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(x, scale, bias, weight)
        return y, gradients

    run = jax.jit(results, static_argnums=0)
    assert_close(run(True, x, scale, bias, weight), run(False, x, scale, bias, weight), 2e-5)


def large_arrays_kept(function, *arguments):
    """Sizes of the arrays beyond vectors that the backward pass keeps, one entry each."""
    _, pullback = jax.vjp(function, *arguments)
    buffers = {leaf.unsafe_buffer_pointer(): leaf for leaf in jax.tree.leaves(pullback)}
    return sorted(leaf.nbytes for leaf in buffers.values() if leaf.size > 64)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "silu", "gelu", "tanh"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_the_backward_pass_keeps_nothing_wider_than_the_input(mode, with_residual, name):
    (x, scale, bias, residual), _ = operands(np.float32)
    x, residual = jnp.asarray(x, jnp.bfloat16), jnp.asarray(residual, jnp.bfloat16)

    def function(x, scale, bias, residual):
        residual = residual if with_residual else None
        options = {"activation": ACTIVATIONS[name], "residual": residual}
        return in_mode(mode, x, scale, bias, **options)

    # `x`, and with a residual either that or the output.
    assert large_arrays_kept(function, x, scale, bias, residual) == [x.nbytes] * (1 + with_residual)


def test_inference_in_float32_keeps_one_array():
    (x, scale, bias, _), _ = operands(np.float32)
    x = jnp.asarray(x)

    def function(x, scale, bias):
        return in_mode("inference", x, scale, bias)

    assert large_arrays_kept(function, x, scale, bias) == [x.nbytes]


@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
def test_with_a_residual_the_output_is_kept_rather_than_the_residual(name):
    (x, scale, bias, residual), _ = operands(np.float32)

    def function(x, scale, bias, residual):
        return in_mode("train", x, scale, bias, activation=name, residual=residual)

    y, pullback = jax.vjp(function, x, scale, bias, jnp.asarray(residual))
    kept = [leaf for leaf in jax.tree.leaves(pullback) if leaf.shape == SHAPE]
    assert any(np.array_equal(leaf, y) for leaf in kept)
    assert not any(np.array_equal(leaf, residual) for leaf in kept)


@pytest.mark.parametrize(
    "module",
    [
        linen.BatchNorm(activation="gelu"),
        linen.BatchNorm2d(8, axis=-1, activation="gelu"),
        linen.BatchNorm2d(8, axis=-1, activation="gelu", track_running_stats=False),
    ],
    ids=["BatchNorm", "BatchNorm2d", "no statistics"],
)
@pytest.mark.parametrize("inference", [False, True])
def test_layers(module, inference):
    (x, _, _, residual), _ = operands(np.float32)
    variables = module.init(jax.random.key(0), x, False, residual=residual)
    y, updates = module.apply(variables, x, inference, residual=residual, mutable=["batch_stats"])
    plain = module.clone(activation=None)
    z, plain_updates = plain.apply(variables, x, inference, mutable=["batch_stats"])
    np.testing.assert_allclose(y, nn.gelu(z + residual), rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, updates, plain_updates)


@pytest.mark.parametrize("groups", [None, 4])
@pytest.mark.parametrize("axis", [(2, 3), (1, -1), (3, 0, 1), 2])
def test_layers_show_a_function_their_own_layout(axis, groups):
    x = sample((8, 10, 6, 4), 1, 2.0, 3.0, np.float32)
    groups = None if axis == (3, 0, 1) else groups
    softmax = functools.partial(jax.nn.softmax, axis=1)
    fused = linen.BatchNorm(axis=axis, activation=softmax, virtual_batch_size=groups)
    plain = linen.BatchNorm(axis=axis, virtual_batch_size=groups)
    variables = plain.init(jax.random.key(0), x, True)

    @functools.partial(jax.jit, static_argnums=0)
    def output(layer, variables, x):
        inference = layer.apply(variables, x, True)
        return layer.apply(variables, x, False, mutable=["batch_stats"])[0], inference

    expected = jax.tree.map(softmax, output(plain, variables, x))
    assert_close(output(fused, variables, x), expected, 1e-6)

    of_nnx = nnx_bn.BatchNorm(
        np.prod([x.shape[i] for i in np.atleast_1d(axis)]),
        axis=axis,
        activation=softmax,
        virtual_batch_size=groups,
        rngs=nnx.Rngs(0),
    )
    assert_close(of_nnx(x), expected[0], 1e-6)


class WithModule(nn.Module):
    """A layer whose activation holds another module, given in one of three ways."""

    way: str

    @nn.compact
    def __call__(self, x, inference=True):
        prelu = nn.PReLU(name="prelu")
        if self.way == "behind":
            return prelu(linen.BatchNorm(inference, name="norm")(x))
        activation = prelu if self.way == "module" else lambda z: prelu(z)
        return linen.BatchNorm(inference, activation=activation, name="norm")(x)


@pytest.mark.parametrize("way", ["module", "closure"])
def test_an_activation_may_be_or_hold_a_linen_module(way):
    x = sample((8, 3), 1, 2.0, 3.0, np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def step(way):
        model = WithModule(way)
        variables = model.init(jax.random.key(0), x)

        def loss(params):
            given = {**variables, "params": params}
            y, updates = model.apply(given, x, False, mutable=["batch_stats"])
            return jnp.square(y).sum(), (y, updates, variables)

        return jax.grad(loss, has_aux=True)(variables["params"])

    assert_close(step(way), step("behind"), 1e-5)


def test_an_activation_that_writes_variables_is_refused():
    class Sows(nn.Module):
        @nn.compact
        def __call__(self, x):
            def activation(z):
                self.sow("intermediates", "z", z)
                return z

            return linen.BatchNorm(True, activation=activation)(x)

    x = jnp.ones((4, 3))
    variables = Sows().init(jax.random.key(0), x)
    Sows().apply(variables, x)
    with pytest.raises(ValueError, match="`activation` must not write variables: it is traced"):
        Sows().apply(variables, x, mutable=["intermediates"])

    dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    layer = nnx_bn.BatchNorm(3, activation=lambda z: dropout(z), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`activation` must not write variables: it is traced"):
        layer(x)


class Net(nnx.Module):
    def __init__(self, fused):
        self.prelu, self.fused = nnx.PReLU(), fused
        self.norm = nnx_bn.BatchNorm(3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        if not self.fused:
            return self.prelu(self.norm(x))
        self.norm.activation = lambda z: self.prelu(z)
        return self.norm(x)


def test_an_activation_may_hold_an_nnx_module():
    x = sample((8, 3), 1, 2.0, 3.0, np.float32)
    loss = nnx.jit(nnx.value_and_grad(lambda net: jnp.square(net(x)).sum()))
    actual, expected = (jax.tree.leaves(loss(Net(fused))) for fused in (True, False))
    assert len(actual) == 4
    assert_close(actual, expected, 1e-5)
