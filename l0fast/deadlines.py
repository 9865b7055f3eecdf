"""Deadlines that stand still while their owner waits for something with a deadline of its own.

    agent    with deadlines_of(whole, turn): ...         an episode's, for all that its task awaits
    gate     with standing_still(): await admitted       engine.request_timeout_s bounds that
    engine   go_on = halt(deadlines) ... go_on()         while new weights come to a request that is under way

So an episode does not fail because there are many others: only its own time counts.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class Deadline(Protocol):
    """What of `asyncio.Timeout` is used here."""

    def when(self) -> float | None: ...
    def reschedule(self, when: float | None) -> None: ...
    def expired(self) -> bool: ...


_deadlines: ContextVar[tuple[Deadline, ...]] = ContextVar("deadlines", default=())


@contextmanager
def deadlines_of(*deadlines: Deadline) -> Iterator[None]:
    """These, entered already, are the running task's while the block runs."""
    token = _deadlines.set(deadlines)
    try:
        yield
    finally:
        _deadlines.reset(token)


def deadlines_of_this_task() -> tuple[Deadline, ...]:
    return _deadlines.get()


def halt(deadlines: Iterable[Deadline]) -> Callable[[], None]:
    """They stand still until what this returns is called, before any of their blocks is left, and have as long to go then as
    now. One that has passed stays so.
    """
    loop = asyncio.get_running_loop()
    left = [(d, when - loop.time()) for d in deadlines if (when := d.when()) is not None and not d.expired()]
    for deadline, _ in left:
        deadline.reschedule(None)

    def go_on() -> None:
        for deadline, left_s in left:
            deadline.reschedule(loop.time() + left_s)

    return go_on


@contextmanager
def standing_still() -> Iterator[None]:
    """The running task's deadlines stand still in the block."""
    go_on = halt(_deadlines.get())
    try:
        yield
    finally:
        go_on()
