"""Causal attention within each row of a pack, as an attention implementation of transformers.

    model.set_attn_implementation("l0fast_packed")      after `register()`
    model.model(input_ids=token_ids[None], position_ids=position_ids[None], cu_seqlens=cu_seqlens, use_cache=False)

transformers hands extra keyword arguments of the base model to the attention of every layer: `cu_seqlens` [S + 1] says
where rows begin and end, `donors` and `shared` [S] whose first keys and values a row begins with (packing.py). A row that
shares p tokens attends to those and, causally, to its own: the last rows of a causal mask. No other mask exists: the mask function returns None, else transformers would build [T, T].

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
    donors: Tensor | None = None,
    shared: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one pack.

    Args:
        query: [1, H, T, E]; key, value: [1, K, T, E], where K divides H (grouped queries).
        cu_seqlens: [S + 1] integers, on the CPU: row s is [cu[s], cu[s + 1]).
        donors, shared: [S] integers, on the CPU; None where no row shares anything.

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
    settings = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    rows = zip(query.split(lengths, 2), keys := key.split(lengths, 2), values := value.split(lengths, 2), strict=True)
    begins = (
        [(0, 0)] * len(lengths)
        if shared is None or donors is None
        else list(zip(donors.tolist(), shared.tolist(), strict=True))
    )
    mask = _causal_mask(max(n + p for n, (_, p) in zip(lengths, begins, strict=True)), query)
    outputs = []
    for (q, k, v), (donor, p) in zip(rows, begins, strict=True):
        if p:
            k, v = torch.cat([keys[donor][:, :, :p], k], 2), torch.cat([values[donor][:, :, :p], v], 2)
            own = mask[p : p + q.shape[2], : p + q.shape[2]]
            outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=own, **settings))
        else:
            outputs.append(scaled_dot_product_attention(q, k, v, is_causal=True, **settings))
    return torch.cat(outputs, 2).transpose(1, 2), None


def _causal_mask(length: int, like: Tensor) -> Tensor:
    """[length, length]: 0 where a column is at or before the row, -inf after it."""
    return torch.full((length, length), float("-inf"), dtype=like.dtype, device=like.device).triu_(1)
