"""One training run, from settings to summary: the loop between the rooms (rooms.py), what they do is theirs.

    world -> questions -> rollouts: NBAgent x engine x sandbox -> groups -> learner -> weights -> engine -> next questions
             held-out questions: before, every few steps, after; everything is written to the run's folder

Who waits for whom: the loop in `_train` for a step's worth of groups, then for the learner, then for the engine to take
the new weights. With rollout.mode = on_policy only then are the next questions admitted, so every token is sampled from the
policy it trains; in the other modes groups are played all the while (rollout/modes.py). With `learner.stream` the learner
gets each group when it is done, and only the optimizer step waits for the last one.
Leaving a block ends what it started: processes, sessions, files.

A run can go on after anything, kill -9 of all its processes included. What a step leaves is the learner's state, in its
own form, and a few numbers of this file's (`Training.state`, driver.json); both are one folder, the checkpoint. Questions
are drawn again from the first one and passed over up to `Schedule.position`, seeds depend on group numbers, and on_policy
groups make a step in the order of their numbers: with an engine that says the same to the same prompt and seed, the run that
goes on is, bit for bit, the one that was not killed. Not so with `learner.stream`: gradients are added up in the order in
which groups finish, which is equal up to rounding. In the other modes what a step gets is a matter of time, and this much
stays exact: each group is learned from once, or dropped with its reason told, or played again when the run goes on
(groups.jsonl).
"""

import asyncio
import signal
import time
from collections.abc import Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from l0fast import __version__
from l0fast.agent.nb_agent import NBAgent
from l0fast.cli import Invocation, newest_checkpoint
from l0fast.config import RunConfig
from l0fast.disk import no_room
from l0fast.errors import LearnerError, UsageError, holds
from l0fast.files import UNLOCKED
from l0fast.garbage import OldObjects, let_go, old_objects_aside
from l0fast.heldout import HeldOut, accuracy
from l0fast.learner.advantage import RunningMean, Values, streams
from l0fast.learner.client import Advantages, LearnerClient, batch_advantages
from l0fast.meters import Meters
from l0fast.report.live import Live
from l0fast.report.plots import PlotError, draw_in_subprocess
from l0fast.rollout.lengths import Lengths
from l0fast.rollout.modes import Schedule
from l0fast.rollout.rollouts import Groups, rollouts
from l0fast.rollout.sampling import DynamicSampling
from l0fast.rollout.whatif import AdviceError, advise_in_subprocess
from l0fast.rooms import Rooms, check, hardly_meant, model_folder, open_rooms
from l0fast.run_dir import GroupRow, RunDir, new_run_hint, read_driver_state, resume_hint, step_name
from l0fast.seeding import derive_seed
from l0fast.tasks.scoring import Scorer
from l0fast.types import Group, Task, Trajectory, Turn

