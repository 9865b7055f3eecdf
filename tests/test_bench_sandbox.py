"""What the soak of the sandbox says of a daemon, and what is said where there is none."""

import os
import subprocess
import sys

import pytest

from bench import sandbox
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


@pytest.mark.parametrize(
    ("soak", "lacks", "sentence"),
    [
        (["--soak", "1"], "", "bench.sandbox: no Docker daemon answers (unix:///nowhere"),
        ([], "ipykernel", "bench.sandbox: error: what is compared needs bubblewrap "),
        ([], "pandas", "bench.sandbox: error: what is compared needs bubblewrap "),
    ],
)
def test_what_is_lacking_is_one_sentence_before_anything_is_measured(monkeypatch, capsys, soak, lacks, sentence):
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere")
    monkeypatch.setattr(sandbox, "find_spec", lambda name: None if name == lacks else True)
    monkeypatch.setattr("sys.argv", ["bench.sandbox", *soak])
    with pytest.raises(SystemExit) as ended:
        sandbox.main()
    said = capsys.readouterr().err if ended.value.code == 2 else str(ended.value.code)
    assert sentence in said.splitlines()[-1]
