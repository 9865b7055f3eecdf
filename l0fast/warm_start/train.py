"""Supervised learning on demonstrations: next-token cross-entropy, weight 1 on what the agent said, less on the rest.

Muon moves the matrices, AdamW the embedding and the norms. Batches hold about
2,048 tokens of rows of like length. Copying appears suddenly, after 1.3-2 M tokens.
"""

import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from l0fast.warm_start.muon import Muon


@dataclass(frozen=True, slots=True)
class Row:
    token_ids: tuple[int, ...]
    sampled: tuple[bool, ...]
    """True on what the agent said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    peak_lr: float = 5e-3
    """Of Muon, in units of AdamW's update RMS; AdamW takes the same."""
    batch_tokens: int = 2048
    context_weight: float = 0.3
    """Loss weight of tokens the agent did not say."""
    warmup_share: float = 0.02
    final_lr_ratio: float = 0.05
    seed: int = 0


def new_policy(tokenizer: Tokenizer, *, context_tokens: int, seed: int) -> Qwen3ForCausalLM:
    """0.9 M parameters, fp32, random weights."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=context_tokens,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        tie_word_embeddings=True,
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
        bos_token_id=None,
        pad_token_id=tokenizer.token_to_id("<|endoftext|>"),
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def train(
    model: Qwen3ForCausalLM,
    rows: Sequence[Row],
    settings: TrainSettings,
    progress: Callable[[int, int, float, float], None],
) -> None:
    """One pass over `rows`, in their order but for what batching like lengths takes.

    `progress(tokens_done, tokens, loss, seconds)` is called after every batch.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, settings.peak_lr, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=settings.peak_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    total = sum(len(row.token_ids) for row in rows)
    done, started = 0, time.monotonic()
    model.train()
    for batch in batches(rows, settings.batch_tokens, random.Random(settings.seed)):
        share = done / total
        scale = min(1.0, (share + 1e-3) / settings.warmup_share) * (1 - (1 - settings.final_lr_ratio) * share)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = settings.peak_lr * scale
        loss = weighted_loss(model, batch, settings.context_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        done += sum(len(row.token_ids) for row in batch)
        progress(done, total, loss.item(), time.monotonic() - started)


def save_policy(model: Qwen3ForCausalLM, folder: Path) -> None:
    """bf16 safetensors: half the file; read back as fp32."""
    transformers.utils.logging.disable_progress_bar()  # a file of two megabytes
    half = copy.deepcopy(model).bfloat16()
    half.config.dtype = "bfloat16"
    half.save_pretrained(folder)


def batches(rows: Sequence[Row], batch_tokens: int, rng: random.Random) -> Iterator[list[Row]]:
    """Rows of like length, at most `batch_tokens` with their padding; in random order within windows of 512 rows."""
    for start in range(0, len(rows), 512):
        window: list[list[Row]] = [[]]
        for row in sorted(rows[start : start + 512], key=lambda row: len(row.token_ids)):
            if window[-1] and (len(window[-1]) + 1) * len(row.token_ids) > batch_tokens:
                window.append([])
            window[-1].append(row)
        rng.shuffle(window)
        yield from window


def weighted_loss(model: Qwen3ForCausalLM, batch: Sequence[Row], context_weight: float) -> Tensor:
    """Weighted mean cross-entropy of all tokens but the first of each row [nats]."""
    # right padding under a causal mask: no real token ever sees a pad
    length = max(len(row.token_ids) for row in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    weights = torch.zeros(len(batch), length)
    for i, row in enumerate(batch):
        n = len(row.token_ids)
        ids[i, :n] = torch.tensor(row.token_ids)
        weights[i, :n] = torch.where(torch.tensor(row.sampled), 1.0, context_weight)
    logits = model(ids).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()
