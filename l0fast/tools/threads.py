"""A function that blocks, as a tool or a reward: each call in a thread of its own.

asyncio's own threads are a few, and shared with all that reads files and cleans up; and both asyncio and Python wait for a
pool's threads before they end. A thread that hangs can't be ended: here it keeps nobody waiting but those who want its slot
(broker.py), which is free again when the thread has returned. So there are never more threads than slots.
"""

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any


class InThread:
    """`function` as a `HostTool`."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    async def __call__(self, /, *args: Any, **kw: Any) -> Any:
        return (await asyncio.shield(self.begin(*args, **kw))).result()

    def begin(self, /, *args: Any, **kw: Any) -> "asyncio.Future[Future[Any]]":
        """Start a thread. Done when it has returned, with what came out: that an error came late is nobody's news."""
        loop, context = asyncio.get_running_loop(), contextvars.copy_context()
        returned: asyncio.Future[Future[Any]] = loop.create_future()

        def run() -> None:
            outcome: Future[Any] = Future()
            try:
                outcome.set_result(context.run(self._function, *args, **kw))
            except BaseException as e:  # noqa: BLE001 - raised where the outcome is asked for
                outcome.set_exception(e)
            # the loop may have ended meanwhile
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(returned.set_result, outcome)

        threading.Thread(target=run, name=f"{getattr(self._function, '__name__', 'function')}()", daemon=True).start()
        return returned
