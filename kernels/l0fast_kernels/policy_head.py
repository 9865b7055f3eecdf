"""LM head and policy loss in one pass over the sampled tokens; [T, V] logits never exist.

    z = h W^T / temperature                           fp32, a chunk of rows at a time
    lp = z[target] - logsumexp(z)                     log-prob of the sampled token
    ratio = exp(lp - old);  c = max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high));  if A < 0: c = min(c, -dual_clip A)
    d = ref - lp;  kl = clip(exp(d) - d - 1, -10, 10)
    loss = sum over tokens of weight (c + kl_coef kl)

The loss of a row depends on that row alone, so its gradient is made on the way forward, while its logits are there:
    dz = dloss/dlp (onehot(target) - softmax(z)) / temperature;   dh = dz W;   dW += dz^T h
That is 6 T D V flops (2 for the logits, 2 each for dh and dW), where keeping no logits and recomputing them takes 8. The
bound is the matmuls. Peak memory above h, W and their gradients: one [chunk, V] block and its softmax.

Clipped ratio: Schulman et al., "Proximal Policy Optimization", https://arxiv.org/abs/1707.06347. Wider upper clip: Yu et al.,
"DAPO", https://arxiv.org/abs/2503.14476. Dual clip: Ye et al., https://arxiv.org/abs/1912.09729. k3: Schulman,
"Approximating KL divergence", http://joschu.net/blog/kl-approx.html. Head in chunks: Liger kernel, https://arxiv.org/abs/2410.10989.

Shape letters, this file only: T sampled tokens, C rows of a chunk, V vocabulary, D hidden size.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_LOG_RATIO = 20.0
"""Log-ratios are cut here before exp, which keeps inf * 0 out of the gradient; every clip has long taken hold by then [nats]."""
MAX_K3 = 10.0
"""Bound of one token's k3 [nats]."""


class HeadStats(NamedTuple):
    """What the head saw of each token, all [T] float32, without gradient."""

    logprobs: Tensor
    """Log-prob of the target [nats]."""
    entropy: Tensor
    """Of the policy's distribution at this token [nats]."""
    kl: Tensor
    """k3 of policy and reference; 0 without a reference [nats]."""
    clipped: Tensor
    """1 where the ratio's clip was the loss, else 0."""


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


def policy_head(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_ids_T: Tensor,
    *,
    advantages_T: Tensor,
    loss_weights_T: Tensor,
    old_logprobs_T: Tensor | None = None,
    ref_logprobs_T: Tensor | None = None,
    temperature: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.25,
    dual_clip: float = 3.0,
    kl_coef: float = 0.0,
    chunk: int = 1024,
) -> tuple[Tensor, HeadStats]:
    """Summed policy loss of T sampled tokens, differentiable in `hidden_TD` and `weight_VD`.

    Args:
        hidden_TD: [T, D], the last hidden state of the token before each sampled one.
        weight_VD: [V, D], the LM head; the embedding where they are tied.
        target_ids_T: [T] int64, the sampled tokens.
        advantages_T, loss_weights_T: [T] float32; weight 0 masks a token.
        old_logprobs_T: [T], of the policy before the first optimizer step on this batch; None while there was none: the
            ratio is 1, and its gradient that of the log-prob.
        ref_logprobs_T: [T], of the frozen reference; needed when kl_coef > 0.
        temperature: that of the sampler, > 0.
        chunk: rows whose logits exist at a time.

    Returns:
        The sum over tokens, a float32 scalar (divide it by the global number of tokens), and what was seen of each token.

    Raises:
        ValueError: shapes that don't fit, temperature <= 0, a KL term without its reference.
    """
    T, D = hidden_TD.shape
    per_token = {"target_ids": target_ids_T, "advantages": advantages_T, "loss_weights": loss_weights_T}
    optional = {"old_logprobs": old_logprobs_T, "ref_logprobs": ref_logprobs_T}
    for name, values in (per_token | optional).items():
        if values is not None and values.shape != (T,):
            raise ValueError(f"{name} has shape {list(values.shape)} but hidden has {T} rows; give one for each row")
    if kl_coef > 0 and ref_logprobs_T is None:
        raise ValueError(f"kl_coef = {kl_coef} needs ref_logprobs; pass them, or kl_coef=0")
    _check_head(hidden_TD, weight_VD, temperature)
    settings = {
        "temperature": temperature,
        "clips": {"clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip},
        "kl_coef": kl_coef,
        "chunk": chunk,
    }
    loss_sum, *stats = _PolicyHead.apply(
        hidden_TD, weight_VD, target_ids_T, advantages_T, loss_weights_T, old_logprobs_T, ref_logprobs_T, settings
    )
    return loss_sum, HeadStats(*stats)


@torch.no_grad()
def token_logprobs(
    hidden_TD: Tensor, weight_VD: Tensor, ids_T: Tensor, temperature: float = 1.0, chunk: int = 1024
) -> Tensor:
    """[T] float32: log-prob of `ids_T` under softmax(hidden W^T / temperature) [nats]. No gradient; arguments as in `policy_head`."""
    _check_head(hidden_TD, weight_VD, temperature)
    out_T = torch.empty(len(hidden_TD), dtype=torch.float32, device=hidden_TD.device)
    for start in range(0, len(hidden_TD), chunk):
        rows = slice(start, start + chunk)
        logits_CV = _logits(hidden_TD[rows], weight_VD, temperature)
        chosen_C = logits_CV.gather(1, ids_T[rows, None])[:, 0]
        out_T[rows] = chosen_C - logits_CV.logsumexp(1)
    return out_T


def _check_head(hidden_TD: Tensor, weight_VD: Tensor, temperature: float) -> None:
    if hidden_TD.ndim != 2 or weight_VD.ndim != 2 or hidden_TD.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"expected hidden [T, D] and weight [V, D], got {list(hidden_TD.shape)} and {list(weight_VD.shape)}; "
            "pick the rows of the sampled tokens first"
        )
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}; greedy sampling has no log-probability")


