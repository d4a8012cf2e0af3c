"""Ctrl-C ends the process at once, whatever it is doing.

Python's own exception waits until XLA has compiled, gets lost in callbacks, and unloads XLA while
its threads still compile, which is a segmentation fault. Here a thread waits for the signal and
leaves without unloading anything. Files are then as after `kill -9`.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable

STATUS = 130  # of a process that SIGINT ends, as shells have it
SHOW_CURSOR = b"\x1b[?25h\n"  # a progress bar hides it

words = "interrupted"  # the reason that is given
before: Callable[[], None] | None = None  # what is done at the end


def leave_at_once() -> None:
    """From here on Ctrl-C ends this process with one line and `STATUS`.

    It stays ignored in a process that was started so, as shells start those of the background.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    number = bytes([signal.SIGINT])

    def wait() -> None:
        while os.read(reader, 1) != number:
            pass
        try:
            if before is not None:
                before()
            if os.isatty(1):
                os.write(1, SHOW_CURSOR)
            os.write(2, f"{os.path.basename(sys.argv[0])}: error: {words}\n".encode())
        finally:
            os._exit(STATUS)

    threading.Thread(target=wait, daemon=True).start()
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # at once, even while XLA compiles
    # An event loop has a wakeup of its own meanwhile.
    signal.signal(signal.SIGINT, lambda *_: os.write(writer, number) and None)
