"""Where a turn goes: home, unless home is down or overloaded; else to the engine with the least to do."""

from hypothesis import given
from hypothesis import strategies as st

from l0fast.engine.placement import Placement


def three(slots: int = 4) -> Placement:
    placement = Placement(3, slots)
    for engine in range(3):
        placement.up(engine)
    return placement


def test_an_episode_stays_where_it_was():
    placement = three()
    homes = [placement.place(f"e{i}") for i in range(6)]
    for i in (5, 0, 3, 1):
        assert placement.place(f"e{i}") == homes[i]


def test_new_episodes_are_spread_evenly():
    placement = three()
    assert sorted(placement.place(f"e{i}") for i in range(6)) == [0, 0, 1, 1, 2, 2]


def test_an_episode_that_is_over_counts_no_more():
    placement = three()
    for i in range(3):
        placement.place(f"e{i}")
    gone = placement.place("e1")
    placement.forget("e1")
    placement.forget("e1")
    placement.forget("never seen")
    assert placement.place("new") == gone


def test_it_leaves_an_engine_without_a_free_slot_for_one_with_many():
    placement = three(slots=4)
    home = placement.place("e")
    for _ in range(4):
        placement.place("e")
    assert placement.requests[home] == 4
    moved = placement.homes["e"]
    assert moved != home
    # and stays there
    assert placement.place("e") == moved


def test_it_leaves_for_the_free_slots_and_not_for_who_has_fewer_episodes():
    placement = three(slots=4)
    homes = [placement.place(f"e{i}") for i in range(15)]
    placement.forget("e1")  # one episode fewer on engine 1
    for i, home in enumerate(homes):
        if home == 2 or i == 1:
            placement.done(home)
    # five requests on 0, four on 1, none on 2
    assert placement.requests == (5, 4, 0)
    assert placement.place("e0") == 2


def test_it_waits_at_home_where_the_others_are_nearly_full_too():
    placement = Placement(2, 4)
    placement.up(0)
    placement.up(1)
    a, b = placement.place("a"), placement.place("b")
    for _ in range(3):
        assert (placement.place("a"), placement.place("b")) == (a, b)
    # both full: to go elsewhere would be to wait there
    assert (placement.place("b"), placement.place("a")) == (b, a)


def test_a_dead_engine_gets_nothing_until_it_is_back():
    placement = three()
    homes = {f"e{i}": placement.place(f"e{i}") for i in range(6)}
    placement.down(1)
    for name, home in homes.items():
        assert (placement.place(name) == home) == (home != 1)
    placement.up(1)
    assert placement.place("new") == 1


def test_no_engine_no_place():
    placement = three()
    for engine in range(3):
        placement.down(engine)
    assert placement.place("e") is None
    assert placement.requests == (0, 0, 0)


STEP = st.one_of(
    st.tuples(st.just("place"), st.integers(0, 8)),
    st.tuples(st.just("done"), st.integers(0, 100)),
    st.tuples(st.just("forget"), st.integers(0, 8)),
    st.tuples(st.just("up"), st.integers(0, 2)),
    st.tuples(st.just("down"), st.integers(0, 2)),
)


@given(st.lists(STEP, max_size=60))
def test_requests_and_episodes_are_never_miscounted(steps):
    placement, up, open_requests, episodes = Placement(3, 2), set(), [], set()
    for step, n in steps:
        if step == "up":
            placement.up(n)
            up.add(n)
        elif step == "down":
            placement.down(n)
            up.discard(n)
        elif step == "forget":
            placement.forget(f"e{n}")
            episodes.discard(n)
        elif step == "done" and open_requests:
            placement.done(open_requests.pop(n % len(open_requests)))
        elif step == "place":
            before = placement.homes.get(f"e{n}")
            engine = placement.place(f"e{n}")
            assert (engine is None) == (not up)
            if engine is not None:
                assert engine in up
                # it moves for a reason only
                if before is not None and before in up and engine != before:
                    assert open_requests.count(before) >= 2
                open_requests.append(engine)
                episodes.add(n)
        assert placement.requests == tuple(open_requests.count(engine) for engine in range(3))
        assert set(placement.homes) == {f"e{n}" for n in episodes}
        assert placement._episodes == [list(placement.homes.values()).count(engine) for engine in range(3)]
