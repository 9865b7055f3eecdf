"""Leases, placement, loss and rebuilding, and what is left when a pool, a zygote or the driver is gone."""

import asyncio
import errno
import os
import select
import signal
import subprocess
import sys
import textwrap

import pytest

from l0fast.cgroups import cores
from l0fast.errors import SandboxError
from l0fast.sandbox.daemon import daemon
from l0fast.sandbox.docker import LABEL, driver_label
from l0fast.sandbox.pool import MAX_FAILURES
from l0fast.sandbox.shard import Shard
from tests.priority import autogroup


def zygote_pid(shard) -> int:
    """Of the zygote itself, as this machine numbers it."""
    pid = shard.launched.pid
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        children = [int(child) for child in f.read().split()]
    with open(f"/proc/{pid}/cmdline", "rb") as f:
        return children[0] if b"bwrap" in f.read().split(b"\0")[0] else pid


def alive(pid):
    """A zombie has no command line, and is its parent's to reap."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as f:
            return bool(f.read())
    except FileNotFoundError:
        return False


def children():
    with open(f"/proc/self/task/{os.getpid()}/children") as f:
        return f.read().split()


@pytest.fixture
def left_over(processes):
    """What is left of a shard: processes with its uids, its zygote, its folder."""

    def find(shard, zygote):
        base, count, root = (shard.config[key] for key in ("uid_base", "uid_count", "root"))
        left = processes(lambda pid, uid, line: base is not None and base <= uid < base + count)
        if alive(zygote):
            left.append(zygote)
        # under bwrap it is a mount of its namespace
        if root != "/agent" and os.path.exists(root):
            left.append(root)
        return left

    return find


def test_a_hundred_sessions_at_once_keep_their_own_state(new_pool, kind):
    async def main():
        pool = new_pool(kind, num_shards=2, sessions_per_shard=50)
        await pool.start()
        try:
            everybody = asyncio.Barrier(100)

            async def one(i):
                async with pool.session({}, seed=i) as session:
                    await session.execute(f"import os\nx = {i}\nopen('f', 'w').write(str(x)) and None")
                    await everybody.wait()
                    assert [shard.load for shard in pool.shards] == [50, 50]
                    await everybody.wait()
                    result = await session.execute("x, int(open('f').read()), os.listdir()")
                    assert result.output == f"({i}, {i}, ['f'])\n"

            async with asyncio.TaskGroup() as group:
                for i in range(100):
                    group.create_task(one(i))
            assert [shard.load for shard in pool.shards] == [0, 0]
        finally:
            await pool.close()

    asyncio.run(main())


def test_no_more_sessions_start_at_once_than_there_are_processors(new_pool, kind, monkeypatch):
    # each start is a processor's work, and the loop is one more that needs one
    starting = peak = 0
    lease = Shard.lease

    async def counted(self, *args):
        nonlocal starting, peak
        starting += 1
        peak = max(peak, starting)
        try:
            return await lease(self, *args)
        finally:
            starting -= 1

    monkeypatch.setattr(Shard, "lease", counted)

    async def main():
        pool = new_pool(kind, num_shards=2, sessions_per_shard=8)
        await pool.start()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(16):
                    group.create_task(one_cell(pool))
        finally:
            await pool.close()

    asyncio.run(main())
    assert peak == min(16, max(2, cores()))


def test_a_lease_waits_for_a_place_and_the_pool_says_so_when_none_comes(new_pool, kind):
    async def main():
        pool = new_pool(kind, sessions_per_shard=1)
        await pool.start()
        pool.start_timeout_s = 0.2
        try:
            async with pool.session({}, seed=1) as first:
                with pytest.raises(SandboxError, match="1 shards have 1 places"):
                    async with pool.session({}, seed=2):
                        pass
                pool.start_timeout_s = 20
                second = asyncio.create_task(one_cell(pool))
                await first.execute("1")
                assert not second.done()
            assert (await second).output == "'ran'\n"
        finally:
            await pool.close()

    asyncio.run(main())


@pytest.mark.parametrize("how", ["cancelled", "no descriptor for its socket", "no descriptor for its output"])
def test_a_lease_that_ends_before_its_session_is_asked_for_leaves_the_place_to_the_next(
    new_pool, kind, how, monkeypatch
):
    def no_more(*args):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def main():
        pool = new_pool(kind, sessions_per_shard=1)
        await pool.start()
        try:
            shard = pool.shards[0]
            if how == "cancelled":
                first = asyncio.create_task(one_cell(pool))
                await asyncio.sleep(0)
                second = asyncio.create_task(one_cell(pool))
                await asyncio.sleep(0)
                assert (shard.load, shard.starts_left) == (1, 0)
                first.cancel()
            else:
                with monkeypatch.context() as patched:
                    what = "socket.socketpair" if "socket" in how else "OutputFile"
                    patched.setattr(f"l0fast.sandbox.shard.{what}", no_more)
                    with pytest.raises(SandboxError, match="could not start a session"):
                        await one_cell(pool)
                second = asyncio.create_task(one_cell(pool))
            async with asyncio.timeout(10):
                assert (await second).output == "'ran'\n"
        finally:
            await pool.close()

    asyncio.run(main())


def test_a_lease_without_a_descriptor_left_keeps_none(new_pool, monkeypatch, tmp_path):
    (tmp_path / "f").touch()
    files = {str(i): str(tmp_path / "f") for i in range(3)}
    real, left = os.dup, 2

    def few(fd):
        nonlocal left
        if not left:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        left -= 1
        return real(fd)

    async def main():
        pool = new_pool("process")
        await pool.start()
        try:
            await one_cell(pool)
            before = os.listdir("/proc/self/fd")
            with monkeypatch.context() as patched:
                patched.setattr(os, "dup", few)
                with pytest.raises(SandboxError, match="could not start a session"):
                    async with pool.session({}, seed=1, files=files):
                        pass
            # the loop closes a transport's socket in its next round
            await asyncio.sleep(0)
            assert os.listdir("/proc/self/fd") == before
        finally:
            await pool.close()

    asyncio.run(main())


async def one_cell(pool):
    async with pool.session({}, seed=1) as session:
        return await session.execute("'ran'")


@pytest.mark.skipif(not os.path.exists("/proc/self/autogroup"), reason="this kernel has no autogroups")
def test_a_shard_has_a_third_of_the_drivers_share_of_the_cpu(pool, run, kind):
    async def main():
        if kind == "docker":
            # by its cgroup: 1,024 is the weight of nice 0, 335 of nice 5
            assert (await pool.shards[0].launched.container.show())["HostConfig"]["CpuShares"] == 335
            return
        zygote = zygote_pid(pool.shards[0])
        # a zygote without CAP_SYS_ADMIN may have to ask again: ten of these a second are taken from all of the machine
        for _ in range(200):
            async with pool.session({}, seed=1):
                pass
            if autogroup(zygote)[1] == "nice 5":
                break
        assert autogroup(zygote)[1] == "nice 5"
        assert autogroup(zygote)[0] != autogroup(os.getpid())[0]

    run(main())


def test_a_killed_session_is_an_error_at_once_and_nobody_elses(pool, run):
    async def main():
        async with pool.session({}, seed=1) as victim, pool.session({}, seed=2) as sibling:
            cell = asyncio.create_task(victim.execute("import time\ntime.sleep(60)", timeout_s=60))
            await sibling.execute("1")
            pool.shards[0].kill(victim.lease)
            with pytest.raises(SandboxError, match="ended by itself"):
                await cell
            with pytest.raises(SandboxError):
                await victim.execute("1")
            assert (await sibling.execute("2")).output == "2\n"

    run(main())


@pytest.mark.parametrize("how", ["zygote", "stopped zygote", "launcher"])
def test_a_killed_shard_is_an_error_in_its_sessions_and_is_rebuilt_with_nothing_left(
    new_pool, kind, left_over, how, monkeypatch
):
    if how == "stopped zygote":
        monkeypatch.setattr("l0fast.sandbox.shard.CLOSE_TIMEOUT_S", 0.3)

    async def main():
        pool = new_pool(kind)
        await pool.start()
        try:
            old = pool.shards[0]
            async with pool.session({}, seed=1) as session:
                daemon = "import os, time\nif os.fork() == 0:\n    if os.fork() == 0: time.sleep(600)\n    os._exit(0)"
                await session.execute(daemon)
                cell = asyncio.create_task(session.execute("import time\ntime.sleep(600)", timeout_s=0.5))
                await asyncio.sleep(0)
                pid = zygote_pid(old) if how != "launcher" else old.launched.pid
                os.kill(pid, signal.SIGSTOP if how == "stopped zygote" else signal.SIGKILL)
                if how == "stopped zygote":
                    # sessions run on without it; leaving the block is what finds out
                    assert (await cell).error.name == "Timeout"
                else:
                    with pytest.raises(SandboxError):
                        await cell
            async with asyncio.timeout(20):
                assert (await one_cell(pool)).output == "'ran'\n"
            assert old not in pool.shards
            assert left_over(old, pid) == []
        finally:
            await pool.close()

    asyncio.run(main())


def test_a_shard_lost_while_a_lease_begins_leaves_the_next_its_sockets(new_pool, kind):
    async def main():
        pool = new_pool(kind)
        await pool.start()
        pool.start_timeout_s = 5
        try:
            # not waited for in the loop, which hears of the end in the turn in which the lease begins
            old = pool.shards[0]
            os.kill(zygote_pid(old), signal.SIGKILL)
            assert select.select([old.launched.control], [], [], 10)[0]
            with pytest.raises(SandboxError, match="zygote"):
                await asyncio.create_task(one_cell(pool))
            assert (await one_cell(pool)).output == "'ran'\n"
        finally:
            await pool.close()

    asyncio.run(main())


def test_a_slot_that_cannot_be_rebuilt_closes_and_says_why(new_pool, kind, monkeypatch):
    monkeypatch.setattr("l0fast.sandbox.pool.BACKOFF_S", 0.001)

    async def main():
        pool = new_pool(kind)
        await pool.start()
        try:

            async def refuse():
                raise SandboxError("no more zygotes today")

            pool.backend.launch = refuse
            os.kill(zygote_pid(pool.shards[0]), signal.SIGKILL)
            said = ""
            while "no shard is left" not in said:
                # the first leases may still meet the killed zygote itself
                with pytest.raises(SandboxError) as refused:
                    await one_cell(pool)
                said = str(refused.value)
            assert "no more zygotes today" in said
        finally:
            await pool.close()

    asyncio.run(main())


@pytest.mark.skipif(os.geteuid() != 0, reason="uids are given to sessions by root")
def test_a_shard_without_fresh_uids_retires_when_its_last_session_ends(new_pool, kind):
    async def main():
        pool = new_pool(kind)
        await pool.start()
        try:
            old = pool.shards[0]
            old.starts_left = 2
            async with pool.session({}, seed=1) as a:
                uid_a = (await a.execute("import os\nos.getuid()")).output
                uid_b = await one_uid(pool)
                assert uid_a != uid_b
                assert not old.open
                assert (await a.execute("'alive'")).output == "'alive'\n"
            async with asyncio.timeout(20):
                uid_c = await one_uid(pool)
            assert uid_c not in (uid_a, uid_b)
            assert old not in pool.shards
        finally:
            await pool.close()

    asyncio.run(main())


@pytest.mark.skipif(os.geteuid() != 0, reason="uids are given to sessions by root")
def test_shards_that_are_used_up_together_keep_no_agent_waiting_for_the_sessions_they_have(new_pool, kind):
    """As those of a run are, whose every step gives each of them as many sessions."""

    async def main():
        pool = new_pool(kind, num_shards=2, sessions_per_shard=2)
        await pool.start()
        try:
            old = pool.shards
            for shard in old:
                shard.starts_left = 1
            async with pool.session({}, seed=1) as a, pool.session({}, seed=2) as b:
                assert not any(shard.open for shard in old)
                async with pool.session({}, seed=3), pool.session({}, seed=4) as d:
                    assert not {*old} & {*pool.shards}
                    assert pool.load() == {"shard 0": 2, "shard 1": 2}
                    # no more than there are places in all
                    late = asyncio.create_task(one_cell(pool))
                    for session in (a, b, d):
                        assert (await session.execute("'alive'")).output == "'alive'\n"
                    assert not late.done()
                assert (await late).output == "'ran'\n"
            async with asyncio.timeout(20):
                await asyncio.gather(*(task for retired in pool._retired.values() for task in retired.values()))
            assert not any(alive(shard.launched.pid) for shard in old)
            assert pool.load() == {"shard 0": 0, "shard 1": 0}
        finally:
            await pool.close()

    asyncio.run(main())


@pytest.mark.skipif(os.geteuid() != 0, reason="uids are given to sessions by root")
def test_a_slot_that_has_no_uids_beside_a_retired_shard_has_those_after_it(new_pool, kind, monkeypatch):
    """A user namespace has few: shards that retire together hold what the next ones need."""
    tried = asyncio.Event()

    async def main():
        pool = new_pool(kind)
        await pool.start()
        try:
            (old,) = pool.shards
            launch, failures = pool.backend.launch, 0

            async def short_of_uids():
                nonlocal failures
                if not old.over:
                    failures += 1
                    if failures == MAX_FAILURES:
                        tried.set()
                    raise SandboxError("no free block of uids")
                return await launch()

            monkeypatch.setattr(pool.backend, "launch", short_of_uids)
            old.starts_left = 1
            async with pool.session({}, seed=1) as session:
                await tried.wait()
                assert (await session.execute("'alive'")).output == "'alive'\n"
            assert await one_cell(pool) is not None
            assert old not in pool.shards
        finally:
            await pool.close()

    monkeypatch.setattr("l0fast.sandbox.pool.BACKOFF_S", 0.0)
    asyncio.run(main())


@pytest.mark.skipif(os.geteuid() != 0, reason="uids are given to sessions by root")
def test_a_pool_that_is_closed_ends_retired_shards_and_their_sessions_too(new_pool, kind, left_over):
    async def main():
        pool = new_pool(kind)
        await pool.start()
        (old,) = pool.shards
        pid = zygote_pid(old)
        old.starts_left = 1
        session = pool.session({}, seed=1)
        await session.__aenter__()
        await one_cell(pool)
        assert old not in pool.shards
        await pool.close()
        await session.__aexit__(None, None, None)
        assert left_over(old, pid) == []

    asyncio.run(main())


async def one_uid(pool):
    async with pool.session({}, seed=1) as session:
        return (await session.execute("import os\nos.getuid()")).output


def test_closing_leaves_no_process_no_descriptor_and_no_folder(new_pool, kind, left_over):
    async def main():
        before = set(os.listdir("/proc/self/fd"))
        for _ in range(2):
            pool = new_pool(kind)
            await pool.start()
            shards = pool.shards
            pids = [zygote_pid(shard) for shard in shards]
            sessions = [pool.session({}, seed=i) for i in range(5)]
            for session in sessions:
                entered = await session.__aenter__()
                await entered.execute(
                    "import os\nopen('f', 'w').close()\nif os.fork() == 0: os.execvp('sleep', ['sleep', '600'])"
                )
            # closed under living sessions, as when a run is stopped
            await pool.close()
            for session in sessions:
                await session.__aexit__(None, None, None)
            for shard, pid in zip(shards, pids, strict=True):
                assert left_over(shard, pid) == []
            # one turn for transports to close
            await asyncio.sleep(0)
        return before, set(os.listdir("/proc/self/fd"))

    before, after = asyncio.run(main())
    assert len(after) <= len(before)


def group_of(pid):
    """Living members of that process group."""
    members = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as f:
                    state, _, group = f.read().rpartition(b")")[2].split()[:3]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(group) == pid and state != b"Z":
                members.append(int(name))
    return members


async def containers_of_mine():
    async with daemon() as found:
        containers = await found.docker.containers.list(all=1, filters=f'{{"label":["{LABEL}"]}}')
        return [c.id for c in containers if c["Labels"][LABEL] == driver_label(os.getpid())]


@pytest.mark.parametrize("after_s", [0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4])
def test_cancelling_a_start_leaves_nothing_whenever_it_comes(new_pool, kind, after_s):
    async def main():
        before = children()
        pool = new_pool(kind)
        launch, launched = pool.backend.launch, []

        async def recorded():
            got = await launch()
            launched.append(got[0].pid)
            return got

        pool.backend.launch = recorded
        containers = await containers_of_mine() if kind == "docker" else []
        start = asyncio.create_task(pool.start())
        await asyncio.wait([start], timeout=after_s)
        if start.done():
            # too late to be cancelled
            await pool.close()
        else:
            start.cancel()
            with pytest.raises(asyncio.CancelledError):
                await start
        assert children() == before
        if kind == "docker":
            # cancelled in the middle of a launch, which is then undone
            assert await containers_of_mine() == containers
        else:
            assert launched
            assert group_of(launched[0]) == []

    asyncio.run(main())


def test_preloaded_modules_are_there_also_those_that_would_start_threads(new_pool, kind):
    # the image that tests build has no pyarrow
    preload = ("numpy",) if kind == "docker" else ("numpy", "pyarrow")

    async def main():
        pool = new_pool(kind, preload=preload, memory_mb=1024)
        try:
            await pool.start()
        except SandboxError as e:
            if kind == "docker" and "No module named 'numpy'" in str(e):
                pytest.skip("the image has no numpy: build one with --packages numpy")
            raise
        try:
            async with pool.session({}, seed=7) as session:
                result = await session.execute(f"import sys\n{set(preload)} <= set(sys.modules)")
                assert result.output == "True\n"
                drawn = await session.execute("import numpy\nfloat(numpy.random.random())")
            async with pool.session({}, seed=7) as session:
                assert (await session.execute("import numpy\nfloat(numpy.random.random())")).output == drawn.output
        finally:
            await pool.close()

    asyncio.run(main())


def test_a_preload_that_is_not_there_is_a_clear_refusal(new_pool, kind):
    async def main():
        with pytest.raises(SandboxError, match="no_such_module"):
            await new_pool(kind, preload=("no_such_module",)).start()

    asyncio.run(main())


DRIVER = """
    import asyncio, sys
    from l0fast.config import SandboxConfig
    from l0fast.sandbox import open_sandbox

    async def main():
        async with open_sandbox(SandboxConfig(kind=sys.argv[1]), max_sessions=4, log=lambda line: None) as sandbox:
            async with sandbox.session({}, seed=1) as session:
                await session.execute("import os, time\\nif os.fork() == 0: os.execvp('sleep', ['sleep', '600'])")
                shard = sandbox.shards[0]
                print(shard.launched.pid, shard.config["uid_base"], shard.config["root"], flush=True)
                await session.execute("while True: pass", timeout_s=600)

    asyncio.run(main())
"""


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_a_driver_that_is_killed_leaves_nothing(kind, processes, signal_number):
    root_dir = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(DRIVER), kind],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root_dir},
    )
    with driver:
        assert driver.stdout is not None
        pid, uid_base, root = driver.stdout.readline().split()
        watch = os.pidfd_open(int(pid))
        driver.send_signal(signal_number)
        driver.wait(10)
    # the zygote's end is an event to wait for, not a time
    assert select.select([watch], [], [], 10)[0], "the zygote outlived its driver"
    os.close(watch)
    if uid_base != "None":
        base = int(uid_base)
        left = lambda: processes(lambda _, uid, line: base <= uid < base + 65536)  # noqa: E731
        # under bwrap the namespace's processes are still being taken down for a moment
        for _ in range(200):
            if not left():
                break
            select.select([], [], [], 0.01)
        assert left() == []
    assert root == "/agent" or not os.path.exists(root)
