"""The transformers engine against transformers' own `generate`: same model, same prompts, same number of tokens.

    python -m bench.engine [--concurrency 16 64 256] [--new-tokens 96] [--threads 2] [--model-path DIR]

Both sample at temperature 1 from the full vocabulary; `generate` gets its prompts in one left-padded batch and stops
nobody early, which is its best case. The two take turns, and the best of `--rounds` counts. Next to wall-clock rates
stand tokens per CPU second, which say more when the machine is shared. `logprob_error` is the engine's largest
difference to a full forward. The last line is JSON.
"""

import argparse
import asyncio
import json
import platform
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from l0fast.config import EngineConfig
from l0fast.engine.base import Sampled, Sampling
from l0fast.engine.transformers import TransformersEngine, transformers_engine

Prompts = list[list[int]]


def random_policy(folder: Path) -> None:
    """The shape of the policies that ship, with random weights."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        vocab_size=1024,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")


async def engine_once(
    engine: TransformersEngine, prompts: Prompts, new_tokens: int, name: str
) -> tuple[float, float, list[Sampled]]:
    """Wall and CPU seconds, and what was sampled."""
    before, started = await engine.stats(), time.perf_counter()
    async with asyncio.TaskGroup() as tg:
        tasks = [
            tg.create_task(
                engine.generate(
                    prompt,
                    Sampling(max_new_tokens=new_tokens, stop_token_ids=(), seed=i),
                    conversation=f"{name} {i}",
                )
            )
            for i, prompt in enumerate(prompts)
        ]
    wall_s = time.perf_counter() - started
    return wall_s, (await engine.stats()).cpu_s - before.cpu_s, [t.result() for t in tasks]


def generate_once(model: Any, prompts: Prompts, new_tokens: int) -> tuple[float, float]:
    longest = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    started, cpu = time.perf_counter(), time.process_time()
    out = model.generate(
        ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=new_tokens, min_new_tokens=new_tokens
    )
    assert out.shape == (len(prompts), longest + new_tokens)
    return time.perf_counter() - started, time.process_time() - cpu


def logprob_error(model: Any, prompt: list[int], sampled: Sampled) -> float:
    logits = model(input_ids=torch.tensor([[*prompt, *sampled.response_ids]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(sampled.response_ids)[:, None])[:, 0]
    return float((expected - torch.tensor(sampled.sampler_logprobs)).abs().max())


async def compare(args: argparse.Namespace, folder: Path) -> list[dict[str, float]]:
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = EngineConfig(slots=max(args.concurrency), threads=args.threads)
    max_tokens = args.prompt_tokens[1] + args.new_tokens
    rows = []
    async with transformers_engine(config, folder, max_tokens=max_tokens) as engine:
        for concurrency in args.concurrency:
            ours, theirs, error = [], [], 0.0
            for round_ in range(args.rounds):
                # new prompts every round: what was cached helps nobody
                rng = random.Random(concurrency * 1000 + round_)
                prompts = [
                    [rng.randrange(model.config.vocab_size) for _ in range(rng.randint(*args.prompt_tokens))]
                    for _ in range(concurrency)
                ]
                *times, samples = await engine_once(engine, prompts, args.new_tokens, f"{concurrency} {round_}")
                ours.append(times)
                theirs.append(generate_once(model, prompts, args.new_tokens))
                error = max(error, *(logprob_error(model, p, s) for p, s in zip(prompts[:8], samples, strict=False)))
            tokens = concurrency * args.new_tokens
            rates = [tokens / min(times) for times in (*zip(*ours, strict=True), *zip(*theirs, strict=True))]
            rows.append(
                {
                    "concurrency": concurrency,
                    "engine_tokens_per_s": round(rates[0]),
                    "generate_tokens_per_s": round(rates[2]),
                    "ratio": round(rates[0] / rates[2], 2),
                    "engine_tokens_per_cpu_s": round(rates[1]),
                    "generate_tokens_per_cpu_s": round(rates[3]),
                    "cpu_ratio": round(rates[1] / rates[3], 2),
                    "logprob_error": float(f"{error:.2g}"),
                }
            )
            print("".join(f"{value!s:>28}" for value in rows[-1].values()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=[64, 160], metavar=("LEAST", "MOST"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--model-path", type=Path, help="default: random weights of the shipped policies' shape")
    args = parser.parse_args()
    machine = f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}"
    print(machine)
    with tempfile.TemporaryDirectory() as scratch:
        if args.model_path is None:
            random_policy(Path(scratch))
        rows = asyncio.run(compare(args, args.model_path or Path(scratch)))
    print(json.dumps({"bench": "engine", "machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
