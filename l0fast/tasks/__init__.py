"""Task sources and their rewards: where questions come from, and what an answer is worth."""

from l0fast.config import TaskConfig
from l0fast.tasks.geography import geography, respelled_world
from l0fast.tasks.invented import invented_world
from l0fast.tasks.world import World


def load_world(config: TaskConfig) -> World:
    """The world that `config` asks for. Raises UsageError where the real one's table is missing or broken."""
    if config.kind == "geography":
        return geography()
    return invented_world(config.world_seed)


def load_variants(config: TaskConfig) -> list[World]:
    """Worlds of the same shapes and none of the facts, for training beside the one that `config` asks for.

    For the real world by turns its training part with every name spelled anew, and invented ones.
    """
    num_variants = config.num_variants if config.variant_share else 0
    # far from the seeds that runs are likely to ask for
    seeds = range(config.world_seed + 10_000, config.world_seed + 10_000 + num_variants)
    respelled = config.kind == "geography"
    return [respelled_world(seed) if respelled and seed % 2 == 0 else invented_world(seed) for seed in seeds]
