"""Packed attention is each row's own causal attention, and needs to be told where rows end."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from l0fast.learner import attention

LENGTHS = [5, 1, 9, 3]


@pytest.fixture(scope="module")
def models(model_path):
    attention.register()
    load = lambda kind: AutoModelForCausalLM.from_pretrained(model_path, attn_implementation=kind)  # noqa: E731
    return load(attention.NAME), load("eager")


def test_a_pack_gives_what_each_row_gives_alone(models):
    packed, eager = models
    torch.manual_seed(1)
    rows = [torch.randint(0, 61, (n,)) for n in LENGTHS]
    token_ids = torch.cat(rows)[None]
    position_ids = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    cu_seqlens = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)])
    with torch.no_grad():
        together = packed.model(
            input_ids=token_ids, position_ids=position_ids, cu_seqlens=cu_seqlens, use_cache=False
        ).last_hidden_state[0]
        alone = torch.cat([eager.model(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in rows])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_gradients_are_those_of_masked_attention_in_float64():
    torch.manual_seed(2)
    T, cu_seqlens = sum(LENGTHS), torch.tensor([0, 5, 6, 15, 18])
    q, k, v = (torch.randn(1, heads, T, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    out, _ = attention.packed_attention(torch.nn.Identity(), q, k, v, None, cu_seqlens=cu_seqlens, scaling=0.3)
    row = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    allowed = (row[:, None] == row[None]) & torch.ones(T, T, dtype=torch.bool).tril()
    scores = 0.3 * q @ k.repeat_interleave(2, 1).transpose(2, 3)
    probs = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    truth = (probs @ v.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(out, truth)
    upstream = torch.randn_like(truth)
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), upstream), torch.autograd.grad(truth, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("kwargs", "remedy"),
    [({}, "got no cu_seqlens"), ({"cu_seqlens": torch.tensor([0, 3])}, "covers 3 tokens but the pack has 4")],
)
def test_a_pack_without_its_rows_is_refused(models, kwargs, remedy):
    with pytest.raises(ValueError, match=remedy):
        models[0].model(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False, **kwargs)


def test_a_padded_batch_is_refused(models):
    with pytest.raises(ValueError, match="lay rows end to end"):
        models[0].model(input_ids=torch.zeros(2, 4, dtype=torch.long), use_cache=False, cu_seqlens=torch.tensor([0, 4]))
