"""Scorers at work: a real math process, real sessions for unit tests, rewards of the user's own."""

import asyncio
import sys
import threading
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest

from l0fast.config import RewardConfig, SandboxConfig
from l0fast.errors import UsageError, WorldError
from l0fast.ids import Ids
from l0fast.sandbox import open_sandbox
from l0fast.tasks import rewards, scoring
from l0fast.tasks.scoring import load_custom, open_scorer
from l0fast.types import Task, Trajectory, TrajectoryStatus, Turn

TURN = Turn(
    prompt_ids=Ids((1,)),
    response_ids=Ids((2, 3)),
    sampler_logprobs=(-0.1, -0.1),
    finish_reason="stop",
    policy_version=0,
    text="",
    output="1",
    well_formed=True,
)


def episode(answer, *answers, check="exact_match", tests=(), turns=2) -> Trajectory:
    task = Task(id="t", question="q", answers=answers, check=check, tests=tests)
    return Trajectory(task=task, index=0, status=TrajectoryStatus.COMPLETED, turns=(TURN,) * turns, answer=answer)


def scored(*trajectories, config=None, sandbox=None, judge=None):
    async def main():
        opened = open_scorer(config or RewardConfig(), max_new_tokens=4, sandbox=sandbox, judge=judge)
        async with opened as scorer:
            return [await scorer.score(t) for t in trajectories]

    return asyncio.run(main())


def test_the_default_weights_are_l0s():
    right, wrong, none = scored(episode("Oslo", "oslo"), episode("Rome", "oslo"), episode(None, "oslo"))
    assert right.rewards == pytest.approx([0.1, 0.9])
    assert wrong.rewards == pytest.approx([0.1, 0.18])
    assert none.rewards == pytest.approx([0.1, 0.1])
    assert [s.correct for s in (right, wrong, none)] == [True, False, False]


def test_a_task_is_judged_by_its_own_check():
    scores = scored(
        episode("about 12 km", "12", check="numeric"), episode("12 km", "12"), episode("b7", r"[a-c]\d", check="regex")
    )
    assert [s.correct for s in scores] == [True, False, True]


def test_what_is_correct_by_its_own_check_need_be_no_exact_match():
    config = RewardConfig(exact_match=1.0)
    [score] = scored(episode("about 12 km", "12", check="numeric"), config=config)
    assert (score.correct, score.answer["correct"], score.answer["exact_match"]) == (True, 1.0, 0.0)


@pytest.mark.parametrize(("words", "here"), [(1, True), (20_000, False)])
def test_an_answer_as_long_as_a_book_is_compared_off_the_loop(monkeypatch, words, here):
    threads = set()

    def watched(function):
        def watch(*args):
            threads.add(threading.current_thread() is threading.main_thread())
            return function(*args)

        return watch

    for name in ("normalize_answer", "last_number"):
        monkeypatch.setattr(rewards, name, watched(getattr(rewards, name)))
    for check in ("exact_match", "f1", "numeric"):
        [score] = scored(episode("Москва 12 " * words, "Москва 12 " * words, check=check))
        assert score.correct
        assert threads == {here}
        threads.clear()


@pytest.mark.slow
def test_equal_expressions_are_right_and_what_goes_on_for_ever_is_wrong_and_leaves_the_others_alone():
    config = RewardConfig(timeout_s=20)
    cases = [
        (r"$\frac{1}{2}$", "0.5", True),
        ("x^2 + 2x + 1", "(x+1)^2", True),
        ("1/3", "0.5", False),
        ("so x is 12", "12", True),
        (r"The answer is $\boxed{7}$", "7", True),
        ("no expression at all", "7", False),
    ]
    trajectories = [episode(given, right, check="math") for given, right, _ in cases]
    assert [s.correct for s in scored(*trajectories, config=config)] == [right for *_, right in cases]
    tower = "9^{9^{9^{9}}}"
    endless, after = scored(
        episode(f"${tower}$", f"${tower} - 1$", check="math"),
        episode("7", "7", check="math"),
        config=RewardConfig(timeout_s=1),
    )
    assert not endless.correct
    assert after.correct


