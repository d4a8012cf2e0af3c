"""The output folder belongs to one run, and one process at a time writes to it."""

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator

from checkpoints import PROGRAM, CheckpointError, reason

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
LOCK = "run.lock"  # among the checkpoints; it marks the folder of a run
FIGURES = ("history", "drift", "confusion", "mistakes")
COMPARISON = "comparison.png"


def is_own(folder: pathlib.Path) -> bool:
    """Whether the folder belongs to a run of this program."""
    return (folder / CHECKPOINTS / LOCK).is_file()


def has_checkpoints(folder: pathlib.Path) -> bool:
    """Whether a run of this program has written a checkpoint into the folder."""
    paths = (folder / CHECKPOINTS).iterdir() if is_own(folder) else ()
    return any(path.name.isdigit() and path.is_dir() for path in paths)


def refuse_others(folder: pathlib.Path, names: list[str], owned: bool) -> None:
    """Refuses a folder in which another program wrote a file or folder of one of these names.

    Raises:
      CheckpointError: there is one, which a run would overwrite.
    """
    found = [folder / name for name in names if (folder / name).exists()]
    filled = [path for path in found if not path.is_dir() or any(path.iterdir())]
    if filled and not owned:
        raise CheckpointError(
            f"{filled[0]}: exists already, and the folder does not belong to a run of {PROGRAM}; "
            "give another --output, or move it out of the way"
        )


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[None]:
    """Makes the folder and keeps other runs out of it while the context, or the process, lasts.

    A run that writes nothing leaves no folder behind.

    Raises:
      CheckpointError: it belongs to another program, another run writes to it, or it cannot be
        written to.
    """
    files = [METRICS, f"{METRICS}.part", *(f"{name}.png" for name in FIGURES)]
    kept = folder.absolute() / CHECKPOINTS
    made = [path for path in (kept, *kept.parents) if not path.exists()]
    try:
        refuse_others(folder, [CHECKPOINTS, *files], is_own(folder))
        kept.mkdir(parents=True, exist_ok=True)
        file = (kept / LOCK).open("a")
    except OSError as error:
        raise CheckpointError(f"{kept}: {reason(error)}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{folder}: another run writes to it; wait until it ends, or give another --output"
            ) from None
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            if not any((folder / file).exists() for file in files):
                _remove_empty(kept, made)


def _remove_empty(kept: pathlib.Path, made: list[pathlib.Path]) -> None:
    """Removes the folders that a run has made and left empty."""
    if kept in made and [path.name for path in kept.iterdir()] == [LOCK]:
        (kept / LOCK).unlink()
        for path in made:
            if not any(path.iterdir()):
                path.rmdir()
