"""Ends a run that hangs, with a diagnosis, instead of letting it hang.

    nothing finished for `quiet_s`     every task's stack and the state of engine, sandboxes, tools and learner are written
                                       down, and a WorldError that names the likeliest culprit ends the run
    the loop is blocked for `blocked_s`
                                       no coroutine can say so: a thread writes down every thread's stack, and raises
                                       LoopBlocked in the loop's thread, where the blocking call is
    ... ten times as long, without a reaction
                                       a thread of faulthandler, which needs no interpreter lock, writes the stacks to stderr
                                       and ends the process, whose children die with it. It can't tell a process that was
                                       stopped for so long (SIGSTOP)
    the run does not end               a room may hang at its end, too: the process is ended like that after `UNWIND_S`

Every room has deadlines of its own, which say more precisely what is wrong. They come first; this is for what they don't see.

"Finished" is any block of an observer (observer.py) that was left without an error: a response, a cell, a step. What fails
over and over is no progress. The culprit is told from what is open, in this order:

    a room that holds open blocks and does not say its state within `PROBE_S`
    learn, checkpoint, sync
                          the step waits for one thing: the learner, or the engine that takes new weights
    generate, tool, lease and execute
                          what most episodes wait for: the engine, a tool, or the sandbox
    nothing               every episode waits for another part of l0fast: a bug, the stacks tell where
"""

import asyncio
import ctypes
import faulthandler
import inspect
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from l0fast.errors import WorldError
from l0fast.loop_lag import blamed
from l0fast.step_shares import Activity

PROBE_S = 2.0
"""Time a room has to say its state [s]."""
LOOK_S = 1.0
"""Between two looks [s]."""
MAX_STACKS = 200
"""Tasks written down in full; of thousands that wait for the same, more say no more."""
BEYOND_RESCUE = 10
"""Times `blocked_s` after which a process that does not react is ended."""

UNWIND_S = 900.0
"""Time a run has to end after a diagnosis, what was learned being saved; what hung may hang at that, too [s]."""

Probe = Callable[[], Any]
"""Says the state of a room, or is a coroutine function that does: in words, or as a record that prints well."""

_ROOM = {
    "learn": "learner",
    "checkpoint": "learner",
    "sync": "engine",
    "generate": "engine",
    "tool": "tools",
    "lease": "sandbox",
    "execute": "sandbox",
}
"""What a block waits for."""


def stand_down() -> None:
    """The run is over: don't end the process."""
    faulthandler.cancel_dump_traceback_later()


class LoopBlocked(WorldError):
    """The event loop was held by one call for too long."""


def diagnose(activity: Mapping[str, Activity], unanswered: frozenset[str] = frozenset()) -> tuple[str, str]:
    """The likeliest culprit ("engine", "tools", "sandbox", "learner" or "l0fast"), and what it is accused of.

    Args:
        activity: what goes on, by the names of an observer's blocks.
        unanswered: rooms that did not say their state.
    """

    def of(name: str) -> Activity:
        return activity.get(name, Activity(0, 0.0))

    # an episode inside of a tool is inside of its cell, too
    cells = Activity(max(0, of("execute").open - of("tool").open), of("execute").quiet_s)
    waiting = {"generate": of("generate"), "tool": of("tool"), "lease": of("lease"), "execute": cells}
    charges = {
        "learn": f"the learner has not finished a step for {of('learn').quiet_s:.0f} s",
        "checkpoint": f"the learner has not written a checkpoint for {of('checkpoint').quiet_s:.0f} s",
        "sync": f"the engine has not taken the new weights for {of('sync').quiet_s:.0f} s",
        "generate": f"the engine has {_count(waiting['generate'].open, 'request')} outstanding and has answered none "
        f"for {waiting['generate'].quiet_s:.0f} s",
        "tool": f"{_count(waiting['tool'].open, 'call')} of tools are outstanding, and none was answered for "
        f"{waiting['tool'].quiet_s:.0f} s",
        "lease": f"{_count(waiting['lease'].open, 'episode')} wait for a session, and the sandbox has given none for "
        f"{waiting['lease'].quiet_s:.0f} s",
        "execute": f"the sandbox runs {_count(waiting['execute'].open, 'cell')} and has finished none for "
        f"{waiting['execute'].quiet_s:.0f} s",
    }
    suspects = [name for name in ("learn", "checkpoint", "sync") if of(name).open]
    suspects += sorted((name for name in waiting if waiting[name].open), key=lambda name: -waiting[name].open)
    # a room that is silent before one that only holds up others
    suspects.sort(key=lambda name: _ROOM[name] not in unanswered)
    if not suspects:
        return "l0fast", "no episode waits for engine, sandbox or tool, and no step is learned: l0fast waits for itself"
    return _ROOM[suspects[0]], charges[suspects[0]]


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


