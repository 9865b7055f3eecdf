"""NBAgent in a real sandbox, with an engine that says what the test tells it to."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any, cast

import pytest

from l0fast.agent.chat import Chat
from l0fast.agent.nb_agent import EpisodeLimits, NBAgent
from l0fast.config import AgentConfig, SandboxConfig
from l0fast.engine.base import EngineLoad, Sampled, Sampling, VersionSpan
from l0fast.engine.gate import gated
from l0fast.errors import EngineError, SandboxError
from l0fast.observer import NullObserver, Observer
from l0fast.sandbox import open_sandbox
from l0fast.sandbox.base import Sandbox
from l0fast.segments import segments_of
from l0fast.types import Task, Trajectory, TrajectoryStatus
from tests.agent.search import SEARCH

STALL = "..."
NOBODY = NullObserver()
TASK = Task(id="t", question="What is the capital of Norway?", answers=("Oslo",))


class Scripted:
    """An Engine that reads its responses from a list; the last one is repeated. At STALL it answers no more."""

    def __init__(self, chat: Chat, responses: Sequence[str | Exception], spans: tuple[VersionSpan, ...] = ()):
        self.chat, self.responses, self.spans, self.prompts = chat, list(responses), spans, []
        self.forgotten: list[str] = []

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, *, conversation: str) -> Sampled:
        self.prompts.append(self.chat.decode(prompt_ids))
        response = self.responses.pop(0) if len(self.responses) > 1 else self.responses[0]
        if isinstance(response, Exception):
            raise response
        if response == STALL:
            await asyncio.Event().wait()
        ids = tuple(self.chat.response(response))[: sampling.max_new_tokens]
        return Sampled(
            response_ids=ids,
            sampler_logprobs=(-0.5,) * len(ids),
            finish_reason="stop",
            policy_version=3,
            version_spans=self.spans,
        )

    async def update_weights(self, policy_version: int) -> None:
        raise NotImplementedError

    def forget(self, conversation: str) -> None:
        self.forgotten.append(conversation)

    async def load(self) -> EngineLoad:
        raise NotImplementedError


def say(code: str) -> str:
    return f"<think>a thought of some length</think><code>{code}</code>"


def play(
    chat: Chat,
    *responses: str | Exception,
    timeout_s=30.0,
    turn_timeout_s=None,
    max_turns=4,
    tools=(SEARCH,),
    spans=(),
    observer: Observer = NOBODY,
    wrap: Callable = lambda sandbox: sandbox,
    **config,
):
    engine = Scripted(chat, responses, spans)

    async def main() -> Trajectory:
        async with open_sandbox(SandboxConfig(kind="auto"), max_sessions=2, log=lambda line: None) as sandbox:
            agent = NBAgent(
                chat=chat,
                engine=engine,
                sandbox=wrap(sandbox),
                tools=tools,
                config=AgentConfig(**{"context_tokens": 2000, "max_new_tokens": 200} | config),
                limits=EpisodeLimits(max_turns=max_turns, timeout_s=timeout_s, turn_timeout_s=turn_timeout_s),
                observer=observer,
            )
            return await agent.run_episode(TASK, index=0, temperature=1.0, seed=5)

    return asyncio.run(main()), engine


def test_an_episode_searches_remembers_and_submits(chat: Chat):
    trajectory, engine = play(
        chat,
        say('hits = search("Norway")\nhits'),
        say("answer = hits[0].split()[-1][:-1]\nanswer"),
        say("submit_final_answer(answer)"),
    )
    assert trajectory.status is TrajectoryStatus.COMPLETED
    assert trajectory.answer == "Oslo"
    assert [turn.output for turn in trajectory.turns[:2]] == ["['The capital of Norway is Oslo.']", "'Oslo'"]
    assert all(turn.well_formed and turn.error is None and turn.policy_version == 3 for turn in trajectory.turns)
    assert engine.prompts[1].endswith("<output>\n['The capital of Norway is Oslo.']\n</output>\nassistant\n")
    (segment,) = segments_of(trajectory)  # one append-only row
    assert len(segment.spans) == 3


def test_a_turn_of_a_model_whose_prompts_begin_its_thought_is_well_formed(model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant\\n'", "assistant\\n<think>\\n'"))
    trajectory, engine = play(Chat(folder), say("submit_final_answer('Oslo')"))
    assert engine.prompts[0].endswith("assistant\n<think>\n")
    assert trajectory.turns[0].well_formed
    assert trajectory.turns[0].text == say("submit_final_answer('Oslo')")


def test_malformed_text_is_answered_with_a_complaint_and_nothing_runs(chat: Chat):
    trajectory, engine = play(chat, "Oslo!", say('submit_final_answer("x")'))
    first = trajectory.turns[0]
    assert first.output is None
    assert not first.well_formed
    assert "write one <code>" in (first.complaint or "")
    assert "write one <code>" in engine.prompts[1]


@pytest.mark.parametrize(
    ("traceback", "shown"), [("last_line", "ZeroDivisionError: division by zero"), ("full", "1/0")]
)
def test_an_error_is_shown_and_the_session_lives(chat: Chat, traceback: str, shown: str):
    trajectory, engine = play(chat, say("x = 7\n1/0"), say("submit_final_answer(x)"), traceback=traceback)
    assert trajectory.turns[0].error == "ZeroDivisionError"
    assert shown in (trajectory.turns[0].output or "")
    assert ("Traceback" in (trajectory.turns[0].output or "")) == (traceback == "full")
    assert trajectory.answer == "7"


def test_a_tools_error_reaches_the_agent_as_an_exception(chat: Chat):
    trajectory, _ = play(
        chat, say("try:\n    search('')\nexcept Exception as e:\n    submit_final_answer(type(e).__name__)")
    )
    assert trajectory.answer == "ToolError"


@pytest.mark.parametrize("number", ["1", "0", "'x'", "None", "1e999"])
def test_a_to_do_that_is_not_there_is_the_agents_error_and_no_more(chat: Chat, number: str):
    trajectory, _ = play(
        chat,
        say("try:\n    notepad.check_todo(" + number + ")\nexcept Exception as e:\n    name = type(e).__name__"),
        say("submit_final_answer(name)"),
    )
    assert trajectory.answer == ("TypeError" if number in ("None", "1e999") else "ToolError")


def test_a_long_integer_is_submitted_to_its_last_digit(chat: Chat):
    trajectory, _ = play(chat, say("submit_final_answer(3**500)"))
    assert trajectory.answer == str(3**500)


def test_only_the_first_answer_counts(chat: Chat):
    trajectory, _ = play(chat, say('submit_final_answer("first")\nsubmit_final_answer("second")'))
    assert trajectory.answer == "first"
    assert len(trajectory.turns) == 1


def test_turns_are_limited(chat: Chat):
    trajectory, _ = play(chat, say("1 + 1"), max_turns=3)
    assert trajectory.status is TrajectoryStatus.TRUNCATED_TURNS
    assert len(trajectory.turns) == 3


def test_a_context_that_may_not_be_trimmed_ends_the_episode(chat: Chat):
    trajectory, _ = play(chat, say("'word ' * 60"), trim="none", context_tokens=400, max_new_tokens=100)
    assert trajectory.status is TrajectoryStatus.TRUNCATED_CONTEXT


def test_a_trim_keeps_variables_and_notepad_and_starts_a_new_row(chat: Chat):
    trajectory, engine = play(
        chat,
        say("x = 41\nnotepad.add_facts('Oslo is in Norway')"),
        say("'word ' * 100"),
        say("'word ' * 100"),
        say("submit_final_answer(x + 1)"),
        context_tokens=560,
        max_new_tokens=150,
    )
    assert trajectory.answer == "42"
    assert "- Oslo is in Norway" in engine.prompts[1]  # shown as it changed
    assert "Earlier turns were dropped" in engine.prompts[-1]
    assert "- Oslo is in Norway" in engine.prompts[-1]
    assert len(segments_of(trajectory)) > 1


def test_a_cell_that_hangs_is_stopped_and_told(chat: Chat):
    trajectory, _ = play(chat, say("while True: pass"), say('submit_final_answer("out")'), cell_timeout_s=0.3)
    assert trajectory.turns[0].error == "Timeout"
    assert trajectory.answer == "out"


def test_a_lost_engine_is_recorded_with_its_cause(chat: Chat):
    trajectory, _ = play(chat, say("1"), EngineError("it died"))
    assert trajectory.status is TrajectoryStatus.FAILED_ENGINE
    assert trajectory.cause == "it died"
    assert len(trajectory.turns) == 1


def test_a_lost_session_is_recorded_not_raised(chat: Chat):
    trajectory, _ = play(chat, say("import os\nos._exit(3)"))
    assert trajectory.status is TrajectoryStatus.FAILED_SANDBOX
    assert trajectory.cause


def test_an_answer_of_a_thousand_lists_in_each_other_costs_its_episode_and_not_the_run(chat: Chat):
    body = 'b"[" * 1000 + b"]" * 1000'
    call = """b'{"op":"call","id":1,"name":"submit_final_answer","kw":{},"args":[%b]}'"""
    code = f'import os\nbody = {call} % ({body})\nos.write(3, len(body).to_bytes(4, "little") + body)\nwhile True: pass'
    trajectory, _ = play(chat, say(code))
    assert trajectory.status is TrajectoryStatus.FAILED_SANDBOX
    assert "levels" in str(trajectory.cause)


def test_a_bug_is_not_data(chat: Chat):
    with pytest.raises(KeyError):
        play(chat, KeyError("bug"))


def test_a_session_that_can_not_start_is_recorded(chat: Chat):
    class Broken:
        kind = "broken"

        def session(self, tools, *, seed, files):
            raise SandboxError("no room")

    trajectory, _ = play(chat, say("1"), wrap=lambda sandbox: Broken())
    assert trajectory.status is TrajectoryStatus.FAILED_SANDBOX
    assert trajectory.cause == "no room"


# --- deadlines, each with its own words -------------------------------------------------------------------------------


def time_passes(seconds: float) -> None:
    """The loop's: nothing takes longer on a machine that is busy."""
    loop = asyncio.get_running_loop()
    now = loop.time
    loop.time = lambda: now() + seconds  # pyright: ignore[reportAttributeAccessIssue]


