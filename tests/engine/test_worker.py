"""The scheduler without its process: what one round of arrivals computes."""

import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from l0fast.engine.slot_model import SlotModel
from l0fast.engine.threads import HOLD_S, LOOK_S, Threads, waited_s
from l0fast.engine.worker import Request, Scheduler, worth_a_prefill
from l0fast.ipc import Message
from tests.engine.tiny import MAX_TOKENS, VOCAB, full_logprobs, tiny_model


class Answers:
    """Stands for the channel: (ids, logprobs, fields) by request."""

    def __init__(self):
        self.of = {}
        self.updated, self.refused = [], []

    def fail(self, to, error):
        self.refused.append(str(error))

    def reply(self, to, payload=b"", **fields):
        if isinstance(to, Message):
            self.updated.append(to.header["policy_version"])
            return
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
        scheduler.waiting[i] = Request(i, i, str(i), np.array(prompt, np.int32), 10 + i, (), 1.0, i)
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
    assert scheduler.sums["prefill_tokens"] == 50
    assert [answers[i][2]["cached_tokens"] for i in range(6)] == [0, 50, 50, 50, 50, 50]
    assert len({tuple(answers[i][0][:10]) for i in range(6)}) == 6


def test_groups_that_share_a_system_prompt_compute_it_once(folder, model):
    system = [i * 11 % VOCAB for i in range(60)]
    prompts = [[*system, question, *range(question + 1)] for question in range(4) for _ in range(3)]
    scheduler, answers = play(folder, prompts, num_slots=12)
    check(model, prompts, answers)
    # each question's own ids; their twins beyond the first question are not worth a third wave
    assert 60 < scheduler.sums["prefill_tokens"] < 60 + 3 * sum(2 + q for q in range(4))


@pytest.mark.parametrize("num_slots", [1, 3])
def test_more_requests_than_slots_are_all_served(folder, model, num_slots):
    prompts = [[i + 1] * (1 + 9 * i) for i in range(9)]
    scheduler, answers = play(folder, prompts, num_slots)
    check(model, prompts, answers)
    assert scheduler.sums["decoded_tokens"] == sum(10 + i for i in range(9))


def test_thousands_that_give_up_at_once_hold_nobody_up(folder):
    """As all that wait do when they miss the same deadline."""
    scheduler, _, answers = start(folder, 1)
    many = 20_000
    ids = np.array([1, 2, 3], np.int32)
    for i in range(many + 1):
        scheduler.waiting[i] = Request(i, i, str(i), ids, 2, (), 1.0, i)
    began_s = time.process_time()
    for i in reversed(range(many)):
        scheduler.handle(Message({"op": "abort", "id": None, "request": i}, b""))
    assert time.process_time() - began_s < 1.0
    while not scheduler.idle:
        scheduler.step()
    assert list(answers.of) == [many]


@given(st.integers(1, 500), st.integers(0, 500), st.integers(0, 100))
def test_nobody_waits_for_company_for_long_or_beside_an_idle_engine(waiting: int, running: int, held_back: int):
    worth = worth_a_prefill(waiting, running, held_back)
    assert worth or (running > 4 * waiting and held_back < 8)
    assert worth_a_prefill(waiting, 0, 0)
    # whoever is admitted now would be admitted with more company, or later, too
    assert not worth or (
        worth_a_prefill(waiting + 1, running, held_back) and worth_a_prefill(waiting, running, held_back + 1)
    )


@cache
def policy(version: int) -> torch.nn.Module:
    return tiny_model(version)


class Published:
    """Stands for the learner's shared weights."""

    def __init__(self):
        self.policy_version = 0
        self._tensors = {name: p.detach().clone() for name, p in policy(0).named_parameters()}

    def tensors(self):
        return self._tensors

    def publish(self, version: int) -> Message:
        self.policy_version = version
        for name, parameter in policy(version).named_parameters():
            self._tensors[name].copy_(parameter.detach())
        return Message({"op": "update_weights", "id": 0, "policy_version": version}, b"")


def start(folder, num_slots):
    published, answers = Published(), Answers()
    model = SlotModel(folder, num_slots=num_slots, max_len=MAX_TOKENS)
    scheduler = Scheduler(model, answers, published, num_slots=num_slots)  # type: ignore[arg-type]
    return scheduler, published, answers


def spans_of(answer):
    ids, _, fields = answer
    return fields["version_spans"] or [(fields["policy_version"], 0, len(ids))]


def check_each_id_is_of_the_version_it_says(prompt, answer):
    ids, logprobs, fields = answer
    spans = spans_of(answer)
    assert fields["policy_version"] == spans[0][0] == min(version for version, _, _ in spans)
    assert [start for _, start, _ in spans] == [0, *(end for _, _, end in spans[:-1])]
    assert spans[-1][2] == len(ids)
    for version, start, end in spans:
        assert start < end
        full = full_logprobs(policy(version), [*prompt, *ids])[len(prompt) - 1 : -1]
        expected = full.gather(-1, torch.tensor(ids)[:, None])[start:end, 0].numpy()
        np.testing.assert_allclose(logprobs[start:end], expected, atol=1e-5, rtol=0)


arrival = st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 25), st.integers(0, 5))
events = st.one_of(arrival, st.just("update"), st.integers(1, 12))


