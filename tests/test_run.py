"""The command as a user runs it: in a process of its own, with real engine, sandbox and learner on a tiny random policy."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from l0fast.run_dir import checkpoints, read_config, read_metrics, read_trajectories
from tests.command import ROOT, children_of, finish, start, wait_until_gone

SMALL = [
    "--engine.threads", "1", "--learner.threads", "1", "--rollout.max-turns", "2", "--agent.max-new-tokens", "8",
    "--eval.questions", "8", "--eval.curve-questions", "8", "--eval.transfer-questions", "4",
]  # fmt: skip
SUMMARY_KEYS = {
    "eval_accuracy_before",
    "eval_accuracy_after",
    "eval_questions",
    "eval_greedy_before",
    "eval_greedy_after",
    "wall_s",
    "first_episode_s",
    "peak_pss_mb",
    "steps",
    "episodes",
    "failed_episodes",
    "tokens_generated",
    "loop_lag_p99_ms",
    "seed",
    "version",
}


@dataclass(frozen=True)
class Runs:
    smoke: Path
    """The folder of a run that went to its end."""
    stopped: Path
    """That of one that got Ctrl-C after its second step."""
    said: str
    """What that one said from then on."""
    children: set[int]
    """Its processes when it got it."""


@pytest.fixture(scope="module")
def runs(policy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Two at once: each leaves half of a small machine idle."""
    folder = tmp_path_factory.mktemp("runs")
    model = ["--model.path", str(policy_folder), *SMALL]
    smoke = start("--smoke", "--run-dir", str(folder / "smoke"), *model)
    stopped = start(
        "--run-dir", str(folder / "stopped"), "--num-steps", "1000", "--rollout.groups-per-step", "1",
        "--rollout.max-open-groups", "1", *model,
    )  # fmt: skip
    assert stopped.stdout is not None
    for line in stopped.stdout:
        if "step 2/1000" in line:
            break
    children = children_of(stopped.pid)
    stopped.send_signal(signal.SIGINT)
    said = finish(stopped, 130)
    last = finish(smoke, 0).splitlines()[-1]
    assert "held-out accuracy" in last
    assert "l0fast.trajectory" in last
    return Runs(folder / "smoke", folder / "stopped", said, children)


@pytest.fixture(scope="module")
def smoke(runs: Runs) -> Path:
    return runs.smoke


@pytest.mark.slow
def test_smoke_leaves_a_complete_folder(smoke: Path):
    summary = json.loads((smoke / "summary.json").read_text())
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["steps"] == 2
    assert summary["failed_episodes"] == 0
    assert {plot.name for plot in (smoke / "plots").iterdir()} >= {"learning_curve.png", "step_time.png"}
    assert {file.name for file in (smoke / "model").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert read_config(smoke).num_steps == 2
    assert [row["step"] for row in read_metrics(smoke)] == [1, 2]
    assert not list(smoke.rglob("*.partial"))


@pytest.mark.slow
def test_what_was_trained_on_is_written_with_ids_and_rewards(smoke: Path):
    trajectories = read_trajectories(smoke / "trajectories" / "step_0001.jsonl")
    assert len(trajectories) == 4 * 8
    assert all(len(t.rewards) == len(t.turns) for t in trajectories)
    assert all(len(turn.response_ids) == len(turn.sampler_logprobs) for t in trajectories for turn in t.turns)


@pytest.mark.slow
def test_the_final_model_loads_as_the_one_it_started_from(smoke: Path, policy_folder: Path):
    import torch
    from transformers import AutoModelForCausalLM

    before, after = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (policy_folder, smoke / "model")
    )
    # a random policy earns nothing, so it has hardly moved
    for name, weights in before.named_parameters():
        torch.testing.assert_close(after.get_parameter(name), weights, atol=1e-2, rtol=0)


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_done_and_leaves_no_process(runs: Runs):
    assert len(runs.children) >= 2  # engine, learner; the sandbox too, where it is not docker's
    assert "interrupted after" in runs.said
    assert f"-m l0fast.run --resume {runs.stopped}\n" in runs.said
    summary = json.loads((runs.stopped / "summary.json").read_text())
    assert summary["steps"] >= 2
    assert len(read_metrics(runs.stopped)) == summary["steps"]  # it never stops inside a step
    assert checkpoints(runs.stopped)[-1].name == f"step_{summary['steps']:06d}"
    assert (runs.stopped / "model" / "model.safetensors").exists()
    assert not wait_until_gone(runs.children)


@pytest.mark.parametrize(("args", "sentence"), [
    (["--model.path", "/no/such/folder"], "neither a folder nor a policy that ships"),
    (["--eval.questions", "1000000"], "held-out questions"),
    (["--nmu-steps", "3"], "--num-steps"),
    (["--resume", "runs/x"], "has no place beside it"),
])  # fmt: skip
def test_bad_input_is_one_sentence_and_nothing_is_written(args: list[str], sentence: str, tmp_path: Path):
    out = finish(start("--run-dir", str(tmp_path / "run"), *args), 2)
    assert sentence in out
    assert len(out.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_dry_run_prints_the_plan_and_writes_nothing(policy_folder: Path, tmp_path: Path):
    out = finish(
        start("--dry-run", "--run-dir", str(tmp_path / "run"), "--model.path", str(policy_folder), "--seed", "3"), 0
    )
    assert "24 steps" in out
    assert "seed" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [("run", "--help"), ("run", "--dry-run"), ("warm_start", "--help")], ids=" ".join)
def test_a_reader_that_has_read_enough_is_no_error(command: tuple[str, str]):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        module, flag = command
        ended = subprocess.run(
            [sys.executable, "-m", f"l0fast.{module}", flag],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, "")
