"""NB-Agent: think, write Python, see the output, go on until an answer is submitted (L0, arXiv 2506.23667, section 3).

    prompt ids -> engine -> response ids -> <think>, <code> -> session -> <output> -> longer prompt ids -> ...

One coroutine an episode. It waits for the engine and for its own session (leased at its first cell), never for another
episode. An episode ends when its code has called submit_final_answer, at `max_turns`, when the context can't take another
turn, or at a deadline: its own, or that of one turn, which both stand still while it waits to be admitted. What the world
breaks (engine, sandbox, deadline) is recorded on the trajectory, a deadline with what was waited for; a bug propagates.
However it ends, its session is given back and the engine told to forget it.
"""

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import orjson

from l0fast.agent.chat import Chat
from l0fast.agent.conversation import converse
from l0fast.agent.notepad import Notepad
from l0fast.agent.parsing import parse_action
from l0fast.agent.prompts import output_message, shorten, system_prompt
from l0fast.config import AgentConfig
from l0fast.deadlines import deadlines_of
from l0fast.engine.base import Engine, Message, TextEngine
from l0fast.errors import EngineError, SandboxError, ToolError
from l0fast.observer import NOTHING, EpisodeObserver, Observer
from l0fast.sandbox.base import CellResult, Sandbox, Session, ToolSpec
from l0fast.types import Task, ToolCall, Trajectory, TrajectoryStatus, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeLimits:
    max_turns: int
    timeout_s: float
    """Wall clock of the whole episode, waiting for a session included, waiting to be admitted to the engine not [s]."""
    turn_timeout_s: float | None = None
    """Wall clock of one turn: the response, the session where it is the first to need one, and the cell; None for any [s]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NBAgent:
    """Everything episodes have in common."""

    chat: Chat | None
    """None where the engine takes messages."""
    engine: Engine | TextEngine
    sandbox: Sandbox
    tools: tuple[ToolSpec, ...]
    """Besides submit_final_answer and the notepad, which every session has."""
    task_tools: Callable[[Task], tuple[ToolSpec, ...]] = lambda task: ()
    """What an episode of this task has besides these."""
    config: AgentConfig
    limits: EpisodeLimits
    observer: Observer = NOTHING
    on_turn: Callable[[Turn], None] = lambda turn: None
    """Told each turn when it is over."""
    keep_chars: int = 20_000
    """Longest answer of a tool that the trajectory keeps [characters]."""

    async def run_episode(self, task: Task, *, index: int, temperature: float, seed: int) -> Trajectory:
        """Play one episode. Never raises for what the world does: the status tells."""
        conversation = f"{task.id}/{index}/{seed}"
        episode = _Episode(started=time.monotonic(), observer=self.observer.episode(conversation))
        status, cause = None, None
        whole, turn = asyncio.timeout(self.limits.timeout_s), _TurnDeadline()
        try:
            async with AsyncExitStack() as stack, whole, turn:
                with deadlines_of(whole, turn):
                    status = await self._turns(task, conversation, episode, stack, turn, temperature, seed)
        except EngineError as e:
            status, cause = TrajectoryStatus.FAILED_ENGINE, str(e)
        except SandboxError as e:
            status, cause = TrajectoryStatus.FAILED_SANDBOX, str(e)
        except TimeoutError:
            status, number, limits = TrajectoryStatus.FAILED_DEADLINE, len(episode.turns) + 1, self.limits
            if turn.expired():
                cause = f"turn {number} not over within {limits.turn_timeout_s:g} s, {episode.doing}"
            elif whole.expired():
                cause = f"not over within {limits.timeout_s:g} s, {episode.doing} in turn {number}"
            else:
                raise
        finally:
            self.engine.forget(conversation)
            episode.observer.end(status=str(status or "cancelled"), turns=len(episode.turns))
        assert status is not None
        return Trajectory(
            task=task,
            index=index,
            status=status,
            turns=tuple(episode.turns),
            answer=episode.answer,
            cause=cause,
            started_s=episode.started,
            wall_s=time.monotonic() - episode.started,
        )

    async def _turns(
        self,
        task: Task,
        conversation: str,
        episode: "_Episode",
        stack: AsyncExitStack,
        deadline: "_TurnDeadline",
        temperature: float,
        seed: int,
    ) -> TrajectoryStatus:
        config = self.config
        session: Session | None = None
        own = (*self.tools, *self.task_tools(task))
        defined = _session_tools(own, episode)
        system = system_prompt(config.prompt, defined, max_turns=self.limits.max_turns)
        dialogue = converse(self.chat, self.engine, conversation, system, task.question, config)
        for n in range(self.limits.max_turns):
            if not dialogue.fit(episode.notepad.render()):
                return TrajectoryStatus.TRUNCATED_CONTEXT
            if self.limits.turn_timeout_s is not None:
                deadline.move(self.limits.turn_timeout_s)
            t0 = time.monotonic()
            with episode.span("generate", "waiting for its response"):
                response = await dialogue.respond(temperature=temperature, seed=seed * self.limits.max_turns + n)
            t1 = time.monotonic()
            sampled, action = response.sampled, parse_action(response.text)
            shown_before, output, error = episode.notepad.render(), None, None
            if action.complaint is None:
                if session is None:
                    # only now: all episodes of a step begin at once, and the engine must not wait for their forks
                    tools = self._observed_tools(defined, own, episode)
                    lease = self.sandbox.session(tools, seed=seed, files=task.files)
                    with episode.span("lease", "waiting for a session"):
                        session = await stack.enter_async_context(lease)
                with episode.span("execute", "running its cell"), episode.live_cell():
                    cell = await session.execute(action.code, timeout_s=config.cell_timeout_s)
                output = shorten(_shown(cell, config.traceback).rstrip(), config.output_chars)
                error = cell.error.name if cell.error else None
            episode.turns.append(
                Turn(
                    prompt_ids=response.prompt_ids,
                    response_ids=sampled.response_ids,
                    sampler_logprobs=sampled.sampler_logprobs,
                    finish_reason=sampled.finish_reason,
                    policy_version=sampled.policy_version,
                    version_spans=tuple((span.policy_version, span.start, span.end) for span in sampled.version_spans),
                    text=response.text,
                    output=output,
                    complaint=action.complaint,
                    well_formed=action.well_formed,
                    error=error,
                    calls=episode.take_calls(),
                    counted_tokens=response.counted_tokens,
                    start_s=t0 - episode.started,
                    generate_s=t1 - t0,
                    execute_s=time.monotonic() - t1,
                )
            )
            self.on_turn(episode.turns[-1])
            if episode.answer is not None:
                return TrajectoryStatus.COMPLETED
            notepad = episode.notepad.render()
            reply = action.complaint if output is None else output
            dialogue.add(response, output_message(reply or "", notepad if notepad != shown_before else ""))
        return TrajectoryStatus.TRUNCATED_TURNS

    def _observed_tools(
        self, defined: tuple[ToolSpec, ...], own: tuple[ToolSpec, ...], episode: "_Episode"
    ) -> Mapping[str, ToolSpec]:
        specs = {tool.name: tool for tool in defined}
        specs |= {tool.name: _observed(tool, episode) for tool in own}
        return {name: _recorded(tool, episode, self.keep_chars) for name, tool in specs.items()}


def first_messages(config: AgentConfig, tools: tuple[ToolSpec, ...], task: Task, *, max_turns: int) -> list[Message]:
    """What an episode begins with; `tools` as in `NBAgent`, those of the task included."""
    episode = _Episode(started=0.0, observer=NOTHING)
    system = system_prompt(config.prompt, _session_tools(tools, episode), max_turns=max_turns)
    return [{"role": "system", "content": system}, {"role": "user", "content": task.question}]


def _session_tools(own: tuple[ToolSpec, ...], episode: "_Episode") -> tuple[ToolSpec, ...]:
    """What a session finds defined: its agent's own, and what every session has."""
    notepad = episode.notepad
    return (
        *own,
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


def _observed(tool: ToolSpec, episode: "_Episode") -> ToolSpec:
    async def call(*args: Any, **kwargs: Any) -> Any:
        with episode.span("tool", f"waiting for {tool.name}()"):
            return await tool.call(*args, **kwargs)

    return ToolSpec(name=tool.name, signature=tool.signature, doc=tool.doc, call=call)


def _recorded(tool: ToolSpec, episode: "_Episode", keep_chars: int) -> ToolSpec:
    async def call(*args: Any, **kwargs: Any) -> Any:
        answer, error = None, ("Timeout", f"the cell ended while it waited for {tool.name}()")
        try:
            result = await tool.call(*args, **kwargs)
        except (ToolError, TypeError) as e:
            # as the session is told
            error = type(e).__name__, str(e)
            raise
        else:
            error, text = None, _as_json(tool, result)
            answer = text if len(text) <= keep_chars else None
            return result
        finally:
            # not orjson: an agent may send any number
            arguments = json.dumps([args, kwargs])
            episode.calls.append(ToolCall(name=tool.name, arguments=arguments, answer=answer, error=error))

    return ToolSpec(name=tool.name, signature=tool.signature, doc=tool.doc, call=call)


def _as_json(tool: ToolSpec, result: Any) -> str:
    try:
        return orjson.dumps(result).decode()
    except TypeError as e:
        # left as it is, it would look like the agent's mistake
        raise RuntimeError(f"{tool.name}() returned something that is not JSON-like: {e}") from e


def _shown(cell: CellResult, traceback: Literal["full", "last_line"]) -> str:
    if traceback == "last_line" and cell.error is not None and cell.output.endswith(cell.error.traceback):
        return f"{cell.output.removesuffix(cell.error.traceback)}{cell.error.name}: {cell.error.value}"
    return cell.output


@dataclass(slots=True)
class _Episode:
    """What the host knows of one episode, out of the session's reach."""

    started: float
    observer: EpisodeObserver
    turns: list[Turn] = field(default_factory=list)
    notepad: Notepad = field(default_factory=Notepad)
    answer: str | None = None
    calls: list[ToolCall] = field(default_factory=list)
    """Of the running cell."""
    doing: str = "beginning"
    """What it was doing last, for the words of a deadline."""
    _cell_is_live: bool = False

    async def submit(self, answer: object) -> None:
        """The first answer submitted while a cell runs counts; a process left behind by one can't submit later."""
        if self._cell_is_live and self.answer is None:
            self.answer = str(answer)

    def take_calls(self) -> tuple[ToolCall, ...]:
        taken, self.calls = tuple(self.calls), []
        return taken

    def span(self, name: str, doing: str) -> "_Span":
        """Do this for the length of the block; what ends the block with an error leaves `doing` as it is."""
        return _Span(self, name, doing)

    @contextmanager
    def live_cell(self) -> Iterator[None]:
        self._cell_is_live = True
        try:
            yield
        finally:
            self._cell_is_live = False


class _TurnDeadline:
    """`asyncio.timeout` that moves with every turn.

    Its timer is left to go off, and looks then when the turn that runs now is due: one a turn would cost more than most of
    what a turn does.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._limit = asyncio.timeout(None)
        self._due: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def move(self, timeout_s: float) -> None:
        """Cancel the block when so much time has passed from now [s]."""
        self.reschedule(self._loop.time() + timeout_s)

    def when(self) -> float | None:
        return self._due

    def reschedule(self, when: float | None) -> None:
        """As `asyncio.Timeout` does, but never to an earlier time than before."""
        self._due = when
        if when is not None and self._timer is None:
            self._timer = self._loop.call_at(when, self._look)

    def expired(self) -> bool:
        return self._limit.expired()

    async def __aenter__(self) -> None:
        await self._limit.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if self._timer is not None:
            self._timer.cancel()
            # a timer holds the context it was set in, and the episode's has its deadlines (l0fast/deadlines.py)
            self._timer = None
        return await self._limit.__aexit__(kind, error, trace)

    def _look(self) -> None:
        self._timer = None
        now = self._loop.time()
        if self._due is None:
            return
        if now < self._due:
            self._timer = self._loop.call_at(self._due, self._look)
        else:
            self._limit.reschedule(now)


class _Span:
    """A `with` block of an episode. No generator: there are several a turn."""

    __slots__ = ("_doing", "_episode", "_observed", "_outer")

    def __init__(self, episode: _Episode, name: str, doing: str):
        self._episode, self._doing = episode, doing
        self._observed = episode.observer.span(name)

    def __enter__(self) -> None:
        self._outer, self._episode.doing = self._episode.doing, self._doing
        self._observed.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._observed.__exit__(kind, error, trace)
        if kind is None:
            self._episode.doing = self._outer
