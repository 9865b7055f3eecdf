"""Demonstrations: perfect where asked to be, wrong in every known way otherwise, and always the same for the same seed."""

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from l0fast.agent.chat import Chat
from l0fast.agent.nb_agent import EpisodeLimits, NBAgent
from l0fast.agent.parsing import parse_action
from l0fast.config import AgentConfig, SandboxConfig
from l0fast.engine.base import Sampling
from l0fast.engine.simulated import SimulatedEngine
from l0fast.rollout.rollouts import play_all
from l0fast.sandbox import open_sandbox
from l0fast.tasks.geography import geography
from l0fast.tasks.invented import invented_world
from l0fast.tasks.rewards import exact_match
from l0fast.tasks.world import World
from l0fast.tools.local_search import LocalSearch, search_tool
from l0fast.types import Task, Trajectory
from l0fast.warm_start.demonstrations import Demonstrator, Mistakes, good_move


@pytest.fixture(scope="module")
def chat(policy_folder: Path) -> Chat:
    return Chat(policy_folder)


def play(chat: Chat, world: World, tasks: Sequence[Task], temperature: float) -> list[Trajectory]:
    script = Demonstrator(chat, [world], good_rate=0.5, seed=0)
    engine = SimulatedEngine(vocab_size=chat.vocab_size, max_tokens=1000, script=script)

    async def main() -> list[Trajectory]:
        async with open_sandbox(SandboxConfig(), max_sessions=16, log=lambda line: None) as sandbox:
            agent = NBAgent(
                chat=chat,
                engine=engine,
                sandbox=sandbox,
                tools=(search_tool(LocalSearch(world.full_corpus), 3),),
                config=AgentConfig(context_tokens=1000, max_new_tokens=120),
                limits=EpisodeLimits(max_turns=5, timeout_s=60),
            )
            return await play_all(
                lambda task: agent.run_episode(task, index=0, temperature=temperature, seed=1), tasks, max_open=16
            )

    return asyncio.run(main())


@pytest.mark.parametrize("world", [geography(), invented_world(3)], ids=lambda world: world.name)
def test_a_perfect_agent_answers_held_out_questions_through_search(chat: Chat, world: World):
    played = play(chat, world, world.heldout_tasks(60, two_hop_share=0.7), temperature=0.0)
    right = [exact_match(t.answer, t.task.answers) for t in played]
    assert sum(right) >= 59
    assert all(len(t.turns) == t.task.hops + 1 for t, ok in zip(played, right, strict=True) if ok)


def test_half_good_moves_are_mostly_wrong_and_the_same_for_the_same_seed(chat: Chat):
    tasks = geography().heldout_tasks(40, two_hop_share=0.7)
    first, second = (play(chat, geography(), tasks, temperature=1.0) for _ in range(2))
    assert [t.turns[-1].text for t in first] == [t.turns[-1].text for t in second]
    right = sum(exact_match(t.answer, t.task.answers) for t in first)
    assert 0.2 * len(tasks) < right < 0.7 * len(tasks)
    assert any(turn.error for t in first for turn in t.turns)
    assert any(turn.complaint for t in first for turn in t.turns)


def test_every_good_move_is_well_formed_and_mistakes_come_in_many_kinds():
    world, rng = geography(), random.Random(0)
    mistakes = Mistakes(world)
    seen = set()
    for _ in range(400):
        plan = world.plan(world.train_task(rng, two_hop_share=0.7))
        for known in range(len(plan.hops) + 1):
            assert parse_action(good_move(plan, known)).well_formed
            action = parse_action(mistakes.draw(plan, known, rng))
            seen.add((action.complaint or "ok").partition(":")[2][:12] + action.code.partition("(")[0])
    assert len(seen) >= 5


def test_a_long_response_is_cut_at_the_limit(chat: Chat):
    world = geography()
    task = world.heldout_tasks(1, two_hop_share=0.7)[0]
    engine = SimulatedEngine(
        vocab_size=chat.vocab_size, max_tokens=500, script=Demonstrator(chat, [world], good_rate=0.5, seed=0)
    )
    sampling = Sampling(max_new_tokens=3, stop_token_ids=chat.stop_token_ids, temperature=0.0)
    sampled = asyncio.run(
        engine.generate(chat.first_prompt("s", task.question), sampling, conversation=f"{task.id}/0/0")
    )
    assert len(sampled.response_ids) == 3
    assert sampled.finish_reason == "length"
