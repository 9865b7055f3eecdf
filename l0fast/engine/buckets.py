"""Weights on their way to SGLang: many tensors flattened into one, which the engine reads where it lies; or a folder.

    RankWeights   the learner's ranks lay them out in their own GPU's memory; the engine there opens it (CUDA IPC)
    HostWeights   the learner writes them to shared memory; made into buckets here, in a thread
    DiskWeights   the learner writes a model folder, the engine reads it: slow and sure
    GroupWeights  rank 0 of the learner sends them to engines on other GPUs, each by a process group that is made for it

On a GPU a bucket is a CUDA IPC handle with names and offsets, some kilobytes, whoever made it; on the CPU, shared memory of
the process that holds the engine, or of its children.
"""

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from multiprocessing import resource_sharer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from l0fast.errors import EngineError
from l0fast.ipc import SharedWeights

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Weights that are sent to who joins a process group on this machine: the sender is rank 0."""

    port: int
    """Where its members meet."""
    backend: str
    """"nccl" | "gloo"."""
    ranks: int
    """Of the engine."""
    dtype: str
    """As torch calls it."""
    buckets: Sequence[Sequence[tuple[str, Sequence[int]]]]
    """Names and shapes of the tensors of each broadcast, flattened into one."""


Weights = Sequence[Sequence[str]] | Offer | Path
"""Of one engine: buckets, each a payload for every tensor-parallel rank; a group to join; or a model folder."""


def group_name(port: int) -> str:
    """Of the process group whose members meet there."""
    return f"l0fast-weights-{port}"


BUCKET_BYTES = 512 << 20
"""Of a bucket made here [bytes]."""
_WRITING_S = 60.0
"""Time the learner has to write weights that are asked for meanwhile [s]."""


def serialize_bucket(named_tensors: Sequence[tuple[str, "Tensor"]]) -> tuple[str, "Tensor"]:
    """A bucket for `SGLangEngine.update_weights`, in whichever process the tensors are.

    Args:
        named_tensors: names as in the model folder; on a GPU the engine's process can reach, or on the CPU. Tied once.

    Returns:
        The payload, and the copy of the tensors that it points to: keep it until the engine has read it. On the CPU one
        process can read it, once.
    """
    payloads, flat = serialize_for(named_tensors, 1)
    return payloads[0], flat


def serialize_for(named_tensors: Sequence[tuple[str, "Tensor"]], readers: int) -> tuple[list[str], "Tensor"]:
    """The same for so many processes: a payload each, and one copy of the tensors."""
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
    else:
        flat = _in_memory_file(flat)
    content = {"flattened_tensor": flat, "metadata": bucket.get_metadata()}
    return [MultiprocessingSerializer.serialize(content, output_str=True) for _ in range(readers)], flat


def _in_memory_file(flat: "Tensor") -> "Tensor":
    """A copy that other processes can map. torch would make one in /dev/shm, of which a container has 64 MB."""
    import torch

    fd = os.memfd_create("l0fast-bucket", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, flat.nbytes)
        storage = torch.UntypedStorage._new_shared_fd_cpu(fd, flat.nbytes)  # pyright: ignore[reportAttributeAccessIssue]
    finally:
        os.close(fd)
    return torch.empty(0, dtype=flat.dtype).set_(storage).copy_(flat)


class Sending(Protocol):
    policy_version: int
    offer: dict[str, Any]
    failures: list[str | None]


class Learner(Protocol):
    """What is asked of the learner's client."""

    @property
    def policy_version(self) -> int: ...

    def buckets(self, ranks: Collection[int]) -> AsyncIterator[list[str]]: ...

    async def free_memory(self, *, empty_cache: bool) -> None: ...

    def broadcast(self, engines: int, *, ranks: int, wait_s: float) -> AbstractAsyncContextManager["Sending"]: ...

    async def save(self, path: Path) -> None: ...


