"""GPUs and memory are dealt out, or refused with the setting to change, before anything starts."""

import asyncio
import json
from pathlib import Path

import pytest

from l0fast.cli import parse, shipped_recipes
from l0fast.config import RunConfig
from l0fast.errors import UsageError
from l0fast.layout import (
    Layout,
    check_layout,
    engine_kind,
    gpu_memories,
    memory_complaint,
    sglang_layout,
    wait_for_memory,
)
from l0fast.learner import cost
from l0fast.learner.cost import GIB, SHAPES

MODEL = Path(__file__).parents[1] / "l0fast/models/geography"


def config(**sections) -> RunConfig:
    sections = {"engine": {"kind": "sglang"}, **sections}
    return RunConfig.model_validate(sections)


def engine(**settings) -> RunConfig:
    return config(engine={"kind": "sglang", **settings})


def test_one_engine_on_a_cpu_gets_its_weights_over_main_memory():
    assert sglang_layout(engine(), 0) == Layout(engines=1, first_gpu=0, ranks=1, weights="host")
    assert sglang_layout(engine(count=3, weights="disk"), 0).weights == "disk"


def test_resident_engines_read_weights_where_the_ranks_lay_them():
    assert sglang_layout(engine(), 8) == Layout(engines=8, first_gpu=0, ranks=8, weights="ipc")
    assert sglang_layout(engine(tensor_parallel=4), 8) == Layout(engines=2, first_gpu=0, ranks=8, weights="ipc")


def test_split_engines_take_the_gpus_the_learner_leaves():
    layout = sglang_layout(config(engine={"layout": "split", "tensor_parallel": 2}, learner={"ranks": 2}), 8)
    assert layout == Layout(engines=3, first_gpu=2, ranks=2, weights="host")


def test_apart_they_are_sent_by_process_groups_where_that_is_asked_for():
    assert sglang_layout(engine(weights="group"), 0).weights == "group"
    split = config(engine={"layout": "split", "weights": "group"}, learner={"ranks": 2})
    assert sglang_layout(split, 8) == Layout(engines=6, first_gpu=2, ranks=2, weights="group")


def test_ranks_on_fewer_gpus_than_engines_publish_over_main_memory():
    assert sglang_layout(config(learner={"ranks": 2}), 8) == Layout(engines=8, first_gpu=0, ranks=2, weights="host")


@pytest.mark.parametrize(
    ("sections", "gpus", "way_out"),
    [
        ({"engine": {"weights": "group"}}, 8, "take --engine.layout split"),
        ({"engine": {"weights": "group"}, "learner": {"ranks": 2}}, 8, "take --engine.layout split"),
        ({"engine": {"weights": "ipc"}}, 0, "leave it out"),
        ({"engine": {"layout": "split"}}, 0, "leave it out"),
        ({"engine": {"layout": "split"}}, 8, "--learner.ranks to 1 or more and less than 8"),
        ({"engine": {"layout": "split"}, "learner": {"ranks": 8}}, 8, "--learner.ranks"),
        ({"engine": {"layout": "split"}, "learner": {"ranks": 1}}, 1, "--engine.layout resident"),
        ({"engine": {"layout": "split", "weights": "ipc"}, "learner": {"ranks": 2}}, 8, "--engine.weights host"),
        ({"engine": {"count": 9}}, 8, "leave --engine.count out"),
        ({"engine": {"tensor_parallel": 16}}, 8, "--engine.tensor-parallel to 8 or less"),
        ({"engine": {"layout": "sleep", "weights": "host"}}, 8, "leave --engine.weights out"),
        ({"engine": {"layout": "sleep"}, "learner": {"stream": "on", "advantage": "group"}}, 8, "--learner.stream off"),
        (
            {"engine": {"layout": "sleep"}, "rollout": {"mode": "carry_over", "max_open_groups": 64}},
            8,
            "--rollout.mode on_policy",
        ),
    ],
)
def test_what_contradicts_itself_is_refused_with_the_way_out(sections, gpus, way_out):
    with pytest.raises(UsageError, match=way_out):
        sglang_layout(config(**sections), gpus)


def test_auto_is_sglang_only_where_it_is_installed_beside_gpus(monkeypatch):
    installed: set[str] = set()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in installed else None)
    assert engine_kind(RunConfig(), gpus=8) == "transformers"
    installed.add("sglang")
    assert engine_kind(RunConfig(), gpus=8) == "sglang"
    assert engine_kind(RunConfig(), gpus=0) == "transformers"
    assert engine_kind(engine(), gpus=0) == "sglang"


