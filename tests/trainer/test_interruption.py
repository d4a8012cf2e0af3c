"""Ctrl-C at any moment ends the trainer with one line and status 130."""

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

INTERRUPTED = r"train_cnn.py: error: interrupted(; go on with --resume)?\n"
PATIENCE = 300  # seconds, on a machine that does other things too
EXAMPLES = pathlib.Path(train_cnn.__file__).parent

pytestmark = pytest.mark.trained


def start(folder):
    """A trainer with nothing compiled at hand, which does not ignore SIGINT."""
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    script = EXAMPLES / "train_cnn.py"
    return subprocess.Popen(
        [*ATTENTIVE, script, "--model", "resnet20", "--output", folder],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("pairs", "latest"), [(1, 4), pytest.param(10, 12, marks=pytest.mark.slow)]
)
def test_an_interruption_at_any_moment(pairs, latest, tmp_path):
    """Of two at a time; most are in imports and in compilation, for which ResNet-20 takes long."""
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
