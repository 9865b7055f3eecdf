"""Does a policy answer as well behind an OpenAI-compatible endpoint as in this process?

    python -m bench.endpoint [MODEL] [--questions 200] [--temperature 0 1] [--open 8] [--results bench/results]

`l0fast.evaluate` twice at each temperature, on the same held-out questions of the built-in world: with the engine of this
process, and asking a server that `l0fast.serve` starts, in a process of its own, over HTTP, with messages. `low` and `high`
bound the difference of the accuracies (95 %, paired bootstrap over questions); `same_answers` counts the questions that got
the same answer from both, right or wrong: at temperature 0 all should, at 1 each draws for itself. The last line is JSON.
"""

import argparse
import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from bench.at_least import at_least, not_below_0
from bench.ending import end_like_ctrl_c
from bench.machine import machine
from bench.results_folder import results_folder, write
from l0fast.cli import model_and_flags
from l0fast.config import RunConfig
from l0fast.engine.openai import EndpointConfig
from l0fast.errors import UsageError
from l0fast.evaluate import Plan, evaluate
from l0fast.evaluation.episodes import read_outcomes
from l0fast.evaluation.report import compared
from l0fast.policies import open_policy
from l0fast.serve import serve

BENCHMARK = "geography"
TIMEOUT_S = 3600.0
"""Of an episode: nothing is to be lost to a server that is slow [s]."""


def as_trained(config: RunConfig) -> list[str]:
    """The flags that have an endpoint asked as its policy was in training: over HTTP nobody knows how that was."""
    agent = {f"agent.{name}": value for name, value in config.agent.model_dump(mode="json").items()}
    timeouts = {f"rollout.{name}": TIMEOUT_S for name in ("episode_timeout_s", "turn_timeout_s")}
    settings = agent | {"rollout.max_turns": config.rollout.max_turns} | timeouts
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


async def measure(plan: Plan, temperatures: Sequence[float], flags: Sequence[str]) -> dict[str, Any]:
    async with open_policy(plan.model) as policy:
        plan = replace(plan, flags=[*as_trained(policy.trained_with or RunConfig()), *flags])
    plans = [replace(plan, temperature=t, out=plan.out / f"{t:g}") for t in temperatures]
    here = [await evaluate(replace(p, out=p.out / "here")) for p in plans]
    async with serve(plan.model) as served:
        endpoint = EndpointConfig(url=served.url, model=served.name, timeout_s=TIMEOUT_S)
        there = [await evaluate(replace(p, model=served.name, endpoint=endpoint, out=p.out / "there")) for p in plans]
    rows = [row(p, a, b) for p, a, b in zip(plans, here, there, strict=True)]
    return {"machine": machine(), "model": plan.model, "server": served.server, "temperatures": rows}


def row(plan: Plan, here: Mapping[str, Any], there: Mapping[str, Any]) -> dict[str, Any]:
    files = [plan.out / name / "episodes.jsonl" for name in ("here", "there")]
    [difference] = compared(*(read_outcomes(file) for file in files)).values()
    answers = [{said["task"]["id"]: said["answer"] for said in map(orjson.loads, file.open("rb"))} for file in files]
    return {
        "temperature": plan.temperature,
        "questions": difference.questions,
        "in_process": difference.a,
        "endpoint": difference.b,
        "low": difference.low,
        "high": difference.high,
        "p_value": difference.p_value,
        "same_answers": sum(answers[0][task] == answer for task, answer in answers[1].items()),
        "failed": sum(report["benchmarks"][BENCHMARK]["failed"] for report in (here, there)),
        "in_process_s": round(here["wall_s"], 1),
        "endpoint_s": round(there["wall_s"], 1),
    }


def main(argv: Sequence[str] | None = None) -> None:
    end_like_ctrl_c()
    parser = argparse.ArgumentParser(
        prog="python -m bench.endpoint",
        usage="%(prog)s [MODEL] [options] [--section.key VALUE ...]",
        description="Accuracy over an endpoint against that in this process.",
    )
    parser.add_argument("--questions", type=at_least(1), default=200)
    parser.add_argument("--open", type=at_least(1), default=8, metavar="N", help="episodes at once")
    parser.add_argument("--results", type=results_folder, help="folder for endpoint_accuracy.json")
    parser.add_argument("--temperature", type=not_below_0, nargs="+", default=[0.0, 1.0])
    options, rest = parser.parse_known_args(argv)
    try:
        model, flags = model_and_flags(rest)
    except UsageError as e:
        parser.error(str(e))
    with tempfile.TemporaryDirectory(prefix="l0fast-bench-") as folder:
        plan = Plan(
            model=model or "geography",
            endpoint=None,
            flags=(),
            benchmarks=(BENCHMARK,),
            tools=(),
            samples=1,
            questions=options.questions,
            temperature=0.0,
            direct=False,
            max_open=options.open,
            seed=0,
            out=Path(folder),
        )
        try:
            result = asyncio.run(measure(plan, options.temperature, flags))
        except UsageError as e:
            parser.error(str(e))
    for figures in result["temperatures"]:
        print(
            "temperature {temperature:g}, {questions} questions: {in_process:.3f} here, {endpoint:.3f} over HTTP; difference "
            "{low:+.3f} to {high:+.3f} (95 %), p = {p_value:.2f}; {same_answers} same answers".format(**figures)
        )
    write(result, options.results, "endpoint_accuracy.json")


if __name__ == "__main__":
    main()
