"""The slab model against transformers' own attention, and the sampler against the distribution it claims."""

from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from l0fast.engine import slot_model
from l0fast.engine.decode_graphs import DecodeGraphs, graph_sizes
from l0fast.engine.sampling import uniforms
from l0fast.engine.slot_model import SlotModel, sample
from l0fast.errors import UsageError
from tests.engine.tiny import VOCAB, full_logprobs, tiny_model

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": VOCAB,
    "initializer_range": 0.25,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 24,
    "short_factor": [1.0, 1.0, 1.0, 1.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}


def biased() -> torch.nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, head_dim=16))


def stirred(make, seed: int):
    """Biases and norms start as if they weren't there."""
    torch.manual_seed(seed)
    model = make()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if "bias" in name else 1.0)
    return model


@pytest.mark.parametrize(
    ("make", "fused"),
    [
        (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), True),
        (biased, True),
        (lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)), True),
        (lambda: Olmo2ForCausalLM(Olmo2Config(**SIZES)), False),
        (lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=DYNAMIC)), False),
    ],
)
def test_the_usual_architectures_pass_the_check(make, fused, tmp_path):
    stirred(make, seed=0).save_pretrained(tmp_path)
    ours = SlotModel(tmp_path, num_slots=2, max_len=32)
    assert (ours._fused is not None) == fused
    ours.check()


def test_new_weights_reach_the_joined_ones(tmp_path):
    """Biases too."""
    old, new = (stirred(biased, seed) for seed in (0, 1))
    old.save_pretrained(tmp_path)
    ours = SlotModel(tmp_path, num_slots=1, max_len=24)
    ours.load({name: parameter.detach() for name, parameter in new.named_parameters()})
    row = np.arange(20, dtype=np.int32)
    got = ours.prefill(np.zeros(1, np.int64), np.zeros(1, np.int64), [row])
    torch.testing.assert_close(got[0].log_softmax(-1), full_logprobs(new, row.tolist())[-1], atol=1e-5, rtol=0)


