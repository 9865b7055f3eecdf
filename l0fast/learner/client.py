"""The learner as the event loop sees it: groups in, metrics out, new weights in shared memory. No torch.

    values       groups -> segments -> rows -> one part an optimizer step -> packs -> dealt to ranks -> shared memory
                                                                                             in a thread: milliseconds
                 -> all ranks at once: what the critic expects of each turn, where there is a critic
    accumulate   the same with the advantages made of it
                 -> all ranks at once: forward and backward, gradients add up; the critic's too
    finish_step  -> all ranks at once: one optimizer step, weights published
                 -> metrics
    step         the last two

Who waits for whom: the caller for its answer, one at a time; the ranks for each other, inside collectives. So when one
of them dies or is stuck all are: the one to blame is looked for, its last words are the error, and all ranks are ended.
A rank that works says what it is at layer by layer (progress.py), so that one that is stuck is noticed within
`learner.stall_timeout_s` however long a pass takes.
Nothing is trained while the caller generates, unless it sends groups as they finish.
"""

import asyncio
import importlib.metadata
import itertools
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Collection, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from l0fast.config import RunConfig
from l0fast.errors import LearnerError, UsageError
from l0fast.garbage import drop
from l0fast.ipc import SharedBytes, SharedWeights, Worker, shared_bytes, spawn_worker
from l0fast.learner.advantage import (
    RunningMean,
    Values,
    compute_advantages,
    critic_targets,
    number_turns,
    values_of_turns,
)
from l0fast.learner.mismatch import judge
from l0fast.learner.packing import Pack, balance, cut, loss_denominator, pack_rows, payload_bytes, row_of, write_payload
from l0fast.segments import segments_of
from l0fast.types import Group

Advantages = list[list[np.ndarray]]
"""[group][trajectory] -> [turns]"""

PROFILE = "torch_rank_{}.json"
"""Of one step of a rank, in the run's folder."""
BLAME_S = 2.0
"""Time that other ranks get to fail too, once one has: the first to say so may only have lost the one that died [s]."""

T = TypeVar("T")
_DEVICES = Path("/dev")


@dataclass(slots=True)
class _Batch:
    """What was sent since the last step."""

    denominator: float = 0.0
    advantages: list[np.ndarray] = field(default_factory=list)
    num_parts: int = 0
    """Optimizer steps it is cut into."""
    pack_s: float = 0.0
    busy_s: float = 0.0


@dataclass(slots=True, kw_only=True)
class Sending:
    """Weights on their way by process groups."""

    policy_version: int
    offer: dict[str, Any]
    """`ports`, one an engine; `backend`, `dtype`, and `buckets`: for each the names and shapes of its tensors."""
    failures: list[str | None] = field(default_factory=list)
    """When all is sent: for each engine why it did not get all of it, None where it did."""


