"""The way from the zygote's rights to a session's, in an order that matters.

    own process group -> limits -> uid -> folder -> parent-death signal -> Landlock -> seccomp

The folder is made by the uid that will own it, in a parent where everybody may create and nobody may list; the death
signal comes after the uid, which clears it; seccomp comes last, because it denies what the others need.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import time
from typing import Any

from . import landlock, seccomp

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER, PR_GET_SECCOMP = 1, 38, 36, 21
SESSION_NICE = 5
"""Beside the zygote, which starts and ends the others, and beside the driver where both are in one cgroup: a third of their
weight. With the least there is, nice 19, a cell would wait some 0.2 s whenever a learner keeps all cores."""
ROOM_S = 10.0
"""Longest wait for room for a session's folder, half of what the host gives a start [s]."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")

_libc = ctypes.CDLL(None, use_errno=True)
_ZERO = ctypes.c_ulong(0)


def prctl(option: int, value: int) -> int:
    result = _libc.prctl(option, ctypes.c_ulong(value), _ZERO, _ZERO, _ZERO)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")
    return result


class Jail:
    """Everything that can be prepared before the fork."""

    def __init__(self, config: dict[str, Any]):
        self.uid_base: int | None = config["uid_base"]
        limits = dict(config["limits"])
        self._shared_nproc: int = config["shared_nproc"]
        if self.uid_base is None:
            limits.pop("NPROC", None)
        self._limits = [_lowered(getattr(resource, f"RLIMIT_{name}"), value) for name, value in limits.items()]
        self.seccomp = _has_seccomp()
        quiet = seccomp.QUIET_IN_NAMESPACE if config["own_pids"] else seccomp.QUIET
        quiet = quiet if self.uid_base is None else frozenset()
        self._filter = seccomp.Filter(seccomp.ZYGOTE_NEEDS, quiet) if self.seccomp else None
        self.landlock = landlock.Landlock(config["read"], DEVICES)
        self._zygote = os.getpid()

    def enter_zygote(self) -> None:
        """What sessions inherit. The calling process still can do all that `enter` takes, and end sessions."""
        if self.seccomp:
            seccomp.Filter(seccomp.ALL - seccomp.ZYGOTE_NEEDS).install()

    def enter(self, folder: str, uid: int | None) -> None:
        """Become a session. Called in the fork; on any error the fork must exit."""
        # and not a POSIX session: the kernel gives each of those its own share of the CPU, as large as the driver's
        os.setpgid(0, 0)
        os.nice(SESSION_NICE)
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
        os.write(fd, b"900")
        os.close(fd)
        for limit, value in self._limits:
            resource.setrlimit(limit, value)
        if self.uid_base is None:
            # the kernel counts all threads of a uid, and this one is the driver's, whose children start more by the thousand
            limit, value = _lowered(resource.RLIMIT_NPROC, _threads() + self._shared_nproc)
            resource.setrlimit(limit, value)
        if uid is not None:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        self._make(folder)
        os.chdir(folder)
        # of bytes: without the way there through os.environ's own encoding
        os.environb[b"HOME"] = os.environb[b"TMPDIR"] = folder.encode()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self._zygote:
            raise OSError("the zygote has gone")
        if self.landlock.abi:
            self.landlock.restrict(folder)
        if self._filter is not None:
            self._filter.install()

    def _make(self, folder: str) -> None:
        """What a session before has left may take all the room there is until it is removed, behind its back."""
        give_up = time.monotonic() + ROOM_S
        while True:
            try:
                return os.mkdir(folder, 0o700)
            except OSError as e:
                if e.errno != errno.ENOSPC or time.monotonic() > give_up or os.getppid() != self._zygote:
                    raise
            time.sleep(0.02)


def _lowered(limit: int, value: int) -> tuple[int, tuple[int, int]]:
    """`value`, or what this machine allows at most."""
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    return limit, (value, value)


def _has_seccomp() -> bool:
    try:
        return prctl(PR_GET_SECCOMP, 0) >= 0
    except OSError:
        # EINVAL: a kernel without it
        return False


def _threads() -> int:
    """Of the whole machine, so no fewer than those of a uid, which take /proc milliseconds to tell."""
    fd = os.open("/proc/loadavg", os.O_RDONLY)
    try:
        # "0.20 0.18 0.12 1/80 11206": the fourth are those that run, and all
        return int(os.read(fd, 256).split()[3].partition(b"/")[2])
    finally:
        os.close(fd)
