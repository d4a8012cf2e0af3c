"""Sharded arrays under `jit`: one batch, whatever is where, on automatic and explicit meshes."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compare import assert_close
from helpers.numpy_reference import error, masked_train, problem, tolerance
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import linen

SHAPE = (16, 8, 4, 8)  # NCHW
SPECS = {
    "batch": P("a"),
    "channels": P(None, "a"),
    "rows": P(None, None, "a"),
    "batch and channels": P("a", "b"),
    "batch and columns": P("a", None, None, "b"),
    "batch over both": P(("a", "b")),
    "columns and channels": P(None, "b", None, "a"),
}


def make_mesh(axis_types):
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=axis_types)


@jax.jit
def run(x, scale, bias, dy, mask):
    """Everything that a training step of a layer makes."""
    stats = jaxbn.init_batch_stats(SHAPE[1], scale.dtype)

    def forward(x, scale, bias):
        moments = jaxbn.batch_moments(x, axis=1, mask=mask)
        y, new = jaxbn.batch_norm(x, stats, scale, bias, train=True, axis=1, mask=mask, momentum=1)
        return y, (moments, new)

    y, pullback, (moments, new) = jax.vjp(forward, x, scale, bias, has_aux=True)
    return y, moments, new, *pullback(dy)


def masked(which):
    if which == "no mask":
        return None
    shape = (SHAPE[0], 1, SHAPE[2], 1) if which == "mask" else SHAPE
    mask = np.random.RandomState(5).uniform(size=shape) < 0.6
    mask[:8] = False  # half of the devices hold nothing that counts
    return mask


def check(results, expected, limit):
    y, moments, new, dx, dscale, dbias = results
    n = expected.count
    pairs = {
        "y": (y, expected.y),
        "mean": (moments.mean, expected.mean),
        "var": (moments.var, expected.var),
        "running mean": (new.mean, expected.mean),
        "running var": (new.var, expected.var * n / (n - 1)),
        "dx": (dx, expected.dx),
        "dscale": (dscale, expected.dscale),
        "dbias": (dbias, expected.dbias),
    }
    for name, (actual, reference) in pairs.items():
        assert error(actual, reference) <= limit, name


TYPES = {
    "auto": (AxisType.Auto,) * 2,
    "explicit": (AxisType.Explicit,) * 2,
    "both": (AxisType.Explicit, AxisType.Auto),
}


MASKS = "no mask", "mask", "mask of every value"
# Any two of a place, a kind of mesh, a mask and a dtype meet in one of them.
CASES = [
    (spec, kind, MASKS[(i + j) % 3], dtype)
    for i, spec in enumerate(SPECS)
    for j, kind in enumerate(TYPES)
    for dtype in (np.float32, np.float64)
    if dtype == np.float32 or i % 3 == j
]


@pytest.mark.parametrize(("spec", "kind", "which", "dtype"), CASES)
def test_a_sharded_array_is_one_batch(spec, kind, which, dtype):
    mesh, mask = make_mesh(TYPES[kind]), masked(which)
    place = NamedSharding(mesh, SPECS[spec])
    everywhere = np.ones(SHAPE, bool) if mask is None else mask
    means = {np.float32: (3.0, 1e6), np.float64: (3.0,)}
    limit = tolerance(dtype, 512) if dtype == np.float32 else 1e-12
    for mean in means[dtype]:
        x, scale, bias, dy = problem(SHAPE, 1, dtype=dtype, mean=mean)
        expected = masked_train(x, scale, bias, dy, 1, everywhere)
        with jax.enable_x64(dtype == np.float64), jax.set_mesh(mesh):
            x, dy = (jax.device_put(v, place) for v in (x, dy))
            results = run(x, scale, bias, dy, mask)
        assert {results[i].sharding.shard_shape(SHAPE) for i in (0, 3)} == {
            place.shard_shape(SHAPE)
        }
        check(results, expected, limit)


MODULE = """
import jax, jaxbn, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((2, 2, 2), ("a", "b", "c"))
x = jax.ShapeDtypeStruct((16, 4), np.float32, sharding=NamedSharding(mesh, P(("c", "a", "b"))))
with jax.set_mesh(mesh):
    gradient = jax.grad(lambda x: (jaxbn.batch_normalize(x)[0] ** 3).sum())
    print(*{"a", "b", "c"})
    print(jax.jit(gradient).lower(x).as_text())
