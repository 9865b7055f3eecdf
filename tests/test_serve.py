"""A policy behind transformers' real server, in a process of its own: it says what the policy says, and leaves nothing."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import proxy_bypass_environment

import pytest

import l0fast.serve
from l0fast.agent.chat import Chat
from l0fast.ask import ask
from l0fast.children import child
from l0fast.engine.base import SampledText, Sampling
from l0fast.engine.openai import EndpointConfig, openai_engine
from l0fast.errors import EngineError, UsageError
from l0fast.policies import MODELS
from l0fast.serve import PLAIN_SAMPLING, _answers, _command, _lay_out, main, serve
from l0fast.types import TrajectoryStatus
from tests.command import children_of, wait_until_gone

# all that a busy machine may take to import torch twice
pytestmark = pytest.mark.timeout(400)

ROOT = Path(__file__).parents[1]
QUESTIONS = ("What is the capital of Norway?", "Which currency is used in Peru?", "In which country is Bergen?")


@contextlib.contextmanager
def served(*words: str) -> Iterator[str]:
    """The command as a user runs it, until Ctrl-C; its address."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "l0fast.serve", *words]
    with subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            url = re.search(r"http://[^,\s]+", line)
            assert url, process.stderr and process.stderr.read()
            family = {process.pid, *children_of(process.pid)}
            assert len(family) >= 2
            yield url[0]
        finally:
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert not wait_until_gone(family)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    temporary = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        with served("geography", "--port", "0") as found:
            yield found
    assert not [file.name for file in temporary.iterdir()]


def messages(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Answer by Python."}, {"role": "user", "content": question}]


def say(url: str, question: str, *, temperature: float, seed: int = 0, streams: bool = False) -> SampledText:
    told: list[str] = []

    async def run() -> SampledText:
        config = EndpointConfig(url=url, model="geography", attempts=1, timeout_s=60.0)
        on_text = (lambda conversation, text: told.append(text)) if streams else None
        async with openai_engine(config, on_text=on_text) as engine:
            sampling = Sampling(max_new_tokens=40, stop_token_ids=(), temperature=temperature, seed=seed)
            return await engine.generate(messages(question), sampling, conversation="c")

    said = asyncio.run(run())
    assert not streams or "".join(told) == said.text
    return said


@pytest.mark.slow
def test_the_likeliest_answer_is_the_policys_own_word_for_word(url: str):
    import torch
    from transformers import AutoModelForCausalLM

    chat = Chat(MODELS / "geography")
    model = AutoModelForCausalLM.from_pretrained(MODELS / "geography", dtype="auto")
    for question in QUESTIONS:
        prompt = chat.first_prompt("Answer by Python.", question)
        with torch.no_grad():
            out = model.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
        ids = out[0, len(prompt) :].tolist()
        for streams in (False, True):
            said = say(url, question, temperature=0.0, streams=streams)
            assert said.text == chat.decode(ids)
            assert said.prompt_tokens == len(prompt)
            assert said.finish_reason == ("stop" if ids[-1] in chat.stop_token_ids else "length")
    assert "<think>" in said.text
    assert "<code>" in said.text


@pytest.mark.slow
def test_it_samples_as_training_does_and_a_seed_repeats_it(url: str):
    texts = [say(url, QUESTIONS[0], temperature=1.0, seed=seed).text for seed in range(6)]
    assert len(set(texts)) > 1
    assert say(url, QUESTIONS[0], temperature=1.0, seed=3).text == texts[3]


@pytest.mark.slow
def test_nb_agent_asks_it(url: str):
    settings = {"agent": {"prompt": "compact", "context_tokens": 640, "max_new_tokens": 72}, "max_turns": 5}
    trajectory = asyncio.run(
        ask(
            QUESTIONS[0], endpoint=url, model="geography", tools=["geography"], settings=settings | {"temperature": 0.0}
        )
    )
    assert trajectory.status in (TrajectoryStatus.COMPLETED, TrajectoryStatus.TRUNCATED_TURNS), trajectory.cause
    assert any(turn.calls for turn in trajectory.turns)


@pytest.mark.slow
def test_another_model_is_refused_in_the_servers_words(url: str):
    async def run() -> None:
        async with openai_engine(EndpointConfig(url=url, model="other")) as engine:
            await engine.generate(messages("Hi"), Sampling(max_new_tokens=4, stop_token_ids=()), conversation="c")

    with pytest.raises(EngineError, match="pinned to 'geography'"):
        asyncio.run(run())


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::", "10.1.2.3"])
def test_a_server_reaches_itself_past_a_proxy(monkeypatch, host: str):
    """As on a cluster's nodes, from where the world is reached by one."""
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "intranet")
    env: dict[str, str] = {}

    @contextlib.asynccontextmanager
    async def starts(*words: str, env: dict[str, str], into: dict[str, str] = env, **rest: object):
        into |= env
        yield

    async def main() -> str:
        async with serve("geography", server="transformers", host=host) as found:
            return found.url

    monkeypatch.setattr(l0fast.serve, "child", starts)
    monkeypatch.setattr(l0fast.serve, "_which", lambda server: server)
    monkeypatch.setattr(l0fast.serve, "_free_port", lambda host, port: 8000)
    monkeypatch.setattr(l0fast.serve, "_answers", lambda *args: asyncio.sleep(0))
    itself = urlsplit(asyncio.run(main())).hostname
    assert itself
    for name in (itself, "localhost", "intranet"):
        assert proxy_bypass_environment(name, {"no": env["no_proxy"]})
    assert not proxy_bypass_environment("example.org", {"no": env["no_proxy"]})


