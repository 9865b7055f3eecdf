"""What a person sees while a run goes on: a table that is redrawn on a terminal, one plain line a step elsewhere.

    phase("warm start loaded")              lines with the time since the start, before the first step
    step({...})                             a row: how good, how fast, how long still; and where the time went
    advice("tools hold it up: ...")         what would make a step shorter, until there is other advice
    evaluation("before", {...})             held-out accuracy
    close(summary)                          the outcome, and how to read a trajectory

Nothing here has a thread or a timer: it draws when it is told something, about a millisecond a step. A run goes on where
nobody sees it any more: Ctrl-C ends the `tee` behind a pipe, too, and a terminal can be closed. The log has every line.
"""

import textwrap
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live as RichLive
from rich.text import Text

from l0fast.run_dir import command

Metrics = Mapping[str, Any]

_UNSEEN = (OSError, SystemExit)
"""What comes of writing to nobody; of a broken pipe rich would end the process, and says no more there."""

_COLUMNS = {
    "step": "step",
    "accuracy": "accuracy",
    "reward": "reward",
    "held-out": "held-out",
    "episodes/s": "episodes\n/s",
    "tokens/s": "tokens\n/s",
    "time [s]": "time\n[s]",
    "time in %": "time\nin %",
    "lag [ms]": "lag\n[ms]",
    "ETA": "ETA",
}
"""Name in a plain line: heading of the table, which fits in 80 columns."""


