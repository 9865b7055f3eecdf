"""Every recipe that ships, looked at on a machine that has none of what it wants; and faults, each named."""

import json

import pytest

from l0fast.cli import parse, shipped_recipes
from l0fast.config import RunConfig
from l0fast.dry_run import dry_run
from l0fast.errors import UsageError
from l0fast.rooms import check, hardly_meant
from l0fast.run import main

BIG = [name for name in shipped_recipes() if name.startswith("l0")]


@pytest.fixture(autouse=True)
def nothing_is_there(monkeypatch):
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    monkeypatch.setattr("l0fast.dry_run.num_gpus", lambda: 0)
    # whoever asks the hub would hang here, or fail
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("recipe", BIG)
def test_a_recipe_is_planned_for_its_gpus_and_what_is_absent_is_named(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    result = dry_run(parse([recipe, "--dry-run", "--run-dir", str(tmp_path / "run")]))
    text = result.text()
    assert "learner     " in text
    assert "keys and values of" in text
    assert "of the Hugging Face hub, not asked now" in text
    assert "[system]\n  | You answer questions" in text.replace("  | [", "[")
    assert "web_search(query: str)" in text
    absent = "\n".join(result.absent)
    for what in ("SERPER_API_KEY", "a model as judge", "sglang", "downloads it from the Hugging Face hub", "GPUs"):
        assert what in absent
    assert not (tmp_path / "run").exists()


def test_a_machine_that_has_gpus_is_planned_for_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr("l0fast.dry_run.num_gpus", lambda: 2)
    for gb, said in ((96, "2 of 96 GB: 2 engines"), (12, "11.2")):
        monkeypatch.setattr("l0fast.dry_run.gpu_memories", lambda gb=gb: [gb * 1e9] * 2)
        try:
            text = dry_run(parse(["l0_qwen3_0.6b", "--dry-run"])).text()
        except UsageError as e:
            text = str(e)
        assert said in text


def test_a_run_without_checkpoints_needs_main_memory_for_the_model_that_it_leaves(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    lines = dry_run(parse(["l0_qwen3_0.6b", "--dry-run", "--checkpoint.every", "0"])).lines
    assert "  main memory 2 GB of the node: weights on their way 2" in lines


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("mine.csv", "none of the formats read here"),
        ("mine", "neither a file nor a data set"),
        ("bamboogle", "no 'train'"),
    ],
)
def test_questions_that_a_run_would_refuse_are_refused(tmp_path, monkeypatch, name, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").write_text("question,answer\nq,x\n")
    with pytest.raises(UsageError, match=complaint):
        dry_run(parse(["--task.kind", "questions", "--task.train", name, "--task.eval", "nq", "--dry-run"]))


def test_seven_recipes_for_gpus_ship():
    assert len(BIG) == 7


def test_the_default_run_lacks_nothing_and_its_first_prompt_is_shown_as_the_model_sees_it(capsys):
    assert main(["--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "<|im_start|>system\n  | Answer by Python." in said
    assert said.rstrip().endswith("nothing that this run needs is absent here")


def test_questions_on_disk_are_read_and_the_first_one_is_shown(tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "Who wrote it?", "answer": "A"}) + "\n{}\n")
    flags = [
        "--task.kind",
        "questions",
        "--task.train",
        str(tmp_path / "q.jsonl"),
        "--task.eval",
        str(tmp_path / "q.jsonl"),
    ]
    text = dry_run(parse(["geography", "--dry-run", *flags])).text()
    assert "q: 1 questions, 1 of 2 rows left out (line 2: no question" in text
    assert "| Who wrote it?" in text


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--learner.pack-tokens", "none"], "--learner.pack-tokens none"),
        (["--rollout.mode", "sometimes"], "--rollout.mode sometimes"),
        (["--task.train", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
        (["--task.train", "bamboogle"], "has no 'train' questions"),
        (["--task.train", "nq?wait=3"], "has wait = '3'"),
        (["--tools.use", "web_serch"], "no tool is called 'web_serch'"),
        (["--tools.use", "corpus=nowhere"], "there is no such file or folder"),
        (["--model.path", "somebody/unknown"], "its shape is none of those known"),
        (["--engine.memory-share", "0.01"], "set --engine.memory-share"),
        (["--plan.gpu-memory-gb", "16"], "of 14.9 GiB"),
        (["--engine.tensor-parallel", "16"], "engine.tensor_parallel"),
        (["--agent.max-new-tokens", "40000"], "leaves no room for a prompt"),
        (["--rollout.max-open-groups", "3"], "rollout.max_open_groups = 3"),
        (["--reward.correct", "-1"], "--reward.correct -1"),
        (["--learner.algorithm", "magic"], "--learner.algorithm magic"),
        (["--learner.stream", "on"], "looks at the whole batch"),
        (["--engine.kind", "simulated"], "plays demonstrations"),
    ],
)
def test_a_fault_in_each_kind_of_field_is_named(flags, complaint):
    with pytest.raises(UsageError) as caught:
        dry_run(parse(["l0_qwen3_4b", "--dry-run", *flags]))
    assert complaint in str(caught.value)


@pytest.mark.parametrize("flag", ["--task.train", "--task.eval", "--tools.use"])
def test_what_only_questions_of_your_own_have_is_refused_without_them(flag):
    with pytest.raises(UsageError, match="but task.kind = 'geography' has .* set --task.kind questions, or leave"):
        dry_run(parse(["--dry-run", flag, "mine.jsonl"]))


@pytest.mark.parametrize("split", ["train", "eval"])
def test_questions_of_your_own_want_sources_of_both_kinds(split, tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "Who wrote it?", "answer": "A"}) + "\n")
    with pytest.raises(UsageError, match=f"task.{split} is empty: name a source, for example --task.{split}"):
        dry_run(
            parse(
                [
                    "questions",
                    "--dry-run",
                    f"--task.{'eval' if split == 'train' else 'train'}",
                    str(tmp_path / "q.jsonl"),
                ]
            )
        )


