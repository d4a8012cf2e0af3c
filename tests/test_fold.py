"""Folded layers against the layers they are made of, in float64: lax, Flax and torch."""

import functools
import itertools
import re

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_reference import error, normalized, sample

import jaxbn
from jaxbn import linen

SPATIAL = {1: "W", 2: "HW", 3: "DHW"}
LAYOUTS = [
    *map("".join, itertools.permutations("WIO")),
    *map("".join, itertools.permutations("HWIO")),
    *("DHWIO", "OIDHW", "IODHW", "DIHOW", "WHDOI"),
]


def batch_norm(channels, seed=0, dtype=np.float64):
    """`mean`, `var`, `scale` and `bias`; the scale has both signs, and a zero."""
    scale = sample(channels, seed + 2, 0.0, 1.0, dtype)
    scale[:2] = -1.5, 0.0
    return (
        sample(channels, seed, 3.0, 2.0, dtype),
        sample(channels, seed + 1, 0.0, 2.0, dtype) ** 2 + dtype(0.05),
        scale,
        sample(channels, seed + 3, -0.5, 1.0, dtype),
    )


def variants(channels, outputs):
    """Batch norm and the layer's own bias, each with and without what may be None."""
    mean, var, scale, bias = batch_norm(channels)
    own = sample(outputs, 8)
    yield "all", (own, mean, var, scale, bias)
    yield "no bias of the layer", (None, mean, var, scale, bias)
    yield "no scale", (own, mean, var, None, bias)
    yield "no bias", (own, mean, var, scale, None)
    yield "mean and variance", (None, mean, var, None, None)


def applied(x, mean, var, scale, bias, axis=1):
    """Batch norm in NumPy, where None stands for 1 or 0."""
    scale = np.ones_like(mean) if scale is None else scale
    bias = np.zeros_like(mean) if bias is None else bias
    return normalized(np.asarray(x), mean, var, scale, bias, axis)


@functools.partial(jax.jit, static_argnames=("layout", "options"))
def _conv(x, kernel, layout, options):
    space = SPATIAL[x.ndim - 2]
    layouts = (f"NC{space}", layout, f"NC{space}")
    return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=layouts, **dict(options))


def conv(x, kernel, bias, layout, **options):
    y = np.asarray(_conv(x, kernel, layout, tuple(options.items())))
    return y if bias is None else y + np.reshape(bias, (-1,) + (1,) * (y.ndim - 2))


def kernel_of(layout, inputs, outputs, size=3, seed=5, dtype=np.float64):
    sizes = {"I": inputs, "O": outputs}
    return sample([sizes.get(letter, size) for letter in layout], seed, 0.2, 0.5, dtype)


