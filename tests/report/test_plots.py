"""Pictures come from the folder alone, and say what is in it."""

import asyncio
import shutil
import struct
from pathlib import Path

import matplotlib
import pytest

from l0fast.config import RunConfig
from l0fast.report.plots import (
    PlotError,
    compare_plot,
    curve_points,
    draw,
    draw_in_subprocess,
    learning_curve,
    step_time,
    timeline,
)
from l0fast.run_dir import RunDir, read_metrics, read_summary, read_trajectories

matplotlib.use("agg")


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def test_every_picture_is_drawn_in_a_process_of_its_own(run_dir: Path):
    paths = asyncio.run(draw_in_subprocess(run_dir))
    assert [path.name for path in paths] == ["learning_curve.png", "step_time.png", "timeline.png"]
    assert all(path.parent == run_dir / "plots" and min(png_size(path)) > 300 for path in paths)


def test_a_process_that_fails_says_why(tmp_path: Path):
    with pytest.raises(PlotError, match=r"exit code 2.*metrics\.jsonl can't be read"):
        asyncio.run(draw_in_subprocess(tmp_path / "nowhere"))


def test_a_process_that_takes_too_long_is_ended(run_dir: Path):
    with pytest.raises(PlotError, match="not drawn within"):
        asyncio.run(draw_in_subprocess(run_dir, timeout_s=0.01))
    assert not list((run_dir / "plots").iterdir())


def test_a_run_that_took_no_step_has_no_pictures(tmp_path: Path):
    with RunDir.create(tmp_path / "run", RunConfig()) as run:
        assert draw(run.path) == []


def test_the_curve_has_the_points_in_between_and_the_summarys_ends(run_dir: Path):
    assert curve_points(read_metrics(run_dir), read_summary(run_dir)) == {
        "sampled": [(0, 0.2), (2, 0.45), (4, 0.7)],
        "greedy": [(0, 0.5)],
    }


def test_a_point_in_between_lies_at_the_step_that_it_is_of_and_not_at_that_of_its_row():
    rows = [
        {"step": 1},
        {"step": 2, "eval/step": 1, "eval/sampled": 0.3},
        {"step": 4, "eval/step": 3, "eval/sampled": 0.5},
    ]
    summary = {"eval_accuracy_before": 0.2, "eval_accuracy_after": 0.6, "steps": 4}
    assert curve_points(rows, summary) == {"sampled": [(0, 0.2), (1, 0.3), (3, 0.5), (4, 0.6)]}


def test_the_learning_curve_shows_accuracy_reward_and_what_went_wrong(run_dir: Path):
    fig = learning_curve(read_metrics(run_dir), read_summary(run_dir))
    accuracy, wrong = fig.axes
    lines = {line.get_label(): line for line in accuracy.lines}
    assert list(lines["held-out, sampled"].get_ydata()) == [0.2, 0.45, 0.7]
    assert list(lines["training, right answers"].get_xdata()) == [1, 2, 3, 4]
    assert "training, reward" in lines
    assert "before training" in lines
    assert wrong.get_xlabel() == "optimizer step"
    # stacked up to all that is not right
    top = max(path.vertices[:, 1].max() for bands in wrong.collections for path in bands.get_paths())
    assert top == pytest.approx(0.7)
    (seconds,) = accuracy.child_axes
    assert seconds.get_xlabel() == "time since the start [s]"
    fig.canvas.draw()
    assert seconds.get_xlim()[1] == pytest.approx(4.0 * accuracy.get_xlim()[1], rel=0.02)
    matplotlib.pyplot.close(fig)


def test_wrong_answers_to_questions_of_ones_own_are_among_what_went_wrong():
    shares = {"outcome/right": 0.3, "outcome/wrong": 0.6, "outcome/no_answer": 0.1, "outcome/failed": 0.0}
    fig = learning_curve([{"step": s, "time/since_start_s": s, "rollout/correct": 0.3, **shares} for s in (1, 2)], {})
    _, wrong = fig.axes
    assert [text.get_text() for text in wrong.get_legend().get_texts()] == ["no answer", "wrong"]
    top = max(path.vertices[:, 1].max() for bands in wrong.collections for path in bands.get_paths())
    assert top == pytest.approx(0.7)
    matplotlib.pyplot.close(fig)


