"""The real SGLang, on the CPU where there is no GPU: it says what transformers says, over updates, deaths and restarts.

Needs sglang; without its GPU packages the stand-ins in sglang_cpu/ are enough. L0FAST_TEST_SGLANG=1 makes a missing one a
failure instead of a skip.
"""

import asyncio
import importlib.util
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch

from l0fast.config import EngineConfig
from l0fast.engine.base import Sampled, Sampling
from l0fast.engine.buckets import serialize_bucket
from l0fast.engine.sglang import SGLangEngine, sglang_engine
from l0fast.errors import EngineError, UsageError
from tests.engine.tiny import VOCAB, full_logprobs, tiny_model

if importlib.util.find_spec("sglang") is None and not os.environ.get("L0FAST_TEST_SGLANG"):
    pytest.skip("sglang is not installed", allow_module_level=True)

# its imports warn
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")]
CONFIG = EngineConfig(slots=64, threads=1, start_timeout_s=300)
MAX_TOKENS = 400
PROMPT = [1, 2, 3, 4]


class Running:
    """One engine on one loop, for all tests."""

    def __init__(self, runner: asyncio.Runner, folder: Path):
        self.runner, self.folder = runner, folder
        self.stack = AsyncExitStack()
        self.engine: SGLangEngine
        self.policy_version = 0

    def run(self, coroutine):
        return self.runner.run(coroutine)

    def start(self) -> None:
        self.stack = AsyncExitStack()
        context = sglang_engine(CONFIG, self.folder, max_tokens=MAX_TOKENS)
        self.engine = self.run(self.stack.enter_async_context(context))

    def close(self) -> None:
        self.run(self.stack.aclose())

    async def update(self, model: torch.nn.Module) -> int:
        self.policy_version += 1
        await self.engine.update_weights(self.policy_version, buckets(model))
        return self.policy_version


async def buckets(model: torch.nn.Module):
    named = [(name, p.data) for name, p in model.named_parameters()]
    memory = []
    for part in (named[:5], named[5:]):
        payload, flat = serialize_bucket(part)
        memory.append(flat)
        yield payload


@pytest.fixture(scope="module")
def running(folder):
    stand_ins = str(Path(__file__).parent / "sglang_cpu")
    if not torch.cuda.is_available():
        sys.path.insert(0, stand_ins)
    with asyncio.Runner() as runner:
        running = Running(runner, folder)
        running.start()
        try:
            yield running
        finally:
            running.close()
            if stand_ins in sys.path:
                sys.path.remove(stand_ins)


@pytest.fixture
def engine(running, model) -> SGLangEngine:
    """With the weights of the folder, whatever a test before did."""
    running.run(running.update(model))
    return running.engine


def sampling(max_new_tokens=12, *, stop=(), temperature=1.0) -> Sampling:
    return Sampling(max_new_tokens=max_new_tokens, stop_token_ids=stop, temperature=temperature)


def error(model, prompt: list[int], sampled: Sampled, start: int = 0, end: int | None = None, temperature=1.0) -> float:
    """Largest difference to the log-probs of transformers."""
    ids = torch.tensor(sampled.response_ids)
    rows = full_logprobs(model, [*prompt, *sampled.response_ids], temperature)[len(prompt) - 1 : -1]
    theirs = rows.gather(1, ids[:, None])[:, 0]
    return (theirs - torch.tensor(sampled.sampler_logprobs)).abs()[start:end].max().item()


async def until_running(engine: SGLangEngine, n: int) -> None:
    async with asyncio.timeout(30):
        # the scheduler is another process: there is nothing to wait for but its word
        while (await engine.load()).running != n:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def prompts(n: int) -> list[list[int]]:
    rng = random.Random(n)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 60))] for _ in range(n)]


async def all_of(engine: SGLangEngine, prompts: list[list[int]], sampling: Sampling) -> list[Sampled]:
    async with asyncio.TaskGroup() as tg:
        tasks = [tg.create_task(engine.generate(p, sampling, conversation=str(i))) for i, p in enumerate(prompts)]
    return [task.result() for task in tasks]


