"""The learner as real child processes: it learns, publishes, saves, goes on after a kill; what breaks has its last words told."""

import asyncio
import gc
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from l0fast.config import LearnerConfig, RolloutConfig, RunConfig
from l0fast.errors import LearnerError, UsageError
from l0fast.ipc import shared_weights
from l0fast.learner import client as client_module
from l0fast.learner.client import batch_advantages, batch_packs, learner, num_ranks
from l0fast.learner.policy_model import PolicyModel

# every turn has advantage 1 and the sampler's log-probs are 0, so that mismatch_k1 is the mean of -log p: what is learned
CONFIG = RunConfig(
    num_steps=10,
    rollout=RolloutConfig(group_size=2, groups_per_step=2),
    learner=LearnerConfig(
        whiten="none",
        gamma=0.0,
        lr=1e-2,
        warmup_steps=0,
        pack_tokens=40,
        threads=1,
        kl_coef=0.01,
        tis_cap=0.0,
        mismatch_stop=0.0,
    ),
)


def with_learner(**settings):
    return CONFIG.model_copy(update={"learner": CONFIG.learner.model_copy(update=settings)})


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
    return [make.group(scored[:2], number=0), make.group(scored[2:], number=1)]


async def take_step(client, groups, version):
    return await client.step(groups, batch_advantages(groups, CONFIG, version), version)


def copy_of(weights):
    return {name: tensor.clone() for name, tensor in weights.tensors().items()}


def gone(pid):
    return not Path(f"/proc/{pid}").exists()


def test_it_learns_publishes_saves_and_goes_on_where_it_was_killed(model_path, tmp_path, groups):
    checkpoint = tmp_path / "checkpoints" / "step_1"

    async def until_killed():
        with shared_weights(model_path) as weights:
            async with learner(CONFIG, model_path, weights=weights, log_dir=tmp_path) as client:
                assert weights.policy_version == 0
                published, metrics = [copy_of(weights)], [await take_step(client, groups, 1)]
                published.append(copy_of(weights))
                await client.save_checkpoint(checkpoint, {"position": 17})
                # groups come in any order, and one by one
                metrics.append(await take_step(client, groups[::-1], 2))
                published.append(copy_of(weights))
                await client.save(tmp_path / "model")
                with pytest.raises(ValueError, match="no sampled token"):
                    await take_step(client, [], 3)
                for group in groups[::-1]:
                    await client.accumulate([group], batch_advantages([group], CONFIG, 3))
                metrics.append(await client.finish_step(3))
                assert weights.policy_version == 3
                published.append(copy_of(weights))
                os.kill(client.pids[0], signal.SIGKILL)
                with pytest.raises(LearnerError, match=r"learner \(pid \d+\) was killed by SIGKILL"):
                    await take_step(client, groups, 4)
            return published, metrics

    async def resumed():
        with shared_weights(model_path) as weights:
            async with learner(CONFIG, model_path, weights=weights, log_dir=None) as client:
                assert await client.load_checkpoint(checkpoint) == {"position": 17}
                assert weights.policy_version == 1
                published = [copy_of(weights)]
                with pytest.raises(UsageError, match="name the folder of a complete checkpoint"):
                    await client.load_checkpoint(tmp_path)
                metrics = await take_step(client, groups, 2)
                return [*published, copy_of(weights)], metrics

    published, metrics = asyncio.run(until_killed())
    nll = [m["mismatch_k1"] for m in metrics]
    assert nll[0] > nll[1] > nll[2]
    assert {"loss", "grad_norm", "kl", "entropy", "lr", "forward_backward_s", "reference_s", "optimizer_s"} <= metrics[
        0
    ].keys()
    assert metrics[0]["advantages_mean"] == 1
    assert "mismatch_warn" in metrics[0]["mismatch_warning"]
    assert (tmp_path / "learner.log").exists()

    again, metrics_again = asyncio.run(resumed())
    torch.testing.assert_close(again, published[1:3], rtol=0, atol=0)
    assert metrics_again["loss"] == metrics[1]["loss"]
    assert metrics_again["lr"] == metrics[1]["lr"] < metrics[0]["lr"]

    # the same steps in this process
    policy = PolicyModel(model_path, CONFIG.learner, num_steps=CONFIG.num_steps, temperature=CONFIG.rollout.temperature)
    weights = dict(policy.model.named_parameters())
    assert published[0].keys() == weights.keys()
    assert all(torch.equal(published[0][name], weights[name]) for name in weights), "the start weights are version 0"
    packs, denominator = batch_packs(groups, batch_advantages(groups, CONFIG, 1), CONFIG)
    for version in (1, 2, 3):
        policy.step(packs, denominator)
        torch.testing.assert_close(published[version], dict(policy.weights()), rtol=0, atol=1e-6)
        if version == 2:
            saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
            for name, p in saved.named_parameters():
                assert torch.equal(p.detach(), published[2][name]), "byte for byte what engines got"
    assert saved.lm_head.weight is saved.model.embed_tokens.weight
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (model_path / "tokenizer.json").read_bytes()


