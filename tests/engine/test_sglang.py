"""The real SGLang, on the CPU where there is no GPU: it says what transformers says, over updates, sleep and aborts.

Needs sglang; without its GPU packages the stand-ins in sglang_cpu/ are enough. L0FAST_TEST_SGLANG=1 makes a missing one a
failure instead of a skip.
"""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch

from l0fast.deadlines import deadlines_of
from l0fast.engine.base import Sampled, Sampling
from l0fast.engine.buckets import serialize_bucket
from l0fast.engine.sglang import SGLangEngine, sglang_engine
from l0fast.errors import EngineError, UsageError
from tests.engine.real_sglang import (
    CONFIG,
    MARKS,
    MAX_TOKENS,
    PROMPT,
    children,
    error,
    prompts,
    sampling,
    skip_without_sglang,
    stand_ins,
    until_running,
)
from tests.engine.tiny import VOCAB, full_logprobs, tiny_model

skip_without_sglang()
pytestmark = MARKS


END_OF_TEXT = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The usual one, but its model has an end-of-text id, as real ones have."""
    path = tmp_path_factory.mktemp("model")
    model = tiny_model(0)
    model.config.eos_token_id = END_OF_TEXT
    assert model.generation_config is not None
    model.generation_config.eos_token_id = END_OF_TEXT
    model.save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


class Running:
    """One engine on one loop, for all tests."""

    def __init__(self, runner: asyncio.Runner, folder: Path):
        self.runner, self.folder = runner, folder
        self.stack = AsyncExitStack()
        self.engine: SGLangEngine
        self.policy_version = 0

    def run(self, coroutine):
        return self.runner.run(coroutine)

    def start(self) -> None:
        self.stack = AsyncExitStack()
        context = sglang_engine(CONFIG, self.folder, max_tokens=MAX_TOKENS)
        self.engine = self.run(self.stack.enter_async_context(context))

    def close(self) -> None:
        self.run(self.stack.aclose())

    async def update(self, model: torch.nn.Module) -> int:
        self.policy_version += 1
        named = [(name, p.data) for name, p in model.named_parameters()]
        buckets = [serialize_bucket(part) for part in (named[:5], named[5:])]
        await self.engine.update_weights(self.policy_version, [[payload] for payload, _ in buckets])
        return self.policy_version


@pytest.fixture(scope="module")
def running(folder):
    with stand_ins(), asyncio.Runner() as runner:
        running = Running(runner, folder)
        running.start()
        try:
            yield running
        finally:
            running.close()


@pytest.fixture
def engine(running, model) -> SGLangEngine:
    """With the weights of the folder, and alive, whatever a test before did."""
    if running.engine.failure is not None:
        running.close()
        running.start()
    running.run(running.update(model))
    return running.engine


async def all_of(engine: SGLangEngine, prompts: list[list[int]], sampling: Sampling) -> list[Sampled]:
    async with asyncio.TaskGroup() as tg:
        tasks = [tg.create_task(engine.generate(p, sampling, conversation=str(i))) for i, p in enumerate(prompts)]
    return [task.result() for task in tasks]


def test_the_gate_knows_how_large_the_cache_is_before_the_scheduler_has_said_anything(
    running, engine, monkeypatch, tmp_path
):
    from sglang.srt.managers.load_snapshot import (  # pyright: ignore[reportMissingImports]
        ShmLoadSnapshotReader,
        ShmLoadSnapshotWriter,
    )

    running.run(engine.generate(PROMPT, sampling(2), conversation="first"))
    said, file = engine.load().max_tokens, str(tmp_path / "loads.shm")
    monkeypatch.setattr(engine._tm, "load_snapshot_reader", ShmLoadSnapshotReader(file, 1))
    assert engine.load().max_tokens == said > 0
    # the scheduler makes it when it starts, and writes its first load when it has nothing to do
    ShmLoadSnapshotWriter(file, 1, 0)
    assert engine.load().max_tokens == said


def test_it_has_answered_before_anyone_asks(running, folder):
    async def main():
        async with sglang_engine(CONFIG, folder, max_tokens=MAX_TOKENS) as engine:
            load, state = engine.load(), engine._tm.rid_to_state
            # two prompts twice, the second time only what is new of them
            assert engine._tm.load_snapshot_reader.read(0).total_prefill_uncached_tokens >= 2 * 160
            assert not load.used_tokens
            assert not state
            # none of it is a conversation's, nor of the time of a step: most of it was compiling
            assert load.decoded_tokens == load.cached_tokens == load.prefill_tokens == 0
            assert load.prefill_s == load.decode_s == 0
            await engine.generate(PROMPT, sampling(2), conversation="first")
            async with asyncio.timeout(30):
                # written down after it is said
                while engine.load().prefill_tokens < len(PROMPT):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert engine.load().prefill_tokens == len(PROMPT)

    running.run(main())


def test_one_that_does_not_answer_has_not_started(running, engine, monkeypatch):
    monkeypatch.setattr(engine, "_config", CONFIG.model_copy(update={"start_timeout_s": 0.05}))
    pause = engine._io.PauseGenerationReqInput(mode="retract")

    async def main():
        await engine._tm.pause_generation(pause)
        with pytest.raises(EngineError, match=r"did not answer within 0\.05 s.*--engine\.start-timeout-s"):
            await engine.warm_up()
        await engine._tm.continue_generation(engine._io.ContinueGenerationReqInput(torch_empty_cache=False))

    running.run(main())


def test_greedy_ids_are_transformers(running, engine, model):
    ids = list(PROMPT)
    for _ in range(12):
        ids.append(int(full_logprobs(model, ids)[-1].argmax()))
    sampled = running.run(engine.generate(PROMPT, sampling(temperature=0.0), conversation="greedy"))
    assert list(sampled.response_ids) == ids[len(PROMPT) :]
    assert error(model, PROMPT, sampled) <= 1e-5
    assert sampled.finish_reason == "length"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_many_at_once_have_the_logprobs_of_transformers(running, engine, model, temperature):
    asked = prompts(128)
    for prompt, sampled in zip(
        asked, running.run(all_of(engine, asked, sampling(20, temperature=temperature))), strict=True
    ):
        assert len(sampled.response_ids) == 20
        # what rounding does to logits is divided by the temperature like them
        assert error(model, prompt, sampled, temperature=temperature) <= 1e-5 / temperature


def test_a_second_turn_finds_its_first(running, engine, model):
    async def main():
        first = await engine.generate(PROMPT, sampling(100), conversation="turns")
        prompt = [*PROMPT, *first.response_ids, 5, 6]
        return prompt, await engine.generate(prompt, sampling(), conversation="turns")

    prompt, second = running.run(main())
    assert second.cached_tokens >= len(prompt) - 4
    assert error(model, prompt, second) <= 1e-5


def test_a_stop_id_ends_a_response_and_is_part_of_it(running, engine):
    greedy = running.run(engine.generate(PROMPT, sampling(temperature=0.0), conversation="stop"))
    stop = greedy.response_ids[5]
    sampled = running.run(engine.generate(PROMPT, sampling(stop=(stop,), temperature=0.0), conversation="stop"))
    assert sampled.response_ids == greedy.response_ids[: greedy.response_ids.index(stop) + 1]
    assert sampled.finish_reason == "stop"


def test_the_models_own_end_of_text_id_is_one_like_others(running, engine, model):
    asked = prompts(64)
    answers = running.run(all_of(engine, asked, sampling(100, stop=(9,))))
    for prompt, sampled in zip(asked, answers, strict=True):
        assert 9 not in sampled.response_ids[:-1]
        if sampled.response_ids[-1] == 9:
            assert sampled.finish_reason == "stop"
        else:
            assert (sampled.finish_reason, len(sampled.response_ids)) == ("length", 100)
        assert error(model, prompt, sampled) <= 1e-5
    assert any(END_OF_TEXT in sampled.response_ids[:-1] for sampled in answers)


@pytest.mark.parametrize("response", [MAX_TOKENS - len(PROMPT), 5, 2, 1])
def test_all_of_the_context_can_be_used(running, engine, response):
    prompt = (PROMPT * MAX_TOKENS)[: MAX_TOKENS - response]
    sampled = running.run(engine.generate(prompt, sampling(response), conversation="long"))
    assert len(sampled.response_ids) == response


@pytest.mark.parametrize("prompt", [[1, VOCAB], [-1], [], [1] * MAX_TOKENS])
def test_what_would_take_the_scheduler_down_does_not_reach_it(running, engine, prompt):
    with pytest.raises(ValueError, match="id|fit"):
        running.run(engine.generate(prompt, sampling(), conversation="bad"))
    running.run(engine.generate(PROMPT, sampling(1), conversation="good"))


def test_new_weights_are_sampled_from_and_nothing_old_is_continued(running, engine, model):
    other = tiny_model(1)

    async def main():
        before = await engine.generate(PROMPT, sampling(50), conversation="turns")
        version = await running.update(other)
        # its prefix was computed under the old weights
        prompt = [*PROMPT, *before.response_ids]
        return version, prompt, await engine.generate(prompt, sampling(50), conversation="turns")

    version, prompt, sampled = running.run(main())
    assert sampled.policy_version == version
    assert error(other, prompt, sampled) <= 1e-5


@pytest.mark.parametrize("how", ["retracted", "aborted and sent again"])
def test_responses_under_way_go_on_under_new_weights(running, engine, model, monkeypatch, how):
    if how != "retracted":
        monkeypatch.setattr(engine, "_retracts", False)
    elif not engine._retracts:
        pytest.skip("this SGLang can't retract")
    other, asked = tiny_model(1), prompts(8)
    before = running.policy_version

    async def main():
        async with asyncio.TaskGroup() as tg:
            playing = [tg.create_task(engine.generate(p, sampling(300), conversation="x")) for p in asked]
            await until_running(engine, len(asked))
            await running.update(other)
        return [task.result() for task in playing]

    for prompt, sampled in zip(asked, running.run(main()), strict=True):
        old, new = sampled.version_spans
        assert (old.policy_version, new.policy_version) == (before, before + 1)
        assert sampled.policy_version == before
        assert (old.start, old.end, new.end) == (0, new.start, 300)
        assert len(sampled.response_ids) == 300
        assert error(model, prompt, sampled, 0, old.end) <= 1e-5
        assert error(other, prompt, sampled, new.start) <= 1e-5


def test_requests_that_wait_for_a_slot_are_aborted_and_sent_again_too(running, engine, model, monkeypatch):
    monkeypatch.setattr(engine, "_retracts", False)
    asked = prompts(CONFIG.slots + 6)

    async def main():
        answers = asyncio.create_task(all_of(engine, asked, sampling(100)))
        async with asyncio.timeout(60):
            while not engine.load().waiting:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        await running.update(model)
        return await answers

    for prompt, sampled in zip(asked, running.run(main()), strict=True):
        assert len(sampled.response_ids) == 100
        assert error(model, prompt, sampled) <= 1e-5


def test_a_cancelled_request_leaves_the_scheduler(running, engine):
    async def main():
        task = asyncio.create_task(engine.generate(PROMPT, sampling(390), conversation="cancelled"))
        await until_running(engine, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until_running(engine, 0)

    running.run(main())


def test_a_missed_deadline_is_an_engine_error_and_leaves_the_scheduler(running, engine, monkeypatch):
    monkeypatch.setattr(engine, "_config", CONFIG.model_copy(update={"request_timeout_s": 0.1}))

    async def main():
        with pytest.raises(EngineError, match="did not answer in 0.1 s"):
            await engine.generate(PROMPT, sampling(390), conversation="late")
        await until_running(engine, 0)

    running.run(main())


def test_time_in_which_new_weights_come_is_no_requests(running, engine, model, monkeypatch):
    take = engine._take_buckets

    async def main():
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(engine.generate(PROMPT, sampling(390), conversation="late"))
        await until_running(engine, 1)
        (under_way,), due = engine._under_way, loop.time() + 0.2
        under_way.own.reschedule(due)

        async def take_late(*weights):
            # the clock is the loop's
            while loop.time() <= due:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await take(*weights)

        monkeypatch.setattr(engine, "_take_buckets", take_late)
        await running.update(model)
        return await task

    assert len(running.run(main()).version_spans) == 2


def test_time_in_which_new_weights_come_is_no_episodes(running, engine, model, monkeypatch):
    take = engine._take_buckets

    async def main():
        loop = asyncio.get_running_loop()

        async def episode() -> Sampled:
            async with asyncio.timeout(60) as whole:
                with deadlines_of(whole):
                    episodes.append(whole)
                    return await engine.generate(PROMPT, sampling(390), conversation="episode")

        episodes: list[asyncio.Timeout] = []
        before = asyncio.create_task(episode())
        await until_running(engine, 1)

        async def take_late(*weights):
            playing.append(asyncio.create_task(episode()))
            await asyncio.sleep(0)
            assert [whole.when() for whole in episodes] == [None, None]
            await take(*weights)

        playing: list[asyncio.Task[Sampled]] = [before]
        monkeypatch.setattr(engine, "_take_buckets", take_late)
        await running.update(model)
        assert all(loop.time() < (whole.when() or 0) <= loop.time() + 60 for whole in episodes)
        return [await task for task in playing]

    assert [len(sampled.response_ids) for sampled in running.run(main())] == [390, 390]


def test_one_that_sleeps_takes_no_core_unless_it_must_keep_requests(running, engine, model, monkeypatch):
    """The scheduler's loop waits where there is nothing to do, and turns without rest where it is paused."""
    pauses, pause = [], engine._tm.pause_generation

    async def counted(request):
        pauses.append(request.mode)
        await pause(request)

    async def main():
        monkeypatch.setattr(engine._tm, "pause_generation", counted)
        await engine.generate(PROMPT, sampling(5), conversation="over")
        await engine.sleep()
        assert not pauses
        asked = asyncio.create_task(engine.generate(PROMPT, sampling(5), conversation="asleep"))
        await asyncio.sleep(0)
        assert not engine._calls
        await running.update(model)
        assert not pauses
        assert len((await asked).response_ids) == 5
        asked = asyncio.create_task(engine.generate(PROMPT, sampling(390), conversation="under way"))
        await until_running(engine, 1)
        await engine.sleep()
        assert pauses == ["retract"]
        await running.update(model)
        assert len((await asked).response_ids) == 390

    running.run(main())


