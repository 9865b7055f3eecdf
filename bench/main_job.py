"""The main job, measured: held-out accuracy before and after, over seeds, beside the control and the invented world.

    python -m bench.main_job --out DIR [--seeds 0 1 2] [--without-invented] [--results bench/results]

Runs `python -m l0fast.run` one after the other, as a user would, and only reads what the runs left: summary.json. Prints
the machine, a table and one JSON line; with --results also writes main_job.json and geography.png there.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from bench.at_least import at_least
from bench.ending import end_like_ctrl_c, run_to_its_end
from bench.machine import machine
from bench.results_folder import results_folder, write
from l0fast.report.plots import compare_plot

COLUMNS = {
    "sampled": ("eval_accuracy_before", "eval_accuracy_after"),
    "greedy": ("eval_greedy_before", "eval_greedy_after"),
    "untrained chains (greedy)": ("transfer_untrained_chains_greedy_before", "transfer_untrained_chains_greedy_after"),
    "other world (greedy)": ("transfer_other_world_greedy_before", "transfer_other_world_greedy_after"),
}


def main() -> None:
    end_like_ctrl_c()
    parser = argparse.ArgumentParser(prog="python -m bench.main_job", description="The main job, measured.")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the runs; those already in it are read, not run"
    )
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=results_folder, help="folder for main_job.json and geography.png")
    parser.add_argument("--without-invented", action="store_true", help="leave the invented world out")
    options = parser.parse_args()

    runs: dict[str, list[str]] = {
        f"geography, seed {seed}": ["geography", "--seed", str(seed)] for seed in options.seeds
    }
    runs["geography, control"] = ["geography", "--learner.permute-advantages"]
    if not options.without_invented:
        runs["invented"] = ["invented"]
    folders = {name: folder_of(options.out, name) for name in runs}
    summaries = {name: run(folders[name], args) for name, args in runs.items()}
    print_table(summaries)

    seeds = [summaries[f"geography, seed {seed}"] for seed in options.seeds]
    result: dict[str, Any] = {"machine": machine()}
    for key in dict.fromkeys(key for keys in COLUMNS.values() for key in keys):
        result[f"{key}_mean"] = statistics.mean(s[key] for s in seeds)
    result["runs"] = summaries
    write(result, options.results, "main_job.json", leave_out=("runs",))
    if options.results is not None:
        shown = {"trained": folders[f"geography, seed {options.seeds[0]}"], "control": folders["geography, control"]}
        compare_plot(shown, options.results / "geography.png")


def folder_of(out: Path, name: str) -> Path:
    return out / name.replace(", ", "-").replace(" ", "-")


def print_table(summaries: dict[str, dict[str, Any]]) -> None:
    """The machine, and a row a run."""
    print(machine())
    header = ["run", *COLUMNS, "wall [s]", "first episode [s]", "peak PSS [MB]", "lag p99 [ms]", "failed"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for name, s in summaries.items():
        changes = [f"{s[before]:.3f} -> {s[after]:.3f}" for before, after in COLUMNS.values()]
        costs = [
            f"{s[key]:.0f}"
            for key in ("wall_s", "first_episode_s", "peak_pss_mb", "loop_lag_p99_ms", "failed_episodes")
        ]
        print("| " + " | ".join([name, *changes, *costs]) + " |")


def run(run_dir: Path, args: list[str]) -> dict[str, Any]:
    """The summary of a run, made now unless it is there."""
    if not (run_dir / "summary.json").exists():
        code = run_to_its_end([sys.executable, "-m", "l0fast.run", *args, "--run-dir", str(run_dir)])
        if code:
            sys.exit(f"bench.main_job: the run in {run_dir} ended with exit code {code}: see above")
    summary = json.loads((run_dir / "summary.json").read_text())
    if not summary.get("finished", True):
        sys.exit(
            f"bench.main_job: the run in {run_dir} was told to end before its end: delete the folder to have it run again, or "
            f"go on with it first: python -m l0fast.run --resume {run_dir}"
        )
    return summary


if __name__ == "__main__":
    main()
