"""A recipe's own run, measured: what `bench.throughput --engine` plays where there is an engine to play with.

The run is `l0fast.run`'s, learner included, for a few steps. Its first step is left out: engines capture graphs and learners
compile in it. Evaluations are no part of the figures, and by default only few questions are asked.
"""

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import uvloop

from bench.machine import machine
from l0fast.cli import Invocation, parse
from l0fast.config import RunConfig
from l0fast.errors import UsageError
from l0fast.learner.client import num_gpus
from l0fast.run_dir import read_metrics, read_summary

FEW = ("--eval.questions", "32", "--eval.every", "0", "--eval.transfer-questions", "8", "--checkpoint.every", "0")
"""Flags of a run that is only measured. They stand first: of a flag that is given twice the last counts."""


def measure_node(engine: str, device: str | None, steps: int, words: Sequence[str]) -> dict[str, Any]:
    """Run, and say how fast. Raises UsageError; SystemExit with the run's own code where it fails."""
    # a learner takes the GPUs that it may use, so `device` can only be what will be anyhow
    gpus = num_gpus()
    if device == "cuda" and not gpus:
        raise UsageError("--device cuda, but this process may use no GPU: look at nvidia-smi and CUDA_VISIBLE_DEVICES")
    if device == "cpu" and gpus:
        raise UsageError(
            f"--device cpu, but this process may use {gpus} GPUs, and would: put CUDA_VISIBLE_DEVICES= in front"
        )
    with tempfile.TemporaryDirectory(prefix="l0fast-bench-") as folder:
        run_dir = Path(folder) / "run"
        flags = ["--engine.kind", engine, "--num-steps", str(steps + 1), "--run-dir", str(run_dir)]
        invocation = measured([*words, *flags])

        from l0fast.training import run

        # the last line of stdout is JSON, and nothing else may look like it
        with (
            contextlib.redirect_stdout(sys.stderr),
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            code = runner.run(run(invocation))
        if code:
            raise SystemExit(code)
        return figures(read_metrics(run_dir), read_summary(run_dir), invocation.config) | {
            "engine": engine,
            "device": "cuda" if gpus else "cpu",
            "recipe": invocation.recipe,
            "machine": machine(),
        }


def measured(words: Sequence[str]) -> Invocation:
    """A run to be measured. Raises UsageError."""
    invocation = parse([*FEW, *words])
    if invocation.dry_run:
        raise UsageError("--dry-run leaves nothing to measure: give it to python -m l0fast.run")
    return invocation


def figures(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """Of all steps but the first; seconds are those of training, without evaluations."""
    steps = rows[1:]
    seconds = [row["time/step_s"] * (1 - row["share/evaluate"]) for row in steps]
    total_s = sum(seconds)

    def per_second(name: str) -> float:
        return sum(row[name] for row in steps) / total_s

    solved = sum(row["rollout/correct"] * (row["rollout/episodes"] - row["rollout/failed"]) for row in steps)
    return {
        "agents": config.rollout.max_open_groups * config.rollout.group_size,
        "mode": config.rollout.mode,
        "steps": len(steps),
        "step_s": total_s / len(steps),
        "tokens_per_s": per_second("rollout/tokens"),
        "episodes_per_s": per_second("rollout/episodes"),
        "solved_tasks_per_hour": 3600 * solved / total_s,
        **{
            f"share_{name.removeprefix('share/')}": sum(row[name] * s for row, s in zip(steps, seconds, strict=True))
            / total_s
            for name in steps[0]
            if name.startswith("share/") and name != "share/evaluate"
        },
        "loop_lag_p50_ms": max(row["loop/lag_p50_ms"] for row in steps),
        "loop_lag_p99_ms": max(row["loop/lag_p99_ms"] for row in steps),
        "loop_lag_p999_ms": max(row["loop/lag_p999_ms"] for row in steps),
        "loop_lag_max_ms": max(row["loop/lag_max_ms"] for row in steps),
        "lost": sum(row["rollout/failed"] for row in steps),
        "peak_pss_mb": summary["peak_pss_mb"],
    }
