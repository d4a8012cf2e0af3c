"""Running statistics of a whole data set, against float64 NumPy and torch's update_bn."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from helpers.compare import assert_close
from helpers.numpy_reference import channel_moments, sample
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbn
from jaxbn import linen, nnx

# Means that differ: the variance of all is many times that within a batch. The last batch is short.
DATA = [sample((n, 3, 4), n, mean, 1.0, np.float32) for n, mean in ((16, -5), (16, 1), (5, 9))]
ALL = np.concatenate(DATA).astype(np.float64)
OLD = {"mean": np.full(4, 2.0, np.float32), "var": np.full(4, 3.0, np.float32)}
MASKS = [np.arange(len(x)).reshape(-1, 1, 1) % 4 != 1 for x in DATA]


class Deep(nn.Module):
    """Three batch norms, the second of torch's convention, with a mask if the batch has one."""

    virtual_batch_size: int | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, batch, train=False):
        x, mask = batch if isinstance(batch, tuple) else (batch, None)
        options = {"use_running_average": not train, "axis_name": self.axis_name}
        options["virtual_batch_size"] = self.virtual_batch_size
        x = linen.BatchNorm(**options, name="a")(x, mask=mask)
        x = jnp.tanh(nn.Dense(5, name="dense_b")(x))
        x = linen.BatchNorm1d(5, axis=-1, **options, name="b")(x, mask=mask)
        x = jnp.tanh(nn.Dense(3, name="dense_c")(x))
        return linen.BatchNorm(**options, name="c")(x, mask=mask)


def apply_of(model):
    def apply(variables, batch, train, mutable):
        return model.apply(variables, batch, train, mutable=mutable)

    return apply


APPLY = apply_of(Deep())
VARIABLES = Deep().init(jax.random.key(0), DATA[0])


class NnxDeep(flax_nnx.Module):
    """The same model, with the variables of the one of Linen."""

    def __init__(self, virtual_batch_size=None):
        options = {"virtual_batch_size": virtual_batch_size, "rngs": flax_nnx.Rngs(0)}
        self.a = nnx.BatchNorm(4, **options)
        self.dense_b = flax_nnx.Linear(4, 5, rngs=flax_nnx.Rngs(0))
        self.b = nnx.BatchNorm1d(5, axis=-1, **options)
        self.dense_c = flax_nnx.Linear(5, 3, rngs=flax_nnx.Rngs(0))
        self.c = nnx.BatchNorm(3, **options)
        for collection in VARIABLES.values():
            for name, variables in collection.items():
                for key, array in variables.items():
                    getattr(getattr(self, name), key).set_value(array)

    def __call__(self, batch):
        x, mask = batch if isinstance(batch, tuple) else (batch, None)
        x = jnp.tanh(self.dense_b(self.a(x, mask=mask)))
        x = jnp.tanh(self.dense_c(self.b(x, mask=mask)))
        return self.c(x, mask=mask)


def stats_of(model):
    layers = {"a": model.a, "b": model.b, "c": model.c}
    return {
        name: {
            key: np.asarray(getattr(layer, key)[...])
            for key in ("mean", "var", "count")
            if hasattr(layer, key)
        }
        for name, layer in layers.items()
    }


def by_linen(batches, virtual_batch_size=None, **options):
    apply = apply_of(Deep(virtual_batch_size)) if virtual_batch_size else APPLY
    new = linen.recalibrate(apply, VARIABLES, batches, **options)
    assert new["params"] is VARIABLES["params"]
    return new["batch_stats"]


def by_nnx(batches, virtual_batch_size=None, **options):
    model = NnxDeep(virtual_batch_size)
    nnx.recalibrate(model, batches, **options)
    return stats_of(model)


both = pytest.mark.parametrize("run", [by_linen, by_nnx], ids=["linen", "nnx"])