T = TypeVar("T")
_ASK_FOR_THE_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Ctrl-C and `kill`; a terminal that is gone; what schedulers give warning with before they kill, as `sbatch --signal=USR1@120`."""
_ECHO_S = 0.5
"""Time in which a signal counts once: in a container process 1 hands on to us what all of its processes were told [s]."""
ADVICE_AFTER = frozenset(4**n for n in range(1, 8))
"""Steps after which a run is simulated to say what would make it faster: it takes seconds of a core [steps]."""


async def run(invocation: Invocation) -> int:
    """Run to the end, or to Ctrl-C or another signal that asks for it; the summary is written either way. Returns the exit code.

    What ends a run otherwise is raised, with a note that says how to go on with it.
    """
    started = time.monotonic()
    config = invocation.config
    check(config)
    with (
        _open_run_dir(invocation) as run_dir,
        Live(config.num_steps, invocation.run_dir, log=run_dir.log) as live,
    ):
        training = Training(config, run_dir, live, started)
        begins = f"recipe {invocation.recipe}" + "; again, for there was no checkpoint" * invocation.anew
        if invocation.resume:
            # once more, for now the folder is this run's: the other one may have gone on since the words were read
            training.go_on(newest_checkpoint(invocation.run_dir, config.num_steps))
            begins = "; ".join((f"going on after step {training.step}", *invocation.changes))
        live.phase(f"l0fast {__version__}, {begins}, writing {invocation.run_dir}")
        if doubt := hardly_meant(config, model_folder(config.model.path)):
            live.phase(doubt)
        if not run_dir.locked:
            live.phase(UNLOCKED.format(run_dir.path))
        if complaint := no_room(config, invocation.run_dir, training.step):
            live.phase(complaint)
        try:
            interrupted = await _until_interrupted(training.run(), live)
        except BaseException as e:
            if not run_dir.vanishes_with(e):
                e.add_note(resume_hint(run_dir.path))
                run_dir.log(resume_hint(run_dir.path))
            raise
        summary = training.summary() | {"finished": not interrupted}
        if not run_dir.as_found:
            # one that was interrupted before it went on leaves the outcome of the run before
            run_dir.summary(summary)
        if interrupted:
            live.phase(f"interrupted after {training.step} steps")
            live.phase(resume_hint(run_dir.path))
        live.close(summary)
        if not interrupted:
            try:
                await draw_in_subprocess(run_dir.path)
            except PlotError as e:
                # everything they show is written; they can be drawn again
                live.phase(f"no pictures: {e}")
    return 130 if interrupted else 0


def _open_run_dir(invocation: Invocation) -> RunDir:
    if invocation.anew:
        return RunDir.anew(invocation.run_dir, invocation.config)
    if invocation.resume is None:
        return RunDir.create(invocation.run_dir, invocation.config)
    return RunDir.resume(invocation.run_dir)


async def _until_interrupted(work: Coroutine[Any, Any, None], live: Live) -> bool:
    """Await `work`. The first signal that asks for the end cancels it, which is then True.

    The same one again, `_ECHO_S` later, kills as usual. Another one does not: who sends SIGINT or SIGUSR1 may go on to SIGTERM
    by a clock.
    """
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    interrupted = False

    def interrupt(number: signal.Signals) -> None:
        nonlocal interrupted
        loop.call_later(_ECHO_S, loop.remove_signal_handler, number)
        if interrupted:
            return
        interrupted = True
        live.phase("ending, as soon as the learner is between two steps; once more ends it at once")
        task.cancel()

    # nohup has SIGHUP ignored, and a terminal's end is then none of the run's
    numbers = [n for n in _ASK_FOR_THE_END if n is not signal.SIGHUP or signal.getsignal(n) is not signal.SIG_IGN]
    for number in numbers:
        loop.add_signal_handler(number, interrupt, number)
    try:
        await task
    except asyncio.CancelledError:
        if not interrupted:
            raise
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
    return interrupted


async def _to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Await `work`. When this is cancelled meanwhile, it is so only after `work` has ended."""
    task, cancelled = asyncio.ensure_future(work), None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as e:
            # by Ctrl-C, say, and by what breaks beside it after that
            cancelled = e
    result = task.result()
    if cancelled is not None:
        raise cancelled
    return result


@dataclass(frozen=True, slots=True)
class _Taken:
    """A step's groups, in their order, and what remains to be done with them."""

    batch: list[Group]
    advantages: Advantages
    learn: Coroutine[Any, Any, dict[str, Any]]
    """The learner's part of the step, to be awaited once; its metrics."""