class Watchdog:
    """Looks whether anything finishes. `run()` is for the run's TaskGroup; `loop_is_late` for the thread of `LoopLag`."""

    def __init__(
        self,
        activity: Callable[[], tuple[float, Mapping[str, Activity]]],
        probes: Mapping[str, Probe],
        *,
        quiet_s: float,
        blocked_s: float,
        log: Callable[[str], None],
    ):
        """
        Args:
            activity: seconds since anything finished, and what goes on.
            probes: by "engine", "sandbox", "tools", "learner": asks for its state. May hang, may fail.
            log: told everything; called by another thread, too. All of it goes to stderr as well.
        """
        self._activity, self._probes = activity, probes
        self._quiet_s, self._blocked_s, self._log = quiet_s, blocked_s, log
        self._loop_thread = threading.get_ident()
        self._blocked: LoopBlocked | None = None

    async def run(self) -> None:
        """Endless, but for a WorldError; the process then has `UNWIND_S` to end, or until `stand_down`."""
        try:
            while True:
                self._end_process_after(BEYOND_RESCUE * self._blocked_s)
                await self.look()
                await asyncio.sleep(LOOK_S)
        except WorldError:
            self._end_process_after(UNWIND_S)
            raise
        except BaseException:
            stand_down()
            raise

    async def look(self) -> None:
        """Once. Raises WorldError where nothing has finished for `quiet_s`, or the loop was blocked for `blocked_s`."""
        # in a bare callback of the loop the exception is logged, and no more
        if self._blocked is not None:
            raise self._blocked
        quiet_s, activity = self._activity()
        if not self._quiet_s or quiet_s < self._quiet_s:
            return
        states = dict(zip(self._probes, await asyncio.gather(*map(_asked, self._probes.values())), strict=True))
        room, charge = diagnose(activity, frozenset(room for room, (answered, _) in states.items() if not answered))
        state = f" (its state: {states[room][1]})" if room in states else ""
        open_blocks = ", ".join(f"{name} {a.open}" for name, a in activity.items() if a.open) or "nothing"
        lines = [f"nothing has finished for {quiet_s:.0f} s; under way: {open_blocks}"]
        lines += [f"{name}: {words}" for name, (_, words) in states.items()]
        self._say("\n".join([*lines, stacks_of_tasks()]))
        raise WorldError(
            f"nothing has finished for {quiet_s:.0f} s, and {charge}{state}: every task's stack is in log.txt; where that "
            "is no hang but work, raise --watchdog.quiet-s"
        )

    def loop_is_late(self, late_s: float) -> None:
        """The loop's heartbeat is overdue; told by another thread, again and again. Once it is too much, ends the run."""
        if not self._blocked_s or late_s < self._blocked_s or self._blocked is not None:
            return
        where = blamed(sys._current_frames().get(self._loop_thread))
        self._blocked = error = LoopBlocked(
            f"the event loop was blocked for more than {self._blocked_s:g} s by {where}: every thread's stack is in log.txt; "
            "where that is no hang but work, raise --watchdog.blocked-s"
        )
        self._say(
            f"the event loop has been blocked for {late_s:.0f} s; this process's threads:\n{_stacks_of_threads()}"
        )
        # it takes a class, and makes the exception
        kind = type("LoopBlocked", (LoopBlocked,), {"__init__": lambda self: LoopBlocked.__init__(self, str(error))})
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._loop_thread), ctypes.py_object(kind))

    def _end_process_after(self, seconds: float) -> None:
        if seconds:
            faulthandler.dump_traceback_later(seconds, exit=True, file=2)

    def _say(self, text: str) -> None:
        self._log(text)
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


async def _asked(probe: Probe) -> tuple[bool, str]:
    """Whether a room said its state in time, and what it said."""
    try:
        async with asyncio.timeout(PROBE_S):
            state = probe()
            return True, str(await state if inspect.isawaitable(state) else state)
    except TimeoutError:
        return False, f"did not answer within {PROBE_S:g} s"
    except Exception as e:  # noqa: BLE001 - a room that can't say how it is has something to hide: that is the finding
        return False, f"{type(e).__name__}: {e}"


def stacks_of_tasks() -> str:
    """Every task's name and stack, innermost last; tasks that wait at the same place are told once, with their number."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for task in asyncio.all_tasks():
        alike.setdefault(_stack_of(task), []).append(task.get_name())
    parts = []
    # the odd ones first: of a hang they are the cause, the many its victims
    for stack, names in sorted(alike.items(), key=lambda item: len(item[1]))[:MAX_STACKS]:
        who = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        parts += [f"{len(names)} x {who}" if len(names) > 1 else who, *(f"    {place}" for place in stack)]
    return "\n".join([f"{sum(map(len, alike.values()))} tasks:", *parts])


def _stack_of(task: "asyncio.Task[Any]") -> tuple[str, ...]:
    # Task.get_stack knows the outermost coroutine of one that waits, and not what that waits for
    places, at = [], task.get_coro()
    while at is not None:
        frame = next((f for name in _FRAMES if (f := getattr(at, name, None)) is not None), None)
        if frame is None:
            break
        places.append(f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_qualname}")
        at = next((a for name in _AWAITED if (a := getattr(at, name, None)) is not None), None)
    return tuple(places)


_FRAMES = ("cr_frame", "gi_frame", "ag_frame")
_AWAITED = ("cr_await", "gi_yieldfrom", "ag_await")


def _stacks_of_threads() -> str:
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"{names.get(ident, '?')}\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
