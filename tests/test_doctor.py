"""The doctor: finds what is there, says what is not, and is never brought down by it."""

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from l0fast import doctor
from l0fast.doctor import Finding, can_run, main
from l0fast.errors import UsageError

NAMES = {
    "system", "Python", "cores", "memory", "disk", "/dev/shm", "torch", "transformers", "policies", "CUDA", "nvcc", "sglang",
    "flash-attn", "liger-kernel", "bubblewrap", "seccomp", "Landlock", "user namespaces", "cgroups", "open files",
    "Docker", "sandbox",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command prints, in a process of its own."""
    import os

    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "DOCKER_HOST": "unix:///nowhere"}
    argv = [sys.executable, "-m", "l0fast.doctor", "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=100)
    assert done.returncode in (0, 1), done.stderr
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    assert answer["can_run"] == (done.returncode == 0)
    return answer


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_every_thing_has_a_line(report: dict[str, Any]):
    names = [finding["name"] for finding in report["findings"]]
    assert set(names) >= NAMES
    assert len(names) == len(set(names))
    assert {finding["mark"] for finding in report["findings"]} <= {"ok", "missing", "can't"}


def test_what_this_process_knows_for_sure_is_ok(report: dict[str, Any]):
    marks = {finding["name"]: finding["mark"] for finding in report["findings"]}
    assert {marks[name] for name in ("system", "Python", "torch", "transformers", "policies", "cores")} == {"ok"}


def test_the_sandbox_was_tried(report: dict[str, Any]):
    tried = next(finding for finding in report["findings"] if finding["name"] == "sandbox")
    assert tried["needed"]
    assert tried["mark"] == "can't" or tried["what"].startswith(("bwrap", "process"))


def test_the_recipe_runs_where_all_that_it_needs_is_ok(report: dict[str, Any]):
    findings = [Finding(**finding) for finding in report["findings"]]
    assert can_run(findings) == report["can_run"]
    ready = [replace(finding, mark="ok") for finding in findings if finding.needed]
    assert can_run(ready)
    for i, finding in enumerate(ready):
        for mark in ("missing", "can't"):
            assert not can_run([*ready[:i], replace(finding, mark=mark), *ready[i + 1 :]])
    optional = [replace(finding, mark="can't") for finding in findings if not finding.needed]
    assert can_run(ready + optional)


@pytest.mark.parametrize("mark", ["ok", "missing"])
def test_the_exit_code_and_the_last_line_say_whether_it_can_run(
    mark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    async def examine() -> list[Finding]:
        return [Finding("torch", mark, "[red]not markup[/red] :smile:", "pip install it", needed=True)]

    monkeypatch.setattr(doctor, "examine", examine)
    assert main([]) == (0 if mark == "ok" else 1)
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"{mark:<8} torch  [red]not markup[/red] :smile:  -> pip install it"
    assert last.startswith(
        "the default recipe can " if mark == "ok" else "the default recipe can't run here yet: torch"
    )


def test_a_probe_that_fails_costs_its_own_line():
    def probe() -> Finding:
        raise PermissionError(13, "Permission denied", "/proc/x")

    found = asyncio.run(doctor._in_thread("it", probe, 5.0))
    assert (found.name, found.mark) == ("it", "can't")
    assert "/proc/x" in found.what


def test_a_probe_that_hangs_has_a_deadline_and_does_not_hold_up_the_exit():
    release = threading.Event()
    started = time.monotonic()
    found = asyncio.run(doctor._in_thread("it", lambda: release.wait(60) and Finding("it", "ok", ""), 0.05))  # type: ignore[arg-type, return-value]
    try:
        assert (found.mark, found.what) == ("can't", "no answer in 0.05 s")
        assert time.monotonic() - started < 30
    finally:
        release.set()


def test_what_mends_a_package_does_so_without_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    packages = [
        probe() for name, probe, _ in doctor._PROBES if name in NAMES & {"torch", "transformers", "CUDA", "sglang"}
    ]
    assert len(packages) == 4
    assert all(found.fix.startswith("pip install ") and " -e " not in found.fix for found in packages)


def test_a_folder_that_may_not_be_written_is_a_line_and_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    # root may write anywhere
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    doctor.default_recipe.cache_clear()
    found = by_name(asyncio.run(doctor.examine()))
    assert found["disk"] == Finding(
        "disk", "missing", f"{tmp_path} is not yours to write to", "cd elsewhere, or name a --run-dir", needed=True
    )
    assert found["policies"].mark == "ok"
    assert "Docker" in found


def test_what_a_command_would_mend_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert doctor._bwrap() == Finding("bubblewrap", "missing", "not installed", "apt-get install -y bubblewrap")
    assert doctor._user_namespaces().mark == "missing"
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    assert doctor._cuda().mark == "missing"
    assert doctor._package("sglang", "pip install it")() == Finding(
        "sglang", "missing", "not installed", "pip install it"
    )


def test_the_compiler_that_sglang_will_run_is_the_one_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    found = doctor._nvcc()
    assert (found.mark, found.what.split(",")[0]) == ("missing", f"no {tmp_path}/bin/nvcc")
    assert "CUDA_HOME" in found.fix
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").write_text("#!/bin/sh\necho Cuda compilation tools, release 13.0, V13.0.48\n")
    (tmp_path / "bin/nvcc").chmod(0o755)
    ok = Finding("nvcc", "ok", f"13.0, {tmp_path}/bin/nvcc")
    assert doctor._nvcc() == ok
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=":")
    assert doctor._nvcc() == ok


@pytest.mark.parametrize(("free_gb", "mark"), [(2.9, "missing"), (3.1, "ok")])
def test_memory_has_to_be_enough(free_gb: float, mark: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_meminfo", lambda name: free_gb * 1e9)
    monkeypatch.setattr(doctor, "_cgroup_limits", lambda *files: [])
    assert doctor._memory().mark == mark


@pytest.mark.parametrize(
    ("used", "stat"),
    [
        ("memory.current", "anon 3000000000\ninactive_file 1000000000\n"),
        ("memory.usage_in_bytes", "inactive_file 0\ntotal_inactive_file 1000000000\n"),
    ],
)
def test_what_a_cgroup_has_left_is_the_memory_there_is(
    used: str, stat: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Other runs in a container take of its limit; files that they have read don't."""
    (tmp_path / used).write_text("4000000000\n")
    (tmp_path / "memory.stat").write_text(stat)
    monkeypatch.setattr(doctor, "_meminfo", lambda name: 64e9)
    monkeypatch.setattr(doctor, "_cgroup_limits", lambda *files: [(int(5e9), tmp_path / "limit")])
    found = doctor._memory()
    assert found.mark == "missing"
    assert found.what.startswith("2.0 GB free, within this cgroup's 5.0 GB")


@pytest.mark.parametrize(
    ("hard", "mark"), [(-1, "ok"), (256 + 2 * 128, "ok"), (255 + 2 * 128, "missing"), (10, "missing")]
)
def test_open_files_are_counted_in_sessions(hard: int, mark: str, monkeypatch: pytest.MonkeyPatch):
    """The default recipe has 16 groups of 8 open."""
    monkeypatch.setattr("resource.getrlimit", lambda which: (10, hard))
    found = doctor._descriptors()
    assert found.mark == mark
    if mark == "missing":
        assert "128" in found.what
        assert "ulimit" in found.fix


@pytest.mark.parametrize(
    ("lines", "files", "limit"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "1000"}, 1000),
        ("0::/a\n", {"a/memory.max": "max"}, None),
        ("4:cpu,memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "2000"}, 2000),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("4:cpu:/a\n", {}, None),
        ("", {}, None),
    ],
)
def test_the_tightest_cgroup_on_the_way_up_counts(lines: str, files: dict[str, str], limit: int | None, tmp_path: Path):
    (tmp_path / "self").write_text(lines)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    found = doctor._cgroup_limits("memory", "memory.limit_in_bytes", "memory.max", tmp_path / "self", tmp_path)
    assert min((number for number, _ in found), default=None) == limit


