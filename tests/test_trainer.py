"""The example trainer, as a newcomer runs it."""

import contextlib
import io
import pathlib
import re
import zipfile

import data
import figures
import jax
import numpy as np
import pytest
import train_cnn
import training
from batches import Batch, batches
from command_line import parse
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from model import CNN


@pytest.fixture(autouse=True)
def standard_promotion():
    """Users run the examples under JAX's defaults."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def accuracies(output):
    """Test accuracy in inference mode and by batch statistics, in percent."""
    return [float(v) for v in re.findall(r"^test accuracy .* ([\d.]+)%$", output, re.MULTILINE)]


def log(output):
    """The lines of the epochs without their times."""
    return re.findall(r"^ +\d+ .*%(?= +[\d.]+$)", output, re.MULTILINE)


def test_default_flags_reach_the_promised_accuracy(capsys):
    assert train_cnn.main([]) == 0
    output = capsys.readouterr().out
    inference, batch = accuracies(output)
    assert inference >= 98.5
    assert abs(inference - batch) <= 1.0
    assert len(log(output)) == 30


@pytest.mark.parametrize("flags", [[], ["--dtype", "bfloat16"], ["--no-batch-norm"]])
def test_same_seed_same_result(flags, capsys):
    outputs = []
    for seed in ("1", "1", "2"):
        assert train_cnn.main(["--epochs", "2", "--seed", seed, *flags]) == 0
        outputs.append(capsys.readouterr().out)
    first, again, other = map(log, outputs)
    assert first == again
    assert first != other
    assert len(accuracies(outputs[0])) == (1 if flags == ["--no-batch-norm"] else 2)


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        (["--epochs", "2"], (1320, 960)),
        (["--epochs", "1"], (1320, 480)),
        (["--epochs", "2", "--no-batch-norm"], (1320, 480)),
        (["--epochs", "2", "--momentum", "0"], (1320, 960)),
    ],
)
def test_plot(flags, size, tmp_path):
    path = tmp_path / "history.png"
    assert train_cnn.main([*flags, "--batch-size", "200", "--plot", str(path)]) == 0
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert tuple(int.from_bytes(header[i : i + 4], "big") for i in (16, 20)) == size


def test_drift_is_measured_in_units_of_the_layer():
    old = {"mean": np.array([0.0, 1.0]), "var": np.array([4.0, 1.0])}
    new = {"mean": np.array([2.0, 1.0]), "var": np.array([4.0, 2.0])}
    assert figures.mean_drift(old, new) == pytest.approx(np.sqrt(0.5))
    assert figures.var_drift(old, new) == pytest.approx(np.sqrt(0.5))
    assert figures.mean_drift(old, old) == figures.var_drift(old, old) == 0


FLAGS = {
    "--epochs 0": "--epochs: must be a whole number at least 1; got '0'",
    "--epochs 1.5": "--epochs: must be a whole number at least 1; got '1.5'",
    "--batch-size 1": "--batch-size: must be a whole number at least 2; got '1'",
    "--batch-size 5000": "--batch-size 5000 is more than the 1437 training images",
    "--learning-rate 0": "--learning-rate: must be a number above 0",
    "--learning-rate nan": "--learning-rate: must be a number above 0",
    "--momentum 1.1": "--momentum: must be a number at least 0 and at most 1; got '1.1'",
    "--seed -1": "--seed: must be a whole number at least 0",
    "--dtype int8": "--dtype: invalid choice: 'int8'",
    "--data nowhere.npz": "nowhere.npz: no such file",
    "--plot history.jpg": "--plot: must end in .png; got 'history.jpg'",
    "--plot nowhere/history.png": "--plot: must be a file in an existing folder",
    "--coordinator nowhere": "--coordinator: must be HOST:PORT; got 'nowhere'",
    "--coordinator host:0": "--coordinator: must be HOST:PORT; got 'host:0'",
    "--coordinator host:1": "go together; missing: --processes, --process-id",
    "--processes 2 --process-id 0": "go together; missing: --coordinator",
    "--processes 0": "--processes: must be a whole number at least 1; got '0'",
    "--process-id -1": "--process-id: must be a whole number at least 0; got '-1'",
    "--coordinator host:1 --processes 2 --process-id 2": "must be below --processes 2; got 2",
    "--timeout 0": "--timeout: must be a whole number at least 1; got '0'",
    "--timeout 9": "--timeout is for several processes",
    "--no-such-flag": "unrecognized arguments: --no-such-flag",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_bad_flags_give_one_line(flags, capsys):
    try:
        status = train_cnn.main(flags.split())
    except SystemExit as exit_:
        status = exit_.code
    captured = capsys.readouterr()
    assert status in (1, 2)
    assert captured.out == ""
    assert captured.err.startswith("train_cnn.py: error: ")
    assert captured.err.count("\n") == 1
    assert FLAGS[flags] in captured.err


def test_the_environment_stands_for_flags(monkeypatch, capsys):
    assert parse("", []).coordinator is None
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "[::1]:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    flags = parse("", ["--process-id", "1"])
    assert (flags.coordinator, flags.processes, flags.process_id) == ("[::1]:1234", 3, 1)
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(SystemExit):
        parse("", [])
    assert "--processes: must be a whole number at least 1; got 'two'" in capsys.readouterr().err


@contextlib.contextmanager
def spread_over(devices):
    """Makes this many devices the mesh; gives the sharding of a batch."""
    types, chosen = (AxisType.Auto,), jax.devices()[:devices]
    mesh = jax.make_mesh((devices,), ("batch",), axis_types=types, devices=chosen)
    with jax.set_mesh(mesh):
        yield NamedSharding(mesh, PartitionSpec("batch"))


def images(train, test=20, size=6):
    """Images of three classes, told apart by a diagonal."""
    y = np.arange(train + test) % 3
    x = np.random.RandomState(0).normal(size=(train + test, size, size, 1))
    x += y[:, None, None, None] * np.eye(size)[..., None]
    x, y = x.astype(np.float32), y.astype(np.int32)
    return data.Dataset(x[:train], y[:train], x[train:], y[train:])


DEVICES = sorted({1, 3, jax.device_count()})


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("size", [2, 26, 99, 100])
def test_batches_hold_every_sample_once(devices, size):
    order = np.random.RandomState(0).permutation(100)
    labels = np.arange(100)
    pictures = np.repeat(labels, 12).reshape(100, 2, 3, 2)
    with spread_over(devices) as sharding:
        made = list(batches(pictures, labels, order, size, sharding))
    assert {batch.labels.shape[0] for batch in made} == {-(-size // devices) * devices}
    assert all(batch.mask.sum() <= size for batch in made)
    seen = np.concatenate([np.asarray(batch.labels)[np.asarray(batch.mask)] for batch in made])
    np.testing.assert_array_equal(seen, order)
    for batch in made:
        assert batch.images.sharding.num_devices == devices
        np.testing.assert_array_equal(batch.images, pictures[np.asarray(batch.labels)])


def test_padding_changes_nothing(x64):
    """A step and an evaluation on 5 samples, in a batch of 5 and in one of 16 over devices."""
    dataset = images(5)
    model = CNN(3, dtype=np.dtype("float64"), features=(8, 8))
    tx = train_cnn.optimizer(1e-2, 1)
    results = []
    for devices, size in ((1, 5), (jax.device_count(), 16)):
        with spread_over(devices) as sharding:
            (batch,) = batches(dataset.x_train, dataset.y_train, np.arange(5), size, sharding)
            state = train_cnn.initial_state(0, (6, 6, 1), model=model, tx=tx)
            state, metrics = train_cnn.train_step(state, batch, model=model, tx=tx)
            tests = [
                train_cnn.evaluate(state.variables, batch, model=model, by_batch=by_batch)
                for by_batch in (False, True)
            ]
        state = state._replace(key=jax.random.key_data(state.key))
        results.append(jax.device_get((state, metrics, tests)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), *results)


def test_loss_and_hits_are_those_of_the_samples_that_count():
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [0.0, 9.0]])  # the last is right, and padding
    batch = Batch(None, np.array([0, 0, 1]), np.array([True, True, False]))
    loss, hits = train_cnn.loss_and_hits(logits, batch)
    assert loss == pytest.approx(np.log1p(np.exp(-2)) + np.log1p(np.exp(1)))
    assert hits == 1


def test_metrics_are_means_over_the_samples():
    epoch = train_cnn.record([(6.0, 3), (1.0, 0)], (4.0, 1), {}, images(5, test=2))
    assert epoch[:4] == (7 / 5, 3 / 5, 4 / 2, 1 / 2)


@pytest.mark.parametrize("devices", DEVICES[1:])
def test_devices_do_not_change_the_result(devices, monkeypatch, x64):
    flags = parse("", ["--epochs", "4", "--batch-size", "26"])
    results = []
    for count in (1, devices):
        with monkeypatch.context() as patched, spread_over(count) as sharding:
            result = training.keep(patched.setattr, "float64")
            assert train_cnn.run(flags, images(100), sharding) == 0
        results.append(result)
    one, several = results
    assert one["batch_stats/Block_0/BatchNorm2d_0/count"] == 16
    for name in one:
        np.testing.assert_allclose(several[name], one[name], rtol=1e-12, atol=1e-12, err_msg=name)


def test_one_image_left_over(tmp_path, monkeypatch, capsys):
    path = tmp_path / "images.npz"
    flags = ["--data", str(path), "--epochs", "1", "--batch-size", "16"]
    np.savez(path, **images(33, size=8)._asdict())
    result = training.keep(monkeypatch.setattr)
    assert train_cnn.main(flags) == 0
    assert result["batch_stats/Block_1/BatchNorm2d_0/count"] == 3
    assert all(np.isfinite(value).all() for value in result.values())
    np.savez(path, **images(33, size=2)._asdict())
    capsys.readouterr()
    assert train_cnn.main(flags) == 1
    assert train_cnn.main([*flags, "--no-batch-norm"]) == 0
    assert capsys.readouterr().err == (
        "train_cnn.py: error: --batch-size 16 leaves one image over: Expected more than 1 value "
        "per channel when training, got input size (1, 1, 1, 8)\n"
    )


X = np.arange(6 * 4 * 4).reshape(6, 4, 4)
Y = np.array([0, 1, 2, 0, 1, 2])
GOOD = {"x_train": X, "y_train": Y, "x_test": X[:2], "y_test": Y[:2]}
BAD = {
    "no images": ({"x_train": X[:0], "y_train": Y[:0]}, "x_train must hold numbers"),
    "one image": (
        {"x_test": X[:1], "y_test": Y[:1]},
        "at least two images; got int64 of shape (1,",
    ),
    "labels in words": ({"y_train": Y.astype(str)}, "y_train must hold an integer from 0 to 9999"),
    "enormous pixels": ({"x_train": X * 1e300}, "finite, below 1e18 and not all the same"),
    "flat images": ({"x_train": X.reshape(6, 16)}, "x_train must hold numbers of shape [N, H, W]"),
    "words": ({"x_test": np.full((2, 4, 4), "x")}, "x_test must hold numbers"),
    "too few labels": ({"y_train": Y[:5]}, "y_train must hold an integer"),
    "float labels": ({"y_train": Y / 2}, "y_train must hold an integer"),
    "negative labels": ({"y_test": -Y[:2] - 1}, "y_test must hold an integer from 0 to 9999"),
    "labels without images": ({"y_test": Y[:0]}, "y_test must hold an integer"),
    "enormous labels": ({"y_train": Y.astype(np.uint64) + 2**40}, "integer from 0 to 9999"),
    "unknown labels": ({"y_test": Y[:2] + 9}, "y_test has labels that y_train has not"),
    "other size": ({"x_test": X[:2, :3]}, "training images have shape (4, 4), test images (3, 4)"),
    "blank images": ({"x_train": 0 * X}, "finite, below 1e18 and not all the same"),
    "NaN pixels": (
        {"x_test": np.full((2, 4, 4), np.nan)},
        "finite, below 1e18 and not all the same",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data(case, tmp_path):
    changes, message = BAD[case]
    path = tmp_path / "images.npz"
    np.savez(path, **GOOD | changes)
    with pytest.raises(data.DataError, match=re.escape(message)):
        data.load(path)


def test_broken_archives(tmp_path):
    path = tmp_path / "images.npz"
    whole = data.DIGITS.read_bytes()
    flipped = bytearray(whole)
    flipped[20_000:20_010] = b"0123456789"
    one_array = io.BytesIO()
    np.save(one_array, X)
    for content in (b"", b"text", whole[:1000], whole[:-100], flipped, one_array.getvalue()):
        path.write_bytes(content)
        with pytest.raises(data.DataError, match=r"not an \.npz archive that can be read"):
            data.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        for key in data.KEYS:
            archive.writestr(f"{key}.npy", "no array")
    with pytest.raises(data.DataError, match=r"not an \.npz archive that can be read"):
        data.load(path)
    np.savez(path, x_train=X)
    with pytest.raises(data.DataError, match="y_train is not a file in the archive"):
        data.load(path)
    with pytest.raises(data.DataError, match=r"not an \.npz archive that can be read"):
        data.load(tmp_path)


def test_other_images_train_too(tmp_path, capsys):
    path = tmp_path / "images.npz"
    x = np.random.RandomState(0).uniform(size=(64, 5, 7, 3))
    x[::2] += 1.0
    y = np.tile([1, 0], 32)
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
    flags = ["--data", str(path), "--epochs", "5", "--batch-size", "16"]
    assert train_cnn.main(flags) == 0
    assert accuracies(capsys.readouterr().out)[0] == 100


def test_the_digits_are_credited_and_whole():
    with np.load(data.DIGITS) as archive:
        assert "Alpaydin" in str(archive["credit"])
    digits = data.load()
    assert digits.x_train.shape == (1437, 8, 8, 1)
    assert digits.x_test.shape == (360, 8, 8, 1)
    assert digits.classes == 10
    assert abs(digits.x_train.mean()) < 1e-5
    assert abs(digits.x_train.std() - 1) < 1e-5
    everything = np.concatenate([digits.x_train, digits.x_test]).reshape(1797, -1)
    assert len(np.unique(everything, axis=0)) == 1797  # no image is in both parts
    assert pathlib.Path(data.DIGITS).stat().st_size < 50_000