def complaint(sections, *, gpus=8, memory=80e9, model="Qwen2.5-7B") -> str | None:
    run = config(**sections)
    return memory_complaint(run, SHAPES[model], sglang_layout(run, gpus), gpu_memory_bytes=memory)


LARGE = {"agent": {"context_tokens": 8192, "max_new_tokens": 2048}}


def test_a_small_model_fits_any_way():
    assert complaint(LARGE, model="Qwen3-0.6B") is None
    assert complaint(LARGE | {"engine": {"layout": "sleep"}}, model="Qwen3-0.6B") is None
    assert complaint(LARGE | {"engine": {"layout": "split"}, "learner": {"ranks": 4}}, model="Qwen3-0.6B") is None


def test_where_both_at_once_are_too_much_in_turn_may_do():
    resident = LARGE | {"engine": {"memory_share": 0.55}, "learner": {"pack_tokens": 16384, "kl_coef": 0.0}}
    said = complaint(resident)
    assert said is not None
    assert "--engine.layout sleep" in said
    assert complaint(resident | {"engine": {"memory_share": 0.55, "layout": "sleep"}}) is None


@pytest.mark.parametrize("layout", ["resident", "sleep", "split"])
def test_an_engine_that_can_not_hold_its_model_is_told_which_share_would_do(layout):
    sections = LARGE | {"engine": {"memory_share": 0.1, "layout": layout}, "learner": {"ranks": 4}}
    if layout == "sleep":
        sections |= {"learner": {}}
    said = complaint(sections)
    assert said is not None
    assert "--engine.memory-share 0.2" in said
    sections |= {"engine": {"memory_share": 0.1, "layout": layout, "tensor_parallel": 4}}
    assert "one context" not in str(complaint(sections))


def test_an_engine_on_several_gpus_holds_a_part_of_its_model_on_each():
    recipe = parse(["l0_qwen2.5_32b"]).config
    layout = sglang_layout(recipe, 8)
    fits = {
        memory: memory_complaint(recipe, SHAPES["Qwen2.5-32B"], layout, gpu_memory_bytes=memory)
        for memory in (80e9, 60e9)
    }
    assert fits[80e9] is None
    # a quarter of 61 GiB fits into the share, so the share is not what is complained of
    assert "GiB a GPU is more than" in str(fits[60e9])
    setup = cost.setup_of(recipe, cost.workload_of(recipe), gpus=8, gpu_memory_bytes=80e9)
    parts = cost.memory_of(SHAPES["Qwen2.5-32B"], setup).parts
    assert parts["engine weights"] == 2 * SHAPES["Qwen2.5-32B"].parameters / 4
    assert parts["engine weights"] + parts["engine KV"] == pytest.approx(0.4 * 80e9)


def test_where_the_copy_that_an_engine_reads_is_what_is_too_much_weights_may_come_by_host():
    sections = {"engine": {"memory_share": 0.45}, "rollout": {"mode": "carry_over"}, "learner": {"kl_coef": 0.0}}
    said = complaint(sections, model="Llama-3.1-8B")
    assert "set --engine.weights host, which saves 15.0 GiB, a copy of the weights, or lower" in str(said)
    by_host = sections | {"engine": sections["engine"] | {"weights": "host"}}
    assert complaint(by_host, model="Llama-3.1-8B") is None
    # and where that is not enough it is no way out
    assert "weights host" not in str(complaint(sections, model="Llama-3.1-8B", memory=40e9))


def test_a_share_that_leaves_a_sleeping_learner_no_room_is_told_how_much_would():
    sections = LARGE | {"engine": {"layout": "sleep", "memory_share": 0.9}, "learner": {"kl_coef": 0.0}}
    said = complaint(sections)
    assert said is not None
    assert "prompts beside it 1.0 and what the learner keeps between steps" in said
    share = float(said.split("--engine.memory-share ")[1])
    # of 80 GB the learner keeps 33.2, and prompts take 1.05
    assert share == 0.57
    assert complaint(sections | {"engine": {"layout": "sleep", "memory_share": share}}) is None
    assert complaint(sections | {"engine": {"layout": "sleep", "memory_share": share + 0.02}}) is not None


