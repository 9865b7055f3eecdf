"""Everything a run works with, opened from its settings, and ended in reverse order. What the rooms do is theirs.

    sandbox, tools   what agents need
    learner          then the engine, which may take its weights from the learner's ranks
    engine           behind the gate of admission where episodes share one cache
    agents           one for each scope of the curriculum: they differ in what they can find

`check` finds what is wrong with the settings before any of it starts.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path

from l0fast import __version__
from l0fast.agent.chat import Chat
from l0fast.agent.nb_agent import EpisodeLimits, NBAgent
from l0fast.allocator import without_expandable_segments
from l0fast.config import RunConfig
from l0fast.disk import check_caches
from l0fast.engine.base import Engine, TextEngine
from l0fast.engine.buckets import DiskWeights, GroupWeights, HostWeights, RankWeights
from l0fast.engine.fleet import Fleet, WeightSource
from l0fast.engine.gate import GatedEngine, gated
from l0fast.engine.sglang import sglang_fleet
from l0fast.engine.sglang_process import check_sockets, import_sglang, more_arguments
from l0fast.engine.simulated import SimulatedEngine
from l0fast.engine.transformers import check_model_folder, transformers_engine
from l0fast.errors import UsageError
from l0fast.hub import download_model, is_hub_name
from l0fast.ipc import SharedWeights, shared_weights
from l0fast.layout import Layout, check_layout, engine_kind, sglang_layout, wait_for_memory
from l0fast.learner.advantage import streams
from l0fast.learner.client import LearnerClient, learner, num_gpus
from l0fast.meters import Meters
from l0fast.observer import NOTHING, Observer
from l0fast.policies import MODELS
from l0fast.rollout.admission import Admission
from l0fast.sandbox import open_sandbox
from l0fast.sandbox.base import Sandbox, ToolSpec
from l0fast.sinks import absent_sinks
from l0fast.tasks.curriculum import NAMED_TOOLS, Curriculum, load_curriculum
from l0fast.tasks.judge import judge_endpoint, open_judge, try_judge
from l0fast.tasks.scoring import Scorer, load_custom, open_scorer
from l0fast.tasks.world import World
from l0fast.tools.broker import Broker, ToolPolicy, open_broker
from l0fast.tools.local_search import LocalSearch, search_tool
from l0fast.tools.toolbox import Toolbox, check_tools, open_toolbox, policy_of, try_tools
from l0fast.types import Task
from l0fast.warm_start.demonstrations import Demonstrator


@dataclass(frozen=True, slots=True, kw_only=True)
class Rooms:
    """What a run works with."""

    curriculum: Curriculum
    agents: Mapping[str, NBAgent]
    """By scope of the curriculum: they differ in what they can find."""
    scorer: Scorer
    broker: Broker
    engine: Engine
    sleeper: Fleet | None
    """The engines that give the learner their memory while it works, if they do."""
    learner: LearnerClient


def check(config: RunConfig) -> None:
    """All that can be found wrong before anything starts. Raises UsageError."""
    check_settings(config)
    if with_sglang := engine_kind(config) == "sglang":
        _check_sglang(config)
    if num_gpus():
        check_caches(with_sglang=with_sglang)
    on_hub = is_hub_name(config.model.path)
    if not on_hub:
        _check_model(config)
    for what in absent_packages(config, check_questions(config)):
        raise UsageError(f"{what}, or leave that out")
    if on_hub:
        # last: it may take an hour to come
        _check_model(config)


def _check_sglang(config: RunConfig) -> None:
    """Whatever the model."""
    check_sockets()
    sglang_layout(config, num_gpus())
    if find_spec("sglang") is None:
        raise UsageError(
            "engine.kind = 'sglang', which is not installed: pip install 'l0fast[gpu]', or take --engine.kind transformers"
        )


def _check_model(config: RunConfig) -> None:
    folder = model_folder(config.model.path)
    Chat(folder).continuation("", closed=True)
    check_model_folder(folder, config.agent.context_tokens)
    if engine_kind(config) == "sglang":
        check_layout(config, folder, gpus=num_gpus())


def check_questions(config: RunConfig) -> set[str]:
    """Read what is asked, and return by which checks it is judged. Raises UsageError."""
    if config.task.kind == "questions":
        check_tools(config.tools.use, config.tools, config.web)
    judge_endpoint(config.judge)
    try:
        curriculum = load_curriculum(config)
        heldout = curriculum.heldout(config.eval.questions)
    except UsageError:
        raise
    except ValueError as e:
        raise UsageError(f"eval.questions = {config.eval.questions}: {e}") from e
    check_judge(config, _judged(curriculum, heldout))
    return {*curriculum.checks, *(task.check for task in heldout)}


def _judged(curriculum: Curriculum, heldout: Sequence[Task]) -> list[str]:
    """What is judged by a model."""
    judged = {
        "some of task.eval": any(task.check == "judge" for task in heldout),
        "some of task.train": "judge" in curriculum.checks,
    }
    return [what for what, is_so in judged.items() if is_so]


def check_judge(config: RunConfig, judged: Sequence[str]) -> None:
    """`judged`: what is judged by a model. Raises UsageError where there is none to ask."""
    asks = [
        *["reward.judge asks a model"] * bool(config.reward.judge),
        *(f"{what} is judged by a model" for what in judged),
    ]
    if asks and not config.judge.endpoint:
        raise UsageError(
            f"{asks[0]}, but judge.endpoint is empty: set --judge.endpoint and --judge.model, or leave that out"
        )


def absent_packages(config: RunConfig, checks: Collection[str]) -> list[str]:
    """What a run asks for that is not installed, each with the way to get it."""
    tools = config.tools.use if config.task.kind == "questions" else ()
    return [*absent_sinks(config.metrics.sinks), *absent_readers(config, tools), *absent_comparers(config, checks)]


def absent_readers(config: RunConfig, tools: Collection[str]) -> list[str]:
    """Of what reads pages and files: agents would be told so at every page, and nobody else."""
    reads = "inspect_file" in tools or ("get_webpage_in_markdown" in tools and config.web.page_reader == "local")
    absent = [name for name in ("trafilatura", "pypdf", "openpyxl", "pebble") if find_spec(name) is None]
    if not reads or not absent or config.tools.cache_mode == "replay":
        return []
    return [f"pages and files are read with {', '.join(absent)}, which is not installed: pip install 'l0fast[web]'"]


def absent_comparers(config: RunConfig, checks: Collection[str]) -> list[str]:
    """Of what compares answers."""
    if not (config.reward.math or "math" in checks) or find_spec("math_verify") is not None:
        return []
    return ["expressions are compared by math-verify, which is not installed: pip install 'l0fast[math]'"]


def check_settings(config: RunConfig) -> None:
    """What contradicts itself, wherever it is to run. Raises UsageError."""
    task, learner = config.task, config.learner
    more_arguments(config.engine)
    for reward in config.reward.custom:
        load_custom(reward)
    if task.kind == "questions":
        if config.engine.kind == "simulated":
            raise UsageError(
                "engine.kind = 'simulated' plays demonstrations of the worlds that ship, but task.kind = 'questions': take "
                "another engine"
            )
        for name, sources in (("train", task.train), ("eval", task.eval)):
            if not sources:
                raise UsageError(
                    f"task.kind = 'questions' needs some, but task.{name} is empty: name a source, for example "
                    f"--task.{name} questions.jsonl"
                )
    else:
        for name, given in (("task.train", task.train), ("task.eval", task.eval), ("tools.use", config.tools.use)):
            if given:
                raise UsageError(
                    f"{name} = {list(given)}, but task.kind = {task.kind!r} has questions and a search of its own: set "
                    f"--task.kind questions, or leave {name} out"
                )
    if learner.stream == "on" and learner.minibatches > 1:
        raise UsageError(
            f"learner.stream = 'on', but learner.minibatches = {learner.minibatches} cuts the whole batch into "
            "optimizer steps: leave it at auto, or set --learner.minibatches to 1"
        )
    if learner.stream == "on" and not streams(learner):
        raise UsageError(
            f"learner.stream = 'on', but learner.advantage = {learner.advantage!r} looks at the whole batch as it is "
            "set up: leave it at auto, or take another one, for example --learner.advantage group"
        )


_SMALL = 100e6
"""Weights of a model that may well be trained with what suits the policies that ship [bytes]."""
_FOR_SMALL = ("agent.prompt", "agent.context_tokens", "agent.max_new_tokens", "learner.lr")
"""Settings whose defaults suit those policies."""


def hardly_meant(config: RunConfig, folder: Path | None) -> str | None:
    """One sentence on defaults that a general model was left with: in `folder`, or on the hub.

    A response of 72 tokens and a learning rate of 7e-4 are no mistake that a run would notice.
    """
    if folder and sum(file.stat().st_size for file in folder.glob("*.safetensors")) < _SMALL:
        return None
    default = RunConfig()
    kept = [name for name in _FOR_SMALL if attrgetter(name)(config) == attrgetter(name)(default)]
    if not kept:
        return None
    settings = ", ".join(f"{name} = {attrgetter(name)(config)}" for name in kept)
    return (
        f"{settings}: the default, which suits the small policies that ship, not {config.model.path}: begin with the recipe "
        "`questions`, which has what general models take, or set that"
    )


def model_folder(path: str) -> Path:
    """A folder, a policy that ships by its name, or a model of the hub, downloaded where it isn't here. Raises UsageError."""
    if is_hub_name(path):
        return download_model(path)
    folder = MODELS / path if (MODELS / path).is_dir() else Path(path)
    if not folder.is_dir():
        ships = ", ".join(sorted(p.name for p in MODELS.iterdir()))
        raise UsageError(
            f"model.path = {path!r} is neither a folder nor a policy that ships ({ships}) nor owner/name on the Hugging Face hub: "
            "give one of them"
        )
    return folder


