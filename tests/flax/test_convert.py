"""Models that name Flax's batch norm, converted: bit for bit what those that name ours compute."""

import copy
import dataclasses
import functools
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx as flax_nnx
from helpers.compare import assert_close
from helpers.numpy_reference import sample
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxbn import Renorm, linen, nnx

KEY = jax.random.key(0)
HAS_VIEW = hasattr(flax_nnx, "view")


def batch(step=0, shape=(8, 4)):
    """Under this mean, Flax's variance and ours differ in many bits."""
    return jnp.asarray(sample(shape, step, mean=300.0, std=1.0, dtype=np.float32))


def bits(tree):
    return jax.tree.map(lambda v: (v.shape, v.dtype.name, np.asarray(v).tobytes()), tree)


def arrays(module, *kinds):
    return flax_nnx.to_pure_dict(flax_nnx.state(module, *kinds))


def fields_of(layer):
    """Class and attributes of a layer, but for its variables."""
    attributes = {n: v for n, v in vars(layer).items() if not n.startswith("_")}
    kept = {n: v for n, v in attributes.items() if not isinstance(v, flax_nnx.Variable)}
    return type(layer), kept, attributes.keys()


def rngs():
    return flax_nnx.Rngs(0)


# NNX


class Subclass(flax_nnx.BatchNorm):
    pass


class Network(flax_nnx.Module):
    """Has batch norms in attributes, one of them twice, in lists, dicts, tuples, and in modules."""

    def __init__(self, norm, rngs):
        self.norm = norm(4, momentum=0.9, rngs=rngs)
        self.again = self.norm
        self.list = flax_nnx.List([flax_nnx.Linear(4, 4, rngs=rngs), norm(4, rngs=rngs)])
        self.dict = flax_nnx.Dict(a=norm(4, use_scale=False, epsilon=0.1, rngs=rngs))
        self.tuple = flax_nnx.data((norm(4, use_bias=False, rngs=rngs), jnp.tanh))
        self.rest = flax_nnx.Sequential(norm(4, param_dtype=jnp.bfloat16, rngs=rngs), jnp.tanh)

    def __call__(self, x):
        x = self.again(self.list[0](self.norm(x)))
        return self.rest(self.tuple[0](self.dict["a"](self.list[1](x))))

    def norms(self):
        return self.norm, self.list[1], self.dict["a"], self.tuple[0], self.rest.layers[0]


@flax_nnx.jit
def step(model, optimizer, x):
    def loss(model):
        y = model(x)
        return jnp.sin(y.astype(jnp.float32)).sum(), y

    (_, y), gradients = flax_nnx.value_and_grad(loss, has_aux=True)(model)
    optimizer.update(model, gradients)
    return y, gradients


def trained(model, optimizer=None):
    """All that two steps of training make."""
    optimizer = optimizer or flax_nnx.Optimizer(model, optax.adam(0.1), wrt=flax_nnx.Param)
    results = [step(model, optimizer, batch(i)) for i in range(2)]
    model.eval()
    return bits((results, arrays(model), arrays(optimizer), model(batch(2))))


@pytest.mark.usefixtures("standard_promotion")
def test_every_batch_norm_of_an_nnx_model_becomes_ours():
    model = Network(flax_nnx.BatchNorm, rngs())
    optimizer = flax_nnx.Optimizer(model, optax.adam(0.1), wrt=flax_nnx.Param)
    variables = jax.tree.leaves(flax_nnx.state(model), is_leaf=lambda v: False)
    before = [v for _, v in flax_nnx.iter_graph(model) if isinstance(v, flax_nnx.Variable)]
    assert nnx.convert(model) is model
    after = [v for _, v in flax_nnx.iter_graph(model) if isinstance(v, flax_nnx.Variable)]
    assert {*map(id, after)} == {*map(id, before)}
    assert len(variables) == len(after)
    assert model.again is model.norm
    assert {type(norm) for norm in model.norms()} == {nnx.BatchNorm}
    written = Network(nnx.BatchNorm, rngs())
    assert flax_nnx.graphdef(model) == flax_nnx.graphdef(written)
    assert trained(model, optimizer) == trained(written)