def test_prompts_being_computed_are_progress_although_nothing_is_said_of_them(running, engine):
    tm, io = engine._tm, engine._io

    async def main():
        # fifty tokens, after which it says something, take seconds
        await tm.slow_down(io.SlowDownReqInput(forward_sleep_time=0.1))
        said, computed, progress = tm.last_receive_tstamp, engine.load().prefill_tokens, engine.progress
        task = asyncio.create_task(engine.generate([9] * 50, sampling(300), conversation="long"))
        async with asyncio.timeout(60):
            while engine.load().prefill_tokens == computed:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        assert tm.last_receive_tstamp == said
        assert engine.progress > progress
        await tm.slow_down(io.SlowDownReqInput(forward_sleep_time=None))
        task.cancel()
        await until_running(engine, 0)

    running.run(main())


def test_sigterm_stays_ours(running, engine):
    async def main():
        seen = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, seen.set)
        await engine.generate(PROMPT, sampling(2), conversation="signal")
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            async with asyncio.timeout(5):
                await seen.wait()
        finally:
            loop.remove_signal_handler(signal.SIGTERM)

    running.run(main())


def test_a_model_that_can_not_be_loaded_is_an_engine_error_and_leaves_nothing(running, engine, folder, monkeypatch):
    """In this process, which SGLang would end with it."""
    # short names, for they are those of sockets, too
    with tempfile.TemporaryDirectory() as models, tempfile.TemporaryDirectory() as sockets:
        monkeypatch.setattr(tempfile, "tempdir", sockets)
        broken = Path(models)
        for file in folder.iterdir():
            (broken / file.name).write_bytes(file.read_bytes())
        (broken / "model.safetensors").write_bytes(b"not one")

        async def main():
            with pytest.raises(EngineError, match="did not start"):
                async with sglang_engine(CONFIG, broken, max_tokens=MAX_TOKENS):
                    raise AssertionError("it started")

        before, memory = children(), set(Path("/dev/shm").glob("sglang*"))
        running.run(main())
        assert children() == before
        # others' may have gone meanwhile
        assert set(Path("/dev/shm").glob("sglang*")) <= memory
        assert not list(Path(sockets).iterdir())
    running.run(engine.generate(PROMPT, sampling(2), conversation="the other one lives"))


