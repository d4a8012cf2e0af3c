"""Whole networks, folded by names, against the networks as they were."""

import functools
import re

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.folding_reference import applied, assert_same, batch_norm, kernel_of
from helpers.numpy_reference import sample

import jaxbn
import jaxbn.nnx
from jaxbn import linen

NORMS = {
    "jaxbn.linen.BatchNorm": lambda **o: linen.BatchNorm(**o),
    "jaxbn.linen.BatchNorm2d": lambda **o: linen.BatchNorm2d(_features(o), axis=-1, **o),
    "flax.linen.BatchNorm": lambda **o: nn.BatchNorm(force_float32_reductions=False, **o),
}

V4, V6 = np.ones(4, np.float32), np.ones(6, np.float32)
KERNEL = np.ones((3, 3, 4, 6), np.float32)


def _features(options):
    return {"norm": 4, "norm_1": 6, "norm_2": 8, "before": 8}[options["name"]]


class Block(nn.Module):
    """A chain conv-bn-relu-conv-bn, a grouped and a pointwise one, and batch norm before."""

    norm: str
    folded: bool = False

    @nn.compact
    def __call__(self, x):
        def norm(x, name):
            if self.folded:
                return x
            layer = NORMS[self.norm](name=name, param_dtype=jnp.float64)
            return layer(x, use_running_average=True)

        def conv(features, size, name, use_bias=False, **options):
            use_bias = use_bias or self.folded
            options |= {"use_bias": use_bias, "param_dtype": jnp.float64, "name": name}
            return nn.Conv(features, (size, size), **options)

        x = nn.relu(norm(conv(4, 3, "conv")(x), "norm"))
        x = nn.relu(norm(conv(6, 3, "conv_1", use_bias=True, strides=2)(x), "norm_1"))
        x = conv(6, 1, "untouched", use_bias=True)(x)
        up = nn.ConvTranspose(
            8, (3, 3), (2, 2), use_bias=self.folded, param_dtype=jnp.float64, name="up"
        )
        x = nn.relu(norm(up(x), "norm_2"))
        return conv(8, 3, "grouped", padding="VALID", feature_group_count=2)(norm(x, "before"))


class Network(nn.Module):
    """The block within a network that has a layer behind it."""

    norm: str
    folded: bool = False

    @nn.compact
    def __call__(self, x):
        x = Block(self.norm, self.folded, name="block")(x)
        return nn.Dense(3, param_dtype=jnp.float64, name="head")(x)


PAIRS = [
    ("block/conv", "block/norm"),
    ("block/conv_1", "block/norm_1"),
    ("block/up", "block/norm_2"),
    ("block/before", "block/grouped"),
]


X = sample((2, 9, 9, 3), 4)


@functools.cache
def network(norm):
    """The variables of a network, with nothing at 0 or 1, and what it makes of X."""
    shapes = jax.eval_shape(Network(norm).init, jax.random.key(0), X)
    leaves, treedef = jax.tree.flatten_with_path(shapes)
    drawn = []
    for i, (path, leaf) in enumerate(leaves, 40):
        value = sample(leaf.shape, i, 0.3, 0.5)
        value = value**2 + 0.1 if path[-1].key == "var" else value
        drawn.append(np.zeros((), leaf.dtype) if path[-1].key == "count" else value)
    variables = jax.tree.unflatten(treedef, drawn)
    return variables, np.asarray(jax.jit(Network(norm).apply)(variables, X))


FOLDED = Network("none", folded=True)
apply_folded = jax.jit(FOLDED.apply)