def test_the_learning_curve_of_one_step_is_seen(row):
    fig = learning_curve([row(1)], {"eval_accuracy_before": 0.2, "eval_accuracy_after": 0.3})
    accuracy, wrong = fig.axes
    lines = {line.get_label(): line for line in accuracy.lines}
    assert lines["training, reward"].get_marker() == lines["training, right answers"].get_marker() == "."
    assert all(path.get_extents().width > 0 for bands in wrong.collections for path in bands.get_paths())
    matplotlib.pyplot.close(fig)


@pytest.mark.parametrize(("reward", "limits"), [(1.5, (0, 1.5)), (-0.5, (-0.5, 1)), (0.5, (0, 1))])
def test_the_learning_curve_has_room_for_any_reward(reward: float, limits: tuple[float, float]):
    fig = learning_curve([{"step": s, "time/since_start_s": s, "rollout/reward": reward} for s in (1, 2)], {})
    assert fig.axes[0].get_ylim() == limits
    matplotlib.pyplot.close(fig)


def test_the_second_axis_tells_recorded_seconds(run_dir: Path):
    rows = [row | {"time/since_start_s": 20.0 + 5 * row["step"]} for row in read_metrics(run_dir)]
    fig = learning_curve(rows, read_summary(run_dir))
    fig.canvas.draw()
    left, right = fig.axes[0].get_xlim()
    assert fig.axes[0].child_axes[0].get_xlim() == pytest.approx((20 + 5 * left, 20 + 5 * right))
    matplotlib.pyplot.close(fig)


def test_the_parts_of_a_step_stack_up_to_it(run_dir: Path):
    fig = step_time(read_metrics(run_dir))
    (ax,) = fig.axes
    assert max(part.get_data().values.max() for part in ax.patches) == pytest.approx(4.0)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == [
        "other (6%)", "sync weights (6%)", "learn (50%)", "sandbox (12%)", "prefill (5%)", "decode (20%)"
    ]  # fmt: skip
    matplotlib.pyplot.close(fig)


def test_the_timeline_has_a_row_an_agent_as_long_as_its_episode(run_dir: Path):
    fig = timeline(read_trajectories(run_dir / "trajectories/step_0004.jsonl"), "step 4")
    (ax,) = fig.axes
    ends: dict[int, float] = {}
    for bar in (bar for kind in ax.collections for bar in kind.get_paths()):
        row = round(bar.vertices[:4, 1].mean())
        ends[row] = max(ends.get(row, 0.0), bar.vertices[:, 0].max())
    assert ends == pytest.approx({0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0})
    matplotlib.pyplot.close(fig)


def test_the_timeline_is_of_the_last_step_also_beyond_9999(run_dir: Path, monkeypatch):
    for name in ("step_9999", "step_10000"):
        shutil.copyfile(run_dir / "trajectories/step_0004.jsonl", run_dir / f"trajectories/{name}.jsonl")
    titles = []
    monkeypatch.setattr("l0fast.report.plots.timeline", lambda t, title: titles.append(title) or timeline(t, title))
    draw(run_dir)
    assert titles == ["step 10000"]


def test_thousands_of_steps_and_of_agents_are_pictures(run_dir: Path, row):
    fig = step_time([row(step) for step in range(1, 3001)])
    # what takes the time
    assert len(fig.axes[0].patches) == 6
    matplotlib.pyplot.close(fig)
    agents = read_trajectories(run_dir / "trajectories/step_0004.jsonl") * 5000
    fig = timeline(agents, "step 4")
    assert len(fig.axes[0].collections) == 3
    # of Agg, at 150 pixels an inch
    assert fig.get_figheight() * 150 < 2**16
    matplotlib.pyplot.close(fig)


def test_several_runs_are_drawn_in_one_picture(run_dir: Path, tmp_path: Path):
    out = compare_plot({"trained": run_dir, "advantages permuted": run_dir}, tmp_path / "both.png")
    assert out == tmp_path / "both.png"
    assert min(png_size(out)) > 300
