"""A model over an OpenAI-compatible endpoint, by a server that others keep well.

    python -m l0fast.serve MODEL [--host HOST] [--port N] [--name NAME] [--server auto|sglang|transformers] [-- ARGUMENTS]

MODEL is a policy that ships, a model folder, a run or one of its checkpoints. Where there is a GPU and sglang, its server
is started, else `transformers serve` (pip install 'l0fast[serve]'), which answers one request after the other. ARGUMENTS go to
it as they are. It serves until Ctrl-C or SIGTERM; then nothing is left: no process, no folder.

What it says is what the policy sampled. A request that says nothing of it gets temperature 1 and all tokens, as in training;
left to itself, transformers takes the likeliest token, or what the folder's makers liked. And the text comes in one piece:
transformers would take the thinking out of it. So the folder that is served has a generation_config.json and a
tokenizer_config.json of its own, beside links to the model's files.

There is no key: whoever reaches the address may ask. It is this machine's alone unless --host says otherwise.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from l0fast.agent.chat import Chat
from l0fast.children import Child, child
from l0fast.engine.sglang_process import check_sockets, has_small_heads
from l0fast.errors import EngineError, L0fastError, UsageError
from l0fast.first_process import step_back
from l0fast.policies import Policy, open_policy
from l0fast.run_dir import command

START_TIMEOUT_S = 600.0
"""Time a server has to load its model and answer [s]."""
POLL_S = 0.25
"""Between two questions whether it is there [s]."""
PLAIN_SAMPLING = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""All that is kept of a model's own settings. A turn ends here where it does while agents are trained."""

# no look at what newer versions there are, or which models
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    url: str
    """As --endpoint takes it."""
    name: str
    """The model's there."""
    server: str
    """"sglang" or "transformers"."""
    policy: Policy
    child: Child


@asynccontextmanager
async def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    name: str = "",
    server: str = "auto",
    arguments: Sequence[str] = (),
    on_line: Callable[[str], None] = lambda line: None,
) -> AsyncIterator[Served]:
    """Serve for as long as the `async with` body runs; it answers when the body begins.

    Args:
        port: 0 takes one that is free.
        name: the model's there; empty takes that of MODEL.
        on_line: told what the server prints.

    Raises:
        UsageError: something to set right before.
        EngineError: the server ended, or did not answer in time.
    """
    server = _which(server)
    port = _free_port(host, port)
    async with open_policy(model) as policy:
        name = _name(name or policy.name)
        place = Path(tempfile.mkdtemp(prefix="l0fast-serve-"))
        try:
            models, temporary = place / "models", place / "temporary"
            for folder in (models, temporary):
                folder.mkdir()
            if server == "sglang":
                check_sockets(temporary)
            _lay_out(policy.folder, models / name)
            module, words = _command(server, policy.folder, name, host, port)
            async with child(
                module,
                *words,
                *arguments,
                name=f"{server}'s server",
                # the folder's name from here is the model's name
                cwd=models,
                env=_OFFLINE | _past_proxies(_reachable(host)) | {"TMPDIR": str(temporary)},
                on_line=on_line,
            ) as process:
                url = f"http://{_reachable(host)}:{port}"
                await _answers(url, process, START_TIMEOUT_S)
                yield Served(url=url, name=name, server=server, policy=policy, child=process)
        finally:
            shutil.rmtree(place)


def _which(server: str) -> str:
    has_sglang = os.path.exists("/dev/nvidiactl") and importlib.util.find_spec("sglang") is not None
    if server == "auto":
        server = "sglang" if has_sglang else "transformers"
    if server == "sglang" and importlib.util.find_spec("sglang") is None:
        raise UsageError("--server sglang: sglang is not installed: pip install 'l0fast[gpu]', or leave --server out")
    if server == "transformers":
        needed = ("fastapi", "uvicorn", "openai", "accelerate", "requests")
        if missing := [package for package in needed if importlib.util.find_spec(package) is None]:
            raise UsageError(f"`transformers serve` lacks {', '.join(missing)} here: pip install 'l0fast[serve]'")
    return server


def _command(server: str, folder: Path, name: str, host: str, port: int) -> tuple[str, list[str]]:
    address = ["--host", host, "--port", str(port)]
    if server == "sglang":
        return "sglang.launch_server", [
            "--model-path",
            name,
            "--served-model-name",
            name,
            *address,
            # of a folder in fp32, as the learner writes them, it would make fp16; agents sample in bf16
            "--dtype",
            "bfloat16",
            # as for the engines of a run; sglang_process.py says why
            "--cuda-graph-backend-prefill",
            "disabled",
            *(("--attention-backend", "triton") if has_small_heads(folder) else ()),
            "--sampling-defaults",
            "openai",
        ]
    return "transformers.cli.transformers", ["serve", name, *address]