# Each kind of tree comes with each batch norm, and folded under `jit` and not.
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", [dict, flax.core.FrozenDict, "jax"], ids=["dict", "frozen", "jax"])
@pytest.mark.parametrize("norm", NORMS)
def test_whole_trees(norm, kind):
    jitted = (list(NORMS).index(norm) + (kind is dict)) % 2 == 0
    variables, expected = network(norm)
    kind, given = (
        (dict, jax.tree.map(jnp.asarray, variables)) if kind == "jax" else (kind, variables)
    )
    given = kind(given)
    copy = jax.tree.map(np.array, given)

    def fold(variables):
        return jaxbn.fold_variables(variables, PAIRS, padding="VALID")

    folded = (jax.jit(fold) if jitted else fold)(given)
    assert type(folded) is kind
    jax.tree.map(np.testing.assert_array_equal, given, copy)
    unfrozen = flax.core.unfreeze(folded)
    assert_same(apply_folded(unfrozen, X), expected)
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(FOLDED.init, jax.random.key(0), X))
    assert jax.tree.map(jnp.shape, unfrozen) == shapes
    np.testing.assert_array_equal(
        folded["params"]["block"]["untouched"]["kernel"],
        variables["params"]["block"]["untouched"]["kernel"],
    )


@pytest.mark.usefixtures("x64")
def test_pairs_as_a_mapping_and_the_rest_as_it_was():
    variables, _ = network("jaxbn.linen.BatchNorm2d")
    variables = {**variables, "other": {"x": np.ones(2)}}
    folded = jaxbn.fold_variables(variables, dict(PAIRS[:2]))
    assert {*folded["batch_stats"]["block"]} == {"norm_2", "before"}
    assert {*variables["batch_stats"]["block"]} == {"norm", "norm_1", "norm_2", "before"}
    assert folded["other"]["x"] is variables["other"]["x"]
    assert folded["params"]["head"] is variables["params"]["head"]
    assert jaxbn.fold_variables(variables, []) == variables
    stepwise = jaxbn.fold_variables(folded, PAIRS[2:], padding="VALID")
    at_once = jaxbn.fold_variables(variables, PAIRS, padding="VALID")
    jax.tree.map(np.testing.assert_array_equal, stepwise, at_once)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("missing", [(), ("scale",), ("bias",), ("scale", "bias")])
def test_whatever_the_batch_norm_has(missing):
    mean, var, scale, bias = batch_norm(6)
    affine = {k: v for k, v in (("scale", scale), ("bias", bias)) if k not in missing}
    x, kernel = sample((5, 4), 4), kernel_of("IO", 4, 6)
    params = {0: {"kernel": kernel}, 1: affine} if affine else {0: {"kernel": kernel}}
    variables = {"params": params, "batch_stats": {1: {"mean": mean, "var": var}}}
    folded = jaxbn.fold_variables(variables, [("0", "1")])  # keys that are ints, as NNX has them
    assert {*folded} == {"params"}
    assert {*folded["params"]} == {0}
    layer = folded["params"][0]
    expected = applied(x @ kernel, mean, var, affine.get("scale"), affine.get("bias"))
    assert_same(x @ layer["kernel"] + layer["bias"][None], expected)


@pytest.mark.usefixtures("x64")
def test_batch_norms_on_both_sides_take_two_calls():
    first, second, x = batch_norm(4), batch_norm(6, seed=20), sample((5, 4), 4)
    kernel = kernel_of("IO", 4, 6)
    names = ("mean", "var", "scale", "bias")
    norms = {n: dict(zip(names, v, strict=True)) for n, v in (("a", first), ("c", second))}
    variables = {
        "params": {"b": {"kernel": kernel}}
        | {n: {k: v[k] for k in names[2:]} for n, v in norms.items()},
        "batch_stats": {n: {k: v[k] for k in names[:2]} for n, v in norms.items()},
    }
    folded = jaxbn.fold_variables(jaxbn.fold_variables(variables, [("a", "b")]), [("b", "c")])
    layer = folded["params"]["b"]
    expected = applied(applied(x, *first) @ kernel, *second)
    assert_same(x @ layer["kernel"] + layer["bias"][None], expected)


class Branches(nn.Module):
    """Three linear layers with outputs side by side, under one batch norm."""

    folded: bool = False

    @nn.compact
    def __call__(self, x):
        bias = {"use_bias": self.folded, "param_dtype": x.dtype}
        first = nn.Conv(3, (1, 1), name="first", **bias)(x)
        depthwise = nn.Conv(4, (3, 3), feature_group_count=4, name="depthwise", **bias)(x)
        last = nn.Dense(1, name="last", **bias)(x)
        x = jnp.concatenate([first, depthwise, last], -1)
        return x if self.folded else linen.BatchNorm(True, name="norm")(x)


