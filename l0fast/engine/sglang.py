"""SGLang in this process: `sglang.Engine` on our event loop, its scheduler, which owns the GPU, a child of ours.

    agents --generate()--> SGLangEngine --zmq--> scheduler --> detokenizer --zmq--> back to the caller
    learner's rank --buckets, as CUDA IPC handles--> update_weights()

    update, SGLang >= 0.5.21   requests go back to the queue (retract) -> buckets -> cache flushed -> they go on
            before             requests are aborted -> cache flushed -> buckets -> what they had is sent again as prompt
    Either way nothing is ever continued from keys and values of older weights, and a response says which policy sampled
    which of its ids.

We run SGLang's reading task (sglang_process.py says why) and watch its children by their pidfds: the death of one fails
all requests at once.

Sampling.seed has no effect: SGLang draws from one generator, in the order in which its batches happen to be made.
"""

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterable, AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from l0fast.config import EngineConfig
from l0fast.engine.base import EngineLoad, Sampled, Sampling, VersionSpan
from l0fast.engine.check import check_request
from l0fast.engine.sglang_process import sglang_process
from l0fast.engine.transformers import check_model_folder
from l0fast.errors import EngineError

T = TypeVar("T")

_ABORT_S = 0.1
"""Time between two calls for aborting what runs; one that was being sent may miss the first [s]."""


