"""`--dry-run`: everything a run would need, resolved and checked; what is absent is named, nothing is downloaded or started.

    settings -> the plan -> questions (files are read, the hub is not asked) -> model (its shape, from its folder or a table)
             -> memory of each GPU, FLOPs and seconds a step (learner/cost.py) -> the first prompt

Absent is what this machine lacks and a run would want: a package, a key, a model not yet downloaded. That is no error here:
a recipe for 8 GPUs is looked at on a laptop.
"""

import importlib.util
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from l0fast.agent.chat import Chat
from l0fast.agent.nb_agent import first_messages
from l0fast.cli import Invocation, render_plan
from l0fast.config import RunConfig
from l0fast.disk import no_room
from l0fast.engine.transformers import check_model_folder
from l0fast.errors import UsageError
from l0fast.hub import cached_model, is_hub_name
from l0fast.layout import engine_kind, exported_bytes, gpu_memories, memory_complaint, sglang_layout
from l0fast.learner import cost
from l0fast.learner.client import num_gpus
from l0fast.rooms import absent_packages, check_questions, check_settings, hardly_meant, model_folder
from l0fast.tasks.catalog import DATASETS
from l0fast.tasks.curriculum import load_curriculum
from l0fast.tasks.judge import judge_endpoint
from l0fast.tasks.sources import SUFFIXES, at_hub, load_source, parse_source, source_name
from l0fast.tools.local_search import LocalSearch, search_tool
from l0fast.tools.toolbox import check_tools, describe_tools
from l0fast.types import Task

SHOWN_PROMPT_LINES = 40


@dataclass(slots=True)
class DryRun:
    lines: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    """What this machine lacks, each with the way to get it."""
    doubt: str | None = None
    """What is allowed and hardly meant."""

    def text(self) -> str:
        absent = [f"absent: {what}" for what in self.absent] or ["nothing that this run needs is absent here"]
        doubt = [f"hardly meant: {self.doubt}"] if self.doubt else []
        return "\n".join([*self.lines, "", *doubt, *absent])


def dry_run(invocation: Invocation) -> DryRun:
    """Look at all of it. Raises UsageError for what no machine could run: a setting, file or name that is wrong."""
    config, result = invocation.config, DryRun()
    check_settings(config)
    result.lines.append(render_plan(invocation))
    task = _questions(config, result)
    folder = _model(config, result)
    result.doubt = hardly_meant(config, folder)
    _packages(config, result)
    _gpus(config, folder, result)
    if complaint := no_room(config, invocation.run_dir):
        result.absent.append(complaint)
    _prompt(config, folder, task, result)
    return result


def _questions(config: RunConfig, result: DryRun) -> Task:
    task = Task(id="example", question="(the first question)", answers=("",))
    if config.task.kind != "questions":
        # all of it is here
        result.absent += absent_packages(config, check_questions(config))
        return next(load_curriculum(config).questions(config.seed))
    checks = {"judge"} if config.reward.judge else set[str]()
    for split, texts in (("train", config.task.train), ("eval", config.task.eval)):
        for text in texts:
            source = parse_source(text)
            data_set = DATASETS.get(source.map or source.data)
            checks.add(source.check or (data_set.check if data_set else ""))
            if (path := Path(source.data)).is_file() or path.suffix in SUFFIXES:
                loaded = load_source(source, split)
                result.lines.append(f"  {split:<12}{loaded.report()}")
                checks |= {task.check for task in loaded.tasks}
                task = loaded.tasks[0] if split == "train" else task
                continue
            hub, subset, _ = at_hub(source, split)
            result.lines.append(
                f"  {split:<12}{source_name(source)}: {hub}{':' + subset if subset else ''} of the Hugging "
                "Face hub, not asked now"
            )
            if importlib.util.find_spec("datasets") is None:
                result.absent.append("datasets, which reads the hub: pip install 'l0fast[data]'")
    if "judge" in checks and not config.judge.endpoint:
        result.absent.append(
            "a model as judge, for the questions that are judged by one: --judge.endpoint and --judge.model, or leave "
            "those questions out of task.eval"
        )
    result.absent[:] = dict.fromkeys([*result.absent, *absent_packages(config, checks)])
    return task


def _model(config: RunConfig, result: DryRun) -> Path | None:
    """The model's folder, where it is here."""
    name = config.model.path
    folder = cached_model(name) if is_hub_name(name) else model_folder(name)
    if folder is None:
        result.absent.append(f"{name}: the run downloads it from the Hugging Face hub when it starts")
    else:
        Chat(folder).continuation("", closed=True)
        check_model_folder(folder, config.agent.context_tokens)
    return folder


