"""An engine behind a gate: requests wait outside until an `Admission` lets them in, so that its KV cache does not thrash.

    generate -> ask -> (wait) -> the engine -> ran -> whoever may go now
    forget   -> the episode's entries are free     -> whoever may go now

Nothing here decides; rollout/admission.py does. A `Gate` is the line of those who wait, in calls: who comes, finishes,
gives up or is forgotten looks whom that lets in, and a timer looks while somebody waits. A `GatedEngine` has it before an
engine. Whoever waits there fails when the line stands still, however long it is while it moves; meanwhile the episode's own
deadlines stand still (l0fast/deadlines.py), and cancelling takes it out of the line. What the engine says of itself is asked
for by whoever finishes, at most once in `_LOOK_S`.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from l0fast.deadlines import standing_still
from l0fast.engine.base import Engine, EngineLoad, Sampled, Sampling
from l0fast.engine.clock import Clock, CompressedClock, Timer
from l0fast.errors import EngineError

_LOOK_S = 1.0
"""Between two looks at the engine's load, or for somebody who may go [s]."""


class Admits(Protocol):
    """Who may go; see rollout/admission.py, the one there is."""

    @property
    def num_in_flight(self) -> int: ...
    @property
    def num_parked(self) -> int: ...
    def ask(self, conversation: str, prompt_tokens: int, now_s: float) -> bool: ...
    def ran(self, conversation: str, tokens: int, cached_tokens: int, now_s: float) -> None: ...
    def withdraw(self, conversation: str, now_s: float) -> None: ...
    def forget(self, conversation: str) -> None: ...
    def observe(self, load: EngineLoad) -> None: ...
    def updated_weights(self) -> None: ...
    def admit(self, now_s: float) -> list[str]: ...


class Gate:
    """Who waits to be let in."""

    def __init__(self, admission: Admits, clock: Clock):
        self.admission = admission
        self.moved_s = -math.inf
        """When a turn was last let in, or ended, or an episode did."""
        self._clock = clock
        self._waiting: dict[str, Callable[[], Any]] = {}
        self._timer: Timer | None = None
        self._next_look_s = 0.0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def wants_load(self) -> bool:
        """Whether who asks shall see to it that `observe` is called: at most once in `_LOOK_S`."""
        now_s = self._clock.now_s
        if now_s < self._next_look_s:
            return False
        self._next_look_s = now_s + _LOOK_S
        return True

    def ask(self, conversation: str, prompt_tokens: int, go: Callable[[], Any]) -> bool:
        """Whether this turn may go at once; if not, `go` is called when it may."""
        if self.admission.ask(conversation, prompt_tokens, self._clock.now_s):
            return True
        self._waiting[conversation] = go
        self._watch()
        return False

    def ran(self, conversation: str, tokens: int, cached_tokens: int) -> None:
        """Its turn is over: so many tokens in its context now, so many of its prompt's found."""
        self.admission.ran(conversation, tokens, cached_tokens, self._clock.now_s)
        self._move()

    def withdraw(self, conversation: str) -> None:
        """It no longer wants the turn it asked for, or was given."""
        self._waiting.pop(conversation, None)
        self.admission.withdraw(conversation, self._clock.now_s)
        self._let_in()

    def forget(self, conversation: str) -> None:
        self.admission.forget(conversation)
        self._move()

    def observe(self, load: EngineLoad) -> None:
        """What the engine says of itself."""
        self.admission.observe(load)
        self._let_in()

    def _move(self) -> None:
        self.moved_s = self._clock.now_s
        self._let_in()

    def _let_in(self) -> None:
        if self._waiting:
            for conversation in self.admission.admit(self._clock.now_s):
                self.moved_s = self._clock.now_s
                self._waiting.pop(conversation)()

    def _watch(self) -> None:
        """Somebody may go because time has passed."""
        if self._timer is None and self._waiting:
            self._timer = self._clock.call_at(self._clock.now_s + _LOOK_S, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._let_in()
        self._watch()


async def gated(engine: Engine, admission: Admits, *, timeout_s: float, clock: Clock | None = None) -> "GatedEngine":
    """An engine behind its gate, which knows by then how large the cache is."""
    gate = GatedEngine(engine, admission, timeout_s=timeout_s, clock=clock)
    await gate.look()
    return gate


class GatedEngine:
    """The `Engine` protocol, of the engine inside."""

    def __init__(self, engine: Engine, admission: Admits, *, timeout_s: float, clock: Clock | None = None):
        """
        Args:
            timeout_s: a request that waits to be let in fails when the line has not moved for so long [s of the clock].
            clock: None is the loop's.
        """
        self.engine = engine
        self._timeout_s = timeout_s
        self._clock: Clock = clock or CompressedClock()
        self._gate = Gate(admission, self._clock)
        self._under_way: set[str] = set()
        self._updating = False

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, *, conversation: str) -> Sampled:
        if conversation in self._under_way:
            # two turns of one conversation at once: only one of them is an episode's
            return await self.engine.generate(prompt_ids, sampling, conversation=conversation)
        self._under_way.add(conversation)
        tokens, cached_tokens = None, 0
        try:
            await self._enter(conversation, len(prompt_ids))
            sampled = await self.engine.generate(prompt_ids, sampling, conversation=conversation)
            tokens, cached_tokens = len(prompt_ids) + len(sampled.response_ids), sampled.cached_tokens
        finally:
            self._under_way.remove(conversation)
            if tokens is None:
                self._gate.withdraw(conversation)
            else:
                self._gate.ran(conversation, tokens, cached_tokens)
        if self._gate.wants_load():
            await self.look()
        return sampled

    async def update_weights(self, policy_version: int) -> None:
        self._gate.admission.updated_weights()
        self._updating = True
        try:
            await self.engine.update_weights(policy_version)
        finally:
            self._updating = False
            # it could not until now
            self._gate.moved_s = self._clock.now_s

    def forget(self, conversation: str) -> None:
        self.engine.forget(conversation)
        self._gate.forget(conversation)

    async def load(self) -> EngineLoad:
        """The engine's, those who wait outside, and what the admission did."""
        load = await self.engine.load()
        return replace(
            load,
            waiting=load.waiting + self._gate.num_waiting,
            in_flight=self._gate.admission.num_in_flight,
            parked=self._gate.admission.num_parked,
        )

    async def look(self) -> None:
        """Tell the admission how the engine does."""
        self._gate.observe(await self.engine.load())

    async def _enter(self, conversation: str, prompt_tokens: int) -> None:
        admitted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        # one that is cancelled or late in the very moment it is let in says so itself, and withdraws
        if self._gate.ask(conversation, prompt_tokens, lambda: _settle(admitted, True)):
            return
        asked_s = self._clock.now_s

        def look() -> None:
            nonlocal deadline
            last_s = self._clock.now_s if self._updating else max(asked_s, self._gate.moved_s)
            if (due_s := last_s + self._timeout_s) > self._clock.now_s:
                deadline = self._clock.call_at(due_s, look)
            else:
                _settle(admitted, False)

        deadline = self._clock.call_at(asked_s + self._timeout_s, look)
        try:
            with standing_still():
                let_in = await admitted
            if not let_in:
                raise EngineError(
                    f"waited {self._clock.now_s - asked_s:.3g} s for room in the KV cache, the last {self._timeout_s:g} s without "
                    "anybody being let in or done: lower rollout.max_open_groups, or raise engine.request_timeout_s"
                )
        finally:
            deadline.cancel()


def _settle(admitted: asyncio.Future[bool], answer: bool) -> None:
    if not admitted.done():
        admitted.set_result(answer)
