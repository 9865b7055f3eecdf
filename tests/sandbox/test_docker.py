"""What a container gets and does not get, and that none stays."""

import asyncio
import os
import textwrap
from contextlib import AsyncExitStack
from types import SimpleNamespace

import pytest

from l0fast.config import SandboxConfig
from l0fast.errors import SandboxError
from l0fast.sandbox.daemon import daemon
from l0fast.sandbox.docker import LABEL, DockerBackend, driver_label
from l0fast.sandbox.image import ensure_image

pytestmark = pytest.mark.parametrize("kind", ["docker"], indirect=True)


async def labelled(found):
    return {c.id for c in await found.docker.containers.list(all=1, filters=f'{{"label":["{LABEL}"]}}')}


def test_a_container_has_no_network_no_capability_to_spare_and_a_read_only_root(pool, run):
    async def main():
        told = await pool.shards[0].launched.container.show()
        code = "import os\n[line.split()[1] for line in open('/proc/self/status') if line.startswith(('CapEff', 'CapPrm', 'CapBnd'))]"
        async with pool.session({}, seed=1) as session:
            return told["HostConfig"], (await session.execute(code)).error

    host, error = run(main())
    assert host["NetworkMode"] == "none"
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert sorted(cap.removeprefix("CAP_") for cap in host["CapAdd"]) == ["SETGID", "SETUID"]
    assert "no-new-privileges" in host["SecurityOpt"][0]
    assert host["IpcMode"] == "none"
    assert host["AutoRemove"]
    assert host["LogConfig"]["Type"] == "none"
    assert host["Memory"] == (512 + 24 * 16) << 20
    assert host["PidsLimit"] == 32 * 16 + 64
    # not even of itself: /proc is closed to a session
    assert error is not None
    assert error.name == "PermissionError"


def test_the_memory_limit_of_a_container_holds_and_kills_no_other(new_pool, kind):
    """Each session stays below its own limit; together they pass the container's."""

    async def main():
        # 512 + 24 * 2 MiB for the container, 512 MiB a session
        pool = new_pool(kind, sessions_per_shard=2, memory_mb=512, num_shards=2)
        await pool.start()
        try:
            async with pool.session({}, seed=0) as one, pool.session({}, seed=1) as elsewhere:
                assert one.lease.sid == elsewhere.lease.sid == 0, "on a shard each"
                async with pool.session({}, seed=2) as other:
                    code = "held = bytearray(420 << 20)\nfor i in range(0, len(held), 4096): held[i] = 1"
                    results = await asyncio.gather(
                        *(session.execute(code, timeout_s=20) for session in (one, other)), return_exceptions=True
                    )
                    assert any(isinstance(result, SandboxError) for result in results), results
                assert (await elsewhere.execute("6 * 7")).output == "42\n"
        finally:
            await pool.close()

    asyncio.run(main())


def test_who_comes_after_a_session_that_left_no_room_has_its_place_when_there_is_room_again(new_pool, kind):
    async def main():
        pool = new_pool(kind, sessions_per_shard=2)
        await pool.start()
        try:
            async with pool.session({}, seed=1) as session:
                code = "import itertools, os\nfor i in itertools.count(): os.mkdir(str(i))"
                assert "No space left" in (await session.execute(code, timeout_s=30)).output
            async with pool.session({}, seed=2) as session:
                assert (await session.execute("open('f', 'w').write('here')")).output == "4\n"
        finally:
            await pool.close()

    asyncio.run(main())


def test_sessions_with_all_the_processes_they_may_have_leave_the_next_its_own(pool, run):
    code = """
        import os, time
        held = 0
        try:
            while True:
                if os.fork() == 0:
                    time.sleep(600)
                held += 1
        except BlockingIOError:
            print(held)
    """

    async def main():
        async with AsyncExitStack() as stack:
            for seed in range(8):
                session = await stack.enter_async_context(pool.session({}, seed=seed))
                assert (await session.execute(textwrap.dedent(code))).output == "31\n"
            async with pool.session({}, seed=8) as session:
                assert (await session.execute("6 * 7")).output == "42\n"

    run(main())


