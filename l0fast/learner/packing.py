"""Rows of different lengths, laid end to end: what one forward and backward pass eats. Arrays only, no padding, no torch.

    token_ids      a0 a1 a2 a3 a4 | b0 b1 b2 | c0 ...     T tokens
    position_ids    0  1  2  3  4 |  0  1  2 |  0 ...
    cu_seqlens      0               5          8  ...     flash-attn's word: row s is [cu[s], cu[s + 1])
    predictors         1  2         6                     R sampled tokens: the hidden state at i predicts token i + 1
    target_ids        a2 a3        b2

Rows that begin with the same prompt, as those of a group do, need not compute it n times: the first of them is laid out
whole, the others from where they differ, and `donors` and `shared` say whose keys and values they begin with.

    token_ids      a0 a1 a2 a3 a4 | b2 b3 | ...           b0 b1 = a0 a1
    position_ids    0  1  2  3  4 |  2  3 | ...
    donors, shared  (0, 0)          (0, 2)   ...          row b begins with 2 tokens of row 0
    predictors         1  2            1     ...          b2 is predicted by the hidden state at a1

Only the R predictors reach the LM head. Everything about a sampled token (advantage, sampler's log-prob, weight, turn)
is an array of length R in the same order.

Rows are packed by first-fit decreasing (Johnson, "Near-optimal bin packing algorithms", 1973; at most 11/9 OPT + 1
bins) under a budget of tokens, in two levels: the rows of a group first, so that rows which share a prompt lie in one
pack, then what the groups came to.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from l0fast.types import Segment, Trajectory

ALIGNMENT = 64
"""Arrays start at multiples of this in the serialised form, so that they can be used where they lie [bytes]."""


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
    turns: np.ndarray
    """[m] int32: the turn of the trajectory that sampled it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """Rows end to end: T tokens in S rows, R of them sampled."""

    token_ids: np.ndarray
    """[T] int64"""
    position_ids: np.ndarray
    """[T] int64: place in its row."""
    cu_seqlens: np.ndarray
    """[S + 1] int32"""
    donors: np.ndarray
    """[S] int32: the row whose first tokens a row begins with; its own number where there is none."""
    shared: np.ndarray
    """[S] int32: how many those are; 0 where there is no donor. A donor is whole."""
    predictors: np.ndarray
    """[R] int64: index in the pack of the token whose hidden state predicts the sampled one."""
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

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


def row_of(segment: Segment, trajectory: Trajectory, advantages: Sequence[float] | np.ndarray) -> Row:
    """Spread the advantage of each turn over the tokens it sampled.

    Args:
        advantages: one a turn of `trajectory`.

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
    return Row(
        token_ids=np.array(segment.token_ids, np.int64),
        predictors=np.concatenate([np.arange(s.start - 1, s.start - 1 + s.length) for s in segment.spans]),
        advantages=np.repeat(np.array([advantages[s.turn] for s in segment.spans], np.float32), lengths),
        sampler_logprobs=np.concatenate([np.array(turn.sampler_logprobs, np.float32) for turn in turns]),
        turns=np.repeat(np.array([s.turn for s in segment.spans], np.int32), lengths),
    )


def pack_rows(groups: Sequence[Sequence[Row]], budget: int, *, share_prefixes: bool = False) -> list[Pack]:
    """Rows into packs of at most `budget` tokens; a row that is longer gets a pack of its own.

    Args:
        groups: the rows of each group.
        budget: [tokens], shared ones counted in every row.
        share_prefixes: lay out what rows of a pack have in common once.
    """
    units = [unit for rows in groups for unit in _first_fit_decreasing([[row] for row in rows], budget)]
    return [_lay_out(rows, share_prefixes) for rows in _first_fit_decreasing(units, budget)]


def _first_fit_decreasing(units: list[list[Row]], budget: int) -> list[list[Row]]:
    """Merge units, longest first, each into the first bin that has room."""
    sizes = [sum(len(row.token_ids) for row in unit) for unit in units]
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
    donors, shared = _find_donors(rows) if share_prefixes else (np.arange(len(rows)), np.zeros(len(rows), np.int64))
    lengths = [len(row.token_ids) - p for row, p in zip(rows, shared, strict=True)]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    starts, donor_starts = cu_seqlens[:-1], cu_seqlens[:-1][donors]
    predictors = [
        np.where(row.predictors < p, row.predictors + donor_start, row.predictors - p + start)
        for row, p, start, donor_start in zip(rows, shared, starts, donor_starts, strict=True)
    ]
    return Pack(
        token_ids=np.concatenate([row.token_ids[p:] for row, p in zip(rows, shared, strict=True)]),
        position_ids=np.concatenate([np.arange(p, len(row.token_ids)) for row, p in zip(rows, shared, strict=True)]),
        cu_seqlens=cu_seqlens.astype(np.int32),
        donors=donors.astype(np.int32),
        shared=shared.astype(np.int32),
        predictors=np.concatenate(predictors),
        target_ids=np.concatenate([row.token_ids[row.predictors + 1] for row in rows]),
        advantages=np.concatenate([row.advantages for row in rows]),
        sampler_logprobs=np.concatenate([row.sampler_logprobs for row in rows]),
        loss_weights=np.ones(sum(len(row.predictors) for row in rows), np.float32),
        turns=np.concatenate([row.turns for row in rows]),
    )


def _find_donors(rows: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """For each row the first one with the same prompt, and how many leading tokens they share; at least one is its own."""
    first_with: dict[bytes, int] = {}
    donors, shared = np.arange(len(rows)), np.zeros(len(rows), np.int64)
    for i, row in enumerate(rows):
        prompt = row.token_ids[: row.predictors[0] + 1 if len(row.predictors) else None].tobytes()
        donor = first_with.setdefault(prompt, i)
        if donor != i:
            n = min(len(row.token_ids) - 1, len(rows[donor].token_ids))
            differs = np.flatnonzero(row.token_ids[:n] != rows[donor].token_ids[:n])
            donors[i], shared[i] = donor, differs[0] if len(differs) else n
    return donors, shared


def to_bytes(packs: Sequence[Pack]) -> bytearray:
    """One payload: the length of the header (8 bytes, little-endian), the header (JSON: for each pack, for each field,
    its dtype and shape), then the arrays, each at a multiple of ALIGNMENT."""
    arrays = [np.ascontiguousarray(getattr(pack, field.name)) for pack in packs for field in fields(Pack)]
    header = json.dumps([[a.dtype.str, a.shape] for a in arrays]).encode()
    payload = bytearray(len(header).to_bytes(8, "little") + header)
    for array in arrays:
        payload += b"\0" * (-len(payload) % ALIGNMENT)
        payload += array.tobytes()
    return payload


def from_bytes(payload: bytearray | memoryview | bytes) -> list[Pack]:
    """The packs, as views of `payload`: nothing is copied, and they are writable if it is.

    Raises:
        ValueError: not a whole payload of `to_bytes`.
    """
    names = [field.name for field in fields(Pack)]
    start = 8 + int.from_bytes(payload[:8], "little")
    layout = json.loads(bytes(payload[8:start]))
    arrays = []
    for dtype, shape in layout:
        start += -start % ALIGNMENT
        array = (
            np.frombuffer(payload, dtype, count=int(np.prod(shape)), offset=start)
            if np.prod(shape)
            else np.empty(0, dtype)
        )
        arrays.append(array.reshape(shape))
        start += array.nbytes
    return [
        Pack(**dict(zip(names, arrays[i : i + len(names)], strict=True))) for i in range(0, len(arrays), len(names))
    ]
