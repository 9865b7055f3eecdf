"""Thousands of agents on one loop, and a learner that only takes time: one mode of a run, measured.

    Workload -> SimulatedEngine -> NBAgent x agents -> sandbox, broker -> rewards -> Groups -> LearnerClient -> ranks that sleep

All of it is what a run is made of, except the engine (arithmetic on a clock), the policy (a script) and the ranks. So the
driver does all that a driver does, between two steps too: advantages, packing a batch into shared memory, writing its
trajectories. The clock is the loop's own times `time_compression`: what delays the loop delays the engine as many times.

    mode        groups played for a step                  the learner
    carry_over  at any time, up to OPEN_STEPS steps open  works on groups as they finish, beside the engine
    on_policy   for this step only                        the same; nothing is played while it takes the last groups
    barrier     for this step only                        begins when the last episode has ended: verl's and L0's way
"""

import asyncio
import math
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from bench.probes import rss_mb
from bench.workload import AGENT, GROUP_SIZE, MAX_TURNS, Workload
from l0fast.agent.chat import Chat
from l0fast.agent.nb_agent import EpisodeLimits, NBAgent
from l0fast.agent.prompts import output_message
from l0fast.config import LearnerConfig, RewardConfig, RolloutConfig, RunConfig
from l0fast.engine.base import Sampled, Sampling
from l0fast.engine.clock import Clock, CompressedClock
from l0fast.engine.simulated import SimulatedEngine, Speed
from l0fast.garbage import let_go, old_objects_aside
from l0fast.ids import Ids
from l0fast.ipc import shared_bytes
from l0fast.learner.client import LearnerClient, batch_advantages
from l0fast.meters import Meters
from l0fast.observer import Observer
from l0fast.rollout.modes import Schedule
from l0fast.rollout.rollouts import Groups, rollouts
from l0fast.rollout.sampling import DynamicSampling
from l0fast.run_dir import RunDir, step_name
from l0fast.sandbox.base import CellResult, Sandbox, Session, ToolSpec
from l0fast.seeding import derive_seed
from l0fast.tasks.rewards import exact_match, has_answer, turn_rewards
from l0fast.tools.broker import Broker, ToolPolicy
from l0fast.types import Group, Task, Trajectory

Mode = Literal["carry_over", "on_policy", "barrier"]

REPLICA_SLOTS = 64
"""Slots of one simulated engine; there are agents / 128 of them, so slots = agents / 2."""
SPEED = Speed(prefill_tokens_per_s=40_000.0, step_s=0.02)
"""50 tokens/s for each of its requests."""
LEARNER_SHARE = 0.3
"""The learner's time for a batch, of what full slots would need to sample it."""
OPEN_STEPS = 3
"""carry_over: steps' worth of groups that may be open."""
STALENESS = 3
"""carry_over: policy versions that a token may be behind."""
DEADLINE_S = 3600.0
"""Of an episode: nothing is to be lost to a machine that is busy otherwise [s]."""


class _CountingEngine(SimulatedEngine):
    turns = 0
    """Responses given."""

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, *, conversation: str) -> Sampled:
        sampled = await super().generate(prompt_ids, sampling, conversation=conversation)
        self.turns += 1
        return sampled


class SimulatedRank:
    """A learner's rank to `LearnerClient`: answers when the time for it has passed."""

    name, pid, dead, held = "simulated rank", os.getpid(), False, ""

    def __init__(self, clock: Clock):
        self.ready = {"parameters": 0, "device": "cuda"}
        self._clock = clock
        self.owed_s = 0.0
        """What the next `accumulate` will take [s]."""

    async def call(self, op: str, **fields: Any) -> tuple[dict[str, Any], bytes]:
        if op == "accumulate":
            work_s, self.owed_s = self.owed_s, 0.0
            await self._clock.sleep(work_s)
        return {"metrics": {}}, b""

    def kill(self) -> None: ...


