"""Zygotes in containers: a shard is a container whose PID 1 is the zygote.

    create -> attach to its stderr -> start -> the zygote connects to the control socket -> config, sessions, ...
    close the control socket -> the zygote ends its sessions and exits -> the container ends and removes itself

The daemon does lifecycle alone. Cells, tool calls, starts and ends of sessions go straight between the event loop and the
container, so a daemon that is slow costs no running session anything. What a container gets: no network, a read-only
root, no capability but SETUID and SETGID, no new privileges, no IPC, limits on memory and processes, a tmpfs of limited
size for the sessions' folders, no log.

What survives a driver that is killed: nothing that runs. The kernel closes its control sockets, the zygotes exit, the
containers remove themselves. Killed in the middle of a launch it leaves a folder with a socket, perhaps a container that
was never started; both tell whose they were, and the next start removes them (`sweep`).

Not covered: kernel bugs (`sandbox.runtime = "runsc"` puts gVisor in between), one session taking its siblings' CPU
time or, up to the shard's limit, their memory (`sandbox.sessions_per_shard = 1` gives each agent a container).
"""

import asyncio
import os
import signal
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from aiodocker.containers import DockerContainer
from aiodocker.exceptions import DockerError

from l0fast.config import SandboxConfig
from l0fast.errors import SandboxError
from l0fast.sandbox.daemon import Daemon, daemon_boundary
from l0fast.sandbox.daemon import daemon as connect
from l0fast.sandbox.guest.files import remove_tree
from l0fast.sandbox.image import ensure_image
from l0fast.sandbox.launch import BOOT, ETC, FOLDER_MB_PER_SESSION, GUEST, SYSTEM, Uids, environment, guest_config

LABEL = "l0fast.driver"
"""Of every container: which process of which boot it belongs to."""
REQUEST_TIMEOUT_S = 15.0
"""Time the daemon has for one request [s]."""
SHARD_MB, SHARD_MB_PER_SESSION = 512, 24
"""Memory of a container [MiB]."""
INODES_PER_SESSION = 2048
CPU_SHARES = 335
"""Of a container, where the driver has 1,024: what nice 5 is (see the zygote's `_stand_back`)."""
_LAST_WORDS = 4096


