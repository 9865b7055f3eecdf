"""Packs hold every token of every row, what rows have in common once, within the budget, and survive the wire."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l0fast.learner.packing import (
    ALIGNMENT,
    Pack,
    Row,
    attention_pairs,
    balance,
    cut,
    dummy_pack,
    from_bytes,
    loss_denominator,
    pack_rows,
    payload_bytes,
    row_of,
    to_bytes,
    write_payload,
)
from l0fast.segments import segments_of

lengths = st.lists(st.lists(st.integers(2, 30), max_size=6), min_size=1, max_size=6)
# two letters, so that rows share beginnings of all lengths, repeat each other and are beginnings of each other
alike = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=8), min_size=1, max_size=7)


def row_like(token_ids, number: int = 0) -> Row:
    """A row that carries numbers it can be known by; some of its tokens are sampled."""
    rng = np.random.default_rng(number)
    n = len(token_ids)
    predictors = np.sort(rng.choice(n - 1, rng.integers(1, n), replace=False)) if n > 1 else np.zeros(0, np.int64)
    return Row(
        token_ids=np.array(token_ids, np.int64),
        predictors=predictors,
        advantages=np.full(len(predictors), number, np.float32),
        sampler_logprobs=rng.normal(size=len(predictors)).astype(np.float32),
        loss_weights=rng.random(len(predictors)).astype(np.float32),
        turns=rng.integers(0, 5, len(predictors)).astype(np.int32),
    )


def rows_of_lengths(groups: list[list[int]]) -> list[list[Row]]:
    """Rows that have nothing in common: token ids name their group and row."""
    return [
        [row_like(1000 * (100 * g + r) + np.arange(n), 100 * g + r) for r, n in enumerate(ns)]
        for g, ns in enumerate(groups)
    ]


def num_rows(pack: Pack) -> int:
    return len(pack.cu_seqlens) - len(pack.family_cu)


def rows_in(pack: Pack) -> list[Row]:
    """The rows again, in the order of `sequences`; checks the layout on the way."""
    stretches = [slice(a, b) for a, b in zip(pack.cu_seqlens, pack.cu_seqlens[1:], strict=False)]
    num_families = len(pack.family_cu) - 1
    assert pack.cu_seqlens[0] == 0
    assert pack.cu_seqlens[-1] == pack.num_tokens
    assert pack.family_cu[0] == pack.cu_seqlens[num_families]
    assert all(s.start < s.stop for s in stretches), "no stretch is empty"
    branches = np.diff(np.searchsorted(pack.cu_seqlens, pack.family_cu))
    assert all(branches >= 2), "a prefix is shared"
    rows = []
    for s, own in enumerate(stretches[num_families:]):
        family = int(np.searchsorted(pack.family_cu, own.start, "right")) - 1
        prefix = stretches[family] if family < num_families else slice(0, 0)
        assert family == num_families or own.stop <= pack.family_cu[family + 1], "a branch is inside its family"
        places = np.concatenate([np.arange(prefix.start, prefix.stop), np.arange(own.start, own.stop)])
        np.testing.assert_array_equal(pack.position_ids[places], np.arange(len(places)))
        mine = pack.sequences == s
        predictors = pack.position_ids[pack.predictors[mine]]
        np.testing.assert_array_equal(places[predictors], pack.predictors[mine])
        np.testing.assert_array_equal(pack.token_ids[places][predictors + 1], pack.target_ids[mine])
        rows.append(
            Row(
                token_ids=pack.token_ids[places],
                predictors=predictors,
                advantages=pack.advantages[mine],
                sampler_logprobs=pack.sampler_logprobs[mine],
                loss_weights=pack.loss_weights[mine],
                turns=pack.turns[mine],
            )
        )
    assert len(rows) == num_rows(pack)
    assert len(pack.predictors) == sum(len(row.predictors) for row in rows)
    return rows


def known_by(row: Row) -> list[bytes]:
    return [getattr(row, f.name).tobytes() for f in fields(Row)]


def assert_same_rows(packs: list[Pack], groups: list[list[Row]]):
    ours = sorted(known_by(row) for pack in packs for row in rows_in(pack))
    assert ours == sorted(known_by(row) for rows in groups for row in rows)


@settings(max_examples=50)
@given(lengths, st.integers(5, 80), st.booleans())
def test_every_row_is_in_one_pack_with_all_it_carries(groups, budget, share):
    groups = rows_of_lengths(groups)
    packs = pack_rows(groups, budget, share_prefixes=share)
    assert_same_rows(packs, groups)
    assert all(len(pack.family_cu) == 1 for pack in packs), "strangers are no family"


@settings(max_examples=50)
@given(st.lists(alike, min_size=1, max_size=4), st.integers(1, 60))
def test_rows_that_share_prefixes_can_be_put_together_again(groups, budget):
    rows = [[row_like(ids, 100 * g + r) for r, ids in enumerate(group)] for g, group in enumerate(groups)]
    packs = pack_rows(rows, budget, share_prefixes=True)
    assert_same_rows(packs, rows)
    for pack in packs:
        assert pack.num_tokens <= budget or num_rows(pack) == 1


def partitions(items: list) -> list[list[list]]:
    if not items:
        return [[]]
    first, rest = items[0], partitions(items[1:])
    return [[*others[:i], [first, *block], *others[i + 1 :]] for others in rest for i, block in enumerate(others)] + [
        [[first], *others] for others in rest
    ]


def tokens_of_family(rows: list[tuple[int, ...]]) -> int:
    """The definition: the longest prefix of all that leaves each a token, once, and what each goes on with."""
    most = min(map(len, rows)) - 1 if len(rows) > 1 else 0
    prefix = max(n for n in range(most + 1) if len({row[:n] for row in rows}) == 1)
    return prefix + sum(len(row) - prefix for row in rows)


@given(alike)
def test_no_other_families_take_fewer_tokens(rows):
    (pack,) = pack_rows([[row_like(ids, r) for r, ids in enumerate(rows)]], 1000, share_prefixes=True)
    rows_in(pack)
    every = partitions([tuple(row) for row in rows])
    assert pack.num_tokens == min(sum(tokens_of_family(block) for block in partition) for partition in every)


def test_a_family_may_lie_within_the_prefix_of_another():
    near = [[1, 2, 3, 4, 5, 6, 10 + i] for i in range(4)]
    far = [[1, 2, 3, 4, 20 + i] for i in range(2)]
    (pack,) = pack_rows([[row_like(ids) for ids in near + far]], 1000, share_prefixes=True)
    # 6 + 4 x 1 and 4 + 2 x 1; all six under the first four tokens would take 4 + 4 x 3 + 2 x 1 = 18
    assert pack.num_tokens == 16
    assert np.diff(pack.cu_seqlens).tolist() == [6, 4, 1, 1, 1, 1, 1, 1]
    assert pack.family_cu.tolist() == [10, 14, 16]


def test_rows_that_are_the_same_keep_a_token_each():
    (pack,) = pack_rows([[row_like([1, 2, 3], 0), row_like([1, 2, 3], 1)]], 1000, share_prefixes=True)
    assert pack.token_ids.tolist() == [1, 2, 3, 3]
    assert pack.position_ids.tolist() == [0, 1, 2, 2]
    assert pack.cu_seqlens.tolist() == [0, 2, 3, 4]
    assert pack.family_cu.tolist() == [2, 4]


def test_hundreds_of_rows_each_longer_than_the_last_are_no_matter():
    rows = [row_like(np.zeros(n, np.int64), n) for n in range(1, 400)]
    (pack,) = pack_rows([rows], 10**6, share_prefixes=True)
    assert pack.num_tokens < 16_000, "of 79,800"
    assert_same_rows([pack], [rows])


@given(lengths, st.integers(5, 80))
def test_only_a_row_that_is_too_long_by_itself_passes_the_budget(groups, budget):
    for pack in pack_rows(rows_of_lengths(groups), budget):
        assert pack.num_tokens <= budget or num_rows(pack) == 1


@given(lengths, st.integers(5, 80))
def test_a_group_that_fits_stays_together(groups, budget):
    packs = pack_rows(rows_of_lengths(groups), budget)
    for g, ns in enumerate(groups):
        if ns and sum(ns) <= budget:
            assert sum(any(pack.token_ids // 100_000 == g) for pack in packs) == 1


def test_a_group_that_fits_because_it_shares_a_prompt_stays_together():
    groups = [[row_like([*[g] * 50, 100 + r], r) for r in range(8)] for g in range(3)]
    packs = pack_rows(groups, 60, share_prefixes=True)
    assert [pack.num_tokens for pack in packs] == [58] * 3
    assert_same_rows(packs, groups)


def test_groups_of_one_that_share_a_prompt_fill_a_pack():
    groups = [[row_like([*[7] * 50, 100 + r], r)] for r in range(8)]
    (pack,) = pack_rows(groups, 110, share_prefixes=True)
    assert pack.num_tokens == 58


@settings(max_examples=50)
@given(st.lists(alike, min_size=1, max_size=5), st.integers(10, 60), st.booleans())
def test_no_two_packs_would_fit_into_one(groups, budget, share):
    rows = [[row_like(ids, 100 * g + r) for r, ids in enumerate(group)] for g, group in enumerate(groups)]
    sizes = sorted(pack.num_tokens for pack in pack_rows(rows, budget, share_prefixes=share))
    assert len(sizes) < 2 or sizes[0] + sizes[1] > budget


# -- ranks


@given(lengths, st.integers(30, 60), st.integers(1, 5))
def test_ranks_share_the_packs_and_none_has_two_more_than_another(groups, budget, num_ranks):
    packs = pack_rows(rows_of_lengths(groups), budget)
    ranks = balance(packs, num_ranks)
    assert len(ranks) == num_ranks
    assert sorted(id(pack) for rank in ranks for pack in rank) == sorted(map(id, packs))
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


def test_ranks_get_alike_packs_in_a_round_and_alike_sums():
    # one row each, so that the order of lengths is the order of costs
    packs = [pack_rows([[row_like(np.arange(n))]], 1)[0] for n in (10, 80, 40, 70, 50, 60)]
    ranks = balance(packs, 2)
    assert [[pack.num_tokens for pack in rank] for rank in ranks] == [[80, 50, 10], [70, 60, 40]]


def test_long_rows_cost_more_than_their_tokens():
    long, short = pack_rows([[row_like(np.arange(10_000))]], 1), pack_rows(rows_of_lengths([[1000] * 11]), 11_000)
    assert long[0].num_tokens < short[0].num_tokens
    assert balance([*short, *long], 2) == [long, short]


@given(alike)
def test_pairs_are_those_of_the_packs_attention(rows):
    (pack,) = pack_rows([[row_like(ids, r) for r, ids in enumerate(rows)]], 1000, share_prefixes=True)
    # a token sees its row up to itself; a prefix is computed once
    seen = {}
    for place in range(pack.num_tokens):
        seen[place] = int(pack.position_ids[place]) + 1
    assert attention_pairs(pack) == sum(seen.values())


def test_a_dummy_is_a_pack_without_weight():
    pack = dummy_pack()
    (row,) = rows_in(pack)
    assert row.loss_weights.tolist() == [0.0]
    like = pack_rows([[row_like([1, 2])]], 10)[0]
    for f in fields(Pack):
        assert getattr(pack, f.name).dtype == getattr(like, f.name).dtype, f.name


@settings(max_examples=50)
@given(lengths, st.integers(30, 80), st.integers(1, 4), st.booleans())
def test_packs_made_for_ranks_hold_the_same_rows_and_take_no_longer(groups, budget, num_ranks, share):
    rows = rows_of_lengths(groups)
    any_number, for_ranks = (pack_rows(rows, budget, share_prefixes=share, num_ranks=n) for n in (1, num_ranks))
    assert_same_rows(for_ranks, rows)
    assert all(pack.num_tokens <= budget for pack in for_ranks)
    rounds = lambda packs: sum(sorted((pack.num_tokens for pack in packs), reverse=True)[::num_ranks])  # noqa: E731
    # costs have a grain of attention in them
    assert rounds(for_ranks) <= 1.01 * rounds(any_number)


def test_few_packs_are_made_smaller_so_that_no_rank_stands_idle():
    groups = [[row_like([*[g] * 40, 1000 + r]) for r in range(20)] for g in range(8)]
    sizes = lambda n: [pack.num_tokens for pack in pack_rows(groups, 330, share_prefixes=True, num_ranks=n)]  # noqa: E731
    assert sizes(1) == [300, 180]
    assert sizes(2) == [240, 240]
    assert sizes(4) == [120] * 4


def test_a_group_is_split_rather_than_let_ranks_stand_idle():
    group = [row_like([*[7] * 40, 1000 + r]) for r in range(200)]
    packs = pack_rows([group], 330, share_prefixes=True, num_ranks=4)
    assert_same_rows(packs, [group])
    assert [pack.num_tokens for pack in packs] == [90] * 4


# -- the wire


@settings(max_examples=50)
@given(st.lists(alike, max_size=3), st.integers(5, 40), st.integers(0, 100))
def test_the_wire_gives_back_the_same_arrays(groups, budget, room):
    packs = pack_rows([[row_like(ids) for ids in group] for group in groups], budget, share_prefixes=True)
    buffer = bytearray(b"\xff" * (payload_bytes(packs) + room))
    assert write_payload(packs, memoryview(buffer)) == payload_bytes(packs)
    assert buffer[payload_bytes(packs) :] == b"\xff" * room
    for payload in (buffer, to_bytes(packs)):
        back = from_bytes(payload)
        assert len(back) == len(packs)
        for pack, other in zip(packs, back, strict=True):
            for f in fields(Pack):
                a, b = getattr(pack, f.name), getattr(other, f.name)
                assert a.dtype == b.dtype
                np.testing.assert_array_equal(a, b)
                assert b.flags.writeable, "torch refuses to share what it may not write"


def test_arrays_are_views_at_aligned_places():
    payload = to_bytes(pack_rows(rows_of_lengths([[5, 6, 7]]), 100))
    (pack,) = from_bytes(payload)
    base = np.frombuffer(payload, np.uint8).ctypes.data
    assert all((getattr(pack, f.name).ctypes.data - base) % ALIGNMENT == 0 for f in fields(Pack))
    pack.loss_weights[0] = 0
    assert from_bytes(payload)[0].loss_weights[0] == 0


def test_a_buffer_that_is_too_small_is_refused():
    packs = pack_rows(rows_of_lengths([[5]]), 100)
    with pytest.raises(ValueError, match="make room for payload_bytes"):
        write_payload(packs, bytearray(payload_bytes(packs) - 1))
    with pytest.raises(ValueError, match="buffer"):
        from_bytes(to_bytes(packs)[:-1])


# -- what a token is worth


def test_a_turns_advantage_reaches_each_of_its_tokens(make):
    trajectory = make.trajectory([make.turn([1, 2], [3, 4], [-0.1, -0.2]), make.turn([1, 2, 3, 4, 5], [6], [-0.3])])
    (segment,) = segments_of(trajectory)
    (pack,) = pack_rows([[row_of(segment, trajectory, [0.5, -2.0])]], 100)
    assert pack.predictors.tolist() == [1, 2, 4]
    assert pack.target_ids.tolist() == [3, 4, 6]
    assert pack.advantages.tolist() == [0.5, 0.5, -2.0]
    assert pack.loss_weights.tolist() == [1, 1, 1]
    assert pack.turns.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(pack.sampler_logprobs, np.float32([-0.1, -0.2, -0.3]))


def test_a_turn_may_have_an_advantage_for_each_of_its_tokens(make):
    trajectory = make.trajectory([make.turn([1, 2], [3, 4]), make.turn([1, 2, 3, 4, 5], [6])])
    (segment,) = segments_of(trajectory)
    assert row_of(segment, trajectory, [np.array([0.5, 1.5]), np.array([-2.0])]).advantages.tolist() == [0.5, 1.5, -2.0]
    with pytest.raises(ValueError, match="broadcast"):
        row_of(segment, trajectory, [np.array([0.5, 1.5, 2.5]), np.array([-2.0])])


@pytest.fixture
def unequal(make):
    """Two trajectories with a trim in one: 2 + 3 and 1 sampled tokens; a third that sampled nothing."""
    first = make.trajectory([make.turn([1], [2, 3]), make.turn([9], [4, 5, 6])])
    second = make.trajectory([make.turn([1], [7])], index=1)
    silent = make.trajectory([make.turn([1], [])], index=2)
    return make.group([first, second, silent])


@pytest.mark.parametrize(
    ("loss_mean", "share_of_a_token"),
    [("token", [1 / 6, 1 / 6]), ("sequence", [1 / 5 / 2, 1 / 1 / 2]), ("constant", [1 / 80, 1 / 80])],
)
def test_what_a_token_weighs_in_the_loss(unequal, loss_mean, share_of_a_token):
    rows = [
        [
            row_of(segment, t, [t.index] * len(t.turns), loss_mean)
            for t in unequal.trajectories
            for segment in segments_of(t)
        ]
    ]
    packs = pack_rows(rows, 4)
    assert len(packs) == 3
    denominator = loss_denominator(packs, [unequal], loss_mean, token_limit=40)
    for pack in packs:
        shares = [share_of_a_token[int(a)] for a in pack.advantages]
        np.testing.assert_allclose(pack.loss_weights / denominator, shares, rtol=1e-6)


def test_a_masked_token_leaves_the_denominator(unequal):
    rows = [[row_of(segment, t, [0.0] * 2) for t in unequal.trajectories for segment in segments_of(t)]]
    packs = pack_rows(rows, 100)
    packs[0].loss_weights[1] = 0
    assert loss_denominator([*packs, dummy_pack()], [unequal], "token", 40) == 5


def test_a_turn_without_a_logprob_for_each_token_is_refused(make):
    trajectory = make.trajectory([make.turn([1], [2, 3], [-0.1])])
    with pytest.raises(ValueError, match="sampled 2 tokens but has 1 sampler_logprobs"):
        row_of(segments_of(trajectory)[0], trajectory, [0.0])


@given(st.lists(st.integers(0, 5), max_size=8), st.integers(1, 6))
def test_a_batch_is_cut_by_whole_groups_in_their_order_or_by_rows_where_there_are_fewer(sizes, num_parts):
    groups = rows_of_lengths([[3] * size for size in sizes])
    parts = cut(groups, num_parts)
    ids = lambda rows: [id(row) for row in rows]  # noqa: E731
    assert [i for part in parts for rows in part for i in ids(rows)] == [i for rows in groups for i in ids(rows)]
    assert len(parts) == min(num_parts, sum(sizes)), "as many as were asked for, if there are rows enough"
    whole = [ids(rows) for rows in groups if rows]
    by_group = len(whole) >= num_parts
    assert not by_group or [ids(rows) for part in parts for rows in part] == whole
    counts = [len(part) if by_group else sum(map(len, part)) for part in parts]
    assert not counts or max(counts) - min(counts) <= 1