class NoSandbox:
    """Sessions that run nothing: what `Workload` would have its cells do is done here. To see what the rest costs."""

    kind = "none"

    def session(
        self, tools: Mapping[str, ToolSpec], *, seed: int, files: Mapping[str, str] = MappingProxyType({})
    ) -> "_NoSession":
        return _NoSession(tools)


class _NoSession:
    def __init__(self, tools: Mapping[str, ToolSpec]):
        self._tools = tools

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, *error: object) -> None: ...

    async def execute(self, code: str, *, timeout_s: float | None = None) -> CellResult:
        if code.startswith("verdict"):
            await self._tools["submit_final_answer"].call(code.split("'")[1])
            return CellResult(output="", error=None, wall_s=0.0)
        page = await self._tools["look_up"].call(int(code.partition("(")[2].partition(")")[0]))
        return CellResult(output=f"{page.count(chr(10)) + 1} sentences\n{page}\n", error=None, wall_s=0.0)

    async def collect(self, *, max_files: int = 64, max_bytes: int = 4 << 20) -> dict[str, bytes]:
        return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One mode at one size. Seconds are the loop's unless they are said to be simulated."""

    mode: str
    agents: int
    time_compression: float
    steps: int
    peak_alive: int
    """Episodes under way at once."""
    lost: int
    """Episodes that failed, and those that were played and neither learned from nor open at the end."""
    episodes_per_s: float
    """Learned from, after the first step."""
    turns_per_s: float
    """Answered by the engine, over all of it."""
    host_cpu_us_per_turn: float
    """CPU of this process, threads included, over responses."""
    engine_busy: float
    """Slots in use over slots there are; carry_over: after the first step."""
    lag: dict[str, float]
    blocked_by: str
    """What held the loop for 50 ms, in most steps; empty where nothing did."""
    shares_sum: tuple[float, float]
    """Of the shares of a step's wall clock: the least and the largest of all steps."""
    rss_mb: float
    wall_s: float