class Slow(NullObserver):
    """As if something took the agent so long, from the n-th time on that it does it."""

    def __init__(self, what: str, seconds: float, first: int = 1):
        self.what, self.seconds, self.first = what, seconds, first

    def episode(self, name: str) -> "Slow":
        return self

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        self.first -= name == self.what
        if name == self.what and self.first <= 0:
            time_passes(self.seconds)
        yield

    def end(self, **facts) -> None: ...


def test_the_deadline_ends_an_episode_that_waits(chat: Chat):
    trajectory, _ = play(
        chat, say("while True: pass"), timeout_s=60, cell_timeout_s=1000, observer=Slow("execute", 100)
    )
    assert trajectory.status is TrajectoryStatus.FAILED_DEADLINE
    assert trajectory.cause == "not over within 60 s, running its cell in turn 1"


async def never(query: str) -> list[str]:
    await asyncio.Event().wait()
    raise AssertionError


class NoRoom:
    """A sandbox whose sessions never come."""

    kind = "full"

    @asynccontextmanager
    async def session(self, tools, *, seed, files) -> AsyncIterator[None]:
        await asyncio.Event().wait()
        yield


@pytest.mark.parametrize(("responses", "stalled", "at", "doing"), [
    ((say("1"), STALL), {}, "generate", "turn 2 not over within 60 s, waiting for its response"),
    ((say("1"),), {"wrap": lambda sandbox: NoRoom()}, "lease", "turn 1 not over within 60 s, waiting for a session"),
    (
        (say("search('x')"),),
        {"tools": (replace(SEARCH, call=never),)},
        "tool",
        "turn 1 not over within 60 s, waiting for search()",
    ),
    ((say("while True: pass"),), {}, "execute", "turn 1 not over within 60 s, running its cell"),
])  # fmt: skip
def test_the_deadline_of_a_turn_says_what_was_waited_for(
    chat: Chat, responses: Sequence[str], stalled: dict, at: str, doing: str
):
    limits: dict[str, Any] = {"timeout_s": 1000, "turn_timeout_s": 60, "cell_timeout_s": 1000}
    trajectory, engine = play(chat, *responses, observer=Slow(at, 100, first=len(responses)), **limits, **stalled)
    assert trajectory.status is TrajectoryStatus.FAILED_DEADLINE
    assert trajectory.cause == doing
    assert len(trajectory.turns) == len(responses) - 1
    assert engine.forgotten == ["t/0/5"]


