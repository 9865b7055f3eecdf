"""SGLang in this process: `sglang.Engine` on our event loop, its scheduler, which owns the GPU, a child of ours.

    agents --generate()--> Fleet --> SGLangEngine --zmq--> scheduler --zmq--> back to the caller
    learner --buckets.py--> update_weights()

    update, SGLang >= 0.5.21   requests go back to the queue (retract) -> buckets -> cache flushed -> they go on
            before             requests are aborted -> cache flushed -> buckets -> what they had is sent again as prompt
    sleep                      requests go back to the queue -> cache flushed -> keys, values and weights are given back
    wake, which is an update   room for weights -> buckets -> room for keys and values -> they go on
    Nothing is ever continued from keys and values of older weights, and a response says which policy sampled which of its
    ids.

We run SGLang's reading task (sglang_process.py says why) and watch its children by their pidfds: the death of one fails
all requests at once, with what each had sampled as far as SGLang had told (every 50 tokens).

Sampling.seed has no effect: SGLang draws from one generator, in the order in which its batches happen to be made.
"""

import asyncio
import itertools
import math
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from l0fast.config import EngineConfig
from l0fast.deadlines import Deadline, deadlines_of_this_task, halt, standing_still
from l0fast.engine.base import EngineLoad, Sampled, Sampling, VersionSpan
from l0fast.engine.buckets import Offer, Weights, group_name
from l0fast.engine.check import check_request
from l0fast.engine.fleet import Fleet, Response, WeightSource, fleet
from l0fast.engine.recomputed import Prefixes
from l0fast.engine.sglang_process import sglang_process, sigquit_does_nothing
from l0fast.engine.transformers import check_model_folder
from l0fast.errors import EngineError, UsageError

T = TypeVar("T")

_WARM_UP = (80, 160)
"""Prompts of its first two turns; SGLang's caches have pages of up to 64 tokens [tokens]."""
_ABORT_S = 0.1
"""Time between two calls for aborting what runs; one that was being sent may miss the first [s]."""


@dataclass(slots=True, eq=False)
class _UnderWay:
    """A request's deadline, and those of whoever asked."""

    own: asyncio.Timeout
    theirs: tuple[Deadline, ...]
    _go_on: Callable[[], None] | None = None

    def halt(self) -> None:
        if self._go_on is None:
            if not self.own.expired():
                self.own.reschedule(None)
            self._go_on = halt(self.theirs)

    def go_on(self, due: float | None = None) -> None:
        """
        Args:
            due: of its own, for what is computed anew; None where it is over [s of the loop].
        """
        if self._go_on is not None:
            if due is not None and not self.own.expired():
                self.own.reschedule(due)
            self._go_on()
            self._go_on = None


