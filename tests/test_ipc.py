"""ipc: calls to a real child, what its death does, and weights that are seen on the other side."""

import asyncio
import json
import os
import re
import signal
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from l0fast.errors import EngineError, UsageError
from l0fast.ipc import Channel, SharedBytes, SharedWeights, _encode, shared_bytes, shared_weights, spawn_worker
from l0fast.signs import Sign

CHILD = """
    import os, sys, time
    from l0fast.errors import UsageError
    from l0fast.ipc import Channel, SharedWeights

    channel, args = Channel.open()
    if args.get("slow"):
        print("loading", file=sys.stderr)
        time.sleep(600)
    if args.get("crash"):
        print("no such model", file=sys.stderr)
        sys.exit(7)
    if args.get("refuses"):
        channel.refuse(UsageError("model = 'x' is none: give another"))
        sys.exit(0)
    channel.ready(greeting="hello", pid=os.getpid())
    held = []
    try:
        while True:
            message = channel.recv()
            op = message.header["op"]
            if op == "echo":
                channel.reply(message, message.payload[::-1], x=message.header["x"] + 1)
            elif op == "zeros":
                channel.reply(message, bytes(message.header["count"]))
            elif op == "hold":
                held.append(message)
            elif op == "release":
                for one in [*reversed(held), message]:
                    channel.reply(one, held=len(held))
                held.clear()
            elif op == "slow but sure":
                for i, (limit_s, pause_s) in enumerate(message.header["parts"]):
                    channel.progress(f"part {i}", limit_s)
                    time.sleep(pause_s)
                channel.reply(message)
            elif op == "stops itself":
                for i in range(message.header["parts"]):
                    channel.progress(f"part {i}", message.header["limit_s"])
                os.kill(os.getpid(), message.header["signal"])
            elif op == "cores":
                import torch

                channel.reply(message, cores=len(os.sched_getaffinity(0)))
            elif op == "bad":
                channel.fail(message, KeyError("nothing here"))
            elif op == "fork":
                channel.reply(message, child=os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "600"))
            elif op == "stuck":
                channel.reply(message)
                while True:
                    time.sleep(600)
            elif op == "hang up":
                channel._sock.close()
                time.sleep(600)
            elif op == "die":
                print("x" * 5000, "out of luck", file=sys.stderr)
                os._exit(3)
            elif op == "weights":
                weights = SharedWeights.attach(args["weights"])
                for tensor in weights.tensors().values():
                    tensor.add_(1)
                weights.policy_version += 1
                channel.reply(message)
    except EOFError:
        pass
"""


@pytest.fixture
def spawn(tmp_path, monkeypatch):
    (tmp_path / "ipc_child.py").write_text(textwrap.dedent(CHILD))
    monkeypatch.syspath_prepend(str(tmp_path))

    def spawn(*, start_timeout_s=30.0, pass_fds=(), stderr_path=None, close_timeout_s=5.0, **args):
        return spawn_worker(
            "ipc_child",
            args=args,
            name="the child",
            error=EngineError,
            start_timeout_s=start_timeout_s,
            pass_fds=pass_fds,
            stderr_path=stderr_path,
            close_timeout_s=close_timeout_s,
        )

    return spawn


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_call_carries_fields_and_bytes_both_ways(spawn):
    payload = np.arange(1_000_000, dtype=np.int32).tobytes()

    async def main():
        async with spawn() as worker:
            assert worker.ready["greeting"] == "hello"
            return await worker.call("echo", payload, timeout_s=10, x=41)

    header, answer = asyncio.run(main())
    assert header["x"] == 42
    assert answer == payload[::-1]


def test_answers_find_their_callers_in_any_order(spawn):
    async def main():
        async with spawn() as worker, asyncio.TaskGroup() as tg:
            held = [tg.create_task(worker.call("hold", timeout_s=10)) for _ in range(3)]
            echoes = [tg.create_task(worker.call("echo", b"ab", timeout_s=10, x=i)) for i in range(100)]
            for i, echo in enumerate(echoes):
                assert (await echo)[0]["x"] == i + 1
            assert not any(h.done() for h in held)
            await worker.call("release", timeout_s=10)
        return [h.result()[0]["held"] for h in held]

    assert asyncio.run(main()) == [3, 3, 3]


def test_a_failure_in_the_child_is_ours_and_the_child_goes_on(spawn):
    async def main():
        async with spawn() as worker:
            with pytest.raises(EngineError, match="failed at 'bad': KeyError: 'nothing here'"):
                await worker.call("bad", timeout_s=10)
            return (await worker.call("echo", timeout_s=10, x=0))[0]["x"]

    assert asyncio.run(main()) == 1


