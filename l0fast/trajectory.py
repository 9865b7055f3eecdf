"""Read one trajectory in the terminal: what was asked, what the agent thought, ran and saw, what it earned.

    python -m l0fast.trajectory RUN_DIR [--step N | --eval NAME] [--index K] [--failed | --best | --worst]

Without a choice it shows the first one of the last evaluation, or of the last step where there was none. All of the text
is the model's own, so nothing in it reaches the terminal as a control sequence.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from l0fast.errors import UsageError
from l0fast.run_dir import SavedTrajectory, read_trajectories, step_name


def trajectory_file(run_dir: Path, *, step: int | None = None, evaluation: str | None = None) -> Path:
    """The file of a step, of an evaluation ("before", "after"), or the last evaluation's, else the last step's."""
    folder = run_dir / "trajectories"
    if step is not None:
        path = folder / f"{step_name(step)}.jsonl"
    elif evaluation is not None:
        path = folder / f"eval_{evaluation}.jsonl"
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


def choose(
    trajectories: list[SavedTrajectory], *, which: str | None = None, index: int = 0
) -> tuple[int, SavedTrajectory]:
    """Pick one and its place in the file.

    Args:
        which: "failed" (lost to the world), "best" or "worst" (by reward, of those that count), None for all.
        index: place among those, best or worst first; negative ones count from the end.
    """
    pool = list(enumerate(trajectories))
    if which is not None:
        pool = [(i, t) for i, t in pool if t.status.failed == (which == "failed")]
        sign = {"best": -1, "worst": 1}.get(which, 0)
        pool.sort(key=lambda it: sign * it[1].reward)
    if not -len(pool) <= index < len(pool):
        what = {"failed": "failed trajectories", None: "trajectories"}.get(which, "trajectories that count")
        way_out = f"--index goes from 0 to {len(pool) - 1}" if pool else "choose another file with --step or --eval"
        raise UsageError(f"--index {index}: there are {len(pool)} {what} in this file; {way_out}")
    return pool[index]


def render(trajectory: SavedTrajectory) -> Group:
    """What a person reads."""
    t = trajectory
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column()
    verdict = Text("right", "bold green") if t.exact_match else Text("wrong", "bold red")
    if t.status.failed:
        verdict = Text(f"failed: {_plain(t.cause or 'no cause recorded')}", "bold red")
    facts.add_row("question", Text(_plain(t.task.question), "bold"))
    facts.add_row("answer", Text(_plain(t.answer) if t.answer is not None else "none submitted"))
    facts.add_row("right answers", Text(_plain(", ".join(t.task.answers))))
    facts.add_row("verdict", verdict)
    facts.add_row("status", f"{t.status}, {len(t.turns)} turns in {t.wall_s:.2f} s, reward {t.reward:.3f}")
    parts: list[Panel | Table] = [facts]
    for i, turn in enumerate(t.turns):
        text = Text(_plain(turn.text).strip())
        text.highlight_regex(r"</?(think|code)>", "dim cyan")
        shown = turn.complaint if turn.output is None else turn.output
        output = Text("\n<output>\n", "dim cyan").append(_plain(shown or "").strip(), "yellow").append("\n</output>")
        notes = [
            f"{len(turn.response_ids)} tokens",
            f"generate {turn.generate_s:.2f} s, execute {turn.execute_s:.3f} s",
        ]
        if i < len(t.rewards):
            notes.insert(0, f"reward {t.rewards[i]:+.3f}")
        if i < len(t.advantages):
            notes.insert(1, f"advantage {t.advantages[i]:+.3f}")
        if turn.error is not None:
            notes.append(f"raised {_plain(turn.error)}")
        if not turn.well_formed:
            notes.append("malformed")
        parts.append(
            Panel(
                Group(text, output), title=f"turn {i + 1}", subtitle=Text("  ".join(notes), "dim"), title_align="left"
            )
        )
    return Group(*parts)


def _plain(text: str) -> str:
    """Without anything a terminal would obey: control characters are spelled out."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m l0fast.trajectory", description="Read one trajectory of a run.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--step", type=int, metavar="N", help="of training step N, the first is 1")
    source.add_argument("--eval", metavar="NAME", help='of an evaluation, e.g. "before" or "after"')
    parser.add_argument("--index", type=int, default=0, metavar="K", help="the K-th of those chosen, from 0")
    which = parser.add_mutually_exclusive_group()
    for name, text in (
        ("failed", "those lost to sandbox, engine or deadline"),
        ("best", "highest reward first"),
        ("worst", "lowest reward first"),
    ):
        which.add_argument(f"--{name}", dest="which", action="store_const", const=name, help=text)
    args = parser.parse_args(argv)
    console = Console(highlight=False)
    try:
        file = trajectory_file(args.run_dir, step=args.step, evaluation=args.eval)
        trajectories = read_trajectories(file)
        place, trajectory = choose(trajectories, which=args.which, index=args.index)
    except UsageError as e:
        Console(stderr=True, highlight=False).print(Text(str(e)), soft_wrap=True)
        return 2
    console.print(Text(f"{file}, line {place + 1} of {len(trajectories)}", "dim"), soft_wrap=True)
    console.print(render(trajectory))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
