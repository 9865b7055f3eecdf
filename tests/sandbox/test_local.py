"""Zygotes on this machine: what they need from it to start, and what of it sessions get."""

import asyncio
import errno
import fcntl
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from l0fast.errors import SandboxError
from l0fast.sandbox.launch import GUEST, Uids
from l0fast.sandbox.local import _library_folders, _wait_for_namespace


@pytest.mark.parametrize("call", ["socket.socketpair", "Uids", "tempfile.mkdtemp", "subprocess.Popen", "os.pidfd_open"])
def test_a_zygote_that_can_not_be_started_is_the_sandboxs_own_error_and_leaves_no_descriptor(
    new_pool, call, monkeypatch
):
    if call == "Uids" and os.geteuid() != 0:
        pytest.skip("uids are given to sessions by root")

    def no_more(*args, **kw):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def main():
        pool = new_pool("process")
        before = os.listdir("/proc/self/fd")
        with monkeypatch.context() as patched:
            patched.setattr(f"l0fast.sandbox.local.{call}", no_more)
            with pytest.raises(SandboxError, match="could not start a process zygote"):
                await pool.start()
        assert os.listdir("/proc/self/fd") == before

    asyncio.run(main())


def test_the_end_of_a_killed_bwraps_zygote_is_seen_among_more_than_1024_open_files(monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard <= 1024:
        pytest.skip(f"the limit here is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    pidfd_open = os.pidfd_open

    def above(pid: int) -> int:
        fd = pidfd_open(pid)
        try:
            return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 1024)
        finally:
            os.close(fd)

    monkeypatch.setattr(os, "pidfd_open", above)
    info, told = os.pipe2(os.O_NONBLOCK)
    zygote = subprocess.Popen(["sleep", "60"])
    try:
        os.write(told, f'{{"child-pid": {zygote.pid}}}'.encode())
        zygote.kill()
        _wait_for_namespace(info)
    finally:
        zygote.kill()
        zygote.wait()
        os.close(info)
        os.close(told)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_user_namespace_has_uids_for_the_shards_of_a_machine_with_many_cores():
    """Of 64, or for 4,096 sessions."""
    blocks = [Uids(small=True) for _ in range(32)]
    try:
        uids = [uid for block in blocks for uid in range(block.base, block.base + block.count)]
        assert len(uids) == len({*uids})
        assert 8_192 <= min(uids) < max(uids) < 65_536
        # each session has one, and one that removes what it leaves
        assert all(block.count // 2 > 128 for block in blocks)
    finally:
        for block in blocks:
            block.close()


def test_a_zygote_that_may_not_fork_removes_a_folder_when_it_may_again(new_pool, monkeypatch, tmp_path):
    """As where the siblings have all the processes that a container may have."""
    full = tmp_path / "full"
    (tmp_path / "no_fork.py").write_text(
        f"import os\nfork = os.fork\ndef failing():\n    if os.path.exists({str(full)!r}): raise BlockingIOError(11, 'full')\n"
        "    return fork()\nos.fork = failing\n"
    )
    monkeypatch.setattr("l0fast.sandbox.local._site_folders", lambda config: [str(tmp_path)])

    async def main():
        pool = new_pool("process", preload=("no_fork",))
        await pool.start()
        try:
            (shard,) = pool.shards
            async with pool.session({}, seed=1) as sibling:
                async with pool.session({}, seed=2) as session:
                    await session.execute("open('f', 'w').close()")
                    full.touch()
                with pytest.raises(SandboxError, match="full"):
                    await pool.session({}, seed=3).__aenter__()
                assert (await sibling.execute("6 * 7")).output == "42\n"
                full.unlink()
            assert pool.shards == [shard]
            while os.listdir(shard.config["root"]):
                async with pool.session({}, seed=4):
                    pass
        finally:
            await pool.close()

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize("become", ["setpriv --bounding-set=-all", "unshare --user --map-root-user"])
def test_root_that_can_give_no_uids_has_a_sandbox_as_a_user_has(become):
    """As in a container without capabilities, or in a rootless one with a single uid."""
    if os.geteuid() != 0 or subprocess.run([*become.split(), "true"], capture_output=True).returncode != 0:
        pytest.skip(f"{become} does not work here")
    code = """if True:
        import asyncio
        from l0fast.config import SandboxConfig
        from l0fast.sandbox import open_sandbox

        async def main():
            async with open_sandbox(SandboxConfig(kind="process"), max_sessions=1, log=print) as sandbox:
                async with sandbox.session({}, seed=0) as session:
                    print((await session.execute("6 * 7")).output)

        asyncio.run(main())
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(["", *sys.path])}
    ran = subprocess.run([*become.split(), sys.executable, "-c", code], capture_output=True, text=True, env=env)
    said, _, rest = ran.stdout.partition("\n")
    assert rest.split() == ["42"], ran.stderr
    assert "without a uid per session" in said
    assert "a limit on processes" in said


@pytest.mark.parametrize("kind", ["process", "bwrap"], indirect=True)
def test_a_machines_lower_limits_are_a_sessions(kind):
    code = """if True:
        import asyncio, resource
        from tests.sandbox.conftest import make_pool
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        async def main():
            pool = make_pool({kind!r})
            await pool.start()
            try:
                async with pool.session({{}}, seed=1) as session:
                    limit = "import resource\\nresource.getrlimit(resource.RLIMIT_FSIZE)"
                    print((await session.execute(limit)).output)
            finally:
                await pool.close()
        asyncio.run(main())
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(["", *sys.path])}
    argv = [sys.executable, "-c", code.format(kind=kind)]
    said = subprocess.run(argv, capture_output=True, text=True, timeout=60, env=env)
    assert said.stdout.strip() == str((1 << 20, 1 << 20)), said.stderr


@pytest.mark.parametrize("kind", ["process", "bwrap"], indirect=True)
def test_libraries_that_python_finds_by_its_environment_are_found_in_a_session(kind, new_pool, monkeypatch, tmp_path):
    """As those of a Python that came with `module load`, its own library among them."""
    (libraries := tmp_path / "lib").mkdir()
    source = next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libm.so" in line)
    shutil.copy(source, libraries / "libof_a_module.so")
    # agents must not read what these hold
    home, none, ours = tmp_path, tmp_path / "none", GUEST.parents[1]
    monkeypatch.setenv("HOME", str(home / "me"))
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{libraries}:{home}::{none}:{ours}:/")

    async def main():
        pool = new_pool(kind)
        await pool.start()
        try:
            async with pool.session({}, seed=1) as session:
                cell = (
                    "import ctypes, os\nctypes.CDLL('libof_a_module.so')\nlen(os.environ['LD_LIBRARY_PATH'].split(':'))"
                )
                return await session.execute(cell)
        finally:
            await pool.close()

    result = asyncio.run(main())
    assert (result.output, result.error) == ("1\n", None)


def test_libraries_in_a_folder_that_we_may_not_enter_are_not_ours(monkeypatch, tmp_path):
    """An environment that came along from another user, by su or sbatch."""
    (closed := tmp_path / "closed" / "lib").mkdir(parents=True)
    closed.parent.chmod(0)
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{closed}:/usr/lib")
    as_root = os.geteuid() == 0
    if as_root:
        os.seteuid(65_534)
    try:
        assert _library_folders() == ["/usr/lib"]
    finally:
        if as_root:
            os.seteuid(0)
        closed.parent.chmod(0o700)


def test_this_package_is_closed_to_sessions_where_it_is_installed_beside_their_python(
    new_pool, usable_kind, monkeypatch
):
    monkeypatch.setattr("l0fast.sandbox.local._site_folders", lambda config: [str(GUEST.parent.parent)])

    async def main():
        pool = new_pool(usable_kind("bwrap"))
        await pool.start()
        try:
            async with pool.session({}, seed=1) as session:
                beside = await session.execute(f"len(open({str(GUEST.parents[1] / 'pyproject.toml')!r}).read()) > 100")
                own = await session.execute(f"open({str(GUEST.parent / 'tasks' / 'data' / 'geography.json.gz')!r})")
                return beside.output, own.error and own.error.name
        finally:
            await pool.close()

    assert asyncio.run(main()) == ("True\n", "FileNotFoundError")