def _logits(hidden_CD: Tensor, weight_VD: Tensor, temperature: float) -> Tensor:
    logits_CV = (hidden_CD @ weight_VD.T).float()
    return logits_CV if temperature == 1.0 else logits_CV.div_(temperature)


class _PolicyHead(torch.autograd.Function):
    """Loops over chunks of rows: logits, epilogue, gradients. The epilogue is the part a fused kernel would replace."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        target_ids_T: Tensor,
        advantages_T: Tensor,
        loss_weights_T: Tensor,
        old_logprobs_T: Tensor | None,
        ref_logprobs_T: Tensor | None,
        settings: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        T, chunk = len(hidden_TD), settings["chunk"]
        stats_T = torch.zeros(4, T, dtype=torch.float32, device=hidden_TD.device)
        loss_sum = torch.zeros((), dtype=torch.float32, device=hidden_TD.device)
        dhidden_TD = torch.empty_like(hidden_TD) if ctx.needs_input_grad[0] else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, T, chunk):
            rows = slice(start, start + chunk)
            logits_CV = _logits(hidden_TD[rows], weight_VD, settings["temperature"])
            loss_C, dlogits_CV, *stats_C = _epilogue(
                logits_CV,
                target_ids_T[rows],
                advantages_T[rows],
                loss_weights_T[rows],
                None if old_logprobs_T is None else old_logprobs_T[rows],
                None if ref_logprobs_T is None else ref_logprobs_T[rows],
                settings,
            )
            loss_sum += loss_C.sum()
            stats_T[:, rows] = torch.stack(stats_C)
            dlogits_CV = dlogits_CV.to(weight_VD.dtype)
            if dhidden_TD is not None:
                torch.mm(dlogits_CV, weight_VD, out=dhidden_TD[rows])
            if dweight_VD is not None:
                dweight_VD += dlogits_CV.T @ hidden_TD[rows]
        ctx.save_for_backward(dhidden_TD, dweight_VD)
        ctx.weight_dtype = weight_VD.dtype
        stats = stats_T.unbind(0)
        ctx.mark_non_differentiable(*stats)
        return loss_sum, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_TD, dweight_VD = ctx.saved_tensors
        dhidden = None if dhidden_TD is None else dhidden_TD * grads[0]
        dweight = None if dweight_VD is None else (dweight_VD * grads[0]).to(ctx.weight_dtype)
        return dhidden, dweight, *[None] * 6


def _epilogue(
    logits_CV: Tensor,
    target_ids_C: Tensor,
    advantages_C: Tensor,
    loss_weights_C: Tensor,
    old_logprobs_C: Tensor | None,
    ref_logprobs_C: Tensor | None,
    settings: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits of a chunk -> weighted loss [C], dloss/d(unscaled logits) [C, V], log-probs, entropy, k3, clipped [C]."""
    lse_C1 = logits_CV.logsumexp(1, keepdim=True)
    logprobs_C = (logits_CV.gather(1, target_ids_C[:, None]) - lse_C1)[:, 0]
    probs_CV = torch.exp(logits_CV - lse_C1)
    # H = logsumexp(z) - sum p z
    entropy_C = lse_C1[:, 0] - torch.einsum("cv,cv->c", probs_CV, logits_CV)
    with torch.enable_grad():
        # the two formulas are the only place where the loss is written down: autograd derives them, on C numbers
        lp_C = logprobs_C.detach().requires_grad_()
        old_C = logprobs_C.detach() if old_logprobs_C is None else old_logprobs_C
        loss_C, clipped_C = policy_loss_tokens(lp_C, old_C, advantages_C, **settings["clips"])
        kl_C = torch.zeros_like(loss_C) if ref_logprobs_C is None else k3(lp_C, ref_logprobs_C)
        loss_C = loss_weights_C * (loss_C + settings["kl_coef"] * kl_C)
        (dlp_C,) = torch.autograd.grad(loss_C.sum(), lp_C)
    dlp_C = dlp_C / settings["temperature"]
    dlogits_CV = probs_CV.mul_(-dlp_C[:, None])
    dlogits_CV.scatter_add_(1, target_ids_C[:, None], dlp_C[:, None])
    return loss_C.detach(), dlogits_CV, logprobs_C, entropy_C, kl_C.detach(), clipped_C
