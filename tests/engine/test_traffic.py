"""Agents that are figures: the same episodes at the same times as coroutines have them, and as arithmetic says."""

import gc

import pytest

from bench.simulated_speed import Coroutines
from l0fast.engine.base import EngineLoad
from l0fast.engine.clock import EventClock
from l0fast.engine.distributions import lognormal, recorded, uniform
from l0fast.engine.gate import Gate
from l0fast.engine.simulated_cluster import Cluster
from l0fast.engine.simulated_replica import Speed
from l0fast.engine.traffic import Agents, Traffic
from l0fast.rollout.admission import Admission

SPEED = Speed(prefill_tokens_per_s=5000, prefill_batch_s=0.01, step_s=0.01, step_request_s=0.0003, step_kv_s=1e-7)
TRAFFIC = Traffic(
    turns=uniform(1, 6),
    prompt_tokens=uniform(50, 120),
    response_tokens=lognormal(40, 0.7),
    max_new_tokens=150,
    output_tokens=lognormal(20, 0.8),
    tool_s=lognormal(0.8, 1.0),
)


def figures(agents: int, until_s: float, *, admission: Admission | None, **engines) -> tuple[int, EngineLoad]:
    """Turns ended by then, and what the engines say."""
    clock = EventClock()
    cluster = Cluster(clock, speed=SPEED, forgets=False, **engines)
    players = Agents(TRAFFIC, cluster, gate=None if admission is None else Gate(admission, clock))
    players.start(agents)
    clock.move_to(until_s)
    return players.turns, cluster.load()


def coroutines(agents: int, until_s: float, *, admission: Admission | None, **engines) -> tuple[int, EngineLoad]:
    players = Coroutines(TRAFFIC, speed=SPEED, admission=admission, **engines)
    _, load = players.play(agents, until_s)
    return players.turns, load


@pytest.mark.parametrize("gate", [False, True], ids=["everybody", "gate"])
@pytest.mark.parametrize(
    "engines",
    [
        {"slots": 64, "kv_tokens": 100_000},
        {"slots": 64, "kv_tokens": 3_000},
        {"slots": 4, "kv_tokens": 100_000, "replicas": 3},
        {"slots": 8, "kv_tokens": 1_500, "replicas": 2},
    ],
    ids=["room for all", "evictions", "few slots", "both"],
)
def test_agents_that_are_figures_do_what_coroutines_do_at_the_same_times(engines, gate):
    def admission():
        return Admission(new_tokens=40) if gate else None

    for until_s in (0.5, 3.0, 20.0, 70.0, 120.0):
        turns, load = figures(24, until_s, admission=admission(), **engines)
        assert (turns, load) == coroutines(24, until_s, admission=admission(), **engines)
    assert turns > 300
    # an episode that comes back to the engine of another one has to be computed again there
    assert (load.recomputed_tokens > 0) == (engines["kv_tokens"] < 100_000 or "replicas" in engines)


def test_an_episode_takes_what_its_recorded_figures_add_up_to():
    traffic = Traffic(
        turns=recorded([2]),
        prompt_tokens=recorded([100]),
        response_tokens=recorded([9]),
        max_new_tokens=64,
        output_tokens=recorded([5]),
        tool_s=recorded([1.0]),
    )
    clock = EventClock()
    agents = Agents(
        traffic,
        Cluster(clock, speed=Speed(prefill_tokens_per_s=1000, step_s=1.0), slots=1, kv_tokens=1000),
    )
    agents.start(1)
    seen = []
    # 0.1 s for the first prompt and the first id, 9 steps, the tool; then 6 ids that are new: the last one sampled, and the output
    for at_s in (9.09, 9.11, 19.105, 19.107, 20.105, 20.107):
        clock.move_to(at_s)
        seen.append((agents.turns, agents.episodes))
    assert seen == [(0, 0), (1, 0), (1, 0), (2, 0), (2, 0), (2, 1)]


def test_what_is_asked_for_does_not_hang_on_who_is_faster():
    def asked(replicas: int, seed: int = 0) -> dict[str, list[tuple[int, int]]]:
        clock, asked = EventClock(), {}
        cluster = Cluster(clock, speed=SPEED, slots=8, kv_tokens=10_000, replicas=replicas)
        submit = cluster.submit

        def listen(request, done):
            asked.setdefault(request.conversation, []).append((request.prompt_tokens, request.response_tokens))
            submit(request, done)

        cluster.submit = listen
        agents = Agents(TRAFFIC, cluster, seed=seed)
        agents.start(16)
        clock.move_to(100.0)
        return asked

    one, four = asked(1), asked(4)
    assert len(four) > len(one) > 50
    for name, turns in one.items():
        # the last ones are under way
        both = min(len(turns), len(four[name]))
        assert turns[:both] == four[name][:both]
    assert asked(1, seed=1)["0"] != one["0"]
    assert len({turns[0] for turns in one.values()}) > 0.9 * len(one)


def test_episodes_leave_no_cycles_so_that_their_simulation_needs_no_collector():
    clock = EventClock()
    agents = Agents(
        TRAFFIC,
        Cluster(clock, speed=SPEED, slots=8, kv_tokens=3_000, replicas=2, forgets=False),
        gate=Gate(Admission(new_tokens=100), clock),
    )
    gc.collect()
    gc.disable()
    try:
        agents.start(16)
        clock.move_to(100.0)
        assert agents.episodes > 50
        assert gc.collect() == 0
    finally:
        gc.enable()