def test_greedy_ids_are_transformers(running, engine, model):
    ids = list(PROMPT)
    for _ in range(12):
        ids.append(int(full_logprobs(model, ids)[-1].argmax()))
    sampled = running.run(engine.generate(PROMPT, sampling(temperature=0.0), conversation="greedy"))
    assert list(sampled.response_ids) == ids[len(PROMPT) :]
    assert error(model, PROMPT, sampled) <= 1e-5
    assert sampled.finish_reason == "length"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_many_at_once_have_the_logprobs_of_transformers(running, engine, model, temperature):
    asked = prompts(128)
    for prompt, sampled in zip(
        asked, running.run(all_of(engine, asked, sampling(20, temperature=temperature))), strict=True
    ):
        assert len(sampled.response_ids) == 20
        assert error(model, prompt, sampled, temperature=temperature) <= 1e-5


def test_a_second_turn_finds_its_first(running, engine, model):
    async def main():
        first = await engine.generate(PROMPT, sampling(100), conversation="turns")
        prompt = [*PROMPT, *first.response_ids, 5, 6]
        return prompt, await engine.generate(prompt, sampling(), conversation="turns")

    prompt, second = running.run(main())
    assert second.cached_tokens >= len(prompt) - 4
    assert error(model, prompt, second) <= 1e-5


def test_a_stop_id_ends_a_response_and_is_part_of_it(running, engine):
    greedy = running.run(engine.generate(PROMPT, sampling(temperature=0.0), conversation="stop"))
    stop = greedy.response_ids[5]
    sampled = running.run(engine.generate(PROMPT, sampling(stop=(stop,), temperature=0.0), conversation="stop"))
    assert sampled.response_ids == greedy.response_ids[: greedy.response_ids.index(stop) + 1]
    assert sampled.finish_reason == "stop"


def test_all_of_the_context_can_be_used(running, engine):
    sampled = running.run(engine.generate(PROMPT, sampling(MAX_TOKENS - len(PROMPT)), conversation="long"))
    assert len(sampled.response_ids) == MAX_TOKENS - len(PROMPT)


@pytest.mark.parametrize("prompt", [[1, VOCAB], [-1], [], [1] * MAX_TOKENS])
def test_what_would_take_the_scheduler_down_does_not_reach_it(running, engine, prompt):
    with pytest.raises(ValueError, match="id|fit"):
        running.run(engine.generate(prompt, sampling(), conversation="bad"))
    running.run(engine.generate(PROMPT, sampling(1), conversation="good"))


def test_new_weights_are_sampled_from_and_nothing_old_is_continued(running, engine, model):
    other = tiny_model(1)

    async def main():
        before = await engine.generate(PROMPT, sampling(50), conversation="turns")
        version = await running.update(other)
        # its prefix was computed under the old weights
        prompt = [*PROMPT, *before.response_ids]
        return version, prompt, await engine.generate(prompt, sampling(50), conversation="turns")

    version, prompt, sampled = running.run(main())
    assert sampled.policy_version == version
    assert error(other, prompt, sampled) <= 1e-5


@pytest.mark.parametrize("how", ["retracted", "aborted and sent again"])
def test_responses_under_way_go_on_under_new_weights(running, engine, model, monkeypatch, how):
    if how != "retracted":
        monkeypatch.setattr(engine, "_retracts", False)
    elif not engine._retracts:
        pytest.skip("this SGLang can't retract")
    other, asked = tiny_model(1), prompts(8)
    before = running.policy_version

    async def main():
        async with asyncio.TaskGroup() as tg:
            playing = [tg.create_task(engine.generate(p, sampling(300), conversation="x")) for p in asked]
            await until_running(engine, len(asked))
            await running.update(other)
        return [task.result() for task in playing]

    for prompt, sampled in zip(asked, running.run(main()), strict=True):
        old, new = sampled.version_spans
        assert (old.policy_version, new.policy_version) == (before, before + 1)
        assert sampled.policy_version == before
        assert (old.start, old.end, new.end) == (0, new.start, 300)
        assert len(sampled.response_ids) == 300
        assert error(model, prompt, sampled, 0, old.end) <= 1e-5
        assert error(other, prompt, sampled, new.start) <= 1e-5


