"""The learner as real child processes: it learns, publishes, saves, goes on after a kill; what breaks has its last words told."""

import asyncio
import gc
import os
import re
import signal
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from l0fast.config import LearnerConfig, RolloutConfig, RunConfig
from l0fast.errors import LearnerError, UsageError
from l0fast.ipc import Message, shared_bytes, shared_weights, spawn_worker
from l0fast.learner import client as client_module
from l0fast.learner.advantage import critic_targets, number_turns, values_of_turns
from l0fast.learner.checkpoint import Checkpoints
from l0fast.learner.client import LearnerClient, batch_advantages, batch_packs, learner, num_gpus, num_ranks
from l0fast.learner.critic import CriticModel
from l0fast.learner.packing import payload_bytes, write_payload
from l0fast.learner.policy_model import PolicyModel
from l0fast.learner.rank import Rank
from l0fast.sandbox.guest.jail import SESSION_NICE
from tests.priority import assert_stands_back

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


WITH_CRITIC = with_learner(ranks=2, advantage="gae", critic="copy", critic_lr=6e-3, gamma=1.0, gae_lambda=1.0, lr=1e-3)


@pytest.fixture(scope="module")
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


async def take_step_with_critic(client, groups, version):
    values = await client.values(groups)
    advantages = batch_advantages(groups, WITH_CRITIC, version, values=values)
    return await client.step(groups, advantages, version, values=values), values, advantages


def copy_of(weights):
    return {name: tensor.clone() for name, tensor in weights.tensors().items()}


def stop_inside_a_layer(worker):
    while "layer" not in worker.sign.doing:
        pass
    os.kill(worker.pid, signal.SIGSTOP)


def gone(pid):
    return not Path(f"/proc/{pid}").exists()


def test_it_learns_saves_goes_on_where_it_was_killed_and_says_so_where_it_is_stuck(model_path, tmp_path, groups):
    checkpoint = tmp_path / "checkpoints" / "step_1"

    async def until_killed():
        with shared_weights(model_path) as weights:
            async with learner(CONFIG, model_path, weights=weights, log_dir=tmp_path) as client:
                assert weights.policy_version == 0
                if not torch.cuda.is_available():
                    assert_stands_back(client.pids[0], SESSION_NICE)
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
            async with learner(with_learner(stall_timeout_s=2.0), model_path, weights=weights, log_dir=None) as client:
                await client.load_checkpoint(checkpoint)
                assert weights.policy_version == 1
                published = [copy_of(weights)]
                metrics = await take_step(client, groups, 2)
                published.append(copy_of(weights))
                stopper = asyncio.create_task(asyncio.to_thread(stop_inside_a_layer, client._workers[0]))
                stuck = (
                    r"learner made no progress .* needs a higher --learner.stall-timeout-s\):\n"
                    r"learner \(pid \d+\) has been silent for too long at 'accumulate', at: (forward|backward) of the "
                    r"(policy|reference), layer \d of 2, pack \d of \d; it is stopped, by a SIGSTOP"
                )
                for _ in range(2):
                    # the second time at once: there is no rank any more
                    async with asyncio.timeout(4):
                        with pytest.raises(LearnerError, match=stuck):
                            await take_step(client, groups, 3)
                await stopper
            return published, metrics, client.pids

    published, metrics = asyncio.run(until_killed())
    nll = [m["mismatch_k1"] for m in metrics]
    assert nll[0] > nll[1] > nll[2]
    assert {"loss", "grad_norm", "kl", "entropy", "lr", "forward_backward_s", "reference_s", "optimizer_s"} <= metrics[
        0
    ].keys()
    assert metrics[0]["advantages_mean"] == 1
    assert "mismatch_warn" in metrics[0]["mismatch_warning"]
    assert (tmp_path / "learner.log").exists()

    # an error and the frames it passed refer to each other, and so to maps of the memory that was shared
    gc.collect()
    files = set(os.listdir("/proc/self/fd"))
    again, metrics_again, pids = asyncio.run(resumed())
    assert all(map(gone, pids))
    gc.collect()
    assert set(os.listdir("/proc/self/fd")) == files
    torch.testing.assert_close(again, published[1:3], rtol=0, atol=0)
    assert metrics_again["loss"] == metrics[1]["loss"]
    assert metrics_again["lr"] == metrics[1]["lr"] < metrics[0]["lr"]

    # the same steps in this process
    policy = PolicyModel(model_path, CONFIG.learner, num_steps=CONFIG.num_steps, temperature=CONFIG.rollout.temperature)
    weights = dict(policy.model.named_parameters())
    assert published[0].keys() == weights.keys()
    assert all(torch.equal(published[0][name], weights[name]) for name in weights), "the start weights are version 0"
    (packs,), denominator = batch_packs(groups, batch_advantages(groups, CONFIG, 1), CONFIG)
    for version in (1, 2, 3):
        policy.step(packs, denominator)
        torch.testing.assert_close(published[version], dict(policy.weights()), rtol=0, atol=1e-6)
        if version == 2:
            saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
            for name, p in saved.named_parameters():
                assert torch.equal(p.detach(), published[2][name]), "byte for byte what engines got"
    assert saved.lm_head.weight is saved.model.embed_tokens.weight
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (model_path / "tokenizer.json").read_bytes()


