"""The transformers engine with a real child: it says what transformers itself would say, whoever shares the batch."""

import asyncio
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from l0fast.config import EngineConfig
from l0fast.engine.base import Sampling
from l0fast.engine.transformers import transformers_engine
from l0fast.engine.worker import pick_device
from l0fast.errors import EngineError, UsageError
from l0fast.sandbox.guest.jail import SESSION_NICE
from tests.engine.tiny import MAX_TOKENS, SLOTS, VOCAB, full_logprobs, tiny_model
from tests.priority import assert_stands_back


def ids(seed: int, length: int) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(VOCAB) for i in range(length)]


def sampling(max_new_tokens=12, *, stop=(), temperature=1.0, seed=0) -> Sampling:
    return Sampling(max_new_tokens=max_new_tokens, stop_token_ids=stop, temperature=temperature, seed=seed)


def check_against(model, prompt, sampled, temperature=1.0):
    """Every log-prob is that of a full forward."""
    logprobs = full_logprobs(model, [*prompt, *sampled.response_ids], temperature)
    expected = logprobs[torch.arange(len(prompt) - 1, len(logprobs) - 1), torch.tensor(sampled.response_ids)]
    torch.testing.assert_close(torch.tensor(sampled.sampler_logprobs), expected, atol=1e-5, rtol=0)
    return logprobs[len(prompt) - 1 : -1]


def test_greedy_ids_are_the_argmax_of_a_full_forward(running, model):
    async def main():
        async with asyncio.TaskGroup() as tg:
            return [
                (p, tg.create_task(running.engine.generate(p, sampling(30, temperature=0), conversation=f"greedy {i}")))
                for i, p in enumerate(ids(i, 1 + 7 * i) for i in range(10))
            ]

    for prompt, task in running.run(main()):
        sampled = task.result()
        logprobs = check_against(model, prompt, sampled)
        assert list(sampled.response_ids) == logprobs.argmax(-1).tolist()
        assert sampled.finish_reason == "length"
        assert len(sampled.response_ids) == 30


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_logprobs_are_those_of_a_full_forward_at_that_temperature(running, model, temperature):
    prompt = ids(50, 40)
    sampled = running.run(running.engine.generate(prompt, sampling(60, temperature=temperature), conversation="hot"))
    check_against(model, prompt, sampled, temperature)


def test_a_stop_id_ends_the_turn_and_is_part_of_it(running):
    prompt = ids(1, 20)
    free = running.run(running.engine.generate(prompt, sampling(40, seed=3), conversation="free"))
    stop = free.response_ids[5]
    first = free.response_ids.index(stop)
    stopped = running.run(running.engine.generate(prompt, sampling(40, seed=3, stop=(stop,)), conversation="stopped"))
    assert stopped.response_ids == free.response_ids[: first + 1]
    assert stopped.finish_reason == "stop"
    assert len(stopped.sampler_logprobs) == first + 1


def test_the_next_turn_computes_only_what_is_new(running, model):
    first = ids(2, 60)
    one = running.run(running.engine.generate(first, sampling(20), conversation="turns"))
    second = [*first, *one.response_ids, *ids(3, 9)]
    before = running.run(running.engine.load())
    two = running.run(running.engine.generate(second, sampling(20), conversation="turns"))
    after = running.run(running.engine.load())
    # the last id sampled was never fed to the model
    assert two.cached_tokens == len(first) + len(one.response_ids) - 1
    assert after.prefill_tokens - before.prefill_tokens == 10
    check_against(model, second, two)


def test_a_trimmed_conversation_reuses_only_what_still_stands(running, model):
    first = ids(4, 60)
    running.run(running.engine.generate(first, sampling(20), conversation="trim"))
    second = [*first[:30], *ids(5, 40)]
    two = running.run(running.engine.generate(second, sampling(20), conversation="trim"))
    assert 30 <= two.cached_tokens <= 31
    check_against(model, second, two)


def test_equal_prompts_that_come_together_are_computed_once(running, model):
    prompt = ids(600, 50)

    async def main():
        before = await running.engine.load()
        async with asyncio.TaskGroup() as tg:
            tasks = [
                tg.create_task(running.engine.generate(prompt, sampling(10, seed=s), conversation=f"group {s}"))
                for s in range(16)
            ]
        return [t.result() for t in tasks], (await running.engine.load()).prefill_tokens - before.prefill_tokens

    samples, prefilled = running.run(main())
    # the first round has at least one of them; where the engine was quicker than we, the others recompute a last position
    assert 45 <= prefilled <= 50 + 15
    assert len({s.response_ids for s in samples}) == 16
    for sampled in samples:
        check_against(model, prompt, sampled)


