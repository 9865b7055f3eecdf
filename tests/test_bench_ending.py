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


# a shell has what stands before an `&` in a script ignore SIGINT
@pytest.mark.parametrize("before", ["", "trap '' INT; "], ids=["in front", "in the background"])
def test_sigterm_ends_it_as_ctrl_c_does(before):
    bench = subprocess.Popen(
        ["sh", "-c", f'{before}exec "$0" -c "$1"', sys.executable, BENCH],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert bench.stdout.readline() == "up\n"
        bench.terminate()
        said, error = bench.communicate(timeout=20)
    finally:
        bench.kill()
        bench.communicate()
    assert said == "tidy\n"
    assert error == "told to end (Ctrl-C or SIGTERM) before its end\n"
    assert bench.returncode == -signal.SIGINT


def test_an_error_has_its_traceback_all_the_same():
    bench = "from bench.ending import end_like_ctrl_c; end_like_ctrl_c(); 1 / 0"
    ended = subprocess.run([sys.executable, "-c", bench], capture_output=True, text=True)
    assert "Traceback" in ended.stderr
    assert "ZeroDivisionError" in ended.stderr
