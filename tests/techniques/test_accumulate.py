"""Layers that merge batches into moments: one update of the statistics for many micro-batches."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from helpers.compare import assert_close
from helpers.numpy_reference import channel_moments, running, sample
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import linen, nnx

# Micro-batches of other means and sizes.
PARTS = [sample((n, 3, 4), n, mean, 1.0, np.float32) for n, mean in ((8, -5), (4, 0), (12, 9))]
MASKS = [np.arange(len(part)).reshape(-1, 1, 1) % 3 != 0 for part in PARTS]
NAN = PARTS[1].copy()
NAN[0, 0, 1] = np.nan

CREATE = {
    "BatchNorm": lambda module, **o: module.BatchNorm(momentum=0.7, **o),
    "BatchNorm1d": lambda module, **o: module.BatchNorm1d(axis=-1, momentum=0.3, **o),
}


def numbers(name, module):
    return {} if (name, module) == ("BatchNorm", linen) else {"num_features": 4}


def expected_after(name, rows):
    """The statistics after one batch of these rows, started from mean 0 and variance 1."""
    mean, var = running(
        np.zeros(4), np.ones(4), *channel_moments(rows, -1), 0.3, name == "BatchNorm1d"
    )
    return {"mean": mean, "var": var} | ({"count": 1} if name == "BatchNorm1d" else {})


def valid_rows(parts, masks=None):
    if masks is not None:
        parts = [part[mask[:, 0, 0]] for part, mask in zip(parts, masks, strict=True)]
    return np.concatenate(parts)


def by_linen(name, parts, calls=None, inference=False, **options):
    layer = CREATE[name](linen, **numbers(name, linen), **options)
    variables = layer.init(jax.random.key(0), parts[0], True)
    stats, ys = variables["batch_stats"], []
    moments = linen.init_batch_moments(stats)
    for part, call in zip(parts, calls or [{}] * len(parts), strict=True):
        y, updates = layer.apply(
            {**variables, "batch_moments": moments},
            part,
            inference,
            mutable=["batch_stats", "batch_moments"],
            **call,
        )
        jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], stats)
        moments, ys = updates["batch_moments"], [*ys, y]
    return ys, linen.update_batch_stats(stats, moments, momentum=0.3)


def by_nnx(name, parts, calls=None, inference=False, **options):
    layer = CREATE[name](nnx, rngs=flax_nnx.Rngs(0), **numbers(name, nnx), **options)
    nnx.init_batch_moments(layer)
    before = stats_of(layer)
    calls = calls or [{}] * len(parts)
    ys = [layer(part, inference, **call) for part, call in zip(parts, calls, strict=True)]
    jax.tree.map(np.testing.assert_array_equal, stats_of(layer), before)
    nnx.update_batch_stats(layer)
    assert layer.moments is None
    return ys, stats_of(layer)


def stats_of(layer):
    names = (name for name in ("mean", "var", "count") if hasattr(layer, name))
    return {name: np.asarray(getattr(layer, name)[...]) for name in names}


both = pytest.mark.parametrize("run", [by_linen, by_nnx], ids=["linen", "nnx"])
classes = pytest.mark.parametrize("name", CREATE)


@both
@classes
@pytest.mark.parametrize("inference", [False, True, jnp.array(False)])
def test_one_update_for_all(run, name, inference):
    """In training and in inference; each part is normalized as without the moments."""
    ys, stats = run(name, PARTS, inference=inference)
    assert_close(stats, expected_after(name, valid_rows(PARTS)), 1e-6)
    stats = jaxbn.init_batch_stats(4)
    ones, zeros = jnp.ones(4), jnp.zeros(4)
    for part, y in zip(PARTS, ys, strict=True):
        expected, _ = jaxbn.batch_norm(part, stats, ones, zeros, train=not inference)
        np.testing.assert_array_equal(y, expected)


@both
@classes
def test_masks_and_ghost_batches(run, name):
    masked = expected_after(name, valid_rows(PARTS, MASKS))
    for options in ({}, {"virtual_batch_size": 4}):
        _, stats = run(name, PARTS, [{"mask": mask} for mask in MASKS], **options)
        assert_close(stats, masked, 1e-6)
    _, stats = run(name, PARTS, virtual_batch_size=2)
    assert_close(stats, expected_after(name, valid_rows(PARTS)), 1e-6)


@both
@classes
def test_a_batch_that_is_not_finite_is_left_out(run, name):
    parts = [PARTS[0], NAN, PARTS[2]]
    _, stats = run(name, parts, skip_nonfinite=True)
    expected, without = (expected_after(name, valid_rows(p)) for p in (PARTS, parts[::2]))
    for key in ("mean", "var"):
        expected[key][1] = without[key][1]
    assert_close(stats, expected, 1e-6)
    _, stats = run(name, parts)
    assert np.isnan(stats["mean"]).tolist() == [False, True, False, False]


@both
@classes
@pytest.mark.parametrize("options", [{"frozen": True}, {"update_stats": False}])
def test_a_layer_that_learns_nothing_stays(run, name, options):
    _, stats = run(name, PARTS, **options)
    expected = {"mean": np.zeros(4), "var": np.ones(4), "count": 0}
    assert_close(stats, {key: expected[key] for key in stats}, 0)


@both
@classes
def test_update_stats_may_be_traced(run, name):
    @jax.jit
    def stats(update):
        module = linen if run is by_linen else nnx
        layer = functools.partial(CREATE[name], module, **numbers(name, module))
        if module is linen:
            bound = layer(update_stats=update)
            variables = layer().init(jax.random.key(0), PARTS[0], True)
            moments = linen.init_batch_moments(variables["batch_stats"])
            variables = {**variables, "batch_moments": moments}
            return bound.apply(variables, PARTS[0], False, mutable=["batch_moments"])[1]
        bound = layer(rngs=flax_nnx.Rngs(0), update_stats=update)
        nnx.init_batch_moments(bound)
        bound(PARTS[0])
        return {"batch_moments": bound.moments.get_value()._asdict()}

    mean, var, count = channel_moments(PARTS[0], -1)
    full = {"mean": mean, "var": var, "count": np.full(4, count)}
    assert_close(stats(True)["batch_moments"], full, 1e-6)
    assert_close(stats(False)["batch_moments"], {name: np.zeros(4) for name in full}, 0)


def test_several_channel_axes():
    layer = linen.BatchNorm(use_running_average=False, axis=(1, 2))
    variables = layer.init(jax.random.key(0), PARTS[0])
    moments = linen.init_batch_moments(variables["batch_stats"])
    for part in PARTS:
        given = {**variables, "batch_moments": moments}
        moments = layer.apply(given, part, mutable=["batch_moments"])[1]["batch_moments"]
    stats = linen.update_batch_stats(variables["batch_stats"], moments, momentum=1.0)
    rows = valid_rows(PARTS).astype(np.float64)
    assert_close(stats, {"mean": rows.mean(0), "var": rows.var(0)}, 1e-6)


@both
@classes
def test_float64(run, name, x64):
    parts = [part.astype(np.float64) + 100 for part in PARTS]
    if name == "BatchNorm":  # whose statistics are float32, as Flax's
        parts, limit, options = PARTS, 1e-6, {}
    else:
        limit, options = 1e-12, {"param_dtype": jnp.float64}
    _, stats = run(name, parts, **options)
    assert_close(stats, expected_after(name, valid_rows(parts)), limit)


@classes
@pytest.mark.parametrize("transform", [jax.jit, jax.grad])
def test_transforms(name, transform):
    """Gradients are those without moments, and the moments come out."""
    layer = CREATE[name](linen, **numbers(name, linen))
    variables = layer.init(jax.random.key(0), PARTS[0], True)
    moments = linen.init_batch_moments(variables["batch_stats"])

    def loss(params, extra, mutable):
        given = {**variables, "params": params, **extra}
        y, updates = layer.apply(given, PARTS[0], False, mutable=mutable)
        return jnp.sin(y).sum(), updates

    def gradient(extra, mutable):
        return jax.grad(lambda p: loss(p, extra, mutable), has_aux=True)(variables["params"])

    if transform is jax.jit:
        gradient = jax.jit(gradient, static_argnames="mutable")
    gradients, updates = gradient({"batch_moments": moments}, ("batch_moments",))
    expected, _ = gradient({}, ("batch_stats",))
    jax.tree.map(np.testing.assert_array_equal, gradients, expected)
    mean, var, count = channel_moments(PARTS[0], -1)
    full = {"mean": mean, "var": var, "count": np.full(4, count)}
    assert_close(updates["batch_moments"], full, 1e-6)


class Block(nn.Module):
    """Carries `x`, as the body of a scan; `Stack` has three of it."""

    kind: type = linen.BatchNorm

    @nn.compact
    def __call__(self, x, _):
        x = nn.Dense(4)(x)
        options = {} if self.kind is linen.BatchNorm else {"num_features": 4, "axis": -1}
        return self.kind(use_running_average=False, name="norm", **options)(x), None


def lifted(kind, remat=False):
    block = nn.remat(Block, prevent_cse=False) if remat else Block
    axes = {"params": 0, "batch_stats": 0, "batch_moments": 0}
    scan = nn.scan(block, axes, split_rngs={"params": True}, length=3)
    return scan(kind)


@pytest.mark.parametrize("kind", [linen.BatchNorm, linen.BatchNorm1d])
@pytest.mark.parametrize("remat", [False, True])
def test_stacked_layers(kind, remat):
    """`nn.scan` stacks variables; the reference runs the layers one after the other."""
    model = lifted(kind, remat)
    variables = model.init(jax.random.key(0), PARTS[0], None)
    stats = variables["batch_stats"]
    moments = linen.init_batch_moments(stats)
    assert moments["norm"]["count"].shape == (3, 4)

    @jax.jit
    def step(variables, moments, x):
        given = {**variables, "batch_moments": moments}
        return model.apply(given, x, None, mutable=["batch_moments"])[1]["batch_moments"]

    for part in PARTS:
        moments = step(variables, moments, part)
    actual = linen.update_batch_stats(stats, moments, momentum=1.0)["norm"]

    hidden = [part.astype(np.float64) for part in PARTS]
    for i in range(3):
        dense = jax.tree.map(lambda v, i=i: np.float64(v[i]), variables["params"]["Dense_0"])
        hidden = [h @ dense["kernel"] + dense["bias"] for h in hidden]
        mean, var, n = channel_moments(np.concatenate(hidden), -1)
        var = var if kind is linen.BatchNorm else var * n / (n - 1)
        assert_close((actual["mean"][i], actual["var"][i]), (mean, var), 1e-5)
        hidden = [
            (h - h.mean((0, 1))) / np.sqrt(h.var((0, 1), keepdims=True) + 1e-5) for h in hidden
        ]
    if kind is linen.BatchNorm1d:
        np.testing.assert_array_equal(actual["count"], [1, 1, 1])


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = linen.BatchNorm(use_running_average=False, name="norm")
        norm(x)
        return norm(3 * x)


def test_a_shared_layer_merges_both_calls():
    variables = Twice().init(jax.random.key(0), PARTS[0])
    moments = linen.init_batch_moments(variables["batch_stats"])
    given = {**variables, "batch_moments": moments}
    _, updates = Twice().apply(given, PARTS[0], mutable=["batch_moments"])
    mean, var, n = channel_moments(np.concatenate([PARTS[0], 3 * PARTS[0]]), -1)
    expected = {"norm": {"mean": mean, "var": var, "count": np.full(4, n)}}
    assert_close(updates["batch_moments"], expected, 1e-6)


@pytest.mark.parametrize("over", ["vmap", "shard_map"])
def test_devices_share_a_batch(over):
    layer = linen.BatchNorm1d(4, axis=-1, use_running_average=False, axis_name="devices")
    variables = layer.init(jax.random.key(0), PARTS[0])
    moments = linen.init_batch_moments(variables["batch_stats"])

    def step(moments, x):
        given = {**variables, "batch_moments": moments}
        return layer.apply(given, x, mutable=["batch_moments"])[1]["batch_moments"]

    if over == "vmap":
        mapped = jax.vmap(step, (None, 0), None, axis_name="devices")
    else:
        mesh = jax.make_mesh((4,), ("devices",), axis_types=(AxisType.Auto,))
        mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("devices")), out_specs=P())
    mapped = jax.jit(mapped)
    for part in PARTS:
        moments = mapped(moments, part.reshape(4, -1, 3, 4) if over == "vmap" else part)
    stats = linen.update_batch_stats(variables["batch_stats"], moments, momentum=0.3)
    assert_close(stats, expected_after("BatchNorm1d", valid_rows(PARTS)), 1e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("devices"), P(None, None, "devices")])
def test_sharded_batches(axis_type, spec):
    """By samples, and by channels: then the statistics are spread as these are."""
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        layer = linen.BatchNorm1d(4, axis=-1, use_running_average=False, affine=False)
        stats = layer.init(jax.random.key(0), PARTS[0])["batch_stats"]
        place = functools.partial(jax.device_put, device=NamedSharding(mesh, P(*spec[2:])))
        stats = {name: place(v) if v.ndim else v for name, v in stats.items()}

        @jax.jit
        def step(moments, x):
            given = {"batch_stats": stats, "batch_moments": moments}
            return layer.apply(given, x, mutable=["batch_moments"])[1]["batch_moments"]

        moments = linen.init_batch_moments(stats)
        for part in PARTS:
            moments = step(moments, jax.device_put(part, NamedSharding(mesh, spec)))
        new = jax.jit(linen.update_batch_stats)(stats, moments, momentum=0.3)
        assert new["mean"].sharding.is_equivalent_to(stats["mean"].sharding, 1)
    assert_close(new, expected_after("BatchNorm1d", valid_rows(PARTS)), 1e-6)


class Model(flax_nnx.Module):
    def __init__(self):
        rngs = flax_nnx.Rngs(0)
        self.first, self.second = (flax_nnx.Linear(4, 4, rngs=rngs) for _ in range(2))
        self.norm = nnx.BatchNorm1d(4, axis=-1, momentum=0.3, rngs=rngs)
        self.head = nnx.BatchNorm(4, momentum=0.9, rngs=rngs)

    def __call__(self, x):
        return self.head(self.second(self.norm(self.first(x))))


def test_a_training_step_of_nnx():
    """Attached and detached under `jit`, with gradients by `nnx.grad`, in a scan."""

    def micro(model, x):
        return flax_nnx.grad(lambda model: jnp.square(model(x)).sum())(model)

    @flax_nnx.jit
    def step(model, parts):
        nnx.init_batch_moments(model)
        gradients = [micro(model, part) for part in parts]
        nnx.update_batch_stats(model)
        return gradients

    @flax_nnx.jit
    def scanned(model, parts):
        nnx.init_batch_moments(model)
        carried = flax_nnx.StateAxes({flax_nnx.Param: None, ...: flax_nnx.Carry})
        scan = flax_nnx.scan(micro, in_axes=(carried, 0), out_axes=0)
        gradients = scan(model, jnp.stack(parts))
        nnx.update_batch_stats(model)
        return gradients

    parts = [part[:4] for part in PARTS]
    model, other, plain = Model(), Model(), Model()
    gradients = step(model, parts)
    stacked = scanned(other, parts)
    for i, part in enumerate(parts):
        expected = flax_nnx.to_pure_dict(micro(plain, part))
        assert_close(flax_nnx.to_pure_dict(gradients[i]), expected, 1e-5)
        one = jax.tree.map(lambda v, i=i: v[i], flax_nnx.to_pure_dict(stacked))
        assert_close(one, expected, 1e-5)
    assert plain.norm.count[...] == 3

    rows = np.concatenate(parts) @ np.asarray(model.first.kernel[...])
    expected = expected_after("BatchNorm1d", rows)
    for layer in (model.norm, other.norm):
        assert layer.moments is None
        assert_close(stats_of(layer), expected, 1e-5)
    assert_close(stats_of(model.head), stats_of(other.head), 1e-6)


class Two(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        options = {"axis": -1, "param_dtype": jnp.float64}
        for features in (5, 4):
            x = nn.Dense(features, param_dtype=jnp.float64)(x)
            x = jnp.tanh(linen.BatchNorm1d(features, **options)(x, not train))
        return x


def test_the_output_of_the_whole_batch(x64):
    """Moments first, layer by layer: loss and gradient are those of the large batch."""
    model, parts = Two(), jnp.stack([part[:4].astype(np.float64) for part in PARTS])
    variables = model.init(jax.random.key(0), parts[0], False)
    stats = variables["batch_stats"]

    def losses(y, x):
        return jnp.square(y - 0.1 * x).sum()

    def with_moments(variables):
        def merge(moments, x):
            given = {**variables, "batch_moments": moments}
            return model.apply(given, x, False, mutable=["batch_moments"])[1]["batch_moments"], None

        moments = jax.lax.scan(jax.checkpoint(merge), linen.init_batch_moments(stats), parts)[0]
        new = {layer: {name: v[name] for name in ("mean", "var")} for layer, v in moments.items()}
        return {**variables, "batch_stats": new}

    def loss(params):
        given = {"params": params, "batch_stats": stats}
        for _ in stats:
            given = with_moments(given)
        return sum(losses(model.apply(given, x, False), x) for x in parts)

    def at_once(params):
        x = jnp.concatenate(parts)
        given = {"params": params, "batch_stats": stats}
        return losses(model.apply(given, x, True, mutable=["batch_stats"])[0], x)

    actual, expected = (
        jax.jit(jax.value_and_grad(f))(variables["params"]) for f in (loss, at_once)
    )
    assert_close(actual, expected, 1e-11)


def long_data(batches):
    """Batches that differ more from each other than their samples do."""
    means = sample((batches, 1, 4), 1, 10.0, 5.0, np.float32)
    return means + sample((batches, 8, 4), 0, 0.0, 1.0, np.float32)


def test_long_accumulation():
    """Thousands of batches of other means, merged one after the other in float32."""
    x = long_data(2000)
    layer = linen.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), x[0])
    moments = linen.init_batch_moments(variables["batch_stats"])

    @jax.jit
    def all_of(moments, x):
        def step(moments, x):
            given = {**variables, "batch_moments": moments}
            return layer.apply(given, x, mutable=["batch_moments"])[1]["batch_moments"], None

        return jax.lax.scan(step, moments, x)[0]

    stats = linen.update_batch_stats(variables["batch_stats"], all_of(moments, x), momentum=1.0)
    mean, var, _ = channel_moments(x, -1)
    random = 2.0**-25 * np.sqrt(len(x))  # each merge rounds its result
    np.testing.assert_allclose(stats["mean"], mean, rtol=random)
    np.testing.assert_allclose(stats["var"], var, rtol=random)


def test_errors():
    stats = {"a": {"norm": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}}
    moments = linen.init_batch_moments(stats)
    with pytest.raises(ValueError, match=r"`batch_stats` must have a batch norm.*got none in 'a'"):
        linen.init_batch_moments({"a": {"sigma": jnp.ones(())}})
    other = {"norm": {name: v[:3] for name, v in moments["a"]["norm"].items()}}
    for wrong in ({"b": moments["a"]}, {"a": other}, stats, {"batch_moments": moments}, {}):
        with pytest.raises(
            ValueError, match="`batch_moments` must hold mean, var and count of lay"
        ):
            linen.update_batch_stats(stats, wrong)
    with pytest.raises(ValueError, match="`momentum` must be a number for layers that keep no"):
        linen.update_batch_stats(stats, moments, momentum=None)
    with pytest.raises(ValueError, match="`momentum` must be None or between 0 and 1"):
        linen.update_batch_stats(stats, moments, momentum=1.5)
    with pytest.raises(ValueError, match="`batch_moments` must hold mean, var and count"):
        linen.BatchNorm().apply(
            {
                "params": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
                "batch_stats": stats["a"]["norm"],
            }
            | {"batch_moments": {"mean": jnp.zeros(4)}},
            PARTS[0],
            False,
            mutable=["batch_moments"],
        )
    with pytest.raises(ValueError, match="A batch norm of the model must have moments; got none"):
        nnx.update_batch_stats(Model())
    with pytest.raises(ValueError, match=r"must choose at least one batch norm of jaxbn.nnx"):
        nnx.init_batch_moments(Model(), "body")
    with pytest.raises(ValueError, match="that keeps running statistics; got layers with track_ru"):
        nnx.init_batch_moments(nnx.BatchNorm1d(4, 1e-5, 0.1, True, False, rngs=flax_nnx.Rngs(0)))
    foreign = flax_nnx.Sequential(flax_nnx.BatchNorm(4, rngs=flax_nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"must be those of jaxbn.nnx; got layers of another lib"):
        nnx.init_batch_moments(foreign)


def test_averages_of_standard_deviations():
    """One micro-batch is a batch."""
    x, options = PARTS[0], {"renorm": jaxbn.Renorm(1.0, 0.0, average_std=True), "axis": -1}
    direct, merging = (
        nnx.BatchNorm1d(4, rngs=flax_nnx.Rngs(0), momentum=0.5, **options) for _ in range(2)
    )
    nnx.init_batch_moments(merging)
    for layer in (direct, merging):
        layer(x)
    nnx.update_batch_stats(merging)
    assert_close(merging.var[...], direct.var[...], 1e-6)
    layer = linen.BatchNorm1d(4, momentum=0.5, **options)
    variables = layer.init(jax.random.key(0), x, True)
    moments = linen.init_batch_moments(variables["batch_stats"])
    given = {**variables, "batch_moments": moments}
    _, updates = layer.apply(given, x, False, mutable=["batch_moments"])
    new = linen.update_batch_stats(
        variables["batch_stats"], updates["batch_moments"], momentum=0.5, std_epsilon=layer.eps
    )
    assert_close(new["var"], direct.var[...], 1e-6)