def test_death_fails_every_call_with_status_and_last_words(spawn):
    async def main():
        async with spawn() as worker:
            calls = [asyncio.create_task(worker.call("hold", timeout_s=60)) for _ in range(3)]
            calls.append(asyncio.create_task(worker.call("die", timeout_s=60)))
            failures = await asyncio.gather(*calls, return_exceptions=True)
            with pytest.raises(EngineError, match="exit status 3"):
                await worker.call("echo", timeout_s=10, x=0)
            worker.notify("hold")
            return failures

    for failure in asyncio.run(main()):
        assert isinstance(failure, EngineError)
        assert "ended with exit status 3" in str(failure)
        assert str(failure).endswith("out of luck")
        assert len(str(failure)) < 3000


def test_a_killed_child_is_noticed_within_a_second(spawn):
    async def main():
        async with spawn() as worker:
            call = asyncio.create_task(worker.call("hold", timeout_s=60))
            await worker.call("echo", timeout_s=10, x=0)
            os.kill(worker.pid, signal.SIGKILL)
            async with asyncio.timeout(1):
                with pytest.raises(EngineError, match="killed by SIGKILL, as the kernel does where memory is short"):
                    await call

    asyncio.run(main())


def test_a_child_that_hangs_up_and_does_not_end_is_not_said_to_have_been_killed(spawn, monkeypatch):
    monkeypatch.setattr("l0fast.ipc._LINGER_S", 0.05)

    async def main():
        async with spawn() as worker:
            with pytest.raises(EngineError, match=r"hung up, and was ended as it had not ended 0.05 s later"):
                await worker.call("hang up", timeout_s=60)

    asyncio.run(main())


def test_a_child_that_does_not_start_says_why(spawn):
    async def main():
        async with spawn(crash=True):
            raise AssertionError("it started")

    with pytest.raises(EngineError, match=r"exit status 7; its last words:\nno such model"):
        asyncio.run(main())


def test_what_a_child_refuses_is_the_users_to_set_right(spawn):
    async def main():
        async with spawn(refuses=True):
            raise AssertionError("it started")

    with pytest.raises(UsageError, match="^model = 'x' is none: give another$"):
        asyncio.run(main())


def test_a_child_that_is_slow_to_start_is_killed_at_once(spawn, tmp_path):
    async def main():
        async with spawn(start_timeout_s=1.0, close_timeout_s=600.0, stderr_path=tmp_path / "log", slow=True):
            raise AssertionError("it started")

    said = r"did not answer 'start' in 1 s \(a slow disk may need a higher start_timeout_s\); its last words:\nloading"
    with pytest.raises(EngineError, match=said + r"\nCurrent thread.*\n.*ipc_child\.py"):
        asyncio.run(main())


def test_a_missed_deadline_names_the_call(spawn):
    async def main():
        async with spawn() as worker:
            with pytest.raises(EngineError, match="did not answer 'hold' in 0.01 s"):
                await worker.call("hold", timeout_s=0.01)
            # its late answer is nobody's, and disturbs nobody
            assert (await worker.call("release", timeout_s=10))[0]["held"] == 1
            assert (await worker.call("echo", timeout_s=10, x=1))[0]["x"] == 2

    asyncio.run(main())


def test_signs_of_progress_put_the_deadline_off(spawn):
    async def main():
        async with spawn(close_timeout_s=0.1) as worker:
            # longer than the deadline together, each far shorter
            await worker.call("slow but sure", timeout_s=1.0, parts=[(1.0, 0.1)] * 12)
            # the sign's own limit counts, not the request's
            with pytest.raises(EngineError, match="silent for too long at 'slow but sure', at: part 0, without a word"):
                await worker.call("slow but sure", timeout_s=0.1, parts=[(0.3, 600.0)])

    asyncio.run(main())


def test_a_sign_that_promises_nothing_leaves_the_deadline_and_an_answer_ends_what_was_promised(spawn):
    async def main():
        async with spawn(close_timeout_s=0.1) as worker:
            await worker.call("slow but sure", timeout_s=10, parts=[(600.0, 0.0)] * 3)
            assert worker.sign == Sign("", 0.0, 0)
            with pytest.raises(EngineError, match="did not answer 'slow but sure' in 0.3 s, at: part 0"):
                await worker.call("slow but sure", timeout_s=0.3, parts=[(0.0, 600.0)])
            assert worker.sign == Sign("part 0", 0.0, 1)

    asyncio.run(main())


def test_the_last_sign_counts_and_not_the_one_that_promised_more(spawn):
    async def main():
        async with spawn(close_timeout_s=0.1) as worker, asyncio.timeout(20):
            with pytest.raises(EngineError, match="at: part 1"):
                await worker.call("slow but sure", timeout_s=0.1, parts=[(600.0, 0.3), (0.1, 600.0)])

    asyncio.run(main())


