"""A Docker daemon on this machine, or podman in its clothes: where one listens, and what it can do.

    DOCKER_HOST, where it is set, and nothing else
    /var/run/docker.sock
    $XDG_RUNTIME_DIR/docker.sock             rootless Docker
    $XDG_RUNTIME_DIR/podman/podman.sock      rootless podman
    /run/podman/podman.sock

The first that answers is taken. Control sockets and folders are bind-mounted into containers, so only a daemon behind a
Unix socket will do. aiodocker's own connector allows 100 connections and lets the 101st request wait for ever; ours has
no limit, and every request a deadline.
"""

import asyncio
import os
import stat
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import aiodocker
import aiohttp

from l0fast.errors import SandboxError

REQUEST_TIMEOUT_S = 60.0
"""Longest request, unless it has a deadline of its own [s]. A busy daemon takes seconds to create a container."""
_OLDEST_API = (1, 40)
_SCHEME = "unix://"
_START_ONE = "start one (systemctl start docker), or set DOCKER_HOST to unix:///its/socket"


@dataclass(frozen=True, slots=True, kw_only=True)
class Daemon:
    """A daemon that has answered."""

    docker: aiodocker.Docker
    endpoint: str
    """"unix:///path"."""
    rootless: bool
    """Rootless, or with remapped users: uids in a container are below 65,536."""
    memory_limit: bool
    """Can limit a container's memory."""
    pids_limit: bool
    """Can limit a container's number of processes."""
    cpu_shares: bool
    """Whether containers can be given weights. Podman without root refuses to start one that has any, where it can't."""
    runtimes: tuple[str, ...]
    """What HostConfig.Runtime may name, e.g. "runc", "runsc"."""
    name: str
    """For a reader: "Docker 20.10.24", "Podman 4.3.1"."""


def endpoints() -> list[str]:
    """Where a daemon may listen, first choice first: DOCKER_HOST alone where it is set, else the sockets that exist."""
    host = os.environ.get("DOCKER_HOST")
    return [host] if host else [_SCHEME + path for path in _usual_places() if _is_socket(path)]


@asynccontextmanager
async def daemon(*, timeout_s: float = 10.0) -> AsyncIterator[Daemon]:
    """The first daemon that answers, for as long as the block runs.

    Args:
        timeout_s: time each place has to answer [s].

    Raises:
        SandboxError: none does. One sentence: what was tried, what each said, the way out.
    """
    refused: list[tuple[str, Exception]] = []
    for endpoint in endpoints():
        connector = aiohttp.UnixConnector(_path(endpoint), limit=0)
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S, sock_connect=timeout_s)
        docker = aiodocker.Docker(url=f"{_SCHEME}localhost", connector=connector, timeout=timeout)
        try:
            try:
                async with asyncio.timeout(timeout_s):
                    found = await _ask(docker, endpoint)
            except (OSError, aiohttp.ClientError, aiodocker.DockerError, _NotADaemon) as e:
                refused.append((endpoint, e))
                continue
            yield found
            return
        finally:
            try:
                await docker.close()
            finally:
                await connector.close()
    raise _none_answers(refused, timeout_s) from (refused[-1][1] if refused else None)


@contextmanager
def daemon_boundary(doing: str) -> Iterator[None]:
    """Turn what a request to the daemon may raise into SandboxError("could not <doing>: ..."), keeping the cause."""
    try:
        yield
    except aiodocker.DockerError as e:
        raise SandboxError(f"could not {doing}: {e.message}") from e
    except (OSError, EOFError, aiohttp.ClientError) as e:
        # TimeoutError is an OSError, and says nothing
        what = f"{type(e).__name__}: {e}" if str(e) else type(e).__name__
        raise SandboxError(f"could not {doing}: {what}") from e


class _NotADaemon(Exception):
    """Something answers, but not what is needed."""


async def _ask(docker: aiodocker.Docker, endpoint: str) -> Daemon:
    # aiodocker hides the errno of a failed connect: permission denied has another way out than nobody there
    _, writer = await asyncio.open_unix_connection(_path(endpoint))
    writer.close()
    await writer.wait_closed()
    try:
        version = await docker._query_json("version", versioned_api=False)
        api = tuple(int(part) for part in version["ApiVersion"].split("."))
        if api < _OLDEST_API:
            raise _NotADaemon(f"speaks API {version['ApiVersion']}; 1.40 (Docker 19.03) or newer is needed")
        docker.api_version = f"v{version['ApiVersion']}"
        return _describe(docker, endpoint, version, await docker.system.info())
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise _NotADaemon(f"does not answer as a Docker daemon does ({type(e).__name__}: {e})") from e


def _describe(docker: aiodocker.Docker, endpoint: str, version: Mapping[str, Any], info: Mapping[str, Any]) -> Daemon:
    if info["OSType"] != "linux":
        raise _NotADaemon(f"runs {info['OSType']} containers; linux ones are needed")
    options = {part for option in info["SecurityOptions"] or () for part in option.split(",")}
    parts = [component["Name"] for component in version.get("Components") or ()]
    maker = "Podman" if any("podman" in part.lower() for part in parts) else "Docker"
    return Daemon(
        docker=docker,
        endpoint=endpoint,
        rootless=bool({"name=rootless", "name=userns"} & options),
        memory_limit=bool(info["MemoryLimit"]),
        pids_limit=bool(info["PidsLimit"]),
        cpu_shares=bool(info.get("CPUShares")),
        runtimes=tuple(sorted(info["Runtimes"] or ())),
        name=f"{maker} {version['Version'].partition('+')[0]}",
    )


def _usual_places() -> list[str]:
    user = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    return ["/var/run/docker.sock", f"{user}/docker.sock", f"{user}/podman/podman.sock", "/run/podman/podman.sock"]


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        # not there, or in a folder of somebody else's
        return False


def _path(endpoint: str) -> str:
    """The socket's path. Raises SandboxError where the endpoint is not a Unix socket."""
    if not endpoint.startswith(f"{_SCHEME}/"):
        raise SandboxError(
            f"DOCKER_HOST is {endpoint!r}, and sandboxes need a daemon on this machine, behind a Unix socket (control "
            f"sockets and folders are bind-mounted): set it to unix:///var/run/docker.sock, or unset it"
        )
    return endpoint.removeprefix(_SCHEME)


def _none_answers(refused: list[tuple[str, Exception]], timeout_s: float) -> SandboxError:
    if not refused:
        return SandboxError(f"no Docker daemon listens at {', '.join(_usual_places())}: {_START_ONE}")
    said = "; ".join(f"{endpoint}: {_reason(e, timeout_s)}" for endpoint, e in refused)
    locked = [endpoint for endpoint, e in refused if isinstance(e, PermissionError)]
    way_out = "add this user to the docker group (sudo usermod -aG docker $USER, then log in anew)"
    return SandboxError(f"no Docker daemon answers ({said}): {way_out if locked else _START_ONE}")


def _reason(error: Exception, timeout_s: float) -> str:
    match error:
        case TimeoutError():
            return f"no answer in {timeout_s:g} s"
        case FileNotFoundError():
            return "no such socket"
        case PermissionError():
            return "permission denied"
        case ConnectionRefusedError():
            return "nobody listens on that socket"
        case aiodocker.DockerError():
            return f"answers with an error: {error.message}"
        case _:
            return str(error) or type(error).__name__
