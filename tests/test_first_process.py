"""A command that is a container's first process ends when it is told to, and reaps whoever loses his parent."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

_FIRST = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
ORPHANS = """if True:
    import os, signal, subprocess, sys
    from l0fast.first_process import step_back

    step_back()
    for _ in range(3):
        # each shell ends before the program that it has started
        subprocess.run("sleep 0.05 &", shell=True)
    # itself and process 1: a zombie would stay
    while sum(name.isdigit() for name in os.listdir("/proc")) > 2:
        pass
    print(os.getpid() != 1, flush=True)
    signal.pause()
"""


def first_process(*argv: str) -> "subprocess.Popen[str]":
    """`python argv` as process 1 of its own namespace."""
    if subprocess.run([*_FIRST, "true"], capture_output=True).returncode != 0:
        pytest.skip("no pid namespace can be made here")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(["", *sys.path])}
    return subprocess.Popen(
        [*_FIRST, sys.executable, *argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    )


def terminate(process: "subprocess.Popen[str]") -> int:
    """As `docker stop` does it; the exit code."""
    (pid,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(pid), signal.SIGTERM)
    return process.wait(20)


def test_orphans_are_reaped_and_sigterm_ends_it():
    with first_process("-c", ORPHANS) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "True\n"
            assert terminate(process) == 128 + signal.SIGTERM
        finally:
            process.kill()


def test_its_exit_code_is_the_containers():
    code = "import sys; from l0fast.first_process import step_back; step_back(); sys.exit(7)"
    with first_process("-c", code) as process:
        assert process.wait(20) == 7


def test_who_outlives_it_has_time_to_clean_up(tmp_path):
    """As a zygote has sessions and their folders to remove when its driver has ended."""
    code = f"""if True:
        import subprocess
        from l0fast.first_process import step_back

        step_back()
        subprocess.Popen("sleep 0.2; touch {tmp_path}/clean", shell=True)
    """
    with first_process("-c", code) as process:
        assert process.wait(20) == 0
    assert (tmp_path / "clean").exists()


def test_an_evaluation_ends_when_its_container_is_stopped(tmp_path):
    words = ("-m", "l0fast.evaluate", "geography", "--on", "geography", "--out", str(tmp_path / "out"))
    with first_process(*words, "--sandbox.kind", "process") as process:
        try:
            assert process.stdout is not None
            assert any(line.startswith("sandbox: ") for line in process.stdout)
            assert terminate(process) == 128 + signal.SIGTERM
        finally:
            process.kill()
