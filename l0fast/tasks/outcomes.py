"""What became of an episode: right, or which of the ways to be wrong. For people and plots; nothing learns from it."""

from collections.abc import Iterable, Sequence

from l0fast.tasks.rewards import exact_match, has_answer, normalize_answer
from l0fast.tasks.world import Plan
from l0fast.types import Trajectory

OUTCOMES = ("right", "one_hop_only", "wrong_field", "invented_or_miscopied", "no_answer", "failed")


def outcome(trajectory: Trajectory, plan: Plan) -> str:
    """One of OUTCOMES.

    "one_hop_only" submitted what the first of two look-ups gives, "wrong_field" something else that it had seen,
    "invented_or_miscopied" something it had not, "no_answer" nothing or "unknown".
    """
    if trajectory.status.failed:
        return "failed"
    if trajectory.correct:
        return "right"
    answer = normalize_answer(trajectory.answer or "")
    if answer in ("", "unknown"):
        return "no_answer"
    if exact_match(answer, [hop.value for hop in plan.hops[:-1]]):
        return "one_hop_only"
    seen = normalize_answer(" ".join([trajectory.task.question, *(turn.output or "" for turn in trajectory.turns)]))
    return "wrong_field" if f" {answer} " in f" {seen} " else "invented_or_miscopied"


def outcome_shares(trajectories: Iterable[Trajectory], plan_of: dict[str, Plan]) -> dict[str, float]:
    """Share of each outcome; `plan_of` by task id."""
    return _shares(OUTCOMES, [outcome(t, plan_of[t.task.id]) for t in trajectories])


PLAIN_OUTCOMES = ("right", "wrong", "no_answer", "failed")
"""Of questions about which nothing more is known than their answers."""


def plain_outcome_shares(trajectories: Iterable[Trajectory]) -> dict[str, float]:
    """Share of each of PLAIN_OUTCOMES."""
    return _shares(
        PLAIN_OUTCOMES,
        [
            "failed" if t.status.failed else "right" if t.correct else "wrong" if has_answer(t.answer) else "no_answer"
            for t in trajectories
        ],
    )


def _shares(names: Sequence[str], found: Sequence[str]) -> dict[str, float]:
    return {name: found.count(name) / (len(found) or 1) for name in names}
