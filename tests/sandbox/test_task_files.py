"""What a task brings into a session's folder, and what is collected from it."""

import errno
import os

import pytest

from l0fast.errors import SandboxError, UsageError


@pytest.fixture
def brought(tmp_path):
    table, note = tmp_path / "table", tmp_path / "note"
    table.write_bytes(b"a,b\n1,2\n" * 1000)
    note.write_text("read me")
    return {"data/deep/table.csv": str(table), "note.txt": str(note)}


def test_a_task_s_files_are_in_the_folder_and_not_writable(pool, run, brought):
    async def main():
        async with pool.session({}, seed=1, files=brought) as session:
            code = "import csv\nprint(open('note.txt').read(), len(open('data/deep/table.csv').read()))\nopen('note.txt', 'a')"
            return await session.execute(code)

    result = run(main())
    assert result.output.startswith("read me 8000\n")
    # root in a container may write everywhere; a session is nobody
    assert result.error.name == "PermissionError"


def test_sessions_read_the_same_file_at_once_and_keep_their_own_copies(pool, run, brought):
    async def main():
        async with (
            pool.session({}, seed=1, files=brought) as a,
            pool.session({}, seed=2, files=brought) as b,
        ):
            assert (await a.execute("import os\nos.unlink('note.txt')")).error is None
            return await b.execute("open('note.txt').read()")

    assert run(main()).output == "'read me'\n"
    with open(brought["note.txt"]) as f:
        assert f.read() == "read me"


def test_a_task_whose_files_find_no_descriptor_is_not_the_users_mistake(pool, run, brought, monkeypatch):
    def no_more(path, flags):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async def main():
        with monkeypatch.context() as patched:
            patched.setattr("l0fast.sandbox.task_files.os.open", no_more)
            async with pool.session({}, seed=1, files=brought):
                pass

    with pytest.raises(SandboxError, match="Too many open files"):
        run(main())


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "a//b", "", ".", "a/../../b", "a\0b", "x" * 300, "ж" * 150, "x/" * 600 + "x", "\1" * 200, "\udc80"],
)
def test_a_name_that_leads_out_of_the_folder_or_can_be_no_files_is_refused(pool, run, brought, name):
    async def main():
        async with pool.session({}, seed=1, files={name: brought["note.txt"]}):
            pass

    with pytest.raises(UsageError, match="below the session's folder"):
        run(main())


def test_a_file_that_another_takes_for_a_folder_is_refused(pool, run, brought):
    async def main():
        async with pool.session({}, seed=1, files={"a/b/c": brought["note.txt"], "a/b": brought["note.txt"]}):
            pass

    with pytest.raises(UsageError, match="'a/b/c'"):
        run(main())


def test_the_longest_names_of_as_many_files_as_there_may_be_arrive(pool, run, brought):
    name = "/".join(["ж" * 99] * 5)[:-3]
    files = {f"{i:02}/{name}": brought["note.txt"] for i in range(32)}
    assert {len(name.encode()) for name in files} == {991}

    async def main():
        async with pool.session({}, seed=1, files=files) as session:
            return await session.execute("import os\nlen(os.listdir())")

    assert run(main()).output == "32\n"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "no regular file"),
        (lambda path: path.write_bytes(bytes(9 << 20)), "more than the 8388608 bytes"),
    ],
    ids=["missing", "folder", "too long"],
)
def test_a_file_that_cannot_be_brought_is_told_with_its_path(pool, run, tmp_path, make, said):
    make(tmp_path / "file")

    async def main():
        async with pool.session({}, seed=1, files={"x": str(tmp_path / "file")}):
            pass

    with pytest.raises(UsageError, match=said) as caught:
        run(main())
    assert str(tmp_path) in str(caught.value)


def test_what_the_agent_leaves_is_collected_and_what_came_unchanged_is_not(pool, run, brought):
    async def main():
        async with pool.session({}, seed=1, files=brought) as session:
            code = """
import os
os.makedirs('out/deep')
open('out/deep/result.bin', 'wb').write(bytes(range(256)))
open('answer.txt', 'w').write('42')
open('0', 'wb').write(bytes(3))
os.symlink('/etc/passwd', 'link')
os.mkfifo('pipe')
open('secret', 'w').close(); os.chmod('secret', 0)
os.remove('note.txt'); open('note.txt', 'w').write('changed')
"""
            assert (await session.execute(code)).error is None
            # its files come by way of its output, whatever it did to that
            assert (await session.execute("os.ftruncate(1, 0)\nprint('cut')")).output == "cut\n"
            files = await session.collect()
            # and it goes on
            assert (await session.execute("6 * 7")).output == "42\n"
            return files

    files = run(main())
    if os.geteuid():
        # of a shared uid it stays readable
        assert files.pop("secret") == b""
    assert files == {
        "0": bytes(3),
        "answer.txt": b"42",
        "note.txt": b"changed",
        "out/deep/result.bin": bytes(range(256)),
    }


def test_no_more_files_and_bytes_are_collected_than_asked_for(pool, run):
    async def main():
        async with pool.session({}, seed=1) as session:
            await session.execute("for i in range(9): open(f'{i}', 'wb').write(b'x' * 100)")
            return await session.collect(max_files=5), await session.collect(max_bytes=350)

    few, small = run(main())
    assert list(few) == ["0", "1", "2", "3", "4"]
    assert sum(map(len, small.values())) == 300


def test_names_that_are_no_utf8_are_told_with_their_bytes_replaced(pool, run):
    async def main():
        async with pool.session({}, seed=1) as session:
            await session.execute("open(b'\\xff.txt', 'w').write('x')")
            return await session.collect()

    assert run(main()) == {"?.txt": b"x"}


def test_a_session_that_lies_about_its_files_is_lost(pool, run):
    """The agent owns its process: it may answer in the host's own protocol."""

    async def main(lie):
        async with pool.session({}, seed=1) as session:
            code = f"""
import gc, json, struct
for o in gc.get_objects():
    if type(o).__name__ == 'Frames':
        frames = o
sys = __import__('sys')
module = sys.modules['guest.session']
module.collect = lambda *a, **k: {lie}
"""
            assert (await session.execute(code)).error is None
            return await session.collect()

    for lie in ("[['../../etc/cron.d/x', 0]]", "[['a', -1]]", "[['a', 10**9]]", "[['a', True]]", "[['a']]", "None"):
        with pytest.raises(SandboxError):
            run(main(lie))
    assert run(main("[['a', 0]]")) == {"a": b""}
