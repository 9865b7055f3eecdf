"""Answering without tools or code: one question, one response, the answer taken from its end. What NB-Agent is compared to.

It has NB-Agent's shape (`run_episode`), so that an evaluation plays either.
"""

import re
import time
from dataclasses import dataclass, replace

from l0fast.agent.chat import Chat
from l0fast.agent.conversation import converse
from l0fast.config import AgentConfig
from l0fast.engine.base import Engine, TextEngine
from l0fast.errors import EngineError
from l0fast.types import Task, Trajectory, TrajectoryStatus, Turn

SYSTEM = """\
Answer the question. Think as long as you need; then end with one line:
ANSWER: the shortest text that answers it"""

# marks of one line alone: over lines, a response of nothing but line breaks would hold the loop for seconds
_ANSWER = re.compile(r"^[^\w\n]*ANSWER[^\w\n]*?:\s*(.+)$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectAnswerer:
    chat: Chat | None
    engine: Engine | TextEngine
    config: AgentConfig

    async def run_episode(self, task: Task, *, index: int, temperature: float, seed: int) -> Trajectory:
        """One response. Never raises for what the engine does: the status tells."""
        name, started = f"{task.id}/{index}/{seed}", time.monotonic()
        trajectory = Trajectory(
            task=task, index=index, status=TrajectoryStatus.TRUNCATED_CONTEXT, turns=(), started_s=started
        )
        dialogue = converse(self.chat, self.engine, name, SYSTEM, task.question, self.config)
        try:
            if dialogue.fit(""):
                response = await dialogue.respond(temperature=temperature, seed=seed)
                sampled = response.sampled
                turn = Turn(
                    prompt_ids=response.prompt_ids,
                    response_ids=sampled.response_ids,
                    sampler_logprobs=sampled.sampler_logprobs,
                    finish_reason=sampled.finish_reason,
                    policy_version=sampled.policy_version,
                    text=response.text,
                    output=None,
                    well_formed=False,
                    counted_tokens=response.counted_tokens,
                    generate_s=time.monotonic() - started,
                )
                answer = final_answer(response.text)
                status = TrajectoryStatus.TRUNCATED_TURNS if answer is None else TrajectoryStatus.COMPLETED
                trajectory = replace(trajectory, turns=(turn,), answer=answer, status=status)
        except EngineError as e:
            trajectory = replace(trajectory, status=TrajectoryStatus.FAILED_ENGINE, cause=str(e))
        finally:
            self.engine.forget(name)
        return replace(trajectory, wall_s=time.monotonic() - started)


def final_answer(text: str) -> str | None:
    """What the last ANSWER line gives, after all thinking; without one, a response of a single line is the answer."""
    said = text.rpartition("</think>")[2].strip()
    if found := _ANSWER.findall(said):
        return found[-1].strip("*` \t\r")
    return said if said and "\n" not in said else None
