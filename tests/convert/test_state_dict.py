"""`state_dict`s as Flax variables and back: layouts, bits, judgement; live against torch."""

import copy
import functools
import importlib.util
import pathlib
import re
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze
from helpers.numpy_reference import evaluate, sample
from helpers.state_dicts import assert_same, prefixed, shapes, torch_or_skip, vectors
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxbn import linen
from jaxbn.torch import from_state_dict, match_names, to_state_dict

DTYPES = {"float16": np.float16, "bfloat16": jnp.bfloat16, "float32": np.float32, "float64": float}
GUIDE = pathlib.Path(__file__).parents[2] / "docs" / "torch.md"


def network():
    """One of each kind of layer, the names and the transposed ones."""
    shapes = {"conv": (8, 3, 3, 2), "up": (8, 5, 2, 3), "fc": (4, 5), "norm": (4,)}
    state_dict = prefixed("block.0.bn.", vectors(8))
    for name, shape in shapes.items():
        outputs = shape[1] if name == "up" else shape[0]
        state_dict[f"{name}.weight"] = sample(shape, 1, dtype=np.float32)
        state_dict[f"{name}.bias"] = sample((outputs,), 2, dtype=np.float32)
    names = {"block.0.bn": "block_0/bn"} | {name: name for name in shapes}
    return state_dict, names


def test_one_layer():
    state_dict = vectors(3)
    params, stats = from_state_dict(prefixed("net.bn.", state_dict) | {"other": None}, "net.bn.")
    assert list(params) == ["scale", "bias"]
    assert list(stats) == ["mean", "var", "count"]
    vector = ((3,), "float32")
    assert shapes(stats) == {"mean": vector, "var": vector, "count": ((), "int32")}

    x = sample((4, 3, 5), 1)
    scale, bias, mean, var, _ = state_dict.values()
    y = linen.BatchNorm1d(3).apply({"params": params, "batch_stats": stats}, jnp.float32(x), True)
    np.testing.assert_allclose(
        y, evaluate(x, mean, var, scale, bias, np.ones_like(x), 1).y, rtol=1e-5, atol=1e-5
    )
    assert to_state_dict(params, stats, "net.bn.").keys() == prefixed("net.bn.", state_dict).keys()


@pytest.mark.parametrize(
    ("spatial", "transposed"),
    [
        ((), False),
        *[(sizes, flag) for sizes in ((3,), (3, 2), (2, 3, 4)) for flag in (False, True)],
    ],
)
def test_every_element_of_a_weight_is_where_flax_has_it(spatial, transposed):
    weight = np.arange(5 * 4 * np.prod(spatial, dtype=int)).reshape(5, 4, *spatial) / 2
    flags = {"names": {"w": "w"}, "transposed": ["w"] if transposed else []}
    expected = np.zeros(spatial + ((5, 4) if transposed else (4, 5)))
    variables = {"params": {"w": {"kernel": expected}}}
    params, stats = from_state_dict({"w.weight": weight}, variables=variables, **flags)
    kernel = params["w"]["kernel"]
    assert kernel.flags.c_contiguous
    assert kernel.shape == expected.shape
    assert stats == {}
    for first, second, *position in np.ndindex(weight.shape):
        if transposed:
            flipped = [size - 1 - i for size, i in zip(spatial, position, strict=True)]
            assert kernel[(*flipped, first, second)] == weight[(first, second, *position)]
        else:
            assert kernel[(*position, second, first)] == weight[(first, second, *position)]
    back = to_state_dict(params, {}, **flags)["w.weight"]
    assert_same(back, weight)
    assert back.flags.c_contiguous


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # by the test
@pytest.mark.parametrize("dtype", DTYPES)
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_every_bit_survives(dtype, data):
    dtype = np.dtype(DTYPES[dtype])

    def bits(*shape):
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), dtype).reshape(
            shape
        )

    def finite(vector):
        wide = vector.astype(np.float64)
        return np.where(np.isfinite(wide), vector, np.array(-0.0, dtype))

    state_dict = {
        "conv.weight": bits(2, 3, 2, 1),
        "conv.bias": bits(2),
        "up.weight": bits(2, 1, 2),
        "fc.weight": bits(3, 2),
        "fc.bias": bits(3),
        "bn.weight": bits(2),
        "bn.bias": bits(2),
        "bn.running_mean": finite(bits(2)),
        "bn.running_var": np.abs(finite(bits(2))),
        "bn.num_batches_tracked": np.array(data.draw(st.integers(0, 2**31 - 1))),
    }
    names = {name: name for name in ("conv", "up", "fc", "bn")}
    params, stats = from_state_dict(state_dict, names=names, transposed=["up"])
    back = to_state_dict(
        params, stats, names=names, transposed=["up"], statistics_dtype=dtype.newbyteorder("=")
    )
    assert list(back) == list(state_dict)
    for key, value in state_dict.items():
        assert back[key].dtype == value.dtype
        assert back[key].shape == value.shape
        assert back[key].tobytes() == value.tobytes()


