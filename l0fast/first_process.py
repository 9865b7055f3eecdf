"""The duties of a container's first process, done by one that does nothing else.

The kernel does not deliver to process 1 a signal that it has no handler for: a SIGTERM, which would end the same command on
a machine, is lost, and the orchestrator's SIGKILL follows. And orphans become children of process 1: each stays a zombie,
which counts as a process, until process 1 has waited for it.
"""

import math
import os
import signal
import time

_HANDED_ON = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
_SI_KERNEL = 0x80
_LINGER_S = 3.0
"""For what the child leaves behind to clean up, as a zygote does: the end of process 1 kills all [s]."""


def step_back() -> None:
    """Where this is process 1, go on in a fork of it: the parent hands on signals, reaps, and ends with the fork's exit code.

    To be called before there are threads.
    """
    if os.getpid() != 1:
        return
    signals = {*_HANDED_ON, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        return
    code, until = 0, math.inf
    while (left_s := until - time.monotonic()) > 0:
        told = signal.sigtimedwait(signals, min(left_s, 3600.0))
        # Ctrl-C at a terminal has reached the child too
        if told and told.si_signo != signal.SIGCHLD and told.si_code != _SI_KERNEL and until == math.inf:
            os.kill(child, told.si_signo)
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == child:
                    code, until = os.waitstatus_to_exitcode(ended[1]), time.monotonic() + _LINGER_S
        except ChildProcessError:
            # all have ended
            break
    os._exit(code if code >= 0 else 128 - code)
