"""What a run recorded of its own timing, and the speed of the engine that explains it.

A turn that sampled n tokens, while on average B requests were at its engine, and prompts of P new tokens came to it, took

    generate_s = n (step_s + step_request_s B) + P / prefill_tokens_per_s + latency_s

Every turn gives one such equation; least squares over all of them, with no coefficient below 0, gives the speed. What the
equation leaves out (waiting for a slot, prompts that share a beginning) stays as an error, which whatif.py measures.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from l0fast.config import RunConfig
from l0fast.engine.simulated import Speed
from l0fast.errors import UsageError
from l0fast.ids import Ids
from l0fast.prefixes import Prefixes
from l0fast.run_dir import SavedTrajectory, read_config, read_metrics, read_trajectories, step_name
from l0fast.segments import segments_of


@dataclass(frozen=True, slots=True)
class RecordedGroup:
    trajectories: tuple[SavedTrajectory, ...]
    failures: tuple[SavedTrajectory, ...]
    laid_out: int
    """What the learner computes of it: segments, and once what they begin with in common [tokens]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedStep:
    groups: tuple[RecordedGroup, ...]
    step_s: float
    """Without the evaluation in it [s]."""
    learn_s: float
    """What the learner worked, whoever waited for it [s]."""
    sync_s: float
    dropped_groups: int
    """Played in it besides, and not recorded."""

    @property
    def laid_out(self) -> int:
        """[tokens]"""
        return sum(group.laid_out for group in self.groups)


@dataclass(frozen=True, slots=True)
class Recording:
    config: RunConfig
    steps: tuple[RecordedStep, ...]


@dataclass(frozen=True, slots=True)
class Timing:
    """How fast a run's rooms were."""

    speed: Speed
    latency_s: float
    """Of every turn, besides the engine's work [s]."""
    learn_s_per_token: float
    """That it lays out: a policy that grows surer says the same more often, and its learner has less to do [s]."""
    sync_s: float

    def slower(self, factor: float) -> "Timing":
        """The same, with an engine that takes so many times as long."""
        speed = self.speed
        return Timing(
            Speed(
                prefill_tokens_per_s=speed.prefill_tokens_per_s / factor,
                step_s=speed.step_s * factor,
                step_request_s=speed.step_request_s * factor,
            ),
            self.latency_s * factor,
            self.learn_s_per_token,
            self.sync_s,
        )


def read_recording(run_dir: Path, *, last_steps: int | None = None) -> Recording:
    """What stands in a run's folder, of its last steps or of all. Takes some 10 ms a trajectory file.

    Raises:
        UsageError: not a run's folder, or one without a whole step; no number of steps.
    """
    config, rows = read_config(run_dir), read_metrics(run_dir)
    # those of older steps may have been deleted
    rows = [row for row in rows if _trajectories(run_dir, row).exists()]
    if last_steps is not None:
        if last_steps < 1:
            raise UsageError(f"the last {last_steps} steps are none: give a number above 0, or leave it out for all")
        rows = rows[-last_steps:]
    if not rows:
        raise UsageError(
            f"{run_dir} has no step that could be replayed: give the folder of a run that took some, with their trajectories"
        )
    return Recording(config, tuple(_read_step(run_dir, config, row) for row in rows))


def _read_step(run_dir: Path, config: RunConfig, row: dict[str, Any]) -> RecordedStep:
    step_s = row["time/step_s"]
    return RecordedStep(
        groups=_groups(read_trajectories(_trajectories(run_dir, row)), config.rollout.group_size),
        step_s=step_s * (1 - row["share/evaluate"]),
        learn_s=row["learner/step_s"],
        sync_s=step_s * row["share/sync"],
        dropped_groups=row["rollout/dropped_groups"],
    )


def _trajectories(run_dir: Path, row: dict[str, Any]) -> Path:
    return run_dir / "trajectories" / f"{step_name(row['step'])}.jsonl"


def _groups(trajectories: Sequence[SavedTrajectory], group_size: int) -> tuple[RecordedGroup, ...]:
    """A step's file holds its groups one after another, each with those that count first, then those that failed."""
    groups: list[RecordedGroup] = []
    at = 0
    while at < len(trajectories):
        ends = at + group_size
        while ends < len(trajectories) and trajectories[ends].status.failed:
            ends += 1
        kept = tuple(trajectories[at : at + group_size])
        groups.append(RecordedGroup(kept, tuple(trajectories[at + group_size : ends]), _laid_out(kept)))
        at = ends
    return tuple(groups)


