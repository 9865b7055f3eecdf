"""A critic: what the rest of an episode will earn, judged from the hidden state before a sampled token.

    head    V = w . stop(h) + b     h: the policy's last hidden state; nothing flows back into the policy
    copy    V = w . h' + b          h': that of a second model, which starts as the policy did and is trained on values alone
    loss    1/2 max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2)      summed over tokens, weights included

R is GAE's return of the token's turn (advantage.critic_targets), the same for each of its tokens; what the advantages are
made of is V at a turn's first token (advantage.values_of_turns). w and b start at 0: until it has learned something the
critic says 0, and GAE is a discounted sum of rewards.

A step asks it twice, with the same packs: `values_of` before there are advantages, then `accumulate` with the returns where
advantages lie, and `finish_step`. Ranks go through the same number of packs, as the policy's do.

Clipped value loss: Schulman et al.'s PPO code, described in Engstrom et al., "Implementation Matters in Deep RL",
https://arxiv.org/abs/2005.12729, section 3. Like the ratio's clip it takes hold from a batch's second optimizer step on.

Shape letters, this file only: R sampled tokens, D hidden size.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from l0fast.learner.loading import load_model, local_part
from l0fast.learner.packing import Pack, filled
from l0fast.learner.policy_model import PolicyModel, not_taken


class ValueHead(nn.Module):
    """One number from a hidden state. fp32, whatever the backbone computes in: values are differences of small numbers."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_RD: Tensor) -> Tensor:
        """[R] float32"""
        # of one number: [:, 0] would be a view, which FSDP2 warns of in what a module returns
        return self.linear(hidden_RD.float()).sum(1)


def value_loss(
    values_R: Tensor, returns_R: Tensor, loss_weights_R: Tensor, *, old_values_R: Tensor | None = None, clip: float
) -> tuple[Tensor, Tensor]:
    """Summed value loss of R sampled tokens, differentiable in `values_R`.

    Args:
        values_R, returns_R, loss_weights_R: [R] float32; weight 0 masks a token.
        old_values_R: [R], of the critic before the first optimizer step on this batch; None while there was none.
        clip: largest useful distance from the old value, `learner.value_clip`.

    Returns:
        The sum over tokens (divide it as the policy's), and where the clip was the loss (1) or not (0), [R].

    Raises:
        ValueError: shapes that don't fit.
    """
    per_token = {"returns": returns_R, "loss_weights": loss_weights_R, "old_values": old_values_R}
    for name, given in per_token.items():
        if given is not None and given.shape != values_R.shape:
            raise ValueError(
                f"{name} has shape {list(given.shape)} but values {list(values_R.shape)}; give one for each"
            )
    old_R = values_R.detach() if old_values_R is None else old_values_R
    plain = (values_R - returns_R).square()
    clipped = (old_R + (values_R - old_R).clamp(-clip, clip) - returns_R).square()
    loss = 0.5 * (loss_weights_R * torch.maximum(plain, clipped)).sum()
    return loss, (clipped > plain).to(values_R.dtype).detach()


