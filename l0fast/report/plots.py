"""Pictures of a run, drawn from its folder alone.

    plots/learning_curve.png   held-out accuracy, training accuracy and reward over steps and seconds; below it, what
                               went wrong in the rest
    plots/step_time.png        where each step's time went
    plots/timeline.png         one step, a row an agent: generate, execute, wait

    python -m l0fast.report.plots RUN_DIR

matplotlib takes a second to load and holds the interpreter while it draws, so a run draws in a process of its own
(`draw_in_subprocess`). Colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/): apart for every kind of sight.
"""

import itertools
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l0fast.children import output_of
from l0fast.errors import L0fastError, UsageError
from l0fast.run_dir import SavedTrajectory, read_metrics, read_summary, read_trajectories

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#999999"

OUTCOMES = {
    "one_hop_only": ("stopped after one hop", ORANGE),
    "wrong_field": ("wrong field", SKY),
    "wrong": ("wrong", VERMILION),
    "invented_or_miscopied": ("invented or miscopied", VERMILION),
    "no_answer": ("no answer", PURPLE),
    "failed": ("failed (sandbox, engine, deadline)", GREY),
}
SHARES = {
    "decode": ("decode", BLUE),
    "prefill": ("prefill", "#4A9BD0"),
    "recompute": ("prefill again", "#8CC4E8"),
    "tail": ("stragglers", "#B9DDF2"),
    "tools": ("tools", YELLOW),
    "sandbox": ("sandbox", ORANGE),
    "learn": ("learn", GREEN),
    "sync": ("sync weights", PURPLE),
    "evaluate": ("evaluate", "#DDDDDD"),
    "stall": ("loop stalled", VERMILION),
    "other": ("other", GREY),
}
"""Cause in the metrics (step_shares.py): what it is called, and its colour; all the engine's time is blue."""

STYLE: dict[Any, Any] = {
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
}


class PlotError(L0fastError):
    """The drawing process failed or took too long."""


async def draw_in_subprocess(run_dir: Path, timeout_s: float = 120.0) -> list[Path]:
    """Draw all pictures of a run without holding up the event loop; returns their paths.

    Raises:
        PlotError: with the last line of what the process said.
    """
    out = await output_of(
        "l0fast.report.plots",
        str(run_dir),
        error=PlotError,
        without=f"the pictures of {run_dir} were not drawn",
        timeout_s=timeout_s,
    )
    return [Path(line) for line in out.splitlines()]


def draw(run_dir: Path) -> list[Path]:
    """Draw what the folder has the data for; returns the pictures' paths."""
    import matplotlib

    matplotlib.use("agg")
    rows, summary = read_metrics(run_dir), read_summary(run_dir)
    folder = run_dir / "plots"
    folder.mkdir(exist_ok=True)
    drawn = []
    with matplotlib.rc_context(STYLE):
        if curve_points(rows, summary):
            drawn.append(_save(learning_curve(rows, summary), folder / "learning_curve.png"))
        if rows:
            drawn.append(_save(step_time(rows), folder / "step_time.png"))
        # by number: step_10000 comes before step_9999 by name
        if steps := {_number(file): file for file in (run_dir / "trajectories").glob("step_*.jsonl")}:
            number, file = max(steps.items())
            trajectories = read_trajectories(file)
            if any(t.wall_s > 0 for t in trajectories):
                drawn.append(_save(timeline(trajectories, f"step {number}"), folder / "timeline.png"))
    return drawn


def _number(file: Path) -> int:
    return int(file.stem.removeprefix("step_"))


def compare_plot(run_dirs: Mapping[str, Path], out: Path) -> Path:
    """Held-out accuracy of several runs in one picture, e.g. {"trained": ..., "advantages permuted": ...}."""
    import matplotlib

    matplotlib.use("agg")
    with matplotlib.rc_context(STYLE):
        import matplotlib.pyplot as plt

        fig, ax = plt.subplots(figsize=(8.4, 3.8), layout="constrained")
        colours = itertools.cycle((BLUE, VERMILION, GREEN, PURPLE, ORANGE))
        for i, ((label, run_dir), colour) in enumerate(zip(run_dirs.items(), colours, strict=False)):
            rows, summary = read_metrics(run_dir), read_summary(run_dir)
            ax.plot(*_series(rows, "rollout/correct"), color=colour, alpha=0.3, lw=1)
            _held_out_curves(ax, curve_points(rows, summary), colour, f"{label}, ", name_start=i == 0)
        ax.plot([], [], color="black", alpha=0.3, lw=1, label="right answers in training")
        _finish_accuracy(ax)
        ax.set(xlabel="optimizer step", ylabel="held-out accuracy (share right)")
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        return _save(fig, out)