@pytest.mark.usefixtures("x64")
def test_a_batch_norm_behind_a_concatenation():
    x = sample((2, 6, 6, 4), 1, 2.0, 3.0)
    mean, var, scale, bias = batch_norm(8)
    params = Branches().init(jax.random.key(0), x)["params"] | {
        "norm": {"scale": scale, "bias": bias}
    }
    variables = {"params": params, "batch_stats": {"norm": {"mean": mean, "var": var}}}
    layers = ("first", "depthwise", "last")
    folded = jaxbn.fold_variables(variables, [(layers, "norm")])
    assert {*folded["params"]} == {*layers}
    expected = Branches().apply(variables, x)
    assert_same(Branches(folded=True).apply(folded, x), expected)

    with pytest.raises(ValueError, match=re.escape("concatenated; got (('first', 'depthwise'),")):
        jaxbn.fold_variables(variables, [(("first", "depthwise"), "norm")])
    alone = [("first", "norm")], [("first", "norm"), ("last", "norm")]
    for pairs in alone:
        with pytest.raises(ValueError, match=r"must have shape|occurs twice") as caught:
            jaxbn.fold_variables(variables, pairs)
        said = " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
        assert "put all layers in one pair, in the order of the channels" in said


def of_linen(wrapper):
    class Wrapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            return linen.BatchNorm(True, name="norm")(wrapper(nn.Conv(4, (3, 3), name="conv"))(x))

    return jax.eval_shape(Wrapped().init, jax.random.key(0), jnp.ones((1, 5, 5, 3))), "conv"


def of_nnx(make):
    rngs = nnx.Rngs(0)
    model = nnx.Dict(conv=make(rngs), norm=jaxbn.nnx.BatchNorm(4, rngs=rngs))
    _, stats, params = nnx.split(model, nnx.BatchStat, ...)
    trees = {"params": nnx.to_pure_dict(params), "batch_stats": nnx.to_pure_dict(stats)}
    return trees, "conv/layer_instance" if "layer_instance" in trees["params"]["conv"] else "conv"


def reparametrized():
    yield "weight normalization", *of_linen(nn.WeightNorm), "'conv/kernel/scale'"
    spectral = of_linen(lambda layer: lambda x: nn.SpectralNorm(layer)(x, update_stats=False))
    yield "spectral normalization", *spectral, "'conv/kernel/sigma', 'conv/kernel/u'"
    low_rank = of_nnx(lambda rngs: nnx.LoRALinear(3, 4, lora_rank=2, rngs=rngs))
    yield "low rank", *low_rank, "'lora_a', 'lora_b'"
    layer = of_nnx(lambda rngs: nnx.WeightNorm(nnx.Conv(3, 4, (3, 3), rngs=rngs), rngs=rngs))
    yield "weight normalization of NNX", *layer, "'layer_instance'"
    wrapped = of_nnx(
        lambda rngs: nnx.LoRA(3, 2, 4, base_module=nnx.Linear(3, 4, rngs=rngs), rngs=rngs)
    )[0]
    yield "low rank around a layer", wrapped, "conv/base_module", "'base_module'"
    norm = {"mean": V4, "var": V4}
    quantized = {"params": {"conv": {"kernel": KERNEL, "kernel_scale": V4}}}
    yield "quantized", {**quantized, "batch_stats": {"norm": norm}}, "conv", "'kernel_scale'"
    scaled = {"params": {"conv": {"kernel": KERNEL}}, "fp8": {"conv": {"scale": V4}}}
    yield "float8", {**scaled, "batch_stats": {"norm": norm}}, "conv", "'scale'"


def test_kernels_that_are_not_used_as_stored_are_refused():
    for name, variables, layer, found in reparametrized():
        with pytest.raises(ValueError, match="A layer must use its `kernel` as it is") as caught:
            jaxbn.fold_variables(variables, [(layer, "norm")])
        assert f"got {layer!r} with {found}, such as weight" in str(caught.value), name