def test_a_setting_that_is_not_json_is_refused(running, folder):
    async def main():
        config = CONFIG.model_copy(update={"sglang": ("attention_backend=triton",)})
        with pytest.raises(UsageError, match="value in JSON"):
            async with sglang_engine(config, folder, max_tokens=MAX_TOKENS):
                raise AssertionError("it started")

    running.run(main())


def test_a_request_that_sglang_refuses_is_an_engine_error_and_the_others_go_on(running, folder):
    async def main():
        config = CONFIG.model_copy(update={"slots": 2, "sglang": ("max_queued_requests=1",)})
        async with sglang_engine(config, folder, max_tokens=MAX_TOKENS) as engine:
            asked = (engine.generate(p, sampling(50), conversation=str(i)) for i, p in enumerate(prompts(8)))
            answers = await asyncio.gather(*asked, return_exceptions=True)
            assert engine.failure is None
            return answers

    answers = running.run(main())
    refused = [answer for answer in answers if isinstance(answer, BaseException)]
    assert refused
    assert all(isinstance(e, EngineError) and "queue is full" in str(e) for e in refused)
    assert {len(s.response_ids) for s in answers if isinstance(s, Sampled)} == {50}


def test_a_prompt_that_sglang_refuses_is_an_engine_error(running, engine, monkeypatch):
    monkeypatch.setattr(engine, "_max_tokens", 2 * MAX_TOKENS)
    with pytest.raises(EngineError, match="refused a request: .*context length"):
        running.run(engine.generate([1] * (MAX_TOKENS + 50), sampling(), conversation="long"))


