"""What a step takes: memory of a GPU by part, FLOPs, seconds. Arithmetic on a model's shape and a run's settings; no torch.

Memory of one of n ranks (FSDP2, P parameters of which P_layer in a decoder layer and P_root in embedding, head and last norm):

    master weights   4 P / n                       fp32
    gradients        4 P / n                       fp32: they add up over packs
    AdamW            8 P / n                       two fp32 moments
    reference        2 P / n                       a second model, frozen, bf16, where kl_coef > 0
    critic           (4 P + 12 (P - head)) / n     where it is a copy of the model; its head is not trained
    unsharded        2 (P_root + 2 P_layer)        bf16: this layer and the next one on its way; the root stays
    backward         2 P_root + 8 P_layer          bf16 gradients of the root; of two layers, one of which is being reduced in fp32
    activations      T (layers A), or checkpointed T (2 D layers + A), A bytes a token and layer (`activation_bytes`)
    policy head      chunk V (4 + 2) + 4 V D       fp32 logits and bf16 dlogits of a chunk, fp32 dW
    engine           its share of the GPU          2 P of weights in bf16, the rest for KV: 4 layers kv_heads head_dim a token;
                                                   both over the GPUs of a tensor-parallel one
    engine prompts   8,192 (4 D + 6 F)             beside its share, bf16: of as many tokens of prompts as SGLang computes at once, the
                                                   residual and hidden states, gate, up and their product
    other            CUDA context, libraries, what the allocator can't use

With LoRA the master weights are frozen: gradients, moments, the reduced gradients and the root's are the additions' alone, a
critic's too, and the reference is the model without them.

FLOPs of a step with N tokens laid out, R of them sampled and S (query, key) pairs of attention, W weights in the layers' matmuls:

    forward  2 W N + 4 layers heads head_dim S     backward: twice the matmuls, 2.5 times the attention (FlashAttention-2)
    policy head  6 R D V                           (kernels/l0fast_kernels/policy_head.py)
    checkpointing  another forward of the layers   reference, and log-probs of before several steps: a forward and 2 R D V each
    critic  a forward to ask it, and before several steps one more; to fit a head another one, to fit a copy what the policy takes

Seconds divide FLOPs by a rate that was measured or is declared. FSDP gathers the weights twice a pack and reduces gradients once,
and each optimizer step of a batch has a pack a rank at least;
that goes on beside the matmuls, so of the two the longer counts. Estimates are for planning: within some 10 % where the
allocator behaves; what was seen in a run is in its metrics.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import orjson

from l0fast.config import RunConfig
from l0fast.errors import UsageError

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A dense decoder-only transformer with grouped queries and a gated MLP."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    """The LM head is the embedding."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm of queries and keys, one weight for all heads."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelShape":
        """Of a model folder's config.json.

        Raises:
            ValueError: an architecture whose parameters are not known here.
        """
        kind = config.get("model_type")
        if kind not in ("llama", "qwen2", "qwen3"):
            raise ValueError(
                f"model_type = {kind!r} is none of llama, qwen2 and qwen3, whose costs are known: take one of those"
            )
        bias = bool(config.get("attention_bias", False))
        heads = config["num_attention_heads"]
        return cls(
            vocab=config["vocab_size"],
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2" or bias,
            o_bias=kind != "qwen2" and bias,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=kind == "qwen3",
        )

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def layer_matmul_parameters(self) -> int:
        """Weights of a layer that every token is multiplied with."""
        attention = self.hidden * (self.query_width + 2 * self.kv_width) + self.query_width * self.hidden
        return attention + 3 * self.hidden * self.intermediate

    @property
    def layer_parameters(self) -> int:
        biases = self.qkv_bias * (self.query_width + 2 * self.kv_width) + self.o_bias * self.hidden
        biases += self.mlp_bias * (2 * self.intermediate + self.hidden)
        return self.layer_matmul_parameters + biases + self.qk_norm * 2 * self.head_dim + 2 * self.hidden

    @property
    def root_parameters(self) -> int:
        """Embedding, LM head if it is another matrix, last norm."""
        return (1 if self.tied else 2) * self.vocab * self.hidden + self.hidden

    @property
    def backbone_parameters(self) -> int:
        """All but the LM head."""
        return self.parameters - (0 if self.tied else self.vocab * self.hidden)

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.root_parameters

    def lora_parameters(self, rank: int) -> int:
        """Of additions of this rank to all linear layers but the head."""
        ends = (
            2 * (self.hidden + self.query_width)
            + 2 * (self.hidden + self.kv_width)
            + 3 * (self.hidden + self.intermediate)
        )
        return self.layers * rank * ends

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token in an engine, bf16 [bytes]."""
        return 2 * 2 * self.layers * self.kv_width

    @property
    def flops_per_pair(self) -> int:
        """Forward, of one (query, key) pair in all layers: q k and p v."""
        return 4 * self.layers * self.query_width

    @property
    def attention_weight(self) -> float:
        """FLOPs of a pair in units of those of a token in the layers' matmuls (`packing.balance`)."""
        return self.flops_per_pair / (2 * self.layers * self.layer_matmul_parameters)

    def activation_bytes(self, *, liger: bool) -> int:
        """What a decoder layer keeps of a token for its backward, bf16 [bytes].

        Both norms and their outputs, queries and keys before their norms, q, k, v and what comes out of attention, log-sum-exp, gate
        and up, their product. transformers' own RMSNorm keeps fp32 copies and its SwiGLU keeps silu(gate); Liger's don't.
        """
        norm = 2 if liger else 6
        kept = 2 * (norm + 2) * self.hidden
        kept += self.qk_norm * norm * (self.query_width + self.kv_width)
        kept += 2 * (2 * self.query_width + 2 * self.kv_width) + 4 * self.heads
        return kept + (6 if liger else 8) * self.intermediate