def test_a_hundred_mixed_requests_equal_their_solo_runs(running, model):
    rng = random.Random(7)
    shared = ids(8, 40)
    jobs = []
    for i in range(100):
        prompt = [*(shared if i % 3 else []), *ids(100 + i % 60, rng.randint(1, 70))]
        jobs.append((prompt, sampling(rng.randint(1, 40), seed=i, stop=(5,), temperature=rng.choice([0.0, 0.8, 1.0]))))

    async def main(prefix):
        async with asyncio.TaskGroup() as tg:
            tasks = [
                tg.create_task(running.engine.generate(p, s, conversation=f"{prefix} {i}"))
                for i, (p, s) in enumerate(jobs)
            ]
        return [t.result() for t in tasks]

    together = running.run(main("together"))
    for i, ((prompt, s), sampled) in enumerate(zip(jobs, together, strict=True)):
        check_against(model, prompt, sampled, s.temperature or 1.0)
        if i % 4:
            continue
        solo = running.run(running.engine.generate(prompt, s, conversation=f"solo {i}"))
        assert solo.response_ids == sampled.response_ids
        assert solo.finish_reason == sampled.finish_reason
    load = running.run(running.engine.load())
    assert load.running == load.waiting == 0
    assert 0 < load.used_tokens <= load.max_tokens == SLOTS * MAX_TOKENS


def test_new_weights_are_used_and_old_prefixes_forgotten(running, model):
    prompt, other = ids(9, 60), tiny_model(1)
    ask = sampling(20, seed=9)
    old = running.run(running.engine.generate(prompt, ask, conversation="update"))
    try:
        running.publish(other, old.policy_version + 1)
        new = running.run(running.engine.generate(prompt, ask, conversation="update"))
        assert new.policy_version == old.policy_version + 1
        assert new.cached_tokens == 0
        assert new.response_ids != old.response_ids
        check_against(other, prompt, new)
    finally:
        running.publish(model, old.policy_version + 2)
    again = running.run(running.engine.generate(prompt, ask, conversation="update"))
    assert again.response_ids == old.response_ids


