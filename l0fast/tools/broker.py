"""Between an agent's call and the tool that answers it: arguments, caches, one running call, a slot, several tries.

    agents' calls -> arguments fit the signature?            no: TypeError
                  -> in memory?                              yes: answered
                  -> the same call running?                  yes: wait for it with the others
                  -> a flight: in the file?                  yes: answered
                                wait for a slot -> try the tool      fails: give the slot back, wait, try again
                                keep the answer in memory and file

A flight is a task of the broker, and the callers of one (tool, arguments) are its waiters. One that is cancelled leaves
the others and the flight alone; the last to leave cancels the flight and waits until it has ended, as if it had awaited
the tool itself. Leaving `open_broker` ends every flight. A slot is held for one try, not over the wait between two; by a
function in a thread until that has returned, given up or not. Every wait is bounded: for a slot by `queue_timeout_s`, for
the tool by `timeout_s`, between tries by `MAX_BACKOFF_S`. A session's cell has its own, often shorter limit: it cancels the
waiter.

Who is told what. The broker checks arguments against the signature that agents read, types included (so annotate
with JSON's types), and what doesn't fit is the agent's TypeError. From there on a tool says what it can't do with
ToolError; every other exception is a bug, TypeError too, and ends the run, except OSErrors, which may pass: what is
left of them after the last try is a ToolError that names their class and not their text, except that of `Passing`, which a
tool words for agents. It may also say how long to wait before the next try.
Agents get what JSON makes of a result, each a copy of its own: tuples, sets and NumPy's arrays as lists, NaN and infinities
as None, U+FFFD for a half of a surrogate pair. What JSON can't say is the tool's mistake and a UsageError, but for integers
beyond 64 bits, which agents' arguments may lead to: a ToolError. `secrets`, also as URLs spell them, are blanked in results
and ToolErrors before those are kept or handed on.

Kept are answers of tools with `cache`, by scope, name, `version` of policy and tool, and arguments with defaults filled in. A ToolError is never
kept: "no such page" may be "not yet". Modes of the file: "use" reads and adds; "record" makes every call anew and
overwrites; "replay" calls nothing, and what the file hasn't got is a ToolError.
"""

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import orjson
import stamina

from l0fast.errors import ToolError, UsageError
from l0fast.sandbox.base import ToolSpec
from l0fast.tools.cache import CacheFile, Key, Memory, Mode, normaliser
from l0fast.tools.convert import whole
from l0fast.tools.threads import InThread

MAX_BACKOFF_S = 5.0
"""Longest wait between two tries [s]."""
FEW_CALLS = 20
"""So few of a tool's are not complained about: an agent may well ask for what is not there [calls]."""

# stamina logs every retry as a warning; without a handler of its own logger they'd all land on stderr
_NO_LOG = logging.NullHandler()


class Passing(OSError):
    """A try failed in a way that may pass. Its text is for agents.

    Args:
        retry_after_s: wait before the next try that the service asks for [s].
    """

    def __init__(self, how: str, retry_after_s: float | None = None):
        super().__init__(how)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolPolicy:
    timeout_s: float = 20.0
    """Time of one try [s]."""
    queue_timeout_s: float = 20.0
    """Time a try may wait for a slot; then the call fails without another [s]."""
    max_concurrent: int = 64
    """Slots: tries that run at once [calls]."""
    per_minute: float = 0.0
    """Most tries that begin in a minute, evenly spaced; 0 for no limit. Waiting for one's turn counts as waiting for a slot."""
    attempts: int = 3
    """Tries in all."""
    backoff_s: float = 0.5
    """Wait before the second try, doubled for each further; a random share of as much is added [s]."""
    cache: bool = True
    """Whether an answer may serve an identical call."""
    version: str = "1"
    """Change it when the tool answers differently: older answers no longer count."""
    secrets: tuple[str, ...] = field(default=(), repr=False)
    """Never shown to an agent: keys and passwords that the tool works with."""

    def __post_init__(self) -> None:
        for name in ("timeout_s", "queue_timeout_s", "max_concurrent", "attempts"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)} lets no call through: make it positive")
        if not all(self.secrets):
            raise ValueError("secrets holds an empty string, which is everywhere: is an environment variable unset?")


DEFAULT_POLICY = ToolPolicy()


