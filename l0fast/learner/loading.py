"""A model folder in Hugging Face form, as one rank has it: whole, or its shard of every tensor.

    config.json -> the model on the meta device, no memory      (Liger's layers, LoRA's additions)
                -> fully_shard: each decoder layer, then the root whose forward needs what is left: embedding, norm, head
                -> memory for the shards alone
    *.safetensors -> of each tensor the rows that this rank keeps, read lazily

A rank never holds a whole model in fp32. What it trains, the master weights, is fp32; on a GPU FSDP2 gathers them for a
layer at a time in bf16, in which forward and backward compute, and adds gradients up in fp32.

FSDP2: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html. Sharding: Rajbhandari et al., "ZeRO",
https://arxiv.org/abs/1910.02054; Zhao et al., "PyTorch FSDP", https://arxiv.org/abs/2304.11277.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from l0fast.config import LearnerConfig
from l0fast.errors import UsageError
from l0fast.hub import weight_files
from l0fast.learner import attention, lora

log = logging.getLogger(__name__)

_OF_LOGITS = ("logits_scaling", "logit_scale", "final_logit_softcapping")
"""Settings of models whose logits are not the head's product alone (Granite, Cohere, Gemma 2)."""
_ATTENTIONS = {"full_attention", "sliding_attention"}
"""Types of layers that `attention` stands in for."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which part of the work this process does, and where."""

    device: torch.device
    rank: int = 0
    world: int = 1
    mesh: DeviceMesh | None = None
    """None: one process has it all, as plain tensors."""

    @classmethod
    def of(cls, device: torch.device | str, rank: int, world: int) -> "Place":
        """A GPU shards even for one rank: that is what computes in bf16 over weights in fp32. Needs the process group then."""
        device = torch.device(device)
        sharded = world > 1 or device.type == "cuda"
        return cls(device, rank, world, init_device_mesh(device.type, (world,)) if sharded else None)

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def summed(self, values: Sequence[float]) -> list[float]:
        """Over all ranks. A collective."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.mesh is not None:
            dist.all_reduce(total)
        return total.tolist()


class Root(nn.Module):
    """The model, with what is done with its last hidden states as its forward.

    FSDP2 has the parameters of a module whole while its forward runs, and no longer: the head has to be part of one.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(
        self,
        token_ids: Tensor,
        position_ids: Tensor,
        layout: attention.PackLayout,
        predictors: Tensor,
        head: Callable[[Tensor, Tensor], Any],
    ) -> Any:
        """head(hidden states of the predictors [R, D], head's weight [V, D])"""
        hidden = self.model.model(
            input_ids=token_ids[None], position_ids=position_ids[None], layout=layout, use_cache=False
        ).last_hidden_state
        return head(hidden[0].index_select(0, predictors), self.model.lm_head.weight)

    def reshard(self) -> None:
        """Give back what a forward without a backward left whole."""
        if isinstance(self, FSDPModule):
            FSDPModule.reshard(self)


def load_model(
    model_path: Path, config: LearnerConfig, place: Place, *, frozen: bool = False, max_row: int = 0
) -> Root:
    """A causal language model with packed attention, in evaluation mode: dropout would be a mismatch with the sampler.

    Args:
        frozen: nothing of it is trained: no LoRA, no gradients, and kept in the dtype it computes in.
        max_row: longest row that will come [tokens].

    Raises:
        UsageError: a folder that can't be loaded, or a model that can't be trained on such rows.
    """
    attention.register()
    if place.device.type == "cuda":
        # its self-test would not go well inside a checkpointed layer
        attention.flash()
    dtype = place.compute_dtype if frozen else torch.float32
    with _named_failures(model_path):
        model_config = AutoConfig.from_pretrained(model_path, local_files_only=True)
    if getattr(model_config, "quantization_config", None) is not None:
        # those in 8 bits have the names and shapes of others, and scales beside them
        raise UsageError(
            f"{model_path} holds quantized weights (quantization_config in its config.json), which can't be trained: take the "
            "model that was quantized"
        )
    with _named_failures(model_path):
        if place.device.type == "cuda":
            apply_liger(model_config.model_type)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config, dtype=dtype, attn_implementation=attention.NAME)
    _check_architecture(model)
    _check_window(model, max_row)
    if frozen:
        model.requires_grad_(False)
    elif config.lora_rank:
        lora.add_adapters(model, config)
    root = Root(model.eval())
    if not frozen and _wants_checkpointing(config, place):
        _checkpoint_activations(model)
    if place.mesh is not None:
        _shard(root, place, config)
    _allocate(root, place, config)
    with _named_failures(model_path):
        _fill(root, model_path, place)
    return root


def _check_architecture(model: PreTrainedModel) -> None:
    """Raise UsageError where tokens meet by other means than attention, or log-probs come of anything but the last hidden
    states and one matrix.
    """
    head = getattr(model, "lm_head", None)
    odd = [f"{name} = {value}" for name in _OF_LOGITS if (value := getattr(model.config, name, None)) not in (None, 1)]
    if not hasattr(model, "model") or not isinstance(head, nn.Linear):
        odd.append("no lm_head on a model")
    elif head.bias is not None:
        odd.append("a bias in lm_head")
    if any(".experts." in name for name, _ in model.named_parameters()):
        # their files hold each expert by itself, transformers all of a layer as one tensor
        odd.append("a mixture of experts")
    # a recurrence along a pack would go on from one row to the next
    if others := {*(getattr(model.config, "layer_types", None) or ())} - _ATTENTIONS:
        odd.append(f"layers of {', '.join(sorted(others))}")
    if not odd and not model._supports_attention_backend:
        # it would not call ours, and rows of a pack see each other
        odd.append("an attention of its own")
    if odd:
        raise _unknown(model, odd)


