import asyncio
import datetime
import fcntl
import math
import os
import sqlite3
import subprocess
import sys
import threading
import tracemalloc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import orjson
import pytest
from blockbuster import blockbuster_ctx
from hypothesis import given
from hypothesis import strategies as st

from l0fast.errors import UsageError
from l0fast.tools import cache
from l0fast.tools.cache import CacheFile, Key, Memory, normaliser

KEY = Key("search", "1", '{"query":"Oslo"}')

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"))
)
json_values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


def typed(value: Any) -> Any:
    """Equal only where values and types are."""
    match value:
        case list():
            return ["list", *map(typed, value)]
        case dict():
            return {key: typed(item) for key, item in value.items()}
        case float():
            return ["float", repr(value)]
    return [type(value).__name__, value]


# what calls are the same


@given(a=json_values, b=json_values)
def test_equal_texts_mean_equal_arguments(a: Any, b: Any):
    normalise = normaliser("f", "(a, b=None)")
    assert normalise(a) == normalise(a=a, b=None)
    assert (normalise(a) == normalise(b)) == (typed(a) == typed(b))
    # which parameter a value is for matters
    assert (normalise(a, b) == normalise(b, a)) == (typed(a) == typed(b))


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), json_values, max_size=4), st.randoms())
def test_the_order_of_keys_does_not_matter(value: dict[str, Any], random):
    normalise = normaliser("f", "(a)")
    items = list(value.items())
    random.shuffle(items)
    assert normalise([{"in": value}]) == normalise([{"in": dict(items)}])


def test_defaults_are_filled_in():
    normalise = normaliser(
        "f", "(query: str, k: int = 3, *more: str, exact: bool = False, **options: int) -> list[str]"
    )
    assert normalise("x") == normalise("x", 3) == normalise(exact=False, query="x")
    assert len({normalise("x"), normalise("x", 4), normalise("x", 3, "y"), normalise("x", z=1), normalise("y")}) == 5


def test_an_int_for_a_float_is_that_float():
    normalise = normaliser("f", "(x: float)")
    assert normalise(5) == normalise(5.0)


@pytest.mark.parametrize(
    ("args", "kw", "complaint"),
    [
        ((), {}, "query: Missing required argument"),
        (("x", [1], 2), {}, "argument 3: Unexpected positional argument"),
        (("x",), {"query": "y"}, "query: Got multiple values"),
        (("x",), {"self": 1}, "self: Unexpected keyword"),
        ((5,), {}, "query: Input should be a valid string"),
        (("x", [1, "a"]), {}, "ids: Input should be a valid integer"),
        (("x", [True]), {}, "ids: Input should be a valid integer"),
        (("x", (1, 2)), {}, "ids: Input should be a valid list"),
    ],
)
def test_arguments_that_do_not_fit_are_type_errors_in_one_sentence(args: tuple, kw: dict, complaint: str):
    with pytest.raises(TypeError) as caught:
        normaliser("find", "(query: str, ids: list[int] = [])")(*args, **kw)
    assert complaint in str(caught.value)
    assert "find() does not take these arguments: " in str(caught.value)
    assert "\n" not in str(caught.value)


def deep(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


ring: list = []
ring.append(ring)


@pytest.mark.parametrize(
    "value",
    [math.nan, math.inf, {1: 2}, {"a": (1, 2)}, b"x", {3}, object(), 2**64, "\ud800", datetime.date(2025, 1, 1), deep(2000), ring],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_is_not_json_is_a_type_error(value: Any):
    with pytest.raises(TypeError, match="takes strings, finite numbers"):
        normaliser("f", "(a)")([value])


@pytest.mark.parametrize("signature", ["(query: str", "(a: DataFrame)", "(a) -> a b", "", "(a, a)", "(a: 3)"])
def test_a_signature_that_cannot_be_checked_is_refused(signature: str):
    with pytest.raises(ValueError, match="can't be checked"):
        normaliser("f", signature)


@pytest.mark.parametrize(
    "kind",
    ["tuple[int, int]", "tuple", "set[str]", "list[set[int]]", "dict[int, str]", "str | bytes", "dict[str, tuple]", "complex"],
)  # fmt: skip
def test_what_no_json_is_read_as_is_refused_before_anything_is_called(kind: str):
    with pytest.raises(ValueError, match=r"at: .* is nothing that agents' arguments, .* annotate arguments with str"):
        normaliser("f", f"(x, at: {kind} = ...)")


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("str | None", None),
        ("Optional[str]", "a"),
        ("Union[int, List[Dict[str, float]]]", [{"a": 1.5}]),
        ("dict[Literal['a'], list]", {"a": [1]}),
        ("None", None),
        ("object", {"a": []}),
    ],
)
def test_jsons_types_are_taken_as_python_spells_them(kind: str, value: Any):
    assert orjson.loads(normaliser("f", f"(at: {kind})")(value)) == {"at": value}


