"""The ids of one conversation: they grow by concatenation, and shrink only by a trim.

    head              exchange 1                exchange 2
    system + task     response, <output> ids    response, <output> ids ...

As long as nothing is trimmed, every prompt starts with the previous prompt and response, so the engine finds its prefix
and the learner gets one row. When prompt + response would pass the budget:

    soft   oldest exchanges go first
    hard   only system prompt, task and notepad stay
    none   the episode ends

Variables of the session and the notepad survive a trim. The notepad is shown when it changed, and after a trim in the
head: showing it at the end of every prompt (as L0 does) would rewrite the context each turn.
"""

from collections.abc import Sequence
from typing import Literal

from l0fast.agent.chat import Chat

Trim = Literal["hard", "soft", "none"]

TRIM_NOTE = "[Earlier turns were dropped. Variables and notepad are kept.]"


class Context:
    """Args:
    budget: longest prompt plus response [tokens].
    response_tokens: room kept for the next response [tokens].
    """

    def __init__(self, chat: Chat, system: str, question: str, *, budget: int, response_tokens: int, trim: Trim):
        self._chat, self._system, self._question = chat, system, question
        self._room = budget - response_tokens
        self._trim = trim
        self.prompt_ids = chat.first_prompt(system, question)
        self._lengths: list[int] = []
        """Of the exchanges at its end [tokens]."""

    def add(self, response_ids: Sequence[int], output: str) -> None:
        """Append a response, exactly as sampled, and what it is answered with."""
        closed = bool(response_ids) and response_ids[-1] in self._chat.stop_token_ids
        longer = self.prompt_ids + response_ids + self._chat.continuation(output, closed=closed)
        self._lengths.append(len(longer) - len(self.prompt_ids))
        self.prompt_ids = longer

    def fit(self, notepad: str) -> bool:
        """Trim, if need be, until the next response fits. False where it can't.

        Args:
            notepad: its current contents, shown in the head of a trimmed context.
        """
        if len(self.prompt_ids) <= self._room:
            return True
        if self._trim == "none":
            return False
        question = "\n".join(filter(None, (self._question, TRIM_NOTE, notepad)))
        head = self._chat.first_prompt(self._system, question)
        if self._trim == "hard":
            self._lengths.clear()
        while self._lengths and len(head) + sum(self._lengths) > self._room:
            del self._lengths[0]
        self.prompt_ids = head + self.prompt_ids[len(self.prompt_ids) - sum(self._lengths) :]
        return len(self.prompt_ids) <= self._room
