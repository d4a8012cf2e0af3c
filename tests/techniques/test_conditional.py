"""Scale and bias of each sample, against the definition in float64."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from helpers.compare import assert_close
from helpers.numpy_reference import error, masked_train, problem, sample, tolerance
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import linen, nnx

X, _, _, DY = problem((16, 3, 4), -1)
SCALE, BIAS = sample((16, 4), 7, 1.0, 0.5, np.float32), sample((16, 4), 8, -0.5, 1.0, np.float32)
RESIDUAL = sample(X.shape, 9, 0.2, 1.0, np.float32)
MASK = np.arange(48).reshape(16, 3, 1) % 5 != 0
STATS = jaxbn.BatchStats(jnp.linspace(1.0, 6.0, 4), jnp.linspace(1.0, 9.0, 4), jnp.int32(7))


def reference(x, scale, bias, residual, dy, mask=True):
    """Output and gradients of `relu(x̂·scale + bias + residual)`."""
    x, scale, bias, residual, dy = (
        np.asarray(v, np.float64) for v in (x, scale, bias, residual, dy)
    )
    ones, mask = np.ones(x.shape[-1]), np.broadcast_to(mask, x.shape)
    normalized = masked_train(x, ones, 0 * ones, dy, -1, mask).y
    z = np.where(mask, normalized * scale[:, None] + bias[:, None] + residual, 0)
    dz = np.where(z > 0, dy, 0)
    dx = masked_train(x, ones, 0 * ones, dz * scale[:, None], -1, mask).dx
    return np.maximum(z, 0), dx, (dz * normalized).sum(1), dz.sum(1), dz


@functools.partial(jax.jit, static_argnames=("axis", "axis_name", "virtual_batch_size"))
def run(x, scale, bias, residual, dy, **options):
    def forward(x, scale, bias, residual):
        return jaxbn.batch_normalize(
            x, scale, bias, residual=residual, activation="relu", **options
        )[0]

    y, backward = jax.vjp(forward, x, scale, bias, residual)
    return y, *backward(dy)


def assert_right(actual, expected):
    for value, right in zip(actual, expected, strict=True):
        assert error(value, right) <= tolerance(value.dtype, X.size)


@pytest.mark.parametrize("mask", [True, MASK], ids=["whole", "masked"])
def test_the_definition(mask):
    poisoned = [np.where(mask, v, np.nan).astype(np.float32) for v in (X, RESIDUAL)]
    actual = run(poisoned[0], SCALE, BIAS, poisoned[1], DY, mask=mask)
    assert_right(actual, reference(X, SCALE, BIAS, RESIDUAL, DY, mask))


def test_channels_first():
    first = [np.moveaxis(v, -1, 1) for v in (X, RESIDUAL, DY)]
    y, dx, *vectors, dresidual = run(first[0], SCALE, BIAS, first[1], first[2], axis=1)
    actual = (
        jnp.moveaxis(y, 1, -1),
        jnp.moveaxis(dx, 1, -1),
        *vectors,
        jnp.moveaxis(dresidual, 1, -1),
    )
    assert_right(actual, reference(X, SCALE, BIAS, RESIDUAL, DY))


def test_channels_before_samples():
    flat = X[:, 0]
    y, _ = jaxbn.batch_normalize(flat.T, SCALE, BIAS, axis=0)
    assert_close(y.T, jaxbn.batch_normalize(flat, SCALE, BIAS)[0], 1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype):
    x, residual, dy = (v.astype(dtype) for v in (X, RESIDUAL, DY))
    assert_right(run(x, SCALE, BIAS, residual, dy), reference(x, SCALE, BIAS, residual, dy))


def test_groups():
    actual = run(X, SCALE, BIAS, RESIDUAL, DY, virtual_batch_size=4)
    for i in range(0, 16, 4):
        part = slice(i, i + 4)
        expected = reference(X[part], SCALE[part], BIAS[part], RESIDUAL[part], DY[part])
        assert_right([v[part] for v in actual], expected)


@pytest.mark.parametrize("transform", ["vmap", "shard_map"])
def test_devices(transform):
    arguments, over = (X, SCALE, BIAS, RESIDUAL, DY), functools.partial(run, axis_name="devices")
    if transform == "vmap":
        parts = [v.reshape(4, 4, *v.shape[1:]) for v in arguments]
        actual = jax.vmap(over, axis_name="devices")(*parts)
        actual = [v.reshape(16, *v.shape[2:]) for v in actual]
    else:
        mesh = jax.make_mesh((4,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
        split = P("devices")
        over = jax.shard_map(over, mesh=mesh, in_specs=(split,) * 5, out_specs=(split,) * 5)
        actual = jax.jit(over)(*arguments)
    assert_right(actual, reference(X, SCALE, BIAS, RESIDUAL, DY))


@pytest.mark.parametrize("own", ["scale", "bias"])
def test_one_of_the_two(own):
    """The other is of shape `[C]`, or not there."""
    given = {"scale": SCALE, "bias": BIAS}
    others = {"scale": "bias", "bias": "scale"}
    vectors = {own: given[own], others[own]: given[others[own]][0]}
    y, _ = jaxbn.batch_normalize(X, **vectors)
    full = {name: np.broadcast_to(v, SCALE.shape) for name, v in vectors.items()}
    assert_close(y, jaxbn.batch_normalize(X, **full)[0], 1e-6)
    y, _ = jaxbn.batch_normalize(X, **{own: given[own]})
    alone = {"scale": np.ones_like(SCALE), "bias": np.zeros_like(BIAS), own: given[own]}
    assert_close(y, jaxbn.batch_normalize(X, **alone)[0], 1e-6)


@pytest.mark.parametrize("train", [True, False])
def test_equal_samples_are_batch_norm(train):
    """In both modes, with a mask and a function of one's own, which sees zero where masked."""
    same = np.tile(SCALE[0], (16, 1)), np.tile(BIAS[0], (16, 1))
    options = {"train": train, "mask": MASK, "activation": lambda z: z - z.mean()}
    actual = jaxbn.batch_norm(X, STATS, *same, **options)
    expected = jaxbn.batch_norm(X, STATS, SCALE[0], BIAS[0], **options)
    assert_close(actual, expected, 2e-6)


