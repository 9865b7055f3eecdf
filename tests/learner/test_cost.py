"""Costs are those of the models themselves: parameters, what layers keep, FLOPs; and what does not fit is told how it would."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from l0fast.config import LearnerConfig, RunConfig
from l0fast.learner import cost
from l0fast.learner.cost import GIB, SHAPES, ModelShape, Setup, Workload
from l0fast.learner.critic import CriticModel
from l0fast.learner.packing import Row, balance, cut, pack_rows
from l0fast.learner.policy_model import PolicyModel

CONFIGS: dict[str, PretrainedConfig] = {
    "Qwen3-0.6B": Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "Qwen3-4B": Qwen3Config(
        vocab_size=151936,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "Qwen2.5-7B": Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    ),
}
TINY = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
OTHERS: list[PretrainedConfig] = [
    LlamaConfig(**TINY, num_hidden_layers=3, attention_bias=True, mlp_bias=True, tie_word_embeddings=False),
    Qwen3Config(**TINY, num_hidden_layers=2, head_dim=16, attention_bias=True),
    Qwen2Config(**TINY, num_hidden_layers=1, tie_word_embeddings=True),
]


def meta(config: PretrainedConfig):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("config", [*CONFIGS.values(), *OTHERS], ids=[*CONFIGS, "llama", "qwen3", "qwen2"])
def test_parameters_are_those_of_the_model(config):
    model, shape = meta(config), ModelShape.from_config(config.to_dict())
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    layer = model.model.layers[0]
    assert shape.layer_parameters == sum(p.numel() for p in layer.parameters())
    linears = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    assert shape.layer_matmul_parameters == sum(m.weight.numel() for m in linears)
    assert shape.lora_parameters(8) == 8 * shape.layers * sum(m.in_features + m.out_features for m in linears)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("Qwen3-0.6B", 596_049_920), ("Qwen3-4B", 4_022_468_096), ("Qwen2.5-7B", 7_615_616_512)],
)
def test_the_shapes_that_are_known_by_name(name, parameters):
    assert SHAPES[name] == ModelShape.from_config(CONFIGS[name].to_dict())
    assert SHAPES[name].parameters == parameters


def test_shapes_have_as_many_parameters_as_the_weights_that_are_published():
    """Of the safetensors on the hub."""
    assert {name: shape.parameters for name, shape in SHAPES.items() if name not in CONFIGS} == {
        "Qwen3-1.7B": 1_720_574_976,
        "Qwen3-8B": 8_190_735_360,
        "Qwen3-14B": 14_768_307_200,
        "Qwen3-32B": 32_762_123_264,
        "Qwen2.5-0.5B": 494_032_768,
        "Qwen2.5-1.5B": 1_543_714_304,
        "Qwen2.5-3B": 3_085_938_688,
        "Qwen2.5-14B": 14_770_033_664,
        "Qwen2.5-32B": 32_763_876_352,
        "Llama-3.2-1B": 1_235_814_400,
        "Llama-3.2-3B": 3_212_749_824,
        "Llama-3.1-8B": 8_030_261_248,
    }


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("Qwen/Qwen3-4B", "Qwen3-4B"),
        ("Qwen/Qwen3-4B-Instruct-2507", "Qwen3-4B"),
        ("somebody/Llama-3.1-8B-Instruct-tuned", "Llama-3.1-8B"),
        ("somebody/Qwen3-4Bits", None),
        ("Qwen3-4B/other", None),
    ],
)
def test_a_model_is_known_by_its_name_whatever_it_was_tuned_for(name, known):
    assert cost.known_shape(name) is (SHAPES[known] if known else None)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="'mamba' is none of llama, qwen2 and qwen3"):
        ModelShape.from_config({"model_type": "mamba"})


@pytest.mark.parametrize("config", [CONFIGS["Qwen3-0.6B"], CONFIGS["Qwen2.5-7B"]], ids=["qwen3", "qwen2"])
def test_a_layer_keeps_what_is_said(config):
    # the proportions of the model, an eighth of its width
    small = type(config)(
        vocab_size=32,
        hidden_size=config.hidden_size // 8,
        intermediate_size=config.intermediate_size // 8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_hidden_layers=2,
        attn_implementation="sdpa",
    )
    tokens, kept = 64, []
    for layers in (1, 2):
        small.num_hidden_layers = layers
        model = AutoModelForCausalLM.from_config(small, dtype=torch.bfloat16).model
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        stored: dict[int, torch.UntypedStorage] = {}

        def pack(tensor, weights=weights, stored=stored):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                stored[storage.data_ptr()] = storage  # held, so that no other takes its place
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            # not causal by mask: sdpa's flash kernel, as on a GPU
            out = model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False).last_hidden_state
        kept.append(sum(s.nbytes() for s in stored.values()))
        del out
    of_a_layer = (kept[1] - kept[0]) / tokens
    assert of_a_layer == pytest.approx(ModelShape.from_config(small.to_dict()).activation_bytes(liger=False), rel=0.1)


def test_liger_keeps_less():
    for shape in SHAPES.values():
        assert shape.activation_bytes(liger=True) < 0.8 * shape.activation_bytes(liger=False)


def test_flops_are_those_that_torch_counts():
    config = Qwen3Config(**TINY, num_hidden_layers=2, head_dim=16, attn_implementation="eager")
    shape = ModelShape.from_config(config.to_dict())
    model = AutoModelForCausalLM.from_config(config).model
    tokens = 24
    with FlopCounterMode(display=False) as counter:
        out = model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False).last_hidden_state
    forward = counter.get_total_flops()
    work = Workload(episodes=1, tokens=tokens, sampled=10)
    ours = cost.flops(shape, work, setup())
    # eager attention computes the whole square
    whole_square = shape.flops_per_pair * tokens**2
    assert forward == ours["forward"] - shape.flops_per_pair * work.pairs + whole_square
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    # q k^T and p v need two products each; flash attention computes q k^T once more. The embedding needs none
    assert counter.get_total_flops() == ours["backward"] - 2.5 * shape.flops_per_pair * work.pairs + 2 * whole_square
    assert ours["policy head"] == 6 * 10 * 48 * 64


@pytest.mark.parametrize(("critic", "forwards", "backwards"), [("none", 0, 0), ("head", 2, 0), ("copy", 2, 1)])
def test_a_critic_is_asked_and_then_fitted(critic: str, forwards: int, backwards: int):
    shape, work = SHAPES["Qwen3-0.6B"], Workload(episodes=16, tokens=8192, sampled=1000)
    once, twice = (cost.flops(shape, work, setup(critic=critic, minibatches=n)) for n in (1, 2))
    assert once["critic"] == pytest.approx(forwards * once["forward"] + backwards * once["backward"])
    assert twice["critic"] - once["critic"] == pytest.approx(once["forward"] if forwards else 0)
    # of each forward and each backward the weights come from the others once
    slow = cost.Rates(link_gb_s=1)
    moving, alone = (cost.seconds(shape, work, setup(critic=c), slow)["forward and backward"] for c in (critic, "none"))
    moved = 2 * (forwards + backwards) + 4 * backwards
    assert moving - alone == pytest.approx(2 * moved * 596_049_920 * 7 / 8 / 1e9)


def setup(**changes) -> Setup:
    return Setup(**{"gpus": 8, "pack_tokens": 8192, "sampled_share": 0.25, "gpu_memory_bytes": 80 * GIB} | changes)


def test_memory_by_hand_for_qwen3_4b():
    shape = SHAPES["Qwen3-4B"]
    parts = cost.memory_of(
        shape, setup(checkpointing=True, reference=True, engine_share=0.5, context_tokens=10_000, liger=True)
    ).parts
    P, P_layer, V, D = 4_022_468_096, 100_930_816, 151_936, 2560
    P_root = V * D + D
    A = 8 * D + 2 * (32 + 8) * 128 + 2 * (2 * 32 + 2 * 8) * 128 + 4 * 32 + 6 * 9728
    assert 36 * P_layer + P_root == P
    assert parts == {
        "master weights": P / 2,
        "gradients": P / 2,
        "AdamW moments": P,
        "reference": P / 4,
        "critic": 0,
        "unsharded weights": 2 * P_root + 4 * P_layer,
        "gradients under way": 2 * P_root + 8 * P_layer,
        "activations": 8192 * (2 * D * 36 + A + 8 * D) + 4 * 2048 * D,
        "policy head": 1024 * V * 6 + 4 * V * D,
        "engine weights": 2 * P,
        "engine KV": pytest.approx(40 * GIB - 2 * P),
        "engine prompts": 8192 * (4 * D + 6 * 9728),
        "other": 2.5 * GIB,
    }
    assert shape.kv_bytes == 147_456


@pytest.mark.parametrize(("gib", "tokens"), [(16, 2048), (24, 4096), (40, 4096), (80, 8192), (141, 8192), (180, 16384)])
def test_prompts_that_an_engine_computes_at_once_are_planned_beside_its_share(gib, tokens):
    shape = SHAPES["Qwen2.5-32B"]
    alone = cost.memory_of(shape, setup(gpu_memory_bytes=gib * GIB, engine_share=0.4)).parts["engine prompts"]
    assert alone == tokens * (4 * 5120 + 6 * 27648)
    four = setup(gpu_memory_bytes=gib * GIB, engine_share=0.4, tensor_parallel=4)
    assert cost.memory_of(shape, four).parts["engine prompts"] == tokens * (4 * 5120 + 6 * 27648 / 4)
    assert cost.memory_of(shape, setup(gpu_memory_bytes=gib * GIB)).parts["engine prompts"] == 0


def test_lora_trains_the_additions_alone():
    shape = SHAPES["Qwen2.5-7B"]
    whole, lora = (cost.memory_of(shape, setup(lora_rank=rank, reference=True)).parts for rank in (0, 16))
    added = shape.lora_parameters(16)
    assert added == 40_370_176, "as peft counts for rank 16 in q, k, v, o, gate, up and down"
    assert lora["gradients"] == 4 * added / 8
    assert lora["AdamW moments"] == 8 * added / 8
    assert lora["reference"] == 0 < whole["reference"]
    assert lora["policy head"] == 1024 * 152_064 * 6
    assert lora["activations"] == whole["activations"]


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("config", OTHERS[::2], ids=["untied", "tied"])
def test_a_copy_takes_what_its_parameters_do(config, lora_rank, tmp_path):
    pytest.importorskip("peft")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    learner = LearnerConfig(critic="copy", lora_rank=lora_rank, kl_coef=0)
    critic = CriticModel(PolicyModel(tmp_path, learner, num_steps=1, temperature=1.0))
    assert critic._copy is not None
    count = lambda parameters: sum(p.numel() for p in parameters)  # noqa: E731
    trained = count(critic.trained.values()) - count(critic.head.parameters())
    shape = ModelShape.from_config(config.to_dict())
    parts = cost.memory_of(shape, setup(gpus=1, critic="copy", lora_rank=lora_rank)).parts
    # with a gradient and two moments
    assert parts["critic"] == 4 * count(critic._copy.parameters()) + 12 * trained


def test_a_copy_that_has_additions_moves_their_gradients_alone():
    shape, work = SHAPES["Qwen3-0.6B"], Workload(episodes=16, tokens=8192, sampled=1000)
    once = cost.flops(shape, work, setup(critic="copy", lora_rank=8))
    assert once["critic"] == pytest.approx(2 * once["forward"] + once["backward"])
    slow = cost.Rates(link_gb_s=1)
    moving, alone = (
        cost.seconds(shape, work, setup(critic=critic, lora_rank=8), slow)["forward and backward"]
        for critic in ("copy", "none")
    )
    moved = 2 * 3 * shape.parameters + 4 * shape.lora_parameters(8)
    assert moving - alone == pytest.approx(2 * moved * 7 / 8 / 1e9)


def test_what_is_offloaded_is_in_main_memory():
    shape = SHAPES["Qwen2.5-7B"]
    on, off = setup(), setup(offload=True)
    here, there = (sum(cost.memory_of(shape, s).parts.values()) for s in (on, off))
    assert here - there == pytest.approx(16 * shape.parameters / 8)
    host = lambda s, **settings: cost.host_parts(  # noqa: E731
        shape, s, **{"weights_by_host": False, "checkpoints": False} | settings
    )
    # weights and gradients are pinned: a shard of 18,944 x 3,584 / 8 in fp32 is 34 MB and takes 64 MiB
    assert host(off)["offloaded"] == pytest.approx((2 * 4 * 1.904 + 8) * shape.parameters, rel=1e-3)
    # a model folder, before it is written
    assert host(on) == {"offloaded": 0, "weights on their way": 4 * shape.parameters, "checkpoint": 0}
    assert host(on, checkpoints=True)["checkpoint"] == 12 * shape.parameters
    assert host(on, weights_by_host=True)["weights on their way"] == 8 * shape.parameters


def test_a_shared_prefix_is_laid_out_once_a_group():
    alone = Workload(episodes=8, tokens=3000, sampled=500)
    shared = Workload(episodes=8, tokens=3000, sampled=500, shared=2000, group_size=4)
    assert alone.laid_out == 24_000
    assert shared.laid_out == 2 * (2000 + 4 * 1000)
    # what a branch sees of the prefix is computed for each; the prefix itself once
    assert shared.pairs == alone.pairs - 6 * 2000**2 / 2


def test_seconds_by_hand():
    shape, work = SHAPES["Qwen3-0.6B"], Workload(episodes=16, tokens=8192, sampled=1000)
    fast = cost.Rates(tflops=100, memory_gb_s=1000, link_gb_s=1e9, host_gb_s=10)
    s = cost.seconds(shape, work, setup(), fast)
    assert s["forward and backward"] == pytest.approx(sum(cost.flops(shape, work, setup()).values()) / 800e12)
    assert s["optimizer"] == pytest.approx(28 * 596_049_920 / 8 / 1e12)
    # one pack more than the ranks are whole rounds of: all but one wait
    more = Workload(episodes=17, tokens=8192, sampled=1000)
    assert cost.seconds(shape, more, setup(), fast)["forward and backward"] == pytest.approx(
        1.5 * s["forward and backward"]
    )
    # a slow link is what counts: weights twice in bf16, gradients in fp32, two rounds, from the seven others
    slow = cost.Rates(link_gb_s=1)
    assert cost.seconds(shape, work, setup(), slow)["forward and backward"] == pytest.approx(
        2 * 8 * 596_049_920 * 7 / 8 / 1e9
    )


@pytest.mark.parametrize(("minibatches", "pack_tokens"), [(1, 8192), (1, 1000), (4, 8192), (4, 500), (100, 8192)])
def test_rounds_are_those_in_which_packs_are_dealt(minibatches: int, pack_tokens: int):
    none = np.zeros(1, np.float32)
    groups = [
        [
            Row(
                token_ids=np.full(100, 4 * g + i),
                predictors=np.array([98]),
                advantages=none,
                sampler_logprobs=none,
                loss_weights=none + 1,
                turns=none.astype(np.int32),
            )
            for i in range(4)
        ]
        for g in range(8)
    ]
    parts = cut(groups, minibatches)
    dealt = [balance(pack_rows(part, pack_tokens, num_ranks=2), 2) for part in parts]
    rounds = sum(max(map(len, packs)) for packs in dealt)
    shape, work = SHAPES["Qwen3-0.6B"], Workload(episodes=32, tokens=100, sampled=10)
    s = cost.seconds(
        shape, work, setup(gpus=2, minibatches=minibatches, pack_tokens=pack_tokens), cost.Rates(link_gb_s=1)
    )
    gathers = 2 + (minibatches > 1)
    moved = rounds * (2 * gathers + 4) * shape.parameters / 2
    assert s["forward and backward"] == pytest.approx(moved / 1e9)
    # of a part's rows each rank has as many, or where it is one row one has none
    fast = cost.seconds(
        shape, work, setup(gpus=2, minibatches=minibatches, pack_tokens=pack_tokens), cost.Rates(link_gb_s=1e9)
    )
    flops = sum(cost.flops(shape, work, setup(minibatches=minibatches)).values())
    idle = 2 if len(parts) == 32 else 1
    assert fast["forward and backward"] == pytest.approx(idle * flops / 2 / 400e12)


shapes = st.sampled_from(sorted(SHAPES))
setups = st.builds(
    Setup,
    gpus=st.sampled_from([1, 2, 8]),
    pack_tokens=st.sampled_from([2048, 8192, 32768]),
    sampled_share=st.floats(0.05, 1),
    reference=st.booleans(),
    checkpointing=st.booleans(),
    offload=st.booleans(),
    liger=st.booleans(),
    gpu_memory_bytes=st.sampled_from([24 * GIB, 80 * GIB, 141 * GIB]),
    engine_share=st.sampled_from([0.0, 0.2, 0.4, 0.7]),
    context_tokens=st.sampled_from([1000, 8000, 16_000]),
)

FLAGS = {
    "--learner.activation-checkpointing on": {"checkpointing": True},
    "--learner.kl-coef 0": {"reference": False},
    "--learner.offload cpu": {"offload": True},
}


def follow(advice: str, setup: Setup) -> Setup:
    """Do as the sentence says."""
    for flag, changes in FLAGS.items():
        if flag in advice:
            setup = replace(setup, **changes)
    if found := re.search(r"--learner.pack-tokens (\d+)", advice):
        setup = replace(setup, pack_tokens=int(found[1]))
    if found := re.search(r"--engine.memory-share ([\d.]+)", advice):
        setup = replace(setup, engine_share=float(found[1]))
    if found := re.search(r"take (\d+) GPUs", advice):
        setup = replace(setup, gpus=int(found[1]))
    return setup


@given(shapes, setups)
def test_whoever_follows_the_advice_gets_a_setup_that_fits(name, setup):
    seen = []
    while (advice := cost.why_not(SHAPES[name], setup)) and "smaller model" not in advice:
        assert advice not in seen, "advice that changes nothing"
        seen.append(advice)
        setup = follow(advice, setup)
        # an engine's share is looked at first; then one answer is enough
        assert len(seen) <= 1 + seen[0].startswith("engine.memory_share")


def test_an_engine_needs_room_for_its_weights_and_one_context():
    shape, here = SHAPES["Qwen2.5-32B"], setup(context_tokens=8192, engine_share=0.4)
    assert cost.share_complaint(shape, replace(here, engine_share=0.0)) is None
    assert str(cost.share_complaint(shape, here)).endswith("set --engine.memory-share 0.79")
    assert cost.share_complaint(shape, replace(here, engine_share=0.79)) is None
    assert cost.share_complaint(shape, replace(here, tensor_parallel=2)) is None
    # no share of this GPU is enough, and there may be no second one
    small = replace(here, gpu_memory_bytes=24 * GIB)
    assert str(cost.share_complaint(shape, small)).endswith("raise --engine.tensor-parallel, or take a smaller model")


@given(shapes, setups)
def test_less_of_anything_takes_no_more_memory(name, setup):
    shape = SHAPES[name]
    total = lambda s: sum(cost.memory_of(shape, s).parts.values())  # noqa: E731
    for smaller in (
        replace(setup, gpus=2 * setup.gpus),
        replace(setup, pack_tokens=setup.pack_tokens // 2),
        replace(setup, checkpointing=True),
        replace(setup, offload=True),
        replace(setup, reference=False),
        replace(setup, liger=True),
    ):
        assert total(smaller) <= total(setup)


def test_a_run_is_planned_from_its_settings():
    config = RunConfig.model_validate(
        {
            "agent": {"context_tokens": 8000, "max_new_tokens": 1000},
            "rollout": {"group_size": 4, "groups_per_step": 8, "max_open_groups": 8, "max_turns": 3},
            "learner": {"kl_coef": 0.0, "pack_tokens": 4096, "activation_checkpointing": "off", "offload": "cpu"},
            "engine": {"memory_share": 0.3},
        }
    )
    work = cost.workload_of(config)
    assert (work.episodes, work.tokens, work.sampled, work.rows) == (32, 8000, 3000, 1)
    assert cost.workload_of(config, tokens=20_000, sampled=5000).rows == 2.5
    s = cost.setup_of(config, work, gpus=2, gpu_memory_bytes=10 * GIB)
    assert (s.pack_tokens, s.reference, s.checkpointing, s.offload, s.engine_share) == (8000, False, False, True, 0.3)
