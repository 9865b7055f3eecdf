"""Where the wall clock of a step went: shares that add up to one, every instant charged to one cause.

Many things go on at once; an instant is charged to the first of these that holds:

    sync        the engine takes new weights
    learn       the learner works, on a step or on a checkpoint, and of the step's episodes only stragglers are left, or none
    stall       the event loop woke later than asked by more than `STALL_S`: it served nobody meanwhile
    evaluate    held-out questions are asked, and meanwhile nothing is waited for that a step needs ("take", "learn")
    tail        only stragglers are left, and one of them is at the engine
    decode  prefill  recompute
                an episode is at the engine; which of the three it was is told by the engine's own figures of the step:
                prefill_s : decode_s, and of the first the share recomputed_tokens / prefill_tokens
    tools       an episode waits for a tool, and none is at the engine
    sandbox     an episode waits for a session or for its cell, and none is at the engine or waits for a tool
    learn       the learner works, and no episode does
    other       none of this

So a share is about what the step would have been shorter by: what is hidden behind the engine's work costs nothing.
Stragglers are left when both the episodes under way and those at the engine are fewer than `TAIL_SHARE` of the most there
were in this step. Whatever waits to be admitted would fill these places, so then nothing does.

An engine that does not tell how long it spent on prompts (`prefill_s`, `decode_s`) has all its time under decode.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from l0fast.observer import EpisodeObserver
from l0fast.types import EngineLoad

STALL_S = 0.02
"""A loop that is later than this is stalled, not busy [s]."""
TAIL_SHARE = 0.25
"""Of the step's most episodes under way, and of those at the engine: fewer are stragglers."""

CAUSES = ("stall", "evaluate", "sync", "learn", "tail", "decode", "prefill", "recompute", "tools", "sandbox", "other")
"""What an instant can be charged to."""
SPANS = ("lease", "generate", "execute", "tool", "take", "learn", "sync", "evaluate", "checkpoint")
"""What an observer can be told; see observer.py."""

_STALL, _EVALUATE, _SYNC, _LEARN, _TAIL, _ENGINE, _TOOLS, _SANDBOX, _OTHER = range(9)


@dataclass(frozen=True, slots=True)
class Activity:
    """What goes on under one name of `SPANS`."""

    open: int
    """Blocks that were entered and not left."""
    quiet_s: float
    """Since one of them was left without an error, or since the first of them was entered if that is later [s]."""


class _Span:
    """Everybody's block of one name: it only counts."""

    __slots__ = ("_shares", "finished_at", "most", "open")

    def __init__(self, shares: "StepShares"):
        self._shares = shares
        self.open = 0
        self.most = 0
        """In this step."""
        self.finished_at = shares.since

    def __enter__(self) -> None:
        shares = self._shares
        shares.settle()
        if not self.open:
            self.finished_at = shares.since
        self.open += 1
        if self.open > self.most:
            self.most = self.open

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        shares = self._shares
        shares.settle()
        self.open -= 1
        if kind is None:
            self.finished_at = shares.since
            shares.finished_at = shares.since


class _Episode:
    __slots__ = ("_shares", "_spans")

    def __init__(self, shares: "StepShares", spans: dict[str, _Span]):
        self._shares, self._spans = shares, spans

    def span(self, name: str) -> _Span:
        return self._spans[name]

    def end(self, **facts: Any) -> None:
        assert self._spans, "an episode ends once"
        self._spans = {}
        self._shares.settle()
        self._shares.episodes -= 1


