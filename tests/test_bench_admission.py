"""bench.admission: the same world for everybody, and a last line of JSON."""

import json

from bench import admission


def test_a_cache_that_is_too_small_for_all_does_more_with_admission():
    all_at_once, gated = (admission.simulate(292_968, limit, 240) for limit in (256, None))
    assert gated.episodes_per_s > 1.5 * all_at_once.episodes_per_s
    assert gated.tokens_per_s > 1.2 * all_at_once.tokens_per_s
    assert gated.computed_again < 0.3 < all_at_once.computed_again
    assert 64 < gated.in_flight < 128


def test_it_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(admission, "LIMITS", (16, 32))
    monkeypatch.setattr(admission, "CAPACITIES", {"little": 100_000})
    assert admission.main(["--seconds", "10", "--out", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    written = json.loads((tmp_path / "admission.json").read_text())
    assert written["gains"] == printed["gains"]
    assert written["times_real_time"] > 0
    assert all(row["turns"] > 0 < row["times_real_time"] for row in written["rows"]["little"])
    assert [row["limit"] for row in written["rows"]["little"]] == [16, 32, None]
    assert (tmp_path / "admission.png").stat().st_size > 10_000
