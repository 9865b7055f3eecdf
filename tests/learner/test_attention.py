"""Packed attention is each row's own causal attention, prefixes shared or not, and needs to be told where rows lie."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from l0fast.learner import attention
from l0fast.learner.attention import Cascade, FlashOps, PackLayout, Varlen
from l0fast.learner.packing import Pack

LENGTHS = [5, 1, 9, 3]


def pack_of(prefix_lengths, families, lone, token_ids=None) -> Pack:
    """A pack of prefixes, the lengths of each family's branches, and lone rows."""
    lengths = [*prefix_lengths, *(n for family in families for n in family), *lone]
    cu_seqlens = np.cumsum([0, *lengths]).astype(np.int32)
    family_cu = (sum(prefix_lengths) + np.cumsum([0, *map(sum, families)])).astype(np.int32)
    begins = [
        *[0] * len(prefix_lengths),
        *(p for p, family in zip(prefix_lengths, families, strict=True) for _ in family),
        *[0] * len(lone),
    ]
    T = int(cu_seqlens[-1])
    empty = {name: np.zeros(0, np.float32) for name in ("advantages", "sampler_logprobs", "loss_weights")}
    ids = {name: np.zeros(0, np.int64) for name in ("predictors", "target_ids")}
    numbers = {name: np.zeros(0, np.int32) for name in ("turns", "sequences")}
    return Pack(
        token_ids=np.zeros(T, np.int64) if token_ids is None else np.asarray(token_ids),
        position_ids=np.concatenate([b + np.arange(n) for b, n in zip(begins, lengths, strict=True)]),
        cu_seqlens=cu_seqlens,
        family_cu=family_cu,
        **empty,
        **ids,
        **numbers,
    )


def definition(q, k, v, pack, scale):
    """Masked attention over the whole pack, the mask written down token by token; float64 in, float64 out."""
    T, num_families = q.shape[2], len(pack.family_cu) - 1
    allowed = torch.zeros(T, T, dtype=torch.bool)
    for a, b in pairwise(pack.cu_seqlens.tolist()):
        allowed[a:b, a:b] = torch.ones(b - a, b - a, dtype=torch.bool).tril()
    for f in range(num_families):
        branches = slice(*pack.family_cu[f : f + 2].tolist())
        allowed[branches, slice(*pack.cu_seqlens[f : f + 2].tolist())] = True
    groups = q.shape[1] // k.shape[1]
    scores = scale * q @ k.repeat_interleave(groups, 1).transpose(2, 3)
    probs = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
    return (probs @ v.repeat_interleave(groups, 1)).transpose(1, 2)


PACKS = {
    "rows alone": pack_of([], [], LENGTHS),
    "one family": pack_of([6], [[4, 1, 7]], []),
    "families and lone rows": pack_of([3, 8], [[5, 2], [1, 1, 6]], [4, 2]),
    "one row": pack_of([], [], [7]),
}


def problem(pack, seed=2):
    generator = torch.Generator().manual_seed(seed)
    T = pack.num_tokens
    draw = lambda heads: torch.randn(1, heads, T, 8, dtype=torch.float64, generator=generator)  # noqa: E731
    return [draw(heads).requires_grad_() for heads in (4, 2, 2)], torch.randn(
        1, T, 4, 8, dtype=torch.float64, generator=generator
    )


