"""What a run writes is planned as it turns out, and bounded where it is told to be."""

import asyncio
import os
import random
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from l0fast import disk, rooms
from l0fast.cli import parse, render_plan
from l0fast.config import RunConfig
from l0fast.disk import BYTES_PER_TOKEN, check_caches, kept_bytes, no_room
from l0fast.dry_run import dry_run
from l0fast.errors import UsageError
from l0fast.ids import Ids
from l0fast.run_dir import RunDir
from l0fast.types import Task, ToolCall, Trajectory, TrajectoryStatus, Turn

Usage = namedtuple("Usage", "total used free")


def long_episode(said: int, shown: int) -> Trajectory:
    """Thirty turns of so many sampled tokens, and so many that it was shown, a token four letters or a blank."""
    rng, words, turns = random.Random(0), np.random.default_rng(0), []
    prompt = Ids(words.integers(0, 151_000, 500).tolist())

    def text(tokens: int) -> str:
        return " ".join("".join(rng.choices("etaoinsh", k=4)) for _ in range(4 * tokens // 5))

    for _ in range(30):
        response = Ids(words.integers(0, 151_000, said).tolist())
        output = text(shown)
        logprobs = tuple(-words.exponential(size=said).astype(np.float32).astype(float))
        turns.append(
            Turn(
                prompt_ids=prompt,
                response_ids=response,
                sampler_logprobs=logprobs,
                finish_reason="stop",
                policy_version=7,
                text=text(said),
                output=output,
                calls=(ToolCall(name="search", arguments='[["?"], {}]', answer=output),),
                well_formed=True,
            )
        )
        prompt = prompt + response + words.integers(0, 151_000, shown).tolist()
    task = Task(id="q", question="?", answers=("a",))
    return Trajectory(task=task, index=0, status=TrajectoryStatus.COMPLETED, turns=tuple(turns), rewards=(0.1,) * 30)


@pytest.mark.parametrize(("said", "shown"), [(250, 400), (325, 325), (480, 170)])
def test_a_token_takes_the_bytes_that_are_planned(tmp_path: Path, said: int, shown: int):
    played = long_episode(said, shown)
    with RunDir.create(tmp_path / "run", RunConfig()) as run_dir:
        path = asyncio.run(run_dir.trajectories("step_0001", [played]))
    last = played.turns[-1]
    tokens = len(last.prompt_ids) + len(last.response_ids)
    assert path.stat().st_size / tokens == pytest.approx(BYTES_PER_TOKEN, rel=0.2)


def test_the_plan_says_what_trajectories_take_and_what_bounds_them():
    plan = render_plan(parse(["l0_qwen3_4b", "--num-steps", "3000"]))
    # 256 x 19,456 tokens, of 3,000 steps, 4 x 1,024 questions and 59 x 256
    assert "disk        trajectories 0.12 GB a step, 368 GB in all with those of evaluations" in plan
    plan = render_plan(parse(["l0_qwen3_4b", "--num-steps", "3000", "--rollout.keep-trajectories", "50"]))
    assert "0.12 GB a step, 15 GB in all with those of evaluations and the newest 50 steps" in plan


def test_a_disk_without_room_for_them_is_said_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flags = ["l0_qwen3_4b", "--num-steps", "3000", "--run-dir", str(tmp_path / "a" / "run")]
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("l0fast.dry_run.num_gpus", lambda: 0)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda folder: Usage(1e12, 8e11, 2e11))
    (said,) = [what for what in dry_run(parse(flags)).absent if "trajectories" in what]
    assert said.startswith(f"trajectories may take 368 GB, 0.12 GB a step, and the disk of {tmp_path} has 200 GB free")
    assert "--rollout.keep-trajectories" in said
    bounded = parse([*flags, "--rollout.keep-trajectories", "50"])
    assert not [what for what in dry_run(bounded).absent if "trajectories" in what]
    # of one that goes on, what is still to come
    config = parse(flags).config
    assert no_room(config, tmp_path / "run", step=2000) is None
    assert kept_bytes(config, step=3000) == 0
    assert kept_bytes(bounded.config, step=49) - kept_bytes(bounded.config, step=50) > disk.step_bytes(config)


@pytest.fixture
def closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The HOME that a container gave to a uid of nobody's; root may write to it in spite of its mode."""
    for variable in ("TRITON_CACHE_DIR", "TRITON_HOME", "SGLANG_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    temporary_file = disk.tempfile.TemporaryFile

    def denied(*, dir: Path):
        if dir == home:
            raise PermissionError(13, "Permission denied")
        return temporary_file(dir=dir)

    monkeypatch.setattr(disk.tempfile, "TemporaryFile", denied)
    monkeypatch.setenv("HOME", str(home))
    return home


def test_a_home_in_which_no_compiled_kernel_can_be_kept_is_refused_with_the_way_out(
    closed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(
        UsageError, match=rf"^{closed}/.triton/cache, .* can't be written to \(Permission denied\): set HOME"
    ):
        check_caches(with_sglang=True)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    check_caches(with_sglang=False)
    with pytest.raises(
        UsageError, match=rf"^{closed}/.cache/sglang, .*: set HOME or SGLANG_CACHE_DIR to a folder that can"
    ):
        check_caches(with_sglang=True)
    monkeypatch.setenv("SGLANG_CACHE_DIR", str(tmp_path / "sglang"))
    check_caches(with_sglang=True)
    monkeypatch.delenv("SGLANG_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    check_caches(with_sglang=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"], "a look leaves nothing"


def test_a_uid_without_a_home_is_told_to_set_one(monkeypatch: pytest.MonkeyPatch):
    """As SGLang's FlashInfer does not: Path.home() raises RuntimeError when that is imported."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(UsageError, match="^HOME is not set, and uid .* has none: set it to a folder"):
        check_caches(with_sglang=True)


@pytest.mark.parametrize("gpus", [0, 2])
def test_where_kernels_are_kept_is_looked_at_where_there_are_gpus_before_a_model_is_downloaded(
    closed: Path, monkeypatch: pytest.MonkeyPatch, gpus: int
):
    def download(name: str) -> None:
        raise AssertionError("it may take an hour")

    monkeypatch.setattr(rooms, "num_gpus", lambda: gpus)
    monkeypatch.setattr(rooms, "download_model", download)
    config = RunConfig.model_validate({"engine": {"kind": "transformers"}, "model": {"path": "nobody/nothing"}})
    with pytest.raises(UsageError if gpus else AssertionError, match=r"\.triton/cache" if gpus else "an hour"):
        rooms.check(config)
