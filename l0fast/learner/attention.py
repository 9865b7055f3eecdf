"""Causal attention within each row of a pack, as an attention implementation of transformers.

    layout = PackLayout.of(pack, device)
    model.set_attn_implementation("l0fast_packed")      after `register()`
    model.model(input_ids=token_ids[None], position_ids=position_ids[None], layout=layout, use_cache=False)

transformers hands extra keyword arguments of the base model to the attention of every layer, also under FSDP2 and activation
checkpointing. No mask exists: the mask function returns None, else transformers would build [T, T].

A token attends to its own stretch, causally, and a branch's token also to all of its family's prefix (packing.py). Packing by
position_ids alone, as transformers and flash-attn do it, knows stretches only: it is silently wrong for shared prefixes.

On a GPU that is a cascade of two ordinary FlashAttention calls (Dao, "FlashAttention-2", https://arxiv.org/abs/2307.08691):
    1. o1, l1    every stretch on itself, causal
    2. o2, l2    the branches of each family on its prefix, not causal; nothing is gathered, all are views
    l = log(exp(l1) + exp(l2));  o = o1 exp(l1 - l) + o2 exp(l2 - l)                   l: log-sum-exp of a query's scores
Its backward is theirs: FlashAttention's backward needs of the forward only o and l, to make p = exp(s - l) and
delta = sum(do o). Given the merged ones, each piece returns its exact share; the shares of q and of the prefixes' k and v add up.
(Merging by log-sum-exp: Ye et al., "Cascade Inference", https://flashinfer.ai/2024/02/02/cascade-inference.html.)

Elsewhere, each stretch gets its own scaled_dot_product_attention, O(sum of n^2). The stretches come from torch.split, whose
backward is one concatenation: the backward of S slices would add S tensors of the whole pack.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from l0fast.errors import UsageError
from l0fast.learner.packing import Pack
from l0fast_kernels.merge_attention import merge_attention_

NAME = "l0fast_packed"


def register() -> None:
    """Make `NAME` known to transformers. Doing it again changes nothing."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, no_mask)


def no_mask(*args: Any, **kwargs: Any) -> None:
    """The mask of `packed_attention`: the layout says it all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackLayout:
    """Where the stretches of a pack lie: F prefixes, then the branches family by family, then lone rows."""

    lengths: list[int]
    """Of the S stretches [tokens]."""
    prefixes: list[int | None]
    """For each stretch, that of its prefix, or None."""
    cu_seqlens: Tensor
    """[S + 1] int32, on the device: stretch s is [cu[s], cu[s + 1])."""
    prefix_cu: Tensor
    """[F + 1] int32, on the device: the same of the prefixes alone."""
    family_cu: Tensor
    """[F + 1] int32, on the device: where the branches of each family lie, counted from the first branch."""
    branches: slice
    """All branches [tokens]."""
    max_length: int
    max_prefix: int
    max_family: int
    """Longest stretch, prefix, and branches of a family laid end to end [tokens]."""
    max_row: int
    """Longest row: a branch with its prefix, or one that stands alone [tokens]."""

    @classmethod
    def of(cls, pack: Pack, device: torch.device | str = "cpu") -> "PackLayout":
        lengths = [b - a for a, b in pairwise(pack.cu_seqlens.tolist())]
        bounds = pack.family_cu.tolist()
        num_families = len(bounds) - 1
        starts = pack.cu_seqlens[:-1].tolist()
        prefixes: list[int | None] = [None] * len(lengths)
        family = 0
        for s in range(num_families, len(lengths)):
            while family < num_families and starts[s] >= bounds[family + 1]:
                family += 1
            if family == num_families:
                break
            prefixes[s] = family
        on_device = lambda values: torch.as_tensor(values, dtype=torch.int32).to(device, non_blocking=True)  # noqa: E731
        return cls(
            lengths=lengths,
            prefixes=prefixes,
            cu_seqlens=on_device(pack.cu_seqlens),
            prefix_cu=on_device(pack.cu_seqlens[: num_families + 1]),
            family_cu=on_device(pack.family_cu - pack.family_cu[0]),
            branches=slice(bounds[0], bounds[-1]),
            max_length=max(lengths),
            max_prefix=max(lengths[:num_families], default=0),
            max_family=max((b - a for a, b in pairwise(bounds)), default=0),
            max_row=int(pack.position_ids.max()) + 1,
        )


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: PackLayout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one pack.

    Args:
        query: [1, H, T, E]; key, value: [1, K, T, E], where K divides H (grouped queries).
        scaling: of the scores; None is E ** -0.5.

    Returns:
        [1, T, H, E], and None for the weights that are never made.

    Raises:
        ValueError: no layout, stretches that don't cover the pack, a batch, a mask, dropout; a model whose attention is another:
            with a window that is shorter than a row, with capped scores or sinks.
    """
    if layout is None:
        raise ValueError(f"{NAME} attention got no layout; pass layout=PackLayout.of(pack, device) to model.model(...)")
    if query.shape[0] != 1 or attention_mask is not None or dropout:
        raise ValueError(
            f"{NAME} attention takes one pack without mask or dropout, got a batch of {query.shape[0]}, "
            f"mask {None if attention_mask is None else list(attention_mask.shape)}, dropout {dropout}; lay rows end to end instead"
        )
    if softcap is not None or s_aux is not None:
        raise ValueError(
            "the model's attention caps its scores or has sinks, which the learner's does not: take another model"
        )
    if sliding_window is not None and sliding_window < layout.max_row:
        raise ValueError(
            f"a row has {layout.max_row} tokens, but the model's attention a window of {sliding_window}, which the learner's has "
            f"not: set --agent.context-tokens to {sliding_window} or less, or take another model"
        )
    if sum(layout.lengths) != query.shape[2]:
        raise ValueError(
            f"the layout covers {sum(layout.lengths)} tokens but the pack has {query.shape[2]}; make it of the same pack"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return Cascade.apply(q, k, v, layout, scale, flash())[None], None  # pyright: ignore[reportOptionalSubscript]
    return _row_by_row(query, key, value, layout, scale), None


def _row_by_row(query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, scale: float) -> Tensor:
    gqa = query.shape[1] != key.shape[1]
    queries, keys, values = (x.split(layout.lengths, 2) for x in (query, key, value))
    seen = [n + (0 if p is None else layout.lengths[p]) for n, p in zip(layout.lengths, layout.prefixes, strict=True)]
    mask = _causal_mask(max(seen), query)
    outputs = []
    for q, k, v, p in zip(queries, keys, values, layout.prefixes, strict=True):
        if p is None:
            outputs.append(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa))
        else:
            k, v = torch.cat([keys[p], k], 2), torch.cat([values[p], v], 2)
            # the last rows of a causal mask: all of the prefix, then itself
            own = mask[k.shape[2] - q.shape[2] : k.shape[2], : k.shape[2]]
            outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=own, scale=scale, enable_gqa=gqa))
    return torch.cat(outputs, 2).transpose(1, 2)