def test_a_share_that_the_learner_leaves_and_an_engine_can_not_use_is_no_way_out():
    asleep = {"layout": "sleep", "memory_share": 0.3, "tensor_parallel": 2}
    sections = {"engine": asleep, "agent": {"context_tokens": 1024, "max_new_tokens": 512}}
    # it and prompts leave 0.1726 of a GPU, and 0.1700 are needed: no hundredth is between them
    said = complaint(sections | {"learner": {"kl_coef": 0.001}}, memory=24.1e9, model="Qwen3-4B")
    assert str(said).endswith("set --learner.offload cpu, or take a smaller model")
    offloaded = {"learner": {"kl_coef": 0.001, "offload": "cpu"}}
    assert complaint(sections | offloaded, memory=24.1e9, model="Qwen3-4B") is None
    # what is set already is none either
    sections["engine"] = {"layout": "sleep", "memory_share": 0.9}
    said = complaint(sections | offloaded, memory=24e9)
    assert "between steps" in str(said)
    assert str(said).endswith(": take a smaller model")


def test_no_layout_helps_a_learner_that_is_too_large_alone():
    for layout in ({}, {"layout": "sleep"}, {"layout": "split"}):
        said = complaint(
            LARGE | {"engine": layout, "learner": {"ranks": 1 if "split" in layout.values() else 0}}, gpus=2
        )
        assert said is not None
        assert "GiB" in said


def test_the_check_reads_the_model_and_the_gpus(tmp_path):
    run = engine()
    assert check_layout(run, MODEL, gpus=2, memories=[80e9, 80e9]).engines == 2
    # the smallest counts
    with pytest.raises(UsageError, match="GiB"):
        check_layout(run, MODEL, gpus=2, memories=[80e9, 0.5 * GIB])
    # nothing is known of this one's costs: torch will say
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    assert check_layout(run, tmp_path, gpus=1, memories=[1.0]).engines == 1


def test_the_gpus_that_are_read_are_the_runs_own(tmp_path, monkeypatch):
    """And not the small one for a display, say, or those of others on the node."""
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho '0, GPU-a, 4096'; echo '1, GPU-b, 4096'; echo '2, GPU-c, 81559'; echo '3, GPU-d, 40960'\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 2")
    monkeypatch.setattr("l0fast.layout.num_gpus", lambda: 2)
    assert gpu_memories() == [40960 * 2**20, 81559 * 2**20]


@pytest.fixture
def others(tmp_path, monkeypatch):
    """Two GPUs of 80 GiB, of which others hold so much when they are looked at the first, the second, ... and the last time [MiB]."""

    def hold(*looks: tuple[int, int]) -> None:
        cases = "".join(
            f"{n}) echo '2, GPU-c, 81920, {b}'; echo '3, GPU-d, 81920, {a}';; " for n, (a, b) in enumerate(looks, 1)
        )
        count = f"n=$(( $(cat {tmp_path}/looks 2>/dev/null || echo 0) + 1 )); [ $n -gt {len(looks)} ] && n={len(looks)}"
        (tmp_path / "nvidia-smi").write_text(
            f"#!/bin/sh\n{count}; echo $n > {tmp_path}/looks; case $n in {cases}esac\n"
        )
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,2")
        monkeypatch.setattr("l0fast.layout.num_gpus", lambda: 2)
        monkeypatch.setattr("l0fast.layout._LOOK_S", 0.0)

    return hold


def waits(run: RunConfig, monkeypatch, patience_s: float) -> list[str]:
    """What is said meanwhile."""
    said: list[str] = []
    monkeypatch.setattr("l0fast.layout._PATIENCE_S", patience_s)
    asyncio.run(wait_for_memory(run, MODEL, sglang_layout(run, 2), said.append))
    return said


@pytest.mark.parametrize("held", [(0, 700), (20_000, 20_000)])
def test_others_may_have_what_is_left(others, monkeypatch, held):
    others(held)
    waits(engine(), monkeypatch, 0.0)


def test_what_an_idle_gpu_shows_as_used_is_held_by_nobody(others, monkeypatch):
    """By a run that wants nearly all of it."""
    others((700, 700))
    run = engine(memory_share=0.9625)
    waits(run, monkeypatch, 0.0)
    monkeypatch.setattr("l0fast.layout._HELD_BY_NOBODY", 0.0)
    with pytest.raises(UsageError, match="others hold 0.7"):
        waits(run, monkeypatch, 0.0)


