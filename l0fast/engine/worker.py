"""The transformers engine's child process: continuous batching over slots. `python -m l0fast.engine.worker` by the driver.

    forever:  take what the driver sent          (block only when there is nothing to do)
              apply new weights                  forget every prefix, compute anew what the running slots hold
              admit waiting requests to slots    own slot first, then first come first served; prefill in waves (slots.py)
              one decode step for all that run   sample; those that are done are answered and leave their slot idle

New weights wait for nobody: a request that runs goes on under them from its prompt and what it has sampled, as if it were
sent again, and its answer says which version sampled what. Where nothing runs (strictly on-policy) an update is a copy of
the weights. Per-token work is vectorised over slots (numpy); Python touches a request when it comes, when weights come
and when it goes.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from l0fast.cgroups import cores
from l0fast.engine.slot_model import SlotModel, sample
from l0fast.engine.slots import Placement, SlotBook
from l0fast.engine.threads import Threads, waited_s
from l0fast.errors import UsageError
from l0fast.ipc import Channel, Message, SharedWeights, stand_back

_MAX_HELD_BACK = 8
"""Longest wait for company [tokens]."""
_PREFILL_TOKENS = 4096
"""Most tokens of one prefill pass, padding included [tokens]."""


@dataclass(frozen=True, slots=True)
class Request:
    reply_to: int
    """Id of the driver's call."""
    id: int
    conversation: str
    prompt: NDArray[np.int32]
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    temperature: float
    seed: int


