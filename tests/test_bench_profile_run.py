"""The page of a profiled run: functions are blamed for their own time, and what a run said can't break the page."""

import argparse
import sys
from pathlib import Path

import pytest

from bench import profile_run
from bench.profile_run import Function, heaviest, render
from l0fast.errors import UsageError

pyinstrument = pytest.importorskip("pyinstrument")
stack_sampler = pytest.importorskip("pyinstrument.stack_sampler")


class Clock:
    """The profiler's, which goes on where we say."""

    now_s = 0.0


def burn(clock: Clock, milliseconds: int) -> None:
    for _ in range(milliseconds):
        clock.now_s += 0.001
        # a profiler looks at its clock at calls
        len(())


def outer(clock: Clock) -> None:
    clock.now_s += 0.005
    burn(clock, 80)


def test_functions_are_blamed_for_what_they_did_themselves(monkeypatch: pytest.MonkeyPatch):
    clock = Clock()
    monkeypatch.setattr(stack_sampler.get_stack_sampler(), "timer_func", lambda: clock.now_s)
    profiler = pyinstrument.Profiler(interval=0.001, async_mode="disabled")
    with profiler:
        outer(clock)
    functions, busy_s, idle_s = heaviest(profiler)
    assert [f.name for f in functions[:2]] == ["burn", "outer"]
    assert [f.self_s for f in functions[:2]] == pytest.approx([0.08, 0.005])
    assert functions[0].place.startswith("tests/test_bench_profile_run.py:")
    assert (busy_s, idle_s) == (pytest.approx(0.085), 0)


def test_a_page_shows_each_step_and_escapes_what_it_was_told(tmp_path: Path):
    run = tmp_path / "run"
    (run / "plots").mkdir(parents=True)
    (run / "plots" / "timeline.png").write_bytes(b"")
    (run / "trace.json").write_text("[]")
    (run / "metrics.jsonl").write_text(
        '{"step":1,"time/step_s":2.0,"share/decode":0.75,"share/learn":0.25,"loop/lag_max_ms":7.0,"loop/blocked_by":"<b>"}\n'
    )
    page = render(
        run, [Function("<lambda>", "a.py:1", 0.5)], busy_s=1.0, idle_s=3.0, command="x <script>alert(1)</script>"
    )
    assert "<script>" not in page
    assert "&lt;lambda&gt;" in page
    assert "decode 75.0%" in page
    assert "learn 25.0%" in page
    assert "step 1, 2.00 s" in page
    assert "<b>25%</b>driver busy" in page
    assert "run/plots/timeline.png" in page
    assert "href='run/trace.json'" in page
    assert "flame.html" in page


def test_flags_that_were_given_are_not_given_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    options = profile_run.argparse.Namespace(steps=2, out=tmp_path / "out")
    invocation = profile_run._invocation(options, ["geography", "--eval.questions=7", "--eval.every", "1"])
    assert invocation.config.num_steps == 2
    assert invocation.config.trace.on
    assert invocation.config.eval.questions == 7
    assert invocation.config.eval.every == 1
    assert invocation.config.checkpoint.every == 0
    assert invocation.run_dir == tmp_path / "out" / "run"


def test_a_profiler_that_is_not_installed_is_one_sentence_before_the_run(monkeypatch, capsys, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "pyinstrument", None)
    monkeypatch.setattr("sys.argv", ["bench.profile_run", "--out", str(tmp_path / "out")])
    assert profile_run.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("bench.profile_run: the profiler can't be imported (")
    assert said.endswith("): pip install -e '.[bench]'\n")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_is_none_to_be_profiled(tmp_path: Path):
    with pytest.raises(UsageError, match="--dry-run leaves nothing to measure"):
        profile_run._invocation(argparse.Namespace(steps=3, out=tmp_path / "out"), ["geography", "--dry-run"])


def test_a_folder_that_has_a_profile_is_not_written_to_again(tmp_path: Path):
    (tmp_path / "run").mkdir()
    with pytest.raises(UsageError, match="name another folder with --out, or move it"):
        profile_run._invocation(argparse.Namespace(steps=3, out=tmp_path), ["geography"])


def test_what_the_words_say_counts(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(profile_run, "num_gpus", lambda: 8)
    words = "--rollout.group-size 4 --eval.transfer_questions 5 --trace.torch-step 3 --num-steps 7".split()
    invocation = profile_run._invocation(argparse.Namespace(steps=3, out=None), words)
    assert invocation.run_dir.parent.name.startswith("geography-")
    config = invocation.config
    assert (config.eval.transfer_questions, config.trace.torch_step, config.num_steps) == (5, 3, 7)
    assert config.eval.questions == 32, "unless they say something"
