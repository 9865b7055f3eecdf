"""The benchmark of a corpus builds, embeds and asks one."""

import json

from bench.corpus import main


def test_a_small_corpus_is_measured_by_words_and_by_vectors(tmp_path, capsys, monkeypatch):
    words = ["bench.corpus", "--passages", "300", "--queries", "20", "--dense", "16", "--results", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    main()
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    [row] = said["sizes"]
    assert (row["passages"], row["dim"]) == (300, 16)
    assert 0 < row["p50_ms"] <= row["p95_ms"]
    assert 0 < row["dense_p50_ms"] <= row["dense_p95_ms"]
    assert json.loads((tmp_path / "corpus.json").read_text()) == said
