"""The way L0 runs its agents, beside ours: the same episodes at the same engine and tools, in real time.

    theirs    trainer --GET status of one after the other, then 0.5 s of sleep--> task server
              task server --starts, one an agent--> bubblewrap: worker --ZMQ--> ipykernel
              worker --POST, one a turn--> engine            kernel --POST, one a call--> look_up
    ours      NBAgent on one loop, a pool's sessions

L0: arXiv 2506.23667 and cmriat/l0, src/l0/traj_sampler: its trainer asks with `httpx.get` of the release used here, which
makes a client each time and with it a TLS context that reads all of certifi's authorities, for a plain HTTP address too.
Where our copy of theirs is cheaper than the original: task server and engine share one process and one loop, aiohttp stands for
FastAPI, a kernel talks over sockets in files, a worker sends what is new and not the whole conversation, and it writes no
pickle. Both start first: L0's workers and kernels are up, our zygotes too; our sessions are forked on the way. CPU is that of
this process and all that it has started, in containers too, from the first turn to the last.
"""

import asyncio
import json
import os
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from tempfile import TemporaryFile
from typing import Any

from aiohttp import web

from bench.probes import tree_cpu_s
from bench.workload import AGENT, MAX_TURNS, Workload
from l0fast.agent.chat import Chat
from l0fast.agent.context import Context
from l0fast.agent.nb_agent import EpisodeLimits, NBAgent
from l0fast.agent.prompts import output_message, system_prompt
from l0fast.config import SandboxConfig
from l0fast.engine.base import Sampling
from l0fast.engine.clock import CompressedClock
from l0fast.engine.simulated import SimulatedEngine, Speed
from l0fast.ids import Ids
from l0fast.sandbox import open_sandbox
from l0fast.tools.broker import ToolPolicy, open_broker
from l0fast.types import Task

