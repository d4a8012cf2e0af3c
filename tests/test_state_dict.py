"""`state_dict`s as Flax variables and back: layouts, bits, judgement; live against torch."""

import pathlib
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import freeze
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_reference import evaluate, sample

from jaxbn import linen
from jaxbn.torch import from_state_dict, to_state_dict

DTYPES = {"float16": np.float16, "bfloat16": jnp.bfloat16, "float32": np.float32, "float64": float}
GUIDE = pathlib.Path(__file__).parents[1] / "docs" / "torch.md"


def vectors(size, dtype=np.float32, seed=0):
    """The entries of a batch norm layer that was trained."""
    values = sample((4, size), seed)
    values[3] = np.abs(values[3])
    entries = ("weight", "bias", "running_mean", "running_var")
    state_dict = {k: v.astype(dtype) for k, v in zip(entries, values, strict=True)}
    return state_dict | {"num_batches_tracked": np.array(7)}


def prefixed(prefix, state_dict):
    return {prefix + key: value for key, value in state_dict.items()}


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


def shapes(tree):
    return jax.tree.map(lambda v: (v.shape, v.dtype.name), tree)


def assert_same(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert shapes(actual) == shapes(expected)


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


@pytest.mark.parametrize("spatial", [(), (3,), (3, 2), (2, 3, 4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_element_of_a_weight_is_where_flax_has_it(spatial, transposed):
    if transposed and not spatial:
        return
    weight = np.arange(5 * 4 * np.prod(spatial, dtype=int)).reshape(5, 4, *spatial) / 2
    flags = {"names": {"w": "w"}, "transposed": ["w"] if transposed else []}
    params, stats = from_state_dict({"w.weight": weight}, **flags)
    kernel = params["w"]["kernel"]
    assert kernel.shape == spatial + ((5, 4) if transposed else (4, 5))
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
        "bn.weight": bits(2),
        "bn.bias": bits(2),
        "bn.running_mean": finite(bits(2)),
        "bn.running_var": np.abs(finite(bits(2))),
        "bn.num_batches_tracked": np.array(data.draw(st.integers(0, 2**31 - 1))),
    }
    names = {name: name for name in ("conv", "up", "fc", "bn")}
    params, stats = from_state_dict(state_dict, names=names, transposed=["up"])
    back = to_state_dict(params, stats, names=names, transposed=["up"])
    assert list(back) == list(state_dict)
    for key, value in state_dict.items():
        assert back[key].dtype == value.dtype
        assert back[key].shape == value.shape
        assert back[key].tobytes() == value.tobytes()


def test_results_are_copies():
    state_dict, names = network()
    trees = from_state_dict(state_dict, names=names, transposed=["up"])
    before = jax.tree.map(np.copy, trees)
    back = to_state_dict(*trees, names=names, transposed=["up"])
    assert all(v.flags.writeable and v.flags.c_contiguous for v in back.values())
    for value in state_dict.values():
        value[...] = 9
    for value in back.values():
        value[...] = 8
    assert_same(trees, before)


def test_strided_foreign_and_jax_arrays():
    scale = np.arange(6.0, dtype=np.float32)[::2]
    for weight in (scale, scale.astype(">f4"), jnp.asarray(scale)):
        params, _ = from_state_dict({"weight": weight})
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
    variables = model.init(jax.random.key(0), x)
    results = [
        from_state_dict(state_dict, names=names, transposed=["up"], variables=form)
        for form in (variables, freeze(variables), jax.eval_shape(lambda: variables))
    ]
    params, stats = results[0]
    for other in results[1:]:
        assert_same(other, results[0])
    assert shapes({"params": params, "batch_stats": stats}) == shapes(variables)
    assert_same(params["block_0"]["bn"]["scale"], state_dict["block.0.bn.weight"])
    if norm == "BatchNorm2d":
        assert stats["block_0"]["bn"]["count"] == (7 if counted else 0)
    y = model.apply({"params": params, "batch_stats": stats}, x)
    assert jnp.isfinite(y).all()
    back = to_state_dict(freeze(params), freeze(stats), names=names, transposed=["up"])
    assert back.keys() >= state_dict.keys() - {"block.0.bn.num_batches_tracked"}
    for key in back.keys() & state_dict.keys():
        assert_same(back[key], state_dict[key])


@pytest.mark.parametrize(
    "flags",
    [{"affine": False}, {"bias": False}, {"track_running_stats": False}, {}],
    ids=str,
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


def test_a_layer_without_variables():
    assert from_state_dict({}, variables={}) == ({}, {})
    assert to_state_dict({}, {}) == {}


def test_counts():
    for count in (np.array(5), np.array([5]), np.array(5, np.uint8), jnp.array(5), 5):
        _, stats = from_state_dict(vectors(3) | {"num_batches_tracked": count})
        assert_same(stats["count"], np.array(5, np.int32))
    back = to_state_dict({}, stats)
    assert_same(back["num_batches_tracked"], np.array(5, np.int64))


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


def test_nothing_heavy_is_imported():
    code = (
        "import sys, numpy, jaxbn.torch; jaxbn.torch.from_state_dict({'weight': numpy.ones(3)});"
        "print({'torch', 'safetensors', 'flax'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


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
        "`weight` must have 3 to 5 dimensions as the weight of a transposed convolution; got 2.",
    ),
    "transposed batch norm": (
        lambda: from_state_dict(vectors(3), transposed=[""]),
        ValueError,
        "`weight` must have 3 to 5 dimensions as the weight of a transposed convolution; got 1.",
    ),
    "transposed batch norm, the way back": (
        lambda: to_state_dict(*LAYER, transposed=[""]),
        ValueError,
        "`params/scale` must have 3 to 5 dimensions as the weight of a transposed convolution",
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
        "`weight` must have 1 dimensions as a scale; got 0.",
    ),
    "a weight of 6 dimensions": (
        lambda: from_state_dict({"weight": np.ones((1,) * 6)}),
        ValueError,
        "`weight` must have 2 to 5 dimensions as a kernel; got 6.",
    ),
    "replicated variables": (
        lambda: to_state_dict({"scale": np.ones((8, 3))}, {}),
        ValueError,
        "`params/scale` must have 1 dimensions as a scale; got 2.",
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
        "`running_var` must not be negative, a variance; got -0.5.",
    ),
    "a negative variance, the way back": (
        lambda: to_state_dict({}, {"mean": V3, "var": -V3, "count": np.int32(0)}),
        ValueError,
        "`running_var` must not be negative, a variance; got -1.0.",
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
