"""One real SGLang engine of two tensor-parallel ranks: each gets a payload of its own, and both know the new weights.

Needs sglang, as test_sglang.py does.
"""

import asyncio
from pathlib import Path

from l0fast.engine.buckets import HostWeights
from l0fast.engine.sglang import sglang_fleet
from l0fast.ipc import shared_weights
from tests.engine.real_sglang import CONFIG, MARKS, MAX_TOKENS, PROMPT, error, sampling, skip_without_sglang, stand_ins
from tests.engine.tiny import tiny_model

skip_without_sglang()
pytestmark = MARKS


def test_two_ranks_take_new_weights_and_sample_as_one(folder, model):
    other, memory = tiny_model(1), set(Path("/dev/shm").glob("sgl*"))
    config = CONFIG.model_copy(update={"tensor_parallel": 2})

    async def main():
        with stand_ins(), shared_weights(folder) as weights:
            source = HostWeights(weights, dtype="float32", tensor_parallel=2)
            async with sglang_fleet(config, folder, max_tokens=MAX_TOKENS, source=source) as fleet:
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
    assert set(Path("/dev/shm").glob("sgl*")) == memory