# memory


def test_what_is_remembered_takes_about_the_memory_that_it_counts():
    memory = Memory(10_000, 2**20)
    found = ["Oslo is the capital of Norway.", "Bergen is a city in Norway.", "Oslo is a city in Norway."]
    tracemalloc.start()
    try:
        for i in range(1000):
            memory.put(Key("search", "1", str(i)), orjson.dumps([*found, str(i)]))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(memory) == 1000
    # besides: keys, and the dictionary
    assert held < memory.num_bytes + 1000 * 500


@given(
    st.lists(st.tuples(st.integers(0, 5), st.none() | st.integers(0, 40)), max_size=40),
    st.integers(1, 4),
    st.integers(1, 100),
)
def test_memory_keeps_the_latest_used_that_fit(
    operations: list[tuple[int, int | None]], max_entries: int, max_bytes: int
):
    memory, model = Memory(max_entries, max_bytes), OrderedDict[Key, bytes]()
    for name, size in operations:
        key = Key("t", "1", f"{name}é")
        if size is None:
            assert memory.get(key) == model.get(key)
            if key in model:
                model.move_to_end(key)
            continue
        memory.put(key, b"." * size)
        model.pop(key, None)
        # "t", "1", a digit and two bytes of é
        if size + 5 <= max_bytes:
            model[key] = b"." * size
        while len(model) > max_entries or sum(5 + len(value) for value in model.values()) > max_bytes:
            model.popitem(last=False)
        assert memory.num_bytes == sum(5 + len(value) for value in model.values()) <= max_bytes
        assert len(memory) == len(model) <= max_entries
    assert all(memory.get(key) == value for key, value in model.items())


# file


def test_a_closed_file_is_one_plain_file_and_no_thread(tmp_path: Path):
    path = tmp_path / "cache.db"

    async def main() -> None:
        file = await CacheFile.open(path, "use")
        assert await file.get(KEY) is None
        await file.put(KEY, b'["x"]')
        await file.put(KEY, b'["y"]')
        assert await file.get(KEY) == b'["y"]'
        assert await file.get(KEY._replace(version="2")) is None
        (thread,) = (t for t in threading.enumerate() if t.name.startswith("tool-cache"))
        await file.close()
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()

    asyncio.run(main())
    assert [p.name for p in tmp_path.iterdir()] == ["cache.db"]
    # both 1: not in WAL mode, so that a folder that can't be written will do to read it
    assert path.read_bytes()[18:20] == b"\x01\x01"


def test_the_loop_never_waits_for_the_file(tmp_path: Path):
    async def main() -> None:
        with blockbuster_ctx():
            file = await CacheFile.open(tmp_path / "cache.db", "use")
            await file.put(KEY, b"1")
            await file.get(KEY)
            await file.close()

    asyncio.run(main())


