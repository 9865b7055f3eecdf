"""One GPU, everything on it: SGLang in this process and the learner beside it, real RL steps on a random-weight model.

    python -m bench.colocated [--device cuda|cpu] [--weights ipc|host] [--layout resident|sleep] [--seconds 120] [--steps 40]
                              [--layers 28] [--lr 1e-4]

    episodes x engine -> groups -> learner -> buckets of weights, read where they lie (CUDA IPC) -> engine -> next episodes

There is no tokenizer and no task: prompts and what comes after each turn are random ids, and the reward is the share of
even ids among those sampled. A random model can learn that: as a trained model's do, its embeddings tell the two kinds
apart, along one direction, and the policy has to find it. So the reward must rise from 0.5, and the log-probs of sampler
and learner must agree after every update (`mismatch`); where either fails, nothing else here is worth reading.

The model has Qwen3-0.6B's shape on a GPU (vocabulary 151,936) and is tiny on a CPU, where weights go through shared
memory and SGLang's GPU packages may be stand-ins: PYTHONPATH=tests/engine/sglang_cpu. The last line is JSON.
"""

import argparse
import asyncio
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import torch
import uvloop
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from bench.at_least import at_least, more_than_0
from bench.ending import end_like_ctrl_c
from bench.machine import machine
from bench.results_folder import results_folder, write
from l0fast.config import AgentConfig, EngineConfig, LearnerConfig, RolloutConfig, RunConfig
from l0fast.engine.base import Sampling
from l0fast.engine.buckets import HostWeights, RankWeights
from l0fast.engine.fleet import Fleet
from l0fast.engine.sglang import sglang_fleet
from l0fast.errors import UsageError
from l0fast.ids import Ids
from l0fast.ipc import shared_weights
from l0fast.learner.client import batch_advantages, learner
from l0fast.types import Group, Task, Trajectory, TrajectoryStatus, Turn

TELLING_SHARE = 0.25
"""How far even and odd ids' embeddings are apart along one direction, in their standard deviations."""
SGLANG_ON_A_BARE_GPU = ('attention_backend="triton"', 'sampling_backend="pytorch"')
"""Kernels that need no package beside Triton."""


def random_policy(folder: Path, *, layers: int, on_gpu: bool) -> Qwen3Config:
    """A model folder: Qwen3 with random weights, and embeddings that tell even ids from odd ones."""
    config = Qwen3Config(
        vocab_size=151_936 if on_gpu else 512,
        hidden_size=1024 if on_gpu else 64,
        intermediate_size=3072 if on_gpu else 128,
        num_hidden_layers=layers,
        num_attention_heads=16 if on_gpu else 4,
        num_key_value_heads=8 if on_gpu else 2,
        head_dim=128 if on_gpu else 16,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        architectures=["Qwen3ForCausalLM"],
    )
    dtype, std = (torch.bfloat16, 0.03) if on_gpu else (torch.float32, 0.08)
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Qwen3ForCausalLM(config).named_parameters()}
    tensors = {}
    for name, shape in shapes.items():
        tensor = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * std
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            # what each layer adds is small, as in a trained model; else rounding grows from layer to layer
            tensor /= (2 * layers) ** 0.5
        if name.endswith("embed_tokens.weight"):
            direction = torch.randn(shape[1], generator=generator).sign() * TELLING_SHARE * std
            tensor[0::2] += direction
            tensor[1::2] -= direction
        tensors[name] = tensor.to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.dtype = dtype
    config.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return config


