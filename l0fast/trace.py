"""A trace of a run, to look at in Perfetto (https://ui.perfetto.dev): an observer (observer.py) that writes down what it is told.

JSON in Chrome's Trace Event Format, as an array that is written as the run goes on. It need not be closed to be read, so a
killed run leaves one as well.

    process     rows
    agents      one an agent: its episode, and in it lease, generate, execute, tool; what is bare is its own thinking
    step        take, learn, sync, evaluate, checkpoint; stalls of the loop
    counters    whatever is counted, e.g. {"engine": {"running": 96, "waiting": 3}}
    rank 0 ...  what torch.profiler saw in a learner's rank, if it was asked to (`merge_torch`)

The loop appends a tuple to a queue; a thread makes JSON of it, half a millisecond at a time, so that it doesn't keep the
interpreter from the loop. Above `rows` agents one in n has a row, and a row is used again when its episode is over.
"""

import heapq
import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import orjson

from l0fast.files import whole_file
from l0fast.observer import NOTHING, EpisodeObserver

ROWS = 512
"""Of agents in a trace; more can't be looked at."""
MAX_BYTES = 1 << 30
"""Of a trace; what comes later is left out, for nothing shows a larger one [bytes]."""
WRITE_EVERY_S = 0.5
"""At most this much is lost to a kill [s]."""

_AGENTS, _STEP, _COUNTERS, _RANK = 1, 2, 3, 10
_SLICE_S = 0.0005


class Trace:
    """An observer that notes what it is told; `write_trace` makes a file of it."""

    def __init__(self, max_agents: int, rows: int = ROWS, now: Callable[[], int] = time.monotonic_ns):
        """
        Args:
            max_agents: most episodes at once; above `rows`, one in n has a row.
            now: a monotonic clock [ns].
        """
        self.now = now
        self.origin = now()
        """Where the trace's time begins [ns]."""
        self.events: deque[tuple[Any, ...]] = deque()
        """(pid, tid, name, start, end, arguments), or (name, time, values) [ns]; `popleft` and `append` are atomic."""
        self._one_in = max(1, math.ceil(max_agents / rows))
        self._episodes = itertools.count()
        self._free_rows = list(range(rows))
        self._step_rows: dict[str, int] = {}

    def episode(self, name: str) -> EpisodeObserver:
        if next(self._episodes) % self._one_in or not self._free_rows:
            return NOTHING
        return _AgentRow(self, heapq.heappop(self._free_rows), name)

    def span(self, name: str) -> AbstractContextManager[None]:
        # a row each: what the run does at once is not nested
        return _Block(self, _STEP, self._row_of(name), name)

    def block(self, name: str, start: int, end: int) -> None:
        """What the whole run has done from `start` to `end` [ns, time.monotonic_ns]."""
        self.events.append((_STEP, self._row_of(name), name, start, end, None))

    def count(self, name: str, values: Mapping[str, float]) -> None:
        """How much there is of something now, drawn over each other."""
        self.events.append((name, self.now(), values))

    def _row_of(self, name: str) -> int:
        return self._step_rows.setdefault(name, len(self._step_rows))

    def give_back(self, row: int) -> None:
        heapq.heappush(self._free_rows, row)


class _Block:
    __slots__ = ("_name", "_pid", "_start", "_tid", "_trace")

    def __init__(self, trace: Trace, pid: int, tid: int, name: str):
        self._trace, self._pid, self._tid, self._name = trace, pid, tid, name

    def __enter__(self) -> None:
        self._start = self._trace.now()

    def __exit__(self, *error: object) -> None:
        trace = self._trace
        trace.events.append((self._pid, self._tid, self._name, self._start, trace.now(), None))


