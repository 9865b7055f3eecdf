"""LM head and policy loss in one pass over the sampled tokens; [T, V] logits never exist.

    z = h W^T / temperature                           fp32, a chunk of rows at a time
    lp = z[target] - logsumexp(z)                     log-prob of the sampled token
    ratio = exp(lp - old)
    ppo     c = max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high));  if A < 0: c = min(c, -dual_clip A)
    cispo   c = -A stop(clip(ratio, 1 - clip_low, 1 + clip_high)) lp
    d = ref - lp;  kl = clip(exp(d) - d - 1, -10, 10)
    w = loss_weight min(exp(old - sampler), tis_cap)  truncated importance sampling, where the sampler's log-probs are given
    loss = sum over tokens of w (c + kl_coef kl)

The loss of a row depends on that row alone, so its gradient is made on the way forward, while its logits are there:
    dz = dloss/dlp (onehot(target) - softmax(z)) / temperature;   dh = dz W;   dW += dz^T h
Rows go in two sizes: the fp32 logits of a chunk exist at a time, and the dz, of half the bytes, of a span of several chunks:
each span reads and writes all of dW in fp32, so that few of them are wanted.
That is 6 T D V flops (2 for the logits, 2 each for dh and dW), where keeping no logits and recomputing them takes 8. The
bound is the matmuls. What lies between them, the epilogue, is one Triton kernel on CUDA (policy_epilogue.py) and the
plain PyTorch below everywhere else. Peak memory above h, W and their gradients: 4 V bytes a row of a
chunk and 2 V a row of a span.

Clipped ratio: Schulman et al., "Proximal Policy Optimization", https://arxiv.org/abs/1707.06347. Wider upper clip: Yu et al.,
"DAPO", https://arxiv.org/abs/2503.14476. Dual clip: Ye et al., https://arxiv.org/abs/1912.09729. CISPO: MiniMax, "MiniMax-M1",
https://arxiv.org/abs/2506.13585, section 3.1. k3: Schulman, "Approximating KL divergence", http://joschu.net/blog/kl-approx.html.
Truncated importance sampling: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025.
Head in chunks: Liger kernel, https://arxiv.org/abs/2410.10989.

Shape letters, this file only: T sampled tokens, C rows of a chunk, V vocabulary, D hidden size.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut here before exp, which keeps inf * 0 out of the gradient; every clip has long taken hold by then [nats]."""
MAX_K3 = 10.0
"""Bound of one token's k3 [nats]."""
TILE = 128
"""Rows that a matmul's program works on at a time."""

PER_TOKEN = ("advantages", "loss_weights", "old_logprobs", "ref_logprobs", "sampler_logprobs")
"""What an epilogue gets of each token, in the order of the kernel's arguments."""
OUT = ("loss", "logprobs", "entropy", "kl", "clipped")
"""What it says of each."""

Objective = Literal["ppo", "cispo"]
Backend = Literal["auto", "torch", "triton"]


