"""Which room may import which, and what must stay cheap to import."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

HEAVY = {"torch", "transformers", "sglang", "aiodocker", "matplotlib"}


@pytest.mark.parametrize(
    ("module", "must_not_load"),
    [
        ("l0fast.config", HEAVY),
        ("l0fast.types", HEAVY),
        ("l0fast.errors", HEAVY),
        ("l0fast.cli", HEAVY),
        ("l0fast.run_dir", HEAVY),
        ("l0fast.metrics", HEAVY),
        ("l0fast.meters", HEAVY | {"wandb", "tensorboard", "prometheus_client"}),
        ("l0fast.trajectory", HEAVY),
        ("l0fast.report.live", HEAVY),
        ("l0fast.report.plots", HEAVY),
        ("l0fast_kernels", {"l0fast", "sglang", "transformers"}),
        ("l0fast.agent.nb_agent", {"torch", "sglang"}),
        ("l0fast.rollout.rollouts", {"torch", "sglang"}),
        ("l0fast.rollout.admission", {"torch", "sglang"}),
        ("l0fast.rollout.whatif", HEAVY),
        ("l0fast.engine.gate", {"torch", "sglang"}),
        ("l0fast.rollout.sampling", {"torch", "sglang"}),
        ("l0fast.engine.base", {"torch", "sglang"}),
        ("l0fast.engine.transformers", {"torch", "sglang"}),
        ("l0fast.engine.simulated", {"torch", "sglang"}),
        ("l0fast.engine.traffic", HEAVY),
        ("l0fast.engine.openai", HEAVY),
        ("l0fast.agent.__main__", HEAVY),
        ("l0fast.serve", HEAVY),
        ("l0fast.learner.client", {"torch", "sglang"}),
        ("l0fast.sandbox.base", HEAVY),
        ("l0fast.run", HEAVY),
    ],
)
def test_import_stays_in_its_room(module: str, must_not_load: set[str]):
    code = f"import sys, {module}; print(*{{m.partition('.')[0] for m in sys.modules}} & {must_not_load!r})"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip(), f"importing {module} also loads {done.stdout.strip()}"


FLOORS = [
    {"__init__", "types", "config", "errors", "metrics", "trace", "run_dir", "seeding", "ipc"}
    | {"http_dates", "proxies", "step_shares", "loop_lag", "watchdog", "sinks", "meters", "observer"}
    | {
        "signs",
        "children",
        "child_pool",
        "garbage",
        "files",
        "disk",
        "hub",
        "nvidia_smi",
        "allocator",
        "cgroups",
        "deadlines",
        "ids",
        "segments",
        "prefixes",
    }
    | {"first_process"},
    # an endpoint that answers is also a judge of answers, and looks at pictures for a tool
    {"sandbox", "tools", "tasks", "engine", "corpus"},
    {"agent"},
    {"rollout", "learner", "report", "evaluation"},
    # commands
    {
        "cli",
        "run",
        "training",
        "rooms",
        "heldout",
        "layout",
        "trajectory",
        "warm_start",
        "doctor",
        "export",
        "serve",
        "data",
        "corpus",
    }
    | {"ask", "policies", "evaluate", "dry_run"},
]
"""Imports point down, or stay on their floor."""

WALLS = {
    "rollout": {"learner", "report"},
    "learner": {"rollout", "report"},
    "report": {"rollout", "learner"},
    "engine": {"agent", "sandbox", "tools", "tasks", "corpus"},
    "sandbox": {"tasks", "tools", "engine", "corpus"},
    "tools": {"tasks", "sandbox.docker", "sandbox.process", "sandbox.bwrap"},
}
"""Rooms of one floor that don't know each other."""

PROTOCOLS = {"engine": "engine.base", "sandbox": "sandbox.base"}
"""All that the agent knows of what it talks to."""


def sources(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Absolute names of what a file imports, at any depth of its code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join((*package, node.module) if node.module else package)
            # `from l0fast import errors` and `from . import repl` import modules, `from l0fast.errors import X` a name
            if module == "l0fast" or not node.module:
                found |= {f"{module}.{alias.name}" for alias in node.names if not alias.name.startswith("__")}
            else:
                found.add(module)
    return found


def floor(room: str) -> int:
    found = [i for i, rooms in enumerate(FLOORS) if room in rooms]
    assert found, f"l0fast/{room} stands on no floor: give it one in FLOORS"
    return found[0]


@pytest.mark.parametrize("path", sources("l0fast"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path):
    # what a room offers as a command is wired like one
    room = "run" if path.name == "__main__.py" else path.relative_to(ROOT / "l0fast").parts[0].removesuffix(".py")
    level = floor(room)
    for name in sorted(imports(path)):
        package, _, rest = name.partition(".")
        if package != "l0fast" or not rest:
            continue
        other = rest.partition(".")[0]
        assert floor(other) <= level, f"{path.name} imports {name}, which is above it"
        walls = WALLS.get(room, set())
        assert not {other, rest} & walls, f"{path.name} imports {name}: {room} doesn't know it"
        if room == "agent" and other in PROTOCOLS:
            assert rest == PROTOCOLS[other], f"{path.name} imports {name}: the agent knows only {PROTOCOLS[other]}"


@pytest.mark.parametrize("path", sources("l0fast/sandbox/guest"), ids=lambda path: path.name)
def test_the_guest_is_standard_library_alone(path: Path):
    foreign = {name for name in imports(path) if name.partition(".")[0] not in sys.stdlib_module_names}
    assert not {name for name in foreign if not name.startswith("l0fast.sandbox.guest.")}


@pytest.mark.parametrize("path", sources("kernels"), ids=lambda path: path.name)
def test_kernels_know_torch_and_triton_only(path: Path):
    allowed = sys.stdlib_module_names | {"torch", "triton", "l0fast_kernels"}
    assert not {name for name in imports(path) if name.partition(".")[0] not in allowed}


def test_the_kernels_folder_is_no_package():
    # `kernels` is Hugging Face's import name
    assert not (ROOT / "kernels" / "__init__.py").exists()
