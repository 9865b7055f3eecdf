"""The folder a run leaves behind. It is the truth: whatever is shown of a run is drawn from it.

    config.toml                    every setting, as run
    metrics.jsonl                  one flat object a step
    groups.jsonl                   what became of each group: learned from in which step, or dropped, and why
    trajectories/step_0001.jsonl   what the agents did, one trajectory a line; also eval_before.jsonl and so on. A prompt that
                                   begins with the one before and its response stands there as `new_prompt_ids`, the rest.
                                   They may be deleted at any time, which rollout.keep_trajectories has the run do
    summary.json                   the outcome, replaced as a whole
    log.txt                        what a person was told, with times
    checkpoints/step_000008/       all that going on from there takes; written by the learner, whole or not at all
    plots/  model/                 made at the end by others

One run writes it at a time: `metrics.jsonl` is locked where the file system has locks (`RunDir.locked`); not `log.txt`, which
logrotate may take. A resumed run first removes what was written after its checkpoint, so that it is written once; it does so
only once everything it needs has started, so that one that can't start leaves the folder as it was.

Trajectories are encoded and written by a thread that sleeps as long as it works, half a millisecond at a time. Without
the sleeps it takes the interpreter back from the event loop at once: 10-35 ms of lag for 600 long trajectories, measured.
"""

import asyncio
import os
import re
import shlex
import shutil
import sys
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, fields
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import orjson
import tomli_w
from pydantic import ConfigDict, TypeAdapter

from l0fast.config import RunConfig
from l0fast.errors import UsageError, WorldError, boundary, holds
from l0fast.files import lock, whole_file, write_whole
from l0fast.ids import Ids
from l0fast.types import Group, Trajectory, Turn

_SLICE_S = 0.0005
_VOLUMES_OWN = "lost+found"
"""Folder that ext4 has in an empty volume, for root alone to look into."""
_TRAJECTORY_FIELDS = tuple(f.name for f in fields(Trajectory))
_TURN_FIELDS = tuple(f.name for f in fields(Turn))


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTrajectory(Trajectory):
    """A trajectory as it stands in a file."""

    # what stands in a file and isn't known here is of another version, whose figures may mean something else
    __pydantic_config__ = ConfigDict(extra="forbid")

    advantages: tuple[float, ...] = ()
    """One a turn, as the learner used them; empty where nothing was learned from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRow:
    """What became of a group. Each number stands in `groups.jsonl` once; one that doesn't is still open."""

    group: int
    """Its number, counted from 0 in the order of admission."""
    task: str
    """Id."""
    step: int
    """That learned from it, or while which it was dropped; counted from 1 as in `metrics.jsonl`."""
    outcome: str
    """"learned"; "dropped": all its episodes equally right (rollout.drop_rate); "too_stale": sampled by weights too old."""
    policy_version: int
    """Of the weights that the engine had when it was admitted."""
    oldest_version: int
    """Of the weights that sampled its tokens."""
    failures: int
    """Episodes lost on the way, each played again."""

    @classmethod
    def of(cls, group: Group, step: int, outcome: str) -> "GroupRow":
        return cls(
            group=group.number,
            task=group.task.id,
            step=step,
            outcome=outcome,
            policy_version=group.policy_version,
            oldest_version=group.oldest_version,
            failures=len(group.failures),
        )


