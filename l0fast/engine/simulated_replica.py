"""One simulated engine: SGLang's scheduler as arithmetic between events. Pure: no tasks, times are passed in.

    waiting --admit--> prefill of a batch --> decode steps --> finished: its KV entries stay as the conversation's prefix
       ^                                          |
       '------------- retracted, or new weights --'

    prefill    prefill_batch_s + new prompt tokens / prefill_tokens_per_s; decoding stands still meanwhile; samples one token
    decode     all running requests get a token every step_s + step_request_s * requests + step_kv_s * KV entries
    memory     kv_tokens entries: those of running requests are locked, the others are prefixes, evicted least recently
               used first, from their ends
    admit      first come, first served, while a slot is free and the prompt fits beside `new_token_ratio` of what the
               running may still sample. That ratio falls with every step and jumps up after a retraction; after one
               refusal nobody is tried before a request leaves
    retract    when the next step does not fit: those with the fewest tokens first; what they sampled is kept, its
               KV entries are not

No request costs an event a token: between two events the batch is constant, so the time of k steps is a closed form.
Left out: chunks of a long prompt interleaved with decoding, prefixes shared between conversations, pages.
Rules and constants: SGLang's scheduler and its retract_decode, as of 0.5.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from l0fast.engine.base import EngineLoad, VersionSpan
from l0fast.engine.schedule import Schedule

_RATIO: Final = 0.7
_RATIO_MIN: Final = 0.7 * 0.14
_RATIO_STEPS: Final = 600
"""SGLang's new_token_ratio: at the start, at the least, steps from one to the other."""
_CLIP_NEW_TOKENS: Final = 4096
"""Nobody is expected to sample more than this [tokens]."""
_PREFILL_BATCH_TOKENS: Final = 8192
"""A batch of prompts takes no further request from here on [tokens]."""
_RETRACT_STEPS: Final = 20
"""Steps that shall fit after a retraction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How long an engine takes."""

    prefill_tokens_per_s: float = 20_000.0
    prefill_batch_s: float = 0.0
    """Of every batch of prompts, besides [s]."""
    step_s: float = 0.01
    """A decode step, whoever is in it [s]."""
    step_request_s: float = 0.0
    """More for each running request [s]."""
    step_kv_s: float = 0.0
    """More for each KV entry that is read [s]."""

    def __post_init__(self) -> None:
        if not (self.prefill_tokens_per_s > 0 and self.step_s > 0):
            raise ValueError(f"{self}: prefill_tokens_per_s and step_s must be above 0")
        if min(self.prefill_batch_s, self.step_request_s, self.step_kv_s) < 0:
            raise ValueError(f"{self}: no time can be negative")


class Request:
    # no dataclass: bench/compiled.py could not compile the making of one, which is done every turn
    __slots__ = (
        "admitted",
        "cached_tokens",
        "conversation",
        "decoded_tokens",
        "done",
        "finish_step",
        "finished_s",
        "matched_tokens",
        "max_new_tokens",
        "prompt_tokens",
        "replica",
        "response_tokens",
        "versions",
    )

    def __init__(
        self,
        *,
        conversation: str,
        prompt_tokens: int,
        response_tokens: int,
        max_new_tokens: int,
        matched_tokens: int = 0,
    ):
        """
        Args:
            response_tokens: what it will sample; the replica acts as if it knew `max_new_tokens` only.
            matched_tokens: leading tokens that were computed before, whether or not their entries are still there.
        """
        self.conversation, self.prompt_tokens = conversation, prompt_tokens
        self.response_tokens, self.max_new_tokens = response_tokens, max_new_tokens
        self.matched_tokens = matched_tokens
        self.decoded_tokens = 0
        """As of the last time that it joined or left the running ones."""
        self.cached_tokens = 0
        """Prompt tokens found when it was first admitted."""
        self.versions: list[tuple[int, int]] = []
        """(policy version, index of its first token)"""
        self.finished_s = math.inf
        self.finish_step = -1
        """Step after which it is done; -1 while it is not running."""
        self.admitted = False
        self.replica = -1
        """Its number, where there are several (simulated_cluster.py)."""
        self.done: Callable[[], Any] | None = None
        """To be called when all of it has been sampled, by whoever has the replica."""

    @property
    def version_spans(self) -> tuple[VersionSpan, ...]:
        ends = [start for _, start in self.versions[1:]] + [self.decoded_tokens]
        return tuple(VersionSpan(v, start, end) for (v, start), end in zip(self.versions, ends, strict=True))


