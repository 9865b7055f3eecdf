"""Causal attention within each row of a pack, as an attention implementation of transformers.

    model.set_attn_implementation("l0fast_packed")      after `register()`
    model.model(input_ids=token_ids[None], position_ids=position_ids[None], cu_seqlens=cu_seqlens, use_cache=False)

transformers hands extra keyword arguments of the base model to the attention of every layer: `cu_seqlens` [S + 1] says
where rows begin and end. No mask exists: the mask function returns None, else transformers would build [T, T].

Where there is no FlashAttention each row gets its own scaled_dot_product_attention, O(sum of n^2). The rows come from
torch.split, whose backward is one concatenation: the backward of S slices would add S tensors of the whole pack.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "l0fast_packed"


def register() -> None:
    """Make `NAME` known to transformers. Doing it again changes nothing."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, no_mask)


def no_mask(*args: Any, **kwargs: Any) -> None:
    """The mask of `packed_attention`: `cu_seqlens` says it all."""


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seqlens: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one pack.

    Args:
        query: [1, H, T, E]; key, value: [1, K, T, E], where K divides H (grouped queries).
        cu_seqlens: [S + 1] integers, on the CPU: row s is [cu[s], cu[s + 1]).

    Returns:
        [1, T, H, E], and None for the weights that are never made.

    Raises:
        ValueError: no `cu_seqlens`, rows that don't cover the pack, a batch, a sliding window.
    """
    if cu_seqlens is None:
        raise ValueError(f"{NAME} attention got no cu_seqlens; pass cu_seqlens=[0, ..., T] to model.model(...)")
    if query.shape[0] != 1 or attention_mask is not None or sliding_window is not None:
        raise ValueError(
            f"{NAME} attention takes one pack without mask or sliding window, got a batch of {query.shape[0]}, "
            f"mask {None if attention_mask is None else list(attention_mask.shape)}, window {sliding_window}; lay rows end to end instead"
        )
    lengths = torch.diff(cu_seqlens).tolist()
    if sum(lengths) != query.shape[2]:
        raise ValueError(
            f"cu_seqlens covers {sum(lengths)} tokens but the pack has {query.shape[2]}; end it with the pack's length"
        )
    grouped = query.shape[1] != key.shape[1]
    rows = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    outputs = [
        scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped)
        for q, k, v in rows
    ]
    return torch.cat(outputs, 2).transpose(1, 2), None
