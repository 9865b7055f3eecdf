"""Old objects are set aside, die as ever, and cycles among them are found by a sweep."""

import asyncio
import gc
import weakref

import pytest

from l0fast.garbage import drop, let_go, old_objects_aside


class Node:
    other: "Node | None" = None


def cycle() -> "weakref.ref[Node]":
    a, b = Node(), Node()
    a.other, b.other = b, a
    return weakref.ref(a)


@pytest.fixture(autouse=True)
def leaves_the_collector_as_it_was():
    callbacks, frozen, thresholds = list(gc.callbacks), gc.get_freeze_count(), gc.get_threshold()
    yield
    assert gc.get_threshold() == thresholds
    assert gc.callbacks == callbacks
    assert gc.get_freeze_count() == frozen


def test_what_survives_a_collection_of_the_young_is_set_aside_and_still_freed_with_its_last_reference():
    with old_objects_aside():
        node = Node()
        seen = weakref.ref(node)
        before = gc.get_freeze_count()
        gc.collect(0)
        assert gc.get_freeze_count() > before
        assert not any(o is node for o in gc.get_objects(generation=2))
        del node
        assert seen() is None


def test_young_cycles_are_collected_as_ever():
    with old_objects_aside():
        seen = cycle()
        gc.collect(0)
        assert seen() is None


def test_the_young_stay_few_while_as_many_old_ones_die():
    """The collector's own count is of new objects less freed ones, which hardly rises here."""
    looked_at = []

    def count(phase, info):
        if phase == "start" and info["generation"] == 0:
            looked_at.append(len(gc.get_objects(generation=0)))

    with old_objects_aside():
        alive = [[Node() for _ in range(100)] for _ in range(200)]
        gc.collect(0)
        gc.callbacks.append(count)
        try:
            for i in range(1000):
                alive.append([Node() for _ in range(100)])
                alive[i] = []
        finally:
            gc.callbacks.remove(count)
    assert len(looked_at) >= 500
    assert max(looked_at) < 300


def test_what_is_let_go_is_freed_bit_by_bit_with_others_served_in_between():
    async def main():
        nodes = [Node() for _ in range(5)]
        seen = [weakref.ref(node) for node in nodes]
        alive = []

        async def other():
            while nodes:
                alive.append(sum(ref() is not None for ref in seen))
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as tg:
            tg.create_task(other())
            await let_go(nodes)
        assert alive == [4, 3, 2, 1]
        assert not any(ref() for ref in seen)

    asyncio.run(main())


def test_a_sweep_finds_old_cycles_once_the_process_has_grown():
    rss_bytes = 1 << 20
    with old_objects_aside(lambda: rss_bytes) as old_objects:
        rss_bytes = 1 << 30
        assert old_objects.sweep() == 0, "what a step needs"
        node = Node()
        node.other = node
        seen = weakref.ref(node)
        gc.collect(0)
        del node
        assert seen() is not None, "nobody looks at what was set aside"
        rss_bytes += rss_bytes // 2 + (256 << 20)
        assert old_objects.sweep() == 0
        assert seen() is not None, "it has not grown enough"
        rss_bytes += 1
        assert old_objects.sweep() > 0
        assert seen() is None
        assert old_objects.sweep() == 0, "growth counts from the last sweep"


def test_it_knows_how_large_the_process_is():
    with old_objects_aside() as old_objects:
        assert old_objects.sweep() == 0


def test_what_is_dropped_goes_one_by_one():
    left: list[int] = []

    class Heavy:
        def __del__(self) -> None:
            left.append(len(objects))

    objects = [Heavy() for _ in range(4)]
    drop(objects)
    assert left == [3, 2, 1, 0]
