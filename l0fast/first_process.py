"""What a container's first process owes to the others, done by one that does nothing else.

The kernel keeps from process 1 each signal that it has no handler for: a SIGTERM that would end a command on a machine is
lost there, and the orchestrator kills all of it when its patience is over. And whoever loses his parent becomes a child of
process 1, and stays a zombie, which counts as a process, until that has asked for his exit code.
"""

import os
import signal
from contextlib import suppress

_HANDED_ON = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
_SI_KERNEL = 0x80


def step_back() -> None:
    """Where this is process 1, go on as a child of it: what is left of it hands on signals, reaps, and ends as the child does.

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
    while True:
        told = signal.sigwaitinfo(signals)
        # Ctrl-C at a terminal has reached the child too
        if told.si_signo != signal.SIGCHLD and told.si_code != _SI_KERNEL:
            os.kill(child, told.si_signo)
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == child:
                    code = os.waitstatus_to_exitcode(ended[1])
                    os._exit(code if code >= 0 else 128 - code)
