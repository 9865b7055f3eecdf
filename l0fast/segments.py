"""Turns of a trajectory, merged into append-only rows.

    turn 0   P0 R0
    turn 1   P1 = P0 R0 o0      R1            one row: P0 R0 o0 R1, spans at R0 and R1
    turn 2   P2 = trimmed       R2            the context was cut: a new row, P2 R2

The prompt of a turn is the previous prompt, the previous response and the observation, so a causal model computes the
same thing for a turn whether its prompt is recomputed alone or is the beginning of a longer row. Merging saves 3-5
times the tokens of one row a turn, and changes no gradient (tests/learner/test_policy_model.py).
"""

from l0fast.types import Segment, Span, Trajectory, Turn


def segments_of(trajectory: Trajectory) -> list[Segment]:
    """The rows to train on, in order of turns. A turn that sampled nothing has no span.

    For every span of every segment, `token_ids[:start]` is that turn's `prompt_ids` and the `length` ids from `start`
    on are its `response_ids`.

    Raises:
        ValueError: a turn with an empty prompt: nothing predicts its first token.
    """
    rows: list[list[tuple[int, Turn]]] = []
    for t, turn in enumerate(trajectory.turns):
        if not turn.response_ids:
            continue
        if not turn.prompt_ids:
            raise ValueError(
                f"turn {t} of trajectory {trajectory.index} of task {trajectory.task.id!r} has an empty prompt, so nothing "
                "predicts its first token; begin every prompt with at least one token"
            )
        if rows and turn.new_prompt_ids(rows[-1][-1][1]) is not None:
            rows[-1].append((t, turn))
        else:
            rows.append([(t, turn)])
    return [_segment(row) for row in rows]


def _segment(row: list[tuple[int, Turn]]) -> Segment:
    _, last = row[-1]
    spans = [Span(start=len(turn.prompt_ids), length=len(turn.response_ids), turn=t) for t, turn in row]
    return Segment(token_ids=last.prompt_ids + last.response_ids, spans=tuple(spans))
