"""One agent's session, seen from the host: cells in, results out, its tool calls answered in between."""

import asyncio
import time
from collections.abc import Callable, Mapping

from l0fast.errors import SandboxError, ToolError
from l0fast.sandbox.base import CELL_TIMEOUT_S, CellError, CellResult, ToolSpec
from l0fast.sandbox.channel import Call, Done, Event, Files, ProtocolError
from l0fast.sandbox.launch import OUTPUT_BYTES
from l0fast.sandbox.shard import Lease

MAX_CALLS = 64
"""Tool calls one cell may make; more are answered with ToolError, and twice as many end the session."""


class PoolSession:
    """Cells run in the coroutine that asks for them, and so do their tool calls: cancelling it stops both.

    Two time limits a cell. The soft one is raised inside it as `Timeout`, and the session goes on; a tool that is
    still running then is cancelled. The hard one, `grace_s` later, is for cells that can't be interrupted (a C loop, a
    stopped process, a swallowed Timeout): it ends the session, and SandboxError is raised.
    """

    def __init__(self, lease: Lease, tools: Mapping[str, ToolSpec], *, end: Callable[[], None], grace_s: float):
        self.lease = lease
        self._channel = lease.channel
        self._loop = asyncio.get_running_loop()
        self._tools = {spec.name: spec for spec in tools.values()}
        self._end = end
        self._grace_s = grace_s

    async def execute(self, code: str, *, timeout_s: float = CELL_TIMEOUT_S) -> CellResult:
        """Run one cell; state stays for the next.

        A cell that fails or times out is a result with an `error`. Raises SandboxError where the session is lost, and
        whatever a tool raised that isn't ToolError or TypeError, after ending the session.
        """
        if not timeout_s > 0:
            raise ValueError(f"timeout_s = {timeout_s} leaves a cell no time: give a positive number of seconds")
        channel = self._channel
        if channel.busy:
            raise RuntimeError("a session runs one cell at a time: await the last execute() before the next")
        began = time.perf_counter()
        soft = self._loop.time() + timeout_s
        hard = soft + self._grace_s
        limit = None
        try:
            answer = channel.execute(code, timeout_s)
            channel.lose_at(hard, lambda: self._late(timeout_s))
            event = await answer
            if isinstance(event, Call):
                # what a tool does with its time is not the channel's to end
                async with asyncio.timeout_at(hard) as limit:
                    calls = 0
                    while isinstance(event, Call):
                        calls += 1
                        event = await self._answer(event, calls, soft)
            # an answer with something forbidden right behind it is no answer
            channel.check()
        except BaseException as e:
            expired = limit is not None and limit.expired()
            self._give_up(e, expired, self._late(timeout_s), left="in the middle of a cell")
            raise
        assert isinstance(event, Done)
        error = CellError(name=event.error[0], value=event.error[1], traceback=event.error[2]) if event.error else None
        text = self.lease.output.take(OUTPUT_BYTES, event.dropped)
        return CellResult(output=text, error=error, wall_s=time.perf_counter() - began)

    async def collect(self, *, max_files: int = 64, max_bytes: int = 4 << 20) -> dict[str, bytes]:
        """What the agent has left in its folder. See `Session.collect`."""
        late = f"it did not tell its files within {self._grace_s:g} s"
        try:
            answer = self._channel.collect(max_files, max_bytes)
            self._channel.lose_at(self._loop.time() + self._grace_s, lambda: late)
            event = await answer
            self._channel.check()
            assert isinstance(event, Files)
            if len(event.files) > max_files or sum(size for _, size in event.files) > max_bytes:
                raise ProtocolError("the session told more files than it was asked for")
        except BaseException as e:
            self._give_up(e, False, late, left="while it told its files")
            raise
        data = self.lease.output.take_bytes(max_bytes)
        files, start = {}, 0
        for name, size in event.files:
            files[name] = data[start : start + size]
            start += size
        return files

    def _late(self, timeout_s: float) -> str:
        return f"its cell did not stop within {self._grace_s:g} s of its {timeout_s:g} s"

    def _give_up(self, e: BaseException, expired: bool, late: str, *, left: str) -> None:
        """End the session for what came in between. Raises SandboxError where that was its own deadline."""
        error = SandboxError(f"the session was left {left}")
        timed_out = expired and isinstance(e, TimeoutError)
        if timed_out:
            error = SandboxError(f"the session was ended: {late}")
        elif isinstance(e, ProtocolError):
            error = e
        # before anything else: a cell that nobody waits for must not go on
        self._channel.lose(error)
        self._end()
        if timed_out:
            raise error from e

    async def _answer(self, call: Call, calls: int, soft: float) -> Event:
        spec = self._tools.get(call.name)
        if spec is None:
            raise ProtocolError(f"the session called {call.name[:80]!r}, a tool it does not have")
        if calls > MAX_CALLS:
            if calls > 2 * MAX_CALLS:
                raise ProtocolError(f"the session made more than {2 * MAX_CALLS} tool calls in one cell")
            return await self._channel.answer(
                call.id, error=("ToolError", f"a cell may make at most {MAX_CALLS} tool calls")
            )
        limit = asyncio.timeout_at(soft)
        try:
            async with limit:
                value = await spec.call(*call.args, **call.kw)
        except (ToolError, TypeError) as e:
            return await self._channel.answer(call.id, error=(type(e).__name__, str(e)))
        except TimeoutError:
            if not limit.expired():
                raise
            return await self._channel.answer(
                call.id, error=("Timeout", f"the cell ran out of time while it waited for {call.name}()")
            )
        return await self._channel.answer(call.id, value=value)
