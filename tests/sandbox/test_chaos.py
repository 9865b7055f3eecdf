"""Killing what a run stands on, in the middle of it: the run goes on or ends with a clear error, and nothing is left.

The whole command with the real learner and the simulated engine, which plays demonstrations as fast as the sandbox can.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from bench.own_daemon import own_daemon
from l0fast.run_dir import read_metrics, read_trajectories
from l0fast.sandbox.image import LOCAL_IMAGE
from l0fast.types import TrajectoryStatus
from tests.sandbox.processes import processes_with

ROOT = Path(__file__).parents[2]
STEPS = 5
FIRST_UID = 1 << 30
"""Sessions' uids are from here on."""


class Run:
    """`python -m l0fast.run` under way."""

    def __init__(self, kind: str, run_dir: Path, env: dict[str, str]):
        self.kind, self.run_dir = kind, run_dir
        self.others = zygotes()
        self.log = run_dir.parent / "log"
        # pytest's own folders are closed to sessions' uids
        self.temporary = Path(tempfile.mkdtemp(prefix="chaos-"))
        self.temporary.chmod(0o755)
        self.containers_before = containers(env) if kind == "docker" else set()
        self.env = {
            **os.environ,
            **env,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "TMPDIR": str(self.temporary),
        }
        args = ["invented", "--engine.kind", "simulated", "--sandbox.kind", kind, "--num-steps", str(STEPS)]
        args += [
            "--eval.questions",
            "4",
            "--eval.every",
            "0",
            "--eval.transfer-questions",
            "2",
            "--learner.threads",
            "1",
        ]
        args += ["--rollout.max-refills", "20", "--rollout.groups-per-step", "6", "--run-dir", str(run_dir)]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "l0fast.run", *args], cwd=ROOT, env=self.env, stdout=log, stderr=log
            )

    def steps(self) -> int:
        metrics = self.run_dir / "metrics.jsonl"
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def wait_for(self, happened, what: str, timeout_s: float = 60):
        deadline = time.monotonic() + timeout_s
        while not (got := happened()):
            assert self.process.poll() is None, f"the run ended before {what}: {self.log.read_text()}"
            assert time.monotonic() < deadline, f"{what} did not happen: {self.log.read_text()}"
            time.sleep(0.002)
        return got

    def finish(self) -> str:
        self.process.wait(100)
        return self.log.read_text()


def zygotes() -> set[int]:
    """Every one on this machine. A session has the same command line, a bwrap has more in front."""
    return set(
        processes_with(
            lambda pid, uid, line: b"guest.zygote" in line and uid < FIRST_UID and b"bwrap" not in line.split(b"\0")[0]
        )
    )


def of(run: Run) -> tuple[list[int], list[int]]:
    """Its zygotes, and its sessions: those whose zygote is not another run's."""
    others = run.others

    def is_mine(pid: int) -> bool:
        while pid > 1:
            if pid in others:
                return False
            try:
                pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            except FileNotFoundError:
                return True
        return True

    return list(zygotes() - others), processes_with(lambda pid, uid, line: uid >= FIRST_UID and is_mine(pid))


def containers(env: dict[str, str]) -> set[str]:
    argv = ["docker", "ps", "-aq", "--filter", "label=l0fast.driver"]
    return set(
        subprocess.run(
            argv, env={**os.environ, **env}, capture_output=True, check=True, text=True, timeout=30
        ).stdout.split()
    )


def nothing_runs(run: Run, env: dict[str, str]) -> None:
    deadline = time.monotonic() + 15
    while any(left := of(run)):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def nothing_is_left(run: Run, env: dict[str, str]) -> None:
    deadline = time.monotonic() + 15
    while True:
        left = {
            "processes": [pid for pids in of(run) for pid in pids],
            "containers": containers(env) - run.containers_before if run.kind == "docker" else set(),
            "folders": [p.name for p in run.temporary.glob("l0fast-*")],
        }
        if not any(left.values()):
            return
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def played(run: Run) -> list:
    return [t for path in sorted((run.run_dir / "trajectories").glob("step_*.jsonl")) for t in read_trajectories(path)]


def ended_well(run: Run) -> dict:
    said = run.finish()
    assert run.process.returncode == 0, said
    summary = json.loads((run.run_dir / "summary.json").read_text())
    assert summary["steps"] == STEPS == len(read_metrics(run.run_dir))
    return summary


@pytest.fixture(params=["bwrap", "docker"], scope="module")
def kind(request, usable_kind):
    if request.param not in os.environ.get("L0FAST_TEST_SANDBOXES", ""):
        pytest.skip(f"whole runs, killed: some minutes. Set L0FAST_TEST_SANDBOXES={request.param} to have them")
    return usable_kind(request.param)


