"""From a finished episode to its rewards: what an answer alone decides at once, the rest where it belongs.

    answer --> exact match, F1, number, pattern       here, in microseconds; a long one, and a pattern, in a thread
           --> math-verify                             a child process, killed when sympy goes on for ever
           --> the task's unit tests                   a session of their own, after the answer has run as code
           --> a model that judges                     judge.py, over HTTP
    trajectory --> your own functions                  coroutines here, others in a thread of their own, which nobody waits for at the end

Each under a deadline. What could not be scored is not a zero: a lost session, a judge that doesn't answer or a child that
can't be started raise `WorldError`, and the episode has no vote. What an answer does to its check (tests that never end, an
expression sympy can't take) is the answer's own fault, and is one.
"""

import asyncio
import importlib
import inspect
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from l0fast.child_pool import ChildPool
from l0fast.config import RewardConfig
from l0fast.errors import SandboxError, UsageError, WorldError
from l0fast.sandbox.base import Sandbox
from l0fast.tasks.expressions import any_equal, start_child
from l0fast.tasks.rewards import exact_match, f1, has_answer, matches, numeric, turn_rewards
from l0fast.tools.threads import InThread
from l0fast.types import CHECKS, Task, Trajectory, TrajectoryStatus

Judge = Callable[[Task, str], Awaitable[float]]
"""Whether a model calls this answer to this task correct, 0 or 1. Raises WorldError where no judgement was to be had."""
CustomReward = Callable[[Trajectory], Any]
T = TypeVar("T")

_RIGHT = 1 - 1e-9
_LONG_CHARS = 2000
"""Texts that take longer to compare than to hand to a thread, about half a millisecond [characters]."""
_LIVES = 3
"""Sessions that an answer may lose."""
_THREADS = 16
"""Rewards of the user's own that are computed in threads at once; the others' time has not begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    rewards: tuple[float, ...]
    """One a turn."""
    correct: bool
    """By the task's own check; what accuracy and dynamic sampling count."""
    answer: dict[str, float]
    """Scores of the answer, by reward, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorer:
    """Made by `open_scorer`."""

    config: RewardConfig
    max_new_tokens: int
    sandbox: Sandbox | None
    judge: Judge | None
    custom: tuple[tuple[float, CustomReward], ...] = ()
    _math: ChildPool = field(repr=False)
    _threads: asyncio.Semaphore = field(repr=False, default_factory=lambda: asyncio.Semaphore(_THREADS))

    async def scored(self, trajectory: Trajectory) -> tuple[Trajectory, Mapping[str, float]]:
        """With its rewards, and its answer's scores; where nobody could say what it is worth, a failed one and none."""
        if trajectory.status.failed:
            return trajectory, {}
        try:
            score = await self.score(trajectory)
        except WorldError as e:
            return replace(trajectory, status=TrajectoryStatus.FAILED_JUDGE, cause=str(e)), {}
        return replace(trajectory, rewards=score.rewards, correct=score.correct), score.answer

    async def score(self, trajectory: Trajectory) -> Score:
        """Raises WorldError where nobody could say; UsageError for a reward of the user's own that gives no numbers."""
        task, answer = trajectory.task, trajectory.answer
        wanted = {
            name
            for name in ("exact_match", "f1", "numeric", "math", "regex", "unit_tests", "judge")
            if getattr(self.config, name)
        }
        scores = {name: await self._score(name, task, answer) for name in sorted(wanted | {task.check})}
        correct = scores[task.check] >= _RIGHT
        scores |= {"correct": float(correct), "has_answer": float(has_answer(answer))}
        rewards = turn_rewards(
            trajectory,
            self.config,
            scores,
            max_new_tokens=self.max_new_tokens,
            custom=[(weight, await self._custom(reward, trajectory)) for weight, reward in self.custom],
        )
        return Score(rewards=rewards, correct=correct, answer=scores)

    async def _score(self, name: str, task: Task, answer: str | None) -> float:
        if not has_answer(answer):
            return 0.0
        assert answer is not None
        match name:
            case "exact_match":
                return float(await _compared(exact_match, answer, task.answers))
            case "f1":
                return await _compared(f1, answer, task.answers)
            case "numeric":
                return float(await _compared(numeric, answer, task.answers, self.config.numeric_tolerance))
            case "regex":
                # a pattern may take its time
                return float(await asyncio.to_thread(matches, answer, task.answers))
            case "math":
                try:
                    return float(await self._math.run(any_equal, answer, tuple(task.answers)))
                except TimeoutError:
                    # nobody can say that it is equal
                    return 0.0
            case "unit_tests":
                return await self._unit_tests(task, answer)
            case "judge":
                if self.judge is None:
                    raise UsageError(
                        f"task {task.id!r} is judged by a model, but judge.endpoint is empty: set --judge.endpoint and "
                        "--judge.model"
                    )
                return await self.judge(task, answer)
        raise ValueError(f"task {task.id!r} has check = {name!r}: take one of {', '.join(CHECKS)}")

    async def _unit_tests(self, task: Task, code: str) -> float:
        """Share of the tests that pass, each a cell; 0 where the answer doesn't run.

        The answer and its tests share an interpreter: one that sets out to fool its tests can.
        """
        if not task.tests:
            return 0.0
        for _ in range(_LIVES):
            if (share := await self._share_passed(task, code)) is not None:
                return share
        # a session may be lost for many reasons, the same one time after time for one alone: it ends its own process
        return 0.0

    async def _share_passed(self, task: Task, code: str) -> float | None:
        """None where the session was lost while the answer or its tests ran."""
        assert self.sandbox is not None, "a scorer of unit tests is opened with a sandbox"
        try:
            async with (
                asyncio.timeout(2 * self.config.timeout_s),
                self.sandbox.session({}, seed=0, files=task.files) as session,
            ):
                try:
                    ran = await session.execute(code, timeout_s=self.config.timeout_s)
                    if ran.error is not None:
                        return 0.0
                    passed = 0
                    for test in task.tests:
                        cell = await session.execute(test, timeout_s=self.config.timeout_s)
                        passed += cell.error is None
                except SandboxError:
                    return None
        except TimeoutError:
            # each cell ended in time, all of them did not
            return 0.0
        return passed / len(task.tests)

    async def _custom(self, reward: CustomReward, trajectory: Trajectory) -> tuple[float, ...]:
        n = len(trajectory.turns)
        # an object that can be called need have no name
        name = f"{reward.__module__}:{getattr(reward, '__qualname__', repr(reward))}"
        here = inspect.iscoroutinefunction(reward)
        limit: asyncio.Timeout | None = None
        try:
            async with nullcontext() if here else self._threads, asyncio.timeout(self.config.timeout_s) as limit:
                given = reward(trajectory) if here else await InThread(reward)(trajectory)
                # of a partial, a decorated one or an object's __call__ it shows only now
                given = await given if inspect.isawaitable(given) else given
        except TimeoutError as e:
            late = limit is not None and limit.expired()
            why = f"took longer than {self.config.timeout_s:g} s" if late else f"gave up: TimeoutError: {e}"
            raise WorldError(f"the reward {name} {why}") from e
        numbers = _plain(given)
        if isinstance(numbers, Sequence):
            scores = tuple(map(_plain, numbers))
        else:
            scores = (*[0.0] * (n - 1), numbers)[-n:] if n else ()
        if len(scores) != n or not all(isinstance(s, int | float) and math.isfinite(s) for s in scores):
            raise UsageError(
                f"the reward {name} gave {given!r} for an episode of {n} turns: return a finite number, or one for each turn"
            )
        return tuple(map(float, scores))