def test_a_stuck_rank_is_an_error_that_says_where_and_nothing_is_left(model_path, groups):
    config = with_learner(step_timeout_s=2.0)

    async def main():
        with shared_weights(model_path) as weights:
            async with learner(config, model_path, weights=weights, log_dir=None) as client:
                await take_step(client, groups, 1)
                os.kill(client.pids[0], signal.SIGSTOP)
                with pytest.raises(LearnerError, match="did not answer 'accumulate' in 2 s"):
                    await take_step(client, groups, 2)
                with pytest.raises(LearnerError, match="did not answer 'accumulate' in 2 s"):
                    await take_step(client, groups, 2)
            return client.pids

    files = set(os.listdir("/proc/self/fd"))
    assert all(map(gone, asyncio.run(main())))
    # an error and the frames it passed refer to each other, and so to maps of the memory that was shared
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) == files


def test_the_rank_that_died_is_named_and_the_others_end_with_it(model_path, groups):
    async def main():
        with shared_weights(model_path) as weights:
            async with learner(with_learner(ranks=2), model_path, weights=weights, log_dir=None) as client:
                await take_step(client, groups, 1)
                after = copy_of(weights)
                # stopped first, so that the other one waits for it in the middle of a step
                os.kill(client.pids[1], signal.SIGSTOP)
                step = asyncio.create_task(take_step(client, groups, 2))
                await asyncio.to_thread(waits_in_the_kernel, client.pids[0])
                os.kill(client.pids[1], signal.SIGKILL)
                async with asyncio.timeout(10):
                    with pytest.raises(LearnerError, match=r"learner rank 1 \(pid \d+\) was killed by SIGKILL"):
                        await step
            return client.pids, after

    pids, after = asyncio.run(main())
    assert all(map(gone, pids))
    policy = PolicyModel(model_path, CONFIG.learner, num_steps=CONFIG.num_steps, temperature=1.0)
    policy.step(*batch_packs(groups, batch_advantages(groups, CONFIG, 1), CONFIG))
    torch.testing.assert_close(after, dict(policy.weights()), rtol=0, atol=1e-6)


def waits_in_the_kernel(pid: int) -> None:
    """Until the process does: here, for a peer."""
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        os.sched_yield()


def test_a_model_that_does_not_load_is_an_error_with_last_words(model_path, tmp_path):
    async def main():
        with shared_weights(model_path) as weights:
            async with learner(CONFIG, tmp_path, weights=weights, log_dir=None):
                pass

    with pytest.raises(LearnerError, match="can't be loaded as a model"):
        asyncio.run(main())


@pytest.mark.parametrize(("gpus", "wanted", "ranks"), [(0, 0, 1), (0, 3, 3), (4, 0, 4), (4, 2, 2)])
def test_there_is_a_rank_for_each_gpu_unless_set(monkeypatch, gpus, wanted, ranks):
    monkeypatch.setattr(client_module, "num_gpus", lambda: gpus)
    assert num_ranks(with_learner(ranks=wanted)) == ranks


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(client_module, "num_gpus", lambda: 2)
    with pytest.raises(UsageError, match="set --learner.ranks to 2 or less"):
        num_ranks(with_learner(ranks=3))
