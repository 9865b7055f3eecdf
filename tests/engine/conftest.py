"""A tiny random policy, and one real engine for all tests of this folder (its start takes seconds)."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from l0fast.config import EngineConfig
from l0fast.engine.transformers import TransformersEngine, transformers_engine
from l0fast.ipc import SharedWeights, shared_weights
from tests.engine.tiny import MAX_TOKENS, SLOTS, tiny_model


@dataclass
class Running:
    engine: TransformersEngine
    weights: SharedWeights
    runner: asyncio.Runner

    def run(self, coroutine):
        return self.runner.run(coroutine)

    def publish(self, model: torch.nn.Module, policy_version: int) -> None:
        """What the learner does after a step, and then the driver."""
        parameters = dict(model.named_parameters())
        for name, tensor in self.weights.tensors().items():
            tensor.copy_(parameters[name].detach())
        self.weights.policy_version = policy_version
        self.run(self.engine.update_weights(policy_version))


@pytest.fixture(scope="session")
def model():
    return tiny_model(0)


@pytest.fixture(scope="session")
def folder(tmp_path_factory, model) -> Path:
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture(scope="session")
def running(folder):
    config = EngineConfig(slots=SLOTS, threads=1)
    with asyncio.Runner() as runner, shared_weights(folder) as weights:
        stack = AsyncExitStack()
        context = transformers_engine(config, folder, max_tokens=MAX_TOKENS, weights=weights)
        engine = runner.run(stack.enter_async_context(context))
        try:
            yield Running(engine, weights, runner)
        finally:
            runner.run(stack.aclose())