class StepShares:
    """An observer (observer.py) that charges time. On integers: nothing is lost or counted twice."""

    def __init__(self, now: Callable[[], int] = time.monotonic_ns):
        """Args:
        now: a monotonic clock [ns].
        """
        self._now = now
        self.since = now()
        """What is before is charged [ns]."""
        self.finished_at = self.since
        """When any block was last left without an error [ns]."""
        self.episodes = 0
        """Under way."""
        self._most_episodes = 0
        self._spans = {name: _Span(self) for name in SPANS}
        self._lease, self._generate, self._execute, self._tool = list(self._spans.values())[:4]
        self._take, self._learn, self._sync, self._evaluate, self._checkpoint = list(self._spans.values())[4:]
        self._spent = [0] * 9
        # charged since the loop should have woken: all of it is a stall if it turns out that it was too late
        self._unsure = [0] * 9
        self._due: int | None = None
        self._work: tuple[float, ...] = (0, 0, 0, 0)

    def alive(self) -> None:
        """Something finished that has no block."""
        self.finished_at = self._now()

    # --- observer ----------------------------------------------------------------------------------------------------

    def episode(self, name: str) -> EpisodeObserver:
        self.settle()
        self.episodes += 1
        self._most_episodes = max(self._most_episodes, self.episodes)
        return _Episode(self, self._spans)

    def span(self, name: str) -> AbstractContextManager[None]:
        return self._spans[name]

    def beat(self, due: int, now: int, next_due: int | None) -> None:
        """The loop woke at `now`, was asked to at `due`, and is asked to at `next_due`; None: no more [ns]."""
        self.settle()
        self._decide(late=now - due)
        self._due = next_due

    # --- account -----------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Charge the time up to now, before anything changes."""
        now = self._now()
        since, due = self.since, self._due
        cause = self._cause()
        if due is None or now <= due:
            self._spent[cause] += now - since
        else:
            sure = max(due - since, 0)
            self._spent[cause] += sure
            self._unsure[cause] += now - since - sure
        self.since = now

    def _decide(self, late: int) -> None:
        """Charge what is unsure."""
        unsure, self._unsure = self._unsure, [0] * 9
        if late > STALL_S * 1e9:
            # whoever waits for the learner or the engine's new weights has nothing to do for the loop
            stalled = sum(unsure) - unsure[_SYNC] - unsure[_LEARN]
            unsure = [ns if cause in (_SYNC, _LEARN) else 0 for cause, ns in enumerate(unsure)]
            unsure[_STALL] = stalled
        self._spent = [sure + more for sure, more in zip(self._spent, unsure, strict=True)]

    def _cause(self) -> int:
        requests = self._generate.open
        if self._sync.open:
            return _SYNC
        few = self.episodes < TAIL_SHARE * self._most_episodes and requests < TAIL_SHARE * self._generate.most
        learning = self._learn.open or self._checkpoint.open
        if learning and (few or not self.episodes):
            return _LEARN
        if self._evaluate.open and not self._take.open and not self._learn.open:
            return _EVALUATE
        if requests:
            return _TAIL if few else _ENGINE
        if self._tool.open:
            return _TOOLS
        if self._lease.open or self._execute.open:
            return _SANDBOX
        return _LEARN if learning else _OTHER

    def take_step(self, work: EngineLoad | None = None) -> dict[str, float]:
        """{"time/step_s": ..., "share/<cause>": ...} since the last call; the shares add up to 1, or are all 0 in no time.

        Args:
            work: the engine's figures now; None where there are none, or nobody asks.
        """
        self.settle()
        # it ends here; what of a stall is found later belongs to the next
        self._decide(late=0 if self._due is None else self.since - self._due)
        spent, self._spent = self._spent, [0] * 9
        self._most_episodes = self.episodes
        self._generate.most = self._generate.open
        total = sum(spent)
        stall, evaluate, sync, learn, tail, engine, tools, sandbox, other = (ns / max(total, 1) for ns in spent)
        prefill, recompute = self._split(work)
        shares = {
            "stall": stall,
            "evaluate": evaluate,
            "sync": sync,
            "learn": learn,
            "tail": tail,
            "decode": engine * (1 - prefill),
            "prefill": engine * prefill * (1 - recompute),
            "recompute": engine * prefill * recompute,
            "tools": tools,
            "sandbox": sandbox,
            "other": other,
        }
        return {"time/step_s": total / 1e9} | {f"share/{cause}": shares[cause] for cause in CAUSES}

    def _split(self, work: EngineLoad | None) -> tuple[float, float]:
        """Share of the engine's time that went into prompts, and of their tokens that were computed again."""
        if work is None:
            return 0.0, 0.0
        now = (work.prefill_s, work.decode_s, work.prefill_tokens, work.recomputed_tokens)
        # an engine that was started again counts from 0
        prefill_s, decode_s, tokens, recomputed = (
            max(0.0, after - before) for before, after in zip(self._work, now, strict=True)
        )
        self._work = now
        busy_s = prefill_s + decode_s
        return (prefill_s / busy_s if busy_s else 0.0), (min(1.0, recomputed / tokens) if tokens else 0.0)

    # --- for the watchdog --------------------------------------------------------------------------------------------

    def quiet(self) -> tuple[float, dict[str, Activity]]:
        """Since when nothing finished, whatever its name [s]; and what goes on now, by the names of `SPANS`."""
        now = self._now()
        return (now - self.finished_at) / 1e9, {
            name: Activity(span.open, (now - span.finished_at) / 1e9) for name, span in self._spans.items()
        }
