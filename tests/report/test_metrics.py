"""Percentiles, and memory of the process tree."""

import asyncio
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l0fast.metrics import Histogram, ProcessTreeMemory


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
    # a name is cut at 15 bytes, wherever that is
    stat = tmp_path / "14" / "stat"
    stat.write_bytes(stat.read_bytes().replace(b"(", b"(fourteen bytes\xc3"))
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
