"""Weights on their way to SGLang: many tensors flattened into one, which the engine reads where it lies.

On a GPU a bucket is a CUDA IPC handle with names and offsets, some kilobytes, whoever made it; on the CPU, shared memory of
the process that holds the engine, or of its children.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def serialize_bucket(named_tensors: Sequence[tuple[str, "Tensor"]]) -> tuple[str, "Tensor"]:
    """A bucket for `SGLangEngine.update_weights`, in whichever process the tensors are.

    Args:
        named_tensors: names as in the model folder; on a GPU the engine's process can reach, or on the CPU. Tied once.

    Returns:
        The payload, and the copy of the tensors that it points to: keep it until the engine has read it.
    """
    import torch
    from sglang.srt.utils import MultiprocessingSerializer  # pyright: ignore[reportMissingImports]
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions  # pyright: ignore[reportMissingImports]
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket  # pyright: ignore[reportMissingImports]

    bucket = FlattenedTensorBucket(named_tensors=list(named_tensors))
    flat = bucket.get_flattened_tensor()
    if flat.is_cuda:
        # devices by their UUID, for processes that number them differently; it breaks serialising CPU tensors
        monkey_patch_torch_reductions()
        # what made the bucket is done before anyone is told of it
        torch.cuda.current_stream().synchronize()
    content = {"flattened_tensor": flat, "metadata": bucket.get_metadata()}
    return MultiprocessingSerializer.serialize(content, output_str=True), flat
