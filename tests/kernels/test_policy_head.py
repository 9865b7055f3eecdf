"""policy_head against its definition: L0's golden losses and gradients, float64, any chunk, and no triton."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from l0fast_kernels.policy_head import k3, policy_head, policy_loss_tokens, token_logprobs, token_stats

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "l0_golden.json").read_text())
INPUTS = {name: torch.tensor(values, dtype=torch.float64) for name, values in GOLDEN["inputs"].items()}
CLIPS = {"clip_low": 0.2, "clip_high": 0.25, "dual_clip": 3.0}


def aggregate(loss: torch.Tensor, mask: torch.Tensor, mode: str) -> torch.Tensor:
    """L0's ways to make one number of the losses of tokens; masked means have + 1e-8 below."""
    masked, tokens = loss * mask, mask.sum(-1)
    match mode:
        case "token-mean":
            return masked.sum() / (mask.sum() + 1e-8)
        case "seq-mean-token-sum":
            return masked.sum(-1).mean()
        case "seq-mean-token-mean":
            return (masked.sum(-1) / tokens).mean()
        case "seq-mean-token-sum-norm":
            return masked.sum() / mask.shape[-1]
    raise AssertionError(mode)


@pytest.mark.parametrize("mode", [name.removeprefix("ppo_") for name in GOLDEN if name.startswith("ppo_")])
def test_the_policy_loss_and_its_gradient_are_those_of_l0(mode):
    golden, mask = GOLDEN[f"ppo_{mode}"], INPUTS["M"]
    lp = INPUTS["lp"].clone().requires_grad_()
    loss, clipped = policy_loss_tokens(lp, INPUTS["old"], INPUTS["A"], **CLIPS)
    total = aggregate(loss, mask, mode)
    total.backward()
    assert total.item() == pytest.approx(golden["loss"], abs=1e-6)
    torch.testing.assert_close(lp.grad, torch.tensor(golden["grad"]).double(), rtol=0, atol=1e-6)
    assert ((clipped * mask).sum() / mask.sum()).item() == pytest.approx(golden["clipfrac"], abs=1e-6)