class Broker:
    """Wraps tools. Made by `open_broker`."""

    def __init__(self, memory: Memory, file: CacheFile | None, mode: Mode, log: Callable[[str], None] | None):
        self._memory, self._file = memory, file
        self._mode: Mode = mode
        self._log = log
        self._writing = asyncio.Lock()
        self._file_is_full = False
        self._tools: dict[str, _Tool] = {}

    def wrap(self, spec: ToolSpec, policy: ToolPolicy = DEFAULT_POLICY, *, scope: str = "") -> ToolSpec:
        """`spec` under `policy`, for every agent. Once a tool: its slots and its answers are common to all who call.

        Args:
            scope: tells tools of one name apart that answer differently: searches of two corpora, say.

        Raises ValueError for a second tool of that name and scope or a signature that can't be checked, and UsageError for
        a tool without a cache in a replay, where nothing could answer.
        """
        identity = f"{scope}/{spec.name}" if scope else spec.name
        if identity in self._tools:
            raise ValueError(f"tool {identity!r} is wrapped already: hand out the first wrapping, or use another scope")
        if self._mode == "replay" and not policy.cache:
            raise UsageError(f"tool {spec.name!r} is never recorded (cache = False): leave it out of a replay")
        tool = self._tools[identity] = _Tool(identity, spec, policy, self._memory, self._file, self._mode, self._write)
        return replace(spec, call=tool.call)

    def running(self) -> dict[str, int]:
        """Flights under way, by the tool's name: calls without a cache are none."""
        flights: dict[str, int] = {}
        for tool in self._tools.values():
            flights[tool.name] = flights.get(tool.name, 0) + tool.running
        return flights

    def take_step(self) -> dict[str, float]:
        """{"tools/<name>/<figure>": ...} since the last call, summed over scopes; the figures are `Counts`."""
        taken: dict[str, float] = {}
        for tool in self._tools.values():
            for figure, value in asdict(tool.take_counts()).items():
                key = f"tools/{tool.name}/{figure}"
                taken[key] = taken.get(key, 0) + value
        return taken

    def complaints(self) -> list[str]:
        """For people, since the last `take_step`: a line for each tool that left most of its calls without an answer.

        Agents are told, and go on without; to who trains them it would be a policy that learns to do without.
        """
        return [line for tool in self._tools.values() if (line := tool.complaint())]

    async def _write(self, key: Key, answer: bytes) -> None:
        """Into the file, if there is one. A full disk, or a lock that stays, ends who records, and nobody else."""
        if self._file is None:
            return
        # one at a time: each may wait for a lock as long as the file lets it, and who reads waits behind them
        async with self._writing:
            if self._file_is_full:
                return
            try:
                await self._file.put(key, answer)
            except UsageError as e:
                if self._mode == "record" or self._log is None:
                    raise
                self._file_is_full = True
                self._log(f"{e}; until then nothing more is written there, and what tools answer is in memory alone")

    async def _end(self) -> None:
        tasks = [task for tool in self._tools.values() for task in tool.end()]
        if tasks:
            await asyncio.wait(tasks)


@asynccontextmanager
async def open_broker(
    cache_file: str | Path | None = None,
    mode: Mode = "use",
    *,
    max_entries: int = 100_000,
    max_bytes: int = 256 * 2**20,
    log: Callable[[str], None] | None = None,
) -> AsyncIterator[Broker]:
    """A broker with `max_entries` answers of together `max_bytes` in memory, and those of `cache_file`, if named, for good.

    Args:
        log: told once if the file can't be written any further, which is then no reason to end, unless mode is "record".

    Raises UsageError for a file that can't be used and for a mode that has no file; so do calls, later.
    """
    if not cache_file and mode != "use":
        raise UsageError(f"tool cache mode {mode!r} has no file to work with: name one")
    logging.getLogger("stamina").addHandler(_NO_LOG)
    file = await CacheFile.open(Path(cache_file), mode) if cache_file else None
    broker = Broker(Memory(max_entries, max_bytes), file, mode, log)
    try:
        yield broker
    finally:
        try:
            await broker._end()
        finally:
            if file is not None:
                await file.close()


