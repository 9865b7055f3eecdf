"""The real SGLang for tests: on the CPU where there is no GPU, with the stand-ins in sglang_cpu/ for its GPU packages."""

import asyncio
import importlib.util
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from l0fast.config import EngineConfig
from l0fast.engine.base import Sampled, Sampling
from l0fast.engine.sglang import SGLangEngine
from tests.engine.tiny import VOCAB, full_logprobs

MAX_TOKENS = 400
PROMPT = [1, 2, 3, 4]
CONFIG = EngineConfig(slots=64, threads=1, start_timeout_s=600)
# its imports warn
MARKS = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.filterwarnings("ignore")]


def skip_without_sglang() -> None:
    """L0FAST_TEST_SGLANG=1 makes a missing one a failure instead of a skip."""
    if importlib.util.find_spec("sglang") is None and not os.environ.get("L0FAST_TEST_SGLANG"):
        pytest.skip("sglang is not installed", allow_module_level=True)


@contextmanager
def stand_ins() -> Iterator[None]:
    """SGLang's children find them, too."""
    path = str(Path(__file__).parent / "sglang_cpu")
    if torch.cuda.is_available():
        yield
        return
    sys.path.insert(0, path)
    try:
        yield
    finally:
        sys.path.remove(path)


def sampling(max_new_tokens=12, *, stop=(), temperature=1.0) -> Sampling:
    return Sampling(max_new_tokens=max_new_tokens, stop_token_ids=stop, temperature=temperature)


def error(model, prompt: list[int], sampled: Sampled, start: int = 0, end: int | None = None, temperature=1.0) -> float:
    """Largest difference to the log-probs of transformers."""
    ids = torch.tensor(sampled.response_ids)
    rows = full_logprobs(model, [*prompt, *sampled.response_ids], temperature)[len(prompt) - 1 : -1]
    theirs = rows.gather(1, ids[:, None])[:, 0]
    return (theirs - torch.tensor(sampled.sampler_logprobs)).abs()[start:end].max().item()


async def until_running(engines: SGLangEngine | list[SGLangEngine], n: int) -> None:
    """Until so many requests are decoded, in all engines together."""
    engines = engines if isinstance(engines, list) else [engines]
    async with asyncio.timeout(60):
        # the scheduler is another process: there is nothing to wait for but its word
        while sum(engine.load().running for engine in engines) != n:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def prompts(n: int) -> list[list[int]]:
    rng = random.Random(n)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 60))] for _ in range(n)]


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}
