"""The throughput benchmark plays what it says, measures what it names, and comes to an end."""

import asyncio
import contextlib
import gc
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import pytest
import uvloop

from bench import l0_style, node_throughput
from bench import throughput as bench
from bench.probes import idle_loop, tree_cpu_s
from bench.swarm import NoSandbox, Swarm
from bench.workload import AGENT, KEYS, MAX_TURNS, MODEL, Workload
from l0fast import training
from l0fast.agent.chat import Chat
from l0fast.agent.nb_agent import EpisodeLimits, NBAgent
from l0fast.agent.parsing import parse_action
from l0fast.config import RunConfig, SandboxConfig
from l0fast.engine.base import Sampling
from l0fast.engine.clock import CompressedClock
from l0fast.engine.simulated import SimulatedEngine
from l0fast.errors import UsageError
from l0fast.sandbox import open_sandbox
from l0fast.sandbox.base import ToolSpec
from l0fast.tools.broker import open_broker
from l0fast.types import TrajectoryStatus

ROOT = Path(__file__).parent.parent
KEYS_OF_THE_RESULT = {
    "agents", "episodes_per_s", "turns_per_s", "host_cpu_us_per_turn", "loop_lag_p50_ms", "loop_lag_p99_ms",
    "loop_lag_p999_ms", "loop_lag_max_ms", "idle_lag_max_ms", "engine_busy", "engine_busy_on_policy",
    "engine_busy_barrier", "ratio_l0_style", "cpu_ratio_l0_style",
    "cpu_ratio_l0_style_without_asking", "rss_mb", "sizes",
    "host_cpu_us_per_turn_without_sandbox", "simulator_us_per_turn", "turns_per_s_full", "host_cpu_us_per_turn_full",
    "turns_per_s_full_without_sandbox", "host_cpu_us_per_turn_full_without_sandbox", "simulator_us_per_turn_full",
}  # fmt: skip


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(MODEL)


@pytest.fixture(scope="module")
def workload(chat: Chat) -> Workload:
    return Workload(chat, asyncio.sleep)


def responses(workload: Workload, chat: Chat, conversation: str) -> list[tuple[int, ...]]:
    sampling = Sampling(max_new_tokens=AGENT.max_new_tokens, stop_token_ids=chat.stop_token_ids)
    return [tuple(workload((), sampling, conversation)) for _ in workload.plan(conversation).turns]


def test_episodes_have_the_lengths_that_are_said(workload: Workload):
    plans = [workload.plan(f"w{n}/0/0") for n in range(2000)]
    turns = [len(plan.turns) for plan in plans]
    assert set(turns) == set(range(1, MAX_TURNS + 1))
    assert statistics.mean(turns) == pytest.approx(4.5, rel=0.03)
    lengths = [said.tokens for plan in plans for said in plan.turns]
    assert statistics.median(lengths) == pytest.approx(300, rel=0.03)
    assert statistics.quantiles(lengths, n=10)[-1] == pytest.approx(300 * 2.16, rel=0.05)
    latencies = workload.latencies_s
    assert len(latencies) == KEYS
    assert statistics.median(latencies) == pytest.approx(0.8, rel=0.01)
    assert statistics.quantiles(latencies, n=100)[-1] == pytest.approx(8.2, rel=0.05)


def test_what_the_policy_says_runs_and_is_the_same_for_the_same_name(workload: Workload, chat: Chat):
    malformed = 0
    for n in range(200):
        said = responses(workload, chat, f"w{n}/1/7")
        assert said == responses(workload, chat, f"w{n}/1/7")
        lengths = [turn.tokens for turn in workload.plan(f"w{n}/1/7").turns]
        assert [len(ids) for ids in said] == pytest.approx(lengths, abs=60)
        actions = [parse_action(chat.decode(ids)) for ids in said]
        malformed += sum(action.complaint is not None for action in actions)
        for action in actions:
            compile(action.code, "cell", "exec")
        assert "submit_final_answer(" in actions[-1].code
        assert all("look_up(" in action.code for action in actions[:-1] if action.complaint is None)
    assert 0 < malformed < 60


def test_a_tree_of_processes_has_its_own_cpu_and_that_of_those_it_waited_for():
    burn = "import time\nwhile time.process_time() < 0.3: pass\n"
    code = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {burn!r}])\n{burn}print(flush=True)\ninput()"
    before = tree_cpu_s(os.getpid())
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        alive = tree_cpu_s(os.getpid()) - before
        assert tree_cpu_s(process.pid) >= 0.55
        process.communicate(b"\n")
    assert alive >= 0.55
    assert tree_cpu_s(os.getpid()) - before >= 0.55, "now that it was waited for, too"


