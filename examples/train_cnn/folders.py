"""The output folder: of one run, of nothing else, and written by one process at a time."""

import contextlib
import fcntl
import pathlib
from collections.abc import Iterator

from checkpoints import PROGRAM, CheckpointError, reason

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
LOCK = "run.lock"  # in the folder of the checkpoints: it marks a run's own folder
FIGURES = ("history", "drift", "confusion", "mistakes")
COMPARISON = "comparison.png"


def is_own(folder: pathlib.Path) -> bool:
    """Whether a run of this program writes into the folder, or did."""
    return (folder / CHECKPOINTS / LOCK).is_file()


def refuse_others(folder: pathlib.Path, names: list[str], owned: bool) -> None:
    """Refuses a folder that has one of these names from elsewhere.

    Raises:
      CheckpointError: nothing in it is written over.
    """
    found = [folder / name for name in names if (folder / name).exists()]
    filled = [path for path in found if not path.is_dir() or any(path.iterdir())]
    if filled and not owned:
        raise CheckpointError(
            f"{filled[0]}: is there already, and the folder is not marked as that of a run of "
            f"{PROGRAM}; give another --output, or remove what is in the way"
        )


@contextlib.contextmanager
def held(folder: pathlib.Path) -> Iterator[None]:
    """Makes the folder that of this run, as long as the context lasts or the process lives.

    Raises:
      CheckpointError: it holds something else, another run writes there, or nothing can be written.
    """
    names = [CHECKPOINTS, METRICS, f"{METRICS}.part", *(f"{name}.png" for name in FIGURES)]
    kept = folder.absolute() / CHECKPOINTS
    made = [path for path in (kept, kept.parent) if not path.exists()]
    try:
        refuse_others(folder, names, is_own(folder))
        kept.mkdir(parents=True, exist_ok=True)
        file = (kept / LOCK).open("a")
    except OSError as error:
        raise CheckpointError(f"{kept}: {reason(error)}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{folder}: another run writes there; wait for its end, or give another --output"
            ) from None
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            _forsake(kept, made)


def _forsake(kept: pathlib.Path, made: list[pathlib.Path]) -> None:
    """Removes the folders that a run made and has left empty."""
    if kept in made and [path.name for path in kept.iterdir()] == [LOCK]:
        (kept / LOCK).unlink()
        for path in made:
            if not any(path.iterdir()):
                path.rmdir()
