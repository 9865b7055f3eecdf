"""What MODEL means: something that ships, a folder, a run, a checkpoint."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from l0fast.config import RolloutConfig, RunConfig
from l0fast.errors import UsageError
from l0fast.policies import MODELS, Policy, open_policy
from l0fast.run_dir import RunDir


def opened(word: str) -> tuple[Policy, list[str]]:
    async def run() -> tuple[Policy, list[str]]:
        async with open_policy(word) as policy:
            return policy, sorted(file.name for file in policy.folder.iterdir())

    return asyncio.run(run())


@asynccontextmanager
async def as_it_is(checkpoint: Path) -> AsyncIterator[Path]:
    yield checkpoint


def test_a_policy_that_ships_comes_with_what_it_was_trained_with():
    policy, files = opened("geography")
    assert (policy.name, policy.folder, policy.trained_with) == ("geography", MODELS / "geography", RunConfig())
    assert "model.safetensors" in files


def test_a_model_folder_is_itself_and_that_of_a_run_knows_its_settings(tmp_path: Path):
    config = RunConfig(rollout=RolloutConfig(max_turns=3))
    with RunDir.create(tmp_path / "run", config) as run_dir:
        for folder in (run_dir.model_path, tmp_path / "mine"):
            folder.mkdir()
            (folder / "config.json").write_text("{}")
    assert opened(str(tmp_path / "mine"))[0] == Policy(name="mine", folder=tmp_path / "mine", trained_with=None)
    assert opened(str(tmp_path / "run" / "model"))[0].trained_with == config


def test_a_run_that_went_on_is_another_policy_than_it_was(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("l0fast.policies._exported", as_it_is)
    checkpoints = tmp_path / "run" / "checkpoints"
    origins = []
    for step in (2, 2, 4):
        (checkpoints / f"step_{step:06d}").mkdir(parents=True, exist_ok=True)
        if not (file := checkpoints / f"step_{step:06d}" / "learner.json").exists():
            file.write_text("{}")
        origins.append(opened(str(tmp_path / "run"))[0].origin)
    assert origins[0] == origins[1] != origins[2]
    assert [Path(origin.partition(" (")[0]).name for origin in origins[1:]] == ["step_000002", "step_000004"]
    # whether the run is named, or its checkpoint
    assert opened(str(checkpoints / "step_000004"))[0].origin == origins[2]


def test_what_is_none_of_it_is_one_sentence(tmp_path: Path):
    for word in ("nothing", str(tmp_path), ""):
        with pytest.raises(UsageError, match="no policy that ships .geography., no model folder"):
            opened(word)
