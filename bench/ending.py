"""How a benchmark ends before its end: whoever sends it SIGTERM gets what Ctrl-C does, so no folder and no process is left."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import IO


def end_like_ctrl_c() -> None:
    """To be called first thing in `main`, in the main thread."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # a script's background job inherits that, and would not hear itself either
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    sys.excepthook = _in_a_line


def run_to_its_end(command: Sequence[str], *, stdout: IO[str] | None = None) -> int:
    """Its exit code. Where we are told to end it is told, too, and has the time that it takes: it may have something to save."""
    # a session of its own: Ctrl-C in a terminal would reach it besides, and who is told twice ends at once
    process = subprocess.Popen(command, stdout=stdout, start_new_session=True)
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise


def _in_a_line(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Who ended it needs no traceback; the exit status is that of Ctrl-C all the same."""
    if issubclass(kind, KeyboardInterrupt):
        print("told to end (Ctrl-C or SIGTERM) before its end", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)
