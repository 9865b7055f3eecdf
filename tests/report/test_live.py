"""What a person reads while a run goes on, on a terminal and elsewhere."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from l0fast.report.live import Live, duration, last_line

Row = Callable[[int], dict[str, float]]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(num_steps: int = 4, **kwargs: object) -> tuple[Live, io.StringIO]:
    out = io.StringIO()
    return Live(num_steps, console=Console(file=out, width=40, highlight=False), now=Clock(), **kwargs), out  # pyright: ignore


def test_elsewhere_a_step_is_one_line(row: Row):
    live, out = plain()
    with live:
        live.step(row(1))
        live.step(row(2))
    first, second = out.getvalue().splitlines()
    assert first.startswith("step 1/4  accuracy 0.300  reward 0.350  episodes/s 30.0  tokens/s 2,250  time [s] 4.0")
    assert "  time in % learn 50, decode 20, sandbox 12, sync 6, other 6, prefill 5  " in first
    assert first.endswith("lag [ms] 1.5  ETA 12s")
    assert "held-out 0.450" in second
    assert "held-out" not in first


def test_held_out_accuracy_stays_in_sight(row: Row):
    live, out = plain()
    live.evaluation("before", {"eval/sampled": 0.2, "eval/greedy": 0.5})
    live.step(row(1))
    evaluation, step = out.getvalue().splitlines()
    assert evaluation.endswith("held-out accuracy before: sampled 0.200, greedy 0.500")
    assert "held-out 0.200" in step


def test_a_phase_says_when_and_takes_no_markup():
    clock = Clock()
    out = io.StringIO()
    live = Live(4, console=Console(file=out, highlight=False), now=clock)
    clock.now = 2.5
    live.phase("loading [bold]model[/bold]")
    assert out.getvalue() == "   2.5 s  loading [bold]model[/bold]\n"


def test_what_is_missing_is_left_out():
    live, out = plain()
    live.step({"step": 1})
    assert out.getvalue() == "step 1/4  ETA 0s\n"


def test_the_last_line_says_before_and_after_and_how_to_read_a_trajectory_where_there_is_one(tmp_path: Path):
    summary = {
        "eval_accuracy_before": 0.23,
        "eval_accuracy_after": 0.71,
        "eval_greedy_before": 0.6,
        "eval_greedy_after": 0.85,
        "eval_questions": 600,
    }
    run_dir = tmp_path / "a folder with a rather long name"
    live, out = plain(run_dir=run_dir)
    live.close({})
    assert out.getvalue() == "stopped before held-out accuracy was measured a second time\n"
    (run_dir / "trajectories").mkdir(parents=True)
    (run_dir / "trajectories" / "eval_before.jsonl").touch()
    live, out = plain(run_dir=run_dir)
    live.close(summary)
    line = out.getvalue()
    assert line.count("\n") == 1
    assert "0.230 -> 0.710 sampled (greedy 0.600 -> 0.850; 600 questions)" in line
    assert f"-m l0fast.trajectory '{run_dir}'" in line
    assert "stopped before" in last_line({"eval_accuracy_before": 0.23}, None)


def test_the_log_is_told_the_same_lines(row: Row):
    lines: list[str] = []
    live, out = plain(log=lines.append)
    live.phase("one")
    live.step(row(1))
    live.close({})
    assert lines == out.getvalue().splitlines()


def test_on_a_terminal_a_table_is_redrawn_and_the_terminal_given_back(row: Row):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, height=30, highlight=False)

    def run() -> None:
        with Live(40, console=console, rows=3) as live:
            for step in range(1, 10):
                live.step(row(step))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    text = out.getvalue()
    # every step, and once more when the terminal is given back
    assert text.count("accuracy") == 10
    last = text[text.rindex("accuracy") :]
    assert [step for step in range(1, 10) if f"{step}/40" in last] == [7, 8, 9]
    assert "\x1b[?25h" in last, "the cursor is shown again"


def test_advice_is_said_when_it_is_new_and_stays_below_the_table(row: Row):
    live, out = plain()
    for _ in range(2):
        live.advice("tools hold it up: raise rollout.max_open_groups")
    live.advice("")
    assert out.getvalue() == "tools hold it up: raise rollout.max_open_groups\n"

    lines: list[str] = []
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=30, highlight=False)
    with Live(40, console=console, log=lines.append) as live:
        live.step(row(1) | {"loop/blocked_by": "l0fast/types.py:7 x", "loop/blocked_s": 0.31})  # pyright: ignore
        live.advice("raise it")
        live.step(row(2))
        shown = live._table().plain.splitlines()
    assert shown[-2].startswith("time in %: learn 50, decode 20")
    assert shown[-1] == "raise it"
    assert lines.count("raise it") == 1
    assert not any("was held" in line for line in shown), "that was the step before"


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(5, "Input/output error")])
def test_a_run_goes_on_where_nobody_sees_it_any_more(row: Row, terminal: bool, error: OSError, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    # rich turns the descriptor of a pipe that broke to /dev/null
    monkeypatch.setattr("rich.console.os.dup2", lambda *descriptors: None)
    lines: list[str] = []
    console = Console(file=Gone(), force_terminal=terminal, force_interactive=terminal, highlight=False)
    with Live(4, console=console, log=lines.append) as live:
        live.phase("starting")
        live.step(row(1))
        live.advice("sandboxes hold it up")
        live.close({})
    assert [line.split()[0] for line in lines] == ["0.0", "step", "sandboxes", "stopped"]


def test_what_held_the_loop_is_named(row: Row):
    live = Live(4, console=Console(file=io.StringIO(), force_terminal=True, width=80))
    live.step(row(1) | {"loop/blocked_by": "l0fast/types.py:7 x", "loop/blocked_s": 0.31})  # pyright: ignore
    assert live._table().plain.splitlines()[-1] == "the loop was held 0.31 s by l0fast/types.py:7 x"
    live.close({})


def test_the_table_fits_in_eighty_columns(row: Row):
    live = Live(100_000, console=Console(file=io.StringIO(), force_terminal=True, width=80), run_dir=None)
    for step in (1, 2):
        live.step(row(step) | {"rollout/tokens_per_s": 123456.0, "eval/sampled": 0.5})
    assert max(map(len, live._table().plain.splitlines())) <= 84
    live.close({})


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (7800, "2h10m")]
)
def test_durations_are_short(seconds: float, text: str):
    assert duration(seconds) == text
