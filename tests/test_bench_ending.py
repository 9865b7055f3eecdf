"""A benchmark that is told to end takes away what it made, however it was started."""

import signal
import subprocess
import sys

import pytest

BENCH = """
import asyncio
from bench.ending import end_like_ctrl_c

async def main():
    print("up", flush=True)
    try:
        await asyncio.sleep(600)
    finally:
        await asyncio.sleep(0)
        print("tidy", flush=True)

end_like_ctrl_c()
asyncio.run(main())
"""


@pytest.mark.parametrize("inherited", [signal.SIG_DFL, signal.SIG_IGN], ids=["in front", "in the background"])
def test_sigterm_ends_it_as_ctrl_c_does(inherited):
    bench = subprocess.Popen(
        [sys.executable, "-c", BENCH],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # as a shell starts what stands before an `&` in a script
        preexec_fn=lambda: signal.signal(signal.SIGINT, inherited),
    )
    try:
        assert bench.stdout.readline() == "up\n"
        bench.terminate()
        said, error = bench.communicate(timeout=20)
    finally:
        bench.kill()
        bench.communicate()
    assert said == "tidy\n"
    assert "KeyboardInterrupt" in error
    assert bench.returncode != 0
