"""What a run asks: training questions without end, held-out ones, and with which tools each is answered.

worlds that ship   every world has a search over its own corpus: its *scope*; training searches the training part, and
                   what is held out all of it
sources            files and data sets (sources.py); one scope, with the tools that the recipe names
"""

import random
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import zip_longest
from typing import Protocol

from l0fast.config import RunConfig, TaskConfig
from l0fast.seeding import derive_seed
from l0fast.tasks import load_variants, load_world
from l0fast.tasks.invented import invented_world
from l0fast.tasks.outcomes import outcome_shares, plain_outcome_shares
from l0fast.tasks.rewards import normalize_answer
from l0fast.tasks.sources import load_source, must_differ, parse_source, stream
from l0fast.tasks.world import World, world_of
from l0fast.types import Task, Trajectory

NAMED_TOOLS = ""
"""The scope of tools that the recipe names."""


class Curriculum(Protocol):
    worlds: Sequence[World]
    """Whose demonstrations a simulated engine can play; none of sources."""
    corpora: Mapping[str, Sequence[str]]
    """Scope -> the sentences its search looks through. A scope that is not here has the recipe's tools."""
    evaluation: str
    """The scope of held-out questions."""
    reports: Sequence[str]
    """Lines for people about what was read."""
    checks: Set[str]
    """By which answers in training are judged."""

    def questions(self, seed: int) -> Iterator[Task]:
        """Endless, and always the same. A task may come up again: groups are told apart by number, trajectories by seeds."""
        ...

    def scope(self, task: Task) -> str:
        """Of a training question."""
        ...

    def heldout(self, num_questions: int) -> list[Task]:
        """The same for every run with these settings; fewer where there are fewer."""
        ...

    def transfer(self, num_questions: int) -> dict[str, tuple[str, list[Task]]]:
        """What nothing was trained for: name -> scope, questions."""
        ...

    def outcomes(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """What became of them, in shares."""
        ...


def load_curriculum(config: RunConfig) -> Curriculum:
    """Read what `config.task` names. Blocks. Raises UsageError."""
    return Questions(config.task) if config.task.kind == "questions" else Worlds(config.task)


class Worlds:
    """A world that ships, with variants of it to train in."""

    def __init__(self, config: TaskConfig) -> None:
        self._config = config
        self._world, self._variants = load_world(config), load_variants(config)
        # invented names for a policy of the real world, and other invented ones for a policy of invented ones
        self._other = invented_world(config.world_seed + 1000 * (config.kind == "invented"))
        self.worlds: Sequence[World] = (self._world, *self._variants, self._other)
        self.evaluation, self._elsewhere = f"{self._world.name}, all", f"{self._other.name}, all"
        self.corpora: Mapping[str, Sequence[str]] = {
            **{world.name: world.train_corpus for world in (self._world, *self._variants)},
            self.evaluation: self._world.full_corpus,
            self._elsewhere: self._other.full_corpus,
        }
        self.reports: Sequence[str] = ()
        self.checks: Set[str] = {"exact_match"}

    def questions(self, seed: int) -> Iterator[Task]:
        config, rng = self._config, random.Random(derive_seed(seed, "questions"))
        while True:
            in_variant = self._variants and rng.random() < config.variant_share
            world = rng.choice(self._variants) if in_variant else self._world
            yield world.train_task(rng, two_hop_share=config.two_hop_share)

    def scope(self, task: Task) -> str:
        return world_of(task.id)

    def heldout(self, num_questions: int) -> list[Task]:
        return self._world.heldout_tasks(num_questions, two_hop_share=self._config.two_hop_share)

    def transfer(self, num_questions: int) -> dict[str, tuple[str, list[Task]]]:
        elsewhere = self._other.heldout_tasks(num_questions, two_hop_share=self._config.two_hop_share)
        return {
            "untrained_chains": (self.evaluation, self._world.untrained_chain_tasks(num_questions)),
            "other_world": (self._elsewhere, elsewhere),
        }

    def outcomes(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        by_name = {world.name: world for world in self.worlds}
        plans = {t.task.id: by_name[world_of(t.task.id)].plan(t.task) for t in trajectories}
        return outcome_shares(trajectories, plans)


class Questions:
    """Sources, mixed by weight."""

    def __init__(self, config: TaskConfig) -> None:
        self._train = [load_source(parse_source(text), "train") for text in config.train]
        self._eval = [load_source(parse_source(text), "eval") for text in config.eval]
        for sources in (self._train, self._eval):
            must_differ("sources", [source.name for source in sources])
        self.worlds: Sequence[World] = ()
        self.corpora: Mapping[str, Sequence[str]] = {}
        self.evaluation = NAMED_TOOLS
        self.checks: Set[str] = {task.check for source in self._train for task in source.tasks}
        self.reports: Sequence[str] = (*(source.report() for source in (*self._train, *self._eval)), *self._shared())

    def _shared(self) -> Iterator[str]:
        evaluated = [[normalize_answer(task.question) for task in source.tasks] for source in self._eval]
        trained = set[str]().union(*evaluated)
        trained &= {normalize_answer(task.question) for source in self._train for task in source.tasks}
        for source, questions in zip(self._eval, evaluated, strict=True):
            if shared := sum(question in trained for question in questions):
                yield (
                    f"{source.name}: {shared:,} of {len(questions):,} questions to evaluate on are trained on as well: where "
                    "that is not meant, give the same ?heldout_share=0.05 to both"
                )

    def questions(self, seed: int) -> Iterator[Task]:
        return stream(self._train, seed)

    def scope(self, task: Task) -> str:
        return NAMED_TOOLS

    def heldout(self, num_questions: int) -> list[Task]:
        """Of each source alike many, as far as it goes."""
        orders = []
        for source in self._eval:
            tasks = list(source.tasks)
            random.Random(derive_seed(0, "heldout", source.name)).shuffle(tasks)
            orders.append(tasks)
        return [task for dealt in zip_longest(*orders) for task in dealt if task][:num_questions]

    def transfer(self, num_questions: int) -> dict[str, tuple[str, list[Task]]]:
        return {}

    def outcomes(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        return plain_outcome_shares(trajectories)