def test_an_engine_without_room_for_a_context_is_refused_at_its_start(running, folder):
    async def main():
        config = CONFIG.model_copy(update={"sglang": ("max_total_tokens=256",)})
        with pytest.raises(UsageError, match=f"of 250 tokens, but a context may have {MAX_TOKENS}: raise"):
            async with sglang_engine(config, folder, max_tokens=MAX_TOKENS):
                raise AssertionError("it started")

    running.run(main())


def test_weights_from_a_folder_are_sampled_from(running, engine, tmp_path):
    other = tiny_model(1)
    other.save_pretrained(tmp_path)

    async def main():
        running.policy_version += 1
        task = asyncio.create_task(engine.generate(PROMPT, sampling(300), conversation="x"))
        await until_running(engine, 1)
        await engine.update_weights(running.policy_version, tmp_path)
        return await task

    sampled = running.run(main())
    assert sampled.version_spans[-1].policy_version == running.policy_version
    assert error(other, PROMPT, sampled, sampled.version_spans[-1].start) <= 1e-5


def test_it_sleeps_and_wakes_twenty_times_with_requests_under_way(running, engine, model):
    # the second one is what it has now
    models, asked = [tiny_model(1), model], prompts(20)

    async def main():
        playing = []
        for cycle, prompt in enumerate(asked):
            prefilled = engine.load().prefill_tokens
            playing.append(asyncio.create_task(engine.generate(prompt, sampling(200), conversation="awake")))
            async with asyncio.timeout(30):
                # what was retracted is computed anew, or this prompt is
                while engine.load().prefill_tokens == prefilled:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            await engine.sleep()
            # asked of one that sleeps: it waits
            playing.append(asyncio.create_task(engine.generate(prompt, sampling(10), conversation="asleep")))
            await asyncio.sleep(0.02)
            assert not playing[-1].done()
            await running.update(models[cycle % 2])
        return [await task for task in playing]

    first = running.policy_version + 1
    answers, cut = running.run(main()), 0
    for i, sampled in enumerate(answers):
        cycle, asleep = divmod(i, 2)
        assert len(sampled.response_ids) == (10 if asleep else 200)
        spans = sampled.version_spans
        cut += len(spans) > 1
        # never older than when it was asked
        assert spans[0].policy_version >= first + cycle - (not asleep)
        for span in spans:
            by = models[(span.policy_version - first) % 2]
            assert error(by, asked[cycle], sampled, span.start, span.end) <= 1e-5
    assert cut, "no response was cut"