def test_what_is_kept_for_the_backward_pass():
    """The input, and the vectors of samples."""
    x, vectors = jnp.zeros((16, 64, 64, 8), jnp.bfloat16), jnp.ones((16, 8))

    def forward(x, scale, bias):
        return jaxbn.batch_normalize(x, scale, bias, activation="relu")[0]

    residuals = jax.eval_shape(lambda *v: jax.vjp(forward, *v)[1], x, vectors, vectors)
    kept = sum(v.size * v.dtype.itemsize for v in jax.tree.leaves(residuals))
    assert kept <= x.nbytes + 4 * vectors.nbytes


class Generator(nn.Module):
    """Class-conditional, in Linen."""

    norm: nn.Module

    @nn.compact
    def __call__(self, x, labels, inference):
        scale = nn.Embed(3, 4, embedding_init=nn.initializers.ones, name="scale")(labels)
        bias = nn.Embed(3, 4, name="bias")(labels)
        return self.norm(x, inference, scale=scale, bias=bias)


@pytest.mark.parametrize(
    "norm",
    [linen.BatchNorm(use_scale=False, use_bias=False), linen.BatchNorm1d(4, affine=False, axis=-1)],
    ids=["Flax", "torch"],
)
def test_linen(norm):
    model, labels = Generator(norm), np.arange(16) % 3
    variables = model.init(jax.random.key(0), X, labels, True)
    table = {name: sample((3, 4), i, dtype=np.float32) for i, name in enumerate(("scale", "bias"))}
    variables["params"] = {name: {"embedding": v} for name, v in table.items()}

    def loss(params):
        y, _ = model.apply(
            {**variables, "params": params}, X, labels, False, mutable=["batch_stats"]
        )
        return (y * DY).sum(), y

    gradients, y = jax.grad(loss, has_aux=True)(variables["params"])

    def expected(table):
        y, _ = jaxbn.batch_normalize(X, table["scale"][labels], table["bias"][labels])
        return (y * DY).sum(), y

    right, same = jax.grad(expected, has_aux=True)(jax.tree.map(jnp.asarray, table))
    assert_close(y, same, 1e-6)
    assert_close(gradients, {name: {"embedding": v} for name, v in right.items()}, 1e-5)


def test_nnx():
    rngs, expected = flax_nnx.Rngs(0), jaxbn.batch_norm(X, STATS, SCALE, BIAS, train=False)[0]
    for layer in (
        nnx.BatchNorm(4, use_scale=False, use_bias=False, use_running_average=True, rngs=rngs),
        nnx.BatchNorm1d(4, affine=False, axis=-1, use_running_average=True, rngs=rngs),
    ):
        layer.mean.set_value(STATS.mean)
        layer.var.set_value(STATS.var)
        assert_close(layer(X, scale=SCALE, bias=BIAS), expected, 1e-6)


def test_several_channel_axes():
    layer = linen.BatchNorm(axis=(1, 2), use_scale=False, use_bias=False)
    scale, bias = (sample((16, 3, 4), i, dtype=np.float32) for i in range(2))
    variables = layer.init(jax.random.key(0), X, True)
    y, _ = layer.apply(variables, X, False, scale=scale, bias=bias, mutable=["batch_stats"])
    flat = [v.reshape(16, 12) for v in (X, scale, bias)]
    assert_close(y.reshape(16, 12), jaxbn.batch_normalize(*flat)[0], 1e-6)


def linen_call(layer, x=X, **options):
    return layer.init_with_output(jax.random.key(0), x, False, **options)


ERRORS = {
    "samples": (
        lambda: jaxbn.batch_normalize(X, SCALE[:3]),
        "`scale` of each sample must have shape [N, C], (16, 4) for x.shape=(16, 3, 4) and axis=2; "
        "got (3, 4).",
    ),
    "a vector beside it": (
        lambda: jaxbn.batch_normalize(X, SCALE, BIAS[0, :3]),
        "`bias` must have shape (4,)",
    ),
    "no samples": (lambda: jaxbn.normalize(X[0, 0], X[0, 0], X[0, 0], SCALE), "`scale` of each"),
    "no inverse": (
        lambda: jaxbn.batch_normalize(X, SCALE, keep_output=True),
        "`keep_output` takes a `scale` and a `bias` of shape [C]; got [N, C], one row per sample.",
    ),
    "three dimensions": (lambda: jaxbn.batch_normalize(X, X), "`scale` must have shape (4,)"),
    "a scale of its own": (
        lambda: linen_call(linen.BatchNorm(), scale=SCALE),
        "`scale` in a call needs a layer without its own; got one that has it. Make the layer with "
        "use_scale=False.",
    ),
    "affine": (
        lambda: nnx.BatchNorm1d(4, axis=-1, rngs=flax_nnx.Rngs(0))(X, bias=BIAS),
        "got one that has it. Make the layer with affine=False.",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, words = ERRORS[case]
    with pytest.raises(ValueError, match=re.escape(words)):
        call()


def test_complex_numbers():
    layer = linen.BatchNorm(use_scale=False, use_bias=False, dtype=jnp.complex64)
    with pytest.raises(NotImplementedError, match="no scale or bias of each sample"):
        linen_call(layer, X.astype(np.complex64), scale=SCALE)
