"""The records of a training run: a line of JSON per step and epoch, and the history."""

import json
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np


class Epoch(NamedTuple):
    """Loss and accuracy of one epoch, and the drift of the running statistics.

    Attributes:
      batch_accuracy: on the test set, normalized by the statistics of its own batches; None without
        batch norm.
      drift: the drift of the mean and of the variance, for each batch norm.
      seconds: duration of the epoch, with evaluation.
      waited: seconds in which the device waited for data.
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
        """Loss and accuracy as columns of the log."""
        return (
            f"{self.train_loss:12.4f}{self.train_accuracy:10.2%}"
            f"{self.test_loss:11.4f}{self.test_accuracy:10.2%}{self.seconds:9.2f}"
        )


def mean_drift(old: Any, new: Any) -> float:
    """The drift of a layer's means, in running standard deviations: `√E[(m' − m)²/v']`."""
    change = np.square(new["mean"] - old["mean"])
    return float(np.sqrt(np.mean(change / np.maximum(new["var"], np.finfo("f").tiny))))


def var_drift(old: Any, new: Any) -> float:
    """The relative drift of a layer's variances: `√E[(v'/v − 1)²]`."""
    ratio = new["var"] / np.maximum(old["var"], np.finfo("f").tiny)
    return float(np.sqrt(np.mean(np.square(ratio - 1))))


class Lines:
    """A file of JSON lines, each with the `step` after which it was written.

    Attributes:
      damaged: the number of unreadable lines that were removed.
    """

    def __init__(self, path: pathlib.Path | None, step: int) -> None:
        """Continues the file after this step and drops later lines.

        Without a path, nothing is written.
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
    """The step of a complete line; None if it was cut off or damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if type(step) is int and line.endswith(b"\n") else None