def _causal_mask(length: int, like: Tensor) -> Tensor:
    """[length, length]: 0 where a column is at or before the row, -inf after it."""
    return torch.full((length, length), float("-inf"), dtype=like.dtype, device=like.device).triu_(1)


class Varlen(NamedTuple):
    """Queries and keys of one FlashAttention call: sequence i of the queries meets sequence i of the keys."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    causal: bool
    scale: float


class FlashOps(NamedTuple):
    """FlashAttention without autograd. Heads of k and v may be fewer than those of q."""

    forward: Callable[[Tensor, Tensor, Tensor, Varlen], tuple[Tensor, Tensor]]
    """q [Tq, H, E], k, v [Tk, K, E] -> out [Tq, H, E], log-sum-exp of the scores [H, Tq] float32."""
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Varlen], tuple[Tensor, Tensor, Tensor]]
    """dout, q, k, v, out, lse -> dq, dk, dv."""


class Cascade(torch.autograd.Function):
    """q [T, H, E], k, v [T, K, E] -> [T, H, E]; see the module's docstring."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: PackLayout, scale: float, ops: FlashOps) -> Tensor:
        own, shared = _calls(layout, scale)
        out, lse = ops.forward(q, k, v, own)
        if shared is not None:
            b, p = layout.branches, layout.branches.start
            out2, lse2 = ops.forward(q[b], k[:p], v[:p], shared)
            merge_attention_(out[b], lse[:, b], out2, lse2)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale, ctx.ops = layout, scale, ops
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the names
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        own, shared = _calls(ctx.layout, ctx.scale)
        dout = grads[0].contiguous()
        dq, dk, dv = ctx.ops.backward(dout, q, k, v, out, lse, own)
        if shared is not None:
            b, p = ctx.layout.branches, ctx.layout.branches.start
            dq2, dk2, dv2 = ctx.ops.backward(dout[b], q[b], k[:p], v[:p], out[b], lse[:, b].contiguous(), shared)
            dq[b] += dq2
            dk[:p] += dk2
            dv[:p] += dv2
        return dq, dk, dv, None, None, None


def _calls(layout: PackLayout, scale: float) -> tuple[Varlen, Varlen | None]:
    n = layout.max_length
    own = Varlen(layout.cu_seqlens, layout.cu_seqlens, n, n, True, scale)
    if not layout.max_prefix:
        return own, None
    return own, Varlen(layout.family_cu, layout.prefix_cu, layout.max_family, layout.max_prefix, False, scale)


