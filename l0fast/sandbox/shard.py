"""One zygote and its sessions, seen from the host.

    launch -> config -> ready -> [start + descriptors -> started ... kill -> ended] x n -> close the control socket -> exit

One writer (`_flush`) and one reader (`_readable`) per control socket; both run in the event loop and never block.
Whatever ends a shard (its exit, its silence, `close`) ends in `_fail`, which gives every session's waiter its
SandboxError; then `Launched.clean` removes what a killed zygote could not.
"""

import asyncio
import itertools
import os
import socket
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from l0fast.errors import SandboxError, boundary
from l0fast.sandbox.base import ToolSpec
from l0fast.sandbox.channel import Channel
from l0fast.sandbox.output import OutputFile
from l0fast.sandbox.task_files import opened

CLOSE_TIMEOUT_S = 15.0
"""Time a zygote has to end its sessions and exit, or to end one session, before it is killed [s]."""


class Launched(Protocol):
    """A zygote that has been started, whatever it runs in."""

    pid: int
    """Of the process that was started."""
    control: socket.socket
    """This side of the control socket: SEQPACKET, not blocking."""

    async def exited(self) -> str:
        """Wait until it has gone; the end of what it said on stderr."""
        ...

    def kill(self) -> None: ...

    async def clean(self, pids: list[int]) -> None:
        """After its exit: end what is left of the sessions with these first processes, and remove their folders."""
        ...


class Backend(Protocol):
    kind: str
    name: str
    """For a reader: "bwrap", "docker (Docker 20.10, python:3.12-slim)"."""
    config: dict[str, Any]
    """What every zygote is told: limits, preloads, paths. `launch` adds what is its own."""
    lacks: tuple[str, ...]
    """What it does not give, for a reader: "a limit on disk"."""

    async def open(self) -> None:
        """What has to be done once before the first launch. Raises SandboxError."""
        ...

    async def close(self) -> None:
        """Let go of what `open` took, or was taking."""
        ...

    async def launch(self) -> tuple[Launched, dict[str, Any]]:
        """Start a zygote; it, and the config to send to it. Raises SandboxError and OSError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the zygote found out about this machine."""

    python: str
    landlock: int
    """ABI; 0 where there is none."""
    seccomp: bool
    own_uids: bool
    """Each session has a uid that no other process has."""


class Lease:
    """A session's place in a shard. Its holder owes it an `end`."""

    def __init__(self, sid: int, sock: socket.socket, output: OutputFile, ended: "asyncio.Future[None]"):
        self.sid = sid
        self.channel = Channel(sock)
        self.output = output
        self.ended = ended
        self.pid: int | None = None
        """Of its first process, as the zygote numbers it."""


