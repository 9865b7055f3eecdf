"""The transformers engine beside other ways to sample from the same model, in one run, taking turns.

    python -m bench.engine [--concurrency 1 16 64 256] [--rounds 3] [--threads N] [--device cpu] [--results bench/results]

    engine      engine/transformers.py, through its protocol: token ids to a child process and back
    generate    transformers' `generate` in its best case: one left-padded batch, everybody samples equally many tokens and
                nobody stops early, dynamic or static cache, whichever is faster here; nothing is compiled
    batching    transformers' continuous batching, its cache sized to the requests: on a CPU its own guess is most of the memory
    sglang      the real SGLang through engine/sglang.py, where it can be imported; without a GPU its CPU mode, on the threads
                of --sglang-threads, one being its best for small models

All sample at temperature 1 from the full vocabulary, new prompts every round. Rates are medians over rounds, `ratio` is
generate's median time over this one's. Next to wall-clock rates stand tokens per CPU second of all processes involved, which
say more when the machine is shared. Time to first token: as many requests of one new token, sent together, the median of
their answers. `logprob_error` is the largest difference to a full forward; generate and that forward are the same code.
Continuous batching is slow enough on a CPU that above 16 requests it samples `1024 / concurrency` tokens, once; its later
tokens count as fast as those, though they are slower. The last line is JSON.
"""

import argparse
import asyncio
import importlib.util
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.utils.logging import disable_progress_bar

from bench.at_least import at_least
from bench.ending import end_like_ctrl_c
from bench.machine import machine
from bench.results_folder import results_folder, write
from l0fast.config import EngineConfig
from l0fast.engine.base import Sampled, Sampling
from l0fast.engine.transformers import transformers_engine
from l0fast.errors import L0fastError, UsageError
from l0fast.metrics import descendants

Prompts = list[list[int]]
VOCAB = {"cpu": 1024, "cuda": 151_936}
SHAPES: dict[str, dict[str, Any]] = {
    # the policies that ship
    "cpu": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"head_dim": 32, "intermediate_size": 384},
    # Qwen3-0.6B
    "cuda": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}
    | {"head_dim": 128, "intermediate_size": 3072, "rope_theta": 1e6},
}
CHECKED = 8
"""Responses of a round whose log-probs are held against a full forward."""
PAGE_TOKENS = 256
DEADLINE_S = 300.0
"""For one answer of a peer [s]."""
STAND_INS = Path(__file__).parents[1] / "tests" / "engine" / "sglang_cpu"


class Played(NamedTuple):
    answered_s: list[float]
    """When each request was answered, from the moment all were sent [s]."""
    cpu_s: float
    samples: list[tuple[Sequence[int], Sequence[float]]]
    """Ids and log-probs; empty where the peer does not tell."""
    new_tokens: int

    @property
    def wall_s(self) -> float:
        return max(self.answered_s)


class Peer(Protocol):
    name: str

    async def play(self, prompts: Prompts, new_tokens: int) -> Played: ...


class Samples(Protocol):
    """The part of the Engine protocol that is measured."""

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, *, conversation: str) -> Sampled: ...

    def forget(self, conversation: str) -> None: ...


class EnginePeer:
    """Anything that has the Engine protocol."""

    def __init__(self, name: str, engine: Samples, pids: set[int]):
        self.name, self._engine, self._pids, self._rounds = name, engine, pids, 0

    async def play(self, prompts: Prompts, new_tokens: int) -> Played:
        self._rounds += 1
        cpu_s, started = cpu_of(self._pids), time.perf_counter()

        async def one(i: int, prompt: list[int]) -> tuple[float, Any]:
            sampling = Sampling(max_new_tokens=new_tokens, stop_token_ids=(), seed=i)
            sampled = await self._engine.generate(prompt, sampling, conversation=f"{self._rounds} {i}")
            return time.perf_counter() - started, sampled

        async with asyncio.TaskGroup() as tg:
            tasks = [tg.create_task(one(i, prompt)) for i, prompt in enumerate(prompts)]
        results = [task.result() for task in tasks]
        for i in range(len(prompts)):
            self._engine.forget(f"{self._rounds} {i}")
        samples = [(sampled.response_ids, sampled.sampler_logprobs) for _, sampled in results]
        return Played([answered for answered, _ in results], cpu_of(self._pids) - cpu_s, samples, new_tokens)


