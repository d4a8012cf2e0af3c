"""What is told of a training run: a line of JSON for each step and epoch, and the history."""

import json
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np


class Epoch(NamedTuple):
    """Means over the sets after one epoch, and how far the running statistics moved in it.

    Attributes:
      batch_accuracy: on the test set, normalized by the statistics of its own batches; None without
        batch norm.
      drift: for each batch norm the drift of its mean and of its variance.
      seconds: how long the epoch took, evaluation included.
      waited: the seconds of them in which the device waited for data.
    """

    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    batch_accuracy: float | None
    drift: dict[str, list[float]]
    seconds: float
    waited: float

    def __str__(self) -> str:
        """Loss and accuracy as the columns of a log."""
        return (
            f"{self.train_loss:12.4f}{self.train_accuracy:10.2%}"
            f"{self.test_loss:11.4f}{self.test_accuracy:10.2%}{self.seconds:9.2f}"
        )


def mean_drift(old: Any, new: Any) -> float:
    """How far the means of a layer moved, in running standard deviations: `√E[(m' − m)²/v']`."""
    change = np.square(new["mean"] - old["mean"])
    return float(np.sqrt(np.mean(change / np.maximum(new["var"], np.finfo("f").tiny))))


def var_drift(old: Any, new: Any) -> float:
    """How far the variances of a layer moved, as a ratio: `√E[(v'/v − 1)²]`."""
    ratio = new["var"] / np.maximum(old["var"], np.finfo("f").tiny)
    return float(np.sqrt(np.mean(np.square(ratio - 1))))


class Lines:
    """A file of JSON lines, each with the `step` after which it was written.

    Attributes:
      damaged: how many lines were left out since they cannot be read.
    """

    def __init__(self, path: pathlib.Path | None, step: int) -> None:
        """Goes on with what the file has up to this step; the rest, written later, is dropped.

        Without a path nothing is written.
        """
        self.path, self.damaged = path, 0
        if path is not None:
            lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
            steps = [_step_of(line) for line in lines]
            self.damaged = steps.count(None)
            found = zip(lines, steps, strict=True)
            kept = [line for line, at in found if at is not None and at <= step]
            part = path.with_name(f"{path.name}.part")
            part.write_bytes(b"".join(kept))
            os.replace(part, path)

    def write(self, *lines: dict[str, Any]) -> None:
        """Appends the lines."""
        if self.path is not None:
            with self.path.open("a") as file:
                file.writelines(f"{json.dumps(line)}\n" for line in lines)


def _step_of(line: bytes) -> int | None:
    """The step of a whole line; None for one that was cut off in the writing, or damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if type(step) is int and line.endswith(b"\n") else None