def assert_same(actual, expected):
    assert error(actual, expected) <= 1e-12


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, before):
    rank = len(layout) - 2
    x, kernel = sample((2, 4) + (5,) * rank, 4), kernel_of(layout, 4, 6, 2)
    own, *norm = (sample(6, 8), *batch_norm(4 if before else 6))
    options = {"window_strides": (1,) * rank, "padding": "VALID"}
    folded = jaxbn.fold_into_conv(
        kernel, own, *norm, layout=layout, before=before, padding="VALID" if before else None
    )
    plain = conv(applied(x, *norm) if before else x, kernel, own, layout, **options)
    assert_same(conv(x, *folded, layout, **options), plain if before else applied(plain, *norm))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4], ids=["plain", "grouped", "depthwise"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_strides_dilation_and_groups(rank, groups, before):
    layout = f"{SPATIAL[rank]}IO"
    x, kernel = sample((2, 4) + (9,) * rank, 4), kernel_of(layout, 4 // groups, 8)
    padding = ((0, 0),) * rank if before else ((1, 2),) * rank
    options = {
        "window_strides": (2, 1, 3)[:rank],
        "rhs_dilation": (1, 2, 2)[:rank],
        "feature_group_count": groups,
        "padding": padding,
    }
    for name, (own, *norm) in variants(4 if before else 8, 8):
        folded = jaxbn.fold_into_conv(
            kernel,
            own,
            *norm,
            feature_group_count=groups,
            layout=layout,
            before=before,
            padding=padding if before else None,
        )
        plain = conv(applied(x, *norm) if before else x, kernel, own, layout, **options)
        expected = plain if before else applied(plain, *norm)
        assert error(conv(x, *folded, layout, **options), expected) <= 1e-12, name


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("layout", ["IO", "OI"])
def test_dense(layout, before):
    x, kernel = sample((5, 4), 4), kernel_of(layout, 4, 6)
    matrix = kernel if layout == "IO" else kernel.T
    for name, (own, *norm) in variants(4 if before else 6, 6):
        plain = (applied(x, *norm) if before else x) @ matrix + (0 if own is None else own)
        folded, bias = jaxbn.fold_into_dense(kernel, own, *norm, layout=layout, before=before)
        y = x @ (folded if layout == "IO" else folded.T) + bias
        assert error(y, plain if before else applied(plain, *norm)) <= 1e-12, name


PADDINGS = [
    *("VALID", "CIRCULAR", "REFLECT", "SAME", 0, 1, (0, 0), (0, 1), ((0, 0), (0, 0))),
    *(((0, 0), (2, 1)), [0, (0, 1)], -1),
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("padding", PADDINGS, ids=str)
def test_a_padding_is_taken_where_it_is_exact_and_nowhere_else(padding, size):
    layer = nn.Conv(6, (size, size), padding=padding, param_dtype=jnp.float64)
    x, kernel, own = sample((2, 8, 8, 4), 4), kernel_of("HWIO", 4, 6, size), sample(6, 8)
    norm = batch_norm(4)

    def apply(x, kernel, own):
        return layer.apply({"params": {"kernel": kernel, "bias": own}}, x)

    expected = apply(applied(x, *norm, axis=-1), kernel, own)
    try:
        folded = jaxbn.fold_into_conv(kernel, own, *norm, before=True, padding=padding)
    except ValueError:
        folded = jaxbn.fold_into_conv(kernel, own, *norm, before=True, padding="VALID")
        assert error(apply(x, *folded), expected) > 0.01
    else:
        assert_same(apply(x, *folded), expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_flax_transposed_convolution(rank, turned):
    size = (3, 2, 2)[:rank]
    layer = nn.ConvTranspose(
        6, size, (2, 1, 2)[:rank], transpose_kernel=turned, param_dtype=jnp.float64
    )
    layout = SPATIAL[rank] + ("OI" if turned else "IO")
    x = sample((2,) + (5,) * rank + (4,), 4)
    shapes = layer.init(jax.random.key(0), x)["params"]
    kernel, norm = sample(shapes["kernel"].shape, 5, 0.2, 0.5), batch_norm(6)
    expected = applied(
        layer.apply({"params": {"kernel": kernel, "bias": np.zeros(6)}}, x), *norm, axis=-1
    )
    kernel, bias = jaxbn.fold_into_conv(kernel, None, *norm, layout=layout)
    assert_same(layer.apply({"params": {"kernel": kernel, "bias": bias}}, x), expected)


def torch_layer(kind, *arguments, **options):
    """A torch layer in float64, in inference mode, its parameters away from 0 and 1."""
    torch = pytest.importorskip("torch", reason="torch is the second referee")
    layer = getattr(torch.nn, kind)(*arguments, dtype=torch.float64, **options).eval()
    tensors = itertools.chain(layer.named_parameters(), layer.named_buffers())
    with torch.no_grad():
        for i, (name, tensor) in enumerate(tensors):
            if tensor.is_floating_point():
                value = sample(tuple(tensor.shape), 30 + i, 0.4, 0.6)
                tensor.copy_(torch.tensor(value**2 if name == "running_var" else value))
    return layer


def batch_norm_of(layer):
    vectors = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    return [None if v is None else v.detach().numpy() for v in vectors]


def copied_into(layer, kernel, bias):
    """The torch layer, its parameters replaced."""
    import torch

    layer.weight = torch.nn.Parameter(torch.tensor(np.asarray(kernel)))
    layer.bias = torch.nn.Parameter(torch.tensor(np.asarray(bias)))
    return layer


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("own_bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
def test_torch_convolutions(kind, rank, groups, affine, own_bias):
    options = {"stride": 2, "padding": 1, "dilation": 2, "groups": groups, "bias": own_bias}
    layer = torch_layer(f"{kind}{rank}d", 4, 8, 3, **options)
    norm = torch_layer(f"BatchNorm{rank}d", 8, affine=affine)
    import torch

    x = torch.tensor(sample((2, 4) + (7,) * rank, 4))
    expected = norm(layer(x)).detach().numpy()
    transposed = kind == "ConvTranspose"
    kernel, bias = jaxbn.fold_into_conv(
        layer.weight.detach().numpy(),
        layer.bias.detach().numpy() if own_bias else None,
        *batch_norm_of(norm),
        layout=("IO" if transposed else "OI") + SPATIAL[rank],
        feature_group_count=groups,
        transposed=transposed,
    )
    if groups == 1 or not transposed:  # torch knows no groups there
        theirs = torch.nn.utils.fusion.fuse_conv_bn_eval(layer, norm, transposed)
        assert_same(kernel, theirs.weight.detach().numpy())
        assert_same(bias, theirs.bias.detach().numpy())
    assert_same(copied_into(layer, kernel, bias)(x).detach().numpy(), expected)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["Conv2d", "Conv2d, circular", "ConvTranspose2d", "Linear"])
def test_torch_batch_norm_before(kind, groups):
    norm = torch_layer(f"BatchNorm{1 if kind == 'Linear' else 2}d", 4)
    import torch

    kind, circular = kind.removesuffix(", circular"), "circular" in kind
    transposed = kind == "ConvTranspose2d"
    vectors = batch_norm_of(norm)
    if kind == "Linear":
        layer, x = torch_layer(kind, 4, 6), torch.tensor(sample((5, 4), 4))
        parameters = [p.detach().numpy() for p in layer.parameters()]
        folded = jaxbn.fold_into_dense(*parameters, *vectors, layout="OI", before=True)
    else:
        mode = {"padding": 1, "padding_mode": "circular"} if circular else {}
        layer = torch_layer(kind, 4, 6, 1 if transposed else 3, groups=groups, **mode)
        x = torch.tensor(sample((2, 4, 5, 5), 4))
        parameters = [p.detach().numpy() for p in layer.parameters()]
        folded = jaxbn.fold_into_conv(
            *parameters,
            *vectors,
            layout="IOHW" if transposed else "OIHW",
            feature_group_count=groups,
            transposed=transposed,
            before=True,
            padding=None if transposed else "CIRCULAR" if circular else 0,
        )
    expected = layer(norm(x)).detach().numpy()
    assert_same(copied_into(layer, *folded)(x).detach().numpy(), expected)


def rounded_once(dtype):
    """Relative and absolute bounds of one rounding to the dtype, after float32 arithmetic."""
    return {"bfloat16": (2.0**-8, 0.0), "float16": (2.0**-11, 2.0**-25)}[dtype]


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_rounded_once(dtype, before):
    kernel = jnp.asarray(kernel_of("HWIO", 16, 16), dtype)
    own, norm = jnp.asarray(sample(16, 8), dtype), batch_norm(16, dtype=np.float32)
    folded, bias = jaxbn.fold_into_conv(
        kernel, own, *norm, before=before, padding="VALID" if before else None
    )
    assert folded.dtype == bias.dtype == jnp.dtype(dtype)
    mean, var, scale, shift, wide, own_wide = (
        np.asarray(v, np.float64) for v in (*norm, kernel, own)
    )
    k = scale / np.sqrt(var + 1e-5)
    relative, absolute = rounded_once(dtype)
    exact = wide * (k[:, None] if before else k)
    bound = np.abs(exact) * (relative + 2.0**-21) + absolute
    assert (np.abs(np.asarray(folded, np.float64) - exact) <= bound).all()
    if before:
        terms = wide * (shift - mean * k)[:, None]
        exact, terms = own_wide + terms.sum((0, 1, 2)), np.abs(terms).sum((0, 1, 2))
    else:
        exact, terms = applied(own_wide[None], *norm)[0], np.abs((own_wide - mean) * k)
    bound = np.abs(exact) * relative + absolute + terms * 2.0**-20
    assert (np.abs(np.asarray(bias, np.float64) - exact) <= bound).all()


def test_the_bias_comes_in_the_dtype_of_the_bias():
    kernel, own = jnp.asarray(kernel_of("IO", 3, 4), jnp.bfloat16), sample(4, 8, dtype=np.float32)
    norm = batch_norm(4, dtype=np.float32)
    for given, dtype in ((own, jnp.float32), (None, jnp.bfloat16)):
        folded, bias = jaxbn.fold_into_dense(kernel, given, *norm)
        assert (folded.dtype, bias.dtype) == (jnp.bfloat16, dtype)
    assert error(jaxbn.fold_into_dense(kernel, own, *norm)[1], applied(own[None], *norm)[0]) < 1e-6


def test_a_bias_near_a_large_mean_does_not_cancel():
    mean, var, scale, bias = batch_norm(8, dtype=np.float32)
    mean = mean + np.float32(1e5)
    own = mean + sample(8, 9, 0.0, 1.0, np.float32)
    _, folded = jaxbn.fold_into_dense(kernel_of("IO", 4, 8), own, mean, var, scale, bias)
    assert error(folded, applied(own[None], mean, var, scale, bias)[0]) <= 1e-6


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("epsilon", [1e-5, 1e-290, 0.0])
def test_tiny_variances(epsilon):
    smallest = np.finfo(np.float64).tiny
    var = np.array([smallest, 1e-300, 1e-20, 1.0] + [0.0, 5e-324, smallest / 4] * (epsilon > 0))
    mean, _, scale, bias = batch_norm(len(var))
    scale[0] = 2.0
    x, kernel = sample((5, 4), 4), kernel_of("IO", 4, len(var))
    folded, shift = jaxbn.fold_into_dense(kernel, None, mean, var, scale, bias, epsilon=epsilon)
    expected = normalized(x @ kernel, mean, var, scale, bias, 1, epsilon)
    for c in range(len(var)):  # each by itself: they are of very different sizes
        assert error((x @ folded + shift)[:, c], expected[:, c]) <= 1e-12, c


@pytest.mark.usefixtures("x64")
def test_transforms():
    norm, kernel, own = batch_norm(6), kernel_of("HWIO", 4, 6), sample(6, 8)
    x, dy = sample((2, 4, 5, 5), 4), sample((2, 6, 5, 5), 9)
    options = (("window_strides", (1, 1)), ("padding", "SAME"))

    def folded(kernel, own, *norm):
        kernel, bias = jaxbn.fold_into_conv(kernel, own, *norm)
        y = _conv(x, kernel, "HWIO", options) + bias[:, None, None]
        return (jnp.sin(y) * dy).sum()

    def unfolded(kernel, own, mean, var, scale, bias):
        y = _conv(x, kernel, "HWIO", options) + own[:, None, None]
        mean, k, bias = (v[:, None, None] for v in (mean, scale / jnp.sqrt(var + 1e-5), bias))
        return (jnp.sin((y - mean) * k + bias) * dy).sum()

    arguments = (kernel, own, *norm)
    everything = tuple(range(6))
    jax.tree.map(
        assert_same,
        jax.jit(jax.grad(folded, everything))(*arguments),
        jax.grad(unfolded, everything)(*arguments),
    )
    several = [np.stack([v, 2 * v, v + 1]) for v in arguments]
    mapped = jax.jit(jax.vmap(folded))(*several)
    assert_same(mapped, jnp.stack([unfolded(*(v[i] for v in several)) for i in range(3)]))


NORMS = {
    "jaxbn.linen.BatchNorm": lambda **o: linen.BatchNorm(**o),
    "jaxbn.linen.BatchNorm2d": lambda **o: linen.BatchNorm2d(_features(o), axis=-1, **o),
    "flax.linen.BatchNorm": lambda **o: nn.BatchNorm(force_float32_reductions=False, **o),
}


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


def network(norm, x, seed=40):
    """A network and its variables, with nothing at 0 or 1."""
    variables = Network(norm).init(jax.random.key(0), x)
    leaves, treedef = jax.tree.flatten_with_path(variables)
    drawn = []
    for i, (path, leaf) in enumerate(leaves):
        value = sample(leaf.shape, seed + i, 0.3, 0.5)
        value = value**2 + 0.1 if path[-1].key == "var" else value
        drawn.append(leaf if path[-1].key == "count" else value)
    return Network(norm), jax.tree.unflatten(treedef, drawn)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("kind", [dict, flax.core.FrozenDict, "jax"], ids=["dict", "frozen", "jax"])
@pytest.mark.parametrize("norm", NORMS)
def test_whole_trees(norm, kind, jitted):
    x = sample((2, 9, 9, 3), 4)
    module, variables = network(norm, x)
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
    y = Network(norm, folded=True).apply(folded, x)
    assert_same(y, module.apply(variables, x))
    shapes = jax.tree.map(jnp.shape, Network(norm, folded=True).init(jax.random.key(0), x))
    assert jax.tree.map(jnp.shape, flax.core.unfreeze(folded)) == shapes
    np.testing.assert_array_equal(
        folded["params"]["block"]["untouched"]["kernel"],
        variables["params"]["block"]["untouched"]["kernel"],
    )


@pytest.mark.usefixtures("x64")
def test_pairs_as_a_mapping_and_the_rest_as_it_was():
    _, variables = network("jaxbn.linen.BatchNorm2d", sample((2, 9, 9, 3), 4))
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
    assert_same(x @ layer["kernel"] + layer["bias"], expected)


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
    assert_same(x @ layer["kernel"] + layer["bias"], expected)


def test_constants_inside_of_jit_are_checked():
    bad = tree(batch_stats={"norm": {"mean": np.zeros(4), "var": -np.ones(4)}})
    with pytest.raises(ValueError, match="finite and not negative; got 4 of 4 values"):
        jax.jit(lambda: jaxbn.fold_variables(bad, [("dense", "norm")]))()


V2, V3, V4, V6 = (np.ones(n, np.float32) for n in (2, 3, 4, 6))
KERNEL = np.ones((3, 3, 4, 6), np.float32)
POINTWISE = np.ones((1, 1, 4, 6), np.float32)


def fold_conv(kernel=KERNEL, own=None, vector=V6, **options):
    return jaxbn.fold_into_conv(kernel, own, vector, vector, **options)


def fold_dense(kernel=KERNEL[0, 0], own=None, vector=V6, **options):
    return jaxbn.fold_into_dense(kernel, own, vector, vector, **options)


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
    "integer kernel": (
        lambda: fold_conv(KERNEL.astype(int)),
        TypeError,
        "`kernel` must have one of the dtypes bfloat16, float16, float32, float64; got int32.",
    ),
    "complex variance": (lambda: fold_conv(vector=V6 + 0j), TypeError, "`mean` must have one of"),
    "integer bias": (
        lambda: fold_conv(own=np.ones(6, int)),
        TypeError,
        "`kernel_bias` must have one of the dtypes",
    ),
    "no kernel": (lambda: fold_conv(None), TypeError, "`kernel` must be an array; got None."),
    "no mean": (
        lambda: jaxbn.fold_into_conv(KERNEL, None, None, V6),
        TypeError,
        "`mean` must be an array; got None.",
    ),
    "layout for another rank": (
        lambda: fold_conv(np.ones((3, 4, 6))),
        ValueError,
        "`layout` must name each axis of `kernel` once: I for inputs, O for outputs, and one of "
        "D, H, W for each axis in space; got layout='HWIO' for kernel.shape=(3, 4, 6). Flax's is "
        "'WIO'.",
    ),
    "layout without O": (lambda: fold_conv(layout="HWDI"), ValueError, "got layout='HWDI'"),
    "letter twice": (lambda: fold_conv(layout="HHIO"), ValueError, "got layout='HHIO'"),
    "lower case": (lambda: fold_conv(layout="hwio"), ValueError, "got layout='hwio'"),
    "layout of the input": (lambda: fold_conv(layout="NHWC"), ValueError, "got layout='NHWC'"),
    "layout as a tuple": (lambda: fold_conv(layout=(3, 2, 0, 1)), ValueError, "got layout=(3,"),
    "kernel of a convolution in a dense layer": (
        lambda: fold_dense(KERNEL),
        ValueError,
        "`layout` must name each axis of `kernel` once: I for inputs, O for outputs; got "
        "layout='IO' for kernel.shape=(3, 3, 4, 6). Flax's is 'IO'.",
    ),
    "layout of a convolution in a dense layer": (
        lambda: fold_dense(KERNEL[0], layout="WIO"),
        ValueError,
        "got layout='WIO' for kernel.shape=(3, 4, 6).",
    ),
    "statistics of other channels": (
        lambda: fold_conv(vector=V3),
        ValueError,
        "`mean` must have shape (6,), one number for each channel that leaves the linear layer; "
        "got (3,) for kernel.shape=(3, 3, 4, 6), layout='HWIO', feature_group_count=1, "
        "transposed=False.",
    ),
    "statistics of the inputs": (
        lambda: fold_conv(vector=V4),
        ValueError,
        "For a batch norm in front of the layer pass before=True.",
    ),
    "statistics of the outputs": (
        lambda: fold_conv(before=True, padding="VALID"),
        ValueError,
        "`mean` must have shape (4,), one number for each channel that enters the linear layer; "
        "got (6,) for kernel.shape=(3, 3, 4, 6), layout='HWIO', feature_group_count=1, "
        "transposed=False. For a batch norm behind the layer pass before=False.",
    ),
    "a matrix of statistics": (
        lambda: fold_dense(vector=V6[None]),
        ValueError,
        "got (1, 6) for kernel.shape=(4, 6), layout='IO'.",
    ),
    "a number for a vector": (
        lambda: jaxbn.fold_into_dense(KERNEL[0, 0], None, V6, 1.0),
        ValueError,
        "`var` must have shape (6,)",
    ),
    "scale of other channels": (
        lambda: jaxbn.fold_into_conv(KERNEL, None, V6, V6, V4),
        ValueError,
        "`scale` must have shape (6,)",
    ),
    "bias of other channels": (
        lambda: jaxbn.fold_into_conv(KERNEL, None, V6, V6, V6, V4),
        ValueError,
        "`bias` must have shape (6,)",
    ),
    "kernel_bias of other channels": (
        lambda: fold_conv(own=V4),
        ValueError,
        "`kernel_bias` must have shape (6,), one number for each channel that leaves the linear "
        "layer; got (4,) for kernel.shape=(3, 3, 4, 6)",
    ),
    "kernel_bias of the inputs, batch norm before": (
        lambda: fold_conv(POINTWISE, V4, V4, before=True),
        ValueError,
        "`kernel_bias` must have shape (6,), one number for each channel that leaves",
    ),
    "groups that do not divide": (
        lambda: fold_conv(feature_group_count=4),
        ValueError,
        "`feature_group_count` must divide the axis O of the kernel of a convolution; got 4 for "
        "kernel.shape=(3, 3, 4, 6), of which O is 6 in layout='HWIO'.",
    ),
    "groups of a transposed convolution": (
        lambda: fold_conv(feature_group_count=3, transposed=True),
        ValueError,
        "`feature_group_count` must divide the axis I of the kernel of a transposed convolution; "
        "got 3 for kernel.shape=(3, 3, 4, 6), of which I is 4 in layout='HWIO'.",
    ),
    "outputs of a transposed convolution": (
        lambda: fold_conv(feature_group_count=2, transposed=True),
        ValueError,
        "`mean` must have shape (12,)",
    ),
    "inputs of a grouped convolution": (
        lambda: fold_conv(POINTWISE, None, V4, before=True, feature_group_count=2),
        ValueError,
        "`mean` must have shape (8,)",
    ),
    "no groups": (
        lambda: fold_conv(feature_group_count=0),
        ValueError,
        "`feature_group_count` must be an int of at least 1; got 0.",
    ),
    "groups that are no int": (
        lambda: fold_conv(feature_group_count=True),
        ValueError,
        "`feature_group_count` must be an int of at least 1; got True.",
    ),
    "transposed that is no bool": (
        lambda: fold_conv(transposed="no"),
        TypeError,
        "`transposed` must be True, False",
    ),
    "before that is no bool": (lambda: fold_conv(before=1), TypeError, "`before` must be True, F"),
    "negative epsilon": (
        lambda: fold_dense(epsilon=-1e-5),
        ValueError,
        "`epsilon` must be finite and non-negative; got -1e-05.",
    ),
    "padding behind": (
        lambda: fold_conv(padding="VALID"),
        ValueError,
        "`padding` makes a difference only where a batch norm comes before a convolution that is "
        "not transposed; got padding='VALID' with before=False, transposed=False. Leave it out.",
    ),
    "padding of a transposed convolution": (
        lambda: fold_conv(POINTWISE, None, V4, before=True, transposed=True, padding=0),
        ValueError,
        "got padding=0 with before=True, transposed=True. Leave it out.",
    ),
    "no padding given": (
        lambda: fold_conv(vector=V4, before=True),
        ValueError,
        "`padding` must be given where a batch norm comes before a convolution, and be one without "
        "zeros: VALID, CIRCULAR, REFLECT or pads of 0; got None for kernel.shape=(3, 3, 4, 6). The "
        "layer pads what the batch norm has normalized. Folded, it would pad what is not "
        "normalized yet, and zeros there mean another value. Leave this batch norm as it is.",
    ),
    "padding with zeros": (
        lambda: fold_conv(vector=V4, before=True, padding="SAME"),
        ValueError,
        "got 'SAME' for kernel.shape=(3, 3, 4, 6).",
    ),
    "padding for another rank": (
        lambda: fold_conv(vector=V4, before=True, padding=(0,)),
        ValueError,
        "got (0,) for kernel",
    ),
    "padding of floats": (
        lambda: fold_conv(vector=V4, before=True, padding=(0.0, 0.0)),
        ValueError,
        "got (0.0, 0.0) for kernel",
    ),
    "unknown padding": (
        lambda: fold_conv(POINTWISE, None, V4, before=True, padding="NONE"),
        ValueError,
        "got 'NONE' for kernel",
    ),
    "before a transposed convolution": (
        lambda: fold_conv(vector=V4, before=True, transposed=True),
        ValueError,
        "A batch norm in front of a transposed convolution can be folded only into a kernel of one "
        "position (at stride 1): otherwise the number of inputs that meet in an output, and with "
        "it the share of the batch norm's bias, differs from place to place; got "
        "kernel.shape=(3, 3, 4, 6). Leave this batch norm as it is.",
    ),
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
        "A layer may come once in `pairs`; 'conv' comes twice. Fold the batch norms before and "
        "behind a layer in two calls; a layer that feeds two batch norms cannot take in either.",
    ),
    "one pair alone": (
        lambda: jaxbn.fold_variables(tree(), ("conv", "norm_6")),
        TypeError,
        '`pairs` must hold pairs of paths, for example [("block_0/Conv_0", '
        "\"block_0/BatchNorm_0\")]; got 'conv' in it.",
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
        "This was to fold 'norm' into 'conv'.",
    ),
    "dense layer of other inputs": (
        lambda: fold_tree(("before", "dense")),
        ValueError,
        "`mean` must have shape (6,), one number for each channel that enters the linear layer; "
        "got (4,) for kernel.shape=(6, 4), layout='IO'. For a batch norm behind the layer pass",
    ),
    "no padding given in a tree": (
        lambda: fold_tree(("before", "conv")),
        ValueError,
        "`padding` must be given where a batch norm comes before a convolution",
    ),
    "padding in a tree without need": (
        lambda: fold_tree(
            ("conv", "norm_6"),
            ("norm_6x", "dense"),
            padding="VALID",
            variables=tree(batch_stats={"norm_6x": {"mean": V6, "var": V6}}),
        ),
        ValueError,
        "`padding` makes a difference only where a batch norm comes before a convolution; got "
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
