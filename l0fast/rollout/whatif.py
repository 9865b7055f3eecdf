"""What if a run had other settings: its recorded episodes, through the real scheduler, against a simulated engine.

    python -m l0fast.rollout.whatif RUN_DIR          one line of advice, if there is any; bench.simulate tells more

    recorded lengths, latencies -> rollouts() and its modes -> SimulatedEngine, as fast as the run's was (recorded.py)
                                                            -> a learner that sleeps as long as a token took it
    every wait is on one clock that costs no time; StepShares watches it as it watches a run (replay.py)

What is predicted is what the settings do to waiting: who waits for whom, how full the engine is. What they do to the model
isn't: with other settings it would have learned, and said, something else. An episode lasts as many turns and tokens as it
did, its cells run as long as they did, and the learner takes as long for a token that it lays out. Unless engine.layout is
"split", engine and learner share their processors, so while the learner works the engine stands still; what overlaps then is
waiting.

The engine's speed is fitted on the first half of the steps and held against the second half, which it has not seen: that
error stands beside every prediction.
"""

import argparse
import itertools
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson
from pydantic import ValidationError

from l0fast.children import output_of
from l0fast.config import RunConfig
from l0fast.errors import L0fastError, UsageError
from l0fast.rollout.modes import Schedule
from l0fast.rollout.recorded import Recording, Timing, fit_timing, read_recording
from l0fast.rollout.replay import AsRecorded, Playlist, World
from l0fast.rollout.rollouts import Groups, rollouts
from l0fast.run_dir import read_metrics
from l0fast.step_shares import CAUSES
from l0fast.types import Group

ADVISES_FROM = 0.05
"""Advice must promise a step shorter by this share at least, and by more than the simulator errs."""
LAST_STEPS = 8
"""Steps that advice is made of; the newest tell most [steps]."""
LAST_TURNS = 30_000
"""Turns in them at most. Advice plays each some six times, at 0.5 ms a turn, and has two minutes; long episodes take a megabyte
of memory each [turns]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """How a run would have gone."""

    step_s: float
    """Mean, evaluations not counted [s]."""
    step_times_s: tuple[float, ...]
    episodes_per_s: float
    tokens_per_s: float
    """Sampled."""
    engine_busy: float
    """Share of the time in which the engines computed, mean over them."""
    slots_busy: float
    """Slots in use, as a share of all slot-time."""
    learner_busy: float
    shares: dict[str, float]
    """As a run's metrics have them (step_shares.py); "decode", "prefill" and "recompute" by the simulated engine's own figures."""
    wall_s: float = field(default=0.0, compare=False)
    """That it took to simulate [s]."""

    @property
    def times_real_time(self) -> float:
        """Simulated seconds in one that it took."""
        return sum(self.step_times_s) / self.wall_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    measured_step_s: float
    """Of the run as it was, mean over the steps used [s]."""
    error: float
    """Predicted over measured step time of the steps that the fit has not seen, minus 1."""
    timing: Timing
    as_it_was: Simulated
    changed: Simulated
    """The same as `as_it_was` where nothing was changed."""

    @property
    def gain(self) -> float:
        """Share of the time for an episode that the changes save: below 0 where they cost time."""
        return 1 - self.as_it_was.episodes_per_s / self.changed.episodes_per_s


def predict(
    run_dir: Path,
    changes: Mapping[str, Any] | None = None,
    *,
    kv_tokens: int | None = None,
    last_steps: int | None = None,
) -> Prediction:
    """Simulate a run as it was and with changes. Takes some seconds of CPU: not for a busy loop.

    Args:
        changes: settings by path, e.g. {"rollout.max_open_groups": 48}; engine.count counts simulated engines.
        kv_tokens: KV entries of each engine; None for as many as its slots can take [tokens].
        last_steps: use only these of the run's; None for all.

    Raises:
        UsageError: fewer than two steps were recorded, or a setting is none.
    """
    recording = read_recording(run_dir, last_steps=last_steps)
    return _predict(recording, changed_config(recording.config, changes or {}), kv_tokens)


def advise(run_dir: Path) -> str | None:
    """One line about the setting that would shorten a run's steps most, or None. Takes some seconds of CPU.

    None, too, where the steps are too large for two of them to be simulated in time.
    """
    rows = read_metrics(run_dir)[-LAST_STEPS:]
    turns = itertools.accumulate(row["rollout/episodes"] * row["rollout/turns_mean"] for row in reversed(rows))
    steps = sum(sofar <= LAST_TURNS for sofar in turns)
    if steps < min(2, len(rows)):
        return None
    recording = read_recording(run_dir, last_steps=max(1, steps))
    timing, error = _calibrate(recording)
    steps = len(recording.steps)
    base = simulate(recording, recording.config, timing, steps=steps)
    best: tuple[float, str] | None = None
    for changes in _candidates(recording.config):
        try:
            config = changed_config(recording.config, changes)
        except UsageError:
            # the rest of this run's settings forbids it
            continue
        then = simulate(recording, config, timing, steps=steps)
        gain = 1 - base.episodes_per_s / then.episodes_per_s
        if best is None or gain > best[0]:
            best = gain, _way(recording.config, changes)
    if best is None or best[0] < max(ADVISES_FROM, abs(error)):
        return None
    gain, way = best
    return f"{_idle(base)}: {way}, predicted {-gain:+.0%} a step (simulated; it misses this run's steps by {abs(error):.0%})"


async def advise_in_subprocess(run_dir: Path, timeout_s: float = 120.0) -> str | None:
    """`advise` without holding up the loop.

    Raises:
        AdviceError: with the last line of what the process said.
    """
    out = await output_of(
        "l0fast.rollout.whatif", str(run_dir), error=AdviceError, without=f"no advice on {run_dir}", timeout_s=timeout_s
    )
    return out.strip() or None


class AdviceError(L0fastError):
    """The simulating process failed or took too long."""


def changed_config(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The settings with some of them changed; a path is "section.name" or "name". Raises UsageError."""
    settings = config.model_dump(mode="json")
    if changes.get("rollout.mode", config.rollout.mode) != config.rollout.mode:
        # what is open is chosen with the mode, unless somebody chooses
        del settings["rollout"]["max_open_groups"]
    for path, value in changes.items():
        *sections, name = path.split(".")
        place = settings
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if not isinstance(place, dict) or (name not in place and path != "rollout.max_open_groups"):
            raise UsageError(f"{path} is not a setting: python -m l0fast.run --help lists them")
        place[name] = value
    try:
        return RunConfig.model_validate_json(orjson.dumps(settings))
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the settings"
        raise UsageError(f"{', '.join(f'{k} = {v!r}' for k, v in changes.items())}: {where}: {first['msg']}") from e