def test_unit_tests_score_their_share_in_a_session_of_their_own():
    code = "def double(x):\n    return 2 * x"
    tests = ("assert double(2) == 4", "assert double('a') == 'aa'", "assert double(1) == 3", "while True: pass")
    config = RewardConfig(unit_tests=1.0, correct=0.0, timeout_s=2.0)
    trajectories = [
        episode(code, check="unit_tests", tests=tests[:2], turns=1),
        episode(code, check="unit_tests", tests=tests[:3], turns=1),
        episode(code, check="unit_tests", tests=tests[1:], turns=1),
        episode("def double(:", check="unit_tests", tests=tests[:2], turns=1),
        # who ends the session is wrong, and the judge is not to blame
        episode("import os; os._exit(0)", check="unit_tests", tests=tests[:2], turns=1),
        episode(f"{code}\nimport atexit", check="unit_tests", tests=("import os; os._exit(0)",), turns=1),
    ]

    async def main():
        async with (
            open_sandbox(SandboxConfig(kind="process"), max_sessions=2, log=lambda text: None) as sandbox,
            open_scorer(config, max_new_tokens=4, sandbox=sandbox) as scorer,
        ):
            return [await scorer.score(t) for t in trajectories]

    scores = asyncio.run(main())
    assert [s.answer["unit_tests"] for s in scores] == pytest.approx([1, 2 / 3, 1 / 3, 0, 0, 0])
    assert [s.correct for s in scores] == [True, False, False, False, False, False]


def test_a_judge_is_asked_once_and_one_that_fails_is_no_zero():
    asked = []

    async def judge(task, answer):
        asked.append(answer)
        if answer == "lost":
            raise WorldError("no judgement")
        return 1.0

    [score] = scored(episode("Oslo", "Rome", check="judge"), judge=judge)
    assert score.correct
    assert asked == ["Oslo"]
    with pytest.raises(WorldError, match="no judgement"):
        scored(episode("lost", "Rome", check="judge"), judge=judge)
    with pytest.raises(UsageError, match="set --judge.endpoint"):
        scored(episode("Oslo", "Rome", check="judge"))


@pytest.fixture
def my_rewards(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "import asyncio, functools, threading, time\n"
        "import numpy\n"
        "def polite(trajectory):\n    return float('please' in (trajectory.answer or ''))\n"
        "async def each(trajectory):\n    return [0.25 for _ in trajectory.turns]\n"
        "def odd(trajectory):\n    return 'many'\n"
        "async def endless(trajectory):\n    await asyncio.Event().wait()\n"
        "def asks(trajectory):\n    raise TimeoutError('no word of 10.0.0.7')\n"
        "number = 3\n"
        "let_go = threading.Event()\n"
        "def hangs(trajectory):\n    let_go.wait(20)\n    return 0.0\n"
        "def half(trajectory):\n    return numpy.float32(0.5)\n"
        "def halves(trajectory):\n    return numpy.full(len(trajectory.turns), 0.5)\n"
        "def right(trajectory):\n    return numpy.bool_(True)\n"
        "def tensor(trajectory):\n    import torch\n    return torch.tensor(0.5)\n"
        "def of_each(trajectory):\n    return [numpy.float32(0.25) for _ in trajectory.turns]\n"
        "class Own:\n    async def __call__(self, trajectory):\n        return 0.5\n"
        "own = Own()\n"
        "part = functools.partial(lambda more, trajectory: more, 0.5)\n"
        "@functools.wraps(each)\n"
        "def decorated(trajectory):\n    return each(trajectory)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_rewards", None)