def test_each_turn_has_its_own_time(chat: Chat):
    limits: dict[str, Any] = {"timeout_s": 1000, "turn_timeout_s": 60, "cell_timeout_s": 1000, "max_turns": 4}
    trajectory, _ = play(chat, say("1"), observer=Slow("execute", 40), **limits)
    assert trajectory.status is TrajectoryStatus.TRUNCATED_TURNS
    assert len(trajectory.turns) == 4


def test_the_turns_of_an_episode_share_a_timer_that_ends_with_it(chat: Chat):
    async def main():
        agent = NBAgent(
            chat=chat,
            engine=Scripted(chat, ["nothing to run"]),
            sandbox=None,  # type: ignore[arg-type]
            tools=(),
            config=AgentConfig(context_tokens=2000, max_new_tokens=200),
            limits=EpisodeLimits(max_turns=4, timeout_s=60, turn_timeout_s=60),
        )
        trajectory = await agent.run_episode(TASK, index=0, temperature=1.0, seed=5)
        assert len(trajectory.turns) == 4
        return [*asyncio.get_running_loop()._scheduled]  # type: ignore[attr-defined]

    timers = asyncio.run(main())
    assert len(timers) == 2, "its own, and that of its turns"
    assert all(timer.cancelled() for timer in timers)


