"""What this process's cgroups leave it of the machine, version 1 or 2."""

import os
from collections.abc import Iterator
from pathlib import Path

OWN = Path("/proc/self/cgroup")
MOUNTED = Path("/sys/fs/cgroup")


def cgroup_files(controller: str, v1: str, v2: str, *, own: Path = OWN, mounted: Path = MOUNTED) -> Iterator[Path]:
    """Those named `v1` or `v2`, from this process's cgroup up to the root, as far as it sees them."""
    if not own.is_file():
        return
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root, name = (mounted / controller, v1) if controllers else (mounted, v2)
        here = root / path.lstrip("/")
        yield from (
            file
            for folder in (here, *here.parents)
            if folder.is_relative_to(root) and (file := folder / name).is_file()
        )


def cores(*, own: Path = OWN, mounted: Path = MOUNTED) -> int:
    """Cores to compute on: those this process may run on, and no more than its quota is worth, rounded down.

    Under a quota (docker --cpus, a pod's limit) it runs on all of the machine's, and stands still for the rest of every tenth
    of a second when its threads have had what they may have together: OpenMP's, which spin, have it at once.
    """
    most = len(os.sched_getaffinity(0))
    for file in cgroup_files("cpu", "cpu.cfs_quota_us", "cpu.max", own=own, mounted=mounted):
        quota, *period = file.read_text().split()
        if quota.isdigit():
            [period_us] = period or (file.parent / "cpu.cfs_period_us").read_text().split()
            most = min(most, max(1, int(quota) // int(period_us)))
    return most
