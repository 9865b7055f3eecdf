"""The critic: its loss by hand, whose weights it touches, and that it learns to tell what an episode will earn."""

import numpy as np
import pytest
import torch

from l0fast.config import LearnerConfig, RunConfig
from l0fast.learner.advantage import compute_advantages, critic_targets, number_turns, values_of_turns
from l0fast.learner.client import batch_packs
from l0fast.learner.critic import CriticModel, ValueHead, value_loss
from l0fast.learner.policy_model import PolicyModel

KINDS = {"head": {"critic_lr": 0.05}, "copy": {"critic_lr": 3e-3}}


def run_config(kind, **settings) -> RunConfig:
    settings = {"gamma": 1.0, "kl_coef": 0.0, "whiten": "none", "pack_tokens": 60} | KINDS[kind] | settings
    return RunConfig(learner=LearnerConfig(advantage="gae", critic=kind, **settings))


def critic_of(model_path, config) -> tuple[PolicyModel, CriticModel]:
    policy = PolicyModel(model_path, config.learner, num_steps=10, temperature=1.0)
    return policy, CriticModel(policy)


@pytest.fixture(scope="module")
def groups(make):
    """Episodes that earn 0 or 1 at their second turn, which their first token tells."""

    def episode(first, index):
        turn = make.turn([first, 5, 6], [7, 8])
        return make.trajectory([turn, make.turn([first, 5, 6, 7, 8, 9], [3])], [0.0, float(first % 2)], index)

    return [make.group([episode(first, i) for i in range(2)]) for first in range(20, 30)]


def values_of(critic, groups, config):
    parts, _ = batch_packs(groups, number_turns(groups), config)
    packs = [pack for part in parts for pack in part]
    said = np.concatenate([critic.values(pack).numpy() for pack in packs])
    return values_of_turns(groups, np.concatenate([pack.advantages for pack in packs]), said)


def step(critic, groups, config):
    """What a step does: ask, compute what it should have said, learn."""
    targets = critic_targets(groups, config.learner, values_of(critic, groups, config))
    parts, denominator = batch_packs(groups, targets, config)
    for part, packs in enumerate(parts):
        critic.accumulate(packs, part=part)
    return critic.finish_step(denominator)


def errors(critic, groups, config):
    """What the advantages are of turns that could not have gone any other way: how wrong the critic is."""
    values = values_of(critic, groups, config)
    advantages = compute_advantages(groups, config.learner, np.random.default_rng(0), values=values)
    return np.concatenate([turns for group in advantages for turns in group])


@pytest.mark.parametrize(("kind", "steps"), [("head", 40), ("copy", 12)])
def test_it_learns_what_an_episode_will_earn_and_leaves_the_policy_alone(model_path, groups, kind, steps):
    config = run_config(kind, gae_lambda=1.0, pack_tokens=200)
    policy, critic = critic_of(model_path, config)
    before = {name: p.clone() for name, p in policy.model.named_parameters()}
    assert sorted(set(errors(critic, groups, config))) == [0.0, 1.0], "it starts at 0, and GAE with the rewards"
    first, *_, last = [step(critic, groups, config) for _ in range(steps)]
    assert first["critic_loss"] == pytest.approx(0.25)
    assert first["critic_explained"] == pytest.approx(0)
    assert last["critic_explained"] > 0.8
    # one constant for all would be wrong by .5
    assert np.abs(errors(critic, groups, config)).mean() < 0.2
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in policy.model.named_parameters())


