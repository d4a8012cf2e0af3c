"""Ctrl-C at any moment ends the trainer with one line per process and status 130."""

import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import train_cnn
from helpers.training import ATTENTIVE

INTERRUPTED = r"train_cnn.py: error: interrupted(; continue with --resume)?\n"
PATIENCE = 300  # seconds, on a machine that does other things too
EXAMPLES = pathlib.Path(train_cnn.__file__).parent

ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "XLA_FLAGS": "",
}

pytestmark = pytest.mark.trained


def start(folder):
    """A trainer with nothing compiled at hand, which does not ignore SIGINT."""
    script = EXAMPLES / "train_cnn.py"
    return subprocess.Popen(
        [*ATTENTIVE, script, "--model", "resnet20", "--output", folder],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("pairs", "latest"), [(1, 4), pytest.param(10, 12, marks=pytest.mark.slow)]
)
def test_an_interruption_at_any_moment(pairs, latest, tmp_path):
    """Most are in imports and in compilation, which takes long for ResNet-20."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")  # shown where the test fails
    random_ = random.Random(seed)
    for i in range(pairs):
        begin = time.monotonic()
        processes = [start(tmp_path / f"{i} {j}") for j in range(2)]
        delays = sorted(random_.uniform(0.2, latest) for _ in processes)
        for process, delay in zip(processes, delays, strict=True):
            time.sleep(max(0, begin + delay - time.monotonic()))
            process.send_signal(signal.SIGINT)
        for process in processes:
            _, error = process.communicate(timeout=PATIENCE)
            assert process.returncode == 130, error
            assert re.fullmatch(INTERRUPTED, error)


STARTER = """
import argparse, sys, time
import interruption
interruption.leave_at_once()
import processes
program = "import interruption, time; interruption.leave_at_once(); time.sleep(60)"
flags = argparse.Namespace(processes=3)
others = processes.start_others(flags, [sys.executable, "-c", program])
print(*(other.pid for other in others), flush=True)
time.sleep(60)
"""


def test_the_processes_that_one_starts_end_before_it():
    """Also if they have not begun to handle Ctrl-C."""
    with subprocess.Popen(
        [*ATTENTIVE, "-c", STARTER], env=ENVIRONMENT, stdout=-1, stderr=-1, text=True
    ) as process:
        others = list(map(int, process.stdout.readline().split()))
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert error == 3 * "-c: error: interrupted\n"
    assert len(others) == 2
    for other in others:
        with pytest.raises(ProcessLookupError):
            os.kill(other, 0)


# An interactive shell in a terminal of its own.
SHELL = "import pty; pty.spawn(['bash', '--norc', '--noprofile', '-i'])"


def typed(line, delay, times):
    """What a terminal shows if Ctrl-C is typed after a delay, as often as this."""
    with subprocess.Popen(
        [*ATTENTIVE, "-c", SHELL], env=ENVIRONMENT, stdin=-1, stdout=-1, bufsize=0
    ) as shell:
        shell.stdin.write(f"{line}; echo status $?\n".encode())
        time.sleep(delay)
        for _ in range(times):
            shell.stdin.write(b"\x03")
            time.sleep(0.05)
        shell.stdin.write(b"exit\n")
        return shell.communicate(timeout=PATIENCE)[0].decode()


def alive(word):
    """The command lines of running processes that have this word in it."""
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes()
        except OSError:  # it has ended
            continue
        if word.encode() in command:
            yield command


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_a_terminal_with_two_processes(times, tmp_path):
    """In imports, in compilation, and in the steps with a checkpoint after each."""
    flags = "--processes 2 --save-every 1 --batch-size 256"
    for latest in (3, 8, 20):
        delay = random.SystemRandom().uniform(latest / 2, latest)
        print(f"Ctrl-C after {delay:.2f} seconds")  # shown where the test fails
        folder = tmp_path / str(latest)
        line = f"{sys.executable} {EXAMPLES / 'train_cnn.py'} {flags} --output {folder}"
        shown = typed(line, delay, times)
        lines = re.findall(r"^.*error.*$", shown.replace("\r", ""), re.MULTILINE)
        assert len(lines) == 2 or (len(lines) == 1 and latest < 20), shown  # not started yet
        assert all(re.search(INTERRUPTED, f"{line}\n") for line in lines), shown
        assert "status 130" in shown, shown
        assert "Traceback" not in shown, shown
        assert not [*alive(str(folder))]
