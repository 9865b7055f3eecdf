"""Simulated engines side by side: who is called, when, and what a refused or cancelled request leaves behind."""

import sys

import pytest

from l0fast.engine.base import VersionSpan
from l0fast.engine.clock import EventClock
from l0fast.engine.simulated_cluster import Cluster
from l0fast.engine.simulated_replica import Request, Speed

SPEED = Speed(prefill_tokens_per_s=1e9, step_s=1.0)


def request(conversation: str, response: int = 3, prompt: int = 10) -> Request:
    return Request(conversation=conversation, prompt_tokens=prompt, response_tokens=response, max_new_tokens=response)


def cluster(**changes) -> Cluster:
    return Cluster(EventClock(), **{"speed": SPEED, "slots": 1, "kv_tokens": 100, **changes})


def test_who_is_called_may_ask_for_more_at_once():
    simulated, called = cluster(), []

    def again():
        called.append(round(simulated.clock.now_s, 3))
        simulated.submit(request("a"), again)

    simulated.submit(request("a"), again)
    assert not called
    simulated.clock.move_to(9.0)
    assert called == [2.0, 4.0, 6.0, 8.0]


def test_who_comes_later_and_is_done_sooner_is_called_on_time():
    simulated, called = cluster(slots=2), []
    for at_s, name, response in ((0.0, "long", 50), (5.5, "short", 3)):
        simulated.clock.move_to(at_s)
        simulated.submit(
            request(name, response), lambda name=name: called.append((name, round(simulated.clock.now_s, 3)))
        )
    simulated.clock.move_to(60.0)
    # it joins at the end of a step
    assert called == [("short", 8.0), ("long", 49.0)]


def test_what_is_done_is_let_go_of():
    simulated, requests = cluster(slots=4), [request(str(i)) for i in range(4)]
    for i in range(4):
        simulated.submit(requests[i], lambda: None)
    simulated.clock.move_to(10.0)
    mine = request("mine")
    assert [sys.getrefcount(r) for r in requests] == [sys.getrefcount(mine) + 1] * 4


def test_a_request_that_cannot_fit_is_refused_and_takes_no_place():
    simulated, called = cluster(replicas=2), []
    for _ in range(5):
        with pytest.raises(ValueError, match="do not fit in 100 KV entries"):
            simulated.submit(request("too long", prompt=98), lambda: called.append("too long"))
    # one on each engine: were the refused counted, both would go where fewer of them had been
    for name in "ab":
        simulated.submit(request(name), lambda name=name: called.append(name))
    simulated.clock.move_to(2.5)
    assert called == ["a", "b"]


def test_a_cancelled_request_is_never_called_and_its_slot_is_the_next_ones():
    simulated, called = cluster(), []
    first = request("a", response=50)
    simulated.submit(first, lambda: called.append("a"))
    simulated.submit(request("b"), lambda: called.append("b"))
    simulated.clock.move_to(5.5)
    simulated.cancel(first)
    simulated.clock.move_to(100.0)
    assert called == ["b"]
    simulated.cancel(first)
    assert simulated.load().running == simulated.load().waiting == 0


def test_to_cancel_what_is_done_or_cancelled_changes_nothing():
    simulated, called = cluster(replicas=2), []
    done, dropped = request("a"), request("a")
    simulated.submit(done, lambda: None)
    simulated.clock.move_to(10.0)
    simulated.submit(dropped, lambda: None)
    for r in (dropped, dropped, done):
        simulated.cancel(r)
    for response in (30, 3):
        simulated.submit(request("a", response), lambda response=response: called.append(response))
    simulated.clock.move_to(15.0)
    # were fewer counted than there are, both would be on one engine, one after the other
    assert called == [3]


def test_a_cancelled_request_does_not_count_against_its_engine():
    simulated = cluster(replicas=2)
    first, again = request("a"), request("a", prompt=20)
    again.matched_tokens = 11
    simulated.submit(first, lambda: None)
    simulated.clock.move_to(1.5)
    simulated.cancel(first)
    simulated.submit(again, lambda: None)
    simulated.clock.move_to(5.0)
    # were the engine taken for full, it would have gone to the other one, where nothing is known
    assert again.cached_tokens == 11


def test_new_weights_come_to_all_engines_and_what_is_under_way_goes_on():
    simulated, called = cluster(replicas=2), []
    requests = [request(name, response=6) for name in "ab"]
    for r in requests:
        simulated.submit(r, lambda r=r: called.append(r))
    simulated.clock.move_to(2.5)
    simulated.update_weights(7, pause_s=1.0)
    simulated.clock.move_to(20.0)
    assert called == requests
    assert [r.version_spans for r in requests] == [(VersionSpan(0, 0, 3), VersionSpan(7, 3, 6))] * 2
