"""A resumed run continues bit for bit; a checkpoint is complete, or an error says what it is."""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import checkpoints
import classify
import figures
import folders
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import train_cnn
from checkpoints import CheckpointError, Checkpoints
from folders import LOCK
from helpers import training
from PIL import Image
from steps import Recipe, State
from trainer import Trainer, TrainingError

INTERRUPTED = r"training.py: error: interrupted(; continue with --resume)?\n"
PATIENCE = 300  # seconds, on a machine that does other things too


pytestmark = [pytest.mark.trained, pytest.mark.usefixtures("standard_promotion")]


@pytest.fixture
def images(tmp_path):
    """The flags for a data set that the batches do not divide."""
    return ["--data", str(training.save_images(tmp_path)), "--batch-size", "26"]


def told(folder):
    """The metrics of a run, but for the times, which no two runs have in common."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    times = ("seconds", "waited")
    return [{k: v for k, v in json.loads(line).items() if k not in times} for line in lines]


class Interrupted(BaseException):
    """Stands for Ctrl-C at a chosen moment."""


WAYS = {
    "default": ("float32", []),
    "ghost, with a loop": ("bfloat16", ["--norm", "ghost", "--steps-per-call", "2"]),
    "streamed": ("float32", ["--stream", "--flip", "--norm", "flax"]),
}


@pytest.mark.parametrize("way", WAYS)
def test_resumed_bit_for_bit(way, images, tmp_path, monkeypatch, capsys):
    dtype, others = WAYS[way]
    flags = [*images, "--epochs", "3", "--save-every", "3", *others]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    result = training.keep(monkeypatch.setattr, dtype)
    assert train_cnn.main([*flags, "--output", str(whole)]) == 0
    expected = dict(result)

    save, saved = Checkpoints.save, []

    def stop_after_two(self, step, *arguments):
        save(self, step, *arguments)
        saved.append(step)
        if len(saved) % 2 == 0:
            raise Interrupted

    monkeypatch.setattr(Checkpoints, "save", stop_after_two)
    for _ in range(3):
        with pytest.raises(Interrupted):
            train_cnn.main([*flags, "--output", str(parts), "--resume"])
    assert saved == [3, 4, 7, 8, 11, 12]
    capsys.readouterr()
    result.clear()
    assert train_cnn.main(["--output", str(parts), "--resume"]) == 0
    assert "continues after step 12" in capsys.readouterr().out
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(result[name], value, name)
    assert told(parts) == told(whole)
    assert len(told(whole)) == 12 + 3


def start(folder, *flags):
    """A trainer on one device, which goes on with what is in the folder."""
    flags = [*flags, "--output", folder / "run", "--resume", "--save-every", "1"]
    environment = os.environ | {
        "XLA_FLAGS": "",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        arguments = training.command(folder / "result.npz", "float32", *flags)
        return subprocess.Popen(arguments, env=environment, stdout=out, stderr=err)


def newest(folder):
    """The step of the newest checkpoint, and whether there are others that are not whole."""
    if not folder.exists():
        return 0, False
    names = [entry.name for entry in folder.iterdir()]
    whole = [int(name) for name in names if name.isdigit()]
    return max(whole, default=0), bool({*names} - {*map(str, whole), LOCK})


@pytest.mark.parametrize(
    ("kills", "epochs"), [(3, 15), pytest.param(20, 120, marks=pytest.mark.slow)]
)
def test_killed_at_any_moment(kills, epochs, images, tmp_path):
    """SIGKILLs and Ctrl-C, most in the writing of a checkpoint; nothing is lost in the end."""
    flags = [*images, "--epochs", str(epochs)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    assert start(whole, *flags).wait(PATIENCE) == 0, (whole / "err").read_text()

    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # shown where the test fails
    delays = random.Random(seed)
    reached, torn = [0], 0
    folder = killed / "run" / "checkpoints"
    for i in range(kills):
        process = start(killed, *flags)
        deadline = time.monotonic() + PATIENCE
        early = i % 4 == 3
        while not early and process.poll() is None and newest(folder)[0] == reached[-1]:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(delays.uniform(0, 4 if early else 0.3))  # early: most likely before a step
        assert process.poll() is None, (killed / "err").read_text()
        process.send_signal(signal.SIGINT if i % 2 else signal.SIGKILL)
        assert process.wait() == (130 if i % 2 else -signal.SIGKILL)
        error = (killed / "err").read_text()
        assert error == "" or (i % 2 and re.fullmatch(INTERRUPTED, error))
        step, cut_off = newest(folder)
        reached.append(step)
        torn += cut_off
    assert reached == sorted(reached)
    assert 0.7 * kills <= reached[-1] < 4 * epochs
    assert torn > 0 or kills < 20  # of many, one cuts a write off
    assert start(killed, *flags).wait(PATIENCE) == 0, (killed / "err").read_text()
    assert told(killed / "run") == told(whole / "run")
    expected, result = (dict(np.load(folder / "result.npz")) for folder in (whole, killed))
    for name, value in expected.items():
        np.testing.assert_array_equal(result[name], value, name)


def test_a_full_disk(images, tmp_path):
    """Files may not grow over one block, which is as if there were no room for them."""
    flags = [*images, "--epochs", "2", "--output", tmp_path / "run"]
    command = training.command(tmp_path / "result.npz", "float32", *flags)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # nothing in it may be cut off
    }
    process = subprocess.run(
        ["bash", "-c", 'ulimit -f 1; exec "$@"', "bash", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert process.returncode == 1
    (reason,) = [line for line in process.stderr.splitlines() if line.startswith("train_cnn")]
    place = f"train_cnn.py: error: {tmp_path / 'run' / 'checkpoints'}"
    assert reason.startswith(f"{place}: the checkpoint of step 4 cannot be written, there is none")
    assert "too large" in reason
    assert "Traceback" not in process.stderr


@pytest.mark.skipif(not pathlib.Path("/sys/kernel").is_dir(), reason="a folder nobody writes in")
def test_a_folder_that_cannot_be_written_in(images, capsys):
    assert train_cnn.main([*images, "--output", "/sys/kernel"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("train_cnn.py: error: /sys/kernel/checkpoints: ")
    assert "ermi" in error  # permission denied, or not permitted
    assert error.count("\n") == 1


STATE = {"variables": {"a": np.arange(6.0, dtype=np.float32)}, "key": np.array([1, 2], np.uint32)}


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    state = State(STATE["variables"], Recipe(1, 2), STATE["key"])._asdict()
    run = {"step": 3, "sums": [0.1, 1e-17, 7], "history": [{"loss": 1 / 3}]}
    for step in (1, 2, 3):
        Checkpoints(tmp_path).save(step, state, run)
    read = Checkpoints(tmp_path, write=False)
    assert read.steps == [2, 3]  # the newest and the one before
    saved = read.load(state)
    assert saved.run | run == saved.run
    assert jax.tree.structure(saved.state) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, saved.state, state)
    as_dicts = read.load().state
    np.testing.assert_array_equal(as_dicts["variables"]["a"], STATE["variables"]["a"])


def message(function, *arguments):
    with pytest.raises(CheckpointError) as raised:
        function(*arguments)
    return str(raised.value)


def test_older_and_foreign_checkpoints(tmp_path, monkeypatch):
    assert "no checkpoint in it" in message(Checkpoints(tmp_path / "empty").load)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "FORMAT", 0)
        Checkpoints(tmp_path / "old").save(1, STATE, {})
    error = message(Checkpoints(tmp_path / "old").load)
    assert error.startswith(f"{tmp_path / 'old' / '1'}: written in format 0 by another version")
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "PROGRAM", "other.py")
        Checkpoints(tmp_path / "other").save(1, STATE, {})
    assert "not a checkpoint of train_cnn.py" in message(Checkpoints(tmp_path / "other").load)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "foreign" / "1", STATE)
    assert "not a checkpoint of train_cnn.py" in message(Checkpoints(tmp_path / "foreign").load)
    (tmp_path / "file").write_text("no folder")
    assert str(tmp_path / "file") in message(Checkpoints, tmp_path / "file")
    (tmp_path / "made" / "1").mkdir(parents=True)
    assert "not a checkpoint of train_cnn.py" in message(Checkpoints(tmp_path / "made").load)


# Where a read fails TensorStore may still answer Orbax's event loop when that is closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_broken_checkpoints_are_refused(tmp_path):
    """Each file cut, emptied, changed or removed: an error, or nothing of the content is lost."""
    folder = tmp_path / "1"
    Checkpoints(tmp_path).save(1, STATE, {"step": 1})
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    refused = 0
    for path, content in whole.items():
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        for broken in (content[:middle], b"", flipped, None):
            path.unlink() if broken is None else path.write_bytes(broken)
            try:
                saved = Checkpoints(tmp_path, write=False).load(STATE)
            except CheckpointError:
                refused += 1
            else:
                jax.tree.map(np.testing.assert_array_equal, saved.state, STATE)
                assert saved.run["step"] == 1
            path.write_bytes(content)
    assert refused >= 8  # the arrays and the JSON at least, in each of four ways


def test_advice_where_a_byte_is_flipped(tmp_path):
    for step in (1, 2):
        Checkpoints(tmp_path).save(step, STATE, {"step": step})
    other = {**STATE, "key": np.array([1, 3], np.uint32)}
    Checkpoints(tmp_path / "other").save(2, other, {})
    shutil.rmtree(tmp_path / "2" / "state")
    (tmp_path / "other" / "2" / "state").rename(tmp_path / "2" / "state")
    error = message(Checkpoints(tmp_path, write=False).load)
    assert "arrays are not those that were written; remove it to continue from step 1" in error


def test_arrays_of_another_checkpoint_are_refused(tmp_path):
    other = {**STATE, "key": np.array([1, 3], np.uint32)}
    for name, state in (("a", STATE), ("b", other)):
        Checkpoints(tmp_path / name).save(1, state, {})
    (tmp_path / "a" / "1" / "state").rename(tmp_path / "moved")
    (tmp_path / "b" / "1" / "state").rename(tmp_path / "a" / "1" / "state")
    assert "not those that were written" in message(Checkpoints(tmp_path / "a").load)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_broken_checkpoint_leaves_the_one_before(images, tmp_path, monkeypatch, capsys):
    training.keep(monkeypatch.setattr)
    flags = ["--output", str(tmp_path), "--resume"]
    assert train_cnn.main([*images, *flags, "--epochs", "3"]) == 0
    broken = tmp_path / "checkpoints" / "12"
    for path in broken.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    assert train_cnn.main(flags) == 1
    error = capsys.readouterr().err
    assert str(broken) in error
    assert "remove it to continue from step 8" in error
    for path in sorted(broken.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    broken.rmdir()
    assert train_cnn.main(flags) == 0
    assert "continues after step 8" in capsys.readouterr().out


def test_a_run_is_neither_overwritten_nor_mixed(images, tmp_path, monkeypatch, capsys):
    training.keep(monkeypatch.setattr)
    flags = ["--output", str(tmp_path)]
    assert train_cnn.main([*images, *flags, "--epochs", "1", "--resume"]) == 0
    assert "nothing to resume yet" in capsys.readouterr().out
    assert train_cnn.main([*images, *flags]) == 1
    assert "holds a run already; continue it with --resume" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_cnn.main([*flags, "--resume", "--seed", "3"])
    assert "--seed is 0 in the run to be resumed; got 3" in capsys.readouterr().err
    other = dict(np.load(images[1]))
    other["x_train"][0, 0, 0] += 1
    np.savez(images[1], **other)
    assert train_cnn.main([*flags, "--resume"]) == 1
    assert "was trained on other images" in capsys.readouterr().err


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of one epoch, and its data."""
    folder = tmp_path_factory.mktemp("begun")
    flags = ["--data", str(training.save_images(folder)), "--batch-size", "26", "--epochs", "1"]
    with pytest.MonkeyPatch.context() as patched, jax.numpy_dtype_promotion("standard"):
        training.keep(patched.setattr)
        assert train_cnn.main([*flags, "--output", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def copied(begun, tmp_path, monkeypatch):
    """A copy of this run, to be gone on with by a small model."""
    training.keep(monkeypatch.setattr)
    monkeypatch.setattr(figures, "draw_run", lambda *_: None)
    return shutil.copytree(begun, tmp_path / "run")


def test_damaged_lines_are_left_out(copied, capsys):
    path = copied / "metrics.jsonl"
    first, *others = path.read_bytes().splitlines(keepends=True)
    damaged = [b'{"step": 1, "lo\n', b"\0\0\0\n", b"\xff{}\n", b"[1]\n", b'{"step": "1"}\n', b"7\n"]
    later = b'{"step": 5, "loss": 1.0}\n'  # than the checkpoint
    path.write_bytes(b"".join([*damaged, first, b"\n", *others, later, b'{"step": 4, "lo']))
    assert train_cnn.main(["--output", str(copied), "--resume"]) == 0
    assert path.read_bytes() == b"".join([first, *others])
    assert f"{path}: removed 8 damaged lines" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["metrics.jsonl", "history.png", "checkpoints/epoch_1.pt"])
def test_files_of_others_are_kept(name, images, tmp_path, capsys):
    path = tmp_path / "theirs" / name
    path.parent.mkdir(parents=True)
    path.write_text("theirs")
    for resume in ([], ["--resume"]):
        assert train_cnn.main([*images, "--output", str(tmp_path / "theirs"), *resume]) == 1
        error = capsys.readouterr().err
        assert "exists already, and the folder does not belong to a run of train_cnn.py" in error
    assert path.read_text() == "theirs"
    assert [p for p in (tmp_path / "theirs").rglob("*") if p.is_file()] == [path]


def test_a_comparison_of_others_is_kept(images, tmp_path, capsys):
    path = tmp_path / "comparison.png"
    path.write_text("theirs")
    assert train_cnn.main([*images, "--output", str(tmp_path), "--compare"]) == 1
    assert f"{path}: exists already" in capsys.readouterr().err
    assert path.read_text() == "theirs"


def test_other_files_are_no_hindrance(copied, capsys):
    (copied / "notes.txt").write_text("mine")
    (copied / "history.png").write_text("an older one")
    assert train_cnn.main(["--output", str(copied), "--resume"]) == 0


HOLD = """
import pathlib, sys
import folders
with folders.held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_run_at_a_time(copied, capsys):
    """Another process that holds the folder bars it, but not once it is killed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", HOLD, copied]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True, env=environment) as process:
        assert process.stdout.readline() == "held\n"
        flags = ["--output", str(copied), "--resume"]
        assert train_cnn.main(flags) == 1
        assert f"{copied}: another run writes to it" in capsys.readouterr().err
        process.kill()
        process.wait()
        assert train_cnn.main(flags) == 0


def killed_in_its_first_epoch(folder):
    """What such a run leaves."""
    (folder / folders.CHECKPOINTS).mkdir(parents=True)
    (folder / folders.CHECKPOINTS / folders.LOCK).touch()


def with_an_export(folder):
    folder.mkdir()
    (folder / "digits.jaxexport").write_bytes(b"exported")


NOTHING_THERE = {
    "no folder": lambda folder: None,
    "an empty folder": lambda folder: folder.mkdir(),
    "other files": with_an_export,
    "a run without a checkpoint": killed_in_its_first_epoch,
}


@pytest.mark.parametrize("flags", [["--resume"], ["--compare", "--resume"]])
@pytest.mark.parametrize("kind", NOTHING_THERE)
def test_nothing_to_resume_and_no_data(kind, flags, tmp_path, capsys):
    """Training on the digits is never begun, and nothing is made or changed."""
    path = tmp_path / "run"
    NOTHING_THERE[kind](path)
    before = [*tmp_path.rglob("*")]
    assert train_cnn.main(["--output", str(path), *flags]) == 1
    place = path / "jaxbn" if "--compare" in flags else path
    captured = capsys.readouterr()
    assert captured.err == (
        f"train_cnn.py: error: {place}: holds no checkpoint to continue from; to begin a run "
        "there, give its --data or --dataset\n"
    )
    assert captured.out == ""
    assert [*tmp_path.rglob("*")] == before


@pytest.mark.parametrize("flags", [[], ["--resume"], ["--resume", "--dataset", "digits"]])
def test_a_run_is_not_begun_among_those_of_a_comparison(flags, copied, tmp_path, capsys):
    compared = tmp_path / "compared"
    compared.mkdir()
    copied.rename(compared / "flax")
    before = [*compared.rglob("*")]
    assert train_cnn.main(["--output", str(compared), *flags]) == 1
    assert f"{compared}: holds the runs of --compare; add --compare" in capsys.readouterr().err
    assert [*compared.rglob("*")] == before


def test_a_comparison_is_refused_before_anything_is_trained(copied, tmp_path, capsys):
    """Also if only the last of its runs cannot start."""
    compared = tmp_path / "compared"
    compared.mkdir()
    copied.rename(compared / "jaxbn")
    before = [*compared.rglob("*")]
    for flags, words in {
        "--compare none jaxbn": f"{compared / 'jaxbn'}: holds a run already; continue it with --r",
        "--compare jaxbn none --resume": f"{compared / 'none'}: holds no checkpoint to continue fr",
    }.items():
        assert train_cnn.main(["--output", str(compared), *flags.split()]) == 1
        captured = capsys.readouterr()
        assert words in captured.err
        assert captured.out == ""
    assert [*compared.rglob("*")] == before


def test_a_run_that_failed_before_its_first_checkpoint_can_begin_again(
    images, tmp_path, monkeypatch, capsys
):
    def fail(*_):
        raise TrainingError("the loss of step 1 is nan")

    training.keep(monkeypatch.setattr)
    monkeypatch.setattr(figures, "draw_run", lambda *_: None)
    flags = [*images, "--epochs", "1", "--output", str(tmp_path / "run")]
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "run", fail)
        assert train_cnn.main(flags) == 1
    assert "the loss of step 1 is nan" in capsys.readouterr().err
    assert train_cnn.main(flags) == 0


