"""The sandbox pool beside other ways to give each agent a Python of its own, in one run, taking turns.

    python -m bench.sandbox [--own-daemon] [--rounds 5] [--crowd 2000] [--soak MINUTES] [--results bench/results]

Ours in four variants: docker and bwrap, bare and with numpy and pandas preloaded. Peers:

    l0 style    bubblewrap + a worker + an ipykernel for each agent, as L0's task server does (arXiv 2506.23667)
    container   a container for each agent through aiodocker, a Python loop on its stdin
    fork        multiprocessing's fork and a pipe, without any isolation: what the idea costs by itself

Start is the time from nothing to the result of the first cell, "1 + 1". Every ratio is theirs / ours of medians in this
run. Memory is PSS of all processes that n live sessions add, divided by n; a container's shim counts as its own.

Round trips of a cell are measured twice, for ours and the peers alike: where the kernel puts both ends, and (`_one_core`)
with all that takes part on one core, as are tool calls and the CPU of a cell. A virtual machine takes 40 us to wake a core
that has halted, and the scheduler decides anew for each session whether both ends share a core: a bare byte there and back
is 15 us or 95 us on one host.

The crowd: so many sessions alive at once, each with 5 cells and 4 tool calls of 50 ms. The last line is JSON; its top
level is docker, bare, and `variants` has the same keys for each.
Needs bubblewrap, `pip install -e '.[bench]'`, and a Docker daemon: --own-daemon starts one (root), builds the image and stops it.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import uvloop

from bench.at_least import at_least, more_than_0
from bench.ending import end_like_ctrl_c, run_to_its_end
from bench.l0_style import in_bubblewrap
from bench.machine import machine
from bench.own_daemon import own_daemon
from bench.results_folder import results_folder, write
from l0fast.config import SandboxConfig
from l0fast.errors import L0fastError
from l0fast.loop_lag import LoopLag
from l0fast.metrics import ProcessTreeMemory, descendants
from l0fast.sandbox.base import Session, ToolSpec
from l0fast.sandbox.daemon import Daemon, daemon
from l0fast.sandbox.docker import LABEL
from l0fast.sandbox.image import ensure_image
from l0fast.sandbox.pool import SandboxPool
from l0fast.sandbox.selection import open_sandbox

PRELOAD = ("numpy", "pandas")
VARIANTS = {
    "docker": ("docker", ()),
    "docker_preloaded": ("docker", PRELOAD),
    "bwrap": ("bwrap", ()),
    "bwrap_preloaded": ("bwrap", PRELOAD),
}
DEADLINE_S = 120.0
"""For anything a peer does [s]."""


# -- ours


async def ping() -> str:
    return "pong"


async def look_up(key: int) -> int:
    await asyncio.sleep(0.05)
    return key


PING = {"ping": ToolSpec(name="ping", signature="() -> str", doc="", call=ping)}
LOOK_UP = {"look_up": ToolSpec(name="look_up", signature="(key: int) -> int", doc="", call=look_up)}


async def start_of(pool: SandboxPool) -> float:
    """Seconds from nothing to the first result."""
    began = time.perf_counter()
    async with pool.session({}, seed=1) as session:
        result = await session.execute("1 + 1")
        took = time.perf_counter() - began
        assert result.output == "2\n", result
    return took


async def round_trips(session: Session, n: int, code: str = "1") -> float:
    """Seconds a cell."""
    began = time.perf_counter()
    for _ in range(n):
        await session.execute(code)
    return (time.perf_counter() - began) / n


@contextmanager
def one_core(*roots: int) -> Iterator[None]:
    """This process, all processes from these roots down, and what they start meanwhile on one core."""
    before = os.sched_getaffinity(0)
    pids = [int(name) for name in os.listdir("/proc/self/task")]
    pids += [pid for root in roots for pid in (root, *descendants(root))]
    try:
        _move(pids, {min(before)})
        yield
    finally:
        _move(pids, before)


def _move(pids: list[int], cores: set[int]) -> None:
    for pid in pids:
        # some end meanwhile
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(pid, cores)


class Ours:
    """One variant's pool and what was measured of it."""

    def __init__(self, name: str, pool: SandboxPool):
        self.name, self.pool = name, pool
        self.starts: list[float] = []
        self.round_trips_one_core: list[float] = []
        self.round_trips: list[float] = []
        self.tool_calls: list[float] = []
        self.cpu_per_cell: list[float] = []
        self.starts_per_s: list[float] = []

    async def round(self) -> None:
        self.starts += [await start_of(self.pool) for _ in range(30)]
        async with self.pool.session({}, seed=1) as session:
            await round_trips(session, 50)
            self.round_trips += [await round_trips(session, 50) for _ in range(10)]
        with one_core(*self.zygotes):
            await self._round_trips()
        began, total = time.perf_counter(), 100
        async with asyncio.TaskGroup() as tg:
            for _ in range(total):
                tg.create_task(start_of(self.pool))
        self.starts_per_s.append(total / (time.perf_counter() - began))

    async def _round_trips(self) -> None:
        async with self.pool.session(PING, seed=1) as session:
            await round_trips(session, 50)
            cpu = time.process_time()
            # means of as many cells as the peers'
            self.round_trips_one_core += [await round_trips(session, 50) for _ in range(10)]
            self.cpu_per_cell.append((time.process_time() - cpu) / 500)
            calls = 50
            with_calls = await round_trips(session, 10, f"for _ in range({calls}): ping()")
            without = await round_trips(session, 10, f"for _ in range({calls}): None")
            self.tool_calls.append((with_calls - without) / calls)

    @property
    def zygotes(self) -> list[int]:
        return [shard.launched.pid for shard in self.pool.shards]

    async def memory_mb(self, n: int = 64) -> float:
        """PSS that one of `n` live sessions adds [MB]."""
        zygotes = self.zygotes
        before = pss_mb(zygotes)
        async with contextlib.AsyncExitStack() as stack:
            for i in range(n):
                session = await stack.enter_async_context(self.pool.session({}, seed=i))
                await session.execute("x = [1]\nx")
            return (pss_mb(zygotes) - before) / n


