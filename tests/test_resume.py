"""Stop and go on: what a killed run had done is not lost, and the run that goes on is the one that was not killed.

That the same seed gives the same run is part of it: the two that are compared share nothing else.
"""

import asyncio
import errno
import fcntl
import io
import shutil
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
from rich.console import Console

from l0fast.cli import parse, render_plan
from l0fast.config import RunConfig
from l0fast.engine.simulated import SimulatedEngine
from l0fast.errors import EngineError, LearnerError, UsageError, WorldError
from l0fast.garbage import OldObjects
from l0fast.ids import Ids
from l0fast.report.live import Live
from l0fast.run import main
from l0fast.run_dir import (
    RunDir,
    checkpoints,
    command,
    new_run_hint,
    read_config,
    read_driver_state,
    read_groups,
    read_metrics,
    read_summary,
    read_trajectories,
    resume_hint,
    step_name,
)
from l0fast.seeding import derive_seed
from l0fast.tasks.curriculum import load_curriculum
from l0fast.tasks.scoring import open_scorer
from l0fast.training import Rooms, Training, _to_its_end, _until_interrupted, check, staleness
from l0fast.training import run as train
from l0fast.types import Task, Trajectory, TrajectoryStatus, Turn
from tests.command import children_of, finish, seen, start, wait_until, wait_until_gone

SCHEDULE = [
    "--engine.kind", "simulated", "--sandbox.kind", "process", "--learner.threads", "1", "--num-steps", "5",
    "--rollout.groups-per-step", "2", "--rollout.max-open-groups", "3", "--rollout.group-size", "2",
    "--rollout.drop-rate", "0.5", "--rollout.max-turns", "2", "--eval.questions", "2", "--eval.curve-questions", "2",
    "--eval.every", "2", "--eval.transfer-questions", "2", "--checkpoint.every", "2",
    "--learner.advantage", "gae", "--learner.critic", "head",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that was let alone, and the same one, killed after its third step and gone on with."""
    folder = tmp_path_factory.mktemp("runs")
    whole, killed = folder / "whole", folder / "killed"
    undisturbed, victim = (
        start("--run-dir", str(path), "--model.path", str(policy_folder), *SCHEDULE) for path in (whole, killed)
    )
    assert victim.stdout is not None
    told = []
    for line in victim.stdout:
        told.append(line)
        if "step 3/5" in line:
            break
    else:
        pytest.fail("".join(told))
    children = children_of(victim.pid)
    # the learner writes the second step's checkpoint beside the third one, and on a busy disk after it
    victim.send_signal(signal.SIGSTOP)
    assert wait_until(lambda: checkpoints(killed), timeout_s=60)
    victim.kill()
    finish(victim, -signal.SIGKILL)
    assert not wait_until_gone(children)
    assert read_driver_state(checkpoints(killed)[-1])["step"] == 2
    assert len(read_metrics(killed)) >= 3
    finish(undisturbed, 0)
    out = finish(start("--resume", str(killed)), 0)
    assert "going on after step 2" in out
    assert "held-out accuracy before:" not in out
    return whole, killed


@pytest.mark.slow
@pytest.mark.timeout(300)  # three runs, two of them at once
def test_a_killed_run_that_goes_on_does_what_it_would_have_done(folders: tuple[Path, Path]):
    (rows, played), (rows_resumed, played_resumed) = map(seen, folders)
    for row in (*rows, *rows_resumed):
        # the broker remembers answers in memory, and counts calls when they are made, also those of groups of later steps
        for name in [name for name in row if name.startswith("tools/")]:
            del row[name]
    assert rows_resumed == rows
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(row["learner/critic_loss"] > 0 for row in rows), "a critic learns, too, and goes on where it was"
    assert sum(row["rollout/dropped_groups"] for row in rows) > 0
    assert played_resumed == played


@pytest.mark.slow
def test_it_ends_with_the_same_weights_bit_for_bit(folders: tuple[Path, Path]):
    whole, resumed = ((folder / "model" / "model.safetensors").read_bytes() for folder in folders)
    assert resumed == whole


@pytest.mark.slow
def test_its_summary_tells_of_the_whole_run(folders: tuple[Path, Path]):
    whole, resumed = map(read_summary, folders)
    told = {key for key in whole if key.startswith(("eval_", "transfer_")) or key in ("steps", "finished", "seed")}
    assert {key: resumed[key] for key in told} == {key: whole[key] for key in told}
    times = [row["time/since_start_s"] for row in read_metrics(folders[1])]
    assert times == sorted(times)


@pytest.mark.slow
def test_checkpoints_are_pruned_and_the_last_step_has_one(folders: tuple[Path, Path]):
    for folder in folders:
        assert [path.name for path in checkpoints(folder)] == ["step_000004", "step_000005"]
        assert len(list((folder / "checkpoints").iterdir())) == 2


@pytest.mark.slow
def test_a_run_that_is_done_says_so(folders: tuple[Path, Path]):
    with pytest.raises(UsageError, match="is done, with all of its 5 steps: give --num-steps 10"):
        parse(["--resume", str(folders[0])])
    longer = parse(["--resume", str(folders[0]), "--num-steps", "6"])
    assert longer.config.num_steps == 6
    assert longer.changes == ("num_steps = 6, was 5",)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The folder of a run that was stopped in its ninth step; the last checkpoint is of the eighth."""
    path = tmp_path / "run"
    with RunDir.create(path, RunConfig(num_steps=12)) as run_dir:
        for step in range(1, 10):
            run_dir.metrics({"step": step})
            asyncio.run(run_dir.trajectories(step_name(step), []))
        for name in (
            "eval_before",
            "eval_step_8",
            "eval_step_9",
            "eval_after",
            "transfer_x_before",
            "transfer_x_after",
        ):
            asyncio.run(run_dir.trajectories(name, []))
        run_dir.summary({"steps": 9})
        for step in (4, 8):
            checkpoint(run_dir.checkpoint_path(step), step=step)
    return path


def left_in(run_dir: Path) -> dict[Path, bytes]:
    """All that a run left but its log."""
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.name != "log.txt"}


def checkpoint(path: Path, **state: Any) -> None:
    path.mkdir(parents=True)
    (path / "driver.json").write_bytes(orjson.dumps(state))
    (path / "learner.json").touch()  # with it a checkpoint is complete


def test_a_run_goes_on_with_its_own_settings_from_its_newest_checkpoint(stopped: Path):
    invocation = parse(["--resume", str(stopped), "--dry-run"])
    assert invocation.config == read_config(stopped)
    assert (invocation.run_dir, invocation.resume) == (stopped, stopped / "checkpoints" / "step_000008")
    assert "goes on from step_000008" in render_plan(invocation)


