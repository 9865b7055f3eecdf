"""What the soak of the sandbox says of a daemon."""

import os
import subprocess
import sys

from bench.sandbox import _held_by, processes_of_daemon

SHIM = "open('/proc/self/comm', 'w').write('containerd-shim')\nprint(flush=True)\ninput()"


def test_a_daemon_is_who_listens_and_every_containerd_and_shim_for_as_long_as_they_are_there():
    with subprocess.Popen([sys.executable, "-c", SHIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            assert {os.getpid(), process.pid} <= set(processes_of_daemon(os.getpid()))
            rss_mb, fds, there = _held_by([process.pid])
            assert (rss_mb > 1, fds, there) == (True, 3, 1)
        finally:
            process.kill()
    assert _held_by([process.pid]) == (0, 0, 0)
    assert process.pid not in processes_of_daemon(os.getpid())
