"""The Triton epilogue against float64, on the GPU where there is one, else in Triton's interpreter."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="kernels are tested where triton is installed")

from l0fast_kernels.policy_epilogue import BLOCK_V, triton_epilogue
from l0fast_kernels.policy_head import MAX_K3, MAX_LOG_RATIO, OUT, PER_TOKEN, policy_head, token_stats, torch_epilogue

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTINGS = {
    "objective": "ppo",
    "temperature": 0.7,
    "clip_low": 0.2,
    "clip_high": 0.25,
    "dual_clip": 3.0,
    "kl_coef": 0.3,
    "tis_cap": 1.5,
    "max_log_ratio": MAX_LOG_RATIO,
    "max_k3": MAX_K3,
}


def problem(C, V, seed=0, dtype=torch.float32):
    """Logits, targets, and for each row numbers that reach every branch of the loss."""
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(C, V, generator=g)).to(dtype)
    targets = torch.randint(V, (C,), generator=g)
    lp = (logits.double() / 0.7).log_softmax(-1).gather(1, targets[:, None])[:, 0].float()
    around = lambda width: lp + width * (2 * torch.rand(C, generator=g) - 1)  # noqa: E731
    per_token = {
        "advantages": torch.randn(C, generator=g),
        "loss_weights": torch.rand(C, generator=g) + 0.5,
        "old_logprobs": around(1.5),
        "ref_logprobs": around(3.0),
        "sampler_logprobs": around(1.0),
    }
    return logits, targets, per_token


def truth(logits, targets, per_token, settings):
    """Everything in float64 by torch's own epilogue, whose loss is held to L0's goldens in test_policy_head.py."""
    exact = logits.double()
    out = {name: torch.empty(len(logits), dtype=torch.float64) for name in OUT}
    dlogits = torch.empty_like(exact)
    doubled = {name: None if x is None else x.double() for name, x in per_token.items()}
    torch_epilogue(exact.clone(), dlogits, targets, doubled, out, settings)
    return out | {"dlogits": dlogits}


def run(logits, targets, per_token, settings, out_dtype=torch.float32):
    """The kernel on outputs full of NaN, the gradient in a wider buffer whose margin must stay untouched."""
    C, V = logits.shape
    out = {name: torch.full((C,), float("nan"), device=DEVICE) for name in OUT}
    buffer = torch.full((C, V + 5), float("nan"), dtype=out_dtype, device=DEVICE)
    on_device = {name: None if x is None else x.to(DEVICE) for name, x in per_token.items()}
    triton_epilogue(logits.to(DEVICE), buffer[:, :V], targets.to(DEVICE), on_device, out, settings)
    assert buffer[:, V:].isnan().all(), "the kernel wrote past the row"
    return {name: x.cpu() for name, x in (out | {"dlogits": buffer[:, :V]}).items()}


def check(ours, theirs, rel=2e-6):
    for name in ("logprobs", "entropy", "kl"):
        torch.testing.assert_close(
            ours[name].double(), theirs[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    torch.testing.assert_close(ours["loss"].double(), theirs["loss"], rtol=1e-5, atol=1e-5)
    assert torch.equal(ours["clipped"].double(), theirs["clipped"])
    error = (ours["dlogits"].double() - theirs["dlogits"]).norm() / theirs["dlogits"].norm()
    assert error < rel, f"gradient: relative error {error:.1e}"


@pytest.mark.parametrize(
    ("objective", "given"),
    [
        *itertools.product(
            ("ppo", "cispo"), [PER_TOKEN, PER_TOKEN[:2], PER_TOKEN[:3], (*PER_TOKEN[:2], "sampler_logprobs")]
        ),
        ("ppo", PER_TOKEN[:4]),
    ],
)
def test_values_and_gradients_are_those_of_float64(objective, given):
    logits, targets, per_token = problem(40, 300)
    per_token = {name: x if name in given else None for name, x in per_token.items()}
    settings = SETTINGS | {"objective": objective, "kl_coef": 0.3 if "ref_logprobs" in given else 0.0}
    theirs = truth(logits, targets, per_token, settings)
    if "old_logprobs" in given:
        assert 0 < theirs["clipped"].sum() < 40, "one side of the clip is not tested"
    check(run(logits, targets, per_token, settings), theirs)


@pytest.mark.parametrize("V", [1, 2, BLOCK_V - 1, BLOCK_V, BLOCK_V + 1, 2 * BLOCK_V + 3])
def test_rows_that_end_anywhere_in_a_tile(V):
    logits, targets, per_token = problem(3, V, seed=V)
    targets[0], targets[1] = 0, V - 1
    settings = SETTINGS
    theirs = truth(logits, targets, per_token, settings)
    if V == 1:
        # the only token there is has probability 1, and nothing to move
        ours = run(logits, targets, per_token, settings)
        assert ours["dlogits"].abs().max() < 1e-6
        torch.testing.assert_close(ours["entropy"], torch.zeros(3), rtol=0, atol=1e-5)
    else:
        check(run(logits, targets, per_token, settings), theirs)


@pytest.mark.parametrize("C", [1, 5])
def test_any_number_of_rows(C):
    logits, targets, per_token = problem(C, 64)
    check(run(logits, targets, per_token, SETTINGS), truth(logits, targets, per_token, SETTINGS))


def test_bf16_gradients_are_the_rounded_ones():
    logits, targets, per_token = problem(20, 500)
    theirs = truth(logits, targets, per_token, SETTINGS)["dlogits"]
    ours = run(logits, targets, per_token, SETTINGS, torch.bfloat16)["dlogits"]
    # half a unit in the last of 8 bits; the interpreter cuts where the GPU rounds, which is a whole one
    unit = 2.0**-8 if DEVICE == "cuda" else 2.0**-7
    torch.testing.assert_close(ours.double(), theirs, rtol=1.01 * unit, atol=1e-6)


def test_logits_far_apart_and_tokens_that_are_impossible_stay_finite():
    logits, targets, per_token = problem(4, BLOCK_V + 100)
    targets[:] = 7
    logits[0, :BLOCK_V] = -float("inf")  # a whole tile without a maximum
    logits[0, 7] = 0.0
    logits[1] *= 1000
    logits[2, 50:] = -float("inf")
    logits[3] += 10_000
    theirs = truth(logits, targets, per_token, SETTINGS)
    ours = run(logits, targets, per_token, SETTINGS)
    assert all(x.isfinite().all() for x in ours.values())
    torch.testing.assert_close(ours["logprobs"].double(), theirs["logprobs"], rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("distance", [-300.0, -21.0, -15.0, 15.0, 300.0])
@pytest.mark.parametrize("objective", ["ppo", "cispo"])
@pytest.mark.parametrize("dual_clip", [3.0, 1e9])
def test_log_probs_far_apart_give_what_torch_gives(distance, objective, dual_clip):
    logits, targets, per_token = problem(6, 100)
    for name in ("old_logprobs", "ref_logprobs", "sampler_logprobs"):
        per_token[name] = per_token[name] + distance
    settings = SETTINGS | {"objective": objective, "dual_clip": dual_clip}
    theirs = truth(logits, targets, per_token, settings)
    ours = run(logits, targets, per_token, settings)
    assert ours["dlogits"].isfinite().all()
    torch.testing.assert_close(ours["dlogits"].double(), theirs["dlogits"], rtol=1e-4, atol=1e-5)


def test_a_masked_row_has_no_gradient():
    logits, targets, per_token = problem(4, 50)
    per_token["loss_weights"] = torch.tensor([0.0, 1.0, 0.0, 1.0])
    moved = run(logits, targets, per_token, SETTINGS | {"objective": "cispo"})["dlogits"].abs().sum(1) > 0
    assert moved.tolist() == [False, True, False, True]


def test_log_probs_alone_need_no_advantages():
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(9, 16, generator=g).to(DEVICE), torch.randn(70, 16, generator=g).to(DEVICE)
    ids = torch.randint(70, (9,), generator=g).to(DEVICE)
    ours, theirs = (token_stats(hidden, weight, ids, 0.9, chunk=4, backend=b) for b in ("triton", "torch"))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_with_the_kernel_is_no_further_from_float64_than_with_torch(dtype):
    g = torch.Generator().manual_seed(4)
    T, V, D = 33, 301, 24
    hidden, weight = (torch.randn(n, D, generator=g) / 3 for n in (T, V))
    hidden, weight = hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype)
    per_token = {f"{name}_T": x.to(DEVICE) for name, x in problem(T, V)[2].items()}
    ids = torch.randint(V, (T,), generator=g).to(DEVICE)
    per_token["old_logprobs_T"] = token_stats(hidden, weight, ids)[0] + torch.linspace(-1, 1, T, device=DEVICE)

    def gradients(backend, dtype=dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden.detach(), weight.detach())]
        loss, _ = policy_head(*leaves, ids, **per_token, kl_coef=0.1, chunk=8, span=16, backend=backend)
        loss.backward()
        return [x.grad.double() for x in leaves]

    exact = gradients("torch", torch.float64)
    for ours, torchs, true in zip(gradients("triton"), gradients("torch"), exact, strict=True):
        error, torchs_error = ((x - true).norm() / true.norm() for x in (ours, torchs))
        assert error < 2.2 * torchs_error + 1e-7
        assert error < (2e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_offsets_beyond_2_to_the_31():
    C, V = 14_500, 151_936
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    assert C * V > 2**31
    logits = torch.randn(C, V, device=DEVICE)
    targets = torch.randint(V, (C,), device=DEVICE)
    per_token = {name: torch.ones(C, device=DEVICE) if i < 2 else None for i, name in enumerate(PER_TOKEN)}
    out = {name: torch.full((C,), float("nan"), device=DEVICE) for name in OUT}
    dlogits = torch.full((C, V), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    settings = SETTINGS | {"kl_coef": 0.0, "temperature": 1.0}
    triton_epilogue(logits, dlogits, targets, per_token, out, settings)
    last = slice(C - 8, C)
    true = logits[last].double().log_softmax(-1)
    torch.testing.assert_close(
        out["logprobs"][last].double(), true.gather(1, targets[last, None])[:, 0], rtol=0, atol=1e-5
    )
    expected = true.exp()
    expected.scatter_add_(1, targets[last, None], -torch.ones(8, 1, dtype=torch.float64, device=DEVICE))
    torch.testing.assert_close(dlogits[last].double(), expected, rtol=1e-2, atol=1e-8)
    assert not dlogits.isnan().any()
