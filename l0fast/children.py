"""A program of someone else's as a child: it ends with the block, with us if we are killed, and with its last words told.

    async with child(module, ...) as process:     # its own session: Ctrl-C reaches us alone, and all it starts ends with it
        ...

`output_of` runs a module for what it prints. Workers, which speak frames over a socket, are ipc.spawn_worker's.
"""

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from l0fast.errors import EngineError, L0fastError

TAIL_LINES = 40
"""Last lines that are kept."""

_BOOT = (
    "import ctypes, os, runpy, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "parent, module = int(sys.argv[1]), sys.argv[2]; sys.argv[:] = sys.argv[2:]; "
    "os.getppid() == parent or sys.exit('the parent is gone'); "
    "runpy.run_module(module, run_name='__main__', alter_sys=True)"
)
"""Runs a module that is told to end (SIGTERM) when we are no more."""


class Child:
    """Made by `child`."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, on_line: Callable[[str], None]):
        self.name, self.pid = name, process.pid
        self._process, self._on_line = process, on_line
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self.reading = asyncio.create_task(self._read(), name=f"read what {name} says")

    async def wait(self) -> int:
        """Its exit code, once it has ended."""
        return await self._process.wait()

    @property
    def last_line(self) -> str:
        return self._tail[-1] if self._tail else ""

    async def died(self) -> EngineError:
        """What to raise when it ended by itself."""
        # what it started may hold its output open
        await asyncio.wait([self.reading], timeout=1.0)
        words = "\n".join(f"  {line}" for line in self._tail) or "  nothing"
        return EngineError(f"{self.name} ended with code {self._process.returncode}; its last words:\n{words}")

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in _lines(self._process.stdout):
            self._tail.append(line)
            self._on_line(line)


@asynccontextmanager
async def child(
    module: str,
    *args: str,
    name: str,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] = lambda line: None,
    close_timeout_s: float = 10.0,
) -> AsyncIterator[Child]:
    """Run `python -m module args` for as long as the `async with` body runs.

    Args:
        name: how errors call it.
        env: besides our own environment.
        on_line: told each line it prints.
        close_timeout_s: time it has to end after SIGTERM, before it and all of its session are killed [s].
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        # -P: the folder it runs in holds no modules
        *("-P", "-c", _BOOT, str(os.getpid()), module, *args),
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path))), **(env or {})},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    started = Child(name, process, on_line)
    try:
        yield started
    finally:
        await asyncio.shield(_end(process, started.reading, close_timeout_s))


async def output_of(module: str, *args: str, error: type[L0fastError], without: str, timeout_s: float) -> str:
    """What `python -m module args` prints, without holding up the loop.

    Args:
        without: what there is none of when it fails, as its error begins: "no advice on runs/x".

    Raises:
        error: it could not be started, failed, with its last line, or took longer than `timeout_s` [s].
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, *args),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as e:
        # no memory for another process, or no number
        raise error(f"{without} ({e})") from e
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate()
    except TimeoutError as e:
        raise error(f"{without} within {timeout_s:g} s") from e
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        said = err.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise error(f"{without} (exit code {process.returncode}): {said[-1]}")
    return out.decode()


async def _end(process: asyncio.subprocess.Process, reading: asyncio.Task[None], close_timeout_s: float) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(close_timeout_s):
                await process.wait()
    # what it started and did not end itself
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
    # the last words; whoever left its session may hold its output open still
    await asyncio.wait([reading], timeout=1.0)
    reading.cancel()
    await asyncio.wait([reading])


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines however long, ended as progress bars end them too."""
    rest = ""
    while data := await stream.read(1 << 16):
        *whole, rest = (rest + data.decode(errors="replace")).replace("\r", "\n").split("\n")
        rest = rest[-4096:]
        for line in whole:
            if line.strip():
                yield line.rstrip()[:4096]
    if rest.strip():
        yield rest.rstrip()
