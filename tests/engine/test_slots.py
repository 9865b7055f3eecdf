"""SlotBook: whatever is placed, copied and computed in whatever order, a slot ends with its own prompt's entries."""

from unittest.mock import patch

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from l0fast.engine import slots
from l0fast.engine.slots import SlotBook

SLOTS, MAX_LEN = 4, 12


def prompt(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def place_one(book: SlotBook, ids: np.ndarray, conversation: str):
    placement = book.place(ids, conversation)
    book.close_round()
    assert placement is not None
    return placement


class Slab:
    """Stands for keys and values: column i of a row remembers the whole prefix it was computed from."""

    def __init__(self):
        self.rows = [[None] * MAX_LEN for _ in range(SLOTS)]

    def compute(self, slot: int, start: int, ids: list[int]):
        for i in range(start, len(ids)):
            assert self.rows[slot][:i] == [tuple(ids[: j + 1]) for j in range(i)], "attends to another prompt's entries"
            self.rows[slot][i] = tuple(ids[: i + 1])

    def run_round(self, book: SlotBook, placed, *, prompts: bool = True):
        for wave in range(1 + max((p.wave for p in placed), default=0)):
            for p in placed:
                if p.wave == wave and p.source != p.slot:
                    self.rows[p.slot][: p.prefix] = self.rows[p.source][: p.prefix]
            for p in placed:
                if p.wave == wave:
                    ids = book.tokens[p.slot, : book.cached[p.slot]].tolist()
                    assert p.prefix < len(ids) or p.twin or not prompts
                    if p.twin:
                        assert ids == book.tokens[p.source, : book.cached[p.source]].tolist()
                    self.compute(p.slot, p.prefix, ids)


arrivals = st.lists(
    st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=MAX_LEN), st.sampled_from("abcdefg")), max_size=6
)


@settings(max_examples=100)
@given(
    rounds=st.lists(
        st.tuples(arrivals, st.sets(st.integers(0, SLOTS - 1)), st.booleans(), st.sets(st.sampled_from("abcdefg"))),
        max_size=8,
    ),
    wave_tokens=st.integers(0, 3),
)
def test_every_slot_holds_the_entries_of_its_own_prompt(rounds, wave_tokens):
    with patch.object(slots, "_WAVE_TOKENS", wave_tokens):
        play(rounds)


def play(rounds):
    book, slab = SlotBook(SLOTS, MAX_LEN), Slab()
    for requests, released, flush, forgotten in rounds:
        placed = []
        for ids, conversation in requests:
            free = not book.running.all()
            placement = book.place(prompt(*ids), conversation)
            assert (placement is not None) == free
            if placement is not None:
                placed.append(placement)
                assert not any(p.slot == placement.slot for p in placed[:-1])
        book.close_round()
        slab.run_round(book, placed)
        for slot in released:
            if book.running[slot]:
                book.release(slot)
        if flush:
            placed = book.flush()
            assert {p.slot for p in placed} == set(np.flatnonzero(book.running))
            slab = Slab()
            book.close_round()
            slab.run_round(book, placed, prompts=False)
        for conversation in forgotten:
            book.forget(conversation)
            assert not book.holds(conversation)
        idle = book.cached[~book.running]
        assert book.used_tokens <= book.cached.sum() <= book.used_tokens + idle.sum()


def test_the_next_turn_finds_its_own_slot():
    book = SlotBook(SLOTS, MAX_LEN)
    first = place_one(book, prompt(1, 2, 3), "a")
    assert not book.holds("a")
    book.release(first.slot)
    assert book.holds("a")
    second = place_one(book, prompt(1, 2, 3, 4), "a")
    assert (second.slot, second.source, second.prefix) == (first.slot, first.slot, 3)


def test_a_newcomer_takes_the_slot_that_was_idle_longest():
    book = SlotBook(3, MAX_LEN)
    slots = {c: place_one(book, prompt(i), c).slot for i, c in enumerate("abc")}
    for conversation in "bac":
        book.release(slots[conversation])
    assert place_one(book, prompt(9), "d").slot == slots["b"]
    assert not book.holds("b")
    assert place_one(book, prompt(9), "e").slot == slots["a"]
    assert book.holds("c")


