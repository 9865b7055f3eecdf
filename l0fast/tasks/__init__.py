"""Task sources and their rewards: where questions come from, and what an answer is worth."""

from l0fast.config import TaskConfig
from l0fast.tasks.geography import geography
from l0fast.tasks.invented import invented_world
from l0fast.tasks.world import World


def load_world(config: TaskConfig) -> World:
    """The world that `config` asks for. Raises UsageError where the real one's table is missing or broken."""
    if config.kind == "geography":
        return geography()
    return invented_world(config.world_seed)
