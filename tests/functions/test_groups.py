"""Batches that are normalized in parts: groups of samples, and groups of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.numpy_reference import error, masked_train, problem, running, tolerance
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import linen

LAYOUTS = {"NC": ((12, 5), -1), "NCHW": ((12, 5, 3, 2), 1), "NHWC": ((12, 3, 2, 5), -1)}
LAYOUTS["CN"] = ((5, 12, 4), 0)


def parts(groups, batch_axis, *arrays):
    """Each group's arrays, blocks of neighbours along the batch axis."""
    return zip(*(np.split(v, groups, batch_axis) for v in arrays), strict=True)


def referee(x, scale, bias, dy, axis, mask, groups, batch_axis):
    """Every group by itself; then everything together, whose moments the running ones take."""
    mask = np.broadcast_to(mask, x.shape)
    results = [
        masked_train(x_, scale, bias, dy_, axis, mask_)
        for x_, dy_, mask_ in parts(groups, batch_axis, x, dy, mask)
    ]
    whole = masked_train(x, scale, bias, dy, axis, mask)
    whole.y, whole.dx = (
        np.concatenate([getattr(r, name) for r in results], batch_axis) for name in ("y", "dx")
    )
    whole.dscale, whole.dbias = (sum(getattr(r, n) for r in results) for n in ("dscale", "dbias"))
    return whole


# Every two of layout, dtype and mask go together.
CASES = [
    (layout, dtype, i % 2 == j)
    for i, layout in enumerate(LAYOUTS)
    for j, dtype in enumerate((np.float32, np.float64))
]


