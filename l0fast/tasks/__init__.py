"""Task sources and their rewards: where questions come from, and what an answer is worth."""

from l0fast.config import TaskConfig
from l0fast.tasks.geography import geography, permuted_world
from l0fast.tasks.invented import invented_world
from l0fast.tasks.world import World


def load_world(config: TaskConfig) -> World:
    """The world that `config` asks for. Raises UsageError where the real one's table is missing or broken."""
    if config.kind == "geography":
        return geography()
    return invented_world(config.world_seed)


def load_variants(config: TaskConfig) -> list[World]:
    """Worlds of the same shapes and none of the facts, for training beside the one that `config` asks for."""
    if not config.variant_share:
        return []
    if config.kind == "geography":
        return [permuted_world(seed) for seed in range(config.num_variants)]
    return [invented_world(config.world_seed + 1 + n) for n in range(config.num_variants)]