@dataclass(slots=True)
class Counts:
    """What became of a tool's calls: calls = hits + shared + those that went on to the tool, or in a replay found nothing."""

    calls: int = 0
    """With arguments that fit."""
    hits: int = 0
    """Answered from memory or file."""
    shared: int = 0
    """Joined an identical call that was running."""
    retries: int = 0
    """Tries after a first."""
    failures: int = 0
    """Given up by the broker: passing failures that stayed, no slot, not in the recording."""
    errors: int = 0
    """ToolErrors of the tool's own: what it said it can't do."""
    queue_s: float = 0.0
    """Waited for slots, summed over tries [s]."""
    run_s: float = 0.0
    """In the tool, summed over tries [s]."""


class _Failed(Exception):
    """A try failed in a way that is the world's. Says how, without the text of the cause."""

    def __init__(self, how: str, again: bool, wait_s: float | None = None):
        super().__init__(how)
        self.again: bool | float = wait_s if again and wait_s is not None else again


class _Tool:
    """One wrapped tool: the path of a call, from top to bottom."""

    def __init__(
        self,
        identity: str,
        spec: ToolSpec,
        policy: ToolPolicy,
        memory: Memory,
        file: CacheFile | None,
        mode: Mode,
        write: Callable[[Key, bytes], Awaitable[None]],
    ):
        self.name = spec.name
        self._identity, self._spec, self._policy = identity, spec, policy
        self._memory, self._file, self._write = memory, file, write
        self._mode: Mode = mode
        self._normalise = normaliser(spec.name, spec.signature)
        self._version = ", ".join(filter(None, (policy.version, spec.version)))
        self._slots = _Slots(policy)
        self._flights: dict[str, _Flight] = {}
        self._tasks: set[asyncio.Task[bytes]] = set()
        self._blanked = _spellings(policy.secrets)
        self._counts = Counts()
        self._last_words = ""
        """Of the last call without an answer."""
        self._ended = False

    async def call(self, /, *args: Any, **kw: Any) -> Any:
        arguments = self._normalise(*args, **kw)
        if self._ended:
            raise RuntimeError(f"{self._spec.name}() was called after its broker was left")
        self._counts.calls += 1
        if not self._policy.cache:
            return orjson.loads(await self._tried(args, kw))
        key = Key(self._identity, self._version, arguments)
        if self._mode != "record" and (kept := self._memory.get(key)) is not None:
            self._counts.hits += 1
            return orjson.loads(kept)
        flight = self._flights.get(arguments)
        if flight is not None and not flight.task.done():
            self._counts.shared += 1
        else:
            flight = self._flights[arguments] = self._start(arguments, self._fetched(key, args, kw))
        return orjson.loads(await flight.join())

    @property
    def running(self) -> int:
        """Flights under way."""
        return len(self._tasks)

    def take_counts(self) -> Counts:
        taken, self._counts = self._counts, Counts()
        return taken

    def complaint(self) -> str:
        """Empty where most calls were answered, or few were made."""
        counts = self._counts
        made, missing = counts.calls - counts.hits - counts.shared, counts.failures + counts.errors
        if made < FEW_CALLS or missing <= made / 2:
            return ""
        # who asks too often is told so by this number
        hint = " (--tools.per-minute spaces calls out)" if " 429 " in f"{self._last_words} " else ""
        return f"{self._identity}() left {missing:,} of {made:,} calls without an answer, the last of them: {self._last_words}{hint}"

    def end(self) -> set[asyncio.Task[bytes]]:
        """Cancel every flight; the tasks to wait for."""
        self._ended = True
        for task in self._tasks:
            task.cancel()
        return set(self._tasks)

    def _start(self, arguments: str, fetched: Coroutine[Any, Any, bytes]) -> "_Flight":
        flight = _Flight(self._spec.name, asyncio.create_task(fetched), arguments, self._flights)
        self._tasks.add(flight.task)
        flight.task.add_done_callback(self._tasks.discard)
        flight.task.add_done_callback(lambda _: flight.forget())
        return flight

    async def _fetched(self, key: Key, args: tuple[Any, ...], kw: dict[str, Any]) -> bytes:
        """The answer from the file, or else from the tool; then it is kept."""
        if self._file is not None and self._mode != "record":
            recorded = await self._file.get(key)
            if recorded is not None:
                self._counts.hits += 1
                # it may have been recorded when less was secret
                recorded = self._without_secrets(recorded)
                self._memory.put(key, recorded)
                return recorded
            if self._mode == "replay":
                raise self._given_up(
                    f"the recording has no answer to this call of {self._spec.name}(): make one it has"
                )
        answer = await self._tried(args, kw)
        self._memory.put(key, answer)
        await self._write(key, answer)
        return answer

    async def _tried(self, args: tuple[Any, ...], kw: dict[str, Any]) -> bytes:
        """The tool's answer, after as many tries as it takes and gets. Raises ToolError, and bugs as they are."""
        policy, num = self._policy, 0
        try:
            return await self._try(args, kw)
        except _Failed as e:
            first = e
        # nearly every call is over by now: making a retry context costs more than all else that the broker does
        try:
            async for attempt in stamina.retry_context(
                lambda e: e.again if isinstance(e, _Failed) else False,
                attempts=policy.attempts,
                timeout=None,
                wait_initial=policy.backoff_s,
                wait_jitter=policy.backoff_s,
                wait_max=MAX_BACKOFF_S,
            ):
                num += 1
                self._counts.retries += num > 1
                with attempt:
                    if num == 1:
                        raise first
                    return await self._try(args, kw)
        except _Failed as e:
            tries = "1 attempt" if num == 1 else f"{num} attempts"
            # a tool's own words may hold a key, in an address say
            how = self._blank(whole(str(e)))
            raise self._given_up(
                f"{self._spec.name}() gave no answer in {tries} ({how}): try later, or do without"
            ) from e
        raise AssertionError("stamina ended without an outcome")

    def _given_up(self, words: str) -> ToolError:
        self._counts.failures += 1
        self._last_words = words
        return ToolError(words)

    async def _try(self, args: tuple[Any, ...], kw: dict[str, Any]) -> bytes:
        """One try, in a slot. Raises ToolError, _Failed for what else is the world's, and bugs."""
        await self._queue()
        began, thread = time.perf_counter(), None
        limit, task = asyncio.timeout(self._policy.timeout_s), asyncio.current_task()
        assert task is not None
        cancels = task.cancelling()
        try:
            async with limit:
                if isinstance(self._spec.call, InThread):
                    thread = self._spec.call.begin(*args, **kw)
                    result = (await asyncio.shield(thread)).result()
                    # of a coroutine function in a wrapper it shows only now
                    result = await result if inspect.isawaitable(result) else result
                else:
                    result = await self._spec.call(*args, **kw)
            return self._without_secrets(self._said(result))
        except asyncio.CancelledError as e:
            if task.cancelling():
                raise
            # it would end whoever waits without a trace
            raise RuntimeError(f"tool {self.name} raised CancelledError, though nobody cancelled it") from e
        except Exception as e:
            told = self._told(e, timed_out=limit.expired() and isinstance(e, TimeoutError))
            if isinstance(told, _Failed) and task.cancelling() > cancels:
                # a tool's last words must not undo the cancelling
                raise asyncio.CancelledError from e
            if told is e:
                raise
            raise told from e
        finally:
            self._slots.give_back(thread)
            self._counts.run_s += time.perf_counter() - began

    async def _queue(self) -> None:
        began = time.perf_counter()
        try:
            await self._slots.take()
        except TimeoutError as e:
            raise _Failed(f"no free slot within {self._policy.queue_timeout_s:g} s", again=False) from e
        finally:
            self._counts.queue_s += time.perf_counter() - began

    def _told(self, e: Exception, *, timed_out: bool) -> Exception:
        """What is raised instead of a tool's exception; itself where it is a bug."""
        if isinstance(e, ToolError):
            self._counts.errors += 1
            self._last_words = self._blank(whole(str(e)))
            return ToolError(self._last_words)
        if isinstance(e, TypeError):
            # to its callers a TypeError would be the agent's mistake, and its arguments were right
            return RuntimeError(f"tool {self.name} failed: {e}")
        if isinstance(e, Passing):
            return _Failed(str(e), again=True, wait_s=e.retry_after_s)
        # TimeoutError is one
        if isinstance(e, OSError):
            how = f"timeout after {self._policy.timeout_s:g} s" if timed_out else type(e).__name__
            return _Failed(how, again=True)
        return e

    def _said(self, result: Any) -> bytes:
        """As JSON. Raises ToolError for an integer too large, UsageError for what else JSON can't say."""
        try:
            try:
                return orjson.dumps(result, default=_plain)
            except TypeError as e:
                if "surrogates" not in str(e):
                    raise
                return orjson.dumps(_mapped(result, whole), default=_plain)
        except TypeError as e:
            if "64-bit" in str(e):
                raise ToolError(f"{self.name}() found an integer beyond 64 bits, which it can't hand over") from e
            raise UsageError(
                f"the tool {self.name} gave {self._blank(repr(result))[:200]}, which JSON can't say ({e}): return text, "
                "numbers, booleans, None, lists, and dicts whose keys are text"
            ) from e

    def _without_secrets(self, answer: bytes) -> bytes:
        return orjson.dumps(_mapped(orjson.loads(answer), self._blank)) if self._blanked else answer

    def _blank(self, text: str) -> str:
        for spelling in self._blanked:
            text = text.replace(spelling, "***")
        return text


