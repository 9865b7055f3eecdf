"""What share of the CPU a process has."""

import os
from pathlib import Path


def autogroup(pid: int) -> tuple[str, str]:
    """Its name and "nice N"; both empty where no session was begun since the boot (the kernel's root group)."""
    name, _, nice = Path(f"/proc/{pid}/autogroup").read_text().strip().partition(" ")
    return name, nice


def assert_stands_back(pid: int, nice: int) -> None:
    assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + nice)
    if os.path.exists("/proc/self/autogroup"):
        assert autogroup(pid)[1] == f"nice {nice}"
