"""The engine where there is no SGLang: a transformers model in a child process, driven from the event loop.

    agents --generate()--> TransformersEngine --socketpair--> worker.py: slots.py decides, slot_model.py computes
    learner --SharedWeights (memfd)-------------------------> update_weights(): copied, every cached prefix forgotten;
                                                             what runs goes on from its ids under the new weights

This side checks, sends and waits; it imports no torch and never blocks the loop. Log-probs are fp32. A caller that is
cancelled, or misses its deadline, takes its request out of the batch.
"""

import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import orjson

from l0fast.config import EngineConfig
from l0fast.engine.base import EngineLoad, Sampled, Sampling, VersionSpan
from l0fast.engine.check import check_request
from l0fast.errors import EngineError, UsageError
from l0fast.ids import Ids
from l0fast.ipc import SharedWeights, Worker, spawn_worker


class TransformersEngine:
    """The `Engine` protocol over one child. Made by `transformers_engine`."""

    def __init__(self, worker: Worker, config: EngineConfig, *, max_tokens: int, has_weights: bool):
        self._worker, self._config, self._max_tokens, self._has_weights = worker, config, max_tokens, has_weights
        self._vocab_size: int = worker.ready["vocab_size"]
        self._requests = itertools.count()

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, *, conversation: str) -> Sampled:
        prompt = np.asarray(prompt_ids, np.int64)
        check_request(prompt, sampling, vocab_size=self._vocab_size, max_tokens=self._max_tokens)
        request = next(self._requests)
        try:
            header, payload = await self._worker.call(
                "generate",
                prompt.astype(np.int32).tobytes(),
                timeout_s=self._config.request_timeout_s,
                request=request,
                conversation=conversation,
                max_new_tokens=sampling.max_new_tokens,
                stop_token_ids=sampling.stop_token_ids,
                temperature=sampling.temperature,
                seed=sampling.seed % 2**64,
            )
        except BaseException:
            self._worker.notify("abort", request=request)
            raise
        half = len(payload) // 2
        return Sampled(
            response_ids=Ids.from_int32s(bytes(payload[:half])),
            sampler_logprobs=tuple(np.frombuffer(payload[half:], np.float32).tolist()),
            finish_reason=header["finish_reason"],
            policy_version=header["policy_version"],
            version_spans=tuple(VersionSpan(*span) for span in header["version_spans"]),
            cached_tokens=header["cached_tokens"],
        )

    async def update_weights(self, policy_version: int) -> None:
        """As in the protocol. Waits for nobody: requests in flight go on under the new weights, and say so in their spans.

        Raises:
            ValueError: the engine was made without shared weights.
            EngineError: the shared weights are of another version, or the engine failed.
        """
        if not self._has_weights:
            raise ValueError(
                "this engine was made with weights=None: give transformers_engine() the learner's SharedWeights"
            )
        await self._worker.call(
            "update_weights", timeout_s=self._config.request_timeout_s, policy_version=policy_version
        )

    def forget(self, conversation: str) -> None:
        """As in the protocol: its slot is the next to be taken."""
        self._worker.notify("forget", conversation=conversation)

    async def load(self) -> EngineLoad:
        load, _ = await self._worker.call("load", timeout_s=self._config.request_timeout_s)
        return EngineLoad(**{name: load[name] for name in load.keys() & set(EngineLoad.__slots__)})


@asynccontextmanager
async def transformers_engine(
    config: EngineConfig,
    model_path: Path,
    *,
    max_tokens: int,
    weights: SharedWeights | None = None,
    log_dir: Path | None = None,
) -> AsyncIterator[TransformersEngine]:
    """An engine for as long as the `async with` body runs.

    Args:
        config: slots, threads, device and deadlines.
        model_path: a model folder in Hugging Face form. Its weights are policy version 0.
        max_tokens: longest prompt plus response [tokens].
        weights: where the learner publishes; None for an engine that never changes.
        log_dir: folder that gets the child's words as `engine.log`; None keeps them for error messages.

    Raises:
        UsageError: a model folder that can't be used.
        EngineError: the child did not start.
    """
    check_model_folder(model_path, max_tokens)
    async with spawn_worker(
        "l0fast.engine.worker",
        args={
            "model_path": str(model_path),
            "slots": config.slots,
            "max_len": max_tokens,
            "threads": config.threads,
            "device": config.device,
            "weights": None if weights is None else weights.handle(),
        },
        name="the engine",
        error=EngineError,
        start_timeout_s=config.start_timeout_s,
        stderr_path=None if log_dir is None else log_dir / "engine.log",
        pass_fds=() if weights is None else (weights.fd,),
    ) as worker:
        yield TransformersEngine(worker, config, max_tokens=max_tokens, has_weights=weights is not None)


def check_model_folder(path: Path, max_tokens: int) -> None:
    needed = {
        "config.json": ["config.json"],
        "tokenizer.json": ["tokenizer.json", "tokenizer.model", "vocab.json"],
        "model.safetensors": ["*.safetensors"],
    }
    for name, patterns in needed.items():
        if not any(any(path.glob(pattern)) for pattern in patterns):
            raise UsageError(
                f"model folder {str(path)!r} has no {name}: give a folder in Hugging Face form, saved with save_pretrained()"
            )
    try:
        positions = orjson.loads((path / "config.json").read_bytes()).get("max_position_embeddings", max_tokens)
    except (OSError, ValueError, AttributeError) as e:
        raise UsageError(f"{path / 'config.json'} is not a model's settings ({e}): copy or save the model again") from e
    if max_tokens > positions:
        raise UsageError(
            f"a context of {max_tokens} tokens is longer than the {positions} positions of the model in {str(path)!r}: "
            f"set --agent.context-tokens to {positions} or less"
        )
