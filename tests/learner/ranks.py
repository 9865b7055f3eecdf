"""A program: one rank of several, as a plain process, for what a test of a driver's client can't see.

    python ranks.py RANK WORLD PORT LISTEN_FD FOLDER MODEL

FOLDER holds packs.bin, and one/ (a checkpoint of one rank). Rank 0 leaves seen.pt there; all ranks leave two/, a checkpoint,
and exported/.
"""

import sys
from pathlib import Path
from typing import Any

import torch

from l0fast.config import LearnerConfig
from l0fast.learner.checkpoint import Checkpoints, Unwritten
from l0fast.learner.critic import CriticModel
from l0fast.learner.loading import local_part, whole
from l0fast.learner.packing import Pack, balance, from_bytes
from l0fast.learner.policy_model import PolicyModel
from l0fast.learner.rank import process_group

CONFIG = LearnerConfig(kl_coef=0.1, tis_cap=0.0, grad_clip=1e9, lr=1e-2, warmup_steps=0, critic="copy")
MORE = CONFIG.model_copy(update={"activation_checkpointing": "on", "offload": "cpu"})
"""What must not change anything."""
HEAD = CONFIG.model_copy(update={"critic": "head", "critic_lr": 0.01})
LORA = CONFIG.model_copy(update={"lora_rank": 2})


def main(rank: int, world: int, port: int, listen_fd: int, folder: Path, model: Path) -> None:
    torch.set_num_threads(1)
    packs = from_bytes(bytearray((folder / "packs.bin").read_bytes()))
    dealt = balance(packs, world)
    with process_group("cpu", rank, world, port, listen_fd, 60):
        new = lambda config: PolicyModel(model, config, num_steps=10, temperature=1.0, rank=rank, world=world)  # noqa: E731
        mine = (dealt[rank], max(map(len, dealt)))
        seen: dict[str, Any] = {"gradients": gradients(new(CONFIG), *mine), "more": gradients(new(MORE), *mine)}

        seen["lora"] = after_a_step(new(LORA), *mine)
        seen["head"] = fitted(CriticModel(new(HEAD)), packs, *mine)
        policy = new(CONFIG)
        critic = CriticModel(policy)
        seen["shard"] = sum(local_part(p).numel() for p in policy.model.parameters())
        checkpoints = Checkpoints(policy, 5, critic)
        seen["copy"] = fitted(critic, packs, *mine)
        policy.accumulate(*mine)
        seen["metrics"] = policy.finish_step()
        seen["weights"] = published(policy)
        seen["buckets"] = {dtype: list(policy.buckets(5000, dtype)) for dtype in (torch.float32, torch.bfloat16)}
        policy.save(folder / "exported")
        # where rank 0 alone fails, so do all
        checkpoints.save(folder / "packs.bin" / "no folder", {}, policy_version=1)
        try:
            checkpoints.wait()
        except Unwritten as e:
            seen["unwritten"] = str(e)
        assert "unwritten" in seen
        checkpoints.save(folder / "two", {"of": "two"}, policy_version=1)
        # while it is written
        seen["next"] = after_a_step(policy, *mine)
        seen["next_copy"] = fitted(critic, packs, *mine)
        checkpoints.wait()
        seen["version"] = checkpoints.load(folder / "two")
        seen["again"] = after_a_step(policy, *mine)
        seen["again_copy"] = fitted(critic, packs, *mine)
        checkpoints.load(folder / "one")
        seen["of_one"] = published(policy)
        seen["copy_of_one"] = weights_of(critic)
        seen["next_of_one"] = after_a_step(policy, *mine)
        checkpoints.close()
        if rank == 0:
            torch.save(seen, folder / "seen.pt")


def gradients(policy: PolicyModel, packs: list[Pack], num_packs: int) -> dict[str, torch.Tensor]:
    """Of the sum, by name."""
    policy.accumulate(packs, num_packs)
    return {name: whole(p.grad) * policy.place.world for name, p in policy.trained.items() if p.grad is not None}


def after_a_step(policy: PolicyModel, packs: list[Pack], num_packs: int) -> dict[str, torch.Tensor]:
    policy.accumulate(packs, num_packs)
    policy.finish_step()
    return published(policy)


def fitted(critic: CriticModel, packs: list[Pack], mine: list[Pack], num_packs: int) -> dict[str, Any]:
    """What two steps of a critic said, with the packs' advantages for returns, and what they left.

    Two, for the first moves the head alone: while that is 0 the backbone has no gradient.
    """
    num_tokens = sum(len(pack.predictors) for pack in packs)
    metrics = []
    for _ in range(2):
        critic.accumulate(mine, num_packs)
        metrics.append(critic.finish_step(num_tokens))
    values = torch.from_numpy(critic.values_of(mine, num_packs))
    return {"metrics": metrics, "values": values, "weights": weights_of(critic)}


def weights_of(critic: CriticModel) -> dict[str, torch.Tensor]:
    return {name: whole(p).clone() for name, p in critic.trained.items()}


def published(policy: PolicyModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.weights()}


if __name__ == "__main__":
    main(*map(int, sys.argv[1:5]), *map(Path, sys.argv[5:7]))