class _AgentRow:
    """One episode's row."""

    __slots__ = ("_calls", "_cell", "_name", "_row", "_started", "_tools_since", "_trace")

    def __init__(self, trace: Trace, row: int, name: str):
        self._trace, self._row, self._name = trace, row, name
        self._started = trace.now()
        self._cell: int | None = None
        self._calls = 0
        self._tools_since: int | None = None

    def span(self, name: str) -> AbstractContextManager[None]:
        match name:
            case "execute":
                return _Around(self._begin_cell, self._end_cell)
            case "tool":
                return _Around(self._begin_tool, self._end_tool)
        return _Block(self._trace, _AGENTS, self._row, name)

    def end(self, **facts: Any) -> None:
        trace = self._trace
        trace.events.append((_AGENTS, self._row, self._name, self._started, trace.now(), facts))
        trace.give_back(self._row)

    def _begin_cell(self) -> None:
        self._cell = self._trace.now()

    def _end_cell(self) -> None:
        trace, now = self._trace, self._trace.now()
        self._end_tools(now)
        trace.events.append((_AGENTS, self._row, "execute", self._cell, now, None))
        self._cell = None

    def _begin_tool(self) -> None:
        """Calls that overlap are one block, from the first to the last: blocks of a row are nested or apart."""
        self._calls += 1
        # a call that a cell has left behind has no place in the next turn
        if self._tools_since is None and self._cell is not None:
            self._tools_since = self._trace.now()

    def _end_tool(self) -> None:
        self._calls -= 1
        if not self._calls:
            self._end_tools(self._trace.now())

    def _end_tools(self, now: int) -> None:
        if self._tools_since is not None:
            self._trace.events.append((_AGENTS, self._row, "tool", self._tools_since, now, None))
            self._tools_since = None


class _Around:
    """A block with something to do before and after it."""

    __slots__ = ("_after", "_before")

    def __init__(self, before: Callable[[], None], after: Callable[[], None]):
        self._before, self._after = before, after

    def __enter__(self) -> None:
        self._before()

    def __exit__(self, *error: object) -> None:
        self._after()


# --- its file --------------------------------------------------------------------------------------------------------


