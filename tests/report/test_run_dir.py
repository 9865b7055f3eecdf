"""The run folder: what is written can be read back, nothing is overwritten, and the event loop is not held up."""

import asyncio
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
from blockbuster import blockbuster_ctx
from hypothesis import given, settings
from hypothesis import strategies as st

from l0fast.config import RunConfig
from l0fast.errors import UsageError, WorldError
from l0fast.ids import Ids
from l0fast.run_dir import (
    RunDir,
    check_free,
    command,
    is_free,
    read_config,
    read_groups,
    read_metrics,
    read_summary,
    read_trajectories,
    step_name,
)
from l0fast.types import Task, Trajectory, TrajectoryStatus, Turn


def turn() -> Turn:
    return Turn(
        prompt_ids=Ids((1, 2, 3)),
        response_ids=Ids((0, 1, 2)),
        sampler_logprobs=(-0.125,) * 3,
        finish_reason="stop",
        policy_version=4,
        text="<think>Let me look it up.</think><code>search('Oslo')</code>",
        output="['Oslo is the capital of Norway.']",
        well_formed=True,
        generate_s=0.25,
        execute_s=0.001,
    )


def trajectory(text: str = "Norway") -> Trajectory:
    return Trajectory(
        task=Task(id="q1", question=f"Where is {text}?", answers=("Norway",), kind="city>country", hops=2),
        index=5,
        status=TrajectoryStatus.COMPLETED,
        turns=(turn(), turn()),
        answer=text,
        rewards=(0.05, 0.9),
        correct=True,
        started_s=1.5,
        wall_s=0.7,
    )


def test_the_settings_read_back_as_they_were(tmp_path: Path):
    config = RunConfig.model_validate(
        {"seed": 3, "sandbox": {"preload": ["json"]}, "learner": {"betas": [0.8, 0.9], "permute_advantages": True}}
    )
    with RunDir.create(tmp_path / "a" / "run", config) as run_dir:
        assert read_config(run_dir.path) == config


def test_a_recipe_made_from_a_run_gives_the_same_run(tmp_path: Path):
    from l0fast.cli import parse

    config = RunConfig.model_validate({"num_steps": 9, "rollout": {"temperature": 0.5}})
    with RunDir.create(tmp_path / "run", config) as run_dir:
        assert parse([str(run_dir.path / "config.toml"), "--run-dir", str(tmp_path / "b")]).config == config


def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds files"):
        RunDir.create(tmp_path, RunConfig())
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def end_with(run_dir: RunDir, error: Exception) -> None:
    with run_dir:
        run_dir.log("starting")
        raise error


@pytest.mark.parametrize(
    "error",
    [UsageError("no such image"), ExceptionGroup("tasks", [UsageError("no such image")])],
    ids=["bare", "grouped"],
)
def test_a_run_that_could_not_begin_leaves_its_folder_free(tmp_path: Path, error: Exception):
    with pytest.raises(type(error)):
        end_with(RunDir.create(tmp_path / "run", RunConfig()), error)
    check_free(tmp_path / "run")


def test_a_link_to_a_folder_is_left_free_too(tmp_path: Path):
    (tmp_path / "volume").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "volume")
    with pytest.raises(UsageError, match="no such image"):
        end_with(RunDir.create(tmp_path / "run", RunConfig()), UsageError("no such image"))
    check_free(tmp_path / "run")


