"""segments_of: rows begin with what the engine saw, hold what it sampled, and are as few as can be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l0fast.segments import segments_of

# a small alphabet, so that unrelated prompts share beginnings by chance
ids = st.lists(st.integers(0, 2), max_size=4)
episodes = st.lists(st.tuples(st.sampled_from(["grow", "trim"]), ids, ids), min_size=1, max_size=8)


def play(make, moves):
    """Turns whose prompts grow, or start anew; `fresh` are those that can't share a row with the one before."""
    turns, row = [], ()
    for move, observation, response in moves:
        prompt = (*row, *observation) if move == "grow" and row else (7, *observation)
        turns.append(make.turn(prompt, response))
        row = (*prompt, *response)
    return make.trajectory(turns)


@given(episodes)
def test_a_span_is_preceded_by_its_prompt_and_holds_its_response(make, moves):
    trajectory = play(make, moves)
    seen = []
    for segment in segments_of(trajectory):
        for span in segment.spans:
            turn = trajectory.turns[span.turn]
            assert segment.token_ids[: span.start] == turn.prompt_ids
            assert segment.token_ids[span.start : span.start + span.length] == turn.response_ids
            seen.append(span.turn)
        assert len(segment.token_ids) == segment.spans[-1].start + segment.spans[-1].length, (
            "nothing after the last response"
        )
    assert seen == [t for t, turn in enumerate(trajectory.turns) if turn.response_ids], (
        "each sampled turn once, in order"
    )


@given(episodes)
def test_a_row_is_split_only_where_the_prompt_does_not_go_on(make, moves):
    trajectory = play(make, moves)
    segments = segments_of(trajectory)
    for before, after in zip(segments, segments[1:], strict=False):
        prompt = trajectory.turns[after.spans[0].turn].prompt_ids
        assert prompt[: len(before.token_ids)] != before.token_ids


def test_a_trim_starts_a_new_row(make):
    turns = [make.turn([1, 2], [3]), make.turn([1, 2, 3, 4], [5]), make.turn([1, 4], [6]), make.turn([1, 4, 6, 7], [8])]
    first, second = segments_of(make.trajectory(turns))
    assert first.token_ids == (1, 2, 3, 4, 5)
    assert [(s.start, s.length, s.turn) for s in first.spans] == [(2, 1, 0), (4, 1, 1)]
    assert second.token_ids == (1, 4, 6, 7, 8)
    assert [(s.start, s.length, s.turn) for s in second.spans] == [(2, 1, 2), (4, 1, 3)]


def test_a_response_that_was_tokenised_again_does_not_share_the_row(make):
    turns = [make.turn([1, 2], [3, 4]), make.turn([1, 2, 9, 5], [6])]
    assert len(segments_of(make.trajectory(turns))) == 2


def test_an_empty_prompt_is_refused(make):
    with pytest.raises(ValueError, match="turn 0 .* empty prompt"):
        segments_of(make.trajectory([make.turn([], [1])]))
