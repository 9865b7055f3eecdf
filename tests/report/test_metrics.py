"""Loop lag, memory of the process tree, and the step clock, without waiting for real time where it can be avoided."""

import asyncio
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l0fast.metrics import Histogram, LoopLag, ProcessTreeMemory, StepClock


@settings(deadline=None)
@given(st.lists(st.floats(0.02, 9e5), min_size=1), st.floats(0.1, 100))
def test_a_histogram_is_right_to_two_percent(values: list[float], q: float):
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    exact = sorted(values)[max(1, math.ceil(q / 100 * len(values))) - 1]
    assert exact * 0.9999 <= histogram.percentile(q) <= exact * 1.0201
    assert histogram.max == max(values)


def test_a_histogram_takes_any_size_of_value():
    histogram = Histogram()
    assert (histogram.percentile(50), histogram.max) == (0.0, 0.0)
    for value in (0.0, 1e12):
        histogram.add(value)
    assert histogram.percentile(50) <= 0.01
    assert histogram.percentile(100) == histogram.max == 1e12


def test_loop_lag_sees_a_blocked_loop():
    async def main() -> LoopLag:
        lag = LoopLag()
        watch = asyncio.create_task(lag.run())
        await asyncio.sleep(0)
        time.sleep(0.06)  # noqa: ASYNC251 - this is the stall
        while not lag.whole_run.count:  # noqa: ASYNC110
            await asyncio.sleep(0)
        watch.cancel()
        return lag

    assert asyncio.run(main()).take_run()["loop/lag_max_ms"] >= 50


def test_a_step_takes_its_lag_and_the_run_keeps_it():
    lag = LoopLag()
    for late_ms in (1.0, 1.0, 8.0):
        lag.record(late_ms)
    assert lag.take_step()["loop/lag_max_ms"] == 8.0
    lag.record(2.0)
    assert lag.take_step() == {"loop/lag_p50_ms": 2.0, "loop/lag_p99_ms": 2.0, "loop/lag_max_ms": 2.0}
    assert lag.take_run()["loop/lag_max_ms"] == 8.0
    assert lag.take_run()["loop/lag_p50_ms"] == pytest.approx(1.0, rel=0.02)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_memory_of_children_and_grandchildren_is_counted():
    memory = ProcessTreeMemory()
    alone_mb = memory.sample()
    hold = "b = bytearray(40_000_000); b[::4096] = b'x' * len(b[::4096])\nprint('ready', flush=True); input()"
    spawn = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {hold!r}])"
    with subprocess.Popen([sys.executable, "-c", spawn], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        with_them_mb = memory.sample()
        child.communicate(b"\n")
    assert with_them_mb > alone_mb + 40
    assert memory.peak_mb == with_them_mb
    assert memory.processes >= 3
    assert memory.unreadable == 0
    assert memory.sample() < with_them_mb - 40
    assert memory.peak_mb == with_them_mb


def fake_process(proc: Path, pid: int, parent: int, pss_kib: int | None, name: str = "python") -> None:
    (proc / str(pid)).mkdir()
    (proc / str(pid) / "stat").write_text(f"{pid} ({name}) S {parent} 1 1")
    if pss_kib is not None:
        (proc / str(pid) / "smaps_rollup").write_text(
            f"5-7 ---p [rollup]\nRss: 9999 kB\nPss: {pss_kib:8} kB\nPss_Anon: 1 kB\n"
        )


def test_only_descendants_count_and_the_vanished_are_no_error(tmp_path: Path):
    fake_process(tmp_path, 10, 1, 1000)
    fake_process(tmp_path, 11, 10, 500, name="a) S 1 (b")
    fake_process(tmp_path, 12, 11, 250)
    fake_process(tmp_path, 13, 10, None)
    fake_process(tmp_path, 14, 1, 9999)
    (tmp_path / "meminfo").touch()
    memory = ProcessTreeMemory(root=10, proc=tmp_path)
    assert memory.sample() == pytest.approx(1750 * 1024 / 1e6)
    assert (memory.processes, memory.unreadable) == (4, 0)


def test_what_cannot_be_read_is_counted_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake_process(tmp_path, 10, 1, 1000)
    fake_process(tmp_path, 11, 10, 500)
    read_text = Path.read_text

    def guarded(path: Path, *args: object, **kwargs: object) -> str:
        if path.parts[-2:] == ("11", "smaps_rollup"):
            raise PermissionError(13, "Permission denied")
        return read_text(path)

    monkeypatch.setattr(Path, "read_text", guarded)
    memory = ProcessTreeMemory(root=10, proc=tmp_path)
    assert memory.sample() == pytest.approx(1000 * 1024 / 1e6)
    assert memory.unreadable == 1


def test_sampling_runs_beside_the_loop_and_ends_when_cancelled():
    memory = ProcessTreeMemory()
    assert memory._root == os.getpid()

    async def main() -> None:
        watch = asyncio.create_task(memory.run())
        async with asyncio.timeout(10):
            while not memory.peak_mb:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        assert watch.cancelled()

    asyncio.run(main())


# --- step clock ------------------------------------------------------------------------------------------------------


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_moment_belongs_to_the_first_part_anyone_is_in():
    now = Time()
    clock = StepClock(("learn", "generate", "execute"), now)
    now.now += 1  # nobody
    with clock.part("execute"):
        now.now += 2
        with clock.part("generate"):
            now.now += 4
            with clock.part("generate"):
                now.now += 8
        now.now += 16
    assert clock.take_step() == {
        "time/step_s": 31,
        "time/learn_s": 0,
        "time/generate_s": 12,
        "time/execute_s": 18,
        "time/other_s": 1,
    }


def test_a_part_that_spans_two_steps_is_shared_between_them():
    now = Time()
    clock = StepClock(now=now)
    with clock.part("learn"):
        now.now += 3
        assert clock.take_step()["time/learn_s"] == 3
        now.now += 5
    now.now += 1
    taken = clock.take_step()
    assert (taken["time/learn_s"], taken["time/other_s"], taken["time/step_s"]) == (5, 1, 6)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.integers(0, 50))))
def test_parts_always_add_up_to_the_step(moves: list[tuple[str, bool, int]]):
    now = Time()
    clock = StepClock("abc", now)
    open_parts: dict[str, list] = {name: [] for name in "abc"}
    for name, enter, wait in moves:
        if enter:
            open_parts[name].append(clock.part(name))
            open_parts[name][-1].__enter__()
        elif open_parts[name]:
            open_parts[name].pop().__exit__(None, None, None)
        now.now += wait
    taken = clock.take_step()
    assert taken.pop("time/step_s") == sum(taken.values()) == sum(wait for _, _, wait in moves)


def test_a_part_ends_with_an_error_too():
    now = Time()
    clock = StepClock(("a",), now)

    def fail() -> None:
        with clock.part("a"):
            now.now += 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    now.now += 2
    assert clock.take_step() == {"time/step_s": 3, "time/a_s": 1, "time/other_s": 2}
