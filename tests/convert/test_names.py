"""Which Flax module each torch module is, without help; what cannot be told is an error."""

import functools
import re

import jax
import mobilenet
import numpy as np
import pytest
from flax import nnx
from helpers import flax_networks

from jaxbn.torch import from_state_dict, match_names, to_state_dict


def zeros(*shape):
    return np.broadcast_to(np.float32(0), shape)


def conv(inputs, outputs, size=3):
    return {"weight": zeros(outputs, inputs, size, size)}


def dense(inputs, outputs):
    return {"weight": zeros(outputs, inputs), "bias": zeros(outputs)}


def norm(size):
    entries = ("weight", "bias", "running_mean", "running_var")
    return {entry: zeros(size) for entry in entries} | {"num_batches_tracked": np.array(0)}


STATISTICS = {"running_mean": "mean", "running_var": "var", "num_batches_tracked": "count"}


def both_sides(layers, transposed=()):
    """The `state_dict` and the variables of layers `(torch name, Flax path, entries)`."""
    state_dict, variables = {}, {"params": {}, "batch_stats": {}}
    for name, path, entries in layers:
        for entry, value in entries.items():
            state_dict[f"{name}.{entry}"] = value
            variable = STATISTICS.get(entry, entry)
            if entry == "weight":
                variable = "scale" if value.ndim == 1 else "kernel"
            if variable == "kernel":
                channels = (0, 1) if name in transposed else (1, 0)
                value = value.transpose(*range(2, value.ndim), *channels)
            tree = variables["batch_stats" if entry in STATISTICS else "params"]
            for module in path.split("/"):
                tree = tree.setdefault(module, {})
            tree[variable] = value
    return state_dict, variables


def reordered(tree, order):
    """A dict whose keys are in another order, at each depth."""
    if not isinstance(tree, dict):
        return tree
    return {key: reordered(tree[key], order) for key in order(tree)}


def check(layers, guessed=None, **options):
    """All pairs are found, and those not by name are listed, whatever the order of Flax's keys."""
    state_dict, variables = both_sides(layers, **options)
    expected = {name: path for name, path, _ in layers}
    for order in (list, sorted, lambda keys: sorted(keys, reverse=True)):
        names = match_names(state_dict, reordered(variables, order))
        assert names == expected
        assert list(names) == list(expected)
        assert set(names.guessed) == (expected.keys() if guessed is None else set(guessed))
        assert names.guessed.items() <= names.items()
    return state_dict, variables


C, B, D = conv(4, 4), norm(4), dense(4, 4)