class RunDir:
    """Writes a run's folder. Not for several threads at once, except `log`. What can't be written is a WorldError."""

    def __init__(self, path: Path, *, as_found: bool = False):
        self.path = path
        self.as_found = as_found
        """Whether all that another run left is still there: true until `go_on_after`."""
        self._metrics = (path / "metrics.jsonl").open("ab")
        try:
            self.locked = lock(self._metrics)
            """Whether no other run can write here meanwhile."""
        except BlockingIOError:
            self._metrics.close()
            raise UsageError(
                f"run folder {path} is being written by a run that still goes on: end that first"
            ) from None
        self._log = (path / "log.txt").open("a", encoding="utf-8")
        self._groups = (path / "groups.jsonl").open("ab")
        self._log_lock = threading.Lock()

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> "RunDir":
        """Make the folder with its `config.toml`.

        Raises:
            UsageError: something is there already, or it can't be made.
        """
        check_free(path)
        try:
            (path / "trajectories").mkdir(parents=True)
            (path / "plots").mkdir()
            _write_config(path, config)
            return cls(path)
        except OSError as e:
            raise UsageError(f"run folder {path} can't be written ({e.strerror}): choose another with --run-dir") from e

    @classmethod
    def anew(cls, path: Path, config: RunConfig) -> "RunDir":
        """Make it where a run has left no checkpoint, whose folder makes way: it is `path` with .1 at its end, or .2, ...

        Raises:
            UsageError: that run is still writing it, or has left a checkpoint meanwhile, or it can't be moved.
        """
        with cls.resume(path):
            if checkpoints(path):
                raise UsageError(
                    f"{path} has a checkpoint by now, of a run that was ending: give the same command again"
                )
            numbered = (path.parent / f"{path.name}.{number}" for number in count(1))
            try:
                path.rename(next(other for other in numbered if not other.exists()))
            except OSError as e:
                raise UsageError(
                    f"run folder {path}, which has no checkpoint to go on from, can't make way ({e.strerror}): move it, or "
                    "choose another with --run-dir"
                ) from e
        return cls.create(path, config)

    @classmethod
    def resume(cls, path: Path) -> "RunDir":
        """Open the folder of a run to go on with, and leave it as it is.

        Raises:
            UsageError: a run is still writing it, or it can't be written.
        """
        try:
            run_dir = cls(path, as_found=True)
            # they take most of the room, so they may have been deleted
            (path / "trajectories").mkdir(exist_ok=True)
        except OSError as e:
            raise _not_yours(path, e) from e
        return run_dir

    def go_on_after(self, step: int, config: RunConfig) -> None:
        """Make it what `step` left, for a run that goes on from there with these settings.

        Raises:
            UsageError: it can't be written.
        """
        self.as_found = False
        try:
            _forget_after(self.path, step)
            _write_config(self.path, config)
        except OSError as e:
            raise _not_yours(self.path, e) from e

    @property
    def model_path(self) -> Path:
        """Where the final model goes."""
        return self.path / "model"

    def checkpoint_path(self, step: int) -> Path:
        """Where the checkpoint after a step goes."""
        return self.path / "checkpoints" / f"step_{step:06d}"

    def metrics(self, row: Mapping[str, Any]) -> None:
        """Append one flat object; on disk when this returns."""
        with self._writing("metrics.jsonl"):
            self._metrics.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY))
            self._metrics.flush()

    def groups(self, rows: Sequence[GroupRow]) -> None:
        """Append what became of some groups."""
        with self._writing("groups.jsonl"):
            self._groups.writelines(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)
            self._groups.flush()

    async def trajectories(
        self,
        name: str,
        trajectories: Sequence[Trajectory],
        advantages: Sequence[Sequence[float]] | None = None,
    ) -> Path:
        """Write `trajectories/<name>.jsonl`, e.g. `step_name(3)` or "eval_before".

        Args:
            advantages: for each trajectory one number a turn, or an empty sequence; may be left out.
        """
        if advantages is not None and len(advantages) != len(trajectories):
            raise ValueError(f"{len(trajectories)} trajectories but advantages for {len(advantages)}")
        path = self.path / "trajectories" / f"{name}.jsonl"
        with self._writing(f"trajectories/{name}.jsonl"):
            await asyncio.to_thread(_write_trajectories, path, trajectories, advantages)
        return path

    async def drop_trajectories(self, last: int) -> None:
        """Remove those of steps up to `last`; those of evaluations stay."""
        with boundary(WorldError, f"remove old ones of {self.path / 'trajectories'}"):
            await asyncio.to_thread(_drop_trajectories, self.path / "trajectories", last)

    def summary(self, summary: Mapping[str, Any]) -> None:
        """Replace `summary.json`: a reader finds the old one or the new one, never half of it."""
        with self._writing("summary.json"):
            write_json(self.path / "summary.json", summary)

    def log(self, text: str) -> None:
        # must not get in the way of an error or a Ctrl-C that is being told: a full disk shows in files that matter more
        with self._log_lock, suppress(OSError):
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self._log.flush()

    def close(self) -> None:
        for file in (self._metrics, self._groups, self._log):
            with suppress(OSError):  # what could not be written, as was told
                file.close()

    def _writing(self, name: str) -> AbstractContextManager[None]:
        return boundary(WorldError, f"write {self.path / name}")

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self.close()
        if self.vanishes_with(error):
            for entry in self.path.iterdir():
                if entry.name == _VOLUMES_OWN:
                    continue
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            with suppress(OSError):  # a link, or where a volume is mounted, stays: empty, it is as free
                self.path.rmdir()

    def vanishes_with(self, error: BaseException | None) -> bool:
        """Whether the folder goes when the run ends with this error.

        Only while it ran did it show that a setting can't be used: the same command, set right, finds its folder free.
        """
        return holds(error, UsageError) and not (
            checkpoints(self.path)
            or any((self.path / "trajectories").iterdir())
            or (self.path / "metrics.jsonl").stat().st_size > 0
        )