@pytest.mark.parametrize(("layout", "dtype", "masked"), CASES)
def test_each_group_of_samples_by_itself(layout, dtype, masked):
    shape, axis = LAYOUTS[layout]
    batch_axis, groups = int(axis == 0), 4
    with jax.enable_x64(dtype == np.float64):
        x, scale, bias, dy = problem(shape, axis, dtype=dtype, mean=3.0)
        along_batch = [12 if i == batch_axis else 1 for i in range(x.ndim)]
        x = x + np.arange(12, dtype=dtype).reshape(along_batch)
        mask = None
        if masked:  # a sample of the second group and all of the third
            valid = np.ones(12, bool)
            valid[[4, 6, 7, 8]] = False
            mask = valid.reshape(along_batch)

        @jax.jit
        def step(x, scale, bias, dy):
            stats = jaxbn.BatchStats(bias, jnp.abs(scale), jnp.int32(0))
            options = {"axis": axis, "mask": mask, "virtual_batch_size": 12 // groups}

            def function(x, scale, bias):
                return jaxbn.batch_norm(x, stats, scale, bias, train=True, **options)

            y, pullback, new = jax.vjp(function, x, scale, bias, has_aux=True)
            return y, new, *pullback(dy)

        y, new, dx, dscale, dbias = step(x, scale, bias, dy)
    everywhere = True if mask is None else mask
    expected = referee(x, scale, bias, dy, axis, everywhere, groups, batch_axis)
    limit = tolerance(dtype, x.size // 5) if dtype == np.float32 else 1e-12
    for actual, name in ((y, "y"), (dx, "dx"), (dscale, "dscale"), (dbias, "dbias")):
        assert error(actual, getattr(expected, name)) <= limit, name
    mean, var = running(bias, np.abs(scale), expected.mean, expected.var, expected.count, 0.1)
    assert error(new.mean, mean) <= limit
    assert error(new.var, var) <= limit


def test_the_moments_of_groups_merge_without_cancelling():
    x = np.random.RandomState(0).normal(1e6, 1.0, (64, 9, 3)).astype(np.float32)
    _, moments = jaxbn.batch_normalize(x, virtual_batch_size=4)
    expected = x.astype(np.float64).reshape(-1, 3)
    assert error(moments.var, expected.var(0)) <= tolerance(np.float32, len(expected))
    assert error(moments.mean, expected.mean(0)) <= tolerance(np.float32)
    assert moments.count == len(expected)


def test_groups_go_with_residual_and_activation_and_named_devices():
    x, scale, bias, _ = problem((2, 8, 3), -1)

    def one(x, residual):  # group i of all devices is one batch
        return jaxbn.batch_normalize(
            x,
            scale,
            bias,
            axis_name="a",
            virtual_batch_size=2,
            residual=residual,
            activation=lambda z: jnp.maximum(z, scale[None]),
        )

    y, moments = jax.jit(jax.vmap(one, axis_name="a", out_axes=(0, None)))(x, np.cos(x))
    for i in range(4):
        part = x[:, 2 * i : 2 * i + 2]
        expected = masked_train(part, scale, bias, part, -1, np.ones(part.shape, bool)).y
        expected = np.maximum(expected + np.cos(part), scale)
        assert error(y[:, 2 * i : 2 * i + 2], expected) <= tolerance(np.float32)
    assert error(moments.var, x.astype(np.float64).reshape(-1, 3).var(0)) <= tolerance(np.float32)
    assert moments.count == 16


def test_the_smallest_groups_and_none():
    x = problem((6, 5, 3), -1)[0]
    y, moments = jaxbn.batch_normalize(x, virtual_batch_size=1)
    assert error(y[4], jaxbn.batch_normalize(x[4])[0]) <= tolerance(np.float32)
    whole = jaxbn.batch_normalize(x, virtual_batch_size=6)
    jax.tree.map(np.testing.assert_array_equal, whole, jaxbn.batch_normalize(x))
    y, moments = jaxbn.batch_normalize(x[:0], virtual_batch_size=4)
    assert y.shape == (0, 5, 3)
    assert moments.count == 0


def test_inference_has_no_groups_but_those_of_a_batch_that_normalizes_itself():
    x = problem((8, 3), -1)[0]
    stats = jaxbn.BatchStats(x[0], np.abs(x[1]), jnp.int32(1))
    y, _ = jaxbn.batch_norm(x, stats, train=False, virtual_batch_size=2)
    np.testing.assert_array_equal(y, jaxbn.batch_norm(x, stats, train=False)[0])
    y, _ = jaxbn.batch_norm(x, None, train=False, virtual_batch_size=2)
    np.testing.assert_allclose(y, np.sign(x - x.reshape(4, 2, 3).mean(1).repeat(2, 0)), atol=1e-2)


@pytest.mark.parametrize(
    "layer", [linen.BatchNorm(virtual_batch_size=2), linen.BatchNorm1d(4, virtual_batch_size=2)]
)
def test_layers(layer):
    x = problem((6, 4), -1)[0]
    variables = layer.init(jax.random.key(0), x, False)
    y, updates = layer.apply(variables, x, False, mutable=["batch_stats"])
    expected, moments = jaxbn.batch_normalize(x, virtual_batch_size=2)
    np.testing.assert_array_equal(y, expected)
    weight = 1 - layer.momentum if isinstance(layer, linen.BatchNorm) else layer.momentum
    np.testing.assert_allclose(updates["batch_stats"]["mean"], weight * moments.mean, rtol=1e-6)


def run_in_groups_of_devices(groups, check_vma, dtype):
    """`(y, mean, dx, dscale, dbias)` of eight devices, and the arguments."""
    x, scale, bias, dy = problem((24, 3, 2), -1, dtype=dtype)
    x = x + np.repeat(np.arange(8, dtype=dtype), 3)[:, None, None]
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))

    def function(x, scale, bias):
        y, moments = jaxbn.batch_normalize(x, scale, bias, axis_name="a", axis_index_groups=groups)
        return y, moments.mean[None]

    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(P("a"), P(), P()),
        out_specs=(P("a"), P("a")),
        check_vma=check_vma,
    )

    @jax.jit
    def step(dy, *operands):
        y, pullback, mean = jax.vjp(mapped, *operands, has_aux=True)
        return y, mean, *pullback(dy)

    return step(dy, x, scale, bias), (x, scale, bias, dy)


