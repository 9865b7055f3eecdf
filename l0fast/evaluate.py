"""How good is it? A policy or an endpoint, on one or many benchmarks, with NB-Agent or without.

    python -m l0fast.evaluate MODEL --on geography --on questions.jsonl --samples 4
    python -m l0fast.evaluate NAME --endpoint URL --on simpleqa --tools web_search --tools get_webpage_in_markdown
    python -m l0fast.evaluate --compare OUT_A OUT_B

    benchmarks x samples --> episodes, at most --max-open at once: agent x engine x sandbox --> scores --> episodes.jsonl
                                                                                              --> report.json, .csv, .md

MODEL is a policy that ships, a model folder, a run or a checkpoint, and runs here; with --endpoint it is a name there. It is
asked with the settings it was trained with, where those are known; --section.key VALUE changes any, as for l0fast.run. The
same command goes on where it was, as long as its words mean the same weights and the same questions. Failed episodes have no
vote; they are counted, and played again by the next command.

The report says how late the event loop was. `--engine.kind simulated --questions 1000 --max-open 1000` plays demonstrations at
the speed of a model of some size, to see how late it is beside a thousand; `--engine.slots` of them are answered at once.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import orjson
import uvloop
from rich.console import Console

from l0fast.agent.chat import Chat
from l0fast.agent.nb_agent import NBAgent
from l0fast.cli import changed, model_and_flags
from l0fast.config import RolloutConfig, RunConfig
from l0fast.engine.base import Engine, TextEngine
from l0fast.engine.clock import CompressedClock
from l0fast.engine.openai import EndpointConfig, openai_engine
from l0fast.engine.simulated import SimulatedEngine, Speed
from l0fast.engine.transformers import transformers_engine
from l0fast.errors import L0fastError, UsageError, known
from l0fast.evaluation.benchmarks import Benchmark, load_benchmarks
from l0fast.evaluation.direct import DirectAnswerer
from l0fast.evaluation.episodes import Episodes, Outcome, fingerprint, read_outcomes
from l0fast.evaluation.report import compared, comparison_table, figures, summary, write_report
from l0fast.files import UNLOCKED
from l0fast.first_process import step_back
from l0fast.garbage import OldObjects, old_objects_aside
from l0fast.loop_lag import LoopLag
from l0fast.policies import GENERAL_AGENT, Policy, open_policy
from l0fast.rooms import absent_comparers, absent_readers, agent_of, check_judge, search_policy
from l0fast.run_dir import write_json
from l0fast.sandbox import open_sandbox
from l0fast.sandbox.base import Sandbox
from l0fast.seeding import derive_seed
from l0fast.tasks.judge import judge_endpoint, open_judge, try_judge
from l0fast.tasks.scoring import Scorer, open_scorer
from l0fast.tools.broker import Broker, open_broker
from l0fast.tools.local_search import LocalSearch, search_tool
from l0fast.tools.toolbox import Toolbox, check_tools, open_toolbox, try_tools
from l0fast.trajectory import spell_out
from l0fast.types import Task, Trajectory
from l0fast.warm_start.demonstrations import Demonstrator

SAY_EVERY_S = 10.0
SIMULATED = Speed(step_s=0.02)
"""Of a simulated engine: 50 tokens/s for each of `engine.slots` conversations."""
BEGIN_EVERY_S = 0.001
"""Between the first episodes [s]."""


class Answerer(Protocol):
    async def run_episode(self, task: Task, *, index: int, temperature: float, seed: int) -> Trajectory: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is asked of whom."""

    model: str
    endpoint: EndpointConfig | None
    flags: Sequence[str]
    """Settings on top of those that the policy was trained with, as l0fast.run takes them."""
    benchmarks: Sequence[str]
    tools: Sequence[str]
    samples: int
    questions: int
    """Of each benchmark; 0 for all."""
    temperature: float
    direct: bool
    max_open: int
    seed: int
    out: Path


