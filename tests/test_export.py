"""Export: what a checkpoint holds is what transformers loads, in the dtype asked for, LoRA merged; bad input is a sentence."""

import asyncio
import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from l0fast.agent.chat import Chat
from l0fast.config import LearnerConfig, RunConfig
from l0fast.errors import UsageError
from l0fast.export import DTYPES, export, find_checkpoint, main
from l0fast.ipc import shared_weights
from l0fast.learner.checkpoint import Checkpoints
from l0fast.learner.policy_model import PolicyModel
from l0fast.policies import open_policy


def saved(run_dir: Path, policy_folder: Path, *, steps: tuple[int, ...] = (8,), **learner) -> PolicyModel:
    """A run with checkpoints of a policy that has moved; the last one is of the policy returned."""
    config = RunConfig(learner=LearnerConfig(**learner))
    policy = PolicyModel(policy_folder, config.learner, num_steps=8, temperature=1.0)
    checkpoints = Checkpoints(policy, keep=5)
    state = {"config": config.model_dump(mode="json"), "model_path": str(policy_folder)}
    generator = torch.Generator().manual_seed(0)
    for step in steps:
        with torch.no_grad():
            for parameter in policy.trained.values():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        checkpoints.save(run_dir / "checkpoints" / f"step_{step:06d}", state | {"step": step}, step)
    checkpoints.close()
    return policy


@pytest.fixture(scope="module")
def run(policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PolicyModel]:
    folder = tmp_path_factory.mktemp("run")
    return folder, saved(folder, policy_folder, steps=(8, 16))


def test_the_export_is_the_policy_byte_for_byte_and_transformers_loads_it(run, policy_folder: Path, tmp_path: Path):
    run_dir, policy = run
    assert main([str(run_dir), str(tmp_path / "out")]) == 0
    policy.save(tmp_path / "as saved")
    files = sorted(file.name for file in (tmp_path / "as saved").iterdir())
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == files
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "as saved" / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)
    text = "Oslo is the capital of Norway."
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text) == AutoTokenizer.from_pretrained(policy_folder)(text)
    assert [path.name for path in tmp_path.glob(".*")] == []
    # a group that shares a run's folder shares its model
    for folder in ("out", "as saved"):
        assert len({file.stat().st_mode for file in (tmp_path / folder).iterdir()}) == 1