def test_the_account_says_what_was_computed_and_what_was_found(running, engine, model):
    async def main():
        before = engine.load()
        first = await engine.generate(PROMPT, sampling(100), conversation="account")
        prompt = [*PROMPT, *first.response_ids, 5, 6]
        second = await engine.generate(prompt, sampling(10), conversation="account")
        # new weights: nothing is found, and what had been computed is so again
        await running.update(model)
        longer = [*prompt, *second.response_ids]
        await engine.generate(longer, sampling(10), conversation="account")
        async with asyncio.timeout(30):
            # written down after it is said
            while engine.load().prefill_tokens - before.prefill_tokens < len(PROMPT) + 2 + len(longer):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return before, engine.load(), second.cached_tokens, len(prompt), len(longer)

    before, after, cached, prompt, longer = running.run(main())
    assert after.decoded_tokens - before.decoded_tokens == 120
    assert after.cached_tokens - before.cached_tokens == cached
    assert after.prefill_tokens - before.prefill_tokens == len(PROMPT) + (prompt - cached) + longer
    assert after.recomputed_tokens - before.recomputed_tokens == (prompt - 3 - cached) + longer - 1
    assert after.prefill_s > before.prefill_s
    assert after.decode_s > before.decode_s


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_logits_that_are_not_finite_are_a_loud_failure(running, engine, temperature):
    diverged = tiny_model(0)
    torch.nn.init.constant_(diverged.get_parameter("model.norm.weight"), float("nan"))

    async def main():
        await running.update(diverged)
        with pytest.raises(EngineError, match="not finite: did training diverge"):
            await engine.generate(PROMPT, sampling(5, temperature=temperature), conversation="diverged")

    running.run(main())


