"""A run that hangs ends with a diagnosis: of a stalled engine, sandbox, tool and learner, and of a blocked loop."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import indent

import pytest

from l0fast import watchdog as watchdog_module
from l0fast.errors import EngineError, WorldError
from l0fast.loop_lag import LoopLag
from l0fast.step_shares import Activity, StepShares
from l0fast.watchdog import LoopBlocked, Watchdog, diagnose, stacks_of_tasks

QUIET_S = 300.0


class Time:
    now = 0

    def __call__(self) -> int:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += int(seconds * 1e9)


async def fine() -> str:
    return "fine"


async def for_ever() -> str:
    await asyncio.get_running_loop().create_future()
    raise AssertionError


@dataclass
class Run:
    """Agents of a run whose rooms may be stuck, and its watchdog, on a clock that tests move."""

    time: Time = field(default_factory=Time)
    lines: list[str] = field(default_factory=list)
    probes: dict[str, Callable[[], Awaitable[str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shares = StepShares(self.time)
        probes = dict.fromkeys(("engine", "sandbox", "tools", "learner"), fine) | self.probes
        self.watchdog = Watchdog(self.shares.quiet, probes, quiet_s=QUIET_S, blocked_s=60.0, log=self.lines.append)

    async def agent(self, *stuck_in: str) -> None:
        episode = self.shares.episode("e")
        try:
            for name in ("generate", "lease"):
                with episode.span(name):
                    await (for_ever() if name in stuck_in else fine())
            with episode.span("execute"):
                with episode.span("tool"):
                    await (for_ever() if "tool" in stuck_in else fine())
                await (for_ever() if "execute" in stuck_in else fine())
        finally:
            episode.end()

    async def step(self, *stuck_in: str) -> None:
        for name in ("take", "learn", "sync"):
            with self.shares.span(name):
                await (for_ever() if name in stuck_in else fine())

    async def verdict(self, *tasks: asyncio.Task[None]) -> str:
        """What the watchdog says when the tasks have got as far as they can."""
        try:
            for _ in range(20):
                await asyncio.sleep(0)
            self.time.passes(QUIET_S - 1)
            await self.watchdog.look()
            self.time.passes(2)
            with pytest.raises(WorldError) as error:
                await self.watchdog.look()
            return str(error.value)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


@pytest.mark.parametrize(
    ("stuck_agents", "stuck_step", "says"),
    [
        (
            ["generate"] * 3 + ["execute"],
            "take",
            "the engine has 3 requests outstanding and has answered none for 301 s",
        ),
        (["lease"] * 3, "take", "3 episodes wait for a session, and the sandbox has given none for 301 s"),
        (["execute"], "take", "the sandbox runs 1 cell and has finished none for 301 s"),
        (["tool"] * 2 + ["execute"], "take", "2 calls of tools are outstanding, and none was answered for 301 s"),
        (["generate"] * 3, "learn", "the learner has not finished a step for 301 s"),
        (["generate"] * 3, "sync", "the engine has not taken the new weights for 301 s"),
    ],
)
def test_each_room_that_is_stuck_has_its_own_diagnosis(stuck_agents: list[str], stuck_step: str, says: str):
    async def main() -> None:
        run = Run()
        agents = [asyncio.create_task(run.agent(room), name=f"episode {i}") for i, room in enumerate(stuck_agents)]
        step = asyncio.create_task(run.step(stuck_step), name="step")
        verdict = await run.verdict(*agents, step)
        assert f"nothing has finished for 301 s, and {says} (its state: fine)" in verdict
        assert "--watchdog.quiet-s" in verdict
        (written,) = run.lines
        assert "learner: fine" in written
        assert "Run.agent" in written
        assert "for_ever" in written, "what a task waits for, not only where it began"

    asyncio.run(main())


def test_a_room_that_does_not_say_its_state_is_the_first_suspect(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watchdog_module, "PROBE_S", 0.0)

    async def broken() -> str:
        raise EngineError("the worker is gone")

    async def main() -> None:
        run = Run(probes={"sandbox": for_ever, "learner": broken})
        agents = [asyncio.create_task(run.agent(room)) for room in ["generate"] * 5 + ["execute"]]
        verdict = await run.verdict(*agents)
        assert "the sandbox runs 1 cell" in verdict
        assert "did not answer within 0 s" in verdict
        assert "learner: EngineError: the worker is gone" in run.lines[0]

    asyncio.run(main())


def test_what_fails_over_and_over_is_no_progress():
    async def main() -> None:
        run = Run()

        async def fail() -> None:
            with run.shares.span("sync"):
                run.time.passes(QUIET_S / 8)
                raise EngineError("no")

        for _ in range(10):
            with pytest.raises(EngineError):
                await fail()
        with pytest.raises(WorldError, match="l0fast waits for itself"):
            await run.watchdog.look()

    asyncio.run(main())


def test_where_something_finishes_nothing_is_said():
    async def main() -> None:
        run = Run()
        for _ in range(10):
            with run.shares.episode("e").span("generate"):
                run.time.passes(QUIET_S - 1)
            await run.watchdog.look()
        assert not run.lines
        forbearing = Watchdog(run.shares.quiet, {}, quiet_s=0, blocked_s=0, log=run.lines.append)
        run.time.passes(100 * QUIET_S)
        await forbearing.look()

    asyncio.run(main())


def test_tasks_that_wait_at_the_same_place_are_told_once():
    async def inner() -> None:
        await for_ever()

    async def main() -> None:
        tasks = [asyncio.create_task(inner(), name=f"episode {i}") for i in range(500)]
        await asyncio.sleep(0)
        said = stacks_of_tasks()
        assert said.startswith("501 tasks:")
        assert said.count("for_ever") == 1
        assert "500 x " in said
        assert " and 497 more" in said
        for task in tasks:
            task.cancel()

    asyncio.run(main())


def test_nothing_open_is_our_own_fault():
    assert diagnose({"take": Activity(1, 9.0)})[0] == "l0fast"


# --- a loop that is blocked ------------------------------------------------------------------------------------------


def test_a_blocked_loop_is_interrupted_where_it_is_held():
    lines: list[str] = []

    async def main() -> None:
        watchdog = Watchdog(lambda: (0.0, {}), {}, quiet_s=QUIET_S, blocked_s=0.1, log=lines.append)
        lag = LoopLag(on_late=watchdog.loop_is_late)
        beat = asyncio.create_task(lag.run())
        await asyncio.sleep(0)
        try:
            with pytest.raises(LoopBlocked, match=r"more than 0\.1 s by .*hold_the_loop: every thread's stack"):
                hold_the_loop()
            # in a callback it would have been logged, and forgotten
            with pytest.raises(LoopBlocked, match="hold_the_loop"):
                await watchdog.look()
        finally:
            beat.cancel()
            await asyncio.wait([beat])

    asyncio.run(main())
    (written,) = lines
    assert "MainThread" in written
    assert "hold_the_loop" in written


def hold_the_loop() -> None:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        pass


HELD = """
# with the interpreter lock held no thread of Python's can do anything
ctypes.PyDLL(None).usleep(60_000_000)
"""
DEAF = """
# what hung hangs at its end, too
while True:
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        pass
"""


@pytest.mark.parametrize(("hangs", "quiet_s", "blocked_s"), [(HELD, 900, 0.02), (DEAF, 1e-6, 0)])
def test_a_run_that_can_not_end_itself_is_ended_with_its_stacks(
    tmp_path: Path, hangs: str, quiet_s: float, blocked_s: float
):
    script = tmp_path / "script.py"
    body = indent(hangs.strip(), " " * 8)
    script.write_text(
        f"""
import asyncio, ctypes
from l0fast import watchdog
watchdog.UNWIND_S = 0.2

async def main():
    dog = watchdog.Watchdog(lambda: (1.0, {{}}), {{}}, quiet_s={quiet_s}, blocked_s={blocked_s}, log=lambda line: None)
    async with asyncio.TaskGroup() as tg:
        tg.create_task(dog.run())
        await asyncio.sleep(0)
{body}

asyncio.run(main())
"""
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "Timeout (0:00:00.2" in done.stderr, "faulthandler's own words"
    assert "script.py" in done.stderr
    assert time.monotonic() - began < 20