@asynccontextmanager
async def open_rooms(
    config: RunConfig, run_dir: Path, meters: Meters, log: Callable[[str], None]
) -> AsyncIterator[Rooms]:
    """Everything a run works with, started; ended in reverse order. `log` is told what a person should see."""
    folder = model_folder(config.model.path)
    curriculum, indexes = await asyncio.to_thread(_load, config)
    for report in curriculum.reports:
        log(report)
    chat = Chat(folder)
    # those that train, and those that are evaluated beside them or after
    open_episodes = config.rollout.max_open_groups * config.rollout.group_size
    if config.rollout.mode != "on_policy":
        open_episodes += int(config.eval.share * config.engine.slots)
    open_episodes = max(open_episodes, config.engine.slots)
    async with (
        open_sandbox(config.sandbox, max_sessions=open_episodes, log=log) as sandbox,
        open_broker(config.tools.cache_file, config.tools.cache_mode, log=log) as broker,
        open_toolbox(_named_tools(config), config.tools, config.web, broker) as toolbox,
        open_judge(config.judge, log) as judge,
        open_scorer(config.reward, max_new_tokens=config.agent.max_new_tokens, sandbox=sandbox, judge=judge) as scorer,
    ):
        await try_tools(toolbox)
        if config.reward.judge or await asyncio.to_thread(
            lambda: _judged(curriculum, curriculum.heldout(config.eval.questions))
        ):
            await try_judge(judge)
        with shared_weights(folder) as weights:
            kind = engine_kind(config)
            layout = check_layout(config, folder, gpus=num_gpus()) if kind == "sglang" else None
            # engines were dealt out to GPUs; without, both would be slow beyond use, and say nothing of it
            on_gpus = layout is not None and num_gpus() > 0
            if layout is not None and on_gpus:
                await wait_for_memory(config, folder, layout, log)
            log(f"starting the learner and {_described(kind, layout, config)}")
            if layout is not None:
                # its engines would in a minute; one that is broken is so before the learner has loaded
                await asyncio.to_thread(import_sglang, config.engine)
            # engines that read them elsewhere need none in main memory
            published = weights if layout is None or layout.weights == "host" else None
            if on_gpus and (asked := without_expandable_segments(os.environ)):
                whom = "engines and the learner" if layout and layout.weights == "ipc" else "engines"
                log(
                    f"{' and '.join(asked)} asks for expandable_segments: {whom} go without, for such memory can be read by no other "
                    "process in most containers, and an engine that sleeps could not give it back"
                )
            async with (
                learner(
                    _watched(config), folder, weights=published, log_dir=run_dir, on_gpus=on_gpus
                ) as learner_client,
                _engine(
                    config, run_dir, folder, chat, curriculum.worlds, weights, layout, learner_client, log
                ) as engine,
                meters.watching(
                    engine.load, {"sandbox": sandbox.load, "tools": broker.running, "learner": learner_client.state}
                ),
            ):
                meters.gauges["sandbox sessions"] = sandbox.load

                def agent(scope: str) -> NBAgent:
                    tools = toolbox.common
                    if (index := indexes.get(scope)) is not None:
                        search = search_tool(index, config.task.search_results)
                        tools = (broker.wrap(search, search_policy(config), scope=scope),)
                    return agent_of(config, chat, engine, sandbox, tools, toolbox, meters.observer)

                inside = engine.engine if isinstance(engine, GatedEngine) else engine
                yield Rooms(
                    curriculum=curriculum,
                    agents={scope: agent(scope) for scope in curriculum.corpora or (NAMED_TOOLS,)},
                    scorer=scorer,
                    broker=broker,
                    engine=engine,
                    sleeper=inside if isinstance(inside, Fleet) and config.engine.layout == "sleep" else None,
                    learner=learner_client,
                )