@pytest.mark.usefixtures("my_rewards")
def test_rewards_of_the_users_own_count_by_their_weight():
    config = RewardConfig(
        correct=0, has_answer=0, format=0, code=0, custom=("my_rewards:polite=2", "my_rewards:each=1")
    )
    [score] = scored(episode("please", "x"), config=config)
    assert score.rewards == pytest.approx([0.25, 2.25])
    [none] = scored(replace(episode("please", "x"), turns=()), config=config)
    assert none.rewards == ()


@pytest.mark.usefixtures("my_rewards")
@pytest.mark.parametrize(
    ("name", "rewards"),
    [
        ("half", [0, 0.5]),
        ("halves", [0.5, 0.5]),
        ("right", [0, 1]),
        ("tensor", [0, 0.5]),
        ("of_each", [0.25, 0.25]),
        ("own", [0, 0.5]),
        ("part", [0, 0.5]),
        ("decorated", [0.25, 0.25]),
    ],
)
def test_a_reward_may_be_all_that_can_be_called_and_give_numbers_of_numpy_and_torch(name, rewards):
    config = RewardConfig(correct=0, has_answer=0, format=0, code=0, custom=(f"my_rewards:{name}",))
    [score] = scored(episode("x", "x"), config=config)
    assert score.rewards == pytest.approx(rewards)


@pytest.mark.usefixtures("my_rewards")
def test_a_reward_that_hangs_keeps_no_run_from_ending():
    config = RewardConfig(custom=("my_rewards:hangs",), timeout_s=0.01)
    with pytest.raises(WorldError, match="my_rewards:hangs took longer"):
        scored(episode("x", "x"), config=config)
    (hanging,) = (thread for thread in threading.enumerate() if thread.name == "hangs()")
    assert hanging.daemon
    sys.modules["my_rewards"].let_go.set()
    hanging.join()


@pytest.mark.usefixtures("my_rewards")
def test_a_rewards_time_begins_when_it_does():
    async def main():
        config = RewardConfig(correct=0, has_answer=0, format=0, code=0, custom=("my_rewards:half",), timeout_s=5)
        async with open_scorer(config, max_new_tokens=4) as scorer, asyncio.TaskGroup() as tg:
            async with AsyncExitStack() as threads:
                for _ in range(scoring._THREADS):
                    await threads.enter_async_context(scorer._threads)
                waiting = tg.create_task(scorer.score(episode("x", "x")))
                await turns()
                # as if 100 seconds had passed
                loop = asyncio.get_running_loop()
                loop.time = lambda time=loop.time: time() + 100
                await turns()
                assert not waiting.done()
        return waiting.result()

    async def turns():
        for _ in range(20):
            await asyncio.sleep(0)

    assert asyncio.run(main()).rewards == pytest.approx([0, 0.5])


@pytest.mark.usefixtures("my_rewards")
@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("my_rewards:gone=1", "has no attribute 'gone'"),
        ("no_such_module:f=1", "No module named"),
        ("my_rewards:polite=much", "write module:function=weight"),
        ("polite", "write module:function=weight"),
        ("my_rewards:number=1", "no function but 3"),
    ],
)
def test_a_reward_that_can_not_be_found_is_named(text, complaint):
    with pytest.raises(UsageError, match=complaint):
        load_custom(text)


@pytest.mark.usefixtures("my_rewards")
def test_a_reward_that_gives_no_number_or_does_not_end_is_named():
    with pytest.raises(UsageError, match="my_rewards:odd gave 'many'"):
        scored(episode("x", "x"), config=RewardConfig(custom=("my_rewards:odd",)))
    with pytest.raises(WorldError, match="my_rewards:endless took longer"):
        scored(episode("x", "x"), config=RewardConfig(custom=("my_rewards:endless",), timeout_s=0.01))
    with pytest.raises(WorldError, match=r"my_rewards:asks gave up: TimeoutError: no word of 10\.0\.0\.7"):
        scored(episode("x", "x"), config=RewardConfig(custom=("my_rewards:asks",)))