class SGLangEngine:
    """A `FleetEngine` over one `sglang.Engine`. Made by `sglang_engine`."""

    def __init__(self, engine: Any, children: Sequence[Any], config: EngineConfig, *, max_tokens: int):
        from fastapi import HTTPException  # pyright: ignore[reportMissingImports]
        from sglang.srt.managers import io_struct  # pyright: ignore[reportMissingImports]

        self.policy_version = 0
        self.failure: str | None = None
        self._engine, self._tm, self._io = engine, engine.tokenizer_manager, io_struct
        self._config, self._max_tokens = config, max_tokens
        self._vocab_size: int = self._tm.model_config.vocab_size
        self._kv_tokens: int = engine._scheduler_init_result.scheduler_infos[0]["max_total_num_tokens"]
        self._has_sessions = hasattr(io_struct, "BeginWeightUpdateReqInput")
        """From 0.5.21: an update has a begin and an end, and what was retracted may wait for it."""
        self._retracts = self._has_sessions
        self._refusals = (ValueError, HTTPException)
        """What SGLang raises for one request: the same as its server's status codes."""
        self._requests = itertools.count()
        self._calls: set[asyncio.Task[Any]] = set()
        """Requests that are in the scheduler, or on their way."""
        self._under_way: set[_UnderWay] = set()
        """Of all that was asked."""
        self._halted = False
        """Whether the time that passes is not theirs."""
        self._updates: set[asyncio.Task[Any]] = set()
        self._open = asyncio.Event()
        """Whether requests may be sent; closed while it sleeps, and while older SGLangs get new weights."""
        self._open.set()
        self._updating = asyncio.Lock()
        self._asleep = False
        self._failed = asyncio.Event()
        self._prefixes = Prefixes()
        self._cached_tokens = self._decoded_tokens = 0
        self._started_with = (0, 0.0, 0.0)
        """Of `_computed` what belongs to its start."""
        self._loop = asyncio.get_running_loop()
        self._pidfds: list[int] = []
        for child in children:
            self._pidfds.append(fd := os.pidfd_open(child.pid))
            self._loop.add_reader(fd, self._child_ended, child)
        self._tm.event_loop = self._loop
        self._reading = self._loop.create_task(self._tm.handle_loop(), name="answers of sglang")
        self._reading.add_done_callback(self._reading_ended)

    async def warm_up(self) -> None:
        """Answer two conversations of two turns each, at once, as part of its start.

        What SGLang does for the first time it compiles kernels for, up to a minute and more beside seven other engines that do,
        and says nothing meanwhile: requests would miss their deadlines, and the engine be taken for stuck.

        Raises:
            EngineError: it can't, or not within `engine.start_timeout_s`.
        """
        timeout_s = self._config.start_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                for length in _WARM_UP:
                    async with asyncio.TaskGroup() as tg:
                        asked = [tg.create_task(self._refusal(first, length)) for first in range(2)]
                    # of one where the queue has no room for two (engine.sglang)
                    refusals = [task.result() for task in asked]
                    if all(refusals):
                        raise EngineError(f"sglang refused its first request: {refusals[0]}")
                for _ in range(2):
                    # by the second its scheduler has written down what was computed before the first
                    await self._flush(timeout_s=timeout_s)
            self._started_with = self._computed(self._tm.load_snapshot_reader.read(0))
        except TimeoutError as e:
            raise EngineError(
                f"sglang started, but did not answer within {timeout_s:g} s: what it said is on stderr; a machine on which it "
                "compiles for longer needs a higher --engine.start-timeout-s"
            ) from e
        except BaseExceptionGroup as e:
            raise e.exceptions[0] from e.exceptions[0].__cause__

    async def _refusal(self, first: int, length: int) -> Exception | None:
        """Of a prompt that begins with this id; None where it was answered."""
        ids = [i % self._vocab_size for i in range(first, first + min(length, self._max_tokens - 2))]
        params = _params(Sampling(max_new_tokens=2, stop_token_ids=(), temperature=1.0), 0)
        rid = f"l0fast-{next(self._requests):016x}"
        request = self._engine.async_generate(input_ids=ids, sampling_params=params, return_logprob=True, rid=rid)
        try:
            await self._unless_it_fails(request, self._calls)
        except self._refusals as e:
            return e
        return None

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, *, conversation: str) -> Sampled:
        """As in the protocol of a whole engine."""
        response = Response()
        await self.extend(response, prompt_ids, sampling, conversation=conversation)
        return response.sampled()

    async def extend(
        self, response: Response, prompt_ids: Sequence[int], sampling: Sampling, *, conversation: str
    ) -> None:
        """As in the protocol. SGLang finds a prefix wherever it came from; `conversation` is for the account."""
        prompt = np.asarray(prompt_ids, np.int64)
        check_request(prompt, sampling, vocab_size=self._vocab_size, max_tokens=self._max_tokens)
        timeout_s = self._config.request_timeout_s
        # asleep, or between two policies: that time is not this request's
        with standing_still():
            await self._open.wait()
        deadline = asyncio.timeout(timeout_s)
        self._under_way.add(under_way := _UnderWay(deadline, deadlines_of_this_task()))
        try:
            async with deadline:
                if self._halted:
                    under_way.halt()
                while not response.ends(sampling):
                    # it may have closed again before this was woken
                    while not self._open.is_set():
                        await self._open.wait()
                    response.policy_version = self.policy_version
                    await self._send(response, prompt, sampling, conversation)
        except TimeoutError as e:
            raise EngineError(f"sglang did not answer in {timeout_s:g} s") from e
        finally:
            self._under_way.discard(under_way)
            under_way.go_on()

    async def _send(self, response: Response, prompt: np.ndarray, sampling: Sampling, conversation: str) -> None:
        """Once; what comes of it is added to the response."""
        version, start = self.policy_version, len(response.ids)
        ids = [*prompt.tolist(), *response.ids]
        # of one length: SGLang aborts all that begin like the one to abort
        rid = f"l0fast-{next(self._requests):016x}"
        request = self._engine.async_generate(
            input_ids=ids, sampling_params=_params(sampling, start), return_logprob=True, rid=rid
        )
        try:
            answer = await self._unless_it_fails(request, self._calls)
        except EngineError:
            self._save_partial(response, rid, version)
            raise
        except self._refusals as e:
            raise EngineError(f"sglang refused a request: {e}") from e
        about, reason = answer["meta_info"], answer["meta_info"]["finish_reason"]
        if "cached_tokens" in about:
            # else it was aborted while it waited
            sampled, logprobs = answer["output_ids"], [logprob for logprob, *_ in about["output_token_logprobs"]]
            if not all(map(math.isfinite, logprobs)):
                # it samples id 0, then
                raise EngineError("the model's logits are not finite: did training diverge?")
            response.add(sampled, logprobs, _spans(about, start, start + len(sampled), version))
            self._count(conversation, ids, sampled, about)
            if response.cached_tokens is None:
                response.cached_tokens = about["cached_tokens"]
        if reason["type"] == "stop":
            # at one of our ids, which ends it, or at one of the model's own, after which we ask for more
            if isinstance(reason["matched"], str):
                # at no id: its numbers were none
                raise EngineError(f"sglang ended a request: {reason['matched']}")
        elif reason["type"] != "abort":
            response.finish_reason = "length"
        elif not response.ends(sampling) and self._open.is_set() and version == self.policy_version:
            raise EngineError(f"sglang aborted a request: {reason.get('message') or 'it did not say why'}")

    def _save_partial(self, response: Response, rid: str, version: int) -> None:
        """What SGLang had told of a request when it died, unless it may be of two policies."""
        state = self._tm.rid_to_state.get(rid)
        if state is None or self._updating.locked() or version != self.policy_version:
            return
        ids, logprobs = list(state.output_ids), list(state.output_token_logprobs_val)
        if ids and len(ids) == len(logprobs):
            start = len(response.ids)
            response.add(ids, logprobs, [VersionSpan(version, start, start + len(ids))])
            self._decoded_tokens += len(ids)

    def _count(self, conversation: str, prompt: list[int], sampled: list[int], about: dict[str, Any]) -> None:
        self._cached_tokens += about["cached_tokens"]
        self._decoded_tokens += len(sampled)
        cuts = [span["start"] for span in about.get("weight_versions") or ()][1:]
        self._prefixes.observe(conversation, prompt, sampled, cached=about["cached_tokens"], cuts=cuts)

    def forget(self, conversation: str) -> None:
        """SGLang's cache lets go of what was used least recently; only the account is closed."""
        self._prefixes.forget(conversation)

    async def update_weights(self, policy_version: int, weights: Weights) -> None:
        """Take new weights, and go on with what is being sampled under them; wakes it.

        Args:
            weights: buckets as `buckets.serialize_bucket` makes them, each one payload a tensor-parallel rank, in this
                process or another one; who made them keeps their memory until this returns. Or an offer to send them, which is
                sent meanwhile; or a model folder.

        Raises:
            EngineError: SGLang refused, died or missed its deadline. Its weights may be half new, so from then on the engine
                refuses everything.
        """
        await self._whole(
            self._take(policy_version, weights), f"could not take the weights of version {policy_version}"
        )

    async def sleep(self) -> None:
        """Give keys, values and weights back until the next `update_weights`. What is asked meanwhile waits, and so does
        what was being sampled. On the CPU nothing is given back, for want of torch_memory_saver; the rest is the same.

        Raises:
            EngineError: as `update_weights`; or this SGLang can't retract, and there are requests.
        """
        await self._whole(self._fall_asleep(), "could not be put to sleep")

    async def _whole(self, work: Coroutine[Any, Any, None], what: str) -> None:
        """Await `work`, all of it or the end of the engine: half-new weights or a pause that nobody ends are no good."""
        async with self._updating:
            try:
                async with asyncio.timeout(self._config.request_timeout_s):
                    await self._unless_it_fails(work, self._updates)
            except BaseException as e:
                self.fail(f"sglang {what}: {e!r}")
                if not isinstance(e, (EngineError, TimeoutError)):
                    raise
                raise EngineError(self.failure) from e

    async def _take(self, policy_version: int, weights: Weights) -> None:
        tm, io = self._tm, self._io
        async with self._paused():
            if self._asleep:
                await tm.resume_memory_occupation(io.ResumeMemoryOccupationReqInput(tags=["weights"]))
            if isinstance(weights, Path):
                request = io.UpdateWeightFromDiskReqInput(
                    model_path=str(weights), flush_cache=False, weight_version=str(policy_version)
                )
                _done("update_weights_from_disk", (await tm.update_weights_from_disk(request))[:2])
            else:
                await self._take_buckets(policy_version, weights)
            if self._asleep:
                # flushed before it slept, and nothing was computed since
                await tm.resume_memory_occupation(io.ResumeMemoryOccupationReqInput(tags=["kv_cache"]))
            elif self._retracts:
                # no deadline: it would wait for those who wait for us
                await self._flush(timeout_s=None)
            self.policy_version = policy_version

    async def _take_buckets(self, policy_version: int, weights: Offer | Sequence[Sequence[str]]) -> None:
        tm, io = self._tm, self._io
        if self._has_sessions:
            _done("begin_weight_update", await tm.begin_weight_update(io.BeginWeightUpdateReqInput()))
        if isinstance(weights, Offer):
            await self._take_sent(policy_version, weights)
        else:
            for payloads in weights:
                request = io.UpdateWeightsFromTensorReqInput(
                    serialized_named_tensors=list(payloads),
                    load_format="flattened_bucket",
                    flush_cache=False,
                    weight_version=str(policy_version),
                )
                _done("update_weights_from_tensor", await tm.update_weights_from_tensor(request))
        if self._has_sessions:
            _done("end_weight_update", await tm.end_weight_update(io.EndWeightUpdateReqInput()))

    async def _take_sent(self, policy_version: int, offer: Offer) -> None:
        """SGLang waits for the sender as long as torch lets it: minutes. Our deadline is the one of `_whole`."""
        tm, io = self._tm, self._io
        name = group_name(offer.port)
        join = io.InitWeightsUpdateGroupReqInput(
            master_address="127.0.0.1",
            master_port=offer.port,
            rank_offset=1,
            world_size=1 + offer.ranks,
            group_name=name,
            backend=offer.backend,
        )
        _done("init_weights_update_group", await tm.init_weights_update_group(join))
        for bucket in offer.buckets:
            request = io.UpdateWeightsFromDistributedReqInput(
                names=[tensor for tensor, _ in bucket],
                dtypes=[offer.dtype] * len(bucket),
                shapes=[list(shape) for _, shape in bucket],
                group_name=name,
                load_format="flattened_bucket",
                flush_cache=False,
                weight_version=str(policy_version),
            )
            _done("update_weights_from_distributed", await tm.update_weights_from_distributed(request))
        leave = io.DestroyWeightsUpdateGroupReqInput(group_name=name)
        _done("destroy_weights_update_group", await tm.destroy_weights_update_group(leave))

    async def _fall_asleep(self) -> None:
        if self._asleep:
            return
        self._open.clear()
        self._halt()
        if paused := bool(self._calls):
            if not self._retracts:
                raise EngineError(f"{len(self._calls)} requests are under way, which this SGLang can't retract")
            # not without need: the loop of one that is paused turns without rest, and takes a core from who works meanwhile
            await self._tm.pause_generation(self._io.PauseGenerationReqInput(mode="retract"))
        # releasing what is in use would take the scheduler down
        await self._flush(timeout_s=None if paused else self._config.request_timeout_s)
        await self._tm.release_memory_occupation(self._io.ReleaseMemoryOccupationReqInput(tags=["kv_cache", "weights"]))
        self._asleep = True

    @asynccontextmanager
    async def _paused(self) -> AsyncIterator[None]:
        """Nothing is computed, and nothing of what was will be used, while the block runs; awake afterwards."""
        self._halt()
        if self._retracts:
            if not self._asleep:
                await self._tm.pause_generation(self._io.PauseGenerationReqInput(mode="retract"))
            yield
            await self._tm.continue_generation(self._io.ContinueGenerationReqInput(torch_empty_cache=False))
        else:
            self._open.clear()
            while self._calls:
                self._tm.abort_request(abort_all=True)
                await asyncio.wait(self._calls, timeout=_ABORT_S)
            if not self._asleep:
                await self._flush(timeout_s=self._config.request_timeout_s)
            yield
        self._asleep = self._halted = False
        for under_way in self._under_way:
            under_way.go_on(self._loop.time() + self._config.request_timeout_s)
        self._open.set()

    def _halt(self) -> None:
        """Time that passes is not that of requests, nor of whoever asked."""
        self._halted = True
        for under_way in self._under_way:
            under_way.halt()

    async def _flush(self, timeout_s: float | None) -> None:
        flushed = await self._tm.flush_cache(timeout_s=timeout_s)
        _done("flush_cache", (flushed.success, flushed.message))

    def load(self) -> EngineLoad:
        """As the scheduler has written it down last; sums of what was answered."""
        now = self._tm.load_snapshot_reader.read(0)
        if now is None or not now.max_total_num_tokens:
            # nothing before its first request, or zeros; the gate is open until it knows how much there is
            return EngineLoad(running=0, waiting=0, used_tokens=0, max_tokens=self._kv_tokens)
        prefill_tokens, prefill_s, decode_s = self._computed(now)
        of_start = self._started_with
        prefill_tokens -= of_start[0]
        return EngineLoad(
            running=now.num_running_reqs,
            waiting=now.num_waiting_reqs,
            used_tokens=now.num_used_tokens,
            max_tokens=now.max_total_num_tokens,
            prefill_tokens=prefill_tokens,
            cached_tokens=self._cached_tokens,
            recomputed_tokens=min(self._prefixes.recomputed, prefill_tokens),
            decoded_tokens=self._decoded_tokens,
            prefill_s=prefill_s - of_start[1],
            decode_s=decode_s - of_start[2],
        )

    def _computed(self, now: Any) -> tuple[int, float, float]:
        """Prompt tokens, and the time for them and for sampling [s], as the scheduler adds them up: from 0.5.21, else 0."""
        decoding = getattr(now, "decode_moments", None) or [0.0] * 6
        return (
            getattr(now, "total_prefill_uncached_tokens", 0),
            getattr(now, "total_prefill_busy_us", 0) / 1e6,
            decoding[2] / 1e6,
        )

    def check_room(self) -> None:
        """SGLang would cut responses short, and refuse prompts. Raises UsageError."""
        # its scheduler has said it before its first `load`; no more than `max_tokens`
        longest = self._tm.max_req_input_len
        if longest < self._max_tokens:
            raise UsageError(
                f"engine.memory_share = {self._config.memory_share} leaves sglang room for the keys and values of "
                f"{longest} tokens, but a context may have {self._max_tokens}: raise --engine.memory-share or lower "
                "--agent.context-tokens"
            )

    @property
    def busy(self) -> bool:
        return bool(self._calls) and not self._updating.locked() and not self._asleep

    @property
    def progress(self) -> float:
        """When it answered last, or told what it had sampled; and prompt tokens computed, over which it says nothing."""
        return self._tm.last_receive_tstamp + self.load().prefill_tokens

    async def failed(self) -> None:
        await self._failed.wait()

    async def _unless_it_fails(self, work: Coroutine[Any, Any, T], among: set[asyncio.Task[Any]]) -> T:
        """The result of `work`, a member of `among` while it lasts; EngineError as soon as the engine has failed."""
        task = self._loop.create_task(work)
        among.add(task)
        try:
            if self.failure is not None:
                task.cancel()
            return await task
        except asyncio.CancelledError:
            caller = asyncio.current_task()
            if self.failure is None or (caller is not None and caller.cancelling()):
                raise
            raise EngineError(self.failure) from None
        finally:
            among.discard(task)

    def fail(self, why: str) -> None:
        if self.failure is None:
            self.failure = why
            self._failed.set()
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
        self.fail(f"sglang's {child.name} (pid {child.pid}) {how}; what it said of it is on stderr")

    def _reading_ended(self, reading: asyncio.Task[None]) -> None:
        error = None if reading.cancelled() else reading.exception()
        self.fail(f"sglang's answers could not be read: {error!r}" if error else "sglang was closed")

    async def _close(self) -> None:
        self.fail("sglang was closed")
        for fd in self._pidfds:
            self._loop.remove_reader(fd)
            os.close(fd)
        self._reading.cancel()
        await asyncio.wait([self._reading])