def test_who_sampled_what_stands_on_the_turn(chat: Chat):
    spans = (VersionSpan(3, 0, 4), VersionSpan(4, 4, 9))
    trajectory, _ = play(chat, say("submit_final_answer(1)"), spans=spans)
    assert trajectory.turns[0].version_spans == ((3, 0, 4), (4, 4, 9))
    assert trajectory.turns[0].oldest_version == 3


@pytest.mark.parametrize("last", [say("submit_final_answer(1)"), EngineError("it died"), KeyError("a bug")])
def test_however_an_episode_ends_the_engine_forgets_it_and_its_observer_is_told(chat: Chat, last: str | Exception):
    told = []

    class Episode:
        @contextmanager
        def span(self, name: str) -> Iterator[None]:
            told.append(name)
            yield
            told.append(f"/{name}")

        def end(self, **facts) -> None:
            told.append(facts)

    class Told(NullObserver):
        def episode(self, name: str) -> Episode:
            told.append(name)
            return Episode()

    try:
        _, engine = play(chat, say("search('x')"), last, observer=Told())
        assert engine.forgotten == ["t/0/5"]
    except KeyError:
        pass
    turn = ["generate", "/generate", "lease", "/lease", "execute", "tool", "/tool", "/execute"]
    assert told[: 1 + len(turn)] == ["t/0/5", *turn]
    if isinstance(last, str):
        assert told[9:] == ["generate", "/generate", "execute", "/execute", {"status": "completed", "turns": 2}]
    else:
        status = "failed_engine" if isinstance(last, EngineError) else "cancelled"
        assert told[9:] == ["generate", {"status": status, "turns": 1}]


class Line:
    """An admission that lets nobody in until it is told to."""

    num_in_flight = num_parked = 0

    def __init__(self):
        self.asked, self.open = asyncio.Event(), False
        self.line: list[str] = []

    def ask(self, conversation: str, prompt_tokens: int, now_s: float) -> bool:
        self.line.append(conversation)
        self.asked.set()
        return False

    def admit(self, now_s: float) -> list[str]:
        line, self.line = (self.line, []) if self.open else ([], self.line)
        return line

    def ran(self, conversation: str, tokens: int, cached_tokens: int, now_s: float) -> None: ...
    def withdraw(self, conversation: str, now_s: float) -> None: ...
    def forget(self, conversation: str) -> None: ...
    def observe(self, load: EngineLoad) -> None: ...
    def updated_weights(self) -> None: ...


class Scheduled(Scripted):
    async def load(self) -> EngineLoad:
        return EngineLoad(running=0, waiting=0, used_tokens=0, max_tokens=100)


@pytest.mark.parametrize(("responses", "cause"), [
    (("not code",), None),
    ((STALL,), "turn 1 not over within 10 s, waiting for its response"),
])  # fmt: skip
def test_who_waits_to_be_admitted_has_as_long_afterwards(chat: Chat, responses: Sequence[str], cause: str | None):
    async def main() -> Trajectory:
        line = Line()
        gate = await gated(Scheduled(chat, responses), line, timeout_s=1e6)
        agent = NBAgent(
            chat=chat,
            engine=gate,
            sandbox=cast(Sandbox, NoRoom()),
            tools=(),
            config=AgentConfig(context_tokens=2000, max_new_tokens=200),
            limits=EpisodeLimits(max_turns=1, timeout_s=20.0, turn_timeout_s=10.0),
        )
        episode = asyncio.create_task(agent.run_episode(TASK, index=0, temperature=1.0, seed=5))
        await line.asked.wait()
        time_passes(1000)
        for _ in range(20):
            await asyncio.sleep(0)
        assert not episode.done()
        line.open = True
        await gate.look()
        for _ in range(20):
            await asyncio.sleep(0)
        # an hour in which it is its own fault
        time_passes(3600)
        return await episode

    trajectory = asyncio.run(main())
    assert trajectory.cause == cause
    assert trajectory.status is (TrajectoryStatus.FAILED_DEADLINE if cause else TrajectoryStatus.TRUNCATED_TURNS)
