"""What an engine offers the rest of l0fast: token ids in, token ids and log-probs out. No text.

    generate        one turn of one conversation
    update_weights  new policy, new version; nothing sampled before it is continued from stale state
    forget          a conversation is over
    load            what admission and the account of a step need to know

The rest of the code can't tell which engine it talks to.

An endpoint elsewhere is less than that, a `TextEngine`: messages in, text out, to evaluate and to use, not to train.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from l0fast.ids import Ids
from l0fast.types import EngineLoad


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    max_new_tokens: int
    """[tokens]"""
    stop_token_ids: tuple[int, ...]
    """Sampling one of these ends the turn; it is part of the response."""
    temperature: float = 1.0
    """0 is greedy; its log-probs are those of temperature 1."""
    seed: int = 0
    """The same seed, prompt and weights give the same ids, whoever shares the batch (up to rounding)."""


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Which policy sampled a stretch of a response."""

    policy_version: int
    start: int
    end: int
    """Ids [start, end) of the response."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    response_ids: Ids
    sampler_logprobs: tuple[float, ...]
    """Temperature-scaled, over the full vocabulary [nats]."""
    finish_reason: str
    """"stop" | "length" | "abort"."""
    policy_version: int
    """Of the first id; the oldest there is in the response."""
    version_spans: tuple[VersionSpan, ...] = ()
    """Where weights came while it was sampled: who sampled what. Empty: all of it is of `policy_version`."""
    cached_tokens: int = 0
    """Prompt tokens that were not computed again."""


class Engine(Protocol):
    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling, *, conversation: str) -> Sampled:
        """Sample one response.

        Args:
            prompt_ids: the whole prompt; what it shares with the last call of this conversation is not computed again.
            conversation: names the episode, so that its turns find their KV entries.

        Raises:
            ValueError: an id outside the vocabulary, or a prompt too long for the engine.
            EngineError: the engine died or missed its deadline.
        """
        ...

    async def update_weights(self, policy_version: int) -> None:
        """Take the weights the learner has published under this version. Returns when they are in use."""
        ...

    def forget(self, conversation: str) -> None:
        """The conversation is over: what is kept for it may go first. Never waits; unknown names are fine."""
        ...

    async def load(self) -> EngineLoad: ...


Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledText:
    text: str
    """As the model wrote it: thinking that the endpoint returns apart stands first, in <think></think>."""
    finish_reason: str
    """"stop" | "length", or the endpoint's own word."""
    prompt_tokens: int | None = None
    """As the endpoint counts them; None where it doesn't [tokens]."""
    completion_tokens: int | None = None


class TextEngine(Protocol):
    async def generate(self, messages: Sequence[Message], sampling: Sampling, *, conversation: str) -> SampledText:
        """Sample the next message. Stop ids mean nothing here.

        Raises:
            EngineError: no answer came before the deadline, or one that can't be used.
            UsageError: address, key or model are wrong: no request will fare better.
        """
        ...

    def forget(self, conversation: str) -> None: ...

    async def load(self) -> EngineLoad: ...
