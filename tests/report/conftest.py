"""A finished run's folder, made up."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from l0fast.config import RunConfig
from l0fast.ids import Ids
from l0fast.run_dir import RunDir, step_name
from l0fast.step_shares import CAUSES
from l0fast.types import Task, Trajectory, TrajectoryStatus, Turn

NUM_STEPS = 4


def played(index: int, *, right: bool, turns: int = 2) -> Trajectory:
    turn = Turn(
        prompt_ids=Ids((1, 2)),
        response_ids=Ids((3, 4, 5)),
        sampler_logprobs=(-0.5,) * 3,
        finish_reason="stop",
        policy_version=0,
        text="<think>I should look it up.</think><code>\nsearch('Bergen')\n</code>",
        output=f"['Bergen is in Norway, says \x1b[2J line {index}.']",
        well_formed=True,
        generate_s=0.25,
        execute_s=0.05,
    )
    return Trajectory(
        task=Task(id="q", question="Which currency is used where Bergen lies?", answers=("krone", "NOK"), hops=2),
        index=index,
        status=TrajectoryStatus.COMPLETED,
        turns=(
            turn,
            replace(turn, text="no code [bold]", output=None, complaint="No code was run.", well_formed=False),
        )[:turns],
        answer="krone" if right else "euro",
        rewards=(0.05, 0.85 if right else 0.05)[:turns],
        correct=right,
        started_s=10.0 + index,
        wall_s=1.0,
    )


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    with RunDir.create(path, RunConfig()) as run:
        for step in range(1, NUM_STEPS + 1):
            run.metrics(row(step))
        group = [played(0, right=True), played(1, right=False), played(2, right=False, turns=1)]
        lost = replace(
            played(3, right=False), status=TrajectoryStatus.FAILED_SANDBOX, cause="the shard died", answer=None
        )
        asyncio.run(run.trajectories(step_name(1), group, [[0.5, 0.25]] * 3))
        asyncio.run(run.trajectories(step_name(NUM_STEPS), [*group, lost]))
        run.summary(
            {"eval_accuracy_before": 0.2, "eval_greedy_before": 0.5, "eval_accuracy_after": 0.7, "steps": NUM_STEPS}
        )
    return path


@pytest.fixture(name="row")
def row_fixture() -> Callable[[int], dict[str, float]]:
    """A step's metrics."""
    return row


def row(step: int) -> dict[str, float]:
    shares = {"decode": 0.2, "prefill": 0.05, "sandbox": 0.125, "learn": 0.5, "sync": 0.0625, "other": 0.0625}
    return {
        "step": step,
        "rollout/correct": 0.2 + 0.1 * step,
        "rollout/reward": 0.3 + 0.05 * step,
        "rollout/episodes_per_s": 30.0,
        "rollout/tokens_per_s": 2250.0,
        "loop/lag_p99_ms": 1.5,
        "time/step_s": 4.0,
        "time/since_start_s": 4.0 * step,
        **{f"share/{cause}": shares.get(cause, 0.0) for cause in CAUSES},
        "outcome/right": 0.2 + 0.1 * step,
        "outcome/one_hop_only": 0.4 - 0.1 * step,
        "outcome/no_answer": 0.4,
        **({"eval/sampled": 0.45} if step == 2 else {}),
    }