def pss_mb(roots: list[int]) -> float:
    """PSS of these processes and all their descendants [MB]."""
    return sum(ProcessTreeMemory(root).sample() for root in roots)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


# -- peers

WORKER = """
    import json, sys, time
    from jupyter_client import KernelManager

    manager = KernelManager()
    manager.start_kernel()
    client = manager.blocking_client()
    client.start_channels()
    client.wait_for_ready(timeout=60)

    def run(code):
        said = []
        def hook(message):
            content = message["content"]
            said.append(content.get("text") or content.get("data", {}).get("text/plain", ""))
        client.execute_interactive(code, output_hook=hook, timeout=60)
        return "".join(said)

    for line in sys.stdin:
        request = json.loads(line)
        began = time.perf_counter()
        for _ in range(request["times"]):
            said = run(request["code"])
        print(json.dumps({"out": said, "s": (time.perf_counter() - began) / request["times"]}), flush=True)
    client.stop_channels()
    manager.shutdown_kernel(now=True)
"""


@asynccontextmanager
async def l0_style() -> AsyncIterator[tuple[Callable[[str, int], Awaitable[dict[str, Any]]], int]]:
    """A way to run cells, and the pid of the tree's root."""
    process = await asyncio.create_subprocess_exec(
        *in_bubblewrap(WORKER), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdin is not None
    assert process.stdout is not None
    reader, writer = process.stdout, process.stdin

    async def run(code: str, times: int = 1) -> dict[str, Any]:
        writer.write(json.dumps({"code": code, "times": times}).encode() + b"\n")
        async with asyncio.timeout(DEADLINE_S):
            return json.loads(await reader.readline())

    try:
        yield run, process.pid
    finally:
        process.kill()
        await process.wait()


LOOP = "import sys\nfor line in sys.stdin:\n    print(eval(line), flush=True)\n"


@asynccontextmanager
async def container_of(found: Daemon, image: str) -> AsyncIterator[tuple[Callable[[str], Awaitable[str]], int]]:
    config = {
        "Image": image,
        "Cmd": ["python3", "-c", LOOP],
        "OpenStdin": True,
        "AttachStdin": True,
        "AttachStdout": True,
        "HostConfig": {"NetworkMode": "none", "AutoRemove": True},
    }
    container = await found.docker.containers.create(config)
    try:
        async with container.attach(stdin=True, stdout=True) as stream:
            await container.start()

            async def run(code: str) -> str:
                await stream.write_in(code.encode() + b"\n")
                async with asyncio.timeout(DEADLINE_S):
                    message = await stream.read_out()
                assert message is not None
                return message.data.decode()

            pid = (await container.show())["State"]["Pid"]
            yield run, pid
    finally:
        await container.delete(force=True)


def _forked(pipe: Any) -> None:
    while (code := pipe.recv()) is not None:
        pipe.send(repr(eval(code)))


class Peers:
    def __init__(self, found: Daemon, image: str):
        self._daemon, self._image = found, image
        self.starts: dict[str, list[float]] = {"l0_style": [], "container": [], "fork": []}
        self.round_trips_one_core: dict[str, list[float]] = {"ipykernel": [], "container": [], "fork": []}
        self.round_trips: dict[str, list[float]] = {"ipykernel": [], "container": [], "fork": []}

    async def round(self) -> None:
        for _ in range(2):
            await self._l0_style(self.round_trips, self.starts["l0_style"])
        for _ in range(3):
            await self._container(self.round_trips, self.starts["container"])
        for _ in range(10):
            self._fork(self.round_trips, self.starts["fork"])
        with one_core():
            for _ in range(2):
                await self._l0_style(self.round_trips_one_core)
            for _ in range(3):
                await self._container(self.round_trips_one_core, together=True)
            for _ in range(10):
                self._fork(self.round_trips_one_core)

    async def _l0_style(self, trips: dict[str, list[float]], starts: list[float] | None = None) -> None:
        began = time.perf_counter()
        async with l0_style() as (run, _):
            assert (await run("1 + 1", 1))["out"] == "2"
            if starts is not None:
                starts.append(time.perf_counter() - began)
            trips["ipykernel"].append((await run("1", 50))["s"])

    async def _container(
        self, trips: dict[str, list[float]], starts: list[float] | None = None, together: bool = False
    ) -> None:
        began = time.perf_counter()
        async with container_of(self._daemon, self._image) as (run, pid):
            assert await run("1 + 1") == "2\n"
            if starts is not None:
                starts.append(time.perf_counter() - began)
            # the daemon and the shim between us are several threads each, and stay where they are
            with one_core(pid) if together else contextlib.nullcontext():
                began = time.perf_counter()
                for _ in range(50):
                    await run("1")
                trips["container"].append((time.perf_counter() - began) / 50)

    def _fork(self, trips: dict[str, list[float]], starts: list[float] | None = None) -> None:
        began = time.perf_counter()
        ours, theirs = get_context("fork").Pipe()
        process = get_context("fork").Process(target=_forked, args=(theirs,))
        process.start()
        ours.send("1 + 1")
        assert ours.recv() == "2"
        if starts is not None:
            starts.append(time.perf_counter() - began)
        began = time.perf_counter()
        for _ in range(200):
            ours.send("1")
            ours.recv()
        trips["fork"].append((time.perf_counter() - began) / 200)
        ours.send(None)
        process.join()
        ours.close()
        theirs.close()

    async def memory_mb(self, n: int = 3) -> dict[str, float]:
        """PSS of one of `n` live agents; a container's shim is its process's parent."""
        async with contextlib.AsyncExitStack() as stack:
            agents = [await stack.enter_async_context(l0_style()) for _ in range(n)]
            for run, _ in agents:
                await run("x = [1]\nx", 1)
            kernels = pss_mb([pid for _, pid in agents]) / n
        async with contextlib.AsyncExitStack() as stack:
            containers = [await stack.enter_async_context(container_of(self._daemon, self._image)) for _ in range(n)]
            for run, _ in containers:
                await run("1")
            return {"l0_style": kernels, "container": pss_mb([parent_of(pid) for _, pid in containers]) / n}


# -- the crowd


async def crowd(pool: SandboxPool, n: int, found: Daemon) -> dict[str, float]:
    """`n` sessions alive at the same moment, each with 5 cells and 4 tool calls of 50 ms."""
    uids = [(shard.config["uid_base"], shard.config["uid_count"]) for shard in pool.shards]
    lag, errors, ran = LoopLag(), 0, 0
    all_ran = asyncio.Event()

    async def agent(i: int) -> None:
        nonlocal errors, ran
        try:
            async with pool.session(LOOK_UP, seed=i) as session:
                await session.execute(f"x = {i}")
                outputs = [(await session.execute(f"x += look_up({key})\nx")).output for key in range(4)]
                right = outputs[-1] == f"{i + 6}\n"
                ran += 1
                if ran == n:
                    all_ran.set()
                async with asyncio.timeout(300):
                    await all_ran.wait()
                errors += not right
        except Exception as e:  # noqa: BLE001 - an error is what is counted here
            errors += 1
            ran += 1
            print(f"session {i}: {type(e).__name__}: {e}", file=sys.stderr)

    meter = asyncio.create_task(lag.run())
    began = time.perf_counter()
    async with asyncio.TaskGroup() as tg:
        for i in range(n):
            tg.create_task(agent(i))
    wall = time.perf_counter() - began
    meter.cancel()
    await pool.close()
    return {
        "crowd_sessions": n,
        "crowd_errors": errors,
        "crowd_wall_s": wall,
        "crowd_loop_lag_p99_ms": lag.take_run()["loop/lag_p99_ms"],
        "crowd_left_over": await left_over(uids, found),
    }


async def left_over(uids: list[tuple[int | None, int]], found: Daemon) -> int:
    """Processes with a session's uid, and containers of ours."""
    left = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                uid = os.stat(f"/proc/{name}").st_uid
            except FileNotFoundError:
                continue
            left += any(base is not None and base <= uid < base + count for base, count in uids)
    containers = await found.docker.containers.list(all=1, filters=json.dumps({"label": [LABEL]}))
    return left + sum(container["Labels"][LABEL].startswith(f"{os.getpid()}/") for container in containers)


# -- the soak


async def soak(pool: SandboxPool, minutes: float, daemon_pid: int) -> dict[str, Any]:
    """Sessions churn at full speed: start, cells, a tool, now and then a crash or a timeout, end."""
    until = time.monotonic() + 60 * minutes
    sessions = errors = 0

    async def churn(worker: int) -> None:
        nonlocal sessions, errors
        while time.monotonic() < until:
            sessions += 1
            try:
                async with pool.session(PING, seed=sessions) as session:
                    await session.execute("x = [ping() for _ in range(3)]\nopen('f', 'w').write('x' * 10000)")
                    if sessions % 50 == 0:
                        await session.execute("import os\nos.fork() or os.execvp('sleep', ['sleep', '600'])")
                    if sessions % 97 == 0:
                        await session.execute("import os\nos._exit(1)")
            except Exception as e:  # noqa: BLE001 - counted; a session that was told to crash is one
                errors += sessions % 97 != 0 and "ended by itself" not in str(e)

    samples: list[dict[str, float]] = []

    async def watch() -> None:
        while True:
            samples.append(await asyncio.to_thread(_sample, pool, daemon_pid) | {"sessions": sessions})
            await asyncio.sleep(10)

    watcher = asyncio.create_task(watch())
    async with asyncio.TaskGroup() as tg:
        for worker in range(16):
            tg.create_task(churn(worker))
    watcher.cancel()
    await asyncio.sleep(1)
    # the first samples are still warming up
    early, late = samples[min(3, len(samples) - 1)], await asyncio.to_thread(_sample, pool, daemon_pid)
    return {
        "minutes": minutes,
        "sessions": sessions,
        "errors": errors,
        "early": early,
        "late": late,
        "samples": samples[:: max(1, len(samples) // 20)],
    }


def _sample(pool: SandboxPool, daemon_pid: int) -> dict[str, float]:
    zygotes = [shard.launched.pid for shard in pool.shards]
    driver_mb, driver_fds, _ = _held_by([os.getpid()])
    zygotes_mb, zygotes_fds, _ = _held_by(zygotes)
    daemon_mb, daemon_fds, daemon_processes = _held_by(processes_of_daemon(daemon_pid))
    return {
        "driver_fds": driver_fds,
        "driver_rss_mb": driver_mb,
        "zygotes_rss_mb": zygotes_mb,
        "zygotes_fds": zygotes_fds,
        "processes": float(sum(name.isdigit() for name in os.listdir("/proc"))),
        "daemon_rss_mb": daemon_mb,
        "daemon_fds": daemon_fds,
        "daemon_processes": daemon_processes,
    }


def _held_by(pids: list[int]) -> tuple[float, float, float]:
    """Memory [MB], open descriptors and number of those of these processes that are still there."""
    rss_mb = fds = there = 0.0
    for pid in pids:
        try:
            pages, opened = int(Path(f"/proc/{pid}/statm").read_text().split()[1]), len(os.listdir(f"/proc/{pid}/fd"))
        except (FileNotFoundError, ProcessLookupError):
            continue
        rss_mb += pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        fds += opened
        there += 1
    return rss_mb, fds, there


def processes_of_daemon(listener: int) -> list[int]:
    """Who listens on its socket, containerd and the containers' shims: every containerd and shim of this machine."""
    pids = {listener}
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and Path(f"/proc/{name}/comm").read_text().startswith("containerd"):
                pids.add(int(name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return sorted(pids)


# -- the run


def daemon_pid(endpoint: str) -> int:
    """Of whoever listens on that socket."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(endpoint.removeprefix("unix://"))
        return struct.unpack("3i", asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    async with daemon() as found:
        image = await ensure_image(found, "auto", pull_timeout_s=300, log=print)
        print(f"{machine()}; {found.name}, image {image}")
        if options.soak:
            async with _pool("docker", (), 64) as pool:
                return {"backend": "docker", "soak": await soak(pool, options.soak, daemon_pid(found.endpoint))}
        peers = Peers(found, image)
        async with contextlib.AsyncExitStack() as stack:
            ours = [
                Ours(name, await stack.enter_async_context(_pool(kind, preload, 128)))
                for name, (kind, preload) in VARIANTS.items()
            ]
            for n in range(options.rounds):
                for variant in ours:
                    await variant.round()
                await peers.round()
                print(f"round {n + 1} of {options.rounds}", file=sys.stderr)
            memory = {variant.name: await variant.memory_mb() for variant in ours}
            theirs_memory = await peers.memory_mb()
        results = {variant.name: _result(variant, memory[variant.name], peers, theirs_memory) for variant in ours}
        l0_style_ms = 1e3 * statistics.median(peers.starts["l0_style"])
        for result in results.values():
            kind = result["backend"]
            # a kernel that has imported nothing, beside a session that has numpy and pandas: in the peer's favour
            result["start_ratio_l0_style"] = l0_style_ms / results[kind]["start_ms"]
            result["start_ratio_l0_style_preloaded"] = l0_style_ms / results[f"{kind}_preloaded"]["start_ms"]
        for name, (kind, preload) in VARIANTS.items() if options.crowd else ():
            async with _pool(kind, preload, options.crowd) as pool:
                results[name] |= await crowd(pool, options.crowd, found)
        return results["docker"] | {
            "variants": results,
            "peers": {
                **{f"{name}_start_ms": 1e3 * statistics.median(values) for name, values in peers.starts.items()},
                **{
                    f"{name}_rtt_one_core_us": 1e6 * statistics.median(values)
                    for name, values in peers.round_trips_one_core.items()
                },
                **{f"{name}_rtt_us": 1e6 * statistics.median(values) for name, values in peers.round_trips.items()},
                **{f"{name}_memory_mb": value for name, value in theirs_memory.items()},
            },
            "machine": machine(),
            "daemon": found.name,
            "rounds": options.rounds,
        }


@asynccontextmanager
async def _pool(kind: str, preload: tuple[str, ...], sessions: int) -> AsyncIterator[SandboxPool]:
    config = SandboxConfig(kind=kind, preload=preload, memory_mb=2048, start_timeout_s=60)  # type: ignore[arg-type]
    async with open_sandbox(config, max_sessions=sessions, log=lambda line: print(line, file=sys.stderr)) as pool:
        yield pool


def _result(ours: Ours, memory_mb: float, peers: Peers, theirs_memory: dict[str, float]) -> dict[str, Any]:
    start, rtt, one_core_rtt = map(statistics.median, (ours.starts, ours.round_trips, ours.round_trips_one_core))
    return {
        "backend": ours.pool.kind,
        "start_ms": 1e3 * start,
        "start_p99_ms": 1e3 * statistics.quantiles(ours.starts, n=100)[98],
        "start_ratio_container": statistics.median(peers.starts["container"]) / start,
        "start_ratio_fork": statistics.median(peers.starts["fork"]) / start,
        "rtt_us": 1e6 * rtt,
        "rtt_ratio_ipykernel": statistics.median(peers.round_trips["ipykernel"]) / rtt,
        "rtt_one_core_us": 1e6 * one_core_rtt,
        "rtt_one_core_ratio_ipykernel": statistics.median(peers.round_trips_one_core["ipykernel"]) / one_core_rtt,
        "tool_rpc_us": 1e6 * statistics.median(ours.tool_calls),
        "memory_mb": memory_mb,
        "memory_ratio_l0_style": theirs_memory["l0_style"] / memory_mb,
        "starts_per_s": statistics.median(ours.starts_per_s),
        "host_cpu_us_per_cell": 1e6 * statistics.median(ours.cpu_per_cell),
    }


def show(results: dict[str, Any]) -> None:
    variants = results["variants"]
    keys = list(dict.fromkeys(key for variant in variants.values() for key in variant if key != "backend"))
    print("| | " + " | ".join(variants) + " |\n|" + "---|" * (len(variants) + 1))
    for key in keys:
        cells = [f"{variant[key]:.4g}" if key in variant else "" for variant in variants.values()]
        print(f"| {key} | " + " | ".join(cells) + " |")
    print("peers: " + ", ".join(f"{key} {value:.4g}" for key, value in results["peers"].items()))


def main() -> None:
    end_like_ctrl_c()
    parser = argparse.ArgumentParser(prog="python -m bench.sandbox", description="The sandbox pool beside its peers.")
    parser.add_argument("--own-daemon", action="store_true", help="start a dockerd, build the image, stop it again")
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument(
        "--crowd", type=at_least(0), default=2000, help="sessions alive at once; 0 leaves the crowd out"
    )
    parser.add_argument(
        "--soak", type=more_than_0, metavar="MINUTES", help="churn sessions for so long, and nothing else"
    )
    parser.add_argument("--results", type=results_folder, help="folder for sandbox.json or sandbox_soak.json")
    options = parser.parse_args()
    if not (options.soak or (shutil.which("bwrap") and all(map(find_spec, ("ipykernel", *PRELOAD))))):
        parser.error(
            "what is compared needs bubblewrap (Debian: apt-get install bubblewrap) and pip install -e '.[bench]': install them"
        )
    try:
        results = run(options)
    except L0fastError as e:
        sys.exit(f"bench.sandbox: {e}")
    if not options.soak:
        show(results)
    write(results, options.results, "sandbox_soak.json" if options.soak else "sandbox.json")


def run(options: argparse.Namespace) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        if options.own_daemon:
            own = stack.enter_context(own_daemon())
            os.environ["DOCKER_HOST"] = own.host
            build = [sys.executable, "-m", "l0fast.sandbox.image", "build", "--packages", *PRELOAD]
            if code := run_to_its_end(build, stdout=sys.stderr):
                sys.exit(f"bench.sandbox: no image was built, exit code {code}: see above")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(measure(options))


if __name__ == "__main__":
    main()