def _plain(value: Any) -> Any:
    """Of NumPy's and torch's, which are no numbers and no sequences of Python's, what they hold."""
    return value.tolist() if hasattr(value, "tolist") else value


async def _compared(by: Callable[..., T], answer: str, answers: Sequence[str], *further: Any) -> T:
    if len(answer) + sum(map(len, answers)) < _LONG_CHARS:
        return by(answer, answers, *further)
    return await asyncio.to_thread(by, answer, answers, *further)


@asynccontextmanager
async def open_scorer(
    config: RewardConfig, *, max_new_tokens: int, sandbox: Sandbox | None = None, judge: Judge | None = None
) -> AsyncIterator[Scorer]:
    """A scorer for as long as the `async with` body runs.

    Args:
        max_new_tokens: longest response of a turn [tokens].
        sandbox: where unit tests run.
        judge: asked where a task or `config` wants a model's judgement.

    Raises:
        UsageError: a reward of the user's own that can't be found, or a weight that is none.
    """
    async with AsyncExitStack() as stack:
        process = ChildPool(
            "comparing expressions",
            needs="pip install 'l0fast[math]'",
            initializer=start_child,
            timeout_s=config.timeout_s,
        )
        stack.push_async_callback(process.close)
        yield Scorer(
            config=config,
            max_new_tokens=max_new_tokens,
            sandbox=sandbox,
            judge=judge,
            custom=tuple(map(load_custom, config.custom)),
            _math=process,
        )


def load_custom(text: str) -> tuple[float, CustomReward]:
    """Weight and function of "module:function=weight". Raises UsageError."""
    path, equals, number = text.partition("=")
    module, colon, name = path.partition(":")
    try:
        weight = float(number) if equals else 1.0
    except ValueError:
        weight = math.nan
    if not colon or not math.isfinite(weight):
        raise UsageError(f"reward.custom has {text!r}: write module:function=weight, for example my_rewards:polite=0.1")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise UsageError(
            f"reward.custom has {text!r}, but {e}: put the module's folder on PYTHONPATH and define the function there"
        ) from e
    if not callable(function):
        raise UsageError(
            f"reward.custom has {text!r}, which is no function but {function!r}: name one that takes a Trajectory"
        )
    return weight, function
