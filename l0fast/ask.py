"""NB-Agent on its own: one question, one answer, and the whole way there.

    import asyncio
    from l0fast.ask import ask

    trajectory = asyncio.run(ask("Who wrote it?", endpoint="http://127.0.0.1:8000", model="geography", tools=["search=notes/"]))
    print(trajectory.answer)

With an endpoint the model answers there, by any OpenAI-compatible API; without one it runs here, in a child process. The
code it writes runs in the strongest sandbox this machine has, with the tools named and no network. `python -m l0fast.agent`
is the same from a terminal.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from l0fast.agent.chat import Chat
from l0fast.agent.nb_agent import EpisodeLimits, NBAgent
from l0fast.config import AgentConfig, Config, EngineConfig, RunConfig, SandboxConfig, ToolsConfig, WebConfig
from l0fast.engine.openai import EndpointConfig, openai_engine
from l0fast.engine.transformers import transformers_engine
from l0fast.errors import UsageError
from l0fast.policies import GENERAL_AGENT, open_policy
from l0fast.sandbox import open_sandbox
from l0fast.sandbox.base import ToolSpec
from l0fast.tools.broker import open_broker
from l0fast.tools.registry import register
from l0fast.tools.toolbox import open_toolbox
from l0fast.types import Task, Trajectory, Turn

KEEP_CHARS = 4_000_000
"""Longest answer of a tool that the notebook can replay [characters]."""
CLOSING_TAG = "</code>"
"""Ends an answer of a general model, which might go on and invent its code's output."""


class AskConfig(Config):
    agent: AgentConfig = GENERAL_AGENT
    max_turns: PositiveInt = 10
    """Turns before it is over, answered or not [turns]."""
    timeout_s: PositiveFloat = 600.0
    """Wall clock of all of it [s]."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 0 takes the likeliest tokens."""
    seed: NonNegativeInt = 0
    """Of the sampling, where the endpoint has a use for it, and of the session."""
    tools: ToolsConfig = ToolsConfig(timeout_s=60.0)
    web: WebConfig = WebConfig()
    sandbox: SandboxConfig = SandboxConfig()
    engine: EngineConfig = EngineConfig(slots=1)
    """Of a model that runs here, by transformers."""


async def ask(
    question: str,
    *,
    model: str = "geography",
    endpoint: str | EndpointConfig | None = None,
    tools: Sequence[str] = (),
    files: Iterable[str | Path] = (),
    settings: Mapping[str, Any] = MappingProxyType({}),
    on_text: Callable[[str], None] | None = None,
    on_turn: Callable[[Turn], None] = lambda turn: None,
    log: Callable[[str], None] = lambda line: None,
) -> Trajectory:
    """Play one episode. What the world breaks is in the trajectory's `status` and `cause`.

    Args:
        model: its name at the endpoint; without one a policy that ships, a model folder, a run or a checkpoint.
        endpoint: its address, or all about it, the model's name there too.
        tools: as --tools takes them: "search=FOLDER", "module:function", ...; none takes those of the settings.
        files: copied to where the code runs, and named in the question.
        settings: what shall differ from what the policy was trained with, where that is known, else from AskConfig's
            defaults: {"max_turns": 20, "agent": {"cell_timeout_s": 300}}.
        on_text: told what the model writes while it does; of models that run here each turn at once.
        on_turn: told each turn when it is over.
        log: told which sandbox it is.

    Raises:
        UsageError: something to set right.
    """
    task = task_of(question, files)
    async with AsyncExitStack() as stack:
        chat = None
        if endpoint is not None:
            if settings.get("engine"):
                raise UsageError(
                    f"engine = {settings['engine']}, but the model answers at an endpoint: leave engine.* out, or the endpoint"
                )
            config = _changed(AskConfig(), settings)
            about = _endpoint(endpoint, model, config)
            listener = None if on_text is None else lambda conversation, text: on_text(text)
            engine = await stack.enter_async_context(openai_engine(about, on_text=listener))
        else:
            policy = await stack.enter_async_context(open_policy(model))
            config = _changed(config_of(policy.trained_with), settings)
            if config.engine.kind not in ("auto", "transformers"):
                raise UsageError(
                    f"engine.kind = {config.engine.kind!r}, but transformers answers for a model that runs here: leave it "
                    "out, or have it served (python -m l0fast.serve) and give --endpoint"
                )
            chat = Chat(policy.folder)
            engine = await stack.enter_async_context(
                transformers_engine(config.engine, policy.folder, max_tokens=config.agent.context_tokens)
            )
        sandbox = await stack.enter_async_context(open_sandbox(config.sandbox, max_sessions=1, log=log))
        broker = await stack.enter_async_context(open_broker(config.tools.cache_file, config.tools.cache_mode))
        box = await stack.enter_async_context(open_toolbox(tools or config.tools.use, config.tools, config.web, broker))

        def turn_is_over(turn: Turn) -> None:
            if chat is not None and on_text is not None:
                on_text(turn.text)
            on_turn(turn)

        agent = NBAgent(
            chat=chat,
            engine=engine,
            sandbox=sandbox,
            tools=(*box.common, *box.for_task(task)),
            config=config.agent,
            limits=EpisodeLimits(max_turns=config.max_turns, timeout_s=config.timeout_s),
            on_turn=turn_is_over,
            keep_chars=KEEP_CHARS,
        )
        return await agent.run_episode(task, index=0, temperature=config.temperature, seed=config.seed)
    raise AssertionError("nothing suppresses what is raised in there")


