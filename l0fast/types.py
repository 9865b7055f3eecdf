"""The records that flow through a run. Plain data: no torch, no behaviour beyond looking at itself.

    Task -> Group -> Trajectory x n (turns: prompt_ids, response_ids, sampler_logprobs, output) -> rewards -> Pack

A record is made once, on the left, and never changed afterwards. Words: a *turn* is one think + code + output
exchange, a *trajectory* the record of one run of the agent on one task, a *step* one optimizer update.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, get_args

from l0fast.ids import Ids

Check = Literal["exact_match", "numeric", "math", "regex", "unit_tests", "judge"]
"""How an answer is judged: those rewards (tasks/scoring.py) that say right or wrong."""
CHECKS: tuple[str, ...] = get_args(Check)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One question with its right answers."""

    id: str
    """Unique within its source; groups, splits and metrics are keyed by it."""
    question: str
    answers: tuple[str, ...]
    """Every one of them is right."""
    kind: str = ""
    """What is asked, e.g. "capital" or "city>currency"; accuracy is also reported by kind."""
    hops: int = 1
    """Look-ups needed to answer."""
    files: Mapping[str, str] = field(default_factory=dict, hash=False)
    """What the agent finds in its folder: name there -> file on this machine."""
    tests: tuple[str, ...] = ()
    """Python statements that must pass after the answer has run as code; of check = "unit_tests"."""
    check: str = "exact_match"
    """One of CHECKS."""