def _params(sampling: Sampling, sampled: int) -> dict[str, Any]:
    """SGLang's words for what is left to sample. The model's own end-of-text id does not end a turn, unless we say so. As
    `ignore_eos` switches our stop ids off, too, SGLang stops at it nevertheless, and is asked for more.
    """
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


def _done(what: str, flag: tuple[bool, str]) -> None:
    success, message = flag
    if not success:
        raise EngineError(f"{what}: {message}")


@asynccontextmanager
async def sglang_engine(
    config: EngineConfig, model_path: Path, *, max_tokens: int, slots: int | None = None, gpu: int = 0
) -> AsyncIterator[SGLangEngine]:
    """One engine for as long as the `async with` body runs. Starting it takes ten seconds and more, off the loop.

    Args:
        model_path: a model folder in Hugging Face form. Its weights are policy version 0.
        max_tokens: longest prompt plus response [tokens].
        slots: requests computed at once; `engine.slots` where not given.
        gpu: the first of its GPUs, where there are any; without one SGLang runs on the CPU, in fp32.

    Raises:
        UsageError: a model folder or a setting that can't be used, no room for a context, or no SGLang.
        EngineError: SGLang did not start, or does not answer.
    """
    check_model_folder(model_path, max_tokens)
    async with sglang_process(config, model_path, max_tokens=max_tokens, slots=slots or config.slots, gpu=gpu) as (
        process,
        children,
    ):
        engine = SGLangEngine(process, children, config, max_tokens=max_tokens)
        try:
            engine.check_room()
            await engine.warm_up()
            yield engine
        finally:
            await engine._close()


@asynccontextmanager
async def sglang_fleet(
    config: EngineConfig,
    model_path: Path,
    *,
    max_tokens: int,
    source: WeightSource | None,
    count: int = 1,
    first_gpu: int = 0,
    log: Callable[[str], None] = lambda text: None,
) -> AsyncIterator[Fleet]:
    """`count` engines that share `engine.slots`, on the GPUs from `first_gpu` on, `engine.tensor_parallel` each.

    Args, Raises:
        As `sglang_engine` and `fleet`.
    """

    def make(number: int) -> AbstractAsyncContextManager[SGLangEngine]:
        gpu = first_gpu + number * config.tensor_parallel
        return sglang_engine(config, model_path, max_tokens=max_tokens, slots=-(-config.slots // count), gpu=gpu)

    # over rebuilds, too: engines come and go
    with sigquit_does_nothing():
        async with fleet(make, count, source=source, config=config, log=log) as engines:
            yield engines