@pytest.mark.parametrize("layout", ["resident", "sleep", "split"])
def test_a_gpu_that_others_hold_too_much_of_is_named_before_anything_starts(others, monkeypatch, layout):
    """SGLang would start with nine tenths of what is free, and the learner fail at its first step, in NCCL's words."""
    others((20_000, 60_000))
    run = config(engine={"kind": "sglang", "layout": layout}, learner={"ranks": 1 if layout == "split" else 0})
    with pytest.raises(
        UsageError, match=r"wants? 3\d\.\d GiB .* GPU 2's 80\.0 others hold 58\.6 .*CUDA_VISIBLE_DEVICES, or lower --"
    ):
        waits(run, monkeypatch, 0.0)


@pytest.mark.parametrize(
    ("engine_settings", "ranks", "held"),
    [
        ({"count": 1}, 1, (0, 81_000)),
        ({"count": 1}, 0, (0, 70_000)),
        ({"layout": "sleep", "count": 1}, 0, (0, 70_000)),
        ({"layout": "split"}, 1, (70_000, 0)),
    ],
)
def test_others_may_have_a_gpu_of_which_less_or_nothing_is_wanted(others, monkeypatch, engine_settings, ranks, held):
    others(held)
    run = config(engine={"kind": "sglang", **engine_settings}, learner={"ranks": ranks})
    waits(run, monkeypatch, 0.0)


@pytest.mark.parametrize(
    ("engine_settings", "ranks", "held", "said"),
    [
        ({"layout": "split"}, 1, (80_000, 0), "^the learner wants 2.6 GiB .* GPU 3's .* lower --learner.pack-tokens$"),
        ({"layout": "split"}, 1, (0, 60_000), "^the engine wants 32.0 GiB .* GPU 2's .* lower --engine.memory-share$"),
        ({}, 1, (0, 60_000), "^the engine wants 32.0 GiB .* GPU 2's"),
        ({"count": 1}, 0, (60_000, 0), "^engine and learner want 34.6 GiB .* GPU 3's"),
    ],
)
def test_who_wants_a_gpu_that_others_hold_is_named(others, monkeypatch, engine_settings, ranks, held, said):
    others(held)
    run = config(engine={"kind": "sglang", **engine_settings}, learner={"ranks": ranks})
    with pytest.raises(UsageError, match=said):
        waits(run, monkeypatch, 0.0)


def test_beside_a_display_a_run_fits_with_the_setting_that_is_named(others, monkeypatch):
    """Nobody would end that one, nor has a desktop another GPU."""
    others((6_000, 6_000))
    with pytest.raises(UsageError, match="lower --engine.memory-share or --learner.pack-tokens$"):
        waits(engine(memory_share=0.9), monkeypatch, 0.0)
    waits(engine(memory_share=0.85), monkeypatch, 0.0)


def test_memory_of_a_gpu_that_the_kernel_manages_is_held_by_nobody(others, monkeypatch, tmp_path):
    """Grace Hopper's counts as used what processes left that have ended, and cached files."""
    others((60_000, 60_000))
    monkeypatch.setattr("l0fast.layout._DRIVER", tmp_path / "gpus")
    (tmp_path / "gpus/0009:01:00.0").mkdir(parents=True)
    with pytest.raises(UsageError, match="others hold"):
        waits(engine(), monkeypatch, 0.0)
    (tmp_path / "gpus/0009:01:00.0/numa_status").write_text("Node:      1\nStatus:    online\n")
    waits(engine(), monkeypatch, 0.0)


def test_a_run_that_was_just_killed_has_time_to_go_and_that_is_said_once(others, monkeypatch):
    others((60_000, 60_000), (0, 60_000), (0, 0))
    [said] = waits(engine(), monkeypatch, 60.0)
    assert said.startswith("waiting up to 60 s for other processes to leave: engine and learner want")


@pytest.mark.parametrize("recipe", [name for name in shipped_recipes() if name.startswith("l0_")])
def test_l0s_recipes_have_all_open_episodes_decoded_at_once(recipe):
    """`engine.slots` are shared by all engines; L0 counts those of one."""
    config = parse([recipe]).config
    assert config.engine.slots == config.rollout.max_open_groups * config.rollout.group_size