def test_how_long_and_how_fast_may_change_and_is_told(stopped: Path):
    changed = parse(["--resume", str(stopped), "--num-steps", "20", "--engine.slots", "7", "--checkpoint.keep", "5"])
    assert (changed.config.num_steps, changed.config.engine.slots, changed.config.checkpoint.keep) == (20, 7, 5)
    assert changed.changes == ("num_steps = 20, was 12", "engine.slots = 7, was 128", "checkpoint.keep = 5, was 2")


@pytest.mark.parametrize("flag", [
    "--judge.endpoint=http://other/v1", "--judge.api-key-env=OTHER_KEY", "--judge.timeout-s=9", "--judge.max-concurrent=9",
    "--judge.cache-file=judged", "--tools.cache-file=answers", "--tools.timeout-s=9", "--tools.attempts=9",
    "--tools.max-concurrent=9", "--tools.per-minute=9", "--web.timeout-s=9", "--web.search-url=http://other/search",
    "--web.reader-url=http://other/", "--web.vision-endpoint=http://other/v1", "--web.vision-api-key-env=OTHER_KEY",
    "--reward.timeout-s=9", "--plan.gpus=4",
])  # fmt: skip
def test_what_is_about_other_machines_may_change(stopped: Path, flag: str):
    assert len(parse(["--resume", str(stopped), flag]).changes) == 1


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--learner.lr", "0.1"], r"--learner.lr 0.1 would make another run .* 0.0007: leave it out"),
    (["--seed", "1"], r"--seed 1 would make another run"),
    (["--tools.use", "web_search"], r"--tools.use \('web_search',\) would make another run"),
    (["--judge.model", "other"], r"--judge.model other would make another run"),
    (["--judge.votes", "3"], r"--judge.votes 3 would make another run"),
    (["--web.search-provider", "exa"], r"--web.search-provider exa would make another run"),
    (["--web.page-chars", "9"], r"--web.page-chars 9 would make another run"),
    (["--num-steps", "7"], r"num_steps = 7, but .* has taken 8 steps already: give --num-steps 8 or more"),
    (["invented"], r"so invented has no place beside it"),
    (["--smoke"], r"so --smoke has no place beside it"),
    (["--run-dir", "x"], r"so --run-dir has no place beside it"),
])  # fmt: skip
def test_what_would_make_another_run_is_refused(stopped: Path, flags: list[str], sentence: str):
    with pytest.raises(UsageError, match=sentence):
        parse(["--resume", str(stopped), *flags])


def test_a_run_that_is_done_goes_on_only_for_more_steps(stopped: Path):
    assert parse(["--resume", str(stopped), "--num-steps", "8"]).config.num_steps == 8
    (stopped / "summary.json").write_text('{"finished": true}')
    with pytest.raises(UsageError, match="is done, with all of its 8 steps: give --num-steps 16"):
        parse(["--resume", str(stopped), "--num-steps", "8"])
    assert parse(["--resume", str(stopped), "--num-steps", "9"]).config.num_steps == 9


def test_a_flag_that_says_what_the_run_has_anyway_is_none(stopped: Path):
    assert parse(["--resume", str(stopped), "--seed", "0"]).changes == ()


def test_a_folder_without_checkpoint_or_run_is_one_sentence(stopped: Path, tmp_path: Path):
    for path in checkpoints(stopped):
        (path / "learner.json").unlink()
    assert "nothing to resume" in resume_hint(stopped)
    with pytest.raises(UsageError, match="holds no checkpoint"):
        parse(["--resume", str(stopped)])
    with pytest.raises(UsageError, match="is .* the folder of a run"):
        parse(["--resume", str(tmp_path)])


def test_the_hint_is_a_line_to_copy(stopped: Path):
    moved = stopped.rename(stopped.with_name("a run"))
    assert resume_hint(moved) == f"resume with: {command('l0fast.run', '--resume', str(moved))}"


def test_another_run_is_told_to_begin_with_what_there_is_to_begin_with(stopped: Path):
    moved = stopped.rename(stopped.with_name("a run"))
    with pytest.raises(UsageError) as caught:
        parse(["--resume", str(moved), "--seed", "1"])
    assert str(caught.value).endswith(f"--model.path OUT after: {command('l0fast.export', str(moved), 'OUT')}")
    (moved / "model").mkdir()
    assert new_run_hint(moved) == f"start a new run with --model.path '{moved}/model'"
    shutil.rmtree(moved / "model")
    shutil.rmtree(moved / "checkpoints")
    assert new_run_hint(moved) == "start a new run"


def test_a_checkpoint_of_another_version_that_lacks_something_is_one_sentence(stopped: Path, capsys):
    before = left_in(stopped)
    state = orjson.dumps({"version": "0.0.9", "step": 8})
    (stopped / "checkpoints" / "step_000008" / "driver.json").write_bytes(state)
    assert main(["--resume", str(stopped)]) == 2
    said = capsys.readouterr().err
    assert "step_000008 was written by l0fast 0.0.9 and has no position" in said
    assert len(said.splitlines()) == 1
    assert left_in(stopped).keys() == before.keys()


# --- the folder -------------------------------------------------------------------------------------------------------


def test_what_was_written_after_the_checkpoint_is_taken_away(stopped: Path):
    (stopped / "trajectories" / ".step_0010.jsonl.partial").touch()
    for name in ("step_000012.tmp", "step_000001"):
        # being written, being removed
        (stopped / "checkpoints" / name).mkdir()
    with RunDir.resume(stopped) as run_dir:
        run_dir.go_on_after(8, RunConfig(num_steps=20))
        assert [row["step"] for row in read_metrics(stopped)] == list(range(1, 9))
        run_dir.metrics({"step": 9})
    assert [row["step"] for row in read_metrics(stopped)] == list(range(1, 10))
    names = {path.stem for path in (stopped / "trajectories").iterdir()}
    assert names == {*map(step_name, range(1, 9)), "eval_before", "eval_step_8", "transfer_x_before"}
    assert [path.name for path in sorted((stopped / "checkpoints").iterdir())] == ["step_000004", "step_000008"]
    assert read_config(stopped).num_steps == 20
    assert read_summary(stopped) == {}


def test_no_checkpoint_is_left_of_a_step_whose_rows_are_taken_away(stopped: Path):
    with RunDir.resume(stopped) as run_dir:
        run_dir.go_on_after(4, read_config(stopped))
    assert [row["step"] for row in read_metrics(stopped)] == [1, 2, 3, 4]
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["step_000004"]


def test_half_a_row_is_taken_away(stopped: Path):
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1')
    with RunDir.resume(stopped) as run_dir:
        run_dir.go_on_after(9, read_config(stopped))
    assert [row["step"] for row in read_metrics(stopped)] == list(range(1, 10))


