"""Looking for processes, living ones alone."""

import os
from collections.abc import Callable
from pathlib import Path


def processes_with(wanted: Callable[[int, int, bytes], bool]) -> list[int]:
    """Pids for which `(pid, uid, command line) -> bool` holds.

    The uid is the saved one: a zygote that kills with a session's uid is for that moment, by real and effective uid,
    taken for the session.
    """
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                line = Path(entry.path, "cmdline").read_bytes()
                # a zombie has no command line, and is nobody's leftover but its parent's
                if line and wanted(int(entry.name), _saved_uid(entry.path), line):
                    found.append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def _saved_uid(process: str) -> int:
    status = Path(process, "status").read_text()
    return int(status.partition("\nUid:")[2].split()[2])
