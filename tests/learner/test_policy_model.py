"""The optimizer step: exactly the gradient of the turns, however they were merged and packed."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    ApertusConfig,
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    GPT2Config,
    GraniteConfig,
    MistralConfig,
    MistralForCausalLM,
    PhiConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    XGLMConfig,
)

from l0fast.config import LearnerConfig
from l0fast.errors import UsageError
from l0fast.learner.packing import pack_rows, row_of
from l0fast.learner.policy_model import PolicyModel, learning_rate
from l0fast.segments import segments_of

KL_COEF = 0.1
TINY = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
WINDOWED = TINY | {"num_hidden_layers": 2, "num_key_value_heads": 2, "sliding_window": 24}


def policy_of(model_path, temperature=1.0, **settings):
    """The sampler's log-probs here are made up, so nothing is weighted by them unless a test is about that."""
    config = LearnerConfig(**{"tis_cap": 0.0} | settings)
    return PolicyModel(model_path, config, num_steps=10, temperature=temperature)


@pytest.fixture
def policy(model_path):
    return policy_of(model_path, kl_coef=KL_COEF)


def stepped(policy, packs, **kwargs):
    """Metrics of one step, and the gradients that the optimizer got."""
    seen = {}

    def look(*_):
        seen.update({name: p.grad.clone() for name, p in policy.model.named_parameters()})

    hook = policy.optimizer.register_step_pre_hook(look)
    try:
        return policy.step(packs, **kwargs), seen
    finally:
        hook.remove()


def accumulate_in_parts(policy, packs, num_parts):
    """Like many packs for each of so many optimizer steps, in their order."""
    for part, indices in enumerate(np.array_split(np.arange(len(packs)), num_parts)):
        policy.accumulate([packs[i] for i in indices], part=part)


@pytest.fixture
def batch(make):
    """Two groups of episodes, some trimmed, and an advantage for each turn."""
    rng = np.random.default_rng(3)
    shapes = [[(3, None), (4, 2), (1, None)], [(5, 3), (2, None)]]
    groups = [[make.episode(rng, n, trim, i) for i, (n, trim) in enumerate(group)] for group in shapes]
    return [[(trajectory, rng.normal(size=len(trajectory.turns))) for trajectory in group] for group in groups]


def packs_of(batch, budget, **kwargs):
    return pack_rows(
        [[row_of(s, t, adv) for t, adv in group for s in segments_of(t)] for group in batch],
        budget,
        **kwargs,
    )


def gradients(policy, packs):
    """Mean loss over the sampled tokens of `packs`, and its gradients by name."""
    policy.model.zero_grad(set_to_none=True)
    count = sum(len(pack.predictors) for pack in packs)
    loss = 0.0
    for pack in packs:
        loss_sum, _ = policy.forward(pack, policy.reference_logprobs(pack))
        (loss_sum / count).backward()
        loss += loss_sum.item() / count
    return loss, {name: p.grad.clone() for name, p in policy.model.named_parameters()}


