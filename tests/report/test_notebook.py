"""Notebooks of trajectories: valid, runnable, and the same again when they are run."""

import asyncio
import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l0fast.agent.nb_agent import EpisodeLimits, NBAgent
from l0fast.config import AgentConfig, SandboxConfig
from l0fast.engine.base import EngineLoad, Message, SampledText, Sampling
from l0fast.errors import ToolError, UsageError
from l0fast.ids import Ids
from l0fast.report.notebook import UNFIT, notebook, save_notebook
from l0fast.sandbox import open_sandbox
from l0fast.sandbox.base import ToolSpec
from l0fast.types import Task, ToolCall, Trajectory, TrajectoryStatus, Turn

CELLS = [
    "hits = [search(q) for q in ('Norway', 'Norway', 'Sweden')]\nhits",
    "try:\n    search('')\nexcept ToolError as e:\n    print('said:', e)\nsearch(1)",
    "1/0",
    "!ls",
    "number = notepad.add_todo('check')\nprint(number, search(query='Norway', k=2))",
    "import time\ntime.sleep(60)",
    "submit_final_answer(hits[1])",
]


class Says:
    """A `TextEngine` that reads its responses from a list."""

    def __init__(self, responses: Sequence[str]):
        self.responses = list(responses)

    async def generate(self, messages: Sequence[Message], sampling: Sampling, *, conversation: str) -> SampledText:
        return SampledText(text=self.responses.pop(0), finish_reason="stop")

    def forget(self, conversation: str) -> None: ...

    async def load(self) -> EngineLoad:
        raise NotImplementedError


def play() -> Trajectory:
    asked = 0

    async def search(query: str, k: int = 1) -> list[str]:
        nonlocal asked
        asked += 1
        if not isinstance(query, str):
            raise TypeError("query is a string")
        if not query:
            raise ToolError("search needs a word")
        return [f"answer {asked} to {query} ({k})"]

    async def main() -> Trajectory:
        async with open_sandbox(SandboxConfig(), max_sessions=1, log=lambda line: None) as sandbox:
            agent = NBAgent(
                chat=None,
                engine=Says(
                    [
                        *(
                            f"<think>Turn {n}: ![a](http://b) <img> 1 < 2</think><code>{code}</code>"
                            for n, code in enumerate(CELLS[:4])
                        ),
                        "no code `x`",
                        *(f"<code>{code}</code>" for code in CELLS[4:]),
                    ]
                ),
                sandbox=sandbox,
                tools=(ToolSpec(name="search", signature="(query, k=1) -> list[str]", doc="", call=search),),
                config=AgentConfig(prompt="full", context_tokens=100_000, max_new_tokens=1000, cell_timeout_s=0.3),
                limits=EpisodeLimits(max_turns=20, timeout_s=60.0),
            )
            task = Task(id="t", question="What is <b>up</b>?", answers=("Oslo",))
            return await agent.run_episode(task, index=0, temperature=1.0, seed=1)

    trajectory = asyncio.run(main())
    assert trajectory.status is TrajectoryStatus.COMPLETED, trajectory.cause
    return trajectory


@pytest.fixture(scope="module")
def played() -> Trajectory:
    return play()


def outputs(cells: list[dict[str, Any]]) -> dict[str, str]:
    """What each code cell printed or displayed, last line of an error only; Jupyter breaks long lists into lines."""
    shown = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            texts = []
            for output in cell["outputs"]:
                kind = output["output_type"]
                texts += [output["text"]] if kind == "stream" else []
                texts += [output["data"]["text/plain"]] if kind == "execute_result" else []
                texts += [f"{output['ename']}: {output['evalue']}"] if kind == "error" else []
            shown[cell["id"]] = " ".join(" ".join("".join(text) for text in texts).split())
    return shown


def run(folder: Path, path: Path) -> list[dict[str, Any]]:
    """The cells after all of them ran in a kernel of their own."""
    code = (
        "import nbclient, nbformat, sys; book = nbformat.read(sys.argv[1], 4); "
        "nbclient.NotebookClient(book, timeout=60, kernel_name='python3').execute(); nbformat.write(book, sys.argv[2])"
    )
    env = {**os.environ} | {name: str(folder) for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "JUPYTER_CONFIG_DIR")}
    done = subprocess.run(
        [sys.executable, "-c", code, path, folder / "ran.ipynb"], capture_output=True, text=True, env=env, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "ran.ipynb").read_text())["cells"]


def test_run_again_the_cells_show_what_they_showed(played: Trajectory, tmp_path: Path):
    save_notebook(tmp_path / "book.ipynb", played)
    before = json.loads((tmp_path / "book.ipynb").read_text())["cells"]
    wanted, found = outputs(before), outputs(run(tmp_path, tmp_path / "book.ipynb"))
    assert "answer 2 to Norway" in wanted["turn-1-code"]
    assert list(wanted) == list(found)
    assert found == wanted