class CriticModel:
    """The critic of one rank, beside its policy, and an optimizer of its own.

    `trained` and `optimizer` are what a checkpoint keeps; with "copy" the first are sharded as the policy's are.
    """

    def __init__(self, policy: PolicyModel):
        self._policy, self._config, self._place = policy, policy.config, policy.place
        assert self._config.critic != "none", "there is no critic to make"
        self._copy = load_model(policy.model_path, self._config, self._place) if self._config.critic == "copy" else None
        # each rank has the whole of it: it is one row
        self.head = ValueHead(policy.model.config.hidden_size).to(self._place.device)
        backbone = {} if self._copy is None else dict(self._copy.model.model.named_parameters(prefix="model"))
        backbone = {name: p for name, p in backbone.items() if p.requires_grad}
        head = dict(self.head.named_parameters(prefix="head"))
        self.trained = backbone | head
        # apart, for an optimizer takes no sharded tensors and whole ones in one go
        groups = [{"params": list(group.values())} for group in (backbone, head) if group]
        self.optimizer = torch.optim.AdamW(
            groups, lr=self._config.critic_lr, betas=self._config.betas, weight_decay=0.0
        )
        for p in self.trained.values():
            # as AdamW itself would make it at its first step: a checkpoint from before that is like any other
            moments = {name: torch.zeros_like(p, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32), **moments}
        self._progress = policy.progress
        if self._copy is not None:
            self._progress.watch(self._copy, "critic")
        self._held: defaultdict[int, list[tuple[Pack, Tensor]]] = defaultdict(list)
        """By part of the batch."""
        self._sums = dict.fromkeys(_SUMS, 0.0)

    @torch.no_grad()
    def values(self, pack: Pack) -> Tensor:
        """[R] float32: what it expects before each sampled token. Every rank must ask for as many packs."""
        values = self._forward(pack)
        if self._copy is not None:
            self._copy.reshard()
        return values

    def values_of(self, packs: Sequence[Pack], num_packs: int) -> np.ndarray:
        """[sum of R] float32: `values` of this rank's packs, end to end; `num_packs` is the most that any rank has."""
        values = [self.values(pack) for pack in self._progress.packs(filled(packs, num_packs))]
        return np.concatenate([np.empty(0, np.float32), *(v.cpu().numpy() for v in values[: len(packs)])])

    def accumulate(self, packs: Sequence[Pack], num_packs: int | None = None, part: int = 0) -> None:
        """Add the gradients of these packs, or keep them for the step if a batch gets several.

        Args:
            packs: this rank's, with the returns in place of the advantages.
            num_packs: the most that any rank has.
            part: as the policy's.
        """
        for pack in self._progress.packs(filled(packs, num_packs or len(packs))):
            if self._config.minibatches > 1:
                self._held[part].append((copy.deepcopy(pack), self.values(pack)))
            else:
                self._forward_backward(pack, None)

    def finish_step(self, denominator: float) -> dict[str, Any]:
        """One optimizer step, or `learner.minibatches`, on what was accumulated. A step that is not finite is not taken.

        Returns:
            critic_loss (mean squared error / 2), critic_explained (share of the returns' variance that the values
            explain: 1 all, 0 none, below 0 worse than their mean), critic_clip_fraction, critic_grad_norm before
            clipping (of several steps the largest, and not finite where one of them is not); where a step was not taken
            also critic_skipped, why. The same on all ranks.
        """
        parts = [self._held[part] for part in sorted(self._held)]
        norms, skipped = [], []
        for number, part in enumerate(parts or [()], 1):
            for pack, old_values in self._progress.packs(part):
                self._forward_backward(pack, old_values)
            norms.append(norm := self._optimize(denominator / max(1, len(parts))))
            if not math.isfinite(norm):
                skipped.append(not_taken(f"the critic's gradient norm {norm:g}", number, len(parts)))
        sums = dict(zip(_SUMS, self._place.summed([self._sums[name] for name in _SUMS]), strict=True))
        self._held.clear()
        self._sums = dict.fromkeys(_SUMS, 0.0)
        return {
            **_metrics(**sums),
            # max() would pass over nan
            "critic_grad_norm": float(np.max(norms)),
            **({"critic_skipped": "; ".join(skipped)} if skipped else {}),
        }

    def discard(self) -> None:
        """Forget what was accumulated."""
        self.optimizer.zero_grad(set_to_none=True)
        self._held.clear()
        self._sums = dict.fromkeys(_SUMS, 0.0)

    def _forward(self, pack: Pack) -> Tensor:
        """[R] values, with a gradient where one is wanted."""
        policy = self._policy
        if self._copy is not None:
            return policy.run(self._copy, pack, lambda hidden, _: self.head(hidden))
        with torch.no_grad():
            hidden = policy.run(policy.root, pack, lambda hidden, _: hidden)
        policy.root.reshard()
        return self.head(hidden)

    def _forward_backward(self, pack: Pack, old_values: Tensor | None) -> None:
        values = self._forward(pack)
        returns, weights = (torch.from_numpy(a).to(values.device) for a in (pack.advantages, pack.loss_weights))
        loss, clipped = value_loss(values, returns, weights, old_values_R=old_values, clip=self._config.value_clip)
        loss.backward()
        with torch.no_grad():
            counts = weights > 0
            returns, errors = returns[counts].double(), (values[counts] - returns[counts]).double()
            seen = (counts, returns, returns.square(), errors, errors.square(), clipped[counts])
            for name, values_seen in zip(_SUMS, seen, strict=True):
                self._sums[name] += values_seen.sum().item()

    @torch.no_grad()
    def _optimize(self, denominator: float) -> float:
        """Scale, clip, step. Returns the gradient norm."""
        self._progress.optimizer_step(" of the critic")
        for p in self.head.parameters():
            if p.grad is not None and self._place.mesh is not None:
                # FSDP does so for the backbone, and averages; the head is in no shard
                dist.all_reduce(p.grad)
                p.grad /= self._place.world
        grads = [(p, local_part(p.grad)) for p in self.trained.values() if p.grad is not None]
        own = {id(p) for p in self.head.parameters()}
        # the head's, which every rank has, counts once
        squares = [g.double().square().sum().item() for p, g in grads if id(p) not in own]
        (total,) = self._place.summed([sum(squares)])
        total += sum(g.double().square().sum().item() for p, g in grads if id(p) in own)
        scale = self._place.world / denominator
        norm = math.sqrt(total) * scale if total >= 0 else math.nan
        if math.isfinite(norm):
            for _, g in grads:
                g *= scale * min(1.0, self._config.grad_clip / (norm + 1e-6))
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


_SUMS = ("tokens", "returns", "squared_returns", "errors", "squared_errors", "clipped")


def _metrics(
    tokens: float, returns: float, squared_returns: float, errors: float, squared_errors: float, clipped: float
) -> dict[str, float]:
    variance = squared_returns / tokens - (returns / tokens) ** 2
    unexplained = squared_errors / tokens - (errors / tokens) ** 2
    return {
        "critic_loss": 0.5 * squared_errors / tokens,
        "critic_explained": 1 - unexplained / variance if variance > 0 else 0.0,
        "critic_clip_fraction": clipped / tokens,
    }