def _laid_out(trajectories: Sequence[SavedTrajectory]) -> int:
    rows = [np.array(segment.token_ids, np.int64) for t in trajectories for segment in segments_of(t)]
    return Prefixes(rows).num_tokens(range(len(rows))) if rows else 0


def fit_timing(recording: Recording, steps: Sequence[RecordedStep]) -> Timing:
    """The timing that explains these steps best.

    Raises:
        UsageError: they hold too few turns.
    """
    replicas = max(1, recording.config.engine.count)
    left, right = [], []
    for step in steps:
        rows, took_s = _equations(step, replicas, recording.config.engine.slots)
        left.append(rows)
        right.append(took_s)
    matrix, took_s = np.concatenate(left), np.concatenate(right)
    if len(took_s) < 32:
        raise UsageError(
            f"{len(took_s)} turns are too few to learn an engine's speed from: let the run take more steps"
        )
    step_s, step_request_s, prefill_s, latency_s = _non_negative_least_squares(matrix, took_s)
    # the first step of a run takes longer, whatever it learns from
    learn_s = [step.learn_s / max(step.laid_out, 1) for step in steps]
    return Timing(
        Speed(
            # what the data does not show is not there, and a speed has to be a number
            prefill_tokens_per_s=1 / max(prefill_s, 1e-9),
            step_s=max(step_s, 1e-6),
            step_request_s=step_request_s,
        ),
        latency_s,
        learn_s_per_token=statistics.median(learn_s),
        sync_s=statistics.median(step.sync_s for step in steps),
    )


def _equations(step: RecordedStep, replicas: int, slots: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """One row a turn: [n, n B, P, 1], and what it took [s]."""
    starts, took, sampled, new = [], [], [], []
    for group in step.groups:
        for trajectory in (*group.trajectories, *group.failures):
            before = Ids()
            for turn in trajectory.turns:
                starts.append(trajectory.started_s + turn.start_s)
                took.append(turn.generate_s)
                sampled.append(len(turn.response_ids))
                kept = len(before) if turn.prompt_ids.starts_with(before) else 0
                new.append(len(turn.prompt_ids) - kept)
                before = turn.prompt_ids + turn.response_ids
    start_s, took_s, n = np.array(starts), np.array(took), np.array(sampled, float)
    end_s = start_s + took_s
    # requests at the engine: up at each start, down at each end; its integral gives means over any interval
    at_s = np.concatenate([start_s, end_s])
    order = np.argsort(at_s, kind="stable")
    at_s, change = at_s[order], np.repeat([1.0, -1.0], len(start_s))[order]
    requests = np.minimum(np.cumsum(change) / replicas, slots)
    integral = np.concatenate([[0.0], np.cumsum(requests[:-1] * np.diff(at_s))])
    mean = (np.interp(end_s, at_s, integral) - np.interp(start_s, at_s, integral)) / np.maximum(took_s, 1e-9)
    by_start = np.argsort(start_s, kind="stable")
    prompts = np.concatenate([[0.0], np.cumsum(np.array(new, float)[by_start])]) / replicas
    sorted_starts = start_s[by_start]
    came = prompts[np.searchsorted(sorted_starts, end_s)] - prompts[np.searchsorted(sorted_starts, start_s)]
    return np.stack([n, n * mean, came, np.ones_like(n)], axis=1), took_s


def _non_negative_least_squares(matrix: NDArray[np.float64], target: NDArray[np.float64]) -> list[float]:
    """argmin |matrix x - target| over x >= 0. Few columns, so every set of those that may be above 0 is tried."""
    columns = matrix.shape[1]
    best, best_error = np.zeros(columns), float(target @ target)
    for chosen in range(1, 2**columns):
        support = [c for c in range(columns) if chosen >> c & 1]
        x = np.linalg.lstsq(matrix[:, support], target, rcond=None)[0]
        error = float(np.sum((matrix[:, support] @ x - target) ** 2))
        if (x >= 0).all() and error < best_error:
            best = np.zeros(columns)
            best[support], best_error = x, error
    return best.tolist()