def test_results_are_copies():
    state_dict, names = network()
    trees = from_state_dict(state_dict, names=names, transposed=["up"])
    before = jax.tree.map(np.copy, trees)
    back = to_state_dict(*trees, names=names, transposed=iter(["up"]))
    assert_same(back, state_dict)
    assert all(v.flags.writeable and v.flags.c_contiguous for v in back.values())
    for value in state_dict.values():
        value[...] = 9
    for value in back.values():
        value[...] = 8
    assert_same(trees, before)


def test_strided_foreign_and_jax_arrays():
    scale = np.arange(6.0, dtype=np.float32)[::2]
    for weight in (scale, scale.astype(">f4"), jnp.asarray(scale)):
        params, _ = from_state_dict(vectors(3) | {"weight": weight})
        assert_same(params["scale"], np.array([0, 2, 4], np.float32))
        assert params["scale"].dtype.isnative


@pytest.mark.parametrize(
    "wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_wrappers_are_taken_off_and_put_back(wrapper):
    state_dict, names = network()
    expected = from_state_dict(state_dict, names=names, transposed=["up"])
    wrapped = prefixed(wrapper, state_dict)
    assert_same(from_state_dict(wrapped, names=names, transposed=["up"]), expected)
    assert_same(from_state_dict(wrapped, wrapper, names=names, transposed=["up"]), expected)
    back = to_state_dict(*expected, wrapper, names=names, transposed=["up"])
    assert list(back) == list(wrapped)

    layer = from_state_dict(vectors(3))
    assert_same(from_state_dict(prefixed(wrapper + "bn.", vectors(3)), "bn."), layer)
    # A module of that name is no wrapper.
    named = from_state_dict(prefixed("module.bn.", vectors(3)), names={"module.bn": "bn"})
    assert_same(named, ({"bn": layer[0]}, {"bn": layer[1]}))
    with pytest.raises(ValueError, match=r'Missing key\(s\) in state_dict: "weight"'):
        from_state_dict(prefixed("module.", vectors(3)) | {"epoch": 1})


class Flax(nn.Module):
    """The model of `network`, whose batch norm is one of several kinds."""

    batch_norm: nn.Module

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 2), name="conv")(x)
        x = Inner(self.batch_norm, name="block_0")(x)
        x = nn.ConvTranspose(5, (2, 3), name="up")(x)
        return nn.LayerNorm(name="norm")(nn.Dense(4, name="fc")(x))


class Inner(nn.Module):
    batch_norm: nn.Module

    @nn.compact
    def __call__(self, x):
        return self.batch_norm.copy(name="bn")(x)


NORMS = {
    "BatchNorm2d": linen.BatchNorm2d(8, axis=-1, use_running_average=True),
    "BatchNorm": linen.BatchNorm(use_running_average=True),
    "of Flax": nn.BatchNorm(use_running_average=True),
}


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_a_model_decides_about_its_variables(norm, counted):
    state_dict, names = network()
    if not counted:
        del state_dict["block.0.bn.num_batches_tracked"]
    x, model = jnp.ones((1, 4, 4, 3)), Flax(NORMS[norm])
    abstract = jax.eval_shape(lambda: model.init(jax.random.key(0), x))
    variables = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), abstract)
    results = [
        from_state_dict(state_dict, names=names, transposed=["up"], variables=form)
        for form in (variables, freeze(variables), abstract)
    ]
    params, stats = results[0]
    for other in results[1:]:
        assert_same(other, results[0])
    assert shapes({"params": params, "batch_stats": stats}) == shapes(variables)
    assert_same(params["block_0"]["bn"]["scale"], state_dict["block.0.bn.weight"])
    if norm == "BatchNorm2d":
        assert stats["block_0"]["bn"]["count"] == (7 if counted else 0)
    y = jax.eval_shape(model.apply, {"params": params, "batch_stats": stats}, x)
    assert y.shape == (1, 4, 4, 4)
    back = to_state_dict(freeze(params), freeze(stats), names=names, transposed=["up"])
    assert back.keys() >= state_dict.keys() - {"block.0.bn.num_batches_tracked"}
    for key in back.keys() & state_dict.keys():
        assert_same(back[key], state_dict[key])


