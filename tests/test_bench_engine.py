"""The engines' benchmark: its peers sample what they say they do, and fewer tokens count as what they would have taken."""

import asyncio

import pytest
import torch

from bench.engine import BatchingPeer, GeneratePeer, Played, Round, logprob_error, summary
from tests.engine.tiny import tiny_model

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]


def played(wall_s: float, new_tokens: int) -> Played:
    return Played([wall_s / 2, wall_s], 10 * wall_s, [], new_tokens)


def test_tokens_that_were_not_sampled_count_as_fast_as_those_that_were():
    round_ = Round(played(3.0, 1), played(7.0, 5))
    assert round_.seconds("wall_s", 5) == 7.0
    assert round_.seconds("wall_s", 9) == 11.0
    assert round_.seconds("cpu_s", 9) == 110.0


def test_ratios_are_of_medians():
    rounds = {
        "engine": [Round(played(1, 1), played(t, 10)) for t in (1.0, 2.0, 30.0)],
        "generate": [Round(played(1, 1), played(t, 10)) for t in (4.0, 6.0, 5.0)],
    }
    rounds["engine"][1].errors += [1e-7, 3e-7]
    ours, theirs = summary(2, 10, rounds)
    assert (ours["tokens_per_s"], ours["ratio"], ours["first_token_ms"]) == (10, 2.5, 750)
    assert (theirs["ratio"], theirs["logprob_error"], ours["logprob_error"]) == (1, None, 3e-7)


@pytest.mark.filterwarnings("ignore")
def test_continuous_batching_is_measured_on_what_it_was_asked_for():
    model = tiny_model(3)
    with torch.no_grad():
        done = asyncio.run(BatchingPeer(tiny_model(3), max_tokens=16).play(PROMPTS, 6))
    assert [len(ids) for ids, _ in done.samples] == [6, 6, 6]
    assert max(logprob_error(model, p, *sample) for p, sample in zip(PROMPTS, done.samples, strict=True)) < 1e-5


def test_generate_goes_on_with_the_cache_that_was_faster():
    peer = GeneratePeer(tiny_model(3))
    asyncio.run(peer.play(PROMPTS, 1))
    assert len(peer.caches) == 2
    done = asyncio.run(peer.play(PROMPTS, 4))
    assert len(peer.caches) == 1
    assert len(done.answered_s) == 3