def test_one_session_a_shard_gets_a_new_container_each_time(new_pool, kind):
    async def main():
        pool = new_pool(kind, sessions_per_shard=1)
        await pool.start()
        try:
            seen = []
            for _ in range(3):
                async with pool.session({}, seed=1) as session:
                    assert (await session.execute("6 * 7")).output == "42\n"
                    seen.append(pool.shards[0].launched.container.id)
            return seen
        finally:
            await pool.close()

    assert len(set(asyncio.run(main()))) == 3


def test_containers_of_drivers_that_have_gone_are_swept_and_of_living_ones_stay(kind):
    async def main():
        async with daemon() as found:
            image = await ensure_image(found, "auto", pull_timeout_s=0.01, log=print)

            async def created(label):
                # as a driver leaves it that was killed between create and start
                config = {"Image": image, "Cmd": ["true"], "Labels": {LABEL: label}}
                return (await found.docker.containers.create(config)).id

            mine = driver_label(os.getpid())
            pid, started, boot = mine.split("/")
            gone = [
                await created(label)
                for label in (
                    f"{pid}/{int(started) - 1}/{boot}",
                    f"{pid}/{started}/{boot[::-1]}",
                    f"{2**22}/1/{boot}",
                    "?",
                )
            ]
            # a number of another pid namespace: of a driver in a container, to which this daemon's socket was given
            elsewhere = f"{2**22}/1/{boot.rpartition('-')[0]}-1"
            living = [await created(label) for label in (mine, elsewhere)]
            backend = DockerBackend(SandboxConfig(kind="docker"), log=print)
            try:
                await backend.open()
                left = await labelled(found)
                assert left >= set(living)
                assert not left & set(gone)
            finally:
                await backend.close()
                for container in living:
                    await found.docker.containers.container(container).delete(force=True)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"runtime": "no-such-runtime"}, r"no-such-runtime.*register it"),
        ({"image": "no-such-image:1", "pull_timeout_s": 5.0}, r"no-such-image:1.*sandbox.image build"),
    ],
)
def test_what_the_daemon_does_not_have_is_told_with_the_way_out(new_pool, kind, settings, said):
    async def main():
        with pytest.raises(SandboxError, match=said) as caught:
            await new_pool(kind, **settings).start()
        assert "\n" not in str(caught.value)

    asyncio.run(main())


async def starts_not(pool, said):
    """Its start is refused with these words, and no container more is there than before."""
    async with daemon() as found:
        before = await labelled(found)
        with pytest.raises(SandboxError, match=said):
            await pool.start()
        assert await labelled(found) == before


def test_an_image_without_python_is_told_and_leaves_no_container(kind, new_pool, monkeypatch):
    monkeypatch.setattr("l0fast.sandbox.docker.BOOT", "raise SystemExit('no such guest')")
    asyncio.run(starts_not(new_pool(kind), "no such guest"))


def test_a_daemon_outside_of_our_container_is_told_and_given_no_folders_to_make(kind, new_pool, monkeypatch, tmp_path):
    # as with a mounted socket: the daemon looks for our files where it is itself
    monkeypatch.setattr("l0fast.sandbox.docker.GUEST", tmp_path / "l0fast")
    asyncio.run(starts_not(new_pool(kind), "does not share files with this process.*-v /tmp:/tmp"))
    assert not any(tmp_path.iterdir())


def test_containers_whose_processes_can_not_be_seen_are_told_with_the_way_out(kind, new_pool, monkeypatch):
    # the number of a peer in a pid namespace that isn't below ours
    monkeypatch.setattr("l0fast.sandbox.docker.struct", SimpleNamespace(unpack=lambda *_: (0, 0, 0)))
    asyncio.run(starts_not(new_pool(kind), "does not share processes with this process.*--pid host"))


def test_a_container_that_never_connects_is_removed_at_the_deadline(kind, new_pool, monkeypatch):
    monkeypatch.setattr("l0fast.sandbox.docker.BOOT", "import time; time.sleep(600)")
    pool = new_pool(kind)
    pool.start_timeout_s = 3.0
    asyncio.run(starts_not(pool, "did not start within 3 s"))
