"""Episodes of an evaluation as they finish: one JSON line each, appended, so that a run that was killed goes on.

A line is a trajectory as runs write them (run_dir.py), with `benchmark`, `sample` and the scores of its answer. One that was
cut off by a kill is not read, and its episode played again. Failed ones have no vote and are played again, too.
"""

import asyncio
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any

import orjson

from l0fast.errors import UsageError, WorldError, boundary
from l0fast.files import lock
from l0fast.run_dir import dump_row, trajectory_row
from l0fast.types import Task, Trajectory

Key = tuple[str, str, int]
"""Benchmark, task id, sample."""
_ASKED = ("question", "answers", "check", "tests")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What statistics need of an episode."""

    correct: bool
    scores: Mapping[str, float]
    """Of the answer, by reward."""
    turns: int
    tokens: int | None
    """Sampled; None of an endpoint that doesn't count them."""
    wall_s: float
    asked: str
    """Fingerprint of the question (`fingerprint`)."""


def fingerprint(task: Task | Mapping[str, Any]) -> str:
    """Of a question and what answers it: the id may be no more than a line's number, and the file another by now."""
    of = task if isinstance(task, Mapping) else {name: getattr(task, name) for name in _ASKED}
    # in which order the answers come makes no difference
    parts = [sorted(of[name]) if name == "answers" else of[name] for name in _ASKED]
    return blake2b(orjson.dumps(parts), digest_size=8).hexdigest()


class Episodes:
    """The file of an evaluation. Use with `async with`; raises UsageError while another process does."""

    def __init__(self, path: Path):
        self.path = path
        self.done: dict[Key, Outcome] = {}
        """Those that have a vote."""
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> "Episodes":
        self._file = await asyncio.to_thread(self.path.open, "ab")
        try:
            self.locked = lock(self._file)
            await asyncio.to_thread(self._read)
        except BaseException as e:
            self._file.close()
            if isinstance(e, BlockingIOError):
                raise UsageError(
                    f"{self.path.parent} is being written by an evaluation that still goes on: end that first"
                ) from None
            if isinstance(e, OSError):
                raise UsageError(f"{self.path} can't be written ({e.strerror}): give another --out") from e
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ):
        with suppress(OSError):  # what could not be written, as was told
            self._file.close()

    async def add(self, benchmark: str, sample: int, trajectory: Trajectory, scores: Mapping[str, float]) -> None:
        """Write an episode, off the loop. Raises WorldError where it can't be written."""
        async with self._lock:
            with boundary(WorldError, f"write {self.path}"):
                outcome = await asyncio.to_thread(self._write, benchmark, sample, trajectory, scores)
        if not trajectory.status.failed:
            self.done[benchmark, trajectory.task.id, sample] = outcome

    def _write(self, benchmark: str, sample: int, trajectory: Trajectory, scores: Mapping[str, float]) -> Outcome:
        row = {"benchmark": benchmark, "sample": sample, "scores": dict(scores)} | trajectory_row(trajectory)
        self._file.write(dump_row(row))
        self._file.flush()
        return _outcome(row)

    def _read(self) -> None:
        whole = 0
        for end, row in _rows(self.path):
            whole = end
            if not row["status"].startswith("failed"):
                self.done[row["benchmark"], row["task"]["id"], row["sample"]] = _outcome(row)
        # what a kill has cut off would spoil the next line
        os.truncate(self.path, whole)


def read_outcomes(path: Path) -> dict[str, dict[str, list[Outcome]]]:
    """benchmark -> question -> the outcomes of its samples that have a vote. Raises UsageError.

    A question is told by its task's id and its fingerprint: those of two files may have the same ids.
    """
    outcomes: dict[str, dict[str, list[Outcome]]] = {}
    for _, row in _rows(path):
        if not row["status"].startswith("failed"):
            outcome = _outcome(row)
            question = f"{row['task']['id']} {outcome.asked}"
            outcomes.setdefault(row["benchmark"], {}).setdefault(question, []).append(outcome)
    return outcomes


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Whole lines, each with where it ends."""
    end = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                end += len(line)
                if not line.endswith(b"\n"):
                    return
                row = orjson.loads(line)
                if not isinstance(row, dict) or not {"benchmark", "correct"} <= row.keys():
                    raise UsageError(f"{path}, line {number} is not what an evaluation writes: give another folder")
                yield end, row
    except OSError as e:
        raise UsageError(f"{path} can't be read ({e.strerror}): is that the folder of an evaluation?") from e
    except orjson.JSONDecodeError as e:
        raise UsageError(f"{path} is not what an evaluation writes ({e}): give another folder") from e


def _sum(counts: Iterable[int | None]) -> int | None:
    """None where one of them is unknown."""
    known = list(counts)
    return None if None in known else sum(n for n in known if n)


def _outcome(row: Mapping[str, Any]) -> Outcome:
    return Outcome(
        correct=row["correct"],
        scores=row["scores"],
        turns=len(row["turns"]),
        tokens=_sum(len(turn["response_ids"]) or turn.get("counted_tokens") for turn in row["turns"]),
        wall_s=row["wall_s"],
        asked=fingerprint(row["task"]),
    )
