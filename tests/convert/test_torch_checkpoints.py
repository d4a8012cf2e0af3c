"""Checkpoints as people have them: half precision, wrappers, NNX; errors that name the cause."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.numpy_reference import channel_moments, error, sample
from helpers.state_dicts import assert_same, prefixed, shapes, torch_or_skip, vectors

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.torch import from_state_dict, match_names, to_state_dict

HALF = {"float16": np.float16, "bfloat16": jnp.bfloat16}


def in_linen(params, stats, batches):
    layer = jaxbn.linen.BatchNorm2d(4, axis=-1, use_running_average=False)

    def step(stats, x):
        _, updates = layer.apply({"params": params, "batch_stats": stats}, x, mutable="batch_stats")
        return updates["batch_stats"], None

    return jax.lax.scan(step, stats, batches)[0]


def in_nnx(params, stats, batches):
    model = jaxbn.nnx.BatchNorm2d(4, axis=-1, rngs=nnx.Rngs(0))
    nnx.update(model, params, stats)
    graph, state = nnx.split(model)

    def step(state, x):
        layer = nnx.merge(graph, state)
        layer(x)
        return nnx.state(layer), None

    state, _ = jax.lax.scan(step, state, batches)
    return nnx.to_pure_dict(nnx.state(nnx.merge(graph, state), nnx.BatchStat))


def with_functions(params, stats, batches):
    def step(stats, x):
        return jaxbn.batch_norm(x, stats, params["scale"], params["bias"], train=True)[1], None

    start = jaxbn.BatchStats.from_mapping(stats)
    return jax.lax.scan(step, start, batches)[0]._asdict()


@pytest.mark.parametrize("train", [in_linen, in_nnx, with_functions])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_trains(dtype, train):
    state_dict = vectors(4, HALF[dtype])
    params, stats = jax.tree.map(jnp.asarray, from_state_dict(state_dict))
    assert shapes(params) == dict.fromkeys(("scale", "bias"), ((4,), dtype))
    assert {k: v.dtype for k, v in stats.items()} == {"mean": "f4", "var": "f4", "count": "i4"}
    for name in ("mean", "var"):
        assert_same(stats[name], np.float32(state_dict[f"running_{name}"]))

    batches = jnp.asarray(sample((3, 2, 4, 4, 4), 5, 3.0, 2.0), HALF[dtype])
    mean, var = (np.float64(stats[name]) for name in ("mean", "var"))
    for x in np.asarray(batches):
        new, spread, n = channel_moments(x, -1)
        mean, var = 0.9 * mean + 0.1 * new, 0.9 * var + 0.1 * spread * n / (n - 1)
    trained = train(params, stats, batches)
    assert {k: v.dtype for k, v in trained.items()} == {k: v.dtype for k, v in stats.items()}
    assert trained["count"] == 10
    assert error(trained["mean"], mean) <= 1e-6
    assert error(trained["var"], var) <= 1e-6


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_and_back(dtype):
    state_dict = vectors(4, HALF[dtype])
    trees = from_state_dict(state_dict)
    assert_same(to_state_dict(*trees, statistics_dtype=HALF[dtype]), state_dict)
    widened = to_state_dict(*trees)
    assert widened["running_var"].dtype == np.float32
    torch = torch_or_skip()
    layer = torch.nn.BatchNorm2d(4).to(getattr(torch, dtype))
    for values in (state_dict, widened):
        layer.load_state_dict({k: torch.from_numpy(v.astype("f4")) for k, v in values.items()})
        assert_same(from_state_dict(layer.state_dict()), trees)


def test_statistics_beyond_half_precision():
    _, stats = from_state_dict(vectors(3) | {"running_var": np.float32([1, 1e6, 2])})
    with pytest.raises(ValueError, match=r"`running_var` must fit into float16; got 1000000\.0\."):
        to_state_dict({}, stats, statistics_dtype="float16")
    back = to_state_dict({}, stats, statistics_dtype=jnp.bfloat16)
    assert_same(back["running_var"], np.asarray([1, 1e6, 2], jnp.bfloat16))


WORDS = jnp.array([[1, 0, 6], [3, 3, 2]])


class Words(nn.Module):
    """An embedding, a PReLU, a dense layer, a convolution over time."""

    @nn.compact
    def __call__(self, x):
        x = nn.PReLU(name="act")(nn.Embed(7, 7, name="emb")(x))
        return nn.Conv(7, (3,), padding=1, name="conv")(nn.Dense(7, use_bias=False, name="fc")(x))


class WordsOfNnx(nnx.Module):
    """The same, its layers in a list."""

    def __init__(self, rngs):
        self.layers = nnx.List(
            [
                nnx.Embed(7, 7, rngs=rngs),
                nnx.PReLU(),
                nnx.Linear(7, 7, use_bias=False, rngs=rngs),
                nnx.Conv(7, 7, (3,), padding=1, rngs=rngs),
            ]
        )

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def words():
    """All weights are squares, so that their shapes tell nothing."""
    entries = {"emb.weight": (7, 7), "act.weight": (1,), "fc.weight": (7, 7)}
    entries |= {"conv.weight": (7, 7, 3), "conv.bias": (7,)}
    return {k: sample(s, i, dtype=np.float32) for i, (k, s) in enumerate(entries.items())}


def states(model):
    """The collections of an NNX model."""
    return {"params": nnx.state(model, nnx.Param), "batch_stats": nnx.state(model, nnx.BatchStat)}


def output_of_words(state_dict):
    """What torch computes, in NumPy."""
    embedding, slope, fc, conv, bias = (np.float64(v) for v in state_dict.values())
    x = embedding[WORDS]
    x = np.where(x > 0, x, slope * x) @ fc.T
    x = np.pad(x, ((0, 0), (1, 1), (0, 0)))
    return sum(x[:, i : i + 3] @ conv[:, :, i].T for i in range(3)) + bias


def test_embeddings_and_prelu_in_linen():
    state_dict, names = words(), {name: name for name in ("emb", "act", "fc", "conv")}
    variables = jax.eval_shape(Words().init, jax.random.key(0), WORDS)
    params, stats = from_state_dict(state_dict, names=names, variables=variables)
    assert shapes(params) == shapes(variables["params"])
    assert_same(params["emb"]["embedding"], state_dict["emb.weight"])
    y = Words().apply({"params": params}, WORDS)
    assert error(y, output_of_words(state_dict)) <= 1e-5
    assert_same(to_state_dict(params, stats, names=names), state_dict)


def test_embeddings_and_prelu_in_nnx():
    state_dict = words()
    names = {name: f"layers/{i}" for i, name in enumerate(("emb", "act", "fc", "conv"))}
    model = WordsOfNnx(nnx.Rngs(0))
    nnx.update(model, *from_state_dict(state_dict, names=names, variables=states(model)))
    assert error(model(WORDS), output_of_words(state_dict)) <= 1e-5
    assert_same(to_state_dict(*states(model).values(), names=names), state_dict)


def test_the_referee_is_torch():
    torch = torch_or_skip()
    emb, act, fc = torch.nn.Embedding(7, 7), torch.nn.PReLU(), torch.nn.Linear(7, 7, bias=False)
    conv = torch.nn.Conv1d(7, 7, 3, padding=1)
    model = torch.nn.ModuleDict({"emb": emb, "act": act, "fc": fc, "conv": conv})
    state_dict = words()
    model.load_state_dict({k: torch.from_numpy(v) for k, v in state_dict.items()})
    y = conv(fc(act(emb(torch.tensor(np.array(WORDS))))).mT).mT.detach()
    assert error(y, output_of_words(state_dict)) <= 1e-5


@pytest.mark.parametrize(
    ("shape", "kinds"),
    [
        ((1,), "a norm without bias or a PReLU"),
        ((5,), "a norm without bias or a PReLU"),
        ((9, 4), "a dense layer without bias or an embedding"),
        ((5, 4, 3), "a Conv1d, a ConvTranspose1d that `transposed` lacks or a Bilinear"),
    ],
)
def test_a_layer_that_may_be_of_two_kinds(shape, kinds):
    state_dict = prefixed("fc.", {"weight": np.ones((2, 3)), "bias": np.ones(2)})
    state_dict |= {"x.weight": np.ones(shape)}
    with pytest.raises(ValueError, match="Pass what the model's init returns, or jax") as caught:
        from_state_dict(state_dict, names={"fc": "fc", "x": "x"})
    assert str(caught.value).endswith(f'of it.\n\t"x.weight" of shape {shape}: {kinds}')
    with pytest.raises(ValueError, match="the kinds of these layers are unknown"):
        from_state_dict({"weight": np.ones(shape)})


class Digits(nnx.Module):
    """Children in lists, in a Sequential, in a dict of digits, and named by a digit."""

    def __init__(self, rngs):
        def layers():
            return nnx.Linear(3, 3, rngs=rngs), jaxbn.nnx.BatchNorm1d(3, rngs=rngs)

        self.blocks = nnx.List([nnx.List(layers()) for _ in range(11)])
        self.seq = nnx.Sequential(*layers(), nnx.relu, nnx.PReLU())
        self.dict = nnx.Dict({"0": layers()[0], "10": layers()[1]})
        setattr(self, "7", layers()[0])


@pytest.mark.parametrize("pure", [False, True])
def test_trees_of_nnx_have_the_keys_of_the_model(pure):
    model = Digits(nnx.Rngs(0))
    variables = states(model)
    if pure:
        variables = {name: nnx.to_pure_dict(state) for name, state in variables.items()}
    dense = [f"blocks/{i}/0" for i in range(11)] + ["seq/layers/0", "dict/0", "7"]
    norms = [f"blocks/{i}/1" for i in range(11)] + ["seq/layers/1", "dict/10"]
    names = {path.replace("/", "."): path for path in (*dense, *norms, "seq/layers/3")}
    state_dict = {"seq.layers.3.weight": np.float32([0.2])}
    for i, path in enumerate(dense):
        entries = {"weight": sample((3, 3), i), "bias": sample((3,), i + 50)}
        state_dict |= prefixed(path.replace("/", ".") + ".", jax.tree.map(np.float32, entries))
    for i, path in enumerate(norms):
        state_dict |= prefixed(path.replace("/", ".") + ".", vectors(3, seed=i))

    params, batch_stats = from_state_dict(state_dict, names=names, variables=variables)
    pure_dicts = [nnx.to_pure_dict(state) for state in states(model).values()]
    assert [shapes(tree) for tree in (params, batch_stats)] == [*map(shapes, pure_dicts)]
    nnx.update(model, params, batch_stats)
    assert_same(model.blocks[10][0].kernel[...], state_dict["blocks.10.0.weight"].T)
    assert_same(model.dict["10"].var[...], state_dict["dict.10.running_var"])
    back = to_state_dict(*states(model).values(), names=names)
    assert back.keys() == state_dict.keys()
    assert_same(back, state_dict)


def test_nnx_without_statistics():
    model = nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    state_dict = {"0.weight": sample((2, 2), 0), "0.bias": sample((2,), 1)}
    trees = from_state_dict(state_dict, names={"0": "layers/0"}, variables=states(model))
    nnx.update(model, *trees)
    assert_same(model.layers[0].kernel[...], state_dict["0.weight"].T)


ENTRIES = prefixed("net.conv.", {"weight": np.ones((2, 2, 3, 3)), "bias": np.ones(2)})
ENTRIES |= prefixed("net.bn.", vectors(2))
NAMES = {"net.conv": "conv", "net.bn": "bn"}


@pytest.mark.parametrize(
    "renamed",
    [
        lambda key: key.replace("conv.", "conv._orig_mod."),
        lambda key: key.replace("net.", "net._orig_mod."),
        lambda key: f"_fsdp_wrapped_module.{key}",
        lambda key: f"module._fsdp_wrapped_module.{key.replace('bn.', 'bn._fsdp_wrapped_module.')}",
        lambda key: key.replace("net.", "net._fsdp_wrapped_module._checkpoint_wrapped_module."),
        lambda key: f"_orig_mod.module.module._orig_mod._orig_mod.{key}",
    ],
)
@pytest.mark.parametrize("averaged", [False, True])
def test_wrappers(renamed, averaged):
    state_dict = {renamed(key): value for key, value in ENTRIES.items()}
    if averaged:
        state_dict = {"n_averaged": np.array(3)} | prefixed("module.", state_dict)
    expected = from_state_dict(ENTRIES, names=NAMES)
    assert_same(from_state_dict(state_dict, names=NAMES), expected)
    wrapped = [key.rpartition(".")[0] for key in state_dict if key != "n_averaged"]
    paths = [NAMES[key.rpartition(".")[0]] for key in ENTRIES]
    names = dict(zip(wrapped, paths, strict=True))
    assert_same(from_state_dict(state_dict, names=names), expected)
    assert to_state_dict(*expected, names=names).keys() == state_dict.keys() - {"n_averaged"}


def test_a_wrapper_hides_no_entry():
    state_dict = ENTRIES | {"net._orig_mod.bn.weight": np.zeros(2)}
    with pytest.raises(ValueError, match=r'Unexpected key.*"net\._orig_mod\.bn\.weight"'):
        from_state_dict(state_dict, names=NAMES)
    with pytest.raises(ValueError, match=r'Unexpected key.*"n_averaged"'):
        from_state_dict(ENTRIES | {"n_averaged": np.array(3)}, names=NAMES)


def test_averaged_models_of_torch():
    torch = torch_or_skip()
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    averaged = torch.optim.swa_utils.AveragedModel(torch.compile(net, backend="eager"))
    names = {"0": "fc", "1": "bn"}
    expected = from_state_dict(net.state_dict(), names=names)
    assert_same(from_state_dict(averaged.state_dict(), names=names), expected)
    net[1] = torch.compile(net[1], backend="eager")
    assert "1._orig_mod.weight" in net.state_dict()
    assert_same(from_state_dict(net.state_dict(), names=names), expected)


def modules_of_torch(torch):
    """A network of layers that Flax has no equal of, and what is said of each."""
    norms, linear = torch.nn.utils, torch.nn.Linear
    prune = pytest.importorskip("torch.nn.utils.prune", reason="torch is not installed")
    modules = {
        "rnn": (torch.nn.RNN(3, 3), "a recurrent layer (LSTM, GRU, RNN), which is not converted"),
        "lstm": (torch.nn.LSTM(3, 3, 2, bidirectional=True, proj_size=2), "a recurrent layer"),
        "cell": (torch.nn.GRUCell(3, 3), "a recurrent layer"),
        "mha": (torch.nn.MultiheadAttention(4, 2), "attention (MultiheadAttention), which is not"),
        "kv": (torch.nn.MultiheadAttention(4, 2, kdim=3, vdim=5, add_bias_kv=True), "attention"),
        "new": (
            norms.parametrizations.weight_norm(linear(3, 3)),
            "a parametrized module. Remove that first: torch.nn.utils.parametrize."
            'remove_parametrizations(module, "weight").',
        ),
        "orthogonal": (norms.parametrizations.orthogonal(linear(3, 3)), "a parametrized module"),
        "spectral": (
            norms.spectral_norm(linear(3, 3)),
            "a module with spectral_norm. Remove it first: torch.nn.utils.remove_spectral_norm(",
        ),
        "pruned": (
            prune.l1_unstructured(linear(3, 3), "weight", 1),
            "a pruned module. Make that final first: torch.nn.utils.prune.remove(module, ",
        ),
    }
    net = torch.nn.ModuleDict({name: module for name, (module, _) in modules.items()})
    return net, {name: what for name, (_, what) in modules.items()}


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
def test_layers_that_cannot_be_imported():
    torch = torch_or_skip()
    net, expected = modules_of_torch(torch)
    with pytest.raises(ValueError, match="has modules that cannot be imported") as caught:
        from_state_dict(prefixed("net.", net.state_dict()), "net.", names={"lstm": "lstm"})
    _, *lines = str(caught.value).split("\n\t")
    assert "Missing" not in str(caught.value)
    assert [line.split('"')[1] for line in lines] == [f"net.{name}" for name in expected]
    for line, (name, what) in zip(lines, expected.items(), strict=True):
        assert line.startswith(f'"net.{name}" is {what}')


TWO = {"weight": np.ones((3, 2)), "bias": np.ones(3)}
UP = prefixed("up.", {"weight": np.ones((4, 2, 3, 3)), "bias": np.ones(2)})
UP_KERNEL = {"kernel": np.ones((3, 3, 4, 2)), "bias": np.ones(2)}
V6 = np.ones(6)
WORD = {"emb.weight": sample((5, 2), 0)}
TIED = {"emb": {"embedding": np.ones((5, 2))}}
MODEL = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
BOXED = nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "model"))).init(
    jax.random.key(0), jnp.ones((1, 2))
)
INIT = "`variables` must be what the model's init returns, with the collections params and "
OF_NNX = (
    "Of an NNX model pass {'params': nnx.state(model, nnx.Param), 'batch_stats': nnx.state(model, "
    "nnx.BatchStat)}."
)
NESTED = "`state_dict` must map names to arrays; got a checkpoint of "
MODEL_VARIABLES = {
    "params": {
        "conv": {"kernel": np.ones((3, 3, 2, 2)), "bias": np.ones(2)},
        "bn": {"scale": np.ones(2), "bias": np.ones(2)},
    },
    "batch_stats": {"bn": {"mean": np.ones(2), "var": np.ones(2), "count": np.int32(0)}},
}

CASES = {
    "a checkpoint": (
        lambda: from_state_dict({"state_dict": TWO, "epoch": 3, "best": np.float64(0.9)}),
        ValueError,
        f"{NESTED}['best', 'epoch', 'state_dict']. Pass state_dict['state_dict'].",
    ),
    "a checkpoint of two": (
        lambda: from_state_dict({"model": ENTRIES, "ema": ENTRIES}, names=NAMES),
        ValueError,
        f"{NESTED}['ema', 'model']. Pass state_dict['model'] or state_dict['ema'].",
    ),
    "a checkpoint with a prefix, deeper": (
        lambda: from_state_dict(
            {
                "model": {"ema": {"shadow": TWO, "decay": 0.9}},
                "optimizer": {"state": {0: {"exp_avg": np.ones(3)}}, "param_groups": []},
                "callbacks": {"best": {"score": np.array(0.5)}},
            },
            "model.",
        ),
        ValueError,
        "['callbacks', 'model', 'optimizer']. Pass state_dict['model']['ema']['shadow'].",
    ),
    "a prefix that no key has": (
        lambda: from_state_dict(ENTRIES, "backbone.", names={"conv1": "conv"}),
        ValueError,
        'Missing key(s) in state_dict: "backbone.conv1.weight". \n\tNo key begins with '
        "prefix='backbone.'; they begin with net.",
    ),
    "another prefix": (
        lambda: from_state_dict(ENTRIES, "model.", names={"conv": "conv", "bn": "bn"}),
        ValueError,
        "\"model.bn.weight\". \n\tThe keys exist with prefix='net.'.",
    ),
    "a prefix without its dot": (
        lambda: from_state_dict(ENTRIES, "net", names={"conv": "conv", "bn": "bn"}),
        ValueError,
        "The keys exist with prefix='net.'.",
    ),
    "no prefix": (
        lambda: from_state_dict(
            prefixed("model.", TWO) | prefixed("ema_model.", TWO),
            variables={"params": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}},
        ),
        ValueError,
        "The keys exist with prefix='model.' or prefix='ema_model.'.",
    ),
    "a prefix too many": (
        lambda: from_state_dict(TWO, "module."),
        ValueError,
        "The keys exist with prefix=''.",
    ),
    "a module for variables": (
        lambda: from_state_dict(TWO, variables=nn.Dense(3)),
        TypeError,
        f"{INIT}batch_stats; got Dense. {OF_NNX}",
    ),
    "an nnx module for variables": (
        lambda: from_state_dict(TWO, variables=MODEL),
        TypeError,
        f"{INIT}batch_stats; got Linear. {OF_NNX}",
    ),
    "a tuple for variables": (
        lambda: from_state_dict(TWO, variables=({}, {})),
        TypeError,
        f"{INIT}batch_stats; got tuple.",
    ),
    "the state of a model for variables": (
        lambda: from_state_dict(TWO, variables=nnx.state(MODEL)),
        ValueError,
        f"{INIT}batch_stats; got ['bias', 'kernel']. {OF_NNX}",
    ),
    "a list of layers for variables": (
        lambda: from_state_dict(TWO, variables={0: {}, "a": {}}),
        ValueError,
        f"{INIT}batch_stats; got ['0', 'a'].",
    ),
    "a tuple for params": (
        lambda: from_state_dict(TWO, variables={"params": ({},)}),
        TypeError,
        "`params` must be nested dicts of arrays; got tuple.",
    ),
    "a module for params, the way back": (
        lambda: to_state_dict(MODEL, {}),
        TypeError,
        "`params` must be nested dicts of arrays; got Linear.",
    ),
    "no statistics, the way back": (
        lambda: to_state_dict({}, None),
        TypeError,
        "`batch_stats` must be nested dicts of arrays; got NoneType.",
    ),
    "boxes": (
        lambda: from_state_dict(TWO, variables=BOXED),
        TypeError,
        "`params/kernel` must be an array; got Partitioned, a box. Take all out of their boxes "
        "first, with flax.linen.meta.unbox(variables).",
    ),
    "old weight_norm": (
        lambda: from_state_dict(
            prefixed("a.b.", {"weight_g": np.ones((3, 1)), "weight_v": np.ones((3, 2))}),
            names={"a.b": "fc"},
        ),
        ValueError,
        'cannot be imported:\n\t"a.b" is a module with weight_norm. Remove it first: '
        "torch.nn.utils.remove_weight_norm(module).",
    ),
    "one recurrent layer": (
        lambda: from_state_dict({"weight_ih_l0": np.ones((4, 1))}),
        ValueError,
        "The layer is a recurrent layer (LSTM, GRU, RNN), which is not converted. Leave it "
        "out of the dict and of `variables`, and convert its weights by hand.",
    ),
    "flattened by FSDP": (
        lambda: from_state_dict({"_fsdp_wrapped_module._flat_param": np.ones(9)}, names=NAMES),
        ValueError,
        "The layer is a module of FSDP whose weights are flattened. Save the whole ones: ",
    ),
    "a quantized layer": (
        lambda: from_state_dict({"fc.scale": 1.0, "fc._packed_params.dtype": None}, "fc."),
        ValueError,
        '"fc" is a quantized module. Import the weights that it was made of.',
    ),
    "transposed forgotten": (
        lambda: from_state_dict(UP, names={"up": "up"}, variables={"params": {"up": UP_KERNEL}}),
        ValueError,
        "These fit as transposed convolutions: pass transposed=['up'].",
    ),
    "transposed forgotten, without variables": (
        lambda: from_state_dict(prefixed("m.", UP), "m.", names={"up": "up"}),
        ValueError,
        "These fit as transposed convolutions: pass transposed=['up'].",
    ),
    "transposed forgotten, a square": (
        lambda: from_state_dict(
            prefixed("up.", {"weight": np.ones((2, 2, 3, 3))}),
            names={"up": "ConvTranspose_0"},
            variables={"params": {"ConvTranspose_0": {"kernel": np.ones((3, 3, 2, 2))}}},
        ),
        ValueError,
        "`transposed` must hold the names of all transposed convolutions; it lacks 'up', whose "
        "Flax module is ConvTranspose_0.",
    ),
    "transposed forgotten, the way back": (
        lambda: to_state_dict({"ConvTranspose_12": UP_KERNEL}, {}, names={"": "ConvTranspose_12"}),
        ValueError,
        "it lacks '', whose Flax module is ConvTranspose_12.",
    ),
    "transposed that is not": (
        lambda: from_state_dict(
            prefixed("conv.", {"weight": np.ones((4, 2, 3, 3)), "bias": np.ones(4)}),
            names={"conv": "conv"},
            transposed=["conv"],
        ),
        ValueError,
        "These fit if `transposed` does not have them: ['conv'].",
    ),
    "groups of a transposed convolution": (
        lambda: from_state_dict({"weight": np.ones((4, 3, 2)), "bias": V6}, transposed=[""]),
        ValueError,
        '"weight" is of a transposed convolution with groups, which Flax does not have.',
    ),
    "a norm over several axes": (
        lambda: from_state_dict({"weight": np.ones((6, 2)), "bias": np.ones((6, 2))}),
        ValueError,
        '"weight" is of a LayerNorm over several axes, which is not converted. Leave it out of',
    ),
    "tied weights": (
        lambda: from_state_dict(
            WORD | {"head.weight": WORD["emb.weight"].copy(), "head.note": "tied"},
            names={"emb": "emb"},
            variables={"params": TIED},
        ),
        ValueError,
        '"head.weight" has the values of "emb.weight". If they are tied, leave it out.',
    ),
    "tied weights of a file that has them once": (
        lambda: from_state_dict(
            WORD,
            names={"emb": "emb", "head": "head"},
            variables={"params": TIED | {"head": {"kernel": np.ones((2, 5))}}},
        ),
        ValueError,
        'Missing key(s) in state_dict: "head.weight". \n\tIf "head.weight" is tied to '
        '"emb.weight", add it: a file has tied weights once.',
    ),
    "tied weights at one path": (
        lambda: from_state_dict(WORD, names={"emb": "emb", "head": "emb"}),
        ValueError,
        "got twice: ['emb']. Of modules that share their weights name one, and leave the entries "
        "of the others out.",
    ),
    "slopes of channels": (
        lambda: from_state_dict(
            {"weight": np.ones(4)}, variables={"params": {"negative_slope": np.ones(())}}
        ),
        ValueError,
        "size mismatch for weight: copying a param with shape torch.Size([4]) from checkpoint, "
        "the shape in current model is torch.Size([1]).",
    ),
    **{
        f"another dtype of statistics, {dtype}": (
            lambda dtype=dtype: to_state_dict({}, {}, statistics_dtype=dtype),
            TypeError,
            "`statistics_dtype` must be one of bfloat16, float16, float32, float64, or None; got "
            f"{dtype}.",
        )
        for dtype in ("int8", "bf16", "torch.bfloat16")
    },
    "the state of an optimizer": (
        lambda: from_state_dict({"state": {0: {"step": np.ones(())}}, "param_groups": [{}]}),
        ValueError,
        "`state_dict` must be that of a model; got that of an optimizer, with state and",
    ),
    "the state of an optimizer, to be matched": (
        lambda: match_names({"state": {}, "param_groups": [{}]}, {}),
        ValueError,
        "`state_dict` must be that of a model; got that of an optimizer, with state and",
    ),
    "a model without names": (
        lambda: from_state_dict(ENTRIES),
        ValueError,
        "\n\tThese are several layers. For a model pass names=match_names(state_dict, variables), "
        "and `variables`.",
    ),
    "a model without names, but with variables": (
        lambda: from_state_dict(ENTRIES, variables=MODEL_VARIABLES),
        ValueError,
        "\n\tThese are several layers. For a model pass names=match_names(state_dict, variables), "
        "and `variables`.",
    ),
    "a model without names, the way back": (
        lambda: to_state_dict(MODEL_VARIABLES["params"], MODEL_VARIABLES["batch_stats"]),
        ValueError,
        "\n\t`names` is missing: of a model pass those of its import.",
    ),
    "all variables for params": (
        lambda: to_state_dict(MODEL_VARIABLES, {}, names={"bn": "bn"}),
        ValueError,
        '\n\t`params` has all collections: pass variables["params"] in its place.',
    ),
    "names that end in a dot": (
        lambda: from_state_dict(ENTRIES, names={"net.conv.": "conv", "net.bn": "bn"}),
        ValueError,
        "The keys of `names` must not end in a dot; got ['net.conv.'].",
    ),
    "names of entries": (
        lambda: from_state_dict(ENTRIES, names={"conv.weight": "conv", "bn": "bn"}, prefix="net."),
        ValueError,
        "\n\t`names` must have modules of torch as keys: 'conv' instead of 'conv.weight'.",
    ),
    "paths with a collection": (
        lambda: from_state_dict(
            ENTRIES, "net.", names={"conv": "params/conv", "bn": "bn"}, variables=MODEL_VARIABLES
        ),
        ValueError,
        "\n\tPaths in `names` begin inside of a collection: 'conv' instead of 'params/conv'.",
    ),
    "paths with a collection, the way back": (
        lambda: to_state_dict(MODEL_VARIABLES["params"], {}, names={"conv": "params/conv"}),
        ValueError,
        "\n\tPaths in `names` begin inside of a collection: 'conv' instead of 'params/conv'.",
    ),
    "no collection of statistics": (
        lambda: from_state_dict(
            ENTRIES,
            "net.",
            names={"conv": "conv", "bn": "bn"},
            variables={"params": MODEL_VARIABLES["params"]},
        ),
        ValueError,
        "\n\t`variables` has no statistics. If the model keeps some, pass the collection "
        "batch_stats, too.",
    ),
    "no collection of statistics, to be matched": (
        lambda: match_names(ENTRIES, {"params": {"norm": MODEL_VARIABLES["params"]["bn"]}}),
        ValueError,
        "\n\t`variables` has no statistics. If the model keeps some, pass the collection "
        "batch_stats, too.",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_cause_is_named(case):
    call, kind, message = CASES[case]
    with pytest.raises(kind, match=re.escape(message)):
        call()


def test_a_checkpoint_with_a_module():
    torch = torch_or_skip()
    with pytest.raises(ValueError, match=re.escape("Pass state_dict['model'].state_dict().")):
        from_state_dict({"model": torch.nn.Linear(2, 3), "epoch": 1})