class _Slots:
    """How many tries run at once, and when the next one may begin."""

    def __init__(self, policy: ToolPolicy):
        self._free = asyncio.Semaphore(policy.max_concurrent)
        self._timeout_s = policy.queue_timeout_s
        self._apart_s = 60 / policy.per_minute if policy.per_minute else 0.0
        self._next_turn = 0.0
        """On the loop's clock."""

    async def take(self) -> None:
        """Raises TimeoutError where none is free in time, or its turn comes too late."""
        if not self._apart_s and not self._free.locked():
            # nothing to wait for, and a deadline would cost more than the slot
            await self._free.acquire()
            return
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        async with asyncio.timeout_at(deadline):
            await self._free.acquire()
            try:
                # with the slot in hand: turns that passed while a slot was waited for would be taken all at once
                await self._turn(deadline)
            except BaseException:
                self._free.release()
                raise

    def give_back(self, thread: "asyncio.Future[Any] | None") -> None:
        """At once, or when the thread that has it returns."""
        if thread is None or thread.done():
            self._free.release()
        else:
            thread.add_done_callback(lambda _: self._free.release())

    async def _turn(self, deadline: float) -> None:
        if not self._apart_s:
            return
        now = asyncio.get_running_loop().time()
        begin = max(now, self._next_turn)
        if begin > deadline:
            # it would give up before its turn came: somebody else may have it
            raise TimeoutError
        self._next_turn = begin + self._apart_s
        await asyncio.sleep(begin - now)