async def evaluate(plan: Plan, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Play what is missing, write the report, return it. Raises UsageError."""
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        policy = None if plan.endpoint else await enter(open_policy(plan.model))
        config = changed((policy.trained_with if policy else None) or GENERAL, plan.flags)
        if policy and config.engine.kind == "sglang":
            say(
                "engine.kind = 'sglang' is for training: transformers answers here, SGLang as an --endpoint (l0fast.serve)"
            )
        benchmarks = await asyncio.to_thread(load_benchmarks, plan.benchmarks, config.task, plan.questions)
        for benchmark in benchmarks:
            say(benchmark.report or f"{benchmark.name}: {len(benchmark.tasks):,} questions")
        # none is opened that nobody asks
        tools = () if plan.direct else plan.tools or config.tools.use
        _check(config, tools, benchmarks)
        about = _about(plan, policy)
        await asyncio.to_thread(_claim, plan.out, about)
        episodes = await enter(Episodes(plan.out / "episodes.jsonl"))
        if not episodes.locked:
            say(UNLOCKED.format(plan.out))
        # now that nobody else can: of one that came to no answer it may say something else
        await asyncio.to_thread(write_json, plan.out / "evaluation.json", about)
        await asyncio.to_thread(_check_questions, plan, benchmarks, episodes)
        chat = await asyncio.to_thread(Chat, policy.folder) if policy else None
        sandbox = await enter(open_sandbox(config.sandbox, max_sessions=plan.max_open, log=say))
        broker = await enter(open_broker(config.tools.cache_file, config.tools.cache_mode, log=say))
        judge = await enter(open_judge(config.judge, say))
        reward = config.reward.model_copy(
            update={"f1": config.reward.f1 or 1.0, "exact_match": config.reward.exact_match or 1.0}
        )
        scorer = await enter(
            open_scorer(reward, max_new_tokens=config.agent.max_new_tokens, sandbox=sandbox, judge=judge)
        )
        box = await enter(open_toolbox(tools, config.tools, config.web, broker))
        waiting = [task for b in benchmarks for _, task, _ in _unanswered(b, plan, episodes)]
        if waiting:
            await try_tools(box)
        if waiting and (config.reward.judge or any(task.check == "judge" for task in waiting)):
            await try_judge(judge)
        engine = await enter(_engine(plan, policy, config, benchmarks))
        answerers = {
            b.name: DirectAnswerer(chat=chat, engine=engine, config=config.agent)
            if plan.direct
            else _agent(b, config, chat, engine, sandbox, broker, box)
            for b in benchmarks
        }
        lag = LoopLag()
        with old_objects_aside() as old_objects:
            beat = asyncio.create_task(lag.run())
            stack.callback(beat.cancel)
            began = time.monotonic()
            played, failed = await _play(plan, benchmarks, answerers, scorer, episodes, old_objects, say)
            wall_s = time.monotonic() - began
        for complaint in broker.complaints():
            say(complaint)
        # before the report is worked out, which may take the loop a while
        late = {name: value for name, value in lag.take_step().items() if name.startswith("loop/blocked")}
        late |= lag.take_run()
        report = {
            "model": plan.model,
            "endpoint": plan.endpoint.url if plan.endpoint else None,
            "with": "direct answers" if plan.direct else "NB-Agent",
            "temperature": plan.temperature,
            "benchmarks": {b.name: figures(_of(b, plan, episodes), failed=failed.get(b.name, 0)) for b in benchmarks},
            "played": played,
            "wall_s": wall_s,
            **late,
        }
    await asyncio.to_thread(write_report, plan.out, report)
    return report


def _of(benchmark: Benchmark, plan: Plan, episodes: Episodes) -> dict[str, list[Outcome]]:
    wanted = {task.id: [(benchmark.name, task.id, n) for n in range(plan.samples)] for task in benchmark.tasks}
    return {task: [episodes.done[key] for key in keys if key in episodes.done] for task, keys in wanted.items()}


def _unanswered(benchmark: Benchmark, plan: Plan, episodes: Episodes) -> list[tuple[str, Task, int]]:
    """Benchmark, task and number of each sample that has no vote yet."""
    return [
        (benchmark.name, task, n)
        for task in benchmark.tasks
        for n in range(plan.samples)
        if (benchmark.name, task.id, n) not in episodes.done
    ]


async def _play(
    plan: Plan,
    benchmarks: Sequence[Benchmark],
    answerers: Mapping[str, Answerer],
    scorer: Scorer,
    episodes: Episodes,
    old_objects: OldObjects,
    say: Callable[[str], None],
) -> tuple[int, dict[str, int]]:
    """All that is missing; how many were played, and how many failed, by benchmark."""
    todo = [missing for b in benchmarks for missing in _unanswered(b, plan, episodes)]
    failed: dict[str, int] = {}
    done, told = 0, time.monotonic()
    if len(todo) < (total := sum(len(b.tasks) for b in benchmarks) * plan.samples):
        say(f"{total - len(todo):,} of {total:,} episodes are there already")

    async def one(name: str, task: Task, n: int) -> None:
        nonlocal done, told
        seed = derive_seed(plan.seed, "evaluation", name, task.id, n)
        trajectory = await answerers[name].run_episode(task, index=n, temperature=plan.temperature, seed=seed)
        trajectory, scores = await scorer.scored(trajectory)
        await episodes.add(name, n, trajectory, scores)
        failed[name] = failed.get(name, 0) + trajectory.status.failed
        done += 1
        if time.monotonic() - told > SAY_EVERY_S:
            told = time.monotonic()
            old_objects.sweep()
            say(f"{done:,} of {len(todo):,} episodes, {sum(failed.values()):,} failed")

    # workers, not a task for each of what may be a million episodes
    waiting = iter(todo)

    async def worker() -> None:
        for name, task, n in waiting:
            await one(name, task, n)

    async with asyncio.TaskGroup() as tg:
        for _ in range(min(plan.max_open, len(todo))):
            tg.create_task(worker())
            # a thousand that begin at once would stall the loop, and go on in step
            await asyncio.sleep(BEGIN_EVERY_S)
    return done, failed


@asynccontextmanager
async def _engine(
    plan: Plan, policy: Policy | None, config: RunConfig, benchmarks: Sequence[Benchmark]
) -> AsyncIterator[Engine | TextEngine]:
    """Who answers."""
    if policy is None:
        assert plan.endpoint is not None
        # a stop of its own keeps a model from inventing the output of its code
        stop = () if plan.direct or config.agent.prompt != "full" else ("</code>",)
        endpoint = plan.endpoint.model_copy(update={"max_concurrent": plan.max_open, "stop": stop})
        async with openai_engine(endpoint) as engine:
            yield engine
    elif config.engine.kind == "simulated":
        chat, worlds = Chat(policy.folder), [b.world for b in benchmarks if b.world is not None]
        if len(worlds) < len(benchmarks):
            raise UsageError(
                "--engine.kind simulated plays demonstrations of worlds that ship: leave it out, or ask of those"
            )
        yield SimulatedEngine(
            vocab_size=chat.vocab_size,
            max_tokens=config.agent.context_tokens,
            slots=config.engine.slots,
            seed=plan.seed,
            script=Demonstrator(chat, worlds, good_rate=0.5, seed=plan.seed),
            # the time that an engine takes: one that took none would keep the loop busy without a pause
            speed=SIMULATED,
            clock=CompressedClock(),
        )
    else:
        slots = config.engine.model_copy(update={"slots": min(config.engine.slots, plan.max_open)})
        async with transformers_engine(slots, policy.folder, max_tokens=config.agent.context_tokens) as engine:
            yield engine


def _agent(
    benchmark: Benchmark,
    config: RunConfig,
    chat: Chat | None,
    engine: Engine | TextEngine,
    sandbox: Sandbox,
    broker: Broker,
    box: Toolbox,
) -> NBAgent:
    tools = box.common
    if benchmark.corpus is not None:
        search = search_tool(LocalSearch(benchmark.corpus), config.task.search_results)
        # in the place of one that was named, which other benchmarks may need
        others = (tool for tool in tools if tool.name != search.name)
        tools = (*others, broker.wrap(search, search_policy(config), scope=benchmark.name))
    return agent_of(config, chat, engine, sandbox, tools, box)


def _check(config: RunConfig, tools: Sequence[str], benchmarks: Sequence[Benchmark]) -> None:
    """What would be found missing at the first call or the first answer. Raises UsageError."""
    check_tools(tools, config.tools, config.web)
    judge_endpoint(config.judge)
    checks = {b.name: {task.check for task in b.tasks} for b in benchmarks}
    check_judge(config, [f"some of {name}" for name, of in checks.items() if "judge" in of])
    for what in (*absent_readers(config, tools), *absent_comparers(config, set().union(*checks.values()))):
        raise UsageError(f"{what}, or leave that out")


def _about(plan: Plan, policy: Policy | None) -> dict[str, Any]:
    """What two commands have in common that write into one folder."""
    return {
        # not the word: tomorrow a run has a newer checkpoint
        "model": policy.origin if policy else plan.model,
        "endpoint": plan.endpoint and plan.endpoint.url,
        "direct": plan.direct,
        "temperature": plan.temperature,
        "flags": list(plan.flags),
        "tools": list(plan.tools),
        "seed": plan.seed,
    }


def _claim(out: Path, about: Mapping[str, Any]) -> None:
    """The folder is this command's, nobody's yet, or one's that came to no answer. Raises UsageError."""
    file, answers = out / "evaluation.json", out / "episodes.jsonl"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            # a kill may leave the beginning of one
            if any(path.suffix != ".partial" for path in out.iterdir()):
                raise UsageError(f"{out} is not empty, and no evaluation: give another --out")
            write_json(file, about)
            return
        before = orjson.loads(file.read_bytes())
        answered = answers.exists() and answers.stat().st_size > 0
    except OSError as e:
        raise UsageError(f"{out} can't hold an evaluation ({e.strerror}): give another --out") from e
    except orjson.JSONDecodeError as e:
        raise UsageError(f"{file} is not what an evaluation writes ({e}): give another --out") from e
    if answered and before != about:
        name = next(name for name in about if before.get(name) != about[name])
        raise UsageError(
            f"{out} holds another evaluation, with {name} = {before.get(name)!r} and not {about[name]!r}: give another --out"
        )


def _check_questions(plan: Plan, benchmarks: Sequence[Benchmark], episodes: Episodes) -> None:
    """What was answered is what is asked. Raises UsageError."""
    for benchmark in benchmarks:
        for task in benchmark.tasks:
            done = [episodes.done.get((benchmark.name, task.id, n)) for n in range(plan.samples)]
            if any(done) and {outcome.asked for outcome in done if outcome} != {fingerprint(task)}:
                raise UsageError(
                    f"{plan.out} holds another evaluation, in which {task.id} of {benchmark.name} was not "
                    f"{task.question[:80]!r}, or had other answers: give another --out"
                )


GENERAL = RunConfig(
    agent=GENERAL_AGENT, rollout=RolloutConfig(max_turns=10, episode_timeout_s=600.0, turn_timeout_s=600.0)
)
"""How a general model is asked: L0's evaluation settings."""


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m l0fast.evaluate",
        usage="%(prog)s MODEL --on BENCHMARK [options] [--section.key VALUE ...]",
        description="Evaluate a policy or an endpoint on benchmarks. MODEL is a policy that ships, a model folder, a run or a "
        "checkpoint; with --endpoint a name there. Every setting of l0fast.run may be given as --section.key VALUE.",
    )
    p.add_argument(
        "--on", action="append", default=[], metavar="BENCHMARK", help="geography, invented, a file, a data set; repeat"
    )
    p.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible API that answers")
    p.add_argument("--api-key-env", default="", metavar="NAME", help="environment variable of its key")
    p.add_argument("--tools", action="append", default=[], metavar="TOOL", help="what agents can call; repeat")
    p.add_argument("--samples", type=int, default=1, metavar="N", help="episodes of each question")
    p.add_argument("--questions", type=int, default=0, metavar="N", help="of each benchmark; 0 for all")
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--direct", action="store_true", help="answer without tools or code")
    p.add_argument("--max-open", type=int, default=128, metavar="N", help="episodes at once")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, metavar="DIR", help="default: evaluations/MODEL")
    p.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="two evaluations: is the difference more than noise?"
    )
    return p


