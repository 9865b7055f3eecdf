"""Opening the rooms of a run leaves the event loop free: what takes long is made in another thread, before episodes begin."""

import asyncio
import sys
import threading
from contextlib import nullcontext
from unittest.mock import AsyncMock

import pytest
from aiohttp import web

from l0fast import rooms
from l0fast.agent.chat import Chat
from l0fast.config import RunConfig, TaskConfig
from l0fast.engine.simulated import SimulatedEngine
from l0fast.errors import UsageError
from l0fast.layout import Layout
from l0fast.meters import Meters
from l0fast.tasks.curriculum import load_curriculum
from l0fast.tasks.world import World
from l0fast.warm_start.demonstrations import Demonstrator
from tests.web_server import serving

CONFIG = RunConfig(task=TaskConfig(kind="invented", num_variants=1))


class ThatWasAll(Exception):
    """Raised where the test has seen enough."""


def open_until_that_was_all(config: RunConfig, run_dir) -> list[str]:
    """What was said until then."""
    said: list[str] = []

    async def main():
        meters = Meters(config, run_dir, log=lambda line: None, warn=lambda line: None)
        async with rooms.open_rooms(config, run_dir, meters, said.append):
            pass

    with pytest.raises(ThatWasAll):
        asyncio.run(main())
    return said


def test_searches_are_indexed_in_another_thread(monkeypatch: pytest.MonkeyPatch, tmp_path):
    indexed: dict[tuple[str, ...], threading.Thread] = {}

    def index(corpus):
        indexed[tuple(corpus)] = threading.current_thread()

    def opened_next(*args: object, **kwargs: object) -> None:
        raise ThatWasAll

    monkeypatch.setattr(rooms, "LocalSearch", index)
    monkeypatch.setattr(rooms, "open_sandbox", opened_next)

    open_until_that_was_all(CONFIG, tmp_path)
    assert indexed.keys() == {tuple(corpus) for corpus in load_curriculum(CONFIG).corpora.values()}
    assert threading.current_thread() not in indexed.values()