def test_requests_in_flight_go_on_under_new_weights_and_say_so(running, model):
    other = tiny_model(2)
    # this may be the first test to ask the engine, which has the weights of its folder and a version nobody published
    version = running.weights.policy_version + 1
    running.publish(model, version)
    parameters = dict(other.named_parameters())

    async def main():
        async with asyncio.TaskGroup() as tg:
            jobs = [
                tg.create_task(running.engine.generate(ids(i, 20), sampling(100, seed=i), conversation=f"mid {i}"))
                for i in range(2 * SLOTS)
            ]
            while (await running.engine.load()).running < SLOTS:
                pass
            for name, tensor in running.weights.tensors().items():
                tensor.copy_(parameters[name].detach())
            running.weights.policy_version = version + 1
            await running.engine.update_weights(version + 1)
        return [j.result() for j in jobs]

    try:
        results = running.run(main())
    finally:
        running.publish(model, version + 2)
    mixed = [r for r in results if r.version_spans]
    assert len(mixed) == SLOTS
    assert sum(r.policy_version == version + 1 for r in results) == SLOTS
    for i, sampled in enumerate(results):
        spans = [(s.policy_version - version, s.start, s.end) for s in sampled.version_spans]
        cut = spans[0][2] if spans else 0
        assert spans in ([], [(0, 0, cut), (1, cut, 100)])
        assert sampled.policy_version - version == (0 if spans else 1)
        expected = full_logprobs(other, [*ids(i, 20), *sampled.response_ids])[19:-1]
        if spans:
            expected[:cut] = full_logprobs(model, [*ids(i, 20), *sampled.response_ids])[19 : 19 + cut]
        got = torch.tensor(sampled.sampler_logprobs)
        expected = expected.gather(-1, torch.tensor(sampled.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_a_forgotten_conversation_keeps_nothing_in_use(running):
    async def main():
        for i in range(SLOTS):
            running.engine.forget(f"forget {i}")
        before = (await running.engine.load()).used_tokens
        sampled = await running.engine.generate(ids(70, 20), sampling(5), conversation="to forget")
        with_it = (await running.engine.load()).used_tokens
        running.engine.forget("to forget")
        return sampled, before, with_it, (await running.engine.load()).used_tokens

    _, before, with_it, after = running.run(main())
    # whose slot it took may have been in use
    assert after == with_it - 24
    assert after <= before


def test_a_device_that_is_not_there_is_one_sentence(folder):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=r"engine.device = 'cuda', but torch finds no GPU.*--engine.device cpu"):
        pick_device("cuda")
    assert pick_device("auto") == pick_device("cpu") == "cpu"


def test_what_the_child_finds_wrong_with_a_model_is_one_sentence(tmp_path):
    tiny_model(0, sliding_window=8, use_sliding_window=True, max_window_layers=1).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")

    async def main():
        async with transformers_engine(EngineConfig(slots=2, threads=1), tmp_path, max_tokens=32):
            raise AssertionError("it started")

    with pytest.raises(UsageError, match=r"^[^\n]* has sliding-window layers[^\n]*$"):
        asyncio.run(main())


def test_an_update_to_a_version_nobody_published_fails(running):
    version = running.weights.policy_version
    with pytest.raises(EngineError, match=f"asked for version {version + 5}, but the learner has published {version}"):
        running.run(running.engine.update_weights(version + 5))


def test_cancelling_frees_the_slot(running):
    async def main():
        tasks = [
            asyncio.create_task(
                running.engine.generate(ids(i, 10), sampling(MAX_TOKENS - 10, seed=i), conversation=f"cancel {i}")
            )
            for i in range(SLOTS + 5)
        ]
        while (await running.engine.load()).running < SLOTS:
            pass
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        return results, await running.engine.load()

    results, load = running.run(main())
    assert all(isinstance(r, asyncio.CancelledError) for r in results)
    assert load.running == load.waiting == 0


@pytest.mark.parametrize(
    ("prompt", "ask", "says"),
    [
        ([], sampling(), "has no ids"),
        ([1, VOCAB], sampling(), f"has id {VOCAB}, but the model's ids are 0 to {VOCAB - 1}"),
        ([-1], sampling(), "has id -1"),
        ([1] * 100, sampling(61), r"100 ids and max_new_tokens = 61 do not fit.*160 tokens: shorten"),
        ([1], sampling(0), "max_new_tokens = 0"),
        ([1], sampling(temperature=-1.0), "temperature = -1"),
        ([1], sampling(temperature=float("nan")), "temperature = nan"),
        ([1], sampling(stop=(VOCAB,)), "stop_token_ids"),
    ],
)
def test_a_request_that_can_not_be_served_is_refused_here(running, prompt, ask, says):
    with pytest.raises(ValueError, match=says):
        running.run(running.engine.generate(prompt, ask, conversation="refused"))


def test_the_longest_request_that_fits_is_served(running, model):
    prompt = ids(11, 100)
    sampled = running.run(running.engine.generate(prompt, sampling(60), conversation="brim"))
    assert len(sampled.response_ids) == 60
    check_against(model, prompt, sampled)


@pytest.mark.skipif(torch.cuda.is_available(), reason="one that only feeds a GPU must not wait")
def test_it_stands_back_on_the_cpu_as_far_as_a_sandbox_does(running):
    assert_stands_back(running.engine._worker.pid, SESSION_NICE)


def test_a_killed_child_fails_its_requests_within_a_second_and_nothing_is_left(folder, tmp_path):
    config = EngineConfig(slots=4, threads=1, request_timeout_s=60)
    before = set(os.listdir("/proc/self/fd"))

    async def main():
        async with transformers_engine(config, folder, max_tokens=64, log_dir=tmp_path) as engine:
            with pytest.raises(ValueError, match="weights=None"):
                await engine.update_weights(1)
            pid = engine._worker.pid
            with (tmp_path / "engine.log").open("a") as log:
                log.write("a last word\n")
            calls = [
                asyncio.create_task(engine.generate([1, 2], sampling(62), conversation=f"{i}")) for i in range(400)
            ]
            while not (await engine.load()).running:
                pass
            os.kill(pid, signal.SIGKILL)
            started = time.monotonic()
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert time.monotonic() - started < 1
            with pytest.raises(EngineError, match="killed by SIGKILL"):
                await engine.generate([1], sampling(), conversation="after")
        return pid, [r for r in results if isinstance(r, BaseException)]

    pid, failures = asyncio.run(main())
    assert failures
    assert all(isinstance(f, EngineError) for f in failures)
    assert "killed by SIGKILL" in str(failures[0])
    assert str(failures[0]).endswith("a last word")
    assert not Path(f"/proc/{pid}").exists()
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_that_lacks_a_file_is_one_sentence(folder, tmp_path, missing):
    for file in folder.iterdir():
        if file.name != missing:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UsageError, match=f"has no {missing}: give a folder") as caught:
        asyncio.run(start(tmp_path, 64))
    assert str(tmp_path) in str(caught.value)


def test_a_context_longer_than_the_model_is_one_sentence(folder):
    with pytest.raises(UsageError, match="513 tokens is longer than the 512 positions"):
        asyncio.run(start(folder, 513))


async def start(folder: Path, max_tokens: int) -> None:
    async with transformers_engine(EngineConfig(), folder, max_tokens=max_tokens):
        raise AssertionError("it started")
