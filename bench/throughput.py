"""Thousands of real agents on one loop beside a barrier, and beside the way L0 runs its agents, in one run.

    python -m bench.throughput [--sizes 256 1024 4096] [--sandbox process] [--results bench/results]
                                                       some 22 minutes, on two cores
    python -m bench.throughput --quick                 some 12 s, small: does it all work?
    python -m bench.throughput --soak MINUTES          one size for so long: memory, descriptors and tasks
    python -m bench.throughput --engine sglang --device cuda [RECIPE and flags of l0fast.run]
                                                       a recipe's own run on a GPU node: tokens/s, solved tasks/hour

What is played is in workload.py, how in swarm.py, L0's way in l0_style.py. A batch is 64 x 4 episodes at 256 agents and
grows with them; slots = agents / 2; the learner takes 30 % of the time full slots need to sample a batch. The engine's clock
is the loop's own, compressed: a loop that is late makes the engine late as many times as the constant says.

Of the largest size carry_over is played `--runs` times, and the run with the median p99 of lag counts. `..._full` is
carry_over with an engine that is faster than the host can follow: how many turns a second the host carries, and what one
costs where CPU is scarce. The last line is JSON: the largest size's figures on top, all of them under `sizes`.
`ratio_l0_style` and `cpu_ratio_l0_style` are over 1 where we are better: episodes per second ours / theirs, CPU a turn
theirs / ours; `..._without_asking` leaves out what L0's trainer spends on its polls.
"""

import argparse
import asyncio
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import asdict, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    # python bench/throughput.py puts bench/ on the path, not what holds it
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import uvloop

from bench.at_least import at_least, more_than_0
from bench.ending import end_like_ctrl_c
from bench.l0_style import Side, l0_style, ours
from bench.machine import machine
from bench.node_throughput import measure_node
from bench.probes import idle_loop, open_descriptors, rss_mb
from bench.results_folder import results_folder, write
from bench.swarm import LEARNER_SHARE, OPEN_STEPS, SPEED, STALENESS, Measured, NoSandbox, Swarm
from bench.workload import GROUP_SIZE, MODEL, Workload
from l0fast.agent.chat import Chat
from l0fast.config import SandboxConfig
from l0fast.engine.clock import CompressedClock
from l0fast.errors import L0fastError
from l0fast.sandbox import open_sandbox
from l0fast.tools.broker import Broker, open_broker

TURNS_PER_S = 16.0
"""About what the engine of 256 agents answers in a second of its own; others in proportion."""
HOST_TURNS_PER_S = 200.0
"""What `time_compression` is chosen for: turns in a second of the loop, so that each size has the same load on the host.

A loop that has more to do is woken for several events at once: with four times the load a turn takes a third less CPU.
"""
FULL = 32.0
"""Times that load: more than any host carries."""
L0_STEP_S = 0.01
"""Decode step beside L0's way, in real time: an engine with few requests is faster than a full one [s]."""


def compression(agents: int) -> float:
    return round(HOST_TURNS_PER_S / (TURNS_PER_S * agents / 256), 1)


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All of it, but the node's."""
    if options.l0_agents and not (shutil.which("bwrap") and all(map(find_spec, ("httpx", "ipykernel")))):
        # now, not when all else has been measured
        raise SystemExit(
            "L0's way needs bubblewrap (Debian: apt-get install bubblewrap) and pip install -e '.[bench]': install them, or "
            "leave it out with --l0-agents 0"
        )
    print(f"{machine()}; sandbox: {options.sandbox}")
    print(
        f"simulated engine: {SPEED.step_s * 1e3:g} ms a token, {SPEED.prefill_tokens_per_s:g} prompt tokens/s; learner "
        f"{LEARNER_SHARE:.0%} of generation; carry_over: {OPEN_STEPS} steps open, staleness {STALENESS}"
    )
    chat, sizes = Chat(MODEL), {}
    async with open_broker() as broker:
        # first, in a process that has not had thousands of agents: memory that they leave scattered costs more to use
        smallest = min(options.sizes)
        swarm = Swarm(
            smallest,
            NoSandbox(),
            broker,
            chat=chat,
            time_compression=options.time_compression or compression(smallest),
            marshal=False,
        )
        free = await swarm.play("carry_over", steps=2)
        progress(free)
        simulator_us = await swarm.simulator_us_per_turn(steps=2)
        swarm.time_compression *= FULL
        free_full = await swarm.play("carry_over", steps=24)
        progress(free_full)
        simulator_full_us = await swarm.simulator_us_per_turn(steps=8)
        for agents in options.sizes:
            runs = options.runs if agents == max(options.sizes) else 1
            sizes[str(agents)] = await size(agents, runs, options, chat, broker)
    top = sizes[str(max(options.sizes))]
    result = top | {
        "host_cpu_us_per_turn_without_sandbox": free.host_cpu_us_per_turn,
        "simulator_us_per_turn": simulator_us,
        "turns_per_s_full_without_sandbox": free_full.turns_per_s,
        "host_cpu_us_per_turn_full_without_sandbox": free_full.host_cpu_us_per_turn,
        "simulator_us_per_turn_full": simulator_full_us,
        "sizes": sizes,
    }
    if options.l0_agents:
        result |= await beside_l0(chat, options)
    return result | {
        "sandbox": options.sandbox,
        "machine": machine(),
        "group_size": GROUP_SIZE,
        "without_sandbox": asdict(free),
        "full_without_sandbox": asdict(free_full),
    }


