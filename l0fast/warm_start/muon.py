"""Muon: momentum, orthogonalised (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    m <- mu m + g;   u = g + mu m;   w <- w - lr * 0.2 sqrt(max(rows, columns)) * orthogonal(u)

0.2 sqrt(max) gives the update AdamW's usual RMS (Liu et al., arXiv 2502.16982, section 2.2). torch.optim.Muon iterates in
bf16, which a CPU without bf16 units computes thirty times slower than fp32; this one stays in fp32 and iterates all
matrices of a shape at once.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(u: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz towards U V^T of the last two dimensions' SVD; singular values end within about [0.7, 1.2]."""
    a, b, c = _QUINTIC
    tall = u.shape[-2] > u.shape[-1]
    x = u.mT if tall else u
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For 2-D parameters.

    Args:
        lr: in units of AdamW's.
        momentum: mu, Nesterov form.
        weight_decay: decoupled.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, *, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - takes no closure
        for group in self.param_groups:
            lr, mu = group["lr"], group["momentum"]
            shapes: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                grads = torch.stack([p.grad for p in params if p.grad is not None])
                state = self.state[params[0]]
                if not state:
                    state["momentum"] = torch.zeros_like(grads)
                state["momentum"].mul_(mu).add_(grads)
                update = orthogonalize(grads + mu * state["momentum"])
                scale = 0.2 * max(shape) ** 0.5
                for p, u in zip(params, update, strict=True):
                    p.mul_(1 - lr * group["weight_decay"]).add_(u, alpha=-lr * scale)