class TrajectoryStatus(StrEnum):
    COMPLETED = "completed"
    """The agent submitted an answer."""
    TRUNCATED_TURNS = "truncated_turns"
    TRUNCATED_CONTEXT = "truncated_context"
    """The next prompt would not fit (trim mode "none")."""
    FAILED_SANDBOX = "failed_sandbox"
    FAILED_ENGINE = "failed_engine"
    FAILED_DEADLINE = "failed_deadline"
    """The episode's own wall clock ran out."""
    FAILED_JUDGE = "failed_judge"
    """Nobody could say whether its answer is right."""
    FAILED_INTERRUPTED = "failed_interrupted"
    """Somebody who watched has ended it."""

    @property
    def failed(self) -> bool:
        """Lost to the world rather than to the policy: no vote in any statistic."""
        return self.value.startswith("failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """What a cell asked of the host, and was told: enough to run the cell again without the tool."""

    name: str
    arguments: str
    """JSON: [positional ones, ones by name]."""
    answer: str | None
    """JSON; None where it raised, was cut short by the cell's end, or said more than was to be kept."""
    error: tuple[str, str] | None = None
    """Class and text of what was raised in the cell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One exchange. `prompt_ids` is exactly what the engine saw, `response_ids` exactly what it sampled.

    Both are empty where an endpoint answered, which takes and returns text: there is nothing to train on.
    """

    prompt_ids: Ids
    response_ids: Ids
    """Sampled ids, the end-of-turn token included where it was sampled."""
    sampler_logprobs: tuple[float, ...]
    """Of `response_ids`, under the policy and temperature that sampled them [nats]."""
    finish_reason: str
    """"stop", "length" or "abort"."""
    policy_version: int
    """Of the weights that sampled the first id; the oldest there are in the response."""
    version_spans: tuple[tuple[int, int, int], ...] = ()
    """(policy version, start, end): who sampled ids [start, end), where weights came meanwhile. Empty: all of `policy_version`."""
    text: str
    """`response_ids` decoded, special tokens dropped; a <think> that the prompt ends with stands first."""
    output: str | None
    """What the agent was shown next; None where no cell ran because the text was malformed (`complaint` was shown)."""
    complaint: str | None = None
    well_formed: bool
    """Exactly one <think> and one <code>, both long enough (L0's format reward)."""
    error: str | None = None
    """Name of the exception the cell ended with."""
    calls: tuple[ToolCall, ...] = ()
    """In the order in which they ended."""
    counted_tokens: int | None = None
    """Of the response, where an endpoint answered and counts them [tokens]."""
    start_s: float = 0.0
    """Since the start of the episode [s]."""
    generate_s: float = 0.0
    execute_s: float = 0.0

    def new_prompt_ids(self, before: "Turn") -> Ids | None:
        """What the prompt adds to that of the turn before and its response; None where it does not begin with them."""
        start, end = len(before.prompt_ids), len(before.prompt_ids) + len(before.response_ids)
        goes_on = self.prompt_ids.starts_with(before.prompt_ids) and self.prompt_ids[start:end] == before.response_ids
        return self.prompt_ids[end:] if goes_on else None

    @property
    def num_tokens(self) -> int | None:
        """Of the response; None where nobody has counted them [tokens]."""
        return self.counted_tokens if not self.response_ids else len(self.response_ids)

    @property
    def oldest_version(self) -> int:
        return min(span[0] for span in self.version_spans) if self.version_spans else self.policy_version

    @property
    def spans(self) -> tuple[tuple[int, int, int], ...]:
        """`version_spans`, of a response of one policy too."""
        return self.version_spans or ((self.policy_version, 0, len(self.response_ids)),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """What happened in one episode."""

    task: Task
    index: int
    """Place in its group."""
    status: TrajectoryStatus
    turns: tuple[Turn, ...]
    answer: str | None = None
    """The first answer submitted."""
    rewards: tuple[float, ...] = ()
    """One a turn; their sum is the episode's reward."""
    correct: bool = False
    """By the check of its task; of one that was scored."""
    cause: str | None = None
    """Why a failed one failed."""
    started_s: float = 0.0
    """Since the start of the run [s]."""
    wall_s: float = 0.0

    @property
    def reward(self) -> float:
        return sum(self.rewards)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The trajectories of one task, complete: `group_size` that count, and those that were lost on the way."""

    task: Task
    trajectories: tuple[Trajectory, ...]
    failures: tuple[Trajectory, ...] = ()
    number: int = 0
    """Place in the order of admission."""
    policy_version: int = 0
    """Of the weights that the engine had when it was admitted."""

    @property
    def oldest_version(self) -> int:
        """Of all that was sampled in it; that of its admission where nothing was."""
        turns = (turn for trajectory in self.trajectories for turn in trajectory.turns)
        return min((turn.oldest_version for turn in turns), default=self.policy_version)

    @property
    def all_equal(self) -> bool:
        """All right or all wrong: a group-relative advantage sees nothing in it."""
        return len({t.correct for t in self.trajectories}) == 1


@dataclass(frozen=True, slots=True)
class Span:
    """A sampled stretch of a segment."""

    start: int
    length: int
    turn: int
    """Index into the trajectory's turns."""


@dataclass(frozen=True, slots=True)
class Segment:
    """An append-only row: for each span, token_ids[:start] is the prompt the engine saw for that turn."""

    token_ids: Ids
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """What admission and the account of a step need to know of an engine."""

    running: int
    """Requests being decoded."""
    waiting: int
    """Requests not yet admitted."""
    used_tokens: int
    """KV entries in use."""
    max_tokens: int
    """KV entries there are."""
    prefill_tokens: int = 0
    """Prompt tokens computed since the start, `recomputed_tokens` among them [tokens]."""
    cached_tokens: int = 0
    """Prompt tokens that were found computed, since the start [tokens]."""
    recomputed_tokens: int = 0
    """Prompt tokens computed again because their KV entries had been evicted, retracted or were of older weights [tokens]."""
    decoded_tokens: int = 0
    """Tokens sampled since the start [tokens]."""
    prefill_s: float = 0.0
    """Time the engine spent on prompts since the start, summed over its replicas; 0 where it does not tell [s]."""
    decode_s: float = 0.0
    """Time it spent on sampling [s]."""
    in_flight: int = 0
    """Episodes that admission counts in, between their turns, too; 0 without a gate [episodes]."""
    parked: int = 0
    """Times since the start that the gate made an episode wait for its next turn."""
