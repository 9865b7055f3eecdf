"""An engine without a model, for tests and benchmarks: scripted or random ids, and a clock that costs no time.

    response     what `script` says, or: length drawn around `mean_response_tokens`, ids uniform, a stop id last
    time         queue for a slot, then new prompt tokens / prefill rate + response tokens / decode rate, on `clock`
    log-probs    -2 u

Every draw is a function of (engine seed, request seed, prompt, position) alone: neither timing, nor who else asks, nor
the policy version changes what is said.
"""

import asyncio
import heapq
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np

from l0fast.engine.base import EngineLoad, Sampled, Sampling
from l0fast.engine.check import check_request
from l0fast.engine.sampling import uniforms

Script = Callable[[Sequence[int], Sampling, str], Sequence[int]]
"""(prompt_ids, sampling, conversation) -> response ids; cut after the first stop id and at `max_new_tokens`."""


_SETTLE_TURNS = 10
"""Loop turns that what was woken has to go to sleep again, before time moves on."""


class SimulatedClock:
    """Event time: sleepers wake in the order of their times, and nobody waits for real.

    Time moves when nobody went to sleep or woke for `_SETTLE_TURNS` turns of the loop; work that takes more turns than
    that starts late on this clock.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        """[s]"""
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()
        self._quiet_turns = 0

    async def sleep(self, duration_s: float) -> None:
        """Return when the clock has moved on by `duration_s` [s]."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        if not self._sleepers:
            loop.call_soon(self._tick)
        heapq.heappush(self._sleepers, (self.now_s + duration_s, next(self._order), future))
        self._quiet_turns = 0
        await future

    def _tick(self) -> None:
        self._quiet_turns += 1
        if self._quiet_turns > _SETTLE_TURNS:
            self._quiet_turns = 0
            at_s, _, future = heapq.heappop(self._sleepers)
            if not future.done():
                self.now_s = at_s
                future.set_result(None)
        if self._sleepers:
            asyncio.get_running_loop().call_soon(self._tick)


class SimulatedEngine:
    """The `Engine` protocol over arithmetic."""

    def __init__(
        self,
        *,
        vocab_size: int,
        max_tokens: int,
        slots: int = 128,
        seed: int = 0,
        script: Script | None = None,
        mean_response_tokens: float = 32.0,
        prefill_tokens_per_s: float = 20_000.0,
        decode_tokens_per_s: float = 100.0,
        clock: SimulatedClock | None = None,
    ):
        """
        Args:
            max_tokens: longest prompt plus response [tokens].
            slots: requests served at once, and conversations whose prefix is remembered.
            mean_response_tokens: of responses that no script gives [tokens].
            prefill_tokens_per_s, decode_tokens_per_s: of one request.
            clock: shared with whatever else is simulated; None makes one.
        """
        self.clock = clock or SimulatedClock()
        self.policy_version = 0
        self._vocab_size, self._max_tokens, self._slots = vocab_size, max_tokens, slots
        self._seed, self._script, self._mean_response_tokens = seed, script, mean_response_tokens
        self._prefill_tokens_per_s, self._decode_tokens_per_s = prefill_tokens_per_s, decode_tokens_per_s
        self._free = asyncio.Semaphore(slots)
        self._running = self._waiting = 0
        self._prefixes: OrderedDict[str, tuple[int, ...]] = OrderedDict()

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, *, conversation: str) -> Sampled:
        prompt = np.asarray(prompt_ids, np.int64)
        check_request(prompt, sampling, vocab_size=self._vocab_size, max_tokens=self._max_tokens)
        self._waiting += 1
        try:
            await self._free.acquire()
        finally:
            self._waiting -= 1
        self._running += 1
        try:
            return await self._serve(prompt, sampling, conversation)
        finally:
            self._running -= 1
            self._free.release()

    async def update_weights(self, policy_version: int) -> None:
        self.policy_version = policy_version
        self._prefixes.clear()

    async def load(self) -> EngineLoad:
        return EngineLoad(
            running=self._running,
            waiting=self._waiting,
            used_tokens=sum(len(prefix) for prefix in self._prefixes.values()),
            max_tokens=self._slots * self._max_tokens,
        )

    async def _serve(self, prompt: np.ndarray, sampling: Sampling, conversation: str) -> Sampled:
        policy_version = self.policy_version
        cached = _common_prefix(self._prefixes.get(conversation, ()), prompt)
        key = blake2b(prompt.tobytes(), digest_size=8, key=(self._seed % 2**64).to_bytes(8, "little")).digest()
        seeds = np.array([int.from_bytes(key, "little") ^ (sampling.seed % 2**64)], np.uint64)
        if self._script is None:
            response = self._draw(seeds, sampling)
        else:
            response = [int(i) for i in self._script(prompt.tolist(), sampling, conversation)]
        stop_at = next((i for i, token in enumerate(response) if token in sampling.stop_token_ids), None)
        response = response[: sampling.max_new_tokens if stop_at is None else stop_at + 1][: sampling.max_new_tokens]
        stopped = response and response[-1] in sampling.stop_token_ids
        await self.clock.sleep(
            (len(prompt) - cached) / self._prefill_tokens_per_s + len(response) / self._decode_tokens_per_s
        )
        if policy_version == self.policy_version:
            self._prefixes[conversation] = (*prompt.tolist(), *response[:-1])
            self._prefixes.move_to_end(conversation)
            if len(self._prefixes) > self._slots:
                self._prefixes.popitem(last=False)
        return Sampled(
            response_ids=tuple(response),
            sampler_logprobs=tuple((-2 * uniforms(seeds, np.arange(len(response)) - 1_000_000)).tolist()),
            finish_reason="stop" if stopped else "length",
            policy_version=policy_version,
            cached_tokens=cached,
        )

    def _draw(self, seeds: np.ndarray, sampling: Sampling) -> list[int]:
        # exponential lengths: most answers are short, some run into the limit
        u = float(uniforms(seeds, np.array([-1]))[0])
        length = 1 + int(-self._mean_response_tokens * np.log1p(-u))
        ids = (uniforms(seeds, np.arange(min(length, sampling.max_new_tokens))) * self._vocab_size).astype(int).tolist()
        if length <= sampling.max_new_tokens and sampling.stop_token_ids:
            ids[-1] = sampling.stop_token_ids[0]
        return ids


def _common_prefix(previous: tuple[int, ...], prompt: np.ndarray) -> int:
    """Leading ids that are equal; the last of a prompt is always computed."""
    n = min(len(previous), len(prompt) - 1)
    differs = np.flatnonzero(prompt[:n] != np.array(previous[:n], np.int64))
    return int(differs[0]) if len(differs) else n
