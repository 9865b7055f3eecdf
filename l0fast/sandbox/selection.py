"""Which sandbox this machine can have: the strongest that works, or the one asked for by name, or a refusal."""

import math
import platform
import resource
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from l0fast.cgroups import cores
from l0fast.config import SandboxConfig
from l0fast.errors import SandboxError, UsageError
from l0fast.sandbox.guest.seccomp import TABLES
from l0fast.sandbox.local import LocalBackend
from l0fast.sandbox.pool import SandboxPool
from l0fast.sandbox.shard import Backend, Report

CORES_PER_SHARD = 2
_FILES_PER_SESSION, _FILES_PER_SHARD, _FILES_BESIDES = 2, 5, 256
"""Open files that this process has for each, and for all else."""
_OPEN_FILES = 65_536
"""What the limit is raised to where it may be: agents have connections, too, and engines sockets. SGLang raises it so far."""


@asynccontextmanager
async def open_sandbox(
    config: SandboxConfig, *, max_sessions: int, log: Callable[[str], None]
) -> AsyncIterator[SandboxPool]:
    """A pool with places for `max_sessions`; leaving the block ends it all.

    "auto" takes docker, else bwrap, else process where seccomp and Landlock are both active. One line through `log` says
    which, and what is missing. Raises UsageError where none is safe here, or the one asked for doesn't work.
    """
    _check_platform()
    _raise_open_files(max_sessions, _num_shards(config, max_sessions))
    kinds = ("docker", "bwrap", "process") if config.kind == "auto" else (config.kind,)
    refused = []
    for kind in kinds:
        pool = _pool(_backend(kind, config, log), config, max_sessions)
        try:
            await pool.start()
        except SandboxError as e:
            refused.append(f"{kind} ({e})")
            continue
        try:
            risk = unsafe(kind, pool.report)
            if risk and config.kind == "auto":
                refused.append(f"{kind} ({risk})")
                continue
            log(_say(pool, refused))
            yield pool
            return
        finally:
            await pool.close()
    raise UsageError(
        f"sandbox.kind = {config.kind!r}: none is safe here: {'; '.join(refused)}; install bubblewrap, or accept the "
        f"risk with --sandbox.kind process"
        if config.kind == "auto"
        else f"sandbox.kind = {config.kind!r} does not work here: {'; '.join(refused)}; use --sandbox.kind auto"
    )


def _backend(kind: str, config: SandboxConfig, log: Callable[[str], None]) -> Backend:
    if kind != "docker":
        return LocalBackend(kind, config)
    # brings aiodocker and aiohttp, which only this kind needs
    from l0fast.sandbox.docker import DockerBackend

    return DockerBackend(config, log=log)


def _num_shards(config: SandboxConfig, max_sessions: int) -> int:
    needed = math.ceil(max_sessions / config.sessions_per_shard)
    wanted = min(max_sessions, cores() // CORES_PER_SHARD)
    return max(needed, wanted, 1)


def _pool(backend: Backend, config: SandboxConfig, max_sessions: int) -> SandboxPool:
    return SandboxPool(
        backend,
        num_shards=_num_shards(config, max_sessions),
        sessions_per_shard=config.sessions_per_shard,
        start_timeout_s=config.start_timeout_s,
    )


def unsafe(kind: str, report: Report) -> str | None:
    """Why this must not be taken unasked."""
    if kind != "process":
        return None
    if not report.seccomp or not report.landlock:
        missing = [name for name, there in (("seccomp", report.seccomp), ("Landlock", report.landlock)) if not there]
        return f"this kernel has no {' and no '.join(missing)}"
    if not report.own_uids and report.landlock < 6:
        return f"Landlock ABI {report.landlock} lets a session signal this process; 6 or root is needed"
    return None


def _say(pool: SandboxPool, refused: list[str]) -> str:
    report, has, lacks = pool.report, [], []
    (has if report.own_uids else lacks).append("a uid per session")
    (has if report.seccomp else lacks).append("seccomp")
    (has if report.landlock else lacks).append(f"Landlock ABI {report.landlock}" if report.landlock else "Landlock")
    lacks += pool.backend.lacks
    why = f"; not {', not '.join(refused)}" if refused else ""
    return (
        f"sandbox: {pool.backend.name}, Python {report.python}, {len(pool.shards)} shard(s), with {', '.join(has)}; "
        f"without {', '.join(lacks)}{why}"
    )


def _check_platform() -> None:
    machine = platform.machine()
    if sys.platform != "linux" or machine not in TABLES:
        raise UsageError(f"the sandbox needs Linux on {' or '.join(TABLES)}, and this is {sys.platform} on {machine}")


def _raise_open_files(max_sessions: int, num_shards: int) -> None:
    """A shell's 1,024 are for programs that wait with select(), which knows no more; nothing here does.

    Raises UsageError where so many sessions can't be had.
    """
    needed = _FILES_PER_SESSION * max_sessions + _FILES_PER_SHARD * num_shards + _FILES_BESIDES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UsageError(
            f"{max_sessions} sessions need {needed} open files and the limit here is {hard}: raise it (ulimit -n), or "
            f"lower the number of open episodes"
        )
    wanted = max(2 * needed, _OPEN_FILES)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