class Shard:
    def __init__(self, launched: Launched, config: dict[str, Any]):
        self.config = config
        """What the zygote was told."""
        self.launched = launched
        self._control = launched.control
        self._loop = asyncio.get_running_loop()
        self._sids = itertools.count()
        # half of the uids are for the zygote's own use, and one is for its trial
        self.starts_left: int | None = None if config["uid_base"] is None else config["uid_count"] // 2 - 1
        self.places = 1
        """Sessions that it may have at once."""
        self._leases: dict[int, Lease] = {}
        self._outbox: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._writing = False
        self._ready: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._dead: asyncio.Future[SandboxError] = self._loop.create_future()
        self._retired: asyncio.Future[None] = self._loop.create_future()
        self._finished: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._control.fileno(), self._readable)
        self.report: Report
        self.on_change = lambda: None
        """Called when a place has become free, or all have gone."""

    @classmethod
    async def start(cls, backend: Backend, timeout_s: float) -> "Shard":
        """A shard that is ready for sessions. Raises SandboxError with the zygote's own words."""
        try:
            async with asyncio.timeout(timeout_s) as limit:
                with boundary(SandboxError, f"start a {backend.kind} zygote"):
                    launched, config = await backend.launch()
        except TimeoutError as e:
            raise SandboxError(f"a {backend.kind} sandbox did not start within {timeout_s:g} s") from e
        shard = cls(launched, config)
        try:
            shard._post(orjson.dumps(config))
            async with asyncio.timeout_at(limit.when()):
                ready = await shard._ready
            if ready["problem"]:
                raise SandboxError(f"a {backend.kind} sandbox does not work here: {ready['problem']}")
        except TimeoutError as e:
            await shard.close(kill=True)
            raise SandboxError(f"a {backend.kind} sandbox did not start within {timeout_s:g} s") from e
        except SandboxError as e:
            await shard.close(kill=True)
            words = await launched.exited()
            raise SandboxError(f"{e}: {words.splitlines()[-1]}" if words else str(e)) from e
        except BaseException:
            await shard.close(kill=True)
            raise
        shard.report = Report(
            python=ready["python"],
            landlock=ready["landlock"],
            seccomp=ready["seccomp"],
            own_uids=config["uid_base"] is not None,
        )
        return shard

    @property
    def load(self) -> int:
        """Sessions that have not ended."""
        return len(self._leases)

    @property
    def open(self) -> bool:
        """Takes new sessions: alive, and with uids left that were never used."""
        return not self._dead.done() and self.starts_left != 0

    def retire_after(self, sessions: int) -> None:
        """Take no more than so many sessions from now on; the shard has then finished."""
        self.starts_left = sessions if self.starts_left is None else min(sessions, self.starts_left)

    async def retired(self) -> None:
        """Wait until the shard is lost, or has no uid left and fewer sessions than places: another may give the rest of them."""
        await asyncio.shield(self._retired)

    async def finished(self) -> None:
        """Wait until the shard is lost, or has neither sessions nor uids left."""
        await asyncio.shield(self._finished)

    @property
    def over(self) -> bool:
        """Whether it has finished."""
        return self._finished.done()

    async def lease(self, tools: Iterable[ToolSpec], seed: int, timeout_s: float, files: Mapping[str, str]) -> Lease:
        """Fork a session. Raises SandboxError; UsageError where the files can't be had."""
        assert self.open
        with boundary(SandboxError, "start a session"), opened(files) as (names, fds):
            return await self._fork(tools, seed, timeout_s, names, fds)

    async def _fork(
        self, tools: Iterable[ToolSpec], seed: int, timeout_s: float, names: list[str], fds: list[int]
    ) -> Lease:
        ours, theirs = socket.socketpair()
        try:
            lease = Lease(next(self._sids), ours, OutputFile(), self._loop.create_future())
        except BaseException:
            ours.close()
            theirs.close()
            raise
        self._leases[lease.sid] = lease
        # before anything is waited for: another lease may begin meanwhile
        if self.starts_left is not None:
            self.starts_left -= 1
            self._look()
        posted = False
        passed: list[int] = []
        try:
            ours.setblocking(False)
            await self._loop.create_unix_connection(lambda: lease.channel, sock=ours)
            # all at once: the session finds its first frame waiting when it comes to life
            specs = [{"name": t.name, "signature": t.signature, "doc": t.doc} for t in tools]
            ready = lease.channel.open(specs, seed)
            start = orjson.dumps({"op": "start", "sid": lease.sid, "files": names})
            passed.append(theirs.detach())
            for fd in (lease.output.fd, *fds):
                passed.append(os.dup(fd))
            self._post(start, *passed)
            posted = True
            async with asyncio.timeout(timeout_s):
                await ready
        except BaseException:
            if posted:
                await self.end(lease)
            else:
                # its transport first, if there is one: a loop must not watch a socket that has been closed
                lease.channel.lose(SandboxError("the session was not started"))
                ours.close()
                theirs.close()
                for fd in passed:
                    os.close(fd)
                lease.output.close()
                del self._leases[lease.sid]
                # the zygote knows nothing of it: the place is free, and its start can still be had
                if self.starts_left is not None and not self._retired.done():
                    self.starts_left += 1
                self._look()
                self.on_change()
            raise
        return lease

    def kill(self, lease: Lease) -> None:
        """End a session now; `end` is still owed."""
        if lease.sid in self._leases:
            self._post(orjson.dumps({"op": "kill", "sid": lease.sid}))

    async def end(self, lease: Lease) -> None:
        """End a session and all it started; back when no process of it is left. Its folder is then being removed."""
        lease.channel.lose(SandboxError("the session has been closed"))
        lease.output.close()
        self.kill(lease)
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                # shielded: whoever is cancelled here leaves the rest to `_received`, which frees the place
                await asyncio.shield(lease.ended)
        except TimeoutError:
            self._fail(SandboxError(f"the zygote did not end a session within {CLOSE_TIMEOUT_S:g} s"))

    async def close(self, *, kill: bool = False) -> None:
        """End the zygote and all sessions; back when no process and no folder of it is left."""
        self._fail(SandboxError("the sandbox has been closed"))
        pids = [lease.pid for lease in self._leases.values() if lease.pid is not None]
        if kill:
            self.launched.kill()
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self.launched.exited()
        except TimeoutError:
            self.launched.kill()
            await self.launched.exited()
        await self.launched.clean(pids)

    # -- the control socket

    def _post(self, message: bytes, *fds: int) -> None:
        if self._dead.done():
            for fd in fds:
                os.close(fd)
            return
        self._outbox.append((message, fds))
        if not self._writing:
            self._flush()

    def _flush(self) -> None:
        while self._outbox:
            message, fds = self._outbox[0]
            try:
                socket.send_fds(self._control, [message], fds)
            except BlockingIOError:
                if not self._writing:
                    self._writing = True
                    self._loop.add_writer(self._control.fileno(), self._flush)
                return
            except OSError as e:
                self._fail(SandboxError(f"the zygote has gone: {e.strerror}"))
                return
            self._outbox.popleft()
            for fd in fds:
                os.close(fd)
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._control.fileno())

    def _readable(self) -> None:
        while not self._dead.done():
            try:
                data = self._control.recv(64 * 1024)
            except BlockingIOError:
                return
            except OSError as e:
                self._fail(SandboxError(f"the zygote has gone: {e.strerror}"))
                return
            if not data:
                self._fail(SandboxError("the zygote of this session's shard has ended"))
                return
            self._received(orjson.loads(data))

    def _received(self, message: dict[str, Any]) -> None:
        match message:
            case {"ev": "ready"}:
                self._ready.set_result(message)
            case {"ev": "started", "sid": sid, "pid": pid}:
                self._leases[sid].pid = pid
            case {"ev": "ended", "sid": sid, "status": status, "error": error}:
                lease = self._leases.pop(sid)
                lease.channel.lose(SandboxError(f"the session ended by itself ({error or f'exit status {status}'})"))
                lease.ended.set_result(None)
                self._look()
                self.on_change()

    def _look(self) -> None:
        """Whether it has retired by now, and finished."""
        if self.starts_left == 0 and self.load < self.places:
            _settle(self._retired)
            if not self._leases:
                _settle(self._finished)

    def _fail(self, error: SandboxError) -> None:
        if self._dead.done():
            return
        self._dead.set_result(error)
        fd = self._control.fileno()
        self._loop.remove_reader(fd)
        if self._writing:
            self._loop.remove_writer(fd)
        self._control.close()
        for _, fds in self._outbox:
            for fd in fds:
                os.close(fd)
        self._outbox.clear()
        for lease in self._leases.values():
            lease.channel.lose(error)
            lease.ended.set_result(None)
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()
        _settle(self._retired)
        _settle(self._finished)
        self.on_change()


def _settle(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