class Swarm:
    """What all modes of one size share."""

    def __init__(
        self,
        agents: int,
        sandbox: Sandbox,
        broker: Broker,
        *,
        chat: Chat,
        time_compression: float,
        marshal: bool = True,
    ):
        """
        Args:
            marshal: whether the learner's packs and the trajectories' file are made.
        """
        self.agents, self.time_compression, self._marshal = agents, time_compression, marshal
        self._sandbox, self._broker, self._chat = sandbox, broker, chat
        self._slots = min(REPLICA_SLOTS, agents // 2)
        self._num_replicas = agents // 2 // self._slots
        groups = agents // GROUP_SIZE
        self.config = RunConfig(
            agent=AGENT,
            rollout=RolloutConfig(
                group_size=GROUP_SIZE,
                groups_per_step=groups,
                max_open_groups=OPEN_STEPS * groups,
                max_turns=MAX_TURNS,
            ),
            # looks at one group at a time, so groups can be trained on as they finish
            learner=LearnerConfig(advantage="group", pack_tokens=32_768, mismatch_warn=0.0, mismatch_stop=0.0),
        )

    async def play(self, mode: Mode, *, steps: int | None = None, seconds: float = math.inf) -> Measured:
        """Play until so many optimizer steps have been taken, or the step after so long [s of the loop]."""
        clock, workload, engine = self._simulator()
        policy = ToolPolicy(timeout_s=120.0, max_concurrent=self.agents, cache=False)
        agent = NBAgent(
            chat=self._chat,
            engine=engine,
            sandbox=self._sandbox,
            tools=(self._broker.wrap(workload.tool, policy, scope=f"{self.agents} {mode} {id(workload)}"),),
            config=AGENT,
            limits=EpisodeLimits(max_turns=MAX_TURNS, timeout_s=DEADLINE_S, turn_timeout_s=DEADLINE_S),
        )
        room, counts = asyncio.Semaphore(self.agents), _Counts()

        async def play(task: Task, number: int, index: int, attempt: int) -> Trajectory:
            # groups may be open in larger numbers than agents are alive
            async with room:
                with counts.alive():
                    seed = derive_seed(0, "episode", number, index, attempt)
                    return counts.ended(_scored(await agent.run_episode(task, index=index, temperature=1.0, seed=seed)))

        rank = SimulatedRank(clock)
        schedule = Schedule(
            "carry_over" if mode == "carry_over" else "on_policy",
            groups_per_step=self.config.rollout.groups_per_step,
            max_open_groups=self.config.rollout.max_open_groups,
            max_staleness=STALENESS,
        )
        shares: list[float] = []
        blamed: Counter[str] = Counter()
        async with self._run_dir() as (run_dir, meters):
            agent = replace(agent, observer=meters.observer)
            began, cpu_s = time.perf_counter(), time.process_time()
            with shared_bytes("packs") as packs, old_objects_aside() as old_objects:
                async with rollouts(
                    play,
                    workload.tasks(),
                    schedule=schedule,
                    sync=engine.update_weights,
                    group_size=GROUP_SIZE,
                    max_refills=0,
                    sampling=DynamicSampling(drop_rate=0.0, max_drops=0, seed=0),
                ) as groups:
                    learner = LearnerClient(self.config, [rank], packs)  # type: ignore[list-item]
                    first, step = _Mark(0.0, 0.0, 0.0), 0
                    while step != steps and time.perf_counter() - began < seconds:
                        step += 1
                        await self._step(mode, groups, learner, rank, run_dir, meters.observer, step)
                        figures = await meters.take_step(engine.load)
                        run_dir.metrics({"step": step} | figures)
                        shares.append(sum(value for name, value in figures.items() if name.startswith("share/")))
                        if "loop/blocked_by" in figures:
                            blamed[figures["loop/blocked_by"]] += 1
                        old_objects.sweep()
                        if step == 1 != steps:
                            first = _Mark(time.perf_counter() - began, engine.slot_s(), clock.now_s)
                    wall_s, cpu_s = time.perf_counter() - began, time.process_time() - cpu_s
                    busy = (engine.slot_s() - first.slot_s) / (self.agents // 2 * (clock.now_s - first.now_s))
                    memory_mb, turns = rss_mb(), engine.turns
                    episodes = (step - (steps != 1)) * self.agents
                    missing = counts.episodes - step * self.agents - GROUP_SIZE * schedule.open
                    lag = meters.lag.take_run()
        return Measured(
            mode=mode,
            agents=self.agents,
            time_compression=self.time_compression,
            steps=step,
            peak_alive=counts.peak,
            # those of open groups that have not ended are not missing
            lost=counts.failed + max(0, missing),
            episodes_per_s=episodes / (wall_s - first.wall_s),
            turns_per_s=turns / wall_s,
            host_cpu_us_per_turn=1e6 * cpu_s / turns,
            engine_busy=busy,
            lag={name.removeprefix("loop/"): value for name, value in lag.items()},
            blocked_by=max(blamed, key=blamed.__getitem__, default=""),
            shares_sum=(min(shares), max(shares)),
            rss_mb=memory_mb,
            wall_s=wall_s,
        )

    def _simulator(self) -> tuple[Clock, Workload, "_CountingEngine"]:
        clock = CompressedClock(self.time_compression)
        workload = Workload(self._chat, clock.sleep)
        engine = _CountingEngine(
            vocab_size=self._chat.vocab_size,
            max_tokens=AGENT.context_tokens + AGENT.max_new_tokens,
            slots=self._slots,
            # as many as full slots take with long contexts
            kv_tokens=self._slots * 8192,
            replicas=self._num_replicas,
            speed=SPEED,
            script=workload,
            clock=clock,
        )
        return clock, workload, engine

    async def simulator_us_per_turn(self, steps: int) -> float:
        """CPU that engine, policy and tool take by themselves for so many steps' episodes [us].

        No run on an engine has it. Joining prompts, which every run does, is in it too: some 10 us.
        """
        _, workload, engine = self._simulator()
        page = Ids(self._chat.continuation(output_message(workload.page(0)), closed=True))
        head = self._chat.encode("word " * 700)
        sampling = Sampling(max_new_tokens=AGENT.max_new_tokens, stop_token_ids=self._chat.stop_token_ids)
        room = asyncio.Semaphore(self.agents)

        async def converse(name: str) -> None:
            async with room:
                prompt = Ids(head)
                for said in workload.plan(name).turns:
                    sampled = await engine.generate(prompt, sampling, conversation=name)
                    await workload.tool.call(said.key)
                    prompt = prompt + sampled.response_ids + page
                engine.forget(name)

        cpu_s = time.process_time()
        async with asyncio.TaskGroup() as tg:
            for n in range(steps * self.agents):
                tg.create_task(converse(f"w{n}"))
        return 1e6 * (time.process_time() - cpu_s) / engine.turns

    async def _step(
        self,
        mode: Mode,
        groups: Groups,
        learner: LearnerClient,
        rank: SimulatedRank,
        run_dir: RunDir,
        observer: Observer,
        step: int,
    ) -> None:
        """As a run takes one, but for what is learned."""
        played: list[tuple[Group, list[np.ndarray]]] = []
        with observer.span("take"):
            if mode == "barrier":
                batch = await groups.take()
            else:
                async with aclosing(groups.stream()) as batches:
                    async for batch in batches:
                        await self._learn(batch, learner, rank, observer, step, played)
                batch = []
        if batch:
            await self._learn(batch, learner, rank, observer, step, played)
            batch.clear()
        if self._marshal:
            with observer.span("learn"):
                await learner.finish_step(step)
        with observer.span("sync"):
            await groups.learned(step)
        groups.done()
        if self._marshal:
            trajectories = [t for group, _ in played for t in group.trajectories]
            advantages = [turns.tolist() for _, per_trajectory in played for turns in per_trajectory]
            path = await run_dir.trajectories(step_name(step), trajectories, advantages)
            await asyncio.to_thread(path.unlink)
            trajectories.clear()
        await let_go(played)

    async def _learn(
        self,
        batch: list[Group],
        learner: LearnerClient,
        rank: SimulatedRank,
        observer: Observer,
        step: int,
        played: list[tuple[Group, list[np.ndarray]]],
    ) -> None:
        tokens = sum(len(turn.response_ids) for group in batch for t in group.trajectories for turn in t.turns)
        rank.owed_s = LEARNER_SHARE * tokens * SPEED.step_s / (self.agents // 2)
        if not self._marshal:
            await rank.call("accumulate")
            return
        advantages = await asyncio.to_thread(batch_advantages, batch, self.config, step)
        with observer.span("learn"):
            await learner.accumulate(batch, advantages)
        played += zip(batch, advantages, strict=True)

    @asynccontextmanager
    async def _run_dir(self) -> AsyncIterator[tuple[RunDir, Meters]]:
        """A run's folder, and all that watches a run."""
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="l0fast-bench-"))
        try:
            with RunDir.create(folder / "run", self.config) as run_dir:
                meters = Meters(self.config, run_dir.path, log=run_dir.log, warn=run_dir.log)
                async with meters.running():
                    yield run_dir, meters
        finally:
            await asyncio.to_thread(shutil.rmtree, folder)


@dataclass(frozen=True, slots=True)
class _Mark:
    wall_s: float
    slot_s: float
    now_s: float
    """Simulated [s]."""


class _Counts:
    def __init__(self) -> None:
        self.now = self.peak = self.episodes = self.failed = 0

    def alive(self) -> "_Counts":
        return self

    def __enter__(self) -> None:
        self.now += 1
        self.peak = max(self.peak, self.now)

    def __exit__(self, *error: object) -> None:
        self.now -= 1

    def ended(self, trajectory: Trajectory) -> Trajectory:
        self.episodes += 1
        self.failed += trajectory.status.failed
        return trajectory


def _scored(trajectory: Trajectory) -> Trajectory:
    right = exact_match(trajectory.answer, trajectory.task.answers)
    scores = {"correct": float(right), "has_answer": float(has_answer(trajectory.answer))}
    return replace(
        trajectory,
        rewards=turn_rewards(trajectory, RewardConfig(), scores, max_new_tokens=AGENT.max_new_tokens),
        correct=right,
    )
