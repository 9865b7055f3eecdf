"""The algorithms: what a name stands for, and hand-computed losses and gradients of each."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from l0fast.cli import parse
from l0fast.config import ALGORITHMS, LearnerConfig
from l0fast.learner.algorithms import gspo_coefficients, sequence_ratios
from l0fast_kernels.policy_head import cispo_loss_tokens, policy_head, policy_loss_tokens

# --- what a name stands for


def test_an_algorithm_stands_for_its_settings():
    config = LearnerConfig(algorithm="dapo")
    assert (config.advantage, config.objective, config.loss_mean) == ("group", "ppo", "token")
    assert (config.clip_low, config.clip_high, config.kl_coef) == (0.2, 0.28, 0.0)
    assert config.lr == LearnerConfig().lr, "what it says nothing of is at its default"


def test_what_is_set_besides_stays_as_it_is_set():
    config = LearnerConfig(algorithm="grpo", kl_coef=0.0, advantage="rloo")
    assert (config.kl_coef, config.advantage, config.loss_mean) == (0.0, "rloo", "sequence")


def test_without_a_name_nothing_is_filled_in_and_l0s_are_the_defaults():
    assert LearnerConfig(algorithm="none") == LearnerConfig()
    assert LearnerConfig(algorithm="reinforce_pp").model_dump(exclude={"algorithm"}) == LearnerConfig().model_dump(
        exclude={"algorithm"}
    )


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_is_made_of_valid_settings_that_survive_being_written_down(name):
    config = LearnerConfig(algorithm=name)
    assert LearnerConfig(**ALGORITHMS[name]).model_dump(exclude={"algorithm"}) == config.model_dump(
        exclude={"algorithm"}
    )
    assert LearnerConfig.model_validate(config.model_dump()) == config
    assert LearnerConfig.model_validate_json(config.model_dump_json(), strict=True) == config
    changed = config.model_dump() | {"clip_high": 7.0}
    assert LearnerConfig.model_validate(changed).clip_high == 7.0


def test_on_the_command_line_a_name_is_one_flag_and_a_recipes_own_settings_win():
    words = ["geography", "--learner.algorithm", "gspo", "--learner.clip-high", "0.01"]
    config = parse(words).config
    assert (config.learner.objective, config.learner.clip_low, config.learner.clip_high) == ("gspo", 3e-4, 0.01)
    assert parse(["geography", "--learner.algorithm", "grpo"]).config.learner.kl_coef == 0.0
    assert parse([*words, "--smoke"]).config.learner == config.learner


# --- the loss of a token


def loss_and_gradient(name, ratio, advantage):
    """Of one token whose policy moved by `ratio` from old = -2, as the algorithm's settings have it: loss, dloss/dlp."""
    config = LearnerConfig(algorithm=name)
    old = torch.tensor([-2.0], dtype=torch.float64)
    lp = (old + math.log(ratio)).requires_grad_()
    A = torch.tensor([advantage], dtype=torch.float64)
    clips = {"clip_low": config.clip_low, "clip_high": config.clip_high}
    if config.objective == "cispo":
        loss, _ = cispo_loss_tokens(lp, old, A, **clips)
    else:
        loss, _ = policy_loss_tokens(lp, old, A, **clips, dual_clip=config.dual_clip)
    (gradient,) = torch.autograd.grad(loss.sum(), lp)
    return loss.item(), gradient.item()


@pytest.mark.parametrize(
    ("name", "ratio", "advantage", "loss", "gradient"),
    [
        ("grpo", 1.1, 2.0, -2.2, -2.2),
        ("grpo", 1.26, 2.0, -2.4, 0.0),  # clipped at 1.2
        ("grpo", 0.7, -1.0, 0.8, 0.0),  # clipped at 0.8
        ("grpo", 5.0, -1.0, 5.0, 5.0),  # no dual clip
        ("dr_grpo", 1.26, 2.0, -2.4, 0.0),
        ("dapo", 1.26, 2.0, -2.52, -2.52),  # clip-higher: 1.28 is not reached
        ("dapo", 1.4, 2.0, -2.56, 0.0),
        ("dapo", 0.7, -1.0, 0.8, 0.0),
        ("reinforce_pp", 1.26, 2.0, -2.5, 0.0),  # L0's 1.25
        ("reinforce_pp", 5.0, -1.0, 3.0, 0.0),  # dual clip
        ("cispo", 1.1, 2.0, -2.2 * (-2 + math.log(1.1)), -2.2),
        ("cispo", 3.0, 2.0, -2.56 * (-2 + math.log(3)), -2.56),  # the weight is clipped, the gradient is not lost
        ("cispo", 0.01, -1.0, 0.01 * (-2 + math.log(0.01)), 0.01),  # no clip below
    ],
)
def test_the_loss_of_a_token_is_the_hand_computed_one(name, ratio, advantage, loss, gradient):
    assert loss_and_gradient(name, ratio, advantage) == pytest.approx((loss, gradient), abs=1e-6)