def test_fields_are_set_on_the_way():
    fields = {"virtual_batch_size": 4, "skip_nonfinite": True, "renorm": Renorm(3.0, 5.0)}
    model = nnx.convert(Network(flax_nnx.BatchNorm, rngs()), **fields, momentum=0.5)
    for norm in model.norms():
        assert {name: getattr(norm, name) for name in fields} == fields
        assert norm.momentum == 0.5
    nnx.convert(model, skip_nonfinite=False)  # what is ours already takes fields too
    assert model.norm.skip_nonfinite is False
    assert model.norm.virtual_batch_size == 4


def test_a_model_may_be_a_batch_norm():
    layer = flax_nnx.BatchNorm(4, axis=1, dtype=jnp.float16, use_running_average=None, rngs=rngs())
    assert nnx.convert(layer) is layer
    written = nnx.BatchNorm(4, axis=1, dtype=jnp.float16, use_running_average=None, rngs=rngs())
    assert fields_of(layer) == fields_of(written)


def results(model, x):
    """Output, statistics and gradients of a step."""

    def loss(model):
        y = model(x)
        return jnp.sin(y).sum(), y

    gradients, y = flax_nnx.grad(loss, has_aux=True)(model)
    return y, arrays(model, flax_nnx.BatchStat), flax_nnx.to_pure_dict(gradients)


def test_an_nnx_model_is_synchronized_in_one_line():
    """On four devices of `shard_map`, each with its share of the batch."""
    model, whole = (Network(flax_nnx.BatchNorm, rngs()) for _ in range(2))
    nnx.convert(model, axis_name="batch")
    nnx.convert(whole)
    x = batch(0, (16, 4))
    mesh = jax.make_mesh((4,), ("batch",), (AxisType.Auto,), devices=jax.devices()[:4])
    graphdef, state = flax_nnx.split(model)

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P("batch")), out_specs=(P("batch"), P(), P())
    )
    def run(state, x):
        return results(flax_nnx.merge(graphdef, state), x)

    with jax.numpy_dtype_promotion("standard"):
        actual, expected = run(state, x), results(whole, x)
    assert_close(actual, expected, 1e-3)


def test_metadata_and_sharding_stay():
    partitioned = flax_nnx.with_partitioning(flax_nnx.initializers.ones, ("model",))
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    with jax.set_mesh(mesh):
        layer = flax_nnx.BatchNorm(
            8, scale_init=partitioned, bias_metadata={"tag": "b"}, rngs=rngs()
        )
        scale, metadata = layer.scale, layer.scale.get_metadata()
        nnx.convert(layer)
    assert layer.scale is scale
    assert layer.scale.get_metadata() == metadata
    assert layer.scale[...].sharding.spec == P("model")
    assert layer.bias.tag == "b"


def test_views_and_copies_share_the_variables():
    model = Network(flax_nnx.BatchNorm, rngs())
    view = flax_nnx.view if HAS_VIEW else flax_nnx.set_mode
    before = view(model, use_running_average=True)
    nnx.convert(model)
    after = view(model, use_running_average=True)
    assert type(after.norm) is nnx.BatchNorm
    with jax.numpy_dtype_promotion("standard"):
        model(batch())
    for other in (before, after):
        assert other.norm.mean is model.norm.mean
        assert other.norm.use_running_average is True
    with jax.numpy_dtype_promotion("standard"):
        duplicate = flax_nnx.merge(*flax_nnx.split(model))
        np.testing.assert_array_equal(duplicate(batch(1)), copy.deepcopy(model)(batch(1)))


