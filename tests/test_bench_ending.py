"""A benchmark that is told to end takes away what it made, however it was started."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench import admission, compiled, main_job, own_daemon, simulate, simulated_speed

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
        assert bench.stdout is not None
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


@pytest.mark.parametrize("bench", [admission, compiled, own_daemon, simulate, simulated_speed])
def test_ctrl_c_is_heard_before_anything_is_begun(monkeypatch: pytest.MonkeyPatch, bench):
    class Told(Exception):
        pass

    def told() -> None:
        raise Told

    monkeypatch.setattr(bench, "end_like_ctrl_c", told)
    with pytest.raises(Told):
        bench.main([])


def test_a_run_that_a_benchmark_started_is_told_once_and_has_its_time_to_save():
    run = """if 1:
        import signal
        def save(*_):
            print("saving", flush=True)
            print(input(), flush=True)
            raise SystemExit
        signal.signal(signal.SIGTERM, save)
        print("up", flush=True)
        signal.pause()
    """
    code = "import sys; from bench import ending; ending.end_like_ctrl_c(); ending.run_to_its_end([sys.executable, '-c', sys.argv[1]])"
    bench = subprocess.Popen(
        [sys.executable, "-c", code, run],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert bench.stdout is not None
    assert bench.stdout.readline() == "up\n"
    bench.send_signal(signal.SIGTERM)
    assert bench.stdout.readline() == "saving\n"
    said, _ = bench.communicate("saved\n", timeout=20)
    assert said == "saved\n"
    assert bench.returncode == -signal.SIGINT


@pytest.mark.parametrize(
    ("file", "says", "sentence"),
    [
        (
            "summary.json",
            {"finished": False},
            "was told to end before its end: delete the folder to have it run again, or",
        ),
        ("config.toml", {}, "ended with exit code 2: see above"),
    ],
)
def test_a_main_job_that_did_not_end_is_no_measurement(monkeypatch, tmp_path: Path, file, says, sentence):
    run_dir = tmp_path / "geography-seed-0"
    run_dir.mkdir()
    (run_dir / file).write_text(json.dumps(says))
    monkeypatch.setattr("sys.argv", ["bench.main_job", "--out", str(tmp_path), "--seeds", "0"])
    with pytest.raises(SystemExit, match=f"the run in {run_dir} {sentence}"):
        main_job.main()