# --- the two sources of FlashAttention -----------------------------------------------------------------------------


@cache
def flash() -> FlashOps:
    """flash-attn where it is installed, else the FlashAttention inside torch; tested once against float64 before its first use.

    Raises:
        UsageError: what was found computes something else here.
    """
    # by its extension: flash-attn-4, which SGLang brings, is a flash_attn too, with none of this in it
    has_package = importlib.util.find_spec("flash_attn_2_cuda") is not None
    name, ops = ("flash_attn", flash_attn_ops()) if has_package else ("torch", torch_ops())
    worst = self_test(ops, "cuda")
    if not worst < 0.03:
        raise UsageError(
            f"FlashAttention of {name} is off by {worst:.2g} of its own size from attention in float64 on this GPU, so nothing can be "
            "trained with it; install another version of flash-attn (pip install --no-build-isolation flash-attn)"
        )
    return ops


def torch_ops() -> FlashOps:
    """The FlashAttention-2 that torch carries."""
    forward_op, backward_op = torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward

    def forward(q: Tensor, k: Tensor, v: Tensor, call: Varlen) -> tuple[Tensor, Tensor]:
        out, lse, *_ = forward_op(
            q, k, v, call.cu_q, call.cu_k, call.max_q, call.max_k, 0.0, call.causal, False, scale=call.scale
        )
        return out, lse

    # the state of the random numbers of dropout, of which there is none
    seed = cache(lambda device: torch.zeros(2, dtype=torch.uint64, device=device))
    unused = cache(lambda device: torch.zeros((), dtype=torch.uint64, device=device))

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Varlen
    ) -> tuple[Tensor, Tensor, Tensor]:
        state = seed(q.device), unused(q.device)
        sizes = call.cu_q, call.cu_k, call.max_q, call.max_k
        return backward_op(dout, q, k, v, out, lse, *sizes, 0.0, call.causal, *state, scale=call.scale)

    return FlashOps(forward, backward)


def flash_attn_ops() -> FlashOps:
    """The flash-attn package, version 2 (Dao-AILab/flash-attention, flash_attn_interface.py)."""
    from flash_attn.flash_attn_interface import (  # pyright: ignore[reportMissingImports]
        _flash_attn_varlen_backward,
        _flash_attn_varlen_forward,
    )

    def sizes(call: Varlen) -> dict[str, Any]:
        return {
            "cu_seqlens_q": call.cu_q,
            "cu_seqlens_k": call.cu_k,
            "max_seqlen_q": call.max_q,
            "max_seqlen_k": call.max_k,
            "dropout_p": 0.0,
            "softmax_scale": call.scale,
            "causal": call.causal,
        }

    def forward(q: Tensor, k: Tensor, v: Tensor, call: Varlen) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _flash_attn_varlen_forward(q, k, v, **sizes(call))
        return out, lse

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Varlen
    ) -> tuple[Tensor, Tensor, Tensor]:
        made = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        options = {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}
        _flash_attn_varlen_backward(dout, q, k, v, out, lse, *made, **sizes(call), **options, deterministic=False)
        return made

    return FlashOps(forward, backward)


def self_test(ops: FlashOps, device: str) -> float:
    """Largest relative error, ||x - truth|| / ||truth||, of the output and the gradients of a small cascade in bf16."""
    lengths, prefixes = [40, 7, 65, 1, 130, 3, 20], [None, None, 0, 0, 1, 1, None]
    ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    on_device = lambda values: torch.tensor(values, dtype=torch.int32, device=device)  # noqa: E731
    layout = PackLayout(
        lengths=lengths,
        prefixes=prefixes,
        cu_seqlens=on_device(ends),
        prefix_cu=on_device(ends[:3]),
        family_cu=on_device([0, 66, 199]),
        branches=slice(47, 246),
        max_length=130,
        max_prefix=40,
        max_family=133,
        max_row=170,
    )
    generator = torch.Generator().manual_seed(0)
    T = ends[-1]
    q, k, v, dout = (torch.randn(T, heads, 64, generator=generator) for heads in (4, 2, 2, 4))
    inputs = [x.to(device, torch.bfloat16).requires_grad_() for x in (q, k, v)]
    out = Cascade.apply(*inputs, layout, 0.2, ops)
    ours = (out, *torch.autograd.grad(out, inputs, dout.to(device, torch.bfloat16)))
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    q, k, v = (x.transpose(0, 1)[None] for x in exact)
    truth = _row_by_row(q, k, v, layout, 0.2)[0]
    theirs = (truth, *torch.autograd.grad(truth, exact, dout.bfloat16().double()))
    errors = [((a.cpu().double() - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True)]
    # nan is no error that max() would see
    return max(errors) if all(e == e for e in errors) else float("nan")
