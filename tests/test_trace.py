"""A trace loads, in whatever state the run left it; blocks of a row are nested or apart; rows are few, and used again."""

import json
import os
import threading
import time
import tracemalloc
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l0fast import trace as trace_module
from l0fast.observer import Both, NullObserver
from l0fast.trace import Trace, event_lines, merge_torch, write_trace

Event = dict


class Time:
    now = 5_000_000

    def __call__(self) -> int:
        self.now += 700  # less than the microsecond that a trace can tell
        return self.now


def written(trace: Trace, path: Path) -> list[Event]:
    with write_trace(trace, path):
        pass
    return json.loads(path.read_bytes())


def rows_of(events: list[Event], process: str) -> dict[int, list[Event]]:
    (pid,) = (e["pid"] for e in events if e["name"] == "process_name" and e["args"]["name"] == process)
    rows = defaultdict(list)
    for e in events:
        if e["ph"] == "X" and e["pid"] == pid:
            rows[e["tid"]].append(e)
    return rows


def assert_nested(row: list[Event]) -> None:
    """No two blocks overlap unless one holds the other."""
    open_ends: list[int] = []
    for e in sorted(row, key=lambda e: (e["ts"], -e["dur"])):
        while open_ends and open_ends[-1] <= e["ts"]:
            open_ends.pop()
        assert not open_ends or e["ts"] + e["dur"] <= open_ends[-1], e
        open_ends.append(e["ts"] + e["dur"])


def test_an_agents_row_shows_its_episode_and_what_it_waited_for(tmp_path: Path):
    now = Time()
    trace = Trace(4, now=now)
    with trace.span("learn"):
        episode = trace.episode("q1/0")
        with episode.span("generate"):
            now.now += 3_000_000
        with episode.span("lease"):
            pass
        with episode.span("execute"), episode.span("tool"):
            now.now += 1_000_000
        episode.end(status="completed", turns=1)
    trace.count("engine requests", {"running": 3, "waiting": 1})
    events = written(trace, tmp_path / "trace.json")
    (row,) = rows_of(events, "agents").values()
    assert {e["name"] for e in row} == {"q1/0", "generate", "lease", "execute", "tool"}
    by_name = {e["name"]: e for e in row}
    assert by_name["q1/0"]["args"] == {"status": "completed", "turns": 1}
    assert by_name["generate"]["dur"] == pytest.approx(3000, abs=2)
    assert_nested(row)
    (step,) = rows_of(events, "step").values()
    assert [e["name"] for e in step] == ["learn"]
    (count,) = (e for e in events if e["ph"] == "C")
    assert count["args"] == {"running": 3, "waiting": 1}


def test_what_a_killed_run_leaves_is_a_trace(tmp_path: Path):
    path = tmp_path / "trace.json"
    trace = Trace(4)
    with write_trace(trace, path):
        trace.episode("q1/0").end()
        deadline = time.monotonic() + 10
        while b"q1/0" not in path.read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        left = path.read_bytes()
    assert left.startswith(b"[\n")
    assert not left.rstrip().endswith(b"]")
    # what Chrome and Perfetto do with an array that was not closed
    assert any(e["name"] == "q1/0" for e in json.loads(left + b"]"))
    killed = tmp_path / "killed.json"
    killed.write_bytes(left + b',\n{"ph":"X","pi')
    with killed.open("rb") as file:
        assert [json.loads(line) for line in event_lines(file)] == json.loads(left + b"]")


def test_of_many_agents_some_have_rows_and_rows_are_used_again(tmp_path: Path):
    trace = Trace(max_agents=40, rows=10)
    episodes = [trace.episode(f"a{i}") for i in range(80)]
    for episode in episodes:
        episode.end()
    for i in range(40):
        trace.episode(f"b{i}").end()
    rows = rows_of(written(trace, tmp_path / "trace.json"), "agents")
    assert len(rows) == 10
    names = [e["name"] for row in rows.values() for e in row]
    # one in four, as long as there are rows: of the first 80 no more than 10
    assert sorted(n for n in names if n[0] == "a") == sorted(f"a{i}" for i in range(0, 40, 4))
    assert sorted(n for n in names if n[0] == "b") == sorted(f"b{i}" for i in range(0, 40, 4))


Steps = st.lists(st.sampled_from(["generate", "execute", "tool", "tool end", "leave", "end"]), max_size=60)


@given(Steps)
def test_blocks_of_a_row_are_nested_also_where_tool_calls_overlap_or_outlive_their_cell(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str]
):
    trace = Trace(1, rows=1, now=Time())
    episode, block, tools = None, None, []
    for step in [*steps, "leave", "end"]:
        if episode is None:
            episode = trace.episode("e")
        if step in ("generate", "execute") and block is None:
            block = episode.span(step)
            block.__enter__()
        elif step == "tool":
            tools.append(episode.span("tool"))
            tools[-1].__enter__()
        elif step == "tool end" and tools:
            tools.pop(0).__exit__(None, None, None)
        elif step == "leave" and block is not None:
            block.__exit__(None, None, None)
            block = None
        elif step == "end" and block is None:
            for tool in tools:
                tool.__exit__(None, None, None)
            episode.end()
            episode, tools = None, []
    events = written(trace, tmp_path_factory.mktemp("t") / "trace.json")
    for row in rows_of(events, "agents").values():
        assert_nested(row)
        cells = [e for e in row if e["name"] == "execute"]
        for tool in (e for e in row if e["name"] == "tool"):
            assert any(c["ts"] <= tool["ts"] and tool["ts"] + tool["dur"] <= c["ts"] + c["dur"] for c in cells)


