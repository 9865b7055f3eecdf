"""Tools by name: what is found, what agents are told of it, and one sentence for what can't be one."""

import asyncio
import functools
import os
import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Optional, Union

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l0fast.errors import ToolError, UsageError
from l0fast.sandbox.base import ToolSpec
from l0fast.tools.broker import ToolPolicy, open_broker
from l0fast.tools.registry import PASSAGE_CHARS, _cut, function_tool, known_tools, load_tool, register


def load(word: str) -> ToolSpec:
    spec = load_tool(word)
    assert isinstance(spec, ToolSpec)
    return spec


async def look_up(isbn: str, k: int = 3, how: Literal["fast", "slow"] = "fast") -> list[str]:
    """Title and author
    of a book."""
    return [isbn, str(k), how]


def plain(x: Any = None) -> str:
    """Says x."""
    return f"said {x}"


def bare(x: int) -> int:
    return x


def odd(x: Path) -> str:
    """Takes a path."""
    return str(x)


def test_a_function_is_a_tool_as_it_stands():
    spec = function_tool(look_up)
    assert spec.signature == "(isbn: str, k: int = 3, how: Literal['fast', 'slow'] = 'fast') -> list[str]"
    assert (spec.name, spec.doc) == ("look_up", "Title and author\nof a book.")
    assert asyncio.run(spec.call("1", k=2)) == ["1", "2", "fast"]
    assert asyncio.run(function_tool(plain).call(7)) == "said 7"


def test_a_function_may_take_what_is_optional():
    def find(name: Optional[str] = None, near: Union[int, str] = 0) -> list[str]:  # noqa: UP007, UP045
        """Finds."""
        return [str(name), str(near)]

    async def main() -> Any:
        async with open_broker() as broker:
            return await broker.wrap(function_tool(find)).call("a", near="b")

    assert asyncio.run(main()) == ["a", "b"]


def test_a_function_may_say_that_it_returns_what_arrives_as_a_list():
    def vector(text: str) -> np.ndarray:
        """Numbers of a text."""
        return np.array([1.5, len(text)])

    def titles(text: str) -> Sequence[str]:
        """Titles of a text."""
        return (text,)

    async def main() -> list[Any]:
        async with open_broker() as broker:
            return [await broker.wrap(function_tool(f)).call("ab") for f in (vector, titles)]

    assert function_tool(vector).signature == "(text: str) -> numpy.ndarray"
    assert asyncio.run(main()) == [[1.5, 2.0], ["ab"]]


def test_a_coroutine_function_in_a_wrapper_is_awaited():
    @functools.wraps(look_up)
    def wrapped(*args: Any, **kw: Any) -> Any:
        return look_up(*args, **kw)

    async def main() -> Any:
        async with open_broker() as broker:
            return await broker.wrap(function_tool(wrapped)).call("1")

    assert asyncio.run(main()) == ["1", "3", "fast"]


def test_as_many_functions_block_at_once_as_there_are_slots():
    together = threading.Barrier(48)

    def meet(n: int) -> int:
        """Waits for all others."""
        together.wait(10)
        return n

    async def main() -> list[int]:
        async with open_broker() as broker:
            call = broker.wrap(function_tool(meet), ToolPolicy(attempts=1)).call
            return await asyncio.gather(*map(call, range(48)))

    assert asyncio.run(main()) == list(range(48))


def test_a_function_that_was_given_up_keeps_its_slot_until_it_returns():
    begun: queue.SimpleQueue[int] = queue.SimpleQueue()
    go_on = threading.Event()

    def hang(n: int) -> int:
        """Hangs."""
        begun.put(n)
        go_on.wait(10)
        return n

    async def main() -> int:
        async with open_broker() as broker:
            call = broker.wrap(function_tool(hang), ToolPolicy(max_concurrent=1)).call
            first = asyncio.create_task(call(1))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert begun.get(timeout=10) == 1
            first.cancel()
            await asyncio.wait([first])
            assert first.cancelled()
            second = asyncio.create_task(call(2))
            for _ in range(20):
                await asyncio.sleep(0)
            assert begun.empty()
            go_on.set()
            return await second

    assert asyncio.run(main()) == 2


def test_a_function_that_hangs_keeps_no_run_from_ending():
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def hang() -> None:
        """Hangs."""
        begun.set()
        go_on.wait(10)
        ended.set()

    async def main() -> None:
        async with open_broker() as broker:
            waiter = asyncio.create_task(broker.wrap(function_tool(hang)).call())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert begun.wait(10)
        with pytest.raises(RuntimeError, match="the broker was left"):
            await waiter

    asyncio.run(main())
    assert not ended.is_set()
    go_on.set()


def test_what_a_function_raises_is_raised_to_its_caller():
    def fail(how: str) -> None:
        """Fails."""
        if how == "known":
            raise ToolError("no such book")
        next(iter(()))

    with pytest.raises(ToolError, match="no such book"):
        asyncio.run(function_tool(fail).call("known"))
    # which no future could hold
    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(function_tool(fail).call("bug"))


@pytest.mark.parametrize(("function", "words"), [(bare, "has no docstring"), (odd, "can't be checked")])
def test_a_function_agents_could_not_use_is_one_sentence(function, words: str):
    with pytest.raises(UsageError, match=words):
        function_tool(function)


def test_a_function_is_found_where_python_finds_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_own_tools.py").write_text(
        "from __future__ import annotations\ndef double(x: int) -> int:\n    'Twice x.'\n    return 2 * x\nvalue = 3\n"
    )
    (tmp_path / "needs_more.py").write_text("import not_there_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    spec = load("my_own_tools:double")
    assert (spec.signature, asyncio.run(spec.call(4))) == ("(x: int) -> int", 8)
    for word, words in (
        ("my_own_tools:value", "no function 'value'"),
        ("my_own_toolz:double", "no module 'my_own_toolz'"),
    ):
        with pytest.raises(UsageError, match=words):
            load_tool(word)
    # what the user's module lacks is told as it is
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        load_tool("needs_more:double")


def test_others_add_their_own():
    spec = ToolSpec(name="own", signature="()", doc="", call=look_up)
    told = []
    register("own_for_test", lambda argument: told.append(argument) or spec)
    assert load_tool("own_for_test=a=b:c") is spec
    assert load_tool("own_for_test") is spec
    assert told == ["a=b:c", ""]
    assert {"own_for_test", "search"} <= set(known_tools())


def test_search_finds_paragraphs_and_says_which_file_they_are_from(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "north.md").write_text("Oslo is the\ncapital of Norway.\n\nBergen is rainy.\n")
    (tmp_path / "south.txt").write_text("Rome is the capital of Italy.")
    (tmp_path / "photo.png").write_bytes(b"Oslo")
    search = load(f"search={tmp_path}").call
    assert asyncio.run(search("Norway")) == ["a/north.md: Oslo is the capital of Norway."]
    assert asyncio.run(load(f"search={tmp_path / 'south.txt'}").call("Italy")) == ["Rome is the capital of Italy."]


def test_whatever_else_lies_in_a_folder_its_texts_are_searched(tmp_path: Path):
    """A lock of an editor is a link to nothing; a name need not be text, and what agents are told has to be."""
    (tmp_path / ".#a.md").symlink_to("somebody@host.1234")
    (tmp_path / "folder.md").mkdir()
    Path(os.fsdecode(bytes(tmp_path) + b"/\xe9t\xe9.md")).write_text("Paris is the capital of France.")

    async def main():
        async with open_broker() as broker:
            return await broker.wrap(load(f"search={tmp_path}")).call("Paris")

    assert asyncio.run(main()) == ["\ufffdt\ufffd.md: Paris is the capital of France."]


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("serach=x", "did you mean search"),
        ("nothing", "there is .*search"),
        ("search", "search=FILE"),
        ("search=/no/such/place", "no such file or folder"),
    ],
)
def test_what_is_no_tool_is_one_sentence(word: str, words: str):
    with pytest.raises(UsageError, match=words):
        load_tool(word)


def test_a_folder_without_text_is_one_sentence(tmp_path: Path):
    with pytest.raises(UsageError, match="there is no text in it"):
        load_tool(f"search={tmp_path}")


@given(st.text(st.sampled_from("ab "), max_size=60).map(lambda text: " ".join((text * 60).split())))
def test_long_paragraphs_are_cut_at_spaces_and_nothing_is_lost(text: str):
    parts = list(_cut(text))
    assert "".join(parts).replace(" ", "") == text.replace(" ", "")
    assert all(0 < len(part) <= PASSAGE_CHARS for part in parts)
    if all(len(word) < PASSAGE_CHARS for word in text.split()):
        assert " ".join(parts) == text