class Scheduler:
    """Requests in, tokens out, one step at a time."""

    def __init__(self, model: SlotModel, channel: Channel, weights: SharedWeights | None, *, num_slots: int):
        self.model, self.channel = model, channel
        self.book = SlotBook(num_slots, model.max_len)
        self.weights = weights
        self.shared = None if weights is None else weights.tensors()
        self.policy_version = 0
        self.waiting: dict[int, Request] = {}
        """By their ids, in the order in which they will be admitted."""
        self.updates: deque[Message] = deque()
        self.sums: dict[str, Any] = dict.fromkeys(
            ("prefill_tokens", "cached_tokens", "recomputed_tokens", "decoded_tokens", "prefill_s", "decode_s"), 0
        )
        """As in EngineLoad."""
        self.held_back = 0
        """Tokens decoded while somebody waited to be admitted."""

        # what a running slot's request asked for and has, by slot
        self.requests: list[Request | None] = [None] * num_slots
        self.prefix = np.zeros(num_slots, np.int64)
        self.end = np.zeros(num_slots, np.int64)
        self.temperature = np.zeros(num_slots, np.float32)
        self.seed = np.zeros(num_slots, np.uint64)
        self.logprobs = np.zeros((num_slots, model.max_len), np.float32)
        self.versions: list[list[tuple[int, int]]] = [[] for _ in range(num_slots)]
        """(policy_version, first position it sampled), one for each that its request has seen."""
        self.stop_set = np.zeros(num_slots, np.int64)
        self.stop_sets: dict[tuple[int, ...], int] = {}
        self.stops_at = np.zeros((0, model.vocab_size), np.bool_)

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.updates or self.book.running.any())

    def handle(self, message: Message) -> None:
        header = message.header
        match header["op"]:
            case "generate":
                self.waiting[header["request"]] = Request(
                    reply_to=header["id"],
                    id=header["request"],
                    conversation=header["conversation"],
                    prompt=np.frombuffer(message.payload, np.int32),
                    max_new_tokens=header["max_new_tokens"],
                    stop_token_ids=tuple(header["stop_token_ids"]),
                    temperature=header["temperature"],
                    seed=header["seed"],
                )
            case "abort":
                self._abort(header["request"])
            case "forget":
                self.book.forget(header["conversation"])
            case "update_weights":
                self.updates.append(message)
            case "load":
                self.channel.reply(
                    message,
                    running=int(self.book.running.sum()),
                    waiting=len(self.waiting),
                    used_tokens=self.book.used_tokens,
                    max_tokens=self.book.tokens.size,
                    **self.sums,
                )
            case other:
                raise AssertionError(f"unknown op {other!r}")

    def step(self) -> None:
        """Bring everything that runs one token further, after admitting what can run."""
        if self.updates:
            self._update_weights()
        if self.waiting and not self.book.running.all():
            if worth_a_prefill(len(self.waiting), int(self.book.running.sum()), self.held_back):
                self._admit()
                self.held_back = 0
            else:
                self.held_back += 1
        self._decode()

    def _decode(self) -> None:
        slots = np.flatnonzero(self.book.running)
        if not len(slots):
            return
        with self._timed("decode_s"):
            positions = self.book.cached[slots]
            logits = self.model.decode(slots, self.book.tokens[slots, positions], positions)
            self.book.cached[slots] += 1
            self._take(slots, logits)

    def _take(self, slots: NDArray[np.int64], logits: torch.Tensor) -> None:
        """Sample the next token of each slot; answer the requests that it ends."""
        at = self.book.cached[slots]
        ids, logprobs = sample(logits, temperatures_n=self.temperature[slots], seeds_n=self.seed[slots], positions_n=at)
        self.sums["decoded_tokens"] += len(slots)
        self.book.tokens[slots, at] = ids
        self.logprobs[slots, at] = logprobs
        stopped = self.stops_at[self.stop_set[slots], ids]
        done = stopped | (at + 1 >= self.end[slots])
        for slot, stop in zip(slots[done].tolist(), stopped[done].tolist(), strict=True):
            self._finish(slot, "stop" if stop else "length")

    def _finish(self, slot: int, finish_reason: str) -> None:
        request = self.requests[slot]
        assert request is not None
        start, end = len(request.prompt), int(self.book.cached[slot]) + 1
        response = slice(start, end)
        versions = [version for version, _ in self.versions[slot]]
        cuts = [first - start for _, first in self.versions[slot]] + [end - start]
        ids, logprobs = self.book.tokens[slot, response], self.logprobs[slot, response]
        self.channel.reply(
            request.reply_to,
            ids.tobytes() + logprobs.tobytes(),
            finish_reason=finish_reason,
            policy_version=versions[0],
            version_spans=list(zip(versions, cuts[:-1], cuts[1:], strict=True)) if len(versions) > 1 else [],
            cached_tokens=int(self.prefix[slot]),
        )
        self._leave(slot)

    def _leave(self, slot: int) -> None:
        self.requests[slot] = None
        self.book.release(slot)

    def _abort(self, request_id: int) -> None:
        # thousands may give up at once
        if self.waiting.pop(request_id, None) is not None:
            return
        for slot, request in enumerate(self.requests):
            if request is not None and request.id == request_id:
                self._leave(slot)

    def _admit(self) -> None:
        # those whose prefix lies in a slot of their own come first, before a newcomer takes that slot
        held, others = [], []
        for request in self.waiting.values():
            (held if self.book.holds(request.conversation) else others).append(request)
        queue = deque([*held, *others])
        placed: list[Placement] = []
        while queue and (placement := self.book.place(queue[0].prompt, queue[0].conversation)) is not None:
            self._enter(queue.popleft(), placement)
            placed.append(placement)
        self.waiting = {request.id: request for request in queue}
        self.book.close_round()
        with self._timed("prefill_s"):
            logits_of = self._prefill(placed)
            slots = np.array([p.slot for p in placed])
            self._take(slots, torch.stack([logits_of[slot] for slot in slots.tolist()]))

    def _enter(self, request: Request, placement: Placement) -> None:
        slot = placement.slot
        self.requests[slot] = request
        self.prefix[slot] = placement.prefix
        self.end[slot] = len(request.prompt) + request.max_new_tokens
        self.temperature[slot] = request.temperature
        self.seed[slot] = request.seed
        self.versions[slot] = [(self.policy_version, len(request.prompt))]
        if request.stop_token_ids not in self.stop_sets:
            self.stop_sets[request.stop_token_ids] = len(self.stops_at)
            self.stops_at = np.vstack([self.stops_at, np.zeros(self.model.vocab_size, np.bool_)])
            self.stops_at[-1, list(request.stop_token_ids)] = True
        self.stop_set[slot] = self.stop_sets[request.stop_token_ids]
        self.sums["cached_tokens"] += placement.prefix

    def _prefill(self, placed: list[Placement]) -> dict[int, torch.Tensor]:
        """Compute what was placed in a round, wave by wave. Returns the logits after each row's last id, by slot."""
        logits_of: dict[int, torch.Tensor] = {}
        for number in range(1 + max(p.wave for p in placed)):
            wave = [p for p in placed if p.wave == number]
            for p in wave:
                if p.source != p.slot:
                    self.model.copy_prefix(p.source, p.slot, p.prefix)
                if p.twin:
                    logits_of[p.slot] = logits_of[p.source]
            self._compute(wave, logits_of)
        return logits_of

    def _compute(self, wave: list[Placement], logits_of: dict[int, torch.Tensor]) -> None:
        # alike lengths together, so that little is padding
        todo = sorted((int(self.book.cached[p.slot]) - p.prefix, p.slot, p.prefix) for p in wave)
        todo = [row for row in todo if row[0]]
        self.sums["prefill_tokens"] += sum(length for length, _, _ in todo)
        self.sums["recomputed_tokens"] += sum(p.recomputed for p in wave)
        while todo:
            size = 1
            while size < len(todo) and _batch_well(todo[0][0], todo[size][0], size + 1):
                size += 1
            batch, todo = todo[:size], todo[size:]
            slots, starts = np.array([b[1] for b in batch]), np.array([b[2] for b in batch])
            ids = [self.book.tokens[slot, start : start + length] for length, slot, start in batch]
            logits = self.model.prefill(slots, starts, ids)
            logits_of.update(zip(slots.tolist(), logits, strict=True))

    def _update_weights(self) -> None:
        accepted = []
        while self.updates:
            message = self.updates.popleft()
            version = message.header["policy_version"]
            assert self.weights is not None
            if (published := self.weights.policy_version) == version:
                accepted.append(message)
            else:
                error = ValueError(f"asked for version {version}, but the learner has published {published}")
                self.channel.fail(message, error)
        if accepted:
            self._take_weights()
        for message in accepted:
            self.channel.reply(message)

    def _take_weights(self) -> None:
        assert self.weights is not None
        assert self.shared is not None
        self.model.load(self.shared)
        self.policy_version = self.weights.policy_version
        placed = self.book.flush()
        self.book.close_round()
        for p in placed:
            # the next id is the first that these weights sample
            self.versions[p.slot].append((self.policy_version, int(self.book.cached[p.slot]) + 1))
        if placed:
            with self._timed("prefill_s"):
                self._prefill(placed)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.sums[what] += time.perf_counter() - started


