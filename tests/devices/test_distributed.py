"""One batch on several devices, in every way that JAX distributes, against float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compare import assert_close
from helpers.numpy_reference import error, masked_train, problem, sample, tolerance
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn._core import moments as core_moments

SHARD = (6, 3, 2)  # samples, positions, channels of one device
NAMES = "y", "mean", "var", "count", "dx", "dscale", "dbias"


def mesh(shape, names=("a", "b")):
    devices = jax.devices()[: np.prod(shape)]
    types = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, names[: len(shape)], types, devices=devices)


def layer(names, groups=None):
    """`(y, moments)` of what is on one device, with the devices named."""

    def function(x, scale, bias, mask):
        return jaxbn.batch_normalize(
            x, scale, bias, mask=mask, axis_name=names, axis_index_groups=groups
        )

    return function


def with_gradient(function, summed=None):
    """The output, the moments and the gradient of `sum(y·dy)`; `summed` adds it over devices."""

    def both(x, scale, bias, mask, dy):
        y, pullback, moments = jax.vjp(
            lambda *operands: function(*operands, mask), x, scale, bias, has_aux=True
        )
        dx, *vectors = pullback(dy)
        return y, moments, dx, *(vectors if summed is None else map(summed, vectors))

    return both


def by_vmap(function, shape):
    """Maps over axes of the array itself, which are split off the samples."""
    sharded, alike = 0, None

    def mapped(x, scale, bias, mask, *dy):
        inner, out_axes = function, (0, None) if not dy else (0, None, 0, None, None)
        for name in reversed("ab"[: len(shape)]):
            in_axes = (sharded, alike, alike, sharded, *[sharded] * len(dy))
            inner = jax.vmap(inner, in_axes, out_axes, axis_name=name)

        def split(v):
            return None if v is None else v.reshape(*shape, -1, *v.shape[1:])

        outputs = inner(split(x), scale, bias, split(mask), *map(split, dy))
        return jax.tree.map(lambda v: v.reshape(x.shape) if v.size == x.size else v, outputs)

    return mapped


def by_shard_map(function, shape, check_vma):
    names = tuple("ab"[: len(shape)])

    def mapped(x, scale, bias, mask, *dy):
        specs = (P(names), P(), P(), P(names), *[P(names)] * len(dy))
        out_specs = (P(names), P()) if not dy else (P(names), P(), P(names), P(), P())
        return jax.shard_map(
            function, mesh=mesh(shape), in_specs=specs, out_specs=out_specs, check_vma=check_vma
        )(x, scale, bias, mask, *dy)

    return mapped


def by_pmap(function, shape):
    (devices,) = shape

    def mapped(x, scale, bias, mask, *dy):
        def split(v):
            return None if v is None else v.reshape(devices, -1, *v.shape[1:])

        in_axes = (0, None, None, 0, *[0] * len(dy))
        outputs = jax.pmap(
            function, axis_name="a", in_axes=in_axes, devices=jax.devices()[:devices]
        )(split(x), scale, bias, split(mask), *map(split, dy))
        # Every device has its own copy of what is alike on all.
        return jax.tree.map(lambda v: v.reshape(x.shape) if v.size == x.size else v[0], outputs)

    return mapped


WAYS = {
    "vmap": by_vmap,
    "pmap": by_pmap,
    "shard_map": functools.partial(by_shard_map, check_vma=True),
    "shard_map without check_vma": functools.partial(by_shard_map, check_vma=False),
}


@functools.cache
def compiled(way, shape, inside):
    """The function behind `run`; every batch of the same shape runs the same program."""
    names = tuple("ab"[: len(shape)])
    names = names[0] if len(names) == 1 else names
    function = layer(names)
    if inside:
        # Where types tell what differs between devices, JAX adds up the gradient of what does not.
        summed = None if way == "shard_map" else functools.partial(jax.lax.psum, axis_name=names)
        total = WAYS[way](with_gradient(function, summed), shape)
    else:
        total = with_gradient(WAYS[way](function, shape))
    return jax.jit(total)


def run(way, shape, inside, arguments):
    """The seven results of `NAMES`, with the gradient taken inside or outside of the mapping."""
    y, moments, *gradient = jax.device_get(compiled(way, shape, inside)(*arguments))
    return dict(zip(NAMES, (y, *moments, *gradient), strict=True))


def masks(devices):
    """What each device has of a batch: all, less and less, nothing on some, nothing but on one."""
    samples = SHARD[0]
    ones = np.ones((devices, samples, 1, 1), bool)
    uneven, empty, last = ones.copy(), ones.copy(), np.zeros_like(ones)
    for i in range(devices):
        uneven[i, samples - i % samples :] = False
    empty[: devices // 2] = False
    last[-1] = True
    return {"unmasked": ones, "even": ones, "uneven": uneven, "empty": empty, "last": last}


def case(devices, which, dtype, mean=3.0, std=2.0):
    shape = (devices * SHARD[0], *SHARD[1:])
    x, scale, bias, dy = problem(shape, -1, dtype=dtype, mean=mean, std=std)
    # Shards differ, as they do where data are sorted.
    x = x + std / 2 * np.repeat(np.arange(devices, dtype=dtype), SHARD[0])[:, None, None]
    mask = masks(devices)[which].reshape(-1, 1, 1)
    x = np.where(mask, x, np.nan).astype(dtype)
    expected = masked_train(x, scale, bias, dy, -1, mask)
    return (x, scale, bias, None if which == "unmasked" else mask, dy), expected


def check(actual, expected, limit):
    for name in NAMES:
        reference = getattr(expected, name)
        value = np.broadcast_to(actual[name], np.shape(reference))  # one count, unmasked
        assert error(value, reference) <= limit, name


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("devices", [2, 3, 4, 8])
@pytest.mark.parametrize("way", WAYS)
def test_the_devices_share_one_batch(way, devices, inside):
    for which in masks(devices):
        arguments, expected = case(devices, which, np.float32)
        check(run(way, (devices,), inside, arguments), expected, tolerance(np.float32, 144))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("devices", "inside"), [(2, False), (3, True), (4, True), (8, False)])
@pytest.mark.parametrize("way", WAYS)
def test_the_devices_share_one_batch_in_float64(way, devices, inside):
    for which in ("empty", "last"):
        arguments, expected = case(devices, which, np.float64)
        check(run(way, (devices,), inside, arguments), expected, 1e-12)


@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("way", ["vmap", "shard_map", "shard_map without check_vma"])
@pytest.mark.usefixtures("x64")
def test_nested_axes(way, inside):
    arguments, expected = case(8, "uneven", np.float64)
    check(run(way, (2, 4), inside, arguments), expected, 1e-12)


@pytest.mark.usefixtures("x64")
def test_an_axis_of_vmap_inside_of_one_of_devices():
    arguments, expected = case(8, "uneven", np.float64)
    inner = by_vmap(with_gradient(layer(("b", "a")), lambda v: jax.lax.psum(v, ("b", "a"))), (2,))

    def mapped(x, scale, bias, mask, dy):
        return jax.shard_map(
            inner,
            mesh=mesh((4,), ("b",)),
            in_specs=(P("b"), P(), P(), P("b"), P("b")),
            out_specs=(P("b"), P(), P("b"), P(), P()),
            check_vma=False,
        )(x, scale, bias, mask, dy)

    y, moments, *gradient = jax.jit(mapped)(*arguments)
    check(dict(zip(NAMES, (y, *moments, *gradient), strict=True)), expected, 1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_the_merge_does_not_cancel(way):
    for mean in (1e4, 1e6):
        arguments, expected = case(4, "uneven", np.float32, mean)
        check(run(way, (4,), True, arguments), expected, tolerance(np.float32, 72))


@pytest.mark.parametrize("way", WAYS)
def test_devices_without_samples_say_nothing(way):
    # Not even 0 · ∞: the square of this mean is none in float32.
    arguments, expected = case(4, "empty", np.float32, mean=1e25, std=1e18)
    check(run(way, (4,), False, arguments), expected, tolerance(np.float32, 72))


@pytest.mark.parametrize("way", WAYS)
def test_nothing_anywhere(way):
    x, scale, bias, dy = problem((2 * SHARD[0], *SHARD[1:]), -1)
    mask = np.zeros((len(x), 1, 1), bool)
    results = run(way, (2,), True, (x, scale, bias, mask, dy))
    assert all(not np.any(results[name]) for name in NAMES)
    stats = jaxbn.BatchStats(bias, np.abs(scale), jnp.int32(3))
    new = jaxbn.update_batch_stats(stats, jaxbn.Moments(*(results[n] for n in NAMES[1:4])))
    np.testing.assert_array_equal(new.mean, stats.mean)
    np.testing.assert_array_equal(new.var, stats.var)
    assert new.count == 4


def alone(x, scale, bias, mask):
    return jaxbn.batch_normalize(x, scale, bias, mask=mask)


def derivatives(function):
    """Outputs and tangents, and both orders of a second derivative, on a fixed batch."""
    (x, scale, bias, mask, _), _ = case(4, "empty", np.float64)
    operands = x, scale, bias
    directions = tuple(sample(v.shape, 7 + i, 0.3, 1.0) for i, v in enumerate(operands))
    weights = sample(x.shape, 11, 0.3, 1.0)

    def outputs(x, scale, bias):
        y, moments = function(x, scale, bias, mask)
        return y, moments.mean, moments.var

    def loss(*operands):
        y, mean, var = outputs(*operands)
        return (jnp.sin(y) * weights).sum() + (mean * jnp.cos(var)).sum()

    @jax.jit
    def run(operands, directions):
        def along(*operands):
            return jax.jvp(loss, operands, directions)[1]

        return (
            jax.jvp(outputs, operands, directions),
            jax.grad(along, (0, 1, 2))(*operands),
            jax.jvp(jax.grad(loss, (0, 1, 2)), operands, directions)[1],
        )

    return run(operands, directions)


@functools.cache
def derivatives_on_one_device():
    return derivatives(alone)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("way", WAYS)
def test_forward_mode_and_second_order(way):
    actual = derivatives(WAYS[way](layer("a"), (4,)))
    expected = derivatives_on_one_device()
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, 1e-11, 1e-12), actual, expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("check_vma", [True, False])
def test_training_inside_of_scan(check_vma):
    steps, devices = 3, 4
    batches = sample((steps, devices * 4, 3), 0)
    weights = sample((devices * 4, 3), 1)

    def train(axis_name):
        def step(carry, x):
            scale, stats = carry

            def loss(scale, x):
                y, new = jaxbn.batch_norm(x, stats, scale, train=True, axis_name=axis_name)
                index = jax.lax.axis_index(axis_name) if axis_name else 0
                part = jax.lax.dynamic_slice_in_dim(weights, index * len(x), len(x))
                total = (jnp.sin(y) * part).sum()
                return jax.lax.psum(total, axis_name) if axis_name else total, new

            # Where types do not tell what is alike, the sum is differentiated on every device.
            gradient, new = jax.grad(loss, has_aux=True)(scale, x)
            if axis_name and not check_vma:
                gradient = jax.lax.psum(gradient, axis_name) / devices
            return (scale - 0.1 * gradient, new), None

        def run(batches):
            start = jnp.ones(3), jaxbn.init_batch_stats(3, jnp.float64)
            return jax.lax.scan(step, start, batches)[0]

        return run

    mapped = jax.shard_map(
        train("a"), mesh=mesh((devices,)), in_specs=P(None, "a"), out_specs=P(), check_vma=check_vma
    )
    actual, expected = jax.jit(mapped)(batches), jax.jit(train(None))(batches)
    assert expected[1].count == steps
    assert_close(actual, expected, 1e-12)


def test_one_value_on_each_of_two_devices_is_a_batch():
    x = np.array([[1.0, 4.0], [3.0, 0.0]], np.float32)
    y, moments = jax.vmap(
        lambda x: jaxbn.batch_normalize(x, axis_name="a"), axis_name="a", out_axes=(0, None)
    )(x[:, None])
    np.testing.assert_allclose(y[:, 0], [[-1, 1], [1, -1]], rtol=1e-5)
    assert moments.count == 2


@pytest.fixture
def four_are_many(monkeypatch):
    """Four devices sum, twice, instead of gathering."""
    monkeypatch.setattr(core_moments, "GATHERED", 3)
    jax.clear_caches()  # of what was traced with another number
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("four_are_many")
@pytest.mark.parametrize("inside", [False, True], ids=["outside", "inside"])
@pytest.mark.parametrize("way", WAYS)
def test_what_many_devices_do(way, inside):
    for which in ("unmasked", "uneven", "empty"):
        for mean in (3.0, 1e6):
            arguments, expected = case(4, which, np.float32, mean)
            check(run(way, (4,), inside, arguments), expected, tolerance(np.float32, 72))


def test_many_devices():
    devices = core_moments.GATHERED + 1
    arguments, expected = case(devices, "uneven", np.float32, 1e6)
    check(run("vmap", (devices,), True, arguments), expected, tolerance(np.float32, 306))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(("names", "scopes"), [(("a", "b"), 1), ("a", 2), (None, 8)])
def test_train_may_be_traced(names, scopes, check_vma):
    """Also where the statistics of a scope smaller than everything differ between devices."""
    x = problem((16, 3), -1)[0]
    stats = jaxbn.init_batch_stats(3)
    everywhere = P(("a", "b"))
    spec = {1: P(), 2: P("b"), 8: everywhere}[scopes]

    def step(x, train):
        y, new = jaxbn.batch_norm(x, stats, train=train, axis_name=names)
        return y, jax.tree.map(lambda v: v[None], new)

    run = jax.shard_map(
        step,
        mesh=mesh((4, 2)),
        in_specs=(everywhere, P()),
        out_specs=(everywhere, spec),
        check_vma=check_vma,
    )
    parts = x.reshape(4, 2, 2, 3)
    for train in (True, False):
        y, new = jax.jit(run)(x, jnp.array(train))
        assert new.count.tolist() == [int(train)] * scopes
        if not train:
            np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-6)
        else:
            means = parts.mean((0, 2)) if scopes == 2 else x.reshape(scopes, -1, 3).mean(1)
            np.testing.assert_allclose(new.mean, 0.1 * means, rtol=1e-5)


@pytest.mark.parametrize("around", [jax.jit, jax.checkpoint])
def test_where_jax_loses_the_name_of_an_axis(around):
    """Inside of `jax.vmap` or outside of the gradient it is known; else an error says so."""

    name = around.__name__  # of its own: JAX may find an earlier trace

    def normalized(x):
        return jaxbn.batch_normalize(x, axis_name=name)[0]

    def loss(function, x):
        return jnp.sin(function(x)).sum()

    x = jnp.asarray(sample((3, 5, 7), 0))
    outside = around(jax.vmap(normalized, axis_name=name))
    with pytest.raises(NameError, match=r"Put jax\.grad inside of these"):
        jax.grad(functools.partial(loss, outside))(x)
    expected = jax.grad(functools.partial(loss, lambda x: jaxbn.batch_normalize(x)[0]))(x)
    inside = jax.vmap(around(normalized), axis_name=name)
    assert_close(jax.grad(functools.partial(loss, inside))(x), expected)