def test_a_volume_that_is_new_is_free_before_and_after_a_run_that_could_not_begin(tmp_path: Path):
    (tmp_path / "run" / "lost+found").mkdir(parents=True)
    (tmp_path / "run" / "lost+found" / "#12").write_text("")
    assert is_free(tmp_path / "run")
    with pytest.raises(UsageError, match="no such image"):
        end_with(RunDir.create(tmp_path / "run", RunConfig()), UsageError("no such image"))
    check_free(tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["lost+found", "#12"]


def on_a_full_disk(path: Path, name: str) -> RunDir:
    """A run whose file can't be written any further."""
    RunDir.create(path, RunConfig()).close()
    (path / name).unlink()
    (path / name).symlink_to("/dev/full")
    return RunDir.resume(path)


def test_what_can_not_be_written_ends_the_run_with_its_name(tmp_path: Path):
    with (
        pytest.raises(WorldError, match=r"could not write .*/metrics\.jsonl: .*No space left on device"),
        on_a_full_disk(tmp_path / "run", "metrics.jsonl") as run_dir,
    ):
        run_dir.metrics({"step": 1})


def test_a_log_that_can_not_be_written_keeps_nobody_from_going_on(tmp_path: Path):
    with on_a_full_disk(tmp_path / "run", "log.txt") as run_dir:
        run_dir.log("ending, as soon as the learner is between two steps")


def test_a_line_to_copy_names_a_python_that_has_this_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    environment = {"PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    # as it is named to a shell that would take another, or none
    (tmp_path / Path(sys.executable).name).symlink_to("/bin/false")
    monkeypatch.setenv("PATH", str(tmp_path))
    line = command("l0fast.trajectory", "a run", "--help")
    assert line.endswith(" -m l0fast.trajectory 'a run' --help")
    assert subprocess.run(line, shell=True, env=environment, capture_output=True).returncode == 0
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert command("l0fast.run") == f"{Path(sys.executable).name} -m l0fast.run"


def test_what_was_done_before_a_usage_error_stays(tmp_path: Path):
    run_dir = RunDir.create(tmp_path / "run", RunConfig())
    run_dir.metrics({"step": 1})
    with pytest.raises(UsageError):
        end_with(run_dir, UsageError("the cache file has gone"))
    assert read_metrics(tmp_path / "run") == [{"step": 1}]


def test_a_bug_leaves_the_log(tmp_path: Path):
    with pytest.raises(KeyError):
        end_with(RunDir.create(tmp_path / "run", RunConfig()), KeyError("bug"))
    assert "starting" in (tmp_path / "run" / "log.txt").read_text()


def test_a_row_is_on_disk_when_metrics_returns(tmp_path: Path):
    with RunDir.create(tmp_path / "run", RunConfig()) as run_dir:
        run_dir.metrics({"step": 1, "loss/kl": np.float32(0.5)})
        run_dir.metrics({"step": 2, "loss/kl": float("nan")})
        assert read_metrics(run_dir.path) == [{"step": 1, "loss/kl": 0.5}, {"step": 2, "loss/kl": None}]


def test_a_broken_line_is_named(tmp_path: Path):
    with RunDir.create(tmp_path / "run", RunConfig()) as run_dir:
        run_dir.metrics({"step": 1})
        with (run_dir.path / "metrics.jsonl").open("a") as file:
            file.write('{"step":')
        with pytest.raises(UsageError, match=r"metrics\.jsonl, line 2"):
            read_metrics(run_dir.path)


def test_a_group_of_another_version_is_named(tmp_path: Path):
    with RunDir.create(tmp_path / "run", RunConfig()) as run_dir:
        (run_dir.path / "groups.jsonl").write_text('{"group": 1, "of_another_version": 2}\n')
        with pytest.raises(UsageError, match=r"groups\.jsonl, line 1 is not what a run writes"):
            read_groups(run_dir.path)


def test_the_summary_is_replaced_as_a_whole(tmp_path: Path):
    with RunDir.create(tmp_path / "run", RunConfig()) as run_dir:
        assert read_summary(run_dir.path) == {}
        run_dir.summary({"steps": 1})
        with pytest.raises(TypeError):
            run_dir.summary({"steps": object()})
        assert read_summary(run_dir.path) == {"steps": 1}
        run_dir.summary({"steps": 2})
        assert read_summary(run_dir.path) == {"steps": 2}
        assert not list(run_dir.path.glob("*partial*"))


def test_the_log_keeps_lines_in_order(tmp_path: Path):
    with RunDir.create(tmp_path / "run", RunConfig()) as run_dir:
        run_dir.log("one")
        run_dir.log("two")
        lines = (run_dir.path / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["one", "two"]


any_text = st.text(st.characters(exclude_categories=["Cs"]))


@settings(deadline=None, max_examples=50)
@given(question=any_text, answer=st.none() | any_text, advantage=st.floats(allow_nan=False, allow_infinity=False))
def test_trajectories_read_back_as_they_were(tmp_path_factory, question: str, answer: str | None, advantage: float):
    played = [trajectory(question), trajectory()]
    object.__setattr__(played[1], "answer", answer)
    with RunDir.create(tmp_path_factory.mktemp("run"), RunConfig()) as run_dir:
        path = asyncio.run(run_dir.trajectories(step_name(12), played, [[advantage, 0.5], []]))
    assert path.name == "step_0012.jsonl"
    read = read_trajectories(path)
    for before, after in zip(played, read, strict=True):
        for name in Trajectory.__dataclass_fields__:
            assert getattr(before, name) == getattr(after, name)
    assert [t.advantages for t in read] == [(advantage, 0.5), ()]
    assert read[0].turns[0].response_ids == (0, 1, 2)
    assert read[0].reward == pytest.approx(0.95)


def test_a_prompt_stands_in_the_file_once(tmp_path: Path):
    first, said = Ids(range(1000)), Ids([7, 8])
    prompts = [first, first + said + [9], first + said + [9] + said + [10, 11], Ids([5, 6])]
    turns = tuple(replace(turn(), prompt_ids=prompt, response_ids=said) for prompt in prompts)
    with RunDir.create(tmp_path / "run", RunConfig()) as run_dir:
        path = asyncio.run(run_dir.trajectories("step_0001", [replace(trajectory(), turns=turns)]))
    row = orjson.loads(path.read_bytes())
    assert [t.get("new_prompt_ids", t.get("prompt_ids")) for t in row["turns"]] == [
        [*range(1000)],
        [9],
        [10, 11],
        [5, 6],
    ]
    read = read_trajectories(path)[0].turns
    assert [t.prompt_ids for t in read] == prompts
    assert len({id(t.prompt_ids._buffer) for t in read}) == 2
    # as an earlier version wrote it
    for t, prompt in zip(row["turns"], prompts, strict=True):
        t.pop("new_prompt_ids", None)
        t["prompt_ids"] = list(prompt)
    path.write_bytes(orjson.dumps(row))
    assert read_trajectories(path)[0].turns == read


@pytest.mark.parametrize("wrong", [{}, {"new_prompt_ids": [1]}, {"prompt_ids": 3}, {"prompt_ids": ["a"]}, "turn", None])
def test_a_turn_without_its_ids_is_one_sentence(tmp_path: Path, wrong: object):
    with RunDir.create(tmp_path / "run", RunConfig()) as run_dir:
        path = asyncio.run(run_dir.trajectories("step_0001", [trajectory()]))
    row = orjson.loads(path.read_bytes())
    row["turns"][0] = wrong
    path.write_bytes(orjson.dumps(row))
    with pytest.raises(UsageError, match="line 1 is not what a run writes"):
        read_trajectories(path)


def test_a_trajectory_of_another_version_is_not_read_as_a_wrong_one(tmp_path: Path):
    with RunDir.create(tmp_path / "run", RunConfig()) as run_dir:
        path = asyncio.run(run_dir.trajectories("step_0001", [trajectory()]))
    path.write_text(path.read_text().replace('"correct":', '"exact_match":'))
    with pytest.raises(UsageError, match="line 1 is not what a run writes"):
        read_trajectories(path)


def test_a_line_is_plain_json(tmp_path: Path):
    with RunDir.create(tmp_path / "run", RunConfig()) as run_dir:
        path = asyncio.run(run_dir.trajectories("eval_before", [trajectory()]))
    (line,) = path.read_bytes().splitlines()
    row = orjson.loads(line)
    assert (row["task"]["question"], row["status"], row["advantages"]) == ("Where is Norway?", "completed", [])


def test_advantages_must_be_given_for_all_or_none(tmp_path: Path):
    with RunDir.create(tmp_path / "run", RunConfig()) as run_dir, pytest.raises(ValueError, match="2 trajectories"):
        asyncio.run(run_dir.trajectories("x", [trajectory()] * 2, [[1.0]]))


def test_no_such_file_is_one_sentence(tmp_path: Path):
    with pytest.raises(UsageError, match="can't be read"):
        read_trajectories(tmp_path / "x.jsonl")


def test_the_writer_sleeps_as_long_as_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # in made-up time: how late a real loop wakes depends on who else uses the machine
    class Time:
        now = worked = slept = 0.0

        def perf_counter(self) -> float:
            self.now += 0.0001
            self.worked += 0.0001
            return self.now

        def sleep(self, seconds: float) -> None:
            assert seconds <= 0.001
            self.now += seconds
            self.slept += seconds

    clock = Time()
    with RunDir.create(tmp_path / "run", RunConfig()) as run_dir:
        monkeypatch.setattr("l0fast.run_dir.time", clock)
        path = asyncio.run(run_dir.trajectories("eval_after", [trajectory()] * 200))
    assert len(read_trajectories(path)) == 200
    assert clock.slept >= 0.7 * clock.worked > 0


def test_writing_trajectories_does_not_block_the_loop(tmp_path: Path):
    async def main(run_dir: RunDir) -> None:
        with blockbuster_ctx():
            await run_dir.trajectories("eval_after", [trajectory()])

    with RunDir.create(tmp_path / "run", RunConfig()) as run_dir:
        asyncio.run(main(run_dir))
