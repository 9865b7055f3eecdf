"""A Docker daemon of one's own ends with whoever wanted it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.own_daemon import main, remove_cgroup

needs_docker = pytest.mark.skipif(
    "docker" not in os.environ.get("L0FAST_TEST_SANDBOXES", ""),
    reason="starts a daemon of its own. Set L0FAST_TEST_SANDBOXES=docker to have it",
)


def processes_of(folder: Path) -> list[int]:
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                if str(folder).encode() in (process / "cmdline").read_bytes():
                    found.append(int(process.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


@needs_docker
def test_kill_9_leaves_no_process():
    argv = [sys.executable, "-m", "bench.own_daemon", "--", "sh", "-c", "echo $DOCKER_HOST; exec sleep 1000"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        folder = Path(started.stdout.readline().strip().removeprefix("unix://")).parent
        assert len(processes_of(folder)) >= 2, "dockerd and its containerd"
        started.send_signal(signal.SIGKILL)
        started.wait()
        # its command had this pipe too
        assert started.stdout.read() == ""
    deadline = time.monotonic() + 30
    while left := processes_of(folder):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    shutil.rmtree(folder)
    for parent in Path("/sys/fs/cgroup").glob(f"**/{folder.name}"):
        remove_cgroup(parent)


@needs_docker
def test_a_command_that_is_not_there_is_one_sentence(capsys):
    assert main(["no-such-program"]) == 2
    assert capsys.readouterr().err == "own_daemon: no-such-program can't be run: name a program that exists\n"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--packages", "numpy", "true"], "--packages numpy goes with --image: add it"),
        (["--log-file", "/tmp", "true"], "argument --log-file: /tmp is a folder: name a file in it"),
        (
            ["--image", "--image-tar", "a.tar", "true"],
            "--image builds an image and --image-tar loads one: keep one of them",
        ),
    ],
)
def test_options_that_can_not_be_are_refused(capsys, argv, sentence):
    with pytest.raises(SystemExit):
        main(argv)
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {sentence}")
