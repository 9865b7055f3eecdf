"""Where a benchmark's figures go is known before it measures."""

import os

import pytest
import torch

from bench import kernels, simulated_speed
from bench.results_folder import results_folder


def test_the_folder_is_made_with_all_above_it(tmp_path):
    assert results_folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()
    assert results_folder(str(tmp_path / "a" / "b")).is_dir(), "one that is there is as good"


def test_one_that_can_not_be_is_refused_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        simulated_speed.main(["--out", str(tmp_path / "file" / "results")])
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].endswith(
        f"{tmp_path / 'file' / 'results'} can't be made (Not a directory): name another folder"
    )
    assert said.out == ""


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ("file/kernels.json", "file can't be made (File exists): name another folder"),
        ("", "is a folder: name a file in it"),
    ],
)
def test_a_file_that_can_not_be_is_refused_before_anything_is_measured(tmp_path, monkeypatch, capsys, out, sentence):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["bench.kernels", "--out", str(tmp_path / out)])
    with pytest.raises(SystemExit):
        kernels.main()
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].endswith(sentence)
    assert said.out == ""


def test_a_head_that_does_not_fit_leaves_the_other_figures(monkeypatch):
    def head(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(kernels, "our_head", head)
    monkeypatch.setattr(kernels, "head_errors", lambda *_: {})
    [row] = kernels.bench_head("cpu", rounds=1)["rows"]
    assert row["policy_head_ms"] == "out of memory"
    assert row["naive_ms"] > 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_one_that_is_read_only_is_refused(tmp_path, capsys):
    tmp_path.chmod(0o500)
    with pytest.raises(SystemExit):
        simulated_speed.main(["--out", str(tmp_path)])
    assert "can't be written to" in capsys.readouterr().err
