"""Where a step's metrics go besides metrics.jsonl, which is the truth and always there.

    wandb          Weights & Biases; account and mode as its own environment variables say (WANDB_MODE=offline)
    tensorboard    event files in the run's folder: tensorboard --logdir RUNS
    prometheus     http://127.0.0.1:PORT/metrics, gauges with the newest step's values; this machine alone can ask

A run that goes on does so there, too. TensorBoard then forgets the steps that are taken once more; Weights & Biases keeps those
that it was told first.

Each has a thread and a queue: the event loop puts a row there and goes on. A package that is missing is said before the
run starts. A sink that fails later is said once, in the log and on the terminal, and gets no more rows; the run goes on.
"""

import importlib.util
import math
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from l0fast.config import MetricsConfig, RunConfig
from l0fast.errors import UsageError
from l0fast.files import write_whole

Row = Mapping[str, Any]

CLOSE_S = 30.0
"""Time that all sinks together have at the end, to send what is left [s]."""

_PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard", "prometheus": "prometheus_client"}


class Sink(Protocol):
    """One destination; made, used and closed by one thread. Anything it raises ends it."""

    def write(self, row: Row) -> None: ...

    def close(self) -> None: ...


def absent_sinks(names: Sequence[str]) -> list[str]:
    """Those whose package is not installed, each with the way to get it."""
    return [
        f"metrics.sinks names {name!r}, whose package {_PACKAGES[name].replace('_', '-')} is not installed: "
        f"pip install 'l0fast[{name}]'"
        for name in names
        if importlib.util.find_spec(_PACKAGES[name]) is None
    ]


@contextmanager
def open_sinks(config: RunConfig, run_dir: Path, warn: Callable[[str], None]) -> Iterator[Callable[[Row], None]]:
    """What takes a row for all sinks of a run; it returns at once.

    Args:
        warn: told where they are, and in the sink's thread of one that fails.

    Raises UsageError for a port that is taken.
    """
    makers: dict[str, Callable[[], Sink]] = {
        "wandb": lambda: _Wandb(config, run_dir),
        "tensorboard": lambda: _TensorBoard(run_dir),
        "prometheus": lambda: Prometheus(config.metrics),
    }
    feeds: list[_Feed] = []
    try:
        for name in dict.fromkeys(config.metrics.sinks):
            make = makers[name]
            # what can be set right is said now
            ready = make() if name == "prometheus" else None
            if isinstance(ready, Prometheus):
                warn(f"metrics at http://127.0.0.1:{ready.port}/metrics")
            feeds.append(_Feed(name, (lambda sink=ready: sink) if ready is not None else make, warn))

        def put(row: Row) -> None:
            for feed in feeds:
                feed.put(row)

        yield put
    finally:
        deadline = time.monotonic() + CLOSE_S
        for feed in feeds:
            feed.end()
        for feed in feeds:
            feed.join(deadline)


class _Feed:
    """A sink's thread and queue."""

    def __init__(self, name: str, make: Callable[[], Sink], warn: Callable[[str], None]):
        self._name, self._make, self._warn = name, make, warn
        self._rows: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._failed = False
        self._thread = threading.Thread(target=self._run, name=f"metrics to {name}", daemon=True)
        self._thread.start()

    def put(self, row: Row) -> None:
        if not self._failed:
            self._rows.put(row)

    def end(self) -> None:
        self._rows.put(None)

    def join(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"metrics to {self._name}: not all was sent within {CLOSE_S:g} s of the run's end")

    def _run(self) -> None:
        try:
            sink = self._make()
            try:
                while (row := self._rows.get()) is not None:
                    sink.write(row)
            finally:
                sink.close()
        except Exception as e:  # noqa: BLE001 - whatever it is, it is no reason to end a run
            self._failed = True
            self._warn(f"metrics go to {self._name} no more ({type(e).__name__}: {e}); metrics.jsonl has them all")


def numbers(row: Row) -> dict[str, float]:
    """What of a row can be drawn: numbers, without "step"."""
    return {
        key: float(value)
        for key, value in row.items()
        if key != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


class Prometheus:
    """An endpoint on loopback. rollout/episodes_per_s becomes l0fast_rollout_episodes_per_s."""

    def __init__(self, config: MetricsConfig):
        from prometheus_client import CollectorRegistry, start_http_server

        registry = CollectorRegistry()
        registry.register(self)
        self._newest: dict[str, float] = {}
        try:
            self._server, self._thread = start_http_server(config.prometheus_port, "127.0.0.1", registry)
        except OSError as e:
            raise UsageError(
                f"metrics.prometheus_port = {config.prometheus_port} can't be listened at ({e.strerror}): "
                "take another one; 0 takes any that is free"
            ) from e
        self.port: int = self._server.server_port

    def write(self, row: Row) -> None:
        # replaced as a whole: a scrape sees one step
        self._newest = {"step": float(row["step"])} | numbers(row) if "step" in row else numbers(row)

    def collect(self) -> Iterator[Any]:
        """For prometheus_client, at each scrape, in its server's thread."""
        from prometheus_client.core import GaugeMetricFamily

        for key, value in self._newest.items():
            yield GaugeMetricFamily(f"l0fast_{re.sub('[^a-zA-Z0-9_]', '_', key)}", f"{key} of the newest step", value)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _TensorBoard:
    """Scalars by tensorboard's own event writer: torch's would load torch into the driver."""

    def __init__(self, run_dir: Path):
        from tensorboard.compat.proto.event_pb2 import (  # pyright: ignore[reportMissingImports]
            Event,
            SessionLog,
        )
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportMissingImports]
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # pyright: ignore[reportMissingImports]

        self._event, self._summary = Event, Summary
        self._begins: Any = SessionLog(status=SessionLog.START)
        self._writer = EventFileWriter(str(run_dir / "tensorboard"))

    def write(self, row: Row) -> None:
        values = [self._summary.Value(tag=key, simple_value=value) for key, value in numbers(row).items()]
        step, summary = int(row.get("step", 0)), self._summary(value=values)
        if self._begins is not None:
            # what another process has told of this step and later ones counts no more
            self._writer.add_event(self._event(wall_time=time.time(), step=step, session_log=self._begins))
            self._begins = None
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, config: RunConfig, run_dir: Path):
        # it looks for a terminal to talk to; the run's own table is there
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(
            project=config.metrics.wandb_project,
            name=run_dir.name,
            dir=run_dir,
            config=config.model_dump(mode="json"),
            id=os.environ.get("WANDB_RUN_ID") or _wandb_id(run_dir),
            resume="allow",
        )

    def write(self, row: Row) -> None:
        self._run.log(numbers(row), step=int(row.get("step", 0)))

    def close(self) -> None:
        self._run.finish()


def _wandb_id(run_dir: Path) -> str:
    """Of the run there; kept in its folder, for when it goes on."""
    file = run_dir / "wandb_id.txt"
    if not file.exists():
        write_whole(file, secrets.token_hex(8).encode())
    return file.read_text()