SHAPES = {
    "Qwen3-0.6B": ModelShape(
        vocab=151936, hidden=1024, intermediate=3072, layers=28, heads=16, kv_heads=8, head_dim=128, tied=True, qk_norm=True
    ),
    "Qwen3-1.7B": ModelShape(
        vocab=151936, hidden=2048, intermediate=6144, layers=28, heads=16, kv_heads=8, head_dim=128, tied=True, qk_norm=True
    ),
    "Qwen3-4B": ModelShape(
        vocab=151936, hidden=2560, intermediate=9728, layers=36, heads=32, kv_heads=8, head_dim=128, tied=True, qk_norm=True
    ),
    "Qwen3-8B": ModelShape(
        vocab=151936, hidden=4096, intermediate=12288, layers=36, heads=32, kv_heads=8, head_dim=128, tied=False, qk_norm=True
    ),
    "Qwen3-14B": ModelShape(
        vocab=151936, hidden=5120, intermediate=17408, layers=40, heads=40, kv_heads=8, head_dim=128, tied=False, qk_norm=True
    ),
    "Qwen3-32B": ModelShape(
        vocab=151936, hidden=5120, intermediate=25600, layers=64, heads=64, kv_heads=8, head_dim=128, tied=False, qk_norm=True
    ),
    "Qwen2.5-0.5B": ModelShape(
        vocab=151936, hidden=896, intermediate=4864, layers=24, heads=14, kv_heads=2, head_dim=64, tied=True, qkv_bias=True
    ),
    "Qwen2.5-1.5B": ModelShape(
        vocab=151936, hidden=1536, intermediate=8960, layers=28, heads=12, kv_heads=2, head_dim=128, tied=True, qkv_bias=True
    ),
    "Qwen2.5-3B": ModelShape(
        vocab=151936, hidden=2048, intermediate=11008, layers=36, heads=16, kv_heads=2, head_dim=128, tied=True, qkv_bias=True
    ),
    "Qwen2.5-7B": ModelShape(
        vocab=152064, hidden=3584, intermediate=18944, layers=28, heads=28, kv_heads=4, head_dim=128, tied=False, qkv_bias=True
    ),
    "Qwen2.5-14B": ModelShape(
        vocab=152064, hidden=5120, intermediate=13824, layers=48, heads=40, kv_heads=8, head_dim=128, tied=False, qkv_bias=True
    ),
    "Qwen2.5-32B": ModelShape(
        vocab=152064, hidden=5120, intermediate=27648, layers=64, heads=40, kv_heads=8, head_dim=128, tied=False, qkv_bias=True
    ),
    "Llama-3.2-1B": ModelShape(
        vocab=128256, hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, head_dim=64, tied=True
    ),
    "Llama-3.2-3B": ModelShape(
        vocab=128256, hidden=3072, intermediate=8192, layers=28, heads=24, kv_heads=8, head_dim=128, tied=True
    ),
    "Llama-3.1-8B": ModelShape(
        vocab=128256, hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, head_dim=128, tied=False
    ),
}  # fmt: skip
"""Shapes that can be planned for without the model being there."""