class LearnerClient:
    """A running learner. Made by `learner`."""

    def __init__(self, config: RunConfig, workers: Sequence[Worker], packs: SharedBytes):
        self.parameters: int = workers[0].ready["parameters"]
        """Of the policy; tied ones count once."""
        self.device: str = workers[0].ready["device"]
        """What the ranks compute on: "cpu" or "cuda"."""
        self.pids = tuple(worker.pid for worker in workers)
        self._config, self._workers, self._packs = config, workers, packs
        self._batch = _Batch()
        self.policy_version = 0
        """Of the weights the ranks hold."""
        self._lock = asyncio.Lock()
        self._failure: str | None = None

    def state(self) -> str:
        """What each rank said last that it is at, and whether it can run."""
        said = [(w.name, w.sign.doing or "waits for a request", w.held) for w in self._workers]
        return self._failure or "; ".join(f"{name}: {', '.join(filter(None, words))}" for name, *words in said)

    async def values(self, groups: Sequence[Group]) -> Values:
        """What the critic, as the last step left it, expects of each turn; for `batch_advantages` and `accumulate`.

        Raises:
            LearnerError: a rank failed, died or missed its deadline; there is no critic.
            ValueError: as `accumulate`.
        """
        async with self._lock:
            numbers, answers, _ = await self._send("values", groups, number_turns(groups))
        said = [np.empty(0), *(np.frombuffer(answer["payload"], np.float32) for answer in answers)]
        return values_of_turns(groups, np.concatenate([np.empty(0), *numbers]), np.concatenate(said))

    async def step(
        self, groups: Sequence[Group], advantages: Advantages, policy_version: int, *, values: Values | None = None
    ) -> dict[str, Any]:
        """`accumulate` and `finish_step`."""
        await self.accumulate(groups, advantages, values=values)
        return await self.finish_step(policy_version)

    async def accumulate(
        self, groups: Sequence[Group], advantages: Advantages, *, values: Values | None = None
    ) -> None:
        """Forward and backward on these groups; the weights stay as they are until `finish_step`.

        Groups that come together are taken in the order of their numbers, whatever order they are in here.

        Args:
            advantages: as `batch_advantages` makes them.
            values: as `values` gave them; needed where there is a critic, which learns what it should have said.

        Raises:
            LearnerError: a rank failed, died or missed its deadline.
            ValueError: a group that can't be trained on: a turn without its log-probs, or with an empty prompt; no values
                where they are needed.
        """
        async with self._lock:
            order = sorted(range(len(groups)), key=lambda i: groups[i].number)
            if self._config.learner.critic != "none":
                returns = critic_targets(groups, self._config.learner, values)
                await self._send("fit", [groups[i] for i in order], [returns[i] for i in order])
            groups, advantages = [groups[i] for i in order], [advantages[i] for i in order]
            _, _, denominator = await self._send("accumulate", groups, advantages)
            self._batch.denominator += denominator
            self._batch.advantages += [turns for per_trajectory in advantages for turns in per_trajectory]

    async def finish_step(self, policy_version: int) -> dict[str, Any]:
        """One optimizer step on what was accumulated; when it returns, the weights are published under `policy_version`.

        Returns:
            What `PolicyModel.finish_step` and `CriticModel.finish_step` report (None for a number that is not finite), with advantages_mean and
            advantages_std over turns, mismatch_warning, minibatches_warning and checkpoint_warning (a sentence or None: the
            last of a checkpoint that could not be written), pack_s (making the packs) and step_s (everything the learner was asked for since the last step) [s].

        Raises:
            LearnerError: a rank failed, died or missed its deadline; the engine samples from another policy than is
                trained (`learner.mismatch_stop`).
            ValueError: no sampled token in all that was accumulated.
        """
        async with self._lock:
            start = time.perf_counter()
            batch, self._batch = self._batch, _Batch()
            if not batch.denominator:
                raise ValueError("the groups of this step hold no sampled token, so there is nothing to learn from")
            answers = await self._ask("finish_step", denominator=batch.denominator, policy_version=policy_version)
            self.policy_version = policy_version
        metrics = answers[0]["metrics"]
        turns = np.concatenate(batch.advantages)
        return {
            **metrics,
            "advantages_mean": float(turns.mean()),
            "advantages_std": float(turns.std()),
            "mismatch_warning": judge(metrics, self._config.learner),
            "minibatches_warning": _too_few(batch.num_parts, self._config.learner.minibatches),
            "pack_s": batch.pack_s,
            "step_s": batch.busy_s + time.perf_counter() - start,
        }

    async def buckets(self, ranks: Collection[int]) -> AsyncIterator[list[str]]:
        """The weights as the last step left them, bucket by bucket: a payload of each rank, for an engine on its GPU to read.

        What `SGLangEngine.update_weights` takes. The ranks keep all of it, in bf16, until the next call or `free_memory`.

        Args:
            ranks: those whose payloads will be read; others give "", since torch never frees what it shared unread.
        """
        async with self._lock:
            first = True
            while True:
                answers = await self._ask("export", first=first, ranks=list(ranks))
                first, buckets = False, [answer["bucket"] for answer in answers]
                if buckets[0] is None:
                    return
                yield buckets

    @asynccontextmanager
    async def broadcast(self, engines: int, *, ranks: int, wait_s: float) -> AsyncIterator[Sending]:
        """Rank 0 sends the weights as the last step left them to engines on other GPUs, while the block runs.

        Args:
            engines: which are to join the process groups that are yielded, one each.
            ranks: of each engine.
            wait_s: time that rank 0 waits for an engine, at each bucket; then it goes on without it [s].

        Raises:
            LearnerError: as `accumulate`; the block is cancelled then.
        """
        async with self._lock:
            answers = await self._ask("offer", engines=engines, ranks=ranks, wait_s=wait_s)
            sending = Sending(policy_version=self.policy_version, offer=answers[0]["offer"])
            try:
                async with asyncio.TaskGroup() as tg:
                    work = tg.create_task(self._ask("send", wait_s=wait_s))
                    yield sending
            except BaseExceptionGroup as e:
                raise e.exceptions[0] from e.exceptions[0].__cause__
            sending.failures = work.result()[0]["failures"]

    async def free_memory(self, *, empty_cache: bool) -> None:
        """The ranks let go of the buckets; with `empty_cache` also of what their allocators keep for the next step."""
        async with self._lock:
            await self._ask("free_memory", empty_cache=empty_cache)

    async def save(self, path: Path) -> None:
        """Write the policy as a model folder in Hugging Face form. Raises LearnerError."""
        async with self._lock:
            await self._ask("save", path=str(path))

    async def save_checkpoint(self, path: Path, driver_state: dict[str, Any]) -> None:
        """Write all that going on from here takes, `driver_state` (JSON-like) included, to a folder; between two steps.

        Returns when the state is copied. It is written while training goes on, and has its name when it is complete; the
        oldest in the same folder beyond `checkpoint.keep` then go. That it could not be written `finish_step` tells, or `close`.

        Raises:
            LearnerError: a rank failed.
        """
        async with self._lock:
            await self._ask(
                "save_checkpoint", path=str(path), driver_state=driver_state, policy_version=self.policy_version
            )

    async def load_checkpoint(self, path: Path) -> None:
        """Go back to a checkpoint, saved by any number of ranks, and publish its weights under the version they had.

        Raises:
            LearnerError: a rank failed, or it is no checkpoint of this model.
        """
        async with self._lock:
            answers = await self._ask("load_checkpoint", path=str(path))
            self.policy_version, self._batch = answers[0]["policy_version"], _Batch()

    async def close(self) -> None:
        """Wait until the last checkpoint is written. Nothing to do where a rank has failed. Raises LearnerError: it can't be."""
        async with self._lock:
            if self._failure is None:
                await self._ask("wait_checkpoint")

    async def _send(
        self, op: str, groups: Sequence[Group], numbers: Advantages
    ) -> tuple[list[np.ndarray], list[dict[str, Any]], float]:
        """Ask ranks for `op` on these groups, with a number for each turn: its advantage, or what else `op` is about.

        Returns:
            of each pack, rank by rank, the sampled tokens' numbers; the ranks' answers, none where no token was sampled;
            the loss denominator.
        """
        start = time.perf_counter()
        dealt, where, denominator = await asyncio.to_thread(self._deal, groups, numbers)
        self._batch.pack_s += time.perf_counter() - start
        self._batch.num_parts = max(self._batch.num_parts, len(where["bounds"][0]) - 1)
        answers = await self._ask(op, **where) if dealt else []
        self._batch.busy_s += time.perf_counter() - start
        return dealt, answers, denominator

    def _deal(self, groups: Sequence[Group], numbers: Advantages) -> tuple[list[np.ndarray], dict[str, Any], float]:
        """Packs into shared memory: as `_send` says the numbers, what ranks need to find their packs, and the loss denominator."""
        num_ranks = len(self._workers)
        parts, denominator = batch_packs(groups, numbers, self._config, num_ranks)
        dealt = [balance(packs, num_ranks) for packs in parts]
        flat, bounds = [], []
        for rank in range(num_ranks):
            bounds.append([len(flat)])
            for part in dealt:
                flat += part[rank]
                bounds[rank].append(len(flat))
        num_bytes = payload_bytes(flat)
        write_payload(flat, self._packs.reserve(num_bytes))
        in_order = [pack.advantages for pack in flat]
        del parts, dealt
        drop(flat)
        return in_order, {"num_bytes": num_bytes, "bounds": bounds}, denominator

    async def _ask(self, op: str, **fields: Any) -> list[dict[str, Any]]:
        """All ranks at once; their answers in order, payload included. After a failure there are no ranks to ask any more."""
        if self._failure is not None:
            raise LearnerError(self._failure)
        # until the first sign of progress; what takes longer says so
        timeout_s = self._config.learner.stall_timeout_s
        calls = [asyncio.create_task(worker.call(op, timeout_s=timeout_s, **fields)) for worker in self._workers]
        try:
            done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
            if any(call.exception() for call in done):
                await asyncio.wait(calls, timeout=BLAME_S)
                error = self._blame(calls)
                self._failure = str(error)
                raise error
            return [header | {"payload": payload} for header, payload in (call.result() for call in calls)]
        finally:
            for call, worker in zip(calls, self._workers, strict=True):
                call.cancel()
                if self._failure is not None:
                    worker.kill()
            await asyncio.gather(*calls, return_exceptions=True)

    def _blame(self, calls: Sequence[asyncio.Task[Any]]) -> BaseException:
        """Who died, or else who failed, or else who is stuck."""
        ended = [
            (w, error)
            for w, call in zip(self._workers, calls, strict=True)
            if call.done() and (error := call.exception())
        ]
        dead = [error for worker, error in ended if worker.dead]
        answered = [error for _, error in ended if not isinstance(error.__cause__, TimeoutError)]
        if dead or answered:
            return [*dead, *answered][0]
        # of those who have not answered, who is stopped, or else who came least far: the others wait for it
        silent = [w for w, call in zip(self._workers, calls, strict=True) if not call.done() or call.exception()]
        fewest = min(worker.sign.given for worker in silent)
        stuck = [w for w in silent if w.held] or [w for w in silent if w.sign.given == fewest]
        others = f"; {len(silent) - len(stuck)} more wait for it" if len(stuck) < len(silent) else ""
        how = (
            f"{' and '.join(worker.name for worker in stuck)} made no progress{others} (a machine on which a layer takes "
            f"longer than {self._config.learner.stall_timeout_s:g} s needs a higher --learner.stall-timeout-s):"
        )
        ended.sort(key=lambda one: one[0] not in stuck)
        return LearnerError("\n".join([how, *(str(error) for _, error in ended)]))