def move_away(policy):
    """The KL term has no gradient at the reference itself."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in policy.model.parameters():
            p += 0.02 * torch.randn_like(p)


def per_turn_gradients(policy, model_path, batch):
    """The definition: each turn a row of its own through the stock model, log_softmax of everything, plain autograd."""
    stock = AutoModelForCausalLM.from_pretrained(model_path, attn_implementation="eager")
    reference = AutoModelForCausalLM.from_pretrained(model_path, attn_implementation="eager")
    stock.load_state_dict(policy.model.state_dict())
    losses = []
    for trajectory, advantages in [pair for group in batch for pair in group]:
        for turn, advantage in zip(trajectory.turns, advantages, strict=True):
            ids = torch.tensor([turn.prompt_ids + turn.response_ids])
            sampled = slice(len(turn.prompt_ids) - 1, -1)
            targets = torch.tensor(turn.response_ids)[:, None]
            lp = torch.log_softmax(stock(ids).logits[0, sampled], -1).gather(1, targets)[:, 0]
            with torch.no_grad():
                ref = torch.log_softmax(reference(ids).logits[0, sampled], -1).gather(1, targets)[:, 0]
            kl = torch.exp(ref - lp) - (ref - lp) - 1
            losses.append(-advantage * torch.exp(lp - lp.detach()) + KL_COEF * kl)
    loss = torch.cat(losses).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in stock.named_parameters()}


def assert_same(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], abs=1e-6)
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in theirs[1].items():
        assert grad.abs().max() > 1e-3, f"{name}: a gradient of nothing tests nothing"
        worst = (ours[1][name] - grad).abs().max().item()
        assert worst < 1e-6, f"{name}: max |dg| {worst:.1e} of {grad.abs().max():.1e}"


def test_merged_and_packed_turns_have_the_gradients_of_single_turns(policy, model_path, batch):
    move_away(policy)
    packs = packs_of(batch, 64)
    turns = sum(len(t.turns) for group in batch for t, _ in group)
    assert sum(len(pack.cu_seqlens) - 1 for pack in packs) < turns, "nothing was merged"
    assert len(packs) > 1
    assert_same(gradients(policy, packs), per_turn_gradients(policy, model_path, batch))


@pytest.fixture
def siblings(make):
    """A group of one prompt: responses that differ at once, later, only in what follows, and not at all; and a stranger."""
    prompt, answer = (5, 6, 7, 8, 9, 1), (3, 4)
    first, second, third = (11, 12, 13), (11, 12, 14), (20, 21)
    episodes = [
        [(prompt, first), ((*prompt, *first, *answer), (15, 16))],
        [(prompt, first), ((*prompt, *first, *answer), (17,))],
        [(prompt, second)],
        [(prompt, third), ((*prompt, *third, *answer), (18, 19))],
        [(prompt, first), ((*prompt, *first, *answer), (15, 16))],
        [((9, 9, 2), (4, 5, 6))],
    ]
    rng = np.random.default_rng(4)
    played = [
        make.trajectory([make.turn(asked, said) for asked, said in turns], index=i) for i, turns in enumerate(episodes)
    ]
    return [[(trajectory, rng.normal(size=len(trajectory.turns))) for trajectory in played]]


def test_shared_prefixes_have_the_gradients_of_single_turns(policy, model_path, siblings):
    move_away(policy)
    packs = packs_of(siblings, 1000, share_prefixes=True)
    tokens = sum(pack.num_tokens for pack in packs)
    assert tokens <= 0.7 * sum(pack.num_tokens for pack in packs_of(siblings, 1000)), "little was shared"
    assert_same(gradients(policy, packs), per_turn_gradients(policy, model_path, siblings))


@pytest.mark.parametrize("budget", [20, 40])
def test_prefixes_shared_within_small_packs_change_nothing(policy, siblings, budget):
    move_away(policy)
    assert_same(
        gradients(policy, packs_of(siblings, budget, share_prefixes=True)), gradients(policy, packs_of(siblings, 1000))
    )


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_the_cut_into_packs_changes_nothing(policy, batch, budget):
    move_away(policy)
    assert_same(gradients(policy, packs_of(batch, budget)), gradients(policy, packs_of(batch, 100)))


def test_a_step_follows_the_advantages(policy, batch):
    packs = packs_of(batch, 64)
    before = [
        policy.forward(pack, None if policy.reference is None else policy.reference_logprobs(pack))[1].logprobs
        for pack in packs
    ]
    metrics = policy.step(packs)
    after = [policy.forward(pack, policy.reference_logprobs(pack))[1].logprobs for pack in packs]
    gained = sum((torch.from_numpy(p.advantages) * (b - a)).sum() for p, a, b in zip(packs, before, after, strict=True))
    assert gained > 0
    assert metrics["skipped"] is None
    assert metrics["kl"] == pytest.approx(0, abs=1e-6), "the first step is taken at the reference"
    assert metrics["clip_fraction"] == 0, "the ratio is 1"
    assert metrics["sampled_tokens"] == sum(len(p.predictors) for p in packs)
    assert metrics["tokens"] == sum(p.num_tokens for p in packs)
    assert policy.step(packs)["kl"] > 1e-6


def test_a_step_does_not_depend_on_the_cut_into_packs(model_path, batch):
    steps = []
    for budget in (1, 10_000):
        steps.append(stepped(policy_of(model_path, grad_clip=1e9), packs_of(batch, budget)))
    (many, grads_many), (one, grads_one) = steps
    assert many["packs"] > one["packs"]
    torch.testing.assert_close(grads_many, grads_one, rtol=0, atol=1e-6)
    for name in ("loss", "grad_norm", "entropy", "mismatch_k1", "mismatch_k3", "mismatch_max"):
        assert many[name] == pytest.approx(one[name], rel=1e-5, abs=1e-6), name


def test_a_step_moves_the_weights_by_the_scheduled_rate(model_path, batch):
    policy = policy_of(model_path, lr=1e-3, warmup_steps=3)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters() if p.ndim < 2}
    metrics = policy.step(packs_of(batch, 64))
    # AdamW's first step is lr times the sign of the gradient, where nothing decays
    moved = max(
        (policy.model.get_parameter(name).detach() - start).abs().max().item() for name, start in before.items()
    )
    assert metrics["lr"] == pytest.approx(2.5e-4)
    assert moved == pytest.approx(2.5e-4, rel=1e-2)


def test_the_mismatch_compares_policy_and_sampler(policy, batch):
    packs = packs_of(batch, 64)
    logprobs = np.concatenate(
        [policy.forward(pack, policy.reference_logprobs(pack))[1].logprobs.numpy() for pack in packs]
    )
    d = logprobs - np.concatenate([pack.sampler_logprobs for pack in packs])
    metrics = policy.step(packs)
    assert metrics["mismatch_k1"] == pytest.approx(-d.mean(), rel=1e-4)
    assert metrics["mismatch_k3"] == pytest.approx((np.exp(d) - d - 1).mean(), rel=1e-4)
    assert metrics["mismatch_max"] == pytest.approx(np.abs(d).max(), rel=1e-4)


def test_a_masked_token_leaves_the_denominator(policy, batch):
    packs = packs_of(batch, 64)
    packs[0].loss_weights[1:] = 0
    metrics = policy.step(packs)
    assert metrics["sampled_tokens"] == 1 + sum(len(p.predictors) for p in packs[1:])
    counted = [p.advantages[p.loss_weights > 0] for p in packs]
    assert metrics["loss"] == pytest.approx(-np.concatenate(counted).mean(), abs=1e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_not_taken_and_says_so(policy, batch, poison):
    packs = packs_of(batch, 64)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    packs[0].advantages[0] = poison
    metrics = policy.step(packs)
    assert "not finite" in metrics["skipped"]
    for name, p in policy.model.named_parameters():
        assert torch.equal(p, before[name])
    packs[0].advantages[0] = 1.0
    metrics = policy.step(packs)
    assert metrics["skipped"] is None
    assert all(p.isfinite().all() for p in policy.model.parameters())
    assert metrics["lr"] == learning_rate(1, 10, policy.config), "the schedule goes on"


@pytest.mark.parametrize("bad", range(3))
def test_of_several_steps_only_the_one_that_is_not_finite_is_not_taken_and_is_named(model_path, batch, bad):
    packs = packs_of(batch, 40)
    assert len(packs) >= 3
    policy = policy_of(model_path, minibatches=3)
    part = np.array_split(np.arange(len(packs)), 3)[bad]
    packs[part[-1]].advantages[0] = math.nan
    accumulate_in_parts(policy, packs, 3)
    metrics = policy.finish_step()
    assert {state["step"].item() for state in policy.optimizer.state.values()} == {metrics["optimizer_steps"]} == {2}
    assert f"of optimizer step {bad + 1} of 3 in this batch is not finite" in metrics["skipped"]
    assert metrics["skipped"].count("not finite") == 1
    assert math.isnan(metrics["grad_norm"]), "no later step's norm hides it"
    assert all(p.isfinite().all() for p in policy.model.parameters())


def test_a_batch_without_sampled_tokens_is_refused(policy, batch):
    packs = packs_of(batch, 1000)
    packs[0].loss_weights[:] = 0
    with pytest.raises(ValueError, match="no sampled token"):
        policy.step(packs)


def test_gradients_are_clipped_and_reported_as_they_were(model_path, batch):
    norms = {}
    for clip in (1e-3, 1e9):
        metrics, grads = stepped(policy_of(model_path, grad_clip=clip), packs_of(batch, 64))
        norms[clip] = metrics["grad_norm"]
        left = torch.nn.utils.get_total_norm(list(grads.values())).item()
        assert left == pytest.approx(min(clip, norms[clip]), rel=1e-3)
    assert norms[1e-3] == pytest.approx(norms[1e9])


def test_only_matrices_decay(model_path, batch):
    policy = policy_of(model_path, lr=0.5, weight_decay=0.9, warmup_steps=0)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    for p in policy.model.parameters():
        p.grad = torch.zeros_like(p)
    policy.optimizer.step()
    for name, p in policy.model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.55 if p.ndim >= 2 else 1.0))


def test_no_kl_term_loads_no_reference(model_path, batch):
    policy = policy_of(model_path, kl_coef=0)
    assert policy.reference is None
    assert policy.step(packs_of(batch, 64))["kl"] == 0


def test_the_temperature_is_that_of_the_sampler(model_path, batch):
    policy = policy_of(model_path, temperature=0.5)
    (pack,) = packs_of(batch, 10_000)
    _, stats = policy.forward(pack, policy.reference_logprobs(pack))
    stock = AutoModelForCausalLM.from_pretrained(model_path)
    row = torch.from_numpy(pack.token_ids[: pack.cu_seqlens[1]])
    with torch.no_grad():
        logprobs = torch.log_softmax(stock(row[None]).logits[0] / 0.5, -1)
    at, target = int(pack.predictors[0]), int(pack.target_ids[0])
    assert stats.logprobs[0].item() == pytest.approx(logprobs[at, target].item(), abs=1e-5)


# --- groups as they finish, and several steps a batch


def test_groups_one_by_one_in_any_order_make_the_step_of_all_at_once(model_path, batch):
    rng = np.random.default_rng(1)
    groups = [packs_of([group], 64) for group in [*batch, *batch]]
    together = stepped(policy_of(model_path), [pack for packs in groups for pack in packs])
    for order in (range(4), rng.permutation(4), rng.permutation(4)):
        policy = policy_of(model_path)
        for g in order:
            policy.accumulate(groups[g])
        metrics, grads = stepped(policy, [])
        torch.testing.assert_close(grads, together[1], rtol=0, atol=1e-7)
        for name in ("loss", "grad_norm", "kl", "entropy", "mismatch_k3", "sampled_tokens"):
            assert metrics[name] == pytest.approx(together[0][name], rel=1e-5, abs=1e-6), name


def test_a_step_starts_from_no_gradient_and_no_count(model_path, batch):
    packs = packs_of(batch, 64)
    policy = policy_of(model_path, lr=1e-12, grad_clip=1e9)
    first, again = stepped(policy, packs), stepped(policy, packs)
    torch.testing.assert_close(again[1], first[1], rtol=0, atol=1e-6)
    assert again[0]["sampled_tokens"] == first[0]["sampled_tokens"]
    assert all(p.grad is None for p in policy.model.parameters()), "they would take memory while others generate"


def test_the_denominator_divides_the_sum(model_path, batch):
    packs = packs_of(batch, 64)
    tokens, by_tokens = stepped(policy_of(model_path, grad_clip=1e9), packs)
    of_ten, by_ten = stepped(policy_of(model_path, grad_clip=1e9), packs, denominator=10.0)
    share = tokens["sampled_tokens"] / 10
    assert of_ten["loss"] == pytest.approx(tokens["loss"] * share)
    assert of_ten["grad_norm"] == pytest.approx(tokens["grad_norm"] * share)
    torch.testing.assert_close(by_ten, {name: grad * share for name, grad in by_tokens.items()}, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("objective", ["ppo", "cispo", "gspo"])
def test_the_first_of_several_steps_is_that_of_its_packs_alone_and_the_second_sees_a_ratio(
    model_path, batch, objective
):
    packs = packs_of(batch, 40)
    half = len(packs) // 2 + len(packs) % 2
    clips = {"clip_low": 0.01, "clip_high": 0.01}
    policy = policy_of(model_path, minibatches=2, objective=objective, lr=1e-2, warmup_steps=0, grad_clip=1e9, **clips)
    seen = []
    policy.optimizer.register_step_pre_hook(
        lambda *_: seen.append({name: p.grad.clone() for name, p in policy.model.named_parameters()})
    )
    accumulate_in_parts(policy, packs, 2)
    assert not seen, "packs wait for the step"
    num_tokens = sum(len(pack.predictors) for pack in packs)
    metrics = policy.finish_step(num_tokens)
    assert len(seen) == 2
    _, alone = stepped(policy_of(model_path, grad_clip=1e9), packs[:half], denominator=num_tokens / 2)
    torch.testing.assert_close(seen[0], alone, rtol=0, atol=1e-6)
    assert metrics["clip_fraction"] > 0, "by the second step the policy has moved"
    assert policy.step_index == 1, "of the schedule"
    assert metrics["sampled_tokens"] == num_tokens


def test_the_mismatch_is_that_of_the_weights_before_the_first_of_several_steps(model_path, batch):
    """An engine that agrees with the learner still does when the learner has moved on."""
    packs = packs_of(batch, 40)
    policy = policy_of(model_path, minibatches=2, lr=1e-2, warmup_steps=0)
    for pack in packs:
        pack.sampler_logprobs[:] = policy.logprobs(pack).numpy()
    before = {name: p.clone() for name, p in policy.model.named_parameters()}
    accumulate_in_parts(policy, packs, 2)
    metrics = policy.finish_step()
    assert not all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters())
    assert metrics["mismatch_max"] < 1e-5


def test_gspo_has_the_gradient_of_its_definition(model_path, batch):
    packs = packs_of(batch, 10_000)
    policy = policy_of(model_path, objective="gspo", clip_low=0.02, clip_high=0.02, kl_coef=0)
    with torch.no_grad():
        old = [policy.logprobs(pack) for pack in packs]
        move_away(policy)
    for pack, old_logprobs in zip(packs, old, strict=True):
        pack.advantages[:] = np.where(pack.sequences % 2, 1.0, -1.0)
        policy.model.zero_grad(set_to_none=True)
        _, stats = policy.forward(pack, None, old_logprobs)
        loss_sum, _ = policy.forward(pack, None, old_logprobs)
        loss_sum.backward()
        ours = {name: p.grad.clone() for name, p in policy.model.named_parameters()}

        policy.model.zero_grad(set_to_none=True)
        head = lambda hidden, weight, pack=pack: (  # noqa: E731
            torch.log_softmax(hidden @ weight.T, -1).gather(1, torch.from_numpy(pack.target_ids)[:, None])[:, 0]
        )
        logprobs = policy.run(policy.root, pack, head)
        loss = 0.0
        clipped = 0
        for s in np.unique(pack.sequences):
            of = torch.from_numpy(pack.sequences == s)
            ratio = torch.exp((logprobs - old_logprobs)[of].mean())
            advantage = pack.advantages[pack.sequences == s][0].item()
            bounded = ratio.clamp(1 - 0.02, 1 + 0.02)
            clipped += int(of.sum()) * bool(bounded * advantage < ratio * advantage)
            # |o_i| tokens of weight 1 each
            loss = loss - int(of.sum()) * torch.minimum(ratio * advantage, bounded * advantage)
        loss.backward()
        theirs = {name: p.grad for name, p in policy.model.named_parameters()}
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert 0 < clipped < len(pack.predictors)
        assert stats.clipped.sum() == clipped


def test_what_the_engine_found_too_likely_counts_less(model_path, batch):
    packs = packs_of(batch, 10_000)
    exact, weighted = policy_of(model_path, kl_coef=0), policy_of(model_path, kl_coef=0, tis_cap=1.5)
    for pack in packs:
        logprobs = exact.logprobs(pack).numpy()
        pack.sampler_logprobs[:] = logprobs + np.where(np.arange(len(logprobs)) % 2, np.log(2), -np.log(4))
        by_hand = pack.advantages * np.where(np.arange(len(logprobs)) % 2, 0.5, 1.5)
        _, ours = stepped(weighted, [pack])
        pack.advantages[:] = by_hand
        _, theirs = stepped(exact, [pack])
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_gspo_weighs_a_sequences_tokens_as_the_head_would_what_was_old_against_what_the_engine_said(model_path, batch):
    """Policy, KL term and all: the ratio of the weights is old to sampler, not the moved policy to sampler."""
    settings = {"kl_coef": KL_COEF, "objective": "gspo", "clip_low": 0.5, "clip_high": 0.5}
    plain, weighted = policy_of(model_path, **settings), policy_of(model_path, **settings, tis_cap=1.5)
    packs = packs_of(batch, 10_000)
    old = [plain.logprobs(pack) for pack in packs]
    # half as likely; likelier than the cap; further than float32's exp goes
    gaps = [np.resize(np.array([-np.log(2), np.log(4), 100.0], np.float32), len(lp)) for lp in old]
    move_away(plain)
    move_away(weighted)
    for pack, old_logprobs, gap in zip(packs, old, gaps, strict=True):
        reference = plain.reference_logprobs(pack)
        pack.sampler_logprobs[:] = old_logprobs.numpy() - gap
        loss, _ = weighted.forward(pack, reference, old_logprobs)
        loss.backward()
        # ratios are means over tokens with a weight: what the weight is does not matter
        pack.loss_weights[:] *= np.where(gap < 0, 0.5, 1.5).astype(np.float32)
        by_hand, _ = plain.forward(pack, reference, old_logprobs)
        by_hand.backward()
        assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    grads = [{name: p.grad for name, p in policy.model.named_parameters()} for policy in (weighted, plain)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_the_learning_rate_rises_then_falls_linearly():
    config = LearnerConfig(lr=1.0, warmup_steps=3, final_lr_ratio=0.1)
    rates = [learning_rate(step, 13, config) for step in range(15)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    np.testing.assert_allclose(np.diff(rates[3:13]), -0.1)
    np.testing.assert_allclose(rates[12:], 0.1)


def test_the_learning_rate_falls_along_a_cosine_or_not_at_all():
    config = LearnerConfig(lr=1.0, warmup_steps=3, final_lr_ratio=0.1, schedule="cosine")
    rates = [learning_rate(step, 14, config) for step in range(16)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    np.testing.assert_allclose(rates[8], 0.55)
    np.testing.assert_allclose(rates[13:], 0.1)
    assert rates[4] > 0.97, "slowly at first"
    constant = LearnerConfig(lr=1.0, warmup_steps=3, schedule="constant")
    assert [learning_rate(step, 14, constant) for step in (2, 3, 13, 20)] == [0.75, 1.0, 1.0, 1.0]


def test_the_learning_rate_of_a_run_shorter_than_its_warm_up():
    config = LearnerConfig(lr=1.0, warmup_steps=3)
    assert [learning_rate(step, 2, config) for step in range(2)] == [0.25, 0.5]
    assert learning_rate(0, 1, LearnerConfig(lr=1.0, warmup_steps=0)) == 1.0


def test_published_weights_are_the_models(policy):
    tensors = {name: torch.zeros_like(p) for name, p in policy.model.named_parameters()}
    policy.publish(tensors)
    for name, p in policy.model.named_parameters():
        assert torch.equal(tensors[name], p)
    tensors.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"differ in \['model.norm.weight'\]"):
        policy.publish(tensors)


def test_a_model_is_written_where_deepspeed_is_installed_and_can_not_be_imported(policy, tmp_path, monkeypatch):
    """As one that is older than torch, or has no CUDA toolkit: accelerate, which transformers asks, would import it."""
    package, about = tmp_path / "site" / "deepspeed", tmp_path / "site" / "deepspeed-0.14.0.dist-info"
    package.mkdir(parents=True)
    about.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('CUDA_HOME does not exist, unable to compile CUDA op(s)')")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.14.0\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    policy.save(tmp_path / "model")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, p in policy.model.named_parameters():
        assert torch.equal(written.get_parameter(name), p)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(UsageError, match="can't be loaded as a model"):
        PolicyModel(tmp_path, LearnerConfig(), num_steps=1, temperature=1.0)


@pytest.mark.parametrize("layers", [None, ["full_attention", "sliding_attention"]])
def test_rows_longer_than_a_models_window_are_refused_when_it_is_loaded(tmp_path, layers):
    """And not at the first step, after a whole evaluation."""
    if layers is None:
        model = MistralForCausalLM(MistralConfig(**WINDOWED))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**WINDOWED, layer_types=layers, use_sliding_window=True))
    model.save_pretrained(tmp_path)
    new = lambda max_row: PolicyModel(tmp_path, LearnerConfig(), num_steps=1, temperature=1.0, max_row=max_row)  # noqa: E731
    new(24)
    with pytest.raises(UsageError, match="window of 24 tokens.*--agent.context-tokens to 24 or less"):
        new(25)


def test_a_window_that_no_layer_has_is_none(tmp_path):
    config = Qwen3Config(**WINDOWED, layer_types=["full_attention"] * 2, use_sliding_window=True)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    PolicyModel(tmp_path, LearnerConfig(), num_steps=1, temperature=1.0, max_row=25)


def test_quantized_weights_are_refused(model_path, tmp_path):
    folder = shutil.copytree(model_path, tmp_path / "fp8")
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("proj.weight")]:
        scale = weights[name].abs().max() / 448
        weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = scale.reshape(1, 1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UsageError, match=r"fp8 holds quantized weights .*: take the model that was quantized$"):
        policy_of(folder)


@pytest.mark.parametrize(
    ("config", "odd"),
    [
        (GraniteConfig(logits_scaling=4.0, **TINY), "logits_scaling = 4.0"),
        (CohereConfig(logit_scale=0.25, **TINY), "logit_scale = 0.25"),
        (PhiConfig(**TINY), "a bias in lm_head"),
        (GPT2Config(vocab_size=61, n_embd=32, n_head=4, n_layer=1), "no lm_head on a model"),
        (Qwen3_5TextConfig(layer_types=["linear_attention"], **TINY), "layers of linear_attention"),
        (Qwen3MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, **TINY), "a mixture of experts"),
        (FalconH1Config(mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, **TINY), "layers of hybrid"),
        (XGLMConfig(vocab_size=61, d_model=32, ffn_dim=48, attention_heads=4, num_layers=1), "an attention of its own"),
        (ApertusConfig(**TINY), "a tensor model.layers.0.mlp.act_fn.beta that is no parameter"),
    ],
    ids=["granite", "cohere", "phi", "gpt2", "qwen3.5", "qwen3-moe", "falcon-h1", "xglm", "apertus"],
)
def test_a_model_whose_logits_are_more_than_attention_and_its_heads_product_is_refused(config, odd, tmp_path):
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=f"^a .* has {odd}, which the learner does not know"):
        policy_of(tmp_path)