@pytest.mark.parametrize(
    ("groups", "check_vma", "dtype"),
    [
        ([[0, 1, 2, 3], [4, 5, 6, 7]], True, np.float32),
        ([[0, 1, 2, 3], [4, 5, 6, 7]], False, np.float64),
        ([[0, 5], [1, 4], [7, 2], [3, 6]], True, np.float64),
        ([[0, 5], [1, 4], [7, 2], [3, 6]], False, np.float32),
    ],
)
def test_groups_of_devices(groups, check_vma, dtype):
    limit = tolerance(np.float32, 72) if dtype == np.float32 else 1e-12
    with jax.enable_x64(dtype == np.float64):
        results, (x, scale, bias, dy) = run_in_groups_of_devices(groups, check_vma, dtype)
    y, mean, dx, dscale, dbias = results
    totals = 0, 0
    for group in groups:
        samples = np.concatenate([np.arange(3 * i, 3 * i + 3) for i in group])
        part = x[samples], scale, bias, dy[samples]
        expected = masked_train(*part, -1, np.ones(part[0].shape, bool))
        assert error(y[samples], expected.y) <= limit
        assert error(dx[samples], expected.dx) <= limit
        for i in group:
            assert error(mean[i], expected.mean) <= limit
        totals = totals[0] + expected.dscale, totals[1] + expected.dbias
    assert error(dscale, totals[0]) <= limit
    assert error(dbias, totals[1]) <= limit


def test_groups_of_devices_under_pmap_and_in_layers():
    x = problem((8, 3, 4), -1)[0]
    groups = ((0, 1, 2, 3), (4, 5, 6, 7))
    layer = linen.BatchNorm(axis_name="a", axis_index_groups=groups, momentum=0.0)
    variables = layer.init(jax.random.key(0), x[0], False)
    y, updates = jax.pmap(
        lambda x: layer.apply(variables, x, False, mutable=["batch_stats"]), axis_name="a"
    )(x)
    for i in range(8):
        expected = x[4 * (i // 4) : 4 * (i // 4) + 4].reshape(-1, 4)
        stats = updates["batch_stats"]
        np.testing.assert_allclose(stats["mean"][i], expected.mean(0), rtol=1e-5)
        np.testing.assert_allclose(stats["var"][i], expected.var(0), rtol=1e-5)
    assert y.shape == x.shape


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("groups", [4, 8])
def test_groups_of_a_sharded_batch(groups, axis_type):
    x, scale, bias, dy = problem((16, 5, 3, 4), 1)
    residual = np.cos(x)  # on one device, as the mask
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    mask = np.random.RandomState(1).uniform(size=(16, 1, 3, 4)) < 0.7
    expected = referee(x, scale, bias, dy, 1, mask, groups, 0)

    @jax.jit
    def run(x, dy):
        y, pullback, moments = jax.vjp(
            lambda *operands: jaxbn.batch_normalize(
                *operands, axis=1, virtual_batch_size=16 // groups, mask=mask, residual=residual
            ),
            x,
            scale,
            bias,
            has_aux=True,
        )
        return y, moments, *pullback(dy)

    with jax.set_mesh(mesh):  # columns of the images are spread, too
        place = NamedSharding(mesh, P("a", None, None, "b"))
        y, moments, *gradient = run(*(jax.device_put(v, place) for v in (x, dy)))
    limit = tolerance(np.float32, 192)
    assert error(y, expected.y + np.where(mask, residual, 0)) <= limit
    assert error(moments.mean, expected.mean) <= limit
    assert error(moments.var, expected.var) <= limit
    for actual, name in zip(gradient, ("dx", "dscale", "dbias"), strict=True):
        assert error(actual, getattr(expected, name)) <= limit, name


def test_groups_larger_than_what_a_device_holds():
    mesh = jax.make_mesh((4,), ("a",))
    with jax.set_mesh(mesh):
        x = jax.device_put(np.ones((8, 3), np.float32), NamedSharding(mesh, P("a")))
        with pytest.raises(
            ValueError, match="spreads them over devices; got 4 for 2 samples on each of 4 devices"
        ):
            jaxbn.batch_normalize(x, virtual_batch_size=4)