def test_a_setting_that_shows_itself_wrong_takes_no_checkpoint_with_it(stopped: Path):
    shutil.rmtree(stopped / "trajectories")
    (stopped / "metrics.jsonl").unlink()
    with pytest.raises(UsageError), RunDir.resume(stopped):
        raise UsageError("no such image")
    assert len(checkpoints(stopped)) == 2


def test_a_run_that_still_goes_on_is_left_alone(stopped: Path):
    with RunDir.resume(stopped):
        before = left_in(stopped)
        with pytest.raises(UsageError, match="still goes on"):
            RunDir.resume(stopped)
        assert left_in(stopped) == before
        # as logrotate does
        (stopped / "log.txt").rename(stopped / "log.txt.1")
        with pytest.raises(UsageError, match="still goes on"):
            RunDir.resume(stopped)


# --- the same line each time ------------------------------------------------------------------------------------------


@pytest.fixture
def again(tmp_path: Path) -> list[str]:
    """The words of a job that is stopped and started again."""
    return ["invented", "--run-dir", str(tmp_path / "run"), "--go-on", "--num-steps", "12", "--learner.lr", "0.001"]


def left_by(words: list[str], *steps: int, **summary: Any) -> Path:
    """The folder that their first run left, with checkpoints of these steps."""
    invocation = parse(words)
    assert (invocation.resume, invocation.anew) == (None, False)
    with RunDir.create(invocation.run_dir, invocation.config) as run_dir:
        run_dir.metrics({"step": 1})
        for step in steps:
            checkpoint(run_dir.checkpoint_path(step), step=step)
        if summary:
            run_dir.summary(summary)
    return invocation.run_dir


def test_the_line_that_began_a_run_goes_on_with_it(again: list[str]):
    run_dir = left_by(again, 4, 8, steps=8, finished=False)
    later = parse(again)
    assert later.resume == run_dir / "checkpoints" / "step_000008"
    assert (later.config, later.changes, later.anew) == (read_config(run_dir), (), False)
    assert parse([*again, "--engine.slots", "7"]).changes == ("engine.slots = 7, was 128",)


def test_a_line_for_another_run_does_not_go_on_with_it(again: list[str]):
    left_by(again, 8)
    with pytest.raises(UsageError, match=r"--seed 1 would make another run of"):
        parse([*again, "--seed", "1"])
    with pytest.raises(UsageError, match=r"--task.kind geography would make another run of"):
        parse(again[1:])


def test_a_line_whose_run_is_done_has_done_its_work(again: list[str], capsys):
    run_dir = left_by(again, 12, steps=12, finished=True)
    shutil.rmtree(run_dir / "checkpoints")
    before = left_in(run_dir)
    with pytest.raises(SystemExit) as ended:
        main(again)
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{run_dir} is done, with all of its 12 steps\n"
    assert left_in(run_dir) == before


def test_a_run_that_was_killed_in_its_last_evaluation_has_that_to_do(again: list[str]):
    run_dir = left_by(again, 12)
    assert parse(again).resume == run_dir / "checkpoints" / "step_000012"


def test_a_run_that_left_nothing_to_go_on_from_begins_again_and_nothing_is_lost(again: list[str], monkeypatch, capsys):
    async def runs(training: Training) -> None:
        assert training.step == 0

    monkeypatch.setattr(Training, "run", runs)
    monkeypatch.setattr("l0fast.training.draw_in_subprocess", lambda path: asyncio.sleep(0))
    run_dir = left_by(again)
    assert "made again" in render_plan(parse([*again, "--dry-run"]))
    before = {path.relative_to(run_dir): data for path, data in left_in(run_dir).items()}
    assert main(again) == 0
    assert "again, for there was no checkpoint" in capsys.readouterr().out
    assert read_metrics(run_dir) == []
    aside = run_dir.with_name("run.1")
    assert {path.relative_to(aside): data for path, data in left_in(aside).items()} == before
    (run_dir / "summary.json").unlink()
    assert main(again) == 0
    assert run_dir.with_name("run.2").is_dir()


def test_a_run_that_still_goes_on_does_not_make_way(again: list[str]):
    invocation = parse(again)
    with RunDir.create(invocation.run_dir, invocation.config):
        later = parse(again)
        assert later.anew
        with pytest.raises(UsageError, match="still goes on"):
            RunDir.anew(later.run_dir, later.config)
    checkpoint(invocation.run_dir / "checkpoints" / "step_000008", step=8)
    with pytest.raises(UsageError, match="has a checkpoint by now"):
        RunDir.anew(later.run_dir, later.config)
    assert [path.name for path in invocation.run_dir.parent.iterdir()] == ["run"]


def test_a_folder_that_can_not_make_way_is_one_sentence(again: list[str], monkeypatch):
    """As one that is mounted, or the one that we are in."""
    run_dir = left_by(again)
    monkeypatch.chdir(run_dir)
    with pytest.raises(UsageError, match=r"can't make way \(Device or resource busy\): move it, or choose another"):
        RunDir.anew(Path(), read_config(run_dir))
    assert [path.name for path in run_dir.parent.iterdir()] == ["run"]