@pytest.mark.parametrize("stop", [signal.SIGSTOP, signal.SIGKILL])
def test_one_that_can_no_longer_say_what_it_was_at_has_said_it(spawn, stop):
    how = {
        signal.SIGSTOP: "silent for too long at 'stops itself', at: part 2; it is stopped, by a SIGSTOP",
        signal.SIGKILL: "was killed by SIGKILL, at: part 2",
    }

    async def main():
        async with spawn(close_timeout_s=0.1) as worker:
            with pytest.raises(EngineError, match=how[stop]):
                await worker.call("stops itself", timeout_s=0.1, parts=3, limit_s=0.1, signal=stop)

    asyncio.run(main())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_child_that_is_told_to_end_with_all_others_is_there_while_its_driver_saves(spawn, number):
    async def main():
        async with spawn() as worker, asyncio.timeout(20):
            os.kill(worker.pid, number)
            _, payload = await worker.call("echo", b"saved", timeout_s=10, x=1)
            return payload, worker.pid

    payload, pid = asyncio.run(main())
    assert payload == b"devas"
    assert not alive(pid)


def test_what_a_child_starts_can_be_told_to_end(spawn):
    async def main():
        async with spawn() as worker:
            header, _ = await worker.call("fork", timeout_s=10)
            return ignored(header["child"])

    # Python has its own programs ignore SIGPIPE and SIGXFSZ, and a script those that it runs in the background SIGQUIT
    assert asyncio.run(main()) <= {signal.SIGPIPE, signal.SIGXFSZ} | ignored(os.getpid())


