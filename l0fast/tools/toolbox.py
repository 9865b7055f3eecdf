"""The tools a recipe names, ready for agents: their connections and children, brokered, closed at the end.

    web_search, get_webpage_in_markdown     web.py, through http.py
    inspect_file, visual_qa                 files.py; another one for each task, over the task's own files
    retrieve=URL, elasticsearch=URL/INDEX   corpus/remote.py
    search=FILE, corpus=DIR, module:function   registry.py

A tool that a task's own files decide has two halves: one by path, which the broker keeps answers of, and one by name, which
is all that an agent sees.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from l0fast.config import ToolsConfig, WebConfig
from l0fast.corpus.remote import elasticsearch, retrieve
from l0fast.engine.openai import EndpointConfig, api_key, endpoint_url, openai_engine
from l0fast.errors import ToolError, UsageError
from l0fast.sandbox.base import ToolSpec
from l0fast.tools.broker import Broker, ToolPolicy
from l0fast.tools.convert import Converter, open_converter
from l0fast.tools.files import TaskTool, inspect_file_of, inspect_file_tool, visual_qa_of, visual_qa_tool
from l0fast.tools.http import Http, open_http
from l0fast.tools.registry import SEARCH_RESULTS, describe_tool, load_tool
from l0fast.tools.web import secrets, web_search_tool, webpage_tool
from l0fast.types import Task

OWN = ("web_search", "get_webpage_in_markdown", "inspect_file", "visual_qa")
"""What is known here, besides the registry."""
TRIAL = "capital of Norway"
"""What is searched for to see whether a search answers."""
NEED_HTTP = {"web_search", "get_webpage_in_markdown", "visual_qa", "retrieve", "elasticsearch"}


@dataclass(frozen=True, slots=True)
class Toolbox:
    common: tuple[ToolSpec, ...]
    """The same for all episodes."""
    of_task: tuple[TaskTool, ...]
    trial: ToolSpec | None = None
    """Our search of the web, where it is among them and no replay, with no answer kept."""

    def for_task(self, task: Task) -> tuple[ToolSpec, ...]:
        """What an episode of this task has besides."""
        return tuple(tool(task) for tool in self.of_task)


def policy_of(tools: ToolsConfig) -> ToolPolicy:
    return ToolPolicy(
        timeout_s=tools.timeout_s,
        attempts=tools.attempts,
        max_concurrent=tools.max_concurrent,
        per_minute=tools.per_minute,
    )


@asynccontextmanager
async def open_toolbox(
    names: Sequence[str], tools: ToolsConfig, web: WebConfig, broker: Broker
) -> AsyncIterator[Toolbox]:
    """For as long as the `async with` body runs. Raises UsageError for a name, key or address that can't be used."""
    policy = replace(policy_of(tools), secrets=secrets())
    replay = tools.cache_mode == "replay"
    if twice := {name for name in names if list(names).count(name) > 1}:
        raise UsageError(f"tools.use names {', '.join(sorted(twice))} twice: once is enough")
    async with AsyncExitStack() as stack:
        http: Http | None = None
        converter: Converter | None = None
        if {name.partition("=")[0] for name in names} & NEED_HTTP:
            http = await stack.enter_async_context(
                open_http(
                    timeout_s=web.timeout_s,
                    max_bytes=web.max_bytes,
                    allow_private=web.allow_private,
                    user_agent=web.user_agent,
                )
            )
        if set(names) & {"get_webpage_in_markdown", "inspect_file"}:
            converter = await stack.enter_async_context(open_converter())
        common: list[ToolSpec] = []
        trial: ToolSpec | None = None
        of_task: list[TaskTool] = []
        for name in names:
            match name:
                case "web_search":
                    assert http is not None
                    version = f"{web.search_provider}, {web.search_results}"
                    spec = web_search_tool(web, http, replay=replay)
                    common.append(broker.wrap(spec, replace(policy, version=version)))
                    if not replay:
                        trial = broker.wrap(spec, replace(policy, cache=False), scope="trial")
                case "get_webpage_in_markdown":
                    assert http is not None
                    assert converter is not None
                    version = f"{web.page_reader}, {web.page_chars}"
                    common.append(broker.wrap(webpage_tool(web, http, converter), replace(policy, version=version)))
                case "inspect_file":
                    assert converter is not None
                    inspect = broker.wrap(
                        inspect_file_tool(web, converter), replace(policy, version=f"{web.page_chars}")
                    )
                    of_task.append(inspect_file_of(inspect))
                case "visual_qa":
                    assert http is not None
                    engine = await stack.enter_async_context(openai_engine(_vision(web)))
                    look = broker.wrap(visual_qa_tool(engine, http), replace(policy, version=web.vision_model))
                    of_task.append(visual_qa_of(look))
                case _ if name.startswith(("retrieve=", "elasticsearch=")):
                    assert http is not None
                    common.append(broker.wrap(_retriever(name, http), policy, scope=name.partition("=")[2]))
                case _:
                    # a corpus takes a while to index
                    loaded = await asyncio.to_thread(load_tool, name)
                    if not isinstance(loaded, ToolSpec):
                        loaded = await stack.enter_async_context(loaded)
                    common.append(broker.wrap(loaded, policy, scope=name.partition("=")[2]))
        box = Toolbox(tuple(common), tuple(of_task), trial)
        _check_names(names, (*box.common, *box.for_task(_EXAMPLE)))
        yield box


