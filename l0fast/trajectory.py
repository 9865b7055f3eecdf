"""Read trajectories in the terminal: what was asked, what the agent thought, ran and saw, what it earned.

    python -m l0fast.trajectory RUN_DIR [--step N | --eval NAME] [--task TEXT] [--failed | --best | --worst]
                                        [--list | --index K [--notebook OUT.ipynb]]

Without a choice it shows the first one of the evaluation after a run, or of the newest file of a run that has none yet. All
of the text is the model's own, so nothing in it reaches the terminal as a control sequence.
"""

import argparse
import io
import sys
from pathlib import Path

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from l0fast.errors import UsageError
from l0fast.report.notebook import save_notebook
from l0fast.run_dir import SavedTrajectory, read_trajectories, step_name


def trajectory_file(run_dir: Path, *, step: int | None = None, evaluation: str | None = None) -> Path:
    """The file of a step, of an evaluation ("before", "transfer_x_after"), or the newest: of a run that ended, "after"."""
    folder = run_dir / "trajectories"
    if step is not None:
        path = folder / f"{step_name(step)}.jsonl"
    elif evaluation is not None:
        # as it is called among those that are there, or for short
        path = folder / f"{evaluation}.jsonl"
        path = path if path.exists() else folder / f"eval_{evaluation}.jsonl"
    else:
        files = [*folder.glob("step_*.jsonl"), *folder.glob("eval_*.jsonl")]
        if not files:
            raise UsageError(f"{run_dir} holds no trajectories: give the folder of a run that took a step")
        after = folder / "eval_after.jsonl"
        return after if after in files else max(files, key=lambda f: f.stat().st_mtime_ns)
    if not path.exists():
        there = ", ".join(sorted(f.stem for f in folder.glob("*.jsonl"))) or "nothing"
        raise UsageError(f"{run_dir} has no trajectories of {path.stem}: there is {there}")
    return path


Placed = tuple[int, SavedTrajectory]
"""A trajectory with its place in its file."""


def select(trajectories: list[SavedTrajectory], *, which: str | None = None, task: str = "") -> list[Placed]:
    """Those that are meant, with their places in the file.

    Args:
        which: "failed" (lost to the world), "best" or "worst" (by reward, of those that count), None for all.
        task: its id, or text that its id or its question contains, in any case.
    """
    pool = [
        (i, t)
        for i, t in enumerate(trajectories)
        if any(task.casefold() in text.casefold() for text in (t.task.id, t.task.question))
    ]
    if which is not None:
        pool = [(i, t) for i, t in pool if t.status.failed == (which == "failed")]
        sign = {"best": -1, "worst": 1}.get(which, 0)
        pool.sort(key=lambda it: sign * it[1].reward)
    return [(i, t) for i, t in pool if t.task.id == task] or pool


def choose(trajectories: list[SavedTrajectory], *, which: str | None = None, index: int = 0, task: str = "") -> Placed:
    """Pick one of those selected: by its place among them, negative ones count from the end."""
    pool = select(trajectories, which=which, task=task)
    if not -len(pool) <= index < len(pool):
        what = {"failed": "failed trajectories", None: "trajectories"}.get(which, "trajectories that count")
        of = f" of tasks with {task!r}" if task else ""
        way_out = f"--index goes from 0 to {len(pool) - 1}" if pool else "choose another file with --step or --eval"
        raise UsageError(f"--index {index}: there are {len(pool)} {what}{of} in this file; {way_out}")
    return pool[index]


