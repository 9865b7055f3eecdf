"""A transformers model that keeps keys and values in a slab, one row a slot. Runs in the engine's child process.

    slab, per layer: keys and values [S, K, M + 1, D]       column M is scratch, for padding that would not fit

    prefill   n rows of up to T new tokens: write their keys, gather the rows, attend under a causal mask
    decode    n rows of one token:          write, attend over the slab in place (or over gathered rows, when few run)

A model of the Llama family runs as a FusedDecoder, whose decoding steps are graphs on CUDA. Of any other the module's own
forward runs; its attention is ours (`AttentionInterface.register`), which finds the slab through a keyword argument that
the layers pass on. An attention implementation unknown to transformers' mask interface gets no mask made for it, so ours
is built once a pass and not once a layer. Query heads that share a KV head are folded into the query axis: nothing is
repeated. Decode is bound by the number of operations while few rows run, then by reading the slab: n * K * length * D * 8
bytes a layer.

On a CPU all is fp32. On CUDA weights and slab are bf16 and the logits fp32, from an fp32 copy of the head: logits rounded
to bf16 would move a log-prob by a hundredth.

Shape letters, this file only: S slots, n rows of this pass (r: and those between them), T new tokens, L longest length,
M max_len, H query heads, K key-value heads, G = H / K, D head dimension, E hidden size, V vocabulary.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from l0fast.engine.decode_graphs import DecodeGraphs
from l0fast.engine.fused_decoder import FusedDecoder, can_be_fused
from l0fast.engine.sampling import uniforms
from l0fast.errors import UsageError

_PREFILL_COLUMNS = 1024
"""Longest piece of a prompt computed in one pass; bounds the mask [tokens]."""
_DENSE_SHARE = 0.6
"""Decode attends over the slab in place where at least this share of the slots from first to last is running."""
_MOST_IDLE_BYTES = 16e9
"""What a graph may read that nobody attends to [bytes]: on an H200 that takes 4 ms, launching a step's kernels 20."""

_SETTINGS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
"""What a model's settings must have to be served."""

Ints = NDArray[np.int64]