def test_what_can_not_be_gone_on_with_is_one_sentence(again: list[str], tmp_path: Path):
    with pytest.raises(UsageError, match="add --run-dir DIR"):
        parse(["--go-on"])
    with pytest.raises(UsageError, match="--go-on has no place beside it"):
        parse(["--resume", str(tmp_path), "--go-on"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is .* the folder of a run"):
        parse(again)


# --- the loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cancels", [1, 2, 3])
def test_work_that_must_be_whole_ends_before_its_waiter_is_cancelled(cancels: int):
    log = []

    async def work():
        for i in range(5):
            await asyncio.sleep(0)
            log.append(i)

    async def main():
        waiter = asyncio.create_task(_to_its_end(work()))
        await asyncio.sleep(0)
        for _ in range(cancels):
            waiter.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await waiter
        log.append("cancelled")

    asyncio.run(main())
    assert log == [0, 1, 2, 3, 4, "cancelled"]


class Ledger:
    """A learner that only writes down what it is told."""

    device = "cpu"

    def __init__(self, *, dies_at_step: int | None = None, waits_at_step: int | None = None):
        self.told: list[tuple[Any, ...]] = []
        self.values_given: list[Any] = []
        self.dies_at_step, self.waits_at_step = dies_at_step, waits_at_step
        self.accumulated, self.waits, self.may_go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def values(self, groups) -> list[list[list[float]]]:
        """A critic that expects a half of everything."""
        self.told.append(("values", [group.number for group in groups]))
        return [[[0.5] * len(t.turns) for t in group.trajectories] for group in groups]

    async def accumulate(self, groups, advantages, *, values=None) -> None:
        assert all(len(a) == len(group.trajectories) for group, a in zip(groups, advantages, strict=True))
        self.values_given.append(values)
        self.told.append(("accumulate", [group.number for group in groups]))
        self.accumulated.set()

    async def finish_step(self, policy_version) -> dict[str, Any]:
        self.told.append(("finish_step", policy_version))
        return {}

    async def step(self, groups, advantages, policy_version, *, values=None) -> dict[str, Any]:
        self.values_given.append(values)
        if policy_version == self.dies_at_step:
            raise LearnerError("the learner died")
        if policy_version == self.waits_at_step:
            self.waits.set()
            await self.may_go_on.wait()
        self.told.append(("step", [group.number for group in groups]))
        return {}

    async def save_checkpoint(self, path: Path, driver_state: dict[str, Any]) -> None:
        self.told.append(("save_checkpoint", path.name, driver_state["step"], driver_state["position"]))
        checkpoint(path, **driver_state)

    async def load_checkpoint(self, path: Path) -> None:
        self.told.append(("load_checkpoint", path.name))

    async def save(self, path: Path) -> None:
        self.told.append(("save", path.name))

    @property
    def saved(self) -> list[tuple[Any, ...]]:
        return [told for told in self.told if "save" in told[0]]


class Agent:
    """Right or wrong by the episode's seed. `before_episode` is awaited between the two tokens it samples."""

    engine: SimulatedEngine

    def __init__(self, before_episode=lambda seed: asyncio.sleep(0)):
        self.before_episode, self.seeds = before_episode, []

    async def run_episode(self, task: Task, *, index: int, temperature: float, seed: int) -> Trajectory:
        self.seeds.append(seed)
        first = self.engine.policy_version
        await self.before_episode(seed)
        second = self.engine.policy_version
        turn = Turn(
            prompt_ids=Ids((1,)), response_ids=Ids((2, 3)), sampler_logprobs=(-1.0, -1.0), finish_reason="stop",
            policy_version=first, version_spans=((first, 0, 1), (second, 1, 2)) if second > first else (),
            text="", output=None, well_formed=True,
        )  # fmt: skip
        answer = task.answers[0] if seed % 3 else "nobody knows"
        return Trajectory(task=task, index=index, status=TrajectoryStatus.COMPLETED, turns=(turn,), answer=answer)


SMALL = {
    "num_steps": 4,
    "rollout": {"groups_per_step": 2, "max_open_groups": 2, "group_size": 2},
    "eval": {"questions": 2, "every": 0, "curve_questions": 2, "transfer_questions": 2},
    "checkpoint": {"every": 2},
}


class Run:
    """The loop of a run with everything around it made up."""

    def __init__(self, path: Path, ledger: Ledger, agent: Agent | None = None, resume: Path | None = None, **settings):
        self.config = RunConfig.model_validate(SMALL | settings)
        self.agent, self.ledger, self.evaluator = agent or Agent(), ledger, Agent()
        engine = SimulatedEngine(vocab_size=8, max_tokens=8)
        self.agent.engine = self.evaluator.engine = engine
        curriculum = load_curriculum(self.config)
        heldout = (curriculum.evaluation, *(scope for scope, _ in curriculum.transfer(1).values()))
        self.rooms = Rooms(
            curriculum=curriculum,
            agents=dict.fromkeys(curriculum.corpora, self.agent) | dict.fromkeys(heldout, self.evaluator),
            scorer=None,
            broker=SimpleNamespace(take_step=dict, complaints=list),
            engine=engine,
            sleeper=None,
            learner=ledger,
        )  # pyright: ignore[reportArgumentType]
        self.run_dir = RunDir.resume(path) if resume else RunDir.create(path, self.config)
        self.console = io.StringIO()
        live = Live(self.config.num_steps, console=Console(file=self.console))
        self.training = Training(self.config, self.run_dir, live, time.monotonic())
        if resume:
            self.training.go_on(resume)

    async def __call__(self) -> None:
        with self.run_dir:
            async with open_scorer(self.config.reward, max_new_tokens=self.config.agent.max_new_tokens) as scorer:
                await self.training._train(replace(self.rooms, scorer=scorer), OldObjects())

    @property
    def questions(self) -> list[list[str]]:
        """Of each step, in their order."""
        files = sorted((self.run_dir.path / "trajectories").glob("step_*"))
        return [[trajectory.task.id for trajectory in read_trajectories(file)] for file in files]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                key: value
                for key, value in row.items()
                if not key.startswith(("time/", "loop/", "share/")) and "_per_s" not in key
            }
            for row in read_metrics(self.run_dir.path)
        ]


def test_a_run_saves_as_often_as_it_is_told_and_at_the_end(tmp_path: Path):
    run = Run(tmp_path / "run", Ledger(), num_steps=5)
    asyncio.run(run())
    assert run.ledger.saved == [
        ("save_checkpoint", "step_000002", 2, 4),
        ("save_checkpoint", "step_000004", 4, 8),
        ("save_checkpoint", "step_000005", 5, 10),
        ("save", "model"),
    ]


def test_a_checkpoint_that_could_not_be_written_is_said_and_the_next_is_tried(tmp_path: Path):
    class Full(Ledger):
        async def step(self, groups, advantages, policy_version, *, values=None) -> dict[str, Any]:
            await super().step(groups, advantages, policy_version, values=values)
            return {"checkpoint_warning": "step_000002 could not be written"} if policy_version == 3 else {}

    run = Run(tmp_path / "run", Full())
    asyncio.run(run())
    assert "step 3: step_000002 could not be written" in run.console.getvalue()
    assert [name for what, name, *_ in run.ledger.saved if what == "save_checkpoint"] == ["step_000002", "step_000004"]


def test_without_checkpoints_the_model_is_saved_all_the_same(tmp_path: Path):
    run = Run(tmp_path / "run", Ledger(), checkpoint={"every": 0})
    asyncio.run(run())
    assert run.ledger.saved == [("save", "model")]


def test_a_run_that_goes_on_plays_what_the_other_would_have_played(tmp_path: Path):
    settings = {"rollout": SMALL["rollout"] | {"drop_rate": 0.5, "max_open_groups": 5}}
    whole, first = (
        Run(tmp_path / "whole", Ledger(), **settings),
        Run(tmp_path / "run", Ledger(), **settings, num_steps=2),
    )
    asyncio.run(whole())
    asyncio.run(first())
    later = Run(tmp_path / "run", Ledger(), resume=checkpoints(tmp_path / "run")[-1], **settings)
    asyncio.run(later())
    assert later.rows == whole.rows
    assert later.questions == whole.questions
    assert later.ledger.told[0] == ("load_checkpoint", "step_000002")
    steps = [told for told in whole.ledger.told if told[0] == "step"]
    assert [told for told in later.ledger.told if told[0] == "step"] == steps[2:]
    # the questions of before were asked once
    assert "eval_accuracy_after" not in read_driver_state(checkpoints(tmp_path / "run")[-1])["results"]
    assert later.training.results["eval_accuracy_before"] == first.training.results["eval_accuracy_before"]


