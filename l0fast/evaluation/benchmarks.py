"""What an evaluation asks: sources of questions, or the held-out part of a world that ships, which has its own search."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from l0fast.config import TaskConfig
from l0fast.errors import UsageError
from l0fast.seeding import derive_seed
from l0fast.tasks.curriculum import Worlds
from l0fast.tasks.sources import load_source, must_differ, parse_source
from l0fast.tasks.world import World
from l0fast.types import Task

WORLDS = ("geography", "invented")


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    name: str
    tasks: tuple[Task, ...]
    corpus: Sequence[str] | None = None
    """What its own `search` looks through; None where agents have the tools that were named."""
    world: World | None = None
    """Whose demonstrations a simulated engine can play."""
    report: str = ""
    """A line about what was read."""


def load_benchmark(text: str, config: TaskConfig, num_questions: int) -> Benchmark:
    """`geography`, `invented`, or a source (tasks/sources.py); of more questions than asked for the same ones always.

    Args:
        num_questions: 0 for all.

    Raises:
        UsageError: a source that can't be read, or a world that hasn't so many.
    """
    if text in WORLDS:
        worlds = Worlds(config.model_copy(update={"kind": text, "variant_share": 0.0}))
        try:
            tasks = tuple(worlds.heldout(num_questions or 600))
        except ValueError as e:
            raise UsageError(f"--questions {num_questions}: {e}") from e
        return Benchmark(name=text, tasks=tasks, corpus=worlds.corpora[worlds.evaluation], world=worlds.worlds[0])
    source = load_source(parse_source(text), "eval")
    tasks = list(source.tasks)
    if num_questions and num_questions < len(tasks):
        random.Random(derive_seed(0, "benchmark", source.name)).shuffle(tasks)
        tasks = tasks[:num_questions]
    return Benchmark(name=source.name, tasks=tuple(tasks), report=source.report())


def load_benchmarks(texts: Sequence[str], config: TaskConfig, num_questions: int) -> list[Benchmark]:
    """Raises UsageError for one that can't be read, and for two of one name."""
    benchmarks = [load_benchmark(text, config, num_questions) for text in texts]
    must_differ("benchmarks", [benchmark.name for benchmark in benchmarks])
    return benchmarks
