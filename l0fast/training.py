"""One training run, from settings to summary: this file wires the rooms, what they do is theirs.

    world -> questions -> rollouts: NBAgent x engine x sandbox -> groups -> learner -> weights -> engine -> next questions
             held-out questions: before, every few steps, after; everything is written to the run's folder

Who waits for whom: the loop in `_train` for a step's worth of groups, then for the learner, then for the engine to take
the new weights; only then are the next questions admitted, so every token is sampled from the policy it trains. With
`learner.stream` the learner gets each group when it is done, and only the optimizer step waits for the last one.
Leaving a block ends what it started: processes, sessions, files.

A run can go on after anything, kill -9 of all its processes included. What a step leaves is the learner's state, in its
own form, and a few numbers of this file's (`Training.state`, driver.json); both are one folder, the checkpoint. Questions
are drawn again from the first one and passed over up to `Groups.position`, seeds depend on group numbers, and groups make
a step in the order of their numbers: with an engine that says the same to the same prompt and seed, the run that goes on
is, bit for bit, the one that was not killed. Not so with `learner.stream`: gradients are added up in the order in which
groups finish, which is equal up to rounding.
"""

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from l0fast import __version__
from l0fast.agent.chat import Chat
from l0fast.agent.nb_agent import EpisodeLimits, NBAgent
from l0fast.cli import Invocation
from l0fast.config import RunConfig
from l0fast.engine.base import Engine
from l0fast.engine.simulated import SimulatedEngine
from l0fast.engine.transformers import check_model_folder, transformers_engine
from l0fast.errors import LearnerError, UsageError
from l0fast.ipc import SharedWeights, shared_weights
from l0fast.learner.advantage import RunningMean, Values, streams
from l0fast.learner.client import Advantages, LearnerClient, batch_advantages, learner
from l0fast.metrics import LoopLag, ProcessTreeMemory, StepClock
from l0fast.report.live import Live
from l0fast.report.plots import PlotError, draw_in_subprocess
from l0fast.rollout.rollouts import Groups, play_all, rollouts
from l0fast.rollout.sampling import DynamicSampling
from l0fast.run_dir import RunDir, read_driver_state, resume_hint, step_name
from l0fast.sandbox import open_sandbox
from l0fast.sandbox.base import Sandbox, ToolSpec
from l0fast.seeding import derive_seed
from l0fast.tasks import load_variants, load_world
from l0fast.tasks.invented import invented_world
from l0fast.tasks.outcomes import outcome_shares
from l0fast.tasks.rewards import exact_match, turn_rewards
from l0fast.tasks.world import World, world_of
from l0fast.tools.broker import Broker, ToolPolicy, open_broker
from l0fast.tools.local_search import LocalSearch, search_tool
from l0fast.types import Group, Task, Trajectory
from l0fast.warm_start.demonstrations import Demonstrator

MODELS = Path(__file__).parent / "models"
"""Policies that ship, a folder each."""

T = TypeVar("T")