def _not_yours(path: Path, error: OSError) -> UsageError:
    return UsageError(f"run folder {path} can't be written ({error.strerror}): make it yours and try again")


def step_name(step: int) -> str:
    """Name of the file that holds a step's trajectories, without its ending."""
    return f"step_{step:04d}"


def is_free(path: Path) -> bool:
    """Whether it is missing or an empty folder, as a new volume is. Raises UsageError where that can't be seen."""
    try:
        return not path.exists() or (path.is_dir() and not any(entry.name != _VOLUMES_OWN for entry in path.iterdir()))
    except OSError as e:
        raise UsageError(f"run folder {path} can't be looked into ({e.strerror}): choose another with --run-dir") from e


def check_free(path: Path) -> None:
    """Raise UsageError unless `path` is missing or an empty folder, below folders that may be written."""
    try:
        if not is_free(path):
            what = "holds files" if path.is_dir() else "is a file"
            raise UsageError(
                f"run folder {path} {what}, and a run never overwrites: choose another with --run-dir, or move it"
            )
        above = path.absolute()
        while not above.exists():
            above = above.parent
    except OSError as e:
        raise UsageError(f"run folder {path} can't be looked into ({e.strerror}): choose another with --run-dir") from e
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(
            f"run folder {path} can't be made, {above} is not a folder you may write to: choose another with --run-dir"
        )


def checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    # the learner writes under another name, and takes learner.json away first from what it removes
    found = [
        (step, path) for path in (run_dir / "checkpoints").glob("*") if (step := _step_of(path.name, "")) is not None
    ]
    return [path for _, path in sorted(found) if (path / "learner.json").exists()]


def read_driver_state(checkpoint: Path) -> dict[str, Any]:
    """What the driver wrote into a checkpoint. Raises UsageError where there is none."""
    path = checkpoint / "driver.json"
    try:
        return _decode(orjson.loads, path.read_bytes(), str(path))
    except OSError as e:
        raise UsageError(f"{path} can't be read ({e.strerror}): is {checkpoint} a checkpoint of a run?") from e


def resume_hint(run_dir: Path) -> str:
    """How to go on with a run, as a line to copy."""
    if not checkpoints(run_dir):
        return f"{run_dir} has no checkpoint yet, so there is nothing to resume"
    return f"resume with: {command('l0fast.run', '--resume', str(run_dir))}"


def new_run_hint(run_dir: Path) -> str:
    """How to begin another run with what one has learned. One that was killed has no model, but perhaps a checkpoint."""
    if (model := run_dir / "model").is_dir():
        return f"start a new run with --model.path {shlex.quote(str(model))}"
    if checkpoints(run_dir):
        return f"start a new run with --model.path OUT after: {command('l0fast.export', str(run_dir), 'OUT')}"
    return "start a new run"


def command(module: str, *words: str) -> str:
    """A line to copy into a shell: `python -m module words`, with the path of this Python where a shell takes another."""
    python = Path(sys.executable)
    # not resolved: a virtual environment's is a link
    name = python.name if shutil.which(python.name) == str(python) else str(python)
    return shlex.join([name, "-m", module, *words])


def read_config(run_dir: Path) -> RunConfig:
    """The settings a run was made with. Raises UsageError where there are none that hold."""
    path = run_dir / "config.toml"
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UsageError(f"{path} can't be read ({e.strerror}): is {run_dir} the folder of a run?") from e
    except tomllib.TOMLDecodeError as e:
        raise UsageError(f"{path} is not TOML: {e}; mend that place") from e
    return _decode(RunConfig.model_validate_json, orjson.dumps(settings), str(path))


def _write_config(run_dir: Path, config: RunConfig) -> None:
    # TOML has no null, and no setting is one
    write_whole(run_dir / "config.toml", tomli_w.dumps(config.model_dump(mode="json")).encode())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a file, for people to read too: a reader finds the old one or the new one, never half of it."""
    options = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY
    write_whole(path, orjson.dumps(value, option=options))


def _step_of(name: str, ending: str) -> int | None:
    """The step in a name like step_0012.jsonl or eval_step_12.jsonl."""
    match = re.fullmatch(rf"(?:eval_)?step_(\d+){re.escape(ending)}", name)
    return int(match[1]) if match else None


def _forget_after(run_dir: Path, step: int) -> None:
    """Remove what a run wrote after a step, and what it was writing when it ended."""
    kept = {path for path in checkpoints(run_dir) if (_step_of(path.name, "") or 0) <= step}
    for other in {*(run_dir / "checkpoints").glob("*")} - kept:
        # before all else: whenever this is killed, no checkpoint is of a step whose rows are gone
        (other / "learner.json").unlink(missing_ok=True)
        shutil.rmtree(other)
    for name in ("metrics.jsonl", "groups.jsonl"):
        kept_bytes = 0
        for line, place in _lines(run_dir / name):
            # a killed run may leave half of its last row
            if not line.endswith(b"\n") or _decode(orjson.loads, line, place)["step"] > step:
                break
            kept_bytes += len(line)
        os.truncate(run_dir / name, kept_bytes)
    for file in (run_dir / "trajectories").iterdir():
        of_step = _step_of(file.name, ".jsonl")
        if file.name.endswith(".partial") or "_after" in file.stem or (of_step is not None and of_step > step):
            file.unlink()
    (run_dir / "summary.json").unlink(missing_ok=True)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All rows of `metrics.jsonl`, in order."""
    return [_decode(orjson.loads, line, place) for line, place in _lines(run_dir / "metrics.jsonl")]


