"""Admission: nobody is forgotten, nothing is counted twice, and it learns how many episodes fit."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from l0fast.engine.base import EngineLoad
from l0fast.rollout.admission import Admission


def load(max_tokens=1000, **work) -> EngineLoad:
    return EngineLoad(running=0, waiting=0, used_tokens=0, max_tokens=max_tokens, **work)


def one_turn(admission: Admission, name: str, prompt: int, tokens: int, now_s=0.0):
    assert admission.ask(name, prompt, now_s)
    admission.ran(name, tokens, 0, now_s)


@settings(max_examples=60)
@given(
    episodes=st.lists(
        st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=6), min_size=1, max_size=30
    ),
    max_tokens=st.integers(0, 2000),
    seed=st.integers(0, 2**32),
    loads=st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000), st.booleans()), max_size=20),
)
def test_everybody_is_served_in_the_end_whatever_happens(episodes, max_tokens, seed, loads):
    """Episodes of random sizes in random order, some cancelled, some forgotten early, the engine telling odd things."""
    rng = random.Random(seed)
    admission = Admission(max_tokens=max_tokens)
    left = {str(i): list(turns) for i, turns in enumerate(episodes)}
    context = dict.fromkeys(left, 0)
    asking, running, thinking = set(), set(), set(left)
    told = {"prefill_tokens": 0, "recomputed_tokens": 0, "decoded_tokens": 0}
    now_s = 0.0

    def admitted(names):
        for name in names:
            asking.remove(name)
            running.add(name)

    for _ in range(20 * sum(map(len, episodes)) + 100):
        if not left:
            break
        now_s += rng.random()
        choices = [*(("ask", n) for n in sorted(thinking)), *(("finish", n) for n in sorted(running))]
        # somebody can always do something, or admission is stuck
        assert choices, f"{sorted(asking)} wait for nobody"
        what, name = rng.choice(choices)
        if what == "ask":
            thinking.remove(name)
            context[name] += left[name][0][0]
            if admission.ask(name, context[name], now_s):
                running.add(name)
            else:
                asking.add(name)
                admitted(admission.admit(now_s))
        elif rng.random() < 0.1:
            running.remove(name)
            admission.withdraw(name, now_s)
            admission.forget(name)
            del left[name]
        else:
            running.remove(name)
            context[name] += left[name].pop(0)[1]
            admission.ran(name, context[name], rng.randrange(2) * context[name] // 3, now_s)
            if left[name]:
                thinking.add(name)
            else:
                admission.forget(name)
                del left[name]
        if asking and rng.random() < 0.05:
            name = min(asking)
            asking.remove(name)
            admission.withdraw(name, now_s)
            admission.forget(name)
            del left[name]
        if loads and max_tokens and rng.random() < 0.2:
            prefill, decoded, wasteful = loads.pop()
            told["prefill_tokens"] += prefill
            told["decoded_tokens"] += decoded
            told["recomputed_tokens"] += prefill * wasteful
            admission.observe(load(max_tokens, **told))
        admitted(admission.admit(now_s))
        assert 0.5 <= admission.fill <= 1.0
        assert admission.num_waiting == len(asking)
    assert not left
    assert (admission.num_waiting, admission.num_in_flight, admission.tokens_in_flight) == (0, 0, 0)
    assert admission._count.sum() == admission._tokens.sum() == 0


def test_new_episodes_wait_for_room_and_come_in_their_order():
    admission = Admission(max_tokens=1000, new_tokens=100)
    went = [admission.ask(str(i), 200, 0.0) for i in range(6)]
    # each is taken to need 200 now and 300 when its turn is over
    assert went == [True, True, False, False, False, False]
    admission.ran("0", 210, 0, 1.0)
    admission.forget("0")
    assert admission.admit(1.0)[:1] == ["2"]


def test_an_engine_that_is_down_lets_nobody_in():
    admission = Admission(max_tokens=1000, new_tokens=100)
    for n in range(10):
        admission.ask(str(n), 200, 0.0)
    waiting = admission.num_waiting
    assert waiting > 5
    admission.observe(load(0))
    assert admission.admit(1.0) == []
    assert admission.num_waiting == waiting


def test_next_turns_go_before_new_episodes_and_at_once_while_all_fits():
    admission = Admission(max_tokens=1000, new_tokens=100)
    assert admission.ask("a", 200, 0.0)
    assert admission.ask("b", 200, 0.0)
    assert not admission.ask("new", 200, 0.0)
    admission.ran("a", 300, 0, 1.0)
    assert admission.ask("a", 350, 1.0)


def test_an_episode_is_parked_where_the_cache_is_full_and_comes_back_before_new_ones():
    admission = Admission(max_tokens=1000, new_tokens=10)
    for name in "abc":
        one_turn(admission, name, 250, 260)
    assert not admission.ask("new", 250, 1.0)
    # they grew more than anybody could know
    assert admission.ask("a", 440, 2.0)
    assert not admission.ask("b", 500, 2.0)
    assert admission.num_parked == 1
    admission.ran("a", 450, 0, 3.0)
    admission.forget("a")
    assert admission.admit(3.0)[0] == "b"


def test_an_episode_larger_than_the_cache_goes_alone():
    admission = Admission(max_tokens=1000)
    one_turn(admission, "a", 10, 20)
    assert not admission.ask("huge", 5000, 0.0)
    admission.forget("a")
    assert admission.admit(0.0) == ["huge"]


def test_it_learns_from_those_that_ended_how_many_fit():
    def fit(turns: int, growth: int) -> int:
        admission = Admission(max_tokens=100_000)
        for i in range(100):
            for turn in range(turns):
                one_turn(admission, str(i), 100 + turn * growth, 100 + (turn + 1) * growth)
            admission.forget(str(i))
        return sum(admission.ask(f"new {i}", 100, 0.0) for i in range(2000))

    # by the end of its last turn an episode holds 100 + turns * growth
    assert 0.8 * 88_000 / 200 < fit(turns=1, growth=100) <= 88_000 / 200
    assert 0.8 * 88_000 / 1100 < fit(turns=5, growth=200) <= 88_000 / 1000
    assert fit(turns=1, growth=5000) < 20


def test_entries_that_episodes_share_count_once():
    def fit(cached: int) -> int:
        admission = Admission(max_tokens=10_000, new_tokens=10)
        n = 0
        while admission.ask(str(n), 1000, 0.0):
            admission.ran(str(n), 1010, cached if n else 0, 0.0)
            n += 1
        return n

    assert fit(0) < 10
    assert fit(900) > 30


def test_fill_falls_with_work_done_again_and_rises_where_there_is_none():
    admission = Admission(max_tokens=1000)
    work = {"prefill_tokens": 0, "recomputed_tokens": 0, "decoded_tokens": 0, "prefill_s": 0.0, "decode_s": 0.0}

    def tell(again: int):
        for key, more in zip(work, (1000, again, 1000, 1.0, 1.0), strict=True):
            work[key] += more
        admission.observe(load(**work))

    tell(0)
    begun = admission.fill
    for _ in range(40):
        tell(800)
    fallen = admission.fill
    assert fallen < begun
    for i in range(3000):
        one_turn(admission, f"a{i}", 100, 150)
        one_turn(admission, f"b{i}", 100, 150)
        if not admission.ask(f"c{i}", 900, 0.0):
            tell(0)
            admission.withdraw(f"c{i}", 0.0)
        admission.forget(f"c{i}")
        admission.forget(f"a{i}")
        admission.forget(f"b{i}")
    assert admission.fill == 1.0 > fallen


def all_in_flight(**tokens: int) -> Admission:
    """Episodes that turned out longer than anybody had thought."""
    admission = Admission(max_tokens=1000, new_tokens=10)
    for name in tokens:
        assert admission.ask(name, 100, 0.0)
    for name, so_many in tokens.items():
        admission.ran(name, so_many, 0, 0.0)
    return admission


def wasteful_from(admission: Admission, looks: int) -> None:
    """Half of the engine's time goes into what it had."""
    for i in range(looks + 1):
        work = {"prefill_tokens": 1000 * i, "recomputed_tokens": 1000 * i, "decoded_tokens": 1000 * i}
        admission.observe(load(**work, prefill_s=float(i), decode_s=float(i)))