def _load(config: RunConfig) -> tuple[Curriculum, dict[str, LocalSearch]]:
    """What is asked, and by scope where it is looked up: tenths of a second each, which no event loop has."""
    curriculum = load_curriculum(config)
    return curriculum, {scope: LocalSearch(corpus) for scope, corpus in curriculum.corpora.items()}


@asynccontextmanager
async def _engine(
    config: RunConfig,
    run_dir: Path,
    folder: Path,
    chat: Chat,
    worlds: Sequence[World],
    weights: SharedWeights,
    layout: Layout | None,
    learner_client: LearnerClient,
    log: Callable[[str], None],
) -> AsyncIterator[Engine]:
    """`layout`: of sglang."""
    max_tokens = config.agent.context_tokens
    if config.engine.kind == "simulated":
        # plays demonstrations: the whole run but for the model, the same to the last id for the same seed
        script = await asyncio.to_thread(Demonstrator, chat, worlds, good_rate=0.5, seed=config.seed)
        simulated = SimulatedEngine(
            vocab_size=chat.vocab_size,
            max_tokens=max_tokens,
            slots=config.engine.slots,
            seed=config.seed,
            script=script,
        )
        yield await _gated(config, simulated, wanted=False)
    elif layout is not None:
        async with sglang_fleet(
            config.engine,
            folder,
            max_tokens=max_tokens,
            source=_weight_source(config, layout, weights, learner_client, run_dir, log),
            count=layout.engines,
            first_gpu=layout.first_gpu,
            log=log,
        ) as engine:
            yield await _gated(config, engine, wanted=True)
    else:
        async with transformers_engine(
            config.engine, folder, max_tokens=max_tokens, weights=weights, log_dir=run_dir
        ) as engine:
            yield await _gated(config, engine, wanted=False)