def test_more_epochs(copied, capsys):
    """A further cycle of the learning rate: what was told of the steps before stays as it was."""
    before = told(copied)
    flags = ["--output", str(copied), "--resume"]
    assert train_cnn.main([*flags, "--epochs", "2", "--save-every", "3", "--stream"]) == 0
    output = capsys.readouterr().out
    assert "continues after step 4" in output
    assert told(copied)[:5] == before
    assert [line["epoch"] for line in told(copied) if "epoch" in line] == [1, 2]
    saved = Checkpoints(copied / "checkpoints", write=False).run()
    assert saved["config"]["cycles"] == [1, 2]
    for flag, value in (("--epochs", "1"), ("--learning-rate", "1")):
        with pytest.raises(SystemExit):
            train_cnn.main([*flags, flag, value])
        assert f"error: {flag} is" in capsys.readouterr().err


def test_class_names_may_change(copied, tmp_path, monkeypatch, capsys):
    """They are shown, and nothing else depends on them."""
    data = Checkpoints(copied / "checkpoints", write=False).run()["config"]["paths"]["data"]
    named = tmp_path / "named.npz"
    np.savez(named, **np.load(data), class_names=["cat", "dog", "red fox"])
    flags = ["--output", str(copied), "--resume", "--data", str(named), "--epochs", "2"]
    assert train_cnn.main(flags) == 0
    assert "\nclasses: cat, dog, red fox\n" in capsys.readouterr().out
    monkeypatch.setattr(classify, "MODELS", training.MODELS)
    Image.fromarray(np.zeros((6, 6), np.uint8)).save(tmp_path / "black.png")
    assert classify.main([str(copied), str(tmp_path / "black.png")]) == 0
    assert len(re.findall(r"(cat|dog|red fox) [\d.]+%", capsys.readouterr().out)) == 3


def test_flags_of_a_run_in_words(copied, capsys):
    for flags, words in {
        "--flip": "--flip is not given in the run to be resumed; got --flip",
        "--no-flip": "--flip is not given in the run to be resumed; got --no-flip",
        "--shift 2": "--shift is not given in the run to be resumed; got 2",
        "--dataset mnist": "--dataset is not given in the run to be resumed; got mnist",
        "--seed 3": "--seed is 0 in the run to be resumed; got 3",
    }.items():
        with pytest.raises(SystemExit):
            train_cnn.main(["--output", str(copied), "--resume", *flags.split()])
        assert words in capsys.readouterr().err