def _packages(config: RunConfig, result: DryRun) -> None:
    if engine_kind(config) == "sglang" and importlib.util.find_spec("sglang") is None:
        result.absent.append("sglang: pip install 'l0fast[gpu]' on the GPU machine")
    if config.learner.lora_rank and importlib.util.find_spec("peft") is None:
        result.absent.append("peft: pip install 'l0fast[lora]'")
    if config.task.kind == "questions":
        asked = [partial(check_tools, [name], config.tools, config.web) for name in config.tools.use]
        for look in (*asked, partial(judge_endpoint, config.judge)):
            try:
                look()
            except UsageError as e:
                # a key, an address or the name of a model
                result.absent.append(str(e))
    if engine_kind(config) == "sglang" and not num_gpus():
        result.absent.append(
            f"GPUs: memory and times are those of {config.plan.gpus} of {config.plan.gpu_memory_gb:g} GB"
        )


def _gpus(config: RunConfig, folder: Path | None, result: DryRun) -> None:
    """Memory and time, for a run that takes GPUs."""
    if engine_kind(config) != "sglang":
        return
    shape = _shape(config, folder)
    gpus = num_gpus() or config.plan.gpus
    memory = min(gpu_memories()) if num_gpus() else config.plan.gpu_memory_gb * 1e9
    layout = sglang_layout(config, gpus)
    if complaint := memory_complaint(config, shape, layout, gpu_memory_bytes=memory):
        raise UsageError(complaint)
    work = cost.workload_of(config)
    setup = cost.setup_of(config, work, gpus=layout.ranks, gpu_memory_bytes=memory)
    learner = {name: size for name, size in cost.memory_of(shape, setup).learner.items() if size}
    if exported := exported_bytes(shape, layout):
        learner["weights for the engine"] = exported
    seconds = cost.seconds(shape, work, setup, cost.Rates())
    engine = config.engine
    room = cost.kv_tokens(shape, setup)
    host = cost.host_parts(
        shape, setup, weights_by_host=layout.weights == "host", checkpoints=bool(config.checkpoint.every)
    )
    rows = {
        "model": f"{shape.parameters / 1e9:.2f} G parameters",
        "GPUs": f"{gpus} of {memory / 1e9:.3g} GB: {layout.engines} engines of {engine.tensor_parallel}, "
        f"{layout.ranks} learner ranks, {engine.layout}, weights by {layout.weights}",
        "learner": f"{sum(learner.values()) / 1e9:.1f} GB a GPU: "
        + ", ".join(f"{name} {size / 1e9:.1f}" for name, size in learner.items()),
        "main memory": f"{sum(host.values()) / 1e9:.0f} GB of the node: "
        + ", ".join(f"{name} {size / 1e9:.0f}" for name, size in host.items() if size),
        "engine": f"{engine.memory_share * memory / 1e9:.1f} GB a GPU: weights "
        f"{2 * shape.parameters / engine.tensor_parallel / 1e9:.1f}, keys and values of {room:,.0f} tokens, "
        f"{room / config.agent.context_tokens:.1f} full contexts an engine; beside that prompts "
        f"{cost.prompt_bytes(shape, setup) / 1e9:.1f}",
        "learning": f"{sum(cost.flops(shape, work, setup).values()) / 1e15:.0f} PFLOP and {sum(seconds.values()):.0f} s a step, "
        f"at {cost.Rates().tflops:g} TFLOP/s a GPU and {work.episodes:,} episodes that fill their context",
    }
    result.lines += [f"  {name:<12}{text}" for name, text in rows.items()]


def _shape(config: RunConfig, folder: Path | None) -> cost.ModelShape:
    if folder is not None:
        return cost.read_shape(folder / "config.json")
    shape = cost.known_shape(config.model.path)
    if shape is None:
        raise UsageError(
            f"model.path = {config.model.path!r} is not here, and its shape is none of those known "
            f"({', '.join(cost.SHAPES)}): download it first, or take one of those"
        )
    return shape


def _prompt(config: RunConfig, folder: Path | None, task: Task, result: DryRun) -> None:
    if config.task.kind == "questions":
        tools = describe_tools(config.tools.use, config.web)
    else:
        tools = (search_tool(LocalSearch(()), config.task.search_results),)
    messages = first_messages(config.agent, tools, task, max_turns=config.rollout.max_turns)
    result.lines += ["", "the first prompt" + ("" if folder else ", as messages: the tokenizer is not here") + ":"]
    if folder is None:
        text = "\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)
    else:
        chat = Chat(folder)
        ids = chat.first_prompt(messages[0]["content"], messages[1]["content"])
        result.lines[-1] = f"the first prompt, {len(ids)} tokens:"
        text = chat.decode(ids, special=True)
    result.lines += _shown(text.splitlines())


def _shown(lines: Sequence[str]) -> list[str]:
    if len(lines) > SHOWN_PROMPT_LINES:
        cut = SHOWN_PROMPT_LINES // 2
        lines = [*lines[:cut], f"[{len(lines) - 2 * cut} lines more]", *lines[-cut:]]
    return [textwrap.indent(line, "  | ") or "  |" for line in lines]
