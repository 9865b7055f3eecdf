"""What is counted on the way to an optimizer step, on one rank, and what it says of the step, on all of them.

Sums over tokens and packs, and seconds. Ranks add up their sums and take the longest of their seconds, so that the metrics of a
step are the same on every rank and do not depend on how packs were dealt.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from l0fast.learner.loading import Place
from l0fast.learner.mismatch import Mismatch
from l0fast.learner.packing import Pack
from l0fast_kernels.policy_head import HeadStats

COUNTS = ("tokens", "sampled_tokens", "packs")
MEANS = ("entropy", "kl", "clip_fraction")
"""Over tokens with a weight."""
SECONDS = ("reference_s", "old_logprobs_s", "forward_backward_s", "optimizer_s")


class Tally:
    """Since the last step."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = dict.fromkeys(("loss", *COUNTS, *MEANS), 0.0)
        self.seconds: dict[str, float] = dict.fromkeys(SECONDS, 0.0)
        self.mismatch = Mismatch()

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Add the wall clock of the `with` body to a part."""
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    def count(self, packs: Sequence[Pack]) -> None:
        """Packs that came."""
        self.sums["packs"] += len(packs)
        self.sums["tokens"] += sum(pack.num_tokens for pack in packs)
        self.sums["sampled_tokens"] += sum(int((pack.loss_weights > 0).sum()) for pack in packs)

    def add(self, pack: Pack, loss_sum: float, stats: HeadStats, old_logprobs: Tensor | None = None) -> None:
        """What the head said of one.

        Args:
            old_logprobs: [R], of the weights that the engine sampled from, where those of `stats` may be of later ones.
        """
        logprobs, entropy, kl, clipped = torch.stack([s.float() for s in stats]).cpu().numpy().astype(np.float64)
        counts = pack.loss_weights > 0
        self.sums["loss"] += loss_sum
        for name, values in zip(MEANS, (entropy, kl, clipped), strict=True):
            self.sums[name] += float(values[counts].sum())
        if old_logprobs is not None:
            logprobs = old_logprobs.cpu().numpy()
        self.mismatch.add(logprobs, pack.sampler_logprobs, pack.loss_weights, pack.turns)

    def reduced(self, place: Place) -> "Tally":
        """That of all ranks together, on each of them. A collective."""
        if place.mesh is None:
            return self
        sums = torch.tensor([*self.sums.values(), *self.mismatch.sums.flat], dtype=torch.float64, device=place.device)
        maxima = torch.tensor([*self.seconds.values(), *self.mismatch.maxima], dtype=torch.float64, device=place.device)
        dist.all_reduce(sums)
        dist.all_reduce(maxima, dist.ReduceOp.MAX)
        together = Tally()
        together.sums = dict(zip(self.sums, sums.tolist(), strict=False))
        together.seconds = dict(zip(self.seconds, maxima.tolist(), strict=False))
        together.mismatch.sums = sums[len(self.sums) :].view(self.mismatch.sums.shape).cpu().numpy()
        together.mismatch.maxima = maxima[len(self.seconds) :].cpu().numpy()
        return together

    def metrics(self, denominator: float | None) -> dict[str, Any]:
        """Means and counts. `denominator` of the loss: None for the tokens with a weight."""
        num_tokens = self.sums["sampled_tokens"]
        return {
            "loss": self.sums["loss"] / (num_tokens if denominator is None else denominator),
            **{name: int(self.sums[name]) for name in COUNTS},
            **{name: self.sums[name] / num_tokens for name in MEANS},
            **self.mismatch.metrics(),
            **self.seconds,
        }
