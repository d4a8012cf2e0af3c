"""Folded layers against the layers they are made of, in float64: lax, Flax and torch."""

import functools
import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.folding_reference import applied, assert_same, batch_norm, kernel_of
from helpers.numpy_reference import error, normalized, sample

import jaxbn

SPATIAL = {1: "W", 2: "HW", 3: "DHW"}
SIZES = {"W": 2, "H": 3, "D": 1}

compiled_fold = jax.jit(
    jaxbn.fold_into_conv,
    static_argnames=("layout", "feature_group_count", "transposed", "before", "padding"),
)

# Batch norm and the layer's own bias, each with and without what may be None.
VARIANTS = {
    "all": ("own", "mean", "var", "scale", "bias"),
    "no bias of the layer": (None, "mean", "var", "scale", "bias"),
    "no scale": ("own", "mean", "var", None, "bias"),
    "no bias": ("own", "mean", "var", "scale", None),
    "mean and variance": (None, "mean", "var", None, None),
}


def vectors(channels, outputs, variant="all"):
    names = ("mean", "var", "scale", "bias", "own")
    values = dict(zip(names, (*batch_norm(channels), sample(outputs, 8)), strict=True))
    return [values.get(name) for name in VARIANTS[variant]]


@functools.partial(jax.jit, static_argnames="options")
def _conv(x, kernel, options):
    space = SPATIAL[x.ndim - 2]
    layouts = (f"NC{space}", f"{space}IO", f"NC{space}")
    return jax.lax.conv_general_dilated(x, kernel, dimension_numbers=layouts, **dict(options))


def conv(x, kernel, bias, **options):
    y = np.asarray(_conv(x, kernel, tuple(options.items())))
    return y if bias is None else y + np.reshape(bias, (1, -1) + (1,) * (y.ndim - 2))


def layouts():
    """Each layout, and for every place of I and O a batch norm behind and before."""
    for layout in map("".join, itertools.permutations("WIO")):
        yield from ((layout, False), (layout, True))
    for layout in map("".join, itertools.permutations("HWIO")):
        yield layout, layout.index("H") > layout.index("W")
    for i, layout in enumerate(("DHWIO", "OIDHW", "IODHW", "DIHOW", "WHDOI")):
        yield layout, i % 2 == 1


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("layout", "before"), [*layouts()])
def test_layouts(layout, before):
    rank = len(layout) - 2
    flax_layout = f"{SPATIAL[rank]}IO"
    kernel = sample([{"I": 4, "O": 6, **SIZES}[letter] for letter in flax_layout], 5, 0.2, 0.5)
    x = sample((2, 4) + (5,) * rank, 4)
    own, *norm = vectors(4 if before else 6, 6)
    given = kernel.transpose([flax_layout.index(letter) for letter in layout])
    padding = "VALID" if before else None
    folded, bias = compiled_fold(given, own, *norm, layout=layout, before=before, padding=padding)
    assert folded.shape == given.shape
    folded = folded.transpose([layout.index(letter) for letter in flax_layout])
    options = {"window_strides": (1,) * rank, "padding": "VALID"}
    plain = conv(applied(x, *norm) if before else x, kernel, own, **options)
    assert_same(conv(x, folded, bias, **options), plain if before else applied(plain, *norm))


