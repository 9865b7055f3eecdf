"""Demonstrations: the agent's own loop, played by a demonstrator that knows the plan and follows it half of the time.

The demonstrator is an `Engine`: episodes run through `NBAgent` and a real sandbox, so every prompt, id and output is what
the policy will see later. At each decision it makes the good move with probability `good_rate`, else one of the
mistakes small models make; what follows a mistake is again drawn the same way, so recoveries are shown too.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from l0fast.agent.chat import Chat
from l0fast.engine.base import EngineLoad, Sampled, Sampling
from l0fast.seeding import derive_seed
from l0fast.tasks.world import Plan, World


@dataclass(slots=True)
class Demonstrator:
    """An `Engine` that answers from plans. `conversation` starts with the task's id and a slash."""

    chat: Chat
    world: World
    plans: dict[str, Plan]
    good_rate: float
    seed: int
    _turns: dict[str, int] = field(default_factory=dict)

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, *, conversation: str) -> Sampled:
        turn = self._turns[conversation] = self._turns.get(conversation, 0) + 1
        rng = random.Random(derive_seed(self.seed, conversation, turn))
        plan = self.plans[conversation.split("/")[0]]
        text = demonstrate(plan, self.chat.decode(prompt_ids), self.world, rng, self.good_rate)
        ids = tuple(self.chat.response(text))[: sampling.max_new_tokens]
        return Sampled(response_ids=ids, sampler_logprobs=(0.0,) * len(ids), finish_reason="stop", policy_version=0)

    async def update_weights(self, policy_version: int) -> None:
        raise NotImplementedError("a demonstrator has no weights")

    async def load(self) -> EngineLoad:
        return EngineLoad(running=0, waiting=0, used_tokens=0, max_tokens=0)


def demonstrate(plan: Plan, seen: str, world: World, rng: random.Random, good_rate: float) -> str:
    """The next response to a conversation whose text is `seen`."""
    known = 0
    while known < len(plan.hops) and plan.hops[known].sentence in seen:
        known += 1
    return _good(plan, known) if rng.random() < good_rate else _mistake(plan, known, seen, world, rng)


def _turn(think: str, code: str) -> str:
    return f"<think>{think}</think><code>{code}</code>"


def _search(relation: str, query: str) -> str:
    return _turn(f"I need the {relation}.", f'search("{query}")')


def _submit(answer: str) -> str:
    return _turn("I found the answer.", f'submit_final_answer("{answer}")')


def _good(plan: Plan, known: int) -> str:
    if known == len(plan.hops):
        return _submit(plan.hops[-1].value)
    hop = plan.hops[known]
    return _search(hop.relation, hop.query)


def _mistake(plan: Plan, known: int, seen: str, world: World, rng: random.Random) -> str:
    hops = plan.hops
    hop = hops[min(known, len(hops) - 1)]
    query = hop.query
    made = [
        lambda: _search(hop.relation, hop.relation),
        lambda: _turn(f"I need the {hop.relation}.", f'lookup("{query}")'),
        lambda: _turn(f"I need the {hop.relation}.", f'search("{query})'),
        lambda: f'<think>I need the {hop.relation}.</think>search("{query}")',
        lambda: f'<think>I need the {hop.relation}.</think><code>search("{query}")',
        lambda: _turn("I do not know.", 'submit_final_answer("unknown")'),
    ]
    if known == 0:
        made += [lambda: _submit(world.guess(rng, hops[-1].relation))] * 3
    if 0 < known < len(hops):
        made += [lambda: _submit(hops[known - 1].value)] * 3
    if known < len(hops):
        made += [lambda: _search(other := world.other_relation(rng, hop), world.query(hop.entity, other))] * 2
    else:
        made += [lambda: _search(hop.relation, query)] * 2
        made += [lambda: _submit(hop.entity), lambda: _submit(hop.sentence)]
    return rng.choice(made)()
