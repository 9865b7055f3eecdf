"""The learner's benchmark: its traces have the shape they are said to have, and a plan says what fits and what does not."""

import json

import numpy as np
import pytest
from transformers import Qwen2Config

from bench import learner as bench
from bench.traces import GROUP_SIZES, OUTPUT_TOKENS, runs
from l0fast.config import LearnerConfig, RunConfig
from l0fast.segments import segments_of

CONFIG = RunConfig(learner=LearnerConfig(kl_coef=0.0))


@pytest.fixture(scope="module")
def mix():
    return list(runs(256, seed=0, groups_per_run=2))


def test_traces_have_the_lengths_that_are_said(mix):
    trajectories = [t for groups in mix for group in groups for t in group.trajectories]
    assert {len(group.trajectories) for groups in mix for group in groups} == set(GROUP_SIZES)
    assert {len(t.turns) for t in trajectories} == set(range(3, 9))
    responses = [len(turn.response_ids) for t in trajectories for turn in t.turns]
    assert np.median(responses) == pytest.approx(300, rel=0.1)
    outputs = [
        [
            len(after.prompt_ids) - len(before.prompt_ids) - len(before.response_ids)
            for group in groups
            for t in group.trajectories
            for before, after in zip(t.turns, t.turns[1:], strict=False)
            if after.prompt_ids[: len(before.prompt_ids)] == before.prompt_ids
        ]
        for groups in mix
    ]
    medians = [np.median(of_a_run) for of_a_run in outputs]
    assert medians == pytest.approx(np.repeat(OUTPUT_TOKENS, len(GROUP_SIZES)), rel=0.25)
    for groups in mix:
        first, second = (group.trajectories[0].turns[0].prompt_ids for group in groups)
        common = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
        # two questions may begin alike by chance
        assert 1500 <= common <= 2505, "the system prompt is the run's"
    trimmed = sum(len(segments_of(t)) > 1 for t in trajectories) / len(trajectories)
    assert 0.03 < trimmed < 0.25


def test_the_same_seed_gives_the_same_traces(mix):
    assert list(runs(256, seed=0, groups_per_run=2)) == mix
    assert list(runs(256, seed=1, groups_per_run=2)) != mix


def test_layouts_hold_the_same_sampled_tokens_in_fewer_and_fewer(mix):
    packs = {layout: bench.packs_of(mix[0], layout, CONFIG) for layout in bench.LAYOUTS}
    sampled = {layout: sum(len(pack.predictors) for pack in ps) for layout, ps in packs.items()}
    assert len(set(sampled.values())) == 1
    tokens = {layout: sum(pack.num_tokens for pack in ps) for layout, ps in packs.items()}
    assert tokens["per_turn"] > 3 * tokens["merged"] > 3 * 1.2 * tokens["packed"]
    turns = [turn for group in mix[0] for t in group.trajectories for turn in t.turns]
    assert tokens["per_turn"] == sum(len(turn.prompt_ids) + len(turn.response_ids) for turn in turns)


def test_the_difference_of_gradients_is_the_worst_of_all_parameters():
    a = {"small": np.array([1e-3, 0.0]), "large": np.array([3.0, 4.0])}
    b = {"small": np.array([1e-3, 1e-4]), "large": np.array([3.0, 4.5])}
    assert bench.difference(a, b) == (0.5, pytest.approx(0.1))


@pytest.fixture
def plan(monkeypatch, capsys):
    def run(*argv: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["bench.learner", "--plan", *argv])
        code = bench.main()
        return code, capsys.readouterr().out

    return run


def test_a_plan_that_fits_prints_its_table(plan):
    code, text = plan("geography", "--model", "Qwen/Qwen3-4B", "--gpus", "8", "--gpu-memory-gb", "80")
    assert code == 0
    assert "4,022,468,096 parameters; memory of one of 8 GPUs" in text
    for part in ("master weights", "AdamW moments", "activations", "policy head", "engine KV", "forward and backward"):
        assert part in text
    assert "does not fit" not in text


def test_a_plan_that_does_not_fit_names_the_setting_that_makes_it_fit(plan):
    tight = [
        "geography",
        "--model",
        "Qwen2.5-7B",
        "--gpus",
        "8",
        "--gpu-memory-gb",
        "80",
        "--learner.pack-tokens=32768",
    ]
    code, text = plan(*tight, "--learner.activation-checkpointing", "off")
    assert code == 1
    assert text.splitlines()[-1].endswith("set --learner.activation-checkpointing on")
    code, text = plan(*tight, "--learner.activation-checkpointing", "on")
    assert code == 0, text


def test_a_plan_counts_all_the_main_memory_that_a_dry_run_counts(plan):
    _, text = plan("l0_qwen2.5_32b", "--gpus", "8", "--gpu-memory-gb", "80")
    [_, of_the_node] = text.split("main memory of the node")
    rows = dict(line.rsplit(maxsplit=1) for line in of_the_node.splitlines()[1:5])
    assert rows == {"offloaded": "794.1", "weights on their way": "244.1", "checkpoint": "366.2", "together": "1404.4"}


def test_a_plan_of_a_model_folder(plan, tmp_path):
    Qwen2Config(
        vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    ).save_pretrained(tmp_path)
    assert plan("geography", "--model", str(tmp_path))[0] == 0
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    code, text = plan("geography", "--model", str(tmp_path))
    assert code == 2
    assert "is none of llama, qwen2 and qwen3" in text


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["geography", "--model", "gpt-9"], "'gpt-9' is no model folder"),
        (["nowhere.toml"], "nowhere.toml"),
        (["l0_qwen3_4b", "--tokens", "10", "--sampled", "20"], "20 sampled tokens are more than the 10 of an episode"),
        (["geography", "--learner.pack-tokns", "1"], "did you mean --learner.pack-tokens?"),
    ],
)
def test_a_plan_of_nothing_is_refused(plan, argv, words):
    code, text = plan(*argv)
    assert code == 2
    assert words in text
    assert len(text.splitlines()) == 1