class _Flight:
    """A running call and how many wait for it."""

    def __init__(self, name: str, task: asyncio.Task[bytes], arguments: str, flights: "dict[str, _Flight]"):
        self.task = task
        self._name, self._arguments, self._flights, self._num_waiters = name, arguments, flights, 0

    def forget(self) -> None:
        """Whoever calls from now on gets another one."""
        if self._flights.get(self._arguments) is self:
            del self._flights[self._arguments]

    async def join(self) -> bytes:
        me = asyncio.current_task()
        assert me is not None
        self._num_waiters += 1
        try:
            return await asyncio.shield(self.task)
        except asyncio.CancelledError as e:
            if self.task.cancelled() and not me.cancelling():
                raise RuntimeError(f"the broker was left while {self._name}() was running") from e
            raise
        finally:
            self._num_waiters -= 1
            if not self._num_waiters and not self.task.done():
                await self._abandon()

    async def _abandon(self) -> None:
        # first: a caller that comes now must not join
        self.forget()
        self.task.cancel()
        await asyncio.wait([self.task])
        # the world's failures no longer matter to anyone; a bug does
        if not self.task.cancelled() and not isinstance(e := self.task.exception(), ToolError | None):
            raise e


def _spellings(secrets: tuple[str, ...]) -> list[str]:
    """The secrets as they may appear, longest first: one may be part of another."""
    spelled = {s for secret in secrets for s in (secret, quote(secret), quote(secret, safe=""), quote_plus(secret))}
    return sorted(spelled, key=len, reverse=True)


def _plain(value: Any) -> Any:
    """Of what JSON has no word for: NumPy's and torch's numbers and arrays, sets, always in one order. Raises TypeError."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, set | frozenset):
        try:
            return sorted(value)
        except TypeError:
            return sorted(value, key=repr)
    raise TypeError(f"{type(value).__name__} is not JSON-like")


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """`value` with every string in it changed, keys too."""
    match value:
        case str():
            return change(value)
        case list() | tuple():
            return [_mapped(item, change) for item in value]
        case dict():
            return {change(key) if isinstance(key, str) else key: _mapped(item, change) for key, item in value.items()}
        case _ if is_dataclass(value) and not isinstance(value, type):
            return _mapped(asdict(value), change)
        case set() | frozenset() | object(tolist=_):
            return _mapped(_plain(value), change)
    return value
