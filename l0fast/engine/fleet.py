"""Several engines behind one `Engine`: placed, given new weights, watched, and rebuilt when they die.

    agents --generate()--> placement.py: which engine? --> engine 0    one a GPU, or a tensor-parallel group of them
                                                       --> engine 1
    learner --WeightSource--> update_weights(): all that live, at the same time
    watchdog: an engine that was asked and says nothing is named, and taken for dead

When an engine dies, its requests go to another one, or to itself when it is back: what was asked, and as much as is known
of what had been sampled, so no episode notices more than a delay. One task keeps each engine: starts it, brings it to the
weights the learner has published, waits for its death, and starts it again, `engine.max_rebuilds` times a day at most. The
others work on meanwhile. A request during which several engines died is given up, for it may be what kills them. Where engines
sleep while the learner works, it waits for one that is being started, which then sleeps, too; none is started meanwhile.

What an engine is, this file does not know (`FleetEngine`); sglang.py makes them.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

from l0fast.config import EngineConfig
from l0fast.deadlines import standing_still
from l0fast.engine.base import EngineLoad, Sampled, Sampling, VersionSpan
from l0fast.engine.placement import Placement
from l0fast.errors import EngineError
from l0fast.ids import Ids

MAX_SENDS = 3
"""Engines that may die over one request before it is given up."""
REBUILDS_S = 24 * 3600.0
"""Time in which rebuilds are counted: in a run of weeks an engine may die now and then [s]."""
_AGAIN_S = 1.0
"""Wait before an engine that could not be started is tried again; it doubles with each try in a row [s]."""


@dataclass(slots=True)
class Response:
    """A response while it is sampled, by as many engines as it takes."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[VersionSpan] = field(default_factory=list)
    """Who sampled which of `ids`; neighbours of one version are one span."""
    cached_tokens: int | None = None
    """Of the first engine's prompt."""
    finish_reason: str | None = None
    policy_version: int = 0
    """Of the engine that was asked last."""

    def add(self, ids: Sequence[int], logprobs: Sequence[float], spans: Sequence[VersionSpan]) -> None:
        """More of it. `spans` are positions in the whole response."""
        assert len(ids) == len(logprobs), f"an engine gave {len(ids)} ids and {len(logprobs)} log-probs"
        self.ids += ids
        self.logprobs += logprobs
        for span in spans:
            last = self.spans[-1] if self.spans else None
            if last and last.policy_version == span.policy_version:
                self.spans[-1] = VersionSpan(span.policy_version, last.start, span.end)
            else:
                self.spans.append(span)

    def ends(self, sampling: Sampling) -> bool:
        """Whether what is here is all there is to sample; sets `finish_reason` then."""
        if self.ids and self.ids[-1] in sampling.stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.ids) == sampling.max_new_tokens:
            self.finish_reason = "length"
        return self.finish_reason is not None

    def sampled(self) -> Sampled:
        assert self.finish_reason is not None, "it is not complete"
        return Sampled(
            response_ids=Ids(self.ids),
            sampler_logprobs=tuple(self.logprobs),
            finish_reason=self.finish_reason,
            policy_version=self.spans[0].policy_version if self.spans else self.policy_version,
            version_spans=tuple(self.spans),
            cached_tokens=self.cached_tokens or 0,
        )