def _lay_out(folder: Path, to: Path) -> None:
    """`folder` again, by links, but for what makes the model say less, or other things, than it was trained to."""
    # a maker's penalties and limits would be in force as well
    theirs = {**_read(folder / "config.json"), **_read(folder / "generation_config.json")}
    generation = {name: ids for name, ids in theirs.items() if name in SPECIAL_IDS and ids is not None}
    # not of a model whose form of chat no agent here knows: it ends where its makers say
    with suppress(UsageError):
        generation["eos_token_id"] = list(Chat(folder).stop_token_ids)
    changed = {"generation_config.json": generation | PLAIN_SAMPLING}
    special = [
        token["content"] for token in _read(folder / "tokenizer.json").get("added_tokens", []) if token["special"]
    ]
    if special:
        changed["tokenizer_config.json"] = _read(folder / "tokenizer_config.json") | {
            "response_template": _as_written(special)
        }
    to.mkdir()
    for file in folder.iterdir():
        if file.name not in changed:
            (to / file.name).symlink_to(file.absolute())
    for name, settings in changed.items():
        (to / name).write_text(json.dumps(settings))


def _as_written(special: list[str]) -> dict[str, Any]:
    """A response template of transformers that takes nothing apart: all is content, up to a special token."""
    content = {"close": special, "content": "text", "content_args": {"strip": False}}
    return {"defaults": {"role": "assistant"}, "start_anchor_pattern": r"\Z", "fields": {"content": content}}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        if isinstance(found := json.loads(path.read_text(encoding="utf-8")), dict):
            return found
    except ValueError as e:
        raise UsageError(f"{path} is not JSON ({e}): restore it from the model's source") from e
    raise UsageError(f"{path} does not hold what a model folder has there: restore it from the model's source")


def _name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "policy"


def _free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0. Raises UsageError where the address can't be had."""
    if not 0 <= port < 65536:
        raise UsageError(f"--port {port}: ports are 0 to 65535, 0 takes a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # as a server does that comes after another
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return probe.getsockname()[1]
    except OSError as e:
        raise UsageError(f"--host {host} --port {port} can't be had ({e}): give another, 0 takes a free port") from e


def _reachable(host: str) -> str:
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}
    return everywhere.get(host, f"[{host}]" if ":" in host else host)


def _past_proxies(host: str) -> dict[str, str]:
    """SGLang's server asks itself a first question, by way of the environment's proxy where nothing says otherwise, and ends
    where that has no answer.
    """
    others = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    names = ",".join(filter(None, (others, "localhost", "127.0.0.1", "::1", host.strip("[]"))))
    return {"no_proxy": names, "NO_PROXY": names}


async def _answers(url: str, process: Child, timeout_s: float) -> None:
    """Return when it does. Raises EngineError where it ends before, or is late."""
    died = asyncio.create_task(process.wait(), name="watch the server")
    try:
        async with asyncio.timeout(timeout_s), aiohttp.ClientSession() as session:
            while not await _is_healthy(session, url):
                await asyncio.wait([died], timeout=POLL_S)
                if died.done():
                    raise await process.died()
    except TimeoutError as e:
        raise EngineError(f"{process.name} did not answer at {url} within {timeout_s:g} s: it is still loading?") from e
    finally:
        died.cancel()
        await asyncio.wait([died])


async def _is_healthy(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(f"{url}/health", timeout=aiohttp.ClientTimeout(total=5.0)) as response:
            return response.status == 200
    except (aiohttp.ClientError, OSError):
        # not yet
        return False


def how_to_ask(served: Served) -> str:
    """A command to copy."""
    words = ["QUESTION", "--endpoint", served.url, "--model", served.name]
    if (config := served.policy.trained_with) is not None:
        agent = config.agent
        words += ["--prompt", agent.prompt, "--context-tokens", str(agent.context_tokens)]
        words += ["--max-new-tokens", str(agent.max_new_tokens), "--max-turns", str(config.rollout.max_turns)]
    return command("l0fast.agent", *words)


async def _serve_until_told(args: argparse.Namespace) -> None:
    loop, task, told = asyncio.get_running_loop(), asyncio.current_task(), False
    assert task is not None

    def end() -> None:
        # once: what is ending has its own deadline
        nonlocal told
        if not told:
            told = True
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    try:
        async with serve(
            args.model,
            host=args.host,
            port=args.port,
            name=args.name,
            server=args.server,
            arguments=args.arguments,
            on_line=_show if args.verbose else lambda line: None,
        ) as served:
            print(f"{served.server} serves {served.name} at {served.url}/v1, until Ctrl-C", flush=True)  # noqa: T201
            print(f"ask it with: {how_to_ask(served)}", flush=True)  # noqa: T201
            await served.child.wait()
            raise await served.child.died()
    except asyncio.CancelledError:
        if not told:
            raise


def _show(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m l0fast.serve", description="A model over an OpenAI-compatible endpoint."
    )
    parser.add_argument("model", metavar="MODEL", help="a policy that ships, a model folder, a run or a checkpoint")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine alone)"
    )
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s; 0 takes a free one")
    parser.add_argument("--name", default="", help="the model's name there (default: MODEL's own)")
    parser.add_argument(
        "--server", choices=("auto", "sglang", "transformers"), default="auto", help="default: what fits this machine"
    )
    parser.add_argument("--verbose", action="store_true", help="show all that the server prints")
    parser.epilog = "Further arguments, after --, go to the server as they are."
    words = list(argv)
    at = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:at], argparse.Namespace(arguments=words[at + 1 :]))
    try:
        asyncio.run(_serve_until_told(args))
    except L0fastError as e:
        print(f"l0fast: {e}", file=sys.stderr)  # noqa: T201
        return 2 if isinstance(e, UsageError) else 1
    return 0


if __name__ == "__main__":
    step_back()
    sys.exit(main(sys.argv[1:]))
