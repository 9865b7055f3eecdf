"""Weights by process groups, from a real learner of two ranks to two real SGLang engines, over gloo on the CPU.

Needs sglang, as test_sglang.py does.
"""

import asyncio
import os
import signal
import tempfile
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from l0fast.config import LearnerConfig, RolloutConfig, RunConfig
from l0fast.engine.buckets import GroupWeights
from l0fast.engine.fleet import Fleet
from l0fast.engine.sglang import SGLangEngine, sglang_fleet
from l0fast.errors import LearnerError
from l0fast.learner.client import LearnerClient, batch_advantages, learner
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
from tests.engine.tiny import VOCAB
from tests.learner.conftest import Make

skip_without_sglang()
pytestmark = MARKS

RUN = RunConfig(
    num_steps=10,
    rollout=RolloutConfig(group_size=2, groups_per_step=1),
    learner=LearnerConfig(
        ranks=2, threads=1, lr=1e-2, warmup_steps=0, kl_coef=0.0, mismatch_stop=0.0, start_timeout_s=600
    ),
)
WAIT_S = 5.0
"""Time an engine may keep the learner waiting [s]."""


class Running:
    def __init__(self, runner: asyncio.Runner):
        self.runner = runner
        self.learner: LearnerClient
        self.fleet: Fleet
        self.log: list[str] = []

    def run(self, coroutine):
        return self.runner.run(coroutine)

    @property
    def engines(self) -> list[SGLangEngine]:
        return [m.engine for m in self.fleet._members if isinstance(m.engine, SGLangEngine)]

    async def learn(self, folder: Path) -> torch.nn.Module:
        """A step; the policy it leads to."""
        rng, make = np.random.default_rng(0), Make()
        ids = [[int(i) for i in rng.integers(VOCAB, size=8)] for _ in range(4)]
        turns = [make.turn(ids[0], ids[1], [-3.0] * 8), make.turn(ids[2], ids[3], [-3.0] * 8)]
        groups = [
            make.group([make.trajectory([turn], [reward]) for turn, reward in zip(turns, (1.0, 0.0), strict=True)])
        ]
        version = self.learner.policy_version + 1
        await self.learner.step(groups, batch_advantages(groups, RUN, version), version)
        await self.learner.save(folder)
        return AutoModelForCausalLM.from_pretrained(folder).eval()

    async def until_both_are_up(self) -> None:
        async with asyncio.timeout(600):
            while len(self.engines) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
def running(folder):
    async def start(stack: AsyncExitStack, running: Running) -> None:
        running.learner = await stack.enter_async_context(learner(RUN, folder, weights=None, log_dir=None))
        source = GroupWeights(running.learner, wait_s=WAIT_S, log=running.log.append)
        running.fleet = await stack.enter_async_context(
            sglang_fleet(CONFIG, folder, max_tokens=MAX_TOKENS, source=source, count=2, log=running.log.append)
        )

    before = left_behind()
    with ExitStack() as outer:
        outer.enter_context(stand_ins())
        running = Running(outer.enter_context(asyncio.Runner()))
        stack = AsyncExitStack()
        running.run(start(stack, running))
        try:
            yield running
        finally:
            running.run(stack.aclose())
    # the last test has killed the learner, at which engines are told twice to end
    assert not left_behind() - before


def left_behind() -> set[Path]:
    """SGLang's sockets and load tables."""
    sockets = (path for path in Path(tempfile.gettempdir()).glob("tmp*") if path.is_socket())
    return {*sockets, *Path("/dev/shm").glob("sglang_loads_*")}


async def until(condition) -> None:
    async with asyncio.timeout(120):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def test_both_go_on_with_what_was_learned_while_they_sample(running, model, tmp_path):
    asked = prompts(8)

    async def main():
        learned = await running.learn(tmp_path)

        async def play(prompt, conversation):
            """Ask until the new weights have come: how long that takes beside two busy engines is the machine's affair."""
            while True:
                sampled = await running.fleet.generate(prompt, sampling(300), conversation=conversation)
                if sampled.version_spans[-1].policy_version == 1:
                    return sampled
                assert error(model, prompt, sampled) <= 1e-5

        async with asyncio.TaskGroup() as tg:
            playing = [tg.create_task(play(p, f"{i}")) for i, p in enumerate(asked)]
            await until_running(running.engines, len(asked))
            await running.fleet.update_weights(running.learner.policy_version)
        assert len(running.engines) == 2
        return learned, [task.result() for task in playing]

    learned, answers = running.run(main())
    under_way = [(p, sampled) for p, sampled in zip(asked, answers, strict=True) if len(sampled.version_spans) == 2]
    unlike = [error(learned, prompt, sampled, 0, sampled.version_spans[0].end) for prompt, sampled in under_way]
    assert max(unlike) > 1e-3, "nothing was learned"
    for prompt, sampled in under_way:
        old, new = sampled.version_spans
        assert (old.policy_version, new.policy_version, new.end) == (0, 1, 300)
        assert error(model, prompt, sampled, 0, old.end) <= 1e-5
        assert error(learned, prompt, sampled, new.start) <= 1e-5
    assert running.log == []


def test_one_that_hangs_keeps_nobody_and_once_rebuilt_is_sent_the_weights_of_now(running, tmp_path):
    async def main():
        learned = await running.learn(tmp_path)
        stopped, other = running.engines
        pid = stopped._engine.get_all_child_pids()[0]
        os.kill(pid, signal.SIGSTOP)
        updating = asyncio.create_task(running.fleet.update_weights(running.learner.policy_version))
        # the learner gives it up, or this one would not get them
        await until(lambda: other.policy_version == running.learner.policy_version)
        os.kill(pid, signal.SIGKILL)
        await updating
        assert other.failure is None
        await running.until_both_are_up()
        rebuilt = next(engine for engine in running.engines if engine is not other)
        return learned, [await e.generate([1, 2, 3], sampling(20), conversation="x") for e in (other, rebuilt)]

    learned, answers = running.run(main())
    assert running.log[0].startswith("the learner could not send its weights to engine 0: ")
    for sampled in answers:
        assert sampled.policy_version == running.learner.policy_version
        assert error(learned, [1, 2, 3], sampled) <= 1e-5


def test_the_death_of_the_learner_under_way_is_an_error_at_once(running):
    async def main():
        await running.until_both_are_up()
        stopped = running.engines[0]._engine.get_all_child_pids()[0]
        # so that it is under way for long
        os.kill(stopped, signal.SIGSTOP)
        updating = asyncio.create_task(running.fleet.update_weights(running.learner.policy_version))
        await until(lambda: "waiting for engines" in running.learner.state())
        os.kill(running.learner.pids[0], signal.SIGKILL)
        with pytest.raises(LearnerError, match="was killed by SIGKILL, at: waiting for engines"):
            await updating

    running.run(main())
