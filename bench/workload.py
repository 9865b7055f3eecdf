"""What `bench.throughput` plays: episodes of L0's length and shape, the same to the last token for the same names.

    episode     1 to 8 turns, each as likely                                      all drawn from the conversation's name
    response    <think> text </think><code> python </code>, lognormal, median 300 tokens
    code        calls look_up(key) through the broker and prints what it got; the last turn submits an answer
    look_up     answers with some 100 tokens after a latency that `key` alone decides: lognormal, median 0.8 s, p99 8.2 s
    malformed   one response in 32 does not close its <code>: the complaint path

Ours and L0's way play the same text, so both wait equally long for engine and tools.
"""

import random
from array import array
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.traces import RESPONSE_TOKENS, SPREAD
from l0fast.agent.chat import Chat
from l0fast.config import AgentConfig
from l0fast.engine.base import Sampling
from l0fast.engine.distributions import lognormal
from l0fast.ids import Ids
from l0fast.sandbox.base import ToolSpec
from l0fast.seeding import derive_seed
from l0fast.tasks.geography import geography
from l0fast.types import Task

MODEL = Path(__file__).parent.parent / "l0fast" / "models" / "geography"
"""Its tokenizer and chat form."""
MAX_TURNS = 8
GROUP_SIZE = 4
TOOL_LATENCY_S = 0.8
"""Median [s]."""
TOOL_SPREAD = 1.0
"""Sigma of the lognormal latency: one call in ten takes 2.9 s, one in a hundred 8.2 s."""
KEYS = 1024
"""Different calls of look_up; each has one latency, so that 1,024 of them are the distribution."""
MALFORMED = 1 / 32
"""Share of responses."""
AGENT = AgentConfig(prompt="full", context_tokens=16_384 + 3_072, max_new_tokens=3_072, cell_timeout_s=120.0)
"""L0's limits. The cell's is above the slowest tool."""


class _Said(NamedTuple):
    """One response."""

    tokens: int
    start: float
    """Where its thought begins in what there is to say, 0 to 1."""
    key: int
    """Of the page it looks up, unless it is the last."""
    malformed: bool


class _Plan(NamedTuple):
    turns: tuple[_Said, ...]
    answer: str


class Workload:
    """Tasks, the policy that plays them (a `Script` for `SimulatedEngine`), and their tool.

    Args:
        sleep: waits on the clock that the engine runs on [s].
    """

    def __init__(self, chat: Chat, sleep: Callable[[float], Awaitable[None]]):
        self._chat, self._sleep = chat, sleep
        sentences = geography().full_corpus
        self._said = array("i", chat.encode(" ".join(sentences[:2000])))
        self._stop = array("i", chat.stop_token_ids[:1])
        self._tags = tuple(array("i", chat.encode(tag)) for tag in ("<think>", "</think>\n<code>\n", "\n</code>"))
        self._calls = [array("i", chat.encode(_CALL.format(key=key))) for key in range(KEYS)]
        self._submits = {answer: array("i", chat.encode(_SUBMIT.format(answer=answer))) for answer in ANSWERS}
        # three sentences a page, as a search returns
        self._pages = ["\n".join(sentences[3 * key : 3 * key + 3]) for key in range(KEYS)]
        quantile = lognormal(TOOL_LATENCY_S, TOOL_SPREAD)
        # shuffled: neighbours in `key` have nothing in common
        self.latencies_s = [quantile((i + 0.5) / KEYS) for i in random.Random(0).sample(range(KEYS), KEYS)]
        """Of look_up, by key [s]."""
        self._length = lognormal(RESPONSE_TOKENS, SPREAD)
        self._under_way: dict[str, tuple[_Plan, int]] = {}
        self.turns = 0
        """Responses given."""

    def tasks(self) -> Iterator[Task]:
        """Endless."""
        number = 0
        while True:
            yield Task(id=f"w{number}", question=f"What do the pages say about place {number}?", answers=("yes",))
            number += 1

    @property
    def tool(self) -> ToolSpec:
        return ToolSpec(
            name="look_up",
            signature="(key: int) -> str",
            doc="Return the page with this number.",
            call=self._look_up,
        )

    def page(self, key: int) -> str:
        return self._pages[key]

    async def _look_up(self, key: int) -> str:
        await self._sleep(self.latencies_s[key])
        return self._pages[key]

    def __call__(self, prompt_ids: Sequence[int], sampling: Sampling, conversation: str) -> Sequence[int]:
        """The next response of a conversation."""
        plan, turn = self._under_way.pop(conversation, None) or (self.plan(conversation), 0)
        last = turn + 1 == len(plan.turns)
        if not last:
            self._under_way[conversation] = plan, turn + 1
        self.turns += 1
        said = plan.turns[turn]
        code = self._submits[plan.answer] if last else self._calls[said.key]
        think, between, close = self._tags
        if said.malformed and not last:
            close = array("i")
        length = max(_MIN_THOUGHT_TOKENS, said.tokens - sum(map(len, (think, between, code, close))) - 1)
        start = int(said.start * (len(self._said) - length))
        # not one Ids after the other: what says it is to cost little beside what is measured
        return Ids(think + self._said[start : start + length] + between + code + close + self._stop)

    def plan(self, conversation: str) -> _Plan:
        """What it will say, drawn from its name."""
        rng = random.Random(derive_seed(0, conversation))
        turns = tuple(
            _Said(
                # room for the tags and the code is part of it
                tokens=min(round(self._length(rng.random())), AGENT.max_new_tokens - 100),
                start=rng.random(),
                key=rng.randrange(KEYS),
                malformed=rng.random() < MALFORMED,
            )
            for _ in range(rng.randint(1, MAX_TURNS))
        )
        return _Plan(turns=turns, answer=rng.choice(ANSWERS))


ANSWERS = ("yes", "no")
"""The first is right."""
_MIN_THOUGHT_TOKENS = 8
_CALL = "page = look_up({key})\nlines = page.splitlines()\nprint(len(lines), 'sentences')\nprint(page)"
_SUBMIT = "verdict = '{answer}'\nsubmit_final_answer(verdict)"