def check_tools(names: Sequence[str], tools: ToolsConfig, web: WebConfig) -> None:
    """All that `open_toolbox` would refuse of a key, an address or a name, before anything is opened. Raises UsageError."""
    nothing: Any = None
    describe_tools(names, web)
    if "web_search" in names:
        web_search_tool(web, nothing, replay=tools.cache_mode == "replay")
    if "visual_qa" in names:
        endpoint = _vision(web)
        api_key(endpoint, endpoint_url(endpoint.url))


async def try_tools(box: Toolbox) -> None:
    """Ask the web one thing before what is expensive starts. Raises UsageError where no answer comes.

    A key that is wrong, an account that is empty or a network that is not there would be told to every agent, and to nobody
    else.
    """
    if box.trial is None:
        return
    try:
        await box.trial.call(TRIAL)
    except ToolError as e:
        raise UsageError(
            f"a first search of the web failed ({e}): see to its key, its account, this machine's network, and of a SearXNG "
            "that its settings list json under search.formats; or replay a recording (--tools.cache-mode replay)"
        ) from e


def _vision(web: WebConfig) -> EndpointConfig:
    """The model that sees. Raises UsageError."""
    if not (web.vision_endpoint and web.vision_model):
        raise UsageError("visual_qa asks a model that sees: name one with --web.vision-endpoint and --web.vision-model")
    return EndpointConfig(
        url=web.vision_endpoint, model=web.vision_model, api_key_env=web.vision_api_key_env, own_temperature=True
    )


def _check_names(words: Sequence[str], specs: Sequence[ToolSpec]) -> None:
    """A session has one tool of a name. Raises UsageError."""
    called = [spec.name for spec in specs]
    if twice := sorted({name for name in called if called.count(name) > 1}):
        raise UsageError(f"two of the tools {' '.join(words)} are called {', '.join(twice)}: keep one of them")


def _retriever(name: str, http: Http | None) -> ToolSpec:
    """`search(query)`, asked of a retriever that runs elsewhere."""
    kind, _, url = name.partition("=")
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"tools.use has {name!r}: write {kind}=http://HOST:PORT/...")

    async def search(query: str) -> list[str]:
        assert http is not None, "this tool is only shown"
        ask = retrieve if kind == "retrieve" else elasticsearch
        return await ask(http, url, query, SEARCH_RESULTS)

    doc = f"The {SEARCH_RESULTS} passages that match best."
    return ToolSpec(name="search", signature="(query: str) -> list[str]", doc=doc, call=search)


def describe_tools(names: Sequence[str], web: WebConfig) -> tuple[ToolSpec, ...]:
    """As agents are shown them, none of which can be called: no key, connection or index is needed. Raises UsageError."""
    nothing: Any = None
    known = {
        "web_search": lambda: web_search_tool(web, nothing, replay=True),
        "get_webpage_in_markdown": lambda: webpage_tool(web, nothing, nothing),
        "inspect_file": lambda: inspect_file_of(nothing)(_EXAMPLE),
        "visual_qa": lambda: visual_qa_of(nothing)(_EXAMPLE),
    }
    specs = tuple(
        known[name]()
        if name in known
        else _retriever(name, None)
        if name.startswith(("retrieve=", "elasticsearch="))
        else describe_tool(name)
        for name in names
    )
    _check_names(names, specs)
    return specs


_EXAMPLE = Task(id="example", question="", answers=("",))
