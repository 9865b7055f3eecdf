"""Two real SGLang engines, on the CPU where there is no GPU: one dies or hangs, and no request is lost over it.

Needs sglang, as test_sglang.py does.
"""

import asyncio
import os
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from l0fast.engine.base import VersionSpan
from l0fast.engine.buckets import HostWeights
from l0fast.engine.fleet import Fleet
from l0fast.engine.sglang import SGLangEngine, sglang_fleet
from l0fast.ipc import SharedWeights, shared_weights
from l0fast.loop_lag import LoopLag
from tests.engine.real_sglang import (
    CONFIG,
    MARKS,
    MAX_TOKENS,
    error,
    prompts,
    sampling,
    skip_without_sglang,
    stand_ins,
    until_running,
)
from tests.engine.tiny import tiny_model

skip_without_sglang()
pytestmark = MARKS


class Running:
    def __init__(self, runner: asyncio.Runner, weights: SharedWeights):
        self.runner, self.weights = runner, weights
        self.fleet: Fleet
        self.log: list[str] = []

    def run(self, coroutine):
        return self.runner.run(coroutine)

    @property
    def engines(self) -> list[SGLangEngine]:
        return [m.engine for m in self.fleet._members if isinstance(m.engine, SGLangEngine)]

    async def update(self, model, policy_version: int) -> None:
        parameters = dict(model.named_parameters())
        for name, tensor in self.weights.tensors().items():
            tensor.copy_(parameters[name].detach())
        self.weights.policy_version = policy_version
        await self.fleet.update_weights(policy_version)

    async def until_both_are_up(self) -> None:
        async with asyncio.timeout(600):
            while len(self.engines) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
def running(folder):
    config = CONFIG.model_copy(update={"stall_timeout_s": 15.0})
    with ExitStack() as stack:
        stack.enter_context(stand_ins())
        weights = stack.enter_context(shared_weights(folder))
        running = Running(stack.enter_context(asyncio.Runner()), weights)
        source = HostWeights(weights, dtype="float32")
        context = sglang_fleet(config, folder, max_tokens=MAX_TOKENS, source=source, count=2, log=running.log.append)
        running.fleet = running.run(context.__aenter__())
        try:
            yield running
        finally:
            running.run(context.__aexit__(None, None, None))


async def ask(fleet: Fleet, episode: str, asked: list[list[int]], tokens: int) -> list[asyncio.Task]:
    return [
        asyncio.create_task(fleet.generate(prompt, sampling(tokens), conversation=f"{episode}/{i}"))
        for i, prompt in enumerate(asked)
    ]


def test_both_take_new_weights_and_a_second_turn_finds_its_first(running):
    model = tiny_model(1)

    async def main():
        await running.update(model, 1)
        tasks = await ask(running.fleet, "turns", prompts(8), 40)
        first = [await task for task in tasks]
        assert all(engine.load().decoded_tokens for engine in running.engines)
        longer = [[*p, *s.response_ids, 1] for p, s in zip(prompts(8), first, strict=True)]
        return longer, [await task for task in await ask(running.fleet, "turns", longer, 10)]

    for prompt, sampled in zip(*running.run(main()), strict=True):
        assert sampled.policy_version == 1
        assert sampled.cached_tokens >= len(prompt) - 4
        assert error(model, prompt, sampled) <= 1e-5


def test_a_scheduler_killed_under_way_costs_no_request_and_is_rebuilt_with_the_weights_of_now(running, folder):
    model, asked = tiny_model(2), prompts(16)
    ours = subprocess.Popen(["sleep", "600"])
    gone: list[str] = []

    async def main():
        await running.update(model, 2)
        first, second = running.engines
        before = (await running.fleet.load()).decoded_tokens
        tasks = await ask(running.fleet, "killed", asked, 300)
        async with asyncio.timeout(60):
            # it tells what it has sampled every 50 tokens
            while not any(state.output_ids for state in first._tm.rid_to_state.values()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        pids = first._engine.get_all_child_pids()
        gone.extend(f"/proc/{pid}" for pid in pids)
        gone.append(first._engine.port_args.tokenizer_ipc_name.removeprefix("ipc://"))
        lag = LoopLag()
        watching = asyncio.create_task(lag.run())
        os.kill(pids[0], signal.SIGKILL)
        # the other one answers its own, and what the dead one had
        sampled = [await task for task in tasks]
        # what had been told was not sampled again
        assert (await running.fleet.load()).decoded_tokens - before == 16 * 300
        await running.until_both_are_up()
        watching.cancel()
        assert first.failure is not None
        assert "was killed by SIGKILL" in first.failure
        assert second.failure is None
        new = next(engine for engine in running.engines if engine is not second)
        said = await new.generate([1, 2, 3], sampling(20), conversation="new")
        return sampled, said, lag.take_step()

    try:
        sampled, said, lag = running.run(main())
        assert not [path for path in gone if Path(path).exists()]
        # its start takes ten seconds; the others' requests and the learner did not wait for it
        assert lag["loop/lag_max_ms"] < 2000
        assert ours.poll() is None, "a child that is not SGLang's was ended with it"
    finally:
        ours.kill()
        ours.wait()
    for prompt, s in zip(asked, sampled, strict=True):
        assert len(s.response_ids) == 300
        assert s.version_spans == (VersionSpan(2, 0, 300),)
        assert error(model, prompt, s) <= 1e-5
    assert said.policy_version == 2
    assert error(model, [1, 2, 3], said) <= 1e-5


def test_a_stopped_scheduler_is_named_and_its_requests_go_on_elsewhere(running):
    model, asked = tiny_model(3), prompts(8)

    async def main():
        await running.until_both_are_up()
        await running.update(model, 3)
        first, second = running.engines
        tasks = await ask(running.fleet, "stopped", asked, 300)
        await until_running(running.engines, 8)
        os.kill(first._engine.get_all_child_pids()[0], signal.SIGSTOP)
        sampled = [await task for task in tasks]
        assert first.failure is not None
        assert "has said nothing for" in first.failure
        assert second.failure is None
        return sampled

    for prompt, sampled in zip(asked, running.run(main()), strict=True):
        assert error(model, prompt, sampled) <= 1e-5
    assert any("requests and has said nothing" in line for line in running.log)