def test_no_slot_while_all_run():
    book = SlotBook(1, MAX_LEN)
    place_one(book, prompt(1), "a")
    assert book.place(prompt(2), "b") is None


def test_equal_prompts_of_a_round_are_twins():
    book = SlotBook(SLOTS, MAX_LEN)
    ids = prompt(*range(10))
    placed = [book.place(ids, c) for c in "abc"]
    assert [(p.wave, p.twin, p.prefix) for p in placed if p] == [(0, False, 0), (0, False, 0), (0, False, 0)]
    # below the price of a wave nobody waits; a long prompt is worth it
    book = SlotBook(SLOTS, 100)
    ids = np.arange(100, dtype=np.int32)
    placed = [book.place(ids, c) for c in "abc"]
    assert [(p.wave, p.twin, p.prefix) for p in placed if p] == [(0, False, 0), (1, True, 100), (1, True, 100)]


def test_a_shared_system_prompt_is_computed_once():
    book = SlotBook(SLOTS, 100)
    system = np.arange(60, dtype=np.int32)
    prompts = [np.concatenate([system, prompt(70 + i, 1, 2)]) for i in range(4)]
    placed = [book.place(ids, str(i)) for i, ids in enumerate(prompts)]
    assert [(p.wave, p.prefix) for p in placed if p] == [(0, 0), (1, 60), (1, 60), (1, 60)]


def test_after_a_flush_nothing_is_shared():
    book = SlotBook(SLOTS, MAX_LEN)
    first = place_one(book, prompt(1, 2, 3), "a")
    book.release(first.slot)
    book.flush()
    assert place_one(book, prompt(1, 2, 3), "a").prefix == 0


def test_a_forgotten_conversations_slot_goes_first():
    book = SlotBook(3, MAX_LEN)
    slots = {c: place_one(book, prompt(i, i), c).slot for i, c in enumerate("abc")}
    book.forget("c")
    for conversation in "abc":
        book.release(slots[conversation])
    assert book.used_tokens == 4
    book.forget("b")
    book.forget("nobody")
    assert book.used_tokens == 2
    assert [place_one(book, prompt(9), c).slot for c in "xyz"] == [slots["b"], slots["c"], slots["a"]]


def test_what_a_forgotten_conversation_left_is_a_prefix_for_others_until_it_is_taken():
    book = SlotBook(2, MAX_LEN)
    book.release(place_one(book, prompt(1, 2, 3), "a").slot)
    book.release(place_one(book, prompt(4), "b").slot)
    book.forget("b")
    book.forget("a")
    assert place_one(book, prompt(1, 2, 4), "c").prefix == 2


def test_tokens_that_new_weights_or_an_eviction_cost_are_told_from_new_ones():
    book = SlotBook(1, MAX_LEN)
    book.release(place_one(book, prompt(1, 2, 3), "a").slot)
    assert place_one(book, prompt(1, 2, 3, 4, 5), "a").recomputed == 0
    (kept,) = book.flush()
    assert (kept.prefix, kept.recomputed) == (0, 5)
    book.close_round()
    book.release(kept.slot)
    assert book.flush() == []
    # four of the five still stand
    again = place_one(book, prompt(1, 2, 3, 4, 6, 7), "a")
    assert (again.prefix, again.recomputed) == (0, 4)
    book.release(again.slot)
    other = place_one(book, prompt(1, 8), "b")
    assert (other.prefix, other.recomputed) == (1, 0)
    book.release(other.slot)
    # taken by b in between
    back = place_one(book, prompt(1, 2, 3, 4, 6, 7, 8), "a")
    assert (back.prefix, back.recomputed) == (1, 5)
    book.release(back.slot)
    book.forget("b")
    assert place_one(book, prompt(9), "b").recomputed == 0
