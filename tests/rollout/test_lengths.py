"""What begins first, by what is known of lengths."""

from hypothesis import given
from hypothesis import strategies as st

from l0fast.ids import Ids
from l0fast.rollout.lengths import MEMORY, Lengths
from l0fast.types import Task, Trajectory, TrajectoryStatus, Turn


def task(name: str, kind: str = "") -> Task:
    return Task(id=name, question="?", answers=("a",), kind=kind)


def played(task: Task, *tokens: int, status=TrajectoryStatus.COMPLETED) -> Trajectory:
    turns = tuple(
        Turn(
            prompt_ids=Ids((1,)), response_ids=Ids((2,) * n), sampler_logprobs=(-1.0,) * n, finish_reason="stop",
            policy_version=0, text="", output=None, well_formed=True,
        )
        for n in tokens
    )  # fmt: skip
    return Trajectory(task=task, index=0, status=status, turns=turns)


def test_a_task_is_expected_to_take_what_it_took_lately():
    lengths = Lengths()
    lengths.observe(played(task("a"), 30, 70))
    lengths.observe(played(task("a"), 200))
    assert lengths.expected(task("a")) == MEMORY * 100 + (1 - MEMORY) * 200


def test_a_new_task_is_expected_to_take_what_its_kind_does_and_else_what_all_do():
    lengths = Lengths()
    assert lengths.expected(task("a", "x")) == 0
    lengths.observe(played(task("a", "x"), 100))
    lengths.observe(played(task("b", "y"), 10))
    assert lengths.expected(task("new", "x")) == 100
    assert lengths.expected(task("new", "y")) == 10
    assert lengths.expected(task("new", "z")) == MEMORY * 100 + (1 - MEMORY) * 10


def test_an_episode_that_was_lost_says_nothing_of_lengths():
    lengths = Lengths()
    lengths.observe(played(task("a"), 500, status=TrajectoryStatus.FAILED_ENGINE))
    assert lengths.expected(task("a")) == 0


@given(st.lists(st.integers(0, 3)))
def test_all_begin_the_longest_first_and_equals_in_their_order(kinds: list[int]):
    lengths = Lengths()
    for kind in range(4):
        lengths.observe(played(task(f"of {kind}", str(kind)), 10 * kind))
    admitted = [(number, task(f"t{number}", str(kind))) for number, kind in enumerate(kinds)]
    begun = lengths.long_first(admitted)
    assert begun == sorted(admitted, key=lambda pair: (-int(pair[1].kind), pair[0]))


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr("l0fast.rollout.lengths.MAX_TASKS", 2)
    lengths = Lengths()
    for name in ("a", "b", "a", "c"):
        lengths.observe(played(task(name, name), 10 if name == "b" else 50))
    assert list(lengths._by_task) == ["a", "c"]
