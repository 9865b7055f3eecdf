"""A simulated engine against one that counts every token, and what holds whatever is asked of it."""

import itertools
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l0fast.engine.simulated_replica import Replica, Request, Speed

SPEED = Speed(prefill_tokens_per_s=1000, prefill_batch_s=0.02, step_s=0.01, step_request_s=0.002, step_kv_s=1e-5)


def request(conversation="a", prompt=10, response=5, limit=None, matched=0) -> Request:
    return Request(
        conversation=conversation,
        prompt_tokens=prompt,
        response_tokens=response,
        max_new_tokens=limit or response,
        matched_tokens=matched,
    )


def run_out(replica: Replica) -> list[Request]:
    """Let it finish all it has."""
    while replica.next_event_s < math.inf:
        replica.advance(replica.next_event_s)
    return replica.finished


def token_by_token(arrivals, speed: Speed, slots: int) -> dict[int, float]:
    """When each of (arrival time, prompt, response) is done, in an engine with endless memory: one step at a time."""
    waiting, running, now_s, done = list(enumerate(arrivals)), {}, 0.0, {}
    while waiting or running:
        if not running:
            now_s = max(now_s, waiting[0][1][0])
        batch, tokens = [], 0
        while waiting and waiting[0][1][0] <= now_s + 1e-9 and len(running) + len(batch) < slots and tokens < 8192:
            batch.append(waiting.pop(0))
            tokens += batch[-1][1][1]
        if batch:
            now_s += speed.prefill_batch_s + tokens / speed.prefill_tokens_per_s
            running |= {i: [prompt, response, 1] for i, (_, prompt, response) in batch}
        else:
            entries = sum(prompt + sampled - 1 for prompt, _, sampled in running.values())
            now_s += speed.step_s + speed.step_request_s * len(running) + speed.step_kv_s * entries
            for state in running.values():
                state[2] += 1
        for i in [i for i, (_, response, sampled) in running.items() if sampled >= response]:
            done[i] = now_s
            del running[i]
    return done


@given(
    st.lists(
        st.tuples(st.integers(0, 300), st.integers(1, 400), st.integers(1, 60)),  # [10 ms], [tokens], [tokens]
        min_size=1,
        max_size=25,
    ),
    st.integers(1, 8),
)
def test_between_events_it_counts_as_if_it_counted_every_token(jobs, slots):
    # off the grid of step boundaries, where both would round by chance
    arrivals = sorted((t / 100 + i * 1.7e-5, prompt, response) for i, (t, prompt, response) in enumerate(jobs))
    replica = Replica(SPEED, slots=slots, kv_tokens=10**6)
    requests = []
    for i, (at_s, prompt, response) in enumerate(arrivals):
        requests.append(request(str(i), prompt, response))
        replica.submit(requests[-1], at_s)
    run_out(replica)
    expected = token_by_token(arrivals, SPEED, slots)
    assert [r.finished_s for r in requests] == pytest.approx([expected[i] for i in range(len(requests))], abs=1e-6)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, 5), st.integers(1, 60), st.integers(1, 40)),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("update"), st.integers(0, 1)),
        st.tuples(st.just("forget"), st.integers(0, 5)),
        # some steps, or until all is done
        st.tuples(st.just("wait"), st.integers(1, 15) | st.integers(1, 200)),
    ),
    min_size=8,
    max_size=60,
)