def test_k3_and_its_gradient_are_those_of_l0():
    lp = INPUTS["lp"].clone().requires_grad_()
    kl = k3(lp, INPUTS["ref"])
    aggregate(kl, INPUTS["M"], "token-mean").backward()
    torch.testing.assert_close(kl.detach(), torch.tensor(GOLDEN["k3"]["k"]).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(lp.grad, torch.tensor(GOLDEN["k3"]["grad"]).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("distance", [-300.0, -50.0, 50.0, 300.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_log_probs_far_apart_leave_loss_and_gradient_finite(distance, advantage):
    lp = torch.tensor([-1.0 + distance], requires_grad=True)
    there = torch.tensor([-1.0])
    loss, _ = policy_loss_tokens(lp, there, torch.tensor([advantage]), **CLIPS)
    (loss + k3(lp, there)).sum().backward()
    assert loss.isfinite().all()
    assert lp.grad is not None
    assert lp.grad.isfinite().all()


# --- the head


def problem(T=23, V=37, D=11, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    return {
        "hidden_TD": normal(T, D),
        "weight_VD": normal(V, D),
        "target_ids_T": torch.randint(V, (T,), generator=g),
        "advantages_T": normal(T).float(),
        "loss_weights_T": (torch.rand(T, generator=g) > 0.3).float(),
        "old_logprobs_T": (normal(T) * 0.5 - 4).float(),
        "ref_logprobs_T": (normal(T) * 0.5 - 4).float(),
    }


def definition(p, *, temperature, kl_coef):
    """The whole [T, V] at once, in float64, differentiated by autograd."""
    hidden, weight = (p[k].double().detach().requires_grad_() for k in ("hidden_TD", "weight_VD"))
    logp_TV = torch.log_softmax(hidden @ weight.T / temperature, -1)
    lp = logp_TV.gather(1, p["target_ids_T"][:, None])[:, 0]
    old = lp.detach() if p["old_logprobs_T"] is None else p["old_logprobs_T"].double()
    A = p["advantages_T"].double()
    ratio = torch.exp(lp - old)
    c = torch.maximum(-A * ratio, -A * ratio.clamp(0.8, 1.25))
    c = torch.where(A < 0, torch.minimum(c, -3 * A), c)
    d = p["ref_logprobs_T"].double() - lp
    kl = (torch.exp(d) - d - 1).clamp(max=10)
    loss = (p["loss_weights_T"] * (c + kl_coef * kl)).sum()
    loss.backward()
    return {
        "loss": loss.detach(),
        "dhidden": hidden.grad,
        "dweight": weight.grad,
        "logprobs": lp.detach(),
        "entropy": -(logp_TV.exp() * logp_TV).sum(-1).detach(),
        "kl": kl.detach(),
    }


def run(p, *, upstream=1.0, **settings):
    p = {
        **p,
        "hidden_TD": p["hidden_TD"].clone().requires_grad_(),
        "weight_VD": p["weight_VD"].clone().requires_grad_(),
    }
    loss, stats = policy_head(**p, **CLIPS, **settings)
    (loss * upstream).backward()
    return {
        "loss": loss.detach(),
        "dhidden": p["hidden_TD"].grad,
        "dweight": p["weight_VD"].grad,
        "logprobs": stats.logprobs,
        "entropy": stats.entropy,
        "kl": stats.kl,
    }


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("old", ["given", "none"])
def test_values_and_gradients_are_those_of_the_definition(temperature, old):
    p = problem(dtype=torch.float32)
    # near enough to the policy's own that every branch of the clips is taken
    lp = token_logprobs(p["hidden_TD"], p["weight_VD"], p["target_ids_T"], temperature)
    offsets = torch.linspace(-1.5, 1.5, len(lp))
    p |= {"old_logprobs_T": lp + offsets if old == "given" else None, "ref_logprobs_T": lp + offsets.flip(0)}
    truth = definition(p, temperature=temperature, kl_coef=0.3)
    ours = run(p, temperature=temperature, kl_coef=0.3, chunk=8)
    for name in ("logprobs", "entropy", "kl"):
        torch.testing.assert_close(
            ours[name].double(), truth[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert ours["loss"].item() == pytest.approx(truth["loss"].item(), rel=1e-5)
    for name in ("dhidden", "dweight"):
        error = (ours[name].double() - truth[name]).norm() / truth[name].norm()
        assert error < 2e-6, f"{name}: relative error {error:.1e}"


def test_the_first_step_on_a_batch_follows_the_log_prob():
    p = problem() | {"old_logprobs_T": None, "ref_logprobs_T": None}
    p["loss_weights_T"] = torch.ones(23)
    hidden = p["hidden_TD"].clone().requires_grad_()
    lp = torch.log_softmax(hidden @ p["weight_VD"].T, -1).gather(1, p["target_ids_T"][:, None])[:, 0]
    (-(p["advantages_T"] * lp)).sum().backward()
    ours = run(p)
    torch.testing.assert_close(ours["dhidden"], hidden.grad, rtol=1e-5, atol=1e-6)
    assert ours["loss"].item() == pytest.approx(-p["advantages_T"].sum().item(), abs=1e-5)


@pytest.mark.parametrize(("chunk", "span"), [(1, 1), (7, 23), (7, 10), (23, 7), (1000, 1000), (2, 1000)])
def test_the_cut_into_chunks_and_spans_changes_nothing(chunk, span, monkeypatch):
    # tiles of two rows, so that parts are as uneven as those of a real batch
    monkeypatch.setattr("l0fast_kernels.policy_head.TILE", 2)
    p = problem()
    whole = run(p, kl_coef=0.1, chunk=23, span=23)
    for name, value in run(p, kl_coef=0.1, chunk=chunk, span=span).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6)


def test_the_gradient_scales_with_what_comes_from_above():
    p = problem()
    once, scaled = run(p), run(p, upstream=0.25)
    torch.testing.assert_close(scaled["dhidden"], 0.25 * once["dhidden"])
    torch.testing.assert_close(scaled["dweight"], 0.25 * once["dweight"])


def test_no_tokens_are_no_loss_and_no_gradient():
    ours = run(problem(T=0))
    assert ours["loss"] == 0
    assert ours["dhidden"].shape == (0, 11)
    assert (ours["dweight"] == 0).all()


def test_a_second_backward_pass_is_refused():
    p = problem()
    p["hidden_TD"].requires_grad_()
    loss, _ = policy_head(**p, **CLIPS)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run the forward again"):
        loss.backward()


def test_a_masked_token_has_no_gradient():
    p = problem()
    p["loss_weights_T"] = torch.zeros(23)
    p["loss_weights_T"][4] = 1.0
    ours = run(p, kl_coef=0.1)
    assert ours["dhidden"][4].abs().sum() > 0
    ours["dhidden"][4] = 0
    assert ours["dhidden"].abs().sum() == 0


def test_bf16_weights_keep_fp32_log_probs():
    p = problem(T=64, V=300, D=32, dtype=torch.bfloat16) | {"old_logprobs_T": None}
    p["hidden_TD"], p["weight_VD"] = p["hidden_TD"] / 4, p["weight_VD"] / 4
    truth, ours = definition(p, temperature=1.0, kl_coef=0.1), run(p, kl_coef=0.1)
    # the logits are a bf16 product here; the softmax and all after it are fp32
    torch.testing.assert_close(ours["logprobs"].double(), truth["logprobs"], rtol=0, atol=3e-2)
    for name in ("dhidden", "dweight"):
        assert ours[name].dtype == torch.bfloat16
        assert (ours[name].double() - truth[name]).norm() / truth[name].norm() < 2e-2


def test_log_probs_alone_are_the_heads():
    p = problem()
    _, stats = policy_head(**p, **CLIPS, temperature=0.8)
    logprobs, entropy = token_stats(p["hidden_TD"], p["weight_VD"], p["target_ids_T"], 0.8, chunk=5)
    torch.testing.assert_close(logprobs, stats.logprobs)
    torch.testing.assert_close(entropy, stats.entropy)
    assert not token_logprobs(p["hidden_TD"].requires_grad_(), p["weight_VD"], p["target_ids_T"]).requires_grad


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"advantages_T": torch.zeros(5)}, "advantages has shape"),
        ({"weight_VD": torch.zeros(37, 12)}, "pick the rows"),
        ({"temperature": 0.0}, "greedy sampling"),
        ({"ref_logprobs_T": None, "kl_coef": 0.1}, "needs ref_logprobs"),
    ],
)
def test_bad_input_is_refused_with_the_remedy(change, remedy):
    with pytest.raises(ValueError, match=remedy):
        policy_head(**(problem() | CLIPS | change))


def test_it_imports_and_computes_without_triton():
    code = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import torch, l0fast_kernels
from l0fast_kernels.policy_head import policy_head
h = torch.ones(2, 4, requires_grad=True)
loss, _ = policy_head(h, torch.eye(4), torch.tensor([0, 3]), advantages_T=torch.ones(2), loss_weights_T=torch.ones(2))
loss.backward()
print(loss.item(), h.grad.shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=100,
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["-2.0", "torch.Size([2,", "4])"]
