"""How many times faster than real time the simulated engine is.

    python -m bench.simulated_speed [--seconds 240] [--out FOLDER]

    agents x engines x length of a response, each agent on to its next episode at once; all else as in bench/admission.py

What costs time is a turn of an agent: its prompt compared with the one before, its request through the scheduler, its wait for
the tool. An idle second costs nothing. So two figures belong together: turns that a second of the host simulates, which
depends little on the scene, and turns in a simulated second, which are fewer where responses and tools take long.

    times real time = turns simulated a second / turns in a simulated second

The last line is JSON.
"""

import argparse
import itertools
import json
import statistics
import sys

from bench.admission import CAPACITIES, RESULTS, Result, simulate
from bench.machine import machine
from bench.results_folder import results_folder

SCENES = tuple(itertools.product((300, 1500), (1, 8), (16, 128, 1024)))
"""(median response [tokens], engines, agents): L0's agents, and some that think longer."""
VOCAB_SIZE = 152_064
"""Qwen2.5's: ids below 257 are objects that Python has ready, and so cheaper than a model's."""
ROUNDS = 3
"""Of all scenes; the figures are medians."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.simulated_speed",
        description="How many times faster than real time engines are simulated.",
    )
    parser.add_argument("--seconds", type=float, default=240.0, help="simulated time of each scene [s]")
    parser.add_argument("--out", type=results_folder, default=RESULTS, help="folder for simulated_speed.json")
    args = parser.parse_args(argv)
    if not args.seconds >= 1:
        parser.error(f"--seconds {args.seconds:g}: give at least 1")
    name, kv_tokens = next(iter(CAPACITIES.items()))
    print(machine())
    print(f"{args.seconds:g} simulated seconds a scene, median of {ROUNDS}; each engine with {name}")
    runs: dict[tuple[int, int, int], list[Result]] = {scene: [] for scene in SCENES}
    for _ in range(ROUNDS):
        for response, engines, agents in SCENES:
            runs[response, engines, agents].append(
                simulate(
                    kv_tokens, agents, args.seconds, replicas=engines, median_response=response, vocab_size=VOCAB_SIZE
                )
            )
    print(
        f"\n{'response':>9} {'engines':>8} {'agents':>7} {'turns in a simulated s':>23} {'turns simulated a s':>20} {'x real time':>12}"
    )
    rows = []
    for (response, engines, agents), results in runs.items():
        wall_s, turns = statistics.median(r.wall_s for r in results), results[0].turns
        row = {
            "median_response_tokens": response,
            "engines": engines,
            "agents": agents,
            "turns_in_simulated_s": turns / args.seconds,
            "turns_a_s": turns / wall_s,
            "times_real_time": args.seconds / wall_s,
        }
        rows.append(row)
        print("{:9,d} {:8d} {:7,d} {:23.2f} {:20,.0f} {:12,.0f}".format(*row.values()))
    result = {"bench": "simulated_speed", "machine": machine(), "simulated_s": args.seconds, "rows": rows}
    (args.out / "simulated_speed.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