class SlotModel:
    """One causal language model and its KV slab, on one device. Raises UsageError for one that can't be served so."""

    def __init__(self, model_path: Path, *, num_slots: int, max_len: int, device: str = "cpu"):
        disable_progress_bar()
        self.device = torch.device(device)
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=dtype, attn_implementation=_ATTENTION, local_files_only=True
        )
        torch.nn.Module.to(self.model.eval().requires_grad_(False), self.device)
        config = self.model.config
        if missing := [name for name in _SETTINGS if not hasattr(config, name)]:
            raise self._not_served(f"its settings have no {missing[0]}")
        window = getattr(config, "sliding_window", None) or max_len
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()) or window < max_len:
            raise UsageError(
                f"{model_path} has sliding-window layers, which this engine does not have: take another model, or "
                "--engine.kind sglang"
            )
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope" and max_len > (short := rope["original_max_position_embeddings"]):
            # its angles change once a row of the batch is longer: kept keys, and other rows, would change what is computed
            raise UsageError(
                f"{model_path} has other angles in contexts of more than {short} tokens (longrope), which this engine does not "
                f"have: set --agent.context-tokens to {short} or less"
            )
        self.vocab_size: int = config.vocab_size
        self.max_len = max_len
        head = self.model.get_output_embeddings()
        if not isinstance(head, torch.nn.Linear):
            raise self._not_served(f"its head is a {type(head).__name__}")
        self._head = head
        self._head_weight_VE = head.weight.float()
        base = self.model.base_model
        self._fused = FusedDecoder(base, max_len=max_len) if can_be_fused(base) else None
        self.groups: int = config.num_attention_heads // config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (num_slots, config.num_key_value_heads, max_len + 1, head_dim)
        _check_memory(2 * config.num_hidden_layers * math.prod(shape) * dtype.itemsize, self.device, shape)
        # zeros, since a masked NaN is still a NaN; on a CPU their pages take no memory before they are written
        slabs = [torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(2 * config.num_hidden_layers)]
        self.keys_SKMD, self.values_SKMD = slabs[::2], slabs[1::2]
        self._column_bytes = sum(slab[0, :, 0].nbytes for slab in slabs)
        self._graphs = None
        if self._fused is not None and self.device.type == "cuda":
            self._graphs = DecodeGraphs(self.decode_first, num_slots=num_slots, max_len=max_len, device=self.device)

    def copy_prefix(self, source: int, slot: int, length: int) -> None:
        """Make the first `length` columns of `slot` those of `source`."""
        for slab_SKMD in (*self.keys_SKMD, *self.values_SKMD):
            slab_SKMD[slot, :, :length] = slab_SKMD[source, :, :length]

    @torch.inference_mode()
    def prefill(self, slots_n: Ints, starts_n: Ints, ids: list[NDArray[np.int32]]) -> Tensor:
        """Compute the ids of each row from column `starts_n` on. Returns the logits after each row's last id, [n, V]."""
        lengths_n = np.array([len(row) for row in ids])
        ids_nT = np.zeros((len(ids), lengths_n.max()), np.int64)
        for row, row_ids in zip(ids_nT, ids, strict=True):
            row[: len(row_ids)] = row_ids
        hidden_nE = torch.empty(0)
        for first in range(0, ids_nT.shape[1], _PREFILL_COLUMNS):
            rows = np.flatnonzero(lengths_n > first)
            last_n = np.minimum(lengths_n[rows] - first, _PREFILL_COLUMNS) - 1
            piece_nT = ids_nT[rows, first : first + last_n.max() + 1]
            slab_pass = _Prefill(self, slots_n[rows], starts_n[rows] + first, last_n + 1, piece_nT.shape[1])
            hidden_nTE = self._forward(self._put(piece_nT), slab_pass)
            last_nE = hidden_nTE[torch.arange(len(rows), device=self.device), self._put(last_n)]
            if first == 0:
                hidden_nE = last_nE
            else:
                hidden_nE[self._put(rows)] = last_nE
        return self._logits(hidden_nE)

    @torch.inference_mode()
    def decode(self, slots_n: Ints, ids_n: NDArray[np.int32], positions_n: Ints) -> Tensor:
        """Compute one id a row, at column `positions_n`; slots ascend. Returns the logits after it, [n, V]."""
        assert (np.diff(slots_n) > 0).all()
        length = int(positions_n.max()) + 1
        if self._graphs is not None:
            rows, columns = self._graphs.sizes(slots_n, positions_n)
            if (rows * columns - len(slots_n) * length) * self._column_bytes <= _MOST_IDLE_BYTES:
                return self._logits(self._graphs(slots_n, ids_n, positions_n, rows, columns))
        first, end = int(slots_n[0]), int(slots_n[-1]) + 1
        block = slice(first, end) if len(slots_n) >= _DENSE_SHARE * (end - first) else None
        slab_pass = _Decode(self, self._put(slots_n), self._put(positions_n), length, block)
        return self._logits(self._forward(self._put(ids_n[:, None].astype(np.int64)), slab_pass)[:, 0])

    @torch.inference_mode()
    def decode_first(self, ids_R: Tensor, columns_R: Tensor, length: int) -> Tensor:
        """Hidden states after one id in each of the first R slots, at `columns_R`, of which no kernel's size depends; [R, E].

        Those at column `max_len`, which is scratch, are of slots that do not run.
        """
        rows = len(ids_R)
        slots_R = torch.arange(rows, device=self.device)
        return self._forward(ids_R[:, None], _Decode(self, slots_R, columns_R, length, slice(0, rows)))[:, 0]

    def _logits(self, hidden_nE: Tensor) -> Tensor:
        return F.linear(hidden_nE.float(), self._head_weight_VE, self._head.bias)

    def _put(self, indices: Ints) -> Tensor:
        return torch.from_numpy(indices).to(self.device)

    def _forward(self, ids_nT: Tensor, slab_pass: "_Prefill | _Decode") -> Tensor:
        if self._fused is not None:
            return self._fused(ids_nT, slab_pass.positions_nT, slab_pass)
        return self.model.base_model(
            input_ids=ids_nT,
            position_ids=slab_pass.positions_nT,
            use_cache=False,
            slab_pass=slab_pass,
        ).last_hidden_state

    @torch.inference_mode()
    def check(self) -> None:
        """Compare a few tokens with transformers' own forward. Raises UsageError for an architecture that differs."""
        ids = (np.arange(1, min(12, self.max_len) + 1) % self.vocab_size).astype(np.int32)
        split = len(ids) // 2
        row = np.zeros(1, np.int64)
        try:
            logits = [self.prefill(row, row, [ids[:split]])]
            logits += [self.decode(row, ids[i : i + 1], row + i) for i in range(split, len(ids))]
        except torch.OutOfMemoryError:
            raise
        except Exception as e:
            # layers with an attention of their own call ours with other words or shapes, or not at all
            raise self._not_served(f"{type(e).__name__}: {e}") from e
        self.model.set_attn_implementation("eager")
        expected = self.model(input_ids=self._put(ids.astype(np.int64))[None], use_cache=False).logits[0].float()
        self.model.set_attn_implementation(_ATTENTION)
        error = (torch.cat(logits) - expected[split - 1 :]).abs().max() / expected.abs().max().clamp(min=1)
        if not error < (1e-3 if self.model.dtype == torch.float32 else 5e-2):
            raise self._not_served(f"it gives other logits here than in transformers, by {error:.2g}")

    def _not_served(self, why: str) -> UsageError:
        return UsageError(
            f"engine.kind transformers can't serve a {type(self.model).__name__} ({why}): take a model of another "
            "architecture, such as Qwen's or Llama's, or --engine.kind sglang"
        )

    @torch.inference_mode()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Copy new values into every parameter."""
        for name, parameter in self.parameters().items():
            parameter.copy_(tensors[name])
        # fp32 weights are their own copy
        self._head_weight_VE = self._head.weight.float()

    def parameters(self) -> dict[str, Tensor]:
        """By their names in the model folder; tied ones once."""
        return dict(self.model.named_parameters())


def sample(
    logits_nV: Tensor, *, temperatures_n: NDArray[np.float32], seeds_n: NDArray[np.uint64], positions_n: Ints
) -> tuple[Ints, NDArray[np.float32]]:
    """One id a row by inverse CDF, and its log-prob under softmax(logits / temperature).

    Temperature 0 takes the largest logit, with the log-prob of temperature 1. `positions_n` is where the id will stand.
    """
    greedy_n = temperatures_n == 0
    scale_n = np.where(greedy_n, np.float32(1), temperatures_n)
    device = logits_nV.device
    if (scale_n != 1).any():
        logits_nV = logits_nV / torch.from_numpy(scale_n).to(device)[:, None]
    probs_nV = logits_nV.softmax(-1)
    cdf_nV = probs_nV.cumsum(-1)
    # u <= 1 - 2**-24, so in fp32 too the target lies below the total, and an id of probability 0 is never the one found
    target_n1 = torch.from_numpy(uniforms(seeds_n, positions_n)).to(device)[:, None] * cdf_nV[:, -1:]
    # only a row of NaN finds nothing; the clamp lets it reach the check below
    ids_n1 = torch.searchsorted(cdf_nV, target_n1, right=True).clamp_(max=cdf_nV.shape[-1] - 1)
    if greedy_n.any():
        rows = torch.from_numpy(np.flatnonzero(greedy_n)).to(device)
        ids_n1[rows] = logits_nV[rows].argmax(-1, keepdim=True)
    logprobs_n = probs_nV.gather(-1, ids_n1).log_()[:, 0].cpu().numpy()
    if not np.isfinite(logprobs_n).all():
        raise FloatingPointError("the model's logits are not finite: did training diverge?")
    return ids_n1[:, 0].cpu().numpy(), logprobs_n


class _Prefill:
    def __init__(self, model: SlotModel, slots_n: Ints, starts_n: Ints, lengths_n: Ints, num_columns: int):
        positions_nT = model._put(starts_n)[:, None] + torch.arange(num_columns, device=model.device)
        # padding behind a row's last id is overwritten before anybody attends to it; it must only stay in the row
        positions_nT.clamp_(max=model.max_len)
        self.model, self.slots_n = model, model._put(slots_n)
        self.positions_nT = positions_nT
        self.length = int((starts_n + lengths_n).max())
        mask_nTL = _causal(positions_nT[:, :, None], self.length, model.model.dtype)
        n, T, L = mask_nTL.shape
        self.mask = mask_nTL[:, None].expand(n, model.groups, T, L).reshape(n, 1, model.groups * T, L)

    def __call__(self, layer: int, query_nHTD: Tensor, key_nKTD: Tensor, value_nKTD: Tensor, scaling: float) -> Tensor:
        keys_SKMD, values_SKMD = self.model.keys_SKMD[layer], self.model.values_SKMD[layer]
        keys_SKMD[self.slots_n[:, None], :, self.positions_nT] = key_nKTD.transpose(1, 2)
        values_SKMD[self.slots_n[:, None], :, self.positions_nT] = value_nKTD.transpose(1, 2)
        n, H, T, D = query_nHTD.shape
        K = key_nKTD.shape[1]
        out = F.scaled_dot_product_attention(
            query_nHTD.reshape(n, K, H // K * T, D),
            keys_SKMD[:, :, : self.length].index_select(0, self.slots_n),
            values_SKMD[:, :, : self.length].index_select(0, self.slots_n),
            attn_mask=self.mask,
            scale=scaling,
        )
        return out.view(n, H, T, D).transpose(1, 2)


class _Decode:
    """One token each of `slots_n`, over the first `length` columns; in place over `block`, slots that hold all of these."""

    def __init__(self, model: SlotModel, slots_n: Tensor, columns_n: Tensor, length: int, block: slice | None):
        self.model, self.slots_n, self.columns_n, self.length, self.block = model, slots_n, columns_n, length, block
        self.positions_nT = columns_n[:, None]
        columns_r = self.columns_n
        # rows of the block that do not run attend to column 0; nobody looks at what they get
        self.rows_n = None
        if block is not None and block.stop - block.start > len(slots_n):
            self.rows_n = self.slots_n - block.start
            columns_r = torch.zeros(block.stop - block.start, dtype=torch.int64, device=model.device)
            columns_r[self.rows_n] = self.columns_n
        mask_rL = _causal(columns_r[:, None], self.length, model.model.dtype)
        r, K, G = len(mask_rL), model.keys_SKMD[0].shape[1], model.groups
        self.mask = mask_rL[:, None, None].expand(r, K, G, self.length).reshape(r * K, G, self.length)

    def __call__(self, layer: int, query_nHTD: Tensor, key_nKTD: Tensor, value_nKTD: Tensor, scaling: float) -> Tensor:
        keys_SKMD, values_SKMD = self.model.keys_SKMD[layer], self.model.values_SKMD[layer]
        keys_SKMD[self.slots_n, :, self.columns_n] = key_nKTD[:, :, 0]
        values_SKMD[self.slots_n, :, self.columns_n] = value_nKTD[:, :, 0]
        _, H, _, D = query_nHTD.shape
        query_rHD = query_nHTD[:, :, 0]
        if self.rows_n is not None:
            query_rHD = query_nHTD.new_zeros(len(self.mask) // keys_SKMD.shape[1], H, D)
            query_rHD[self.rows_n] = query_nHTD[:, :, 0]
        keys, values = self._rows(keys_SKMD), self._rows(values_SKMD)
        query = query_rHD.reshape(len(keys), -1, D)
        scores = torch.baddbmm(self.mask, query, keys.transpose(1, 2), alpha=scaling)
        out_rHD = torch.bmm(scores.softmax(-1), values).view(-1, 1, H, D)
        return out_rHD if self.rows_n is None else out_rHD[self.rows_n]

    def _rows(self, slab_SKMD: Tensor) -> Tensor:
        """The rows to attend over, [r * K, L, D]: a view where they lie together, a copy where they are scattered."""
        if self.block is not None:
            return slab_SKMD[self.block].flatten(0, 1)[:, : self.length]
        return slab_SKMD[:, :, : self.length].index_select(0, self.slots_n).flatten(0, 1)


def _causal(positions: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """0 where a column is at or before the position, -inf after it. The last axis of `positions` is 1, of the result L."""
    past = torch.arange(length, device=positions.device) <= positions
    return torch.zeros((), dtype=dtype, device=positions.device).where(past, float("-inf"))


def _check_memory(slab_bytes: int, device: torch.device, shape_SKMD: tuple[int, ...]) -> None:
    if device.type == "cuda" and slab_bytes > (free := torch.cuda.mem_get_info(device)[0]):
        raise UsageError(
            f"keys and values of {shape_SKMD[0]} slots of {shape_SKMD[2] - 1} tokens take {slab_bytes / 1e9:.1f} GB, but the "
            f"GPU has {free / 1e9:.1f} GB left: lower --engine.slots or --agent.context-tokens, or take engine.kind sglang"
        )


def _slot_attention(
    module: torch.nn.Module,
    query_nHTD: Tensor,
    key_nKTD: Tensor,
    value_nKTD: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    slab_pass: _Prefill | _Decode,
    **_: object,
) -> tuple[Tensor, None]:
    layer = module.layer_idx
    assert isinstance(layer, int)
    return slab_pass(layer, query_nHTD, key_nKTD, value_nKTD, scaling), None


_ATTENTION = "l0fast_slots"
AttentionInterface.register(_ATTENTION, _slot_attention)