def parse_change(text: str) -> tuple[str, Any]:
    """("rollout.max_open_groups", 48) of "rollout.max_open_groups=48". Raises UsageError."""
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise UsageError(f"{text!r} changes nothing: write it as section.name=value, e.g. rollout.max_open_groups=48")
    try:
        return path.strip(), tomllib.loads(f"x = {value}")["x"]
    except tomllib.TOMLDecodeError:
        # a bare word
        return path.strip(), value.strip()


def simulate(
    recording: Recording, config: RunConfig, timing: Timing, *, steps: int, first: int = 0, kv_tokens: int | None = None
) -> Simulated:
    """Play `steps` steps of a recording from its step `first` on, with these settings and this timing."""
    began = time.perf_counter()
    world = World(Playlist(recording, first), config, timing, kv_tokens)
    simulated = world.clock.run(_replay(world, config, steps))
    return replace(simulated, wall_s=time.perf_counter() - began)


async def _replay(world: World, config: RunConfig, steps: int) -> Simulated:
    """Go round a run's loop so many times."""
    rollout, tally = config.rollout, _Tally()
    await world.open()
    async with rollouts(
        world.play,
        world.playlist.tasks(),
        schedule=Schedule(
            rollout.mode,
            groups_per_step=rollout.groups_per_step,
            max_open_groups=rollout.max_open_groups,
            max_staleness=rollout.max_staleness,
        ),
        sync=world.sync,
        group_size=rollout.group_size,
        max_refills=10**6,
        sampling=AsRecorded(drop_rate=rollout.drop_rate, max_drops=0, seed=0, is_dropped=world.playlist.is_dropped),
        begin=world.lengths.long_first,
    ) as groups:
        for step in range(1, steps + 1):
            began_s = world.clock.now_s
            batch = await _step(world, groups, step, stream=config.learner.stream == "on")
            tally.add(batch, world.clock.now_s - began_s, world.shares.take_step(await world.engine.load()))
        # before leaving ends what is being played
        total_s, (engine_busy, slots_busy, learner_busy) = world.clock.now_s, await world.busy()
    return Simulated(
        step_s=total_s / steps,
        step_times_s=tuple(tally.times_s),
        episodes_per_s=tally.episodes / total_s,
        tokens_per_s=tally.tokens / total_s,
        engine_busy=engine_busy,
        slots_busy=slots_busy,
        learner_busy=learner_busy,
        shares={cause: charged_s / total_s for cause, charged_s in tally.charged_s.items()},
    )


async def _step(world: World, groups: Groups, version: int, *, stream: bool) -> list[Group]:
    """Learn from a step's worth of groups: from each as it finishes, or from all at once."""
    batch: list[Group] = []
    with world.shares.span("take"):
        async with aclosing(groups.stream()) as finished:
            async for some in finished:
                batch += some
                if stream:
                    await world.learn(some)
    if not stream:
        await world.learn(batch)
    await groups.learned(version)
    groups.done()
    return batch


