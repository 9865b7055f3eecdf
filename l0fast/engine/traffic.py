"""Agents that are nothing but their figures, on simulated engines: what a node does with them, in event time.

    first prompt --> [gate] --> engine: prefill, decode --> tool --> next turn: its prompt has response and output more
                       ^                                     |
                       '----- after the last turn: another episode

No ids, no coroutines: a turn costs a third of what it does as a coroutine on a `SimulatedEngine`. It answers what lengths,
latencies, memory and admission come to; what a scheduler makes of recorded episodes, rollout/whatif.py does.

What an episode asks for is a function of (seed, its number) alone, drawn when it begins: who is faster than whom changes nothing.
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


Turn = tuple[int, int, float]
"""(tokens of the response, tokens of what the tool says, how long that takes [s])"""


class Episodes:
    """What one after the other asks for."""

    def __init__(self, traffic: Traffic, seed: int = 0):
        self._traffic, self._random, self._number = traffic, random.Random(seed).random, -1

    def next(self) -> tuple[str, int, list[Turn]]:
        """Returns the episode's name, the tokens of its first prompt, and its turns, the last one first."""
        traffic, u = self._traffic, self._random
        response_tokens, output_tokens, tool_s = traffic.response_tokens, traffic.output_tokens, traffic.tool_s
        self._number += 1
        turns = [
            (min(1 + int(response_tokens(u())), traffic.max_new_tokens), int(output_tokens(u())), tool_s(u()))
            for _ in range(max(1, int(traffic.turns(u()))))
        ]
        return str(self._number), int(traffic.prompt_tokens(u())), turns


class Agents:
    """They play on the cluster for as long as its clock moves, each one on to its next episode at once."""

    def __init__(self, traffic: Traffic, cluster: Cluster, *, gate: Gate | None = None, seed: int = 0):
        """
        Args:
            gate: on the cluster's clock; None lets everybody in.
        """
        self.turns = self.episodes = 0
        """Ended so far."""
        self.cluster, self.clock, self.gate = cluster, cluster.clock, gate
        self.to_come, self.max_new_tokens = Episodes(traffic, seed), traffic.max_new_tokens
        if gate is not None:
            gate.observe(cluster.load())

    def start(self, agents: int) -> None:
        """So many more."""
        for _ in range(agents):
            _Agent(self).begin()


class _Agent:
    __slots__ = ("_agents", "_conversation", "_known", "_request", "_tokens", "_turn", "_turns")

    def __init__(self, agents: Agents):
        self._agents = agents
        self._conversation = ""
        self._tokens = self._known = 0
        self._turns: list[Turn] = []
        """Still to come."""
        self._turn: Turn
        self._request: Request

    def begin(self) -> None:
        """Another episode."""
        self._conversation, self._tokens, self._turns = self._agents.to_come.next()
        self._known = 0
        self._ask()

    def _ask(self) -> None:
        agents = self._agents
        self._turn = self._turns.pop()
        self._request = Request(
            conversation=self._conversation,
            prompt_tokens=self._tokens,
            response_tokens=self._turn[0],
            max_new_tokens=agents.max_new_tokens,
            matched_tokens=self._known,
        )
        if agents.gate is None or agents.gate.ask(self._conversation, self._tokens, self._go):
            self._go()

    def _go(self) -> None:
        self._agents.cluster.submit(self._request, self._answered)

    def _answered(self) -> None:
        agents = self._agents
        response_tokens, output_tokens, tool_s = self._turn
        agents.turns += 1
        self._tokens += response_tokens
        # the last id sampled is never computed
        self._known = self._tokens - 1
        if (gate := agents.gate) is not None:
            gate.ran(self._conversation, self._tokens, self._request.cached_tokens)
            if gate.wants_load():
                gate.observe(agents.cluster.load())
        self._tokens += output_tokens
        agents.clock.call_at(agents.clock.now_s + tool_s, self._go_on)

    def _go_on(self) -> None:
        if self._turns:
            self._ask()
            return
        agents = self._agents
        agents.cluster.forget(self._conversation)
        if agents.gate is not None:
            agents.gate.forget(self._conversation)
        agents.episodes += 1
        self.begin()
