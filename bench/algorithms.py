"""Every published algorithm and every way to train, on the default job: does each learn, and what does it take?

    python -m bench.algorithms --out DIR [--only grpo "one step off" ...] [--seed N] [--results bench/results]

Runs `python -m l0fast.run`, one after the other, and only reads what the runs left. Nothing is tuned for any of them: all
else is as in the recipe, the learning rate too. Prints the machine, a table and one JSON line; with --results also writes
algorithms.json there. LoRA wants `pip install -e '.[lora]'`. One seed: what is a few hundredths apart may be the other way round for another.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from bench.at_least import at_least
from bench.ending import end_like_ctrl_c
from bench.machine import machine
from bench.main_job import folder_of, print_table, run
from bench.results_folder import results_folder
from l0fast.config import ALGORITHMS

WAYS = {
    **{name: ["--learner.algorithm", name] for name in ALGORITHMS},
    "running mean": ["--learner.advantage", "running_mean"],
    "gae, critic head": ["--learner.advantage", "gae", "--learner.critic", "head"],
    "gae, critic copy": ["--learner.advantage", "gae", "--learner.critic", "copy", "--learner.critic-lr", "7e-4"],
    "4 minibatches": ["--learner.minibatches", "4"],
    "drop rate 0.5": ["--rollout.drop-rate", "0.5"],
    "carry over": ["--rollout.mode", "carry_over"],
    "one step off": ["--rollout.mode", "one_step_off"],
    "lora, rank 16": ["--learner.lora-rank", "16"],
    "2 ranks": ["--learner.ranks", "2"],
    "4 ranks": ["--learner.ranks", "4"],
    "control": ["--learner.permute-advantages"],
}


def main() -> None:
    end_like_ctrl_c()
    parser = argparse.ArgumentParser(
        prog="python -m bench.algorithms", description="Every algorithm and way to train, on the default job."
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the runs; those already in it are read, not run"
    )
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help="; ".join(WAYS))
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--results", type=results_folder, help="folder for algorithms.json")
    options = parser.parse_args()

    summaries: dict[str, dict[str, Any]] = {
        name: run(folder_of(options.out, name), ["geography", "--seed", str(options.seed), *WAYS[name]])
        for name in options.only
    }
    print_table(summaries)
    result = {"bench": "algorithms", "machine": machine(), "seed": options.seed, "runs": summaries}
    if options.results is not None:
        (options.results / "algorithms.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({**result, "runs": {name: s["eval_accuracy_after"] for name, s in summaries.items()}}))


if __name__ == "__main__":
    main()