@pytest.mark.parametrize("name", PACKS)
def test_values_and_gradients_are_those_of_masked_attention_in_float64(name):
    pack = PACKS[name]
    inputs, upstream = problem(pack)
    out, _ = attention.packed_attention(torch.nn.Identity(), *inputs, None, layout=PackLayout.of(pack), scaling=0.3)
    truth = definition(*inputs, pack, 0.3)
    torch.testing.assert_close(out, truth)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(truth, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


# --- the cascade, with FlashAttention's contract spelled out in float64


def exact_forward(q, k, v, call: Varlen):
    """out and log-sum-exp of each query sequence over its keys, as FlashAttention gives them."""
    out, lse = torch.full_like(q, float("nan")), q.new_full((q.shape[1], q.shape[0]), float("nan"))
    for rows, scores, _, values in _sequences(q, k, v, call):
        lse[:, rows] = scores.logsumexp(-1)
        out[rows] = (scores.softmax(-1) @ values).transpose(0, 1)
    return out, lse


def exact_backward(dout, q, k, v, out, lse, call: Varlen):
    """Gradients from the given out and lse alone: p = exp(s - lse), delta = sum(dout out)."""
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    for (rows, scores, keys, values), cols in zip(_sequences(q, k, v, call), _slices(call.cu_k), strict=True):
        p = torch.exp(scores - lse[:, rows, None])
        do = dout[rows].transpose(0, 1)
        delta = (do * out[rows].transpose(0, 1)).sum(-1, keepdim=True)
        ds = p * (do @ values.transpose(1, 2) - delta)
        dq[rows] = call.scale * (ds @ keys).transpose(0, 1)
        per_group = lambda x: x.unflatten(0, (-1, groups)).sum(1).transpose(0, 1)  # noqa: E731
        dk[cols] = call.scale * per_group(ds.transpose(1, 2) @ q[rows].transpose(0, 1))
        dv[cols] = per_group(p.transpose(1, 2) @ do)
    return dq, dk, dv


def _slices(cu):
    return [slice(a, b) for a, b in pairwise(cu.tolist())]


def _sequences(q, k, v, call: Varlen):
    groups = q.shape[1] // k.shape[1]
    lengths = [s.stop - s.start for s in _slices(call.cu_q)]
    assert max(lengths) <= call.max_q
    assert max(s.stop - s.start for s in _slices(call.cu_k)) <= call.max_k
    for rows, cols in zip(_slices(call.cu_q), _slices(call.cu_k), strict=True):
        keys, values = (x[cols].repeat_interleave(groups, 1).transpose(0, 1) for x in (k, v))
        scores = call.scale * q[rows].transpose(0, 1) @ keys.transpose(1, 2)
        if call.causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[1:], dtype=torch.bool).tril(), float("-inf"))
        yield rows, scores, keys, values


EXACT = FlashOps(exact_forward, exact_backward)


