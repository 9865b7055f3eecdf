"""Looking for processes, living ones alone."""

import os
from collections.abc import Callable


def processes_with(wanted: Callable[[int, int, bytes], bool]) -> list[int]:
    """Pids for which `(pid, uid, command line) -> bool` holds."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                with open(f"/proc/{entry.name}/cmdline", "rb") as f:
                    line = f.read()
                # a zombie has no command line, and is nobody's leftover but its parent's
                if line and wanted(int(entry.name), entry.stat().st_uid, line):
                    found.append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found