class SGLangEngine:
    """The `Engine` protocol over one `sglang.Engine`. Made by `sglang_engine`."""

    def __init__(self, engine: Any, children: Sequence[Any], config: EngineConfig, *, max_tokens: int):
        from sglang.srt.managers import io_struct  # pyright: ignore[reportMissingImports]

        self.policy_version = 0
        self._engine, self._tm, self._io = engine, engine.tokenizer_manager, io_struct
        self._config, self._max_tokens = config, max_tokens
        self._vocab_size: int = self._tm.model_config.vocab_size
        self._has_sessions = hasattr(io_struct, "BeginWeightUpdateReqInput")
        """From 0.5.21: an update has a begin and an end, and what was retracted may wait for it."""
        self._retracts = self._has_sessions
        self._requests = itertools.count()
        self._calls: set[asyncio.Task[Any]] = set()
        """Requests that are in the scheduler, or on their way."""
        self._updates: set[asyncio.Task[Any]] = set()
        self._open = asyncio.Event()
        """Whether requests may be sent; closed while older SGLangs get new weights."""
        self._open.set()
        self._updating = asyncio.Lock()
        self._failure: str | None = None
        self._loop = asyncio.get_running_loop()
        self._pidfds: list[int] = []
        for child in children:
            self._pidfds.append(fd := os.pidfd_open(child.pid))
            self._loop.add_reader(fd, self._child_ended, child)
        self._tm.event_loop = self._loop
        self._reading = self._loop.create_task(self._tm.handle_loop(), name="answers of sglang")
        self._reading.add_done_callback(self._reading_ended)

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, *, conversation: str) -> Sampled:
        """As in the protocol. `conversation` is not needed: SGLang finds a prefix wherever it came from."""
        prompt = np.asarray(prompt_ids, np.int64)
        check_request(prompt, sampling, vocab_size=self._vocab_size, max_tokens=self._max_tokens)
        ids: list[int] = []
        logprobs: list[float] = []
        spans: list[VersionSpan] = []
        cached = 0
        try:
            async with asyncio.timeout(self._config.request_timeout_s):
                while True:
                    await self._open.wait()
                    version, start = self.policy_version, len(ids)
                    request = self._engine.async_generate(
                        input_ids=[*prompt.tolist(), *ids],
                        sampling_params=_params(sampling, start),
                        return_logprob=True,
                        # of one length: SGLang aborts all that begin like the one to abort
                        rid=f"l0fast-{next(self._requests):016x}",
                    )
                    answer = await self._unless_it_fails(request, self._calls)
                    about = answer["meta_info"]
                    ids += answer["output_ids"]
                    logprobs += [logprob for logprob, *_ in about["output_token_logprobs"]]
                    assert len(ids) == len(logprobs), f"sglang gave {len(ids)} ids and {len(logprobs)} log-probs"
                    spans += _spans(about, start, len(ids), version)
                    cached = cached if start else about["cached_tokens"]
                    reason = about["finish_reason"]
                    if reason["type"] != "abort" or len(ids) == sampling.max_new_tokens:
                        break
                    if self._open.is_set() and version == self.policy_version:
                        raise EngineError(f"sglang aborted a request: {reason.get('message') or 'it did not say why'}")
        except TimeoutError as e:
            raise EngineError(f"sglang did not answer in {self._config.request_timeout_s:g} s") from e
        return Sampled(
            response_ids=tuple(ids),
            sampler_logprobs=tuple(logprobs),
            finish_reason="stop" if reason["type"] == "stop" else "length",
            policy_version=spans[0].policy_version if spans else version,
            version_spans=_merged(spans),
            cached_tokens=cached,
        )

    async def update_weights(self, policy_version: int, payloads: AsyncIterable[str]) -> None:
        """Take new weights, and go on with what is being sampled under them.

        Args:
            payloads: buckets as `buckets.serialize_bucket` makes them, in this process or another one. The next is asked for when
                the engine has read the one before; who made it keeps its tensor until all are read.

        Raises:
            EngineError: SGLang refused, died or missed its deadline. Its weights may be half new, so from then on the engine
                refuses everything.
        """
        async with self._updating:
            try:
                async with asyncio.timeout(self._config.request_timeout_s):
                    await self._unless_it_fails(self._take(policy_version, payloads), self._updates)
            except BaseException as e:
                # half-new weights, or a pause that nobody ends
                self._fail(f"sglang could not take the weights of version {policy_version}: {e!r}")
                if not isinstance(e, (EngineError, TimeoutError)):
                    raise
                raise EngineError(self._failure) from e

    async def _take(self, policy_version: int, payloads: AsyncIterable[str]) -> None:
        tm, io = self._tm, self._io
        async with self._paused():
            if self._has_sessions:
                _done("begin_weight_update", await tm.begin_weight_update(io.BeginWeightUpdateReqInput()))
            async for payload in payloads:
                request = io.UpdateWeightsFromTensorReqInput(
                    serialized_named_tensors=[payload] * self._engine.server_args.tp_size,
                    load_format="flattened_bucket",
                    flush_cache=False,
                    weight_version=str(policy_version),
                )
                _done("update_weights_from_tensor", await tm.update_weights_from_tensor(request, None))
            if self._has_sessions:
                _done("end_weight_update", await tm.end_weight_update(io.EndWeightUpdateReqInput()))
            if self._retracts:
                # no deadline: it would wait for those who wait for us
                await self._flush(timeout_s=None)
            self.policy_version = policy_version

    @asynccontextmanager
    async def _paused(self) -> AsyncIterator[None]:
        """Nothing is computed, and nothing of what was will be used, while the block runs."""
        if self._retracts:
            await self._tm.pause_generation(self._io.PauseGenerationReqInput(mode="retract"))
            yield
            await self._tm.continue_generation(self._io.ContinueGenerationReqInput(torch_empty_cache=False))
        else:
            self._open.clear()
            while self._calls:
                self._tm.abort_request(abort_all=True)
                await asyncio.wait(self._calls, timeout=_ABORT_S)
            await self._flush(timeout_s=self._config.request_timeout_s)
            yield
            self._open.set()

    async def _flush(self, timeout_s: float | None) -> None:
        flushed = await self._tm.flush_cache(timeout_s=timeout_s)
        _done("flush_cache", (flushed.success, flushed.message))

    async def load(self) -> EngineLoad:
        self._check_alive()
        now = (await self._tm.get_loads())[0]
        return EngineLoad(
            running=now.num_running_reqs,
            waiting=now.num_waiting_reqs,
            used_tokens=now.num_used_tokens,
            max_tokens=now.max_total_num_tokens,
        )

    async def _unless_it_fails(self, work: Coroutine[Any, Any, T], among: set[asyncio.Task[Any]]) -> T:
        """The result of `work`, a member of `among` while it lasts; EngineError as soon as the engine has failed."""
        task = self._loop.create_task(work)
        among.add(task)
        try:
            if self._failure is not None:
                task.cancel()
            return await task
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if self._failure is None or (caller is not None and caller.cancelling()):
                raise
            raise EngineError(self._failure) from None
        finally:
            among.discard(task)

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineError(self._failure)

    def _fail(self, failure: str) -> None:
        """Resolve everything that waits, now and later, with EngineError."""
        if self._failure is None:
            self._failure = failure
            # those who wait to be sent find out by themselves
            self._open.set()
            for task in (*self._calls, *self._updates):
                task.cancel()

    def _child_ended(self, child: Any) -> None:
        for fd in self._pidfds:
            self._loop.remove_reader(fd)
        child.join(1)
        code = child.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        self._fail(f"sglang's {child.name} (pid {child.pid}) {how}; what it said of it is on stderr")

    def _reading_ended(self, reading: asyncio.Task[None]) -> None:
        error = None if reading.cancelled() else reading.exception()
        self._fail(f"sglang's answers could not be read: {error!r}" if error else "sglang was closed")

    async def _close(self) -> None:
        self._fail("sglang was closed")
        for fd in self._pidfds:
            self._loop.remove_reader(fd)
            os.close(fd)
        self._reading.cancel()
        await asyncio.wait([self._reading])


