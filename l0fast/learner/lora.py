"""LoRA: frozen weights W with low-rank additions that are trained; what engines and exports get is the sum.

    y = W x + (alpha / r) B A x         A [r, in] random, B [out, r] zero at first
    published: W + (alpha / r) B A, under W's name

Hu et al., "LoRA", https://arxiv.org/abs/2106.09685. The layers are peft's, in every linear layer but the head; the
frozen reference of the KL term is the model without them.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from l0fast.config import LearnerConfig
from l0fast.errors import UsageError

_ADAPTER = "default"
_A, _B, _BASE = f".lora_A.{_ADAPTER}.weight", f".lora_B.{_ADAPTER}.weight", ".base_layer."


def add_adapters(model: PreTrainedModel, config: LearnerConfig) -> None:
    """Put the additions beside the linear layers of `model`, in place, and freeze all else.

    Raises:
        UsageError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise UsageError(
            f"learner.lora_rank = {config.lora_rank} needs peft, which can't be imported ({e}): "
            "pip install 'l0fast[lora]', or set --learner.lora-rank 0"
        ) from e
    inject_adapter_in_model(
        LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear"), model
    )


def is_adapter(name: str) -> bool:
    return name.endswith((_A, _B))


def base_name(name: str) -> str:
    """The name a parameter has in the model folder."""
    return name.replace(_BASE, ".")


def initial(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Of an adapter's parameter: the same on every rank."""
    if name.endswith(_B):
        return torch.zeros(shape)
    bound = math.sqrt(1 / shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def adapters_of(name: str) -> tuple[str, str] | None:
    """Names of A and B beside the weight of that name; None where there are none."""
    if not name.endswith(f"{_BASE}weight"):
        return None
    layer = name.removesuffix(f"{_BASE}weight")
    return layer + _A, layer + _B


def merged(weight: Tensor, a: Tensor, b: Tensor, config: LearnerConfig) -> Tensor:
    """W + (alpha / r) B A, in the dtype of W."""
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=config.lora_alpha / config.lora_rank).to(
        weight.dtype
    )


@contextmanager
def without_adapters(model: PreTrainedModel) -> Iterator[None]:
    """The model as it was before training."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # pyright: ignore[reportMissingImports]

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    for parameter in trained:
        # switched off, peft freezes them; FSDP2 would take what is frozen in its first forward for frozen ever after, and add
        # up their gradients in bf16
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
