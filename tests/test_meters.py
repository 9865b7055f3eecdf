"""All that watches a run, together: a step's metrics, the trace it leaves, and the watchdog that may end it."""

import asyncio
import faulthandler
import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

from l0fast.config import RunConfig
from l0fast.engine.base import EngineLoad
from l0fast.errors import EngineError, WorldError
from l0fast.meters import Meters
from l0fast.step_shares import CAUSES, StepShares


@dataclass
class Engine:
    prefill_tokens: int = 0
    used_tokens: int = 50
    parked: int = 0
    broken: bool = False

    async def load(self) -> EngineLoad:
        if self.broken:
            raise EngineError("the worker is gone")
        return EngineLoad(
            running=3,
            waiting=1,
            used_tokens=self.used_tokens,
            max_tokens=200,
            prefill_tokens=self.prefill_tokens,
            decoded_tokens=7,
            in_flight=4,
            parked=self.parked,
        )


def meters(path: Path, said: list[str], **settings: object) -> Meters:
    def log(line: str) -> None:
        # on a busy machine it may be
        if "event loop was blocked" not in line:
            said.append(line)

    return Meters(RunConfig.model_validate(settings), path, log=log, warn=said.append)


def test_a_step_is_told_and_the_trace_shows_it(tmp_path: Path):
    said: list[str] = []

    async def main() -> tuple[dict, dict]:
        measured = meters(tmp_path, said, trace={"on": True})
        engine = Engine(100)
        measured.gauges["open groups"] = lambda: {"groups": 5}
        async with measured.running(), measured.watching(engine.load, {}):
            measured.begin_trace()
            first = await measured.take_step(engine.load)
            engine.prefill_tokens = 130
            episode = measured.observer.episode("q/0")
            with measured.observer.span("learn"), episode.span("generate"):
                await asyncio.sleep(0.01)
            episode.end(status="completed")
            return first, await measured.take_step(engine.load)

    first, second = asyncio.run(main())
    assert sum(second[f"share/{cause}"] for cause in CAUSES) == pytest.approx(1)
    assert second["share/decode"] + second["share/stall"] > 0
    assert (first["engine/prefill_tokens"], second["engine/prefill_tokens"]) == (100, 30)
    assert (first["engine/decoded_tokens"], second["engine/decoded_tokens"]) == (7, 0)
    assert {"loop/lag_p50_ms", "loop/lag_p99_ms", "loop/lag_p999_ms", "loop/lag_max_ms"} <= second.keys()
    events = json.loads((tmp_path / "trace.json").read_bytes())
    assert {"q/0", "generate", "learn"} <= {e["name"] for e in events if e["ph"] == "X"}
    counts = {e["name"]: e["args"] for e in events if e["ph"] == "C"}
    assert counts["engine requests"] == {"running": 3, "waiting": 1}
    assert counts["KV use [%]"] == {"used": 25.0}
    assert counts["open groups"] == {"groups": 5}
    assert counts.keys() >= {"loop lag [ms]"}
    assert not said
    assert {thread.name for thread in threading.enumerate()}.isdisjoint({"trace", "loop watch"})


def test_a_step_is_told_the_most_that_was_in_the_cache_and_in_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("l0fast.meters.LOOK_S", 0.0)

    async def main() -> tuple[dict, dict]:
        measured = meters(tmp_path, [])
        engine = Engine(used_tokens=150, parked=5)
        async with measured.watching(engine.load, {}):
            for _ in range(10):
                await asyncio.sleep(0)
            engine.used_tokens = 60
            first = await measured.take_step(engine.load)
            engine.used_tokens, engine.parked = 20, 7
            return first, await measured.take_step(engine.load)

    first, second = asyncio.run(main())
    assert [step["engine/kv_used"] for step in (first, second)] == [150, 20]
    assert [step["engine/parked"] for step in (first, second)] == [5, 2]
    names = ("engine/kv_tokens", "engine/running", "engine/waiting", "engine/in_flight")
    assert [second[name] for name in names] == [200, 3, 1, 4]


def test_an_engine_that_does_not_tell_is_told_of(tmp_path: Path):
    said: list[str] = []

    async def main() -> None:
        measured = meters(tmp_path, said)
        engine = Engine(broken=True)
        with measured.observer.episode("e").span("generate"):
            await asyncio.sleep(0)
        taken = await measured.take_step(engine.load)
        assert taken["share/decode"] > 0
        assert taken["share/prefill"] == 0
        assert "engine/prefill_tokens" not in taken

    asyncio.run(main())
    assert said == [
        "the engine did not tell what it did in this step (the worker is gone): its time is all under decode"
    ]


def test_a_run_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("l0fast.watchdog.LOOK_S", 0.0)
    said: list[str] = []
    timers: list[str] = []
    for name in ("dump_traceback_later", "cancel_dump_traceback_later"):
        real = getattr(faulthandler, name)
        monkeypatch.setattr(
            faulthandler, name, lambda *args, name=name, real=real, **kw: (timers.append(name), real(*args, **kw))
        )

    async def main() -> None:
        measured = meters(tmp_path, said, watchdog={"quiet_s": 0.01})
        async with measured.running(), measured.watching(Engine().load, {"learner": lambda: "rank 0: layer 3"}):
            with measured.observer.span("learn"):
                await asyncio.get_running_loop().create_future()

    with pytest.raises(ExceptionGroup) as error:
        asyncio.run(main())
    found = error.value.subgroup(WorldError)
    assert found is not None
    assert "the learner has not finished a step for 0 s (its state: rank 0: layer 3)" in str(_only(found))
    assert any("running=3" in line for line in said), "the engine's state is written down, too"
    assert timers[-1] == "cancel_dump_traceback_later", "this process is to go on"


def test_what_the_rooms_take_to_start_is_not_held_against_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = [0]
    monkeypatch.setattr("l0fast.meters.StepShares", lambda: StepShares(lambda: now[0]))

    async def main() -> None:
        measured = meters(tmp_path, [], watchdog={"quiet_s": 600})
        async with measured.running():
            now[0] = 3_600 * 10**9
            async with measured.watching(Engine().load, {}):
                # it looks at once
                await asyncio.sleep(0.05)

    asyncio.run(main())


def _only(group: BaseExceptionGroup) -> BaseException:
    (error,) = group.exceptions
    return _only(error) if isinstance(error, BaseExceptionGroup) else error


def test_a_profile_that_was_never_made_is_told_of(tmp_path: Path):
    said: list[str] = []

    async def main() -> None:
        measured = meters(tmp_path, said, trace={"on": True, "torch_step": 9})
        async with measured.running():
            measured.begin_trace()

    # of the run that this one goes on with
    (tmp_path / "torch_rank_0.json").write_text('{"traceEvents": [{"ph": "X", "name": "old", "pid": 1, "ts": 5.0}]}')
    os.utime(tmp_path / "torch_rank_0.json", (0, 0))
    asyncio.run(main())
    assert said == ["no profile: the learner took no step 9"]
    assert b"old" not in (tmp_path / "trace.json").read_bytes()


def test_the_trace_of_a_run_that_can_not_go_on_stays_as_it_is(tmp_path: Path):
    (tmp_path / "trace.json").write_text("hours of it")

    async def main() -> None:
        async with meters(tmp_path, [], trace={"on": True, "torch_step": 9}).running():
            raise EngineError("the engine did not start")

    with pytest.raises(BaseExceptionGroup):
        asyncio.run(main())
    assert (tmp_path / "trace.json").read_text() == "hours of it"
