"""A rank on a GPU computes in bf16 what a CPU does in fp32: each of its settings, the critic, checkpoints, what engines get.

Liger changes transformers' layers for the whole process when a model is loaded for a GPU, and then they work on a GPU alone.
So all that is compared with is computed on the CPU first.
"""

import os
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from l0fast.learner.checkpoint import Checkpoints
from l0fast.learner.critic import CriticModel
from l0fast.learner.policy_model import PolicyModel
from l0fast.learner.rank import process_group

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BF16 = 0.06
"""How far a gradient may be off, of its own size."""
ALL_GRADIENTS = (
    {},
    {"activation_checkpointing": "off"},
    {"activation_checkpointing": "on", "offload": "cpu"},
    {"lora_rank": 2},
    {"lora_rank": 2, "offload": "cpu"},
)
ALL_STEPS = ({}, {"offload": "cpu"}, {"lora_rank": 2}, {"minibatches": 2})


def stepped(policy, packs):
    """A step on like many packs for each of its optimizer steps."""
    for part, indices in enumerate(np.array_split(np.arange(len(packs)), policy.config.minibatches)):
        policy.accumulate([packs[i] for i in indices], part=part)
    return policy.finish_step()


@pytest.fixture(scope="module")
def cpu(program, model_path, packs):
    """What a CPU says to everything that is asked of a GPU below."""
    with_settings = lambda settings: PolicyModel(  # noqa: E731
        model_path, program.CONFIG.model_copy(update=settings), num_steps=10, temperature=1.0
    )
    gradients = {str(s): program.gradients(with_settings(s), packs, len(packs)) for s in ALL_GRADIENTS}
    steps = {}
    for settings in ALL_STEPS:
        policy = with_settings(settings)
        before = program.published(policy)
        steps[str(settings)] = (before, stepped(policy, packs), program.published(policy))
    critics = {
        kind: program.fitted(
            CriticModel(PolicyModel(model_path, getattr(program, kind), num_steps=10, temperature=1.0)),
            packs,
            packs,
            len(packs),
        )
        for kind in ("HEAD", "CONFIG")
    }
    return SimpleNamespace(gradients=gradients, steps=steps, critics=critics)


@pytest.fixture(scope="module")
def new(program, model_path, cpu):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port, listen_fd = server.getsockname()[1], os.dup(server.fileno())
    with process_group("cuda", 0, 1, port, listen_fd, 60):
        yield lambda config=program.CONFIG: PolicyModel(
            model_path, config, num_steps=10, temperature=1.0, device="cuda"
        )


@pytest.mark.parametrize("settings", ALL_GRADIENTS, ids=str)
def test_gradients_are_those_of_a_cpu(new, cpu, program, packs, settings):
    theirs = cpu.gradients[str(settings)]
    ours = program.gradients(new(program.CONFIG.model_copy(update=settings)), packs, len(packs))
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert ours[name].dtype == torch.float32
        assert (ours[name].cpu() - grad).norm() <= BF16 * grad.norm(), name


@pytest.mark.parametrize("settings", ALL_STEPS, ids=str)
def test_a_step_reports_what_one_on_a_cpu_does_and_moves_the_weights_likewise(new, cpu, program, packs, settings):
    before, theirs, expected = cpu.steps[str(settings)]
    policy = new(program.CONFIG.model_copy(update=settings))
    ours = stepped(policy, packs)
    for name in ("loss", "kl", "entropy", "grad_norm"):
        assert ours[name] == pytest.approx(theirs[name], rel=0.05, abs=5e-3), name
    after = program.published(policy)
    moved = torch.cat([(after[name].cpu() - tensor).flatten() for name, tensor in before.items()])
    as_expected = torch.cat([(expected[name] - tensor).flatten() for name, tensor in before.items()])
    # AdamW's first step is almost the sign of the gradient, so that a gradient near 0 may go the other way
    assert (moved - as_expected).norm() < 0.35 * as_expected.norm()


@pytest.mark.parametrize("kind", ["HEAD", "CONFIG"])
def test_the_critic_fits_as_on_a_cpu(new, cpu, program, packs, kind):
    theirs, ours = cpu.critics[kind], program.fitted(CriticModel(new(getattr(program, kind))), packs, packs, len(packs))
    first, second = ours["metrics"]
    assert second["critic_loss"] < first["critic_loss"]
    for of_gpu, of_cpu in zip(ours["metrics"], theirs["metrics"], strict=True):
        assert of_gpu["critic_loss"] == pytest.approx(of_cpu["critic_loss"], rel=0.05)
    np.testing.assert_allclose(ours["values"], theirs["values"], atol=0.05)


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_after_a_checkpoint_it_goes_on(new, program, packs, tmp_path, offload):
    config = program.CONFIG.model_copy(update={"offload": offload})
    policy, other = new(config), new(config)
    critic, of_other = CriticModel(policy), CriticModel(other)
    program.fitted(critic, packs, packs, len(packs))
    policy.step(packs)
    checkpoints, loading = Checkpoints(policy, 5, critic), Checkpoints(other, 5, of_other)
    checkpoints.save(tmp_path / "a", {"position": 3}, policy_version=1)
    checkpoints.wait()
    assert loading.load(tmp_path / "a") == 1
    torch.testing.assert_close(program.published(other), program.published(policy), rtol=0, atol=0)
    torch.testing.assert_close(program.weights_of(of_other), program.weights_of(critic), rtol=0, atol=0)
    for one in (policy, other):
        one.step(packs)
    # FlashAttention's backward adds up in any order
    ours, theirs = program.published(other), program.published(policy)
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 1e-3 * tensor.norm(), name
    checkpoints.close()
    loading.close()


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2}, {"offload": "cpu"}], ids=str)
def test_engines_get_what_is_exported(new, program, packs, tmp_path, settings):
    policy = new(program.CONFIG.model_copy(update=settings))
    policy.step(packs)
    policy.save(tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    sent = dict(pair for bucket in policy.buckets(5000, torch.bfloat16) for pair in bucket)
    assert sent.keys() == exported.keys()
    for name, tensor in sent.items():
        assert tensor.is_cuda, "an engine reads it where it lies, on its GPU"
        assert torch.equal(tensor.cpu(), exported[name].to(torch.bfloat16)), name