@pytest.mark.parametrize(
    "flags", [{"affine": False}, {"bias": False}, {"track_running_stats": False}, {}], ids=str
)
def test_what_the_dict_lacks_the_layer_lacks(flags):
    x = jnp.ones((2, 3))
    variables = linen.BatchNorm1d(3, **flags).init(jax.random.key(0), x, True)
    state_dict = vectors(3)
    if "affine" in flags:
        del state_dict["weight"]
    if "affine" in flags or "bias" in flags:
        del state_dict["bias"]
    if "track_running_stats" in flags:
        state_dict = {k: state_dict[k] for k in ("weight", "bias")}
    params, stats = from_state_dict(state_dict)
    assert_same(from_state_dict(state_dict, variables=variables), (params, stats))
    assert shapes(params) == shapes(variables.get("params", {}))
    assert shapes(stats) == shapes(variables.get("batch_stats", {}))
    assert list(to_state_dict(params, stats)) == list(state_dict)


@pytest.mark.parametrize("entry", ["running_mean", "running_var"])
def test_one_entry_tells_the_length_of_the_others(entry):
    state_dict = {key: value for key, value in vectors(3).items() if key not in ("weight", entry)}
    with pytest.raises(ValueError, match="Missing") as error:
        from_state_dict(state_dict)
    problem = f'Missing key(s) in state_dict: "weight", "{entry}". '
    assert str(error.value) == f"Error(s) in loading state_dict for BatchNorm:\n\t{problem}"


def test_lists_of_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([nnx.Linear(3, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)])

    model = Net(nnx.Rngs(0))
    _, *states = nnx.split(model, nnx.Param, nnx.BatchStat)
    variables = dict(zip(("params", "batch_stats"), map(nnx.to_pure_dict, states), strict=True))
    names = {"0": "blocks/0", "1": "blocks/1"}
    state_dict = prefixed("1.", vectors(3))
    state_dict |= {"0.weight": sample((3, 3), 1), "0.bias": sample((3,), 2)}
    trees = from_state_dict(state_dict, names=names, variables=variables)
    nnx.update(model, *map(nnx.restore_int_paths, trees))
    _, *states = nnx.split(model, nnx.Param, nnx.BatchStat)
    back = to_state_dict(*map(nnx.to_pure_dict, states), names=names)
    del state_dict["1.num_batches_tracked"]
    assert back.keys() == state_dict.keys()
    assert_same(back, state_dict)


def test_a_layer_without_variables():
    assert from_state_dict({}, variables={}) == ({}, {})
    assert to_state_dict({}, {}) == {}


def test_counts():
    for count in (np.array(5), np.array([5]), np.array(5, np.uint8), jnp.array(5), 5):
        _, stats = from_state_dict(vectors(3) | {"num_batches_tracked": count})
        assert_same(stats["count"], np.array(5, np.int32))
    back = to_state_dict({}, stats)
    assert_same(back["num_batches_tracked"], np.array(5, np.int64))
    _, stats = from_state_dict(vectors(3) | {"num_batches_tracked": np.array(2**31 - 1)})
    assert stats["count"] == 2**31 - 1