def config_of(trained_with: RunConfig | None) -> AskConfig:
    """What a policy is best asked with."""
    if trained_with is None:
        return AskConfig()
    return AskConfig(
        agent=trained_with.agent,
        max_turns=trained_with.rollout.max_turns,
        sandbox=trained_with.sandbox,
        # what was recorded while it trained answers no other question
        tools=trained_with.tools.model_copy(update={"cache_file": "", "cache_mode": "use"}),
        web=trained_with.web,
        engine=trained_with.engine.model_copy(update={"slots": 1, "kind": "auto"}),
    )


def task_of(question: str, files: Iterable[str | Path]) -> Task:
    """A question, with its files. Raises UsageError."""
    if not question.strip():
        raise UsageError("there is no question: write it in quotation marks")
    named: dict[str, str] = {}
    for file in map(Path, files):
        if not file.is_file():
            raise UsageError(f"--file {file}: there is no such file")
        if file.name in named:
            raise UsageError(
                f"--file {file}: there is a {file.name} already, from {named[file.name]}: rename one of the two"
            )
        named[file.name] = str(file)
    if named:
        question = f"{question}\n\nFiles in the working directory: {', '.join(named)}"
    return Task(id=f"asked-{time.strftime('%Y%m%d-%H%M%S')}", question=question, answers=(), files=named)


def _changed(config: AskConfig, settings: Mapping[str, Any]) -> AskConfig:
    """Raises UsageError for settings that there are not, or that can't be."""
    merged = config.model_dump()
    for name, value in settings.items():
        merged[name] = {**merged.get(name, {}), **value} if isinstance(value, Mapping) else value
    try:
        return AskConfig.model_validate(merged)
    except ValidationError as e:
        error = e.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, error["loc"]))
        raise UsageError(
            f"{where} = {error['input']!r}: {error['msg']}; {type(config).__name__} lists all settings"
        ) from e


def _endpoint(endpoint: str | EndpointConfig, model: str, config: AskConfig) -> EndpointConfig:
    if isinstance(endpoint, str):
        endpoint = EndpointConfig(url=endpoint, model=model)
    ours = {"stop": (CLOSING_TAG,) if config.agent.prompt == "full" else (), "timeout_s": config.timeout_s}
    return endpoint.model_copy(update={k: v for k, v in ours.items() if k not in endpoint.model_fields_set})


def _geography(argument: str) -> ToolSpec:
    """`search` over the sentences that the questions of the shipped policy are about."""
    from l0fast.tasks.geography import geography
    from l0fast.tools.local_search import LocalSearch, search_tool

    return search_tool(LocalSearch(geography().full_corpus), RunConfig().task.search_results)


register("geography", _geography)