def reference(data, masks=None, sequential=False, group=None):
    """The statistics by float64 NumPy, layer after layer, each over all values."""
    rows = [np.asarray(x, np.float64) for x in data]
    if masks is not None:
        rows = [x[mask[:, 0, 0]] for x, mask in zip(rows, masks, strict=True)]
    stats, params = {}, VARIABLES["params"]
    for name in "abc":
        if name != "a":
            dense = jax.tree.map(np.float64, params[f"dense_{name}"])
            rows = [np.tanh(x @ dense["kernel"] + dense["bias"]) for x in rows]
        mean, var, n = channel_moments(np.concatenate(rows), -1)
        kept = var * n / (n - 1) if name == "b" else var
        stats[name] = {"mean": mean, "var": kept} | ({"count": len(data)} if name == "b" else {})
        if sequential:
            rows = [(x - mean) / np.sqrt(kept + 1e-5) for x in rows]
        else:
            rows = [
                np.concatenate(
                    [
                        (part - part.mean((0, 1))) / np.sqrt(part.var((0, 1)) + 1e-5)
                        for part in np.split(x, len(x) // (group or len(x)))
                    ]
                )
                for x in rows
            ]
    return stats


@both
@pytest.mark.parametrize("sequential", [False, True])
def test_population_statistics(run, sequential):
    assert ALL.var((0, 1)).min() > 15 * DATA[0].var((0, 1)).max()
    assert_close(run(DATA, sequential=sequential), reference(DATA, sequential=sequential), 3e-6)


@both
@pytest.mark.parametrize("sequential", [False, True])
def test_masks(run, sequential):
    """A last batch that is padded with NaN is as good as a short one."""
    padded = np.concatenate([DATA[2], np.full((11, 3, 4), np.nan, np.float32)])
    masks = [*MASKS[:2], np.concatenate([MASKS[2], np.zeros((11, 1, 1), bool)])]
    batches = list(zip([*DATA[:2], padded], masks, strict=True))
    assert_close(run(batches, sequential=sequential), reference(DATA, MASKS, sequential), 3e-6)


@both
def test_ghost_batches(run):
    data = [DATA[0], DATA[1], DATA[2][:4]]
    assert_close(run(data, virtual_batch_size=4), reference(data, group=4), 3e-6)


@both
def test_a_single_sample_and_a_batch_of_nothing_that_counts(run):
    data = [DATA[0], DATA[1][:1]]
    assert_close(run(data, sequential=True), reference(data, sequential=True), 3e-6)
    nothing = (DATA[1], np.zeros((16, 1, 1), bool))
    batches = [(DATA[0], MASKS[0]), nothing]
    expected = reference(DATA[:1], MASKS[:1])
    expected["b"]["count"] = 2
    assert_close(run(batches), expected, 3e-6)


def torch_model(torch):
    layers = torch.nn.BatchNorm1d(4), torch.nn.BatchNorm1d(4)
    model = torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1])
    for layer in layers:
        torch.nn.init.constant_(layer.running_mean, 7.0)
    return model


@both
def test_the_average_of_batches_is_that_of_torch(run):
    torch = pytest.importorskip("torch")
    model = torch_model(torch)
    data = [x[:, 0] for x in DATA]
    torch.optim.swa_utils.update_bn(map(torch.from_numpy, data), model)
    expected = [
        {"mean": v.running_mean, "var": v.running_var, "count": v.num_batches_tracked}
        for v in (model[0], model[2])
    ]
    if run is by_linen:

        class Model(nn.Module):
            @nn.compact
            def __call__(self, x, train):
                x = jnp.tanh(linen.BatchNorm1d(4, axis=-1, name="0")(x, not train))
                return linen.BatchNorm1d(4, axis=-1, name="1")(x, not train)

        variables = Model().init(jax.random.key(0), data[0], True)
        new = linen.recalibrate(apply_of(Model()), variables, iter(data), average=True)
        actual = [new["batch_stats"]["0"], new["batch_stats"]["1"]]
    else:
        layers = [nnx.BatchNorm1d(4, axis=-1, rngs=flax_nnx.Rngs(0)) for _ in range(2)]
        nnx.recalibrate(flax_nnx.Sequential(layers[0], jnp.tanh, layers[1]), data, average=True)
        actual = [{name: getattr(v, name)[...] for name in expected[0]} for v in layers]
    assert_close(actual, [{k: np.asarray(v) for k, v in one.items()} for one in expected], 2e-6)
    whole = np.concatenate(data).var(0)
    assert (np.asarray(actual[0]["var"]) < whole / 10).all()  # which is why it is not the default


@both
def test_averages_leave_out_what_is_masked(run):
    nothing = (DATA[1], np.zeros((16, 1, 1), bool))
    batches = [(DATA[0], MASKS[0]), nothing, (DATA[2], MASKS[2])]
    parts = [x[m[:, 0, 0]].astype(np.float64) for x, m in (batches[0], batches[2])]
    expected = {
        "mean": np.mean([x.mean((0, 1)) for x in parts], 0),
        "var": np.mean([x.var((0, 1)) for x in parts], 0),
    }
    assert_close(run(batches, average=True)["a"], expected, 2e-6)


