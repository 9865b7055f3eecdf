"""Held-out questions of one run: before, every few steps, after.

In mode on_policy an evaluation has the engine to itself. In the others training would wait for its longest episode, so it
is asked beside training instead: by `eval.share` of the engine's slots at most, one evaluation at a time. New weights may
come while it is asked: the oldest and the newest that answered are told (`eval/policy_version_*`), and its numbers stand in
the row of the step that was written next, with the step that it is of (`eval/step`). One that was under way when a run was
killed is asked again from the start.
"""

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from l0fast.agent.nb_agent import NBAgent
from l0fast.config import RunConfig
from l0fast.errors import WorldError
from l0fast.report.live import Live
from l0fast.rollout.rollouts import play_all
from l0fast.run_dir import RunDir
from l0fast.seeding import derive_seed
from l0fast.tasks.curriculum import Curriculum
from l0fast.types import Task, Trajectory


class Play(Protocol):
    def __call__(
        self, agent: NBAgent, task: Task, *, index: int, temperature: float, seed: int
    ) -> Awaitable[Trajectory]: ...


@dataclass(slots=True, kw_only=True)
class HeldOut:
    config: RunConfig
    run_dir: RunDir
    live: Live
    play: Play
    """Plays one episode and scores it."""
    curriculum: Curriculum
    agents: Mapping[str, NBAgent]
    """By scope."""
    results: dict[str, Any]
    """For the summary; added to."""
    under_way: int | None = None
    """Step whose evaluation is being asked beside training."""
    _task: "asyncio.Task[dict[str, float]] | None" = field(default=None, init=False)

    async def all(self, when: str) -> None:
        """Every fixed question, sampled and greedily, and what nothing was trained for. `when` is "before" or "after"."""
        await self._evaluate(when, self.config.eval.questions, greedy=True)
        transfer = await asyncio.to_thread(self.curriculum.transfer, self.config.eval.transfer_questions)
        for name, (scope, tasks) in transfer.items():
            played = await self._ask(scope, tasks, temperature=0.0)
            self.results[f"transfer_{name}_greedy_{when}"] = accuracy(played)
            await self.run_dir.trajectories(f"transfer_{name}_{when}", played)

    async def curve(self, step: int, *, max_open: int | None = None) -> dict[str, float]:
        """The questions of the learning curve, sampled, after a step. Returns metrics."""
        num_questions = min(self.config.eval.curve_questions, self.config.eval.questions)
        metrics = await self._evaluate(f"step {step}", num_questions, greedy=False, max_open=max_open)
        return metrics | {"eval/step": step}

    def begin(self, step: int, tasks: asyncio.TaskGroup) -> None:
        """Ask them beside training."""
        if self._task is not None:
            self.live.phase(
                f"the evaluation of step {step} is left out, for that of step {self.under_way} still goes on: raise "
                "--eval.share or --eval.every"
            )
            return
        max_open = max(1, int(self.config.eval.share * self.config.engine.slots))
        self.under_way = step
        self._task = tasks.create_task(self.curve(step, max_open=max_open), name=f"evaluation of step {step}")

    async def over(self) -> None:
        """Wait until none is asked beside training."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def finished(self) -> dict[str, float]:
        """Metrics of the one asked beside training, once: when it is over."""
        if self._task is None or not self._task.done():
            return {}
        metrics = self._task.result()
        self._task = self.under_way = None
        return metrics

    async def _evaluate(
        self, name: str, num_questions: int, *, greedy: bool, max_open: int | None = None
    ) -> dict[str, float]:
        """Ask held-out questions, sampled at T = 1 and, where wanted, greedily."""
        # a tenth of a second for the real world
        tasks, scope = await asyncio.to_thread(self.curriculum.heldout, num_questions), self.curriculum.evaluation
        played = await self._ask(scope, tasks, temperature=1.0, max_open=max_open, needed=greedy)
        metrics = {"eval/sampled": accuracy(played)} | _versions(played)
        await self.run_dir.trajectories(f"eval_{name.replace(' ', '_')}", played)
        if greedy:
            greedily = await self._ask(scope, tasks, temperature=0.0, needed=True)
            metrics["eval/greedy"] = accuracy(greedily)
            await self.run_dir.trajectories(f"eval_{name.replace(' ', '_')}_greedy", greedily)
            self.results |= {
                f"eval_accuracy_{name}": metrics["eval/sampled"],
                f"eval_greedy_{name}": metrics["eval/greedy"],
                f"eval_outcomes_{name}": self.curriculum.outcomes(played),
                # of a source there may be fewer than are wanted
                "eval_questions": len(played),
            }
        self.live.evaluation(name, metrics)
        return metrics

    async def _ask(
        self,
        scope: str,
        tasks: Sequence[Task],
        *,
        temperature: float,
        max_open: int | None = None,
        needed: bool = False,
    ) -> list[Trajectory]:
        """Episodes of the tasks, those that were lost said. Where all were, and one is `needed`, raises WorldError."""

        async def play(task: Task) -> Trajectory:
            seed = derive_seed(self.config.seed, "evaluation", task.id)
            return await self.play(self.agents[scope], task, index=0, temperature=temperature, seed=seed)

        played = await play_all(play, tasks, max_open=max_open or self.config.engine.slots)
        if lost := [t for t in played if t.status.failed]:
            how = f"of {len(played)} held-out questions {len(lost)} were lost, the last as {lost[-1].status}: {lost[-1].cause}"
            if needed and len(lost) == len(played):
                raise WorldError(how)
            self.live.phase(f"{how}; they don't count")
        return played


def accuracy(trajectories: Sequence[Trajectory]) -> float:
    """Share of right answers among the trajectories that were not lost."""
    counted = [t.correct for t in trajectories if not t.status.failed]
    return sum(counted) / len(counted) if counted else 0.0


def _versions(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    versions = [version for t in trajectories for turn in t.turns for version, _, _ in turn.spans]
    if not versions:
        return {}
    return {"eval/policy_version_oldest": min(versions), "eval/policy_version_newest": max(versions)}