@pytest.mark.parametrize("kind", [nnx.BatchNorm, nnx.BatchNorm1d])
def test_stacks_of_layers(kind):
    def stack(norm):
        @flax_nnx.split_rngs(splits=3)
        @flax_nnx.vmap
        def create(rngs):
            return norm(4, scale_init=flax_nnx.initializers.normal(1.0), rngs=rngs)

        return create(rngs())

    converted = nnx.convert(stack(flax_nnx.BatchNorm), to=kind)
    written = stack(functools.partial(kind, **({} if kind is nnx.BatchNorm else {"axis": -1})))
    written.momentum = converted.momentum
    axes = (flax_nnx.Carry, 0)
    scanned = flax_nnx.scan(lambda x, layer: (layer(x), jnp.sum(x)), in_axes=axes, out_axes=axes)
    assert fields_of(converted) == fields_of(written)
    results = [bits((scanned(batch(), layer), arrays(layer))) for layer in (converted, written)]
    assert results[0] == results[1]
    assert results[0][1]["mean"][0] == (3, 4)


def test_subclasses_are_left_alone_and_named():
    model = flax_nnx.Sequential(Subclass(4, rngs=rngs()), flax_nnx.BatchNorm(4, rngs=rngs()))
    with pytest.warns(UserWarning, match=r"stay as they are: layers/0 \(.*\.Subclass\)"):
        nnx.convert(model)
    assert [type(layer) for layer in model.layers] == [Subclass, nnx.BatchNorm]
    nnx.convert(model, classes=[Subclass])
    assert type(model.layers[0]) is nnx.BatchNorm


def test_a_model_without_batch_norm_is_refused():
    linear = flax_nnx.Linear(4, 4, rngs=rngs())
    with pytest.raises(ValueError, match=r"must have a batch norm of the classes .* with none"):
        nnx.convert(linear)
    with pytest.raises(ValueError, match=r"got Subclass with the model itself \(.*\.Subclass\)"):
        nnx.convert(Subclass(4, rngs=rngs()))


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
def test_to_torch_s_conventions_and_back(name):
    kind, rank = getattr(nnx, name), {"BatchNorm1d": 2, "BatchNorm2d": 4, "BatchNorm3d": 5}[name]
    x = batch(0, (8, *[2] * (rank - 2), 4))
    layer = flax_nnx.BatchNorm(4, momentum=0.75, epsilon=0.1, use_bias=False, rngs=rngs())
    layer(x)
    stats, original = arrays(layer, flax_nnx.BatchStat), fields_of(layer)
    nnx.convert(layer, to=kind, skip_nonfinite=True)
    assert arrays(layer, flax_nnx.BatchStat) == stats | {"count": 0}
    options = {"momentum": 0.25, "eps": 0.1, "bias": False, "axis": -1, "skip_nonfinite": True}
    written = kind(4, **options, rngs=rngs())
    written.mean, written.var = (flax_nnx.BatchStat(stats[v]) for v in ("mean", "var"))
    assert fields_of(layer) == fields_of(written)
    assert bits((layer(x), arrays(layer))) == bits((written(x), arrays(written)))
    with pytest.raises(ValueError, match=r"it has no skip_nonfinite"):
        nnx.convert(layer, to=flax_nnx.BatchNorm)
    layer.skip_nonfinite = False
    variables = layer.scale, layer.mean, layer.var
    nnx.convert(layer, to=flax_nnx.BatchNorm)
    assert (layer.momentum, layer.epsilon, layer.axis) == (0.75, 0.1, -1)
    assert variables == (layer.scale, layer.mean, layer.var)
    assert not hasattr(layer, "count")
    assert fields_of(layer) == original
    layer(x)