def _check_window(model: PreTrainedModel, max_row: int) -> None:
    """Raise UsageError where tokens of such a row are out of each other's sight: `attention` would at the first one, a step later."""
    window, layers = getattr(model.config, "sliding_window", None), getattr(model.config, "layer_types", None)
    if window and window < max_row and (layers is None or "sliding_attention" in layers):
        raise UsageError(
            f"a {type(model).__name__} has attention in a window of {window} tokens, which the learner's has not: set "
            f"--agent.context-tokens to {window} or less, or take another model"
        )


def _unknown(model: PreTrainedModel, odd: list[str]) -> UsageError:
    return UsageError(
        f"a {type(model).__name__} has {' and '.join(odd)}, which the learner does not know: take a model of another "
        "architecture, such as Qwen's or Llama's"
    )


def apply_liger(model_type: str) -> None:
    """Liger's fused RMSNorm, rotary embedding and SwiGLU, for models made from now on. The head is ours."""
    try:
        from liger_kernel import transformers as liger  # pyright: ignore[reportMissingImports]
    except ImportError:
        log.warning("liger-kernel is not installed: layers are transformers' own (pip install liger-kernel)")
        return
    apply = getattr(liger, f"apply_liger_kernel_to_{model_type}", None)
    if apply is None or model_type not in ("qwen2", "qwen3"):
        log.warning("no Liger layers for a %s: layers are transformers' own", model_type)
        return
    apply(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False)


def _wants_checkpointing(config: LearnerConfig, place: Place) -> bool:
    setting = config.activation_checkpointing
    return setting == "on" or (setting == "auto" and place.device.type == "cuda")


def _checkpoint_activations(model: PreTrainedModel) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.layers:
        # transformers checkpoints in training mode alone; what a layer is made of stays in evaluation mode
        layer.training = True


def _shard(root: Root, place: Place, config: LearnerConfig) -> None:
    # cast_forward_inputs would also make bf16 of advantages and log-probs
    precision = MixedPrecisionPolicy(
        param_dtype=place.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    shard = partial(
        fully_shard,
        mesh=place.mesh,
        mp_policy=precision,
        offload_policy=CPUOffloadPolicy(place.device.type == "cuda") if config.offload == "cpu" else OffloadPolicy(),
    )
    for layer in root.model.model.layers:
        shard(layer)
    shard(root)


def _allocate(root: Root, place: Place, config: LearnerConfig) -> None:
    """Memory for parameters, and all else that a model computes with. Raises UsageError."""
    model = root.model
    root.to_empty(device="cpu" if config.offload == "cpu" else place.device)
    # memory of its own undid that
    model.tie_weights()
    for name, module in model.named_modules():
        buffers = dict(module.named_buffers(prefix=name, recurse=False))
        if buffers:
            for buffer in buffers.values():
                if buffer.is_floating_point():
                    buffer.fill_(torch.nan)
            # what is in no file, e.g. the frequencies of the rotary embedding
            model._init_weights(module)
            nn.Module.to(module, place.device)
        if left := [name for name, buffer in buffers.items() if buffer.isnan().any()]:
            raise _unknown(model, [f"a tensor {left[0]} that is no parameter"])


def _fill(root: Root, model_path: Path, place: Place) -> None:
    model = root.model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), _tensor_files(model_path) as slices:
        for name, parameter in model.named_parameters():
            if lora.is_adapter(name):
                values = lora.initial(name, parameter.shape, generator)
            else:
                values = slices.get(lora.base_name(name))
                if values is None:
                    raise ValueError(f"its *.safetensors lack {name}")
            local = local_part(parameter)
            if tuple(values.shape if isinstance(values, Tensor) else values.get_shape()) != tuple(parameter.shape):
                raise ValueError(f"{name} has another shape than config.json says, {list(parameter.shape)}")
            local.copy_(values[rows_of(parameter.shape, place)])


def rows_of(shape: torch.Size, place: Place) -> slice:
    """What FSDP2 gives this rank of a tensor: its rows as torch.chunk cuts them."""
    if place.mesh is None:
        return slice(0, shape[0])
    size = -(-shape[0] // place.world)
    return slice(min(place.rank * size, shape[0]), min((place.rank + 1) * size, shape[0]))


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard, or all of a plain tensor. A view."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def whole(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """All of a sharded tensor, on every rank, on a GPU where there is one; a collective. In another dtype only that much travels."""
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        # what is offloaded, too: main memory has gloo, not NCCL, and no engine could read it there
        tensor = tensor.to(tensor.device_mesh.device_type)
    tensor = tensor if dtype is None else tensor.to(dtype)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def _tensor_files(model_path: Path) -> Iterator[dict[str, Any]]:
    """name -> a slice of a file that reads the rows it is indexed with"""
    files = [safe_open(file, "pt") for file in weight_files(model_path)]
    yield {name: file.get_slice(name) for file in files for name in file.keys()}


@contextmanager
def _named_failures(model_path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as e:
        raise UsageError(
            f"{model_path} can't be loaded as a model ({e}); give a folder written by save_pretrained()"
        ) from e
