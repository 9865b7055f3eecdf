"""The parts of a replay, one at a time: which recorded episode is played where, and how long the simulated rooms take."""

import asyncio
from itertools import islice

import pytest

from l0fast.config import RunConfig
from l0fast.engine.simulated import Speed
from l0fast.ids import Ids
from l0fast.rollout.recorded import RecordedGroup, RecordedStep, Recording, Timing
from l0fast.rollout.replay import AsRecorded, Playlist, World
from l0fast.run_dir import SavedTrajectory
from l0fast.types import Group, Task, TrajectoryStatus, Turn

TIMING = Timing(
    Speed(prefill_tokens_per_s=100, step_s=0.5, step_request_s=0.0), latency_s=0.25, learn_s_per_token=0.125, sync_s=3.0
)
CONFIG = RunConfig.model_validate({"engine": {"kind": "sglang", "layout": "split", "slots": 4}})


def turn(num_prompt: int, num_response: int, execute_s: float) -> Turn:
    return Turn(
        prompt_ids=Ids(range(num_prompt)),
        response_ids=Ids(range(num_response)),
        sampler_logprobs=(0.0,) * num_response,
        finish_reason="stop",
        policy_version=0,
        text="",
        output="",
        well_formed=True,
        execute_s=execute_s,
    )


def trajectory(name: str, status: TrajectoryStatus = TrajectoryStatus.COMPLETED) -> SavedTrajectory:
    turns = (turn(100, 4, execute_s=2.0), turn(200, 6, execute_s=5.0))
    return SavedTrajectory(task=Task(id=name, question="?", answers=("a",)), index=0, status=status, turns=turns)


def group(name: str, *, places: int = 2, failed: int = 0, laid_out: int = 1) -> RecordedGroup:
    return RecordedGroup(
        tuple(trajectory(f"{name}{place}") for place in range(places)),
        tuple(trajectory(f"{name} lost {n}", TrajectoryStatus.FAILED_SANDBOX) for n in range(failed)),
        laid_out,
    )


def step(*groups: RecordedGroup, dropped_groups: int = 0) -> RecordedStep:
    return RecordedStep(groups=groups, step_s=1.0, learn_s=0.0, sync_s=0.0, dropped_groups=dropped_groups)


def playlist(*steps: RecordedStep, first: int = 0) -> Playlist:
    return Playlist(Recording(CONFIG, steps), first)


def names(played: Playlist, count: int) -> list[str]:
    return [task.id for task in islice(played.tasks(), count)]


def test_groups_are_played_in_their_order_from_a_step_on_and_round_again():
    steps = step(group("a"), group("b")), step(group("c"))
    assert names(playlist(*steps), 4) == ["a0", "b0", "c0", "a0"]
    assert names(playlist(*steps, first=1), 4) == ["c0", "a0", "b0", "c0"]
    numbered = playlist(*steps, first=1)
    assert [numbered.group(number).trajectories[0].task.id for number in range(4)] == names(numbered, 4)


def test_groups_that_were_dropped_are_stood_for_by_those_they_were_played_with():
    played = playlist(step(group("a"), group("b"), dropped_groups=3))
    assert names(played, 5) == ["a0", "a0", "b0", "b0", "b0"]
    assert [played.is_dropped(number) for number in range(6)] == [True, False, True, True, False, True]


def test_none_is_dropped_where_dropping_is_switched_off():
    dropped = Group(task=trajectory("a").task, trajectories=(trajectory("a"),), number=1)
    for drop_rate, kept in ((0.5, False), (0.0, True)):
        sampling = AsRecorded(drop_rate=drop_rate, max_drops=0, seed=0, is_dropped=lambda number: number == 1)
        assert sampling.keep(dropped, 0) == kept


def test_a_place_is_lost_as_often_as_was_recorded_and_then_played_to_its_end():
    played = playlist(step(group("a", failed=3)))
    lost = [[played.episode(0, index, attempt).task.id for attempt in range(3)] for index in range(2)]
    assert lost == [["a lost 0", "a lost 2", "a0"], ["a lost 1", "a1", "a1"]]
    # a larger group than was recorded
    assert [playlist(step(group("a"))).episode(0, index, 0).task.id for index in range(4)] == ["a0", "a1", "a0", "a1"]


def world(layout: str = "split") -> World:
    config = CONFIG.model_copy(update={"engine": CONFIG.engine.model_copy(update={"layout": layout})})
    return World(playlist(step(group("a", laid_out=8)), step(group("b", laid_out=16))), config, TIMING)


def test_an_episode_says_what_it_said_and_takes_as_long_as_engine_and_cells_do():
    there = world()
    recorded = there.playlist.episode(0, 0, 0)
    played = there.clock.run(there.play(recorded.task, 0, 0, 0))
    assert played == recorded
    # 200 tokens of prompt and 10 of response, twice the latency, both cells
    assert there.clock.now_s == pytest.approx(2.0 + 10 * 0.5 + 2 * 0.25 + 7.0, abs=1.0)
    assert there.lengths.expected(recorded.task) == 10
    figures = there.shares.take_step()
    assert figures["share/sandbox"] * there.clock.now_s == pytest.approx(7.0)


def test_turns_have_the_weights_that_sampled_them_now():
    async def play(there: World):
        await there.sync(7)
        return await there.play(there.playlist.episode(0, 0, 0).task, 0, 0, 0)

    there = world()
    assert [turn.policy_version for turn in there.clock.run(play(there)).turns] == [7, 7]
    assert there.shares.take_step()["share/sync"] * there.clock.now_s == pytest.approx(TIMING.sync_s)


@pytest.mark.parametrize("layout", ["split", "resident"])
def test_the_learner_takes_its_time_for_each_token_and_holds_up_an_engine_beside_it(layout):
    async def alone(there: World) -> float:
        await there.play(there.playlist.episode(0, 0, 0).task, 0, 0, 0)
        return there.clock.now_s

    async def both(there: World) -> float:
        recorded = [there.playlist.episode(number, 0, 0) for number in (0, 1)]
        learn_from = [Group(task=t.task, trajectories=(t,), number=n) for n, t in enumerate(recorded)]
        playing = asyncio.create_task(there.play(recorded[0].task, 0, 0, 0))
        await there.learn(learn_from)
        assert there.clock.now_s == 0.125 * (8 + 16)
        assert (await there.busy())[2] == 1
        await playing
        return there.clock.now_s

    first, second = world(layout), world(layout)
    held_up_s = second.clock.run(both(second)) - first.clock.run(alone(first))
    assert held_up_s == pytest.approx(3.0 if layout == "resident" else 0.0)