def test_a_run_that_ended_in_its_last_evaluation_has_only_that_to_do(tmp_path: Path):
    asyncio.run(Run(tmp_path / "run", Ledger())())
    later = Run(tmp_path / "run", Ledger(), resume=checkpoints(tmp_path / "run")[-1])
    asyncio.run(later())
    assert later.ledger.told == [("load_checkpoint", "step_000004"), ("save", "model")]
    assert later.rooms.engine.policy_version == 4  # pyright: ignore[reportAttributeAccessIssue]
    assert "eval_accuracy_after" in later.training.results


def test_held_out_questions_that_are_lost_are_said_and_where_all_are_there_is_no_accuracy(tmp_path: Path):
    run = Run(tmp_path / "run", Ledger())
    whole = run.evaluator.run_episode

    async def lost(task: Task, *, index: int, temperature: float, seed: int) -> Trajectory:
        trajectory = await whole(task, index=index, temperature=temperature, seed=seed)
        # asked before and sampled, one of two is lost; greedily, both
        if temperature == 0.0 or seed == run.evaluator.seeds[0]:
            trajectory = replace(trajectory, status=TrajectoryStatus.FAILED_ENGINE, cause="it is gone")
        return trajectory

    run.evaluator.run_episode = lost
    with pytest.raises(WorldError, match="of 2 held-out questions 2 were lost, the last as failed_engine: it is gone"):
        asyncio.run(run())
    assert "of 2 held-out questions 1 were lost, the last as failed_engine: it is gone; they don't count" in (
        run.console.getvalue().replace("\n", " ")
    )
    assert "eval_greedy_before" not in run.training.results


def test_the_number_of_held_out_questions_is_that_of_those_there_are(tmp_path: Path, monkeypatch):
    run = Run(tmp_path / "run", Ledger())
    monkeypatch.setattr(run.rooms.curriculum, "heldout", lambda n, all=run.rooms.curriculum.heldout: all(n)[:1])
    asyncio.run(run())
    assert run.training.summary()["eval_questions"] == 1


def test_the_running_mean_goes_on(tmp_path: Path):
    settings = {"learner": {"advantage": "running_mean"}}
    first = Run(tmp_path / "run", Ledger(), **settings, num_steps=2)
    asyncio.run(first())
    later = Run(tmp_path / "run", Ledger(), resume=checkpoints(tmp_path / "run")[-1], **settings)
    later.run_dir.close()
    assert later.training.running == first.training.running
    assert later.training.running.baseline is not None


def test_cancelled_while_the_learner_works_a_run_ends_with_a_whole_step_and_its_checkpoint(tmp_path: Path):
    async def main() -> Run:
        ledger = Ledger(waits_at_step=3)
        run = Run(tmp_path / "run", ledger)
        task = asyncio.create_task(run())
        await ledger.waits.wait()
        task.cancel()
        for _ in range(20):
            await asyncio.sleep(0)
        ledger.may_go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        return run

    run = asyncio.run(main())
    assert [row["step"] for row in run.rows] == [1, 2, 3]
    assert run.ledger.saved[-2:] == [("save_checkpoint", "step_000003", 3, 6), ("save", "model")]


def test_a_bug_in_an_episode_after_ctrl_c_cuts_no_step_short(tmp_path: Path):
    """Each of them cancels the loop, which waits for the learner."""
    interrupted = asyncio.Event()

    async def before_episode(seed: int) -> None:
        if len(run.agent.seeds) > 3 * 4:
            # of no group that three steps learn from
            await interrupted.wait()
            raise KeyError("bug")

    async def main() -> None:
        task = asyncio.create_task(run())
        await run.ledger.waits.wait()
        task.cancel()
        interrupted.set()
        for _ in range(100):
            await asyncio.sleep(0)
        run.ledger.may_go_on.set()
        with pytest.raises(BaseExceptionGroup) as caught:
            await task
        assert caught.value.subgroup(KeyError)

    rollout = SMALL["rollout"] | {"mode": "carry_over", "max_open_groups": 4}
    run = Run(tmp_path / "run", Ledger(waits_at_step=3), Agent(before_episode), rollout=rollout)
    asyncio.run(main())
    assert [row["step"] for row in run.rows] == [1, 2, 3]
    assert [told[:3] for told in run.ledger.saved[-2:]] == [("save_checkpoint", "step_000003", 3), ("save", "model")]


def test_cancelled_while_agents_play_a_run_keeps_its_last_step(tmp_path: Path):
    stuck = asyncio.Event()

    async def main() -> Run:
        async def before_episode(seed: int) -> None:
            if run.training.step == 3:
                stuck.set()
                await asyncio.Event().wait()

        run = Run(tmp_path / "run", Ledger(), Agent(before_episode))
        task = asyncio.create_task(run())
        await stuck.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return run

    run = asyncio.run(main())
    assert run.ledger.saved[-2:] == [("save_checkpoint", "step_000003", 3, 6), ("save", "model")]


def test_a_bug_in_an_episode_loses_no_step(tmp_path: Path):
    async def before_episode(seed: int) -> None:
        if run.training.step == 1:
            raise KeyError("bug")

    run = Run(tmp_path / "run", Ledger(), Agent(before_episode))
    with pytest.raises(BaseExceptionGroup) as caught:
        asyncio.run(run())
    assert caught.value.subgroup(KeyError)
    assert run.ledger.saved == [("save_checkpoint", "step_000001", 1, 2), ("save", "model")]


@pytest.mark.parametrize(("step", "before"), [
    (1, []),
    (2, []),
    (3, [("save_checkpoint", "step_000002", 2, 4)]),
])  # fmt: skip
def test_a_step_that_breaks_once_it_is_learned_says_why_and_leaves_the_model(
    tmp_path: Path, step: int, before: list[tuple[Any, ...]]
):
    class Engine(SimulatedEngine):
        async def update_weights(self, policy_version: int) -> None:
            if policy_version == step:
                raise EngineError("the engine took no weights")
            await super().update_weights(policy_version)

    run = Run(tmp_path / "run", Ledger())
    engine = run.agent.engine = run.evaluator.engine = Engine(vocab_size=8, max_tokens=8)
    run.rooms = replace(run.rooms, engine=engine)
    with pytest.raises(BaseExceptionGroup) as caught:
        asyncio.run(run())
    assert caught.value.subgroup(EngineError)
    # the learner is ahead of what is written: a model to use, and no checkpoint that would skip this step's rows
    assert run.ledger.saved == [*before, ("save", "model")]


def test_a_dead_learner_is_asked_for_nothing(tmp_path: Path):
    run = Run(tmp_path / "run", Ledger(dies_at_step=3))
    with pytest.raises(BaseExceptionGroup) as caught:
        asyncio.run(run())
    assert caught.value.subgroup(LearnerError)
    assert run.ledger.saved == [("save_checkpoint", "step_000002", 2, 4)]