def test_next_turns_wait_sooner_while_the_engine_computes_again_what_it_had():
    def let_in(looks: int) -> list[bool]:
        admission = all_in_flight(a=310, b=310, c=310)
        wasteful_from(admission, looks)
        assert 0.88 < admission.tokens_in_flight / 1000 < 1.1 * 0.88
        return [admission.ask(name, 310, 0.0) for name in "abc"]

    assert let_in(0) == [True, True, True]
    # with one of them parked the others fit
    assert let_in(16) == [False, True, True]


def test_what_was_wasted_while_too_much_was_in_flight_does_not_lower_fill():
    admission = all_in_flight(a=310, b=310, c=310)
    wasteful_from(admission, 16)
    assert admission.fill == 0.88
    admission.forget("a")
    work = {"prefill_tokens": 16_000, "recomputed_tokens": 16_000, "decoded_tokens": 16_000}
    for more in range(1, 20):
        # nothing is computed again any more
        admission.observe(load(**work | {"prefill_tokens": 16_000 + more}, prefill_s=16.0 + more, decode_s=16.0 + more))
    assert admission.fill == 0.88


def test_what_is_computed_again_for_those_that_were_parked_does_not_lower_fill():
    def fill_after(parked: bool) -> float:
        admission = all_in_flight(a=500, b=600)
        if parked:
            assert not admission.ask("a", 500, 0.0)
        admission.forget("b")
        assert admission.admit(0.0) == ["a"] * parked
        admission.observe(load())
        # all of its prompt, again
        for look in range(1, 20):
            again = min(500, 100 * look)
            admission.observe(load(prefill_tokens=again, recomputed_tokens=again, prefill_s=float(look)))
        return admission.fill

    assert fill_after(parked=True) == 0.88 > fill_after(parked=False)


