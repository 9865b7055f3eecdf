"""python -m l0fast.warm_start --out DIR: a policy folder from nothing.

    tokenizer  <- the wording once more often than the names: each training name once
    episodes   <- NBAgent x Demonstrator x a real sandbox, in many worlds
    policy     <- supervised learning, one pass

Worlds: the real one teaches its wording; invented and respelled ones, made anew many times, leave copying as the only way
to be right (low loss on real names can be memorised names). Names of respelled worlds are made of the tokenizer's own pieces,
each as likely as the others: a piece that is rare in the demonstrations can't be copied.
"""

import asyncio
import itertools
import os
import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from l0fast.agent.chat import Chat
from l0fast.agent.nb_agent import EpisodeLimits, NBAgent
from l0fast.cli import until_read
from l0fast.config import RunConfig, SandboxConfig
from l0fast.engine.simulated import SimulatedEngine
from l0fast.errors import UsageError, WorldError
from l0fast.first_process import step_back
from l0fast.rollout.rollouts import play_all
from l0fast.run_dir import command
from l0fast.sandbox import open_sandbox
from l0fast.seeding import derive_seed
from l0fast.segments import segments_of
from l0fast.tasks.facts import PHRASINGS, RELATIONS
from l0fast.tasks.geography import geography, respelled_world
from l0fast.tasks.invented import invented_world
from l0fast.tasks.world import World
from l0fast.tools.local_search import LocalSearch, search_tool
from l0fast.warm_start.demonstrations import Demonstrator, Mistakes, good_move

_LETTERS = re.compile("[A-Z]?[a-z]+$|[A-Z]$")
"""A piece that can begin a name, or go on with one."""
_NUM_WORLDS = 32
"""Different invented and respelled worlds to draw on."""
_OPEN = 128
"""Demonstrations played at once."""
_ROUND = 512
"""Demonstrations between two looks at how many tokens there are."""

NUM_TOKENS = 7_000_000
"""Of demonstrations [tokens]."""
SHARES = {"real": 0.3, "invented": 0.2, "respelled": 0.5}
"""Of episodes, by kind of world."""
VOCAB_SIZE = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    out: Path
    """Folder to write: config, weights (bf16), tokenizer, chat template."""
    seed: int = 0
    """Of demonstrations, initial weights and batches."""
    scale: float = 1.0
    """Share of the tokens to train on; small values try the path out."""
    good_rate: float = 0.43
    """Probability of the good move at each decision of a demonstration."""
    sandbox: Literal["auto", "docker", "bwrap", "process"] = "auto"
    """Where demonstrations run."""


def main(argv: Sequence[str] | None = None) -> int:
    with until_read():
        options = tyro.cli(Options, args=argv, prog="python -m l0fast.warm_start", description=__doc__)
    console = Console()
    try:
        make(options, console)
    except (UsageError, WorldError) as e:
        console.print(str(e), style="red", highlight=False, markup=False, soft_wrap=True)
        return 2
    return 0


def make(options: Options, console: Console) -> None:
    if options.out.exists() and any(options.out.iterdir()):
        raise UsageError(f"{options.out} is not empty: name a new folder with --out")
    options.out.mkdir(parents=True, exist_ok=True)
    # torch comes late: a wrong flag is answered at once
    from l0fast.warm_start.tokenizer import save_tokenizer, train_tokenizer
    from l0fast.warm_start.train import TrainSettings, new_policy, save_policy, train

    config = RunConfig()
    tokenizer = train_tokenizer(tokenizer_texts(geography(), options.seed), VOCAB_SIZE)
    model = new_policy(tokenizer, context_tokens=config.agent.context_tokens, seed=options.seed)
    save_tokenizer(tokenizer, options.out, context_tokens=config.agent.context_tokens)
    save_policy(model, options.out)  # the chat form needs the model's config; the weights are replaced below
    console.print(f"tokenizer of {tokenizer.get_vocab_size()} pieces, policy of {model.num_parameters():,} parameters")

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        rows = asyncio.run(_demonstrate(options, config, Chat(options.out), progress))
        bar = progress.add_task("supervised learning", total=1, note="")
        said = 0.0

        def show(done: int, total: int, loss: float, seconds: float) -> None:
            nonlocal said
            note = f"loss {loss:.3f}, {done / 1e6:.2f} of {total / 1e6:.2f} M tokens"
            progress.update(bar, completed=done, total=total, note=note)
            if not console.is_terminal and seconds - said > 20:
                said = seconds
                console.print(f"{note}, {seconds:.0f} s")

        train(model, rows, TrainSettings(seed=options.seed), show)
    save_policy(model, options.out)
    console.print(
        f"policy in {options.out}; try it: {command('l0fast.run', '--model.path', str(options.out))}", soft_wrap=True
    )