def render_list(pool: list[Placed]) -> Table:
    """One line a trajectory."""
    # what a narrow terminal has no room for is cut from the words, not from the figures
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0), expand=True)
    for name in ("line", "reward", "turns", "time [s]"):
        table.add_column(Text(name), justify="right", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    for name, share in (("task", 2), ("question", 3), ("answer", 2)):
        table.add_column(name, no_wrap=True, overflow="ellipsis", ratio=share)
    for i, t in pool:
        outcome = Text("right", "green") if t.correct else Text("wrong" if not t.status.failed else t.status, "red")
        answer = _line(t.answer) if t.answer is not None else (t.cause and _line(t.cause)) or str(t.status)
        figures = (str(i + 1), f"{t.reward:.3f}", str(len(t.turns)), f"{t.wall_s:.2f}")
        table.add_row(*figures, outcome, Text(_line(t.task.id)), Text(_line(t.task.question)), Text(answer))
    return table


def render(trajectory: SavedTrajectory) -> Group:
    """What a person reads."""
    t = trajectory
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column()
    verdict = Text("right", "bold green") if t.correct else Text("wrong", "bold red")
    if t.status.failed:
        verdict = Text(f"failed: {plain(t.cause or 'no cause recorded')}", "bold red")
    facts.add_row("question", Text(plain(t.task.question), "bold"))
    facts.add_row("answer", Text(plain(t.answer) if t.answer is not None else "none submitted"))
    facts.add_row("right answers", Text(plain(", ".join(t.task.answers))))
    facts.add_row("verdict", verdict)
    facts.add_row("status", f"{t.status}, {len(t.turns)} turns in {t.wall_s:.2f} s, reward {t.reward:.3f}")
    parts: list[Panel | Table] = [facts]
    for i, turn in enumerate(t.turns):
        text = Text(plain(turn.text).strip())
        text.highlight_regex(r"</?(think|code)>", "dim cyan")
        shown = turn.complaint if turn.output is None else turn.output
        output = Text("\n<output>\n", "dim cyan").append(plain(shown or "").strip(), "yellow").append("\n</output>")
        notes = [
            *([f"{turn.num_tokens} tokens"] if turn.num_tokens else []),
            f"generate {turn.generate_s:.2f} s, execute {turn.execute_s:.3f} s",
        ]
        if i < len(t.rewards):
            notes.insert(0, f"reward {t.rewards[i]:+.3f}")
        if i < len(t.advantages):
            notes.insert(1, f"advantage {t.advantages[i]:+.3f}")
        if turn.error is not None:
            notes.append(f"raised {plain(turn.error)}")
        if not turn.well_formed:
            notes.append("malformed")
        parts.append(
            Panel(
                Group(text, output), title=f"turn {i + 1}", subtitle=Text("  ".join(notes), "dim"), title_align="left"
            )
        )
    return Group(*parts)


def _line(text: str) -> str:
    return " ".join(plain(text).split())


def plain(text: str) -> str:
    """Without anything a terminal would obey: control characters are spelled out."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def spell_out() -> None:
    """From now on a letter that the terminal's encoding lacks is spelled out, and no reason to end."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m l0fast.trajectory", description="Read a run's trajectories.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--step", type=int, metavar="N", help="of training step N, the first is 1")
    source.add_argument("--eval", metavar="NAME", help='of an evaluation: "before", "after", a name in trajectories/')
    parser.add_argument("--index", type=int, default=0, metavar="K", help="the K-th of those chosen, from 0")
    which = parser.add_mutually_exclusive_group()
    for name, text in (
        ("failed", "those lost to sandbox, engine or deadline"),
        ("best", "highest reward first"),
        ("worst", "lowest reward first"),
    ):
        which.add_argument(f"--{name}", dest="which", action="store_const", const=name, help=text)
    parser.add_argument("--task", default="", metavar="TEXT", help="with this in the task's id or question")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--list", action="store_true", help="all of them, a line each")
    output.add_argument("--notebook", type=Path, metavar="OUT", help="write it as a Jupyter notebook that runs")
    args = parser.parse_args(argv)
    spell_out()
    console = Console(highlight=False)
    try:
        file = trajectory_file(args.run_dir, step=args.step, evaluation=args.eval)
        trajectories = read_trajectories(file)
        if args.list:
            pool = select(trajectories, which=args.which, task=args.task)
            console.print(Text(f"{file}, {len(pool)} of {len(trajectories)}", "dim"), soft_wrap=True)
            console.print(render_list(pool))
            return 0
        place, trajectory = choose(trajectories, which=args.which, index=args.index, task=args.task)
        if args.notebook:
            save_notebook(args.notebook, trajectory, trajectory.advantages)
    except UsageError as e:
        Console(stderr=True, highlight=False).print(Text(str(e)), soft_wrap=True)
        return 2
    console.print(Text(f"{file}, line {place + 1} of {len(trajectories)}", "dim"), soft_wrap=True)
    console.print(
        Text(f"written to {args.notebook}") if args.notebook else render(trajectory), soft_wrap=bool(args.notebook)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