@dataclass(slots=True)
class _Tally:
    """What the steps of a replay add up to."""

    times_s: list[float] = field(default_factory=list)
    charged_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0.0))
    """By cause."""
    episodes: int = 0
    tokens: int = 0
    """Sampled, by those that did not fail."""

    def add(self, batch: Sequence[Group], took_s: float, figures: Mapping[str, float]) -> None:
        """A step on these groups; `figures` are what StepShares took of it."""
        self.times_s.append(took_s)
        for cause in CAUSES:
            self.charged_s[cause] += figures[f"share/{cause}"] * took_s
        self.episodes += sum(len(group.trajectories) + len(group.failures) for group in batch)
        self.tokens += sum(len(t.response_ids) for g in batch for e in g.trajectories for t in e.turns)


def _predict(recording: Recording, changed: RunConfig, kv_tokens: int | None) -> Prediction:
    timing, error = _calibrate(recording, kv_tokens)
    steps = len(recording.steps)
    as_it_was = simulate(recording, recording.config, timing, steps=steps, kv_tokens=kv_tokens)
    then = as_it_was
    if changed != recording.config:
        then = simulate(recording, changed, timing, steps=steps, kv_tokens=kv_tokens)
    return Prediction(
        measured_step_s=sum(s.step_s for s in recording.steps) / steps,
        error=error,
        timing=timing,
        as_it_was=as_it_was,
        changed=then,
    )


def _calibrate(recording: Recording, kv_tokens: int | None = None) -> tuple[Timing, float]:
    """The timing of the first half of the steps, and its error on the second half."""
    if len(recording.steps) < 2:
        kept = recording.config.rollout.keep_trajectories
        way = (
            "keep the trajectories of 2 or more: rollout.keep_trajectories = 1 deletes the others"
            if kept == 1
            else "take more"
        )
        raise UsageError(
            f"{len(recording.steps)} step was recorded, and two are needed, one to learn from and one to check: let the run "
            f"{way}"
        )
    half = len(recording.steps) // 2
    seen, unseen = recording.steps[:half], recording.steps[half:]
    timing = fit_timing(recording, seen)
    for _ in range(2):
        # equations for turns don't know of waiting for a slot and the like; a factor makes up for their sum
        simulated = simulate(recording, recording.config, timing, steps=half, kv_tokens=kv_tokens)
        learn_s = sum(s.learn_s + s.sync_s for s in seen)
        played_s = sum(simulated.step_times_s) - learn_s
        measured_s = sum(s.step_s for s in seen) - learn_s
        if played_s > 0 and measured_s > 0:
            timing = timing.slower(min(3.0, max(1 / 3, measured_s / played_s)))
    there = simulate(recording, recording.config, timing, steps=len(unseen), first=half, kv_tokens=kv_tokens)
    return timing, sum(there.step_times_s) / sum(s.step_s for s in unseen) - 1


def _candidates(config: RunConfig) -> list[dict[str, Any]]:
    """Settings that a person can simply change. That a mode learns from older tokens is for them to weigh."""
    rollout, engine = config.rollout, config.engine
    if rollout.mode == "on_policy":
        return [
            {"engine.slots": 2 * engine.slots},
            {"rollout.mode": "one_step_off"},
            {"rollout.mode": "carry_over"},
        ]
    more = [rollout.max_open_groups * 3 // 2, rollout.max_open_groups * 2]
    return [{"engine.slots": 2 * engine.slots}, *({"rollout.max_open_groups": n} for n in more)]


def _way(config: RunConfig, changes: Mapping[str, Any]) -> str:
    (path, value), *_ = changes.items()
    section, _, name = path.partition(".")
    before = getattr(getattr(config, section), name)
    verb = "raise" if isinstance(value, int) else "change"
    return f"{verb} {path} from {before} to {value}"


_WAITS = {"tools": "tools", "sandbox": "cells", "learn": "the learner", "tail": "stragglers", "sync": "new weights"}


def _idle(base: Simulated) -> str:
    """What the engine waits for most."""
    cause = max(_WAITS, key=lambda c: base.shares[c])
    return f"engine idle {1 - base.engine_busy:.0%}, most of it waiting for {_WAITS[cause]} ({base.shares[cause]:.0%} of a step)"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m l0fast.rollout.whatif",
        description="The setting that would shorten a run's steps most, if there is one; python -m bench.simulate tells more.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    try:
        advice = advise(parser.parse_args(argv).run_dir)
    except UsageError as e:
        sys.stderr.write(f"{e}\n")
        return 2
    sys.stdout.write(f"{advice or ''}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
