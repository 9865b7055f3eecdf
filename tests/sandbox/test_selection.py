"""Which sandbox is taken, what is said about it, and when it is refused."""

import asyncio
import os
import re
import resource

import pytest

from l0fast.config import SandboxConfig
from l0fast.errors import UsageError
from l0fast.sandbox import open_sandbox, selection
from l0fast.sandbox.shard import Report


def opened(**config):
    """The kind that was opened, and what was said."""
    said = []

    async def main():
        async with open_sandbox(SandboxConfig(**config), max_sessions=2, log=said.append) as sandbox:
            async with sandbox.session({}, seed=1) as session:
                assert (await session.execute("1")).output == "1\n"
            return sandbox.kind

    return asyncio.run(main()), said


def test_the_kind_asked_for_is_opened_and_one_line_says_what_it_has_and_lacks(kind):
    got, said = opened(kind=kind)
    assert got == kind
    assert len(said) == 1
    assert re.match(rf"sandbox: {kind}\b.*, Python 3.* with .*; without .*a limit on a shard's CPU", said[0])


def test_shards_are_as_many_as_the_cores_that_this_process_may_use_are_for(monkeypatch):
    """Of a machine of 192 cores a container has eight, say."""
    monkeypatch.setattr(os, "cpu_count", lambda: 192)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    config = SandboxConfig(kind="process")
    pool = selection._pool(selection._backend("process", config, print), config, 100)
    assert pool._num_shards == 8 // selection.CORES_PER_SHARD


@pytest.fixture
def no_docker(monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "unix:///no/such/docker.sock")


@pytest.mark.parametrize("kind", ["docker"], indirect=True)
def test_auto_takes_docker_where_it_works(kind):
    got, said = opened(kind="auto")
    assert got == "docker"
    assert len(said) == 1
    assert "not bwrap" not in said[0]


def test_auto_takes_the_strongest_that_works_and_says_why_not_the_others(no_docker):
    got, said = opened(kind="auto")
    assert got in ("bwrap", "process")
    assert "not docker (no Docker daemon answers" in said[0]
    assert "\n" not in said[0]
    if got == "process":
        assert "bwrap" in said[0].partition("not docker")[2]


def test_auto_falls_back_to_process_where_bwrap_is_missing(no_docker, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    got, said = opened(kind="auto")
    assert got == "process"
    assert "bubblewrap is not installed" in said[0]


def test_bwrap_by_name_is_refused_with_the_remedy_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UsageError, match="apt-get install bubblewrap"):
        opened(kind="bwrap")


def test_bwrap_that_cannot_make_namespaces_is_refused_with_its_own_words(monkeypatch, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: str(fake))
    with pytest.raises(UsageError, match="No permissions to create new namespace"):
        opened(kind="bwrap")


def test_docker_by_name_is_refused_with_the_remedy_where_no_daemon_listens(no_docker):
    with pytest.raises(UsageError, match=r"no such socket.*DOCKER_HOST.*--sandbox.kind auto"):
        opened(kind="docker")


@pytest.mark.parametrize(("platform", "machine"), [("darwin", "arm64"), ("linux", "riscv64")])
def test_another_platform_is_refused(monkeypatch, platform, machine):
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr("platform.machine", lambda: machine)
    with pytest.raises(UsageError, match=machine):
        asyncio.run(open_sandbox(SandboxConfig(), max_sessions=1, log=lambda line: None).__aenter__())


def test_more_sessions_than_open_files_are_refused():
    with pytest.raises(UsageError, match="open files"):
        asyncio.run(open_sandbox(SandboxConfig(), max_sessions=10**9, log=lambda line: None).__aenter__())


@pytest.mark.parametrize(
    ("hard", "sessions", "per_shard", "soft"),
    [
        (524_288, 256, 128, 65_536),
        # a Slurm node's
        (4_096, 256, 128, 4_096),
        (resource.RLIM_INFINITY, 256, 128, 65_536),
        # containers of their own
        (4_096, 400, 1, 4_096),
        (1_048_576, 100_000, 1, 1_048_576),
    ],
)
def test_open_files_are_raised_as_far_as_they_may_be(monkeypatch, hard, sessions, per_shard, soft):
    """Connections of agents and sockets of engines need some, too."""
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: asked.append(limits))
    selection._raise_open_files(sessions, -(-sessions // per_shard))
    assert asked == [(soft, hard)]


def test_a_shard_for_each_session_takes_open_files_of_its_own(monkeypatch):
    """A container an agent: the driver holds the zygote's socket, its process and what it says."""
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 1024))
    selection._raise_open_files(256, 8)
    with pytest.raises(UsageError, match="256 sessions need 2048 open files and the limit here is 1024"):
        selection._raise_open_files(256, 256)


def test_open_files_of_a_shell_are_raised_when_a_sandbox_is_opened():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard <= 1024:
        pytest.skip(f"the limit here is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    try:
        opened(kind="process")
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 1024
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("landlock", "seccomp", "own_uids", "safe"),
    [
        (7, True, False, True),
        (5, True, True, True),
        (5, True, False, False),
        (0, True, True, False),
        (7, False, True, False),
    ],
)
def test_a_process_is_taken_unasked_only_where_it_is_safe(landlock, seccomp, own_uids, safe):
    report = Report(python="3.11", landlock=landlock, seccomp=seccomp, own_uids=own_uids)
    assert (selection.unsafe("process", report) is None) == safe
    assert selection.unsafe("bwrap", report) is None
    assert selection.unsafe("docker", report) is None


def test_auto_refuses_where_nothing_is_safe_but_process_by_name_is_allowed(no_docker, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(selection, "unsafe", lambda kind, report: "this kernel has no Landlock")
    with pytest.raises(UsageError, match=r"no Landlock.*install bubblewrap.*--sandbox.kind process"):
        opened(kind="auto")
    assert opened(kind="process")[0] == "process"