@pytest.fixture(scope="module")
def two(model_path, groups):
    """Two ranks with a critic: what a few steps said and left, and how it ended when one of the ranks was killed."""

    async def main():
        with shared_weights(model_path) as weights:
            async with learner(WITH_CRITIC, model_path, weights=weights, log_dir=None) as client:
                steps, published = [], []
                for version in range(1, 9):
                    steps.append(await take_step_with_critic(client, groups, version))
                    published.append(copy_of(weights))
                with pytest.raises(ValueError, match="has no values; ask the critic"):
                    await client.accumulate(groups, steps[0][2])
                # stopped first, so that the other one waits for it in the middle of a step
                os.kill(client.pids[1], signal.SIGSTOP)
                step = asyncio.create_task(take_step_with_critic(client, groups, 9))
                await asyncio.to_thread(waits_in_the_kernel, client.pids[0])
                os.kill(client.pids[1], signal.SIGKILL)
                async with asyncio.timeout(10):
                    with pytest.raises(LearnerError) as failure:
                        await step
            return client.pids, *zip(*steps, strict=True), published, str(failure.value)

    return SimpleNamespace(
        **dict(zip(("pids", "metrics", "values", "advantages", "published", "error"), asyncio.run(main()), strict=True))
    )


def test_the_rank_that_died_is_named_and_the_others_end_with_it(two):
    assert re.match(r"learner rank 1 \(pid \d+\) was killed by SIGKILL", two.error)
    assert all(map(gone, two.pids))


RANKS = """
    import os, signal
    from l0fast.ipc import Channel

    channel, args = Channel.open()
    channel.ready(parameters=1, device="cpu")
    channel.recv()
    for layer in range(1, args["layers"] + 1):
        channel.progress(f"layer {layer}", 0.2)
    if args["stops"]:
        os.kill(os.getpid(), signal.SIGSTOP)
    channel.recv()
"""


@pytest.mark.parametrize(
    ("layers", "stops", "named"),
    [
        ((3, 3, 3), (False, True, False), "rank 1 made no progress; 2 more wait for it"),
        ((3, 2, 3), (False, False, False), "rank 1 made no progress; 2 more wait for it"),
        ((3, 3, 3), (False, False, False), "rank 0 and rank 1 and rank 2 made no progress \\("),
    ],
)
def test_of_ranks_that_wait_for_each_other_the_one_that_is_stuck_is_named(tmp_path, monkeypatch, layers, stops, named):
    """Stopped, or behind. Ranks without a model: what they say is all that counts."""
    (tmp_path / "stuck_rank.py").write_text(textwrap.dedent(RANKS))
    monkeypatch.syspath_prepend(str(tmp_path))

    async def main():
        ranks = [
            spawn_worker(
                "stuck_rank",
                args={"layers": layers[rank], "stops": stops[rank]},
                name=f"rank {rank}",
                error=LearnerError,
                start_timeout_s=30,
                close_timeout_s=0.1,
            )
            for rank in range(3)
        ]
        async with client_module._all_open(ranks) as workers:
            with shared_bytes("packs") as packs:
                client = LearnerClient(with_learner(stall_timeout_s=0.5), workers, packs)
                with pytest.raises(LearnerError, match=named) as failure:
                    await client.save(tmp_path)
            return str(failure.value)

    error = asyncio.run(main())
    for rank in range(3):
        assert f"rank {rank} (pid" in error
    assert error.count("stuck_rank.py") == 3 - sum(stops), "the stacks of all that can still write them"


