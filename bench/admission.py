"""What admission by KV cache is worth: simulated, against fixed limits on the episodes in flight.

    python -m bench.admission [--seconds 9600] [--median-response 300] [--out FOLDER]

    engine/traffic.py: episodes x (engine/gate.py with rollout/admission.py | nothing) x a simulated engine       in event time

Always `OFFERED` episodes want to be played on one GPU. Fixed: so many of them may be in flight, as with a hand-set
limit. kv: all of them ask, and the controller lets in whom it likes; it starts knowing nothing, and its learning counts.
The engine is SGLang's scheduler as arithmetic, with the same prompts, lengths and latencies in every run; a finished
episode's KV entries stay until they are evicted, as there. The best fixed limit is chosen here in hindsight, after trying all.

    1-8 turns, each as likely; response lognormal, median 300; output of a cell lognormal, median 150; tool lognormal, median
    0.8 s, p99 8.2 s; first prompt 1,200 to 2,000 tokens. Qwen2.5-7B in bf16 on an 80 GB H100: arithmetic, not measured.

The last line is JSON.
"""

import argparse
import gc
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from bench.at_least import at_least
from bench.ending import end_like_ctrl_c
from bench.machine import machine
from bench.results_folder import results_folder, write
from l0fast.engine import simulated_replica
from l0fast.engine.clock import EventClock
from l0fast.engine.distributions import lognormal, uniform
from l0fast.engine.gate import Gate
from l0fast.engine.simulated_cluster import Cluster
from l0fast.engine.simulated_replica import Speed
from l0fast.engine.traffic import Agents, Traffic
from l0fast.rollout.admission import Admission

matplotlib.use("Agg")

RESULTS = Path(__file__).parent / "results"
COMPILED = not simulated_replica.__file__.endswith(".py")
"""By bench.compiled, which runs this in less time."""
OFFERED = 1024
"""Episodes that want to be played at any time, on one GPU."""
LIMITS = (32, 48, 64, 80, 96, 128, 192, 256, 320, 512, 1024)
MAX_NEW_TOKENS = 3072