def test_boxes_of_metadata_are_named():
    layer = nn.Dense(4, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "model")))
    params = {"dense": layer.init(jax.random.key(0), jnp.ones((1, 3)))["params"]}
    variables = {"params": params, "batch_stats": {"norm": {"mean": V4, "var": V4}}}
    with pytest.raises(TypeError, match=r"for 'dense'\. Use flax\.linen\.unbox\(variables\)\."):
        jaxbn.fold_variables(variables, [("dense", "norm")])
    jaxbn.fold_variables(nn.unbox(variables), [("dense", "norm")])


def test_constants_inside_of_jit_are_checked():
    bad = tree(batch_stats={"norm": {"mean": np.zeros(4), "var": -np.ones(4)}})
    with pytest.raises(ValueError, match="finite and not negative; got 4 of 4 values"):
        jax.jit(lambda: jaxbn.fold_variables(bad, [("dense", "norm")]))()


def tree(params=None, batch_stats=None):
    """A convolution and a dense layer, and batch norms for either."""
    return {
        "params": {
            "conv": {"kernel": KERNEL},
            "dense": {"kernel": np.ones((6, 4), np.float32)},
            "norm": {"scale": V4, "bias": V4},
            "block_0": {"Conv_0": {"kernel": KERNEL}},
            "other": {"scale": V4},
        }
        | (params or {}),
        "batch_stats": {
            "norm": {"mean": V4, "var": V4},
            "norm_6": {"mean": V6, "var": V6},
            "before": {"mean": V4, "var": V4},
        }
        | (batch_stats or {}),
    }


def fold_tree(*pairs, variables=None, **options):
    return jaxbn.fold_variables(tree() if variables is None else variables, pairs, **options)


