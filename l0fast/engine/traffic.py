"""Agents that are nothing but their figures, on simulated engines: what a node does with them, in event time.

    first prompt --> [gate] --> engine: prefill, decode --> tool --> next turn: its prompt has response and output more
                       ^                                     |
                       '----- after the last turn: another episode

No ids, no coroutines: a turn costs a third of what it does as a coroutine on a `SimulatedEngine`. It answers what lengths,
latencies, memory and admission come to; what a scheduler makes of recorded episodes, rollout/whatif.py does.

Every draw is a function of (seed, number of the episode, turn): who is faster than whom changes nothing in what is asked for.
"""

import random
from dataclasses import dataclass

from l0fast.engine.distributions import Distribution
from l0fast.engine.gate import Gate
from l0fast.engine.simulated_cluster import Cluster
from l0fast.engine.simulated_replica import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What agents ask for: parametric or recorded (distributions.py); numbers of tokens and turns are rounded down."""

    turns: Distribution
    """Of an episode; at least 1."""
    prompt_tokens: Distribution
    """The first one's; at least 1."""
    response_tokens: Distribution
    """Besides the last one, which ends it; cut at `max_new_tokens`."""
    max_new_tokens: int
    output_tokens: Distribution
    """What a prompt has more than the one before it and its response."""
    tool_s: Distribution


class Agents:
    """They play on the cluster for as long as its clock moves, each one on to its next episode at once."""

    def __init__(self, traffic: Traffic, cluster: Cluster, *, gate: Gate | None = None, seed: int = 0):
        """
        Args:
            gate: on the cluster's clock; None lets everybody in.
        """
        self.turns = self.episodes = 0
        """Ended so far."""
        self.traffic, self.cluster, self.clock, self.gate = traffic, cluster, cluster.clock, gate
        self._seed, self._number = seed, -1
        if gate is not None:
            gate.observe(cluster.load())

    def start(self, agents: int) -> None:
        """So many more."""
        for _ in range(agents):
            _Agent(self).begin()

    def next_episode(self) -> tuple[str, int]:
        """Returns its name and the seed of its draws."""
        self._number += 1
        return str(self._number), self._seed << 64 | self._number


class _Agent:
    __slots__ = ("_agents", "_conversation", "_known", "_left", "_random", "_request", "_seed", "_tokens")

    def __init__(self, agents: Agents):
        self._agents = agents
        # made once: to seed it is a tenth of what an episode costs
        rng = random.Random(0)
        self._seed, self._random = rng.seed, rng.random
        self._conversation = ""
        self._tokens = self._left = self._known = 0
        self._request: Request

    def begin(self) -> None:
        """Another episode."""
        self._conversation, seed = self._agents.next_episode()
        self._seed(seed)
        self._tokens = int(self._agents.traffic.prompt_tokens(self._random()))
        self._left = int(self._agents.traffic.turns(self._random()))
        self._known = 0
        self._ask()

    def _ask(self) -> None:
        traffic, gate = self._agents.traffic, self._agents.gate
        self._request = Request(
            conversation=self._conversation,
            prompt_tokens=self._tokens,
            response_tokens=min(1 + int(traffic.response_tokens(self._random())), traffic.max_new_tokens),
            max_new_tokens=traffic.max_new_tokens,
            matched_tokens=self._known,
        )
        if gate is None or gate.ask(self._conversation, self._tokens, self._go):
            self._go()

    def _go(self) -> None:
        self._agents.cluster.submit(self._request, self._answered)

    def _answered(self) -> None:
        agents, request = self._agents, self._request
        agents.turns += 1
        self._tokens += request.response_tokens
        # the last id sampled is never computed
        self._known = self._tokens - 1
        if (gate := agents.gate) is not None:
            gate.ran(self._conversation, self._tokens, request.cached_tokens)
            if gate.wants_load():
                gate.observe(agents.cluster.load())
        self._tokens += int(agents.traffic.output_tokens(self._random()))
        agents.clock.call_at(agents.clock.now_s + agents.traffic.tool_s(self._random()), self._go_on)

    def _go_on(self) -> None:
        self._left -= 1
        if self._left > 0:
            self._ask()
            return
        agents = self._agents
        agents.cluster.forget(self._conversation)
        if agents.gate is not None:
            agents.gate.forget(self._conversation)
        agents.episodes += 1
        self.begin()