def worth_a_prefill(waiting: int, running: int, held_back: int) -> bool:
    """Whether to admit now, or to let others come and share the pass.

    A pass for one row costs half as much as one for twenty, and while it lasts nobody decodes. So those who wait are
    gathered until they are a quarter of those who run, for at most `_MAX_HELD_BACK` tokens.
    """
    return 4 * waiting >= running or held_back >= _MAX_HELD_BACK


def _batch_well(shortest: int, longest: int, rows: int) -> bool:
    return longest <= 2 * shortest + 16 and rows * longest <= _PREFILL_TOKENS


def pick_device(wanted: str) -> str:
    """ "cpu" or "cuda" for what engine.device says."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "engine.device = 'cuda', but torch finds no GPU that it can use: set --engine.device cpu or auto"
        )
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def _build(channel: Channel, args: dict[str, Any]) -> Scheduler:
    torch.set_num_threads(args["threads"] or cores())
    device = pick_device(args["device"])
    if device == "cpu":
        stand_back()
    model = SlotModel(Path(args["model_path"]), num_slots=args["slots"], max_len=args["max_len"], device=device)
    model.check()
    weights = None if args["weights"] is None else SharedWeights.attach(args["weights"])
    if weights is not None and (odd := {s.name for s in weights.specs} ^ set(model.parameters())):
        raise UsageError(f"the model folder and the loaded model name their tensors differently: {sorted(odd)[:4]}")
    return Scheduler(model, channel, weights, num_slots=args["slots"])


def main(channel: Channel, args: dict[str, Any]) -> None:
    try:
        scheduler = _build(channel, args)
    except UsageError as e:
        channel.refuse(e)
        return
    channel.ready(vocab_size=scheduler.model.vocab_size)
    # those that were asked for by number stay
    most = 1 if args["threads"] or scheduler.model.device.type != "cpu" else torch.get_num_threads()
    threads = Threads(most, time.monotonic(), waited_s())
    try:
        while True:
            message = channel.recv(block=scheduler.idle)
            while message is not None:
                scheduler.handle(message)
                message = channel.recv(block=False)
            scheduler.step()
            if most > 1:
                torch.set_num_threads(threads.look(time.monotonic(), waited_s))
    except EOFError:
        # nobody is left to answer; skip the interpreter's long goodbye
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main(*Channel.open())
