"""What-if: a recorded world is recognised, and what other settings do to it is told."""

import asyncio
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bench import simulate as bench_simulate
from l0fast.config import RunConfig
from l0fast.engine.base import Sampling
from l0fast.engine.simulated import SimulatedClock, SimulatedEngine, Speed
from l0fast.errors import UsageError
from l0fast.ids import Ids
from l0fast.rollout import whatif
from l0fast.rollout.recorded import Timing, fit_timing, read_recording
from l0fast.rollout.whatif import (
    AdviceError,
    Simulated,
    advise,
    advise_in_subprocess,
    changed_config,
    parse_change,
    predict,
    simulate,
)
from l0fast.run_dir import RunDir, read_metrics, step_name
from l0fast.types import Task, Trajectory, TrajectoryStatus, Turn

SPEED = Speed(prefill_tokens_per_s=5000, step_s=0.02, step_request_s=0.002)
CONFIG = RunConfig.model_validate(
    {
        "rollout": {"group_size": 4, "groups_per_step": 4, "max_open_groups": 4, "max_turns": 6},
        "engine": {"kind": "sglang", "layout": "split", "slots": 16},
    }
)


async def record(
    clock: SimulatedClock,
    folder: Path,
    *,
    steps: int,
    tool_s: float,
    learn_s_per_token: float,
    dropped: int,
    alike_from: int = 10**9,
) -> None:
    """Play on-policy steps in a world of known speed, and write what a run would of them.

    From step `alike_from` on the episodes of a group say the same.
    """
    rng = random.Random(0)
    said: dict[str, tuple[int, ...]] = {}
    engine = SimulatedEngine(
        vocab_size=64, max_tokens=4000, slots=16, speed=SPEED, script=lambda p, s, name: said[name], clock=clock
    )

    async def episode(name: str, index: int) -> Trajectory:
        prompt, turns, begun_s = Ids(rng.choices(range(64), k=200)), [], clock.now_s
        for _ in range(rng.randint(1, 6)):
            said[name] = tuple(rng.choices(range(64), k=rng.randint(20, 200)))
            asked_s = clock.now_s
            sampled = await engine.generate(prompt, Sampling(max_new_tokens=500, stop_token_ids=()), conversation=name)
            answered_s = clock.now_s
            await clock.sleep(tool_s * rng.random())
            turns.append(
                Turn(
                    prompt_ids=prompt,
                    response_ids=sampled.response_ids,
                    sampler_logprobs=sampled.sampler_logprobs,
                    finish_reason="length",
                    policy_version=0,
                    text="",
                    output="",
                    well_formed=True,
                    start_s=asked_s - begun_s,
                    generate_s=answered_s - asked_s,
                    execute_s=clock.now_s - answered_s,
                )
            )
            prompt = prompt + sampled.response_ids + rng.choices(range(64), k=30)
        engine.forget(name)
        task = Task(id=name.partition("/")[0], question="?", answers=("a",))
        return Trajectory(
            task=task, index=index, status=TrajectoryStatus.COMPLETED, turns=tuple(turns), started_s=begun_s
        )

    config = changed_config(CONFIG, {"rollout.drop_rate": 0.5 if dropped else 0.0})
    with RunDir.create(folder, config) as run_dir:
        for step in range(1, steps + 1):
            begun_s = clock.now_s
            groups = CONFIG.rollout.groups_per_step + dropped
            played = await asyncio.gather(*(episode(f"{step}.{g}/{i}", i) for g in range(groups) for i in range(4)))
            learned = played[: len(played) - 4 * dropped]
            ends = [len(t.turns[-1].prompt_ids) + len(t.turns[-1].response_ids) for t in learned]
            if step >= alike_from:
                learned = [replace(learned[i - i % 4], index=i % 4) for i in range(len(learned))]
                # one of them, and of each other one the last token
                ends = [ends[i] if i % 4 == 0 else 1 for i in range(len(learned))]
            learn_s = learn_s_per_token * sum(ends)
            await clock.sleep(learn_s)
            await engine.update_weights(step)
            lost = replace(learned[0], status=TrajectoryStatus.FAILED_SANDBOX, cause="gone", turns=learned[0].turns[:1])
            await run_dir.trajectories(step_name(step), [*learned[:4], lost, *learned[4:]])
            run_dir.metrics(
                {
                    "step": step,
                    "time/step_s": (clock.now_s - begun_s) / 0.8,
                    "share/evaluate": 0.2,
                    "share/sync": 0.0,
                    "learner/step_s": learn_s,
                    "rollout/dropped_groups": dropped,
                    "rollout/episodes": len(learned) + 1,
                    "rollout/turns_mean": sum(len(t.turns) for t in learned) / len(learned),
                }
            )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of runs: one that its engine holds up, one that waits for tools, one that drops groups, one whose policy grows surer."""
    kinds = {
        "engine": {"tool_s": 0.1, "learn_s_per_token": 1e-6, "dropped": 0},
        "tools": {"tool_s": 60.0, "learn_s_per_token": 1e-3, "dropped": 0},
        "drops": {"tool_s": 1.0, "learn_s_per_token": 1e-5, "dropped": 4},
        "surer": {"tool_s": 0.1, "learn_s_per_token": 1e-2, "dropped": 0, "alike_from": 3},
    }
    folders = {}
    for name, kind in kinds.items():
        folders[name] = tmp_path_factory.mktemp("runs") / name
        clock = SimulatedClock()
        clock.run(record(clock, folders[name], steps=4, **kind))
    return folders


def test_steps_whose_trajectories_were_deleted_are_left_out(runs, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(runs["engine"], run)
    for step in (1, 2):
        (run / "trajectories" / f"{step_name(step)}.jsonl").unlink()
    assert read_recording(run).steps == read_recording(runs["engine"], last_steps=2).steps
    assert len(read_recording(run, last_steps=3).steps) == 2
    shutil.rmtree(run / "trajectories")
    with pytest.raises(UsageError, match="no step that could be replayed"):
        read_recording(run)


def test_the_speed_of_the_engine_is_found_in_the_recording(runs):
    recording = read_recording(runs["engine"])
    timing = fit_timing(recording, recording.steps)
    assert timing.speed.step_s == pytest.approx(SPEED.step_s, rel=0.1)
    assert timing.speed.step_request_s == pytest.approx(SPEED.step_request_s, rel=0.1)
    assert timing.speed.prefill_tokens_per_s == pytest.approx(SPEED.prefill_tokens_per_s, rel=0.3)
    assert timing.learn_s_per_token == pytest.approx(1e-6)
    assert [len(step.groups) for step in recording.steps] == [4] * 4
    assert [len(group.failures) for group in recording.steps[0].groups] == [1, 0, 0, 0]


def test_a_policy_that_says_the_same_more_often_gives_its_learner_less_to_do(runs):
    recording = read_recording(runs["surer"])
    first, last = recording.steps[0], recording.steps[-1]
    assert last.learn_s < 0.4 * first.learn_s
    assert last.learn_s / last.laid_out == pytest.approx(first.learn_s / first.laid_out, rel=0.01)
    assert abs(predict(runs["surer"]).error) < 0.05


@pytest.mark.parametrize("name", ["engine", "tools"])
def test_the_run_as_it_was_is_predicted(runs, name):
    prediction = predict(runs[name])
    assert abs(prediction.error) < 0.1
    assert prediction.as_it_was.step_s == pytest.approx(prediction.measured_step_s, rel=0.1)
    assert prediction.changed == prediction.as_it_was
    assert sum(prediction.as_it_was.shares.values()) == pytest.approx(1, abs=0.01)


def with_settings(run_dir: Path, timing: Timing, changes: dict, **more) -> Simulated:
    recording = read_recording(run_dir)
    return simulate(recording, changed_config(recording.config, changes), timing, steps=4, **more)


TIMING = Timing(SPEED, latency_s=0.0, learn_s_per_token=1e-5, sync_s=0.0)


def test_more_engines_help_where_the_engine_is_the_bound_and_fewer_slots_hurt(runs):
    was = with_settings(runs["engine"], TIMING, {})
    assert with_settings(runs["engine"], TIMING, {"engine.count": 2}).step_s < 0.8 * was.step_s
    assert with_settings(runs["engine"], TIMING, {"engine.slots": 4}).step_s > 1.2 * was.step_s
    waits = with_settings(runs["tools"], TIMING, {})
    assert with_settings(runs["tools"], TIMING, {"engine.count": 2}).step_s > 0.85 * waits.step_s
    assert waits.engine_busy < was.engine_busy


def test_a_cache_too_small_makes_it_compute_again_and_admission_prevents_some_of_it(runs):
    def recomputed(admission: str, kv_tokens: int | None) -> float:
        settings = {"rollout.admission": admission}
        return with_settings(runs["engine"], TIMING, settings, kv_tokens=kv_tokens).shares["recompute"]

    assert recomputed("fixed", None) == 0
    assert recomputed("kv", 4000) < 0.7 * recomputed("fixed", 4000)


def test_an_engine_that_shares_its_machine_stands_still_while_the_learner_works(runs):
    slow = replace(TIMING, learn_s_per_token=1e-3)
    apart = with_settings(runs["engine"], slow, {"rollout.mode": "carry_over"})
    together = with_settings(runs["engine"], slow, {"rollout.mode": "carry_over", "engine.layout": "resident"})
    assert apart.step_s < 0.9 * together.step_s
    assert together.step_s > (together.learner_busy + together.engine_busy) * together.step_s * 0.99


def test_groups_that_were_dropped_cost_time_until_dropping_is_switched_off(runs):
    # half of the groups played were dropped
    was = with_settings(runs["drops"], TIMING, {})
    assert with_settings(runs["drops"], TIMING, {"rollout.drop_rate": 0.0}).step_s < 0.8 * was.step_s


def test_advice_names_the_wait_the_setting_and_the_gain(runs):
    advice = asyncio.run(advise_in_subprocess(runs["tools"]))
    assert advice is not None
    assert "waiting for" in advice
    assert "change rollout.mode from on_policy to carry_over, predicted -" in advice
    with pytest.raises(AdviceError, match=r"exit code 2.*is that the folder of a run|can't be read"):
        asyncio.run(advise_in_subprocess(runs["tools"] / "trajectories"))


def test_no_advice_where_nothing_helps(runs, monkeypatch):
    monkeypatch.setattr("l0fast.rollout.whatif._candidates", lambda config: [{"engine.slots": 48}])
    assert advise(runs["tools"]) is None


@pytest.mark.parametrize(("steps_of_turns", "steps"), [(4, 4), (2.5, 2), (1.5, None)])
def test_advice_is_made_of_no_more_steps_than_can_be_simulated_in_time(runs, monkeypatch, steps_of_turns, steps):
    read = []

    def reading(run_dir: Path, *, last_steps: int):
        read.append(last_steps)
        raise UsageError("it was asked for so many")

    # about as many in each of the four
    turns = max(row["rollout/episodes"] * row["rollout/turns_mean"] for row in read_metrics(runs["tools"]))
    monkeypatch.setattr(whatif, "LAST_TURNS", steps_of_turns * turns)
    monkeypatch.setattr(whatif, "read_recording", reading)
    if steps is None:
        assert advise(runs["tools"]) is None
        assert read == []
    else:
        with pytest.raises(UsageError, match="so many"):
            advise(runs["tools"])
        assert read == [steps]


def test_advice_leaves_out_what_the_other_settings_forbid(runs, tmp_path, monkeypatch):
    run_dir = shutil.copytree(runs["tools"], tmp_path / "run")
    text = (run_dir / "config.toml").read_text()
    assert "tis_cap = 2.0\n" in text
    # forbids every mode but on_policy
    (run_dir / "config.toml").write_text(text.replace("tis_cap = 2.0\n", "tis_cap = 0.0\n"))
    candidates = [{"rollout.mode": "carry_over"}, {"engine.slots": 32}]
    monkeypatch.setattr("l0fast.rollout.whatif._candidates", lambda config: candidates)
    monkeypatch.setattr("l0fast.rollout.whatif.ADVISES_FROM", -1.0)
    monkeypatch.setattr("l0fast.rollout.whatif._calibrate", lambda recording: (TIMING, 0.0))
    advice = advise(run_dir)
    assert advice is not None
    assert "raise engine.slots from 16 to 32" in advice
    candidates.pop()
    assert advise(run_dir) is None


def test_what_is_no_setting_is_refused():
    assert parse_change("rollout.max_open_groups=48") == ("rollout.max_open_groups", 48)
    assert parse_change("rollout.mode=carry_over") == ("rollout.mode", "carry_over")
    with pytest.raises(UsageError, match="changes nothing: write it as"):
        parse_change("rollout.mode")
    with pytest.raises(UsageError, match=r"rollout\.max_opn is not a setting"):
        changed_config(CONFIG, {"rollout.max_opn": 3})
    for path in ("seed.x", "seed.x.y", "nothing.x", "rollout.max_open_groups.x"):
        with pytest.raises(UsageError, match=rf"{path} is not a setting"):
            changed_config(CONFIG, {path: 3})
    with pytest.raises(UsageError, match=r"rollout\.group_size = -1"):
        changed_config(CONFIG, {"rollout.group_size": -1})


def test_another_mode_opens_as_many_groups_as_it_would_by_itself():
    assert changed_config(CONFIG, {"rollout.mode": "carry_over"}).rollout.max_open_groups == 8
    settings = {"rollout.mode": "carry_over", "rollout.max_open_groups": 7}
    assert changed_config(CONFIG, settings).rollout.max_open_groups == 7


def test_one_step_is_too_few(runs):
    with pytest.raises(UsageError, match="1 step was recorded, and two are needed.*: let the run take more$"):
        predict(runs["engine"], last_steps=1)


@pytest.mark.parametrize("look", [predict, advise])
def test_a_run_that_keeps_one_steps_trajectories_is_told_to_keep_more(runs, tmp_path: Path, look):
    run_dir = shutil.copytree(runs["engine"], tmp_path / "run")
    text = (run_dir / "config.toml").read_text()
    (run_dir / "config.toml").write_text(text.replace("keep_trajectories = 0\n", "keep_trajectories = 1\n"))
    for step in (1, 2, 3):
        (run_dir / "trajectories" / f"{step_name(step)}.jsonl").unlink()
    with pytest.raises(
        UsageError, match="let the run keep the trajectories of 2 or more: rollout.keep_trajectories = 1"
    ):
        look(run_dir)


@pytest.mark.parametrize("last_steps", [0, -1])
def test_no_steps_are_not_all_of_them(runs, last_steps: int):
    with pytest.raises(UsageError, match=f"the last {last_steps} steps are none: give a number above 0"):
        predict(runs["engine"], last_steps=last_steps)


def test_the_command_says_what_it_wants(capsys):
    with pytest.raises(SystemExit):
        whatif.main([])
    assert "RUN_DIR" in capsys.readouterr().err


def test_bench_simulate_prints_a_table_and_json(runs, capsys):
    assert bench_simulate.main([str(runs["engine"]), "--set", "engine.count=2", "--last-steps", "2"]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result["changes"] == {"engine.count": 2}
    assert result["changed"]["step_s"] < result["as_it_was"]["step_s"]
    assert "engine.count = 2: -" in out
    assert bench_simulate.main([str(runs["engine"]), "--set", "nothing"]) == 2


@pytest.mark.parametrize("kv_tokens", ["-1", "0", "20"])
def test_memory_that_holds_no_turn_of_the_run_is_refused_in_a_sentence(runs, capsys, kv_tokens):
    assert bench_simulate.main([str(runs["engine"]), "--kv-tokens", kv_tokens]) == 2
    assert f"--kv-tokens {kv_tokens} has no room for the longest turn" in capsys.readouterr().err