class Live:
    """Shows one run. A context manager: leaving it gives the terminal back, whatever happened."""

    def __init__(
        self,
        num_steps: int,
        run_dir: Path | None = None,
        *,
        console: Console | None = None,
        rows: int = 12,
        now: Callable[[], float] = time.monotonic,
        log: Callable[[str], None] = lambda line: None,
    ):
        """Args:
        run_dir: named in the last line; None where there is none.
        rows: steps kept in sight on a terminal.
        log: also told every plain line, e.g. `RunDir.log`.
        """
        self._console = console or Console(highlight=False)
        self._num_steps, self._run_dir, self._now, self._log = num_steps, run_dir, now, log
        self._start = now()
        self._rows: deque[list[str]] = deque(maxlen=rows)
        self._held_out = ""
        self._notes: list[str] = []
        self._advice = ""
        self._steps_s: deque[float] = deque(maxlen=10)
        self._live: RichLive | None = None

    def __enter__(self) -> "Live":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def phase(self, text: str) -> None:
        """Say what happens now."""
        self._say(f"{self._now() - self._start:6.1f} s  {text}")

    def step(self, metrics: Metrics) -> None:
        """A step has ended. `metrics["step"]` counts from 1; metrics that are missing show as a dash."""
        self._steps_s.append(metrics.get("time/step_s", 0.0))
        if "eval/sampled" in metrics:
            self._held_out = f"{metrics['eval/sampled']:.3f}"
        left_s = (self._num_steps - metrics["step"]) * sum(self._steps_s) / len(self._steps_s)
        row = _row(metrics, self._num_steps, self._held_out or "-", left_s)
        named = dict(zip(_COLUMNS, row, strict=True))
        shares = shares_of(metrics)
        if shares:
            # a line has room for all of them
            named["time in %"] = ", ".join(shares)
        line = "  ".join(f"{name} {value}" for name, value in named.items() if value != "-")
        self._log(line)
        self._notes = [f"time in %: {', '.join(shares)}"] if shares else []
        if "loop/blocked_by" in metrics:
            self._notes.append(f"the loop was held {metrics['loop/blocked_s']:.2f} s by {metrics['loop/blocked_by']}")
        if not self._console.is_terminal:
            self._print(line)
            return
        self._rows.append(row)
        if self._live is None:
            self._live = RichLive(console=self._console, auto_refresh=False)
        self._draw(self._live)

    def advice(self, text: str) -> None:
        """What would make a step shorter; shown below the table, or said where it is new. Empty: nothing would."""
        if text == self._advice:
            return
        self._advice = text
        if self._live is not None:
            self._draw(self._live)
            if text:
                self._log(text)
        elif text:
            self._say(text)

    def evaluation(self, name: str, metrics: Metrics) -> None:
        """Held-out questions were asked: `name` is "before", "after" or "step 10"."""
        if "eval/sampled" in metrics:
            self._held_out = f"{metrics['eval/sampled']:.3f}"
        parts = [f"{key} {metrics[f'eval/{key}']:.3f}" for key in ("sampled", "greedy") if f"eval/{key}" in metrics]
        self.phase(f"held-out accuracy {name}: {', '.join(parts)}")

    def close(self, summary: Metrics) -> None:
        """The run is over: say what came of it."""
        self._stop()
        # one that is stopped as it starts has none
        has_some = self._run_dir and any((self._run_dir / "trajectories").glob("*.jsonl"))
        self._say(last_line(summary, self._run_dir if has_some else None))

    def _say(self, line: str) -> None:
        self._log(line)
        self._print(line)

    def _print(self, line: str) -> None:
        with suppress(*_UNSEEN):
            # not markup, not cut: a path in it can be copied
            self._console.print(Text(line), soft_wrap=True)
            if not self._console.is_terminal:
                self._console.file.flush()

    def _draw(self, live: RichLive) -> None:
        with suppress(*_UNSEEN):
            live.start()
            live.update(self._table(), refresh=True)

    def _stop(self) -> None:
        if self._live is not None:
            with suppress(*_UNSEEN):
                self._live.stop()
            self._live = None

    def _table(self) -> Text:
        # laid out by hand: rich's own table takes ten times as long, on the event loop
        headings = [heading.rpartition("\n") for heading in _COLUMNS.values()]
        lines = [[above for above, _, _ in headings], [below for _, _, below in headings], *self._rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = [" ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        table = Text("\n" + "\n".join(rows[:2]), "bold", no_wrap=True, overflow="crop")
        for row in rows[2:-1]:
            table.append("\n" + row, "not bold dim")
        table.append("\n" + rows[-1], "not bold")
        for note in (*self._notes, *filter(None, [self._advice])):
            for line in textwrap.wrap(note, self._console.width):
                table.append("\n" + line, "not bold dim")
        return table


def _row(metrics: Metrics, num_steps: int, held_out: str, left_s: float) -> list[str]:
    def show(key: str, form: str) -> str:
        value = metrics.get(key)
        return "-" if value is None else format(value, form)

    return [
        f"{metrics['step']}/{num_steps}",
        show("rollout/correct", ".3f"),
        show("rollout/reward", ".3f"),
        held_out,
        show("rollout/episodes_per_s", ".1f"),
        show("rollout/tokens_per_s", ",.0f"),
        show("time/step_s", ".1f"),
        next(iter(shares_of(metrics)), "-"),
        show("loop/lag_p99_ms", ".1f"),
        duration(left_s),
    ]


def shares_of(metrics: Metrics) -> list[str]:
    """["decode 41", "learn 30", ...]: what the time of a step went into [%], largest first, if it is a percent."""
    shares = {key.removeprefix("share/"): 100 * value for key, value in metrics.items() if key.startswith("share/")}
    return [f"{cause} {share:.0f}" for cause, share in sorted(shares.items(), key=lambda s: -s[1]) if share >= 1]


def duration(seconds: float) -> str:
    """ "7s", "3m05s", "2h10m"."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    return f"{s // 60}m{s % 60:02d}s" if s < 3600 else f"{s // 3600}h{s % 3600 // 60:02d}m"


def last_line(summary: Metrics, run_dir: Path | None) -> str:
    """Held-out accuracy before and after, and how to read a trajectory, in one line."""

    def change(kind: str) -> str | None:
        before, after = (summary.get(f"{kind}_{when}") for when in ("before", "after"))
        return None if before is None or after is None else f"{before:.3f} -> {after:.3f}"

    sampled, greedy = change("eval_accuracy"), change("eval_greedy")
    if sampled is None:
        outcome = "stopped before held-out accuracy was measured a second time"
    else:
        notes = [f"greedy {greedy}"] * (greedy is not None)
        notes += [f"{summary['eval_questions']:,} questions"] * ("eval_questions" in summary)
        outcome = f"held-out accuracy {sampled} sampled" + (f" ({'; '.join(notes)})" if notes else "")
    return outcome + (f"; read one: {command('l0fast.trajectory', str(run_dir))}" if run_dir else "")
