"""What merging turns and sharing prefixes save the learner, that neither changes a gradient, and that the loop stays free.

    python -m bench.learner [--rounds 3] [--threads N] [--results bench/results]
    python -m bench.learner --plan RECIPE --gpus 8 --gpu-memory-gb 80 [--model NAME] [--section.key VALUE ...]

Three layouts of the same episodes (bench/traces.py) through the same tiny random model:

    per turn   a row for each turn: its prompt, its response
    merged     a row for each stretch of turns between trims (l0fast/segments.py)
    packed     those, with what the rows of a pack have in common laid out once (learner/packing.py)

Tokens are those of the whole mix; CPU seconds of forward and backward those of its groups of four, one for each length of
output, medians of rounds in which the layouts take turns. Gradients of the token mean are compared parameter by parameter: between the
layouts, and between one rank and two, whose gradients are read from a checkpoint after one step (AdamW's first moment, with
a beta of 0). Loop lag is how late an event loop wakes while learners of one and two ranks train, and with nothing to do.
On a CPU shared prefixes save tokens rather than time: attention takes most of it, and its pairs stay.

With --plan nothing is run: memory, FLOPs and seconds of a step by arithmetic (learner/cost.py); exit code 1 and one sentence
where it does not fit. The last line of a measurement is JSON.
"""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from bench.at_least import at_least, more_than_0
from bench.ending import end_like_ctrl_c
from bench.machine import machine
from bench.plan import run_plan
from bench.results_folder import results_folder, write
from bench.traces import GROUP_SIZES, runs
from l0fast.config import LearnerConfig, RunConfig
from l0fast.ipc import shared_weights
from l0fast.learner.client import batch_advantages, learner
from l0fast.learner.cost import GIB, Rates
from l0fast.learner.packing import Pack, pack_rows, row_of
from l0fast.loop_lag import LoopLag
from l0fast.segments import segments_of
from l0fast.types import Group, Segment, Span, Trajectory

VOCABULARY = 256
BUDGET = 32_768
"""Of a pack [tokens]."""
IDLE_S = 4.0
"""Time an idle loop is watched [s]."""

Gradients = dict[str, np.ndarray]


# -- layouts


def turns_of(trajectory: Trajectory) -> list[Segment]:
    """A row a turn."""
    return [
        Segment(turn.prompt_ids + turn.response_ids, (Span(len(turn.prompt_ids), len(turn.response_ids), t),))
        for t, turn in enumerate(trajectory.turns)
    ]


LAYOUTS: dict[str, tuple[Callable[[Trajectory], list[Segment]], bool]] = {
    "per_turn": (turns_of, False),
    "merged": (segments_of, False),
    "packed": (segments_of, True),
}
"""How episodes become rows, and whether prefixes are shared."""


def packs_of(groups: Sequence[Group], layout: str, config: RunConfig) -> list[Pack]:
    segments, share = LAYOUTS[layout]
    rows = [
        [
            row_of(segment, t, a)
            for t, a in zip(group.trajectories, per_trajectory, strict=True)
            for segment in segments(t)
        ]
        for group, per_trajectory in zip(groups, batch_advantages(groups, config, 1), strict=True)
    ]
    return pack_rows(rows, BUDGET, share_prefixes=share)


def count_tokens(seed: int, config: RunConfig) -> dict[str, int]:
    """Of the mix, by layout. Per-turn rows are counted without being made."""
    tokens = dict.fromkeys(LAYOUTS, 0)
    for groups in runs(VOCABULARY, seed, groups_per_run=2):
        turns = [turn for group in groups for t in group.trajectories for turn in t.turns]
        tokens["per_turn"] += sum(len(turn.prompt_ids) + len(turn.response_ids) for turn in turns)
        for layout in ("merged", "packed"):
            tokens[layout] += sum(pack.num_tokens for pack in packs_of(groups, layout, config))
    return tokens


# -- time and gradients, in this process