def test_a_head_is_one_row_and_a_copy_trains_its_backbone_too(model_path):
    count = lambda model: sum(p.numel() for p in model.trained.values())  # noqa: E731
    _, head = critic_of(model_path, run_config("head"))
    policy, copied = critic_of(model_path, run_config("copy"))
    assert count(head) == 32 + 1
    # the head of the language model is its embedding here
    assert count(copied) == 32 + 1 + count(policy)
    assert not {p.data_ptr() for p in copied.trained.values()} & {p.data_ptr() for p in policy.trained.values()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_cut_into_packs_changes_nothing(model_path, groups, kind):
    seen = []
    for pack_tokens in (20, 10_000):
        config = run_config(kind, pack_tokens=pack_tokens)
        _, critic = critic_of(model_path, config)
        critic.head.linear.weight.data.fill_(0.05)  # so that the backbone gets a gradient
        seen.append((step(critic, groups, config), {name: p.clone() for name, p in critic.trained.items()}))
    (metrics, weights), (others, other_weights) = seen
    assert metrics == pytest.approx(others, rel=1e-4)
    for name, weight in weights.items():
        # Adam's first step is the sign of the gradient, near enough; where that is rounding noise the sign is too
        assert (weight - other_weights[name]).abs().mean() < 1e-2 * KINDS[kind]["critic_lr"], name


def test_several_minibatches_are_several_steps_and_the_clip_takes_hold(model_path, groups):
    config = run_config("head", minibatches=4, critic_lr=0.3, value_clip=0.01, pack_tokens=20)
    _, critic = critic_of(model_path, config)
    assert step(critic, groups, config)["critic_clip_fraction"] > 0
    assert next(iter(critic.optimizer.state.values()))["step"].item() == 4
    _, whole = critic_of(model_path, run_config("head", pack_tokens=20))
    at_once = step(whole, groups, config)
    assert at_once["critic_clip_fraction"] == 0
    # each part is scaled as a batch of its own: their gradients average to the whole one's, so one is as long at least
    _, still = critic_of(model_path, run_config("head", minibatches=4, critic_lr=1e-9, pack_tokens=20))
    assert step(still, groups, config)["critic_grad_norm"] > 0.999 * at_once["critic_grad_norm"]


def test_the_gradient_is_clipped_and_a_step_that_is_not_finite_is_not_taken(model_path, groups):
    config = run_config("head", grad_clip=1e-3)
    _, critic = critic_of(model_path, config)
    norm = step(critic, groups, config)["critic_grad_norm"]
    moments = [critic.optimizer.state[p]["exp_avg"] for p in critic.trained.values()]
    clipped = sum(m.square().sum().item() for m in moments) ** 0.5 / (1 - config.learner.betas[0])
    assert norm > 1e-3
    assert clipped == pytest.approx(1e-3, rel=1e-2)
    before = critic.head.linear.weight.clone()
    (packs,), denominator = batch_packs(groups, [[np.full(2, np.inf)] * 2 for _ in groups], config)
    critic.accumulate(packs)
    assert not np.isfinite(critic.finish_step(denominator)["critic_grad_norm"])
    assert torch.equal(critic.head.linear.weight, before)
    assert np.isfinite(step(critic, groups, config)["critic_grad_norm"]), "nothing of it is left behind"


@pytest.mark.parametrize("bad", range(3))
def test_of_several_steps_only_the_one_that_is_not_finite_is_not_taken_and_is_named(model_path, groups, bad):
    config = run_config("head", minibatches=3, pack_tokens=20)
    _, critic = critic_of(model_path, config)
    parts, denominator = batch_packs(groups, number_turns(groups), config)
    parts[bad][-1].advantages[0] = np.nan
    for part, packs in enumerate(parts):
        critic.accumulate(packs, part=part)
    metrics = critic.finish_step(denominator)
    assert next(iter(critic.optimizer.state.values()))["step"].item() == 2
    assert np.isnan(metrics["critic_grad_norm"]), "no later step's norm hides it"
    assert f"of optimizer step {bad + 1} of 3 in this batch is not finite" in metrics["critic_skipped"]
    assert metrics["critic_skipped"].count("not finite") == 1
    assert "critic_skipped" not in step(critic, groups, config)


def test_values_are_fp32_over_bf16_states():
    values = ValueHead(32)(torch.ones(3, 32, dtype=torch.bfloat16))
    assert (values.shape, values.dtype) == ((3,), torch.float32)


# --- the loss


def test_the_loss_is_the_hand_computed_one():
    # moved by .3 towards the return, but only .2 of it counts: (.2 - 1)^2 is worse than (.3 - 1)^2, and has no gradient;
    # moved away from it: (-.3 - 1)^2 is the worse one and pulls back; not moved; masked
    values = torch.tensor([0.3, -0.3, 0.5, 9.0], requires_grad=True)
    returns, old = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0.0, 0.0, 0.5, 0.0])
    weights = torch.tensor([1.0, 1.0, 0.5, 0.0])
    loss, clipped = value_loss(values, returns, weights, old_values_R=old, clip=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (0.64 + 1.69 + 0.5 * 0.25))
    torch.testing.assert_close(values.grad, torch.tensor([0.0, -1.3, -0.25, 0.0]))
    assert clipped.tolist() == [1, 0, 0, 0]


def test_before_the_first_update_it_is_the_squared_error():
    values, returns = torch.tensor([0.3, 4.0], requires_grad=True), torch.tensor([1.0, 0.0])
    loss, clipped = value_loss(values, returns, torch.ones(2), clip=0.01)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * (0.49 + 16))
    torch.testing.assert_close(values.grad, values.detach() - returns)
    assert not clipped.any()


def test_shapes_that_do_not_fit_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match="returns has shape"):
        value_loss(torch.zeros(2), torch.zeros(2, 1), torch.ones(2), clip=0.2)