def test_what_a_class_cannot_hold_is_refused_before_anything_changes():
    def layer(kind=nnx.BatchNorm, **fields):
        return kind(4, **fields, rngs=rngs())

    flax, torch = flax_nnx.BatchNorm, nnx.BatchNorm2d
    fused = layer(activation="relu", frozen=True)
    cumulative, untracked = layer(torch, momentum=None), layer(torch, track_running_stats=False)
    promoting = layer(promote_dtype=lambda values, dtype: values)
    cases = [
        (fused, {"to": flax}, "has no activation, frozen"),
        (promoting, {"to": torch}, "has no promote_dtype"),
        (layer(num_domains=2), {"to": flax}, "has no num_domains"),
        (layer(axis=(1, 2)), {"to": torch}, r"one channel axis.*axis=\(1, 2\)"),
        (cumulative, {"to": flax}, "momentum=None"),
        (untracked, {"to": nnx.BatchNorm}, "no statistics"),
        (layer(flax), {"to": flax_nnx.LayerNorm}, "`to` must be BatchNorm, BatchNorm1d"),
        (layer(flax), {"num_domains": 2}, "`fields` must be fields of .*momentum.*got num_domains"),
        (layer(flax), {"use_scale": False}, "got use_scale"),
        (layer(flax), {"to": torch, "epsilon": 0.1}, "eps, momentum, axis.*got epsilon"),
        (layer(flax), {"to": flax, "skip_nonfinite": True}, "got skip_nonfinite"),
    ]
    for one, options, message in cases:
        model = flax_nnx.Sequential(layer(flax), one)
        before = [(type(v), vars(v).copy()) for v in model.layers]
        with pytest.raises(ValueError, match=message):
            nnx.convert(model, **options)
        assert [(type(v), vars(v)) for v in model.layers] == before


# Linen


class Block(nn.Module):
    """Calls one batch norm twice, and leaves some fields to the call."""

    norm: type[nn.Module] = nn.BatchNorm

    def setup(self):
        self.dense = nn.Dense(4)
        self.shared = self.norm(use_running_average=None, momentum=0.9)
        self.listed = [self.norm(use_scale=False), self.norm(axis=0, use_bias=False)]

    def encode(self, x, train=True):
        return self.shared(self.dense(x), use_running_average=not train)

    def __call__(self, x, train=True):
        x = self.shared(self.encode(x, train), not train, mask=jnp.arange(8)[:, None] < 6)
        for norm in self.listed:
            x = norm(x, use_running_average=not train)
        return x


class Deep(nn.Module):
    """Lifts blocks in every way."""

    norm: type[nn.Module] = nn.BatchNorm

    @nn.compact
    def __call__(self, x):
        x = nn.remat(Block)(self.norm)(x)
        x = nn.jit(Block)(self.norm)(x)
        norms = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
        x = nn.scan(Scanned, **norms, length=2)(self.norm)(x, None)[0]
        return nn.vmap(self.norm, **norms)(use_running_average=False)(jnp.stack([x, 2 * x]))


class Scanned(nn.Module):
    norm: type[nn.Module]

    @nn.compact
    def __call__(self, x, _):
        return x + self.norm(use_running_average=False)(nn.Dense(4)(x)), None


def everything(model, context=None):
    """What initialization, a step of training and inference make of the same model."""
    with context or linen.converted():
        y, variables = jax.jit(model.init_with_output)(KEY, batch())

        @jax.jit
        def train(variables):
            def loss(params):
                y, updates = model.apply(
                    variables | {"params": params}, batch(), mutable=["batch_stats"]
                )
                return jnp.sin(y).sum(), (y, updates)

            return jax.grad(loss, has_aux=True)(variables["params"])

        return bits((y, variables, train(variables)))


def test_linen_models_are_computed_by_ours_at_any_depth():
    expected = everything(Deep(linen.BatchNorm))
    assert everything(linen.convert(Deep())) == expected
    assert everything(Deep()) == expected  # in the context
    assert everything(Deep(), nn.intercept_methods(lambda f, a, k, _: f(*a, **k))) != expected


