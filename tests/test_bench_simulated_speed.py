"""bench.simulated_speed: every scene has a row, and the three figures of a row agree."""

import json

import pytest

from bench import simulated_speed


def test_it_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(simulated_speed, "SCENES", ((300, 1, 4), (100, 2, 8)))
    assert simulated_speed.main(["--seconds", "20", "--out", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((tmp_path / "simulated_speed.json").read_text()) == printed
    assert [(row["engines"], row["agents"]) for row in printed["rows"]] == [(1, 4), (2, 8)]
    for row in printed["rows"]:
        assert row["turns_a_s"] / row["turns_in_simulated_s"] == pytest.approx(row["times_real_time"])