def test_refused_weights_end_the_engine_with_the_reason(running, engine):
    # it may say so, or die of it
    reason = "could not take the weights of version 1000|ended with exit status"
    payload, _memory = serialize_bucket([("model.norm.weight", torch.ones(7))])

    async def main():
        with pytest.raises(EngineError, match=reason):
            await engine.update_weights(1000, [[payload]])
        with pytest.raises(EngineError, match=reason):
            await engine.generate(PROMPT, sampling(), conversation="after")

    running.run(main())


def test_a_driver_killed_while_an_engine_starts_leaves_no_process(folder):
    import psutil

    code = f"""
import asyncio
from pathlib import Path
from l0fast.engine.sglang import sglang_engine
from tests.engine.real_sglang import CONFIG, MAX_TOKENS

async def main():
    async with sglang_engine(CONFIG, Path({str(folder)!r}), max_tokens=MAX_TOKENS):
        pass

asyncio.run(main())
"""
    with stand_ins():
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        driver = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.DEVNULL)
    started: list[psutil.Process] = []
    try:
        # scheduler, detokenizer, and multiprocessing's tracker
        while len(started) < 3:
            assert driver.poll() is None, "it ended before its children were started"
            started = psutil.Process(driver.pid).children(recursive=True)
            time.sleep(0.01)
    finally:
        driver.kill()
        driver.wait()
    _, left = psutil.wait_procs(started, timeout=120)
    for process in left:
        process.kill()
    assert not left
