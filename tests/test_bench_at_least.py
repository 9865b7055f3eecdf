"""What a benchmark can't do with is one sentence before anything is measured."""

import importlib

import pytest
import torch


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("admission --seconds 0", "--seconds: 0: give at least 1"),
        ("algorithms --out x --seed -1", "--seed: -1: give at least 0"),
        ("colocated --seed -1", "--seed: -1: give at least 0"),
        ("colocated --steps 0", "--steps: 0: give at least 1"),
        ("colocated --device cuda", "--device cuda: torch finds no GPU that it can use"),
        ("corpus --queries 1", "--queries: 1: give at least 2"),
        ("corpus --passages many", "--passages: 'many' is no whole number: give at least 1"),
        ("endpoint --questions 0", "--questions: 0: give at least 1"),
        ("endpoint --temperature 0 -1", "--temperature: -1: give 0 or more"),
        ("endpoint --temperature nan", "--temperature: nan: give 0 or more"),
        ("engine --rounds 0", "--rounds: 0: give at least 1"),
        ("engine --prompt-tokens 20 10", "--prompt-tokens 20 10: give the smaller number first"),
        ("engine --model-path /nowhere", "model folder '/nowhere' has no config.json"),
        ("kernels --rounds 0", "--rounds: 0: give at least 1"),
        ("learner --rounds 0", "--rounds: 0: give at least 1"),
        ("learner --seed -1", "--seed: -1: give at least 0"),
        ("learner --plan geography --gpu-memory-gb 0", "--gpu-memory-gb: 0: give a number above 0"),
        ("main_job --out x --seeds 0 -1", "--seeds: -1: give at least 0"),
        ("sandbox --soak 0", "--soak: 0: give a number above 0"),
        ("throughput --runs 0", "--runs: 0: give at least 1"),
        ("throughput --soak 0", "--soak: 0: give a number above 0"),
        ("throughput --time-compression x", "--time-compression: 'x' is no number: give one above 0"),
    ],
)
def test_a_number_that_can_not_be_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, capsys, line: str, words: str):
    bench = importlib.import_module(f"bench.{line.partition(' ')[0]}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", line.split())
    with pytest.raises(SystemExit) as refused:
        bench.main()
    assert refused.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