async def wait_for_an_answer(module: str, *words: str, timeout_s: float) -> None:
    async with child(module, *words, name="the server") as process:
        await _answers(f"http://127.0.0.1:{words[0] if words else 1}", process, timeout_s)


def test_where_no_socket_of_sglangs_would_fit_it_is_said_before_it_starts(monkeypatch, tmp_path: Path):
    place = tmp_path / ("s" * (107 - len(str(tmp_path)) - len("/l0fast-serve-xxxxxxxx/temporary")))
    place.mkdir()

    async def main() -> None:
        async with serve("geography", port=0, server="sglang"):
            pass

    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setattr(l0fast.serve, "_which", lambda server: server)
    with pytest.raises(UsageError, match=rf"^TMPDIR = {place}/.* set TMPDIR to a shorter one"):
        asyncio.run(main())
    assert not any(place.iterdir())


def test_a_server_that_dies_is_told_in_its_own_words():
    with pytest.raises(EngineError, match="the server ended with code 1; its last words:(.|\n)*No module named"):
        asyncio.run(wait_for_an_answer("no_such_server", timeout_s=60))


def test_a_server_that_never_answers_is_left_at_the_deadline():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # it is there, but has no /health
    with pytest.raises(EngineError, match="did not answer at .* within 1 s"):
        asyncio.run(wait_for_an_answer("http.server", port, "--bind", "127.0.0.1", timeout_s=1))


def test_a_taken_port_is_one_sentence(capsys: pytest.CaptureFixture[str]):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["geography", "--port", str(taken.getsockname()[1])]) == 2
    error = capsys.readouterr().err
    assert "can't be had" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["no/such/model"], "no policy that ships (geography)"),
        (["geography", "--port", "70000"], "--port 70000: ports are"),
        (["geography", "--host", "256.1.1.1"], "can't be had"),
    ],
)
def test_what_can_be_set_right_is_one_sentence(words: list[str], part: str, capsys: pytest.CaptureFixture[str]):
    assert main([*words, *(["--port", "0"] if "--port" not in words else [])]) == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1


def test_of_a_makers_way_of_sampling_nothing_is_left(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("")
    theirs = {"eos_token_id": [1, 2], "repetition_penalty": 1.05, "min_p": 0.1, "temperature": 0.7, "max_length": 20}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(theirs))
    _lay_out(tmp_path / "model", tmp_path / "served")
    served = json.loads((tmp_path / "served" / "generation_config.json").read_text())
    assert served == {"eos_token_id": [1, 2], **PLAIN_SAMPLING}
    assert (tmp_path / "served" / "weights").resolve() == tmp_path / "model" / "weights"


@pytest.mark.parametrize("theirs", [None, {"eos_token_id": 0}], ids=["no generation_config.json", "a base model's"])
def test_a_turn_ends_where_it_does_in_training(theirs: dict[str, int] | None, tmp_path: Path):
    folder = shutil.copytree(MODELS / "geography", tmp_path / "model")
    (folder / "generation_config.json").unlink()
    if theirs is not None:
        (folder / "generation_config.json").write_text(json.dumps(theirs))
    _lay_out(folder, tmp_path / "served")
    served = json.loads((tmp_path / "served" / "generation_config.json").read_text())
    stops = Chat(folder).stop_token_ids
    assert stops == ((2,) if theirs is None else (2, 0))
    assert served == {"eos_token_id": list(stops), "pad_token_id": 0, **PLAIN_SAMPLING}


def test_a_broken_settings_file_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "generation_config.json").write_text("[")
    assert main([str(folder), "--port", "0"]) == 2
    assert "generation_config.json is not JSON" in capsys.readouterr().err


def test_sglang_serves_in_the_precision_that_agents_sample_in():
    """A folder that the learner writes is in fp32, of which SGLang would make fp16."""
    _, words = _command("sglang", MODELS / "geography", "policy", "127.0.0.1", 1)
    assert words[words.index("--dtype") + 1] == "bfloat16"


def test_sglang_serves_the_policies_that_ship_with_the_attention_that_agents_sample_with(tmp_path: Path):
    """Its default has no kernels for their heads on most GPUs."""
    _, words = _command("sglang", MODELS / "geography", "policy", "127.0.0.1", 1)
    assert words[words.index("--attention-backend") + 1] == "triton"
    for larger in ('{"hidden_size": 1024, "num_attention_heads": 16}', '{"n_embd": 768, "n_head": 12}'):
        (tmp_path / "config.json").write_text(larger)
        assert "--attention-backend" not in _command("sglang", tmp_path, "policy", "127.0.0.1", 1)[1]


def test_sglang_serves_prompts_as_the_engines_of_a_run_compute_them():
    _, words = _command("sglang", MODELS / "geography", "policy", "127.0.0.1", 1)
    assert words[words.index("--cuda-graph-backend-prefill") + 1] == "disabled"