@pytest.mark.parametrize("gpus", [0, 2])
def test_a_learner_beside_sglang_is_on_the_gpus_that_were_dealt_out(monkeypatch: pytest.MonkeyPatch, tmp_path, gpus):
    def opened(*args: object, on_gpus: bool, **kwargs: object) -> None:
        assert on_gpus == bool(gpus)
        raise ThatWasAll

    monkeypatch.setattr(rooms, "open_sandbox", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(rooms, "num_gpus", lambda: gpus)
    monkeypatch.setattr(
        rooms, "check_layout", lambda *args, **kwargs: Layout(engines=1, first_gpu=0, ranks=1, weights="ipc")
    )
    monkeypatch.setattr(rooms, "wait_for_memory", AsyncMock())
    monkeypatch.setattr(rooms, "import_sglang", lambda config: None)
    monkeypatch.setattr(rooms, "learner", opened)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    config = CONFIG.model_copy(update={"engine": CONFIG.engine.model_copy(update={"kind": "sglang"})})

    told = any("engines and the learner go without" in line for line in open_until_that_was_all(config, tmp_path))
    assert told == bool(gpus)


def test_an_sglang_that_can_not_be_imported_is_found_before_a_learner_starts(monkeypatch: pytest.MonkeyPatch, tmp_path):
    def learner(*args: object, **kwargs: object) -> None:
        raise AssertionError("a large model takes minutes to load")

    def broken(config: object) -> None:
        assert threading.current_thread() is not threading.main_thread()
        raise ThatWasAll

    monkeypatch.setattr(rooms, "open_sandbox", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(rooms, "num_gpus", lambda: 0)
    monkeypatch.setattr(rooms, "import_sglang", broken)
    monkeypatch.setattr(rooms, "learner", learner)
    config = CONFIG.model_copy(update={"engine": CONFIG.engine.model_copy(update={"kind": "sglang"})})
    assert open_until_that_was_all(config, tmp_path)[-1].startswith("starting the learner and 1 sglang engine")


def test_a_demonstrator_learns_its_worlds_in_another_thread(monkeypatch: pytest.MonkeyPatch, tmp_path):
    added: dict[str, threading.Thread] = {}

    class Watched(Demonstrator):
        def add(self, world: World) -> None:
            added[world.name] = threading.current_thread()
            super().add(world)

    monkeypatch.setattr(rooms, "Demonstrator", Watched)
    config = CONFIG.model_copy(update={"engine": CONFIG.engine.model_copy(update={"kind": "simulated"})})
    folder, worlds = rooms.model_folder("geography"), load_curriculum(config).worlds

    async def main():
        opened = rooms._engine(config, tmp_path, folder, Chat(folder), worlds, None, None, None, lambda line: None)
        async with opened as engine:
            assert isinstance(engine, SimulatedEngine)

    asyncio.run(main())
    assert added.keys() == {world.name for world in worlds}
    assert threading.current_thread() not in added.values()


def asking(tmp_path, *, check: str = "exact_match", **sections) -> RunConfig:
    """A run over questions, with web search and a judge."""
    questions = tmp_path / "q.jsonl"
    questions.write_text(f'{{"question": "1 + 1?", "answer": "2", "check": "{check}"}}\n')
    task = {"kind": "questions", "train": [str(questions)], "eval": [str(questions)]}
    return RunConfig.model_validate({"task": task, "tools": {"use": ["web_search"]}} | sections)


def test_what_costs_nothing_to_look_at_is_looked_at_before_a_model_is_downloaded(monkeypatch, tmp_path):
    def download(name: str) -> None:
        raise AssertionError("it may take an hour")

    monkeypatch.setattr(rooms, "download_model", download)
    monkeypatch.setenv("SERPER_API_KEY", "k")
    model = {"path": "nobody/nothing"}
    judge = {"endpoint": "http://127.0.0.1:9", "model": "m", "api_key_env": "NONE"}
    with pytest.raises(UsageError, match="the environment has no NONE"):
        rooms.check(asking(tmp_path, model=model, judge=judge))
    monkeypatch.setattr(rooms, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="read with trafilatura, pypdf, openpyxl, pebble, which is not installed"):
        rooms.check(asking(tmp_path, model=model, tools={"use": ["get_webpage_in_markdown"]}))
    monkeypatch.delenv("SERPER_API_KEY")
    with pytest.raises(UsageError, match="the environment has no SERPER_API_KEY"):
        rooms.check(asking(tmp_path, model=model))
    with pytest.raises(AssertionError, match="an hour"):
        rooms.check(asking(tmp_path, model=model, tools={"use": []}))


@pytest.mark.parametrize("path", ["/search", "/judge/chat/completions"])
def test_a_search_or_a_judge_that_does_not_answer_is_found_before_a_learner_starts(monkeypatch, tmp_path, path):
    def learner(*args: object, **kwargs: object) -> None:
        raise ThatWasAll

    monkeypatch.setenv("SERPER_API_KEY", "wrong")
    monkeypatch.setattr(rooms, "open_sandbox", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(rooms, "learner", learner)
    refused, check, weight = [path], "judge", 0.0

    async def answer(request: web.Request) -> web.Response:
        if request.path in refused:
            return web.json_response({"message": "No."}, status=400)
        choice = {"message": {"content": "GRADE: CORRECT"}, "finish_reason": "stop"}
        return web.json_response({"organic": [], "choices": [choice]})

    async def main():
        async with serving(answer) as url:
            tools = {"use": ["web_search"], "cache_file": str(tmp_path / "searches")}
            judge = {"endpoint": f"{url}/judge", "model": "m", "cache_file": str(tmp_path / "votes")}
            sections = {
                "web": {"search_url": f"{url}/search"},
                "tools": tools,
                "judge": judge,
                "reward": {"judge": weight},
            }
            config = asking(tmp_path, check=check, **sections)
            meters = Meters(config, tmp_path, log=lambda line: None, warn=lambda line: None)
            async with rooms.open_rooms(config, tmp_path, meters, lambda line: None):
                pass

    def is_found():
        with pytest.raises(UsageError, match="a first (search of the web|judgement) failed .*400 Bad Request.*No"):
            asyncio.run(main())

    is_found()
    refused.clear()
    with pytest.raises(ThatWasAll):
        asyncio.run(main())
    # also where a run has had answers that are kept
    refused.append(path)
    is_found()
    check, weight = "exact_match", 0.5
    is_found()
    # a judge that nobody asks need not answer
    weight = 0.0
    with pytest.raises(ThatWasAll if path.startswith("/judge") else UsageError):
        asyncio.run(main())


def test_the_first_question_costs_no_more_than_any_other():
    questions = load_curriculum(CONFIG).questions(0)

    def calls() -> int:
        """Functions called to draw one."""
        called = 0

        def count(frame: object, event: str, what: object) -> None:
            nonlocal called
            called += event == "call"

        before = sys.getprofile()
        sys.setprofile(count)
        try:
            next(questions)
        finally:
            sys.setprofile(before)
        return called

    first, others = calls(), [calls() for _ in range(50)]
    assert first <= 2 * max(others)