async def _gated(config: RunConfig, engine: Engine, *, wanted: bool) -> Engine:
    """Behind its gate. `wanted`: what admission "auto" comes down to, one cache of KV entries that all episodes share."""
    if config.rollout.admission == "fixed" or (config.rollout.admission == "auto" and not wanted):
        return engine
    admission = Admission(new_tokens=config.agent.max_new_tokens // 4)
    return await gated(engine, admission, timeout_s=config.engine.request_timeout_s)


def _named_tools(config: RunConfig) -> tuple[str, ...]:
    """Those of the recipe; a world that ships is answered with its own search alone."""
    return config.tools.use if config.task.kind == "questions" else ()


def search_policy(config: RunConfig) -> ToolPolicy:
    """Of the search that a world brings."""
    # of the code that ranks; what is searched, and how many are told, is the tool's own version
    return replace(policy_of(config.tools), version=__version__)


def agent_of(
    config: RunConfig,
    chat: Chat | None,
    engine: Engine | TextEngine,
    sandbox: Sandbox,
    tools: tuple[ToolSpec, ...],
    toolbox: Toolbox,
    observer: Observer = NOTHING,
) -> NBAgent:
    """That plays as the settings say, with these tools and those that the toolbox has for a task."""
    return NBAgent(
        chat=chat,
        engine=engine,
        sandbox=sandbox,
        tools=tools,
        task_tools=toolbox.for_task,
        config=config.agent,
        limits=EpisodeLimits(
            max_turns=config.rollout.max_turns,
            timeout_s=config.rollout.episode_timeout_s,
            turn_timeout_s=config.rollout.turn_timeout_s,
        ),
        observer=observer,
    )


def _weight_source(
    config: RunConfig,
    layout: Layout,
    weights: SharedWeights,
    learner_client: LearnerClient,
    run_dir: Path,
    log: Callable[[str], None],
) -> WeightSource:
    """Where sglang's engines get the learner's weights from."""
    tp = config.engine.tensor_parallel
    if layout.weights == "ipc":
        return RankWeights(learner_client, tensor_parallel=tp, make_room=config.engine.layout == "sleep")
    if layout.weights == "disk":
        return DiskWeights(learner_client, run_dir / "weights")
    if layout.weights == "group":
        # the learner goes on without an engine that hangs before the others have missed their own deadline over it
        wait_s = config.engine.request_timeout_s / 4
        return GroupWeights(learner_client, wait_s=wait_s, tensor_parallel=tp, log=log)
    dtype = "bfloat16" if learner_client.device == "cuda" else "float32"
    return HostWeights(weights, dtype=dtype, tensor_parallel=tp)


def _described(kind: str, layout: Layout | None, config: RunConfig) -> str:
    if layout is None:
        return f"the {kind} engine"
    engines = f"{layout.engines} sglang engine{'s' * (layout.engines > 1)}"
    if not num_gpus():
        return f"{engines} on the CPU, weights by {layout.weights}"
    return f"{engines} ({config.engine.layout}, {config.engine.tensor_parallel} GPUs each, weights by {layout.weights})"


def _watched(config: RunConfig) -> RunConfig:
    """What the learner is run with: there is no mismatch to watch where a simulated engine makes its log-probs up, nor where
    they are of other weights than the learner's."""
    if config.engine.kind != "simulated" and config.rollout.mode == "on_policy":
        return config
    learner = config.learner.model_copy(update={"mismatch_warn": 0.0, "mismatch_stop": 0.0})
    return config.model_copy(update={"learner": learner})
