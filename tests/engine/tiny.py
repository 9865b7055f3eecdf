"""A tiny policy and what transformers itself says about it."""

from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

VOCAB, MAX_TOKENS, SLOTS = 48, 160, 24


def tiny_model(seed: int, **changes: Any) -> Qwen3ForCausalLM:
    """Peaked enough that an argmax is no tie: random weights of the usual size give nearly uniform logits."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.25,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **changes,
    )
    return Qwen3ForCausalLM(config).eval()


@torch.no_grad()
def full_logprobs(model: torch.nn.Module, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probs of every id after every prefix, by transformers' own attention, [len(ids), V]."""
    return (model(input_ids=torch.tensor([ids])).logits[0] / temperature).log_softmax(-1)
