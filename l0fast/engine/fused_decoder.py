"""The decoder of the Llama family in fewer operations: a step of few rows is bound by their number, not by their size.

    qkv          = norm(x) [Wq; Wk; Wv]^T           one product instead of three
    q, k         = rope(norm([q; k]))               both at once; rotate_half(q) sin = roll(q) [-sin; sin], from a table
    x            = x + attention(q, k, v) Wo^T
    gate, up     = norm(x) [Wgate; Wup]^T           one instead of two
    x            = x + act(gate) up Wdown^T

The joined matrices are the parameters' memory: q_proj.weight and the others become views of them, so whoever writes new
values into a parameter has written into the joined one. `SlotModel.check` holds the result against transformers' own
forward, which goes on working, at every start.

Shape letters: n rows, T new tokens, N = n * T, H query heads, K key-value heads, D head dimension, E hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
"""Layers whose forward is the one above, by the name of their class."""
_ROPES = {"default", "linear", "llama3", "yarn"}
"""Those whose angles depend on the position alone, not on the longest one so far."""


def can_be_fused(model: Any) -> bool:
    """Whether a model without its head is of this family."""
    layers, rotary = getattr(model, "layers", ()), getattr(model, "rotary_emb", None)
    return {type(layer).__name__ for layer in layers} <= _LAYERS and getattr(rotary, "rope_type", "") in _ROPES


class FusedDecoder:
    """Computes what `model` does, which must be one that can be fused. Joins its parameters."""

    def __init__(self, model: Any, *, max_len: int):
        self._embed, self._norm = model.embed_tokens, model.norm
        self._layers = [_FusedLayer(layer) for layer in model.layers]
        positions = torch.arange(max_len + 1, device=model.embed_tokens.weight.device)[None]
        cos, sin = model.rotary_emb(model.embed_tokens.weight, positions)
        low, high = sin[0].chunk(2, -1)
        self._cos_MD, self._sin_MD = cos[0], torch.cat((-low, high), -1)

    def __call__(self, ids_nT: Tensor, positions_nT: Tensor, slab_pass: Any) -> Tensor:
        """Hidden states after the last norm, [n, T, E]. `slab_pass(layer, q, k, v, scaling)` attends."""
        positions_N = positions_nT.flatten()
        rotation = self._cos_MD[positions_N][:, None], self._sin_MD[positions_N][:, None]
        x_NE = self._embed(ids_nT.flatten())
        for layer in self._layers:
            x_NE = layer(x_NE, ids_nT.shape, rotation, slab_pass)
        return _norm(x_NE, self._norm).view(*ids_nT.shape, -1)


class _FusedLayer:
    def __init__(self, layer: Any):
        attention, mlp = layer.self_attn, layer.mlp
        self._index, self._scaling, self._head_dim = attention.layer_idx, attention.scaling, attention.head_dim
        self._num_heads = attention.q_proj.out_features // self._head_dim
        self._num_keys = attention.k_proj.out_features // self._head_dim
        self._qkv = _join(attention.q_proj, attention.k_proj, attention.v_proj)
        self._gate_up = _join(mlp.gate_proj, mlp.up_proj)
        self._out, self._down, self._act = attention.o_proj, mlp.down_proj, mlp.act_fn
        self._norms = layer.input_layernorm, layer.post_attention_layernorm
        # Qwen3's, of queries and of keys
        self._head_norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None

    def __call__(self, x_NE: Tensor, shape: torch.Size, rotation: tuple[Tensor, Tensor], slab_pass: Any) -> Tensor:
        H, K = self._num_heads, self._num_keys
        qkv = F.linear(_norm(x_NE, self._norms[0]), *self._qkv).unflatten(-1, (H + 2 * K, self._head_dim))
        qk = qkv[:, : H + K]
        if self._head_norms is not None:
            qk = _normalize(qk, self._head_norms[0].variance_epsilon)
            qk[:, :H].mul_(self._head_norms[0].weight)
            qk[:, H:].mul_(self._head_norms[1].weight)
        cos, signed_sin = rotation
        qk = torch.addcmul(qk * cos, qk.roll(self._head_dim // 2, -1), signed_sin)
        q, k, v = (t.unflatten(0, shape).transpose(1, 2) for t in (qk[:, :H], qk[:, H:], qkv[:, H + K :]))
        out_nTHD = slab_pass(self._index, q, k, v, self._scaling)
        x_NE = F.linear(out_nTHD.reshape(len(x_NE), -1), self._out.weight, self._out.bias).add_(x_NE)
        gate, up = F.linear(_norm(x_NE, self._norms[1]), *self._gate_up).chunk(2, -1)
        return F.linear(self._act(gate).mul_(up), self._down.weight, self._down.bias).add_(x_NE)


def _join(*projections: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of all, one below the other; theirs become views of it."""
    weight = torch.cat([p.weight.detach() for p in projections])
    bias = None if projections[0].bias is None else torch.cat([p.bias.detach() for p in projections])
    start = 0
    for p in projections:
        rows = slice(start, start := start + p.out_features)
        p.weight = nn.Parameter(weight[rows], requires_grad=False)
        if bias is not None:
            p.bias = nn.Parameter(bias[rows], requires_grad=False)
    return weight, bias


def _normalize(x: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()).to(x.dtype)


def _norm(x: Tensor, norm: Any) -> Tensor:
    return _normalize(x, norm.variance_epsilon).mul_(norm.weight)