FOUND = {
    "lists, digits and Sequential are written in several ways": (
        [
            ("layer1.0.conv1", "layer1_0/conv1", C),
            ("layer1.0.bn1", "layer1_0/bn1", B),
            ("layer1.1.conv1", "layer1/1/conv1", C),
            ("layer1.1.bn1", "layer1/1/bn1", B),
            ("body.0", "body/layers_0", C),
            ("body.1", "body/layers/1", B),
            ("fc", "fc", D),
        ],
        [],
    ),
    "a prefix of all of one side": (
        [("model.net.a", "a", C), ("model.net.b.0", "b_0", C), ("model.net.c", "c", C)],
        [],
    ),
    "a prefix of all of the other": ([("a", "net/body/a", C), ("b", "net/body/b", C)], []),
    "numbers that count something else": (
        [("0", "layers/0", C), ("2", "layers/1", C), ("4", "layers/2", C)],
        None,
    ),
    "numbers that begin elsewhere": (
        [(f"conv{i + 1}", f"conv{i}", C) for i in range(3)] + [("fc", "fc", D)],
        ["conv1", "conv2", "conv3"],
    ),
    "names of other shapes mean something else": (
        [("a", "b", conv(3, 4)), ("b", "a", C), ("c", "d", conv(4, 5))],
        None,
    ),
    "more than ten": ([(f"body.{2 * i}", f"Conv_{i}", C) for i in range(12)], None),
    "each sort is numbered by itself": (
        [
            ("0", "Conv_0", C),
            ("1", "BatchNorm_0", B),
            ("2", "Conv_1", C),
            ("3", "BatchNorm_1", B),
            ("5", "Dense_0", D),
            ("6", "Dense_1", D),
        ],
        None,
    ),
    "a convolution without a norm": (
        [
            ("0", "Conv_0", C),
            ("1", "Conv_1", C),
            ("2", "BatchNorm_0", B),
            ("3", "Conv_2", C),
            ("4", "BatchNorm_1", B),
        ],
        None,
    ),
    "a stem of the shapes of blocks": (
        [
            ("conv1", "Conv_0", C),
            ("bn1", "BatchNorm_0", B),
            *[
                (f"layer1.{i}.{torch}", f"Block_{i}/{flax}", entries)
                for i in range(2)
                for torch, flax, entries in (
                    ("conv1", "Conv_0", C),
                    ("bn1", "BatchNorm_0", B),
                    ("conv2", "Conv_1", C),
                    ("bn2", "BatchNorm_1", B),
                )
            ],
        ],
        None,
    ),
    "a shortcut that Flax calls first": (
        [
            ("stem", "stem", conv(3, 2, 7)),
            ("block.conv1", "Block_0/Conv_1", conv(2, 4)),
            ("block.bn1", "Block_0/BatchNorm_1", B),
            ("block.conv2", "Block_0/Conv_2", C),
            ("block.bn2", "Block_0/BatchNorm_2", B),
            ("block.downsample.0", "Block_0/Conv_0", conv(2, 4, 1)),
            ("block.downsample.1", "Block_0/BatchNorm_0", B),
        ],
        [f"block.{name}" for name in ("conv1", "bn1", "conv2", "bn2")]
        + [f"block.downsample.{i}" for i in range(2)],
    ),
    **{
        f"a shortcut that Flax calls first, {norm}": (
            [
                ("conv1", "Conv_1", conv(2, 4)),
                ("bn1", f"{norm}_1", B),
                ("conv2", "Conv_2", C),
                ("bn2", f"{norm}_2", B),
                ("downsample.0", "Conv_0", conv(2, 4, 1)),
                ("downsample.1", f"{norm}_0", B),
            ],
            None,
        )
        for norm in ("BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
    },
    "nested calls in the head leave the order of the body": (
        [
            *[
                (f"{2 * i + j}", f"{flax}_{i}", entries)
                for i in range(3)
                for j, (flax, entries) in enumerate((("Conv", C), ("BatchNorm2d", B)))
            ],
            ("6", "Dense_1", dense(4, 8)),
            ("7", "Dense_0", dense(8, 5)),
        ],
        None,
    ),
    "as many norms as convolutions, one of them after a transposed convolution": (
        [
            ("0", "Conv_0", conv(8, 4, 1)),
            ("1", "BatchNorm_0", B),
            ("2", "Conv_1", C),
            ("3", "ConvTranspose_0", conv(4, 4, 2)),
            ("4", "BatchNorm_1", B),
            ("5", "Conv_2", conv(4, 6)),
            ("6", "BatchNorm_2", norm(6)),
        ],
        None,
    ),
    "a shortcut with names of its own": (
        [
            ("conv1", "Conv_0", C),
            ("bn1", "BatchNorm_0", B),
            ("conv2", "Conv_1", C),
            ("bn2", "BatchNorm_1", B),
            ("downsample.0", "conv_proj", conv(4, 4, 1)),
            ("downsample.1", "norm_proj", B),
        ],
        None,
    ),
    "lists of what is called in turn": (
        [
            ("up2", "up/0", conv(8, 6, 2)),
            ("dec2.0", "dec/0/layers/0", C),
            ("dec2.1", "dec/0/layers/1", B),
            ("up1", "up/1", conv(6, 4, 2)),
            ("dec1.0", "dec/1/layers/0", C),
            ("dec1.1", "dec/1/layers/1", B),
        ],
        None,
    ),
    "torch registers in another order, and shapes tell": (
        [
            ("ups.0", "Up_1/Conv_0", conv(8, 4)),
            ("ups.1", "Up_1/Conv_1", C),
            ("downs.0", "Up_0/Conv_0", conv(3, 4)),
            ("downs.1", "Up_0/Conv_1", C),
        ],
        None,
    ),
    "modules of torch's names with others in them, registered backwards": (
        [
            (f"{name}.{torch}", f"{name}/{flax}", entries)
            for name in ("decoder", "dec3", "dec2", "dec1", "encoder")
            for torch, flax, entries in (
                ("0", "Conv_0", C),
                ("1", "BatchNorm_0", B),
                ("3", "Conv_1", C),
                ("4", "BatchNorm_1", B),
            )
        ],
        None,
    ),
    "layers of one kind with and without a bias": (
        [("x", "Dense_0", dense(4, 4)), ("y", "Dense_1", {"weight": zeros(4, 4)})],
        None,
    ),
    "norms without parameters, or without statistics": (
        [
            ("x", "BatchNorm_1", {k: v for k, v in B.items() if "running" in k}),
            ("y", "LayerNorm_0", {k: v for k, v in B.items() if "running" not in k and v.ndim}),
        ],
        None,
    ),
}


@pytest.mark.parametrize("case", FOUND)
def test_found(case):
    check(*FOUND[case])


def test_transposed_convolutions_need_not_be_told():
    """But for two channel numbers that are equal, their shape tells the module, and its layout."""
    up = {"weight": zeros(8, 4, 2, 2), "bias": zeros(4)}
    square = {"weight": zeros(4, 4, 2, 2), "bias": zeros(4)}
    layers = [("x", "Conv_0", conv(4, 8)), ("up", "ConvTranspose_0", up)]
    layers += [("y", "Conv_1", C), ("other", "ConvTranspose_1", square), ("z", "Conv_2", C)]
    check(layers, transposed=["up", "other"])
    named = [(name, path.replace("ConvTranspose", "Up"), entries) for name, path, entries in layers]
    check(named, transposed=["up", "other"])


UPS = [{"weight": zeros(4, 8, 2, 2)}, {"weight": zeros(8, 4, 2, 2)}]


def test_transposed_convolutions_of_mirrored_shapes():
    """Read as ordinary ones they fit in another order, so nothing but `transposed` tells."""
    layers = [("0", "up1", UPS[0]), ("2", "up2", UPS[1])]
    state_dict, variables = both_sides(layers, transposed=["0", "2"])
    with pytest.raises(ValueError, match=r"pass `transposed`, \[\] if none is") as error:
        match_names(state_dict, variables)
    assert "\n\t0, weight [4, 8, 2, 2]: up2 or up1" in str(error.value)
    names = match_names(state_dict, variables, transposed=["0", "2"])
    assert names == {"0": "up1", "2": "up2"} == names.guessed
    from_state_dict(state_dict, names=names, variables=variables, transposed=["0", "2"])
    swapped = match_names(state_dict, variables, transposed=[])
    assert swapped == {"0": "up2", "2": "up1"}
    with pytest.raises(ValueError, match="size mismatch") as error:
        from_state_dict(state_dict, names=swapped, variables=variables, transposed=["0", "2"])
    assert str(error.value).endswith(
        "match_names has guessed the Flax modules of ['0', '2']. Pass all transposed convolutions "
        "as `transposed` to it, too, and read `guessed`."
    )
    with pytest.raises(ValueError, match="They fit with others in `transposed`, which are shown"):
        match_names(state_dict, variables, transposed=["0"])
    message = "`transposed` must hold names of torch's convolutions; got ['up1']."
    with pytest.raises(ValueError, match=re.escape(message)):
        match_names(state_dict, variables, transposed=["up1"])


def test_a_generator_with_mirrored_shapes():
    """16, 32, 16, 8 and 3 channels: the first two weights have the shapes of each other."""
    sizes = ((16, 32), (32, 16), (16, 8), (8, 3))
    layers = [
        (f"main.{3 * i}", f"up/{i}", {"weight": zeros(*size, 4, 4)}) for i, size in enumerate(sizes)
    ]
    transposed = [name for name, _, _ in layers]
    state_dict, variables = both_sides(layers, transposed)
    expected = {name: path for name, path, _ in layers}
    assert match_names(state_dict, variables, transposed=transposed) == expected
    with pytest.raises(ValueError, match=r"pass `transposed`, \[\] if none is") as error:
        match_names(state_dict, variables)
    assert str(error.value).count("\n") == 2
    with pytest.raises(ValueError, match=re.escape(f"pass transposed={transposed}.")):
        from_state_dict(state_dict, names=expected, variables=variables, transposed=transposed[:2])


def test_what_is_known_of_transposed_convolutions():
    """A right pair takes nothing from the others."""
    layers = [("0", "up_0", UPS[0]), ("1", "up_1", UPS[1])]
    state_dict, variables = both_sides(layers, transposed=["0", "1"])
    for known in ({"0": "up_0"}, {"1": "up_1"}, {"0": "up_0", "1": "up_1"}):
        for transposed in (None, ["0", "1"]):
            names = match_names(state_dict, variables, known=known, transposed=transposed)
            assert names == {"0": "up_0", "1": "up_1"}


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.module.", "model.", "module.model."])
def test_names_are_those_that_the_import_takes(wrapper):
    layers = [("body.0", "Conv_0", C), ("body.1", "BatchNorm_0", B), ("fc", "fc", D)]
    state_dict, variables = both_sides(layers)
    wrapped = {wrapper + key: value for key, value in state_dict.items()}
    names = match_names(wrapped, variables)
    params, stats = from_state_dict(wrapped, names=names, variables=variables)
    assert jax.tree.map(np.shape, {"params": params, "batch_stats": stats}) == jax.tree.map(
        np.shape, variables
    )
    back = to_state_dict(params, stats, names=names)
    taken_off = wrapper.removeprefix("_orig_mod.").removeprefix("module.")
    assert list(back) == [taken_off + key for key in state_dict]

    if wrapper:
        prefixed = match_names(wrapped | {"loss.weight": zeros(7)}, variables, wrapper)
        assert prefixed == {name: path for name, path, _ in layers}


def test_what_is_known():
    """It is taken as it is, and tells about its neighbours."""
    layers = [
        ("conv1", "Block_0/Conv_1", conv(2, 4)),
        ("bn1", "Block_0/BatchNorm_1", B),
        ("conv2", "Block_0/Conv_2", conv(4, 6, 1)),
        ("bn2", "Block_0/BatchNorm_2", norm(6)),
        ("downsample.0", "Block_0/Conv_0", conv(4, 6, 1)),
        ("downsample.1", "Block_0/BatchNorm_0", norm(6)),
    ]
    state_dict, variables = both_sides(layers)
    with pytest.raises(ValueError, match="more than one way"):
        match_names(state_dict, variables)
    known = {"downsample.0": "Block_0/Conv_0"}
    names = match_names(state_dict, variables, known=known)
    assert names == {name: path for name, path, _ in layers}
    assert set(names.guessed) == names.keys() - known.keys()

    order = [("shortcut", "Conv_0", C), *[(f"{i}", f"Conv_{i}", C) for i in range(1, 4)]]
    layers = [*order[1:], order[0], ("4", "Dense_1", dense(4, 8)), ("5", "Dense_0", dense(8, 5))]
    state_dict, variables = both_sides(layers)
    names = match_names(state_dict, variables, known={"shortcut": "Conv_0"})
    assert names == {name: path for name, path, _ in layers}

    state_dict, variables = both_sides([("x", "a", D), ("y", "b", C), ("z", "c", C)])
    names = match_names(state_dict, variables, known={"x": "b", "y": "a"})  # of other shapes
    assert names == {"x": "b", "y": "a", "z": "c"}
    with pytest.raises(ValueError, match=r"size mismatch for x\.weight"):
        from_state_dict(state_dict, names=names, variables=variables)


def test_keys_in_alphabetical_order():
    """Nothing follows from it: Flax calls `stem` first, which torch might have done, too."""
    layers = [("neck", "Dense_0", D), ("stem", "Dense_1", D), ("tail", "Dense_2", D)]
    state_dict, variables = both_sides(layers)
    with pytest.raises(ValueError, match="alphabetical order; that of model") as error:
        match_names(reordered(state_dict, sorted), variables)
    assert "\n\tneck, weight [4, 4], bias [4]: Dense_0 or Dense_2" in str(error.value)
    assert match_names(state_dict, variables).guessed == {name: path for name, path, _ in layers}

    numbered = [("body.2", "Dense_0", D), ("body.10", "Dense_1", D)]
    state_dict, variables = both_sides(numbered)
    names = match_names(reordered(state_dict, sorted), variables)
    assert names == {"body.2": "Dense_0", "body.10": "Dense_1"}


def test_a_file(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    layers = [
        ("layer.2.bn", "BatchNorm_0", B),
        ("layer.2.conv", "Conv_0", C),
        ("layer.10.conv", "Conv_1", C),
        ("layer.10.bn", "BatchNorm_1", B),
    ]
    state_dict, variables = both_sides(layers)
    safetensors.save_file({k: v.copy() for k, v in state_dict.items()}, tmp_path / "a.safetensors")
    names = match_names(tmp_path / "a.safetensors", variables)
    assert names == {name: path for name, path, _ in layers}
    from_state_dict(tmp_path / "a.safetensors", names=names, variables=variables)


def test_a_prefix_that_no_key_has():
    state_dict, variables = both_sides([("a", "a", C)])
    message = "`prefix` must be what keys of `state_dict` begin with; got 'model.'."
    with pytest.raises(ValueError, match=re.escape(message)):
        match_names(state_dict, variables, "model.")


def test_one_layer():
    assert match_names({"weight": zeros(4)}, {"params": {"scale": zeros(4)}}) == {"": ""}
    assert match_names({}, {}) == {}


REFUSED = {
    "another number, another shape": (
        [("a", "Conv_0", C), ("b", "Conv_1", C), ("fc", "head", D)],
        [("a", "Conv_0", C), ("fc", "head", dense(4, 5))],
        "The torch model and the Flax model must have the same layers; leave out those that take "
        "no part. They differ in these (shapes in torch's layout):"
        "\n\tweight [4, 4, 3, 3]: torch a, b; Flax Conv_0"
        "\n\tweight [4, 4], bias [4]: torch fc; Flax none"
        "\n\tweight [5, 4], bias [5]: torch none; Flax head",
    ),
    "no order": (
        [("a", "", D), ("b", "", D)],
        [("", "x", D), ("", "y", D)],
        "The layers match in more than one way, in these two among others. Pass those that you "
        "know as `known`, or name the Flax modules as in torch."
        "\n\ta, weight [4, 4], bias [4]: x or y\n\tb, weight [4, 4], bias [4]: y or x",
    ),
    "orders that contradict each other": (
        [("a.0", "", C), ("a.1", "", conv(4, 4, 1)), ("b", "", C)],
        [("", "Conv_0", C), ("", "Conv_1", C), ("", "Conv_2", conv(4, 4, 1))],
        "in more than one way",
    ),
    "norms between convolutions that contradict their order": (
        [
            ("0", "", conv(4, 8)),
            ("1", "", norm(8)),
            ("2", "", conv(8, 8, 1)),
            ("3", "", norm(8)),
            ("4", "", conv(8, 8, 5)),
        ],
        [
            ("a", "Conv_1", conv(4, 8)),
            ("b", "BatchNorm_0", norm(8)),
            ("c", "Conv_0", conv(8, 8, 1)),
            ("d", "BatchNorm_1", norm(8)),
            ("e", "Conv_2", conv(8, 8, 5)),
        ],
        "in more than one way",
    ),
    "lists side by side, and modules": (
        [("convs.0", "", C), ("convs.1", "", C), ("norms.0", "", B), ("norms.1", "", B)],
        [
            ("a", "Block_0/Conv_0", C),
            ("b", "Block_0/BatchNorm_0", B),
            ("c", "Block_1/Conv_0", C),
            ("d", "Block_1/BatchNorm_0", B),
        ],
        "The torch model and the Flax model have the same layers, but nested or ordered in other "
        "ways. Pass those that you know as `known`, or name the Flax modules as in torch."
        "\n\tweight [4, 4, 3, 3]: torch convs.0, convs.1; Flax Block_0/Conv_0, Block_1/Conv_0"
        "\n\tweight [4], bias [4], running_mean [4], running_var [4]: torch norms.0, norms.1; "
        "Flax Block_0/BatchNorm_0, Block_1/BatchNorm_0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    theirs, ours, message = REFUSED[case]
    state_dict = {f"{name}.{e}": v for name, _, entries in theirs for e, v in entries.items()}
    _, variables = both_sides([(path, path, entries) for _, path, entries in ours])
    with pytest.raises(ValueError, match=re.escape(message)):
        match_names(state_dict, variables)


def test_initializers_of_onnx():
    state_dict, variables = both_sides([("fc", "fc", D)])
    with pytest.raises(ValueError, match=r'Flax conv\n\t"onnx::Conv_1" is a name from'):
        match_names(
            state_dict | {"onnx::Conv_1": zeros(4, 4, 3, 3)},
            {"params": variables["params"] | {"conv": {"kernel": zeros(3, 3, 4, 4)}}},
        )


@pytest.mark.parametrize(
    ("known", "strange"),
    [({"c": "x"}, "'c'"), ({"a": "z"}, "'z'"), ({"a": "x", "b": "x"}, "'x', 'x'")],
    ids=str,
)
def test_known_that_is_not_there(known, strange):
    state_dict, variables = both_sides([("a", "x", C), ("b", "y", C)])
    message = "`known` must map torch modules to Flax modules, each with layers in it and once; got"
    with pytest.raises(ValueError, match=re.escape(f"{message} {strange}.")):
        match_names(state_dict, variables, known=known)


def test_the_network_of_the_example():
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    variables = jax.eval_shape(mobilenet.MobileNetV2().init, jax.random.key(0), images)
    values = jax.tree.map(lambda v: np.zeros(v.shape, v.dtype), variables)
    state_dict = to_state_dict(values["params"], values["batch_stats"], names=mobilenet.names())
    assert match_names(state_dict, variables) == mobilenet.names()


NETWORKS = {
    "ResNet18": ["ResNet18", "NnxResNet18"],
    "ResNet18, shortcut first": [functools.partial(flax_networks.ResNet18, shortcut_first=True)],
    "MobileNetV2": ["MobileNetV2", "NnxMobileNetV2"],
    "DenseNet": ["DenseNet", "NnxDenseNet"],
    "UNet": ["UNet", "NamedUNet", "NnxUNet"],
}
IMAGES = np.random.RandomState(0).normal(size=(2, 32, 32, 3)).astype(np.float32)


@functools.cache
def torch_network(name):
    """The entries of a network that was trained, and its output."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from helpers import torch_networks

    model, random = getattr(torch_networks, name)().eval(), np.random.RandomState(1)
    for value in model.state_dict().values():
        if value.ndim > 1:
            drawn = random.normal(size=value.shape) / np.sqrt(value[0].numel())
        else:
            drawn = random.uniform(0.5, 1.5, value.shape) if value.ndim else 3
        value.copy_(torch.as_tensor(drawn))
    with torch.no_grad():
        y = model(torch.tensor(IMAGES).permute(0, 3, 1, 2)).numpy()
    return model.state_dict(), np.moveaxis(y, 1, -1)


def import_into(model, state_dict, **options):
    """Its names and its output, by the documented steps."""
    if isinstance(model, nnx.Module):
        states = nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)
        variables = dict(zip(("params", "batch_stats"), states, strict=True))
    else:
        variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    names = match_names(state_dict, variables)
    params, stats = from_state_dict(state_dict, names=names, variables=variables, **options)
    if isinstance(model, nnx.Module):
        nnx.update(model, params, stats)
        return names, nnx.jit(lambda model, x: model(x))(model, IMAGES)
    return names, jax.jit(model.apply)({"params": params, "batch_stats": stats}, IMAGES)


@pytest.mark.parametrize(
    ("name", "twin"), [(name, twin) for name, twins in NETWORKS.items() for twin in twins]
)
def test_networks_without_help(name, twin):
    name = name.partition(",")[0]
    state_dict, expected = torch_network(name)
    options = {"transposed": ["up2", "up1"]} if name == "UNet" else {}
    model = getattr(flax_networks, twin) if isinstance(twin, str) else twin
    names, y = import_into(model(), state_dict, **options)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert set(names.guessed) == ({"up2", "up1"} if twin == "NamedUNet" else names.keys())
