"""A module run with the simulated engines compiled by mypyc: the same source and the same figures, in less time.

Agents that are figures (engine/traffic.py) take a tenth to a quarter of the time, those that are coroutines half to 70 %.

    python -m bench.compiled bench.admission --seconds 9600
    python -m bench.compiled pytest tests/engine/test_simulated_replica.py

Needs `pip install -e '.[bench]'`, a C compiler and Python's headers. What was compiled is kept in build/compiled/, one folder
for each state of the sources, and loaded from there by this command alone: nothing else ever meets it.
"""

import argparse
import hashlib
import importlib.metadata
import os
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path

from bench.ending import end_like_ctrl_c
from l0fast.errors import L0fastError, UsageError

ROOT = Path(__file__).parent.parent
SOURCES = tuple(
    f"l0fast/engine/{name}.py"
    for name in ("clock", "distributions", "placement", "schedule", "simulated_cluster", "simulated_replica", "traffic")
)
"""What costs time where a turn is simulated. They may import others, whose types mypyc then takes for anything."""
OPTIONS = (
    "--follow-imports=skip",
    "--ignore-missing-imports",
    "--disable-error-code=func-returns-value",
    "--cache-dir=/dev/null",
)
TIMEOUT_S = 600.0


class Compiled(MetaPathFinder):
    """The compiled modules, found before their sources."""

    def __init__(self, folder: Path):
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        self._files = {
            ".".join((path.parent / path.name.removesuffix(suffix)).relative_to(folder).parts): path
            for path in folder.rglob(f"*{suffix}")
        }

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        file = self._files.get(fullname)
        return None if file is None else spec_from_file_location(fullname, file)


def compiled(root: Path = ROOT, sources: Sequence[str] = SOURCES) -> Path:
    """The folder of the compiled modules, filled first where there is none for this state of the sources.

    Args:
        root: above `sources`, and where build/compiled/ is.

    Raises:
        UsageError: there is no mypyc, or it can't compile them.
    """
    try:
        mypy = importlib.metadata.version("mypy")
    except importlib.metadata.PackageNotFoundError as e:
        raise UsageError("bench.compiled needs mypyc, and there is none: pip install -e '.[bench]'") from e
    state = hashlib.sha256(repr((sys.version, mypy, OPTIONS)).encode())
    for source in sources:
        state.update(source.encode() + (root / source).read_bytes())
    folder = root / "build" / "compiled" / state.hexdigest()[:16]
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="making-") as making:
            copies, made = Path(making) / "copies", Path(making) / "made"
            _compile(root, sources, copies)
            shutil.rmtree(copies / "build")
            for file in copies.rglob("*.so"):
                (to := made / file.relative_to(copies)).parent.mkdir(parents=True, exist_ok=True)
                file.rename(to)
            try:
                made.rename(folder)
            except OSError:
                # somebody else was faster
                if not folder.exists():
                    raise
    return folder


def _compile(root: Path, sources: Sequence[str], folder: Path) -> None:
    """mypyc writes beside the sources, so it gets a copy of them."""
    for source in sources:
        copy = folder / source
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / source, copy)
        for parent in copy.relative_to(folder).parents[:-1]:
            # a package, or its modules would have other names
            if (init := root / parent / "__init__.py").exists():
                shutil.copy(init, folder / parent)
    command = [sys.executable, "-m", "mypyc", *OPTIONS, *sources]
    environment = {**os.environ, "MYPYC_OPT_LEVEL": "3"}
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=TIMEOUT_S)
        except BaseException as e:
            # mypyc has a compiler at work, which would go on
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(e, subprocess.TimeoutExpired):
                raise UsageError(f"mypyc did not compile {', '.join(sources)} within {TIMEOUT_S:.0f} s") from e
            raise
    if process.returncode:
        raise UsageError(
            "\n".join(
                [
                    *said.strip().splitlines()[-20:],
                    "mypyc could not compile that; it needs a C compiler and Python's headers (gcc, python3-dev)",
                ]
            )
        )


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        # nor what it would be in
        return False


def main(argv: list[str] | None = None) -> int:
    end_like_ctrl_c()
    parser = argparse.ArgumentParser(
        prog="python -m bench.compiled", description="Run a module with the simulated engines compiled by mypyc."
    )
    parser.add_argument("module", help="what `python -m` would run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    args = parser.parse_args(argv)
    if not _is_there(args.module):
        parser.error(f"no module is called {args.module}: give what `python -m` would run, e.g. bench.admission")
    try:
        sys.meta_path.insert(0, Compiled(compiled()))
    except L0fastError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    sys.argv = [args.module, *args.arguments]
    runpy.run_module(args.module, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
