"""A program of someone else's as a child: its words, its end, and ours."""

import asyncio
import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from l0fast.children import TAIL_LINES, child, output_of
from l0fast.rollout.whatif import AdviceError
from tests.command import children_of, wait_until_gone


@pytest.fixture(autouse=True)
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module `odd_program` that each test writes."""
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "odd_program.py"


def test_its_lines_are_told_and_its_last_words_kept(program: Path):
    program.write_text(
        "import sys\nfor i in range(99): print('line', i)\nprint('half', end='\\r', file=sys.stderr)\nsys.exit(3)"
    )
    told: list[str] = []

    async def main() -> tuple[int, str]:
        async with child("odd_program", name="it", on_line=told.append) as started:
            return await started.wait(), str(await started.died())

    code, words = asyncio.run(main())
    assert code == 3
    assert sorted(told) == sorted([*(f"line {i}" for i in range(99)), "half"])
    assert words.startswith("it ended with code 3; its last words:\n  ")
    assert len(words.splitlines()) == 1 + TAIL_LINES


def test_a_module_that_is_not_there_is_told_in_pythons_words():
    async def main() -> str:
        async with child("no_such_module", name="it") as started:
            await started.wait()
            return str(await started.died())

    assert "No module named no_such_module" in asyncio.run(main()).replace("'", "")


STUBBORN = """\
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"])
time.sleep(600)
"""


def test_leaving_the_block_ends_it_and_all_it_started(program: Path):
    program.write_text(STUBBORN)

    async def main() -> set[int]:
        up = asyncio.Event()
        async with child("odd_program", name="it", on_line=lambda line: up.set(), close_timeout_s=0.1) as started:
            await asyncio.wait_for(up.wait(), 30)
            pids = {started.pid, *children_of(started.pid)}
        assert len(pids) == 2
        assert len(asyncio.all_tasks()) == 1
        return pids

    assert not wait_until_gone(asyncio.run(main()))


def test_a_polite_one_has_time_to_end(program: Path):
    program.write_text(
        "import signal, sys, time\n"
        "def end(*_): print('goodbye', flush=True); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\nprint('up', flush=True)\ntime.sleep(600)"
    )
    told: list[str] = []

    async def main() -> None:
        up = asyncio.Event()

        def on_line(line: str) -> None:
            told.append(line)
            up.set()

        async with child("odd_program", name="it", on_line=on_line) as started:
            await asyncio.wait_for(up.wait(), 30)
        assert await started.wait() == 0

    asyncio.run(main())
    assert told == ["up", "goodbye"]


def test_it_ends_when_we_are_killed(program: Path):
    program.write_text("import time\nprint('up', flush=True)\ntime.sleep(600)")
    code = (
        "import asyncio\nfrom l0fast.children import child\nasync def main():\n"
        "    async with child('odd_program', name='it', on_line=lambda line: print(started.pid, flush=True)) as started:\n"
        "        await started.wait()\nasyncio.run(main())"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        parent.send_signal(signal.SIGKILL)
    assert not wait_until_gone({pid})


def test_a_machine_without_room_for_another_process_is_an_error_of_the_kind_that_was_asked_for(monkeypatch):
    async def no_memory(*words: str, **kinds: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(asyncio, "create_subprocess_exec", no_memory)
    with pytest.raises(AdviceError, match=r"no advice on runs/x \(\[Errno 12\] Cannot allocate memory\)"):
        asyncio.run(output_of("odd_program", error=AdviceError, without="no advice on runs/x", timeout_s=1))