@pytest.mark.parametrize("name", sorted({"reinforce_pp", "grpo", "dr_grpo", "rloo", "dapo", "cispo"}))
def test_at_ratio_one_every_algorithm_follows_the_log_prob(name):
    for advantage in (-1.5, 2.0):
        assert loss_and_gradient(name, 1.0, advantage)[1] == pytest.approx(-advantage)


# --- GSPO


def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens():
    ratios = np.log([1.0, 4.0, 3.0, 9.0, 7.0])
    s = sequence_ratios(ratios - 2.0, np.full(5, -2.0), np.ones(5), np.array([0, 0, 2, 0, 2]))
    np.testing.assert_allclose(s, [36 ** (1 / 3), 36 ** (1 / 3), 21**0.5, 36 ** (1 / 3), 21**0.5])


def test_masked_tokens_have_no_vote_in_the_ratio():
    d, weights, sequences = np.log([2.0, 100.0, 8.0]), np.array([1.0, 0.0, 0.5]), np.array([0, 0, 0])
    np.testing.assert_allclose(sequence_ratios(d, np.zeros(3), weights, sequences), [4.0] * 3)
    np.testing.assert_allclose(sequence_ratios(d, np.zeros(3), np.zeros(3), sequences), [1.0] * 3)


def test_ratios_beyond_float_are_cut():
    assert np.isfinite(sequence_ratios(np.array([5000.0]), np.zeros(1), np.ones(1), np.array([0])))[0]


@pytest.mark.parametrize(
    ("s", "advantage", "coefficient"),
    [(1.22, 2.0, 2.44), (1.3, 2.0, 0.0), (1.3, -2.0, -2.6), (0.9, 2.0, 1.8), (0.7, -2.0, 0.0), (0.7, 2.0, 1.4), (9.0, 0.0, 0.0), (0.1, 0.0, 0.0)],
)  # fmt: skip
def test_a_sequence_is_clipped_as_a_whole(s, advantage, coefficient):
    d = np.log(s) + np.array([-0.5, 0.5])
    coefficients, clipped = gspo_coefficients(
        d, np.zeros(2), np.full(2, advantage), np.ones(2), np.zeros(2, int), clip_low=0.2, clip_high=0.25
    )
    np.testing.assert_allclose(coefficients, [coefficient] * 2, rtol=1e-6)
    assert coefficients.dtype == np.float32
    assert clipped.tolist() == [coefficient == 0 and advantage != 0] * 2, "an advantage of 0 has nothing to clip"


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-5, 5, width=32)), min_size=1, max_size=20))
def test_before_the_first_update_the_coefficients_are_the_advantages(tokens):
    sequences, advantages = (np.array(column) for column in zip(*tokens, strict=True))
    lp = np.linspace(-3, -0.1, len(tokens))
    coefficients, clipped = gspo_coefficients(
        lp, lp, advantages, np.ones(len(lp)), sequences, clip_low=3e-4, clip_high=4e-4
    )
    np.testing.assert_allclose(coefficients, advantages, rtol=1e-6)
    assert not clipped.any()


def test_the_head_makes_gspos_gradient_of_the_coefficients():
    g = torch.Generator().manual_seed(0)
    lengths, V, D = [3, 5, 1, 4, 2, 6], 17, 8
    T = sum(lengths)
    sequences = np.repeat(np.arange(len(lengths)), lengths)
    hidden, weight = (torch.randn(n, D, generator=g, dtype=torch.float64) for n in (T, V))
    targets = torch.randint(V, (T,), generator=g)
    # three sequences of each sign, whose ratios lie below, within and above the clip
    A = torch.tensor([1.0, -1.0, 2.0, -0.5, -1.5, 0.7], dtype=torch.float64)
    shift = torch.tensor([0.5, -0.5, -0.5, 0.5, 0.01, -0.01], dtype=torch.float64)

    def logprobs(h):
        return torch.log_softmax(h @ weight.T, -1).gather(1, targets[:, None])[:, 0]

    noise = 0.3 * torch.randn(T, generator=g, dtype=torch.float64)
    centred = torch.cat([part - part.mean() for part in noise.split(lengths)])
    old = logprobs(hidden) - (shift[sequences] + centred)
    clips = {"clip_low": 0.2, "clip_high": 0.25}

    # the paper's objective, differentiated
    h = hidden.clone().requires_grad_()
    s = torch.stack([d.mean().exp() for d in (logprobs(h) - old).split(lengths)])
    (-torch.minimum(s * A, s.clamp(1 - 0.2, 1 + 0.25) * A).mean()).backward()

    coefficients, clipped = gspo_coefficients(
        logprobs(hidden).numpy(), old.numpy(), A[sequences].numpy(), np.ones(T), sequences, **clips
    )
    assert 0 < clipped.sum() < T
    ours = hidden.clone().requires_grad_()
    weights = (1 / np.array(lengths))[sequences]  # loss_mean = "sequence"
    loss, _ = policy_head(
        ours,
        weight,
        targets,
        advantages_T=torch.from_numpy(coefficients),
        loss_weights_T=torch.from_numpy(weights).float(),
        **clips,
    )
    (loss / len(lengths)).backward()
    assert h.grad.abs().max() > 1e-3
    torch.testing.assert_close(ours.grad, h.grad, rtol=1e-5, atol=1e-7)
