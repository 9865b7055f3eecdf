"""Where metrics go besides metrics.jsonl: off the loop, and never the end of a run."""

import importlib.util
import sys
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from l0fast import sinks
from l0fast.config import MetricsConfig, RunConfig
from l0fast.errors import UsageError
from l0fast.sinks import Prometheus, absent_sinks, numbers, open_sinks

ROW = {"step": 3, "rollout/reward": 0.5, "share/decode": 1, "loop/blocked_by": "l0fast/x.py:1 f", "learner/kl": None}


def config(*names: str, **more: object) -> RunConfig:
    return RunConfig.model_validate({"metrics": {"sinks": names, **more}})


def scrape(port: int) -> dict[str, str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return dict(line.split(" ") for line in lines if not line.startswith("#"))


def test_prometheus_is_told_the_newest_step_on_loopback():
    endpoint = Prometheus(MetricsConfig(prometheus_port=0))
    try:
        assert scrape(endpoint.port) == {}
        endpoint.write(ROW)
        endpoint.write({"step": 4, "rollout/reward": 0.75})
        assert scrape(endpoint.port) == {"l0fast_step": "4.0", "l0fast_rollout_reward": "0.75"}
    finally:
        endpoint.close()
    with pytest.raises(OSError, match="refused"):
        scrape(endpoint.port)


def test_a_run_feeds_its_sinks_and_leaves_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[Prometheus] = []

    class Kept(Prometheus):
        def write(self, row: sinks.Row) -> None:
            super().write(row)
            written.set()

        def __init__(self, config: MetricsConfig):
            super().__init__(config)
            made.append(self)

    written = threading.Event()
    monkeypatch.setattr(sinks, "Prometheus", Kept)
    before = set(threading.enumerate())
    said: list[str] = []
    with open_sinks(config("prometheus", prometheus_port=0), tmp_path, said.append) as put:
        assert said == [f"metrics at http://127.0.0.1:{made[0].port}/metrics"]
        put(ROW)
        assert written.wait(10)
        assert scrape(made[0].port) == {
            "l0fast_step": "3.0",
            "l0fast_rollout_reward": "0.5",
            "l0fast_share_decode": "1.0",
        }
    assert set(threading.enumerate()) <= before


def test_a_port_that_is_taken_is_said_before_the_run(tmp_path: Path):
    endpoint = Prometheus(MetricsConfig(prometheus_port=0))
    try:
        with (
            pytest.raises(UsageError, match=f"metrics.prometheus_port = {endpoint.port} can't be listened at"),
            open_sinks(config("prometheus", prometheus_port=endpoint.port), tmp_path, pytest.fail),
        ):
            pass
    finally:
        endpoint.close()


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (said,) = absent_sinks(["prometheus"])
    assert "package prometheus-client is not installed: pip install 'l0fast[prometheus]'" in said


def failing(what: str) -> Callable[..., object]:
    class Failing:
        def __init__(self, *args: object):
            if what == "made":
                raise ConnectionError("nobody there")

        def write(self, row: sinks.Row) -> None:
            if what == "write":
                raise ConnectionError("nobody there")

        def close(self) -> None:
            if what == "close":
                raise ConnectionError("nobody there")

    return Failing


@pytest.mark.parametrize("what", ["made", "write", "close"])
def test_a_sink_that_fails_is_told_once_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str):
    monkeypatch.setattr(sinks, "_Wandb", failing(what))
    warnings: list[str] = []
    with open_sinks(config("wandb"), tmp_path, warnings.append) as put:
        for _ in range(3):
            put(ROW)
    assert warnings == ["metrics go to wandb no more (ConnectionError: nobody there); metrics.jsonl has them all"]


def test_a_sink_that_hangs_does_not_hold_up_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    over = threading.Event()

    class Hanging:
        def __init__(self, *args: object):
            pass

        def write(self, row: sinks.Row) -> None:
            over.wait(30)

        def close(self) -> None: ...

    monkeypatch.setattr(sinks, "_Wandb", Hanging)
    monkeypatch.setattr(sinks, "CLOSE_S", 0.05)
    warnings: list[str] = []
    with open_sinks(config("wandb"), tmp_path, warnings.append) as put:
        put(ROW)
    assert warnings == ["metrics to wandb: not all was sent within 0.05 s of the run's end"]
    over.set()


def test_only_numbers_can_be_drawn():
    assert numbers(ROW | {"x": float("nan")}) == {"rollout/reward": 0.5, "share/decode": 1.0}


def test_tensorboard_can_read_what_is_written(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore[reportMissingImports]
        EventAccumulator,
    )

    with open_sinks(config("tensorboard"), tmp_path, pytest.fail) as put:
        put(ROW)
        put(ROW | {"step": 4, "rollout/reward": 0.75})
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in read.Scalars("rollout/reward")] == [(3, 0.5), (4, 0.75)]


def test_tensorboard_shows_what_a_run_did_that_went_on_from_an_earlier_step(tmp_path: Path):
    pytest.importorskip("tensorboard", reason="the tensorboard extra is not installed")
    from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore[reportMissingImports]
        EventAccumulator,
    )

    for steps, reward in (((1, 2, 3, 4), 0.25), ((3, 4, 5), 0.75)):
        with open_sinks(config("tensorboard"), tmp_path, pytest.fail) as put:
            for step in steps:
                put({"step": step, "rollout/reward": reward})
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    told = [(e.step, e.value) for e in read.Scalars("rollout/reward")]
    assert told == [(1, 0.25), (2, 0.25), (3, 0.75), (4, 0.75), (5, 0.75)]


def test_a_run_that_goes_on_is_the_same_one_to_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[dict[str, Any]] = []
    stand_in = ModuleType("wandb")

    class Run:
        def log(self, row: sinks.Row, step: int) -> None: ...

        def finish(self) -> None: ...

    def init(**settings: Any) -> Run:
        asked.append(settings)
        return Run()

    monkeypatch.setattr(stand_in, "init", init, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    other = tmp_path / "other"
    other.mkdir()
    for folder in (tmp_path, tmp_path, other):
        with open_sinks(config("wandb"), folder, pytest.fail) as put:
            put(ROW)
    first, again, another = (settings["id"] for settings in asked)
    assert first == again != another
    assert {settings["resume"] for settings in asked} == {"allow"}


def test_wandb_takes_them_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with open_sinks(config("wandb"), tmp_path, pytest.fail) as put:
        put(ROW)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))