def read_groups(run_dir: Path) -> list[GroupRow]:
    """All rows of `groups.jsonl`, in order."""
    return [_decode(_group_of, line, place) for line, place in _lines(run_dir / "groups.jsonl")]


def _group_of(line: bytes) -> GroupRow:
    return GroupRow(**orjson.loads(line))


def read_summary(run_dir: Path) -> dict[str, Any]:
    """`summary.json`, or nothing while the run has not ended."""
    path = run_dir / "summary.json"
    return _decode(orjson.loads, path.read_bytes(), str(path)) if path.exists() else {}


def read_trajectories(path: Path) -> list[SavedTrajectory]:
    """All trajectories of one file, in order.

    Raises:
        UsageError: no such file, or a line that is not a trajectory.
    """
    return [_decode(_trajectory_of, line, place) for line, place in _lines(path)]


def trajectory_row(trajectory: Trajectory, advantages: Sequence[float] = ()) -> dict[str, Any]:
    """What a line of a file says, for `dump_row`. Prompts in full would take most of it, and more with every turn."""
    row = {name: getattr(trajectory, name) for name in _TRAJECTORY_FIELDS}
    turns, before = [], None
    for turn in trajectory.turns:
        fields_of_turn = {name: getattr(turn, name) for name in _TURN_FIELDS}
        if before is not None and (new := turn.new_prompt_ids(before)) is not None:
            del fields_of_turn["prompt_ids"]
            fields_of_turn["new_prompt_ids"] = new
        turns.append(fields_of_turn)
        before = turn
    return row | {"turns": turns, "advantages": list(advantages)}


def dump_row(row: Mapping[str, Any]) -> bytes:
    """A line of JSON."""
    return orjson.dumps(row, default=Ids.numpy, option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)


def _trajectory_of(line: bytes) -> SavedTrajectory:
    row = orjson.loads(line)
    try:
        ids = None
        for turn in row["turns"]:
            new = turn.pop("new_prompt_ids", None)
            # as in the run, a conversation is in memory once
            turn["prompt_ids"] = Ids(turn["prompt_ids"]) if ids is None or new is None else ids + new
            turn["response_ids"] = Ids(turn["response_ids"])
            ids = turn["prompt_ids"] + turn["response_ids"]
    except (AttributeError, KeyError, TypeError) as e:
        raise ValueError(f"no ids where they should be: {type(e).__name__} {e}") from e
    return _saved_trajectory().validate_python(row)


@cache
def _saved_trajectory() -> TypeAdapter[SavedTrajectory]:
    return TypeAdapter(SavedTrajectory)


def _lines(path: Path) -> Iterator[tuple[bytes, str]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield line, f"{path}, line {number}"
    except OSError as e:
        raise UsageError(f"{path} can't be read ({e.strerror}): is that the folder of a run?") from e


def _decode(decode: Any, data: bytes, place: str) -> Any:
    try:
        return decode(data)
    except (TypeError, ValueError) as e:
        # not JSON, or not of this shape
        raise UsageError(f"{place} is not what a run writes ({str(e).splitlines()[0]}): remove it or run again") from e


def _drop_trajectories(folder: Path, last: int) -> None:
    for file in folder.glob("step_*.jsonl"):
        if (_step_of(file.name, ".jsonl") or 0) <= last:
            file.unlink()


def _write_trajectories(
    path: Path, trajectories: Sequence[Trajectory], advantages: Sequence[Sequence[float]] | None
) -> None:
    with whole_file(path) as partial, partial.open("wb") as file:
        since = time.perf_counter()
        for i, trajectory in enumerate(trajectories):
            file.write(dump_row(trajectory_row(trajectory, advantages[i] if advantages is not None else ())))
            if time.perf_counter() - since > _SLICE_S:
                time.sleep(_SLICE_S)
                since = time.perf_counter()