def batch_advantages(
    groups: Sequence[Group],
    config: RunConfig,
    policy_version: int,
    *,
    running: RunningMean | None = None,
    values: Values | None = None,
) -> Advantages:
    """Advantages of the batch that leads to `policy_version`: [group][trajectory] -> [turns]."""
    # its own stream a step, so that a run that goes on later permutes as the uninterrupted one did
    rng = np.random.default_rng([config.seed, policy_version])
    return compute_advantages(groups, config.learner, rng, running=running, values=values)


def batch_packs(
    groups: Sequence[Group], advantages: Advantages, config: RunConfig, num_ranks: int = 1
) -> tuple[list[list[Pack]], float]:
    """The packs of some groups, of each optimizer step's part of them, and their share of the loss denominator.

    No part where they hold no sampled token.
    """
    learner, rollout = config.learner, config.rollout
    rows = [
        [
            row_of(segment, trajectory, turns, learner.loss_mean)
            for trajectory, turns in zip(group.trajectories, per_trajectory, strict=True)
            for segment in segments_of(trajectory)
        ]
        for group, per_trajectory in zip(groups, advantages, strict=True)
    ]
    parts = [
        pack_rows(part, learner.pack_tokens, share_prefixes=True, num_ranks=num_ranks)
        for part in cut(rows, learner.minibatches)
    ]
    drop(rows)
    token_limit = rollout.max_turns * config.agent.max_new_tokens
    packs = [pack for part in parts for pack in part]
    return parts, loss_denominator(packs, groups, learner.loss_mean, token_limit)