def save_random_model(folder: Path) -> None:
    """Two layers in which attention has the share of FLOPs it has in Qwen3-0.6B; far from uniform, so that a mistake shows."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=65_536,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")


def passes(
    groups: Sequence[Group], model_path: Path, config: RunConfig, rounds: int, threads: int
) -> tuple[dict[str, list[float]], dict[str, Gradients]]:
    """CPU seconds of each round and gradients of the mean, by layout."""
    import torch

    from l0fast.learner.policy_model import PolicyModel

    torch.set_num_threads(threads)
    policy = PolicyModel(model_path, config.learner, num_steps=1, temperature=1.0)
    packs = {layout: packs_of(groups, layout, config) for layout in LAYOUTS}
    seconds: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    gradients: dict[str, Gradients] = {}
    for round_ in range(rounds):
        for layout in LAYOUTS:
            began = time.process_time()
            policy.accumulate(packs[layout])
            seconds[layout].append(time.process_time() - began)
            count = sum(len(pack.predictors) for pack in packs[layout])
            gradients[layout] = {name: p.grad.numpy() / count for name, p in policy.trained.items()}  # pyright: ignore[reportOptionalMemberAccess]
            policy.optimizer.zero_grad()
            print(f"round {round_ + 1}: {layout} {seconds[layout][-1]:.1f} CPU s", file=sys.stderr, flush=True)
    return seconds, gradients


def difference(a: Gradients, b: Gradients) -> tuple[float, float]:
    """Largest |dg| of any number, and largest ||dg|| / ||g|| of any parameter."""
    assert a.keys() == b.keys()
    return (
        max(float(np.abs(a[name] - b[name]).max()) for name in a),
        max(float(np.linalg.norm(a[name] - b[name]) / np.linalg.norm(a[name])) for name in a),
    )


# -- ranks


async def train(
    groups: Sequence[Group], model_path: Path, config: RunConfig, folder: Path, lag: LoopLag
) -> dict[str, Any]:
    """Metrics of one step, after which the state is saved in `folder`; lag is recorded while the ranks work."""
    with shared_weights(model_path) as weights:
        async with learner(config, model_path, weights=weights, log_dir=None) as client:
            watch = asyncio.create_task(lag.run())
            try:
                metrics = await client.step(groups, batch_advantages(groups, config, 1), 1)
                await client.save_checkpoint(folder, {})
                return metrics
            finally:
                watch.cancel()


async def watch_idle() -> LoopLag:
    lag = LoopLag()
    watch = asyncio.create_task(lag.run())
    await asyncio.sleep(IDLE_S)
    watch.cancel()
    return lag


def saved_gradients(folder: Path) -> Gradients:
    """The first moments of a checkpoint: gradients, where beta is 0 and one step was taken."""
    from l0fast.learner.checkpoint import read_tensors

    moment = "/exp_avg"
    saved = read_tensors(folder, "optimizer/")
    return {name.removesuffix(moment): tensor.numpy() for name, tensor in saved.items() if name.endswith(moment)}


# -- all of it


def measure(options: argparse.Namespace) -> dict[str, Any]:
    config = RunConfig(
        learner=LearnerConfig(
            kl_coef=0.0,
            betas=(0.0, 0.95),
            grad_clip=1e9,
            warmup_steps=0,
            pack_tokens=BUDGET,
            mismatch_stop=0,
            mismatch_warn=0,
        )
    )
    tokens = count_tokens(options.seed, config)
    fours = [groups[0] for groups in runs(VOCABULARY, options.seed, 1) if len(groups[0].trajectories) == GROUP_SIZES[0]]
    with tempfile.TemporaryDirectory(prefix="l0fast-bench-") as scratch:
        model_path = Path(scratch, "model")
        save_random_model(model_path)
        seconds, gradients = passes(fours, model_path, config, options.rounds, options.threads)
        lags = {"idle": asyncio.run(watch_idle())}
        metrics = {}
        for ranks in (1, 2):
            # more packs than ranks, and not a multiple
            settings = config.learner.model_copy(update={"ranks": ranks, "threads": 1, "pack_tokens": BUDGET // 2})
            of_ranks = config.model_copy(update={"learner": settings})
            name, folder = f"{ranks}_rank{'s' * (ranks > 1)}", Path(scratch, f"checkpoint_{ranks}")
            lags[name] = LoopLag()
            metrics[name] = asyncio.run(train(fours, model_path, of_ranks, folder, lags[name]))
            gradients[name] = saved_gradients(folder)
    cpu_s = {layout: statistics.median(values) for layout, values in seconds.items()}
    pairs = {f"{a} {b}": difference(gradients[a], gradients[b]) for a, b in combinations(gradients, 2)}
    lag_ms = {name: lag.take_run() for name, lag in lags.items()}
    return {
        "bench": "learner",
        "machine": machine(),
        "tokens_ratio_merged": tokens["per_turn"] / tokens["merged"],
        "tokens_ratio_packed": tokens["per_turn"] / tokens["packed"],
        "time_ratio_merged": cpu_s["per_turn"] / cpu_s["merged"],
        "time_ratio_packed": cpu_s["per_turn"] / cpu_s["packed"],
        "max_abs_grad_diff": max(largest for largest, _ in pairs.values()),
        "max_rel_grad_diff": max(relative for _, relative in pairs.values()),
        "loop_lag_p99_ms": max(lag["loop/lag_p99_ms"] for name, lag in lag_ms.items() if name != "idle"),
        "loop_lag_idle_p99_ms": lag_ms["idle"]["loop/lag_p99_ms"],
        "tokens": tokens,
        "cpu_s": cpu_s,
        "grad_diff": pairs,
        "loop_lag_ms": lag_ms,
        "ranks": {
            name: {key: m[key] for key in ("packs", "tokens", "forward_backward_s", "optimizer_s", "pack_s", "step_s")}
            for name, m in metrics.items()
        },
    }


def show(result: dict[str, Any]) -> None:
    print(result["machine"])
    print(f"\n| {'layout':<10} | {'tokens of the mix':>17} | {'ratio':>5} | {'CPU s':>6} | {'ratio':>5} |")
    print("|---|---|---|---|---|")
    for layout, n in result["tokens"].items():
        cpu = result["cpu_s"][layout]
        ratios = result["tokens"]["per_turn"] / n, result["cpu_s"]["per_turn"] / cpu
        print(f"| {layout:<10} | {n:>17,} | {ratios[0]:>5.2f} | {cpu:>6.1f} | {ratios[1]:>5.2f} |")
    print(f"\n| {'gradients':<20} | {'max abs':>8} | {'max rel':>8} |\n|---|---|---|")
    for pair, (largest, relative) in result["grad_diff"].items():
        print(f"| {pair:<20} | {largest:>8.1e} | {relative:>8.1e} |")
    print(f"\n| {'loop lag [ms]':<14} | {'p50':>6} | {'p99':>6} | {'max':>6} |\n|---|---|---|---|")
    for name, lag in result["loop_lag_ms"].items():
        print(f"| {name:<14} | " + " | ".join(f"{lag[f'loop/lag_{q}_ms']:>6.2f}" for q in ("p50", "p99", "max")) + " |")
    print()


def main() -> int:
    end_like_ctrl_c()
    parser = argparse.ArgumentParser(
        prog="python -m bench.learner", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument(
        "--threads", type=at_least(1), default=len(os.sched_getaffinity(0)), help="OpenMP threads of the passes"
    )
    parser.add_argument("--results", type=results_folder, metavar="DIR", help="folder for learner.json")
    plan = parser.add_argument_group("--plan", "further flags are settings, as python -m l0fast.run takes them")
    plan.add_argument("--plan", metavar="RECIPE", help="name of a recipe, or a TOML file")
    plan.add_argument("--model", metavar="NAME", help="a model folder, a config.json or e.g. Qwen3-4B; the recipe's")
    plan.add_argument("--gpus", type=at_least(1), default=8)
    plan.add_argument("--gpu-memory-gb", type=more_than_0, default=80.0, help="of each, as on its label [GiB]")
    plan.add_argument("--tokens", type=more_than_0, help="mean of an episode, where known [tokens]")
    plan.add_argument("--sampled", type=more_than_0, help="sampled ones among them [tokens]")
    plan.add_argument(
        "--tflops", type=more_than_0, default=Rates().tflops, help="of a GPU in a whole step, where measured"
    )
    options, flags = parser.parse_known_args()
    if options.plan:
        return run_plan(
            options.plan,
            flags,
            options.model,
            gpus=options.gpus,
            gpu_memory_bytes=options.gpu_memory_gb * GIB,
            rates=Rates(tflops=options.tflops),
            tokens=options.tokens,
            sampled=options.sampled,
        )
    if flags:
        parser.error(f"{flags[0]} is a setting of a run, which goes with --plan alone")
    # idle OpenMP threads sleep: spinning would count as work. Read once, when torch is loaded
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    result = measure(options)
    show(result)
    write(result, options.results, "learner.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