@both
@pytest.mark.parametrize("prior", [1, 0.25, 1e6])
def test_a_mixture_with_the_old_statistics(run, prior):
    """They count as so many batches of average size."""
    mean, var, _ = channel_moments(ALL, -1)
    weight = prior / (prior + len(DATA))  # of the old: mean 0 and variance 1
    mixed = (1 - weight) * mean
    spread = weight * (1 + mixed**2) + (1 - weight) * (var + (mean - mixed) ** 2)
    actual = run(DATA, prior=prior, sequential=True)["a"]
    assert_close(actual, {"mean": mixed, "var": spread}, 1e-5)


@pytest.mark.optimized
def test_under_jit_the_passes_become_one():
    """What the passes over one batch have in common is computed once, also for each sample."""
    x = DATA[0]

    def adapted(variables, x, prior=1):
        new = linen.recalibrate(APPLY, variables, [x], sequential=True, prior=prior)
        return Deep().apply(new, x), new["batch_stats"]

    def by_sample(variables, x):  # of which each has a share of a quarter
        return jax.vmap(lambda x: adapted(variables, x[None], 3))(x)

    together, apart, once = (
        jax.jit(f).lower(VARIABLES, x).compile() for f in (adapted, by_sample, Deep().apply)
    )
    products = [program.as_text().count(" dot(") for program in (together, apart, once)]
    assert products == [products[2]] * 3
    assert products[2] > 0

    y, stats = together(VARIABLES, x)
    expected = linen.recalibrate(APPLY, VARIABLES, [x], sequential=True, prior=1)
    assert_close(stats, expected["batch_stats"], 1e-6)
    assert_close(y, Deep().apply(expected, x), 1e-5)

    y, stats = apart(VARIABLES, x)
    mean = 0.25 * x.astype(np.float64).mean(1)  # and 0.75 · 0
    var = 0.25 * np.square(x.astype(np.float64)).mean(1) + 0.75 - mean**2
    assert_close((stats["a"]["mean"], stats["a"]["var"]), (mean, var), 1e-5)
    one = linen.recalibrate(APPLY, VARIABLES, [x[3:4]], sequential=True, prior=3)
    assert_close(y[3], Deep().apply(one, x[3:4]), 1e-5)


def test_what_is_not_known_under_jit_is_nan():
    run = jax.jit(lambda v, x, m: linen.recalibrate(APPLY, v, [(x, m)])["batch_stats"])
    stats = run(VARIABLES, DATA[0], np.zeros((16, 1, 1), bool))
    assert np.isnan(stats["a"]["mean"]).all()

    @flax_nnx.jit
    def in_place(model, batches):
        nnx.recalibrate(model, batches, sequential=True)

    model = NnxDeep()
    in_place(model, DATA)
    assert_close(stats_of(model), reference(DATA, sequential=True), 3e-6)


@pytest.mark.parametrize(
    ("way", "sequential"),
    [("sharded", True), ("explicit", False), ("shard_map", True), ("vmap", False)],
)
def test_data_parallelism(way, sequential):
    data = DATA[:2]
    model, batches = Deep(axis_name="devices" if way in ("shard_map", "vmap") else None), data
    apply = apply_of(model)
    kind = AxisType.Explicit if way == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(kind,))
    if way in ("sharded", "explicit"):
        batches = [jax.device_put(x, NamedSharding(mesh, P("devices"))) for x in data]
    elif way == "vmap":
        batches = [x.reshape(4, -1, 3, 4) for x in data]

        def apply(variables, batch, train, mutable):
            one = lambda x: model.apply(variables, x, train, mutable=mutable)  # noqa: E731
            return jax.vmap(one, out_axes=(0, None), axis_name="devices")(batch)

    else:

        def apply(variables, batch, train, mutable):
            one = lambda v, x: model.apply(v, x, train, mutable=mutable)  # noqa: E731
            specs = {"in_specs": (P(), P("devices")), "out_specs": (P("devices"), P())}
            return jax.shard_map(one, mesh=mesh, **specs)(variables, batch)

    with jax.set_mesh(mesh):
        new = linen.recalibrate(apply, VARIABLES, batches, sequential=sequential)
    assert_close(new["batch_stats"], reference(data, sequential=sequential), 3e-6)