def test_a_run_means_its_newest_checkpoint_and_a_checkpoint_itself(run, tmp_path: Path):
    run_dir, _ = run
    older = run_dir / "checkpoints" / "step_000008"
    assert find_checkpoint(run_dir) == run_dir / "checkpoints" / "step_000016"
    assert find_checkpoint(older) == older
    for name, checkpoint in (("old", older), ("new", find_checkpoint(run_dir))):
        export(checkpoint, tmp_path / name)
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("old", "new"))
    assert not any(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_rounded_to_the_dtype_and_the_folder_says_so(run, tmp_path: Path, dtype: str):
    run_dir, policy = run
    export(find_checkpoint(run_dir), tmp_path / "out", dtype=dtype)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == {name for name, _ in policy.model.named_parameters()}
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(written[name], parameter.to(getattr(torch, dtype)))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_settings_stay_in_the_words_of_the_model_the_run_began_with(policy_folder: Path, tmp_path: Path):
    older = shutil.copytree(policy_folder, tmp_path / "older")
    settings = json.loads((older / "config.json").read_text())
    for name in ("rope_parameters", "dtype", "architectures"):
        settings.pop(name)
    # as transformers 4 wrote them, which does not know rope_parameters
    settings |= {"rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "bfloat16", "auto_map": {"AutoConfig": "a.B"}}
    (older / "config.json").write_text(json.dumps(settings))
    policy = saved(tmp_path / "run", older)
    policy.save(tmp_path / "saved")
    export(find_checkpoint(tmp_path / "run"), tmp_path / "out", dtype="bfloat16")
    del settings["auto_map"], settings["torch_dtype"]
    settings["architectures"] = ["Qwen3ForCausalLM"]
    for folder, dtype in (("saved", "float32"), ("out", "bfloat16")):
        assert json.loads((tmp_path / folder / "config.json").read_text()) == settings | {"torch_dtype": dtype}
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype="auto")
        assert model.config.rope_parameters["rope_theta"] == 1e6
        assert str(model.dtype) == f"torch.{dtype}"


@pytest.mark.parametrize(
    "theirs", [None, {"eos_token_id": 0, "top_p": 0.9}], ids=["in config.json alone", "a base model's"]
)
def test_whoever_loads_a_policy_ends_a_turn_where_training_did(theirs, policy_folder: Path, tmp_path: Path):
    base = shutil.copytree(policy_folder, tmp_path / "base")
    settings = json.loads((base / "config.json").read_text()) | {"eos_token_id": 0}
    (base / "config.json").write_text(json.dumps(settings))
    (base / "generation_config.json").unlink(missing_ok=True)
    if theirs is not None:
        (base / "generation_config.json").write_text(json.dumps(theirs))
    saved(tmp_path / "run", base).save(tmp_path / "saved")
    export(find_checkpoint(tmp_path / "run"), tmp_path / "out")
    stops = list(Chat(base).stop_token_ids)
    assert stops == [2, 0]
    for folder in ("saved", "out"):
        written = json.loads((tmp_path / folder / "generation_config.json").read_text())
        assert written["eos_token_id"] == stops
        assert written.get("top_p") == (theirs or {}).get("top_p")
        assert AutoModelForCausalLM.from_pretrained(tmp_path / folder).generation_config.eos_token_id == stops


def test_lora_is_merged(policy_folder: Path, tmp_path: Path):
    pytest.importorskip("peft")
    policy = saved(tmp_path / "run", policy_folder, lora_rank=4)
    export(find_checkpoint(tmp_path / "run"), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    merged = dict(policy.weights())
    assert merged.keys() == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, merged[name])
    before = load_file(policy_folder / "model.safetensors")
    assert any(not torch.equal(before[name].float(), merged[name]) for name in merged)


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_file_that_has_tied_weights_twice_is_no_other_model(policy_folder: Path, tmp_path: Path, lora_rank: int):
    pytest.importorskip("peft")
    twice = shutil.copytree(policy_folder, tmp_path / "twice")
    weights = load_file(twice / "model.safetensors")
    assert "lm_head.weight" not in weights, "it is a tied model"
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(weights | head, twice / "model.safetensors", metadata={"format": "pt"})
    policy = saved(tmp_path / "run", twice, lora_rank=lora_rank)
    export(find_checkpoint(tmp_path / "run"), tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == dict(policy.weights()).keys()


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_what_a_folder_holds_beside_its_parameters_is_left_out(policy_folder: Path, tmp_path: Path, lora_rank: int):
    pytest.importorskip("peft")
    more = shutil.copytree(policy_folder, tmp_path / "more")
    weights = load_file(more / "model.safetensors")
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file(weights | frequencies, more / "model.safetensors", metadata={"format": "pt"})
    save_file({"tok_embeddings.weight": torch.ones(7, 3)}, more / "consolidated.safetensors")
    policy = saved(tmp_path / "run", more, lora_rank=lora_rank)
    with shared_weights(more) as shared:
        policy.publish(shared.tensors())
    export(find_checkpoint(tmp_path / "run"), tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == dict(policy.weights()).keys()


def test_an_export_that_was_killed_is_no_hindrance(run, tmp_path: Path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.safetensors").write_bytes(b"half")
    export(find_checkpoint(run[0]), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- what can't be used -----------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_checkpoint_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "neither a complete checkpoint nor a run that has one" in said
    assert len(said.splitlines()) == 1


def test_the_folder_one_is_in_is_no_place_and_that_is_one_sentence(run, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([str(run[0]), "."]) == 2
    assert capsys.readouterr().err == "l0fast: an export makes its folder, and . is there already: give OUT a name\n"
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(run, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UsageError, match="never overwrites"):
            export(find_checkpoint(run[0]), out)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_link_to_an_empty_folder_is_that_folder(run, tmp_path: Path):
    (tmp_path / "volume").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "volume")
    export(find_checkpoint(run[0]), tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "volume" / "model.safetensors").exists()


def test_a_model_that_has_moved_may_be_named(run, policy_folder: Path, tmp_path: Path):
    run_dir, policy = run
    checkpoint = tmp_path / "copy"
    checkpoint.mkdir()
    for file in find_checkpoint(run_dir).iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    state = json.loads((checkpoint / "driver.json").read_text())
    (checkpoint / "driver.json").write_text(json.dumps(state | {"model_path": "/no/such/model"}))
    with pytest.raises(UsageError, match="/no/such/model, .* is no model folder any more: give it with --model"):
        export(checkpoint, tmp_path / "out")
    assert main([str(checkpoint), str(tmp_path / "out"), "--model", str(policy_folder)]) == 0


def test_another_model_than_the_run_began_with_is_told_apart(run, tmp_path: Path, policy_folder: Path):
    for file in policy_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 8}))
    with pytest.raises(UsageError, match=r"does not fit .* give the model that the run began with"):
        export(find_checkpoint(run[0]), tmp_path / "out", model=tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("harm", ["cut", "gone", "no metadata"])
def test_a_damaged_checkpoint_is_one_sentence_and_leaves_nothing(run, tmp_path: Path, harm: str):
    checkpoint = tmp_path / "copy"
    checkpoint.mkdir()
    for file in find_checkpoint(run[0]).iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    (data,) = checkpoint.glob("*.distcp")
    if harm == "cut":
        data.write_bytes(data.read_bytes()[:1000])
    elif harm == "gone":
        data.unlink()
    else:
        (checkpoint / ".metadata").unlink()
    with pytest.raises(UsageError, match="can't be read as a checkpoint"):
        export(checkpoint, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_an_export_that_fails_leaves_nothing(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("l0fast.export.shutil.copyfile", full)
    with pytest.raises(UsageError, match=r"out can't be written \(No space left on device\)"):
        export(find_checkpoint(run[0]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_folder_without_room_for_the_weights_is_told_in_a_sentence(run, tmp_path: Path, monkeypatch):
    async def main() -> None:
        async with open_policy(str(run[0])):
            pass

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # the child has it, too
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(
            UsageError, match=r"model can't be written \(.*\): choose another place, TMPDIR says where$"
        ):
            asyncio.run(main())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []
