"""A run with other settings: what would it have been like? Its own episodes, played again on a clock that costs no time.

    python -m bench.simulate RUN_DIR --set rollout.max_open_groups=48 --set engine.count=6 [--kv-tokens N] [--last-steps N]

Without --set it simulates the run as it was, and says how far off that is. How it is done, and what it can't know, stands in
l0fast/rollout/whatif.py. The last line is JSON.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from bench.ending import end_like_ctrl_c
from bench.machine import machine
from l0fast.errors import UsageError
from l0fast.rollout.whatif import Prediction, Simulated, parse_change, predict


def show(prediction: Prediction, changes: dict[str, object]) -> None:
    was, then, timing = prediction.as_it_was, prediction.changed, prediction.timing
    print(
        f"engine as it seems from the run: {timing.speed.prefill_tokens_per_s:,.0f} prompt tokens/s, a decode step "
        f"{timing.speed.step_s * 1e3:.2f} ms + {timing.speed.step_request_s * 1e6:.0f} us a request; learner "
        f"{timing.learn_s_per_token * 1e6:.0f} us a token"
    )
    print(f"measured {prediction.measured_step_s:.2f} s a step; steps the fit has not seen: {prediction.error:+.1%}\n")
    columns = [("as it was", was), *([("changed", then)] if changes else [])]

    def row(name: str, values: list[str]) -> None:
        print(f"{name:>22}" + "".join(f"{value:>12}" for value in values))

    row("simulated", [name for name, _ in columns])
    row("step [s]", [f"{s.step_s:.2f}" for _, s in columns])
    row("episodes/s", [f"{s.episodes_per_s:.2f}" for _, s in columns])
    row("tokens/s", [f"{s.tokens_per_s:,.0f}" for _, s in columns])
    row("times real time", [f"{s.times_real_time:,.0f}" for _, s in columns])
    for name in ("engine_busy", "slots_busy", "learner_busy"):
        row(name.replace("_", " "), [f"{getattr(s, name):.0%}" for _, s in columns])
    for cause in was.shares:
        if any(s.shares[cause] >= 0.005 for _, s in columns):
            row(f"share {cause}", [f"{s.shares[cause]:.0%}" for _, s in columns])
    if changes:
        what = ", ".join(f"{path} = {value}" for path, value in changes.items())
        print(f"\n{what}: {-prediction.gain:+.1%} time an episode")


def main(argv: list[str] | None = None) -> int:
    end_like_ctrl_c()
    parser = argparse.ArgumentParser(
        prog="python -m bench.simulate", description="A run with other settings, simulated."
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--set", action="append", default=[], metavar="section.name=value", help="a setting to change")
    parser.add_argument("--kv-tokens", type=int, help="KV entries of each engine; else its slots are the only limit")
    parser.add_argument("--last-steps", type=int, help="use only these of the run's; else all [steps]")
    args = parser.parse_args(argv)
    began_s = time.perf_counter()
    try:
        changes = dict(map(parse_change, args.set))
        prediction = predict(args.run_dir, changes, kv_tokens=args.kv_tokens, last_steps=args.last_steps)
    except UsageError as e:
        print(e, file=sys.stderr)
        return 2
    print(machine())
    show(prediction, changes)
    print(
        json.dumps(
            {
                "bench": "simulate",
                "changes": changes,
                "wall_s": round(time.perf_counter() - began_s, 1),
                "measured_step_s": prediction.measured_step_s,
                "error": prediction.error,
                "gain": prediction.gain,
                "timing": asdict(prediction.timing),
                "as_it_was": _figures(prediction.as_it_was),
                "changed": _figures(prediction.changed),
            }
        )
    )
    return 0


def _figures(simulated: Simulated) -> dict[str, object]:
    figures: dict[str, object] = {"times_real_time": simulated.times_real_time}
    figures |= asdict(simulated)
    del figures["step_times_s"]
    return figures


if __name__ == "__main__":
    sys.exit(main())