@pytest.mark.parametrize("way", ["sharded", "shard_map"])
def test_data_parallelism_in_nnx(way):
    data = DATA[:2]
    mesh = jax.make_mesh((4,), ("devices",), axis_types=(AxisType.Auto,))
    model = NnxDeep()
    if way == "sharded":
        batches = [jax.device_put(x, NamedSharding(mesh, P("devices"))) for x in data]
        nnx.recalibrate(model, batches)
    else:
        for layer in (model.a, model.b, model.c):
            layer.axis_name = "devices"

        def call(model, x):
            specs = {"in_specs": (P(), P("devices")), "out_specs": P("devices")}
            return flax_nnx.shard_map(lambda model, x: model(x), mesh=mesh, **specs)(model, x)

        nnx.recalibrate(model, data, call=call)
    assert_close(stats_of(model), reference(data), 3e-6)


class Block(nn.Module):
    unbiased: bool = False

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4, name="dense")(x)
        norm = linen.BatchNorm1d(4, axis=-1, name="norm") if self.unbiased else None
        return jnp.tanh((norm or linen.BatchNorm(name="norm"))(x, not train)), None


def stack(collections, unbiased=False):
    axes = dict.fromkeys(["params", *collections], 0)
    options = {"split_rngs": {"params": True}, "in_axes": nn.broadcast, "length": 3}
    return nn.scan(Block, axes, **options)(unbiased)


@pytest.mark.parametrize("unbiased", [False, True])
def test_stacked_layers(unbiased):
    """As many passes as there are layers in the stack, and one more."""
    model = stack(["batch_stats", "batch_moments"], unbiased)
    variables = model.init(jax.random.key(0), DATA[0], False)
    seen = []
    new = linen.recalibrate(
        apply_of(model),
        variables,
        DATA,
        sequential=True,
        callback=lambda batches, passes: seen.append((passes, batches)),
    )
    assert seen == [(i, j) for i in range(4) for j in (1, 2, 3)]
    rows = ALL
    stats = new["batch_stats"]["norm"]
    for i in range(3):
        dense = jax.tree.map(lambda v, i=i: np.float64(v[i]), variables["params"]["dense"])
        rows = rows @ dense["kernel"] + dense["bias"]
        mean, var, n = channel_moments(rows, -1)
        var = var * n / (n - 1) if unbiased else var
        assert_close((stats["mean"][i], stats["var"][i]), (mean, var), 1e-5)
        rows = np.tanh((rows - mean) / np.sqrt(var + 1e-5))
    if unbiased:
        np.testing.assert_array_equal(stats["count"], [3, 3, 3])

    model = stack(["batch_stats"], unbiased)
    message = "fewer for 'norm'.*In `nn.scan` and other lifted transforms, name the collection"
    with pytest.raises(ValueError, match=message):
        linen.recalibrate(apply_of(model), variables, DATA)


def test_stacked_layers_of_nnx():
    """Made by `nnx.vmap` and run by `nnx.scan`: the results are those of `nn.scan`."""

    class NnxBlock(flax_nnx.Module):
        def __init__(self, rngs):
            self.dense = flax_nnx.Linear(4, 4, rngs=rngs)
            self.norm = nnx.BatchNorm1d(4, axis=-1, rngs=rngs)

        def __call__(self, x):
            return jnp.tanh(self.norm(self.dense(x)))

    model = stack(["batch_stats", "batch_moments"], unbiased=True)
    variables = model.init(jax.random.key(0), DATA[0], False)
    expected = linen.recalibrate(apply_of(model), variables, DATA, sequential=True)

    @flax_nnx.split_rngs(splits=3)
    @flax_nnx.vmap
    def blocks(rngs):
        return NnxBlock(rngs)

    @flax_nnx.scan(in_axes=(0, flax_nnx.Carry), out_axes=flax_nnx.Carry)
    def run(block, x):
        return block(x)

    stacked = blocks(flax_nnx.Rngs(0))
    for name, array in variables["params"]["dense"].items():
        getattr(stacked.dense, name).set_value(array)
    nnx.recalibrate(stacked, DATA, call=run, sequential=True)
    actual = {name: getattr(stacked.norm, name)[...] for name in ("mean", "var", "count")}
    assert_close(actual, dict(expected["batch_stats"]["norm"]), 1e-5)


