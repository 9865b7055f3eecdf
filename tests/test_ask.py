"""NB-Agent on its own, from Python and from a terminal, with a real endpoint on loopback and a real sandbox."""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
from aiohttp import web

from l0fast.agent.__main__ import main
from l0fast.ask import AskConfig, ask, config_of
from l0fast.config import AgentConfig, EngineConfig, RolloutConfig, RunConfig, ToolsConfig
from l0fast.errors import UsageError
from l0fast.types import TrajectoryStatus

KEY = "sk-not-to-be-seen"
STOPS = "<think>Now half a thought"
FURTHER = ["--answer", "answer.txt", "--agent.max-new-tokens", "99"]
ROOT = Path(__file__).parents[1]


class Endpoint:
    """A server in a thread of its own: answers are taken from a list, a status code is an error."""

    def __init__(self) -> None:
        self.answers: list[str | int] = []
        self.requests: list[dict[str, Any]] = []
        self.url = ""
        self.go_on = asyncio.Event()
        self._ready, self._loop = threading.Event(), asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(10)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def let_go(self) -> None:
        self._loop.call_soon_threadsafe(self.go_on.set)

    def _run(self) -> None:
        self._loop.run_until_complete(self._start())
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._runner.cleanup())

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(await request.json() | {"key": request.headers.get("Authorization")})
        answer = self.answers.pop(0)
        if isinstance(answer, int):
            return web.json_response({"error": f"key {KEY} is not liked"}, status=answer)
        # as servers do: a text that ends an answer is left out of it
        for stop in self.requests[-1].get("stop", ()):
            answer = answer.partition(stop)[0]
        if not self.requests[-1].get("stream"):
            choice = {"message": {"content": answer}, "finish_reason": "stop"}
            return web.json_response({"choices": [choice]})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if answer.startswith(STOPS):
            # says that much, and then nothing more
            await response.write(b"data: " + orjson.dumps({"choices": [{"delta": {"content": answer}}]}) + b"\n\n")
            await self.go_on.wait()
            return response
        for i in range(0, len(answer), 5):
            await response.write(
                b"data: " + orjson.dumps({"choices": [{"delta": {"content": answer[i : i + 5]}}]}) + b"\n\n"
            )
        await response.write(b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n')
        return response


@pytest.fixture(scope="module")
def server() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    yield endpoint
    endpoint.close()


@pytest.fixture
def endpoint(server: Endpoint) -> Endpoint:
    server.answers, server.requests = [], []
    return server


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.chdir(tmp_path)


def say(code: str, think: str = "a thought of some length") -> str:
    return f"<think>{think}</think>\n<code>{code}</code><output>made up</output>"


def test_five_lines_from_python(endpoint: Endpoint, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("Oslo is the capital of Norway.\n\nRome is the capital of Italy.")
    endpoint.answers = [say("hits = search('Norway')\nhits"), say("submit_final_answer(hits[0].split()[0])")]
    trajectory = asyncio.run(
        ask("Capital of Norway?", endpoint=endpoint.url, model="m", tools=[f"search={tmp_path / 'notes.txt'}"])
    )
    assert (trajectory.status, trajectory.answer) == (TrajectoryStatus.COMPLETED, "Oslo")
    assert trajectory.turns[0].output == "['Oslo is the capital of Norway.']"
    # what ends an answer is put back, and what came after it never came
    assert [turn.text[-7:] for turn in trajectory.turns] == ["</code>"] * 2
    assert all(turn.well_formed for turn in trajectory.turns)
    first = endpoint.requests[0]
    assert (first["model"], first["key"], first["stop"], first["max_tokens"]) == (
        "m",
        f"Bearer {KEY}",
        ["</code>"],
        3192,
    )
    assert "search(query: str) -> list[str]" in first["messages"][0]["content"]


def test_the_terminal_shows_it_and_the_notebook_keeps_it(
    endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "data.csv").write_text("a,b\n1,2\n")
    endpoint.answers = [
        say("rows = open('data.csv').read()\nprint(rows)", think="Look \x1b[2J at it."),
        "I'd say 2.",
        say("submit_final_answer(rows[-2])"),
    ]
    words = ["What is b?", "--endpoint", endpoint.url, "--model", "m", "--file", "data.csv", "--notebook", "out.ipynb"]
    assert main([*words, "--max-turns", "5", "--temperature", "0.25", "--body", "top_p=0.5", *FURTHER]) == 0
    captured = capsys.readouterr()
    for part in (
        "<think>Look \\x1b[2J at it.</think>",
        "<code>rows = open",
        "a,b\n1,2",
        "write one <code>",
        "answer: 2",
        "3 turns",
    ):
        assert part in captured.out
    assert "\x1b" not in captured.out
    assert "sandbox: " in captured.err
    assert KEY not in captured.out + captured.err
    request = endpoint.requests[0]
    assert request["messages"][1]["content"] == "What is b?\n\nFiles in the working directory: data.csv"
    assert request["max_tokens"] == 99
    assert (tmp_path / "answer.txt").read_text() == "2"
    assert (request["temperature"], request["top_p"], request["stream"]) == (0.25, 0.5, True)
    assert "You have 5 turns" in request["messages"][0]["content"]
    book = json.loads((tmp_path / "out.ipynb").read_text())
    assert book["metadata"]["l0fast"]["answer"] == "2"
    assert KEY not in json.dumps(book)
    assert main([*words]) == 2
    assert "never overwrites" in capsys.readouterr().err


def test_a_terminal_that_lacks_a_letter_loses_no_episode(
    endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    endpoint.answers = [say("submit_final_answer('1 → 2')")]
    said = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(said, encoding="latin-1", write_through=True))
    words = ["What?", "--endpoint", endpoint.url, "--model", "m", "--notebook", str(tmp_path / "out.ipynb")]
    assert main([*words, *FURTHER]) == 0
    assert b"answer: 1 \\u2192 2" in said.getvalue()


def test_without_an_answer_it_says_why_and_keeps_what_there_is(
    endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["Who?", "--endpoint", endpoint.url, "--model", "m", "--max-turns", "1", "--notebook"]
    endpoint.answers = [say("1 + 1")]
    assert main([*words, "a.ipynb"]) == 1
    assert "no answer: truncated turns" in capsys.readouterr().out
    endpoint.answers = [400]
    assert main([*words, "b.ipynb"]) == 1
    out = capsys.readouterr().out
    assert "no answer: " in out
    assert "400" in out
    assert KEY not in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ipynb", "b.ipynb"]


@pytest.mark.parametrize(
    ("last", "kept"),
    [
        (STOPS, f"No code ran. The model wrote:\n\n```\n{STOPS}\n```\n\n*interrupted here*"),
        (None, "This cell ended with Interrupted:\n\n```\nwait()\n```"),
    ],
    ids=["while it thinks", "while its code runs"],
)
def test_ctrl_c_saves_what_there_is_and_says_where(endpoint: Endpoint, tmp_path: Path, last: str | None, kept: str):
    (tmp_path / "my_tools.py").write_text(
        "import asyncio\n\nasync def wait() -> None:\n    'Wait.'\n    print('it waits', flush=True)\n    await asyncio.Event().wait()\n"
    )
    endpoint.answers = [say("6 * 7"), last or say("wait()")]
    command = ["-m", "l0fast.agent", "Why?", "--endpoint", endpoint.url, "--model", "m", "--notebook", "out.ipynb"]
    process = subprocess.Popen(
        [sys.executable, *command, "--tools", "my_tools:wait", "--sandbox", "process"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(tmp_path)])},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    said = ""
    until = last or "it waits"
    while until not in said:
        said += (character := process.stdout.read(1))
        assert character, process.communicate()
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        endpoint.let_go()
    assert process.returncode == 130, errors
    assert "interrupted in turn 2: what there is was written to out.ipynb" in errors
    assert "Traceback" not in errors
    book = json.loads((tmp_path / "out.ipynb").read_text())
    assert book["metadata"]["l0fast"]["status"] == "failed_interrupted"
    sources = [cell["source"] for cell in book["cells"]]
    assert "6 * 7" in sources
    assert kept in sources[-1]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--tools", "serach"], "did you mean search"),
        (["--tools", "json:loads", "json:loads"], "twice"),
        (["--file", "none.csv"], "no such file"),
        (["--max-turns", "0"], "max_turns = 0"),
        (["--endpoint", "nonsense"], "is no address"),
        (["--api-key-env", "NO_SUCH_KEY"], "no NO_SUCH_KEY"),
        (["--nonsense", "1"], "--nonsense is no flag"),
        (["--web.search-provider"], "--web.search-provider is no flag, or has no value"),
        (["--web.search-provider", "bing"], "web.search_provider = 'bing'"),
        (["--wab.search-provider=bing"], "wab"),
        (["--engine.slots", "2"], "engine = {'slots': 2}, but the model answers at an endpoint"),
        (["--answer", "no/such/a.md"], "there is no folder no/such"),
        (["--answer", "."], "is a folder"),
        (["--notebook", "no/such/a.ipynb"], "there is no folder no/such"),
    ],
)
def test_what_can_be_set_right_is_one_sentence(
    endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], part: str
):
    assert main(["Who?", "--endpoint", endpoint.url, "--model", "m", *words]) == 2
    error = capsys.readouterr().err.splitlines()
    assert part in error[-1]
    assert error[-1].startswith("l0fast: ")
    assert not list(tmp_path.iterdir())
    assert not endpoint.requests


