"""The trainer in two processes of two devices each; what becomes of one that loses the other."""

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import training

TIMEOUT = 15  # seconds, --timeout
PATIENCE = 300  # seconds: for what ends by itself, on a machine that does other things too
START = 40  # seconds: for the imports before a process can join
pytestmark = pytest.mark.trained
LOSS = r"another process of the run|the loss of another process|not all processes of the run"


class Run:
    """Processes of the trainer, which write into a folder."""

    def __init__(self, folder):
        self.folder = folder
        self.processes = []
        self.environment = dict(os.environ)
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.coordinator = f"127.0.0.1:{server.getsockname()[1]}"

    def start(self, name, devices, dtype, *flags):
        """A trainer on its own; its result comes into NAME.npz."""
        flag = f"--xla_force_host_platform_device_count={devices}"
        path = os.pathsep.join(filter(None, sys.path))
        with open(self.folder / f"{name}.out", "w") as out, open(self.error(name), "w") as err:
            process = subprocess.Popen(
                training.command(self.folder / f"{name}.npz", dtype, *flags),
                env=self.environment | {"XLA_FLAGS": flag, "PYTHONPATH": path},
                stdout=out,
                stderr=err,
            )
        self.processes.append(process)
        return process

    def join(self, index, *flags, dtype="float32", timeout=TIMEOUT):
        """One of two trainers of a run; its result comes into INDEX.npz."""
        flags = [*flags, "--coordinator", self.coordinator, "--processes", "2"]
        flags += ["--process-id", str(index), "--timeout", str(timeout)]
        return self.start(index, 2, dtype, *flags)

    def error(self, name):
        return self.folder / f"{name}.err"

    def output(self, name):
        return (self.folder / f"{name}.out").read_text()

    def reasons(self, name):
        """The lines with which a process, or its witness, says why it ended."""
        deadline = time.monotonic() + START
        while not (lines := re.findall(r"^train_cnn.*$", self.error(name).read_text(), re.M)):
            assert time.monotonic() < deadline, self.error(name).read_text()
            time.sleep(0.1)  # the witness speaks after the end
        return lines


@pytest.fixture
def run(tmp_path):
    run = Run(tmp_path)
    yield run
    for process in run.processes:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


@pytest.fixture
def mortal(run, tmp_path):
    """A run whose processes are killed; one may leave half a program in its cache."""
    run.environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "compiled")
    return run


@pytest.fixture
def images(tmp_path):
    """A data set that batches of 26 and four devices do not divide."""
    return training.save_images(tmp_path)


# Both are sixteen steps, which amplify rounding: the parameters are of order one, each of its sums
# has up to 26 · 36 terms, and the errors measured are below 1e-6 and 1e-14.
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float32", 1e-5), pytest.param("float64", 1e-12, marks=pytest.mark.slow)],
)
def test_two_processes_train_like_one(dtype, tolerance, run, images):
    flags = ["--data", str(images), "--batch-size", "26", "--epochs", "4"]
    alone = run.start("alone", 1, dtype, *flags)
    output = run.folder / "output"
    output.mkdir()
    for i in range(2):
        run.join(i, *flags, "--output", str(output), dtype=dtype, timeout=PATIENCE)
    for name, process in zip(("alone", 0, 1), (alone, *run.processes[1:]), strict=True):
        assert process.wait(PATIENCE) == 0, run.error(name).read_text()
    one, first, second = (dict(np.load(run.folder / f"{name}.npz")) for name in ("alone", "0", "1"))
    assert one.keys() == first.keys() == second.keys()
    assert one["params/Block_0/Conv_0/kernel"].dtype == dtype
    assert {int(one[name]) for name in one if name.endswith("count")} == {16}
    for name in one:
        np.testing.assert_array_equal(first[name], second[name], name)
        np.testing.assert_allclose(
            first[name], one[name], rtol=tolerance, atol=tolerance, err_msg=name
        )
    assert len(re.findall(r"^ +\d+ .*%", run.output(0), re.M)) == 4
    assert "%" not in run.output(1)
    assert {path.name for path in output.iterdir()} == {
        *("checkpoints", "metrics.jsonl"),
        *(f"{name}.png" for name in ("history", "drift", "confusion", "mistakes")),
    }

    shutil.rmtree(output / "checkpoints" / "16")
    again = [
        run.join(i, "--output", str(output), "--resume", dtype=dtype, timeout=PATIENCE)
        for i in range(2)
    ]
    for i, process in enumerate(again):
        assert process.wait(PATIENCE) == 0, run.error(i).read_text()
        assert ("continues after step 12" in run.output(i)) == (i == 0)
        resumed = dict(np.load(run.folder / f"{i}.npz"))
        for name in first:
            np.testing.assert_array_equal(resumed[name], first[name], name)


