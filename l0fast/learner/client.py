"""The learner as the event loop sees it: groups in, metrics out, new weights in shared memory. No torch.

    groups -> advantages -> segments -> rows -> packs -> bytes     in a thread: a batch takes tens of milliseconds
           -> rank (child process): one optimizer step, weights published
           -> metrics

Who waits for whom: the caller for its step; the rank for the next one. Nothing is trained while the caller generates.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from l0fast.config import RunConfig
from l0fast.errors import LearnerError
from l0fast.ipc import SharedWeights, Worker, spawn_worker
from l0fast.learner.advantage import compute_advantages
from l0fast.learner.packing import pack_rows, row_of, to_bytes
from l0fast.learner.segments import segments_of
from l0fast.types import Group

Advantages = list[list[np.ndarray]]
"""[group][trajectory] -> [turns]"""

START_TIMEOUT_S = 120.0
"""Time the child has to import torch and load the model [s]."""


class LearnerClient:
    """A running learner. Made by `learner`."""

    def __init__(self, config: RunConfig, worker: Worker):
        self.parameters: int = worker.ready["parameters"]
        """Of the policy; tied ones count once."""
        self.pid = worker.pid
        self._config, self._worker = config, worker

    async def step(self, groups: Sequence[Group], advantages: Advantages, policy_version: int) -> dict[str, Any]:
        """One optimizer step on these groups; when it returns, the weights are published under `policy_version`.

        Args:
            advantages: as `batch_advantages` makes them.

        Returns:
            What `PolicyModel.step` reports (None for a number that is not finite), with advantages_mean and
            advantages_std over turns, pack_s (making the packs) and step_s (everything) [s].

        Raises:
            LearnerError: the child failed, died or missed its deadline.
            ValueError: a group that can't be trained on: no rewards, no sampled token.
        """
        start = time.perf_counter()
        payload, stats = await asyncio.to_thread(batch_payload, groups, advantages, self._config.learner.pack_tokens)
        pack_s = time.perf_counter() - start
        header, _ = await self._worker.call(
            "step", memoryview(payload), timeout_s=self._config.learner.step_timeout_s, policy_version=policy_version
        )
        return {**header["metrics"], **stats, "pack_s": pack_s, "step_s": time.perf_counter() - start}

    async def save(self, path: Path) -> None:
        """Write the policy as a model folder in Hugging Face form. Raises LearnerError."""
        await self._worker.call("save", timeout_s=self._config.learner.step_timeout_s, path=str(path))


def batch_advantages(groups: Sequence[Group], config: RunConfig, policy_version: int) -> Advantages:
    """Advantages of the batch that leads to `policy_version`: [group][trajectory] -> [turns]."""
    # its own stream a step, so that a run that goes on later permutes as the uninterrupted one did
    return compute_advantages(groups, config.learner, np.random.default_rng([config.seed, policy_version]))


def batch_payload(
    groups: Sequence[Group], advantages: Advantages, pack_tokens: int
) -> tuple[bytearray, dict[str, float]]:
    """The packs of a batch, serialised, and what was seen of its advantages."""
    rows = [
        [
            row_of(segment, trajectory, turns)
            for trajectory, turns in zip(group.trajectories, per_trajectory, strict=True)
            for segment in segments_of(trajectory)
        ]
        for group, per_trajectory in zip(groups, advantages, strict=True)
    ]
    if not any(map(len, rows)):
        raise ValueError(
            f"the {len(groups)} groups of this step hold no sampled token, so there is nothing to learn from"
        )
    flat = np.concatenate([turns for per_trajectory in advantages for turns in per_trajectory])
    stats = {"advantages_mean": float(flat.mean()), "advantages_std": float(flat.std())}
    return to_bytes(pack_rows(rows, pack_tokens, share_prefixes=True)), stats


@asynccontextmanager
async def learner(
    config: RunConfig, model_path: Path, *, weights: SharedWeights, log_dir: Path | None
) -> AsyncIterator[LearnerClient]:
    """Run the learner for as long as the `async with` body runs.

    Args:
        model_path: the start model; also the frozen reference when `learner.kl_coef` > 0.
        weights: where new weights go; on entering it holds the start weights, as version 0.
        log_dir: folder for the child's log, learner.log; None keeps its words for errors only.

    Raises:
        LearnerError: it does not start.
    """
    async with spawn_worker(
        "l0fast.learner.rank",
        args={
            "config": config.learner.model_dump(),
            "model_path": str(model_path),
            "num_steps": config.num_steps,
            "temperature": config.rollout.temperature,
            "seed": config.seed,
            "weights": weights.handle(),
        },
        name="learner",
        error=LearnerError,
        start_timeout_s=START_TIMEOUT_S,
        stderr_path=None if log_dir is None else log_dir / "learner.log",
        pass_fds=(weights.fd,),
    ) as worker:
        yield LearnerClient(config, worker)