def test_settings_may_stand_before_the_question(endpoint: Endpoint, tmp_path: Path):
    endpoint.answers = [say("print('x' * 30)"), say("submit_final_answer('Oslo')")]
    words = ["--agent.output-chars", "9", "--agent.prompt=full", "Capital of Norway?"]
    assert main([*words, "--endpoint", endpoint.url, "--model", "m", "--notebook", "out.ipynb"]) == 0
    assert "Capital of Norway?" in endpoint.requests[0]["messages"][-1]["content"]
    assert "x" * 10 not in str(endpoint.requests[1]["messages"])


def test_an_answer_that_can_not_be_written_is_in_the_notebook(
    endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    endpoint.answers = [say("submit_final_answer('Oslo')")]
    words = ["Capital?", "--endpoint", endpoint.url, "--model", "m", "--notebook", "out.ipynb", "--answer", "/dev/full"]
    assert main(words) == 2
    assert "can't be written (No space left on device): the answer is in out.ipynb" in capsys.readouterr().err
    assert json.loads((tmp_path / "out.ipynb").read_text())["metadata"]["l0fast"]["answer"] == "Oslo"


def test_tools_of_the_settings_are_there_and_their_answers_are_kept_and_replayed(endpoint: Endpoint, tmp_path: Path):
    notes = tmp_path / "notes.txt"
    notes.write_text("Oslo is the capital of Norway.")

    def said(query: str, mode: str):
        endpoint.answers = [say(f"search({query!r})"), say("submit_final_answer('x')")]
        kept = {"use": [f"search={notes}"], "cache_file": "kept.sqlite", "cache_mode": mode}
        return asyncio.run(ask("Capital?", endpoint=endpoint.url, settings={"tools": kept})).turns[0].output

    assert said("Norway", "record") == said("Norway", "replay") == "['Oslo is the capital of Norway.']"
    assert "the recording has no answer" in (said("Oslo", "replay") or "")


def test_a_wrong_key_is_said_without_it(endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    endpoint.answers = [401]
    assert main(["Who?", "--endpoint", endpoint.url, "--model", "m"]) == 2
    captured = capsys.readouterr()
    assert "OPENAI_API_KEY holds another key" in captured.err
    assert KEY not in captured.err + captured.out
    assert not list(tmp_path.iterdir())


def test_a_key_that_is_refused_later_leaves_the_turns_before(
    endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    endpoint.answers = [say("6 * 7"), 401]
    assert main(["Who?", "--endpoint", endpoint.url, "--model", "m", "--notebook", "out.ipynb"]) == 2
    error = capsys.readouterr().err
    assert "OPENAI_API_KEY holds another key" in error
    assert "interrupted in turn 2: what there is was written to out.ipynb" in error
    assert "6 * 7" in (tmp_path / "out.ipynb").read_text()


def test_an_endpoints_flags_need_an_endpoint(capsys: pytest.CaptureFixture[str]):
    assert main(["Who?", "--body", "top_p=0.5"]) == 2
    assert "give --endpoint" in capsys.readouterr().err


def test_no_question_and_no_model_are_one_sentence():
    with pytest.raises(UsageError, match="no question"):
        asyncio.run(ask("  "))
    with pytest.raises(UsageError, match="no policy that ships .geography"):
        asyncio.run(ask("Who?", model="no/such/folder"))
    with pytest.raises(UsageError, match="agent.prompt = 'odd'"):
        asyncio.run(ask("Who?", endpoint="http://127.0.0.1:1", settings={"agent": {"prompt": "odd"}}))
    with pytest.raises(UsageError, match="agnet"):
        asyncio.run(ask("Who?", endpoint="http://127.0.0.1:1", settings={"agnet": {}}))


@pytest.mark.parametrize("kind", ["simulated", "sglang"])
def test_an_engine_that_would_not_answer_is_refused_in_a_sentence(kind: str, capsys: pytest.CaptureFixture[str]):
    assert main(["Who?", "--engine.kind", kind]) == 2
    assert f"l0fast: engine.kind = '{kind}', but transformers answers" in capsys.readouterr().err


def test_a_policy_is_asked_as_it_was_trained():
    run = RunConfig(agent=AgentConfig(max_new_tokens=50), rollout=RolloutConfig(max_turns=3))
    config = config_of(run)
    assert (config.agent, config.max_turns, config.engine.slots) == (run.agent, 3, 1)
    # which is no engine to ask one question
    assert config_of(RunConfig(engine=EngineConfig(kind="simulated"))).engine.kind == "auto"
    assert config_of(None) == AskConfig()
    recorded = RunConfig(tools=ToolsConfig(use=("web_search",), cache_file="kept.sqlite", cache_mode="replay"))
    assert config_of(recorded).tools == ToolsConfig(use=("web_search",))