@pytest.mark.parametrize("name", PACKS)
def test_the_cascade_and_its_backward_are_exact(name):
    pack = PACKS[name]
    inputs, upstream = problem(pack)
    rows = [x[0].transpose(0, 1) for x in inputs]
    out = Cascade.apply(*rows, PackLayout.of(pack), 0.3, EXACT)[None]
    truth = definition(*inputs, pack, 0.3)
    torch.testing.assert_close(out, truth)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(truth, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_self_test_accepts_the_truth_and_sees_a_wrong_backward():
    assert attention.self_test(EXACT, "cpu") < 0.02
    causal_everywhere = FlashOps(
        lambda q, k, v, call: exact_forward(q, k, v, call._replace(scale=0.21)), exact_backward
    )
    assert attention.self_test(causal_everywhere, "cpu") > 0.03
    without_dk = FlashOps(exact_forward, lambda *a: (lambda dq, dk, dv: (dq, dk * 1.1, dv))(*exact_backward(*a)))
    assert attention.self_test(without_dk, "cpu") > 0.03
    silent = FlashOps(lambda *a: tuple(x * float("nan") for x in exact_forward(*a)), exact_backward)
    assert not attention.self_test(silent, "cpu") < 0.03


# --- in a model


@pytest.fixture(scope="module")
def models(model_path):
    attention.register()
    load = lambda kind: AutoModelForCausalLM.from_pretrained(model_path, attn_implementation=kind)  # noqa: E731
    return load(attention.NAME), load("eager"), load("sdpa")


@pytest.fixture(scope="module")
def family():
    """Two rows of 5 + 4 and 5 + 3 tokens that begin alike, a stranger of 6, and the pack of them."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(0, 61, (n,), generator=generator)  # noqa: E731
    prefix, first, second, stranger = draw(5), draw(4), draw(3), draw(6)
    ids = torch.cat([prefix, first, second, stranger])
    pack = pack_of([5], [[4, 3]], [6], ids.numpy())
    return [torch.cat([prefix, first]), torch.cat([prefix, second]), stranger], pack


def states(model, pack, **kwargs):
    ids, positions = (torch.from_numpy(x)[None] for x in (pack.token_ids, pack.position_ids))
    with torch.no_grad():
        return model.model(input_ids=ids, position_ids=positions, use_cache=False, **kwargs).last_hidden_state[0]


def test_a_pack_gives_what_each_row_gives_alone(models, family):
    packed, eager, _ = models
    rows, pack = family
    together = states(packed, pack, layout=PackLayout.of(pack))
    with torch.no_grad():
        first, second, stranger = (
            eager.model(input_ids=row[None], use_cache=False).last_hidden_state[0] for row in rows
        )
    torch.testing.assert_close(together, torch.cat([first, second[5:], stranger]), rtol=0, atol=1e-5)


def test_stock_packing_by_position_ids_is_wrong_for_shared_prefixes(models, family):
    # it starts a new row wherever positions fall: right for rows laid out whole, but a branch would not see its prefix
    packed, _, sdpa = models
    _, pack = family
    ours, stock = states(packed, pack, layout=PackLayout.of(pack)), states(sdpa, pack)
    assert (ours - stock)[9:12].abs().max() > 0.1, "the second branch came out right without its prefix"
    lone = pack_of([], [], [9, 6], np.concatenate([pack.token_ids[:9], pack.token_ids[12:]]))
    ours, stock = states(packed, lone, layout=PackLayout.of(lone)), states(sdpa, lone)
    torch.testing.assert_close(ours, stock, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"layout": None}, "got no layout"),
        ({"layout": PackLayout.of(pack_of([], [], [3]))}, "covers 3 tokens but the pack has 4"),
        ({"dropout": 0.1}, "dropout 0.1"),
        ({"sliding_window": 3}, "context-tokens to 3 or less"),
        ({"softcap": 50.0}, "caps its scores"),
        ({"s_aux": torch.zeros(4)}, "sinks"),
        ({"attention_mask": torch.zeros(1, 1, 4, 4)}, r"mask \[1, 1, 4, 4\]"),
    ],
)
def test_what_is_no_plain_pack_is_refused(change, remedy):
    x = torch.zeros(1, 2, 4, 8)
    kwargs = {"attention_mask": None, "layout": PackLayout.of(pack_of([], [], [4]))} | change
    with pytest.raises(ValueError, match=remedy):
        attention.packed_attention(torch.nn.Identity(), x, x, x, **kwargs)


def test_a_window_that_no_row_is_longer_than_changes_nothing():
    x = torch.randn(1, 2, 12, 8)
    # a prefix of 5 with branches of 2 and 1, and a row of 4
    layout = PackLayout.of(pack_of([5], [[2, 1]], [4]))
    plain, _ = attention.packed_attention(torch.nn.Identity(), x, x, x, None, layout=layout)
    windowed, _ = attention.packed_attention(torch.nn.Identity(), x, x, x, None, layout=layout, sliding_window=7)
    assert torch.equal(plain, windowed)
    with pytest.raises(ValueError, match="a row has 7 tokens"):
        attention.packed_attention(torch.nn.Identity(), x, x, x, None, layout=layout, sliding_window=6)


def test_a_padded_batch_is_refused(models):
    with pytest.raises(ValueError, match="lay rows end to end"):
        models[0].model(
            input_ids=torch.zeros(2, 4, dtype=torch.long), use_cache=False, layout=PackLayout.of(pack_of([], [], [4]))
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("source", ["torch", "flash_attn"])
def test_flash_attention_on_this_gpu_passes_the_self_test(source):
    if source == "flash_attn":
        pytest.importorskip("flash_attn_2_cuda")
    assert attention.self_test(getattr(attention, f"{source}_ops")(), "cuda") < 0.02
    attention.flash()


def test_a_flash_attn_without_the_calls_of_version_2_is_passed_over(tmp_path, monkeypatch):
    """As flash-attn-4, which SGLang requires, leaves it: a namespace with `cute` in it."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(attention, "torch_ops", lambda: "torch's")
    monkeypatch.setattr(attention, "self_test", lambda ops, device: 0.0)
    # past what is kept of the first call
    assert attention.flash.__wrapped__() == "torch's"
