"""Which conversation holds which KV slot, and what of a prompt need not be computed again. Pure: no model, no clock.

A slot is one row of the KV slab, `cached[slot]` ids long. A conversation keeps its slot between turns, so its next turn
computes only what was appended. A new one takes the slot that was idle longest, and copies the longest prefix any slot
holds. Idle slots are the prefix cache: nothing is freed, only overwritten, those of forgotten conversations first.

Requests placed in one round may share a prefix that nobody has computed yet (a group's prompt, the system prompt after a
flush). Then one computes it and the others copy, which orders the round in waves:

    wave 0   sources were there before this round
    wave 1   sources are computed in wave 0          ... a prompt equal to its source's copies everything, logits included

After new weights nothing cached counts any more, and what the running slots hold is computed again, in waves too.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from l0fast.prefixes import common_prefix

_WAVE_TOKENS = 16
"""What a wave costs: a source one wave later must share this many tokens more to be preferred [tokens]."""
_FORGOTTEN = 2**62
"""Taken off the time of a slot's release, so that it comes before all others."""
_EVICTED_PER_SLOT = 8
"""Evicted conversations remembered [conversations a slot]."""


@dataclass(frozen=True, slots=True)
class Placement:
    slot: int
    source: int
    """Slot the prefix is in; equal to `slot` where it is there already."""
    prefix: int
    """Tokens that are not computed again [tokens]."""
    wave: int
    twin: bool
    """The prompt is the source's, placed in the same round: its last position's logits are ours too."""
    recomputed: int = 0
    """Of the tokens to compute, those that this slot or conversation had computed before [tokens]."""


class SlotBook:
    """The slots' ids and owners. `place` until it says None, `close_round`, compute, and `release` each when it is done."""

    def __init__(self, num_slots: int, max_len: int):
        self.tokens: NDArray[np.int32] = np.full((num_slots, max_len), -1, np.int32)
        """Ids of each slot; past `cached` they are stale, or sampled and not yet computed."""
        self.cached: NDArray[np.int64] = np.zeros(num_slots, np.int64)
        """Leading ids of each slot whose keys and values are in the slab [tokens]."""
        self.running: NDArray[np.bool_] = np.zeros(num_slots, np.bool_)
        self._released_at = np.zeros(num_slots, np.int64)
        self._releases = 0
        self._slot_of: dict[str, int] = {}
        self._owner: list[str | None] = [None] * num_slots
        self._wave = np.full(num_slots, -1, np.int64)
        self._stale = np.zeros(num_slots, np.int64)
        """Leading ids of each slot that were computed by older weights [tokens]."""
        self._evicted: dict[str, NDArray[np.int32]] = {}
        """What conversations had computed when their slot was taken; the latest few, for the account of `recomputed`."""

    @property
    def used_tokens(self) -> int:
        """Entries that somebody may still want [tokens]."""
        return int(self.cached[self.running | (self._released_at > 0)].sum())

    def holds(self, conversation: str) -> bool:
        """Whether it has an idle slot of its own."""
        slot = self._slot_of.get(conversation)
        return slot is not None and not self.running[slot]

    def place(self, prompt: NDArray[np.int32], conversation: str) -> Placement | None:
        """Give a prompt a slot and mark it running; None while every slot is. Its ids count as cached from here on."""
        slot = self._slot_of[conversation] if self.holds(conversation) else self._longest_idle()
        if slot is None:
            return None
        source, prefix = self._best_source(prompt, slot)
        again = max(0, self._once_computed(prompt, slot, conversation) - prefix)
        planned = self._wave[source] >= 0
        twin = bool(planned) and prefix == len(prompt) == self.cached[source]
        if not twin:
            # the last position's logits are nowhere: compute at least that one
            prefix = min(prefix, len(prompt) - 1)
        wave = int(self._wave[source]) + 1 if planned else 0
        self._own(slot, conversation)
        self.tokens[slot, : len(prompt)] = prompt
        self.cached[slot] = len(prompt)
        self._stale[slot] = 0
        self.running[slot] = True
        self._wave[slot] = wave
        return Placement(slot, source, prefix, wave, twin, again)

    def close_round(self) -> None:
        """What was placed is about to be computed: the next round copies from it at once."""
        self._wave[:] = -1

    def release(self, slot: int) -> None:
        """The request is done; its ids stay as a prefix for others until the slot is needed."""
        self.running[slot] = False
        self._releases += 1
        self._released_at[slot] = self._releases
        if self._owner[slot] is None:
            self._released_at[slot] -= _FORGOTTEN

    def forget(self, conversation: str) -> None:
        """It will not come back: its slot is the next to be taken, as soon as it is idle."""
        self._evicted.pop(conversation, None)
        slot = self._slot_of.pop(conversation, None)
        if slot is not None:
            self._owner[slot] = None
            if not self.running[slot]:
                self._released_at[slot] -= _FORGOTTEN

    def flush(self) -> list[Placement]:
        """Forget every prefix: the weights changed. What running slots hold is placed anew; close the round, then compute it.

        Nobody needs its last position's logits, so unlike a prompt it may be copied as a whole.
        """
        held = self.cached.copy()
        self._stale = np.maximum(self._stale, held)
        self.cached[:] = 0
        placed = []
        for slot in np.flatnonzero(self.running).tolist():
            length = int(held[slot])
            source, prefix = self._best_source(self.tokens[slot, :length], slot)
            wave = int(self._wave[source]) + 1 if source != slot else 0
            self.cached[slot], self._stale[slot], self._wave[slot] = length, 0, wave
            placed.append(Placement(slot, source, prefix, wave, False, length - prefix))
        return placed

    def _longest_idle(self) -> int | None:
        idle = np.flatnonzero(~self.running)
        return int(idle[self._released_at[idle].argmin()]) if len(idle) else None

    def _own(self, slot: int, conversation: str) -> None:
        previous = self._owner[slot]
        if previous is not None and previous != conversation and self._slot_of.get(previous) == slot:
            del self._slot_of[previous]
            self._evicted[previous] = self._known(slot).copy()
            if len(self._evicted) > _EVICTED_PER_SLOT * len(self.cached):
                del self._evicted[next(iter(self._evicted))]
        self._owner[slot] = conversation
        self._slot_of[conversation] = slot

    def _known(self, slot: int) -> NDArray[np.int32]:
        """The ids of a slot that were computed, by these weights or by older ones."""
        return self.tokens[slot, : max(self.cached[slot], self._stale[slot])]

    def _once_computed(self, prompt: NDArray[np.int32], slot: int, conversation: str) -> int:
        """Leading ids of a prompt that its conversation has had computed before; `slot` is the one it gets."""
        before = self._evicted.pop(conversation, None)
        if before is None and self._owner[slot] == conversation:
            before = self._known(slot)
        return 0 if before is None else common_prefix(before, prompt)

    def _best_source(self, prompt: NDArray[np.int32], slot: int) -> tuple[int, int]:
        differs = self.tokens[:, : len(prompt)] != prompt
        shared = np.where(differs.any(axis=1), differs.argmax(axis=1), len(prompt))
        shared = np.minimum(shared, self.cached)
        score = shared - _WAVE_TOKENS * (self._wave + 1)
        source = int(score.argmax())
        if score[source] <= score[slot]:
            source = slot
        return source, int(shared[source])