# Two dimensions with all groups, batch norms behind and before; one and three with half of those.
STRIDED = [
    *itertools.product((2,), (1, 2, 4), (False, True)),
    *((1, 1, False), (1, 2, True), (1, 4, False), (3, 1, True), (3, 2, False), (3, 4, True)),
]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("case", range(len(STRIDED)))
def test_strides_dilation_and_groups(case):
    rank, groups, before = STRIDED[case]
    layout = f"{SPATIAL[rank]}IO"
    x, kernel = sample((2, 4) + (9,) * rank, 4), kernel_of(layout, 4 // groups, 8)
    padding = ((0, 0),) * rank if before else ((1, 2),) * rank
    options = {
        "window_strides": (2, 1, 3)[:rank],
        "rhs_dilation": (1, 2, 2)[:rank],
        "feature_group_count": groups,
        "padding": padding,
    }
    # Three variants each, so that all of them meet each rank, group and side.
    for variant in [*VARIANTS, *VARIANTS][case % 5 :][:3]:
        own, *norm = vectors(4 if before else 8, 8, variant)
        folded = compiled_fold(
            kernel,
            own,
            *norm,
            feature_group_count=groups,
            layout=layout,
            before=before,
            padding=padding if before else None,
        )
        plain = conv(applied(x, *norm) if before else x, kernel, own, **options)
        expected = plain if before else applied(plain, *norm)
        assert error(conv(x, *folded, **options), expected) <= 1e-12, variant


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("layout", ["IO", "OI"])
def test_dense(layout, before):
    x, kernel = sample((5, 4), 4), kernel_of(layout, 4, 6)
    matrix = kernel if layout == "IO" else kernel.T
    for variant in VARIANTS:
        own, *norm = vectors(4 if before else 6, 6, variant)
        plain = (applied(x, *norm) if before else x) @ matrix + (0 if own is None else own)
        folded, bias = jaxbn.fold_into_dense(kernel, own, *norm, layout=layout, before=before)
        y = x @ (folded if layout == "IO" else folded.T) + bias[None]
        assert error(y, plain if before else applied(plain, *norm)) <= 1e-12, variant


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

    @jax.jit
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
    kernel = sample((*size, *((6, 4) if turned else (4, 6))), 5, 0.2, 0.5)
    apply, norm = jax.jit(layer.apply), batch_norm(6)
    plain = apply({"params": {"kernel": kernel, "bias": np.zeros(6)}}, x)
    kernel, bias = compiled_fold(kernel, None, *norm, layout=layout)
    y = apply({"params": {"kernel": kernel, "bias": bias}}, x)
    assert_same(y, applied(plain, *norm, axis=-1))


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
    found = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    return [None if v is None else v.detach().numpy() for v in found]


def copied_into(layer, kernel, bias):
    """The torch layer, its parameters replaced."""
    import torch

    layer.weight = torch.nn.Parameter(torch.tensor(np.asarray(kernel)))
    layer.bias = torch.nn.Parameter(torch.tensor(np.asarray(bias)))
    return layer


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
def test_torch_convolutions(kind, rank, groups):
    # With each kind, rank, number of groups and the other flag, each flag is set and is not.
    affine = (rank + groups.bit_length()) % 2 == 0
    own_bias = affine != (kind == "Conv")
    options = {"stride": 2, "padding": 1, "dilation": 2, "groups": groups, "bias": own_bias}
    layer = torch_layer(f"{kind}{rank}d", 4, 8, 3, **options)
    norm = torch_layer(f"BatchNorm{rank}d", 8, affine=affine)
    import torch

    x = torch.tensor(sample((2, 4) + (7,) * rank, 4))
    expected = norm(layer(x)).detach().numpy()
    transposed = kind == "ConvTranspose"
    kernel, bias = compiled_fold(
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
@pytest.mark.parametrize("kind", ["Conv2d", "Conv2d, circular", "ConvTranspose2d"])
def test_torch_batch_norm_before(kind, groups):
    norm = torch_layer("BatchNorm2d", 4)
    import torch

    kind, circular = kind.removesuffix(", circular"), "circular" in kind
    transposed = kind == "ConvTranspose2d"
    mode = {"padding": 1, "padding_mode": "circular"} if circular else {}
    layer = torch_layer(kind, 4, 6, 1 if transposed else 3, groups=groups, **mode)
    x = torch.tensor(sample((2, 4, 5, 5), 4))
    folded = compiled_fold(
        *[p.detach().numpy() for p in layer.parameters()],
        *batch_norm_of(norm),
        layout="IOHW" if transposed else "OIHW",
        feature_group_count=groups,
        transposed=transposed,
        before=True,
        padding=None if transposed else "CIRCULAR" if circular else 0,
    )
    expected = layer(norm(x)).detach().numpy()
    assert_same(copied_into(layer, *folded)(x).detach().numpy(), expected)


@pytest.mark.usefixtures("x64")
def test_torch_batch_norm_before_linear():
    norm, layer = torch_layer("BatchNorm1d", 4), torch_layer("Linear", 4, 6)
    import torch

    x = torch.tensor(sample((5, 4), 4))
    parameters = [p.detach().numpy() for p in layer.parameters()]
    folded = jaxbn.fold_into_dense(*parameters, *batch_norm_of(norm), layout="OI", before=True)
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
        assert error((x @ folded + shift[None])[:, c], expected[:, c]) <= 1e-12, c


@pytest.mark.usefixtures("x64")
def test_transforms():
    norm, kernel, own = batch_norm(6), kernel_of("HWIO", 4, 6), sample(6, 8)
    x, dy = sample((2, 4, 5, 5), 4), sample((2, 6, 5, 5), 9)
    options = (("window_strides", (1, 1)), ("padding", "SAME"))

    def folded(kernel, own, *norm):
        kernel, bias = jaxbn.fold_into_conv(kernel, own, *norm)
        y = _conv(x, kernel, options) + bias[None, :, None, None]
        return (jnp.sin(y) * dy).sum()

    @jax.jit
    def unfolded(kernel, own, mean, var, scale, bias):
        y = _conv(x, kernel, options) + own[None, :, None, None]
        mean, k, bias = (v[None, :, None, None] for v in (mean, scale / jnp.sqrt(var + 1e-5), bias))
        return (jnp.sin((y - mean) * k + bias) * dy).sum()

    arguments = (kernel, own, *norm)
    everything = tuple(range(6))
    jax.tree.map(
        assert_same,
        jax.jit(jax.grad(folded, everything))(*arguments),
        jax.jit(jax.grad(unfolded, everything))(*arguments),
    )
    several = [np.stack([v, 2 * v, v + 1]) for v in arguments]
    mapped = jax.jit(jax.vmap(folded))(*several)
    assert_same(mapped, np.stack([unfolded(*(v[i] for v in several)) for i in range(3)]))


V3, V4, V6 = (np.ones(n, np.float32) for n in (3, 4, 6))
KERNEL = np.ones((3, 3, 4, 6), np.float32)
POINTWISE = np.ones((1, 1, 4, 6), np.float32)


def test_a_traced_negative_variance_shows():
    kernel, bias = jax.jit(jaxbn.fold_into_dense)(
        np.ones((2, 3), np.float32), None, np.ones(3, np.float32), -np.ones(3, np.float32)
    )
    assert np.isnan(kernel).all()
    assert np.isnan(bias).all()


def test_constants_inside_of_jit():
    ones, negative = jnp.ones(3), -jnp.ones(3)
    jax.jit(lambda x: jaxbn.fold_into_dense(x, None, ones, ones))(jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="`var` must not be negative; got 3 of 3 values"):
        jax.jit(lambda x: jaxbn.fold_into_dense(x, None, ones, negative))(jnp.ones((2, 3)))


def fold_conv(kernel=KERNEL, own=None, vector=V6, **options):
    return jaxbn.fold_into_conv(kernel, own, vector, vector, **options)


def fold_dense(kernel=KERNEL[0, 0], own=None, vector=V6, **options):
    return jaxbn.fold_into_dense(kernel, own, vector, vector, **options)


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
    "negative variance": (
        lambda: jaxbn.fold_into_conv(KERNEL, None, V6, V6 - np.arange(6, dtype=np.float32)),
        ValueError,
        "`var` must not be negative; got 4 of 6 values that are.",
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
        "For a batch norm before the layer pass before=True.",
    ),
    "statistics of the outputs": (
        lambda: fold_conv(before=True, padding="VALID"),
        ValueError,
        "`mean` must have shape (4,), one number for each channel that enters the linear layer; "
        "got (6,) for kernel.shape=(3, 3, 4, 6), layout='HWIO', feature_group_count=1, "
        "transposed=False. For a batch norm after the layer pass before=False.",
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
        "kernel.shape=(3, 3, 4, 6), where O has size 6 in layout='HWIO'.",
    ),
    "groups of a transposed convolution": (
        lambda: fold_conv(feature_group_count=3, transposed=True),
        ValueError,
        "`feature_group_count` must divide the axis I of the kernel of a transposed convolution; "
        "got 3 for kernel.shape=(3, 3, 4, 6), where I has size 4 in layout='HWIO'.",
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
        "`transposed` must be True or False, known when traced; got 'no'.",
    ),
    "before that is no bool": (lambda: fold_conv(before=1), TypeError, "`before` must be True o"),
    "negative epsilon": (
        lambda: fold_dense(epsilon=-1e-5),
        ValueError,
        "`epsilon` must be finite and non-negative; got -1e-05.",
    ),
    "padding behind": (
        lambda: fold_conv(padding="VALID"),
        ValueError,
        "`padding` has an effect only if a batch norm comes before a convolution that is not "
        "transposed; got padding='VALID' with before=False, transposed=False. Leave it out.",
    ),
    "padding of a transposed convolution": (
        lambda: fold_conv(POINTWISE, None, V4, before=True, transposed=True, padding=0),
        ValueError,
        "got padding=0 with before=True, transposed=True. Leave it out.",
    ),
    "no padding given": (
        lambda: fold_conv(vector=V4, before=True),
        ValueError,
        "`padding` must be given if a batch norm comes before a convolution, and must add no "
        "zeros: VALID, CIRCULAR, REFLECT or pads of 0; got None for kernel.shape=(3, 3, 4, 6). The "
        "layer pads normalized values. After folding, it would pad values before normalization, "
        "where zero means another value. Leave this batch norm as it is.",
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
        "A batch norm before a transposed convolution can be folded only into a kernel of one "
        "position (at stride 1): otherwise the number of inputs per output, and so the share of "
        "the batch norm's bias, differs between positions; got "
        "kernel.shape=(3, 3, 4, 6). Leave this batch norm as it is.",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case):
    call, kind, message = CASES[case]
    with pytest.raises(kind, match=re.escape(message)):
        call()
