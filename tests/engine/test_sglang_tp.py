"""One real SGLang engine of two tensor-parallel ranks: each gets a payload of its own, and both know the new weights.

Needs sglang, as test_sglang.py does.
"""

import asyncio
import multiprocessing
import os

from l0fast.engine.buckets import HostWeights
from l0fast.engine.sglang import sglang_fleet
from l0fast.ipc import shared_weights
from tests.engine.real_sglang import CONFIG, MARKS, MAX_TOKENS, PROMPT, error, sampling, skip_without_sglang, stand_ins
from tests.engine.tiny import tiny_model

skip_without_sglang()
pytestmark = MARKS


def memory_of(pids: set[int | None]) -> list[str]:
    """Files through which tensor-parallel ranks speak, by who made them."""
    return [name for name in os.listdir("/dev/shm") if name.startswith("sgl_shm_") and int(name.split("_")[-2]) in pids]


def test_two_ranks_take_new_weights_and_sample_as_one(folder, model):
    other, ranks = tiny_model(1), set[int | None]()
    config = CONFIG.model_copy(update={"tensor_parallel": 2})

    async def main():
        with stand_ins(), shared_weights(folder) as weights:
            source = HostWeights(weights, dtype="float32", tensor_parallel=2)
            async with sglang_fleet(config, folder, max_tokens=MAX_TOKENS, source=source) as fleet:
                ranks.update(child.pid for child in multiprocessing.active_children())
                assert memory_of(ranks)
                before = await fleet.generate(PROMPT, sampling(20), conversation="x")
                parameters = dict(other.named_parameters())
                for name, tensor in weights.tensors().items():
                    tensor.copy_(parameters[name].detach())
                weights.policy_version = 1
                await fleet.update_weights(1)
                return before, await fleet.generate(PROMPT, sampling(20), conversation="x")

    before, after = asyncio.run(main())
    assert error(model, PROMPT, before) <= 1e-5
    assert after.policy_version == 1
    assert error(other, PROMPT, after) <= 1e-5
    assert not memory_of(ranks)