class World:
    """Episodes without a task: random prompts and observations, and a reward that can be checked."""

    def __init__(self, engine: Fleet, config: RunConfig, vocab_size: int, prompt_tokens: int, seed: int):
        self._engine, self._config, self._vocab_size, self._prompt_tokens = engine, config, vocab_size, prompt_tokens
        self._seed = seed
        self.prompt_ids = self.cached_ids = 0
        """Of second and later turns, since the last look."""

    async def groups(self, step: int) -> list[Group]:
        rollout = self._config.rollout
        async with asyncio.TaskGroup() as tg:
            playing = [
                [tg.create_task(self._episode(step, g, i)) for i in range(rollout.group_size)]
                for g in range(rollout.groups_per_step)
            ]
        return [
            Group(task=tasks[0].result().task, trajectories=tuple(t.result() for t in tasks), number=g)
            for g, tasks in enumerate(playing)
        ]

    async def _episode(self, step: int, group: int, index: int) -> Trajectory:
        name = f"{step}/{group}"
        of_group = random.Random(f"{self._seed}/{name}")
        of_episode = random.Random(f"{self._seed}/{name}/{index}")
        prompt = Ids(self._ids(of_group, self._prompt_tokens))
        turns: list[Turn] = []
        for _ in range(self._config.rollout.max_turns):
            limit = of_episode.randint(self._config.agent.max_new_tokens // 2, self._config.agent.max_new_tokens)
            sampling = Sampling(max_new_tokens=limit, stop_token_ids=())
            sampled = await self._engine.generate(prompt, sampling, conversation=f"{name}/{index}")
            turns.append(
                Turn(
                    prompt_ids=prompt,
                    response_ids=sampled.response_ids,
                    sampler_logprobs=sampled.sampler_logprobs,
                    finish_reason=sampled.finish_reason,
                    policy_version=sampled.policy_version,
                    text="",
                    output="",
                    well_formed=True,
                )
            )
            if len(turns) > 1:
                self.prompt_ids += len(prompt)
                self.cached_ids += sampled.cached_tokens
            prompt = prompt + sampled.response_ids + self._ids(of_episode, self._prompt_tokens // 4)
        self._engine.forget(f"{name}/{index}")
        sampled_ids = [token for turn in turns for token in turn.response_ids]
        share = sum(token % 2 == 0 for token in sampled_ids) / len(sampled_ids)
        return Trajectory(
            task=Task(id=name, question="", answers=()),
            index=index,
            status=TrajectoryStatus.COMPLETED,
            turns=tuple(turns),
            rewards=(*[0.0] * (len(turns) - 1), share),
        )

    def _ids(self, rng: random.Random, mean: int) -> list[int]:
        return [rng.randrange(self._vocab_size) for _ in range(rng.randint(mean // 2, mean + mean // 2))]

    def cached_share(self) -> float:
        share = self.cached_ids / max(1, self.prompt_ids)
        self.prompt_ids = self.cached_ids = 0
        return share


def _config(options: argparse.Namespace) -> RunConfig:
    on_gpu = options.device == "cuda"
    return RunConfig(
        num_steps=options.steps,
        seed=options.seed,
        agent=AgentConfig(context_tokens=2048 if on_gpu else 512, max_new_tokens=options.new_tokens),
        rollout=RolloutConfig(
            group_size=8, groups_per_step=options.groups, max_open_groups=options.groups, max_turns=options.turns
        ),
        engine=EngineConfig(
            slots=256 if on_gpu else 64,
            start_timeout_s=300,
            layout=options.layout,
            sglang=(*(SGLANG_ON_A_BARE_GPU if on_gpu else ()), *options.sglang),
        ),
        learner=LearnerConfig(
            advantage="group",
            lr=options.lr,
            warmup_steps=0,
            final_lr_ratio=1.0,
            kl_coef=0.0,
            pack_tokens=16_384 if on_gpu else 4096,
            # measured here, not judged
            mismatch_warn=0.0,
            mismatch_stop=0.0,
            start_timeout_s=300,
        ),
    )


async def colocated(options: argparse.Namespace, folder: Path, stack: AsyncExitStack) -> dict[str, Any]:
    began = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - began:6.1f} s] {text}", flush=True)

    on_gpu = options.device == "cuda"
    model = random_policy(folder, layers=options.layers or (28 if on_gpu else 2), on_gpu=on_gpu)
    say(f"a model of {(folder / 'model.safetensors').stat().st_size / 2**20:.0f} MiB in {folder}")
    config = _config(options)
    weights = None if options.weights == "ipc" else stack.enter_context(shared_weights(folder))
    client = await stack.enter_async_context(learner(config, folder, weights=weights, log_dir=folder))
    say(f"the learner is up: {client.parameters / 1e6:.0f} M parameters on {client.device}")
    engine = await stack.enter_async_context(
        sglang_fleet(
            config.engine,
            folder,
            max_tokens=config.agent.context_tokens,
            source=HostWeights(weights, dtype="bfloat16" if on_gpu else "float32")
            if weights
            else RankWeights(client, make_room=options.layout == "sleep"),
            log=say,
        )
    )
    say(f"SGLang is up: {await engine.load()}")

    # the same weights once more: what SGLang samples from then on, the learner must know
    clock = time.perf_counter()
    await engine.update_weights(0)
    say(f"first update of weights, imports included: {time.perf_counter() - clock:.2f} s")
    world = World(engine, config, model.vocab_size, options.prompt_tokens, options.seed)
    steps: list[dict[str, float]] = []
    for step in range(1, options.steps + 1):
        t0 = time.perf_counter()
        groups = await world.groups(step)
        t1 = time.perf_counter()
        if options.layout == "sleep":
            await engine.sleep()
            if on_gpu and step == 1:
                say(f"asleep: {gpu()}")
        t2 = time.perf_counter()
        learned = await client.step(groups, batch_advantages(groups, config, step), step)
        t3 = time.perf_counter()
        await engine.update_weights(step)
        t4 = time.perf_counter()
        rewards = [t.reward for group in groups for t in group.trajectories]
        sampled = sum(len(turn.response_ids) for group in groups for t in group.trajectories for turn in t.turns)
        steps.append(
            {
                "reward": statistics.mean(rewards),
                **{name: learned[name] for name in ("mismatch_k3", "mismatch_max", "entropy", "grad_norm", "loss")},
                "generate_s": t1 - t0,
                "sleep_s": t2 - t1,
                "learn_s": t3 - t2,
                "sync_s": t4 - t3,
                "sampled_tokens": sampled,
                "learned_tokens": learned["tokens"],
                "cached_share": world.cached_share(),
            }
        )
        say(
            "step {step}: reward {reward:.4f}, mismatch k3 {mismatch_k3:.1e} max {mismatch_max:.2f}, entropy {entropy:.2f}, "
            "gradient {grad_norm:.2f}; generate {generate_s:.2f} s ({gen:.0f} tok/s, {cached_share:.0%} of later prompts cached), "
            "sleep {sleep_s:.3f} s, learn {learn_s:.2f} s ({learn:.0f} tok/s), sync {sync_s:.3f} s".format(
                step=step, gen=sampled / (t1 - t0), learn=learned["tokens"] / (t3 - t2), **steps[-1]
            )
        )
        if time.perf_counter() - began > options.seconds:
            say(f"{options.seconds:g} s are over")
            break
    last = len(steps) + 1
    groups = await world.groups(last)
    await client.step(groups, batch_advantages(groups, config, last), last)
    in_flight = await update_in_flight(engine, model.vocab_size, last)
    say(f"an update with requests in flight: {in_flight}")
    return summary(steps, options) | {"in_flight": in_flight, "seconds": time.perf_counter() - began}


async def update_in_flight(engine: Fleet, vocab_size: int, version: int) -> dict[str, Any]:
    """New weights come while 16 long responses are sampled: what it costs, and who sampled what."""
    rng = random.Random(0)
    prompts = [[rng.randrange(vocab_size) for _ in range(64)] for _ in range(16)]
    sampling = Sampling(max_new_tokens=400, stop_token_ids=())
    async with asyncio.TaskGroup() as tg:
        playing = [tg.create_task(engine.generate(p, sampling, conversation="in flight")) for p in prompts]
        await asyncio.sleep(0.5)
        began = time.perf_counter()
        await engine.update_weights(version)
        update_s = time.perf_counter() - began
    sampled = [task.result() for task in playing]
    return {
        "update_s": update_s,
        "tokens": sum(len(s.response_ids) for s in sampled),
        "across": sum(len(s.version_spans) == 2 for s in sampled),
        "first_cut": [s.version_spans[0].end for s in sampled[:4]],
    }


def summary(steps: list[dict[str, float]], options: argparse.Namespace) -> dict[str, Any]:
    # the first steps compile and warm up
    steady = steps[len(steps) // 4 :]

    def mean(name: str) -> float:
        return statistics.mean(step[name] for step in steady)

    return {
        "machine": machine(),
        "gpu": gpu() if options.device == "cuda" else None,
        "steps": len(steps),
        "reward_first": statistics.mean(step["reward"] for step in steps[:3]),
        "reward_last": statistics.mean(step["reward"] for step in steps[-3:]),
        "mismatch_k3": mean("mismatch_k3"),
        "mismatch_k3_worst": max(step["mismatch_k3"] for step in steps),
        "generate_s": mean("generate_s"),
        "sleep_s": mean("sleep_s"),
        "learn_s": mean("learn_s"),
        "sync_s": mean("sync_s"),
        "generate_tokens_per_s": sum(s["sampled_tokens"] for s in steady) / sum(s["generate_s"] for s in steady),
        "learn_tokens_per_s": sum(s["learned_tokens"] for s in steady) / sum(s["learn_s"] for s in steady),
        "cached_share": mean("cached_share"),
        "settings": {name: value for name, value in vars(options).items() if name != "results"},
        "curve": [round(step["reward"], 4) for step in steps],
    }


def gpu() -> str:
    command = ["nvidia-smi", "--query-gpu=name,memory.used,memory.total,driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


async def run(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="l0fast-colocated-") as name:
        folder = Path(name)
        try:
            async with asyncio.timeout(options.seconds + 400), AsyncExitStack() as stack:
                return await colocated(options, folder, stack)
        except BaseException:
            with suppress(FileNotFoundError):
                print((folder / "learner.log").read_text()[-6000:], file=sys.stderr, flush=True)
            raise


def main() -> None:
    end_like_ctrl_c()
    parser = argparse.ArgumentParser(prog="python -m bench.colocated", description="Real RL steps on one GPU.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--weights", choices=["ipc", "host"], help="how they get to SGLang; ipc on a GPU, host on a CPU"
    )
    parser.add_argument("--layout", choices=["resident", "sleep"], default="resident", help="while the learner works")
    parser.add_argument("--seconds", type=more_than_0, default=120.0, help="no step begins after this, start included")
    parser.add_argument("--steps", type=at_least(1), default=40)
    parser.add_argument("--groups", type=at_least(1), default=16, help="of 8 episodes each, a step")
    parser.add_argument("--turns", type=at_least(1), default=3)
    parser.add_argument("--new-tokens", type=at_least(2), default=64, help="at most, a turn; at least half of it")
    parser.add_argument(
        "--prompt-tokens", type=at_least(2), default=128, help="on average; a quarter of it after each turn"
    )
    parser.add_argument("--layers", type=at_least(0), default=0, help="0: 28 on a GPU, 2 on a CPU")
    parser.add_argument("--lr", type=more_than_0, default=1e-4)
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--sglang", nargs="*", default=[], help="further arguments of sglang.Engine, name=JSON")
    parser.add_argument("--results", type=results_folder, help="folder for colocated.json")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU that it can use")
    options.weights = options.weights or ("ipc" if options.device == "cuda" else "host")
    try:
        result = uvloop.run(run(options))
    except UsageError as e:
        sys.exit(f"l0fast: {e}")
    write(result, options.results, "colocated.json")


if __name__ == "__main__":
    main()