class DockerLaunched:
    """A zygote in a container. Watched by a pidfd of its process, which needs no daemon."""

    def __init__(
        self,
        backend: "DockerBackend",
        container: DockerContainer,
        control: socket.socket,
        pid: int,
        words: "asyncio.Task[str]",
        uids: Uids,
    ):
        self.control = control
        self.pid = pid
        self.container = container
        self._backend = backend
        self._words = words
        self._uids = uids
        self._loop = asyncio.get_running_loop()
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._killer: asyncio.Task[None] | None = None
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._gone.set_result(None)
        else:
            self._loop.add_reader(self._pidfd, self._exited)

    def _exited(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._gone.set_result(None)

    async def exited(self) -> str:
        await asyncio.shield(self._gone)
        # told by the daemon, which may be the one that has gone
        await asyncio.wait((self._words,), timeout=1.0)
        return self._words.result() if self._words.done() else ""

    def kill(self) -> None:
        if self._gone.done():
            return
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except PermissionError:
            # another user's process, as far as this one may see: the daemon may
            self._killer = asyncio.create_task(self._backend.remove(self.container))

    async def clean(self, pids: list[int]) -> None:
        # PID 1 has taken all processes and the tmpfs along; the container's record goes by itself, or goes now
        try:
            if self._killer is not None:
                await self._killer
            await self._backend.remove(self.container)
        finally:
            self._words.cancel()
            self._uids.close()


class DockerBackend:
    """Starts containers of the image in `config`, which is pulled where it is missing.

    Args:
        log: told what takes long (a pull), and of a container that could not be removed.
    """

    kind = "docker"

    def __init__(self, config: SandboxConfig, *, log: Callable[[str], None]):
        self.name = "docker"
        self.config = guest_config(config)
        self.lacks: tuple[str, ...] = ()
        self._settings = config
        self._log = log
        self._stack = AsyncExitStack()
        self._daemon: Daemon
        self._image: str

    async def open(self) -> None:
        """Find the daemon and the image; remove what drivers that have gone left. Raises SandboxError."""
        settings = self._settings
        self._daemon = daemon = await self._stack.enter_async_context(connect())
        if settings.runtime and settings.runtime not in daemon.runtimes:
            raise SandboxError(
                f"sandbox.runtime = {settings.runtime!r} is unknown to {daemon.name}, which has "
                f"{', '.join(daemon.runtimes)}: register it in the daemon's configuration, or leave the setting empty"
            )
        timeout_s = settings.pull_timeout_s
        self._image = await ensure_image(daemon, settings.image, pull_timeout_s=timeout_s, log=self._log)
        self.name = f"docker ({daemon.name}, {self._image})"
        limits = {"memory": daemon.memory_limit, "processes": daemon.pids_limit, "CPU": False}
        self.lacks = tuple(f"a limit on a shard's {what}" for what, there in limits.items() if not there)
        await self.sweep()

    async def close(self) -> None:
        await self._stack.aclose()

    async def launch(self) -> tuple[DockerLaunched, dict[str, Any]]:
        uids = Uids(small=self._daemon.rootless)
        create: asyncio.Task[DockerContainer] | None = None
        words: asyncio.Task[str] | None = None
        try:
            # others can't enter the folder, so the socket itself may be open to the container's root
            name = f"l0fast-{driver_label(os.getpid()).replace('/', '-')}-"
            with tempfile.TemporaryDirectory(prefix=name) as folder, _listen(folder) as listener:
                with daemon_boundary(f"start a container of {self._image}"):
                    async with asyncio.timeout(REQUEST_TIMEOUT_S):
                        create = asyncio.create_task(self._daemon.docker.containers.create(self._container(folder)))
                        try:
                            container = await asyncio.shield(create)
                        except DockerError as e:
                            if folder in e.message or str(GUEST) in e.message:
                                raise _outside("files") from e
                            raise
                        stream = container.attach(stdout=True, stderr=True)
                        await stream.__aenter__()
                        words = asyncio.create_task(_last_words(stream), name="container's stderr")
                        await container.start()
                control = await _accept(listener, words)
            pid, _, _ = struct.unpack("3i", control.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if pid == 0:
                control.close()
                raise _outside("processes")
            launched = DockerLaunched(self, container, control, pid, words, uids)
        except BaseException:
            if words is not None:
                words.cancel()
            if create is not None:
                # cancelled or not: once asked for, a container comes into being
                await asyncio.shield(self._undo(create))
            uids.close()
            raise
        config = {
            "root": "/agent",
            # PID 1 of a container has no parent to die with
            "death_signal": 0,
            "program": "/l0fast",
            # the image's own packages
            "site": None,
            "read": [*SYSTEM, *ETC, "/opt"],
            "keep_fds": [],
            "own_pids": True,
            "uid_base": uids.base,
            "uid_count": uids.count,
        }
        return launched, {**self.config, **config}

    def _container(self, folder: str) -> dict[str, Any]:
        settings, sessions = self._settings, self._settings.sessions_per_shard
        memory = (SHARD_MB + SHARD_MB_PER_SESSION * sessions) << 20
        tmpfs = f"rw,exec,nosuid,nodev,mode=1733,size={(FOLDER_MB_PER_SESSION * sessions) << 20},nr_inodes={INODES_PER_SESSION * sessions}"
        host: dict[str, Any] = {
            "AutoRemove": True,
            "CapAdd": ["SETUID", "SETGID"],
            "CapDrop": ["ALL"],
            "IpcMode": "none",
            "LogConfig": {"Type": "none"},
            # not as Binds, for which a daemon that does not see our files makes folders of these names
            "Mounts": [
                {"Type": "bind", "Source": f"{folder}/control", "Target": "/l0fast/control"},
                {"Type": "bind", "Source": f"{GUEST}/guest", "Target": "/l0fast/guest", "ReadOnly": True},
            ],
            "NetworkMode": "none",
            "ReadonlyRootfs": True,
            "SecurityOpt": ["no-new-privileges"],
            "Tmpfs": {"/agent": tmpfs},
        }
        if self._daemon.cpu_shares:
            host["CpuShares"] = CPU_SHARES
        if self._daemon.memory_limit:
            host |= {"Memory": memory, "MemorySwap": memory}
        if self._daemon.pids_limit:
            # all that its sessions may have: those of some must not keep the zygote from starting another
            host["PidsLimit"] = self.config["limits"]["NPROC"] * sessions + 64
        if settings.runtime:
            host["Runtime"] = settings.runtime
        return {
            "Image": self._image,
            "Entrypoint": ["python3", "-S", "-s", "-B", "-c", BOOT],
            "Cmd": ["/l0fast", "/l0fast/control"],
            "Env": [f"{name}={value}" for name, value in environment().items()],
            "Labels": {LABEL: driver_label(os.getpid())},
            # a daemon that stops its containers would give a pid 1 that ignores SIGTERM ten seconds
            "StopSignal": "SIGKILL",
            "User": "0:0",
            "WorkingDir": "/",
            "AttachStdout": True,
            "AttachStderr": True,
            "HostConfig": host,
        }

    async def _undo(self, create: "asyncio.Task[DockerContainer]") -> None:
        await asyncio.wait((create,), timeout=REQUEST_TIMEOUT_S)
        if create.done() and not create.cancelled() and create.exception() is None:
            await self.remove(create.result())

    async def remove(self, container: DockerContainer) -> None:
        """Kill and remove a container that may be gone, or going, already; back when it is gone."""
        try:
            with daemon_boundary(f"remove container {container.id[:12]}"):
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    await _remove(container)
        except SandboxError as e:
            # its process is watched and its removal is the daemon's own duty, so nobody has to fail for it
            self._log(f"{e}; the daemon removes it when it is back")

    async def sweep(self) -> None:
        """Remove what drivers left that were killed in the middle of a launch: containers, and folders of sockets."""
        with daemon_boundary("look for leftover containers"):
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                found = await self._daemon.docker.containers.list(all=1, filters=f'{{"label":["{LABEL}"]}}')
        for container in found:
            if not _driver_lives(container["Labels"][LABEL]):
                await self.remove(container)
        _sweep_folders()


async def _remove(container: DockerContainer) -> None:
    while True:
        try:
            await container.delete(force=True)
        except DockerError as e:
            if e.status == 404:
                return
            # 409: its removal is under way
            if e.status != 409:
                raise
        await asyncio.sleep(0.02)


async def _last_words(stream: Any) -> str:
    """The end of what a container says, once it has ended."""
    said = b""
    try:
        while (message := await stream.read_out()) is not None:
            said = (said + message.data)[-_LAST_WORDS:]
    except (aiohttp.ClientError, OSError):
        # the daemon has gone; what it told so far is all there is
        pass
    finally:
        await stream.close()
    return said.decode("utf-8", "replace").strip()


def _outside(what: str) -> SandboxError:
    return SandboxError(
        f"the daemon does not share {what} with this process, which is in a container itself: run that one with --pid host "
        f"-v {tempfile.gettempdir()}:{tempfile.gettempdir()} -v {GUEST}:{GUEST}, or take another kind of sandbox"
    )


@contextmanager
def _listen(folder: str) -> Iterator[socket.socket]:
    """On `control` in a folder, however long its name: a socket's may have 107 characters, and a TMPDIR takes many of them."""
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as listener:
            path = f"/proc/self/fd/{fd}/control"
            listener.bind(path)
            os.chmod(path, 0o666)
            listener.listen(1)
            yield listener
    finally:
        os.close(fd)


async def _accept(listener: socket.socket, words: "asyncio.Task[str]") -> socket.socket:
    """The zygote's connection. Raises SandboxError with the container's words if it ends first."""
    loop = asyncio.get_running_loop()
    connected = asyncio.Event()
    loop.add_reader(listener.fileno(), connected.set)
    waiter = asyncio.create_task(connected.wait())
    try:
        await asyncio.wait((waiter, words), return_when=asyncio.FIRST_COMPLETED)
    finally:
        loop.remove_reader(listener.fileno())
        waiter.cancel()
    if not connected.is_set():
        said = words.result().splitlines()[-1:] or ["it said nothing"]
        raise SandboxError(f"the container ended before its zygote was there: {said[0]}")
    control, _ = listener.accept()
    control.setblocking(False)
    return control


def driver_label(pid: int) -> str:
    """A process, told apart from a later one of the same number, one in another container, and one of before a restart."""
    # field 22, counted behind the name, which may hold anything
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{pid}/{started}/{'-'.join(_here())}"


def _here() -> tuple[str, str]:
    """Where process numbers are those we see: this boot of the machine, and this pid namespace."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), str(os.stat("/proc/self/ns/pid").st_ino)


def _sweep_folders() -> None:
    for folder in Path(tempfile.gettempdir()).glob("l0fast-*-*-*"):
        pid, started, rest = folder.name.removeprefix("l0fast-").split("-", 2)
        mine = folder.lstat().st_uid == os.geteuid()
        if mine and not _driver_lives(f"{pid}/{started}/{rest.rpartition('-')[0]}"):
            remove_tree(str(folder))


def _driver_lives(label: str) -> bool:
    """True also of those in other containers that share this daemon: their processes can't be seen from here."""
    pid, _, rest = label.partition("/")
    boot, _, namespace = rest.rpartition("/")[2].rpartition("-")
    here = _here()
    if boot == here[0] and namespace != here[1]:
        return True
    try:
        return pid.isdigit() and driver_label(int(pid)) == label
    except (FileNotFoundError, ProcessLookupError):
        return False