@pytest.mark.parametrize(
    ("clone", "fix"),
    [("0", "sysctl -w kernel.unprivileged_userns_clone=1"), ("1", "seccomp=unconfined"), (None, "seccomp=unconfined")],
)
def test_user_namespaces_are_allowed_by_what_forbids_them(clone: str | None, fix: str, tmp_path: Path):
    """A container's filter of system calls, where no setting of the machine does."""
    (tmp_path / "kernel").mkdir()
    if clone is not None:
        (tmp_path / "kernel/unprivileged_userns_clone").write_text(f"{clone}\n")
    assert fix in doctor._allow_user_namespaces(tmp_path)


def test_a_daemon_that_is_not_there_is_a_line_with_a_way_out():
    (found,) = asyncio.run(doctor._docker())
    assert (found.name, found.mark) == ("Docker", "missing")
    assert "no such socket" in found.what
    assert "systemctl start docker" in found.fix


def test_without_its_image_docker_is_told_and_left_out_of_the_trial(monkeypatch: pytest.MonkeyPatch):
    async def docker() -> list[Finding]:
        return [Finding("Docker", "ok", "Docker 27"), Finding("image", "missing", "no python", "docker pull python")]

    monkeypatch.setattr(doctor, "_docker", docker)
    opened: list[str] = []

    @asynccontextmanager
    async def open_sandbox(config: Any, **_: Any):
        opened.append(config.kind)
        raise UsageError("does not work here")
        yield

    monkeypatch.setattr(doctor, "open_sandbox", open_sandbox)
    found = by_name(asyncio.run(doctor.examine()))
    assert opened == ["bwrap", "process"]
    assert (found["sandbox"].mark, found["sandbox"].what) == ("can't", "does not work here")
    assert found["image"].fix == "docker pull python"


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("probe "):
            thread.join(30)
            assert not thread.is_alive()
