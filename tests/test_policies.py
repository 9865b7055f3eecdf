"""What MODEL means: something that ships, a folder, a run, a checkpoint."""

import asyncio
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


def test_what_is_none_of_it_is_one_sentence(tmp_path: Path):
    for word in ("nothing", str(tmp_path), ""):
        with pytest.raises(UsageError, match="no policy that ships .geography., no model folder"):
            opened(word)