@pytest.fixture(scope="module")
def blocks():
    """The converted block, one that names ours, and variables of either."""
    ours = Block(linen.BatchNorm)
    return linen.convert(Block()), ours, jax.jit(ours.init)(KEY, batch())


def test_every_entry_of_a_model(blocks):
    converted, ours, variables = blocks
    mutable = {"mutable": ["batch_stats", "intermediates"]}

    def entries(model):
        whole = model.bind(variables, mutable=["batch_stats"])
        yield whole(batch()), whole.encode(batch()), whole.variables["batch_stats"]
        for method in ("encode", Block.encode, lambda model, x: model.shared(x, False)):
            yield model.apply(variables, batch(), method=method, **mutable)
        yield model.apply(variables, batch(), capture_intermediates=True, **mutable)
        yield model.apply(variables, batch(), train=False)
        yield model.lazy_init(KEY, jax.ShapeDtypeStruct((8, 4), jnp.float32))
        yield nn.init(Block.encode, model)(KEY, batch())

    assert bits([*entries(converted)][:-1]) == bits([*entries(ours)][:-1])
    tables = [v.tabulate(KEY, batch(), console_kwargs={"width": 200}) for v in (converted, ours)]
    assert tables[0] == tables[1]
    assert "batch_stats" in tables[0]


def test_a_converted_model_is_as_the_model(blocks):
    converted, _, _ = blocks
    assert isinstance(converted, Block)
    assert repr(converted) == repr(Block())
    assert converted == linen.convert(Block()) == converted.clone()
    assert hash(converted) == hash(linen.convert(Block()))
    assert converted != linen.convert(Block(), skip_nonfinite=True)
    sequence = [nn.Sequential([v, nn.Dense(2)]) for v in (converted, Block(linen.BatchNorm))]
    results = [jax.jit(v.init_with_output)(KEY, batch()) for v in sequence]
    assert bits(results[0]) == bits(results[1])
    assert "layers_0" in results[0][1]["params"]


def test_programs_of_jit_belong_to_their_conversion(blocks):
    _, ours, variables = blocks

    def run(model):
        return jax.jit(functools.partial(model.apply, mutable=["batch_stats"]))

    theirs = run(Block())
    before = bits(theirs(variables, batch()))
    with linen.converted():
        inside = bits(theirs(variables, batch()))
        with linen.converted(momentum=0.5):  # the inner one counts
            inner = bits(theirs(variables, batch()))
    assert inside == bits(run(ours)(variables, batch()))
    assert inner == bits(run(linen.convert(Block(), momentum=0.5))(variables, batch()))
    assert bits(theirs(variables, batch())) == before
    assert len({pickle.dumps(v) for v in (before, inside, inner)}) == 3


@pytest.mark.parametrize(
    "fields",
    [
        {"virtual_batch_size": 4, "skip_nonfinite": True},
        {"axis_name": "i", "axis_index_groups": None, "activation": "relu"},
        {"renorm": Renorm(3.0, 5.0)},
        {"momentum": jnp.float32(0.5)},
    ],
)
def test_fields_of_linen_models(fields):
    norm = functools.partial(nn.BatchNorm, use_running_average=False)
    ours = nn.Sequential([nn.Dense(3), linen.BatchNorm(use_running_average=False, **fields)])
    model = nn.Sequential([nn.Dense(3), norm()])
    variables = ours.init(KEY, batch())

    def run(model):
        apply = functools.partial(model.apply, variables, mutable=["batch_stats"])
        mapped = (
            jax.vmap(apply, axis_name="i", out_axes=(0, None)) if "axis_name" in fields else apply
        )
        return bits(mapped(batch(0, (2, 8, 4)) if "axis_name" in fields else batch()))

    # Twice: the second conversion goes on with the fields of the first.
    converted = linen.convert(linen.convert(model, epsilon=1e-5), **fields)
    assert run(converted) == run(ours)


