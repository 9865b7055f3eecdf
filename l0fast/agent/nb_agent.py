"""NB-Agent: think, write Python, see the output, go on until an answer is submitted (L0, arXiv 2506.23667, section 3).

    prompt ids -> engine -> response ids -> <think>, <code> -> session -> <output> -> longer prompt ids -> ...

One coroutine an episode. It waits for the engine and for its own session (leased at its first cell), never for another
episode. An episode ends when its code has called submit_final_answer, at `max_turns`, when the context can't take another
turn, or at its deadline. What the world breaks (engine, sandbox, deadline) is recorded on the trajectory; a bug propagates.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, AsyncExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

from l0fast.agent.chat import Chat
from l0fast.agent.context import Context
from l0fast.agent.notepad import Notepad
from l0fast.agent.parsing import parse_action
from l0fast.agent.prompts import output_message, shorten, system_prompt
from l0fast.config import AgentConfig
from l0fast.engine.base import Engine, Sampling
from l0fast.errors import EngineError, SandboxError
from l0fast.sandbox.base import CellResult, Sandbox, Session, ToolSpec
from l0fast.types import Task, Trajectory, TrajectoryStatus, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeLimits:
    max_turns: int
    timeout_s: float
    """Wall clock of the whole episode, waiting for a session included [s]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NBAgent:
    """Everything episodes have in common."""

    chat: Chat
    engine: Engine
    sandbox: Sandbox
    tools: tuple[ToolSpec, ...]
    """Besides submit_final_answer and the notepad, which every session has."""
    config: AgentConfig
    limits: EpisodeLimits
    part: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext()
    """Told what an episode waits for: entered around "generate" and "execute"."""
    clock: Callable[[], float] = time.monotonic

    async def run_episode(self, task: Task, *, index: int, temperature: float, seed: int) -> Trajectory:
        """Play one episode. Never raises for what the world does: the status tells."""
        episode = _Episode(started=self.clock())
        status, cause = TrajectoryStatus.FAILED_DEADLINE, f"not over within {self.limits.timeout_s:g} s"
        deadline = asyncio.timeout(self.limits.timeout_s)
        try:
            async with deadline, AsyncExitStack() as stack:
                status, cause = await self._turns(task, episode, stack, index, temperature, seed), None
        except EngineError as e:
            status, cause = TrajectoryStatus.FAILED_ENGINE, str(e)
        except SandboxError as e:
            status, cause = TrajectoryStatus.FAILED_SANDBOX, str(e)
        except TimeoutError:
            if not deadline.expired():
                raise
        return Trajectory(
            task=task,
            index=index,
            status=status,
            turns=tuple(episode.turns),
            answer=episode.answer,
            cause=cause,
            started_s=episode.started,
            wall_s=self.clock() - episode.started,
        )

    async def _turns(
        self, task: Task, episode: "_Episode", stack: AsyncExitStack, index: int, temperature: float, seed: int
    ) -> TrajectoryStatus:
        config = self.config
        session: Session | None = None
        context = Context(
            self.chat,
            system_prompt(config.prompt, self.tools_of(episode), max_turns=self.limits.max_turns),
            task.question,
            budget=config.context_tokens,
            response_tokens=config.max_new_tokens,
            trim=config.trim,
        )
        for n in range(self.limits.max_turns):
            if not context.fit(episode.notepad.render()):
                return TrajectoryStatus.TRUNCATED_CONTEXT
            prompt_ids = context.prompt_ids
            t0 = self.clock()
            sampling = Sampling(
                max_new_tokens=config.max_new_tokens,
                stop_token_ids=self.chat.stop_token_ids,
                temperature=temperature,
                seed=seed * self.limits.max_turns + n,
            )
            with self.part("generate"):
                sampled = await self.engine.generate(prompt_ids, sampling, conversation=f"{task.id}/{index}/{seed}")
            t1 = self.clock()
            text = self.chat.decode(sampled.response_ids)
            action = parse_action(text)
            shown_before, output, error = episode.notepad.render(), None, None
            if action.complaint is None:
                with self.part("execute"):
                    if session is None:
                        # only now: all episodes of a step begin at once, and the engine must not wait for their forks
                        lease = self.sandbox.session(self._session_tools(episode), seed=seed, files=task.files)
                        session = await stack.enter_async_context(lease)
                    with episode.live_cell():
                        cell = await session.execute(action.code, timeout_s=config.cell_timeout_s)
                output = shorten(_shown(cell, config.traceback).rstrip(), config.output_chars)
                error = cell.error.name if cell.error else None
            episode.turns.append(
                Turn(
                    prompt_ids=prompt_ids,
                    response_ids=sampled.response_ids,
                    sampler_logprobs=sampled.sampler_logprobs,
                    finish_reason=sampled.finish_reason,
                    policy_version=sampled.policy_version,
                    text=text,
                    output=output,
                    complaint=action.complaint,
                    well_formed=action.well_formed,
                    error=error,
                    start_s=t0 - episode.started,
                    generate_s=t1 - t0,
                    execute_s=self.clock() - t1,
                )
            )
            if episode.answer is not None:
                return TrajectoryStatus.COMPLETED
            notepad = episode.notepad.render()
            reply = action.complaint if output is None else output
            context.add(sampled.response_ids, output_message(reply or "", notepad if notepad != shown_before else ""))
        return TrajectoryStatus.TRUNCATED_TURNS

    def tools_of(self, episode: "_Episode") -> tuple[ToolSpec, ...]:
        notepad = episode.notepad
        return (
            *self.tools,
            ToolSpec(
                name="submit_final_answer",
                signature="(answer: str)",
                doc="End the session with this answer.",
                call=episode.submit,
            ),
            *(
                ToolSpec(name=f"notepad.{name}", signature=signature, doc=(call.__doc__ or "").strip(), call=call)
                for name, signature, call in (
                    ("add_todo", "(item: str) -> str", notepad.add_todo),
                    ("check_todo", "(number: int)", notepad.check_todo),
                    ("add_facts", "(*facts: str)", notepad.add_facts),
                    ("write_draft", "(text: str)", notepad.write_draft),
                )
            ),
        )

    def _session_tools(self, episode: "_Episode") -> Mapping[str, ToolSpec]:
        return {tool.name: tool for tool in self.tools_of(episode)}


def _shown(cell: CellResult, traceback: Literal["full", "last_line"]) -> str:
    if traceback == "last_line" and cell.error is not None and cell.output.endswith(cell.error.traceback):
        return f"{cell.output.removesuffix(cell.error.traceback)}{cell.error.name}: {cell.error.value}"
    return cell.output


@dataclass(slots=True)
class _Episode:
    """What the host knows of one episode, out of the session's reach."""

    started: float
    turns: list[Turn] = field(default_factory=list)
    notepad: Notepad = field(default_factory=Notepad)
    answer: str | None = None
    _cell_is_live: bool = False

    async def submit(self, answer: object) -> None:
        """The first answer submitted while a cell runs counts; a process left behind by one can't submit later."""
        if self._cell_is_live and self.answer is None:
            self.answer = str(answer)

    @contextmanager
    def live_cell(self) -> Iterator[None]:
        self._cell_is_live = True
        try:
            yield
        finally:
            self._cell_is_live = False