CASES = {
    "variables that are none": (
        lambda: fold_tree(variables=[tree()]),
        TypeError,
        "`variables` must be a mapping of collections, as `model.init` returns it; got list.",
    ),
    "no batch_stats": (
        lambda: fold_tree(variables={"params": {}}),
        ValueError,
        "`variables` must have the collections params and batch_stats, as `model.init` returns "
        "them; got 'params'.",
    ),
    "unknown path": (
        lambda: fold_tree(("block0/conv_0", "norm")),
        ValueError,
        "`pairs` must name linear layers, with a `kernel` in params, and batch norms, with `mean` "
        "and `var` in batch_stats; got 'block0/conv_0', which is neither. The nearest paths are "
        "'block_0/Conv_0', ",
    ),
    "layer without kernel": (
        lambda: fold_tree(("other", "norm")),
        ValueError,
        "got 'other', which is neither.",
    ),
    "a block": (lambda: fold_tree(("block_0", "norm")), ValueError, "got 'block_0', which is n"),
    "two batch norms": (
        lambda: fold_tree(("norm", "norm_6")),
        ValueError,
        "Each of the `pairs` must have one linear layer, with a `kernel` in params, and one batch "
        "norm, with `mean` and `var` in batch_stats; got no linear layer in ('norm', 'norm_6').",
    ),
    "no batch norm": (
        lambda: fold_tree(("conv", "dense")),
        ValueError,
        "got no batch norm in ('conv', 'dense').",
    ),
    "used twice": (
        lambda: fold_tree(("conv", "norm_6"), ("norm", "conv")),
        ValueError,
        "A layer may occur once in `pairs`; 'conv' occurs twice. Fold the batch norms before and "
        "after a layer in two calls. A layer that feeds two batch norms cannot absorb either.",
    ),
    "one pair alone": (
        lambda: jaxbn.fold_variables(tree(), ("conv", "norm_6")),
        TypeError,
        '`pairs` must hold pairs of paths, for example [("block_0/Conv_0", '
        "\"block_0/BatchNorm_0\")]; got 'conv' in it.",
    ),
    "a batch norm before two layers": (
        lambda: fold_tree(("before", ("conv", "dense"))),
        TypeError,
        "A batch norm before several layers cannot be folded.",
    ),
    "an empty concatenation": (
        lambda: fold_tree(((), "norm")),
        TypeError,
        "got ((), 'norm') in it.",
    ),
    "three of them": (lambda: fold_tree(("conv", "norm", "dense")), TypeError, "got ('conv', 'n"),
    "no strings": (lambda: fold_tree((0, 1)), TypeError, "got (0, 1) in it."),
    "other channels in a tree": (
        lambda: fold_tree(("conv", "norm")),
        ValueError,
        "`mean` must have shape (6,), one number for each channel that leaves the linear layer; "
        "got (4,) for kernel.shape=(3, 3, 4, 6)",
    ),
    "which pair it was": (
        lambda: fold_tree(("conv", "norm")),
        ValueError,
        "This happened while folding 'norm' into 'conv'.",
    ),
    "dense layer of other inputs": (
        lambda: fold_tree(("before", "dense")),
        ValueError,
        "`mean` must have shape (6,), one number for each channel that enters the linear layer; "
        "got (4,) for kernel.shape=(6, 4), layout='IO'. For a batch norm after the layer pass",
    ),
    "no padding given in a tree": (
        lambda: fold_tree(("before", "conv")),
        ValueError,
        "`padding` must be given if a batch norm comes before a convolution",
    ),
    "padding in a tree without need": (
        lambda: fold_tree(
            ("conv", "norm_6"),
            ("norm_6x", "dense"),
            padding="VALID",
            variables=tree(batch_stats={"norm_6x": {"mean": V6, "var": V6}}),
        ),
        ValueError,
        "`padding` has an effect only if a batch norm comes before a convolution; got "
        "padding='VALID' and no such pair. Leave it out.",
    ),
    "kernel of one axis": (
        lambda: fold_tree(("before", "odd"), variables=tree({"odd": {"kernel": V4}})),
        ValueError,
        "`layout` must name each axis of `kernel` once",
    ),
    "negative variance": (
        lambda: fold_tree(
            ("dense", "n"),
            variables=tree(batch_stats={"n": {"mean": V4, "var": jnp.array([1.0, -1e-7, 1, -1])}}),
        ),
        ValueError,
        "The running variance must be finite and not negative; got 2 of 4 values that are not.",
    ),
    "NaN in the variance": (
        lambda: fold_tree(
            ("dense", "n"), variables=tree(batch_stats={"n": {"mean": V4, "var": V4 * np.nan}})
        ),
        ValueError,
        "The running variance must be finite and not negative; got 4 of 4 values that are not.",
    ),
    "infinite mean": (
        lambda: fold_tree(
            ("dense", "n"), variables=tree(batch_stats={"n": {"mean": V4 * np.inf, "var": V4}})
        ),
        ValueError,
        "The running mean must be finite; got 4 of 4 values that are not.",
    ),
    "no variance": (
        lambda: fold_tree(
            ("dense", "n"),
            variables=tree(batch_stats={"n": {"mean": V4, "var": V4 - 1}}),
            epsilon=0.0,
        ),
        ValueError,
        "The folded kernel must be finite in float32; got 24 of 24 values that are not.",
    ),
    "beyond the range of float16": (
        lambda: fold_tree(
            ("half", "n"),
            variables=tree(
                {"half": {"kernel": np.full((2, 4), 300, np.float16)}},
                {"n": {"mean": V4, "var": V4 * 0}},
            ),
        ),
        ValueError,
        "The folded kernel must be finite in float16; got 8 of 8 values that are not.",
    ),
    "bias beyond the range of float16": (
        lambda: fold_tree(
            ("half", "n"),
            variables=tree(
                {"half": {"kernel": np.ones((2, 4), np.float16)}},
                {"n": {"mean": V4 * 1e4, "var": V4 * 0}},
            ),
        ),
        ValueError,
        "The folded bias must be finite in float16; got 4 of 4 values that are not.",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case):
    call, kind, message = CASES[case]
    with pytest.raises(kind, match=re.escape(message)):
        call()