def test_a_batch_norm_by_itself():
    ours = linen.BatchNorm(use_running_average=False, axis=(0, 1))
    converted = linen.convert(nn.BatchNorm(use_running_average=False, axis=(0, 1)))
    x = batch(0, (3, 4, 8))
    assert bits(converted.init_with_output(KEY, x)) == bits(ours.init_with_output(KEY, x))


class BatchNormCopy(nn.Module):
    """As packages have it: fewer fields, and initializers of its own for the statistics."""

    use_running_average: bool | None = None
    momentum: float = 0.9
    dtype: type = jnp.float32
    scale_init: object = lambda key, shape: 2 * jnp.ones(shape)
    mean_init: object = lambda shape: 3 * jnp.ones(shape)

    @nn.compact
    def __call__(self, x, use_running_average=None):
        shape = x.shape[-1:]
        scale = self.param("scale", self.scale_init, shape)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        self.variable("batch_stats", "mean", self.mean_init, shape)
        self.variable("batch_stats", "var", jnp.ones, shape)
        return x * scale[None] + bias[None]


@dataclasses.dataclass
class Renamed(BatchNormCopy):
    decay: float = 0.9


def test_classes_of_one_s_own():
    model = nn.Sequential([nn.Dense(3), BatchNormCopy(use_running_average=False)])
    converted = linen.convert(model, classes=[nn.BatchNorm, BatchNormCopy])
    y, variables = converted.init_with_output(KEY, batch())
    assert bits(variables) == bits(model.init(KEY, batch()))
    ours = nn.Sequential([nn.Dense(3), linen.BatchNorm(use_running_average=False, momentum=0.9)])
    apply = functools.partial(ours.apply, variables, batch(), mutable=["batch_stats"])
    expected, updates = apply()
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    assert bits(converted.apply(variables, batch(), mutable=["batch_stats"])) == bits(
        (expected, updates)
    )
    with pytest.raises(ValueError, match=r"`classes` must name .* for one with .*BatchNormCopy\."):
        linen.convert(model).init(KEY, batch())
    renamed = linen.convert(Renamed(use_running_average=False), classes=[Renamed])
    with pytest.raises(ValueError, match=r"test_convert\.Renamed also has decay"):
        renamed.init(KEY, batch())


def test_subclasses_of_flax_s_are_left_alone():
    class Louder(nn.BatchNorm):
        def __call__(self, x):
            return 2 * super().__call__(x)

    layer = Louder(use_running_average=False)
    variables = layer.init(KEY, batch())
    apply = functools.partial(layer.apply, variables, batch(), mutable=["batch_stats"])
    with linen.converted():
        y, _ = apply()
    assert bits(y) == bits(apply()[0])
    with pytest.raises(ValueError, match=r"`classes` must name .* for one with .*Louder"):
        linen.convert(layer).init(KEY, batch())


def test_what_linen_refuses():
    bound = Block().bind({})
    for call, message in {
        (lambda: linen.convert(bound)): "neither bound nor made inside of another; got Block",
        (lambda: linen.convert(rngs())): "must be a Linen module.*got Rngs",
        (lambda: linen.convert(Block(), use_bias=False)): "momentum.*got use_bias",
        (lambda: linen.converted(typo=1).__enter__()): "got typo",
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_checkpoints_of_converted_models(tmp_path):
    x, model = batch(), linen.convert(Block())
    variables = Block().init(KEY, x)
    _, updates = model.apply(variables, x, mutable=["batch_stats"])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "linen", variables | updates)
        network = nnx.convert(Network(flax_nnx.BatchNorm, rngs()))
        checkpointer.save(tmp_path / "nnx", flax_nnx.state(network))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "linen", variables)
        original = Network(flax_nnx.BatchNorm, flax_nnx.Rngs(5))
        state = checkpointer.restore(tmp_path / "nnx", flax_nnx.state(original))
    assert bits(restored) == bits(variables | updates)
    flax_nnx.update(original, state)
    assert bits(arrays(original)) == bits(arrays(network))