async def size(agents: int, runs: int, options: argparse.Namespace, chat: Chat, broker: Broker) -> dict[str, Any]:
    """All modes with so many agents."""
    config = SandboxConfig(kind=options.sandbox, start_timeout_s=900.0)
    time_compression = options.time_compression or compression(agents)
    async with open_sandbox(config, max_sessions=agents, log=lambda line: None) as sandbox:
        swarm = Swarm(agents, sandbox, broker, chat=chat, time_compression=time_compression)
        carried: list[tuple[Measured, float]] = []
        for run in range(runs):
            with idle_loop() as idle:
                # a step more where figures of throughput are taken, which begin after the first one
                measured = await swarm.play("carry_over", steps=2 if run == 0 else 1)
            carried.append((measured, idle["loop/lag_max_ms"]))
            progress(measured)
        on_policy = await swarm.play("on_policy", steps=1)
        progress(on_policy)
        barrier = await swarm.play("barrier", steps=1)
        progress(barrier)
        swarm.time_compression *= FULL
        full = await swarm.play("carry_over", steps=1)
        progress(full)
    first = carried[0][0]
    by_lag = sorted(carried, key=lambda pair: pair[0].lag["lag_p99_ms"])
    median, idle_max_ms = by_lag[(len(by_lag) - 1) // 2]
    return {
        "agents": agents,
        "time_compression": time_compression,
        "peak_alive": first.peak_alive,
        "lost": sum(m.lost for m, _ in carried) + on_policy.lost + barrier.lost + full.lost,
        "episodes_per_s": first.episodes_per_s,
        "turns_per_s": first.turns_per_s,
        "host_cpu_us_per_turn": statistics.median(m.host_cpu_us_per_turn for m, _ in carried),
        **{f"loop_{name}": value for name, value in median.lag.items()},
        "idle_lag_max_ms": idle_max_ms,
        "engine_busy": first.engine_busy,
        "engine_busy_on_policy": on_policy.engine_busy,
        "engine_busy_barrier": barrier.engine_busy,
        "episodes_per_s_on_policy": on_policy.episodes_per_s,
        "episodes_per_s_barrier": barrier.episodes_per_s,
        "ratio_barrier": first.episodes_per_s / barrier.episodes_per_s,
        "rss_mb": max(m.rss_mb for m, _ in carried),
        "turns_per_s_full": full.turns_per_s,
        "host_cpu_us_per_turn_full": full.host_cpu_us_per_turn,
        "loop_lag_p99_ms_full": full.lag["lag_p99_ms"],
        "loop_lag_p999_ms_full": full.lag["lag_p999_ms"],
        "runs": [asdict(m) | {"idle_lag_max_ms": idle} for m, idle in carried]
        + [asdict(m) for m in (on_policy, barrier, full)],
    }


async def beside_l0(chat: Chat, options: argparse.Namespace) -> dict[str, Any]:
    """L0's way and ours, one after the other, each task once."""
    speed, compressed = replace(SPEED, step_s=L0_STEP_S), {"time_compression": options.l0_time_compression}
    tasks = Workload(chat, CompressedClock(1.0).sleep).tasks()
    tasks = list(islice(tasks, options.l0_agents))
    theirs = await l0_style(chat, tasks, speed, **compressed)
    mine = await ours(chat, tasks, speed, SandboxConfig(kind=options.sandbox), **compressed)
    print(f"L0's way, {len(tasks)} agents: {_side(theirs)}; ours: {_side(mine)}", file=sys.stderr)
    return {
        "ratio_l0_style": mine.episodes_per_s / theirs.episodes_per_s,
        "cpu_ratio_l0_style": theirs.cpu_us_per_turn / mine.cpu_us_per_turn,
        "cpu_ratio_l0_style_without_asking": (theirs.cpu_us_per_turn - theirs.asking_us_per_turn)
        / mine.cpu_us_per_turn,
        "l0_style": {
            "agents": len(tasks),
            "step_s": speed.step_s,
            **compressed,
            "theirs": asdict(theirs),
            "ours": asdict(mine),
        },
    }


def _side(side: Side) -> str:
    return f"{side.episode_s:.1f} s an episode, {side.cpu_us_per_turn:.0f} us of CPU a turn over {side.turns} turns"


async def soak(options: argparse.Namespace) -> dict[str, Any]:
    """One size for so long; figures of every half minute."""
    agents = max(options.sizes)
    samples: list[dict[str, float]] = []

    async def watch(began: float) -> None:
        while True:
            await asyncio.sleep(min(30.0, 2.0 * options.soak))
            samples.append(
                {
                    "s": round(time.perf_counter() - began),
                    "rss_mb": rss_mb(),
                    "descriptors": open_descriptors(),
                    "tasks": len(asyncio.all_tasks()),
                }
            )

    config = SandboxConfig(kind=options.sandbox, start_timeout_s=900.0)
    time_compression = options.time_compression or compression(agents)
    async with (
        open_broker() as broker,
        open_sandbox(config, max_sessions=agents, log=lambda line: None) as sandbox,
    ):
        before = {"rss_mb": rss_mb(), "descriptors": open_descriptors(), "tasks": len(asyncio.all_tasks())}
        swarm = Swarm(agents, sandbox, broker, chat=Chat(MODEL), time_compression=time_compression)
        watcher = asyncio.create_task(watch(time.perf_counter()))
        with idle_loop() as idle:
            measured = await swarm.play("carry_over", seconds=60 * options.soak)
        watcher.cancel()
        after = {"rss_mb": rss_mb(), "descriptors": open_descriptors(), "tasks": len(asyncio.all_tasks()) - 1}
    # memory has grown to what a run needs after the first third
    third = len(samples) // 3
    early, late = samples[third : 2 * third] or samples, samples[2 * third :] or samples
    flat = {
        f"{name}_late_over_early": statistics.mean(s[name] for s in late) / statistics.mean(s[name] for s in early)
        for name in ("rss_mb", "descriptors", "tasks")
    }
    return {
        "minutes": options.soak,
        "sandbox": options.sandbox,
        "machine": machine(),
        **asdict(measured),
        **flat,
        "idle_lag_max_ms": idle["loop/lag_max_ms"],
        "before": before,
        "after": after,
        "samples": samples[:: max(1, len(samples) // 40)],
    }


def progress(m: Measured) -> None:
    print(
        f"{m.agents} agents, {m.mode}, {m.steps} step(s), clock x {m.time_compression:g}: {m.wall_s:.0f} s, "
        f"{m.episodes_per_s:.1f} episodes/s, {m.turns_per_s:.0f} turns/s, {m.host_cpu_us_per_turn:.0f} us a turn, engine "
        f"{m.engine_busy:.0%} busy, lag p99 {m.lag['lag_p99_ms']:.1f} p99.9 {m.lag['lag_p999_ms']:.1f} max "
        f"{m.lag['lag_max_ms']:.0f} ms, {m.peak_alive} alive, {m.lost} lost"
        + (f"; {m.blocked_by}" if m.blocked_by else ""),
        file=sys.stderr,
    )


ROWS = (
    "time_compression peak_alive lost episodes_per_s turns_per_s host_cpu_us_per_turn loop_lag_p50_ms loop_lag_p99_ms "
    "loop_lag_p999_ms loop_lag_max_ms idle_lag_max_ms engine_busy engine_busy_on_policy engine_busy_barrier ratio_barrier "
    "rss_mb turns_per_s_full host_cpu_us_per_turn_full loop_lag_p99_ms_full loop_lag_p999_ms_full"
).split()


def show(result: dict[str, Any]) -> None:
    sizes = result["sizes"]
    print("| agents | " + " | ".join(sizes) + " |\n|" + "---|" * (len(sizes) + 1))
    for row in ROWS:
        print(f"| {row} | " + " | ".join(f"{of_size[row]:.4g}" for of_size in sizes.values()) + " |")
    print(
        f"without a sandbox: {result['host_cpu_us_per_turn_without_sandbox']:.0f} us of host CPU a turn; simulated engine, "
        f"policy and tool by themselves: {result['simulator_us_per_turn']:.0f} us, which no run has; with all that the loop "
        f"carries, {result['turns_per_s_full_without_sandbox']:.0f} turns/s: "
        f"{result['host_cpu_us_per_turn_full_without_sandbox']:.0f} us and {result['simulator_us_per_turn_full']:.0f} us"
    )
    if "l0_style" in result:
        print(
            f"beside L0's way, {result['l0_style']['agents']} agents, {1 / result['l0_style']['step_s']:g} tokens/s: "
            f"{result['ratio_l0_style']:.3f} times its episodes/s, CPU a turn 1/{result['cpu_ratio_l0_style']:.1f} of its, "
            f"1/{result['cpu_ratio_l0_style_without_asking']:.1f} if its trainer asked for nothing"
        )


def main() -> None:
    end_like_ctrl_c()
    parser = argparse.ArgumentParser(prog="python -m bench.throughput", description="Agents on one loop, measured.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 4096], help="agents alive at once")
    parser.add_argument(
        "--runs", type=at_least(1), default=3, help="of carry_over at the largest size; the median p99 counts"
    )
    parser.add_argument("--sandbox", choices=("process", "bwrap", "docker"), default="process")
    parser.add_argument(
        "--time-compression", type=more_than_0, help="for all sizes; by default the host's load is the same"
    )
    parser.add_argument(
        "--l0-agents", type=at_least(0), default=32, help="of L0's way and ours beside it; 0 leaves it out"
    )
    parser.set_defaults(l0_time_compression=1.0)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="some 12 s: 32 agents; two of L0's, whose engine and tools are compressed too",
    )
    parser.add_argument(
        "--soak", type=more_than_0, metavar="MINUTES", help="the largest size for so long, and nothing else"
    )
    parser.add_argument("--results", type=results_folder, help="folder for throughput.json or throughput_soak.json")
    parser.add_argument(
        "--engine",
        choices=("simulated", "sglang", "transformers"),
        default="simulated",
        help="a real one plays a recipe",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="refuse another one for a real engine and its learner; default: what is here",
    )
    parser.add_argument(
        "--steps", type=at_least(1), default=5, help="optimizer steps measured with a real engine, after one more"
    )
    options, words = parser.parse_known_args()
    if options.engine != "simulated":
        try:
            result = measure_node(options.engine, options.device, options.steps, words)
        except L0fastError as e:
            raise SystemExit(f"bench.throughput: {e}") from e
        for name, value in result.items():
            print(f"| {name} | {value:.4g} |" if isinstance(value, float) else f"| {name} | {value} |")
        write(result, options.results, "throughput_node.json")
        return
    if words:
        parser.error(f"unknown words {words}: recipes and their flags go with --engine sglang or transformers")
    if any(agents < 8 or agents % 8 or (agents > 128 and agents % 128) for agents in options.sizes):
        parser.error(
            f"--sizes {options.sizes}: give multiples of 8 up to 128, and of 128 above, so that groups and slots divide them"
        )
    if options.quick:
        options.sizes, options.runs, options.time_compression = [32], 1, 100.0
        options.l0_agents, options.l0_time_compression = 2, 50.0
    work: Callable[[argparse.Namespace], Coroutine[Any, Any, dict[str, Any]]] = soak if options.soak else measure
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            result = runner.run(work(options))
    except L0fastError as e:
        raise SystemExit(f"bench.throughput: {e}") from e
    if not options.soak:
        show(result)
    write(result, options.results, "throughput_soak.json" if options.soak else "throughput.json")


if __name__ == "__main__":
    main()
