"""A real sandbox of each kind, shared by the tests of a file, and the loop it lives on."""

import asyncio
import os
import shutil
import subprocess
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from l0fast.config import SandboxConfig
from l0fast.errors import SandboxError
from l0fast.sandbox.docker import DockerBackend
from l0fast.sandbox.local import LocalBackend
from l0fast.sandbox.pool import SandboxPool
from tests.sandbox.processes import processes_with


def _why_no_bwrap() -> str | None:
    if shutil.which("bwrap") is None:
        return "bubblewrap is not installed"
    argv = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "true"]
    tried = subprocess.run(argv, capture_output=True, text=True, timeout=20)
    return f"bubblewrap does not work here: {tried.stderr.strip()}" if tried.returncode else None


def _why_no_docker() -> str | None:
    """Asked of the real backend: daemon and image are there, and nothing has to be pulled for a test."""

    async def ask() -> None:
        backend = DockerBackend(SandboxConfig(kind="docker", pull_timeout_s=0.01), log=lambda line: None)
        try:
            await backend.open()
        finally:
            await backend.close()

    try:
        asyncio.run(ask())
    except SandboxError as e:
        return str(e)
    return None


WHY_NOT = {"process": None, "bwrap": _why_no_bwrap(), "docker": _why_no_docker()}
REQUIRED = os.environ.get("L0FAST_TEST_SANDBOXES", "").split()
"""Kinds that must be tested: there a reason to skip is a failure."""


@pytest.fixture(scope="session")
def usable_kind() -> Callable[[str], str]:
    """The kind itself, or a skip that says why not."""

    def usable(kind: str) -> str:
        why = WHY_NOT[kind]
        if why is not None:
            assert kind not in REQUIRED, why
            pytest.skip(why)
        return kind

    return usable


@pytest.fixture(scope="module", params=["process", "bwrap", "docker"])
def kind(request: pytest.FixtureRequest, usable_kind: Callable[[str], str]) -> str:
    return usable_kind(request.param)


def make_pool(
    kind: str, *, num_shards: int = 1, sessions_per_shard: int = 16, grace_s: float = 20.0, **config: Any
) -> SandboxPool:
    config = {"kind": kind, "sessions_per_shard": sessions_per_shard, "memory_mb": 256, **config}
    settings = SandboxConfig(**config)
    return SandboxPool(
        DockerBackend(settings, log=print) if kind == "docker" else LocalBackend(kind, settings),
        num_shards=num_shards,
        sessions_per_shard=sessions_per_shard,
        start_timeout_s=20.0,
        grace_s=grace_s,
    )


@pytest.fixture(scope="session")
def new_pool() -> Callable[..., SandboxPool]:
    """A pool that the test starts and closes itself."""
    return make_pool


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    """Runs a coroutine on the module's loop, where its sandbox lives; no test takes longer than this."""
    with asyncio.Runner() as runner:
        yield lambda coroutine: runner.run(asyncio.wait_for(coroutine, 60))


@pytest.fixture(scope="module")
def pool(kind: str, run: Callable[..., Any]) -> Iterator[SandboxPool]:
    pool = make_pool(kind)
    run(pool.start())
    yield pool
    run(pool.close())


@pytest.fixture(scope="session")
def processes() -> Callable[[Callable[[int, int, bytes], bool]], list[int]]:
    return processes_with