def test_a_process_of_somebody_else_counts_where_it_is_named():
    """As a container's does, which is a child of the daemon's."""
    burn = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    script = 'exec 3<&0; "$0" -c "$1" <&3 & echo $!'
    with subprocess.Popen(
        ["sh", "-c", script, sys.executable, burn], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.stdout.readline()
        process.wait()
        ours, with_it = tree_cpu_s(os.getpid()), tree_cpu_s(os.getpid(), pid)
        process.communicate(b"\n")
    assert with_it - ours >= 0.25


def test_an_idle_loop_tells_its_lag():
    with idle_loop() as lag:
        time.sleep(0.1)  # another process's loop has to turn for a while
    assert 0 <= lag["loop/lag_p50_ms"] <= lag["loop/lag_max_ms"]


@pytest.mark.parametrize("mode", ["carry_over", "on_policy", "barrier"])
def test_every_mode_loses_nothing_and_charges_all_of_its_time(chat: Chat, mode):
    async def main():
        async with open_broker() as broker:
            swarm = Swarm(16, NoSandbox(), broker, chat=chat, time_compression=400.0)
            measured = await swarm.play(mode, steps=2)
            assert len(asyncio.all_tasks()) == 1, "nothing goes on after it"
            return measured

    measured = asyncio.run(main())
    assert measured.lost == 0
    assert measured.peak_alive == 16
    assert measured.steps == 2
    assert 0 < measured.engine_busy <= 1
    assert measured.shares_sum == pytest.approx((1, 1), abs=0.01)


def test_an_episode_leaves_nothing_to_the_cycle_collector(chat: Chat, workload: Workload):
    """Nobody looks for cycles among old objects for long (garbage.py)."""
    clock = CompressedClock(1000.0)
    engine = SimulatedEngine(
        vocab_size=chat.vocab_size, max_tokens=AGENT.context_tokens + AGENT.max_new_tokens, script=workload, clock=clock
    )

    async def main() -> list[object]:
        config = SandboxConfig(kind="process")
        async with open_sandbox(config, max_sessions=1, log=lambda line: None) as sandbox, open_broker() as broker:
            agent = NBAgent(
                chat=chat,
                engine=engine,
                sandbox=sandbox,
                tools=(broker.wrap(ToolSpec(name="look_up", signature="(key: int) -> str", doc="", call=look_up)),),
                config=AGENT,
                limits=EpisodeLimits(max_turns=MAX_TURNS, timeout_s=60, turn_timeout_s=60),
            )
            tasks = workload.tasks()
            await agent.run_episode(next(tasks), index=0, temperature=1.0, seed=0)
            gc.collect()
            gc.disable()
            gc.set_debug(gc.DEBUG_SAVEALL)
            for _ in range(3):
                # as in a run: what holds the task holds what it returned
                playing = agent.run_episode(next(tasks), index=0, temperature=1.0, seed=0)
                assert (await asyncio.create_task(playing)).status is TrajectoryStatus.COMPLETED
            gc.collect()
            return gc.garbage

    async def look_up(key: int) -> str:
        return workload.page(key)

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            assert runner.run(main()) == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def test_a_node_is_measured_from_its_metrics_without_the_first_step():
    def row(step_s: float, evaluate: float) -> dict[str, float]:
        return {
            "time/step_s": step_s, "share/evaluate": evaluate, "share/decode": 1 - evaluate, "rollout/tokens": 1000,
            "rollout/episodes": 9, "rollout/failed": 1, "rollout/correct": 0.5, "loop/lag_p50_ms": 1.0,
            "loop/lag_p99_ms": 2.0, "loop/lag_p999_ms": 3.0, "loop/lag_max_ms": 4.0,
        }  # fmt: skip

    rows = [row(100.0, 0.0), row(10.0, 0.0), row(20.0, 0.5)]
    figures = node_throughput.figures(rows, {"peak_pss_mb": 1.0}, RunConfig())
    assert figures["steps"] == 2
    assert figures["tokens_per_s"] == pytest.approx(2000 / 20)
    assert figures["solved_tasks_per_hour"] == pytest.approx(3600 * 8 / 20)
    assert figures["share_decode"] == pytest.approx((10 + 10 * 0.5) / 20)
    assert figures["lost"] == 2


def test_a_gpu_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(node_throughput, "num_gpus", lambda: 0)
    with pytest.raises(UsageError, match="may use no GPU"):
        node_throughput.measure_node("sglang", "cuda", 3, [])


def test_a_dry_run_is_none_to_be_measured():
    with pytest.raises(UsageError, match="--dry-run leaves nothing to measure"):
        node_throughput.measure_node("transformers", None, 3, ["geography", "--dry-run"])


def test_what_a_node_was_measured_on_is_what_it_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(node_throughput, "num_gpus", lambda: 8)
    with pytest.raises(UsageError, match="may use 8 GPUs, and would: put CUDA_VISIBLE_DEVICES= in front"):
        node_throughput.measure_node("transformers", "cpu", 3, [])

    async def run(invocation: object) -> int:
        return 0

    monkeypatch.setattr(training, "run", run)
    for name in ("read_metrics", "read_summary", "figures"):
        monkeypatch.setattr(node_throughput, name, lambda *_: {})
    for device in (None, "cuda"):
        assert node_throughput.measure_node("transformers", device, 3, [])["device"] == "cuda"
    monkeypatch.setattr(node_throughput, "num_gpus", lambda: 0)
    assert node_throughput.measure_node("transformers", None, 3, [])["device"] == "cpu"


@pytest.mark.parametrize(
    ("argv", "words"),
    [(["--sizes", "100"], "multiples of 8"), (["--nonsense"], "unknown words"), (["--sizes", "200"], "of 128 above")],
)
def test_what_can_not_be_measured_is_refused(monkeypatch: pytest.MonkeyPatch, capsys, argv, words):
    monkeypatch.setattr(sys, "argv", ["bench.throughput", *argv])
    with pytest.raises(SystemExit):
        bench.main()
    assert words in capsys.readouterr().err


def test_a_sandbox_that_is_not_here_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere")
    monkeypatch.setattr(sys, "argv", "bench.throughput --sizes 8 --l0-agents 0 --sandbox docker".split())
    with pytest.raises(SystemExit, match="^bench.throughput: sandbox.kind = 'docker' does not work here: "):
        bench.main()


def test_a_talkative_worker_of_l0s_way_stalls_nobody():
    code = """if 1:
        import json, sys
        print("ready", flush=True)
        sys.stdin.readline()
        print("x" * 1_000_000, file=sys.stderr)
        print(json.dumps({"turns": 1, "answer": "yes"}), flush=True)
    """

    async def main() -> str:
        async with l0_style._process("worker", [sys.executable, "-c", code]) as child:
            child.go()
            await child.watch()
            return child.status

    assert asyncio.run(main()) == "completed"


def test_a_worker_of_l0s_way_that_can_not_start_says_why():
    async def main() -> None:
        async with l0_style._process("worker", [sys.executable, "-c", "import no_such_package"]):
            pass

    with pytest.raises(RuntimeError, match="status 1 instead of being ready: .*No module named 'no_such_package'"):
        asyncio.run(main())


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="L0's way needs bubblewrap")
def test_a_worker_of_l0s_way_finds_a_python_under_a_folder_that_is_empty_for_it(monkeypatch: pytest.MonkeyPatch):
    # /home is another such folder, where most people's virtual environments are
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        venv.create(folder, symlinks=True)
        monkeypatch.setattr(sys, "prefix", folder)
        monkeypatch.setattr(sys, "executable", f"{folder}/bin/python")
        argv = l0_style.in_bubblewrap("import os, sys; print(sys.prefix, os.listdir('/home'), os.listdir('/tmp'))")
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.stdout == f"{folder} [] [{Path(folder).name!r}]\n", done.stderr