POLL_S = 0.5
"""Between two rounds of looks at the status of every task, as in L0 [s]."""
START_TIMEOUT_S = 180.0
"""For all of L0's workers and kernels [s]."""
PLAY_TIMEOUT_S = 600.0
"""For all episodes of one side [s]."""
STARTS_AT_ONCE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What one way did."""

    episodes_per_s: float
    """Sum over agents of 1 / (time of its episode)."""
    turns: int
    cpu_us_per_turn: float
    episode_s: float
    """Mean [s]."""
    asking_us_per_turn: float = 0.0
    """Part of that CPU that went into asking whether episodes have ended [us]; not what the asked one spent."""


WORKER = """
    import json, queue, re, sys, urllib.request
    from jupyter_client import KernelManager

    name, url = sys.argv[1:]

    def post(path, **fields):
        request = urllib.request.Request(url + path, json.dumps(fields).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    # the ports of tcp are chosen, let go and bound again: with many workers one may be gone by then
    manager = KernelManager(transport="ipc")
    manager.start_kernel()
    client = manager.blocking_client()
    client.start_channels()
    client.wait_for_ready(timeout=120)

    def run(code):
        said = []
        def hook(message):
            content = message["content"]
            said.append(content.get("text") or content.get("data", {}).get("text/plain", ""))
        client.execute_interactive(code, output_hook=hook, timeout=600)
        return "".join(said)

    run(f'''
    import json, urllib.request
    def _post(path, **fields):
        request = urllib.request.Request({url!r} + path, json.dumps(fields).encode(), {{"Content-Type": "application/json"}})
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)
    def look_up(key):
        return _post("/look_up", key=key)["page"]
    def submit_final_answer(answer):
        print("<answer>" + str(answer) + "</answer>")
    ''')
    print("ready", flush=True)
    sys.stdin.readline()
    output, turns, answer = None, 0, None
    while answer is None and turns < 8:
        text = post("/generate", name=name, output=output)["text"]
        turns += 1
        codes = re.findall("<code>(.*?)</code>", text, re.DOTALL)
        output = run(codes[0].strip()) if len(codes) == 1 else "No code was run."
        found = re.search("<answer>(.*?)</answer>", output)
        answer = found and found[1]
    print(json.dumps({"turns": turns, "answer": answer}), flush=True)
    sys.stdin.readline()
    client.stop_channels()
    manager.shutdown_kernel(now=True)
"""

TRAINER = """
    import json, sys, time
    import httpx

    poll_s, url, *names = sys.argv[1:]
    print("ready", flush=True)
    sys.stdin.readline()
    began, began_cpu, ended = time.perf_counter(), time.process_time(), {}
    while len(ended) < len(names):
        for name in names:
            if name not in ended:
                status = httpx.get(f"{url}/check_task_status/{name}").json()["status"]
                if status != "running":
                    ended[name] = [status, time.perf_counter() - began]
        if len(ended) < len(names):
            time.sleep(float(poll_s))
    print(json.dumps({"ended": ended, "cpu_s": time.process_time() - began_cpu}), flush=True)
"""


@dataclass(slots=True)
class _Child:
    """The trainer, or a task of the task server."""

    process: asyncio.subprocess.Process
    status: str = "starting"
    result: dict[str, Any] | None = None

    async def line(self) -> bytes:
        assert self.process.stdout is not None
        return await self.process.stdout.readline()

    async def watch(self) -> None:
        said = await self.line()
        self.result, self.status = (json.loads(said), "completed") if said else (None, "failed")

    def go(self) -> None:
        assert self.process.stdin is not None
        self.status = "running"
        self.process.stdin.write(b"go\n")


class _Servers:
    """The task server, and the engine and the tool behind HTTP."""

    def __init__(self, chat: Chat, workload: Workload, engine: SimulatedEngine, questions: dict[str, str]):
        self._chat, self._workload, self._engine, self._questions = chat, workload, engine, questions
        self._contexts: dict[str, Context] = {}
        self._said: dict[str, Ids] = {}
        self.tasks: dict[str, _Child] = {}

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes(
            [
                web.get("/check_task_status/{name}", self._status),
                web.post("/generate", self._generate),
                web.post("/look_up", self._look_up),
            ]
        )
        return app

    async def _status(self, request: web.Request) -> web.Response:
        task = self.tasks[request.match_info["name"]]
        return web.json_response({"status": task.status, "output": json.dumps(task.result), "error": ""})

    async def _generate(self, request: web.Request) -> web.Response:
        fields = await request.json()
        name = fields["name"]
        context = self._contexts.get(name)
        if context is None:
            system = system_prompt("full", [self._workload.tool], max_turns=MAX_TURNS)
            context = self._contexts[name] = Context(
                self._chat,
                system,
                self._questions[name],
                budget=AGENT.context_tokens,
                response_tokens=AGENT.max_new_tokens,
                trim="soft",
            )
        else:
            context.add(self._said[name], output_message(fields["output"]))
        context.fit("")
        sampling = Sampling(max_new_tokens=AGENT.max_new_tokens, stop_token_ids=self._chat.stop_token_ids)
        sampled = await self._engine.generate(context.prompt_ids, sampling, conversation=name)
        self._said[name] = sampled.response_ids
        return web.json_response({"text": self._chat.decode(sampled.response_ids)})

    async def _look_up(self, request: web.Request) -> web.Response:
        return web.json_response({"page": await self._workload.tool.call((await request.json())["key"])})


@asynccontextmanager
async def _process(what: str, argv: Sequence[str]) -> AsyncIterator[_Child]:
    """One that has said that it is ready."""
    # a file, not a pipe: what nobody reads fills a pipe, and then it and we would wait for each other
    with TemporaryFile() as errors:
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=errors
        )
        try:
            child = _Child(process)
            if await child.line() != b"ready\n":
                await process.communicate()
                errors.seek(0)
                last = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise RuntimeError(
                    f"a {what} of L0's way ended with status {process.returncode} instead of being ready: {last}"
                )
            yield child
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


def in_bubblewrap(program: str, *args: str) -> list[str]:
    """The command that runs a Python program as L0's task server runs a worker."""
    folders = ["/usr", "/bin", "/lib", "/lib64", "/etc", sys.prefix, sys.base_prefix]
    # empty folders first: a Python may lie in them, and what is mounted last hides what was there
    argv = "bwrap --proc /proc --dev /dev --tmpfs /tmp --tmpfs /home --setenv HOME /home".split()
    argv += [part for path in folders for part in ("--ro-bind-try", path, path)]
    argv += ["--unshare-pid", "--die-with-parent"]
    return [*argv, sys.executable, "-c", textwrap.dedent(program), *args]


def _worker(name: str, url: str) -> AbstractAsyncContextManager[_Child]:
    return _process("worker", in_bubblewrap(WORKER, name, url))


async def l0_style(chat: Chat, tasks: Sequence[Task], speed: Speed, *, time_compression: float = 1.0) -> Side:
    """Play each task once, as L0 does. Its polls are not compressed."""
    clock = CompressedClock(time_compression)
    workload = Workload(chat, clock.sleep)
    names = {_conversation(task): task.question for task in tasks}
    servers = _Servers(chat, workload, _engine(chat, workload, clock, speed, len(tasks)), names)
    runner = web.AppRunner(servers.app(), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with AsyncExitStack() as stack:
            starts = asyncio.Semaphore(STARTS_AT_ONCE)

            async def start(name: str) -> None:
                async with starts:
                    servers.tasks[_task_name(name)] = await stack.enter_async_context(_worker(name, url))

            async with asyncio.timeout(START_TIMEOUT_S), asyncio.TaskGroup() as tg:
                for name in names:
                    tg.create_task(start(name))
            code = textwrap.dedent(TRAINER)
            argv = [sys.executable, "-c", code, str(POLL_S), url, *servers.tasks]
            async with asyncio.timeout(START_TIMEOUT_S):
                trainer = await stack.enter_async_context(_process("trainer", argv))
            cpu_s = tree_cpu_s(os.getpid())
            async with asyncio.timeout(PLAY_TIMEOUT_S), asyncio.TaskGroup() as tg:
                for task in servers.tasks.values():
                    task.go()
                    tg.create_task(task.watch())
                trainer.go()
                await trainer.watch()
            cpu_s = tree_cpu_s(os.getpid()) - cpu_s
    finally:
        await runner.cleanup()
    if trainer.result is None:
        raise RuntimeError("the trainer of L0's way ended before its tasks had")
    ended: dict[str, tuple[str, float]] = trainer.result["ended"]
    for name, (status, _) in ended.items():
        if status != "completed":
            raise RuntimeError(f"the worker of {name} {status}")
    side = _side([took for _, took in ended.values()], workload.turns, cpu_s)
    return replace(side, asking_us_per_turn=1e6 * trainer.result["cpu_s"] / workload.turns)


async def ours(
    chat: Chat, tasks: Sequence[Task], speed: Speed, config: SandboxConfig, *, time_compression: float = 1.0
) -> Side:
    """Play each task once, as we do."""
    clock = CompressedClock(time_compression)
    workload = Workload(chat, clock.sleep)
    took: list[float] = []
    async with open_sandbox(config, max_sessions=len(tasks), log=lambda line: None) as sandbox, open_broker() as broker:
        policy = ToolPolicy(timeout_s=120.0, max_concurrent=len(tasks), cache=False)
        agent = NBAgent(
            chat=chat,
            engine=_engine(chat, workload, clock, speed, len(tasks)),
            sandbox=sandbox,
            tools=(broker.wrap(workload.tool, policy),),
            config=AGENT,
            limits=EpisodeLimits(max_turns=MAX_TURNS, timeout_s=PLAY_TIMEOUT_S, turn_timeout_s=PLAY_TIMEOUT_S),
        )

        async def play(task: Task) -> None:
            began = time.perf_counter()
            trajectory = await agent.run_episode(task, index=0, temperature=1.0, seed=0)
            if trajectory.status.failed:
                raise RuntimeError(f"episode {task.id} {trajectory.status}: {trajectory.cause}")
            took.append(time.perf_counter() - began)

        # a container's zygote is a child of the daemon's
        zygotes = [shard.launched.pid for shard in sandbox.shards]
        cpu_s = tree_cpu_s(os.getpid(), *zygotes)
        async with asyncio.timeout(PLAY_TIMEOUT_S), asyncio.TaskGroup() as tg:
            for task in tasks:
                tg.create_task(play(task))
        cpu_s = tree_cpu_s(os.getpid(), *zygotes) - cpu_s
    return _side(took, workload.turns, cpu_s)


def _engine(chat: Chat, workload: Workload, clock: CompressedClock, speed: Speed, agents: int) -> SimulatedEngine:
    # a slot for everyone: nobody waits for another, so both sides wait equally long
    return SimulatedEngine(
        vocab_size=chat.vocab_size,
        max_tokens=AGENT.context_tokens + AGENT.max_new_tokens,
        slots=agents,
        speed=speed,
        script=workload,
        clock=clock,
    )


def _task_name(conversation: str) -> str:
    """For a path."""
    return conversation.replace("/", "-")


def _conversation(task: Task) -> str:
    """As `NBAgent` names an episode with index 0 and seed 0: the workload is drawn from the name."""
    return f"{task.id}/0/0"


def _side(took: list[float], turns: int, cpu_s: float) -> Side:
    return Side(
        episodes_per_s=sum(1 / t for t in took),
        turns=turns,
        cpu_us_per_turn=1e6 * cpu_s / turns,
        episode_s=sum(took) / len(took),
    )