def test_what_new_weights_make_the_engine_compute_again_is_not_held_against_anybody():
    admission = Admission(max_tokens=1000)
    for name in "ab":
        one_turn(admission, name, 100, 200)
    admission.observe(load())
    begun, prefill = admission.fill, 0
    for _ in range(40):
        admission.updated_weights()
        prefill += 400
        admission.observe(load(prefill_tokens=prefill, recomputed_tokens=prefill))
    assert admission.fill == begun


def test_an_episode_forgotten_while_its_turn_is_under_way_is_over_when_the_turn_is():
    admission = Admission(max_tokens=1000, new_tokens=10)
    assert admission.ask("a", 800, 0.0)
    assert not admission.ask("b", 500, 0.0)
    admission.forget("a")
    assert admission.num_in_flight == 1
    admission.ran("a", 850, 0, 1.0)
    assert admission.admit(1.0) == ["b"]
    admission.ran("b", 510, 0, 2.0)
    assert not admission.ask("c", 500, 2.0)
    admission.forget("c")
    admission.withdraw("c", 2.0)
    admission.forget("b")
    assert (admission.num_in_flight, admission.num_waiting, admission.tokens_in_flight) == (0, 0, 0)


def test_one_that_neither_ends_nor_returns_counts_no_longer():
    admission = Admission(max_tokens=1000, new_tokens=10, idle_limit_s=60.0)
    one_turn(admission, "gone", 800, 850)
    assert not admission.ask("new", 500, 1.0)
    assert admission.admit(50.0) == []
    assert admission.admit(70.0) == ["new"]
    # it may come back: as a new one
    assert not admission.ask("gone", 900, 71.0)
