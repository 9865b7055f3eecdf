"""Demonstrations: the agent's own loop, played by a demonstrator that knows the plan and follows it half of the time.

The demonstrator is the script of a simulated engine: episodes run through `NBAgent` and a real sandbox, so every prompt, id
and output is what the policy will see later. At each decision it makes the good move with probability `good_rate`, else
one of the mistakes small models make; what follows a mistake is drawn the same way, so recoveries are shown too.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from l0fast.agent.chat import Chat
from l0fast.engine.base import Sampling
from l0fast.seeding import derive_seed
from l0fast.tasks.facts import RELATIONS
from l0fast.tasks.world import Hop, Plan, World, world_of
from l0fast.types import Task


class Demonstrator:
    """A `Script` for questions of `worlds`. `conversation` is "<task id>/<index>/<seed>", as `NBAgent` names it.

    At temperature 0 every move is the good one.
    """

    def __init__(self, chat: Chat, worlds: Iterable[World] = (), *, good_rate: float, seed: int):
        self._chat, self._seed, self._good_rate = chat, seed, good_rate
        self._worlds: dict[str, tuple[World, Mistakes]] = {}
        for world in worlds:
            self.add(world)

    def add(self, world: World) -> None:
        """From now on also play questions of `world`."""
        self._worlds[world.name] = (world, Mistakes(world))

    def __call__(self, prompt_ids: Sequence[int], sampling: Sampling, conversation: str) -> Sequence[int]:
        task_id = conversation.rsplit("/", 2)[0]
        world, mistakes = self._worlds[world_of(task_id)]
        plan = world.plan(Task(id=task_id, question="", answers=()))  # the id says it all
        seen = self._chat.decode(prompt_ids)
        known = 0
        while known < len(plan.hops) and plan.hops[known].sentence in seen:
            known += 1
        rng = random.Random(derive_seed(self._seed, conversation, len(prompt_ids)))
        good = sampling.temperature == 0 or rng.random() < self._good_rate
        return self._chat.response(good_move(plan, known) if good else mistakes.draw(plan, known, rng))


def good_move(plan: Plan, known: int) -> str:
    """The response of a perfect agent that has seen the sentences of the first `known` hops."""
    if known == len(plan.hops):
        return _turn("I found the answer.", f'submit_final_answer("{plan.answer}")')
    return _turn(_need(plan, known), f'search("{plan.hops[known].query}")')


@dataclass(slots=True)
class Mistakes:
    """What small models do wrong, from a malformed block to an answer that was never looked up."""

    world: World
    _values: dict[str, list[str]] = field(init=False)
    _relations: dict[str, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self._values, self._relations = defaultdict(list), defaultdict(list)
        for fact in self.world.train_facts:
            self._values[fact.relation].append(fact.value)
            if fact.relation not in self._relations[fact.entity]:
                self._relations[fact.entity].append(fact.relation)

    def draw(self, plan: Plan, known: int, rng: random.Random) -> str:
        """A mistake of someone who has seen the sentences of the first `known` hops."""
        hops = plan.hops
        if known == len(hops):
            think, code = "I found the answer.", f'submit_final_answer("{plan.answer}")'
            last = hops[-1]
            search_again = _turn(_need(plan, known - 1), f'search("{last.query}")')
            mistakes = [
                *_malformed(think, code),
                _turn(think, f'answer("{plan.answer}")'),
                *[search_again] * 2,
                _turn(think, f'submit_final_answer("{last.entity}")'),
                _turn(think, f'submit_final_answer("{last.sentence}")'),
                _GIVE_UP,
            ]
            return rng.choice(mistakes)
        hop, think = hops[known], _need(plan, known)
        mistakes = [
            *_malformed(think, f'search("{hop.query}")'),
            _turn(think, f'lookup("{hop.query}")'),
            _turn(think, f'search("{hop.relation}")'),
            *[_turn(think, f'search("{self._other_query(hop, rng)}")')] * 2,
            *[_GIVE_UP] * 2,
        ]
        if known:
            mistakes += [_turn("I found the answer.", f'submit_final_answer("{hops[known - 1].value}")')] * 3
        else:
            guess = rng.choice(self._values[hops[-1].relation])
            mistakes += [_turn("I guess the answer.", f'submit_final_answer("{guess}")')] * 2
        return rng.choice(mistakes)

    def _other_query(self, hop: Hop, rng: random.Random) -> str:
        others = [name for name in self._relations[hop.entity] if name != hop.relation]
        name = rng.choice(others or [name for name in RELATIONS if name != hop.relation])
        return RELATIONS[name].query.format(e=hop.entity)


def _need(plan: Plan, known: int) -> str:
    on_the_way = known < len(plan.hops) - 1
    return f"I need the {'country' if on_the_way else plan.hops[known].relation}."


def _turn(think: str, code: str) -> str:
    return f"<think>{think}</think><code>{code}</code>"


def _malformed(think: str, code: str) -> list[str]:
    """An unterminated string, no <code>, no </code>."""
    return [
        _turn(think, code.replace('")', ")")),
        f"<think>{think}</think>{code}",
        f"<think>{think}</think><code>{code}",
    ]


_GIVE_UP = _turn("I do not know.", 'submit_final_answer("unknown")')