def ignored(pid: int) -> set[int]:
    (mask,) = re.findall(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return {number for number in range(1, 32) if int(mask, 16) >> (number - 1) & 1}


def test_a_child_has_all_cores_where_the_environment_binds_openmp_to_some(spawn, monkeypatch):
    for name, value in (("OMP_PROC_BIND", "close"), ("OMP_PLACES", "cores"), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, value)

    async def main():
        async with spawn() as worker:
            return (await worker.call("cores", timeout_s=60))[0]["cores"]

    assert asyncio.run(main()) == len(os.sched_getaffinity(0))


def test_a_driver_that_was_held_up_still_takes_the_answer_that_waits(spawn):
    async def main():
        async with spawn() as worker:
            # more than one read takes
            call = asyncio.create_task(worker.call("zeros", timeout_s=0.1, count=1 << 20))
            await asyncio.sleep(0)
            # as Ctrl-Z would; the answer begins long before it ends
            time.sleep(0.3)  # noqa: ASYNC251
            return (await call)[1]

    assert asyncio.run(main()) == bytes(1 << 20)


def test_a_child_that_hangs_says_where_in_its_last_words(spawn):
    async def main():
        async with spawn(close_timeout_s=0.1) as worker:
            await worker.call("stuck", timeout_s=10)
            with pytest.raises(
                EngineError, match=r"did not answer 'echo' in 0.01 s, without a word\nCurrent thread.*\n.*ipc_child\.py"
            ):
                await worker.call("echo", timeout_s=0.01, x=1)

    asyncio.run(main())


def test_leaving_the_block_ends_the_child_and_what_it_started(spawn):
    async def main():
        async with spawn(close_timeout_s=0.1) as worker:
            sleeper = (await worker.call("fork", timeout_s=10))[0]["child"]
            await worker.call("stuck", timeout_s=10)
            assert alive(worker.pid)
            assert alive(sleeper)
        return worker.pid, sleeper

    before = set(os.listdir("/proc/self/fd"))
    pid, sleeper = asyncio.run(main())
    assert not alive(pid)
    # its new parent reaps it when it likes; a killed process runs no more
    deadline = time.monotonic() + 5
    while alive(sleeper) and time.monotonic() < deadline:
        os.sched_yield()
    assert not alive(sleeper)
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_willing_child_ends_by_itself(spawn):
    async def main():
        async with spawn() as worker:
            pass
        return worker

    worker = asyncio.run(main())
    assert worker._process.returncode == 0


def test_the_child_dies_with_a_killed_driver(spawn, tmp_path):
    driver = """
        import asyncio, os, sys
        from l0fast.errors import EngineError
        from l0fast.ipc import spawn_worker

        async def main():
            async with spawn_worker("ipc_child", args={}, name="c", error=EngineError, start_timeout_s=30) as worker:
                await worker.call("stuck", timeout_s=30)
                print(worker.pid, flush=True)
                await asyncio.sleep(600)

        asyncio.run(main())
    """
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    code = textwrap.dedent(driver)
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert alive(pid)
        process.kill()
        process.wait()
    deadline = time.monotonic() + 5
    while alive(pid) and time.monotonic() < deadline:
        os.sched_yield()
    assert not alive(pid)


def test_what_the_child_prints_is_kept_in_its_log(spawn, tmp_path):
    async def main():
        async with spawn(stderr_path=tmp_path / "child.log") as worker:
            with pytest.raises(EngineError):
                await worker.call("die", timeout_s=10)

    asyncio.run(main())
    assert (tmp_path / "child.log").read_text().endswith("out of luck\n")


@given(
    messages=st.lists(st.tuples(st.dictionaries(st.text(), st.integers(0, 2**31)), st.binary()), max_size=5),
    cuts=st.lists(st.integers(1, 30), max_size=30),
)
def test_frames_survive_any_fragmentation(messages, cuts):
    channel = Channel(None, None)  # type: ignore[arg-type]
    stream = b"".join(_encode(header, payload) for header, payload in messages)
    received = []
    for cut in [*cuts, len(stream)]:
        channel._buffer += stream[:cut]
        stream = stream[cut:]
        while (message := channel._parse()) is not None:
            received.append(tuple(message))
    assert received == messages


# --- large things


def test_shared_bytes_grow_and_are_seen_without_copies():
    with shared_bytes("test") as writer:
        reader = SharedBytes(writer.fd)
        writer.reserve(3)[:] = b"abc"
        seen = reader.view(3)
        assert bytes(seen) == b"abc"
        writer.reserve(3)[:1] = b"x"
        assert bytes(seen) == b"xbc"
        writer.reserve(1_000_000)[3:] = b"y" * 999_997
        assert bytes(reader.view(1_000_000)) == b"xbc" + b"y" * 999_997
        assert bytes(seen) == b"xbc", "an old view stays what it was"
        assert len(writer.reserve(2)) == 2
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(writer.fd)


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = {
        "model.embed_tokens.weight": torch.randn(7, 3, dtype=torch.bfloat16),
        "lm_head.weight": torch.randn(7, 3, dtype=torch.bfloat16),
        "model.norm.weight": torch.randn(3),
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    return folder


def test_the_layout_is_the_files_in_fp32_with_tied_weights_once(model_folder):
    with shared_weights(model_folder) as weights:
        tensors = weights.tensors()
        assert weights.policy_version == -1
        assert {name: tuple(t.shape) for name, t in tensors.items()} == {
            "model.embed_tokens.weight": (7, 3),
            "model.norm.weight": (3,),
        }
        assert all(t.dtype == torch.float32 for t in tensors.values())
        tensors["model.embed_tokens.weight"].fill_(5)
        assert tensors["model.norm.weight"].eq(0).all(), "tensors overlap"
        assert weights.policy_version == -1, "a tensor overlaps the header"
    (model_folder / "config.json").write_text("{}")
    with shared_weights(model_folder) as weights:
        assert "lm_head.weight" in weights.tensors()


def test_what_a_folder_holds_beside_its_parameters_has_no_room(model_folder):
    file = model_folder / "model.safetensors"
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file(load_file(file) | frequencies, model_folder / "model-1.safetensors")
    index = {"weight_map": dict.fromkeys(load_file(file), "model-1.safetensors")}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    # as Mistral ships them
    save_file({"tok_embeddings.weight": torch.ones(7, 3)}, model_folder / "consolidated.safetensors")
    file.unlink()
    with shared_weights(model_folder) as weights:
        assert weights.tensors().keys() == {"model.embed_tokens.weight", "model.norm.weight"}


def test_what_a_child_writes_is_seen_here_without_copies(spawn, model_folder):
    async def main(weights: SharedWeights):
        tensors = weights.tensors()
        async with spawn(pass_fds=(weights.fd,), weights=weights.handle()) as worker:
            await worker.call("weights", timeout_s=60)
        return tensors

    with shared_weights(model_folder) as weights:
        tensors = asyncio.run(main(weights))
        assert weights.policy_version == 0
        assert all(t.eq(1).all() for t in tensors.values())
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(weights.fd)


@pytest.mark.parametrize(
    "content", [None, b"", b"12345678", struct.pack("<Q", 1 << 40) + b"{}", struct.pack("<Q", 2) + b"x}"]
)
def test_a_folder_without_readable_weights_is_one_sentence(model_folder, content):
    file = model_folder / "model.safetensors"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(UsageError, match="safetensors") as caught, shared_weights(model_folder):
        pass
    assert str(model_folder) in str(caught.value)
    assert "\n" not in str(caught.value)