def curve_points(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """{"sampled": [(step, accuracy), ...], "greedy": ...}: what was measured in between, and the summary's two ends."""
    last = max((row["step"] for row in rows), default=0)
    points = {}
    for kind, key in (("sampled", "eval_accuracy"), ("greedy", "eval_greedy")):
        # one that was asked beside training stands in a later row than that of its step
        found = {row.get("eval/step", row["step"]): row[f"eval/{kind}"] for row in rows if f"eval/{kind}" in row}
        # the ends are asked on all fixed questions, those in between on the first of them
        for end, step in (("before", 0), ("after", summary.get("steps", last))):
            if summary.get(f"{key}_{end}") is not None:
                found[step] = summary[f"{key}_{end}"]
        if found:
            points[kind] = sorted(found.items())
    return points


def learning_curve(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> "Figure":
    import matplotlib.pyplot as plt

    outcomes = [row for row in rows if "rollout/correct" in row and any(f"outcome/{o}" in row for o in OUTCOMES)]
    # what can go wrong depends on what is asked
    wrong = {name: shown for name, shown in OUTCOMES.items() if any(row.get(f"outcome/{name}") for row in outcomes)}
    heights = [3, 1.7] if wrong else [1]
    fig, axes = plt.subplots(
        len(heights),
        1,
        figsize=(8.4, 5.6 if wrong else 3.8),
        height_ratios=heights,
        sharex=True,
        layout="constrained",
    )
    ax, *below = axes if wrong else [axes]
    points = curve_points(rows, summary)
    # a line through one point can't be seen
    marker = "." if len(rows) == 1 else None
    ax.plot(*_series(rows, "rollout/reward"), color=GREY, lw=1, marker=marker, label="training, reward")
    ax.plot(*_series(rows, "rollout/correct"), color=SKY, lw=1.2, marker=marker, label="training, right answers")
    _held_out_curves(ax, points, BLUE, "held-out, ")
    _finish_accuracy(ax)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    seconds = [(row["step"], row["time/since_start_s"]) for row in rows]
    if len(seconds) > 1:
        _add_seconds_axis(ax, seconds)
    if below:
        steps = [row["step"] for row in outcomes]
        if len(steps) == 1:
            # nor an area above one
            outcomes, steps = outcomes * 2, [steps[0] - 0.25, steps[0] + 0.25]
        shares = [[row.get(f"outcome/{name}", 0.0) for row in outcomes] for name in wrong]
        labels, colours = zip(*wrong.values(), strict=True)
        below[0].stackplot(steps, shares, labels=labels, colors=colours, edgecolor="white", lw=0.4)
        below[0].set(ylabel="share of training\nepisodes", ylim=(0, None))
        handles, names = below[0].get_legend_handles_labels()
        # in the order they are stacked
        below[0].legend(handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1, 0.5), title="what went wrong")
    (below[0] if below else ax).set_xlabel("optimizer step")
    return fig


def step_time(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    import matplotlib.pyplot as plt

    steps = [row["step"] for row in rows]
    fig, ax = plt.subplots(figsize=(8.4, 3.2), layout="constrained")
    edges = [steps[0] - 0.5, *(step + 0.5 for step in steps)]
    bottom = [0.0] * len(rows)
    total = sum(row["time/step_s"] for row in rows)
    for cause, (label, colour) in SHARES.items():
        heights = [row["time/step_s"] * row[f"share/{cause}"] for row in rows]
        below, bottom = bottom, [b + h for b, h in zip(bottom, heights, strict=True)]
        # else thinner than a line
        if sum(heights) >= 0.005 * total:
            # one outline a cause: a bar a step takes minutes for thousands
            label = f"{label} ({sum(heights) / total:.0%})"
            ax.stairs(bottom, edges, baseline=below, fill=True, color=colour, label=label, lw=0)
    ax.set(xlabel="optimizer step", ylabel="wall clock of the step [s]", xlim=(steps[0] - 0.5, steps[-1] + 0.5))
    ax.grid(False, axis="x")
    ax.set_title(f"{len(rows)} steps, {total / len(rows):.2f} s each on average", loc="left", fontsize=9)
    handles, names = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def timeline(trajectories: Sequence[SavedTrajectory], title: str) -> "Figure":
    """A row an agent: what it did, and where it waited for a place or a session."""
    import matplotlib.pyplot as plt
    from matplotlib.collections import PolyCollection

    played = sorted((t for t in trajectories if t.wall_s > 0), key=lambda t: (t.started_s, t.wall_s))
    start = played[0].started_s
    bars: dict[str, tuple[list[float], list[float], list[float]]] = {
        name: ([], [], []) for name in ("wait", "generate", "execute")
    }
    for row, t in enumerate(played):
        began = t.started_s - start
        pieces = [("wait", began, t.wall_s)]  # what is not drawn over
        for turn in t.turns:
            at = began + turn.start_s
            pieces += [("generate", at, turn.generate_s), ("execute", at + turn.generate_s, turn.execute_s)]
        for name, at, length in pieces:
            for values, value in zip(bars[name], (row, length, at), strict=True):
                values.append(value)
    busy = {name: sum(bars[name][1]) for name in bars}
    busy["wait"] -= busy["generate"] + busy["execute"]
    # no picture is higher than 2^16 pixels: of more agents the rows are thinner
    height = 1.4 + 0.025 * min(max(40, len(played)), 4000)
    fig, ax = plt.subplots(figsize=(8.4, height), layout="constrained")
    for name, colour in (("wait", "#DDDDDD"), ("generate", BLUE), ("execute", ORANGE)):
        corners = [
            ((left, row - 0.45), (left, row + 0.45), (left + length, row + 0.45), (left + length, row - 0.45))
            for row, length, left in zip(*bars[name], strict=True)
        ]
        share = busy[name] / sum(t.wall_s for t in played)
        ax.add_collection(PolyCollection(corners, facecolors=colour, lw=0, label=f"{name} ({share:.0%})"))
    end = max(t.started_s + t.wall_s for t in played) - start
    ax.set(xlabel="time since the first of them began [s]", ylabel="agent", xlim=(0, 1.05 * end))
    ax.set(ylim=(len(played) - 0.5, -0.5))
    ax.grid(False, axis="y")
    ax.set_title(f"{title}: {len(played)} episodes", loc="left", fontsize=9)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def _held_out_curves(
    ax: "Axes", points: Mapping[str, list[tuple[int, float]]], colour: str, prefix: str, *, name_start: bool = True
) -> None:
    """Held-out points joined by lines, and as a dashed line where each began."""
    last = {kind: reached[-1][1] for kind, reached in points.items()}
    # figures that would lie on each other move apart
    close = len(last) == 2 and max(last.values()) - min(last.values()) < 0.05
    lift = dict(zip(sorted(last, key=last.__getitem__), (-5, 5) if close else (0, 0), strict=False))
    for kind, marker, fill in (("sampled", "o", colour), ("greedy", "s", "white")):
        if kind not in points:
            continue
        steps, values = [step for step, _ in points[kind]], [value for _, value in points[kind]]
        # two points say nothing about the way between them
        line = "-" if len(steps) > 2 else ":"
        style = {"ls": line, "lw": 1.6, "marker": marker, "ms": 4.5, "mfc": fill, "zorder": 3, "clip_on": False}
        ax.plot(steps, values, color=colour, label=f"{prefix}{kind}", **style)
        if steps[0] == 0:
            ax.axhline(values[0], color=colour, ls=(0, (4, 3)), lw=0.8, alpha=0.5, zorder=1)
        ends = [(steps[0], values[0], (6, -10))] if name_start else []
        ends += [(steps[-1], values[-1], (7, -3 + lift[kind]))] if len(steps) > 1 else []
        for x, y, offset in ends:
            ax.annotate(f"{y:.2f}", (x, y), xytext=offset, textcoords="offset points", color=colour, fontweight="bold")


def _finish_accuracy(ax: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    ax.plot([], [], color="black", ls=(0, (4, 3)), lw=0.8, alpha=0.5, label="before training")
    # rewards of one's own may lie anywhere
    low, high = ax.dataLim.intervaly
    ax.set(ylabel="accuracy (share right); reward", ylim=(min(0.0, low), max(1.0, high)))
    left, right = ax.dataLim.intervalx
    ax.set_xlim(min(0.0, left), right + 0.08 * max(1.0, right))
    # there is no half of a step
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def _add_seconds_axis(ax: "Axes", seconds: Sequence[tuple[int, float]]) -> None:
    import numpy as np

    steps, times = np.array(seconds, dtype=float).T
    pace = max((times[-1] - times[0]) / (steps[-1] - steps[0]), 1e-9)

    def mapped(x: Any, xs: Any, ys: Any, slope: float) -> Any:
        # beyond the measured ends the axis goes on at the mean pace, so that the mapping stays one to one
        return np.interp(x, xs, ys) + (x - np.clip(x, xs[0], xs[-1])) * slope

    to_seconds = partial(mapped, xs=steps, ys=times, slope=pace)
    to_steps = partial(mapped, xs=times, ys=steps, slope=1 / pace)
    top = ax.secondary_xaxis("top", functions=(to_seconds, to_steps))
    top.set_xlabel("time since the start [s]")


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = [(row["step"], row[key]) for row in rows if key in row]
    return [step for step, _ in found], [value for _, value in found]


def _save(fig: "Figure", path: Path) -> Path:
    import matplotlib.pyplot as plt

    fig.savefig(path)
    plt.close(fig)
    return path


def main(argv: Sequence[str]) -> int:
    if len(argv) != 1:
        sys.stderr.write(f"{len(argv)} folders were given: write python -m l0fast.report.plots RUN_DIR\n")
        return 2
    try:
        paths = draw(Path(argv[0]))
    except UsageError as e:
        sys.stderr.write(f"{e}\n")
        return 2
    sys.stdout.writelines(f"{path}\n" for path in paths)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
