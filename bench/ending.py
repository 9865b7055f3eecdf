"""How a benchmark ends before its end: whoever sends it SIGTERM gets what Ctrl-C does, so no folder and no process is left."""

import os
import signal
import sys
from types import TracebackType


def end_like_ctrl_c() -> None:
    """To be called first thing in `main`, in the main thread."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # a script's background job inherits that, and would not hear itself either
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    sys.excepthook = _in_a_line


def _in_a_line(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Who ended it needs no traceback; the exit status is that of Ctrl-C all the same."""
    if issubclass(kind, KeyboardInterrupt):
        print("told to end (Ctrl-C or SIGTERM) before its end", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)