@pytest.mark.parametrize(("step", "hint"), [(None, "has no checkpoint yet"), (2, "-m l0fast.run --resume")])
def test_what_ends_a_run_says_how_to_go_on(tmp_path: Path, monkeypatch, capsys, step: int | None, hint: str):
    async def fails(training: Training) -> None:
        training.run_dir.metrics({"step": 1})
        if step:
            checkpoint(training.run_dir.checkpoint_path(step), step=step)
        raise ExceptionGroup("tasks", [LearnerError("the learner died")])

    monkeypatch.setattr(Training, "run", fails)
    assert main(["--run-dir", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "l0fast: the learner died"
    assert len(said) == 2
    assert hint in said[1]
    assert hint in (tmp_path / "run" / "log.txt").read_text()


def test_a_run_goes_on_where_there_are_no_locks_and_says_so(tmp_path: Path, monkeypatch, capsys):
    async def runs(training: Training) -> None: ...

    def refuses(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuses)
    monkeypatch.setattr(Training, "run", runs)
    monkeypatch.setattr("l0fast.training.draw_in_subprocess", lambda path: asyncio.sleep(0))
    assert main(["--run-dir", str(tmp_path / "run")]) == 0
    assert f"the file system of {tmp_path / 'run'} has no locks" in capsys.readouterr().out


def test_a_setting_that_shows_itself_wrong_at_the_start_leaves_nothing_to_resume(tmp_path: Path, monkeypatch, capsys):
    async def fails(training: Training) -> None:
        raise UsageError("no such image")

    monkeypatch.setattr(Training, "run", fails)
    assert main(["--run-dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == "l0fast: no such image\n"
    assert not (tmp_path / "run").exists()


def test_streamed_groups_are_learned_from_while_others_are_played(tmp_path: Path):
    async def main() -> Run:
        async def before_episode(seed: int) -> None:
            # the first group is done only when another was learned from
            if seed in first_group:
                await ledger.accumulated.wait()

        ledger = Ledger()
        first_group = {derive_seed(0, "episode", 0, index, 0) for index in range(2)}
        run = Run(
            tmp_path / "run", ledger, Agent(before_episode), learner={"advantage": "group", "stream": "on"}, num_steps=2
        )
        async with asyncio.timeout(20):
            await run()
        return run

    run = asyncio.run(main())
    told = run.ledger.told
    assert told[:3] == [("accumulate", [1]), ("accumulate", [0]), ("finish_step", 1)]
    assert sorted(n for what, *rest in told if what == "accumulate" for n in rest[0]) == [0, 1, 2, 3]
    assert not any(what == "step" for what, *_ in told)
    # written in the order of admission all the same
    other = Run(tmp_path / "other", Ledger(), num_steps=2)
    asyncio.run(other())
    assert run.questions == other.questions


def test_ctrl_c_while_pictures_are_drawn_ends_a_run_that_has_told_what_came_of_it(tmp_path: Path, monkeypatch, capsys):
    async def runs(training: Training) -> None: ...

    async def draws(path: Path) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Training, "run", runs)
    monkeypatch.setattr("l0fast.training.draw_in_subprocess", draws)
    assert main(["--run-dir", str(tmp_path / "run")]) == 130
    assert "stopped before held-out accuracy was measured" in capsys.readouterr().out
    assert read_summary(tmp_path / "run")["finished"]


def until_interrupted(told: Sequence[signal.Signals]) -> bool:
    """Whether work counts as interrupted that gets these signals: one, and the others while it saves what there is."""

    async def main() -> bool:
        async def work() -> None:
            try:
                await gets(told[0])
            finally:
                for number in told[1:]:
                    await gets(number)

        return await _until_interrupted(work(), Live(1, console=Console(file=io.StringIO())))

    async def gets(number: signal.Signals) -> None:
        await turns_of_the_loop()
        signal.raise_signal(number)
        # it looks for it
        await turns_of_the_loop()

    async def turns_of_the_loop() -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    return asyncio.run(main())


@pytest.mark.parametrize("number", [
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2,
])  # fmt: skip
def test_what_a_terminal_or_a_scheduler_gives_warning_with_ends_a_run_cleanly(number: signal.Signals):
    before = signal.getsignal(number)
    assert until_interrupted([number])
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("told", [
    # LSF, ten seconds apart; SLURM with --signal=USR1@120; a terminal that closes, as systemd ends a session
    [signal.SIGINT, signal.SIGTERM], [signal.SIGUSR1, signal.SIGTERM], [signal.SIGHUP, signal.SIGTERM],
])  # fmt: skip
def test_a_warning_that_is_followed_by_another_one_leaves_a_run_its_time_to_save(told: list[signal.Signals]):
    assert until_interrupted(told)


def test_what_a_containers_first_process_hands_on_of_a_signal_to_all_counts_once():
    assert until_interrupted([signal.SIGINT, signal.SIGINT])
    assert until_interrupted([signal.SIGTERM, signal.SIGINT, signal.SIGINT])


def test_ctrl_c_twice_ends_a_run_at_once(monkeypatch):
    monkeypatch.setattr("l0fast.training._ECHO_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        until_interrupted([signal.SIGINT, signal.SIGINT])


def test_a_run_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert not until_interrupted([signal.SIGHUP])
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The folder of a run that went to its end."""
    run = Run(tmp_path / "finished", Ledger())
    asyncio.run(run())
    run.run_dir.summary(run.training.summary() | {"finished": True})
    assert (run.run_dir.path / "trajectories" / "eval_after.jsonl").exists()
    return run.run_dir.path


def test_a_resume_that_a_setting_refuses_leaves_the_finished_run_as_it_was(finished: Path, capsys):
    before = left_in(finished)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        sink = ["--metrics.sinks", "prometheus", "--metrics.prometheus-port", str(port)]
        assert main(["--resume", str(finished), "--num-steps", "6", *sink]) == 2
    assert "can't be listened at" in capsys.readouterr().err
    assert left_in(finished) == before


def test_a_resume_whose_learner_fails_leaves_the_finished_run_as_it_was(finished: Path):
    class Broken(Ledger):
        async def load_checkpoint(self, path: Path) -> None:
            raise LearnerError("out of memory")

    (finished / "trace.json").write_text("hours of it")
    before = left_in(finished)
    with pytest.raises(LearnerError):
        asyncio.run(Run(finished, Broken(), resume=checkpoints(finished)[-1], num_steps=6, trace={"on": True})())
    assert left_in(finished) == before


def test_a_resume_that_is_interrupted_before_it_goes_on_leaves_the_finished_run_as_it_was(
    finished: Path, monkeypatch, capsys
):
    async def starts(training: Training) -> None:
        signal.raise_signal(signal.SIGINT)
        await asyncio.Event().wait()

    monkeypatch.setattr(Training, "run", starts)
    before = left_in(finished)
    assert main(["--resume", str(finished), "--num-steps", "6"]) == 130
    assert "interrupted after 4 steps" in capsys.readouterr().out
    assert left_in(finished) == before


def test_a_run_goes_on_without_the_trajectories_that_were_deleted(finished: Path):
    shutil.rmtree(finished / "trajectories")
    run = Run(finished, Ledger(), resume=checkpoints(finished)[-1], num_steps=5)
    asyncio.run(run())
    assert [row["step"] for row in run.rows] == [1, 2, 3, 4, 5]
    assert len(run.questions) == 1


def test_trajectories_of_the_newest_steps_alone_stay_where_that_is_set(tmp_path: Path):
    rollout = SMALL["rollout"] | {"keep_trajectories": 2}
    run = Run(tmp_path / "run", Ledger(), rollout=rollout, num_steps=5)
    asyncio.run(run())
    files = {path.stem for path in (tmp_path / "run" / "trajectories").iterdir()}
    assert {name for name in files if name.startswith("step_")} == {"step_0004", "step_0005"}
    assert {"eval_before", "eval_after_greedy"} < files
    # all that stood there before goes with the next step, too
    later = Run(
        tmp_path / "run",
        Ledger(),
        resume=checkpoints(tmp_path / "run")[-1],
        rollout=rollout | {"keep_trajectories": 1},
        num_steps=6,
    )
    asyncio.run(later())
    assert [row["step"] for row in later.rows] == [1, 2, 3, 4, 5, 6]
    assert [path.stem for path in (tmp_path / "run" / "trajectories").glob("step_*")] == ["step_0006"]


@pytest.mark.parametrize("num_steps", [6, 4, 3])
def test_a_checkpoint_that_comes_after_the_words_were_read_is_the_one_to_go_on_from(
    finished: Path, monkeypatch, num_steps: int
):
    begun = []

    async def begins(training: Training) -> None:
        begun.append((training.step, training.checkpoint))
        raise LearnerError("that was all")

    monkeypatch.setattr(Training, "run", begins)
    newest = checkpoints(finished)[-1]
    moved = newest.rename(finished / "being written")
    invocation = parse(["--resume", str(finished), "--num-steps", str(num_steps)])
    assert invocation.resume == finished / "checkpoints" / "step_000002"
    moved.rename(newest)
    error, sentence = {
        6: (LearnerError, "that was all"),
        4: (UsageError, "is done, with all of its 4 steps"),
        3: (UsageError, "has taken 4 steps already"),
    }[num_steps]
    with pytest.raises(error, match=sentence):
        asyncio.run(train(invocation))
    assert begun == ([(4, newest)] if num_steps == 6 else [])


@pytest.mark.parametrize(("stream", "learns"), [("off", "step"), ("on", "accumulate")])
def test_the_critic_is_asked_before_there_are_advantages_and_told_what_it_said(
    tmp_path: Path, stream: str, learns: str
):
    learner = {"advantage": "gae", "critic": "head", "whiten": "none", "stream": stream}
    run = Run(tmp_path / "run", Ledger(), learner=learner, num_steps=2)
    asyncio.run(run())
    asked = [told for told in run.ledger.told if told[0] in ("values", learns)]
    assert sorted(n for what, *rest in asked if what == "values" for n in rest[0]) == [0, 1, 2, 3]
    for (first, *groups), (then, *same) in zip(asked[::2], asked[1::2], strict=True):
        assert (first, then, groups) == ("values", learns, same)
    assert run.ledger.values_given == [[[[0.5], [0.5]]] * len(groups) for _, groups in asked[::2]]
    for file in (run.run_dir.path / "trajectories").glob("step_*"):
        for trajectory in read_trajectories(file):
            assert trajectory.advantages == pytest.approx([trajectory.reward - 0.5])


def test_streaming_tells_the_same_of_a_step(tmp_path: Path):
    runs = [
        Run(tmp_path / stream, Ledger(), learner={"advantage": "running_mean", "stream": stream})
        for stream in ("on", "off")
    ]
    for run in runs:
        asyncio.run(run())
    assert runs[0].rows == runs[1].rows
    assert runs[0].training.running == runs[1].training.running
    on, off = (
        [(t.reward, t.advantages) for file in sorted((run.run_dir.path / "trajectories").glob("step_*"))
         for t in read_trajectories(file)]
        for run in runs
    )  # fmt: skip
    assert on == off
    assert any(a for _, advantages in on for a in advantages)


@pytest.mark.parametrize(("learner", "device", "streams"), [
    ({"advantage": "group"}, "cuda", True),
    ({"advantage": "group"}, "cpu", False),
    ({"advantage": "group", "stream": "on"}, "cpu", True),
    ({"advantage": "group", "stream": "off"}, "cuda", False),
    ({"advantage": "reinforce_pp"}, "cuda", False),
    ({"advantage": "gae", "critic": "head"}, "cuda", False),
    ({"advantage": "gae", "critic": "head", "whiten": "none"}, "cuda", True),
    ({"advantage": "rloo", "permute_advantages": True}, "cuda", False),
    ({"advantage": "group", "minibatches": 2}, "cuda", False),
])  # fmt: skip
def test_streams_where_a_group_is_enough_and_the_cores_are_free(tmp_path: Path, learner, device: str, streams: bool):
    ledger = Ledger()
    ledger.device = device
    with (run := Run(tmp_path / "run", ledger, learner=learner)).run_dir:
        assert run.training._streams(ledger) is streams  # pyright: ignore[reportArgumentType]


def test_streaming_what_needs_the_whole_batch_is_refused():
    config = RunConfig.model_validate({"learner": {"stream": "on"}, "eval": {"questions": 2}})
    with pytest.raises(
        UsageError, match=r"stream = 'on', but learner.advantage = 'reinforce_pp' looks at the whole batch"
    ):
        check(config)
    config = RunConfig.model_validate({"learner": {"stream": "on", "minibatches": 2, "advantage": "group"}})
    with pytest.raises(UsageError, match=r"stream = 'on', but learner.minibatches = 2 cuts the whole batch"):
        check(config)


# --- the modes --------------------------------------------------------------------------------------------------------

MODES = ("on_policy", "carry_over", "one_step_off")


def in_mode(mode: str, **settings: Any) -> dict[str, Any]:
    rollout = {"groups_per_step": 2, "group_size": 2, "mode": mode, "max_open_groups": 5, "drop_rate": 0.5}
    return {"rollout": rollout, "num_steps": 8} | settings


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(200_000):
        if holds():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came to that")


def dawdling(rng: Random) -> Agent:
    """Episodes that take a few turns of the loop, and now and then many."""

    async def before_episode(seed: int) -> None:
        for _ in range(rng.randint(0, 5) * (1 if rng.random() < 0.8 else 20)):
            await asyncio.sleep(0)

    return Agent(before_episode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(3))
def test_each_group_is_trained_once_or_dropped_and_none_is_lost_by_a_kill(tmp_path: Path, mode: str, seed: int):
    rng = Random(seed)
    killed = tmp_path / "killed"

    async def until_killed() -> Run:
        run = Run(tmp_path / "run", Ledger(), dawdling(rng), **in_mode(mode))
        task = asyncio.create_task(run())
        await until(lambda: run.training.step >= 3)
        for _ in range(rng.randint(0, 100)):
            await asyncio.sleep(0)
        # what a kill would leave; a thread may be giving such a file its name just now
        shutil.copytree(tmp_path / "run", killed, ignore=shutil.ignore_patterns("*.partial"))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return run

    first = asyncio.run(until_killed())
    resumed_from = read_driver_state(checkpoints(killed)[-1])["step"]
    later = Run(killed, Ledger(), dawdling(rng), resume=checkpoints(killed)[-1], **in_mode(mode))
    asyncio.run(later())

    rows = read_groups(killed)
    numbers = [row.group for row in rows]
    assert sorted(numbers) == list(range(len(numbers))), "each number once, and nothing that was begun is missing"
    learned = [{row.group for row in rows if row.step == step and row.outcome == "learned"} for step in range(1, 9)]
    assert all(len(groups) == 2 for groups in learned)
    assert {row.outcome for row in rows} == {"learned", "dropped"}
    # what is written is what the learner was given, by the run that was killed up to its checkpoint, then by the other
    told = [
        {*groups}
        for run, steps in ((first, slice(0, resumed_from)), (later, slice(None)))
        for groups in [told[1] for told in run.ledger.told if told[0] == "step"][steps]
    ]
    assert told == learned
    bound = {"on_policy": 0, "carry_over": 2, "one_step_off": 1}[mode]
    assert all(0 <= row.step - 1 - row.oldest_version <= bound for row in rows if row.outcome == "learned")
    assert all(row["rollout/staleness_max"] <= bound for row in later.rows)
    if mode != "on_policy":
        assert any(row["rollout/staleness_mean"] > 0 for row in later.rows)
        assert any(row["rollout/carried_groups"] for row in later.rows)
    assert all(2 <= row["rollout/open_groups"] <= 5 for row in later.rows)


@pytest.mark.parametrize("mode", MODES)
def test_groups_are_played_while_the_learner_works_except_on_policy(tmp_path: Path, mode: str):
    async def main() -> int:
        ledger = Ledger(waits_at_step=2)
        settings = in_mode(mode, num_steps=4)
        run = Run(tmp_path / "run", ledger, **settings | {"rollout": settings["rollout"] | {"drop_rate": 0.0}})
        task = asyncio.create_task(run())
        await ledger.waits.wait()
        for _ in range(50):
            await asyncio.sleep(0)
        begun = len(run.agent.seeds)
        ledger.may_go_on.set()
        await task
        return begun

    # two steps of two groups of two, and what is ahead: all that is left, as far as there is room
    assert asyncio.run(main()) == 8 + {"on_policy": 0, "carry_over": 6, "one_step_off": 4}[mode]


def test_an_evaluation_beside_training_holds_nothing_up_and_says_whom_it_asked(tmp_path: Path):
    async def main() -> Run:
        async def before_episode(seed: int) -> None:
            # the whole evaluation before training goes through; the one of step 1 has an answer only when step 4 is learned
            if run.training.step == 1:
                ledger.may_go_on.set()
            await until(lambda: not 1 <= run.training.step < 4)

        ledger = Ledger(waits_at_step=2)
        run = Run(tmp_path / "run", ledger, **in_mode("carry_over", eval=SMALL["eval"] | {"every": 1}))
        run.evaluator.before_episode = before_episode
        async with asyncio.timeout(20):
            await run()
        return run

    run = asyncio.run(main())
    row = next(row for row in run.rows if row.get("eval/step") == 1)
    assert row["step"] >= 4
    assert row["eval/policy_version_oldest"] == 1
    assert row["eval/policy_version_newest"] >= 3
    evaluated = [row["eval/step"] for row in run.rows if "eval/step" in row]
    assert len(set(evaluated)) == len(evaluated)
    assert "the evaluation of step 2 is left out, for that of step 1 still goes on" in (
        (run.run_dir.path / "log.txt").read_text() + run.console.getvalue()
    )
    assert read_trajectories(run.run_dir.path / "trajectories" / "eval_step_1.jsonl")[0].turns[0].version_spans


def test_an_evaluation_that_was_under_way_is_asked_again_by_the_run_that_goes_on(tmp_path: Path):
    settings = in_mode("carry_over", eval=SMALL["eval"] | {"every": 2})

    async def main() -> None:
        async def before_episode(seed: int) -> None:
            if run.training.step >= 2:
                await asyncio.Event().wait()

        run = Run(tmp_path / "run", Ledger(), **settings)
        run.evaluator.before_episode = before_episode
        task = asyncio.create_task(run())
        await until(lambda: run.training.step >= 3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    newest = checkpoints(tmp_path / "run")[-1]
    assert read_driver_state(newest)["evaluating"] == 2
    later = Run(tmp_path / "run", Ledger(), resume=newest, **settings)
    asyncio.run(later())
    assert 2 in [row.get("eval/step") for row in later.rows]


def test_an_evaluation_in_between_asks_no_more_than_the_fixed_questions(tmp_path: Path):
    run = Run(tmp_path / "run", Ledger(), eval=SMALL["eval"] | {"every": 1, "curve_questions": 5})
    asyncio.run(run())
    before, between = (
        [t.task.id for t in read_trajectories(tmp_path / "run" / "trajectories" / f"eval_{name}.jsonl")]
        for name in ("before", "step_1")
    )
    assert len(before) == 2
    assert between == before


def test_staleness_is_counted_by_tokens():
    def turn(*spans: tuple[int, int, int]) -> Turn:
        return Turn(
            prompt_ids=Ids((1,)), response_ids=Ids((2,) * spans[-1][2]), sampler_logprobs=(), finish_reason="stop",
            policy_version=spans[0][0], version_spans=spans if len(spans) > 1 else (), text="", output=None,
            well_formed=True,
        )  # fmt: skip

    assert staleness([turn((3, 0, 6), (5, 6, 8)), turn((5, 0, 2))], 5) == {
        "rollout/staleness_mean": 2 * 6 / 10,
        "rollout/staleness_max": 2,
    }
    assert staleness([], 5) == {"rollout/staleness_mean": 0, "rollout/staleness_max": 0}