def _params(sampling: Sampling, sampled: int) -> dict[str, Any]:
    """SGLang's words for what is left to sample. The model's own end-of-text id does not end a turn, unless we say so."""
    return {
        "temperature": sampling.temperature,
        "top_p": 1.0,
        "top_k": -1,
        "max_new_tokens": sampling.max_new_tokens - sampled,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": not sampling.stop_token_ids,
    }


def _spans(about: dict[str, Any], start: int, end: int, version: int) -> list[VersionSpan]:
    """Who sampled the ids [start, end) of a response; `version` where SGLang does not say."""
    if "weight_versions" not in about:
        return [VersionSpan(version, start, end)] if end > start else []
    said = about["weight_versions"] or []
    return [VersionSpan(int(s["version"]), start + s["start"], start + s["end"]) for s in said if s["end"] > s["start"]]


def _merged(spans: Sequence[VersionSpan]) -> tuple[VersionSpan, ...]:
    """Neighbours of one version are one span."""
    merged: list[VersionSpan] = []
    for span in spans:
        if merged and merged[-1].policy_version == span.policy_version:
            merged[-1] = VersionSpan(span.policy_version, merged[-1].start, span.end)
        else:
            merged.append(span)
    return tuple(merged)


def _done(what: str, flag: tuple[bool, str]) -> None:
    success, message = flag
    if not success:
        raise EngineError(f"{what}: {message}")


@asynccontextmanager
async def sglang_engine(
    config: EngineConfig, model_path: Path, *, max_tokens: int, gpu: int = 0
) -> AsyncIterator[SGLangEngine]:
    """An engine for as long as the `async with` body runs. Starting it blocks the loop: do it before agents play.

    Args:
        model_path: a model folder in Hugging Face form. Its weights are policy version 0.
        max_tokens: longest prompt plus response [tokens].
        gpu: which GPU, where there are any; without one SGLang runs on the CPU, in fp32.

    Raises:
        UsageError: a model folder or a setting that can't be used, or no SGLang.
        EngineError: SGLang did not start.
    """
    check_model_folder(model_path, max_tokens)
    async with sglang_process(config, model_path, max_tokens=max_tokens, gpu=gpu) as (process, children):
        engine = SGLangEngine(process, children, config, max_tokens=max_tokens)
        try:
            yield engine
        finally:
            await engine._close()
