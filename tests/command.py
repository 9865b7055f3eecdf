"""The command as a user runs it, in a process of its own, and what it left behind."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from l0fast.run_dir import read_metrics, read_trajectories

ROOT = Path(__file__).parents[1]


def start(*args: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "l0fast.run", *args],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen[str], code: int) -> str:
    out, _ = process.communicate(timeout=110)
    assert process.returncode == code, out
    return out


def children_of(pid: int) -> set[int]:
    """All descendants of a process."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(stat.parent.name)] = int(fields[1])
    found, frontier = set(), {pid}
    while frontier := {child for child, parent in parents.items() if parent in frontier} - found:
        found |= frontier
    return found


def wait_until(condition: Callable[[], Any], timeout_s: float) -> bool:
    """Whether it came to hold in time."""
    deadline = time.monotonic() + timeout_s
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(holds)


def wait_until_gone(pids: set[int], timeout_s: float = 5) -> set[int]:
    """Those that are still there after a while."""
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), timeout_s)
    return {pid for pid in pids if Path(f"/proc/{pid}").exists()}


def seen(run_dir: Path) -> tuple[list[dict[str, Any]], list[Any]]:
    """What a run did, without what is a matter of time: its rows of metrics, and all that was said in its episodes."""
    rows = [
        {
            key: value
            for key, value in row.items()
            # what an engine has computed by the end of a step is a matter of time, too
            if not key.startswith(("time/", "loop/", "share/", "engine/")) and not key.endswith("_s")
        }
        for row in read_metrics(run_dir)
    ]
    for row in rows:
        # whether an identical call had been answered or was still running is a matter of time; that there was one is not
        row["tools/search/reused"] = row.pop("tools/search/hits") + row.pop("tools/search/shared")
    played = [
        (file.name, [(turn.prompt_ids, turn.response_ids, turn.output) for turn in t.turns], t.rewards, t.advantages)
        for file in sorted((run_dir / "trajectories").iterdir())
        for t in read_trajectories(file)
    ]
    return rows, played