@settings(max_examples=12, deadline=None)
@given(events=st.lists(events, max_size=14))
def test_no_response_mixes_versions_without_saying_so(folder, model, events):
    """Requests with shared prefixes come, weights come and steps pass in any order, on three slots."""
    scheduler, published, answers = start(folder, num_slots=3)
    prompts = []
    for event in events:
        if event == "update":
            scheduler.handle(published.publish(published.policy_version + 1))
        elif isinstance(event, int):
            for _ in range(event):
                scheduler.step()
        else:
            kind, length, new_tokens, conversation = event
            prompts.append([(kind + i * i) % VOCAB for i in range(length)])
            ids, i = np.array(prompts[-1], np.int32), len(prompts) - 1
            scheduler.waiting[i] = Request(i, i, str(conversation), ids, new_tokens, (), 1.0, i)
    while not scheduler.idle:
        scheduler.step()
    assert sorted(answers.of) == list(range(len(prompts)))
    asked = [v for v in range(1, published.policy_version + 1) if v in answers.updated]
    assert len(asked) + len(answers.refused) == published.policy_version
    for i, prompt in enumerate(prompts):
        check_each_id_is_of_the_version_it_says(prompt, answers.of[i])
        assert {version for version, _, _ in spans_of(answers.of[i])} <= {0, *asked}


def test_what_runs_goes_on_under_new_weights_as_if_it_were_sent_again(folder):
    """Sixteen of one prompt: what they share is computed once again, and not sixteen times."""
    scheduler, published, answers = start(folder, num_slots=16)
    prompt = [i * 7 % VOCAB for i in range(50)]
    for i in range(16):
        scheduler.waiting[i] = Request(i, i, str(i), np.array(prompt, np.int32), 40, (), 1.0, i)
    for _ in range(11):
        scheduler.step()
    assert scheduler.sums["recomputed_tokens"] == 0
    scheduler.handle(published.publish(1))
    while not scheduler.idle:
        scheduler.step()
    assert answers.updated == [1]
    assert 50 + 16 * 8 < scheduler.sums["recomputed_tokens"] < 50 + 16 * 20
    assert scheduler.sums["prefill_tokens"] == 50 + scheduler.sums["recomputed_tokens"]

    fresh, published, again = start(folder, num_slots=16)
    fresh.handle(published.publish(1))
    for i in range(16):
        ids, _, fields = answers.of[i]
        assert fields["version_spans"] == [(0, 0, 12), (1, 12, 40)]
        sent = np.array([*prompt, *ids[:12]], np.int32)
        fresh.waiting[i] = Request(i, i, str(i), sent, 28, (), 1.0, i)
    while not fresh.idle:
        fresh.step()
    for i in range(16):
        assert answers.of[i][0][12:] == again.of[i][0]
        np.testing.assert_allclose(answers.of[i][1][12:], again.of[i][1], atol=1e-5, rtol=0)


def test_an_update_while_nothing_runs_costs_no_prefill_and_leaves_no_span(folder):
    scheduler, published, answers = start(folder, num_slots=2)
    ask = Request(0, 0, "a", np.arange(9, dtype=np.int32), 5, (), 1.0, 0)
    scheduler.waiting[ask.id] = ask
    while not scheduler.idle:
        scheduler.step()
    before = dict(scheduler.sums)
    scheduler.handle(published.publish(1))
    scheduler.step()
    assert scheduler.sums == before
    scheduler.waiting[ask.id] = ask
    while not scheduler.idle:
        scheduler.step()
    _, _, fields = answers.of[0]
    assert (fields["policy_version"], fields["version_spans"], fields["cached_tokens"]) == (1, [], 0)
    # the last id was sampled and never computed
    assert scheduler.sums["recomputed_tokens"] == 9


def test_the_sums_add_up(folder, model):
    prompts = [[i * 7 % VOCAB for i in range(50)]] * 4 + [[3] * 20]
    scheduler, _ = play(folder, prompts, num_slots=2)
    sums = scheduler.sums
    assert sums["prefill_tokens"] + sums["cached_tokens"] == sum(map(len, prompts))
    assert sums["decoded_tokens"] == sum(10 + i for i in range(5))
    assert sums["prefill_s"] > 0
    assert sums["decode_s"] > 0


def seen(threads: Threads, seconds: float, waits: float) -> list[int]:
    """Threads at each look for `seconds`, in which some thread waits for a processor for `waits` of the time."""
    looks = np.arange(1, round(seconds / LOOK_S) + 1) * 1.01 * LOOK_S
    start, waited = threads._looked_s, threads._waited_s
    return [threads.look(start + float(t), lambda t=float(t): waited + waits * t) for t in looks]


def test_one_thread_computes_beside_others_that_compute_and_all_of_them_on_a_quiet_machine():
    threads = Threads(4, 100.0, 7.0)
    assert set(seen(threads, 5.0, waits=0.3)) == {4}
    # all are tried again now and then, for one look
    crowded = seen(threads, 10 * HOLD_S, waits=2.5)
    assert crowded[0] == 1
    assert 8 <= crowded.count(4) <= 10
    assert set(seen(threads, 2 * HOLD_S, waits=0.3)[round(HOLD_S / LOOK_S) :]) == {4}


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this kernel does not say")
def test_the_kernel_says_how_long_threads_have_waited_for_a_processor():
    # some, by now: this process has had neighbours
    assert 0 < waited_s() < time.clock_gettime(time.CLOCK_BOOTTIME) * len(list(Path("/proc/self/task").iterdir()))
