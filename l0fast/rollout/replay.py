"""A recorded run's rooms, simulated: agents that say again what they said, engines and a learner as fast as they were.

    Playlist    which recorded episode is played where
    World       play() one on the engines, sync() weights to them, learn() from groups; all of it on one clock that costs no time

Who makes steps of it, and what they come to, is whatif.py's.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from l0fast.config import RunConfig
from l0fast.engine.base import Engine, Sampling
from l0fast.engine.gate import gated
from l0fast.engine.simulated import SimulatedClock, SimulatedEngine
from l0fast.errors import UsageError
from l0fast.ids import Ids
from l0fast.rollout.admission import Admission
from l0fast.rollout.lengths import Lengths
from l0fast.rollout.recorded import RecordedGroup, Recording, Timing
from l0fast.rollout.sampling import DynamicSampling
from l0fast.run_dir import SavedTrajectory
from l0fast.step_shares import StepShares
from l0fast.types import Group, Task, Trajectory, Turn

_PATIENCE_S = 86_400.0
"""Who would wait too long for room in the cache is to be seen in the step time, not cut off [s]."""


class Playlist:
    """Recorded groups in their order, from a step on and round again: a group of any number."""

    def __init__(self, recording: Recording, first: int = 0):
        self._groups: list[tuple[RecordedGroup, bool]] = []
        """With whether it is dropped: what was dropped is not recorded, and stood for by what was played with it."""
        for step in (*recording.steps[first:], *recording.steps[:first]):
            kept, dropped = len(step.groups), step.dropped_groups
            for i, group in enumerate(step.groups):
                # spread among the others
                self._groups += [(group, True)] * ((i + 1) * dropped // kept - i * dropped // kept)
                self._groups.append((group, False))

    def group(self, number: int) -> RecordedGroup:
        return self._groups[number % len(self._groups)][0]

    def is_dropped(self, number: int) -> bool:
        return self._groups[number % len(self._groups)][1]

    def episode(self, number: int, index: int, attempt: int) -> SavedTrajectory:
        """Played as this attempt at a place of a group, which may have more places than were recorded."""
        group = self.group(number)
        # a place that failed is played again; in which place it was makes no difference
        lost = group.failures[index :: len(group.trajectories)]
        return lost[attempt] if attempt < len(lost) else group.trajectories[index % len(group.trajectories)]

    def tasks(self) -> Iterator[Task]:
        """One a group, without end."""
        while True:
            for group, _ in self._groups:
                yield group.trajectories[0].task

    def turns(self) -> Iterator[Turn]:
        """All there are."""
        for group, _ in self._groups:
            for trajectory in (*group.trajectories, *group.failures):
                yield from trajectory.turns


@dataclass(frozen=True, slots=True)
class AsRecorded(DynamicSampling):
    """Drops the groups that stand for dropped ones; none where dropping was switched off."""

    is_dropped: Callable[[int], bool]

    def keep(self, group: Group, first: int) -> bool:
        return not (self.drop_rate and self.is_dropped(group.number))


class World:
    """Who plays, samples and learns, and the clock they share."""

    def __init__(self, playlist: Playlist, config: RunConfig, timing: Timing, kv_tokens: int | None = None):
        """
        Args:
            kv_tokens: KV entries of each engine; None for as many as its slots can take [tokens].
        """
        self.playlist = playlist
        self._config, self._timing, self._kv_tokens = config, timing, kv_tokens
        self.clock = SimulatedClock()
        self.shares = StepShares(now=lambda: int(self.clock.now_s * 1e9))
        self.lengths = Lengths()
        """Of what was played so far."""
        self._saying: dict[str, Ids] = {}
        """By conversation, what it says next."""
        self._learn_s = 0.0
        """That the learner worked."""
        self._replicas = max(1, config.engine.count)
        turns = list(playlist.turns())
        max_tokens = max((len(t.prompt_ids) + len(t.response_ids) for t in turns), default=1) + 1
        if kv_tokens is not None and kv_tokens < max_tokens:
            raise UsageError(
                f"--kv-tokens {kv_tokens} has no room for the longest turn of the run: give {max_tokens} or more"
            )
        max_id = max((max(ids) for t in turns for ids in (t.prompt_ids, t.response_ids) if ids), default=1)
        self.engine = SimulatedEngine(
            vocab_size=max_id + 1,
            max_tokens=max_tokens,
            slots=config.engine.slots,
            kv_tokens=kv_tokens,
            replicas=self._replicas,
            speed=timing.speed,
            update_s=timing.sync_s,
            script=lambda prompt, sampling, conversation: self._saying[conversation],
            clock=self.clock,
        )
        self._front: Engine = self.engine
        """What agents ask: the engine, or its gate."""

    async def open(self) -> None:
        """Before anybody plays: the gate, where there is one, asks the engine how large its cache is."""
        admission, engine = self._config.rollout.admission, self._config.engine.kind
        by_cache = admission == "kv" or (admission == "auto" and engine == "sglang")
        if by_cache and self._kv_tokens is not None:
            self._front = await gated(self.engine, Admission(), timeout_s=_PATIENCE_S, clock=self.clock)

    async def play(self, task: Task, number: int, index: int, attempt: int) -> Trajectory:
        """One episode, as long as it was; its turns have the versions of the weights that they were sampled with now."""
        recorded = self.playlist.episode(number, index, attempt)
        conversation = f"{number}/{index}/{attempt}"
        episode = self.shares.episode(conversation)
        turns: list[Turn] = []
        try:
            for turn in recorded.turns:
                self._saying[conversation] = turn.response_ids
                sampling = Sampling(max_new_tokens=max(1, len(turn.response_ids)), stop_token_ids=())
                with episode.span("generate"):
                    sampled = await self._front.generate(turn.prompt_ids, sampling, conversation=conversation)
                    await self.clock.sleep(self._timing.latency_s)
                with episode.span("execute"):
                    await self.clock.sleep(turn.execute_s)
                spans = tuple((s.policy_version, s.start, s.end) for s in sampled.version_spans)
                turns.append(replace(turn, policy_version=sampled.policy_version, version_spans=spans))
        finally:
            self._front.forget(conversation)
            self._saying.pop(conversation, None)
            episode.end()
        trajectory = replace(recorded, turns=tuple(turns))
        self.lengths.observe(trajectory)
        return trajectory

    async def sync(self, version: int) -> None:
        with self.shares.span("sync"):
            await self._front.update_weights(version)

    async def learn(self, groups: Sequence[Group]) -> None:
        """As long as it took for the tokens that are laid out."""
        laid_out = sum(self.playlist.group(group.number).laid_out for group in groups)
        duration_s = self._timing.learn_s_per_token * laid_out
        if self._config.engine.layout != "split":
            # one of the two computes at a time; taking turns more finely would come to the same
            self.engine.stall(duration_s)
        with self.shares.span("learn"):
            await self.clock.sleep(duration_s)
        self._learn_s += duration_s

    async def busy(self) -> tuple[float, float, float]:
        """Of the time so far: shares in which engines computed, slots were in use, and the learner worked."""
        load, engines_s = await self.engine.load(), self.clock.now_s * self._replicas
        return (
            (load.prefill_s + load.decode_s) / engines_s,
            self.engine.slot_s() / (engines_s * self._config.engine.slots),
            self._learn_s / self.clock.now_s,
        )
