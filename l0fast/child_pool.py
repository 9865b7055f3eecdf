"""Work that may burn a core, grow or go on for ever, in child processes that can be killed: pebble's pool, made async.

For libraries that take what strangers wrote: sympy an expression, a PDF reader a file. A child is started at the first
call, with its imports done before a call's time begins, and dies with the driver. One that ends is followed by another,
whatever it was at.
"""

import asyncio
import ctypes
import multiprocessing
import resource
import signal
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, CancelledError
from typing import Any, ParamSpec, TypeVar

from l0fast.cgroups import cores
from l0fast.errors import UsageError, WorldError

P = ParamSpec("P")
T = TypeVar("T")

_PR_SET_PDEATHSIG = 1


class ChildPool:
    """
    Args:
        doing: what for, as errors put it: "comparing expressions".
        needs: what to install where pebble is missing.
        initializer: run in each child before its first call: its imports.
        timeout_s: time of one call [s].
        memory_bytes: address space of a child; 0 for no limit.
    """

    def __init__(
        self,
        doing: str,
        *,
        needs: str,
        initializer: Callable[[], None],
        timeout_s: float,
        memory_bytes: int = 0,
    ):
        self._doing, self._needs, self._timeout_s = doing, needs, timeout_s
        self._initargs = (initializer, memory_bytes)
        self._pool: Any = None
        self._starting = asyncio.Lock()

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`function(*args)` in a child.

        Raises:
            TimeoutError: it took too long, and its child was killed.
            UsageError: a package is missing.
            WorldError: the child could not be started, or ended.
            Exception: what `function` raised.
        """
        async with self._starting:
            if self._pool is not None and not self._pool.active:
                # to pebble a child that ended while it had nothing to do, killed where memory is short, is the end of them all
                await self.close()
            if self._pool is None:
                self._pool = await asyncio.to_thread(self._start)
        from pebble import ProcessExpired

        future = self._pool.schedule(function, args=args, kwargs=kwargs, timeout=self._timeout_s)
        try:
            return await asyncio.wrap_future(future)
        except (BrokenExecutor, CancelledError, ProcessExpired) as e:
            raise WorldError(f"the process for {self._doing} ended: {e or type(e).__name__}") from e

    async def close(self) -> None:
        """Kill the children."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.stop()
            await asyncio.to_thread(pool.join)

    def _start(self) -> Any:
        try:
            from pebble import ProcessPool
        except ImportError as e:
            raise UsageError(f"{self._doing} needs pebble: {self._needs}") from e
        return ProcessPool(
            max_workers=max(1, min(8, cores() // 4)),
            initializer=_start_child,
            initargs=self._initargs,
            context=multiprocessing.get_context("spawn"),
        )


def _start_child(initializer: Callable[[], None], memory_bytes: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Ctrl-C is the driver's
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    initializer()
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