def test_an_architecture_that_does_more_to_its_logits_is_refused(tmp_path):
    config = Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=1.0, layer_types=["full_attention"] * 2)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"can't serve a Gemma2ForCausalLM \(it gives other logits here"):
        SlotModel(tmp_path, num_slots=2, max_len=32).check()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (
            lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB)),
            "no num_key_value_heads",
        ),
        (lambda: StableLmForCausalLM(StableLmConfig(**SIZES)), "'slab_pass'"),
    ],
)
def test_an_architecture_whose_attention_is_not_ours_to_replace_is_refused_in_a_sentence(make, why, tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(
        UsageError, match=rf"^[^\n]*{why}[^\n]*: take a model of another[^\n]* or --engine.kind sglang$"
    ):
        SlotModel(tmp_path, num_slots=2, max_len=32).check()


def test_sliding_windows_are_refused(tmp_path):
    tiny_model(
        0, layer_types=["full_attention", "sliding_attention"], sliding_window=8, use_sliding_window=True
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sliding-window"):
        SlotModel(tmp_path, num_slots=2, max_len=32)


def test_a_window_over_all_layers_is_refused_where_it_is_narrower_than_the_context(tmp_path):
    MistralForCausalLM(MistralConfig(**SIZES, sliding_window=24)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="sliding-window"):
        SlotModel(tmp_path, num_slots=2, max_len=25)
    SlotModel(tmp_path, num_slots=2, max_len=24).check()


def test_angles_that_depend_on_the_longest_row_are_refused_where_a_row_may_be_as_long(tmp_path):
    """A short row beside a long one would have other log-probs than alone, and so than the learner computes."""
    config = LlamaConfig(**SIZES, rope_parameters=LONGROPE)
    stirred(lambda: LlamaForCausalLM(config), seed=0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"more than 24 tokens \(longrope\).*--agent.context-tokens to 24"):
        SlotModel(tmp_path, num_slots=2, max_len=25)
    SlotModel(tmp_path, num_slots=2, max_len=24).check()


@pytest.mark.parametrize("columns", [3, 1024])
@pytest.mark.parametrize("slots", [[5, 6, 7], [1, 2, 4], [0, 4, 7]])
def test_prefill_and_decode_equal_a_full_forward(folder, model, monkeypatch, columns, slots):
    """In pieces or whole; rows that lie together, nearly so, and far apart."""
    monkeypatch.setattr(slot_model, "_PREFILL_COLUMNS", columns)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, VOCAB, n).astype(np.int32) for n in (9, 20, 13)]
    ours = SlotModel(folder, num_slots=8, max_len=24)
    slots_n, zeros = np.array(slots), np.zeros(3, np.int64)
    ours.prefill(slots_n, zeros, [row[:2] for row in rows])
    logits = [ours.prefill(slots_n, zeros + 2, [row[2:-3] for row in rows])]
    for back in (3, 2, 1):
        positions = np.array([len(row) - back for row in rows])
        logits.append(ours.decode(slots_n, np.array([row[-back] for row in rows]), positions))
    got = torch.stack(logits, dim=1).log_softmax(-1)
    expected = torch.stack([full_logprobs(model, row.tolist())[-4:] for row in rows])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_a_step_of_the_first_slots_gives_those_that_run_what_they_get_alone(folder, model):
    """What a CUDA graph holds: slots that do not run take part, whatever they hold, over more columns than anybody has."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, VOCAB, n).astype(np.int32) for n in (9, 20, 13)]
    ours = SlotModel(folder, num_slots=8, max_len=24)
    slots_n, zeros = np.array([1, 2, 4]), np.zeros(3, np.int64)
    ours.prefill(np.arange(8), np.zeros(8, np.int64), [rng.integers(0, VOCAB, 24).astype(np.int32)] * 8)
    ours.prefill(slots_n, zeros, [row[:-2] for row in rows])
    for back in (2, 1):
        ids, columns = torch.zeros(2, 8, dtype=torch.int64)
        columns += 24
        ids[slots_n] = torch.tensor([int(row[-back]) for row in rows])
        columns[slots_n] = torch.tensor([len(row) - back for row in rows])
        got = ours._logits(ours.decode_first(ids, columns, 24)[slots_n]).log_softmax(-1)
        expected = torch.stack([full_logprobs(model, row.tolist())[-back] for row in rows])
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("slots", "position", "sizes"),
    [([0], 0, (1, 64)), ([0, 2], 63, (4, 64)), ([0, 2], 64, (4, 128)), ([4], 100, (8, 128)), ([9], 149, (10, 150))],
)
def test_graphs_are_of_sizes_that_hold_what_runs_and_few(slots, position, sizes):
    positions = np.full(len(slots), position)
    assert graph_sizes(np.array(slots), positions, num_slots=10, max_len=150) == sizes


def test_graphs_are_made_on_one_stream(monkeypatch):
    """On each that a product was computed on, cuBLAS has a workspace for good."""
    cuda = MagicMock()
    monkeypatch.setattr(torch, "cuda", cuda)
    graphs = DecodeGraphs(
        lambda ids, columns, length: torch.zeros(len(ids), 3), num_slots=8, max_len=256, device=torch.device("cpu")
    )
    for slot in (0, 1, 3, 7):
        slots, positions = np.array([slot]), np.array([70])
        graphs(slots, np.array([5], np.int32), positions, *graphs.sizes(slots, positions))
    assert len(graphs._graphs) == cuda.graph.call_count == 4
    assert cuda.Stream.call_count == 1
    stream = cuda.Stream.return_value
    assert {call.args for call in cuda.stream.call_args_list} == {(stream,)}
    assert {call.kwargs["stream"] for call in cuda.graph.call_args_list} == {stream}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_give_what_kernels_one_by_one_give(folder):
    """Under new weights too, with slots that come and go, and none is made twice."""
    rng = np.random.default_rng(0)
    ours = SlotModel(folder, num_slots=10, max_len=150, device="cuda")
    graphs, by_size = ours._graphs, {}
    for seed in (0, 1):
        ours.load({name: p.detach() for name, p in tiny_model(seed).named_parameters()})
        rows = [rng.integers(0, VOCAB, 150).astype(np.int32) for _ in range(10)]
        cached = rng.integers(40, 60, 10)
        ours.prefill(np.arange(10), np.zeros(10, np.int64), [row[:n] for row, n in zip(rows, cached, strict=True)])
        for step in range(80):
            slots = np.sort(rng.choice(10 if step % 2 else 5, 3, replace=False))
            ids = np.array([rows[slot][cached[slot]] for slot in slots])
            ours._graphs = graphs
            got = ours.decode(slots, ids, cached[slots]).log_softmax(-1)
            ours._graphs = None
            torch.testing.assert_close(got, ours.decode(slots, ids, cached[slots]).log_softmax(-1), atol=0.1, rtol=0)
            cached[slots] += 1
        by_size.update({size: by_size.get(size, graph) for size, graph in graphs._graphs.items()})
    assert by_size == graphs._graphs
    assert set(by_size) == {(rows, columns) for rows in (4, 8, 10) for columns in (64, 128)}


def test_padding_stays_in_its_row(folder, model):
    rng = np.random.default_rng(1)
    rows = [rng.integers(0, VOCAB, n).astype(np.int32) for n in (24, 20, 24)]
    ours = SlotModel(folder, num_slots=3, max_len=24)
    ours.prefill(np.array([0, 2]), np.zeros(2, np.int64), [rows[0][:23], rows[2][:23]])
    got = ours.prefill(np.arange(3), np.array([23, 0, 23]), [rows[0][23:], rows[1], rows[2][23:]])
    expected = torch.stack([full_logprobs(model, row.tolist())[-1] for row in rows])
    torch.testing.assert_close(got.log_softmax(-1), expected, atol=1e-5, rtol=0)


def test_samples_follow_the_distribution():
    """Chi-square over 40,000 draws: the 99.9 % point of 15 degrees of freedom is 37.7."""
    torch.manual_seed(0)
    n, logits = 40_000, torch.randn(16)
    temperature = 0.7
    ids, logprobs = sample(
        logits.expand(n, -1),
        temperatures_n=np.full(n, temperature, np.float32),
        seeds_n=np.arange(n, dtype=np.uint64),
        positions_n=np.full(n, 17),
    )
    probs = (logits / temperature).softmax(-1)
    expected = probs.double().numpy() * n
    counts = np.bincount(ids, minlength=16)
    assert expected.min() > 5
    assert ((counts - expected) ** 2 / expected).sum() < 37.7
    np.testing.assert_allclose(logprobs, probs.log().numpy()[ids], atol=1e-6)


def test_an_impossible_id_is_never_sampled():
    torch.manual_seed(0)
    logits = torch.full((3000, 5), float("-inf"))
    logits[:, [1, 3]] = torch.randn(3000, 2)
    for lowest in (0.0, 0.5, 1 - 2.0**-24):
        original = slot_model.uniforms
        slot_model.uniforms = lambda seeds, positions, u=lowest: np.full(len(seeds), u, np.float32)
        try:
            ids, _ = sample(
                logits,
                temperatures_n=np.ones(3000, np.float32),
                seeds_n=np.zeros(3000, np.uint64),
                positions_n=np.zeros(3000, np.int64),
            )
        finally:
            slot_model.uniforms = original
        assert set(ids.tolist()) <= {1, 3}


def test_a_row_does_not_see_its_batch():
    torch.manual_seed(1)
    logits = torch.randn(64, 32)
    temperatures = np.tile(np.array([0.0, 1.0, 0.5, 2.0], np.float32), 16)
    seeds, positions = np.arange(64, dtype=np.uint64) % 7, np.arange(64) % 5
    together, logprobs = sample(logits, temperatures_n=temperatures, seeds_n=seeds, positions_n=positions)
    for i in range(64):
        one = slice(i, i + 1)
        ids, lp = sample(logits[one], temperatures_n=temperatures[one], seeds_n=seeds[one], positions_n=positions[one])
        assert ids[0] == together[i]
        assert abs(lp[0] - logprobs[i]) < 1e-6
    assert together[0] == logits[0].argmax()


def test_logits_that_are_not_finite_are_a_loud_failure():
    with pytest.raises(FloatingPointError, match="not finite"):
        sample(
            torch.full((1, 4), float("nan")),
            temperatures_n=np.ones(1, np.float32),
            seeds_n=np.zeros(1, np.uint64),
            positions_n=np.zeros(1, np.int64),
        )


def test_uniforms_are_uniform_and_independent_along_both_axes():
    seeds, positions = np.arange(400, dtype=np.uint64)[:, None], np.arange(400)[None, :]
    u = uniforms(seeds, positions).astype(np.float64)
    assert u.min() >= 0
    assert u.max() < 1
    # 160,000 draws: mean and lag correlations within 5 standard errors
    assert abs(u.mean() - 0.5) < 5 * 0.2887 / 400
    centred = (u - 0.5) * np.sqrt(12)
    assert abs((centred[1:] * centred[:-1]).mean()) < 5 / 400
    assert abs((centred[:, 1:] * centred[:, :-1]).mean()) < 5 / 400
    counts = np.histogram(u, bins=100, range=(0, 1))[0]
    assert ((counts - 1600) ** 2 / 1600).sum() < 148


def test_seeds_that_differ_by_the_step_of_a_position_are_not_shifted_copies():
    step, positions = 0x9E3779B97F4A7C15, np.arange(100)
    one, other = uniforms(np.array([5], np.uint64), positions), uniforms(np.array([5 + step], np.uint64), positions)
    assert not np.isin(other, one).any()
