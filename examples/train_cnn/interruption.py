"""Ctrl-C ends the process at once, whatever it is doing.

Python's KeyboardInterrupt waits for XLA's compiler, gets lost in callbacks, and unloads XLA while
its threads still compile, which crashes. Here a thread waits for the signal and exits without
unloading anything. Files are then as after `kill -9`.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable

STATUS = 130  # what shells report for a process ended by SIGINT
SHOW_CURSOR = b"\x1b[?25h\n"  # a progress bar hides it

words = "interrupted"  # the reason that is printed
endings: list[Callable[[], object]] = []  # called before the process exits
leaving = threading.Lock()  # the thread that ends the process takes it and keeps it


def leave_at_once() -> None:
    """Makes Ctrl-C end this process with one line and `STATUS`.

    A process that starts with SIGINT ignored, as a background job of a script does, keeps ignoring
    it. A process that starts with SIGINT blocked unblocks it here.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    number = bytes([signal.SIGINT])

    def wait() -> None:
        while os.read(reader, 1) != number:
            pass
        leaving.acquire()
        try:
            for end in endings:
                end()
            if os.isatty(1):
                os.write(1, SHOW_CURSOR)
            os.write(2, f"{os.path.basename(sys.argv[0])}: error: {words}\n".encode())
        finally:
            os._exit(STATUS)

    threading.Thread(target=wait, daemon=True).start()
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # works even while XLA compiles
    # An event loop replaces the wakeup descriptor while it runs.
    signal.signal(signal.SIGINT, lambda *_: os.write(writer, number) and None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