def test_many_batches_in_float32():
    """Sums of as many batches are merged: errors grow with the logarithm."""
    means = sample((4000, 1, 4), 1, 10.0, 5.0, np.float32)
    x = means + sample((4000, 8, 4), 0, 0.0, 1.0, np.float32)
    layer = linen.BatchNorm()
    variables = layer.init(jax.random.key(0), x[0], True)

    def apply(variables, batch, train, mutable):
        return layer.apply(variables, batch, not train, mutable=mutable)

    stats = linen.recalibrate(apply, variables, list(x))["batch_stats"]
    mean, var, _ = channel_moments(x, -1)
    np.testing.assert_allclose(stats["mean"], mean, rtol=3e-7)
    np.testing.assert_allclose(stats["var"], var, rtol=3e-7)


def test_compiled_once_for_each_shape():
    traced = []

    def apply(variables, batch, train, mutable):
        traced.append(batch.shape)
        return APPLY(variables, batch, train, mutable)

    linen.recalibrate(apply, VARIABLES, DATA, sequential=True)
    linen.recalibrate(apply, VARIABLES, DATA, sequential=True)
    assert traced == [(16, 3, 4), (5, 3, 4)]


def test_progress():
    seen = []
    linen.recalibrate(APPLY, VARIABLES, DATA, callback=lambda *done: seen.append(done))
    assert seen == [(1, 0), (2, 0), (3, 0)]


