"""What a run spends its time on: a recipe for a few steps under a profiler, a trace and, on CUDA, torch.profiler; one page.

    python -m bench.profile_run RECIPE [--steps 3] [--out DIR] [flags of l0fast.run]

    DIR/index.html        start here: shares of each step, lag, heaviest functions, pictures, links to all below
    DIR/flame.html        pyinstrument's report of the driver's steps: what the loop's thread did, millisecond by millisecond
    DIR/run/              the run's own folder: metrics.jsonl, trace.json for https://ui.perfetto.dev, plots, log

pyinstrument (https://pyinstrument.readthedocs.io) looks at the driver's stack every millisecond; time in which the loop
waits for the world is told apart from time in which it computes. What other processes do, engine, sandboxes and learner, is
not on that stack: their time is in the shares, and with CUDA the learner's kernels are merged into the trace. A profiled run
is slower, some 10 % here; compare shares, not seconds. Unless a flag says otherwise few questions are evaluated.
"""

import argparse
import asyncio
import html
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

from bench.ending import end_like_ctrl_c
from bench.machine import machine
from bench.node_throughput import measured
from l0fast.cli import Invocation
from l0fast.errors import L0fastError, UsageError
from l0fast.learner.client import num_gpus
from l0fast.report.plots import SHARES
from l0fast.run_dir import read_metrics, read_summary

INTERVAL_S = 0.001
TORCH_STEP = 2
"""Its first steps compile and allocate."""
LOOK_S = 0.1
"""How often is looked whether steps have begun [s]."""
HEAVIEST = 25
"""Functions on the page."""


@dataclass(frozen=True, slots=True)
class Function:
    """Where the driver's thread was."""

    name: str
    place: str
    self_s: float
    """In it, and in nothing of Python that it called [s]."""


def main() -> int:
    end_like_ctrl_c()
    parser = argparse.ArgumentParser(
        prog="python -m bench.profile_run",
        description="A recipe for a few steps, profiled; one page.",
        epilog="All other words are those of python -m l0fast.run.",
    )
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps")
    parser.add_argument("--out", type=Path, help="folder for page, profile and run; by default profiles/RECIPE-TIME")
    options, words = parser.parse_known_args()
    try:
        invocation = _invocation(options, words)
        code, profiler = _profiled(invocation)
        if profiler.last_session is None:
            raise UsageError(f"the run ended with {code} before its first step, so there is nothing to show: see above")
    except L0fastError as e:
        print(f"bench.profile_run: {e}", file=sys.stderr)
        return 2
    out = invocation.run_dir.parent
    (out / "flame.html").write_text(profiler.output_html())
    functions, busy_s, idle_s = heaviest(profiler)
    command = " ".join(["python -m bench.profile_run", *sys.argv[1:]])
    page = render(out / "run", functions, busy_s=busy_s, idle_s=idle_s, command=command)
    (out / "index.html").write_text(page)
    print(f"\n{out / 'index.html'}: open it in a browser")
    print(json.dumps({"page": str(out / "index.html"), "driver_busy_s": busy_s, "driver_idle_s": idle_s}))
    return code


def _invocation(options: argparse.Namespace, words: Sequence[str]) -> Invocation:
    torch = ["--trace.torch-step", str(min(TORCH_STEP, options.steps))] if num_gpus() else []
    # whatever the words say of these counts
    words = [*torch, "--trace", "--num-steps", str(options.steps), *words]
    out = options.out or Path("profiles") / f"{measured(words).recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    if (run := out / "run").exists():
        raise UsageError(f"{run} is there, and a run never overwrites: name another folder with --out, or move it")
    return measured([*words, "--run-dir", str(run)])


def _profiled(invocation: Invocation) -> tuple[int, Any]:
    """The run's exit code, and pyinstrument's session."""
    try:
        from pyinstrument import Profiler  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise UsageError(f"the profiler can't be imported ({e}): pip install -e '.[bench]'") from e

    from l0fast.training import run

    # "disabled" looks at whatever the thread does: all tasks, and not only the one that began it
    profiler = Profiler(interval=INTERVAL_S, async_mode="disabled")

    async def work() -> int:
        running = asyncio.create_task(run(invocation), name="profiled run")
        steps = _steps()
        while not running.done() and steps is None:
            await asyncio.wait([running], timeout=LOOK_S)
            steps = _steps()
        if steps is not None:
            # making worlds, loading models and asking what comes before say nothing of a step
            with profiler:
                await asyncio.wait([running, steps], return_when=asyncio.FIRST_COMPLETED)
        return await running

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work()), profiler