def _world(kind: str, seed: int, n: int, pieces: tuple[str, ...] = ()) -> World:
    if kind == "real":
        return geography()
    # seed 0 of the invented worlds is the one that runs train and evaluate on
    world_seed = derive_seed("warm start", kind, seed, n)
    return respelled_world(world_seed, pieces) if kind == "respelled" else invented_world(world_seed)


def tokenizer_texts(world: World, seed: int) -> Iterator[str]:
    """Each training name once, and the wording of everything else with one name in place of all others."""
    rng = random.Random(seed)
    names, mistakes = sorted(world.train_names), Mistakes(world)
    yield from names
    yield from sorted({fact.value for fact in world.train_facts} - world.train_names)
    for _ in range(300):
        task = world.train_task(rng, two_hop_share=0.7)
        plan = world.plan(task)
        name = names[0]
        for known in range(len(plan.hops) + 1):
            for text in (good_move(plan, known), mistakes.draw(plan, known, rng)):
                for hop in plan.hops:
                    text = text.replace(hop.sentence, "").replace(hop.entity, name).replace(hop.value, name)
                yield text
    for wording in (*(r.sentence for r in RELATIONS.values()), *(p for ps in PHRASINGS.values() for p in ps)):
        yield from [wording.format(e=names[0], v=names[0])] * 30


async def _demonstrate(options: Options, config: RunConfig, chat: Chat, progress: Progress) -> list:
    """Rows to learn from, in the order they were played."""
    from l0fast.warm_start.train import Row

    rows: list[Row] = []
    total = int(NUM_TOKENS * options.scale)
    # making one takes about a second
    num_worlds = min(_NUM_WORLDS, 1 + total // 100_000)
    bar = progress.add_task("demonstrations", total=total, note="")
    rng = random.Random(derive_seed("demonstrations", options.seed))
    demonstrator = Demonstrator(chat, good_rate=options.good_rate, seed=options.seed)
    engine = SimulatedEngine(
        vocab_size=chat.vocab_size, max_tokens=config.agent.context_tokens, slots=_OPEN, script=demonstrator
    )
    numbers = itertools.count()
    pieces = tuple(piece for piece in map(chat.decode, ([i] for i in range(chat.vocab_size))) if _LETTERS.match(piece))
    async with open_sandbox(
        SandboxConfig(kind=options.sandbox), max_sessions=_OPEN, log=progress.console.print
    ) as sandbox:

        @cache
        def player(kind: str, n: int) -> tuple[World, NBAgent]:
            world = _world(kind, options.seed, n, pieces)
            demonstrator.add(world)
            search = search_tool(LocalSearch(world.train_corpus), config.task.search_results)
            limits = EpisodeLimits(max_turns=config.rollout.max_turns, timeout_s=config.rollout.episode_timeout_s)
            return world, NBAgent(
                chat=chat, engine=engine, sandbox=sandbox, tools=(search,), config=config.agent, limits=limits
            )

        tokens = 0
        while tokens < total:
            plays = []
            num_plays = min(_ROUND, 1 + (total - tokens) // 100)  # an episode has some 280 tokens
            for kind in rng.choices(list(SHARES), weights=list(SHARES.values()), k=num_plays):
                world, agent = player(kind, rng.randrange(1 if kind == "real" else num_worlds))
                task = world.train_task(rng, two_hop_share=config.task.two_hop_share)
                plays.append(partial(agent.run_episode, task, index=0, temperature=1.0, seed=next(numbers)))
            played = await play_all(lambda play: play(), plays, max_open=_OPEN)
            lost = [trajectory for trajectory in played if trajectory.status.failed]
            if len(lost) > len(played) // 10:
                raise WorldError(
                    f"{len(lost)} of {len(played)} demonstrations failed, one as {lost[0].status}: {lost[0].cause}"
                )
            for trajectory in (t for t in played if not t.status.failed):
                for segment in segments_of(trajectory):
                    sampled = [False] * len(segment.token_ids)
                    for span in segment.spans:
                        sampled[span.start : span.start + span.length] = [True] * span.length
                    rows.append(Row(tuple(segment.token_ids), tuple(sampled)))
                    tokens += len(segment.token_ids)
            progress.update(bar, completed=tokens, note=f"{len(rows):,} episodes, {tokens / 1e6:.2f} M tokens")
    progress.console.print(f"{len(rows):,} demonstrations, {tokens / 1e6:.2f} M tokens")
    return rows


if __name__ == "__main__":
    # glibc gives large blocks back to the kernel at once, and a training step asks for the same ones again: 15 % of its time
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
        os.execv(sys.executable, [sys.executable, "-m", "l0fast.warm_start", *sys.argv[1:]])
    step_back()
    sys.exit(main())
