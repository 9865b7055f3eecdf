"""The scheduler without its process: what one round of arrivals computes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from l0fast.engine.slot_model import SlotModel
from l0fast.engine.worker import Request, Scheduler, worth_a_prefill
from tests.engine.tiny import MAX_TOKENS, VOCAB, full_logprobs


class Answers:
    """Stands for the channel: (ids, logprobs, fields) by request."""

    def __init__(self):
        self.of = {}

    def reply(self, to, payload=b"", **fields):
        half = len(payload) // 2
        self.of[to] = (
            np.frombuffer(payload[:half], np.int32).tolist(),
            np.frombuffer(payload[half:], np.float32),
            fields,
        )


def play(folder, prompts, num_slots):
    answers = Answers()
    scheduler = Scheduler(
        SlotModel(folder, num_slots=num_slots, max_len=MAX_TOKENS), answers, None, num_slots=num_slots
    )  # type: ignore[arg-type]
    for i, prompt in enumerate(prompts):
        scheduler.waiting.append(Request(i, i, str(i), np.array(prompt, np.int32), 10 + i, (), 1.0, i))
    while not scheduler.idle:
        scheduler.step()
    return scheduler, answers.of


def check(model, prompts, answers):
    assert sorted(answers) == list(range(len(prompts)))
    for i, prompt in enumerate(prompts):
        ids, logprobs, fields = answers[i]
        assert len(ids) == len(logprobs) == 10 + i
        assert fields["finish_reason"] == "length"
        full = full_logprobs(model, [*prompt, *ids])[len(prompt) - 1 : -1]
        expected = full.gather(-1, torch.tensor(ids)[:, None])[:, 0].numpy()
        np.testing.assert_allclose(logprobs, expected, atol=1e-5, rtol=0)


def test_equal_prompts_of_a_round_are_computed_once(folder, model):
    prompts = [[i * 7 % VOCAB for i in range(50)]] * 6
    scheduler, answers = play(folder, prompts, num_slots=6)
    check(model, prompts, answers)
    assert scheduler.stats["prefill_tokens"] == 50
    assert [answers[i][2]["cached_tokens"] for i in range(6)] == [0, 50, 50, 50, 50, 50]
    assert len({tuple(answers[i][0][:10]) for i in range(6)}) == 6


def test_groups_that_share_a_system_prompt_compute_it_once(folder, model):
    system = [i * 11 % VOCAB for i in range(60)]
    prompts = [[*system, question, *range(question + 1)] for question in range(4) for _ in range(3)]
    scheduler, answers = play(folder, prompts, num_slots=12)
    check(model, prompts, answers)
    # each question's own ids; their twins beyond the first question are not worth a third wave
    assert 60 < scheduler.stats["prefill_tokens"] < 60 + 3 * sum(2 + q for q in range(4))


@pytest.mark.parametrize("num_slots", [1, 3])
def test_more_requests_than_slots_are_all_served(folder, model, num_slots):
    prompts = [[i + 1] * (1 + 9 * i) for i in range(9)]
    scheduler, answers = play(folder, prompts, num_slots)
    check(model, prompts, answers)
    assert scheduler.stats["decoded_tokens"] == sum(10 + i - 1 for i in range(9))


@given(st.integers(1, 500), st.integers(0, 500), st.integers(0, 100))
def test_nobody_waits_for_company_for_long_or_beside_an_idle_engine(waiting: int, running: int, held_back: int):
    worth = worth_a_prefill(waiting, running, held_back)
    assert worth or (running > 4 * waiting and held_back < 8)
    assert worth_a_prefill(waiting, 0, 0)
    # whoever is admitted now would be admitted with more company, or later, too
    assert not worth or (
        worth_a_prefill(waiting + 1, running, held_back) and worth_a_prefill(waiting, running, held_back + 1)
    )
