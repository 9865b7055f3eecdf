"""The learner as a real child process: it learns, publishes, saves, and its death is an error with its last words."""

import asyncio
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from l0fast.config import LearnerConfig, RolloutConfig, RunConfig
from l0fast.errors import LearnerError
from l0fast.ipc import shared_weights
from l0fast.learner.client import batch_advantages, batch_payload, learner
from l0fast.learner.packing import from_bytes
from l0fast.learner.policy_model import PolicyModel

# every turn has advantage 1 and the sampler's log-probs are 0, so that mismatch_k1 is the mean of -log p: what is learned
CONFIG = RunConfig(
    num_steps=10,
    rollout=RolloutConfig(group_size=2, groups_per_step=2),
    learner=LearnerConfig(whiten="none", gamma=0.0, lr=1e-2, warmup_steps=0, pack_tokens=40, threads=1, kl_coef=0.01),
)


@pytest.fixture
def groups(make):
    rng = np.random.default_rng(7)
    trajectories = [make.episode(rng, 2, index=i) for i in range(4)]
    scored = [
        make.trajectory(
            [make.turn(t.prompt_ids, t.response_ids, [0.0] * len(t.response_ids)) for t in episode.turns], [1.0, 1.0]
        )
        for episode in trajectories
    ]
    return [make.group(scored[:2]), make.group(scored[2:])]


def test_two_steps_learn_publish_and_save(model_path, tmp_path, groups):
    async def main():
        with shared_weights(model_path) as weights:
            async with learner(CONFIG, model_path, weights=weights, log_dir=tmp_path) as client:
                assert weights.policy_version == 0
                start = {name: tensor.clone() for name, tensor in weights.tensors().items()}
                metrics = [
                    await client.step(groups, batch_advantages(groups, CONFIG, 1), 1),
                    await client.step(groups, batch_advantages(groups, CONFIG, 2), 2),
                ]
                assert weights.policy_version == 2
                await client.save(tmp_path / "model")
                with pytest.raises(ValueError, match="no sampled token"):
                    await client.step([], batch_advantages([], CONFIG, 3), 3)
                metrics.append(await client.step(groups, batch_advantages(groups, CONFIG, 3), 3))
            return start, {name: tensor.clone() for name, tensor in weights.tensors().items()}, metrics

    start, end, metrics = asyncio.run(main())
    nll = [m["mismatch_k1"] for m in metrics]
    assert nll[0] > nll[1] > nll[2]
    assert {"loss", "grad_norm", "kl", "entropy", "lr", "forward_backward_s", "reference_s", "optimizer_s"} <= metrics[
        0
    ].keys()
    assert (tmp_path / "learner.log").exists()

    # the same steps in this process
    policy = PolicyModel(model_path, CONFIG.learner, num_steps=CONFIG.num_steps, temperature=CONFIG.rollout.temperature)
    weights = dict(policy.model.named_parameters())
    assert start.keys() == weights.keys()
    assert all(torch.equal(start[name], weights[name]) for name in weights), "the start weights are version 0"
    for version in (1, 2):
        policy.step(
            from_bytes(batch_payload(groups, batch_advantages(groups, CONFIG, version), CONFIG.learner.pack_tokens)[0])
        )
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, p in saved.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name].detach(), rtol=0, atol=1e-6)
    assert saved.lm_head.weight is saved.model.embed_tokens.weight
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (model_path / "tokenizer.json").read_bytes()

    policy.step(from_bytes(batch_payload(groups, batch_advantages(groups, CONFIG, 3), CONFIG.learner.pack_tokens)[0]))
    for name, p in policy.model.named_parameters():
        torch.testing.assert_close(end[name], p.detach(), rtol=0, atol=1e-6)


def test_a_stuck_child_and_a_dead_one_are_errors_and_nothing_is_left(model_path, groups):
    config = CONFIG.model_copy(update={"learner": CONFIG.learner.model_copy(update={"step_timeout_s": 0.5})})

    async def main():
        with shared_weights(model_path) as weights:
            async with learner(config, model_path, weights=weights, log_dir=None) as client:
                os.kill(client.pid, signal.SIGSTOP)
                with pytest.raises(LearnerError, match=r"did not answer 'step' in 0\.5 s"):
                    await client.step(groups, batch_advantages(groups, CONFIG, 1), 1)
                os.kill(client.pid, signal.SIGKILL)
                with pytest.raises(LearnerError, match="was killed by SIGKILL"):
                    await client.step(groups, batch_advantages(groups, CONFIG, 2), 2)
            return client.pid

    pid = asyncio.run(main())
    assert not Path(f"/proc/{pid}").exists()


def test_a_model_that_does_not_load_is_an_error_with_last_words(model_path, tmp_path):
    async def main():
        with shared_weights(model_path) as weights:
            async with learner(CONFIG, tmp_path, weights=weights, log_dir=None):
                pass

    with pytest.raises(LearnerError, match="can't be loaded as a model"):
        asyncio.run(main())