class FleetEngine(Protocol):
    """One engine, as long as it lives. Once it has failed it stays so, and everything asked of it raises EngineError."""

    failure: str | None
    """Why it can't be used any more."""

    async def extend(
        self, response: Response, prompt_ids: Sequence[int], sampling: Sampling, *, conversation: str
    ) -> None:
        """Sample the rest of a response. What came of it is in `response` also where this raises, as far as it is known.

        Raises:
            ValueError: as `Engine.generate`.
            EngineError: it failed, which `failure` then says too, or missed its deadline.
        """
        ...

    async def update_weights(self, policy_version: int, weights: Any) -> None:
        """Take weights as its `WeightSource` gives them, awake or asleep; afterwards it is awake. Raises EngineError."""
        ...

    async def sleep(self) -> None:
        """Give memory back until the next `update_weights`; what is asked meanwhile waits. Raises EngineError."""
        ...

    async def failed(self) -> None:
        """Returns when it has failed."""
        ...

    def fail(self, why: str) -> None:
        """Resolve all that waits for it, now and later, with EngineError."""
        ...

    def forget(self, conversation: str) -> None: ...

    def load(self) -> EngineLoad:
        """As far as it has told; sums since its start also when it has failed."""
        ...

    @property
    def busy(self) -> bool:
        """Whether it has been asked for something that it should be at."""
        ...

    @property
    def progress(self) -> float:
        """Anything that changes when it says something."""
        ...


class WeightSource(Protocol):
    """What the learner has published, in the form that engines take it in."""

    def weights(self, engines: Sequence[int]) -> AbstractAsyncContextManager[tuple[int, Mapping[int, Any]]]:
        """Its version, and what each of these engines is given; good until the block is left. Raises EngineError."""
        ...


class Silence:
    """How long someone has said nothing although they were asked."""

    def __init__(self):
        self._since, self._progress = 0.0, -1.0

    def observe(self, now: float, *, busy: bool, progress: float) -> float:
        if not busy or progress != self._progress:
            self._since, self._progress = now, progress
        return now - self._since


@dataclass(slots=True)
class _Member:
    number: int
    engine: FleetEngine | None = None
    """None while it is down."""
    started: asyncio.Event = field(default_factory=asyncio.Event)
    """Whether it has ever been up."""
    at_rest: asyncio.Event = field(default_factory=asyncio.Event)
    """Set unless it is being started or ended: it is up, or has no memory."""
    rebuilds: list[float] = field(default_factory=list)
    """When it was rebuilt, within `REBUILDS_S` of the last death [s]."""
    given_up: bool = False
    ended: FleetEngine | None = None
    """The one that died last, while it is being ended."""
    past: EngineLoad | None = None
    """Sums of those before it."""
    silence: Silence = field(default_factory=Silence)


