"""How many cores there are to compute on, under quotas of both versions of cgroups."""

import os
from pathlib import Path

import pytest

from l0fast import doctor
from l0fast.cgroups import cores


@pytest.mark.parametrize(
    ("lines", "files", "there"),
    [
        # a container of docker or a pod: its own cgroup is the root that it sees
        ("0::/\n", {"cpu.max": "400000 100000"}, 4),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "350000 100000"}, 3),
        ("0::/a\n", {"a/cpu.max": "50000 100000"}, 1),
        ("0::/a\n", {"a/cpu.max": "6400000 100000"}, 8),
        ("0::/a\n", {"a/cpu.max": "max 100000"}, 8),
        (
            "3:cpu,cpuacct:/docker/x\n0::/\n",
            {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"},
            2,
        ),
        ("3:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("0::/\n", {}, 8),
        (None, {}, 8),
    ],
)
def test_cores_are_those_that_a_quota_pays_for(
    lines: str | None, files: dict[str, str], there: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    if lines is not None:
        (tmp_path / "self").write_text(lines)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert cores(own=tmp_path / "self", mounted=tmp_path) == there


def test_the_doctor_says_that_a_quota_is_why_there_are_few(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(doctor, "cores", lambda: 4)
    assert doctor._cores().what.startswith("4 for this process by its cgroup's quota")
    monkeypatch.setattr(doctor, "cores", lambda: 8)
    assert doctor._cores().what.startswith("8 for this process, ")
