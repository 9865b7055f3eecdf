"""Rows of different lengths, laid end to end: what one forward and backward pass eats. Arrays only, no padding, no torch.

Rows of a pack that begin alike form a *family*. What all of a family begin with is its *prefix*, laid out once; what each
goes on with is its *branch*. First all prefixes, then the branches family by family, then the rows that stand alone:

    rows           a = P x1 x2 x3     b = P y1 y2     c = z1 z2           P = p1 p2 p3, families = [a b]
    token_ids      p1 p2 p3 | x1 x2 x3 | y1 y2 | z1 z2                    T tokens
    position_ids    0  1  2 |  3  4  5 |  3  4 |  0  1
    cu_seqlens      0          3          6       8       10              flash-attn's word: stretch s is [cu[s], cu[s + 1])
    family_cu                  3                  8                       family f's branches are [family_cu[f], family_cu[f + 1])
    predictors             2   3  4   |  2  6                             R sampled tokens: the hidden state at i predicts one
    target_ids             x1 x2 x3   | y1 y2                             p3 predicts the first token of both branches
    sequences               0  0  0   |  1  1                             the row it belongs to: a is 0, b is 1, c would be 2

A branch attends to all of its prefix and, causally, to itself: (1) causal attention over cu_seqlens, (2) the queries
of a family's branches against the keys of its prefix. Every prefix and branch has a token, so no stretch is empty.

Which rows form families is chosen exactly (l0fast/prefixes.py). Which rows form packs is first-fit decreasing under a budget
of tokens (Johnson, "Near-optimal bin packing algorithms", 1973; at most 11/9 OPT + 1 bins), on two levels: first the rows of
a group, so that rows which share a prompt lie in one pack, then what the groups came to. Within a group a row goes where the
tokens really laid out stay within the budget. Over groups the sizes of both are added, an upper bound; that is repeated
with the tokens really laid out until no two packs fit into one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import orjson

from l0fast.prefixes import Prefixes
from l0fast.types import Group, Segment, Trajectory

ALIGNMENT = 64
"""Arrays start at multiples of this in the serialised form, so that they can be used where they lie [bytes]."""

ATTENTION_WEIGHT = 1e-4
"""FLOPs of one (query, key) pair in all layers, in units of the FLOPs of one token in all weights: 2.6e-5 for Qwen2.5-7B,
7e-5 for Qwen3-4B, 1.9e-4 for Qwen3-0.6B (`cost.ModelShape.attention_weight`)."""

SLACKS = (1.0, 1.1, 1.25, 1.5)
"""Sizes that are tried for packs of several ranks, in units of an even share."""

MANY_ROUNDS = 8
"""From so many rounds on, ranks that stand idle in the last are no matter."""

LossMean = Literal["token", "sequence", "constant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One segment, and what each of its sampled tokens is worth."""

    token_ids: np.ndarray
    """[n] int64"""
    predictors: np.ndarray
    """[m] int64: index in the row of the token before each sampled one."""
    advantages: np.ndarray
    """[m] float32"""
    sampler_logprobs: np.ndarray
    """[m] float32 [nats]"""
    loss_weights: np.ndarray
    """[m] float32"""
    turns: np.ndarray
    """[m] int32: the turn of the trajectory that sampled it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """Rows end to end: T tokens in S stretches, the first F of them prefixes; R tokens sampled."""

    token_ids: np.ndarray
    """[T] int64"""
    position_ids: np.ndarray
    """[T] int64: place in its row; a branch starts at the length of its prefix."""
    cu_seqlens: np.ndarray
    """[S + 1] int32: prefixes, branches family by family, lone rows."""
    family_cu: np.ndarray
    """[F + 1] int32: family f's branches are the tokens [family_cu[f], family_cu[f + 1]); the first is the number of prefix tokens."""
    predictors: np.ndarray
    """[R] int64: index in the pack of the token whose hidden state predicts the sampled one; may repeat."""
    target_ids: np.ndarray
    """[R] int64: the sampled tokens."""
    advantages: np.ndarray
    """[R] float32"""
    sampler_logprobs: np.ndarray
    """[R] float32 [nats]"""
    loss_weights: np.ndarray
    """[R] float32: factor of a token's loss; 0 masks it, and takes it out of the denominator too."""
    turns: np.ndarray
    """[R] int32"""
    sequences: np.ndarray
    """[R] int32: which row of the pack it belongs to, counted in the order of the branches and lone rows."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


def row_of(
    segment: Segment,
    trajectory: Trajectory,
    advantages: Sequence[float] | Sequence[np.ndarray] | np.ndarray,
    loss_mean: LossMean = "token",
) -> Row:
    """Spread the advantage of each turn over the tokens it sampled.

    Args:
        advantages: one a turn of `trajectory`: a number, or an array with one for each token it sampled.
        loss_mean: "sequence" weighs a token by 1 / the tokens its whole trajectory sampled, the others by 1.

    Raises:
        ValueError: a turn without one log-prob for each of its tokens.
    """
    turns = [trajectory.turns[span.turn] for span in segment.spans]
    for span, turn in zip(segment.spans, turns, strict=True):
        if len(turn.sampler_logprobs) != span.length:
            raise ValueError(
                f"turn {span.turn} of trajectory {trajectory.index} of task {trajectory.task.id!r} sampled {span.length} tokens "
                f"but has {len(turn.sampler_logprobs)} sampler_logprobs; the engine must return one for each"
            )
    lengths = [span.length for span in segment.spans]
    weight = 1 / num_sampled(trajectory) if loss_mean == "sequence" else 1.0
    return Row(
        token_ids=np.array(segment.token_ids, np.int64),
        predictors=np.concatenate([np.arange(s.start - 1, s.start - 1 + s.length) for s in segment.spans]),
        advantages=np.concatenate(
            [np.broadcast_to(np.asarray(advantages[s.turn], np.float32), s.length) for s in segment.spans]
        ),
        sampler_logprobs=np.concatenate([np.array(turn.sampler_logprobs, np.float32) for turn in turns]),
        loss_weights=np.full(sum(lengths), weight, np.float32),
        turns=np.repeat(np.array([s.turn for s in segment.spans], np.int32), lengths),
    )


def num_sampled(trajectory: Trajectory) -> int:
    """Tokens that the policy sampled, in all turns."""
    return sum(len(turn.response_ids) for turn in trajectory.turns)


def loss_denominator(packs: Sequence[Pack], groups: Sequence[Group], loss_mean: LossMean, token_limit: int) -> float:
    """What the summed loss of these packs is divided by; of several batches in one step they add up.

        token      tokens with a weight: every token has one vote (DAPO, https://arxiv.org/abs/2503.14476)
        sequence   trajectories, whose token weights are 1 / |o_i|: each has one vote (GRPO, https://arxiv.org/abs/2402.03300)
        constant   trajectories x token_limit: a long one is not discounted (Dr. GRPO, https://arxiv.org/abs/2503.20783)

    Args:
        packs: all that `groups` came to.
        token_limit: most tokens one trajectory can sample: rollout.max_turns x agent.max_new_tokens [tokens].
    """
    if loss_mean == "token":
        return float(sum(int((pack.loss_weights > 0).sum()) for pack in packs))
    trajectories = sum(num_sampled(trajectory) > 0 for group in groups for trajectory in group.trajectories)
    return float(trajectories * (token_limit if loss_mean == "constant" else 1))


# -- packs


def cut(groups: Sequence[Sequence[Row]], num_parts: int) -> list[list[Sequence[Row]]]:
    """A batch's parts, of an optimizer step each: like many whole groups in their order, or, where there are fewer, rows.

    Groups and their order alone decide which rows are in which part; budget and ranks only how a part is packed.

    Returns:
        [part][group] -> rows, as `pack_rows` takes a part's; fewer than `num_parts` where there are fewer rows.
    """
    units = [rows for rows in groups if rows]
    if len(units) < num_parts:
        units = [[row] for rows in units for row in rows]
    parts = np.array_split(np.arange(len(units)), num_parts)
    return [[units[i] for i in part] for part in parts if len(part)]


def pack_rows(
    groups: Sequence[Sequence[Row]], budget: int, *, share_prefixes: bool = False, num_ranks: int = 1
) -> list[Pack]:
    """Rows into packs of at most `budget` tokens; a row that is longer gets a pack of its own.

    Args:
        groups: the rows of each group.
        budget: tokens laid out in a pack, a shared prefix counted once [tokens].
        share_prefixes: lay out what rows of a pack have in common once.
        num_ranks: that are to share the packs. Few packs are made smaller where ranks are then done earlier: prefixes may be
            laid out more often, but side by side.
    """
    packs = _pack(groups, budget, share_prefixes)
    if num_ranks > 1 and 0 < len(packs) < MANY_ROUNDS * num_ranks:
        places = -(-len(packs) // num_ranks) * num_ranks
        longest = max(len(row.token_ids) for rows in groups for row in rows)
        even = sum(pack.num_tokens for pack in packs) / places
        smaller = sorted({max(longest, math.ceil(slack * even)) for slack in SLACKS}, reverse=True)
        others = [_pack(groups, size, share_prefixes) for size in smaller if size < budget]
        packs = min([packs, *others], key=lambda packs: _duration(packs, num_ranks))
    return packs


def _pack(groups: Sequence[Sequence[Row]], budget: int, share_prefixes: bool) -> list[Pack]:
    units = [unit for rows in groups if rows for unit in _split(rows, budget, share_prefixes)]
    while True:
        merged = _first_fit_decreasing(units, [_num_tokens(unit, share_prefixes) for unit in units], budget)
        if len(merged) == len(units):
            return [_lay_out(unit, share_prefixes) for unit in merged]
        units = merged


def _prefixes(rows: Sequence[Row]) -> Prefixes:
    return Prefixes([row.token_ids for row in rows])


def _num_tokens(rows: list[Row], share_prefixes: bool) -> int:
    return _prefixes(rows).num_tokens(range(len(rows))) if share_prefixes else sum(len(row.token_ids) for row in rows)


def _split(rows: Sequence[Row], budget: int, share_prefixes: bool) -> list[list[Row]]:
    """The rows of a group, in as few parts as first fit finds."""
    if not share_prefixes:
        return _first_fit_decreasing([[row] for row in rows], [len(row.token_ids) for row in rows], budget)
    prefixes = _prefixes(rows)
    if prefixes.num_tokens(range(len(rows))) <= budget:
        return [list(rows)]
    bins: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i].token_ids)):
        room = next((bin for bin in bins if prefixes.num_tokens([*bin, i]) <= budget), None)
        if room is None:
            bins.append([i])
        else:
            room.append(i)
    return [[rows[i] for i in bin] for bin in bins]


def _first_fit_decreasing(units: Sequence[list[Row]], sizes: Sequence[int], budget: int) -> list[list[Row]]:
    """Merge units, largest first, each into the first bin that has room for its `size`."""
    bins: list[list[Row]] = []
    free: list[int] = []
    for i in sorted(range(len(units)), key=lambda i: -sizes[i]):  # stable: the same rows give the same packs
        place = next((b for b, room in enumerate(free) if sizes[i] <= room), None)
        if place is None:
            bins.append(list(units[i]))
            free.append(budget - sizes[i])
        else:
            bins[place] += units[i]
            free[place] -= sizes[i]
    return bins


def _lay_out(rows: list[Row], share_prefixes: bool) -> Pack:
    families = _prefixes(rows).families(range(len(rows))) if share_prefixes else []
    prefix_of = {r: f for f, (_, members) in enumerate(families) for r in members}
    lone = [r for r in range(len(rows)) if r not in prefix_of]
    order = [r for _, members in families for r in members] + lone
    # tokens of a row that lie in its prefix
    shared = np.array([families[prefix_of[r]][0] if r in prefix_of else 0 for r in order])
    stretches = [(rows[members[0]], 0, depth) for depth, members in families]
    stretches += [(rows[r], p, len(rows[r].token_ids)) for r, p in zip(order, shared, strict=True)]
    cu_seqlens = np.cumsum([0, *(stop - start for _, start, stop in stretches)])
    first_branches = len(families) + np.cumsum([0, *(len(members) for _, members in families)])
    starts = cu_seqlens[len(families) : -1]
    predictors = [
        np.where(
            rows[r].predictors < p,
            rows[r].predictors + cu_seqlens[prefix_of.get(r, 0)],
            rows[r].predictors - p + start,
        )
        for r, p, start in zip(order, shared, starts, strict=True)
    ]
    laid = [rows[r] for r in order]
    return Pack(
        token_ids=np.concatenate([row.token_ids[start:stop] for row, start, stop in stretches]),
        position_ids=np.concatenate([np.arange(start, stop) for _, start, stop in stretches]),
        cu_seqlens=cu_seqlens.astype(np.int32),
        family_cu=cu_seqlens[first_branches].astype(np.int32),
        predictors=np.concatenate(predictors),
        target_ids=np.concatenate([row.token_ids[row.predictors + 1] for row in laid]),
        advantages=np.concatenate([row.advantages for row in laid]),
        sampler_logprobs=np.concatenate([row.sampler_logprobs for row in laid]),
        loss_weights=np.concatenate([row.loss_weights for row in laid]),
        turns=np.concatenate([row.turns for row in laid]),
        sequences=np.repeat(np.arange(len(laid), dtype=np.int32), [len(row.predictors) for row in laid]),
    )


def dummy_pack() -> Pack:
    """Two tokens of no weight: keeps a rank in step that has a pack less than the others."""
    return Pack(
        token_ids=np.zeros(2, np.int64),
        position_ids=np.arange(2),
        cu_seqlens=np.array([0, 2], np.int32),
        family_cu=np.zeros(1, np.int32),
        predictors=np.zeros(1, np.int64),
        target_ids=np.zeros(1, np.int64),
        advantages=np.zeros(1, np.float32),
        sampler_logprobs=np.zeros(1, np.float32),
        loss_weights=np.zeros(1, np.float32),
        turns=np.zeros(1, np.int32),
        sequences=np.zeros(1, np.int32),
    )


def filled(packs: Sequence[Pack], num_packs: int) -> list[Pack]:
    """So many, with weightless ones at the end."""
    return [*packs, *[dummy_pack()] * (num_packs - len(packs))]


# -- ranks


def attention_pairs(pack: Pack) -> int:
    """(query, key) pairs of a pack's attention: n (n + 1) / 2 in a stretch, and every branch token with its prefix."""
    lengths = np.diff(pack.cu_seqlens).astype(np.int64)
    branch_tokens = np.diff(pack.family_cu).astype(np.int64)
    return int((lengths * (lengths + 1) // 2).sum() + lengths[: len(branch_tokens)] @ branch_tokens)


def _cost(pack: Pack) -> float:
    """FLOPs, in tokens."""
    return pack.num_tokens + ATTENTION_WEIGHT * attention_pairs(pack)


def _duration(packs: Sequence[Pack], num_ranks: int) -> float:
    """Of dealing them with `balance`: the sum over rounds of the most expensive pack."""
    return sum(sorted(map(_cost, packs), reverse=True)[::num_ranks])


def balance(packs: Sequence[Pack], num_ranks: int) -> list[list[Pack]]:
    """The packs of each rank. Ranks that get one less than others are `filled` up.

    Ranks wait for each other at every layer of every pack (FSDP gathers weights), so a round takes as long as its most
    expensive pack: packs are dealt in rounds of similar cost, which makes the sum over rounds least, and within a round
    the most expensive goes to the rank that has had the least so far. Costs are FLOPs: T + ATTENTION_WEIGHT x pairs.
    """
    costs = [_cost(pack) for pack in packs]
    order = sorted(range(len(packs)), key=lambda i: -costs[i])
    ranks: list[list[Pack]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for start in range(0, len(order), num_ranks):
        least_first = sorted(range(num_ranks), key=loads.__getitem__)
        for i, rank in zip(order[start : start + num_ranks], least_first, strict=False):
            ranks[rank].append(packs[i])
            loads[rank] += costs[i]
    return ranks


# -- the wire: length of the header (8 bytes, little-endian), header (JSON: dtype and shape of each field of each pack),
#    then the arrays, each at a multiple of ALIGNMENT


def _arrays(packs: Sequence[Pack]) -> list[np.ndarray]:
    return [getattr(pack, f.name) for pack in packs for f in fields(Pack)]


def _header(arrays: list[np.ndarray]) -> bytes:
    # json takes a twentieth of a second for a thousand packs, in which no other thread runs
    header = orjson.dumps([[a.dtype.str, a.shape] for a in arrays])
    return len(header).to_bytes(8, "little") + header


def payload_bytes(packs: Sequence[Pack]) -> int:
    """Room that `write_payload` needs [bytes]."""
    arrays = _arrays(packs)
    size = len(_header(arrays))
    for array in arrays:
        size += -size % ALIGNMENT + array.nbytes
    return size


def write_payload(packs: Sequence[Pack], buffer: bytearray | memoryview) -> int:
    """Write the packs at the beginning of `buffer`, which should itself lie at a multiple of ALIGNMENT. Each array is copied once.

    Returns:
        the bytes written, `payload_bytes(packs)`.

    Raises:
        ValueError: a buffer with less room than that.
    """
    if len(buffer) < (size := payload_bytes(packs)):
        raise ValueError(
            f"{len(packs)} packs take {size} bytes but the buffer has {len(buffer)}: make room for payload_bytes()"
        )
    arrays = _arrays(packs)
    header = _header(arrays)
    buffer[: (end := len(header))] = header
    for array in arrays:
        start = end + -end % ALIGNMENT
        end = start + array.nbytes
        if array.size:
            np.frombuffer(buffer, array.dtype, count=array.size, offset=start)[:] = array.ravel()
    return end


def to_bytes(packs: Sequence[Pack]) -> bytearray:
    """One payload of its own."""
    payload = bytearray(payload_bytes(packs))
    write_payload(packs, payload)
    return payload


def from_bytes(payload: bytearray | memoryview | bytes) -> list[Pack]:
    """The packs, as views of `payload`: nothing is copied, and they are writable if it is. What follows them is not looked at.

    Raises:
        ValueError: not a whole payload of `write_payload`.
    """
    names = [f.name for f in fields(Pack)]
    end = 8 + int.from_bytes(payload[:8], "little")
    arrays = []
    for dtype, shape in orjson.loads(payload[8:end]):
        start = end + -end % ALIGNMENT
        count = int(np.prod(shape))
        array = np.frombuffer(payload, dtype, count, start) if count else np.empty(0, dtype)
        arrays.append(array.reshape(shape))
        end = start + array.nbytes
    return [
        Pack(**dict(zip(names, arrays[i : i + len(names)], strict=True))) for i in range(0, len(arrays), len(names))
    ]