class Fleet:
    """The `Engine` protocol over several of them. Made by `fleet`."""

    def __init__(
        self,
        make: Callable[[int], AbstractAsyncContextManager[FleetEngine]],
        count: int,
        source: WeightSource | None,
        config: EngineConfig,
        log: Callable[[str], None],
    ):
        self._make, self._source, self._config, self._log = make, source, config, log
        self._members = [_Member(number) for number in range(count)]
        self._placement = Placement(count, -(-config.slots // count))
        self._version: int | None = None
        """Of the last update; None before the first, when the model folder's weights are the ones."""
        self._updating = asyncio.Lock()
        self._awake = asyncio.Event()
        self._awake.set()
        self._any_up = asyncio.Event()
        """Set while an engine is up, and for ever once there will be none."""
        self._none_left: str | None = None

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, *, conversation: str) -> Sampled:
        """As in the protocol. An engine that dies over it is replaced by another one, or by itself rebuilt."""
        response, deaths = Response(), 0
        while not response.ends(sampling):
            member, engine = await self._placed(conversation)
            try:
                await engine.extend(response, prompt_ids, sampling, conversation=conversation)
                break
            except EngineError as e:
                if engine.failure is None:
                    raise
                self._is_down(member, engine)
                deaths += 1
                if deaths == MAX_SENDS:
                    raise EngineError(
                        f"{deaths} engines died while they were at this request, which is not sent again; the last: {e}"
                    ) from e
            finally:
                self._placement.done(member.number)
        return response.sampled()

    async def _placed(self, conversation: str) -> tuple[_Member, FleetEngine]:
        while (number := self._placement.place(conversation)) is None:
            if self._none_left is not None:
                raise EngineError(self._none_left)
            # until one is built again, which has deadlines of its own
            with standing_still():
                await self._any_up.wait()
        member = self._members[number]
        assert member.engine is not None, "an engine that is down was placed on"
        return member, member.engine

    async def update_weights(self, policy_version: int) -> None:
        """As in the protocol: all engines take them at the same time. One that can't is rebuilt with them.

        Raises:
            ValueError: there is no source of weights.
            EngineError: the source failed, or holds another version; or no engine is left.
        """
        if self._source is None:
            raise ValueError("these engines were made without a source of weights: give sglang_fleet() one")
        async with self._updating:
            living = [(m, m.engine) for m in self._members if m.engine is not None]
            async with self._source.weights([member.number for member, _ in living]) as (version, weights):
                if version != policy_version:
                    raise EngineError(
                        f"the learner has published version {version}, not {policy_version}, which was asked for"
                    )
                self._version = policy_version
                async with asyncio.TaskGroup() as tg:
                    for member, engine in living:
                        tg.create_task(self._update(member, engine, version, weights[member.number]))
            self._awake.set()
        # where none has survived it, one that is rebuilt with them is as good
        await self._any_up.wait()
        if self._none_left is not None:
            raise EngineError(self._none_left)

    async def _update(self, member: _Member, engine: FleetEngine, version: int, weights: Any) -> None:
        try:
            await engine.update_weights(version, weights)
        except EngineError:
            # it is dead now, which who keeps it will see, and say
            self._is_down(member, engine)

    async def sleep(self) -> None:
        """The engines give their memory to the learner until the next `update_weights`. One that is being started or ended
        holds some of it: this waits until it has come up or is gone, which its start's deadline bounds.
        """
        async with self._updating:
            self._awake.clear()
            async with asyncio.TaskGroup() as tg:
                for member in self._members:
                    if member.engine is not None:
                        tg.create_task(self._sleep(member, member.engine))
        # not under the lock, which one that has started takes
        for member in self._members:
            await member.at_rest.wait()

    async def _sleep(self, member: _Member, engine: FleetEngine) -> None:
        try:
            await engine.sleep()
        except EngineError:
            self._is_down(member, engine)

    def forget(self, conversation: str) -> None:
        self._placement.forget(conversation)
        for member in self._members:
            if member.engine is not None:
                member.engine.forget(conversation)

    async def load(self) -> EngineLoad:
        """Of all engines together, those that died included."""
        if self._none_left is not None:
            raise EngineError(self._none_left)
        loads = [m.engine.load() for m in self._members if m.engine is not None]
        loads += [_sum([m.ended.load()], sums_only=True) for m in self._members if m.ended is not None]
        return _sum([*loads, *(m.past for m in self._members if m.past is not None)])

    async def _keep(self, member: _Member) -> None:
        """One engine's lives, one after the other."""
        in_a_row = 0
        while True:
            try:
                await self._awake.wait()
                member.at_rest.clear()
                async with self._make(member.number) as engine:
                    await self._catch_up(member, engine)
                    in_a_row = 0
                    member.engine = engine
                    member.started.set()
                    member.at_rest.set()
                    self._placement.up(member.number)
                    self._any_up.set()
                    if member.rebuilds:
                        self._log(f"engine {member.number} is back")
                    try:
                        await engine.failed()
                    finally:
                        self._is_down(member, engine)
                    why = str(engine.failure)
                self._settle(member)
            except EngineError as e:
                self._settle(member)
                if not member.started.is_set():
                    raise
                why = str(e)
            in_a_row += 1
            now, limit = asyncio.get_running_loop().time(), self._config.max_rebuilds
            member.rebuilds = [at for at in member.rebuilds if now - at < REBUILDS_S]
            if len(member.rebuilds) == limit:
                self._give_up(member, why)
                return
            member.rebuilds.append(now)
            self._log(f"engine {member.number} died: {why}; rebuild {len(member.rebuilds)} of {limit} in a day")
            if in_a_row > 1:
                await asyncio.sleep(_AGAIN_S * 2 ** (in_a_row - 2))

    async def _catch_up(self, member: _Member, engine: FleetEngine) -> None:
        """Give an engine that has just started the weights the others have, or newer ones; or let it sleep as they do."""
        async with self._updating:
            if not self._awake.is_set():
                # it wakes with new ones
                await engine.sleep()
            elif self._version is not None and self._source is not None:
                async with self._source.weights([member.number]) as (version, weights):
                    await engine.update_weights(version, weights[member.number])

    def _is_down(self, member: _Member, engine: FleetEngine) -> None:
        if member.engine is not engine:
            return
        # its requests may still be writing down what it had told them
        member.engine, member.ended = None, engine
        member.at_rest.clear()
        self._placement.down(member.number)
        if all(other.engine is None for other in self._members):
            self._any_up.clear()

    def _settle(self, member: _Member) -> None:
        """Remember what an engine that has ended did, and no more of it."""
        member.at_rest.set()
        if member.ended is not None:
            past = [member.past] if member.past else []
            member.past, member.ended = _sum([member.ended.load(), *past], sums_only=True), None

    def _give_up(self, member: _Member, why: str) -> None:
        what = (
            f"engine {member.number} died {len(member.rebuilds) + 1} times in a day and is not rebuilt any more "
            "(engine.max_rebuilds)"
        )
        self._log(f"{what}; the last time: {why}")
        member.given_up = True
        if all(other.given_up for other in self._members):
            self._none_left = f"no engine is left: {what}; the last time: {why}"
            self._any_up.set()

    async def _watch(self) -> None:
        """The watchdog."""
        limit, loop = self._config.stall_timeout_s, asyncio.get_running_loop()
        while True:
            await asyncio.sleep(limit / 4)
            for member in self._members:
                if (engine := member.engine) is None:
                    continue
                silent_s = member.silence.observe(loop.time(), busy=engine.busy, progress=engine.progress)
                if silent_s >= limit:
                    load = self._placement.requests[member.number]
                    engine.fail(
                        f"engine {member.number} has {load} requests and has said nothing for {silent_s:.0f} s (engine.stall_timeout_s)"
                    )

    async def _all_up(self) -> None:
        for member in self._members:
            await member.started.wait()


def _sum(loads: Sequence[EngineLoad], *, sums_only: bool = False) -> EngineLoad:
    states = ("running", "waiting", "used_tokens", "max_tokens")
    return EngineLoad(
        **{
            f.name: 0 if sums_only and f.name in states else sum(getattr(load, f.name) for load in loads)
            for f in fields(EngineLoad)
        }
    )


@asynccontextmanager
async def fleet(
    make: Callable[[int], AbstractAsyncContextManager[FleetEngine]],
    count: int,
    *,
    source: WeightSource | None,
    config: EngineConfig,
    log: Callable[[str], None] = lambda text: None,
) -> AsyncIterator[Fleet]:
    """Engines 0 to count - 1 for as long as the `async with` body runs, all of them up when it begins.

    Args:
        make: starts an engine, with the weights of the model folder (version 0), for as long as its block runs.
        source: where new weights come from; None for engines that keep those they start with.
        log: told of deaths and rebuilds.

    Raises:
        EngineError, UsageError: one of them did not start.
    """
    running = Fleet(make, count, source, config, log)
    try:
        async with asyncio.TaskGroup() as tg:
            tasks = [tg.create_task(running._keep(m), name=f"engine {m.number}") for m in running._members]
            tasks.append(tg.create_task(running._watch(), name="watch over engines"))
            try:
                await running._all_up()
                yield running
            finally:
                for task in tasks:
                    task.cancel()
    except BaseExceptionGroup as e:
        # one failure has one name, whether it was the body's or an engine's
        first, *others = e.exceptions
        if others:
            raise
        raise first from first.__cause__