def _steps() -> "asyncio.Task[Any] | None":
    """The task that is there while steps are taken."""
    return next((task for task in asyncio.all_tasks() if task.get_name() == "produce groups"), None)


def heaviest(profiler: Any) -> tuple[list[Function], float, float]:
    """Functions by the time in themselves; the seconds in which the loop computed, and those in which it waited."""
    session = profiler.last_session
    root = session.root_frame(trim_stem=False)
    spent: defaultdict[tuple[str, str], float] = defaultdict(float)
    total_s = 0.0
    pending = [] if root is None else [root]
    while pending:
        frame = pending.pop()
        children = list(frame.children)
        pending += children
        own_s = frame.time - sum(child.time for child in children)
        if frame.is_synthetic:
            # "[self]": of the function above
            own_s, frame = frame.time, frame.parent
        elif any(child.is_synthetic for child in children):
            own_s = 0.0
        total_s += own_s
        spent[frame.function, f"{_short(frame.file_path)}:{frame.line_no}"] += own_s
    # uvloop has no frames of its own: while it polls, whoever runs it is the innermost
    idle_s = sum(s for (name, place), s in spent.items() if name == "run" and "asyncio/runners.py" in place)
    found = [
        Function(name, place, s)
        for (name, place), s in sorted(spent.items(), key=lambda item: -item[1])
        if not (name == "run" and "asyncio/runners.py" in place)
    ]
    return found[:HEAVIEST], total_s - idle_s, idle_s


def _short(path: str | None) -> str:
    parts = Path(path or "?").parts
    for marker in ("l0fast", "site-packages"):
        if marker in parts[:-1]:
            keep = parts.index(marker) + (marker == "site-packages")
            return "/".join(parts[keep:])
    return "/".join(parts[-2:])