class RankWeights:
    """From the learner's ranks, each of which shares its GPU with a tensor-parallel rank of an engine."""

    def __init__(self, learner: Learner, *, tensor_parallel: int = 1, make_room: bool = False):
        """
        Args:
            make_room: engines that wake up need the memory that the ranks' allocators keep for the next step.
        """
        self._learner, self._ranks, self._make_room = learner, tensor_parallel, make_room

    @asynccontextmanager
    async def weights(self, engines: Sequence[int]) -> AsyncIterator[tuple[int, Mapping[int, Weights]]]:
        if self._make_room:
            await self._learner.free_memory(empty_cache=True)
        n = self._ranks
        read = {engine: range(engine * n, (engine + 1) * n) for engine in engines}
        buckets, version = [], self._learner.policy_version
        async for payloads in self._learner.buckets([rank for ranks in read.values() for rank in ranks]):
            buckets.append(payloads)
            # as long as there are more, no step is taken
            version = self._learner.policy_version
        yield version, {engine: [[b[rank] for rank in ranks] for b in buckets] for engine, ranks in read.items()}
        # the engines have copied them
        await self._learner.free_memory(empty_cache=self._make_room)


class HostWeights:
    """From main memory, for engines anywhere on this machine."""

    def __init__(self, shared: SharedWeights, *, dtype: str, tensor_parallel: int = 1):
        """
        Args:
            dtype: the engines', as torch calls it.
        """
        self._shared, self._dtype, self._ranks = shared, dtype, tensor_parallel

    @asynccontextmanager
    async def weights(self, engines: Sequence[int]) -> AsyncIterator[tuple[int, Mapping[int, Weights]]]:
        version, buckets, memory = await asyncio.to_thread(self._buckets, len(engines) * self._ranks)
        n = self._ranks
        try:
            yield version, {engine: [b[i * n : (i + 1) * n] for b in buckets] for i, engine in enumerate(engines)}
        finally:
            del memory
            # what an engine that died meanwhile has not read would be kept for it as long as we live
            await asyncio.to_thread(resource_sharer.stop)

    def _buckets(self, readers: int) -> tuple[int, list[list[str]], list["Tensor"]]:
        """Version, payloads for each reader bucket by bucket, and the memory they point to."""
        import torch

        dtype = getattr(torch, self._dtype)
        deadline = time.monotonic() + _WRITING_S
        while True:
            version = self._shared.policy_version
            copies = [(name, tensor.to(dtype, copy=True)) for name, tensor in self._shared.tensors().items()]
            if version >= 0 and version == self._shared.policy_version:
                break
            # written to meanwhile, which only happens to an engine that is rebuilt while the learner takes a step
            if time.monotonic() > deadline:
                raise EngineError(f"no weights were published within {_WRITING_S:g} s")
            time.sleep(0.01)
        buckets, memory, part = [], [], []
        for i, (name, tensor) in enumerate(copies):
            part.append((name, tensor))
            if i == len(copies) - 1 or sum(t.nbytes for _, t in part) > BUCKET_BYTES:
                payloads, flat = serialize_for(part, readers)
                buckets.append(payloads)
                memory.append(flat)
                part = []
        return version, buckets, memory


class DiskWeights:
    """From a model folder that the learner writes each time."""

    def __init__(self, learner: Learner, folder: Path):
        self._learner, self._folder = learner, folder

    @asynccontextmanager
    async def weights(self, engines: Sequence[int]) -> AsyncIterator[tuple[int, Mapping[int, Weights]]]:
        while True:
            version = self._learner.policy_version
            await self._learner.save(self._folder)
            if version == self._learner.policy_version:
                break
        try:
            yield version, dict.fromkeys(engines, self._folder)
        finally:
            await asyncio.to_thread(shutil.rmtree, self._folder)


class GroupWeights:
    """By process groups, to engines on other GPUs than the learner's."""

    def __init__(
        self,
        learner: Learner,
        *,
        wait_s: float,
        tensor_parallel: int = 1,
        log: Callable[[str], None] = lambda text: None,
    ):
        """
        Args:
            wait_s: time that an engine may keep the learner waiting, at each bucket [s].
            log: told of engines that did not get them, as the learner sees it; what becomes of them is theirs to say.
        """
        self._learner, self._ranks, self._wait_s, self._log = learner, tensor_parallel, wait_s, log

    @asynccontextmanager
    async def weights(self, engines: Sequence[int]) -> AsyncIterator[tuple[int, Mapping[int, Weights]]]:
        async with self._learner.broadcast(len(engines), ranks=self._ranks, wait_s=self._wait_s) as sending:
            about = dict(sending.offer)
            ports = about.pop("ports")
            yield (
                sending.policy_version,
                {e: Offer(port=port, ranks=self._ranks, **about) for e, port in zip(engines, ports, strict=True)},
            )
        for engine, failure in zip(engines, sending.failures, strict=True):
            if failure is not None:
                self._log(f"the learner could not send its weights to engine {engine}: {failure}")
