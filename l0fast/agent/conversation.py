"""One episode's dialogue, whoever answers: an engine that takes ids, or an endpoint that takes messages.

    fit -> respond -> add -> fit -> ...

Ids grow by concatenation (context.py), which is what training needs. Messages are rendered by the endpoint, which tells
afterwards how many tokens they were: until then their length is an estimate from their characters, and so is the trim.
"""

import math
from dataclasses import dataclass
from typing import Protocol, cast

from l0fast.agent.chat import Chat
from l0fast.agent.context import TRIM_NOTE, Context
from l0fast.config import AgentConfig
from l0fast.engine.base import Engine, Message, Sampled, Sampling, TextEngine
from l0fast.ids import Ids

CHARS_PER_TOKEN = 3.0
"""Guessed until an endpoint has counted: fewer than most tokenizers make of English, about what they make of code."""
MESSAGE_TOKENS = 8
"""What a chat form puts around a message, at most [tokens]."""


@dataclass(frozen=True, slots=True)
class Response:
    text: str
    """Special tokens dropped, and a <think> that the prompt ends with put first."""
    prompt_ids: Ids
    """Exactly what the engine saw; empty where it saw messages."""
    sampled: Sampled
    """Without ids and log-probs where an endpoint told none."""
    counted_tokens: int | None = None
    """Of the response, as such an endpoint counts them [tokens]."""


class Conversation(Protocol):
    def fit(self, notepad: str) -> bool:
        """Trim, if need be, until the next response fits. False where it can't.

        Args:
            notepad: its current contents, shown in the first message of a trimmed conversation.
        """
        ...

    async def respond(self, *, temperature: float, seed: int) -> Response: ...

    def add(self, response: Response, reply: str) -> None:
        """Append a response and what it is answered with."""
        ...


def converse(
    chat: Chat | None, engine: Engine | TextEngine, name: str, system: str, question: str, config: AgentConfig
) -> Conversation:
    """Begin one. Without a `chat` the engine is one that takes messages."""
    if chat is not None:
        return _IdConversation(chat, cast(Engine, engine), name, system, question, config)
    return _MessageConversation(cast(TextEngine, engine), name, system, question, config)


class _IdConversation:
    def __init__(self, chat: Chat, engine: Engine, name: str, system: str, question: str, config: AgentConfig):
        self._chat, self._engine, self._name, self._config = chat, engine, name, config
        self._context = Context(
            chat,
            system,
            question,
            budget=config.context_tokens,
            response_tokens=config.max_new_tokens,
            trim=config.trim,
        )

    def fit(self, notepad: str) -> bool:
        return self._context.fit(notepad)

    async def respond(self, *, temperature: float, seed: int) -> Response:
        prompt_ids = self._context.prompt_ids
        sampling = Sampling(
            max_new_tokens=self._config.max_new_tokens,
            stop_token_ids=self._chat.stop_token_ids,
            temperature=temperature,
            seed=seed,
        )
        sampled = await self._engine.generate(prompt_ids, sampling, conversation=self._name)
        return Response(self._chat.said(sampled.response_ids), prompt_ids, sampled)

    def add(self, response: Response, reply: str) -> None:
        self._context.add(response.sampled.response_ids, reply)


class _MessageConversation:
    def __init__(self, engine: TextEngine, name: str, system: str, question: str, config: AgentConfig):
        self._engine, self._name, self._config = engine, name, config
        self._room = config.context_tokens - config.max_new_tokens
        self._question = question
        self._head = [_message("system", system), _message("user", question)]
        self._exchanges: list[list[Message]] = []
        self._chars_per_token = CHARS_PER_TOKEN

    def fit(self, notepad: str) -> bool:
        if self._tokens() <= self._room:
            return True
        if self._config.trim == "none":
            return False
        question = "\n".join(filter(None, (self._question, TRIM_NOTE, notepad)))
        self._head[1] = _message("user", question)
        if self._config.trim == "hard":
            self._exchanges.clear()
        while self._exchanges and self._tokens() > self._room:
            del self._exchanges[0]
        return self._tokens() <= self._room

    async def respond(self, *, temperature: float, seed: int) -> Response:
        messages = self._messages()
        sampling = Sampling(
            max_new_tokens=self._config.max_new_tokens, stop_token_ids=(), temperature=temperature, seed=seed
        )
        said = await self._engine.generate(messages, sampling, conversation=self._name)
        if said.prompt_tokens:
            # what a chat form adds counts as characters too: it weighs on short conversations, where room is no matter
            self._chars_per_token = max(1.0, _chars(messages) / said.prompt_tokens)
        sampled = Sampled(response_ids=Ids(), sampler_logprobs=(), finish_reason=said.finish_reason, policy_version=0)
        return Response(said.text, Ids(), sampled, said.completion_tokens)

    def add(self, response: Response, reply: str) -> None:
        self._exchanges.append([_message("assistant", response.text), _message("user", reply)])

    def _messages(self) -> list[Message]:
        return [*self._head, *(message for exchange in self._exchanges for message in exchange)]

    def _tokens(self) -> int:
        messages = self._messages()
        return math.ceil(_chars(messages) / self._chars_per_token) + MESSAGE_TOKENS * len(messages)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _chars(messages: list[Message]) -> int:
    return sum(len(message["content"]) for message in messages)
