"""Packs hold every token of every row once, within the budget, and survive the wire."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from l0fast.learner.packing import Pack, Row, from_bytes, pack_rows, row_of, to_bytes
from l0fast.learner.segments import segments_of

lengths = st.lists(st.lists(st.integers(2, 30), max_size=6), min_size=1, max_size=6)


def rows_of_lengths(groups: list[list[int]]) -> list[list[Row]]:
    """Rows whose token ids name their group and row, so that they can be found again."""
    rng = np.random.default_rng(0)

    def row(g: int, r: int, n: int) -> Row:
        predictors = np.sort(rng.choice(n - 1, rng.integers(1, n), replace=False))
        return Row(
            token_ids=1000 * (100 * g + r) + np.arange(n),
            predictors=predictors,
            advantages=rng.normal(size=len(predictors)).astype(np.float32),
            sampler_logprobs=rng.normal(size=len(predictors)).astype(np.float32),
            turns=rng.integers(0, 5, len(predictors)).astype(np.int32),
        )

    return [[row(g, r, n) for r, n in enumerate(ns)] for g, ns in enumerate(groups)]


def rows_in(pack: Pack) -> list[slice]:
    return [slice(a, b) for a, b in zip(pack.cu_seqlens, pack.cu_seqlens[1:], strict=False)]


@given(lengths, st.integers(5, 80))
def test_every_row_is_in_one_pack_with_all_it_carries(groups, budget):
    rows = {int(row.token_ids[0]): row for rows in rows_of_lengths(groups) for row in rows}
    for pack in pack_rows(rows_of_lengths(groups), budget):
        assert pack.cu_seqlens[0] == 0
        assert pack.cu_seqlens[-1] == pack.num_tokens
        for place in rows_in(pack):
            row = rows.pop(int(pack.token_ids[place][0]))
            np.testing.assert_array_equal(pack.token_ids[place], row.token_ids)
            np.testing.assert_array_equal(pack.position_ids[place], np.arange(len(row.token_ids)))
            mine = (pack.predictors >= place.start) & (pack.predictors < place.stop)
            np.testing.assert_array_equal(pack.predictors[mine] - place.start, row.predictors)
            np.testing.assert_array_equal(pack.target_ids[mine], row.token_ids[row.predictors + 1])
            np.testing.assert_array_equal(pack.advantages[mine], row.advantages)
            np.testing.assert_array_equal(pack.sampler_logprobs[mine], row.sampler_logprobs)
            np.testing.assert_array_equal(pack.turns[mine], row.turns)
        assert (pack.loss_weights == 1).all()
        assert pack.loss_weights.shape == pack.predictors.shape
    assert not rows, "some rows are in no pack"


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=8), st.integers(1, 4))
def test_rows_that_share_prefixes_can_be_put_together_again(tails, prompt_tokens):
    rows = [
        Row(
            token_ids=np.array([7] * prompt_tokens + tail),
            predictors=np.arange(prompt_tokens - 1, prompt_tokens - 1 + len(tail)),
            advantages=np.full(len(tail), i, np.float32),
            sampler_logprobs=np.zeros(len(tail), np.float32),
            turns=np.zeros(len(tail), np.int32),
        )
        for i, tail in enumerate(tails)
    ]
    for pack in pack_rows([rows], 10_000, share_prefixes=True):
        own = [pack.token_ids[place] for place in rows_in(pack)]
        done = 0
        for s, (donor, p) in enumerate(zip(pack.donors, pack.shared, strict=True)):
            assert pack.shared[donor] == 0
            assert len(own[s]) > 0
            whole = np.concatenate([own[donor][:p], own[s]]) if p else own[s]
            row = rows[int(pack.advantages[done])]
            np.testing.assert_array_equal(whole, row.token_ids)
            np.testing.assert_array_equal(pack.position_ids[rows_in(pack)[s]], np.arange(p, len(whole)))
            here = slice(done, done + len(row.predictors))
            np.testing.assert_array_equal(pack.target_ids[here], row.token_ids[row.predictors + 1])
            # each predictor is the token at its place, in the row itself or in its donor
            np.testing.assert_array_equal(pack.token_ids[pack.predictors[here]], row.token_ids[row.predictors])
            np.testing.assert_array_equal(pack.position_ids[pack.predictors[here]], row.predictors)
            done = here.stop
        assert done == len(pack.predictors)


@given(lengths, st.integers(5, 80))
def test_only_a_row_that_is_too_long_by_itself_passes_the_budget(groups, budget):
    for pack in pack_rows(rows_of_lengths(groups), budget):
        assert pack.num_tokens <= budget or len(rows_in(pack)) == 1


@given(lengths, st.integers(5, 80))
def test_a_group_that_fits_stays_together(groups, budget):
    packs = pack_rows(rows_of_lengths(groups), budget)
    for g, ns in enumerate(groups):
        if ns and sum(ns) <= budget:
            assert sum(any(pack.token_ids // 100_000 == g) for pack in packs) == 1


@given(lengths, st.integers(30, 80))
def test_no_two_packs_would_fit_into_one(groups, budget):
    sizes = sorted(pack.num_tokens for pack in pack_rows(rows_of_lengths(groups), budget))
    assert len(sizes) < 2 or sizes[0] + sizes[1] > budget


@given(lengths, st.integers(5, 80))
def test_the_wire_gives_back_the_same_arrays(groups, budget):
    packs = pack_rows(rows_of_lengths(groups), budget)
    back = from_bytes(to_bytes(packs))
    assert len(back) == len(packs)
    for pack, other in zip(packs, back, strict=True):
        for field in fields(Pack):
            a, b = getattr(pack, field.name), getattr(other, field.name)
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
            assert b.flags.writeable, "torch refuses to share what it may not write"


def test_a_turns_advantage_reaches_each_of_its_tokens(make):
    trajectory = make.trajectory([make.turn([1, 2], [3, 4], [-0.1, -0.2]), make.turn([1, 2, 3, 4, 5], [6], [-0.3])])
    (segment,) = segments_of(trajectory)
    (pack,) = pack_rows([[row_of(segment, trajectory, [0.5, -2.0])]], 100)
    assert pack.predictors.tolist() == [1, 2, 4]
    assert pack.target_ids.tolist() == [3, 4, 6]
    assert pack.advantages.tolist() == [0.5, 0.5, -2.0]
    assert pack.turns.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(pack.sampler_logprobs, np.float32([-0.1, -0.2, -0.3]))


def test_a_turn_without_a_logprob_for_each_token_is_refused(make):
    trajectory = make.trajectory([make.turn([1], [2, 3], [-0.1])])
    with pytest.raises(ValueError, match="sampled 2 tokens but has 1 sampler_logprobs"):
        row_of(segments_of(trajectory)[0], trajectory, [0.0])