@dataclass(slots=True)
class Training:
    config: RunConfig
    run_dir: RunDir
    live: Live
    started: float
    """On time.monotonic."""
    step: int = 0
    """Optimizer steps taken."""
    position: int = 0
    """Number of the first group that no step has learned from or dropped."""
    consumed: frozenset[int] = frozenset()
    """Numbers above it that one has."""
    evaluating: int | None = None
    """Step whose evaluation was under way when the run was killed that this one goes on with."""
    episodes: int = 0
    failed_episodes: int = 0
    tokens_generated: int = 0
    first_episode_s: float | None = None
    results: dict[str, Any] = field(default_factory=dict)
    """Held-out accuracies for the summary."""
    running: RunningMean = field(default_factory=RunningMean)
    """Baseline of advantage = running_mean."""
    checkpoint: Path | None = None
    """The one to go on from."""
    saved_step: int = 0
    """That of the newest checkpoint."""
    state: dict[str, Any] = field(default_factory=dict)
    """What a checkpoint keeps of this object, as the last whole step left it."""
    lengths: Lengths = field(default_factory=Lengths)
    meters: Meters = field(init=False)

    def __post_init__(self) -> None:
        self.meters = Meters(self.config, self.run_dir.path, log=self.run_dir.log, warn=self.live.phase)

    async def run(self) -> None:
        async with (
            self.meters.running(),
            open_rooms(self.config, self.run_dir.path, self.meters, self.live.phase) as rooms,
        ):
            with old_objects_aside() as old_objects:
                await self._train(rooms, old_objects)

    def go_on(self, checkpoint: Path) -> None:
        """Be where a checkpoint says, its time included. The learner follows when it has started. Raises UsageError."""
        state = read_driver_state(checkpoint)
        self.checkpoint, self.state = checkpoint, state
        try:
            self.step = self.saved_step = state["step"]
            # a checkpoint of before there were modes has neither
            self.position, self.consumed = state["position"], frozenset(state.get("consumed", ()))
            self.evaluating = state.get("evaluating")
            self.episodes, self.failed_episodes = state["episodes"], state["failed_episodes"]
            self.tokens_generated, self.first_episode_s = state["tokens_generated"], state["first_episode_s"]
            self.results = state["results"]
            self.running = RunningMean.from_state(state["running_mean"])
            self.meters.memory.peak_mb = state["peak_pss_mb"]
            self.started -= state["wall_s"]
        except KeyError as e:
            raise UsageError(
                f"{checkpoint} was written by l0fast {state.get('version')} and has no {e.args[0]}, so {__version__} can't go "
                f"on from it: use that one, or {new_run_hint(self.run_dir.path)}"
            ) from e

    def _state(self, heldout: HeldOut) -> dict[str, Any]:
        return {
            "version": __version__,
            "config": self.config.model_dump(mode="json"),
            "model_path": str(model_folder(self.config.model.path).absolute()),
            "step": self.step,
            "position": self.position,
            "consumed": sorted(self.consumed),
            "evaluating": heldout.under_way,
            "episodes": self.episodes,
            "failed_episodes": self.failed_episodes,
            "tokens_generated": self.tokens_generated,
            "first_episode_s": self.first_episode_s,
            "results": dict(self.results),
            "running_mean": self.running.state(),
            "peak_pss_mb": self.meters.memory.peak_mb,
            "wall_s": time.monotonic() - self.started,
        }

    async def _train(self, rooms: Rooms, old_objects: OldObjects) -> None:
        config, rollout = self.config, self.config.rollout
        heldout = HeldOut(
            config=config,
            run_dir=self.run_dir,
            live=self.live,
            play=partial(self._play, rooms.scorer),
            curriculum=rooms.curriculum,
            agents=rooms.agents,
            results=self.results,
        )
        if self.checkpoint:
            with self.meters.observer.span("checkpoint"):
                await rooms.learner.load_checkpoint(self.checkpoint)
            with self.meters.observer.span("sync"):
                await rooms.engine.update_weights(self.step)
            # nothing can refuse to go on any more
            await _to_its_end(asyncio.to_thread(self.run_dir.go_on_after, self.step, config))
            self.meters.begin_trace()
        else:
            self.meters.begin_trace()
            await heldout.all("before")
        questions = rooms.curriculum.questions(config.seed)
        # pass over those of groups that are done with: thousands take a second, and the very first takes half of one
        first = await asyncio.to_thread(lambda: list(islice(questions, self.position, self.position + 1)))

        async def play(task: Task, number: int, index: int, attempt: int) -> Trajectory:
            seed = derive_seed(config.seed, "episode", number, index, attempt)
            agent = rooms.agents[rooms.curriculum.scope(task)]
            trajectory = await self._play(
                rooms.scorer, agent, task, index=index, temperature=rollout.temperature, seed=seed
            )
            self.lengths.observe(trajectory)
            return trajectory

        async def sync(version: int) -> None:
            with self.meters.observer.span("sync"):
                await rooms.engine.update_weights(version)

        try:
            async with (
                asyncio.TaskGroup() as beside,
                rollouts(
                    play,
                    chain(first, questions),
                    schedule=self._schedule(),
                    sync=sync,
                    group_size=rollout.group_size,
                    max_refills=rollout.max_refills,
                    sampling=DynamicSampling(
                        drop_rate=rollout.drop_rate,
                        max_drops=rollout.max_drop_rounds * rollout.groups_per_step,
                        seed=config.seed,
                    ),
                    begin=self.lengths.long_first,
                ) as groups,
            ):
                if self.evaluating is not None:
                    heldout.begin(self.evaluating, beside)
                self.meters.gauges["open groups"] = lambda: {"groups": groups.schedule.open}
                await self.meters.take_step(rooms.engine.load)
                advice = None
                while self.step < config.num_steps:
                    await self._step(rooms, groups, heldout, beside)
                    old_objects.sweep()
                    if self.step in ADVICE_AFTER and self.step < config.num_steps:
                        advice = beside.create_task(self._advise(), name="advice")
                if advice is not None:
                    advice.cancel()
        except BaseException as e:
            # Ctrl-C, or something that broke: what was learned is kept, if there is a learner to ask
            if not holds(e, LearnerError):
                await self._keep(rooms)
            raise
        await self._keep(rooms)
        await heldout.all("after")

    async def _advise(self) -> None:
        """Say what would make a step shorter, if anything."""
        try:
            self.live.advice(await advise_in_subprocess(self.run_dir.path) or "")
        except AdviceError as e:
            # none is no reason to end a run
            self.run_dir.log(str(e))

    def _schedule(self) -> Schedule:
        rollout = self.config.rollout
        return Schedule(
            rollout.mode,
            groups_per_step=rollout.groups_per_step,
            max_open_groups=rollout.max_open_groups,
            max_staleness=rollout.max_staleness,
            num_steps=self.config.num_steps,
            step=self.step,
            position=self.position,
            consumed=self.consumed,
        )

    async def _step(self, rooms: Rooms, groups: Groups, heldout: HeldOut, beside: asyncio.TaskGroup) -> None:
        """One optimizer step, and what is told of it."""
        if self.step + 1 == self.config.num_steps:
            await heldout.over()
        take = self._stream if self._streams(rooms.learner) else self._take
        taken = await take(rooms, groups)
        # half of it would leave the learner ahead of what is written
        await _to_its_end(self._learn(taken, rooms, groups, heldout, beside))
        await let_go(taken.batch)
        every = self.config.checkpoint.every
        if every and self.step % every == 0:
            await self._save_checkpoint(rooms)

    def _streams(self, learner: LearnerClient) -> bool:
        wanted = self.config.learner.stream
        # where engines sleep while the learner works there is nothing to work beside
        by_itself = wanted == "auto" and learner.device == "cuda" and self.config.engine.layout != "sleep"
        return streams(self.config.learner) and (wanted == "on" or by_itself)

    async def _take(self, rooms: Rooms, groups: Groups) -> _Taken:
        """All of a step's groups, for the learner to begin with."""
        with self.meters.observer.span("take"):
            batch = await groups.take()
        if rooms.sleeper:
            await rooms.sleeper.sleep()
        values = await self._values(rooms.learner, batch)
        advantages = await asyncio.to_thread(
            batch_advantages, batch, self.config, self.step + 1, running=self.running, values=values
        )
        return _Taken(batch, advantages, rooms.learner.step(batch, advantages, self.step + 1, values=values))

    async def _stream(self, rooms: Rooms, groups: Groups) -> _Taken:
        """Train on groups as they finish; returns the step's, in their order, when the learner has had all of them."""
        done: list[tuple[Group, list[np.ndarray]]] = []
        async with aclosing(groups.stream()) as batches:
            with self.meters.observer.span("take"):
                async for batch in batches:
                    values = await self._values(rooms.learner, batch)
                    advantages = batch_advantages(
                        batch, self.config, self.step + 1, running=self.running, values=values
                    )
                    with self.meters.observer.span("learn"):
                        await rooms.learner.accumulate(batch, advantages, values=values)
                    done += zip(batch, advantages, strict=True)
        done.sort(key=lambda pair: pair[0].number)
        batch, advantages = [group for group, _ in done], [advantages for _, advantages in done]
        return _Taken(batch, advantages, rooms.learner.finish_step(self.step + 1))

    async def _values(self, learner: LearnerClient, batch: Sequence[Group]) -> Values | None:
        """What the critic expects of their turns, where there is a critic."""
        if self.config.learner.critic == "none":
            return None
        with self.meters.observer.span("learn"):
            return await learner.values(batch)

    async def _learn(
        self, taken: _Taken, rooms: Rooms, groups: Groups, heldout: HeldOut, beside: asyncio.TaskGroup
    ) -> None:
        """From a step's groups to what is written of it."""
        batch, schedule = taken.batch, groups.schedule
        with self.meters.observer.span("learn"):
            learned = await taken.learn
        open_groups = schedule.open
        self.step += 1
        self.position, self.consumed = schedule.position, schedule.consumed
        self.running.observe(batch)
        await groups.learned(self.step)
        metrics: dict[str, Any] = {"step": self.step} | self._rollout_metrics(rooms, batch)
        metrics |= {
            "rollout/dropped_groups": len(groups.dropped),
            "rollout/too_stale": len(groups.too_stale),
            "rollout/open_groups": open_groups,
        }
        metrics |= {f"learner/{name}": value for name, value in learned.items()}
        for complaint in ("skipped", "critic_skipped", "mismatch_warning", "minibatches_warning", "checkpoint_warning"):
            if learned.get(complaint):
                self.live.phase(f"step {self.step}: {learned[complaint]}")
        metrics |= await self._curve(heldout, beside)
        for complaint in rooms.broker.complaints():
            self.live.phase(f"step {self.step}: {complaint}")
        # before the next step's episodes count in it
        state = self._state(heldout)
        groups.done()
        await self._write_groups(taken, groups)
        metrics |= await self.meters.take_step(rooms.engine.load) | rooms.broker.take_step()
        self._write_metrics(metrics)
        self.state = state

    async def _write_groups(self, taken: _Taken, groups: Groups) -> None:
        """What was played and learned from, and what became of each group."""
        played = [t for group in taken.batch for t in (*group.trajectories, *group.failures)]
        per_turn = [
            turns
            for group, per_trajectory in zip(taken.batch, taken.advantages, strict=True)
            for turns in (*(turns.tolist() for turns in per_trajectory), *([[]] * len(group.failures)))
        ]
        await self.run_dir.trajectories(step_name(self.step), played, per_turn)
        if keep := self.config.rollout.keep_trajectories:
            await self.run_dir.drop_trajectories(self.step - keep)
        outcomes = ("learned", taken.batch), ("dropped", groups.dropped), ("too_stale", groups.too_stale)
        self.run_dir.groups([GroupRow.of(group, self.step, outcome) for outcome, those in outcomes for group in those])

    def _write_metrics(self, metrics: dict[str, Any]) -> None:
        """To the run's folder and all who show them, with what is figured per second of training."""
        training_s = metrics["time/step_s"] * (1 - metrics["share/evaluate"])
        metrics |= {
            "time/since_start_s": time.monotonic() - self.started,
            "rollout/episodes_per_s": metrics["rollout/episodes"] / training_s,
            "rollout/tokens_per_s": metrics["rollout/tokens"] / training_s,
        }
        self.run_dir.metrics(metrics)
        self.meters.put(metrics)
        self.live.step(metrics)

    async def _curve(self, heldout: HeldOut, beside: asyncio.TaskGroup) -> dict[str, float]:
        """Evaluate after a step where one is due; metrics of what was evaluated since the last step."""
        every = self.config.eval.every
        due = every and self.step % every == 0 and self.step < self.config.num_steps
        if self.config.rollout.mode != "on_policy":
            metrics = heldout.finished()
            if due:
                heldout.begin(self.step, beside)
            return metrics
        if not due:
            return {}
        with self.meters.observer.span("evaluate"):
            return await heldout.curve(self.step)

    async def _save_checkpoint(self, rooms: Rooms) -> None:
        with self.meters.observer.span("checkpoint"):
            await rooms.learner.save_checkpoint(self.run_dir.checkpoint_path(self.step), self.state)
        self.saved_step = self.step

    async def _keep(self, rooms: Rooms) -> None:
        """Write what was learned so far: a model to use, and a checkpoint to go on from if every step was a whole one."""
        if not self.step:
            return
        # a first step that was not a whole one leaves no state at all
        if self.config.checkpoint.every and self.saved_step < self.step == self.state.get("step"):
            await self._save_checkpoint(rooms)
        with self.meters.observer.span("checkpoint"):
            await rooms.learner.save(self.run_dir.model_path)

    async def _play(
        self, scorer: Scorer, agent: NBAgent, task: Task, *, index: int, temperature: float, seed: int
    ) -> Trajectory:
        """One episode with its rewards, counted."""
        trajectory = await agent.run_episode(task, index=index, temperature=temperature, seed=seed)
        trajectory, _ = await scorer.scored(trajectory)
        self.episodes += 1
        self.failed_episodes += trajectory.status.failed
        self.tokens_generated += sum(len(turn.response_ids) for turn in trajectory.turns)
        if self.first_episode_s is None and not trajectory.status.failed:
            self.first_episode_s = time.monotonic() - self.started
        return replace(trajectory, started_s=trajectory.started_s - self.started)

    def _rollout_metrics(self, rooms: Rooms, batch: Sequence[Group]) -> dict[str, float]:
        trajectories = [t for group in batch for t in group.trajectories]
        failures = [t for group in batch for t in group.failures]
        n = len(trajectories)
        turns = [turn for t in trajectories for turn in t.turns]
        return {
            "rollout/correct": accuracy(trajectories),
            "rollout/reward": sum(t.reward for t in trajectories) / n,
            "rollout/turns_mean": len(turns) / n,
            "rollout/episodes": n + len(failures),
            "rollout/tokens": sum(len(turn.response_ids) for turn in turns),
            "rollout/failed": len(failures),
            "rollout/equal_groups": sum(group.all_equal for group in batch),
            "rollout/carried_groups": sum(group.policy_version < self.step - 1 for group in batch),
            **staleness(turns, self.step - 1),
            **{f"outcome/{name}": share for name, share in rooms.curriculum.outcomes(trajectories).items()},
        }

    def summary(self) -> dict[str, Any]:
        """What a run comes down to; after an interruption, as far as it got."""
        return {
            **self.results,
            "wall_s": time.monotonic() - self.started,
            "first_episode_s": self.first_episode_s,
            "peak_pss_mb": self.meters.memory.peak_mb,
            "steps": self.step,
            "episodes": self.episodes,
            "failed_episodes": self.failed_episodes,
            "tokens_generated": self.tokens_generated,
            "loop_lag_p99_ms": self.meters.lag.take_run()["loop/lag_p99_ms"],
            "seed": self.config.seed,
            "version": __version__,
        }


def staleness(turns: Sequence[Turn], version: int) -> dict[str, float]:
    """How old the tokens of a step are that starts from the weights `version`: mean over tokens, and maximum [policy versions]."""
    spans = [(version - sampled_by, end - start) for turn in turns for sampled_by, start, end in turn.spans]
    tokens = sum(length for _, length in spans)
    return {
        "rollout/staleness_mean": sum(age * length for age, length in spans) / max(tokens, 1),
        "rollout/staleness_max": max((age for age, _ in spans), default=0),
    }