@pytest.fixture
def private_daemon(kind, tmp_path):
    """A dockerd that may be killed, with the image of the one that may not."""
    archive = tmp_path / "image.tar"
    image = subprocess.run(
        ["docker", "image", "ls", "-q", LOCAL_IMAGE], check=True, capture_output=True, text=True, timeout=30
    ).stdout
    if not image or os.geteuid() != 0:
        assert "docker" not in os.environ.get("L0FAST_TEST_SANDBOXES", ""), f"{LOCAL_IMAGE} and root are needed"
        pytest.skip(f"a daemon of one's own takes root and an image that was built: {LOCAL_IMAGE}")
    subprocess.run(["docker", "save", LOCAL_IMAGE, "-o", str(archive)], check=True, timeout=60)
    with own_daemon() as own:
        env = {**os.environ, "DOCKER_HOST": own.host}
        subprocess.run(["docker", "load", "-i", str(archive)], check=True, env=env, timeout=60)
        yield own


@pytest.fixture
def start(tmp_path, kind):
    runs = []

    def start(kind: str, **env: str) -> Run:
        runs.append(Run(kind, tmp_path / "run", env))
        return runs[-1]

    if os.geteuid() != 0:
        pytest.skip("finding the sessions of a run takes root: their uids tell them")
    yield start
    for run in runs:
        run.process.kill()
        run.process.wait()
        shutil.rmtree(run.temporary)


def test_killed_sessions_cost_their_episodes_and_nobody_elses(start, kind):
    run = start(kind)
    run.wait_for(lambda: run.steps() >= 1, "the first step")
    killed = 0
    while killed < 3:
        pid = run.wait_for(lambda: of(run)[1], "a session")[0]
        try:
            os.kill(pid, signal.SIGKILL)
            killed += 1
        except ProcessLookupError:
            # it has just ended by itself
            continue
    summary = ended_well(run)
    lost = [t for t in played(run) if t.status is TrajectoryStatus.FAILED_SANDBOX]
    assert len(lost) <= summary["failed_episodes"] <= killed, [(t.status, t.cause) for t in lost]
    assert all(t.cause for t in lost)
    nothing_is_left(run, {})


def test_a_killed_zygote_is_replaced_and_the_run_goes_on(start, kind):
    run = start(kind)
    run.wait_for(lambda: run.steps() >= 1, "the first step")
    run.wait_for(lambda: of(run)[1], "a session")
    os.kill(of(run)[0][0], signal.SIGKILL)
    summary = ended_well(run)
    lost = [t for t in played(run) if t.status.failed]
    assert all(t.status is TrajectoryStatus.FAILED_SANDBOX and t.cause for t in lost)
    assert len(lost) <= summary["failed_episodes"] <= 128
    nothing_is_left(run, {})


def test_a_killed_driver_leaves_nothing(start, kind):
    run = start(kind)
    run.wait_for(lambda: run.steps() >= 1, "the first step")
    run.wait_for(lambda: of(run)[1], "a session")
    run.process.kill()
    run.process.wait()
    nothing_is_left(run, {})
    assert len(read_metrics(run.run_dir)) >= 1


def test_a_driver_killed_while_it_starts_leaves_nothing_that_runs_and_the_next_start_sweeps(start, kind):
    run = start(kind)
    run.wait_for(lambda: list(run.temporary.glob("l0fast-*")) or of(run)[0], "the start of a zygote")
    run.process.kill()
    run.process.wait()
    # a folder with a socket may stay, and a container that was never started
    nothing_runs(run, {})
    code = "import asyncio, sys; from l0fast.config import SandboxConfig; from l0fast.sandbox import open_sandbox\n"
    code += "async def main():\n    async with open_sandbox(SandboxConfig(kind=sys.argv[1]), max_sessions=1, log=print): pass\n"
    code += "asyncio.run(main())"
    subprocess.run([sys.executable, "-c", code, kind], env=run.env, cwd=ROOT, check=True, timeout=60)
    nothing_is_left(run, {})


@pytest.mark.parametrize("kind", ["docker"], indirect=True)
def test_a_removed_container_is_replaced_and_the_run_goes_on(start, kind):
    run = start(kind)
    run.wait_for(lambda: run.steps() >= 1, "the first step")
    mine = run.wait_for(lambda: containers({}) - run.containers_before, "a container")
    subprocess.run(["docker", "rm", "-f", *mine], check=True, capture_output=True, timeout=30)
    ended_well(run)
    nothing_is_left(run, {})


@pytest.mark.parametrize("kind", ["docker"], indirect=True)
def test_a_daemon_that_is_killed_and_comes_back_costs_its_containers_and_not_the_run(start, kind, private_daemon):
    run = start(kind, DOCKER_HOST=private_daemon.host)
    run.wait_for(lambda: run.steps() >= 1, "the first step")
    # the new daemon stops the old one's containers
    private_daemon.restart()
    ended_well(run)
    nothing_is_left(run, {"DOCKER_HOST": private_daemon.host})


@pytest.mark.parametrize("kind", ["docker"], indirect=True)
def test_a_daemon_that_is_gone_for_good_ends_the_run_with_a_clear_error_or_lets_it_finish(start, kind, private_daemon):
    run = start(kind, DOCKER_HOST=private_daemon.host)
    run.wait_for(lambda: run.steps() >= 1, "the first step")
    private_daemon.stop()
    said = run.finish()
    # its containers go with it, or outlive it and finish the run
    assert run.process.returncode == 0 or "shard" in said, said
    nothing_is_left(run, {"DOCKER_HOST": private_daemon.host} if run.process.returncode == 0 else {})