def test_ranks_with_a_critic_say_and_do_what_one_process_does(two, model_path, groups):
    policy = PolicyModel(model_path, WITH_CRITIC.learner, num_steps=WITH_CRITIC.num_steps, temperature=1.0)
    critic = CriticModel(policy)
    for step in range(2):
        (packs,), denominator = batch_packs(groups, number_turns(groups), WITH_CRITIC)
        said = critic.values_of(packs, len(packs))
        values = values_of_turns(groups, np.concatenate([pack.advantages for pack in packs]), said)
        for ours, theirs in zip(flat(two.values[step]), flat(values), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        # with lambda = gamma = 1 and a reward of 1 a turn, the returns are the turns still to come
        returns = [[np.arange(len(t.turns), 0, -1.0) for t in group.trajectories] for group in groups]
        critic.accumulate(batch_packs(groups, returns, WITH_CRITIC)[0][0])
        metrics = critic.finish_step(denominator)
        (packs,), denominator = batch_packs(groups, two.advantages[step], WITH_CRITIC)
        policy.step(packs, denominator)
        torch.testing.assert_close(two.published[step], dict(policy.weights()), rtol=0, atol=1e-6)
        assert {name: two.metrics[step][name] for name in metrics} == pytest.approx(metrics, rel=1e-4)
    assert np.abs(np.concatenate(flat(two.values[1]))).min() > 1e-3, "values of 0 test nothing"


def test_the_critic_comes_to_expect_what_is_earned_and_advantages_vanish(two):
    losses = [metrics["critic_loss"] for metrics in two.metrics]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 4
    assert not np.concatenate(flat(two.values[0])).any(), "it starts at 0, and GAE with the returns"
    assert np.concatenate(flat(two.advantages[0])).tolist() == [2.0, 1.0] * 4
    left = np.concatenate(flat(two.advantages[-1]))
    assert np.abs(left).mean() < 0.5 * np.abs([2.0, 1.0]).mean()
    # just what it was wrong by
    np.testing.assert_allclose(left + np.concatenate(flat(two.values[-1])), [2.0, 1.0] * 4, atol=1e-6)


@pytest.mark.parametrize("minibatches", [2, 3, 4])
def test_neither_ranks_nor_the_budget_of_packs_move_a_token_to_another_optimizer_step(make, minibatches):
    rng = np.random.default_rng(5)
    groups = [make.group([make.episode(rng, 3, index=i) for i in range(3)], number=n) for n in range(3)]
    seen = set()
    for pack_tokens in (20, 100, 8192):
        config = with_learner(minibatches=minibatches, pack_tokens=pack_tokens)
        for ranks in (1, 2, 4):
            parts, _ = batch_packs(groups, number_turns(groups), config, ranks)
            # a number tells a turn
            seen.add(tuple(tuple(sorted(n for pack in part for n in pack.advantages.tolist())) for part in parts))
    (cut,) = seen
    assert len(cut) == minibatches
    turns = [set(part) for part in cut]
    assert not turns[0] & turns[1]


def test_two_ranks_take_the_several_steps_of_one_and_say_where_there_are_fewer_than_asked_for(model_path, groups):
    """In packs that would hold the whole batch; the critic too."""
    config = with_learner(
        ranks=2, advantage="gae", critic="copy", critic_lr=6e-3, lr=1e-3, minibatches=3, pack_tokens=8192
    )
    alone = replace(groups[0], trajectories=groups[0].trajectories[:1])
    batches = [groups, groups[::-1], [alone]]

    async def main():
        seen = []
        with shared_weights(model_path) as weights:
            async with learner(config, model_path, weights=weights, log_dir=None) as client:
                for version, batch in enumerate(batches, 1):
                    values = await client.values(batch)
                    advantages = batch_advantages(batch, config, version, values=values)
                    seen.append((values, advantages, await client.step(batch, advantages, version, values=values)))
                    seen[-1] += (copy_of(weights),)
        return seen

    policy = PolicyModel(model_path, config.learner, num_steps=config.num_steps, temperature=1.0)
    critic = CriticModel(policy)
    taken = 0
    for batch, (values, advantages, metrics, published) in zip(batches, asyncio.run(main()), strict=True):
        returns = critic_targets(batch, config.learner, values)
        order = sorted(range(len(batch)), key=lambda i: batch[i].number)
        in_order = [batch[i] for i in order]
        for model, numbers in ((critic, returns), (policy, advantages)):
            parts, denominator = batch_packs(in_order, [numbers[i] for i in order], config)
            for part, packs in enumerate(parts):
                model.accumulate(packs, part=part)
        expected = critic.finish_step(denominator) | policy.finish_step(denominator)
        torch.testing.assert_close(published, dict(policy.weights()), rtol=0, atol=2e-6)
        taken += metrics["optimizer_steps"]
        for model in (policy, critic):
            assert {state["step"].item() for state in model.optimizer.state.values()} == {taken}
        for name in ("loss", "grad_norm", "clip_fraction", "critic_loss", "critic_grad_norm", "optimizer_steps"):
            assert metrics[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name
        if len(batch) > 1:
            assert metrics["optimizer_steps"] == 3
            assert metrics["minibatches_warning"] is None
        else:
            assert metrics["optimizer_steps"] == 1
            assert "minibatches = 3, but rows in the batch are as few as 1" in metrics["minibatches_warning"]


def test_a_head_is_fitted_to_the_states_it_judged_by(model_path, groups):
    """Not to those of the policy that has moved since, where a batch gets several steps."""
    settings = WITH_CRITIC.learner.model_copy(update={"critic": "head", "minibatches": 2, "lr": 1.0})
    with_critic = WITH_CRITIC.model_copy(update={"learner": settings})
    parts, denominator = batch_packs(groups, number_turns(groups), with_critic)
    packs = [pack for part in parts for pack in part]

    def pair():
        policy = PolicyModel(model_path, settings, num_steps=1, temperature=1.0)
        return policy, CriticModel(policy)

    policy, critic = pair()
    _, alone = pair()
    for part, packs_of_it in enumerate(parts):
        alone.accumulate(packs_of_it, part=part)
    with shared_bytes("packs") as shared:
        checkpoints = Checkpoints(policy, 1, critic)
        rank = Rank(policy, critic, checkpoints, None, shared, publishes=False)
        write_payload(packs, shared.reserve(payload_bytes(packs)))
        where = {"num_bytes": payload_bytes(packs), "bounds": [[0, len(parts[0]), len(packs)]]}
        for op in ("fit", "accumulate"):
            rank.answer(Message({"op": op, **where}, b""))
        answer = rank.answer(Message({"op": "finish_step", "denominator": denominator, "policy_version": 1}, b""))
        checkpoints.close()
    expected = alone.finish_step(denominator)
    assert {name: answer["metrics"][name] for name in expected} == expected


def flat(by_group):
    return [turns for group in by_group for turns in group]


def waits_in_the_kernel(pid: int) -> None:
    """Until the process does: here, for a peer."""
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
        os.sched_yield()


@pytest.mark.parametrize(("gpus", "wanted", "ranks"), [(0, 0, 1), (0, 3, 3), (4, 0, 4), (4, 2, 2)])
def test_there_is_a_rank_for_each_gpu_unless_set(monkeypatch, gpus, wanted, ranks):
    monkeypatch.setattr(client_module, "num_gpus", lambda: gpus)
    assert num_ranks(with_learner(ranks=wanted)) == ranks


@pytest.mark.parametrize(("visible", "ours", "gpus"), [
    (None, "0123", 4),
    # a cgroup keeps those of another job closed, whose files are there all the same
    (None, "23", 2),
    ("0,1", "23", 2),
    ("2, 1", "0123", 2),
    ("", "0123", 0),
    # CUDA reads up to the first name that is none; Slurm's of a job that has asked for no GPU
    ("NoDevFiles", "0123", 0),
    ("-1", "0123", 0),
    ("1,-1,2", "0123", 1),
    ("0,4,1", "0123", 1),
    ("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,GPU-61432ca8", "0123", 2),
])  # fmt: skip
def test_gpus_are_those_that_cuda_will_find(monkeypatch, tmp_path, visible, ours, gpus):
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm", "nvidia-caps"):
        (tmp_path / name).touch()
    monkeypatch.setattr(client_module, "_DEVICES", tmp_path)
    monkeypatch.setattr(client_module.os, "access", lambda path, mode: path.name[6:] in set(ours))
    monkeypatch.setattr("importlib.metadata.version", lambda package: "2.11.0")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert num_gpus() == gpus


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(client_module, "num_gpus", lambda: 2)
    with pytest.raises(UsageError, match="set --learner.ranks to 2 or less"):
        num_ranks(with_learner(ranks=3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a torch that can use no GPU")
def test_gpus_that_torch_can_not_use_are_no_reason_to_compute_on_cpus(model_path):
    async def main():
        async with learner(CONFIG, model_path, weights=None, log_dir=None, on_gpus=True):
            pass

    with pytest.raises(UsageError, match="can use none of the GPUs here: is NVIDIA's driver new enough"):
        asyncio.run(main())