def refusal(path: Path, mode: cache.Mode = "use") -> str:
    with pytest.raises(UsageError) as caught:
        asyncio.run(CacheFile.open(path, mode))
    assert not any(t.name.startswith("tool-cache") and not t.join(10) and t.is_alive() for t in threading.enumerate())
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path):
    path = tmp_path / "notes.txt"
    path.write_text("not a database, but long enough to be taken for one\n" * 50)
    before = path.read_bytes()
    assert "file is not a database" in refusal(path)
    assert "file is not a database" in refusal(path, "replay")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_database_of_another_program_is_refused_and_left_alone(tmp_path: Path):
    path = tmp_path / "bookmarks.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE bookmarks (url)")
    db.close()
    before = path.read_bytes()
    assert "another program" in refusal(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["bookmarks.db"]


def test_another_layout_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "cache.db"

    async def main() -> None:
        await (await CacheFile.open(path, "use")).close()

    monkeypatch.setattr(cache, "LAYOUT", 7)
    asyncio.run(main())
    monkeypatch.undo()
    assert "has layout 7, and this version knows 1" in refusal(path)


def test_a_place_where_no_file_can_be_is_refused(tmp_path: Path):
    assert "unable to open" in refusal(tmp_path)
    assert "No such file" in refusal(tmp_path / "missing" / "cache.db")


def test_a_replay_needs_a_file_and_makes_none(tmp_path: Path):
    assert "unable to open" in refusal(tmp_path / "cache.db", "replay")
    (tmp_path / "empty.db").touch()
    assert "another program" in refusal(tmp_path / "empty.db", "replay")
    assert (tmp_path / "empty.db").stat().st_size == 0
    assert [p.name for p in tmp_path.iterdir()] == ["empty.db"]


def test_a_replay_changes_nothing(tmp_path: Path):
    path = tmp_path / "cache.db"

    async def main() -> None:
        file = await CacheFile.open(path, "record")
        await file.put(KEY, b"1")
        await file.close()
        before = path.read_bytes()
        file = await CacheFile.open(path, "replay")
        assert await file.get(KEY) == b"1"
        with pytest.raises(UsageError, match="readonly"):
            await file.put(KEY, b"2")
        await file.close()
        assert path.read_bytes() == before

    asyncio.run(main())


def test_damage_found_later_is_a_usage_error(tmp_path: Path):
    path = tmp_path / "cache.db"

    async def main() -> None:
        file = await CacheFile.open(path, "use")
        for i in range(200):
            await file.put(KEY._replace(arguments=str(i)), b"." * 1000)
        await file.close()
        data = path.read_bytes()
        path.write_bytes(data[:4096] + b"\xff" * (len(data) - 4096))
        file = await CacheFile.open(path, "use")
        try:
            with pytest.raises(UsageError, match="malformed"):
                await file.get(KEY)
        finally:
            await file.close()

    asyncio.run(main())


def test_waiting_for_another_process_has_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "BUSY_S", 0.01)
    path = tmp_path / "cache.db"

    async def main() -> None:
        file = await CacheFile.open(path, "use")
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(UsageError, match="database is locked"):
            await file.put(KEY, b"1")
        other.close()
        await file.put(KEY, b"1")
        await file.close()

    asyncio.run(main())


def test_who_opens_or_closes_waits_for_who_does_so_just_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "BUSY_S", 0.01)
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert "temporarily unavailable" in refusal(tmp_path / "cache.db")
    assert list(tmp_path.iterdir()) == []

    async def main() -> None:
        fcntl.flock(other, fcntl.LOCK_UN)
        file = await CacheFile.open(tmp_path / "cache.db", "use")
        await file.put(KEY, b"1")
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="temporarily unavailable"):
            await file.close()

    try:
        asyncio.run(main())
    finally:
        os.close(other)
    assert [p.name for p in tmp_path.iterdir()] == ["cache.db"]


def test_a_new_file_may_be_opened_by_many_at_once(tmp_path: Path):
    async def main() -> None:
        for i in range(10):
            path = tmp_path / f"{i}.db"
            files = await asyncio.gather(*(CacheFile.open(path, "use") for _ in range(4)))
            await asyncio.gather(*(file.put(KEY._replace(tool=str(n)), b"1") for n, file in enumerate(files)))
            await asyncio.gather(*(file.close() for file in files))

    asyncio.run(main())
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{i}.db" for i in range(10)]


WRITER = """
import asyncio, sys
from pathlib import Path
from l0fast.tools.cache import CacheFile, Key

async def main(path, name):
    for i in range(10):
        file = await CacheFile.open(Path(path), "use")
        for j in range(5):
            await file.put(Key(name, "1", f"{i}.{j}"), b"1")
        await file.close()

asyncio.run(main(*sys.argv[1:]))
"""


def test_processes_share_a_file_and_the_last_tidies_up(tmp_path: Path):
    path = tmp_path / "cache.db"
    root = str(Path(__file__).parents[2])
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name], cwd=root) for name in "ab"]
    try:
        assert [writer.wait(60) for writer in writers] == [0, 0]
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT tool, count(*) FROM calls GROUP BY tool").fetchall() == [("a", 50), ("b", 50)]
    db.close()
    assert [p.name for p in tmp_path.iterdir()] == ["cache.db"]


def test_a_process_that_was_killed_loses_no_answer(tmp_path: Path):
    path = tmp_path / "cache.db"
    killed = WRITER.replace("        await file.close()\n", "        import os; os.kill(os.getpid(), 9)\n")
    assert subprocess.run([sys.executable, "-c", killed, path, "a"], cwd=Path(__file__).parents[2]).returncode == -9
    assert (tmp_path / "cache.db-wal").exists()

    async def main() -> None:
        file = await CacheFile.open(path, "replay")
        assert [await file.get(Key("a", "1", f"0.{j}")) for j in range(5)] == [b"1"] * 5
        await file.close()

    asyncio.run(main())
    assert [p.name for p in tmp_path.iterdir()] == ["cache.db"]