def test_a_cancelled_request_leaves_the_scheduler(running, engine):
    async def main():
        task = asyncio.create_task(engine.generate(PROMPT, sampling(390), conversation="cancelled"))
        await until_running(engine, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until_running(engine, 0)

    running.run(main())


def test_a_missed_deadline_is_an_engine_error_and_leaves_the_scheduler(running, engine, monkeypatch):
    monkeypatch.setattr(engine, "_config", CONFIG.model_copy(update={"request_timeout_s": 0.1}))

    async def main():
        with pytest.raises(EngineError, match="did not answer in 0.1 s"):
            await engine.generate(PROMPT, sampling(390), conversation="late")
        await until_running(engine, 0)

    running.run(main())


def test_sigterm_stays_ours(running, engine):
    async def main():
        seen = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, seen.set)
        await engine.generate(PROMPT, sampling(2), conversation="signal")
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            async with asyncio.timeout(5):
                await seen.wait()
        finally:
            loop.remove_signal_handler(signal.SIGTERM)

    running.run(main())


def test_refused_weights_end_the_engine_with_the_reason(running, engine):
    # it may say so, or die of it
    reason = "could not take the weights of version 1000|ended with exit status"

    async def broken():
        yield serialize_bucket([("model.norm.weight", torch.ones(7))])[0]

    async def main():
        with pytest.raises(EngineError, match=reason):
            await engine.update_weights(1000, broken())
        with pytest.raises(EngineError, match=reason):
            await engine.generate(PROMPT, sampling(), conversation="after")

    try:
        running.run(main())
    finally:
        running.close()
        running.start()


def test_a_killed_scheduler_fails_all_requests_at_once_and_a_new_engine_takes_over(running, engine, model, folder):
    ours = subprocess.Popen(["sleep", "600"])
    try:
        pids = engine._engine.get_all_child_pids()

        async def main():
            playing = [asyncio.create_task(engine.generate(p, sampling(300), conversation="x")) for p in prompts(8)]
            await until_running(engine, 8)
            os.kill(pids[0], signal.SIGKILL)
            began = time.monotonic()
            results = await asyncio.gather(*playing, return_exceptions=True)
            assert time.monotonic() - began < 10
            assert all(isinstance(r, EngineError) and "was killed by SIGKILL" in str(r) for r in results)
            with pytest.raises(EngineError, match="was killed by SIGKILL"):
                await engine.load()

        running.run(main())
        ports = engine._engine.port_args
        running.close()
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        assert not Path(ports.tokenizer_ipc_name.removeprefix("ipc://")).exists()
        assert ours.poll() is None, "a child that is not SGLang's was ended with it"
        running.start()
        sampled = running.run(running.engine.generate(PROMPT, sampling(), conversation="again"))
        assert error(model, PROMPT, sampled) <= 1e-5
    finally:
        ours.kill()
        ours.wait()


def test_a_model_that_can_not_be_loaded_is_an_engine_error_and_leaves_nothing(running, engine, folder, monkeypatch):
    """In this process, which SGLang would end with it."""
    # short names, for they are those of sockets, too
    with tempfile.TemporaryDirectory() as models, tempfile.TemporaryDirectory() as sockets:
        monkeypatch.setattr(tempfile, "tempdir", sockets)
        broken = Path(models)
        for file in folder.iterdir():
            (broken / file.name).write_bytes(file.read_bytes())
        (broken / "model.safetensors").write_bytes(b"not one")

        async def main():
            with pytest.raises(EngineError, match="did not start"):
                async with sglang_engine(CONFIG, broken, max_tokens=MAX_TOKENS):
                    raise AssertionError("it started")

        before = children(), set(Path("/dev/shm").glob("sglang*"))
        running.run(main())
        assert (children(), set(Path("/dev/shm").glob("sglang*"))) == before
        assert not list(Path(sockets).iterdir())
    running.run(engine.generate(PROMPT, sampling(2), conversation="the other one lives"))


def test_a_setting_that_is_not_json_is_refused(running, folder):
    async def main():
        config = CONFIG.model_copy(update={"sglang": ("attention_backend=triton",)})
        with pytest.raises(UsageError, match="value in JSON"):
            async with sglang_engine(config, folder, max_tokens=MAX_TOKENS):
                raise AssertionError("it started")

    running.run(main())


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}