def test_defaults_of_the_small_policies_for_a_general_model_are_said_to_be_hardly_meant(tmp_path, capsys):
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "Who wrote it?", "answer": "A"}) + "\n")
    sources = ["--task.train", str(tmp_path / "q.jsonl"), "--task.eval", str(tmp_path / "q.jsonl")]
    flags = ["--dry-run", "--model.path", "Qwen/Qwen3-0.6B", "--task.kind", "questions", *sources]
    assert main([*flags, "--agent.prompt", "full", "--agent.max-new-tokens", "500"]) == 0
    assert "hardly meant: agent.context_tokens = 640, learner.lr = 0.0007: " in capsys.readouterr().out
    assert main(["questions", *flags]) == 0
    assert "hardly meant" not in capsys.readouterr().out


@pytest.mark.parametrize(("megabytes", "doubted"), [(99, False), (101, True)])
def test_how_large_a_model_is_its_weights_say(megabytes, doubted, tmp_path):
    for name in ("a.safetensors", "b.safetensors"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(megabytes * 500_000)
    assert (hardly_meant(RunConfig(), tmp_path) is not None) == doubted


@pytest.fixture
def own_questions(tmp_path):
    """Flags of a run whose training questions are judged by a model, each as its row says."""
    for name, row in (
        ("train", {"question": "a?", "answer": "A", "check": "judge"}),
        ("eval", {"question": "b?", "answer": "B"}),
    ):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    sources = [flag for name in ("train", "eval") for flag in (f"--task.{name}", str(tmp_path / f"{name}.jsonl"))]
    return ["--task.kind", "questions", *sources]


@pytest.mark.parametrize("kind", ["geography", "questions"])
def test_packages_that_are_not_installed_are_absent_and_a_reward_that_is_nowhere_is_wrong(
    own_questions, monkeypatch, kind: str
):
    monkeypatch.setattr("l0fast.rooms.find_spec", lambda name: None)
    monkeypatch.setattr("l0fast.sinks.importlib.util.find_spec", lambda name: None)
    flags = ["--judge.endpoint", "http://x/v1", "--judge.model", "x", *(own_questions if kind == "questions" else ())]
    lacks = [*flags, "--metrics.sinks", "wandb", "--reward.math", "0.5"]
    absent = "\n".join(dry_run(parse(["--dry-run", *lacks])).absent)
    assert "pip install 'l0fast[wandb]'" in absent
    assert "pip install 'l0fast[math]'" in absent
    with pytest.raises(UsageError, match=r"not installed: pip install 'l0fast\[wandb\]', or leave that out"):
        check(parse(lacks).config)
    for look in (dry_run, lambda invocation: check(invocation.config)):
        with pytest.raises(UsageError, match="reward.custom has 'nowhere:polite', but No module named 'nowhere'"):
            look(parse(["--dry-run", *flags, "--reward.custom", "nowhere:polite"]))


def test_a_judge_that_training_needs_is_wanted_before_anything_starts(own_questions):
    for flags, what in (
        (own_questions, "some of task.train is judged"),
        (["--reward.judge", "0.5"], "reward.judge asks"),
    ):
        with pytest.raises(UsageError, match=f"{what} .*but judge.endpoint is empty"):
            check(parse(flags).config)


def test_a_judge_that_a_row_asks_for_is_named_as_absent(own_questions):
    assert any("a model as judge" in what for what in dry_run(parse(["--dry-run", *own_questions])).absent)


def test_services_that_a_run_would_refuse_for_want_of_a_key_or_a_name_are_absent_each_in_a_sentence(own_questions):
    tools = ["--tools.use", "web_search", "--tools.use", "visual_qa"]
    absent = dry_run(parse(["--dry-run", *own_questions, *tools, "--judge.endpoint", "http://127.0.0.1:9"])).absent
    for what in ("has no SERPER_API_KEY", "--web.vision-endpoint and --web.vision-model", "has no model"):
        assert sum(what in line for line in absent) == 1
