"""The tools a recipe names, opened together: what agents get, what is kept, and what is refused."""

import asyncio
import shutil

import pytest
from aiohttp import web

from l0fast import __version__
from l0fast.config import ToolsConfig, WebConfig
from l0fast.corpus.index import Passage, build
from l0fast.errors import ToolError, UsageError
from l0fast.sandbox.base import ToolSpec
from l0fast.tools.broker import open_broker
from l0fast.tools.convert import Converter
from l0fast.tools.files import visual_qa_of
from l0fast.tools.local_search import LocalSearch, search_tool
from l0fast.tools.toolbox import describe_tools, open_toolbox
from l0fast.types import Task


def opened(names, use, *, config=None, file=None, mode="use"):
    """What the coroutine function `use` makes of the open toolbox."""

    async def main():
        async with (
            open_broker(file, mode) as broker,
            open_toolbox(names, ToolsConfig(), config or WebConfig(), broker) as box,
        ):
            return await use(box)

    return asyncio.run(main())


async def shown(box):
    return [tool.name for tool in (*box.common, *box.for_task(Task(id="t", question="q", answers=("a",))))]


def test_agents_get_the_tools_that_are_named_in_their_order(tmp_path, monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "k")
    (tmp_path / "notes.txt").write_text("Oslo is in Norway.\n\nRome is in Italy.")
    names = ["get_webpage_in_markdown", "web_search", f"search={tmp_path / 'notes.txt'}", "inspect_file"]
    assert opened(names, shown) == ["get_webpage_in_markdown", "web_search", "search", "inspect_file"]


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["web_search"], "no SERPER_API_KEY"),
        (["visual_qa"], "--web.vision-endpoint"),
        (["inspect_file", "inspect_file"], "names inspect_file twice"),
        (["web_serch"], "no tool is called 'web_serch'"),
    ],
)
def test_a_tool_that_can_not_be_had_is_named(names, complaint, monkeypatch):
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    with pytest.raises(UsageError, match=complaint):
        opened(names, shown)


def test_pages_are_told_who_reads_them_as_the_user_wants(serving):
    told = []

    async def answer(request):
        told.append(request.headers["User-Agent"])
        raise web.HTTPNotFound

    async def main():
        async with serving(answer) as url:
            for name in ("", "lab (a@b.org)"):
                config = WebConfig(allow_private=True, user_agent=name)
                async with (
                    open_broker() as broker,
                    open_toolbox(["get_webpage_in_markdown"], ToolsConfig(), config, broker) as box,
                ):
                    with pytest.raises(ToolError, match="404"):
                        await box.common[0].call(url)

    asyncio.run(main())
    assert told == [f"l0fast/{__version__}", "lab (a@b.org)"]


def test_two_tools_that_agents_would_call_by_one_name_are_refused(tmp_path):
    names = [f"search={tmp_path / name}.txt" for name in "ab"]
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    for also in (names, [names[0], "retrieve=http://127.0.0.1:9/retrieve"]):
        with pytest.raises(UsageError, match="are called search: keep one of them"):
            opened(also, shown)
        with pytest.raises(UsageError, match="are called search: keep one of them"):
            describe_tools(also, WebConfig())


def test_a_file_that_has_changed_since_an_earlier_run_is_read_again_and_one_that_was_copied_is_not(
    tmp_path, monkeypatch
):
    file, cache = tmp_path / "a.csv", tmp_path / "cache.db"
    task = Task(id="t", question="q", answers=("a",), files={"a.csv": str(file)})
    converted = []

    async def markdown(self, data, content_type, name, charset=None):
        converted.append(data)
        return data.decode()

    monkeypatch.setattr(Converter, "markdown", markdown)

    async def use(box):
        [tool] = box.for_task(task)
        return await tool.call("a.csv")

    def said(text, mode="use"):
        file.write_text(text)
        return opened(["inspect_file"], use, file=cache, mode=mode)

    assert [said("1"), said("2"), said("1", "replay")] == ["1", "2", "1"]
    assert converted == [b"1", b"2"]