def started(run, images):
    """Two processes that train for longer than any test."""
    return [run.join(i, "--data", str(images), "--epochs", "100000") for i in range(2)]


def wait_for_an_epoch(run):
    deadline = time.monotonic() + PATIENCE
    while "%" not in run.output(0):
        assert time.monotonic() < deadline, run.error(0).read_text()
        time.sleep(0.1)


def check_death(run, processes, victim):
    """Kills one; the other must end soon, and say why."""
    assert [process.poll() for process in processes] == [None, None], run.reasons(0)
    processes[victim].send_signal(signal.SIGKILL)
    assert processes[1 - victim].wait(START + TIMEOUT) != 0
    (reason,) = run.reasons(1 - victim)
    assert reason.startswith("train_cnn.py: error: ")
    assert re.search(LOSS, reason)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_death_of_one_ends_the_other(victim, mortal, images):
    processes = started(mortal, images)
    wait_for_an_epoch(mortal)
    check_death(mortal, processes, victim)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_death_at_any_moment(victim, mortal, images):
    delay = random.SystemRandom().uniform(0, 15)
    print(f"killed after {delay:.2f} seconds")  # shown where the test fails
    processes = started(mortal, images)
    time.sleep(delay)
    check_death(mortal, processes, victim)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_silence_of_one_ends_the_other(victim, mortal, images):
    run, processes = mortal, started(mortal, images)
    wait_for_an_epoch(run)
    processes[victim].send_signal(signal.SIGSTOP)  # its connections stay open
    assert processes[1 - victim].wait(2 * TIMEOUT) != 0
    (reason,) = run.reasons(1 - victim)
    assert "another process of the run died or is out of reach" in reason


@pytest.mark.parametrize("present", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_one_that_does_not_come(present, run):
    assert run.join(present, timeout=2).wait(START + 2) == 1
    assert run.reasons(present) == [
        "train_cnn.py: error: not all processes of the run could be reached within 2 seconds"
    ]


def test_processes_with_different_flags_are_refused(run):
    for i in range(2):
        run.join(i, "--seed", str(i), timeout=PATIENCE)
    for i, process in enumerate(run.processes):
        assert process.wait(PATIENCE) == 1
        assert run.reasons(i) == [
            "train_cnn.py: error: the processes have different flags, data or checkpoints, or "
            "another one failed, as it says; start them all with the same"
        ]


def test_a_file_that_one_process_has_not(run, images):
    """Both end, long before they would notice that one is gone."""
    paths = [images, images.with_name("missing.npz")]
    for i, path in enumerate(paths):
        run.join(i, "--data", str(path), timeout=PATIENCE)
    ends = {}
    while len(ends) < 2:
        over = [i for i, process in enumerate(run.processes) if process.poll() is not None]
        ends = dict.fromkeys(over, time.monotonic()) | ends
        time.sleep(0.05)
    assert abs(ends[0] - ends[1]) < 5
    assert "another one failed, as it says" in run.reasons(0)[0]
    assert f"{paths[1]}: no such file" in run.reasons(1)[0]


@pytest.mark.slow
def test_failure_of_one_ends_the_other_long_before_the_timeout(mortal, images):
    run = mortal
    output = run.folder / "output"
    (output / "metrics.jsonl").mkdir(parents=True)  # where the first process alone writes a file
    for i in range(2):
        run.join(i, "--data", str(images), "--output", str(output), timeout=2 * PATIENCE)
    for process in run.processes:
        assert process.wait(PATIENCE) != 0
    assert "metrics.jsonl" in run.reasons(0)[0]
    (reason,) = run.reasons(1)
    assert re.search(LOSS, reason)