def test_other_variables_stay():
    """What else a model writes is dropped, and layers left out keep their statistics."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            calls = self.variable("other", "calls", jnp.zeros, (), jnp.int32)
            calls.value += 1
            x = linen.BatchNorm(name="ours")(x, not train)
            return nn.BatchNorm(name="flax")(x, not train)

    variables = Model().init(jax.random.key(0), DATA[0], True)
    apply = apply_of(Model())
    new = linen.recalibrate(apply, variables, DATA, where=lambda path: path == "ours")
    kept = {**new, "batch_stats": {**new["batch_stats"], "ours": variables["batch_stats"]["ours"]}}
    jax.tree.map(np.testing.assert_array_equal, kept, variables)
    assert_close(new["batch_stats"]["ours"]["mean"], ALL.mean((0, 1)), 1e-6)
    with pytest.raises(ValueError, match="at least two values per channel; got fewer for 'flax'"):
        linen.recalibrate(apply, variables, DATA)


def test_wrong_statistics_are_replaced_whatever_they_are():
    stats = jax.tree.map(lambda v: jnp.full_like(v, -1 if v.ndim == 0 else np.nan), VARIABLES)
    broken = {**VARIABLES, "batch_stats": stats["batch_stats"]}
    new = linen.recalibrate(APPLY, broken, DATA, sequential=True)
    assert_close(new["batch_stats"], reference(DATA, sequential=True), 3e-6)


def test_the_model_itself():
    layer = linen.BatchNorm()
    variables = {"batch_stats": OLD, "params": {"scale": np.ones(4), "bias": np.ones(4)}}

    def apply(variables, batch, train, mutable):
        return layer.apply(variables, batch, not train, mutable=mutable)

    new = linen.recalibrate(apply, variables, DATA)["batch_stats"]
    assert_close(new, {"mean": ALL.mean((0, 1)), "var": ALL.var((0, 1))}, 1e-6)


class Dropped(flax_nnx.Module):
    def __init__(self):
        self.dropout = flax_nnx.Dropout(0.5, rngs=flax_nnx.Rngs(0))
        self.norm = nnx.BatchNorm(4, rngs=flax_nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(self.dropout(x))


def test_dropout_has_the_mode_of_the_model():
    model = Dropped()
    model.eval()
    nnx.recalibrate(model, DATA)
    assert_close(model.norm.mean[...], ALL.mean((0, 1)), 1e-6)
    assert model.norm.use_running_average
    assert model.dropout.deterministic
    model.train()
    ones = [np.ones((16, 3, 4), np.float32)] * 3
    nnx.recalibrate(model, ones)
    three = np.asarray(model.norm.mean[...])
    nnx.recalibrate(model, ones[:1])
    assert (three != model.norm.mean[...]).any()  # each batch drops others
    assert model.dropout.rngs.count[...] == 0
    assert not model.norm.use_running_average


def test_an_error_leaves_the_model_as_it_was():
    model = NnxDeep()
    nnx.init_batch_moments(model)
    graphdef, before = flax_nnx.split(model)

    def failing():
        yield DATA[0]
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        nnx.recalibrate(model, failing())
    now, after = flax_nnx.split(model)
    assert now == graphdef
    jax.tree.map(np.testing.assert_array_equal, after, before)


class Loader:
    """Starts anew, as a DataLoader does."""

    def __iter__(self):
        return iter(DATA)


def test_what_may_be_iterated():
    expected = by_linen(DATA, sequential=True)
    assert_close(by_linen(Loader(), sequential=True), expected, 0)
    by_linen(iter(DATA))
    for run in (by_linen, by_nnx):
        with pytest.raises(
            TypeError, match=r"`batches` must start anew.*got a list_iterator, which"
        ):
            run(iter(DATA), sequential=True)
        with pytest.raises(TypeError, match="`batches` must be iterable; got int"):
            run(3)
        with pytest.raises(ValueError, match="`batches` must hold at least one batch; got none"):
            run([])


@both
def test_options_that_do_not_fit(run):
    for prior in (-1, np.nan, "1", np.inf):
        with pytest.raises(ValueError, match="`prior` must be a number of batches, at least 0"):
            run(DATA, prior=prior)
    with pytest.raises(ValueError, match="Leave one of them out"):
        run(DATA, prior=1, average=True)
    nan = DATA[0].copy()
    nan[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"got NaN or infinity in the input of 'a', 'b', 'c'\."):
        run([nan, DATA[1]])


def test_frozen_layers_and_those_of_others_are_named():
    model = NnxDeep()
    nnx.freeze(model, flax_nnx.PathContains("b"))
    with pytest.raises(ValueError, match=r"fewer for 'b'\. Use `where` to exclude layers"):
        nnx.recalibrate(model, DATA)
    nnx.recalibrate(model, DATA, where=flax_nnx.Any(*map(flax_nnx.PathContains, "ac")))
    assert (model.b.mean[...] == 0).all()
    assert (model.a.mean[...] != 0).all()
    model.c = flax_nnx.BatchNorm(3, rngs=flax_nnx.Rngs(0))
    with pytest.raises(ValueError, match="got layers of another library: 'c'"):
        nnx.recalibrate(model, DATA)
    with pytest.raises(
        ValueError, match="`where` must choose at least one batch norm; got none of"
    ):
        linen.recalibrate(APPLY, VARIABLES, DATA, where=lambda path: False)
    with pytest.raises(
        ValueError, match="`where` must choose at least one batch norm; got none of n"
    ):
        linen.recalibrate(APPLY, {"params": {}}, DATA)


def test_apply_must_return_the_updates():
    def silent(variables, batch, train, mutable):
        return APPLY(variables, batch, train, mutable)[0]

    with pytest.raises(ValueError, match="`apply` must return the output and the updates"):
        linen.recalibrate(silent, VARIABLES, DATA)


def test_with_functions_alone():
    """Merge, and start the cumulative average anew."""
    merged = jaxbn.merge_moments(*map(jaxbn.batch_moments, DATA))
    stats = jaxbn.update_batch_stats(jaxbn.init_batch_stats(4), merged, momentum=None)
    mean, var, n = channel_moments(ALL, -1)
    assert_close(stats[:2], (mean, var * n / (n - 1)), 1e-6)


@pytest.mark.parametrize("one", [DATA[0], {"x": DATA[0]}], ids=["array", "dict"])
def test_one_batch_is_no_list_of_batches(one):
    with pytest.raises(TypeError, match=r"got one batch, a \w+\. Pass it in a list"):
        linen.recalibrate(APPLY, VARIABLES, one)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_model_that_chooses_its_mode_itself(sequential):
    """Statistics of the other mode would be wrong."""

    def apply(variables, batch, train, mutable):
        return APPLY(variables, batch, sequential, mutable)

    with pytest.raises(ValueError, match=f"sequential={sequential}; 'a' was called in"):
        linen.recalibrate(apply, VARIABLES, DATA, sequential=sequential)

    class Stubborn(flax_nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(4, rngs=flax_nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(x, use_running_average=not sequential)

    model = Stubborn()
    with pytest.raises(ValueError, match=f"sequential={sequential}; 'norm' was called in"):
        nnx.recalibrate(model, DATA, sequential=sequential)
    assert (model.norm.mean[...] == 0).all()
