"""Checkpoints of a training run, written by Orbax: complete or absent, whenever the process dies.

Orbax writes a checkpoint into a temporary folder, and renames it at the end. A checkpoint has two
items: `state`, a tree of arrays, and `run`, JSON with the configuration, the position in the data,
the history and a digest of the arrays.
"""

import hashlib
import logging
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_manager import MultiprocessingOptions

FORMAT = 2
PROGRAM = "train_cnn.py"
KEPT = 2  # the newest checkpoint and the one before it

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs each save


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read; names it, the reason and what to do."""


class Saved(NamedTuple):
    """The content of a checkpoint: a tree of arrays, and plain values."""

    state: Any
    run: dict[str, Any]


class Checkpoints:
    """The checkpoints in a folder, each named by its number of training steps."""

    def __init__(self, folder: pathlib.Path, *, write: bool = True) -> None:
        """`write` says whether this process writes; then it makes the folder."""
        self.folder = folder.absolute()
        process = jax.process_index()
        alone = MultiprocessingOptions(
            primary_host=process, active_processes={process}, barrier_sync_key_prefix=str(process)
        )
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT,
            create=False,
            cleanup_tmp_directories=write,
            enable_async_checkpointing=False,
            multiprocessing_options=alone,
            read_only=not write,
        )
        try:
            if write:
                self.folder.mkdir(parents=True, exist_ok=True)
            self.manager = ocp.CheckpointManager(self.folder, options=options)
            self.steps: list[int] = sorted(self.manager.all_steps())
        except Exception as error:
            raise CheckpointError(f"{self.folder}: {reason(error)}") from error

    def save(self, step: int, state: Any, run: dict[str, Any]) -> None:
        """Writes a checkpoint. The ones before it stay until it is complete.

        Raises:
          CheckpointError: it cannot be written.
        """
        run = {"program": PROGRAM, "format": FORMAT, **run, "digest": digest(state)}
        items = {"state": ocp.args.StandardSave(state), "run": ocp.args.JsonSave(run)}
        try:
            self.manager.save(step, args=ocp.args.Composite(**items))
            self.manager.check_for_errors()
        except Exception as error:
            kept = f"that of step {self.steps[-1]} is kept" if self.steps else "there is none yet"
            raise CheckpointError(
                f"{self.folder}: the checkpoint of step {step} cannot be written, {kept}: "
                f"{reason(error)}; free disk space or allow writing, then continue with --resume"
            ) from error
        self.steps.append(step)

    def run(self) -> dict[str, Any]:
        """The plain values of the newest checkpoint.

        Raises:
          CheckpointError: it is broken, or from another program or version.
        """
        items = ocp.args.Composite(run=ocp.args.JsonRestore())
        run: Any = self._restored(items)["run"]
        if not isinstance(run, dict) or run.get("program") != PROGRAM:
            raise self._broken(f"not a checkpoint of {PROGRAM}")
        if run.get("format") != FORMAT:
            raise CheckpointError(
                f"{self._newest}: written in format {run.get('format')} by another version of "
                f"{PROGRAM}; this one reads format {FORMAT}: use that version, or train again"
            )
        return run

    def load(self, like: Any = None) -> Saved:
        """The newest checkpoint, with its arrays in the structure of `like`, or in dicts.

        Raises:
          CheckpointError: it is broken, or from another network.
        """
        run = self.run()
        items = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        state = self._restored(items)["state"]
        if digest(state) != run["digest"]:
            raise self._broken("the arrays are not those that were written")
        return Saved(state, run)

    @property
    def _newest(self) -> pathlib.Path:
        return self.folder / str(self.steps[-1])

    def _restored(self, items: Any) -> Any:
        if not self.steps:
            raise CheckpointError(f"{self.folder}: no checkpoint in it")
        try:
            return self.manager.restore(self.steps[-1], args=items)
        except Exception as error:
            told = f"broken, or not a checkpoint of {PROGRAM}: {reason(error)}"
            raise self._broken(told) from error

    def _broken(self, told: str) -> CheckpointError:
        before = f"; remove it to continue from step {self.steps[-2]}" if self.steps[1:] else ""
        return CheckpointError(f"{self._newest}: {told}{before}")


def digest(state: Any) -> str:
    """SHA-256 of the arrays of a tree, independent of their names and order."""
    arrays = [np.ascontiguousarray(leaf) for leaf in jax.tree.leaves(state)]
    hashes = [hashlib.sha256(f"{a.dtype}{a.shape}".encode() + a.tobytes()).digest() for a in arrays]
    return hashlib.sha256(b"".join(sorted(hashes))).hexdigest()


def reason(error: BaseException) -> str:
    """The first line of an error, shortened in the middle, or the error's type."""
    line = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
    return line if len(line) <= 240 else f"{line[:120]} … {line[-120:]}"


def hush() -> None:
    """Silences what Orbax, TensorStore and the event loop log beside the error they raise."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    said = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            said(unraisable)

    sys.unraisablehook = hook
