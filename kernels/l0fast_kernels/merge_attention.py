"""Two attentions of the same queries, over different keys, made one.

    l = log(exp(l1) + exp(l2));  o = o1 exp(l1 - l) + o2 exp(l2 - l)          l: log-sum-exp of a query's scores

Its bound is memory: o1 and o2 read, o written. Ye et al., "Cascade Inference", https://flashinfer.ai/2024/02/02/cascade-inference.html

Shape letters: T queries, H heads, E size of a head.
"""

import torch
from torch import Tensor


def merge_attention_(out_THE: Tensor, lse_HT: Tensor, other_THE: Tensor, other_lse_HT: Tensor) -> None:
    """Merge `other` into `out` and `lse`, in place; Triton on CUDA, plain PyTorch elsewhere.

    Args:
        out_THE, other_THE: [T, H, E] of one floating dtype, the last dimension contiguous.
        lse_HT, other_lse_HT: [H, T] float32 (the reference takes float64 too) [nats]; -inf where a query saw no key there, not in both.
    """
    if not out_THE.is_cuda:
        merge_attention_reference_(out_THE, lse_HT, other_THE, other_lse_HT)
        return
    from l0fast_kernels.merge_attention_triton import merge_attention_triton_

    merge_attention_triton_(out_THE, lse_HT, other_THE, other_lse_HT)


def merge_attention_reference_(out_THE: Tensor, lse_HT: Tensor, other_THE: Tensor, other_lse_HT: Tensor) -> None:
    merged_HT = torch.logaddexp(lse_HT, other_lse_HT)
    weight_TH1, other_weight_TH1 = ((lse - merged_HT).exp().T[..., None] for lse in (lse_HT, other_lse_HT))
    out_THE.copy_(out_THE * weight_TH1 + other_THE * other_weight_TH1)
    lse_HT.copy_(merged_HT)