# -- the page


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
.quiet { color: #666; } code { background: #f3f3f3; padding: .1rem .3rem; border-radius: 3px; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin-top: 1.2rem; }
.card { background: #f6f8fa; border-radius: 6px; padding: .6rem 1rem; min-width: 8rem; }
.card b { display: block; font-size: 1.25rem; }
.bar { display: flex; height: 1.5rem; border-radius: 4px; overflow: hidden; background: #eee; }
.step { display: grid; grid-template-columns: 9rem 1fr; gap: .6rem; align-items: center; margin: .25rem 0; }
.legend span { display: inline-block; margin-right: 1rem; white-space: nowrap; }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .35rem; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .2rem .8rem .2rem 0; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; } tr:nth-child(odd) td { background: #fafafa; }
img { max-width: 100%; } iframe { width: 100%; height: 640px; border: 1px solid #ddd; border-radius: 6px; }
"""


def render(run: Path, functions: Sequence[Function], *, busy_s: float, idle_s: float, command: str) -> str:
    """The page of a profile whose run is in `run`; links are relative to the folder above it."""
    steps, summary = read_metrics(run), read_summary(run)
    parts = [
        f"<h1>{html.escape(run.parent.name)}</h1>",
        f"<div class=quiet><code>{html.escape(command)}</code><br>{html.escape(machine())}; {time.strftime('%Y-%m-%d %H:%M')}</div>",
        f"<div class=cards>{_cards(steps, summary, busy_s, idle_s)}</div>",
        "<h2>Where each step's time went</h2>",
        *(_step(row) for row in steps),
        f"<p class=legend>{_legend(steps)}</p>",
        "<h2>Heaviest functions of the driver</h2>",
        "<p class=quiet>Seconds in a function itself while steps were taken, on the event loop's thread, without what it called.</p>",
        _table(functions, busy_s),
        "<h2>Flame graph</h2>",
        "<p class=quiet><a href=flame.html>flame.html</a>, by pyinstrument.</p><iframe src=flame.html loading=lazy></iframe>",
        "<h2>Pictures</h2>",
        *(f"<p><img src='run/plots/{html.escape(p.name)}' alt='{html.escape(p.stem)}'></p>" for p in _plots(run)),
        "<h2>Files</h2>",
        f"<ul>{''.join(f'<li>{line}</li>' for line in _files(run))}</ul>",
        "<h2>Metrics of the last step</h2>",
        _metrics(steps[-1] if steps else {}),
    ]
    body = "\n".join(parts)
    return f"<!doctype html><meta charset=utf-8><title>{html.escape(run.parent.name)}</title><style>{STYLE}</style>{body}\n"


def _cards(steps: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], busy_s: float, idle_s: float) -> str:
    cards = {
        "steps": f"{len(steps)}",
        "s a step": f"{sum(row['time/step_s'] for row in steps) / len(steps):.2f}" if steps else "-",
        "driver busy": f"{busy_s / (busy_s + idle_s):.0%}" if busy_s + idle_s else "-",
        "loop lag p99": f"{summary.get('loop_lag_p99_ms', 0):.1f} ms",
        "worst lag": f"{max((row.get('loop/lag_max_ms', 0) for row in steps), default=0):.0f} ms",
        "episodes": f"{summary.get('episodes', 0)}",
        "peak memory": f"{summary.get('peak_pss_mb', 0):.0f} MB",
    }
    blamed = Counter(str(row["loop/blocked_by"]) for row in steps if row.get("loop/blocked_by"))
    if blamed:
        cards["blocked the loop most often"] = f"<small>{html.escape(blamed.most_common(1)[0][0])}</small>"
    return "".join(f"<div class=card><b>{value}</b>{name}</div>" for name, value in cards.items())


def _step(row: Mapping[str, Any]) -> str:
    pieces = "".join(
        f"<div style='width:{100 * row[f'share/{cause}']:.2f}%;background:{colour}' title='{label} {row[f'share/{cause}']:.1%}'></div>"
        for cause, (label, colour) in SHARES.items()
        if row.get(f"share/{cause}", 0) > 0
    )
    return f"<div class=step><span>step {row['step']}, {row['time/step_s']:.2f} s</span><div class=bar>{pieces}</div></div>"


def _legend(steps: Sequence[Mapping[str, Any]]) -> str:
    total_s = sum(row["time/step_s"] for row in steps) or 1.0
    shares = {c: sum(row["time/step_s"] * row.get(f"share/{c}", 0) for row in steps) / total_s for c in SHARES}
    return "".join(
        f"<span><i style='background:{colour}'></i>{label} {shares[cause]:.1%}</span>"
        for cause, (label, colour) in SHARES.items()
        if shares[cause] >= 0.0005
    )


def _table(functions: Sequence[Function], busy_s: float) -> str:
    rows = "".join(
        f"<tr><td class=n>{f.self_s:.3f}</td><td class=n>{f.self_s / busy_s:.1%}</td><td>{html.escape(f.name)}</td>"
        f"<td class=quiet>{html.escape(f.place)}</td></tr>"
        for f in functions
        if busy_s
    )
    return f"<table><tr><th class=n>s</th><th class=n>share</th><th>function</th><th>where</th></tr>{rows}</table>"


def _plots(run: Path) -> list[Path]:
    # what a step looks like, before what was learned in a few of them
    order = ("timeline", "step_time", "learning_curve")
    return sorted((run / "plots").glob("*.png"), key=lambda p: order.index(p.stem) if p.stem in order else len(order))


def _files(run: Path) -> list[str]:
    about = {
        "trace.json": "what every agent did when; open it in <a href=https://ui.perfetto.dev>ui.perfetto.dev</a>, with the "
        "learner's kernels where there was a GPU",
        "metrics.jsonl": "a row a step",
        "summary.json": "what the run came down to",
        "config.toml": "all settings",
        "log.txt": "what it said",
        "trajectories": "a line an episode",
    }
    return [f"<a href='run/{name}'>{name}</a>: {text}" for name, text in about.items() if (run / name).exists()]


def _metrics(row: Mapping[str, Any]) -> str:
    cells = "".join(
        f"<tr><td>{html.escape(name)}</td><td class=n>{f'{v:.6g}' if isinstance(v, float) else html.escape(str(v))}</td></tr>"
        for name, v in sorted(row.items())
    )
    return f"<details><summary>{len(row)} figures</summary><table>{cells}</table></details>"


if __name__ == "__main__":
    sys.exit(main())
