"""Which engine a run takes, which GPUs engines and learner take, and whether that fits, before anything starts.

    resident   GPU 0: engine 0 + rank 0   GPU 1: engine 1 + rank 1   both have their memory all the time
    sleep      the same GPUs              the engine has its memory while it samples, the learner while it learns
    split      GPU 0: rank 0              GPU 1: engine 0            each has its GPUs for itself

    of one GPU's memory            resident            sleep, sampling           sleep, learning         split
    engine.memory_share, prompts   yes                 yes                       what is left of it      of engines' GPUs
    weights, optimizer, reference  yes                 yes                       yes                     of the learner's
    activations and the rest       yes                 -                         yes                     of the learner's
    weights on their way (ipc)     yes                 yes                       -                       -

The learner's part is learner/cost.py's arithmetic.
"""

import asyncio
import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import orjson

from l0fast import nvidia_smi
from l0fast.config import RunConfig
from l0fast.errors import UsageError
from l0fast.learner import cost
from l0fast.learner.client import num_gpus

ASLEEP_BYTES = 2.0 * cost.GIB
"""What an engine keeps of a GPU while it sleeps: CUDA context, libraries, graphs. An estimate: on one H200 it was less than 3 GiB
together with the context and the allocator of the learner beside it (bench/results/colocated_sleep_h200.json) [bytes]."""
_HELD_BY_NOBODY = 1.0 * cost.GIB
"""The most that nvidia-smi counts of an idle GPU [bytes]."""
_PATIENCE_S, _LOOK_S = 20.0, 1.0
"""How long GPUs may be in others' hands, and how often that is looked at [s]."""
_DRIVER = Path("/proc/driver/nvidia/gpus")
_LESS = (("engine", "--engine.memory-share"), ("learner", "--learner.pack-tokens"))
"""What each takes less with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    engines: int
    first_gpu: int
    """Of the engines."""
    ranks: int
    """Of the learner, on GPUs from 0 on; one on the CPU."""
    weights: Literal["ipc", "host", "disk", "group"]
    """How new ones get to the engines."""


def engine_kind(config: RunConfig, *, gpus: int | None = None) -> Literal["transformers", "sglang", "simulated"]:
    """What `engine.kind` stands for on this machine."""
    if config.engine.kind != "auto":
        return config.engine.kind
    found = num_gpus() if gpus is None else gpus
    return "sglang" if found and importlib.util.find_spec("sglang") is not None else "transformers"


def sglang_layout(config: RunConfig, gpus: int) -> Layout:
    """How a run with sglang lies on so many GPUs, 0 for the CPU. Raises UsageError, saying which setting to change."""
    engine, tp = config.engine, config.engine.tensor_parallel
    if engine.layout == "sleep":
        _check_sleep(config)
    if not gpus:
        if engine.layout == "split" or engine.weights == "ipc":
            name = "layout" if engine.layout == "split" else "weights"
            raise UsageError(
                f"engine.{name} = {getattr(engine, name)!r} is about GPUs, and there are none here: leave it out"
            )
        weights = "host" if engine.weights == "auto" else engine.weights
        return Layout(engines=engine.count or 1, first_gpu=0, ranks=config.learner.ranks or 1, weights=weights)
    ranks = config.learner.ranks
    if engine.layout == "split" and not 0 < ranks < gpus:
        raise UsageError(
            f"engine.layout = 'split' and learner.ranks = {ranks} of {gpus} GPUs leave none for "
            f"{'the engines' if ranks else 'one of both'}: set --learner.ranks to 1 or more and less than {gpus}"
            if gpus > 1
            else "engine.layout = 'split' needs two GPUs or more, and there is one: take --engine.layout resident"
        )
    first = ranks if engine.layout == "split" else 0
    ranks = ranks or gpus
    count = engine.count or (gpus - first) // tp
    if not 0 < count * tp <= gpus - first:
        raise UsageError(
            f"engine.count = {engine.count} engines of {tp} GPUs each (engine.tensor_parallel) are to lie on {gpus - first} GPUs: "
            f"set --engine.tensor-parallel to {gpus - first} or less and leave --engine.count out"
        )
    together = engine.layout != "split" and count * tp <= ranks
    if engine.weights == "ipc" and not together:
        raise UsageError(
            f"engine.weights = 'ipc' reads from a rank of the learner on the same GPU, but {count * tp} GPUs of engines and "
            f"{ranks} ranks are not on the same ones (engine.layout = {engine.layout!r}): take --engine.weights host"
        )
    if engine.weights == "group" and engine.layout != "split":
        raise UsageError(
            f"engine.weights = 'group' sends from the learner's GPUs to others, but engine.layout = {engine.layout!r} has engines "
            "and learner on the same ones: take --engine.layout split, or leave --engine.weights out"
        )
    weights = ("ipc" if together else "host") if engine.weights == "auto" else engine.weights
    if engine.layout == "sleep" and weights != "ipc":
        raise UsageError(
            f"engine.layout = 'sleep' hands a GPU's memory to and fro, for which weights must come by ipc and not by {weights}: "
            "give the learner all GPUs (--learner.ranks 0) and leave --engine.weights out"
        )
    return Layout(engines=count, first_gpu=first, ranks=ranks, weights=weights)


def _check_sleep(config: RunConfig) -> None:
    if config.rollout.mode != "on_policy":
        raise UsageError(
            f"engine.layout = 'sleep' means that nothing is sampled while the learner works, but rollout.mode = "
            f"{config.rollout.mode!r} goes on sampling: take --rollout.mode on_policy or --engine.layout resident"
        )
    if config.learner.stream == "on":
        raise UsageError(
            "engine.layout = 'sleep' means that the learner works while nothing is sampled, but learner.stream = 'on' has it "
            "work meanwhile: set --learner.stream off"
        )


def memory_complaint(
    config: RunConfig, shape: cost.ModelShape, layout: Layout, *, gpu_memory_bytes: float, liger: bool = True
) -> str | None:
    """None where it fits; else one sentence with the settings that would do. The columns of the table above."""
    setup = _setup(config, layout, gpu_memory_bytes, liger)
    if (said := cost.share_complaint(shape, setup)) is not None:
        return said
    exported = exported_bytes(shape, layout)
    match config.engine.layout:
        case "split":
            return cost.why_not(shape, replace(setup, engine_share=0.0))
        case "sleep":
            return _complaint_in_turn(shape, setup, exported)
        case "resident":
            together = replace(setup, other_bytes=setup.other_bytes + exported)
            said = cost.why_not(shape, together)
            may_sleep = layout.weights == "ipc" and config.rollout.mode == "on_policy"
            if said is None:
                return None
            # before any remedy of the learner's: neither changes anything that is computed
            if may_sleep and _complaint_in_turn(shape, setup, exported) is None:
                way_out = "set --engine.layout sleep, which gives them the memory in turn"
            elif exported and cost.why_not(shape, setup) is None:
                way_out = f"set --engine.weights host, which saves {exported / cost.GIB:.1f} GiB, a copy of the weights"
            else:
                return said
            return (
                f"engine and learner together want {cost.bytes_needed(shape, together) / cost.GIB:.1f} GiB of a GPU that has "
                f"{gpu_memory_bytes / cost.GIB:.1f}: {way_out}, or lower --engine.memory-share or --learner.pack-tokens"
            )


def exported_bytes(shape: cost.ModelShape, layout: Layout) -> float:
    """What a rank of the learner keeps for the engine on its GPU, which reads it there: all weights in bf16 [bytes]."""
    return 2.0 * shape.parameters if layout.weights == "ipc" else 0.0


def _complaint_in_turn(shape: cost.ModelShape, setup: cost.Setup, exported: float) -> str | None:
    """Of a GPU that the learner has while it learns, and the engine while it samples."""
    learning = replace(setup, engine_share=0.0, other_bytes=setup.other_bytes + ASLEEP_BYTES)
    if (said := cost.why_not(shape, learning)) is not None:
        return said
    planned, memory = cost.memory_of(shape, setup), setup.gpu_memory_bytes
    kept, room = sum(planned.kept.values()) + exported, setup.engine_share * memory
    prompts = cost.prompt_bytes(shape, setup)
    if kept + prompts + room <= memory:
        return None
    share = int(100 * (1 - (kept + prompts) / memory)) / 100
    if share >= cost.least_share(shape, setup):
        way_out = f"set --engine.memory-share {share:g}"
    else:
        way_out = ("" if setup.offload else "set --learner.offload cpu, or ") + "take a smaller model"
    return (
        f"engine.memory_share takes {room / cost.GIB:.1f} GiB of a GPU, prompts beside it {prompts / cost.GIB:.1f} and what the learner "
        f"keeps between steps {kept / cost.GIB:.1f}, but it has {memory / cost.GIB:.1f}: {way_out}"
    )


def check_layout(config: RunConfig, model_path: Path, *, gpus: int, memories: Sequence[float] | None = None) -> Layout:
    """The layout of a run with sglang, which fits. Asks nvidia-smi how large GPUs are where `memories` [bytes] doesn't say.

    Raises:
        UsageError: it does not fit, or a setting contradicts another one.
    """
    layout = sglang_layout(config, gpus)
    if not gpus:
        return layout
    shape = _shape(model_path)
    if shape is None:
        # a model whose costs are not known may well fit; torch will say
        return layout
    memory = min(gpu_memories() if memories is None else memories)
    complaint = memory_complaint(config, shape, layout, gpu_memory_bytes=memory, liger=_liger())
    if complaint is not None:
        raise UsageError(complaint)
    return layout


async def wait_for_memory(config: RunConfig, model_path: Path, layout: Layout, log: Callable[[str], None]) -> None:
    """Until other processes leave these GPUs the memory that engines and learner will want: those of a run that was just killed
    take seconds to go.

    Raises:
        UsageError: they don't. The engine would start with less than it should have, and the learner fail at its first step.
    """
    if (shape := _shape(model_path)) is None:
        return
    deadline, told = time.monotonic() + _PATIENCE_S, False
    while complaint := await asyncio.to_thread(_held_complaint, config, shape, layout):
        if time.monotonic() >= deadline:
            raise UsageError(complaint)
        if not told:
            log(f"waiting up to {_PATIENCE_S:g} s for other processes to leave: {complaint}")
            told = True
        await asyncio.sleep(_LOOK_S)


def _held_complaint(config: RunConfig, shape: cost.ModelShape, layout: Layout) -> str | None:
    """None where what others hold leaves enough; else one sentence about the first GPU where it does not."""
    # where a GPU's memory is a NUMA node (Grace Hopper), pages stay with it when their process ends, and the kernel keeps files in
    # it: used, but to be had (https://docs.nvidia.com/deploy/nvml-api/known-issues.html). The driver has this file only there
    if any(_DRIVER.glob("*/numa_status")):
        return None
    ours = nvidia_smi.names(range(num_gpus()))
    fields = ("memory.total", "memory.used")
    memories = nvidia_smi.ask(fields, "how much memory the GPUs have and who has it", UsageError, gpus=ours)
    for gpu, (name, (total, used)) in enumerate(zip(ours, memories, strict=True)):
        memory, held = total * 2**20, used * 2**20
        whose, wanted = wanted_bytes(config, shape, layout, gpu, gpu_memory_bytes=memory)
        if wanted and held > _HELD_BY_NOBODY and held + wanted > memory:
            lower = " or ".join(setting for who, setting in _LESS if who in whose)
            return (
                f"{whose} {wanted / cost.GIB:.1f} GiB of a GPU, but of GPU {name}'s {memory / cost.GIB:.1f} others hold "
                f"{held / cost.GIB:.1f} (nvidia-smi says who): end those, choose other GPUs with CUDA_VISIBLE_DEVICES, or lower {lower}"
            )
    return None


def wanted_bytes(
    config: RunConfig, shape: cost.ModelShape, layout: Layout, gpu: int, *, gpu_memory_bytes: float
) -> tuple[str, float]:
    """Who wants how much of a GPU, at any time; 0 where it is in nobody's part of the layout [bytes]."""
    setup = _setup(config, layout, gpu_memory_bytes, _liger())
    planned, exported = cost.memory_of(shape, setup), exported_bytes(shape, layout)
    engine, learner = sum(planned.engine.values()), sum(planned.learner.values())
    if not 0 <= gpu - layout.first_gpu < layout.engines * config.engine.tensor_parallel:
        return "the learner wants", learner if gpu < layout.ranks else 0.0
    if gpu >= layout.ranks:
        return "the engine wants", engine
    if config.engine.layout == "sleep":
        engine += sum(planned.kept.values()) + exported
        return "engine and learner want", max(learner + ASLEEP_BYTES, engine)
    return "engine and learner want", engine + learner + exported


def _shape(model_path: Path) -> cost.ModelShape | None:
    """None where a model's costs are not known."""
    try:
        return cost.ModelShape.from_config(orjson.loads((model_path / "config.json").read_bytes()))
    except (ValueError, KeyError):
        return None


def _setup(config: RunConfig, layout: Layout, gpu_memory_bytes: float, liger: bool) -> cost.Setup:
    work = cost.workload_of(config)
    return cost.setup_of(config, work, gpus=layout.ranks, gpu_memory_bytes=gpu_memory_bytes, liger=liger)


def _liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def gpu_memories() -> list[float]:
    """Of the GPUs that are ours, without importing torch [bytes]. Raises UsageError where nvidia-smi does not work."""
    ours = nvidia_smi.names(range(num_gpus()))
    memories = nvidia_smi.ask(("memory.total",), "how much memory the GPUs have", UsageError, gpus=ours)
    return [mib * 2**20 for [mib] in memories]