def _too_few(num_parts: int, minibatches: int) -> str | None:
    """What is to be said of a batch that could not be cut into as many parts as were asked for."""
    if num_parts >= minibatches:
        return None
    return (
        f"learner.minibatches = {minibatches}, but rows in the batch are as few as {num_parts}, an optimizer step each; "
        "more come with a higher --rollout.groups-per-step or --rollout.group-size"
    )


def _profile(config: RunConfig, log_dir: Path | None, rank: int) -> dict[str, Any] | None:
    """Which step a rank writes a profile of, and where, if any."""
    if not config.trace.torch_step or log_dir is None:
        return None
    return {"path": str(log_dir / PROFILE.format(rank)), "step": config.trace.torch_step}


@asynccontextmanager
async def learner(
    config: RunConfig, model_path: Path, *, weights: SharedWeights | None, log_dir: Path | None, on_gpus: bool = False
) -> AsyncIterator[LearnerClient]:
    """Run the learner for as long as the `async with` body runs.

    Args:
        model_path: the start model; also the frozen reference when `learner.kl_coef` > 0.
        weights: where new weights go; on entering it holds the start weights, as version 0. None where engines take
            `LearnerClient.buckets` instead.
        log_dir: folder for the ranks' logs, learner.log (learner_1.log, ... of further ranks); None keeps their words
            for errors only.
        on_gpus: on CPUs it is refused.

    Raises:
        UsageError: more ranks than GPUs, or GPUs that torch can't use.
        LearnerError: it does not start, or can't write the last checkpoint.
    """
    world = num_ranks(config)
    with socket.create_server(("127.0.0.1", 0)) as rendezvous, shared_bytes("l0fast-packs") as packs:

        def rank(number: int) -> AbstractAsyncContextManager[Worker]:
            return spawn_worker(
                "l0fast.learner.rank",
                args={
                    "config": config.learner.model_dump(),
                    "keep_checkpoints": config.checkpoint.keep,
                    "model_path": str(model_path),
                    "num_steps": config.num_steps,
                    "temperature": config.rollout.temperature,
                    "max_row": config.agent.context_tokens,
                    "seed": config.seed,
                    "on_gpus": on_gpus,
                    "meets_engines": config.engine.weights == "group",
                    # engines read it where it lies (`buckets`)
                    "lends_memory": weights is None and config.engine.weights in ("auto", "ipc"),
                    "rank": number,
                    "world": world,
                    "port": rendezvous.getsockname()[1],
                    "listen_fd": rendezvous.fileno(),
                    "weights": weights and weights.handle(),
                    "packs_fd": packs.fd,
                    "profile": _profile(config, log_dir, number),
                },
                name=f"learner rank {number}" if world > 1 else "learner",
                error=LearnerError,
                start_timeout_s=config.learner.start_timeout_s,
                stderr_path=log_dir and log_dir / (f"learner_{number}.log" if number else "learner.log"),
                pass_fds=[
                    packs.fd,
                    *([] if weights is None else [weights.fd]),
                    *([] if number else [rendezvous.fileno()]),
                ],
            )

        async with _all_open([rank(number) for number in range(world)]) as workers:
            client = LearnerClient(config, workers, packs)
            try:
                yield client
            finally:
                await client.close()


