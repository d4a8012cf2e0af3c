"""Several processes as one run: they join, and when one is lost the others end with the reason.

A lost process is noticed by JAX's heartbeat, in C++, which then aborts the others: in a collective
that waits for ever nothing in Python could. The reason is therefore given by a witness, a small
process that waits for the end of this one.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import interruption
import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

TIMEOUT = 100  # seconds
GRACE = 10  # seconds that a process which failed waits for the others
# Flags that processes of one run need not have in common, nor a run that is resumed.
PERSONAL = (
    "coordinator",
    "cluster",
    "processes",
    "process_id",
    "timeout",
    "data",
    "data_dir",
    "compare",
    "output",
    "resume",
)
DONE = "done"
# Prints what it is told, or else its argument, unless it is told that all went well.
WITNESS = f"import sys; told = sys.stdin.read(); told == '{DONE}' or sys.exit(told or sys.argv[1])"


class Witness:
    """Gives the reason on standard error when this process ends before `dismiss`."""

    def __init__(self, prefix: str, last_words: str) -> None:
        """`last_words` are the reason where this process cannot give another."""
        self.prefix = prefix
        self.process = subprocess.Popen(
            [sys.executable, "-c", WITNESS, f"{prefix}: {last_words}"],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is not for it
        )

    def abandon(self, reason: str) -> NoReturn:
        """Ends this process now: JAX's own way to end would wait for the others."""
        self.process.communicate(f"{self.prefix}: {reason}")
        os._exit(1)

    def dismiss(self) -> None:
        """All went well."""
        self.process.communicate(DONE)


def joined(flags: argparse.Namespace, prefix: str, run: Callable[[], int]) -> int:
    """Runs as one of several processes, which also end together; the exit status.

    Where another does not come, dies or is silent for `flags.timeout` seconds, this process ends
    with a line on standard error, begun by `prefix`, and a status other than 0. Where `run` returns
    such a status, having said why, the others end too.
    """
    timeout = flags.timeout or TIMEOUT
    witness = Witness(
        prefix,
        "this process was killed, or aborted by JAX because another process of the run died or is "
        "out of reach; start all of them again",
    )
    missing = f"not all processes of the run could be reached within {timeout} seconds"
    interruption.before = witness.dismiss
    late = threading.Timer(timeout, witness.abandon, [missing])
    late.start()
    try:
        _initialize(flags, timeout)
    except Exception as error:
        fix = "; give --coordinator, --processes and --process-id" if flags.cluster else ""
        witness.abandon(f"the processes cannot be joined: {_first_line(error)}{fix}")
    late.cancel()
    failed = "this process failed, as said above; the others end too"
    # The others may have failed alike. If not, they wait in a computation for this one.
    alone = threading.Timer(GRACE, witness.abandon, [failed])
    try:
        status = _status(run)
        if status:
            alone.start()
        jax.distributed.shutdown()
    except jax.errors.JaxRuntimeError as error:
        witness.abandon(
            f"a computation failed, likely for the loss of another process: {_first_line(error)}"
        )
    except BaseException:
        traceback.print_exc()
        witness.abandon(failed)
    alone.cancel()
    witness.dismiss()
    interruption.before = None
    return status


def _status(run: Callable[[], int]) -> int:
    try:
        return run()
    except SystemExit as error:  # for a flag, of which was said what is wrong
        return int(error.code or 0)


def _first_line(error: Exception) -> str:
    line = str(error).partition("\n")[0].replace("Error dispatching computation: ", "")
    return textwrap.shorten(line.rstrip("."), 200)


def _initialize(flags: argparse.Namespace, timeout: int) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM
    jax.distributed.initialize(
        flags.coordinator,
        flags.processes,
        flags.process_id,
        cluster_detection_method=None if flags.cluster else "deactivate",
        initialization_timeout=2 * timeout,  # the caller is faster, and says why
        heartbeat_timeout_seconds=timeout,
        shutdown_timeout_seconds=timeout,
    )


def shared(flags: argparse.Namespace) -> dict[str, Any]:
    """The flags that make a run what it is."""
    return {name: value for name, value in vars(flags).items() if name not in PERSONAL}


def agree(values: Any, sharding: NamedSharding) -> bool:
    """Whether all processes have the same values, compared by how they are written."""
    digest = hashlib.sha256(repr(values).encode())
    row = np.frombuffer(digest.digest(), np.uint8)[None]
    shape = sharding.num_devices, row.shape[1]
    rows = jax.make_array_from_callback(shape, sharding, lambda _: row)
    same = jax.jit(lambda rows: (rows == rows[:1]).all(), out_shardings=PartitionSpec())
    return bool(same(rows))