class GeneratePeer:
    name = "generate"

    def __init__(self, model: Any):
        self._model = model
        self.caches: list[str | None] = [None, "static"]

    async def play(self, prompts: Prompts, new_tokens: int) -> Played:
        played = [(self._play(prompts, new_tokens, cache), cache) for cache in self.caches]
        played.sort(key=lambda pair: pair[0].wall_s)
        # one token says nothing about the cache
        if new_tokens > 1:
            self.caches = [played[0][1]]
        return played[0][0]

    def _play(self, prompts: Prompts, new_tokens: int, cache: str | None) -> Played:
        longest, device = max(map(len, prompts)), self._model.device
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        cpu_s, started = cpu_of(set()), time.perf_counter()
        out = self._model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            cache_implementation=cache,
            # on a GPU a static cache would be compiled, for a minute and more, for every size of a batch
            disable_compile=True,
        )
        assert out.cpu().shape == (len(prompts), longest + new_tokens)
        wall_s = time.perf_counter() - started
        return Played([wall_s] * len(prompts), cpu_of(set()) - cpu_s, [], new_tokens)


class BatchingPeer:
    name = "batching"

    def __init__(self, model: Any, max_tokens: int):
        self._model, self._max_tokens = model, max_tokens

    async def play(self, prompts: Prompts, new_tokens: int) -> Played:
        settings: dict[str, Any] = {"return_logprobs": True}
        if self._model.device.type == "cpu":
            pages = -(-self._max_tokens // PAGE_TOKENS)
            settings |= {"num_blocks": len(prompts) * pages + 2, "max_batch_tokens": 512, "page_size": PAGE_TOKENS}
        else:
            settings |= {"max_memory_percent": 0.3}
        with self._model.continuous_batching_context_manager(
            generation_config=GenerationConfig(do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(**settings),
            block=True,
            timeout=DEADLINE_S,
        ) as manager:
            # its start is not what is measured
            self._finish(manager, [[1, 2, 3]], 2)
            cpu_s, started = cpu_of(set()), time.perf_counter()
            outputs = self._finish(manager, prompts, new_tokens)
            answered = [at - started for at, _ in outputs]
            played_cpu_s = cpu_of(set()) - cpu_s
        by_prompt = {tuple(o.prompt_ids): (o.generated_tokens, o.logprobs) for _, o in outputs}
        return Played(answered, played_cpu_s, [by_prompt[tuple(p)] for p in prompts], new_tokens)

    def _finish(self, manager: Any, prompts: Prompts, new_tokens: int) -> list[tuple[float, Any]]:
        manager.add_requests(prompts, max_new_tokens=new_tokens)
        outputs: list[tuple[float, Any]] = []
        while len(outputs) < len(prompts):
            output = manager.get_result(timeout=DEADLINE_S)
            if output is None or output.error:
                raise RuntimeError(f"continuous batching failed: {output.error if output else 'no answer'}")
            outputs.append((time.perf_counter(), output))
        return outputs


def cpu_of(pids: set[int]) -> float:
    """CPU seconds that this process and those have used."""
    ticks = 0
    for pid in pids:
        ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def random_policy(folder: Path, device: str = "cpu") -> None:
    """Random weights in a shape that is in use."""
    torch.manual_seed(0)
    config = Qwen3Config(
        **SHAPES[device],
        vocab_size=VOCAB[device],
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    config.dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = Qwen3ForCausalLM(config)
    torch.nn.Module.to(model, config.dtype)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")


def load_model(folder: Path, device: str) -> Any:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    torch.nn.Module.to(model, device)
    return model.eval()


def draw_prompts(seed: int, count: int, least: int, most: int, vocab: int) -> Prompts:
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(rng.randint(least, most))] for _ in range(count)]


@torch.no_grad()
def logprob_error(model: Any, prompt: list[int], ids: Sequence[int], logprobs: Sequence[float]) -> float:
    logits = model(input_ids=torch.tensor([[*prompt, *ids]], device=model.device)).logits[0, len(prompt) - 1 : -1]
    chosen = torch.tensor(ids, device=model.device)[:, None]
    expected = logits.float().log_softmax(-1).gather(-1, chosen)[:, 0]
    return float((expected.cpu() - torch.tensor(logprobs)).abs().max())


@asynccontextmanager
async def peers(args: argparse.Namespace, folder: Path) -> AsyncIterator[tuple[list[Peer], Any, str]]:
    """All that can be measured here, a model for full forwards, and why sglang is not among them, if it isn't."""
    max_tokens = args.prompt_tokens[1] + args.new_tokens
    config = EngineConfig(
        slots=max(args.concurrency), threads=args.threads, device=args.device, memory_share=0.3, start_timeout_s=600
    )
    async with AsyncExitStack() as stack:
        before = children()
        engine = await stack.enter_async_context(transformers_engine(config, folder, max_tokens=max_tokens))
        found: list[Peer] = [EnginePeer("engine", engine, children() - before)]
        absent = await start_sglang(args, config, folder, max_tokens, stack, found)
        models = [load_model(folder, args.device) for _ in range(2)]
        found += [GeneratePeer(models[0]), BatchingPeer(models[1], max_tokens)]
        yield found, models[0], absent


async def start_sglang(
    args: argparse.Namespace,
    config: EngineConfig,
    folder: Path,
    max_tokens: int,
    stack: AsyncExitStack,
    found: list[Peer],
) -> str:
    if importlib.util.find_spec("sglang") is None:
        return "not installed: pip install 'l0fast[gpu]', or as tests/engine/test_sglang.py does on a CPU"
    update: dict[str, Any] = {"sglang": tuple(args.sglang)}
    if args.device == "cpu":
        if torch.cuda.is_available():
            return "takes the GPU where there is one: --device cuda"
        # its GPU packages can't be imported here
        sys.path.insert(0, str(STAND_INS))
        threads, pool = args.sglang_threads, max(config.slots * max_tokens, 8192)
        update = {"threads": threads, "sglang": (f"max_total_tokens={pool}", *args.sglang)}
    config = config.model_copy(update=update)
    from l0fast.engine.sglang import sglang_engine

    before = children()
    try:
        engine = await stack.enter_async_context(sglang_engine(config, folder, max_tokens=max_tokens))
    except L0fastError as e:
        return f"did not start: {e}"
    found.append(EnginePeer("sglang", engine, children() - before))
    return ""


def children() -> set[int]:
    """Processes that this one has started, and theirs."""
    return set(descendants(os.getpid()))


async def compare(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    async with peers(args, folder) as (found, model, absent):
        vocab = model.config.vocab_size
        for peer in found:
            await peer.play(draw_prompts(0, 2, 8, 8, vocab), 4)
        for concurrency in args.concurrency:
            rounds: dict[str, list[Round]] = {peer.name: [] for peer in found}
            for number in range(args.rounds):
                for peer in found:
                    new_tokens = args.new_tokens
                    if isinstance(peer, BatchingPeer) and args.device == "cpu" and concurrency > 16:
                        if number:
                            continue
                        new_tokens = min(new_tokens, max(4, 1024 // concurrency))
                    # new prompts every round: what was cached helps nobody
                    seeds = concurrency * 1000 + number, concurrency * 1000 + number + 500
                    first, whole = (draw_prompts(seed, concurrency, *args.prompt_tokens, vocab) for seed in seeds)
                    if isinstance(peer, GeneratePeer) and number == 0:
                        peer.caches = [None, "static"]
                    round_ = Round(await peer.play(first, 1), await peer.play(whole, new_tokens))
                    rounds[peer.name].append(round_)
                    samples = zip(whole[:CHECKED], round_.whole.samples, strict=False)
                    round_.errors.extend(logprob_error(model, prompt, *sample) for prompt, sample in samples)
            rows += summary(concurrency, args.new_tokens, rounds)
            show(rows[-len(found) :])
    if absent:
        rows.append({"peer": "sglang", "absent": absent})
        print(f"sglang      {absent}", flush=True)
    return rows


class Round:
    """What one peer did with one set of prompts."""

    def __init__(self, first: Played, whole: Played):
        self.first, self.whole = first, whole
        self.errors: list[float] = []

    def seconds(self, what: str, new_tokens: int) -> float:
        """Wall or CPU time for that many tokens; where fewer were sampled the rest counts as fast as those."""
        first, whole = getattr(self.first, what), getattr(self.whole, what)
        if self.whole.new_tokens == new_tokens:
            return whole
        return first + (whole - first) / (self.whole.new_tokens - 1) * (new_tokens - 1)


def summary(concurrency: int, new_tokens: int, rounds: dict[str, list[Round]]) -> list[dict[str, Any]]:
    def median(name: str, what: str) -> float:
        return statistics.median(round_.seconds(what, new_tokens) for round_ in rounds[name])

    tokens, rows = concurrency * new_tokens, []
    for name, played in rounds.items():
        wall_s, cpu_s = median(name, "wall_s"), median(name, "cpu_s")
        errors = [error for round_ in played for error in round_.errors]
        rows.append(
            {
                "concurrency": concurrency,
                "peer": name,
                "tokens_per_s": round(tokens / wall_s),
                "ratio": round(median("generate", "wall_s") / wall_s, 2),
                "tokens_per_cpu_s": round(tokens / cpu_s),
                "cpu_ratio": round(median("generate", "cpu_s") / cpu_s, 2),
                "first_token_ms": round(1000 * statistics.median(m for r in played for m in r.first.answered_s), 1),
                "logprob_error": float(f"{max(errors):.2g}") if errors else None,
                "sampled_tokens": sum(concurrency * r.whole.new_tokens for r in played),
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print("".join(f"{'-' if value is None else value!s:>17}" for value in row.values()), flush=True)


def main() -> None:
    end_like_ctrl_c()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=at_least(1), nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--new-tokens", type=at_least(1), default=96)
    parser.add_argument(
        "--prompt-tokens",
        type=at_least(1),
        nargs=2,
        default=[64, 160],
        metavar=("LEAST", "MOST"),
        help="of each prompt",
    )
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--threads", type=at_least(1), default=len(os.sched_getaffinity(0)))
    parser.add_argument("--sglang-threads", type=at_least(1), default=1)
    parser.add_argument("--sglang", nargs="*", default=[], help="further arguments of sglang.Engine, name=JSON")
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="cuda: the shape of Qwen3-0.6B, in bf16"
    )
    parser.add_argument("--model-path", type=Path, help="default: random weights")
    parser.add_argument("--results", type=results_folder, metavar="DIR", help="folder for engine.json")
    args = parser.parse_args()
    least, most = args.prompt_tokens
    if least > most:
        parser.error(f"--prompt-tokens {least} {most}: give the smaller number first")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU that it can use")
    where = f"{machine()}, {args.threads} threads, torch {torch.__version__}, transformers {transformers.__version__}"
    if args.device == "cuda":
        where = f"{torch.cuda.get_device_name()}, {where}"
    print(where)
    disable_progress_bar()
    columns = ("concurrency", "peer", "tokens/s", "ratio", "tokens/CPU s", "CPU ratio", "first token [ms]")
    print("".join(f"{name:>17}" for name in (*columns, "logprob_error", "sampled")), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        if args.model_path is None:
            random_policy(Path(scratch), args.device)
        try:
            rows = asyncio.run(compare(args, args.model_path or Path(scratch)))
        except UsageError as e:
            parser.error(str(e))
    settings = {name: value for name, value in vars(args).items() if name not in ("results", "model_path")}
    result = {"bench": "engine", "machine": where, "settings": settings, "rows": rows}
    write(result, args.results, "engine.json" if args.device == "cpu" else "engine_cuda.json")


if __name__ == "__main__":
    main()