def test_it_is_valid_and_says_what_it_cost_and_earned(played: Trajectory):
    rewards = tuple(float(n) for n in range(len(played.turns)))
    book = notebook(replace(played, rewards=rewards), [n / 2 for n in rewards])
    nbformat.validate(nbformat.from_dict(book))
    assert book["metadata"]["l0fast"]["rewards"] == list(rewards)
    cell = next(cell for cell in book["cells"] if cell["id"] == "turn-2-code")
    assert {"turn": 2, "reward": 1.0, "advantage": 0.5, "error": "TypeError"}.items() <= cell["metadata"][
        "l0fast"
    ].items()
    assert cell["metadata"]["tags"] == ["raises-exception"]


def test_what_can_not_run_in_a_notebook_is_quoted(played: Trajectory):
    cells = {cell["id"]: cell for cell in notebook(played)["cells"]}
    assert [turn.error for turn in played.turns if turn.error in UNFIT] == ["SyntaxError", "Timeout"]
    for name, words in (
        ("turn-4-code", "```\n!ls\n```"),
        ("turn-5", "```\nno code `x`\n```"),
        ("turn-7-code", "time.sleep"),
    ):
        assert cells[name]["cell_type"] == "markdown"
        assert words in cells[name]["source"]


def test_the_models_markdown_fetches_nothing_and_holds_no_html(played: Trajectory):
    texts = "\n".join(cell["source"] for cell in notebook(played)["cells"] if cell["cell_type"] == "markdown")
    assert "!\\[a](http://b) \\<img> 1 < 2" in texts
    assert "What is \\<b>up\\</b>?" in texts


def test_a_cell_that_is_run_twice_gets_its_last_answer_again(played: Trajectory):
    scope: dict[str, Any] = {}
    exec(next(cell for cell in notebook(played)["cells"] if cell["id"] == "replay")["source"], scope)
    asked = [scope["search"]("Norway")[0] for _ in range(3)]
    assert asked == ["answer 1 to Norway (1)", "answer 2 to Norway (1)", "answer 2 to Norway (1)"]
    with pytest.raises(LookupError, match="was not called with"):
        scope["search"]("Mars")


def test_a_notebook_needs_no_hard_links(played: Trajectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def link(*args, **kw):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    # as on storage behind FUSE
    monkeypatch.setattr("os.link", link)
    save_notebook(tmp_path / "book.ipynb", played)
    assert [path.name for path in tmp_path.iterdir()] == ["book.ipynb"]


def test_a_notebook_never_overwrites(played: Trajectory, tmp_path: Path):
    path = tmp_path / "book.ipynb"
    path.write_text("mine")
    with pytest.raises(UsageError, match="never overwrites"):
        save_notebook(path, played)
    assert path.read_text() == "mine"
    with pytest.raises(UsageError, match="name another place"):
        save_notebook(tmp_path / "missing" / "book.ipynb", played)
    assert [file.name for file in tmp_path.iterdir()] == ["book.ipynb"]


TEXTS = st.text(st.characters(exclude_categories=("Cs",)))
CALLS = st.builds(
    ToolCall,
    name=st.sampled_from(["search", "notepad.add_todo", "a.b"]),
    arguments=st.lists(TEXTS, max_size=2).map(lambda args: json.dumps([args, {}])),
    answer=st.none() | TEXTS.map(json.dumps),
    error=st.none() | st.tuples(st.sampled_from(["ToolError", "TypeError", "Timeout"]), TEXTS),
)
TURNS = st.builds(
    Turn,
    prompt_ids=st.just(Ids()),
    response_ids=st.just(Ids()),
    sampler_logprobs=st.just(()),
    finish_reason=st.just("stop"),
    policy_version=st.just(0),
    text=TEXTS | TEXTS.map(lambda code: f"<think>{code}</think><code>{code}</code>"),
    output=st.none() | TEXTS,
    complaint=st.none() | TEXTS,
    well_formed=st.booleans(),
    error=st.none() | st.sampled_from(["ValueError", *UNFIT]),
    calls=st.lists(CALLS, max_size=3).map(tuple),
)


@given(st.lists(TURNS, max_size=3), TEXTS)
def test_any_trajectory_is_a_valid_notebook_whose_replay_is_python(turns: list[Turn], text: str):
    task = Task(id="t", question=text, answers=(text,), files={"a.csv": "/a.csv"})
    book = notebook(Trajectory(task=task, index=0, status=TrajectoryStatus.COMPLETED, turns=tuple(turns), answer=text))
    nbformat.validate(nbformat.from_dict(book))
    replay = next(cell for cell in book["cells"] if cell["id"] == "replay")
    scope: dict[str, Any] = {}
    exec(replay["source"], scope)
    for call in (call for turn in turns for call in turn.calls):
        owner, _, method = call.name.rpartition(".")
        tool = getattr(scope[owner], method) if owner else scope[method]
        asked = partial(tool, *json.loads(call.arguments)[0])
        if call.error is not None:
            with pytest.raises(Exception, match="^" + re.escape(call.error[1]) + "$"):
                asked()
        elif call.answer is None:
            with pytest.raises(LookupError, match="too long to be kept"):
                asked()
        else:
            assert asked() == json.loads(call.answer)
