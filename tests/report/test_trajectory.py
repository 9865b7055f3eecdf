"""Reading one trajectory in the terminal."""

import io
import json
import sys
from pathlib import Path

import pytest

from l0fast.trajectory import main


@pytest.fixture
def read(run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "160")

    def run(*words: str) -> str:
        assert main([str(run_dir), *words]) == 0
        return capsys.readouterr().out

    return run


def test_it_shows_question_words_output_rewards_and_right_answers(read):
    text = read("--step", "1")
    for part in (
        "Which currency is used where Bergen lies?",
        "krone, NOK",
        "<think>I should look it up.</think><code>",
        "search('Bergen')",
        "Bergen is in Norway",
        "reward +0.050  advantage +0.500",
        "no code [bold]",
        "No code was run.",
        "malformed",
        "right",
    ):
        assert part in text


def test_without_a_choice_it_is_the_last_steps_first(read):
    assert "step_0004.jsonl, line 1 of 4" in read()


@pytest.mark.parametrize("file", ["eval_after", "eval_after_greedy", "transfer_other_world_after"])
def test_every_evaluation_is_found_by_the_name_that_is_told_of_it(read, run_dir: Path, file: str, capsys):
    folder = run_dir / "trajectories"
    (folder / f"{file}.jsonl").write_bytes((folder / "step_0001.jsonl").read_bytes())
    assert main([str(run_dir), "--eval", "no such"]) == 2
    assert file in capsys.readouterr().err
    assert f"{file}.jsonl, line 1 of 3" in read("--eval", file)
    assert f"{file}.jsonl, line 1 of 3" in read("--eval", file.removeprefix("eval_"))


def test_worst_best_and_failed_pick_their_own(read):
    assert "line 3 of 4" in read("--worst")
    assert "line 2 of 4" in read("--worst", "--index", "1")
    assert "line 1 of 4" in read("--best")
    failed = read("--failed")
    assert "line 4 of 4" in failed
    assert "the shard died" in failed
    assert "none submitted" in failed


def test_the_models_words_can_not_steer_the_terminal(read):
    text = read()
    assert "\x1b" not in text
    assert "\\x1b[2J" in text


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--step", "9"], "step_0009: there is step_0001, step_0004"),
        (["--eval", "after"], "eval_after"),
        (["--index", "4"], "--index goes from 0 to 3"),
        (["--step", "1", "--failed"], "0 failed trajectories"),
    ],
)
def test_what_is_not_there_is_one_sentence(
    run_dir: Path, capsys: pytest.CaptureFixture[str], words: list[str], part: str
):
    assert main([str(run_dir), *words]) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path)]) == 2
    assert "holds no trajectories" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_letter_that_the_terminal_lacks_is_spelled_out(run_dir: Path, monkeypatch: pytest.MonkeyPatch, encoding: str):
    monkeypatch.setenv("COLUMNS", "60")
    said = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(said, encoding=encoding, write_through=True))
    # long lines are cut with an ellipsis
    assert main([str(run_dir), "--list"]) == 0
    assert b"\\u2026" in said.getvalue()


def test_a_list_is_one_line_a_trajectory_of_those_chosen(read):
    lines = read("--list").splitlines()
    assert "4 of 4" in lines[0]
    assert len(lines) == 6
    assert [line.split()[0] for line in lines[2:]] == ["1", "2", "3", "4"]
    assert "right" in lines[2]
    assert "failed_sandbox" in lines[5]
    assert "the shard died" in lines[5]
    worst = read("--list", "--worst").splitlines()
    assert [line.split()[0] for line in worst[2:]] == ["3", "2", "1"]


def test_a_list_shows_all_figures_in_eighty_columns(read, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, heading, first, *_ = read("--list").splitlines()
    assert heading.split()[:6] == ["line", "reward", "turns", "time", "[s]", "outcome"]
    assert first.split()[:6] == ["1", "0.900", "2", "1.00", "right", "q"]
    assert "Which" in first


def test_a_task_is_found_by_its_id_or_by_words_of_its_question(read, run_dir: Path):
    assert "4 of 4" in read("--list", "--task", "q")
    assert "4 of 4" in read("--list", "--task", "where BERGEN")
    assert "0 of 4" in read("--list", "--task", "Oslo")
    assert main([str(run_dir), "--task", "Oslo"]) == 2


def test_an_export_is_a_notebook_of_the_one_that_was_chosen(read, tmp_path: Path, run_dir: Path):
    out = tmp_path / "book.ipynb"
    assert "written to" in read("--step", "1", "--worst", "--notebook", str(out))
    about = json.loads(out.read_text())["metadata"]["l0fast"]
    assert (about["reward"], about["advantages"]) == (0.05, [0.5, 0.25])
    assert main([str(run_dir), "--notebook", str(out)]) == 2