class Replica:
    def __init__(self, speed: Speed, *, slots: int, kv_tokens: int, forgets: bool = True):
        """
        Args:
            slots: requests that run at once.
            kv_tokens: KV entries there are.
            forgets: a conversation's entries go when it is over; else they wait to be evicted like all others, as SGLang's.
        """
        self.speed, self.slots, self.kv_tokens = speed, slots, kv_tokens
        self.policy_version = 0
        self.finished: list[Request] = []
        """Since the caller last emptied it."""
        self.next_event_s = math.inf
        """When something happens by itself; `advance` to it."""
        self.num_retracted = 0
        self._forgets = forgets
        self._now_s = 0.0
        self._waiting: deque[Request] = deque()
        self._prefilling: list[Request] = []
        self._prefill_end_s = 0.0
        self._running: dict[Request, None] = {}
        self._finishes: Schedule[Request] = Schedule()
        """Of the running, by their steps."""
        self._steps = 0
        self._next_steps, self._next_steps_s = 0, 0.0
        """Until the next event, while requests run."""
        self._base_s = 0.0
        """When `_steps` were done, while requests run; while a prompt is computed, up to when that is counted."""
        self._locked = 0
        self._expected = 0
        """Tokens that the admitted may still sample, by their limits [tokens]."""
        self._ratio = _RATIO
        self._full = False
        self._resume_s = 0.0
        # first ones go all the time: a dict steps over all that have gone to find its first
        self._prefixes: OrderedDict[str, int] = OrderedDict()
        self._evictable = 0
        self._owed = 0
        """Tokens that were evicted and are still counted in `_prefixes`: the first of those owe them."""
        self._prefill_tokens = self._cached_tokens = self._recomputed_tokens = self._decoded_tokens = 0
        self._prefill_s = self._decode_s = self._slot_s = 0.0

    # what the outside does

    def submit(self, request: Request, now_s: float) -> None:
        if request.prompt_tokens + request.max_new_tokens > self.kv_tokens:
            raise ValueError(
                f"a prompt of {request.prompt_tokens} tokens and max_new_tokens = {request.max_new_tokens} do not fit in "
                f"{self.kv_tokens} KV entries: give the engine more"
            )
        self.advance(now_s)
        self._waiting.append(request)
        self._plan()

    def cancel(self, request: Request, now_s: float) -> None:
        """Whatever it sampled is lost. No harm where it is finished."""
        self.advance(now_s)
        if request.finish_step >= 0:
            self._settle()
            self._finishes.remove(request)
            self._leave(request)
            self._keep_prefix(request.conversation, request.prompt_tokens + request.decoded_tokens - 1)
        elif request in self._prefilling:
            self._settle()
            self._prefilling.remove(request)
            self._unlock(request, request.prompt_tokens + request.decoded_tokens)
        elif request in self._waiting:
            self._waiting.remove(request)
        self._plan()

    def update_weights(self, policy_version: int, now_s: float, *, pause_s: float = 0.0) -> None:
        """New weights: what is under way keeps its tokens and is computed again, and nothing else is kept."""
        self.advance(now_s)
        self._settle()
        under_way = [*self._running, *self._prefilling]
        self._finishes.clear()
        for request in self._running.copy():
            self._leave(request)
            request.matched_tokens = request.prompt_tokens + request.decoded_tokens - 1
        for request in self._prefilling:
            self._unlock(request, request.prompt_tokens + request.decoded_tokens)
        self._prefilling.clear()
        self._waiting.extendleft(reversed(under_way))
        self._prefixes.clear()
        self._evictable = self._owed = 0
        self.policy_version, self._resume_s = policy_version, now_s + pause_s
        self._plan()

    def stall(self, duration_s: float, now_s: float) -> None:
        """Somebody else has the machine for so long: nothing that is under way gets any further."""
        self.advance(now_s)
        self._settle()
        self._prefill_end_s += duration_s
        self._base_s += duration_s
        self._resume_s = max(self._resume_s, now_s) + duration_s
        self._plan()

    def forget(self, conversation: str) -> None:
        """The conversation is over."""
        if self._forgets:
            self._take_prefix(conversation)

    def advance(self, to_s: float) -> None:
        """Let happen what does until then; who is done by then is in `finished`."""
        while self.next_event_s <= to_s:
            self._now_s = max(self._now_s, self.next_event_s)
            if self._prefilling:
                self._prefilled()
            elif self._running:
                self._decode(self._next_steps, self._next_steps_s)
                self._finish()
                if self._locked + len(self._running) > self.kv_tokens:
                    self._retract()
            if self._waiting and not self._full:
                self._admit()
            self._plan()
        self._now_s = max(self._now_s, to_s)

    # what the outside asks; after `advance`

    def load(self) -> EngineLoad:
        self._settle()
        return EngineLoad(
            running=len(self._running) + len(self._prefilling),
            waiting=len(self._waiting),
            used_tokens=self._locked + self._evictable,
            max_tokens=self.kv_tokens,
            prefill_tokens=self._prefill_tokens,
            cached_tokens=self._cached_tokens,
            recomputed_tokens=self._recomputed_tokens,
            decoded_tokens=self._decoded_tokens,
            prefill_s=self._prefill_s,
            decode_s=self._decode_s,
        )

    @property
    def num_requests(self) -> int:
        return len(self._running) + len(self._prefilling) + len(self._waiting)

    @property
    def locked_tokens(self) -> int:
        """KV entries of running requests; the rest of those in use are prefixes, which may go."""
        return self._locked

    @property
    def slot_s(self) -> float:
        """Slots in use, summed over time [slots x s]."""
        self._settle()
        return self._slot_s

    # events

    def _plan(self) -> None:
        """When something happens next, and how many decode steps that is from `_base_s`."""
        tries = bool(self._waiting) and not self._full
        if self._prefilling:
            self.next_event_s = self._prefill_end_s
        elif not self._running:
            self.next_event_s = max(self._now_s, self._resume_s) if tries else math.inf
        else:
            steps = int(self._finishes.next_at()) - self._steps
            steps = min(steps, max(1, (self.kv_tokens - self._locked) // len(self._running)))
            first_s, growth_s = self._step_times(len(self._running), self._locked)
            if tries:
                # a batch forms between two steps
                done = _steps_in(self._now_s - self._base_s, first_s, growth_s)
                on_time = self._base_s + _time_of(done, first_s, growth_s) >= self._now_s - 1e-9
                steps = min(steps, done if on_time and done else done + 1)
            self._next_steps, self._next_steps_s = steps, _time_of(steps, first_s, growth_s)
            self.next_event_s = self._base_s + self._next_steps_s

    def _admit(self) -> None:
        batch, new_tokens = self._prefilling, 0
        while self._waiting and len(self._running) + len(batch) < self.slots and new_tokens < _PREFILL_BATCH_TOKENS:
            request = self._waiting[0]
            total = request.prompt_tokens + request.decoded_tokens
            expects = _expects(request)
            if self._running or batch:
                if self._locked + total + self._ratio * max(0, self._expected + expects) > self.kv_tokens:
                    self._full = True
                    break
            self._waiting.popleft()
            prefix = self._take_prefix(request.conversation)
            self._locked += total
            self._expected += expects
            self._evict(self.kv_tokens - self._locked)
            computed_before = _computed_before(request)
            hit = min(prefix, computed_before)
            if not request.admitted:
                request.admitted, request.cached_tokens = True, hit
            new_tokens += total - hit
            self._prefill_tokens += total - hit
            self._cached_tokens += hit
            self._recomputed_tokens += computed_before - hit
            batch.append(request)
        if self._waiting and len(self._running) + len(batch) >= self.slots:
            self._full = True
        if batch:
            self._base_s = self._now_s
            self._prefill_end_s = self._now_s + self._prefill_duration_s(new_tokens)

    def _prefilled(self) -> None:
        self._settle()
        batch, self._prefilling = self._prefilling, []
        self._decoded_tokens += len(batch)
        self._expected -= len(batch)
        for request in batch:
            if not request.versions or request.versions[-1][0] != self.policy_version:
                request.versions.append((self.policy_version, request.decoded_tokens))
            request.decoded_tokens += 1
            request.finish_step = self._steps + request.response_tokens - request.decoded_tokens
            self._running[request] = None
            self._finishes.add(request.finish_step, request)
        self._finish()

    def _finish(self) -> None:
        while (request := self._finishes.take(self._steps)) is not None:
            self._leave(request)
            self._keep_prefix(request.conversation, request.prompt_tokens + request.response_tokens - 1)
            request.finished_s = self._now_s
            self.finished.append(request)

    def _retract(self) -> None:
        order = sorted(self._running, key=lambda r: (self._decoded(r), -r.prompt_tokens), reverse=True)
        while self._locked + len(self._running) > self.kv_tokens:
            request = order.pop()
            self._finishes.remove(request)
            self._leave(request)
            request.matched_tokens = request.prompt_tokens + request.decoded_tokens - 1
            self._keep_prefix(request.conversation, request.prompt_tokens)
            self._waiting.append(request)
            self.num_retracted += 1
        self._evict(self.kv_tokens - self._locked - _RETRACT_STEPS * len(order))
        sampled = sum(map(self._decoded, order)) + _RETRACT_STEPS * len(order)
        self._ratio = min(1.0, sampled / (sum(r.max_new_tokens for r in order) + 1))

    # bookkeeping

    def _settle(self) -> None:
        """Count what is done by now."""
        if self._prefilling:
            # nothing of what stands still
            done_s = max(0.0, self._now_s - self._base_s)
            self._base_s = max(self._base_s, self._now_s)
            self._prefill_s += done_s
            self._slot_s += done_s * (len(self._running) + len(self._prefilling))
        elif self._running:
            first_s, growth_s = self._step_times(len(self._running), self._locked)
            steps = _steps_in(self._now_s - self._base_s, first_s, growth_s)
            self._decode(steps, _time_of(steps, first_s, growth_s))
            self._plan()

    def _decode(self, steps: int, duration_s: float) -> None:
        requests = len(self._running)
        self._steps += steps
        self._base_s += duration_s
        self._locked += requests * steps
        self._expected -= requests * steps
        self._ratio = max(_RATIO_MIN, self._ratio - steps * (_RATIO - _RATIO_MIN) / _RATIO_STEPS)
        self._decoded_tokens += requests * steps
        self._decode_s += duration_s
        self._slot_s += duration_s * requests
        self._evict(self.kv_tokens - self._locked)

    def _leave(self, request: Request) -> None:
        """Stop running."""
        request.decoded_tokens = self._decoded(request)
        del self._running[request]
        request.finish_step = -1
        self._unlock(request, request.prompt_tokens + request.decoded_tokens - 1)

    def _unlock(self, request: Request, tokens: int) -> None:
        self._locked -= tokens
        self._expected -= _expects(request)
        self._full = False

    def _decoded(self, request: Request) -> int:
        return request.response_tokens - (request.finish_step - self._steps)

    def _keep_prefix(self, conversation: str, tokens: int) -> None:
        if conversation in self._prefixes:
            self._take_prefix(conversation)
        self._evictable += tokens
        self._prefixes[conversation] = tokens

    def _take_prefix(self, conversation: str) -> int:
        """What is left of it [tokens]; it is no prefix any more."""
        while self._owed:
            first = next(iter(self._prefixes))
            paid = min(self._prefixes[first], self._owed)
            self._owed -= paid
            if self._owed:
                del self._prefixes[first]
            else:
                self._prefixes[first] -= paid
        tokens = self._prefixes.pop(conversation, 0)
        self._evictable -= tokens
        return tokens

    def _evict(self, room: int) -> None:
        """Until prefixes take no more than `room` [tokens]."""
        over = self._evictable - max(room, 0)
        if over > 0:
            # whose they were matters when one of them is looked up
            self._evictable -= over
            self._owed += over

    def _prefill_duration_s(self, new_tokens: int) -> float:
        return self.speed.prefill_batch_s + new_tokens / self.speed.prefill_tokens_per_s

    def _step_times(self, running: int, locked: int) -> tuple[float, float]:
        """(duration of the next step, how much longer each one is than the one before)"""
        speed = self.speed
        return (
            speed.step_s + speed.step_request_s * running + speed.step_kv_s * locked,
            speed.step_kv_s * running,
        )


def _time_of(steps: int, first_s: float, growth_s: float) -> float:
    return steps * first_s + growth_s * steps * (steps - 1) / 2


def _steps_in(duration_s: float, first_s: float, growth_s: float) -> int:
    """Whole steps."""
    duration_s = max(0.0, duration_s) + 1e-9
    if growth_s * duration_s < 1e-9 * first_s * first_s:
        steps = int(duration_s / first_s)
    else:
        b = first_s - growth_s / 2
        steps = int((math.sqrt(b * b + 2 * growth_s * duration_s) - b) / growth_s)
    while _time_of(steps, first_s, growth_s) > duration_s:
        steps -= 1
    return steps


def _expects(request: Request) -> int:
    return min(request.max_new_tokens, _CLIP_NEW_TOKENS) - request.decoded_tokens


def _computed_before(request: Request) -> int:
    """Leading tokens; the last one is computed whatever there was, for what comes after it."""
    return min(request.matched_tokens, request.prompt_tokens + request.decoded_tokens - 1)