"""


def test_every_process_compiles_the_same_module():
    # Python orders a set of strings differently in every process.
    orders, modules = set(), set()
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", MODULE]
        output = subprocess.check_output(command, env=environment, text=True)
        order, module = output.split("\n", 1)
        orders.add(order)
        modules.add(module)
    assert len(orders) == 2
    assert len(modules) == 1
    assert "all_gather" in modules.pop()


def test_the_type_of_an_array_is_enough():
    # No mesh is set, and nothing is compiled around the call.
    place = NamedSharding(make_mesh(TYPES["explicit"]), P("a"))
    x, scale, bias, _ = problem(SHAPE, 1)
    y, moments = jaxbn.batch_normalize(jax.device_put(x, place), scale, bias, axis=1)
    expected = masked_train(x, scale, bias, x, 1, np.ones(SHAPE, bool))
    assert error(y, expected.y) <= tolerance(np.float32, 512)
    assert error(moments.var, expected.var) <= tolerance(np.float32, 512)


def test_models_on_devices_of_their_own():
    # The mapped axis is sharded by "b", and the batch of every model by "a".
    mesh = make_mesh(TYPES["explicit"])
    x, scale, bias, _ = problem((2, *SHAPE), 2)
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, P("b", "a"))
        y, moments = jax.jit(jax.vmap(lambda x: jaxbn.batch_normalize(x, scale, bias, axis=1)))(
            jax.device_put(x, place)
        )
    y, moments = jax.device_get((y, moments))
    for i in range(2):
        expected = masked_train(x[i], scale, bias, x[i], 1, np.ones(SHAPE, bool))
        assert error(y[i], expected.y) <= tolerance(np.float32, 512)
        assert error(moments.var[i], expected.var) <= tolerance(np.float32, 512)


@pytest.mark.parametrize("groups", [None, [[0, 3], [1, 2]]])
def test_named_devices_of_a_mesh_whose_other_axis_is_explicit(groups):
    mesh = make_mesh(TYPES["explicit"])
    x, scale, bias, _ = problem(SHAPE, 1)
    x += np.arange(SHAPE[0], dtype=np.float32)[:, None, None, None]

    def part(x):
        assert jax.typeof(x).sharding.spec == P(None, None, None, "b")
        return jaxbn.batch_normalize(
            x, scale, bias, axis=1, axis_name="a", axis_index_groups=groups
        )[0]

    with jax.set_mesh(mesh):
        x_placed = jax.device_put(x, NamedSharding(mesh, P("a", None, None, "b")))
        mapped = jax.shard_map(part, in_specs=P("a"), out_specs=P("a"), axis_names={"a"})
        y = jax.device_get(jax.jit(mapped)(x_placed))
    for group in groups or [range(4)]:
        samples = np.concatenate([np.arange(4 * i, 4 * i + 4) for i in group])
        expected = masked_train(x[samples], scale, bias, x[samples], 1, True)
        assert error(y[samples], expected.y) <= tolerance(np.float32, 512)


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("types", ["auto", "explicit"])
def test_statistics_stay_where_they_are(types, spread):
    """Carried through a loop and through both modes, beside channels that are spread."""
    mesh = make_mesh(TYPES[types])
    x = problem(SHAPE, 1)[0]
    start = jaxbn.init_batch_stats(SHAPE[1])

    def step(stats, train):
        return jaxbn.batch_norm(x_spread, stats, train=train, axis=1)[1], None

    with jax.set_mesh(mesh):
        x_spread = jax.device_put(x, NamedSharding(mesh, P(None, "a")))
        vector = NamedSharding(mesh, P("a" if spread else None))
        stats = jaxbn.BatchStats(*(jax.device_put(v, vector) for v in start[:2]), start.count)
        stats, _ = jax.jit(lambda s: jax.lax.scan(step, s, jnp.array([True, False])))(stats)
    expected = jaxbn.batch_norm(x, start, train=True, axis=1)[1]
    assert stats.mean.sharding.shard_shape((8,)) == ((2,) if spread else (8,))
    assert error(stats.mean, expected.mean) <= tolerance(np.float32, 512)
    assert error(stats.var, expected.var) <= tolerance(np.float32, 512)
    assert stats.count == 1


@pytest.mark.parametrize("types", ["auto", "explicit"])
def test_layers(types):
    mesh = make_mesh(TYPES[types])
    x = problem(SHAPE, 1)[0]
    layer = linen.BatchNorm2d(SHAPE[1], virtual_batch_size=SHAPE[0] // 4)
    variables = layer.init(jax.random.key(0), x, True)

    @jax.jit
    def step(x):
        return layer.apply(variables, x, False, mutable=["batch_stats"])

    with jax.set_mesh(mesh):
        actual = step(jax.device_put(x, NamedSharding(mesh, P("a"))))
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5), actual, step(x)
    )


def test_long_batches_of_vectors_stay_in_place():
    # More than is summed in two parts, so that the shift is taken of every sixteenth sample.
    x = np.random.RandomState(0).normal(1e4, 1.0, (32_768, 8)).astype(np.float32)
    mesh = make_mesh(TYPES["auto"])
    moments = jax.jit(jaxbn.batch_moments)(jax.device_put(x, NamedSharding(mesh, P(("a", "b")))))
    assert error(moments.var, x.astype(np.float64).var(0)) <= tolerance(np.float32, len(x))
    assert jnp.all(moments.count == len(x))


@pytest.mark.parametrize("names", ["inner", ("inner", "a")])
def test_an_axis_of_vmap_inside_of_shard_map(names):
    x = problem((8, 2, 6), -1, dtype=np.float32)[0]
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,))

    def local(x):
        def normalized(x):
            return jaxbn.batch_normalize(x, axis_name=names)[0]

        return jax.vmap(normalized, 1, 1, axis_name="inner")(x)

    def run(check_vma):
        specs = {"in_specs": P("a"), "out_specs": P("a")}
        return jax.jit(jax.shard_map(local, mesh=mesh, check_vma=check_vma, **specs))(x)

    expected = x if names != "inner" else x.reshape(4, 2, 2, 6)
    axes = (0, 1) if names != "inner" else (1, 2)
    mean, var = (f(expected, axis=axes, keepdims=True) for f in (np.mean, np.var))
    expected = ((expected - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
    assert error(run(False), expected) <= 1e-6
    with pytest.raises(NotImplementedError, match="Pass check_vma=False to"):
        run(True)


OWN = {
    "softmax": lambda z: jax.nn.softmax(z, -1),
    "where": lambda z: jnp.where(z > 0, z, 0.1 * z),
    "loop": lambda z: jax.lax.fori_loop(0, 2, lambda i, c: c * 0.5 + z, z),
}


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", OWN)
def test_a_function_and_groups_inside_of_shard_map(name, check_vma):
    x, scale, bias, dy = problem((8, 3, 6), -1, dtype=np.float32)
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,))

    def functions(activation):
        options = {"activation": activation}
        yield lambda x: jaxbn.normalize(x, bias, scale**2, scale, bias, **options)
        yield lambda x: jaxbn.batch_normalize(x, scale, bias, virtual_batch_size=2, **options)[0]

    def results(function, x, dy):
        y, pullback = jax.vjp(function, x)
        return y, pullback(dy)

    for function, plain in zip(functions(OWN[name]), functions(None), strict=True):
        mapped = jax.shard_map(
            functools.partial(results, function),
            mesh=mesh,
            in_specs=P("a"),
            out_specs=P("a"),
            check_vma=check_vma,
        )
        expected = results(lambda x, plain=plain: OWN[name](plain(x)), x, dy)
        assert_close(jax.jit(mapped)(x, dy), expected, 1e-5)


def test_the_type_of_an_output_of_a_function_says_where_it_is():
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((8, 3, 6)), NamedSharding(mesh, P("a")))

        @jax.jit
        def gradient(x):
            def loss(x):
                y, _ = jaxbn.batch_normalize(x, activation=OWN["loop"])
                assert jax.typeof(y).sharding.spec[0] == "a"
                return y.sum()

            return jax.grad(loss)(x)

        assert gradient(x).shape == x.shape