@settings(max_examples=200)
@given(ACTIONS, st.integers(1, 4), st.integers(120, 250))
def test_under_pressure_no_entry_is_used_twice_and_everybody_gets_every_token(actions, slots, kv_tokens):
    replica = Replica(SPEED, slots=slots, kv_tokens=kv_tokens)
    now_s, requests, cancelled, version = 0.0, [], set(), 0
    for action, *args in [*actions, ("wait", 10**6)]:
        if action == "submit":
            conversation, prompt, response = args
            requests.append(request(str(conversation), prompt, response, limit=response + 20, matched=prompt // 2))
            replica.submit(requests[-1], now_s)
        elif action == "cancel" and args[0] < len(requests):
            victim = requests[args[0]]
            if victim.finished_s == math.inf:
                replica.cancel(victim, now_s)
                if victim.finished_s == math.inf:
                    cancelled.add(victim)
        elif action == "update":
            version += 1
            replica.update_weights(version, now_s, pause_s=args[0] * 0.5)
        elif action == "forget":
            replica.forget(str(args[0]))
        elif action == "wait":
            now_s += args[0] / 100
            while (event_s := replica.next_event_s) <= now_s:
                replica.advance(event_s)
                load = replica.load()
                assert 0 <= load.used_tokens <= kv_tokens
                assert 0 <= load.running <= slots
            replica.advance(now_s)
    assert set(replica.finished) == set(requests) - cancelled
    load = replica.load()
    assert (load.running, load.waiting, replica.locked_tokens) == (0, 0, 0)
    assert load.recomputed_tokens <= load.prefill_tokens
    for done in replica.finished:
        assert done.decoded_tokens == done.response_tokens
        assert done.version_spans[0].start == 0
        assert done.version_spans[-1].end == done.response_tokens
        assert all(a.end == b.start for a, b in itertools.pairwise(done.version_spans))
        assert all(a.policy_version < b.policy_version for a, b in itertools.pairwise(done.version_spans))
    if not cancelled:
        assert load.decoded_tokens == sum(r.response_tokens for r in requests)


def test_the_longest_unused_prefix_goes_first_and_from_its_end():
    replica = Replica(SPEED, slots=4, kv_tokens=100)
    for at_s, name in ((0.0, "a"), (5.0, "b")):
        replica.submit(request(name, prompt=30, response=11), at_s)
        run_out(replica)
    assert replica.load().used_tokens == 80
    replica.submit(request("c", prompt=30, response=1), 10.0)
    run_out(replica)
    # ten of a's entries gave way to c
    again_b, again_a = request("b", prompt=41, response=1, matched=40), request("a", prompt=41, response=1, matched=40)
    replica.submit(again_b, 20.0)
    run_out(replica)
    assert again_b.cached_tokens == 40
    replica.submit(again_a, 30.0)
    run_out(replica)
    assert again_a.cached_tokens < 30
    assert replica.load().recomputed_tokens == 40 - again_a.cached_tokens


def test_a_conversation_that_asks_twice_at_once_leaves_one_prefix():
    replica = Replica(SPEED, slots=2, kv_tokens=200)
    for prompt, response in ((30, 11), (20, 6)):
        replica.submit(request("a", prompt, response), 0.0)
    run_out(replica)
    # of the one that was done last; its last id was never computed
    assert replica.load().used_tokens == 40


def test_prefixes_go_from_the_least_recently_used_on_and_nothing_of_that_outlives_new_weights():
    def cached(replica: Replica, name: str) -> int:
        again = request(name, prompt=31, response=1, matched=30)
        replica.submit(again, replica.next_event_s if replica.next_event_s < math.inf else 100.0)
        run_out(replica)
        return again.cached_tokens

    def with_a_full_cache() -> Replica:
        replica = Replica(SPEED, slots=1, kv_tokens=100)
        for name in "abc":
            replica.submit(request(name, prompt=30, response=1), 0.0)
        replica.submit(request("big", prompt=45, response=1), 0.0)
        run_out(replica)
        return replica

    # 45 of the others' 90 had to go: all of a, and 5 of b
    assert [cached(with_a_full_cache(), name) for name in "cba"] == [30, 25, 0]
    replica = with_a_full_cache()
    replica.update_weights(1, 50.0)
    assert [cached(replica, name) for name in "aa"] == [0, 30]


def test_to_find_who_is_evicted_next_takes_no_longer_when_many_have_gone():
    replica = Replica(SPEED, slots=1, kv_tokens=60_000)
    for i in range(60_000):
        replica._keep_prefix(str(i), 1)

    def evict_s(prefixes: int) -> float:
        began_s = time.process_time()
        for _ in range(prefixes):
            replica._evict(replica.load().used_tokens - 1)
            replica.forget("nobody")
        return time.process_time() - began_s

    first_s = min(evict_s(500) for _ in range(5))
    for _ in range(50):
        replica._evict(replica.load().used_tokens - 1000)
        replica.forget("nobody")
    assert min(evict_s(500) for _ in range(5)) < 10 * first_s


def test_of_those_who_were_under_way_when_new_weights_came_each_is_done_once_and_in_full():
    replica = Replica(Speed(prefill_tokens_per_s=1000, step_s=1.0), slots=4, kv_tokens=1000)
    requests = [request("short", response=10), request("long", response=20)]
    for one in requests:
        replica.submit(one, 0.0)
    replica.advance(4.5)
    replica.update_weights(1, 4.5)
    assert run_out(replica) == requests
    assert [one.decoded_tokens for one in requests] == [10, 20]


def test_what_does_not_fit_is_retracted_and_goes_on_where_it_was():
    replica = Replica(SPEED, slots=4, kv_tokens=100)
    # the first says it may need 1 and the second 70, so both get in; together they need 110
    old, new = request("old", prompt=20, response=40, limit=41), request("new", prompt=20, response=30, limit=31)
    replica.submit(old, 0.0)
    replica.submit(new, 0.1)
    run_out(replica)
    assert replica.num_retracted == 1
    assert old.finished_s < new.finished_s
    assert new.decoded_tokens == 30
    assert replica.load().decoded_tokens == 70
    assert replica.load().recomputed_tokens > 0


def test_new_weights_keep_what_was_sampled_and_compute_it_again():
    replica = Replica(Speed(prefill_tokens_per_s=1000, step_s=1.0), slots=4, kv_tokens=1000)
    one = request("a", prompt=100, response=10)
    replica.submit(one, 0.0)
    replica.advance(4.5)  # the prompt took 0.1 s and gave an id, four steps gave four
    replica.update_weights(7, 4.5, pause_s=2.0)
    assert replica.load().used_tokens == 0
    run_out(replica)
    assert [(s.policy_version, s.start, s.end) for s in one.version_spans] == [(0, 0, 5), (7, 5, 10)]
    # 105 tokens again and an id with them, then four steps
    assert one.finished_s == pytest.approx(6.5 + 0.105 + 4)
    assert replica.load().recomputed_tokens == 104


def test_a_stall_delays_what_is_under_way_and_what_comes():
    def finish_times(stalls_s: dict[float, float]) -> list[float]:
        replica = Replica(Speed(prefill_tokens_per_s=1000, step_s=1.0), slots=4, kv_tokens=1000)
        events = [(0.0, request("a", 100, 10)), (30.0, request("b", 100, 10)), *stalls_s.items()]
        for at_s, event in sorted(events, key=lambda e: e[0]):
            if isinstance(event, Request):
                replica.submit(event, at_s)
            else:
                replica.stall(event, at_s)
        return [r.finished_s for r in run_out(replica)]

    assert finish_times({}) == pytest.approx([9.1, 39.1])
    assert finish_times({0.05: 1.0, 4.5: 2.0}) == pytest.approx([12.1, 39.1])
    assert finish_times({29.0: 5.0}) == pytest.approx([9.1, 43.1])


def test_of_a_prompt_only_what_was_computed_counts_while_it_stands_still_or_when_it_is_dropped():
    def spent_s(replica: Replica, at_s: float) -> tuple[float, float]:
        replica.advance(at_s)
        return replica.load().prefill_s, replica.slot_s

    replica = Replica(Speed(prefill_tokens_per_s=1000, step_s=1.0), slots=4, kv_tokens=1000)
    replica.submit(request("a", prompt=100, response=1), 0.0)
    assert spent_s(replica, 0.02) == pytest.approx((0.02, 0.02))
    replica.stall(5.0, 0.05)
    for at_s in (0.05, 1.0, 5.0):
        assert spent_s(replica, at_s) == pytest.approx((0.05, 0.05))
    replica.update_weights(1, 5.06)
    assert spent_s(replica, 5.06) == pytest.approx((0.06, 0.06))
    run_out(replica)
    assert spent_s(replica, 6.0) == pytest.approx((0.16, 0.16))


def test_sglangs_admission_keeps_room_for_what_the_running_may_still_sample():
    replica = Replica(SPEED, slots=4, kv_tokens=200)
    first, second = request("a", prompt=20, response=100, limit=150), request("b", prompt=90, response=1, limit=50)
    replica.submit(first, 0.0)
    replica.submit(second, 0.0)
    replica.advance(0.5)
    assert (replica.load().running, replica.load().waiting) == (1, 1)
    run_out(replica)
    assert first.finished_s < second.finished_s


@pytest.mark.parametrize("wrong", [{"step_s": 0.0}, {"prefill_tokens_per_s": -1.0}, {"step_kv_s": -1.0}])
def test_a_speed_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Speed(**wrong)