def test_what_is_searched_and_has_changed_since_an_earlier_run_is_searched_again(tmp_path):
    notes, index, cache = tmp_path / "notes.txt", tmp_path / "index", tmp_path / "cache.db"

    async def use(box):
        return await box.common[0].call("Oslo")

    def said(name):
        return opened([name], use, file=cache), opened([name], use, file=cache, mode="replay")

    for text in ("Oslo is rainy.", "Oslo is sunny."):
        notes.write_text(text)
        shutil.rmtree(index, ignore_errors=True)
        build([Passage(id="1", title="", text=text)], index)
        for name in (f"search={notes}", f"corpus={index}"):
            assert said(name) == ([text], [text])


def test_more_results_than_an_earlier_run_was_given_are_searched_for_anew(tmp_path):
    async def found(num_results):
        async with open_broker(tmp_path / "cache.db") as broker:
            return await broker.wrap(search_tool(LocalSearch(["a b", "a c", "d", "e"]), num_results)).call("a")

    assert [len(asyncio.run(found(n))) for n in (1, 2)] == [1, 2]


def test_a_picture_that_has_changed_is_looked_at_again_and_a_file_that_is_gone_is_an_error_for_the_agent(tmp_path):
    picture = tmp_path / "p.png"
    task = Task(id="t", question="q", answers=("a",), files={"p.png": str(picture)})
    looked = []

    async def look(image: str, content: str, question: str) -> str:
        looked.append(picture.read_bytes())
        return f"{len(looked)}"

    async def main():
        async with open_broker() as broker:
            spec = ToolSpec(
                name="visual_qa", signature="(image: str, content: str, question: str) -> str", doc="", call=look
            )
            tool = visual_qa_of(broker.wrap(spec))(task)
            answers = []
            for data in (b"1", b"1", b"2"):
                picture.write_bytes(data)
                answers.append(await tool.call("p.png", "?"))
            picture.unlink()
            with pytest.raises(ToolError, match=r"p\.png can't be read \(FileNotFoundError\)"):
                await tool.call("p.png", "?")
            return answers

    assert asyncio.run(main()) == ["1", "1", "2"]


def test_a_picture_of_a_task_or_the_web_is_shown_to_the_model_that_sees_and_its_answer_is_kept(serving, tmp_path):
    (tmp_path / "p.png").write_bytes(b"\x89PNG")
    task = Task(id="t", question="q", answers=("a",), files={"p.png": str(tmp_path / "p.png")})
    asked = []

    async def answer(request):
        if request.path == "/pic.png":
            return web.Response(body=b"\x89PNG2", content_type="image/png")
        if request.path == "/page":
            return web.Response(text="no picture")
        asked.append((await request.json())["messages"][0]["content"])
        said = "<think>hm</think> a dog"
        return web.json_response({"choices": [{"message": {"content": said}, "finish_reason": "stop"}]})

    async def main():
        async with serving(answer) as url:
            config = WebConfig(vision_endpoint=url, vision_model="v", allow_private=True)
            async with open_broker() as broker, open_toolbox(["visual_qa"], ToolsConfig(), config, broker) as box:
                [tool] = box.for_task(task)
                answers = [await tool.call("p.png", "What is it?") for _ in range(2)]
                answers.append(await tool.call(f"{url}/pic.png", "And this?"))
                for image, complaint in (
                    (f"{url}/page", "no picture"),
                    ("x.png", "has no file"),
                    ("/etc/passwd", "no file"),
                ):
                    with pytest.raises(ToolError, match=complaint):
                        await tool.call(image, "?")
                with pytest.raises(TypeError, match=r"visual_qa\(\) does not take these arguments: image"):
                    await tool.call(["p.png"], "?")
                return answers

    assert asyncio.run(main()) == ["a dog"] * 3
    (text, picture), (_, other) = asked
    assert text["text"] == "What is it?"
    assert picture["image_url"]["url"] == "data:image/png;base64,iVBORw=="
    assert other["image_url"]["url"].startswith("data:image/png;base64,")
