import os
import subprocess
import sys

import pytest

from tests.sandbox.processes import processes_with


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can take other uids")
def test_a_zygote_that_kills_as_a_session_is_not_taken_for_the_session():
    session = 1 << 30
    as_it_kills = f"import os; os.setresuid({session + 1000}, {session}, 0); print(os.getpid(), flush=True); input()"
    argv = [sys.executable, "-c", as_it_kills]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as zygote:
        assert zygote.stdin is not None
        assert zygote.stdout is not None
        assert int(zygote.stdout.readline()) == zygote.pid
        assert zygote.pid not in processes_with(lambda pid, uid, line: uid >= session)
        assert zygote.pid in processes_with(lambda pid, uid, line: uid == 0)
        zygote.stdin.write("\n")