def plan_of(argv: Sequence[str]) -> tuple[Plan | None, tuple[Path, Path] | None]:
    """What the words ask for: a plan, or two folders to compare. Raises UsageError."""
    options, rest = _parser().parse_known_args(argv)
    model, flags = model_and_flags(rest)
    if options.compare:
        return None, tuple(options.compare)
    for name, value in (("--samples", options.samples), ("--max-open", options.max_open)):
        if value < 1:
            raise UsageError(f"{name} {value}: give at least 1")
    if options.temperature < 0 or options.questions < 0:
        raise UsageError(f"--temperature {options.temperature:g} --questions {options.questions}: give 0 or more")
    if not model:
        raise UsageError("there is no model: name a policy, a folder, a run, or with --endpoint a model there")
    if not options.on:
        raise UsageError(
            "there is nothing to ask: name a benchmark, for example --on geography or --on questions.jsonl"
        )
    endpoint = None
    if options.endpoint:
        endpoint = EndpointConfig(url=options.endpoint, model=model, api_key_env=options.api_key_env)
    out = options.out or Path("evaluations") / Path(model).name
    return (
        Plan(
            model=model,
            endpoint=endpoint,
            flags=tuple(flags),
            benchmarks=tuple(options.on),
            tools=tuple(options.tools),
            samples=options.samples,
            questions=options.questions,
            temperature=options.temperature,
            direct=options.direct,
            max_open=options.max_open,
            seed=options.seed,
            out=out,
        ),
        None,
    )


def main(argv: Sequence[str]) -> int:
    spell_out()
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    try:
        plan, pair = plan_of(argv)
        if pair is not None:
            a, b = (read_outcomes(folder / "episodes.jsonl") for folder in pair)
            differences = compared(a, b)
            if not differences:
                raise UsageError(f"{pair[0]} and {pair[1]} have no question in common: evaluate both on the same")
            console.print(comparison_table(differences, pair[0].name, pair[1].name), soft_wrap=True, markup=False)
            return 0
        assert plan is not None
        report = uvloop.run(evaluate(plan, partial(errors.print, markup=False, soft_wrap=True)))
        console.print(summary(report), soft_wrap=True, markup=False)
        errors.print(f"written to {plan.out}", markup=False)
    except (L0fastError, BaseExceptionGroup) as e:
        if (error := known(e)) is None:
            raise
        errors.print(f"l0fast: {error}", markup=False, soft_wrap=True)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        errors.print("interrupted; the same command goes on", markup=False)
        return 130
    return 0


if __name__ == "__main__":
    step_back()
    sys.exit(main(sys.argv[1:]))