@pytest.mark.skipif(
    shutil.which("bwrap") is None or not all(map(importlib.util.find_spec, ("httpx", "ipykernel"))),
    reason="L0's way needs bubblewrap, ipykernel and httpx",
)
def test_the_quick_run_prints_every_figure(tmp_path: Path):
    command = [sys.executable, "bench/throughput.py", "--quick", "--results", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.keys() >= KEYS_OF_THE_RESULT
    assert result == json.loads((tmp_path / "throughput.json").read_text())
    assert result["agents"] == result["peak_alive"] == 32
    assert result["lost"] == 0
    full = result["runs"][-1]
    assert full["turns_per_s"] == result["turns_per_s_full"]
    # how many turns a second that is depends on who else uses the machine; that the engine waits for the host does not
    assert full["engine_busy"] < result["engine_busy"] / 2, "an engine that never waits is no harder on the host"
    theirs, ours = result["l0_style"]["theirs"], result["l0_style"]["ours"]
    assert theirs["turns"] == ours["turns"], "both play the same episodes"
    assert result["cpu_ratio_l0_style"] > result["cpu_ratio_l0_style_without_asking"] > 1
    assert 0 < theirs["asking_us_per_turn"] < theirs["cpu_us_per_turn"]
    assert not [name for name in os.listdir("/proc") if name.isdigit() and _is_ours(name)]


def _is_ours(pid: str) -> bool:
    """A worker of L0's way that was left behind."""
    with contextlib.suppress(OSError):
        return b"execute_interactive" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False
