"""merge_attention.py's formulas as a Triton kernel, a program for all heads of a query."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def merge_attention_kernel(
    out_ptr,
    lse_ptr,
    other_ptr,
    other_lse_ptr,
    H,
    out_stride_t,
    out_stride_h,
    other_stride_t,
    other_stride_h,
    lse_stride_h,
    lse_stride_t,
    other_lse_stride_h,
    other_lse_stride_t,
    E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = heads < H
    lse_at = lse_ptr + heads * lse_stride_h + t * lse_stride_t
    l1 = tl.load(lse_at, mask=inside, other=0.0)
    l2 = tl.load(other_lse_ptr + heads * other_lse_stride_h + t * other_lse_stride_t, mask=inside, other=0.0)
    top = tl.maximum(l1, l2)
    merged = top + tl.log(tl.exp(l1 - top) + tl.exp(l2 - top))
    w1 = tl.exp(l1 - merged)[:, None]
    w2 = tl.exp(l2 - merged)[:, None]
    columns = tl.arange(0, BLOCK_E)
    mask = inside[:, None] & (columns < E)[None, :]
    out_at = out_ptr + t * out_stride_t + heads[:, None] * out_stride_h + columns[None, :]
    other_at = other_ptr + t * other_stride_t + heads[:, None] * other_stride_h + columns[None, :]
    o1 = tl.load(out_at, mask=mask, other=0.0).to(tl.float32)
    o2 = tl.load(other_at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_at, (o1 * w1 + o2 * w2).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_at, merged, mask=inside)


def merge_attention_triton_(out_THE: Tensor, lse_HT: Tensor, other_THE: Tensor, other_lse_HT: Tensor) -> None:
    T, H, E = out_THE.shape
    if T == 0:
        return
    block_h = min(16, triton.next_power_of_2(H))
    merge_attention_kernel[(T, triton.cdiv(H, block_h))](
        out_THE,
        lse_HT,
        other_THE,
        other_lse_HT,
        H,
        *out_THE.stride()[:2],
        *other_THE.stride()[:2],
        *lse_HT.stride(),
        *other_lse_HT.stride(),
        E=E,
        BLOCK_H=block_h,
        BLOCK_E=triton.next_power_of_2(E),
        num_warps=4,
    )
