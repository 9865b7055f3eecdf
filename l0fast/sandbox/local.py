"""Zygotes on this machine: under bubblewrap, or as plain processes.

    bwrap     pid, net, ipc, uts and mount namespaces of its own; sees /usr, Python and nothing else; folders on a
              tmpfs of limited size. As root it keeps CAP_SETUID and CAP_SETGID, to give each session a uid; as a user
              it lives in a user namespace and sessions share a uid.
    process   the same program without any of that: limits, seccomp, Landlock and, as root, a uid a session.

Root without the capabilities, or with no uids to give, as in most containers, is a user like others (`_uids_to_give`).

Not covered by either: CPU and memory of a shard as a whole (no cgroup), kernel bugs. Not covered by `process` in
addition: disk space, the list of the machine's processes, and l0fast's own files, with the answers of its tasks, where it
is installed beside the Python that it runs on.
"""

import asyncio
import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

from l0fast.config import SandboxConfig
from l0fast.errors import SandboxError
from l0fast.sandbox.guest.files import remove_tree
from l0fast.sandbox.launch import BOOT, ETC, FOLDER_MB_PER_SESSION, GUEST, SYSTEM, Uids, environment, guest_config

_SWEEP_TIMEOUT_S = 5.0
_CAPABILITIES = {"bwrap": (6, 7, 12, 21), "process": (1, 5, 6, 7)}
"""That a kind needs to give each session a uid: SETGID, SETUID; NET_ADMIN, SYS_ADMIN; DAC_OVERRIDE and KILL to clean up."""


def _site_folders(config: SandboxConfig) -> list[str]:
    """Where preloads come from. Without preloads a session has the standard library alone, on every machine alike."""
    return sorted({sysconfig.get_path(p) for p in ("purelib", "platlib")}) if config.preload else []


def _library_folders() -> list[str]:
    """Where this Python may find its libraries, as one of an environment module does: without, it would not start, or with
    others of that name. But for folders above this package or the user's own.
    """
    closed = [Path(folder).resolve() for folder in (GUEST, os.path.expanduser("~"))]
    folders = [Path(entry).resolve() for entry in os.environ.get("LD_LIBRARY_PATH", "").split(":") if entry]
    return [
        str(folder)
        for folder in dict.fromkeys(folders)
        # pathlib's would raise for one below a folder that we may not enter
        if os.path.isdir(folder) and not any(path.is_relative_to(folder) for path in closed)
    ]


def _closed_to_others(path: str) -> bool:
    """True where some folder on the way can't be entered by a uid that is nobody's."""
    return any(not p.stat().st_mode & 0o001 for p in (Path(path).resolve(), *Path(path).resolve().parents))


