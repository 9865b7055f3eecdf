"""NB-Agent with an engine that takes messages: what is sent, what is trimmed, what is recorded."""

import asyncio
import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l0fast.agent.context import TRIM_NOTE
from l0fast.agent.conversation import Response, converse
from l0fast.agent.nb_agent import EpisodeLimits, NBAgent
from l0fast.config import AgentConfig, SandboxConfig
from l0fast.engine.base import EngineLoad, Message, Sampled, SampledText, Sampling
from l0fast.errors import EngineError, UsageError
from l0fast.ids import Ids
from l0fast.sandbox import open_sandbox
from l0fast.types import Task, ToolCall, Trajectory, TrajectoryStatus, Turn
from tests.agent.search import SEARCH

TASK = Task(id="t", question="What is the capital of Norway?", answers=("Oslo",))


class Says:
    """A `TextEngine` that reads its responses from a list and counts a token every `chars_per_token` characters."""

    def __init__(self, responses: Sequence[str | Exception], chars_per_token: float = 4.0):
        self.responses, self.chars_per_token = list(responses), chars_per_token
        self.asked: list[tuple[list[Message], Sampling]] = []
        self.forgotten: list[str] = []

    async def generate(self, messages: Sequence[Message], sampling: Sampling, *, conversation: str) -> SampledText:
        self.asked.append((list(messages), sampling))
        response = self.responses.pop(0) if len(self.responses) > 1 else self.responses[0]
        if isinstance(response, Exception):
            raise response
        tokens = int(sum(len(m["content"]) for m in messages) / self.chars_per_token)
        return SampledText(text=response, finish_reason="stop", prompt_tokens=tokens, completion_tokens=9)

    def forget(self, conversation: str) -> None:
        self.forgotten.append(conversation)

    async def load(self) -> EngineLoad:
        raise NotImplementedError


def play(*responses: str | Exception, keep_chars: int = 1000, on_turn=lambda turn: None) -> tuple[Trajectory, Says]:
    engine = Says(responses)

    async def main() -> Trajectory:
        async with open_sandbox(SandboxConfig(), max_sessions=1, log=lambda line: None) as sandbox:
            agent = NBAgent(
                chat=None,
                engine=engine,
                sandbox=sandbox,
                tools=(SEARCH,),
                config=AgentConfig(prompt="full", context_tokens=4000, max_new_tokens=200),
                limits=EpisodeLimits(max_turns=4, timeout_s=30.0),
                on_turn=on_turn,
                keep_chars=keep_chars,
            )
            return await agent.run_episode(TASK, index=0, temperature=0.5, seed=5)

    return asyncio.run(main()), engine


def say(code: str) -> str:
    return f"<think>a thought of some length</think><code>{code}</code>"


def test_an_episode_over_messages_is_one_over_ids_without_the_ids():
    turns: list[Turn] = []
    words = [say("x = search('Norway')\nx"), "no code", say("submit_final_answer(x[0].split()[-1][:-1])")]
    trajectory, engine = play(*words, on_turn=turns.append)
    assert (trajectory.status, trajectory.answer) == (TrajectoryStatus.COMPLETED, "Oslo")
    assert tuple(turns) == trajectory.turns
    assert [turn.text for turn in turns] == words
    assert all(turn.prompt_ids == turn.response_ids == turn.sampler_logprobs == () for turn in turns)
    assert [turn.num_tokens for turn in turns] == [9, 9, 9]
    messages, sampling = engine.asked[-1]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert messages[1]["content"] == TASK.question
    assert messages[2]["content"] == words[0]
    assert messages[3]["content"] == "<output>\n['The capital of Norway is Oslo.']\n</output>"
    assert "write one <code>" in messages[5]["content"]
    assert (sampling.max_new_tokens, sampling.temperature, sampling.stop_token_ids) == (200, 0.5, ())
    # every turn samples with a seed of its own
    assert len({sampling.seed for _, sampling in engine.asked}) == 3
    assert engine.forgotten == ["t/0/5"]


def test_what_the_host_was_asked_is_kept_with_its_turn():
    code = "try:\n    search('')\nexcept ToolError:\n    pass\nsearch('Norway')\nnotepad.add_todo('a')\nsearch(query='x' * 90)"
    trajectory, _ = play(say(code), say("submit_final_answer(2**70)"), keep_chars=60)
    first, last = trajectory.turns
    assert first.calls == (
        ToolCall(name="search", arguments='[[""], {}]', answer=None, error=("ToolError", "search needs a word")),
        ToolCall(name="search", arguments='[["Norway"], {}]', answer='["The capital of Norway is Oslo."]'),
        ToolCall(name="notepad.add_todo", arguments='[["a"], {}]', answer='"1"'),
        ToolCall(name="search", arguments=json.dumps([[], {"query": "x" * 90}]), answer=None),
    )
    assert [call.name for call in last.calls] == ["submit_final_answer"]


def test_a_lost_endpoint_is_data_and_a_wrong_key_is_not():
    trajectory, _ = play(EngineError("gone"))
    assert (trajectory.status, trajectory.cause) == (TrajectoryStatus.FAILED_ENGINE, "gone")
    with pytest.raises(UsageError, match="no such model"):
        play(UsageError("no such model"))


TEXTS = st.text(st.sampled_from("ab \n"), max_size=400)


@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=8), st.sampled_from(["soft", "hard", "none"]), st.floats(1.5, 6.0))
def test_what_fits_leaves_room_once_the_endpoint_has_counted(exchanges, trim: str, chars_per_token: float):
    config = AgentConfig(context_tokens=300, max_new_tokens=100, trim=trim)  # pyright: ignore[reportArgumentType]
    engine = Says(["x"], chars_per_token)
    dialogue = converse(None, engine, "c", "system", "question", config)

    async def main() -> None:
        for said, reply in exchanges:
            if not dialogue.fit("<notepad>a</notepad>"):
                return
            response = await dialogue.respond(temperature=1.0, seed=0)
            messages = engine.asked[-1][0]
            if len(engine.asked) > 1:
                assert sum(len(m["content"]) for m in messages) / chars_per_token <= 200
            assert [m["role"] for m in messages] == [
                "system",
                *["user", "assistant"] * (len(messages) // 2 - 1),
                "user",
            ]
            trimmed = messages[1]["content"] != "question"
            assert not trimmed or messages[1]["content"] == f"question\n{TRIM_NOTE}\n<notepad>a</notepad>"
            assert not (trim == "none" and trimmed)
            dialogue.add(
                Response(
                    said,
                    Ids(),
                    Sampled(response_ids=Ids(), sampler_logprobs=(), finish_reason="stop", policy_version=0),
                ),
                reply,
            )
            assert response.text == "x"

    asyncio.run(main())


def test_the_oldest_turns_go_first():
    config = AgentConfig(context_tokens=300, max_new_tokens=100, trim="soft")
    engine = Says(["x"], 3.0)
    dialogue = converse(None, engine, "c", "s", "q", config)
    for n in range(9):
        assert dialogue.fit("")
        response = asyncio.run(dialogue.respond(temperature=1.0, seed=0))
        dialogue.add(response, f"reply {n} " + "a" * 120)
    messages = engine.asked[-1][0]
    kept = [m["content"].split()[1] for m in messages[2:] if m["role"] == "user"]
    assert kept == [str(n) for n in range(8 - len(kept), 8)]
    assert 1 <= len(kept) <= 4
    assert TRIM_NOTE in messages[1]["content"]