@contextmanager
def write_trace(trace: Trace, path: Path, log: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Write a trace to `path` while the block runs; whole when it is left, and readable before.

    Args:
        log: told once, if it can't be written any further; the run goes on without.

    Raises OSError where it can't be begun.
    """
    writer = _Writer(trace, path, log)
    try:
        yield
    finally:
        writer.close()


class _Writer:
    """The thread that writes."""

    def __init__(self, trace: Trace, path: Path, log: Callable[[str], None]):
        self._trace, self._log = trace, log
        self._named: set[tuple[int, int]] = set()
        self._file = path.open("wb")
        self._bytes = 0
        self._failed = False
        try:
            self._begin()
        except OSError:
            with suppress(OSError):
                self._file.close()
            raise
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trace", daemon=True)
        self._thread.start()

    def _begin(self) -> None:
        trace = self._trace
        # wall clock of its beginning: torch's profiles are told by that
        began_unix = time.time_ns() - (trace.now() - trace.origin)
        self._write(b"[\n" + _json(_meta("clock_sync", _STEP, 0, began_unix_ns=began_unix)))
        for pid, name in ((_STEP, "step"), (_COUNTERS, "counters"), (_AGENTS, "agents")):
            self._line(_meta("process_name", pid, 0, name=name))
            self._line(_meta("process_sort_index", pid, 0, sort_index=pid))
        self._file.flush()

    def close(self) -> None:
        self._end.set()
        self._thread.join()
        try:
            if not self._failed:
                self._file.write(b"\n]\n")
                self._file.flush()
        except OSError as e:
            self._fails(e)
        finally:
            with suppress(OSError):  # what could not be written, as was told
                self._file.close()

    def _run(self) -> None:
        while not self._end.wait(WRITE_EVERY_S):
            self._drain(rest=_SLICE_S)
        self._drain(rest=0)

    def _drain(self, rest: float) -> None:
        events = self._trace.events
        try:
            since = time.perf_counter()
            while events:
                self._event(events.popleft())
                if rest and time.perf_counter() - since > _SLICE_S:
                    time.sleep(rest)
                    since = time.perf_counter()
            if not self._failed:
                self._file.flush()
        except OSError as e:
            self._fails(e)

    def _fails(self, error: OSError) -> None:
        self._failed = True
        self._log(f"the trace can't be written any further ({error.strerror}); the run goes on without it")

    def _event(self, event: tuple[Any, ...]) -> None:
        if self._failed:
            return
        origin = self._trace.origin
        if len(event) == 3:
            name, at, values = event
            self._line({"ph": "C", "pid": _COUNTERS, "name": name, "ts": (at - origin) // 1000, "args": values})
            return
        pid, tid, name, start, end, facts = event
        if (pid, tid) not in self._named:
            self._named.add((pid, tid))
            self._line(_meta("thread_name", pid, tid, name=name if pid == _STEP else f"agent {tid}"))
            self._line(_meta("thread_sort_index", pid, tid, sort_index=tid))
        # whole microseconds, rounded down at both ends: what was nested stays nested
        ts = (start - origin) // 1000
        dur = (end - origin) // 1000 - ts
        if facts:
            self._line({"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": ts, "dur": dur, "args": facts})
        else:
            # nearly all: a third of the time that making a dictionary of it takes
            self._write(_BLOCK % (pid, tid, _quoted(name), ts, dur))

    def _line(self, event: Mapping[str, Any]) -> None:
        self._write(b",\n" + _json(event))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._bytes += len(data)
        if self._bytes > MAX_BYTES and not self._failed:
            self._failed = True
            self._file.write(b"\n]\n")
            self._log(f"the trace has {MAX_BYTES / 1e9:.1f} GB, which is all that can be looked at: it ends here")


_BLOCK = b',\n{"ph":"X","pid":%d,"tid":%d,"name":%b,"ts":%d,"dur":%d}'


@lru_cache(1024)
def _quoted(name: str) -> bytes:
    return orjson.dumps(name)


def _meta(kind: str, pid: int, tid: int, **facts: Any) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": tid, "name": kind, "args": facts}


def _json(event: Mapping[str, Any]) -> bytes:
    return orjson.dumps(event, default=str)


def event_lines(trace: Iterable[bytes]) -> Iterator[bytes]:
    """The events as they stand there, also of a trace that a killed run left behind, which may end inside of one."""
    before = b""
    for line in trace:
        line = line.rstrip(b",\n")
        if line in (b"[", b"]"):
            continue
        if before:
            yield before
        before = line
    try:
        orjson.loads(before)
    except orjson.JSONDecodeError:
        return
    yield before


def merge_torch(trace: Path, profiles: Sequence[Path]) -> None:
    """Add what torch.profiler exported in each learner rank to a finished trace, in its place in time.

    The trace goes by line by line: as objects its events take some fifty times its bytes, 50 GB of the largest.

    Args:
        profiles: `export_chrome_trace` files, in the order of the ranks. Their times count from `baseTimeNanoseconds`, on the
            wall clock, which is one for all processes of a machine.
    """
    with trace.open("rb") as file, whole_file(trace) as partial, partial.open("wb") as out:
        lines = event_lines(file)
        # what a trace begins with
        clock = next(lines)
        began = orjson.loads(clock)["args"]["began_unix_ns"]
        out.write(b"[\n" + clock)
        out.writelines(b",\n" + line for line in lines)
        for rank, path in enumerate(profiles):
            profile = orjson.loads(path.read_bytes())
            offset_us = (profile.get("baseTimeNanoseconds", 0) - began) / 1000
            pids: dict[Any, int] = {}
            for event in profile["traceEvents"]:
                # each process and device of a rank becomes a process of the trace, apart from the others'
                pid = pids.setdefault(event.get("pid"), _RANK + 100 * rank + len(pids))
                if event.get("ph") == "M" and event["name"] == "process_name":
                    event["args"]["name"] = f"rank {rank}: {event['args'].get('name', '')}"
                out.write(
                    b",\n" + _json(event | {"pid": pid} | ({"ts": event["ts"] + offset_us} if "ts" in event else {}))
                )
        out.write(b"\n]\n")