def read_shape(config_json: Path) -> ModelShape:
    """Of the model a config.json describes. Raises UsageError."""
    try:
        return ModelShape.from_config(orjson.loads(config_json.read_bytes()))
    except (OSError, ValueError, KeyError) as e:
        raise UsageError(
            f"{config_json} can't be planned for ({e}): give the config.json of a Hugging Face model"
        ) from e


def known_shape(name: str) -> ModelShape | None:
    """Of a model by the last part of its name, whatever it was tuned for: "Qwen/Qwen3-4B-Instruct-2507"."""
    last = name.rpartition("/")[2]
    return next((shape for model, shape in SHAPES.items() if f"{last}-".startswith(f"{model}-")), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How the model lies on the GPUs."""

    gpus: int
    """Ranks of the learner, one a GPU."""
    pack_tokens: int
    sampled_share: float
    """Of the tokens of a pack, those that are predicted."""
    reference: bool = False
    """A frozen start model for the KL term."""
    critic: Literal["none", "head", "copy"] = "none"
    """A row on the policy's hidden states, or a trained copy of the model."""
    lora_rank: int = 0
    minibatches: int = 1
    """Optimizer steps a batch."""
    checkpointing: bool = False
    """Keep each layer's input only and compute the rest again."""
    offload: bool = False
    """Master weights, gradients and moments in the host's memory."""
    liger: bool = False
    head_chunk: int = 1024
    """Rows of the policy head at a time [tokens]."""
    gpu_memory_bytes: float = 80e9
    engine_share: float = 0.0
    """Of a GPU's memory, what an engine on it takes for weights and keys and values; 0 where engines have GPUs of their own."""
    tensor_parallel: int = 1
    """GPUs an engine lies on, a part of the weights and of each key and value on each."""
    context_tokens: int = 0
    """Longest conversation: an engine needs room for one at least."""
    other_bytes: float = 2.5 * GIB
    """CUDA contexts, libraries, communication buffers, and what the allocator can't use."""

    @property
    def second_model(self) -> bool:
        """With LoRA the reference is the model itself, without its additions."""
        return self.reference and not self.lora_rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a step learns from: means over its episodes [tokens]."""

    episodes: int
    tokens: float
    """Of an episode's rows."""
    sampled: float
    rows: float = 1.0
    """Of an episode: one more for every trim."""
    shared: float = 0.0
    """First tokens that the episodes of a group have in common, laid out once a group."""
    group_size: int = 1

    @property
    def laid_out(self) -> float:
        """Tokens in all packs of the step."""
        return self.episodes * (self.tokens - self.shared * (1 - 1 / self.group_size))

    @property
    def pairs(self) -> float:
        """(query, key) pairs of attention, every row of mean length."""
        per_row, shared = self.tokens / self.rows, min(self.shared, self.tokens / self.rows)
        return self.episodes * (self.rows * per_row**2 - (1 - 1 / self.group_size) * shared**2) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a GPU of the node does: declared here for an H100 or H200, better measured (bench.kernels)."""

    tflops: float = 400.0
    """In the matmuls and attention of a whole training step [TFLOP/s]."""
    memory_gb_s: float = 3000.0
    """[GB/s]"""
    link_gb_s: float = 300.0
    """Gather and reduce over all GPUs, bytes that a GPU takes in [GB/s]."""
    host_gb_s: float = 40.0
    """To and from the host's memory [GB/s]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Most memory of one GPU by part [bytes]."""

    kept: dict[str, float]
    """What the learner has between two steps, too."""
    working: dict[str, float]
    """What it has only while it works."""
    engine: dict[str, float]

    @property
    def learner(self) -> dict[str, float]:
        return self.kept | self.working

    @property
    def parts(self) -> dict[str, float]:
        return self.learner | self.engine


def memory_of(shape: ModelShape, setup: Setup) -> Memory:
    n, t = setup.gpus, setup.pack_tokens
    on_gpu = 0 if setup.offload else 1 / n
    lora = shape.lora_parameters(setup.lora_rank)
    trained, layer_gradients = (
        (lora, lora / shape.layers) if setup.lora_rank else (shape.parameters, shape.layer_parameters)
    )
    root_gradients = 0 if setup.lora_rank else shape.root_parameters
    head_gradient = 0 if setup.lora_rank else 4 * shape.vocab * shape.hidden
    activation = shape.activation_bytes(liger=setup.liger)
    layers, one_layer = (2 * shape.hidden, activation) if setup.checkpointing else (activation, 0)
    sampled = setup.sampled_share * t
    kept = {
        "master weights": 4 * (shape.parameters + lora) * on_gpu,
        "gradients": 4 * trained * on_gpu,
        "AdamW moments": 8 * trained * on_gpu,
        "reference": 2 * shape.parameters * on_gpu if setup.second_model else 0.0,
        "critic": (4 * (shape.parameters + lora) + 12 * (lora or shape.backbone_parameters)) * on_gpu
        if setup.critic == "copy"
        else 0.0,
        "other": setup.other_bytes,
    }
    working = {
        "unsharded weights": 2 * (shape.root_parameters + 2 * shape.layer_parameters),
        "gradients under way": 2 * root_gradients + 8 * layer_gradients,
        # the root keeps its output, its norm and the predictors' states with their gradient
        "activations": t * (layers * shape.layers + one_layer + 8 * shape.hidden) + 4 * sampled * shape.hidden,
        "policy head": min(setup.head_chunk, sampled) * shape.vocab * 6 + head_gradient,
    }
    engine = {
        "engine weights": 2.0 * shape.parameters / setup.tensor_parallel if setup.engine_share else 0.0,
        "engine KV": kv_tokens(shape, setup) * shape.kv_bytes / setup.tensor_parallel,
        "engine prompts": prompt_bytes(shape, setup) if setup.engine_share else 0.0,
    }
    return Memory(kept=kept, working=working, engine=engine)


def prompt_bytes(shape: ModelShape, setup: Setup) -> float:
    """Most that an engine's prompts on their way through a layer take of one of its GPUs, beside its share [bytes]."""
    # SGLang's chunked_prefill_size, by the size of the GPU
    tokens = next((n for gib, n in ((20, 2048), (60, 4096), (160, 8192)) if setup.gpu_memory_bytes < gib * GIB), 16384)
    return tokens * (4.0 * shape.hidden + 6.0 * shape.intermediate / setup.tensor_parallel)


def kv_tokens(shape: ModelShape, setup: Setup) -> float:
    """Tokens whose keys and values an engine has room for; negative where not even the weights fit."""
    if not setup.engine_share:
        return 0.0
    room = setup.engine_share * setup.gpu_memory_bytes * setup.tensor_parallel
    return (room - 2 * shape.parameters) / shape.kv_bytes


def host_parts(shape: ModelShape, setup: Setup, *, weights_by_host: bool, checkpoints: bool) -> dict[str, float]:
    """Most of the node's own memory by part, all ranks together [bytes].

    Args:
        weights_by_host: they are published there in fp32, and made into bf16 and then into buckets for engines; else only a
            model folder is gathered there, when the run ends.
        checkpoints: what is trained is copied before it is written.
    """
    there, here = (memory_of(shape, replace(setup, offload=offload)).kept for offload in (False, True))
    offloaded = {name: setup.gpus * (there[name] - here[name]) for name in there} if setup.offload else {}
    pinned = {"master weights": 4, "reference": 2} | ({} if setup.lora_rank else {"gradients": 4})
    trained = shape.lora_parameters(setup.lora_rank) or shape.parameters
    return {
        "offloaded": sum(
            n * (_pinned(shape, setup.gpus, pinned[name]) if name in pinned else 1) for name, n in offloaded.items()
        ),
        "weights on their way": (8.0 if weights_by_host else 4.0) * shape.parameters,
        "checkpoint": 12.0 * trained * (1 + (setup.critic == "copy")) * checkpoints,
    }


def _pinned(shape: ModelShape, ranks: int, element_bytes: int) -> float:
    """Pinned memory over what lies in it: torch takes the next power of two for each shard of a tensor."""
    D, Q, K, F = shape.hidden, shape.query_width, shape.kv_width, shape.intermediate
    layer = [(Q, D), (K, D), (K, D), (D, Q), (F, D), (F, D), (D, F)]
    matrices = [*layer * shape.layers, *[(shape.vocab, D)] * (1 if shape.tied else 2)]
    shards = [-(-rows // ranks) * columns * element_bytes for rows, columns in matrices]
    return sum(1 << (size - 1).bit_length() for size in shards) / sum(shards)


def flops(shape: ModelShape, work: Workload, setup: Setup) -> dict[str, float]:
    """Of one step, on all GPUs together."""
    matmuls = 2 * shape.layers * shape.layer_matmul_parameters * work.laid_out
    attention = shape.flops_per_pair * work.pairs
    head = 2 * work.episodes * work.sampled * shape.hidden * shape.vocab
    forward = matmuls + attention
    # frozen weights need no gradient of their own
    trained = 1 if not setup.lora_rank else 0.5
    backward = 2 * matmuls * trained + 2.5 * attention
    again = forward if setup.checkpointing else 0.0
    ask = forward * (1 + (setup.minibatches > 1))
    critic = {"none": 0.0, "head": ask + forward, "copy": ask + forward + backward + again}[setup.critic]
    return {
        "forward": forward,
        "backward": backward,
        "computed again": again,
        "policy head": (3 if trained == 1 else 2) * head,
        "reference": forward + head if setup.reference else 0.0,
        "log-probs of before": forward + head if setup.minibatches > 1 else 0.0,
        "critic": critic,
    }


def seconds(shape: ModelShape, work: Workload, setup: Setup, rates: Rates) -> dict[str, float]:
    """Of one step: the longer of computing and moving weights, then optimizer and weight sync [s]."""
    n, parameters = setup.gpus, shape.parameters
    computing = sum(flops(shape, work, setup).values()) / (n * rates.tflops * 1e12)
    # each optimizer step's part of the batch is dealt by itself, and has a row at least
    parts = max(1, min(setup.minibatches, math.floor(work.episodes * work.rows)))
    rounds = parts * math.ceil(work.laid_out / parts / setup.pack_tokens / n)
    # packs are made alike for all ranks to have one, as far as rows allow; else a round leaves ranks idle
    computing *= max(1, rounds * n * work.tokens / work.rows / work.laid_out)
    share_of_others = (n - 1) / n
    # bf16 weights for forward, for backward and for each pass without one; fp32 gradients
    copy, several = setup.critic == "copy", setup.minibatches > 1
    gathers = 2 + setup.reference + several + (setup.critic != "none") * (2 + several) + copy
    trained = (shape.lora_parameters(setup.lora_rank) if setup.lora_rank else parameters) * (1 + copy)
    moved = rounds * share_of_others * (2 * gathers * parameters + 4 * trained)
    moving = moved / (rates.link_gb_s * 1e9)
    if setup.offload:
        moving += rounds * (2 * gathers * parameters + 4 * trained) / n / (rates.host_gb_s * 1e9)
    return {
        "forward and backward": max(computing, moving),
        # reads weight, gradient and moments, writes all but the gradient
        "optimizer": setup.minibatches
        * 28
        * trained
        / n
        / ((rates.host_gb_s if setup.offload else rates.memory_gb_s) * 1e9),
        "weights to engines": 2 * parameters / (rates.link_gb_s * 1e9),
    }


# -- does it fit


def why_not(shape: ModelShape, setup: Setup) -> str | None:
    """None where it fits; else one sentence that says what is missing and the settings that would do."""
    if (said := share_complaint(shape, setup)) is not None:
        return said
    memory, need = setup.gpu_memory_bytes, bytes_needed(shape, setup)
    if need <= memory:
        return None
    head = f"{need / GIB:.1f} GiB a GPU is more than the {memory / GIB:.1f} GiB there are: "
    changed, names = setup, {}
    for name, value, remedy in _remedies(shape, setup):
        alone, together = remedy(setup), remedy(changed)
        if _fits(shape, alone):
            return head + f"set {name} {value}"
        if bytes_needed(shape, together) < bytes_needed(shape, changed):
            changed = together
            names[name] = value
        if _fits(shape, changed):
            return head + "set " + " and ".join(f"{name} {value}" for name, value in names.items())
    for gpus in (2 * setup.gpus, 4 * setup.gpus, 8 * setup.gpus):
        if _fits(shape, replace(setup, gpus=gpus)):
            return head + f"take {gpus} GPUs"
    return head + "no setting is enough, take a smaller model (--model.path)"


def share_complaint(shape: ModelShape, setup: Setup) -> str | None:
    """None where there is no engine, or its share of a GPU has room for the least it needs; else one sentence alike."""
    memory, share, least = setup.gpu_memory_bytes, setup.engine_share, least_share(shape, setup)
    if not share or share >= least:
        return None
    larger = f"set --engine.memory-share {_up(least):g}"
    return (
        f"engine.memory_share = {share:g} of {memory / GIB:.1f} GiB is less than the {least * memory / GIB:.1f} GiB of an "
        f"engine's weights and one context of {setup.context_tokens:,} tokens: "
        + (larger if _up(least) < 1 else "raise --engine.tensor-parallel, or take a smaller model")
    )


def least_share(shape: ModelShape, setup: Setup) -> float:
    """Of a GPU's memory, for an engine's weights and one context."""
    least = (2 * shape.parameters + setup.context_tokens * shape.kv_bytes) / setup.tensor_parallel
    return least / setup.gpu_memory_bytes


def bytes_needed(shape: ModelShape, setup: Setup) -> float:
    """Of one GPU, of all parts together."""
    return sum(memory_of(shape, setup).parts.values())


def _fits(shape: ModelShape, setup: Setup) -> bool:
    return bytes_needed(shape, setup) <= setup.gpu_memory_bytes


def _up(share: float) -> float:
    """To the next hundredth."""
    return math.ceil(share * 100) / 100


def _remedies(shape: ModelShape, setup: Setup) -> Iterator[tuple[str, object, Callable[[Setup], Setup]]]:
    """(setting, value, what that makes of a setup), cheapest first."""
    if not setup.checkpointing:
        yield "--learner.activation-checkpointing", "on", lambda s: replace(s, checkpointing=True)
    for tokens in (setup.pack_tokens // 2, setup.pack_tokens // 4):
        if tokens >= max(1024, setup.context_tokens):
            yield "--learner.pack-tokens", tokens, lambda s, t=tokens: replace(s, pack_tokens=t)
    if setup.engine_share > (share := _up(least_share(shape, setup))):
        yield "--engine.memory-share", f"{share:g}", lambda s: replace(s, engine_share=share)
    if setup.second_model:
        yield "--learner.kl-coef", 0, lambda s: replace(s, reference=False)
    if not setup.offload:
        yield "--learner.offload", "cpu", lambda s: replace(s, offload=True)


# -- of a run


def setup_of(config: RunConfig, work: Workload, *, gpus: int, gpu_memory_bytes: float, liger: bool = True) -> Setup:
    """How a run whose steps have this work lies on GPUs of this number and size, engines and learner on the same ones."""
    learner = config.learner
    return Setup(
        gpus=gpus,
        gpu_memory_bytes=gpu_memory_bytes,
        pack_tokens=max(learner.pack_tokens, config.agent.context_tokens),
        sampled_share=work.sampled / work.tokens,
        reference=learner.kl_coef > 0,
        critic=learner.critic,
        lora_rank=learner.lora_rank,
        minibatches=learner.minibatches,
        checkpointing=learner.activation_checkpointing != "off",
        offload=learner.offload == "cpu",
        liger=liger,
        engine_share=config.engine.memory_share,
        tensor_parallel=config.engine.tensor_parallel,
        context_tokens=config.agent.context_tokens,
    )


def workload_of(config: RunConfig, *, tokens: float | None = None, sampled: float | None = None) -> Workload:
    """What a step of a run learns from. Without means that were measured: episodes that fill their context in one row, half of
    it sampled if the turns allow so much.

    Args:
        tokens, sampled: of an episode [tokens].
    """
    r, a = config.rollout, config.agent
    tokens = float(a.context_tokens if tokens is None else tokens)
    if sampled is None:
        sampled = min(r.max_turns * a.max_new_tokens, tokens / 2)
    return Workload(
        episodes=r.groups_per_step * r.group_size,
        tokens=tokens,
        sampled=float(sampled),
        rows=max(1.0, tokens / a.context_tokens),
        group_size=r.group_size,
    )
