"""The example trainer, as a newcomer runs it."""

import contextlib
import io
import json
import re

import figures
import jax
import numpy as np
import pytest
import train_cnn
from command_line import parse
from helpers import training
from layers import told_apart
from model import NORMS

pytestmark = [pytest.mark.trained, pytest.mark.usefixtures("standard_promotion")]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """The flags for eight steps on small images, which the batches do not divide."""
    path = training.save_images(tmp_path_factory.mktemp("images"))
    return ["--data", str(path), "--batch-size", "26", "--epochs", "2"]


@pytest.fixture(scope="module")
def compared(few, tmp_path_factory):
    """Each norm is trained, and all are compared: the folder of the output, and what is printed."""
    folder = tmp_path_factory.mktemp("compared") / "all"
    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patched,
        jax.numpy_dtype_promotion("standard"),
        contextlib.redirect_stdout(printed),
    ):
        training.keep(patched.setattr)
        assert train_cnn.main([*few, "--output", str(folder), "--compare"]) == 0
    return folder, printed.getvalue()


def metrics(folder):
    """The lines of metrics in a folder."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def accuracies(output):
    """Test accuracy in inference mode and by batch statistics, in percent."""
    return [float(v) for v in re.findall(r"^test accuracy .* ([\d.]+)%$", output, re.MULTILINE)]


def log(output):
    """The lines of the epochs without their times."""
    return re.findall(r"^ +\d+ .*%(?= +[\d.]+$)", output, re.MULTILINE)


@pytest.mark.parametrize(
    ("flags", "epochs", "least", "apart"),
    [
        (["--epochs", "2"], 2, 90, 5),
        pytest.param([], 30, 98.5, 1, marks=pytest.mark.slow),  # as is promised
    ],
)
def test_default_flags_reach_their_accuracy(flags, epochs, least, apart, capsys):
    assert train_cnn.main(flags) == 0
    output = capsys.readouterr().out
    inference, batch = accuracies(output)
    assert inference >= least
    assert abs(inference - batch) <= apart
    assert len(log(output)) == epochs
    assert "batch norm over 1024 training images, against running statistics" in output
    assert "why inference mode differs" not in output


@pytest.mark.parametrize(
    "flags",
    [[], ["--dtype", "bfloat16", "--norm", "ghost", "--steps-per-call", "2"], ["--norm", "none"]],
)
def test_same_seed_same_result(flags, few, monkeypatch, capsys):
    training.keep(monkeypatch.setattr)
    outputs = []
    for seed in ("1", "1", "2"):
        assert train_cnn.main([*few, "--seed", seed, *flags]) == 0
        outputs.append(capsys.readouterr().out)
    first, again, other = map(log, outputs)
    assert first == again
    assert first != other
    assert len(accuracies(outputs[0])) == (1 if "none" in flags else 2)


@pytest.mark.parametrize(
    ("momentum", "kind"),
    [("0.95", "momentum"), ("0", "momentum_of_zero"), ("0.01", "too_few_steps")],
)
def test_the_end_explains_why_the_modes_differ(momentum, kind, few, monkeypatch, capsys):
    training.keep(monkeypatch.setattr)
    # Thirty images would not tell the modes apart.
    monkeypatch.setattr(train_cnn, "told_apart", lambda first, second, samples: samples == 30)
    assert train_cnn.main([*few, "--momentum", momentum]) == 0
    output = capsys.readouterr().out
    assert re.findall(r"^(\w+): The running statistics", output, re.MULTILINE) == [kind]
    assert "What to do: " in output


@pytest.mark.parametrize(
    ("first", "second", "samples", "apart"),
    [(0.9, 0.9, 100, False), (0.9, 0.85, 100, False), (0.9, 0.85, 10_000, True), (1, 0, 3, True)],
)
def test_accuracies_are_told_apart(first, second, samples, apart):
    assert told_apart(first, second, samples) == apart


def png_size(path):
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    return tuple(int.from_bytes(header[i : i + 4], "big") for i in (16, 20))


def drawn(folder):
    """The names of the figures in a folder, which are large enough to be read."""
    paths = list(folder.glob("*.png"))
    assert all(min(png_size(path)) >= 250 for path in paths)
    return {path.stem for path in paths}


ALL = {"history", "drift", "confusion", "mistakes"}


def test_figures_and_a_table_for_each_norm(compared):
    folder, printed = compared
    assert {norm: drawn(folder / norm) for norm in NORMS} == {
        **dict.fromkeys(NORMS, ALL),
        "none": ALL - {"drift"},
    }
    parts = re.split(r"^─+ (\w+) ─+$", printed, flags=re.MULTILINE)[1:]
    table = "batch norm over 100 training images, against running statistics"
    with_table = {name: table in part for name, part in zip(parts[::2], parts[1::2], strict=True)}
    assert with_table == {**dict.fromkeys(NORMS, True), "none": False}


def test_figures_where_nothing_drifts(few, tmp_path, monkeypatch):
    """With momentum 0 the drift is 0; over one epoch there is none to draw."""
    kept, draw_run = [], figures.draw_run

    def draw(*arguments):
        kept[:] = arguments
        draw_run(*arguments)

    training.keep(monkeypatch.setattr)
    monkeypatch.setattr(figures, "draw_run", draw)
    assert train_cnn.main([*few, "--momentum", "0", "--output", str(tmp_path)]) == 0
    assert drawn(tmp_path) == ALL
    folder, title, history, *others = kept
    assert history[1].drift == {f"Block_{i}/BatchNorm2d_0": [0, 0] for i in range(2)}
    folder = tmp_path / "one epoch"
    folder.mkdir()
    draw_run(folder, title, history[:1], *others)
    assert drawn(folder) == ALL - {"drift"}


def test_one_figure_compares_the_norms(compared, few, monkeypatch, capsys):
    folder, printed = compared
    assert {path.name for path in folder.iterdir()} == {*NORMS, "comparison.png"}
    assert png_size(folder / "comparison.png")[0] > 1000
    rows = re.findall(r"^│ (\w+) +│ +[\d.]+ │ +[\d.]+% │", printed, re.MULTILINE)
    assert [row for row in rows if row in NORMS] == list(NORMS)
    training.keep(monkeypatch.setattr)
    flags = [*few, "--output", str(folder), "--compare", "none", "ghost", "--resume"]
    assert train_cnn.main(flags) == 0
    assert capsys.readouterr().out.count("continues after step 8") == 2


def test_jaxbn_and_flax_are_one_function_in_training(compared):
    """The losses of the first steps, before rounding is amplified; ghost batch norm differs."""
    folder, _ = compared
    losses = {
        norm: [line["loss"] for line in metrics(folder / norm) if "loss" in line][:5]
        for norm in ("jaxbn", "flax", "ghost")
    }
    np.testing.assert_allclose(losses["flax"], losses["jaxbn"], rtol=1e-4)
    assert abs(losses["ghost"][0] - losses["jaxbn"][0]) > 1e-3


def test_metrics_have_a_line_for_each_step_and_epoch(compared):
    folder, printed = compared
    lines = metrics(folder / "jaxbn")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    first = lines[4]
    assert first["epoch"] == 1
    losses = np.array([line["loss"] for line in lines[:4]])
    assert first["train_loss"] == pytest.approx(losses @ [26, 26, 26, 22] / 100)
    assert list(first["drift"]) == ["Block_0/BatchNorm2d_0", "Block_1/BatchNorm2d_0"]
    assert 0 <= first["waited"] < first["seconds"]
    assert f"{first['test_accuracy']:.2%}" in printed.partition(" flax ")[0]


def test_a_loss_that_is_not_finite_ends_the_run(few, monkeypatch, capsys):
    training.keep(monkeypatch.setattr)
    flags = [*few, "--norm", "none", "--learning-rate", "1000", "--epochs", "50"]
    assert train_cnn.main(flags) == 1
    error = capsys.readouterr().err
    assert re.match(r"train_cnn.py: error: the loss of step \d+ is (nan|inf); lower --lea", error)


FLAGS = {
    "--epochs 0": "--epochs: must be a whole number at least 1; got '0'",
    "--epochs 1.5": "--epochs: must be a whole number at least 1; got '1.5'",
    "--batch-size 1": "--batch-size: must be a whole number at least 2; got '1'",
    f"--epochs {2**63}": "--epochs: must be a whole number at least 1 and at most 2147483647; got",
    f"--epochs {2**31 - 1}": "--epochs 2147483647 of 23 steps are more than 2147483647 steps",
    "--norm ghost --ghost-size 1438": "--ghost-size 1438 is more than the 1437 training images",
    "--range 3 3": "--range must be two numbers that differ; got 3 twice",
    "--range 0 inf": "--range: must be a number at least -1e+18 and at most 1e+18; got 'inf'",
    "--batch-size 5000": "--batch-size 5000 is more than the 1437 training images",
    "--learning-rate 0": "--learning-rate: must be a number above 0",
    "--learning-rate nan": "--learning-rate: must be a number above 0",
    "--momentum 1.1": "--momentum: must be a number at least 0 and at most 1; got '1.1'",
    "--seed -1": "--seed: must be a whole number at least 0",
    "--dtype int8": "--dtype: invalid choice: 'int8'",
    "--data nowhere.npz": "nowhere.npz: no such file",
    "--output nowhere/run": "--output: must be a folder, or a new one in an existing folder",
    "--output README.md": "--output: must be a folder, or a new one in an existing folder",
    "--compare --norm flax": "--compare and --norm exclude each other; to compare some norms only",
    "--resume": "--resume needs --output, the folder of the checkpoints",
    "--save-every 3": "--save-every needs --output, the folder of the checkpoints",
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
    "--timeout 9": "--timeout is for several processes; give --processes too",
    "--processes 2 --seed -1": "--seed: must be a whole number at least 0",
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
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS")
    monkeypatch.delenv("JAX_PROCESS_ID")
    with pytest.raises(SystemExit):
        parse("", [])
    assert "missing: --coordinator, --process-id" in capsys.readouterr().err
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(SystemExit):
        parse("", [])
    assert (
        "error: JAX_NUM_PROCESSES must be a whole number at least 1; got 'two'"
        in capsys.readouterr().err
    )


def test_devices_do_not_change_the_result(few, monkeypatch, x64):
    one, *others = (
        training.trained_on(devices, monkeypatch, *few, dtype="float64")
        for devices in sorted({1, 3, jax.device_count()})
    )
    assert one["batch_stats/Block_0/BatchNorm2d_0/count"] == 8
    for several in others:
        for name in one:
            np.testing.assert_allclose(several[name], one[name], 1e-12, 1e-12, err_msg=name)


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


def test_other_images_train_too(tmp_path, monkeypatch, capsys):
    """In colour, not square, from 0 to 1 in float64."""
    training.keep(monkeypatch.setattr)
    flags = ["--data", str(training.save_colours(tmp_path)), *training.ON_COLOURS]
    assert train_cnn.main(flags) == 0
    output = capsys.readouterr().out
    assert accuracies(output)[0] == 100
    assert "of (9, 8, 3), 3 classes, cnn" in output
    assert "\n0 to 255 in an image file stand for 0 to 1 in the training images\n" in output


@pytest.mark.parametrize("made", [False, True])
@pytest.mark.parametrize("compare", [[], ["--compare"]])
def test_a_start_that_fails_leaves_no_folder(compare, made, tmp_path, capsys):
    folder = tmp_path / "run"
    if made:
        folder.mkdir()
    assert train_cnn.main(["--data", "nowhere.npz", "--output", str(folder), *compare]) == 1
    assert "no such file" in capsys.readouterr().err
    assert folder.exists() == made
    assert not made or not list(folder.iterdir())
