"""Figures of an evaluation: JSON, CSV, a Markdown table; and of two of them, whether they differ."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from l0fast.evaluation.episodes import Outcome
from l0fast.evaluation.statistics import Difference, compare, interval, pass_at_k
from l0fast.run_dir import write_json

Outcomes = Mapping[str, Sequence[Outcome]]
"""Task id -> its samples."""

COLUMNS = ("questions", "samples", "accuracy", "±", "exact match", "F1", "turns", "tokens", "failed")


def figures(outcomes: Outcomes, *, failed: int = 0) -> dict[str, Any]:
    """Of one benchmark. Accuracy is by each task's own check; ± is half of the 95 % interval over questions."""
    accuracy = interval({task: [float(o.correct) for o in samples] for task, samples in outcomes.items()})
    every = [o for samples in outcomes.values() for o in samples]
    most = max(map(len, outcomes.values()), default=0)
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= most]

    def mean(values: Sequence[float]) -> float | None:
        return sum(values) / len(values) if values else None

    def score(name: str) -> float | None:
        by_task = {task: [o.scores[name] for o in samples if name in o.scores] for task, samples in outcomes.items()}
        return _finite(interval(by_task).mean)

    return {
        "questions": accuracy.questions,
        "samples": len(every),
        "accuracy": _finite(accuracy.mean),
        "accuracy_half_width": _finite(accuracy.half_width),
        **{name: score(name) for name in ("exact_match", "f1", "judge")},
        "pass_at_k": {
            str(k): _finite(pass_at_k({t: [o.correct for o in s] for t, s in outcomes.items()}, k)) for k in ks
        },
        "turns": mean([o.turns for o in every]),
        "tokens": mean([o.tokens for o in every if o.tokens is not None]),
        "wall_s": mean([o.wall_s for o in every]),
        "failed": failed,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """report.json, report.csv, report.md."""
    write_json(folder / "report.json", report)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    flat = {name: _flat(of) for name, of in report["benchmarks"].items()}
    names = list(dict.fromkeys(column for of in flat.values() for column in of))
    writer.writerow(["benchmark", *names])
    for name, of in flat.items():
        writer.writerow([name, *("" if of.get(column) is None else of[column] for column in names)])
    (folder / "report.csv").write_text(out.getvalue())
    (folder / "report.md").write_text(summary(report) + "\n")


def _flat(figures: Mapping[str, Any]) -> dict[str, Any]:
    flat = {name: value for name, value in figures.items() if name != "pass_at_k"}
    return flat | {f"pass_at_{k}": value for k, value in figures["pass_at_k"].items()}


def summary(report: Mapping[str, Any]) -> str:
    """The table, and how the episodes that were played for it went."""
    if not report["played"]:
        return table(report)
    p50, p99, most = (report[f"loop/lag_{name}_ms"] for name in ("p50", "p99", "max"))
    held = f", held by {report['loop/blocked_by']}" if "loop/blocked_by" in report else ""
    return (
        f"{table(report)}\n\n{report['played']:,} episodes in {report['wall_s']:.1f} s; the event loop was late by "
        f"{p50:.1f} ms (p50), {p99:.1f} ms (p99), {most:.1f} ms at most{held}"
    )


def table(report: Mapping[str, Any]) -> str:
    """Markdown."""
    ks = sorted({int(k) for of in report["benchmarks"].values() for k in of["pass_at_k"]} - {1})
    head = ["benchmark", *COLUMNS, *(f"pass@{k}" for k in ks)]
    rows = [
        [
            name,
            f"{of['questions']:,}",
            f"{of['samples']:,}",
            _shown(of["accuracy"]),
            _shown(of["accuracy_half_width"]),
            _shown(of["exact_match"]),
            _shown(of["f1"]),
            _shown(of["turns"], 1),
            _shown(of["tokens"], 0),
            f"{of['failed']:,}",
            *(_shown(of["pass_at_k"].get(str(k))) for k in ks),
        ]
        for name, of in report["benchmarks"].items()
    ]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def _shown(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def compared(a: Mapping[str, Outcomes], b: Mapping[str, Outcomes]) -> dict[str, Difference]:
    """Accuracy of two evaluations, benchmark by benchmark where both have questions in common."""

    def correct(outcomes: Outcomes) -> dict[str, list[float]]:
        return {task: [float(o.correct) for o in samples] for task, samples in outcomes.items()}

    return {name: compare(correct(a[name]), correct(b[name])) for name in a if a[name].keys() & b.get(name, {}).keys()}


def comparison_table(differences: Mapping[str, Difference], name_a: str, name_b: str) -> str:
    lines = [
        f"| benchmark | questions | {name_a} | {name_b} | difference | 95 % interval | p | more than noise |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {d.questions:,} | {d.a:.3f} | {d.b:.3f} | {d.a - d.b:+.3f} | {_range(d)} | "
        f"{d.p_value:.4f} | {'yes' if d.real else 'no'} |"
        for name, d in differences.items()
    ]
    return "\n".join(lines)


def _range(difference: Difference) -> str:
    return f"{difference.low:+.3f} to {difference.high:+.3f}" if math.isfinite(difference.low) else ""
