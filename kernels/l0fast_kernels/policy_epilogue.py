"""The epilogue of `policy_head` as one Triton kernel, a program a row: logits in, what the loss needs of them out.

    pass 1, over V    m = max z;  s = sum exp(z - m);  u = sum exp(z - m) z           online, one read of the row
                      lse = m + log s;  lp = z[target] - lse;  entropy = lse - u / s
    per row           loss and dloss/dlp, the formulas of policy_head.py written once more in scalars
    pass 2, over V    dz = dloss/dlp (onehot(target) - exp(z - lse)) / temperature    one read, one write

Its bound is memory: 4 V bytes read twice and 2 V written a row (bf16 gradients), about 5 ms for 10k rows of 152k logits at
3 TB/s, next to 44 ms of matmuls at a hidden size of 3,584. Online softmax: Milakov and Gimelshein, "Online normalizer
calculation for softmax", https://arxiv.org/abs/1805.02867.

Row offsets are int64: T V passes 2^31. No `tl.dot` here, so the interpreter computes what the GPU does.
"""

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from l0fast_kernels.policy_head import OUT, PER_TOKEN

BLOCK_V = 4096
"""Logits that a program holds at a time."""
NUM_WARPS = 8


@triton.jit
def policy_epilogue_kernel(
    logits_ptr,
    dlogits_ptr,
    target_ids_ptr,
    advantages_ptr,
    loss_weights_ptr,
    old_logprobs_ptr,
    ref_logprobs_ptr,
    sampler_logprobs_ptr,
    loss_ptr,
    logprobs_ptr,
    entropy_ptr,
    kl_ptr,
    clipped_ptr,
    V,
    logits_stride,
    dlogits_stride,
    inv_temperature,
    clip_low,
    clip_high,
    dual_clip,
    kl_coef,
    tis_cap,
    max_log_ratio,
    max_k3,
    OBJECTIVE: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_SAMPLER: tl.constexpr,
    WITH_LOSS: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    columns = tl.arange(0, BLOCK_V)

    m = -float("inf")
    s = 0.0
    u = 0.0
    for start in range(0, V, BLOCK_V):
        z = tl.load(logits_ptr + start + columns, mask=start + columns < V, other=-float("inf")).to(tl.float32)
        z *= inv_temperature
        new_m = tl.maximum(m, tl.max(z, 0))
        # a row of -inf so far has no maximum to subtract
        shift = tl.where(new_m == -float("inf"), 0.0, new_m)
        e = tl.exp(z - shift)
        rescale = tl.exp(m - shift)
        s = s * rescale + tl.sum(e, 0)
        # exp(-inf) * -inf would be nan
        u = u * rescale + tl.sum(e * tl.where(e > 0, z, 0.0), 0)
        m = new_m
    lse = m + tl.log(s)
    target = tl.load(target_ids_ptr + row)
    lp = tl.load(logits_ptr + target).to(tl.float32) * inv_temperature - lse
    tl.store(logprobs_ptr + row, lp)
    tl.store(entropy_ptr + row, lse - u / s)

    if WITH_LOSS:
        A = tl.load(advantages_ptr + row)
        weight = tl.load(loss_weights_ptr + row)
        old = lp
        if HAS_OLD:
            old = tl.load(old_logprobs_ptr + row)
        if HAS_SAMPLER:
            sampler = tl.load(sampler_logprobs_ptr + row)
            gap = tl.minimum(tl.maximum(old - sampler, -max_log_ratio), max_log_ratio)
            weight *= tl.minimum(tl.exp(gap), tis_cap)
        ratio = tl.exp(tl.minimum(tl.maximum(lp - old, -max_log_ratio), max_log_ratio))
        in_ratio = tl.minimum(tl.maximum(ratio, 1 - clip_low), 1 + clip_high)
        if OBJECTIVE == "ppo":
            plain = -A * ratio
            worst = tl.maximum(plain, -A * in_ratio)
            clipped = worst > plain
            bounded = (A < 0) & (worst > -dual_clip * A)
            loss = tl.where(bounded, -dual_clip * A, worst)
            # a log-ratio that was cut has no slope
            cut = tl.abs(lp - old) > max_log_ratio
            dlp = tl.where((clipped == 0) & (bounded == 0) & (cut == 0), plain, 0.0)
        else:
            loss = -A * in_ratio * lp
            dlp = -A * in_ratio
            clipped = in_ratio != ratio
        kl = 0.0
        if HAS_REF:
            d = tl.minimum(tl.load(ref_logprobs_ptr + row) - lp, max_log_ratio)
            kl = tl.exp(d) - d - 1
            slope = tl.where(kl <= max_k3, 1 - tl.exp(d), 0.0)
            kl = tl.minimum(tl.maximum(kl, -max_k3), max_k3)
            loss += kl_coef * kl
            dlp += kl_coef * slope
        tl.store(loss_ptr + row, weight * loss)
        tl.store(kl_ptr + row, kl)
        tl.store(clipped_ptr + row, clipped.to(tl.float32))

        if WITH_GRAD:
            g = weight * dlp * inv_temperature
            dlogits_ptr += row * dlogits_stride
            for start in range(0, V, BLOCK_V):
                inside = start + columns < V
                z = tl.load(logits_ptr + start + columns, mask=inside, other=-float("inf")).to(tl.float32)
                p = tl.exp(z * inv_temperature - lse)
                hit = (start + columns == target).to(tl.float32)
                tl.store(dlogits_ptr + start + columns, (g * (hit - p)).to(dlogits_ptr.dtype.element_ty), mask=inside)


def triton_epilogue(
    logits_CV: Tensor,
    dlogits_CV: Tensor | None,
    target_ids_C: Tensor,
    per_token: Mapping[str, Tensor | None],
    out: dict[str, Tensor],
    settings: dict[str, Any],
    *,
    block_v: int = BLOCK_V,
    num_warps: int = NUM_WARPS,
) -> None:
    """Launch the kernel on the rows of a chunk; everything is written in place.

    Args:
        logits_CV: [C, V], rows contiguous.
        dlogits_CV: [C, V] of any floating dtype, for the gradient; None computes none.
        per_token: advantages, loss_weights, old_logprobs, ref_logprobs, sampler_logprobs, each [C] float32 or None; without
            advantages there is no loss, only log-probs and entropy.
        out: loss, logprobs, entropy, kl, clipped, each [C] float32.
        settings: as policy_head collects them.
    """
    C, V = logits_CV.shape
    if C == 0:
        return
    # a pointer that is never followed still has to be one
    unused = logits_CV
    pointer = lambda name: unused if per_token[name] is None else per_token[name].contiguous()  # noqa: E731
    policy_epilogue_kernel[(C,)](
        logits_CV,
        unused if dlogits_CV is None else dlogits_CV,
        target_ids_C.contiguous(),
        *(pointer(name) for name in PER_TOKEN),
        *(out[name] for name in OUT),
        V,
        logits_CV.stride(0),
        0 if dlogits_CV is None else dlogits_CV.stride(0),
        1 / settings["temperature"],
        *(settings[name] for name in ("clip_low", "clip_high", "dual_clip", "kl_coef", "tis_cap")),
        *(settings[name] for name in ("max_log_ratio", "max_k3")),
        OBJECTIVE=settings["objective"],
        HAS_OLD=per_token["old_logprobs"] is not None,
        HAS_REF=per_token["ref_logprobs"] is not None,
        HAS_SAMPLER=per_token["sampler_logprobs"] is not None,
        WITH_LOSS=per_token["advantages"] is not None,
        WITH_GRAD=dlogits_CV is not None,
        BLOCK_V=block_v,
        num_warps=num_warps,
    )