PARAMETERS = 7.6e9
KV_BYTES = 28 * 2 * 4 * 128 * 2
"""Of a token: 28 layers, keys and values, 4 heads of 128, bf16."""
BYTES_PER_S = 0.7 * 3.35e12
FLOPS = 0.5 * 989e12
SPEED = Speed(
    prefill_tokens_per_s=FLOPS / (2 * PARAMETERS),
    prefill_batch_s=0.01,
    step_s=2 * PARAMETERS / BYTES_PER_S + 0.002,
    step_request_s=2 * PARAMETERS / FLOPS,
    step_kv_s=KV_BYTES / BYTES_PER_S,
)
CAPACITIES = {f"{share:.0%} of the GPU": int((share * 80e9 - 2 * PARAMETERS) / KV_BYTES) for share in (0.85, 0.4)}
"""KV entries beside the weights: an engine that has the GPU to itself, and one that shares it with the learner [tokens]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    limit: int | None
    """None: the controller."""
    tokens_per_s: float
    episodes_per_s: float
    computed_again: float
    """Share of the prompt tokens computed that had been computed before."""
    in_flight: float
    """Mean over the time."""
    running: float
    """Requests the engines worked on, mean."""
    turns: int
    """Finished."""
    wall_s: float
    """That it took to simulate."""
    times_real_time: float
    """Simulated seconds in one of these."""


def traffic(median_response: int) -> Traffic:
    return Traffic(
        turns=uniform(1, 9),
        prompt_tokens=uniform(1200, 2001),
        response_tokens=lognormal(median_response, 0.7),
        max_new_tokens=MAX_NEW_TOKENS,
        output_tokens=lognormal(150, 0.8),
        tool_s=lognormal(0.8, 1.0),
    )


def simulate(
    kv_tokens: int, limit: int | None, seconds: int, *, replicas: int = 1, median_response: int = 300
) -> Result:
    """Play for so long, from the first prompt on. `kv_tokens` are those of each replica."""
    # figures leave no cycles, so there is nothing to collect before the world is dropped
    gc.disable()
    try:
        began = time.perf_counter()
        clock = EventClock()
        cluster = Cluster(clock, speed=SPEED, slots=OFFERED, kv_tokens=kv_tokens, replicas=replicas, forgets=False)
        # as a run makes it (rooms.py)
        admission = Admission(new_tokens=MAX_NEW_TOKENS // 4)
        gate = Gate(admission, clock) if limit is None else None
        agents = Agents(traffic(median_response), cluster, gate=gate)
        agents.start(limit or OFFERED)
        in_flight = 0
        for second in range(1, seconds + 1):
            clock.move_to(second)
            in_flight += limit or admission.num_in_flight
        load, wall_s = cluster.load(), time.perf_counter() - began
    finally:
        gc.enable()
    return Result(
        limit=limit,
        tokens_per_s=load.decoded_tokens / clock.now_s,
        episodes_per_s=agents.episodes / clock.now_s,
        computed_again=load.recomputed_tokens / load.prefill_tokens,
        in_flight=in_flight / clock.now_s,
        running=cluster.slot_s() / clock.now_s,
        turns=agents.turns,
        wall_s=wall_s,
        times_real_time=clock.now_s / wall_s,
    )


def show(name: str, kv_tokens: int, results: list[Result]) -> None:
    print(f"\n{name}: {kv_tokens:,} KV entries")
    print(
        f"{'in flight':>14} {'mean':>6} {'running':>8} {'tokens/s':>9} {'episodes/s':>11} {'computed again':>15} "
        f"{'x real time':>12}"
    )
    for r in results:
        limit = "kv" if r.limit is None else f"at most {r.limit}"
        print(
            f"{limit:>14} {r.in_flight:6.0f} {r.running:8.0f} {r.tokens_per_s:9,.0f} {r.episodes_per_s:11.2f} "
            f"{r.computed_again:15.1%} {r.times_real_time:12,.0f}"
        )


def draw(tables: dict[str, list[Result]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(tables), figsize=(10, 4), layout="constrained", squeeze=False)
    for axis, (name, results) in zip(axes[0], tables.items(), strict=True):
        fixed = [r for r in results if r.limit is not None]
        kv = results[-1]
        axis.plot([r.limit for r in fixed], [r.tokens_per_s for r in fixed], "o-", label="at most so many")
        axis.axhline(kv.tokens_per_s, color="C1", linestyle="--")
        axis.plot(kv.in_flight, kv.tokens_per_s, "s", color="C1", label="admission by KV cache")
        axis.set(xscale="log", xlabel="episodes in flight", title=f"engine with {name}", ylim=(0, None))
        # those between powers of two have no room
        axis.set_xticks(powers := [limit for limit in LIMITS if limit & (limit - 1) == 0], map(str, powers))
        axis.minorticks_off()
    axes[0][0].set_ylabel("tokens sampled a second (simulated)")
    axes[0][0].legend(loc="lower left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    end_like_ctrl_c()
    parser = argparse.ArgumentParser(prog="python -m bench.admission", description="Admission by KV cache, simulated.")
    parser.add_argument("--seconds", type=at_least(1), default=9600, help="simulated time of each row [s]")
    parser.add_argument("--median-response", type=at_least(1), default=300, help="its length, lognormal [tokens]")
    parser.add_argument(
        "--out", type=results_folder, default=RESULTS, help="folder for admission.json and admission.png"
    )
    args = parser.parse_args(argv)
    began, began_cpu = time.perf_counter(), time.process_time()
    print(machine())
    print(f"{args.seconds:,d} simulated seconds a row, {OFFERED} episodes offered")
    tables: dict[str, list[Result]] = {}
    for name, kv_tokens in CAPACITIES.items():
        tables[name] = [
            simulate(kv_tokens, limit, args.seconds, median_response=args.median_response) for limit in (*LIMITS, None)
        ]
        show(name, kv_tokens, tables[name])
    gains = {}
    for name, results in tables.items():
        *fixed, kv = results
        best = max(fixed, key=lambda r: r.tokens_per_s)
        gains[name] = {
            "best_fixed": best.limit,
            "over_best_fixed": round(kv.tokens_per_s / best.tokens_per_s, 3),
            "over_no_limit": round(kv.tokens_per_s / fixed[-1].tokens_per_s, 3),
            "over_worst_fixed": round(kv.tokens_per_s / min(r.tokens_per_s for r in fixed), 3),
        }
        print(f"\nengine with {name}: kv is {gains[name]['over_no_limit']:.2f}x of no limit ({OFFERED}), and ", end="")
        print(f"{gains[name]['over_best_fixed']:.2f}x of the best fixed one, {best.limit}")
    runs = [r for results in tables.values() for r in results]
    simulated_s, wall_s = args.seconds * len(runs), sum(r.wall_s for r in runs)
    print(
        f"\n{simulated_s:,.0f} simulated seconds in {wall_s:.1f} s: {simulated_s / wall_s:,.0f} times real time, "
        f"{sum(r.turns for r in runs) / wall_s:,.0f} turns a second"
    )
    result = {
        "bench": "admission",
        "machine": machine(),
        "compiled": COMPILED,
        "wall_s": round(time.perf_counter() - began, 1),
        "cpu_s": round(time.process_time() - began_cpu, 1),
        "simulated_s": args.seconds,
        "median_response_tokens": args.median_response,
        "times_real_time": round(simulated_s / wall_s, 1),
        "speed": asdict(SPEED),
        "kv_tokens": CAPACITIES,
        "gains": gains,
        "rows": {name: [asdict(r) for r in results] for name, results in tables.items()},
    }
    draw(tables, args.out / "admission.png")
    write(result, args.out, "admission.json", leave_out=("rows", "speed"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
