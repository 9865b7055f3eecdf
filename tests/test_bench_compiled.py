"""bench.compiled: the same figures as the interpreted engines, whatever the sources are changed to, and a way out where it can't."""

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import bench.compiled
from bench.compiled import ROOT, Compiled, compiled, main
from l0fast.errors import UsageError
from tests.command import wait_until_gone

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("mypyc") is None
        or shutil.which("cc") is None
        or not Path(sysconfig.get_path("include"), "Python.h").exists(),
        reason="mypyc, a C compiler or Python's headers are missing",
    ),
]


def simulated(out: Path, *runner: str) -> dict:
    command = [sys.executable, *runner, "bench.admission", "--seconds", "20", "--out", out]
    subprocess.run(command, cwd=ROOT, capture_output=True, timeout=110, check=True)
    return json.loads((out / "admission.json").read_text())


def test_compiled_engines_give_the_same_figures_as_interpreted_ones(tmp_path):
    result, result_compiled = simulated(tmp_path, "-m"), simulated(tmp_path, "-m", "bench.compiled")
    assert (result["compiled"], result_compiled["compiled"]) == (False, True)
    rows, rows_compiled = (
        [row | {"wall_s": 0, "times_real_time": 0} for rows in r["rows"].values() for row in rows]
        for r in (result, result_compiled)
    )
    assert len(rows) == 24
    assert rows == rows_compiled


def test_a_changed_source_is_compiled_anew_and_nothing_else_is_left(tmp_path):
    source = tmp_path / "answer.py"
    answers = []
    for answer in (41, 42):
        source.write_text(f"def answer() -> int:\n    return {answer}\n")
        folder = compiled(tmp_path, ["answer.py"])
        assert compiled(tmp_path, ["answer.py"]) == folder
        program = (
            f"import sys; from pathlib import Path; from bench.compiled import Compiled; "
            f"sys.meta_path.insert(0, Compiled(Path({str(folder)!r}))); import answer; "
            "assert answer.__file__.endswith('.so'); print(answer.answer())"
        )
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
        answers.append(done.stdout.strip())
        assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".so"}
    assert answers == ["41", "42"]
    assert len(list((tmp_path / "build" / "compiled").iterdir())) == 2


def test_what_cannot_be_compiled_is_said_and_leaves_no_folder(tmp_path):
    (tmp_path / "answer.py").write_text('def answer() -> int:\n    return "42"\n')
    with pytest.raises(UsageError, match=r"answer\.py:2: error.*\n(.*\n)*mypyc could not compile that"):
        compiled(tmp_path, ["answer.py"])
    assert list((tmp_path / "build" / "compiled").iterdir()) == []


def test_a_compiler_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    mypyc, pids = tmp_path / "mypyc", tmp_path / "pids"
    mypyc.write_text(f"#!/bin/sh\nsleep 600 &\necho $! $$ > {pids}\nwait\n")
    mypyc.chmod(0o755)
    (tmp_path / "answer.py").touch()
    monkeypatch.setattr(sys, "executable", str(mypyc))
    monkeypatch.setattr(bench.compiled, "TIMEOUT_S", 1.0)
    with pytest.raises(UsageError, match=r"mypyc did not compile answer\.py within 1 s"):
        compiled(tmp_path, ["answer.py"])
    assert not wait_until_gone(set(map(int, pids.read_text().split())))
    assert list((tmp_path / "build" / "compiled").iterdir()) == []


def test_without_mypyc_the_way_out_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.metadata.Distribution, "discover", lambda **_: iter(()))
    with pytest.raises(UsageError, match=r"needs mypyc, and there is none: pip install -e '\.\[bench\]'"):
        compiled(tmp_path, ["answer.py"])


@pytest.mark.parametrize("module", ["bench.nothing", "nothing.at_all"])
def test_a_module_that_is_not_there_is_one_sentence(module, capsys):
    with pytest.raises(SystemExit):
        main([module])
    assert f"no module is called {module}: give" in capsys.readouterr().err


def test_other_modules_are_left_to_python(tmp_path):
    assert Compiled(tmp_path).find_spec("json") is None
