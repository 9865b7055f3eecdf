"""An engine without a model, for tests, benchmarks and predictions: scripted or random ids, and time that is only counted.

    response     what `script` says, or: a length drawn from `response_tokens`, ids uniform, a stop id last
    time         what a `Cluster` says, SGLang's scheduler as arithmetic (simulated_cluster.py), on `clock` (clock.py)
    log-probs    -2 u

Every draw is a function of (engine seed, request seed, end of the prompt, position) alone: neither timing, nor who else
asks, nor the policy version changes what is said. No token costs anything: a turn of an agent costs 0.1 to 0.3 ms of the
host's CPU. On a `SimulatedClock` time goes thousands of times as fast as real time where a few turns a second end, and about
a thousand times for an engine that is full; agents that are no coroutines are faster (traffic.py, README.md).
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from l0fast.engine.base import EngineLoad, Sampled, Sampling
from l0fast.engine.check import check_prompt, check_sampling
from l0fast.engine.clock import Clock, CompressedClock, SimulatedClock
from l0fast.engine.distributions import Distribution, exponential
from l0fast.engine.sampling import uniforms
from l0fast.engine.simulated_cluster import Cluster
from l0fast.engine.simulated_replica import Request, Speed
from l0fast.ids import Ids

__all__ = ["Clock", "CompressedClock", "Script", "SimulatedClock", "SimulatedEngine", "Speed"]

Script = Callable[[Sequence[int], Sampling, str], Sequence[int]]
"""(prompt_ids, sampling, conversation) -> response ids; cut after the first stop id and at `max_new_tokens`."""


_POOL = 1 << 13
"""Random numbers that responses are slices of."""
_NO_TIME = 1e6
"""Compression that leaves nothing of a response's time but the loop's timers."""
_TAIL = 64
"""Last ids of a prompt that stand for it in a draw."""


class SimulatedEngine:
    """The `Engine` protocol over arithmetic."""

    def __init__(
        self,
        *,
        vocab_size: int,
        max_tokens: int,
        slots: int = 128,
        kv_tokens: int | None = None,
        replicas: int = 1,
        speed: Speed | None = None,
        update_s: float = 0.0,
        forgets: bool = True,
        seed: int = 0,
        script: Script | None = None,
        mean_response_tokens: float = 32.0,
        response_tokens: Distribution | None = None,
        clock: Clock | None = None,
    ):
        """
        Args:
            max_tokens: longest prompt plus response [tokens].
            slots: requests that run at once, in each replica.
            kv_tokens: KV entries of each replica; None for as many as full slots can take.
            replicas: engines that work side by side.
            speed: of each replica; None for `Speed()`.
            update_s: time new weights take [s].
            forgets: `forget` frees KV entries at once; SGLang's wait to be evicted.
            mean_response_tokens: of responses that no script gives and `response_tokens` does not say [tokens].
            response_tokens: their lengths (distributions.py).
            clock: shared with whatever else is simulated; None is for a world that is real: on any loop, in next to no time.
        """
        kv_tokens = slots * max_tokens if kv_tokens is None else kv_tokens
        if kv_tokens < max_tokens:
            raise ValueError(
                f"kv_tokens = {kv_tokens} can't hold one conversation of max_tokens = {max_tokens}: give more"
            )
        self.clock: Clock = clock or CompressedClock(_NO_TIME)
        self.policy_version = 0
        self._vocab_size, self._max_tokens = vocab_size, max_tokens
        self._seed, self._script, self._update_s = seed, script, update_s
        self._response_tokens = response_tokens or exponential(mean_response_tokens)
        self._cluster = Cluster(
            self.clock,
            speed=speed or Speed(),
            slots=slots,
            kv_tokens=kv_tokens,
            replicas=replicas,
            forgets=forgets,
        )
        # slices of these cost nothing, thousands of draws a turn would be most of what this engine costs
        self._uniforms = uniforms(np.array([seed % 2**64], np.uint64), np.arange(_POOL + max_tokens))
        self._ids: dict[tuple[int, ...], Ids] = {}
        """By stop ids: those of all others."""
        self._logprobs: tuple[float, ...] = tuple((-2 * self._uniforms).tolist())
        self._known: OrderedDict[str, Ids] = OrderedDict()
        """By conversation, what its KV entries stand for or once stood for."""
        self._num_known = 4 * slots * replicas
        """Of conversations that nobody forgets, the last so many stay known."""

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, *, conversation: str) -> Sampled:
        check_sampling(sampling, vocab_size=self._vocab_size)
        prompt = prompt_ids if isinstance(prompt_ids, Ids) else self._checked(np.array(prompt_ids, np.int64), sampling)
        matched = self._matched(conversation, prompt)
        if (
            # what is known was checked before
            matched == len(prompt)
            or np.maximum.reduce(prompt.numpy(matched).view(np.uint32)) >= self._vocab_size
            or len(prompt) + sampling.max_new_tokens > self._max_tokens
        ):
            self._checked(prompt.numpy().astype(np.int64), sampling)
        response, stopped, place = self._respond(prompt, sampling, conversation)
        request = Request(
            conversation=conversation,
            prompt_tokens=len(prompt),
            response_tokens=max(1, len(response)),
            max_new_tokens=sampling.max_new_tokens,
            matched_tokens=matched,
        )
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._cluster.submit(request, lambda: answered.done() or answered.set_result(None))
        try:
            await answered
        except asyncio.CancelledError:
            self._cluster.cancel(request)
            raise
        self._know(conversation, prompt + response[:-1])
        spans = request.version_spans if len(request.versions) > 1 else ()
        return Sampled(
            response_ids=response,
            sampler_logprobs=self._logprobs[place : place + len(response)],
            finish_reason="stop" if stopped else "length",
            policy_version=request.versions[0][0],
            version_spans=spans,
            cached_tokens=request.cached_tokens,
        )

    async def update_weights(self, policy_version: int) -> None:
        """In-flight requests keep what they sampled and go on under the new weights, computed again."""
        self.policy_version = policy_version
        self._cluster.update_weights(policy_version, pause_s=self._update_s)
        if self._update_s:
            await self.clock.sleep(self._update_s)

    def forget(self, conversation: str) -> None:
        self._known.pop(conversation, None)
        self._cluster.forget(conversation)

    async def load(self) -> EngineLoad:
        """Summed over the replicas."""
        return self._cluster.load()

    def stall(self, duration_s: float) -> None:
        """Let nothing get any further for so long; returns at once."""
        self._cluster.stall(duration_s)

    def slot_s(self) -> float:
        """Slots in use, summed over time and replicas; over slots x replicas x `clock.now_s`, how busy it was [slots x s]."""
        return self._cluster.slot_s()

    def _matched(self, conversation: str, prompt: Ids) -> int:
        """Leading ids that were computed before."""
        known = self._known.get(conversation)
        return 0 if known is None else prompt.common(known)

    def _know(self, conversation: str, ids: Ids) -> None:
        self._known[conversation] = ids
        self._known.move_to_end(conversation)
        if len(self._known) > self._num_known:
            self._cluster.lose_home(self._known.popitem(last=False)[0])

    def _checked(self, prompt: NDArray[np.int64], sampling: Sampling) -> Ids:
        check_prompt(prompt, sampling.max_new_tokens, vocab_size=self._vocab_size, max_tokens=self._max_tokens)
        return Ids(prompt.tolist())

    def _respond(self, prompt: Ids, sampling: Sampling, conversation: str) -> tuple[Ids, bool, int]:
        """(ids, whether the last one is a stop id, place of its log-probs in the pool)"""
        # numbers hash the same in every process; mixed, since the bits of a tuple's hash are not all alike
        key = _mix(hash((self._seed, sampling.seed, len(prompt), prompt[-_TAIL:])))
        if self._script is None:
            response = self._draw((key >> 40) / 2**24, key % _POOL, sampling)
        else:
            said = self._script(prompt, sampling, conversation)
            response = _up_to_stop(said if isinstance(said, Ids) else Ids(said), sampling)
        return response, bool(response) and response[-1] in sampling.stop_token_ids, (key >> 20) % _POOL

    def _draw(self, u: float, at: int, sampling: Sampling) -> Ids:
        stops = sampling.stop_token_ids
        if (ids := self._ids.get(stops)) is None:
            ids = self._ids[stops] = self._ids_but(stops)
        length = 1 + int(self._response_tokens(u))
        if length > sampling.max_new_tokens or not stops:
            return ids[at : at + min(length, sampling.max_new_tokens)]
        return ids[at : at + length - 1] + stops[:1]

    def _ids_but(self, stops: tuple[int, ...]) -> Ids:
        """A stop id among them would cut a response shorter than was drawn."""
        left_out = sorted(set(stops))
        if len(left_out) == self._vocab_size:
            raise ValueError(f"stop_token_ids = {stops} are all the ids there are: leave one out")
        ids = (self._uniforms * (self._vocab_size - len(left_out))).astype(int)
        for stop in left_out:
            ids += ids >= stop
        return Ids(ids.tolist())


def _up_to_stop(said: Ids, sampling: Sampling) -> Ids:
    end = min(len(said), sampling.max_new_tokens)
    for stop in sampling.stop_token_ids:
        try:
            end = said.index(stop, 0, end) + 1
        except ValueError:
            continue
    return said if end == len(said) else said[:end]


def _mix(z: int) -> int:
    """SplitMix64's finaliser, for one number (engine/sampling.py has it for arrays)."""
    z %= 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)
