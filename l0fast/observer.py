"""Who is told what a run does while it does it: the account of a step (step_shares.py), a trace (trace.py).

    observer.episode("q17/3")       an episode has begun
      .span("lease")                it waits for a session                one after the other or nested,
      .span("generate")             ... for the engine                    as `with` blocks are
      .span("execute")              ... for its cell
      .span("tool")                 ... for a tool, inside of "execute"
      .end(status="completed")      it is over; in a `finally`, whatever happened
    observer.span("learn")          the whole run does this: "take", "learn", "sync", "evaluate", "checkpoint"

Thousands of agents tell all they do: what listens takes microseconds, and mostly counts.
"""

from contextlib import AbstractContextManager
from typing import Any, Protocol


class EpisodeObserver(Protocol):
    """Told about one episode, by its own coroutine alone."""

    def span(self, name: str) -> AbstractContextManager[None]:
        """What it does for the length of the block: "lease", "generate", "execute" or "tool"."""
        ...

    def end(self, **facts: Any) -> None:
        """It is over. `facts` (strings and numbers: status="completed", turns=3) are shown beside it."""
        ...


class Observer(Protocol):
    """Told about a run, on the event loop. Never waits, never raises; microseconds a call."""

    def episode(self, name: str) -> EpisodeObserver: ...

    def span(self, name: str) -> AbstractContextManager[None]:
        """What the whole run does for the length of the block: "take", "learn", "sync", "evaluate" or "checkpoint"."""
        ...


class NullObserver:
    """A run that nobody watches, an episode of it, and a block."""

    __slots__ = ()

    def episode(self, name: str) -> EpisodeObserver:
        return NOTHING

    def span(self, name: str) -> AbstractContextManager[None]:
        return NOTHING

    def end(self, **facts: Any) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


NOTHING = NullObserver()


class Both:
    """Two that listen."""

    def __init__(self, first: Observer, second: Observer):
        self._first, self._second = first, second

    def episode(self, name: str) -> EpisodeObserver:
        second = self._second.episode(name)
        first = self._first.episode(name)
        return first if second is NOTHING else _BothEpisodes(first, second)

    def span(self, name: str) -> AbstractContextManager[None]:
        return _BothSpans(self._first.span(name), self._second.span(name))


class _BothEpisodes:
    __slots__ = ("_first", "_second")

    def __init__(self, first: EpisodeObserver, second: EpisodeObserver):
        self._first, self._second = first, second

    def span(self, name: str) -> AbstractContextManager[None]:
        return _BothSpans(self._first.span(name), self._second.span(name))

    def end(self, **facts: Any) -> None:
        self._first.end(**facts)
        self._second.end(**facts)


class _BothSpans:
    __slots__ = ("_first", "_second")

    def __init__(self, first: AbstractContextManager[None], second: AbstractContextManager[None]):
        self._first, self._second = first, second

    def __enter__(self) -> None:
        self._first.__enter__()
        self._second.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._second.__exit__(*error)
        self._first.__exit__(*error)