def test_a_call_that_outlives_its_cell_is_no_part_of_the_next_turn(tmp_path: Path):
    now = Time()
    trace = Trace(1, now=now)
    episode = trace.episode("e")
    late, later = episode.span("tool"), episode.span("tool")
    with episode.span("execute"):
        late.__enter__()
        now.now += 1_000_000
    with episode.span("generate"):
        now.now += 1_000_000
        later.__enter__()
        late.__exit__(None, None, None)
        now.now += 1_000_000
    later.__exit__(None, None, None)
    episode.end()
    (row,) = rows_of(written(trace, tmp_path / "trace.json"), "agents").values()
    assert_nested(row)
    (tool,) = (e for e in row if e["name"] == "tool")
    assert tool["dur"] == pytest.approx(1000, abs=3)


@pytest.mark.parametrize("num_episodes", [0, 3])
def test_a_disk_that_fails_ends_the_trace_and_not_the_run(tmp_path: Path, num_episodes: int):
    lines: list[str] = []
    trace, path = Trace(1), tmp_path / "trace.json"
    os.mkfifo(path)
    disk = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with write_trace(trace, path, lines.append):
        os.close(disk)
        for i in range(num_episodes):
            trace.episode(str(i)).end()
    assert lines == ["the trace can't be written any further (Broken pipe); the run goes on without it"]
    assert not any(thread.name == "trace" for thread in threading.enumerate())


def test_a_disk_that_is_full_from_the_start_is_told():
    with pytest.raises(OSError, match="No space"), write_trace(Trace(1), Path("/dev/full")):
        pass


def test_a_trace_ends_where_nothing_could_show_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trace_module, "MAX_BYTES", 2000)
    lines: list[str] = []
    trace = Trace(1)
    for i in range(100):
        trace.episode(f"e{i}").end()
    with write_trace(trace, tmp_path / "trace.json", lines.append):
        pass
    assert (tmp_path / "trace.json").stat().st_size < 2200
    assert len(json.loads((tmp_path / "trace.json").read_bytes())) > 10
    assert len(lines) == 1


def test_both_are_told_and_nobody_may_listen(tmp_path: Path):
    told = [Trace(1, now=Time()), Trace(1, now=Time())]
    for observer in (Both(*told), Both(Both(NullObserver(), NullObserver()), NullObserver())):
        episode = observer.episode("e")
        with observer.span("learn"), episode.span("execute"), episode.span("tool"):
            pass
        episode.end(status="completed")
    names = [[e["name"] for e in written(t, tmp_path / "t.json") if e["ph"] == "X"] for t in told]
    assert names[0] == names[1]
    assert sorted(names[0]) == ["e", "execute", "learn", "tool"]


def test_a_ranks_profile_is_put_where_it_was_in_time(tmp_path: Path):
    trace, path = Trace(1), tmp_path / "trace.json"
    with trace.span("learn"):
        began_unix = time.time_ns()
    events = written(trace, path)
    (learn,) = (e for e in events if e["name"] == "learn")
    profile = tmp_path / "rank.json"
    profile.write_text(
        json.dumps(
            {
                "baseTimeNanoseconds": began_unix - 50_000_000,
                "traceEvents": [
                    {"ph": "M", "name": "process_name", "pid": 77, "tid": 0, "args": {"name": "python"}},
                    {"ph": "X", "name": "aten::mm", "pid": 77, "tid": 1, "ts": 50000.0, "dur": 3.0},
                    {"ph": "X", "name": "kernel", "pid": 0, "tid": 7, "ts": 50010.0, "dur": 3.0},
                ],
            }
        )
    )
    merge_torch(path, [profile, profile])
    merged = json.loads(path.read_bytes())
    assert merged[: len(events)] == events
    products = [e for e in merged if e["name"] == "aten::mm"]
    assert all(abs(e["ts"] - learn["ts"]) < 2000 for e in products)
    assert len({e["pid"] for e in merged if e["name"] in ("aten::mm", "kernel")}) == 4
    assert "rank 1: python" in {e["args"]["name"] for e in merged if e["name"] == "process_name"}


def test_a_profile_is_merged_into_a_trace_larger_than_memory_has_room_for(tmp_path: Path):
    trace, path = Trace(1), tmp_path / "trace.json"
    for i in range(5000):
        trace.episode(f"e{i}").end(status="completed", turns=3)
    events = written(trace, path)
    profile = tmp_path / "rank.json"
    profile.write_text('{"traceEvents": []}')
    tracemalloc.start()
    try:
        merge_torch(path, [profile])
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert json.loads(path.read_bytes()) == events
    assert peak_bytes < path.stat().st_size / 2, "all events as objects took some fifty times that"