def num_ranks(config: RunConfig) -> int:
    """How many ranks a run has: one a GPU, or as set. Raises UsageError for more than there are GPUs."""
    gpus, wanted = num_gpus(), config.learner.ranks
    if gpus and wanted > gpus:
        raise UsageError(
            f"learner.ranks = {wanted} but this process may use {gpus} GPUs, and each rank takes one: set "
            f"--learner.ranks to {gpus} or less, or CUDA_VISIBLE_DEVICES"
        )
    return wanted or gpus or 1


def num_gpus() -> int:
    """GPUs that torch will find here, without importing it: none for its CPU build."""
    try:
        if importlib.metadata.version("torch").endswith("+cpu"):
            return 0
    except importlib.metadata.PackageNotFoundError:
        return 0
    # those of other jobs are seen, too; the scheduler's cgroup keeps them closed
    files = (path for path in _DEVICES.glob("nvidia[0-9]*") if path.name[6:].isdigit())
    found = sum(os.access(path, os.R_OK | os.W_OK) for path in files)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    # the first name that is none hides all that follow, as Slurm's NoDevFiles
    names = itertools.takewhile(lambda name: _is_gpu(name, found), map(str.strip, visible.split(",")))
    return min(found, len([*names]))


def _is_gpu(name: str, found: int) -> bool:
    return name.startswith(("GPU-", "MIG-")) or (name.isdecimal() and int(name) < found)


@asynccontextmanager
async def _all_open(managers: Sequence[AbstractAsyncContextManager[T]]) -> AsyncIterator[list[T]]:
    """Enter them at the same time, and leave them at the same time."""
    entered: list[AbstractAsyncContextManager[T]] = []

    async def enter(manager: AbstractAsyncContextManager[T]) -> T:
        value = await manager.__aenter__()
        entered.append(manager)
        return value

    try:
        yield await _together(map(enter, managers))
    finally:
        await _together(manager.__aexit__(None, None, None) for manager in entered)


async def _together(work: Iterable[Awaitable[T]]) -> list[T]:
    """The results; what fails first cancels the others, and is raised."""

    async def one(awaitable: Awaitable[T]) -> T:
        return await awaitable

    try:
        async with asyncio.TaskGroup() as tg:
            tasks = [tg.create_task(one(awaitable)) for awaitable in work]
    except BaseExceptionGroup as e:
        raise e.exceptions[0] from e.exceptions[0].__cause__
    return [task.result() for task in tasks]
