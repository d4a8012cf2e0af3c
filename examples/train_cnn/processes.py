"""Several processes train as one; if one is lost, the others end and say why.

JAX's heartbeat notices a lost process and aborts the others in C++, since Python cannot interrupt a
collective that waits forever. So a witness, a small second process, prints the reason after this
one has ended.
"""

import argparse
import hashlib
import os
import signal
import socket
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
GRACE = 10  # seconds that a process waits for the end of others
# Flags that may differ between the processes of a run, and when a run is resumed.
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
# Prints what it reads, or its argument if that is nothing; if it reads DONE it prints nothing.
WITNESS = f"import sys; told = sys.stdin.read(); told == '{DONE}' or sys.exit(told or sys.argv[1])"


class Witness:
    """Prints why this process ended, on standard error, unless `dismiss` was called."""

    def __init__(self, prefix: str, last_words: str) -> None:
        """`last_words` is the reason if this process cannot name another."""
        self.prefix = prefix
        self.process = subprocess.Popen(
            [sys.executable, "-c", WITNESS, f"{prefix}: {last_words}"],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is not for it
        )

    def abandon(self, reason: str) -> NoReturn:
        """Ends this process now. A normal exit would make JAX wait for the others."""
        interruption.leaving.acquire()
        self.process.communicate(f"{self.prefix}: {reason}")
        os._exit(1)

    def dismiss(self) -> None:
        """There is nothing to print."""
        self.process.communicate(DONE)


def start_others(flags: argparse.Namespace, command: list[str]) -> list[subprocess.Popen[bytes]]:
    """Starts processes 1, 2, … of the run on this host, and makes this process number 0.

    Ctrl-C ends them and then this one. SIGINT is blocked in a new process until it can handle it.
    """
    with socket.create_server(("localhost", 0)) as server:
        flags.coordinator = f"localhost:{server.getsockname()[1]}"
    flags.process_id = 0
    command = [*command, "--coordinator", flags.coordinator, "--process-id"]
    others: list[subprocess.Popen[bytes]] = []

    def end() -> None:
        for other in others:
            other.send_signal(signal.SIGINT)
        for other in others:
            other.wait(GRACE)

    with interruption.leaving:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        others += [subprocess.Popen([*command, str(i)]) for i in range(1, flags.processes)]
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        interruption.endings.append(end)
    return others


def joined(flags: argparse.Namespace, prefix: str, run: Callable[[], int]) -> int:
    """Joins the other processes, calls `run`, and returns the exit status.

    If another process is missing, dies or is silent for `flags.timeout` seconds, this process ends
    with a status other than 0 and a line on standard error that begins with `prefix`. If `run`
    returns such a status, after printing why, the others end too.
    """
    timeout = flags.timeout or TIMEOUT
    with interruption.leaving:
        witness = Witness(
            prefix,
            "this process was killed, or aborted by JAX because another process of the run died "
            "or is out of reach; start all of them again",
        )
        interruption.endings.insert(0, witness.dismiss)
    missing = f"not all processes of the run could be reached within {timeout} seconds"
    late = threading.Timer(timeout, witness.abandon, [missing])
    late.start()
    try:
        _initialize(flags, timeout)
    except Exception as error:
        fix = "; give --coordinator, --processes and --process-id" if flags.cluster else ""
        witness.abandon(f"the processes cannot be joined: {_first_line(error)}{fix}")
    late.cancel()
    failed = "this process failed, as said above; the others end too"
    # The others may have failed too. If not, they wait for this one in a collective.
    alone = threading.Timer(GRACE, witness.abandon, [failed])
    try:
        status = _status(run)
        if status:
            alone.start()
        jax.distributed.shutdown()
    except jax.errors.JaxRuntimeError as error:
        witness.abandon(
            f"a computation failed, probably by the loss of another process: {_first_line(error)}"
        )
    except BaseException:
        traceback.print_exc()
        witness.abandon(failed)
    alone.cancel()
    with interruption.leaving:
        witness.dismiss()
        interruption.endings.remove(witness.dismiss)
    return status


def _status(run: Callable[[], int]) -> int:
    try:
        return run()
    except SystemExit as error:  # a bad flag, which the parser has reported
        return int(error.code or 0)


def _first_line(error: Exception) -> str:
    line = str(error).partition("\n")[0].replace("Error dispatching computation: ", "")
    return textwrap.shorten(line.rstrip("."), 200)


def _initialize(flags: argparse.Namespace, timeout: int) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # it swallows SIGTERM
    jax.distributed.initialize(
        flags.coordinator,
        flags.processes,
        flags.process_id,
        cluster_detection_method=None if flags.cluster else "deactivate",
        initialization_timeout=2 * timeout,  # the caller ends earlier, and says why
        heartbeat_timeout_seconds=timeout,
        shutdown_timeout_seconds=timeout,
    )


def shared(flags: argparse.Namespace) -> dict[str, Any]:
    """The flags that all processes of a run, and a resumed run, must share."""
    return {name: value for name, value in vars(flags).items() if name not in PERSONAL}


def agree(values: Any, sharding: NamedSharding) -> bool:
    """Whether all processes have the same values, compared by their `repr`."""
    digest = hashlib.sha256(repr(values).encode())
    row = np.frombuffer(digest.digest(), np.uint8)[None]
    shape = sharding.num_devices, row.shape[1]
    rows = jax.make_array_from_callback(shape, sharding, lambda _: row)
    same = jax.jit(lambda rows: (rows == rows[:1]).all(), out_shardings=PartitionSpec())
    return bool(same(rows))