class LocalLaunched:
    """A zygote that is a child of this process, or of the bwrap that is.

    A plain Popen whose pidfd the loop watches: nothing here waits between the fork and the record of it, so there is no
    moment at which a cancelled start could lose a child.
    """

    def __init__(
        self,
        control: socket.socket,
        process: subprocess.Popen[bytes],
        stderr: int,
        info: int | None,
        uids: Uids | None,
        root: str | None,
    ):
        self.control = control
        self.pid = process.pid
        self._process = process
        self._stderr = stderr
        self._info = info
        self._uids = uids
        self._root = root
        self._loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[str] = self._loop.create_future()
        try:
            self._pidfd = os.pidfd_open(process.pid)
        except OSError:
            os.killpg(self.pid, SIGKILL)
            process.wait()
            raise
        self._loop.add_reader(self._pidfd, self._exited)

    def _exited(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._process.wait()
        size = os.fstat(self._stderr).st_size
        self._exit.set_result(os.pread(self._stderr, 4096, max(0, size - 4096)).decode("utf-8", "replace").strip())
        os.close(self._stderr)

    async def exited(self) -> str:
        return await asyncio.shield(self._exit)

    def kill(self) -> None:
        if not self._exit.done():
            # All of its group: a bwrap that is killed before its child has asked to die with it leaves the child
            # waiting for ever. Sessions have groups of their own.
            os.killpg(self.pid, SIGKILL)

    async def clean(self, pids: list[int]) -> None:
        try:
            if self._info is not None:
                await asyncio.to_thread(_wait_for_namespace, self._info)
                if self._process.returncode != 0:
                    # one that was killed before it could tell its child's number has taken the child along, or is about to
                    await asyncio.to_thread(_sweep, {self.pid}, None)
            if self._root is not None:
                # one that came to its end by itself has left nothing
                if self._process.returncode != 0:
                    await asyncio.to_thread(_sweep, set(pids), self._uids)
                await asyncio.to_thread(remove_tree, self._root)
        finally:
            if self._info is not None:
                os.close(self._info)
                self._info = None
            if self._uids is not None:
                self._uids.close()


class LocalBackend:
    """Starts zygotes of one kind, "bwrap" or "process"."""

    def __init__(self, kind: str, config: SandboxConfig):
        self.kind = self.name = kind
        self._config = config
        self.config = guest_config(config)
        num_uids = _uids_to_give(kind)
        self._own_uids, self._small = num_uids > 0, num_uids < 1 << 31
        lacks = "a limit on a shard's CPU and memory"
        self.lacks: tuple[str, ...] = (lacks,) if kind == "bwrap" else ("namespaces", "a limit on disk", lacks)
        if not self._own_uids and os.geteuid() == 0 and [0, 0] in [ids[:2] for ids in _id_map("uid")]:
            # of the machine's root the kernel allows any number
            self.lacks += ("a limit on processes",)

    async def open(self) -> None:
        """Nothing to find first."""

    async def close(self) -> None:
        """Nothing is held between launches."""

    async def launch(self) -> tuple[LocalLaunched, dict[str, Any]]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        uids: Uids | None = None
        opened: list[int] = []
        root = info = stderr = None
        try:
            ours.setblocking(False)
            uids = Uids(small=self._small) if self._own_uids else None
            if self.kind == "bwrap":
                info, told = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
                opened.append(told)
                argv, env, config = self._bwrap(told)
            else:
                root = tempfile.mkdtemp(prefix="l0fast-")
                os.chmod(root, 0o1733 if self._own_uids else 0o700)
                argv, env, config = self._process(root, opened)
            config |= {"uid_base": uids.base if uids else None, "uid_count": uids.count if uids else 0}
            stderr = os.memfd_create("stderr", os.MFD_CLOEXEC)
            # forked by the loop's own thread: the zygote's parent-death signal is bound to it
            process = subprocess.Popen(  # noqa: ASYNC220 - a few ms, once a shard
                [*argv, str(theirs.fileno())],
                pass_fds=(theirs.fileno(), *opened),
                env=env,
                cwd="/",
                # its own group, for `kill`; and a Ctrl-C at the terminal is for the driver alone
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
            return LocalLaunched(ours, process, stderr, info, uids, root), {**self.config, **config}
        except BaseException:
            ours.close()
            for fd in (stderr, info):
                if fd is not None:
                    os.close(fd)
            if uids is not None:
                uids.close()
            if root is not None:
                os.rmdir(root)
            raise
        finally:
            theirs.close()
            for fd in opened:
                os.close(fd)

    def _process(self, root: str, opened: list[int]) -> tuple[list[str], dict[str, str], dict[str, Any]]:
        env = environment()
        site = _site_folders(self._config)

        def reach(folder: str) -> str:
            # A Python below /root, say, is closed to the sessions' uids. A descriptor of its folder opens it, and
            # nothing beside it, without a change to the folders on the way.
            if not (self._own_uids and _closed_to_others(folder)):
                return folder
            fd = os.open(folder, os.O_PATH | os.O_DIRECTORY)
            opened.append(fd)
            return f"/proc/self/fd/{fd}"

        prefix = reach(sys.base_prefix)
        if prefix != sys.base_prefix:
            env["PYTHONHOME"] = prefix
        site = [reach(folder) for folder in site]
        if libraries := [reach(folder) for folder in _library_folders()]:
            env["LD_LIBRARY_PATH"] = ":".join(libraries)
        config = {
            "root": root,
            # it cleans up before it goes
            "death_signal": SIGTERM,
            "program": str(GUEST),
            "site": site,
            "read": [*SYSTEM, *ETC, prefix, *site, *libraries],
            "keep_fds": list(opened),
            "own_pids": False,
        }
        return [*_python(), str(GUEST)], env, config

    def _bwrap(self, info: int) -> tuple[list[str], dict[str, str], dict[str, Any]]:
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise SandboxError("bubblewrap is not installed (Debian: apt-get install bubblewrap)")
        argv = [bwrap, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        if self._own_uids:
            argv += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        else:
            argv += ["--unshare-user"]
        # as PID 1 the zygote takes its namespace with it, however it ends
        argv += ["--info-fd", str(info), "--die-with-parent", "--new-session", "--as-pid-1"]
        argv += ["--proc", "/proc", "--dev", "/dev"]
        for path in SYSTEM:
            if os.path.islink(path):
                argv += ["--symlink", os.readlink(path), path]
            elif os.path.isdir(path):
                argv += ["--ro-bind", path, path]
        for path in ETC:
            argv += ["--ro-bind-try", path, path]
        site, libraries = _site_folders(self._config), _library_folders()
        for folder in (sys.base_prefix, *site, *libraries):
            if not folder.startswith("/usr"):
                # bwrap makes the folders on the way for its own user alone
                for parent in reversed(Path(folder).parents[:-1]):
                    argv += ["--perms", "0755", "--dir", str(parent)]
                argv += ["--ro-bind", folder, folder]
        own = GUEST.parent
        if any(own.is_relative_to(folder) for folder in (*SYSTEM, sys.base_prefix, *site)):
            # installed beside Python: its tasks' answers, and what makes them, are in it
            argv += ["--tmpfs", str(own), "--remount-ro", str(own)]
        size = (FOLDER_MB_PER_SESSION * self._config.sessions_per_shard) << 20
        argv += ["--ro-bind", str(GUEST / "guest"), "/l0fast/guest"]
        argv += ["--perms", "1733" if self._own_uids else "0700", "--size", str(size), "--tmpfs", "/agent"]
        argv += ["--remount-ro", "/", "--chdir", "/", "--"]
        config = {
            "root": "/agent",
            # the kernel cleans up: PID 1 takes its namespace along
            "death_signal": SIGKILL,
            "program": "/l0fast",
            "site": site,
            "read": [*SYSTEM, *ETC, sys.base_prefix, *site, *libraries],
            "keep_fds": [],
            "own_pids": True,
        }
        env = environment() | ({"LD_LIBRARY_PATH": ":".join(libraries)} if libraries else {})
        return [*argv, *_python(), "/l0fast"], env, config


def _uids_to_give(kind: str) -> int:
    """How many uids there are, from 0 on, that sessions may be given: 0 unless we are root, with the capabilities for it."""
    (effective,) = re.findall(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())
    if os.geteuid() != 0 or not all(int(effective, 16) >> number & 1 for number in _CAPABILITIES[kind]):
        return 0
    # 2^32 - 1 outside of any user namespace, 65,536 or 1 in a rootless container
    mapped = min(_mapped("uid"), _mapped("gid"))
    return mapped if mapped >= 1 << 16 else 0


def _mapped(which: str) -> int:
    end = 0
    for first, _, count in sorted(_id_map(which)):
        end += count if first == end else 0
    return end


def _id_map(which: str) -> list[list[int]]:
    """[first id in this user namespace, the same outside of it, how many] of each range."""
    return [[int(word) for word in line.split()] for line in Path(f"/proc/self/{which}_map").read_text().splitlines()]


def _python() -> Sequence[str]:
    """The interpreter itself, not a virtual environment's link to it; its own folders alone on the path."""
    executable = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    return executable, "-S", "-s", "-B", "-c", BOOT


def _wait_for_namespace(info: int) -> None:
    """Wait until the zygote is gone too, where bwrap was killed: the kernel then ends PID 1 and all of its namespace."""
    try:
        pid = json.loads(os.read(info, 4096))["child-pid"]
        watch = os.pidfd_open(pid)
    except (BlockingIOError, ValueError, ProcessLookupError):
        # bwrap had not got that far, or all is over
        return
    try:
        # not select(), which knows no descriptor above 1,023
        ended = select.poll()
        ended.register(watch, select.POLLIN)
        if not ended.poll(1000 * _SWEEP_TIMEOUT_S):
            raise SandboxError(f"process {pid} is still there after its bwrap has ended")
    finally:
        os.close(watch)


def _sweep(pids: set[int], uids: Uids | None) -> None:
    """Kill what a zygote that was killed itself left behind: its sessions' process groups, or all with their uids.

    `pids` led groups a moment ago, and a group's number can't be given away while a member lives: one killpg takes each
    at once, forks under way included. Then /proc is read for what was not known by its group; twice, because a process
    that forks and exits while the list is read can be missed.
    """
    for group in pids:
        _kill_group(group)
    deadline = time.monotonic() + _SWEEP_TIMEOUT_S
    empty = 0
    while empty < 2:
        groups = _groups_left(pids, uids)
        empty = 0 if groups else empty + 1
        for group in groups:
            _kill_group(group)
        if groups and time.monotonic() > deadline:
            raise SandboxError(f"processes of groups {sorted(groups)} are still there after SIGKILL")
        time.sleep(0.01)


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, SIGKILL)
    except ProcessLookupError:
        # nobody left
        return


def _groups_left(pids: set[int], uids: Uids | None) -> set[int]:
    """Groups of living processes that are one of `pids` or, where uids are given out, have one of ours."""
    groups = set()
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit():
            continue
        try:
            uid = entry.stat().st_uid
            with open(f"/proc/{entry.name}/stat", "rb") as f:
                # "pid (name, which may hold anything) state ppid pgrp ..."
                state, _, group = f.read().rpartition(b")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        mine = uids.base <= uid < uids.base + uids.count if uids is not None else int(group) in pids
        if mine and state not in (b"Z", b"X"):
            groups.add(int(group))
    return groups