def test_safetensors_files(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    for name, dtype in DTYPES.items():
        path = tmp_path / f"{name}.safetensors"
        state_dict = vectors(3, dtype)
        safetensors.save_file(state_dict, path)
        expected = from_state_dict(state_dict)
        for form in (path, str(path)):
            assert_same(from_state_dict(form), expected)
        assert expected[0]["scale"].dtype == dtype


def test_a_file_without_safetensors(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        from_state_dict("model.safetensors")


def bad(key, value):
    return vectors(3) | {key: value}


def net(**entries):
    state_dict, names = network()
    state_dict |= {key.replace("_", "."): value for key, value in entries.items()}
    return from_state_dict(state_dict, names=names, transposed=["up"])


LAYER = from_state_dict(vectors(3))
VARIABLES = {"params": LAYER[0], "batch_stats": LAYER[1]}
V3 = np.ones(3, np.float32)

CASES = {
    "a model in place of its dict": (
        lambda: from_state_dict(nn.Dense(3)),
        TypeError,
        "`state_dict` must map names to arrays, as model.state_dict() does, or be the path of a "
        ".safetensors file; got Dense.",
    ),
    "keys that are no names": (
        lambda: from_state_dict({0: V3}),
        TypeError,
        "`state_dict` must map names to arrays",
    ),
    "another file": (
        lambda: from_state_dict(pathlib.Path("model.pt")),
        ValueError,
        "`state_dict` as a path must end in .safetensors; got 'model.pt'. For other files pass "
        "what torch.load(path, weights_only=True) returns.",
    ),
    "a list of names": (
        lambda: from_state_dict({}, names=["bn"]),
        TypeError,
        "`names` must map torch module names to paths of Flax modules",
    ),
    "paths as tuples": (
        lambda: from_state_dict({}, names={"a": ("b", "c")}),
        TypeError,
        "for example {'layer1.0.bn1': 'layer1_0/bn1'}; got {'a': ('b', 'c')}.",
    ),
    "a layer inside of a variable": (
        lambda: from_state_dict({"a.weight": V3, "b.weight": V3}, names={"b": "a/scale", "a": "a"}),
        ValueError,
        "`names` must not put a layer inside of a variable; got ['params/a/scale/scale'].",
    ),
    "a path twice": (
        lambda: to_state_dict({}, {}, names={"a": "bn", "b": "bn", "c": "c"}),
        ValueError,
        "`names` must give each layer a path of its own; got twice: ['bn'].",
    ),
    "transposed without a name": (
        lambda: from_state_dict({}, names={"up": "up"}, transposed=["up", "down"]),
        ValueError,
        "`transposed` must hold keys of `names`; got ['down'].",
    ),
    "transposed dense": (
        lambda: from_state_dict({"weight": np.ones((3, 3))}, transposed=[""]),
        ValueError,
        "`weight` must have ndim 3 to 5 as the weight of a transposed convolution; got 2.",
    ),
    "transposed batch norm": (
        lambda: from_state_dict(vectors(3), transposed=[""]),
        ValueError,
        "`weight` must have ndim 3 to 5 as the weight of a transposed convolution; got 1.",
    ),
    "transposed batch norm, the way back": (
        lambda: to_state_dict(*LAYER, transposed=[""]),
        ValueError,
        "`params/scale` must have ndim 3 to 5 as the weight of a transposed convolution",
    ),
    "grouped transposed": (
        lambda: from_state_dict(
            {"weight": np.ones((4, 3, 2)), "bias": np.ones(6)}, transposed=[""]
        ),
        ValueError,
        "size mismatch for bias: copying a param with shape torch.Size([6]) from checkpoint, the "
        "shape in current model is torch.Size([3]).",
    ),
    "a weight without dimensions": (
        lambda: from_state_dict({"weight": np.ones(())}),
        ValueError,
        "`weight` must have ndim 1 as a scale; got 0.",
    ),
    "a weight of 6 dimensions": (
        lambda: from_state_dict({"weight": np.ones((1,) * 6)}),
        ValueError,
        "`weight` must have ndim 2 to 5 as a kernel; got 6.",
    ),
    "replicated variables": (
        lambda: to_state_dict({"scale": np.ones((8, 3))}, {}),
        ValueError,
        "`params/scale` must have ndim 1 as a scale; got 2.",
    ),
    "no entries": (
        lambda: from_state_dict(vectors(3), "bn."),
        ValueError,
        'loading state_dict for BatchNorm:\n\tMissing key(s) in state_dict: "bn.weight". ',
    ),
    "no entries of one of several": (
        lambda: from_state_dict(prefixed("a.", vectors(3)), names={"a": "a", "b": "b"}),
        ValueError,
        'loading state_dict for the model:\n\tMissing key(s) in state_dict: "b.weight". ',
    ),
    "bias alone": (
        lambda: from_state_dict({"bias": V3}),
        ValueError,
        'Missing key(s) in state_dict: "weight". ',
    ),
    "mean alone": (
        lambda: from_state_dict({"weight": V3, "bias": V3, "running_mean": V3}),
        ValueError,
        'Missing key(s) in state_dict: "running_var". ',
    ),
    "a count alone": (
        lambda: from_state_dict({"weight": V3, "num_batches_tracked": np.array(1)}),
        ValueError,
        'Missing key(s) in state_dict: "running_mean", "running_var". ',
    ),
    "a module without a name": (
        lambda: net(head_weight=V3),
        ValueError,
        'Unexpected key(s) in state_dict: "head.weight". ',
    ),
    "vectors of two lengths": (
        lambda: from_state_dict(bad("running_var", np.ones(4))),
        ValueError,
        "size mismatch for running_var: copying a param with shape torch.Size([4]) from "
        "checkpoint, the shape in current model is torch.Size([3]).",
    ),
    "statistics of a convolution": (
        lambda: from_state_dict(bad("weight", np.ones((3, 3, 3, 3)))),
        ValueError,
        "size mismatch for weight: copying a param with shape torch.Size([3, 3, 3, 3])",
    ),
    "a bias of another length": (
        lambda: net(fc_bias=np.ones(5)),
        ValueError,
        "size mismatch for fc.bias: copying a param with shape torch.Size([5]) from checkpoint, "
        "the shape in current model is torch.Size([4]).",
    ),
    "a count for each channel": (
        lambda: from_state_dict(bad("num_batches_tracked", np.ones(3, int))),
        ValueError,
        "size mismatch for num_batches_tracked: copying a param with shape torch.Size([3])",
    ),
    "integer weights": (
        lambda: from_state_dict({"weight": np.ones(3, np.int8)}),
        TypeError,
        "`weight` must have one of the dtypes bfloat16, float16, float32, float64; got int8.",
    ),
    "no array": (
        lambda: from_state_dict({"weight": None}),
        TypeError,
        "`weight` must have one of the dtypes bfloat16, float16, float32, float64; got object.",
    ),
    "complex variables": (
        lambda: to_state_dict({"fc": {"kernel": np.ones((2, 2), complex)}}, {}, names={"a": "fc"}),
        TypeError,
        "`a.weight` must have one of the dtypes",
    ),
    "a mean that is NaN": (
        lambda: from_state_dict(bad("running_mean", np.array([0, np.nan, 0], np.float32))),
        ValueError,
        "`running_mean` must be finite; got NaN or infinity.",
    ),
    "a mean that is a signaling NaN": (
        lambda: from_state_dict(
            bad("running_mean", np.full(3, 0x7F81, np.uint16).view("bfloat16"))
        ),
        ValueError,
        "`running_mean` must be finite; got NaN or infinity.",
    ),
    "an infinite variance, with a prefix that does not end in a dot": (
        lambda: from_state_dict(prefixed("bn_", bad("running_var", V3 * np.inf)), "bn_"),
        ValueError,
        "`bn_running_var` must be finite; got NaN or infinity.",
    ),
    "a negative variance": (
        lambda: from_state_dict(bad("running_var", np.array([1.0, -0.5, 1.0]))),
        ValueError,
        "`running_var` is a variance and must not be negative; got -0.5.",
    ),
    "a negative variance, the way back": (
        lambda: to_state_dict({}, {"mean": V3, "var": -V3, "count": np.int32(0)}),
        ValueError,
        "`running_var` is a variance and must not be negative; got -1.0.",
    ),
    "a float count": (
        lambda: from_state_dict(bad("num_batches_tracked", np.array(3.0))),
        TypeError,
        "`num_batches_tracked` must be an integer, the number of batches; got float64.",
    ),
    "a negative count": (
        lambda: from_state_dict(bad("num_batches_tracked", np.array(-1))),
        ValueError,
        "`num_batches_tracked` must fit into int32 and not be negative; got -1.",
    ),
    "a count that does not fit": (
        lambda: from_state_dict(bad("num_batches_tracked", np.array(2**31))),
        ValueError,
        "`num_batches_tracked` must fit into int32 and not be negative; got 2147483648.",
    ),
    "params in place of variables": (
        lambda: from_state_dict(vectors(3), variables=VARIABLES["params"]),
        ValueError,
        "`variables` must be what the model's init returns, with the collections params and "
        "batch_stats; got ['bias', 'scale'].",
    ),
    "statistics that the model does not keep": (
        lambda: from_state_dict(vectors(3), variables={"params": LAYER[0]}),
        ValueError,
        'Unexpected key(s) in state_dict: "running_mean", "running_var", "num_batches_tracked". ',
    ),
    "variables without a name": (
        lambda: from_state_dict(
            vectors(3), names={"": "bn"}, variables={"params": {"bn": LAYER[0], "fc": {"w": V3}}}
        ),
        ValueError,
        '\tVariable(s) of the model that `names` lacks: "params/fc/w". ',
    ),
    "variables without a name, the way back": (
        lambda: to_state_dict({"bn": LAYER[0], "fc": {"kernel": V3}}, {}, names={"bn1": "bn"}),
        ValueError,
        '`names` must cover every variable, so that none is lost; it lacks "params/fc/kernel".',
    ),
    "two weights of one layer": (
        lambda: to_state_dict({"scale": V3, "kernel": np.ones((3, 3))}, {}),
        ValueError,
        'it lacks "params/kernel".',
    ),
    "initializers of ONNX": (
        lambda: from_state_dict({"/a/Constant": V3, "onnx::Conv_1": V3}, names={"a": "a"}),
        ValueError,
        'Unexpected key(s) in state_dict: "/a/Constant", "onnx::Conv_1". \n\t"/a/Constant" is a '
        "name from an ONNX file, whose nodes tell what belongs to which layer: read it as "
        "docs/onnx.md shows.",
    ),
    "a convolution of one element for a dense layer": (
        lambda: from_state_dict(
            {"weight": np.ones((4, 3, 1, 1))}, variables={"params": {"kernel": np.ones((3, 4))}}
        ),
        ValueError,
        "size mismatch for weight: copying a param with shape torch.Size([4, 3, 1, 1]) from "
        "checkpoint, the shape in current model is torch.Size([4, 3]).",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case):
    call, kind, message = CASES[case]
    with pytest.raises(kind, match=re.escape(message)):
        call()


def flax_layout(x):
    """A NumPy array, channels last, from a tensor with channels at axis 1."""
    return np.moveaxis(x.detach().numpy(), 1, -1)


def trained(torch, module, *inputs, steps=3):
    """`module` after training steps, with parameters that are not those of the initialization."""
    module.train()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.3)
    for i in range(steps):
        module(*(3 + 2 * x + i for x in inputs))
    return module.eval()


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_and_back_bit_for_bit(dtype, tmp_path):
    torch = torch_or_skip()
    layer = torch.nn.BatchNorm2d(256).to(getattr(torch, dtype))
    size = layer.weight.element_size()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    low, high = torch.iinfo(integer).min, torch.iinfo(integer).max
    patterns = torch.randint(low, high, (256,), dtype=integer)  # NaNs, signaling ones too, and all
    patterns[:5] = torch.tensor([0, 1, -1, low, low + 1])  # 0, subnormal, NaN, -0, -subnormal
    with torch.no_grad():
        layer.weight.copy_(patterns.view(layer.weight.dtype))
        layer.running_mean[0] = -0.0
        layer.running_var.uniform_(0, 4)
    theirs = layer.state_dict()
    trees = from_state_dict(theirs)
    np.testing.assert_array_equal(trees[0]["scale"].view(f"i{size}"), patterns.numpy())
    assert trees[0]["scale"].dtype == DTYPES[dtype]
    ours = to_state_dict(*trees, statistics_dtype=dtype)
    assert list(ours) == list(theirs)
    assert {key: str(value.dtype) for key, value in ours.items()} == {
        key: str(value.dtype).removeprefix("torch.") for key, value in theirs.items()
    }

    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    safetensors.save_file(ours, tmp_path / "layer.safetensors")
    loaded = pytest.importorskip("safetensors.torch").load_file(tmp_path / "layer.safetensors")
    for state_dict in (loaded, {key: guide()["tensor"](value) for key, value in ours.items()}):
        other = torch.nn.BatchNorm2d(256).to(layer.weight.dtype)
        other.load_state_dict(state_dict, strict=True)
        for key, value in other.state_dict().items():
            assert value.dtype == theirs[key].dtype
            as_bits = integer if value.is_floating_point() else value.dtype
            assert torch.equal(value.view(as_bits), theirs[key].view(as_bits)), key


def test_tensors_that_numpy_cannot_hold():
    torch = torch_or_skip()
    with pytest.raises(TypeError, match=r"`bn\.weight` cannot become a NumPy array: "):
        from_state_dict({"bn.weight": torch.ones(3, dtype=torch.float8_e4m3fn)}, "bn.")
    with pytest.raises(NotImplementedError, match="`weight` cannot become a NumPy array: "):
        from_state_dict({"weight": torch.ones(3, device="meta")})


def test_training_on_in_torch_changes_nothing_here():
    torch = torch_or_skip()
    layer = torch.nn.BatchNorm1d(3)
    trees = from_state_dict(layer.state_dict())
    before = jax.tree.map(np.copy, trees)
    trained(torch, layer, torch.randn(8, 3))
    assert_same(trees, before)
    layer.weight.data = layer.weight.data.expand(2, 3).T[:, 0]  # not contiguous
    assert_same(from_state_dict(layer.state_dict())[0]["scale"], layer.weight.detach().numpy())
    _, stats = from_state_dict(dict(layer.named_parameters()) | dict(layer.named_buffers()))
    assert stats["count"] == 3  # Parameters need a gradient


CONVOLUTIONS = {
    "1d": ("Conv1d", (2, 4, 9), {"kernel_size": 3}),
    "2d, strided": ("Conv2d", (2, 4, 8, 7), {"kernel_size": (3, 2), "stride": 2, "padding": 1}),
    "2d, grouped": ("Conv2d", (2, 4, 6, 6), {"kernel_size": 3, "groups": 2, "padding": 1}),
    "2d, depthwise": ("Conv2d", (2, 4, 6, 6), {"kernel_size": 5, "groups": 4, "dilation": 1}),
    "2d, dilated, no bias": ("Conv2d", (2, 4, 9, 9), {"kernel_size": 3, "dilation": 2, "bias": 0}),
    "3d": ("Conv3d", (2, 4, 5, 6, 7), {"kernel_size": (2, 3, 4), "stride": (1, 2, 3)}),
    "1d, transposed": ("ConvTranspose1d", (2, 4, 9), {"kernel_size": 3, "stride": 2}),
    "2d, transposed": (
        "ConvTranspose2d",
        (2, 4, 5, 6),
        {"kernel_size": (4, 3), "stride": 2, "padding": 1, "output_padding": 1},
    ),
    "3d, transposed, no bias": (
        "ConvTranspose3d",
        (2, 4, 3, 4, 5),
        {"kernel_size": (2, 3, 4), "dilation": (1, 2, 1), "bias": False},
    ),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_are_those_of_torch(case):
    torch = torch_or_skip()
    kind, shape, options = CONVOLUTIONS[case]
    outputs = 6 if options.get("groups") != 4 else 8
    layer = getattr(torch.nn, kind)(4, outputs, **options).double()
    transposed = "Transpose" in kind
    common = {
        "features": outputs,
        "kernel_size": layer.kernel_size,
        "strides": layer.stride,
        "kernel_dilation": layer.dilation,
        "use_bias": layer.bias is not None,
        "param_dtype": float,
    }
    if transposed:
        pads = zip(
            layer.kernel_size, layer.padding, layer.output_padding, layer.dilation, strict=True
        )
        padding = [((k - 1) * d - p, (k - 1) * d - p + q) for k, p, q, d in pads]
        ours = nn.ConvTranspose(padding=padding, **common)
    else:
        padding = [(p, p) for p in layer.padding]
        ours = nn.Conv(padding=padding, feature_group_count=layer.groups, **common)
    x = torch.randn(shape, dtype=torch.float64)
    params, stats = from_state_dict(
        layer.state_dict(),
        variables=jax.eval_shape(ours.init, jax.random.key(0), flax_layout(x)),
        transposed=[""] if transposed else [],
    )
    assert stats == {}
    actual, expected = ours.apply({"params": params}, flax_layout(x)), flax_layout(layer(x))
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)
    back = to_state_dict(params, {}, transposed=[""] if transposed else [])
    layer.load_state_dict({k: torch.from_numpy(v) for k, v in back.items()}, strict=True)


@pytest.mark.usefixtures("x64")
def test_dense_layers_and_other_norms_are_those_of_torch():
    torch = torch_or_skip()
    x = 3 + 2 * torch.randn(4, 6, dtype=torch.float64)
    pairs = [
        (torch.nn.Linear(6, 5), nn.Dense(5)),
        (torch.nn.LayerNorm(6), nn.LayerNorm(epsilon=1e-5, use_fast_variance=False)),
        (torch.nn.GroupNorm(3, 6), nn.GroupNorm(3, epsilon=1e-5, use_fast_variance=False)),
    ]
    for theirs, ours in pairs:
        theirs = trained(torch, theirs.double(), x)
        params, stats = from_state_dict(theirs.state_dict())
        assert stats == {}
        with jax.numpy_dtype_promotion("standard"):  # as Flax needs it
            actual = ours.apply({"params": params}, x.numpy())
        np.testing.assert_allclose(actual, theirs(x).detach(), rtol=1e-12, atol=1e-12)


WRAPPED = {
    "DataParallel": lambda torch, net: torch.nn.DataParallel(net),
    "compile": lambda torch, net: torch.compile(net, backend="eager"),
    "both": lambda torch, net: torch.nn.DataParallel(torch.compile(net, backend="eager")),
    "SyncBatchNorm": lambda torch, net: torch.nn.SyncBatchNorm.convert_sync_batchnorm(net),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrapped_torch_models(wrapper):
    torch = torch_or_skip()
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    net = trained(torch, net, torch.randn(4, 3, 5, 5))
    names = {"0": "conv", "1": "bn"}
    expected = from_state_dict(net.state_dict(), names=names)
    wrapped = WRAPPED[wrapper](torch, net)
    assert_same(from_state_dict(wrapped.state_dict(), names=names), expected)
    prefix = next(iter(wrapped.state_dict())).removesuffix("0.weight")
    back = to_state_dict(*expected, prefix, names=names)
    back = {key: torch.from_numpy(value) for key, value in back.items()}
    wrapped.load_state_dict(back, strict=True)


ERRORS = {
    "empty": {},
    "missing, unexpected, another shape": {"weight": (4,), "foo": (1,), "bar": (2, 2)},
    "shapes": {"weight": (4,), "bias": (3,), "running_mean": (1, 3), "running_var": ()},
    "a count of another shape": {
        "weight": (3,),
        "bias": (3,),
        "running_mean": (3,),
        "running_var": (3,),
        "num_batches_tracked": (2,),
    },
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_in_the_words_of_torch(case):
    torch = torch_or_skip()
    theirs = torch.nn.BatchNorm2d(3)
    state_dict = {key: torch.ones(shape) for key, shape in ERRORS[case].items()}
    with pytest.raises(RuntimeError) as expected:
        theirs.load_state_dict(state_dict)
    variables = linen.BatchNorm2d(3).init(jax.random.key(0), jnp.ones((2, 3, 4, 4)), True)
    with pytest.raises(ValueError, match="loading state_dict") as actual:
        from_state_dict(state_dict, variables=variables)
    assert str(actual.value) == str(expected.value).replace("BatchNorm2d", "BatchNorm")


def test_errors_of_a_model_are_in_the_words_of_torch():
    torch = torch_or_skip()
    state_dict, names = network()

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = torch.nn.BatchNorm2d(8)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = torch.nn.Sequential(Block())
            self.conv = torch.nn.Conv2d(3, 8, (3, 2))
            self.up = torch.nn.ConvTranspose2d(8, 5, (2, 3))
            self.fc = torch.nn.Linear(5, 4)
            self.norm = torch.nn.LayerNorm(4)

    theirs = Net()
    state_dict = {key: torch.from_numpy(np.array(value)) for key, value in state_dict.items()}
    theirs.load_state_dict(state_dict)
    model, x = Flax(NORMS["BatchNorm2d"]), jnp.ones((1, 4, 4, 3))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), x))
    for key in ("block.0.bn.bias", "conv.weight", "norm.bias"):
        del state_dict[key]
    for key in ("block.0.bn.running_var", "up.weight", "fc.weight", "fc.bias", "head.weight"):
        state_dict[key] = torch.ones(2, 3, 4)
    with pytest.raises(RuntimeError) as expected:
        theirs.load_state_dict(state_dict)
    with pytest.raises(ValueError, match="loading state_dict") as actual:
        from_state_dict(state_dict, names=names, transposed=["up"], variables=variables)
    assert str(actual.value) == str(expected.value).replace(" Net:", " the model:")


SNIPPETS = re.findall(r"```(py|python)\n(.*?)```", GUIDE.read_text(), re.DOTALL)
ALONE = [snippet for kind, snippet in SNIPPETS if kind == "python" and "class Block" not in snippet]


@pytest.mark.parametrize("snippet", ALONE, ids=range(len(ALONE)))
def test_snippets_of_the_guide(snippet):
    assert "assert " in snippet
    with jax.numpy_dtype_promotion("standard"):
        exec(snippet, {})


@functools.cache
def guide():
    """What the other snippets define: the network in Flax, and, where torch is, those for torch."""
    names, with_torch = {}, importlib.util.find_spec("torch") is not None
    for kind, snippet in SNIPPETS:
        if snippet not in ALONE and (with_torch or kind == "python"):
            with jax.numpy_dtype_promotion("standard"):
                exec(snippet, names)
    return names


def test_the_network_of_the_guide():
    """Its snippet judges itself by an `assert`, also without torch."""
    assert isinstance(guide()["model"], nn.Module)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_network_by_the_guide(dtype, request):
    torch, defined = torch_or_skip(), guide()
    if dtype == "float64":
        request.getfixturevalue("x64")
    tolerance = {"float32": 1e-5, "float64": 1e-12}[dtype]
    kind = getattr(torch, dtype)
    theirs, model = copy.deepcopy(defined["torch_model"]).to(kind), defined["model"]
    trained(torch, theirs, torch.randn(16, 3, 32, 32, dtype=kind))
    state_dict = {key: value.clone() for key, value in theirs.state_dict().items()}
    names = match_names(state_dict, defined["variables"])
    assert names == defined["names"]
    params, stats = from_state_dict(state_dict, names=names, variables=defined["variables"])
    variables = {"params": params, "batch_stats": stats}

    spread = torch.linspace(1, 8, 8, dtype=kind).reshape(8, 1, 1, 1)
    batch = 2 + spread * torch.randn(8, 3, 32, 32, dtype=kind)
    x = jnp.asarray(flax_layout(batch))
    with torch.no_grad():
        expected = theirs(batch).numpy()
    actual = jax.jit(functools.partial(model.apply, train=False))(variables, x)
    assert actual.dtype == dtype
    largest = np.abs(expected).max()
    assert np.abs(actual - expected).max() <= tolerance * largest
    assert expected.std(0).max() > 0.01 * largest  # the samples differ, not only the biases

    with torch.no_grad():
        expected = theirs.train()(batch).numpy()
    step = jax.jit(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    actual, updates = step(variables, x)
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()
    _, after = from_state_dict(theirs.state_dict(), names=names)
    before = jax.tree.leaves(stats)
    leaves = zip(before, *map(jax.tree.leaves, (updates["batch_stats"], after)), strict=True)
    for old, new, target in leaves:
        assert (old != target).all()
        assert np.abs(new - target).max() <= tolerance * np.abs(target).max()

    for statistics in (updates["batch_stats"], stats):  # the new ones, then those that came
        back = to_state_dict(params, statistics, names=names)
        assert list(back) == list(state_dict)
        theirs.load_state_dict({k: torch.from_numpy(v) for k, v in back.items()}, strict=True)
        count = int(theirs.layer1[0].bn2.num_batches_tracked)
        assert count == statistics["layer1_0"]["bn2"]["count"]
    for key, value in theirs.state_dict().items():
        assert_same(value.numpy(), state_dict[key].numpy())