class HeadStats(NamedTuple):
    """What the head saw of each token, all [T] float32, without gradient."""

    logprobs: Tensor
    """Log-prob of the target [nats]."""
    entropy: Tensor
    """Of the policy's distribution at this token [nats]."""
    kl: Tensor
    """k3 of policy and reference; 0 without a reference [nats]."""
    clipped: Tensor
    """1 where the ratio's clip was the loss (ppo) or its weight (cispo), else 0."""


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) from samples of the policy, >= 0: exp(d) - d - 1 with d = ref - policy [nats]."""
    d = (ref_logprobs - logprobs).clamp(max=MAX_LOG_RATIO)
    return (torch.exp(d) - d - 1).clamp(-MAX_K3, MAX_K3)


def policy_loss_tokens(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float, dual_clip: float
) -> tuple[Tensor, Tensor]:
    """Dual-clip PPO loss of each token, and where the ratio's clip was it (1) or not (0). Any shape; elementwise."""
    ratio = torch.exp((logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    worst = torch.maximum(plain, clipped)
    loss = torch.where(advantages < 0, torch.minimum(worst, -dual_clip * advantages), worst)
    return loss, (clipped > plain).to(logprobs.dtype)


def cispo_loss_tokens(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """CISPO loss of each token, and where the clip changed its weight (1) or not (0). Every token keeps a gradient."""
    ratio = torch.exp((logprobs - old_logprobs).detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    weight = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -advantages * weight * logprobs, (weight != ratio).to(logprobs.dtype)


def policy_head(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_ids_T: Tensor,
    *,
    advantages_T: Tensor,
    loss_weights_T: Tensor,
    old_logprobs_T: Tensor | None = None,
    ref_logprobs_T: Tensor | None = None,
    sampler_logprobs_T: Tensor | None = None,
    objective: Objective = "ppo",
    temperature: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.25,
    dual_clip: float = 3.0,
    kl_coef: float = 0.0,
    tis_cap: float = 2.0,
    chunk: int = 512,
    span: int = 2560,
    backend: Backend = "auto",
) -> tuple[Tensor, HeadStats]:
    """Summed policy loss of T sampled tokens, differentiable in `hidden_TD` and `weight_VD`.

    Args:
        hidden_TD: [T, D], the last hidden state of the token before each sampled one.
        weight_VD: [V, D], the LM head; the embedding where they are tied.
        target_ids_T: [T] int64, the sampled tokens.
        advantages_T, loss_weights_T: [T] float32; weight 0 masks a token.
        old_logprobs_T: [T] float32, of the policy before the first optimizer step on this batch; None while there was
            none: the ratio is 1, and its gradient that of the log-prob.
        ref_logprobs_T: [T] float32, of the frozen reference; needed when kl_coef > 0.
        sampler_logprobs_T: [T] float32, of the engine that sampled the tokens. Where given, a token's loss is weighted by
            the ratio of the old policy to the sampler, cut at `tis_cap`; None trusts the sampler.
        objective: "ppo", the clipped ratio, or "cispo", the log-prob weighted by the clipped ratio.
        temperature: that of the sampler, > 0.
        chunk: rows whose logits exist at a time.
        span: rows whose gradients by logits exist at a time.
        backend: of the epilogue. "auto": triton on CUDA, torch elsewhere.

    Returns:
        The sum over tokens, a float32 scalar (divide it by the global number of tokens), and what was seen of each token.

    Raises:
        ValueError: shapes that don't fit, temperature <= 0, a KL term without its reference, an objective there is not.
    """
    T = len(hidden_TD)
    per_token = {
        "advantages": advantages_T,
        "loss_weights": loss_weights_T,
        "old_logprobs": old_logprobs_T,
        "ref_logprobs": ref_logprobs_T,
        "sampler_logprobs": sampler_logprobs_T,
    }
    for name, values in ({"target_ids": target_ids_T} | per_token).items():
        if values is not None and values.shape != (T,):
            raise ValueError(f"{name} has shape {list(values.shape)} but hidden has {T} rows; give one for each row")
    if kl_coef > 0 and ref_logprobs_T is None:
        raise ValueError(f"kl_coef = {kl_coef} needs ref_logprobs; pass them, or kl_coef=0")
    if objective not in ("ppo", "cispo"):
        raise ValueError(f"objective is {objective!r}; give 'ppo' or 'cispo'")
    _check_head(hidden_TD, weight_VD, temperature)
    settings = {
        "objective": objective,
        "temperature": temperature,
        "clip_low": clip_low,
        "clip_high": clip_high,
        "dual_clip": dual_clip,
        "kl_coef": kl_coef,
        "tis_cap": tis_cap,
        "max_log_ratio": MAX_LOG_RATIO,
        "max_k3": MAX_K3,
        "chunk": chunk,
        "span": span,
        "backend": backend,
    }
    loss_sum, *stats = _PolicyHead.apply(hidden_TD, weight_VD, target_ids_T, per_token, settings)
    return loss_sum, HeadStats(*stats)


@torch.no_grad()
def token_stats(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    ids_T: Tensor,
    temperature: float = 1.0,
    chunk: int = 512,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-prob of `ids_T` under softmax(hidden W^T / temperature) and that distribution's entropy, each [T] float32 [nats].

    No gradient; arguments as in `policy_head`.
    """
    _check_head(hidden_TD, weight_VD, temperature)
    settings = _NO_LOSS | {"temperature": temperature, "chunk": chunk, "span": chunk, "backend": backend}
    _, _, seen = _chunks(hidden_TD, weight_VD, ids_T, dict.fromkeys(PER_TOKEN), settings, False, False)
    return seen["logprobs"], seen["entropy"]


def token_logprobs(hidden_TD: Tensor, weight_VD: Tensor, ids_T: Tensor, temperature: float = 1.0) -> Tensor:
    """The log-probs of `token_stats` alone, [T] float32 [nats]."""
    return token_stats(hidden_TD, weight_VD, ids_T, temperature)[0]


def _check_head(hidden_TD: Tensor, weight_VD: Tensor, temperature: float) -> None:
    if hidden_TD.ndim != 2 or weight_VD.ndim != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"expected hidden [T, D] and weight [V, D], got {list(hidden_TD.shape)} and {list(weight_VD.shape)}; "
            "pick the rows of the sampled tokens first"
        )
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}; greedy sampling has no log-probability")


class _PolicyHead(torch.autograd.Function):
    """The gradients are made in `forward`; `backward` scales them by what comes from above."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        target_ids_T: Tensor,
        per_token: Mapping[str, Tensor | None],
        settings: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        dhidden_TD, dweight_VD, seen = _chunks(
            hidden_TD, weight_VD, target_ids_T, per_token, settings, *ctx.needs_input_grad[:2]
        )
        # not saved as tensors are: backward uses their memory up
        ctx.made = dhidden_TD, dweight_VD
        ctx.dtypes = hidden_TD.dtype, weight_VD.dtype
        stats = [seen[name] for name in HeadStats._fields]
        ctx.mark_non_differentiable(*stats)
        return seen["loss"].sum(), *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        made, ctx.made = ctx.made, None
        if made is None:
            raise RuntimeError("policy_head keeps its gradients for one backward pass; run the forward again")
        scaled = (_scaled(grad, grads[0], dtype) for grad, dtype in zip(made, ctx.dtypes, strict=True))
        return *scaled, None, None, None


def _scaled(grad: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """grad x factor in `dtype`, in its own memory if it can be: an fp32 copy of dW would be the largest tensor of a step."""
    if grad is None:
        return None
    return torch.mul(grad, factor, out=grad if grad.dtype == dtype else torch.empty_like(grad, dtype=dtype))


_NO_LOSS = {"objective": "ppo"} | dict.fromkeys(
    ("clip_low", "clip_high", "dual_clip", "kl_coef", "tis_cap", "max_log_ratio", "max_k3"), 0.0
)
"""Settings of an epilogue that computes no loss: the kernel wants them all the same."""


def _chunks(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_ids_T: Tensor,
    per_token: Mapping[str, Tensor | None],
    settings: dict[str, Any],
    want_dhidden: bool,
    want_dweight: bool,
) -> tuple[Tensor | None, Tensor | None, dict[str, Tensor]]:
    """For each chunk of rows: logits, epilogue, gradients. Returns dhidden, dweight (float32), and loss and stats of each token."""
    T, V = len(hidden_TD), len(weight_VD)
    on_cuda = hidden_TD.is_cuda
    backend = settings["backend"]
    if backend == "auto":
        backend = "triton" if on_cuda else "torch"
    if backend == "triton":
        from l0fast_kernels.policy_epilogue import triton_epilogue as epilogue
    else:
        epilogue = torch_epilogue
    low_precision = hidden_TD.dtype in (torch.bfloat16, torch.float16)
    if low_precision and not on_cuda:
        # the CPU has no product of bf16 operands with an fp32 result
        hidden_TD, weight_VD, low_precision = hidden_TD.float(), weight_VD.float(), False
    seen = {name: torch.empty(T, dtype=torch.float32, device=hidden_TD.device) for name in OUT}
    dhidden_TD = torch.empty_like(hidden_TD) if want_dhidden else None
    dweight_VD = torch.empty_like(weight_VD, dtype=torch.float32) if want_dweight else None
    want_grad = want_dhidden or want_dweight
    span = _even(T, settings["span"])
    chunk = _even(span, settings["chunk"])
    logits = hidden_TD.new_empty(chunk, V, dtype=torch.float32)
    dlogits = hidden_TD.new_empty(span, V) if want_grad else None
    for start in range(0, T, span):
        end = min(start + span, T)
        for first in range(start, end, chunk):
            rows = slice(first, min(first + chunk, end))
            logits_CV = logits[: rows.stop - first]
            if low_precision:
                torch.mm(hidden_TD[rows], weight_VD.T, out_dtype=torch.float32, out=logits_CV)
            elif hidden_TD.dtype == torch.float32:
                torch.mm(hidden_TD[rows], weight_VD.T, out=logits_CV)
            else:
                logits_CV.copy_(hidden_TD[rows] @ weight_VD.T)
            epilogue(
                logits_CV,
                None if dlogits is None else dlogits[first - start : rows.stop - start],
                target_ids_T[rows],
                {name: None if values is None else values[rows] for name, values in per_token.items()},
                {name: values[rows] for name, values in seen.items()},
                settings,
            )
        if dlogits is None:
            continue
        dlogits_SV, hidden_SD = dlogits[: end - start], hidden_TD[start:end]
        if dhidden_TD is not None:
            torch.mm(dlogits_SV, weight_VD, out=dhidden_TD[start:end])
        if dweight_VD is not None:
            # beta = 0 ignores what is there
            beta = 0.0 if start == 0 else 1.0
            if low_precision:
                torch.addmm(dweight_VD, dlogits_SV.T, hidden_SD, out_dtype=torch.float32, beta=beta, out=dweight_VD)
            else:
                dweight_VD.addmm_(dlogits_SV.T.float(), hidden_SD.float(), beta=beta)
    if T == 0 and dweight_VD is not None:
        dweight_VD.zero_()
    return dhidden_TD, dweight_VD, seen


def _even(T: int, most: int) -> int:
    """Rows of a part when T rows are cut into as few as `most` allows; where there are several, whole tiles of a matmul."""
    num_parts = -(-T // most)
    return max(T, 1) if num_parts <= 1 else min(most, -(-T // num_parts // TILE) * TILE)


def torch_epilogue(
    logits_CV: Tensor,
    dlogits_CV: Tensor | None,
    target_ids_C: Tensor,
    per_token: Mapping[str, Tensor | None],
    out: dict[str, Tensor],
    settings: dict[str, Any],
) -> None:
    """What `policy_epilogue.triton_epilogue` does, in plain PyTorch; arguments as there. Overwrites the logits."""
    temperature = settings["temperature"]
    if temperature != 1.0:
        logits_CV.div_(temperature)
    lse_C1 = logits_CV.logsumexp(1, keepdim=True)
    logprobs_C = (logits_CV.gather(1, target_ids_C[:, None]) - lse_C1)[:, 0]
    probs_CV = torch.exp(logits_CV - lse_C1)
    out["logprobs"].copy_(logprobs_C)
    # H = logsumexp(z) - sum p z
    out["entropy"].copy_(lse_C1[:, 0] - torch.einsum("cv,cv->c", probs_CV, logits_CV))
    advantages_C = per_token["advantages"]
    if advantages_C is None:
        return
    weights_C = per_token["loss_weights"]
    assert weights_C is not None
    old_C, ref_C, sampler_C = (per_token[f"{name}_logprobs"] for name in ("old", "ref", "sampler"))
    old_C = logprobs_C if old_C is None else old_C
    if sampler_C is not None:
        gap_C = (old_C - sampler_C).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        weights_C = weights_C * torch.exp(gap_C).clamp(max=settings["tis_cap"])
    with torch.enable_grad():
        # no derivative is written down here: autograd finds them, on C numbers
        lp_C = logprobs_C.detach().requires_grad_()
        clips = {"clip_low": settings["clip_low"], "clip_high": settings["clip_high"]}
        if settings["objective"] == "ppo":
            loss_C, clipped_C = policy_loss_tokens(lp_C, old_C, advantages_C, **clips, dual_clip=settings["dual_clip"])
        else:
            loss_C, clipped_C = cispo_loss_tokens(lp_C, old_C, advantages_C, **clips)
        kl_C = torch.zeros_like(loss_C) if ref_C is None else k3(lp_C, ref_C)
        loss_C = weights_C * (loss_C + settings["kl_coef"] * kl_C)
        (dlp_C,) = torch.autograd.grad(loss_C.sum(), lp_C)
    for name, values in (("loss", loss_C), ("kl", kl_C), ("clipped", clipped_C)):
        out[name].copy_(values.detach())
    if dlogits_CV is not None:
        dlp_C = dlp_C / temperature
        probs_CV.mul_(-dlp_C[:, None])
        probs_CV.scatter_add_(1, target_ids_C[:, None], dlp_C[:, None])
        dlogits_CV.copy_(probs_CV)
