"""Where a benchmark's figures go is known before it measures."""

import os

import pytest

from bench import simulated_speed
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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_one_that_is_read_only_is_refused(tmp_path, capsys):
    tmp_path.chmod(0o500)
    with pytest.raises(SystemExit):
        simulated_speed.main(["--out", str(tmp_path)])
    assert "can't be written to" in capsys.readouterr().err