async def run(invocation: Invocation) -> int:
    """Run to the end, or to Ctrl-C or SIGTERM; the summary is written either way. Returns the exit code.

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
        begins = f"recipe {invocation.recipe}"
        if invocation.resume:
            training.go_on(invocation.resume)
            begins = "; ".join((f"going on after step {training.step}", *invocation.changes))
        live.phase(f"l0fast {__version__}, {begins}, writing {invocation.run_dir}")
        try:
            interrupted = await _until_interrupted(training.run(), live)
        except BaseException as e:
            if not run_dir.vanishes_with(e):
                e.add_note(resume_hint(run_dir.path))
                run_dir.log(resume_hint(run_dir.path))
            raise
        summary = training.summary() | {"finished": not interrupted}
        run_dir.summary(summary)
        if interrupted:
            live.phase(f"interrupted after {training.step} steps; what was done is kept")
            live.phase(resume_hint(run_dir.path))
        else:
            try:
                await draw_in_subprocess(run_dir.path)
            except PlotError as e:
                # everything they show is written; they can be drawn again
                live.phase(f"no pictures: {e}")
        live.close(summary)
    return 130 if interrupted else 0


def _open_run_dir(invocation: Invocation) -> RunDir:
    if invocation.resume is None:
        return RunDir.create(invocation.run_dir, invocation.config)
    step = read_driver_state(invocation.resume)["step"]
    return RunDir.resume(invocation.run_dir, invocation.config, step)


def check(config: RunConfig) -> None:
    """All that can be found wrong before anything starts. Raises UsageError."""
    folder = model_folder(config.model.path)
    Chat(folder).continuation("", closed=True)
    check_model_folder(folder, config.agent.context_tokens)
    try:
        load_world(config.task).heldout_tasks(config.eval.questions, two_hop_share=config.task.two_hop_share)
    except ValueError as e:
        raise UsageError(f"eval.questions = {config.eval.questions}: {e}") from e
    if config.learner.stream == "on" and not streams(config.learner):
        raise UsageError(
            f"learner.stream = 'on', but learner.advantage = {config.learner.advantage!r} looks at the whole batch as it is "
            "set up: leave it at auto, or take another one, for example --learner.advantage group"
        )


def model_folder(path: str) -> Path:
    """A folder, or the name of a policy that ships. Raises UsageError."""
    folder = MODELS / path if (MODELS / path).is_dir() else Path(path)
    if not folder.is_dir():
        ships = ", ".join(sorted(p.name for p in MODELS.iterdir()))
        raise UsageError(
            f"model.path = {path!r} is neither a folder nor a policy that ships ({ships}): give one of them"
        )
    return folder


async def _until_interrupted(work: Coroutine[Any, Any, None], live: Live) -> bool:
    """Await `work`. The first SIGINT or SIGTERM cancels it, which is then True; a second one kills as usual."""
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    interrupted = False

    def release() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        release()
        live.phase("ending, as soon as the learner is between two steps; once more ends it at once")
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    try:
        await task
    except asyncio.CancelledError:
        if not interrupted:
            raise
    finally:
        release()
    return interrupted


async def _to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Await `work`. When this is cancelled meanwhile, it is so only after `work` has ended."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class Rooms:
    """What a run works with."""

    world: World
    variants: list[World]
    agents: dict[str, NBAgent]
    """For training: by the name of a world, the agent that searches its training corpus."""
    evaluator: NBAgent
    """The agent that searches all of `world`."""
    transfer: dict[str, tuple[NBAgent, list[Task]]]
    """What nothing was trained for: chains of look-ups left out, and another world."""
    broker: Broker
    engine: Engine
    learner: LearnerClient


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
    lag: LoopLag = field(default_factory=LoopLag)
    memory: ProcessTreeMemory = field(default_factory=ProcessTreeMemory)
    clock: StepClock = field(default_factory=StepClock)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tg:
            meters = [tg.create_task(self.lag.run(), name="loop lag"), tg.create_task(self.memory.run(), name="memory")]
            async with self._rooms() as rooms:
                await self._train(rooms)
            for meter in meters:
                meter.cancel()

    def go_on(self, checkpoint: Path) -> None:
        """Be where a checkpoint says, its time included. The learner follows when it has started."""
        state = read_driver_state(checkpoint)
        self.checkpoint, self.state = checkpoint, state
        self.step = self.saved_step = state["step"]
        self.position = state["position"]
        self.episodes, self.failed_episodes = state["episodes"], state["failed_episodes"]
        self.tokens_generated, self.first_episode_s = state["tokens_generated"], state["first_episode_s"]
        self.results = state["results"]
        self.running = RunningMean.from_state(state["running_mean"])
        self.memory.peak_mb = state["peak_pss_mb"]
        self.started -= state["wall_s"]

    def _state(self) -> dict[str, Any]:
        return {
            "version": __version__,
            "config": self.config.model_dump(mode="json"),
            "model_path": str(model_folder(self.config.model.path).absolute()),
            "step": self.step,
            "position": self.position,
            "episodes": self.episodes,
            "failed_episodes": self.failed_episodes,
            "tokens_generated": self.tokens_generated,
            "first_episode_s": self.first_episode_s,
            "results": dict(self.results),
            "running_mean": self.running.state(),
            "peak_pss_mb": self.memory.peak_mb,
            "wall_s": time.monotonic() - self.started,
        }

    async def _train(self, rooms: Rooms) -> None:
        config, rollout = self.config, self.config.rollout
        if self.checkpoint:
            await rooms.learner.load_checkpoint(self.checkpoint)
            await rooms.engine.update_weights(self.step)
        else:
            await self._evaluate(rooms, "before", config.eval.questions, greedy=True)
            await self._evaluate_transfer(rooms, "before")
        questions = self._questions(rooms)
        # thousands of them take a second
        await asyncio.to_thread(lambda: next(islice(questions, self.position, self.position), None))

        async def play(task: Task, number: int, index: int, attempt: int) -> Trajectory:
            seed = derive_seed(config.seed, "episode", number, index, attempt)
            agent = rooms.agents[world_of(task.id)]
            return await self._play(agent, task, index=index, temperature=rollout.temperature, seed=seed)

        try:
            async with rollouts(
                play,
                questions,
                group_size=rollout.group_size,
                max_open_groups=rollout.max_open_groups,
                max_refills=rollout.max_refills,
                sampling=DynamicSampling(
                    drop_rate=rollout.drop_rate,
                    max_drops=rollout.max_drop_rounds * rollout.groups_per_step,
                    seed=config.seed,
                ),
                position=self.position,
            ) as groups:
                self.clock.take_step()
                while self.step < config.num_steps:
                    await self._step(rooms, groups)
        except BaseException as e:
            # Ctrl-C, or something that broke: what was learned is kept, if there is a learner to ask
            if not _holds(e, LearnerError):
                await self._keep(rooms)
            raise
        await self._keep(rooms)
        await self._evaluate(rooms, "after", config.eval.questions, greedy=True)
        await self._evaluate_transfer(rooms, "after")

    async def _step(self, rooms: Rooms, groups: Groups) -> None:
        """One optimizer step, and what is told of it."""
        if self._streams(rooms.learner):
            batch, advantages = await self._stream(rooms, groups)
            learn = rooms.learner.finish_step(self.step + 1)
        else:
            batch = await groups.take(self.config.rollout.groups_per_step)
            values = await self._values(rooms.learner, batch)
            advantages = await asyncio.to_thread(
                batch_advantages, batch, self.config, self.step + 1, running=self.running, values=values
            )
            learn = rooms.learner.step(batch, advantages, self.step + 1, values=values)
        # half of it would leave the learner ahead of what is written
        await _to_its_end(self._learn(rooms, learn, batch, advantages, groups))
        groups.done(len(batch))
        every = self.config.checkpoint.every
        if every and self.step % every == 0:
            await self._save_checkpoint(rooms)

    def _streams(self, learner: LearnerClient) -> bool:
        wanted = self.config.learner.stream
        return streams(self.config.learner) and (wanted == "on" or (wanted == "auto" and learner.device == "cuda"))

    async def _stream(self, rooms: Rooms, groups: Groups) -> tuple[list[Group], Advantages]:
        """Train on groups as they finish; returns the step's, in their order, when the learner has had all of them."""
        done: list[tuple[Group, list[np.ndarray]]] = []
        async with aclosing(groups.stream(self.config.rollout.groups_per_step)) as batches:
            async for batch in batches:
                values = await self._values(rooms.learner, batch)
                advantages = batch_advantages(batch, self.config, self.step + 1, running=self.running, values=values)
                with self.clock.part("learn"):
                    await rooms.learner.accumulate(batch, advantages, values=values)
                done += zip(batch, advantages, strict=True)
        done.sort(key=lambda pair: pair[0].number)
        return [group for group, _ in done], [advantages for _, advantages in done]

    async def _values(self, learner: LearnerClient, batch: Sequence[Group]) -> Values | None:
        """What the critic expects of their turns, where there is a critic."""
        if self.config.learner.critic == "none":
            return None
        with self.clock.part("learn"):
            return await learner.values(batch)

    async def _learn(
        self,
        rooms: Rooms,
        learn: Coroutine[Any, Any, dict[str, Any]],
        batch: Sequence[Group],
        advantages: Advantages,
        groups: Groups,
    ) -> None:
        """From a step's groups to what is written of it."""
        config = self.config
        with self.clock.part("learn"):
            learned = await learn
        self.step += 1
        self.position = groups.position
        self.running.observe(batch)
        with self.clock.part("sync"):
            await rooms.engine.update_weights(self.step)
        metrics = {"step": self.step} | self._rollout_metrics(rooms, batch, groups.dropped)
        metrics |= {f"learner/{name}": value for name, value in learned.items()}
        for complaint in ("skipped", "mismatch_warning"):
            if learned.get(complaint):
                self.live.phase(f"step {self.step}: {learned[complaint]}")
        evaluation = config.eval
        if evaluation.every and self.step % evaluation.every == 0 and self.step < config.num_steps:
            with self.clock.part("evaluate"):
                metrics |= await self._evaluate(rooms, f"step {self.step}", evaluation.curve_questions, greedy=False)
        played = [t for group in batch for t in (*group.trajectories, *group.failures)]
        per_turn = [
            turns
            for group, per_trajectory in zip(batch, advantages, strict=True)
            for turns in (*(turns.tolist() for turns in per_trajectory), *([[]] * len(group.failures)))
        ]
        await self.run_dir.trajectories(step_name(self.step), played, per_turn)
        metrics |= self.clock.take_step() | self.lag.take_step() | rooms.broker.take_step()
        metrics |= {"time/since_start_s": time.monotonic() - self.started}
        training_s = metrics["time/step_s"] - metrics["time/evaluate_s"]
        metrics |= {
            "rollout/episodes_per_s": metrics["rollout/episodes"] / training_s,
            "rollout/tokens_per_s": metrics["rollout/tokens"] / training_s,
        }
        self.run_dir.metrics(metrics)
        self.live.step(metrics)
        self.state = self._state()

    async def _save_checkpoint(self, rooms: Rooms) -> None:
        await rooms.learner.save_checkpoint(self.run_dir.checkpoint_path(self.step), self.state)
        self.saved_step = self.step

    async def _keep(self, rooms: Rooms) -> None:
        """Write what was learned so far: a model to use, and a checkpoint to go on from if every step was a whole one."""
        if not self.step:
            return
        if self.config.checkpoint.every and self.saved_step < self.step == self.state["step"]:
            await self._save_checkpoint(rooms)
        await rooms.learner.save(self.run_dir.model_path)

    async def _play(self, agent: NBAgent, task: Task, *, index: int, temperature: float, seed: int) -> Trajectory:
        """One episode with its rewards, counted."""
        trajectory = await agent.run_episode(task, index=index, temperature=temperature, seed=seed)
        self.episodes += 1
        self.failed_episodes += trajectory.status.failed
        self.tokens_generated += sum(len(turn.response_ids) for turn in trajectory.turns)
        if self.first_episode_s is None and not trajectory.status.failed:
            self.first_episode_s = time.monotonic() - self.started
        return replace(
            trajectory,
            rewards=turn_rewards(trajectory),
            exact_match=not trajectory.status.failed and exact_match(trajectory.answer, task.answers),
            started_s=trajectory.started_s - self.started,
        )

    def _questions(self, rooms: Rooms) -> Iterator[Task]:
        """Endless. A task may come up again: groups are told apart by number, trajectories by their seeds."""
        config = self.config.task
        rng = random.Random(derive_seed(self.config.seed, "questions"))
        while True:
            in_variant = rooms.variants and rng.random() < config.variant_share
            world = rng.choice(rooms.variants) if in_variant else rooms.world
            yield world.train_task(rng, two_hop_share=config.two_hop_share)

    async def _evaluate(self, rooms: Rooms, name: str, num_questions: int, *, greedy: bool) -> dict[str, float]:
        """Ask held-out questions, sampled at T = 1 and, where wanted, greedily."""
        tasks = rooms.world.heldout_tasks(num_questions, two_hop_share=self.config.task.two_hop_share)
        played = await self._ask(rooms.evaluator, tasks, temperature=1.0)
        metrics = {"eval/sampled": _accuracy(played)}
        await self.run_dir.trajectories(f"eval_{name.replace(' ', '_')}", played)
        if greedy:
            greedily = await self._ask(rooms.evaluator, tasks, temperature=0.0)
            metrics["eval/greedy"] = _accuracy(greedily)
            await self.run_dir.trajectories(f"eval_{name.replace(' ', '_')}_greedy", greedily)
            self.results |= {
                f"eval_accuracy_{name}": metrics["eval/sampled"],
                f"eval_greedy_{name}": metrics["eval/greedy"],
                f"eval_outcomes_{name}": _outcomes([rooms.world], played),
            }
        self.live.evaluation(name, metrics)
        return metrics

    async def _evaluate_transfer(self, rooms: Rooms, when: str) -> None:
        for name, (agent, tasks) in rooms.transfer.items():
            played = await self._ask(agent, tasks, temperature=0.0)
            self.results[f"transfer_{name}_greedy_{when}"] = _accuracy(played)
            await self.run_dir.trajectories(f"transfer_{name}_{when}", played)

    async def _ask(self, agent: NBAgent, tasks: Sequence[Task], *, temperature: float) -> list[Trajectory]:
        async def play(task: Task) -> Trajectory:
            seed = derive_seed(self.config.seed, "evaluation", task.id)
            return await self._play(agent, task, index=0, temperature=temperature, seed=seed)

        return await play_all(play, tasks, max_open=self.config.engine.slots)

    def _rollout_metrics(self, rooms: Rooms, batch: Sequence[Group], dropped: Sequence[Group]) -> dict[str, float]:
        trajectories = [t for group in batch for t in group.trajectories]
        failures = [t for group in batch for t in group.failures]
        n = len(trajectories)
        turns = [turn for t in trajectories for turn in t.turns]
        return {
            "rollout/exact_match": _accuracy(trajectories),
            "rollout/reward": sum(t.reward for t in trajectories) / n,
            "rollout/turns_mean": len(turns) / n,
            "rollout/episodes": n + len(failures),
            "rollout/tokens": sum(len(turn.response_ids) for turn in turns),
            "rollout/failed": len(failures),
            "rollout/equal_groups": sum(group.all_equal for group in batch),
            "rollout/dropped_groups": len(dropped),
        } | {
            f"outcome/{name}": share for name, share in _outcomes([rooms.world, *rooms.variants], trajectories).items()
        }

    def summary(self) -> dict[str, Any]:
        """What a run comes down to; after an interruption, as far as it got."""
        return {
            **self.results,
            "eval_questions": self.config.eval.questions,
            "wall_s": time.monotonic() - self.started,
            "first_episode_s": self.first_episode_s,
            "peak_pss_mb": self.memory.peak_mb,
            "steps": self.step,
            "episodes": self.episodes,
            "failed_episodes": self.failed_episodes,
            "tokens_generated": self.tokens_generated,
            "loop_lag_p99_ms": self.lag.take_run()["loop/lag_p99_ms"],
            "seed": self.config.seed,
            "version": __version__,
        }

    @asynccontextmanager
    async def _rooms(self) -> AsyncIterator[Rooms]:
        """Everything a run works with, started; ended in reverse order."""
        config, log_dir = self.config, self.run_dir.path
        folder = model_folder(config.model.path)
        world = load_world(config.task)
        # invented names for a policy of the real world, and other invented ones for a policy of invented ones
        other = invented_world(config.task.world_seed + 1000 * (config.task.kind == "invented"))
        variants = load_variants(config.task)
        chat = Chat(folder)
        open_episodes = max(config.rollout.max_open_groups * config.rollout.group_size, config.engine.slots)
        cache_file = Path(config.tools.cache_file) if config.tools.cache_file else None
        async with (
            open_sandbox(config.sandbox, max_sessions=open_episodes, log=self.live.phase) as sandbox,
            open_broker(cache_file, config.tools.cache_mode) as broker,
        ):
            with shared_weights(folder) as weights:
                self.live.phase("starting engine and learner")
                async with (
                    self._engine(folder, chat, [world, *variants, other], weights) as engine,
                    learner(_watched(config), folder, weights=weights, log_dir=log_dir) as learner_client,
                ):

                    def agent(scope: str, corpus: Sequence[str]) -> NBAgent:
                        search = search_tool(LocalSearch(corpus), config.task.search_results)
                        tools = (broker.wrap(search, self._tool_policy(), scope=scope),)
                        return self._agent(chat, engine, sandbox, tools)

                    evaluator = agent(f"{world.name}, all", world.full_corpus)
                    n, two_hop_share = config.eval.transfer_questions, config.task.two_hop_share
                    yield Rooms(
                        world=world,
                        variants=variants,
                        agents={w.name: agent(w.name, w.train_corpus) for w in (world, *variants)},
                        evaluator=evaluator,
                        transfer={
                            "untrained_chains": (evaluator, world.untrained_chain_tasks(n)),
                            "other_world": (
                                agent(f"{other.name}, all", other.full_corpus),
                                other.heldout_tasks(n, two_hop_share=two_hop_share),
                            ),
                        },
                        broker=broker,
                        engine=engine,
                        learner=learner_client,
                    )

    @asynccontextmanager
    async def _engine(
        self, folder: Path, chat: Chat, worlds: Sequence[World], weights: SharedWeights
    ) -> AsyncIterator[Engine]:
        config = self.config
        max_tokens = config.agent.context_tokens
        if config.engine.kind == "simulated":
            # plays demonstrations: the whole run but for the model, the same to the last id for the same seed
            script = Demonstrator(chat, worlds, good_rate=0.5, seed=config.seed)
            yield SimulatedEngine(
                vocab_size=chat.vocab_size,
                max_tokens=max_tokens,
                slots=config.engine.slots,
                seed=config.seed,
                script=script,
            )
        else:
            async with transformers_engine(
                config.engine, folder, max_tokens=max_tokens, weights=weights, log_dir=self.run_dir.path
            ) as engine:
                yield engine

    def _tool_policy(self) -> ToolPolicy:
        tools, task = self.config.tools, self.config.task
        return ToolPolicy(
            timeout_s=tools.timeout_s,
            attempts=tools.attempts,
            max_concurrent=tools.max_concurrent,
            # a local search answers otherwise when it is asked for more, or of another package's table
            version=f"{__version__}, {task.search_results} sentences",
        )

    def _agent(self, chat: Chat, engine: Engine, sandbox: Sandbox, tools: tuple[ToolSpec, ...]) -> NBAgent:
        config = self.config
        return NBAgent(
            chat=chat,
            engine=engine,
            sandbox=sandbox,
            tools=tools,
            config=config.agent,
            limits=EpisodeLimits(max_turns=config.rollout.max_turns, timeout_s=config.rollout.episode_timeout_s),
            part=self.clock.part,
        )


def _watched(config: RunConfig) -> RunConfig:
    """What the learner is run with: a simulated engine makes its log-probs up, and there is no mismatch to watch."""
    if config.engine.kind != "simulated":
        return config
    learner = config.learner.model_copy(update={"mismatch_warn": 0.0, "mismatch_stop": 0.0})
    return config.model_copy(update={"learner": learner})


def _holds(error: BaseException, kind: type[BaseException]) -> bool:
    """Whether an error, or one in a group of them, is of a kind."""
    return isinstance(error, kind) or (isinstance(error, BaseExceptionGroup) and error.subgroup(kind) is not None)


def _accuracy(trajectories: Sequence[Trajectory]) -> float:
    """Share of right answers among the trajectories that were not lost."""
    counted = [t.exact_match for t in trajectories if not t.status.failed]
    return sum(counted) / len(counted) if counted else 0.0


def _outcomes(worlds: Sequence[World], trajectories: Sequence[Trajectory]) -> dict[str, float]:
    by_name = {world.name: world for world in worlds}
    plans = {t.task.id: by_name[world_of(t.task.id)].plan(t.task) for t in trajectories}
    return outcome_shares(trajectories, plans)
