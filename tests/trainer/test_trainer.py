"""The example trainer, as a newcomer runs it."""

import json
import re

import jax
import numpy as np
import pytest
import train_cnn
from command_line import parse
from helpers import training
from model import NORMS
from rich.console import Console

pytestmark = pytest.mark.usefixtures("standard_promotion")


def metrics(folder):
    """The lines of metrics in a folder."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


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


@pytest.mark.parametrize("flags", [[], ["--dtype", "bfloat16"], ["--norm", "none"]])
def test_same_seed_same_result(flags, monkeypatch, capsys):
    training.keep(monkeypatch.setattr, flags[1] if "bfloat16" in flags else "float32")
    outputs = []
    for seed in ("1", "1", "2"):
        assert train_cnn.main(["--epochs", "2", "--seed", seed, *flags]) == 0
        outputs.append(capsys.readouterr().out)
    first, again, other = map(log, outputs)
    assert first == again
    assert first != other
    assert len(accuracies(outputs[0])) == (1 if "none" in flags else 2)


def png_size(path):
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    return tuple(int.from_bytes(header[i : i + 4], "big") for i in (16, 20))


ALL = {"history", "drift", "confusion", "mistakes"}


@pytest.mark.parametrize(
    ("flags", "figures"),
    [
        (["--epochs", "2"], ALL),
        (["--epochs", "1"], ALL - {"drift"}),
        (["--epochs", "2", "--norm", "none"], ALL - {"drift"}),
        (["--epochs", "2", "--momentum", "0"], ALL),
    ],
)
def test_figures(flags, figures, tmp_path, monkeypatch, capsys):
    training.keep(monkeypatch.setattr)
    assert train_cnn.main([*flags, "--batch-size", "200", "--output", str(tmp_path)]) == 0
    assert {path.stem for path in tmp_path.glob("*.png")} == figures
    assert all(min(png_size(path)) >= 250 for path in tmp_path.glob("*.png"))
    table = "batch norm over 1024 training images, against running statistics"
    assert (table in capsys.readouterr().out) == ("none" not in flags)


def test_one_figure_compares_the_norms(tmp_path, monkeypatch, capsys):
    training.keep(monkeypatch.setattr)
    flags = ["--epochs", "2", "--batch-size", "200", "--output", str(tmp_path / "all")]
    assert train_cnn.main([*flags, "--compare"]) == 0
    assert {path.name for path in (tmp_path / "all").iterdir()} == {*NORMS, "comparison.png"}
    assert png_size(tmp_path / "all" / "comparison.png")[0] > 1000
    output = capsys.readouterr().out
    rows = re.findall(r"^│ (\w+) +│ +[\d.]+ │ +[\d.]+% │", output, re.MULTILINE)
    assert [row for row in rows if row in NORMS] == list(NORMS)
    assert train_cnn.main([*flags, "--compare", "none", "ghost", "--resume"]) == 0
    assert capsys.readouterr().out.count("goes on after step 16") == 2


def test_jaxbn_and_flax_are_one_function_in_training(tmp_path, monkeypatch):
    """The losses of the first steps, before rounding is amplified; ghost batch norm differs."""
    losses = {}
    for norm in ("jaxbn", "flax", "ghost"):
        with monkeypatch.context() as patched:
            training.keep(patched.setattr)
            folder = tmp_path / norm
            flags = ["--epochs", "1", "--norm", norm, "--output", str(folder)]
            assert train_cnn.main(flags) == 0
        losses[norm] = [line["loss"] for line in metrics(folder)[:5]]
    np.testing.assert_allclose(losses["flax"], losses["jaxbn"], rtol=1e-4)
    assert abs(losses["ghost"][0] - losses["jaxbn"][0]) > 1e-3


def test_metrics_have_a_line_for_each_step_and_epoch(tmp_path, monkeypatch, capsys):
    training.keep(monkeypatch.setattr)
    flags = ["--epochs", "2", "--batch-size", "500", "--output", str(tmp_path)]
    assert train_cnn.main(flags) == 0
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 6, 6]
    first = lines[3]
    assert first["epoch"] == 1
    losses = np.array([line["loss"] for line in lines[:3]])
    assert first["train_loss"] == pytest.approx(losses @ [500, 500, 437] / 1437)
    assert list(first["drift"]) == ["Block_0/BatchNorm2d_0", "Block_1/BatchNorm2d_0"]
    assert 0 <= first["waited"] < first["seconds"]
    assert f"{first['test_accuracy']:.2%}" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_ends_the_run(monkeypatch, capsys):
    training.keep(monkeypatch.setattr)
    assert train_cnn.main(["--norm", "none", "--learning-rate", "1000", "--epochs", "50"]) == 1
    error = capsys.readouterr().err
    assert re.match(r"train_cnn.py: error: the loss of step \d+ is (nan|inf); lower --lea", error)


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
    "--output nowhere/run": "--output: must be a folder, or a new one in an existing folder",
    "--output README.md": "--output: must be a folder, or a new one in an existing folder",
    "--resume": "--resume and --save-every take an --output folder",
    "--save-every 3": "--resume and --save-every take an --output folder",
    "--save-every 0 --output .": "--save-every: must be a whole number at least 1; got '0'",
    "--shift 8": "--shift 8 must be less than the 8 pixels of an image",
    "--norm batch": "--norm: invalid choice: 'batch'",
    "--compare jaxbn torch": "--compare: invalid choice: 'torch'",
    "--ghost-size 1": "--ghost-size: must be a whole number at least 2; got '1'",
    "--model vgg": "--model: invalid choice: 'vgg'",
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


@pytest.mark.parametrize("devices", sorted({3, jax.device_count()}))
def test_devices_do_not_change_the_result(devices, monkeypatch, x64, tmp_path):
    np.savez(tmp_path / "images.npz", **training.arrays(training.images(100)))
    flags = ["--data", str(tmp_path / "images.npz"), "--epochs", "4", "--batch-size", "26"]
    results = []
    for count in (1, devices):
        with monkeypatch.context() as patched, training.spread_over(count) as sharding:
            result = training.keep(patched.setattr, "float64")
            train_cnn.run(parse("", flags), flags, sharding, Console(quiet=True))
        results.append(result)
    one, several = results
    assert one["batch_stats/Block_0/BatchNorm2d_0/count"] == 16
    for name in one:
        np.testing.assert_allclose(several[name], one[name], rtol=1e-12, atol=1e-12, err_msg=name)


def test_one_image_left_over(tmp_path, monkeypatch, capsys):
    path = tmp_path / "images.npz"
    flags = ["--data", str(path), "--epochs", "1", "--batch-size", "16"]
    np.savez(path, **training.arrays(training.images(33, size=8)))
    result = training.keep(monkeypatch.setattr)
    assert train_cnn.main(flags) == 0
    assert result["batch_stats/Block_1/BatchNorm2d_0/count"] == 3
    assert all(np.isfinite(value).all() for value in result.values())
    np.savez(path, **training.arrays(training.images(33, size=2)))
    capsys.readouterr()
    for norm in ("jaxbn", "flax", "ghost"):
        assert train_cnn.main([*flags, "--norm", norm]) == 1
    assert train_cnn.main([*flags, "--norm", "none"]) == 0
    assert capsys.readouterr().err == 3 * (
        "train_cnn.py: error: --batch-size 16 leaves one image over: Expected more than 1 value "
        "per channel when training, got input size (1, 1, 1, 16)\n"
    )


def test_other_images_train_too(tmp_path, capsys):
    path = tmp_path / "images.npz"
    x = np.random.RandomState(0).uniform(size=(64, 5, 7, 3))
    x[::2] += 1.0
    y = np.tile([1, 0], 32)
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
    flags = ["--data", str(path), "--epochs", "5", "--batch-size", "16"]
    assert train_cnn.main(flags) == 0
    assert accuracies(capsys.readouterr().out)[0] == 100
