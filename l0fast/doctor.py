"""python -m l0fast.doctor [--json]: what this machine can run, and the command for what it can't yet.

    a probe          -> one line: what, ok | missing | can't, what was found, what would mend it
    the last two     what `sandbox.kind = "auto"` takes here, tried with a cell; whether the default recipe can run

Probes look, they don't guess: bubblewrap is run, the daemon asked, a session started. Each has a deadline and its own
thread or task, so one that hangs or fails costs its own line only. Exit code 0 where the default recipe can run, else 1.
"""

import argparse
import asyncio
import ctypes
import errno
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from l0fast.cgroups import MOUNTED, OWN, cgroup_files, cores
from l0fast.cli import default_recipe
from l0fast.config import SandboxConfig
from l0fast.errors import L0fastError, SandboxError
from l0fast.run_dir import command
from l0fast.sandbox import open_sandbox
from l0fast.sandbox.guest import landlock
from l0fast.sandbox.guest.seccomp import PR_SET_SECCOMP, SECCOMP_MODE_FILTER, TABLES

PROBE_TIMEOUT_S = 10.0
"""Longest a probe may take [s]."""
_SLOW_TIMEOUT_S = 60.0
"""The same where torch has to be loaded, or a shard started [s]."""
MEMORY_GB, DISK_GB = 3.0, 1.0
"""What the default recipe needs, with room to spare."""
_FDS_PER_SESSION, _FDS_BESIDES = 2, 256
_PIDS_BESIDES = 256

Mark = Literal["ok", "missing", "can't"]


@dataclass(frozen=True, slots=True)
class Finding:
    name: str
    mark: Mark
    what: str
    """What was found."""
    fix: str = ""
    """A command, or what to do."""
    needed: bool = False
    """The default recipe can't run without it."""


Probe = Callable[[], Finding]


async def examine() -> list[Finding]:
    """Every probe's finding, in the order of the list; never raises for what a machine lacks."""
    async with asyncio.TaskGroup() as tg:
        looks = [tg.create_task(_in_thread(name, probe, timeout_s)) for name, probe, timeout_s in _PROBES]
        docker = tg.create_task(_docker())
    findings = [look.result() for look in looks] + docker.result()
    image = next((f for f in docker.result() if f.name == "image"), None)
    # a look must not download: without its image, docker is left out of the trial
    kinds = ("bwrap", "process") if image is not None and image.mark != "ok" else ("auto",)
    return [*findings, await _sandbox(kinds)]


def can_run(findings: Sequence[Finding]) -> bool:
    """Whether the default recipe can."""
    return all(f.mark == "ok" for f in findings if f.needed)


# --- the machine -----------------------------------------------------------------------------------------------------


def _python() -> Finding:
    return Finding("Python", "ok", f"{platform.python_version()}, {sys.executable}", needed=True)


def _system() -> Finding:
    good = sys.platform == "linux" and platform.machine() in TABLES
    return Finding(
        "system", "ok" if good else "can't", f"{platform.system()} {platform.release()} on {platform.machine()}",
        "" if good else f"use Linux on {' or '.join(TABLES)}", needed=True,
    )  # fmt: skip


def _cores() -> Finding:
    of_quota = " by its cgroup's quota" if cores() < len(os.sched_getaffinity(0)) else ""
    return Finding("cores", "ok", f"{cores()} for this process{of_quota}, {os.cpu_count()} in all")


def _memory() -> Finding:
    free_gb, within = _meminfo("MemAvailable") / 1e9, ""
    for limit, file in _cgroup_limits("memory", "memory.limit_in_bytes", "memory.max"):
        if (room_gb := (limit - _memory_used(file.parent)) / 1e9) <= free_gb:
            free_gb, within = room_gb, f", within this cgroup's {limit / 1e9:.1f} GB"
    return _enough("memory", free_gb, MEMORY_GB, f"{free_gb:.1f} GB free{within}", "end other programs")


def _disk() -> Finding:
    folder = Path("runs").resolve()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        return Finding(
            "disk", "missing", f"{folder} is not yours to write to", "cd elsewhere, or name a --run-dir", True
        )
    free_gb = shutil.disk_usage(folder).free / 1e9
    return _enough("disk", free_gb, DISK_GB, f"{free_gb:.1f} GB free at {folder}", "make room, or name a --run-dir")


def _shm() -> Finding:
    size = shutil.disk_usage("/dev/shm").total
    good = size >= 1 << 30
    return Finding(
        "/dev/shm", "ok" if good else "missing", f"{size / 1e9:.2f} GB; GPU libraries want 1 GB, the default recipe none",
        "" if good else "mount -o remount,size=1G /dev/shm (in a container: docker run --shm-size 1g)",
    )  # fmt: skip


def _cuda() -> Finding:
    if _version("torch") is None:
        return Finding(
            "CUDA", "missing", "torch is not installed, and tells", "pip install 'l0fast[cpu]', or 'l0fast[gpu]'"
        )
    if not os.path.exists("/dev/nvidiactl"):
        return Finding("CUDA", "missing", "no NVIDIA driver here; the default recipe needs none")
    code = "import torch; print(*[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())], sep=', ')"
    devices = _output([sys.executable, "-W", "ignore", "-c", code], _SLOW_TIMEOUT_S - 1)
    if devices:
        return Finding("CUDA", "ok", devices)
    return Finding(
        "CUDA",
        "can't",
        f"a driver, but torch {_version('torch')} sees no device",
        "nvidia-smi; pip install 'l0fast[gpu]'",
    )


def _nvcc() -> Finding:
    """SGLang compiles kernels of its models when it starts, with the compiler it finds in this way."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not os.access(nvcc, os.X_OK):
        return Finding(
            "nvcc", "missing", f"no {nvcc}, with which sglang compiles kernels; the default recipe needs none",
            "install NVIDIA's CUDA toolkit, or set CUDA_HOME to where it is",
        )  # fmt: skip
    said = _output([nvcc, "--version"]).partition("release ")[2]
    return Finding("nvcc", "ok" if said else "can't", f"{said.split(',')[0] or 'says no version'}, {nvcc}")


def _package(name: str, fix: str, *, needed: bool = False) -> Probe:
    def look() -> Finding:
        version = _version(name)
        return Finding(name, "ok" if version else "missing", version or "not installed", "" if version else fix, needed)

    return look


def _policies() -> Finding:
    wanted, folder = default_recipe().model.path, Path(__file__).parent / "models"
    there = sorted(path.parent.name for path in folder.glob("*/model.safetensors"))
    good = wanted in there
    return Finding(
        "policies", "ok" if good else "missing", ", ".join(there) or f"none in {folder}",
        "" if good else f"python -m l0fast.warm_start --out {folder / wanted}", needed=True,
    )  # fmt: skip


# --- what contains agents --------------------------------------------------------------------------------------------


def _bwrap() -> Finding:
    if shutil.which("bwrap") is None:
        return Finding("bubblewrap", "missing", "not installed", "apt-get install -y bubblewrap")
    version = _output(["bwrap", "--version"]).removeprefix("bubblewrap ")
    argv = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "true"]
    tried = subprocess.run(argv, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S - 1)
    if tried.returncode == 0:
        return Finding("bubblewrap", "ok", f"{version}, starts")
    return Finding("bubblewrap", "can't", f"{version}: {tried.stderr.strip()}", _allow_user_namespaces())


def _seccomp() -> Finding:
    # a null filter can't be installed: EFAULT says that filters are known, EINVAL that they are not
    libc = ctypes.CDLL(None, use_errno=True)
    ctypes.set_errno(0)
    libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, None, 0, 0)
    known = ctypes.get_errno() == errno.EFAULT
    return Finding("seccomp", "ok" if known else "can't", "filters" if known else "this kernel has no filters")


def _landlock() -> Finding:
    abi = landlock.abi()
    if abi:
        scopes = "" if abi >= 6 else "; 6 would also confine signals and abstract sockets"
        return Finding("Landlock", "ok", f"ABI {abi}{scopes}")
    return Finding("Landlock", "can't", "not in this kernel", "Linux 5.13 or newer, started with lsm=landlock,...")


def _user_namespaces() -> Finding:
    if shutil.which("unshare") is None:
        return Finding("user namespaces", "missing", "no unshare to try with", "apt-get install -y util-linux")
    tried = subprocess.run(["unshare", "--user", "true"], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S - 1)
    if tried.returncode == 0:
        return Finding("user namespaces", "ok", "can be made")
    return Finding("user namespaces", "can't", tried.stderr.strip(), _allow_user_namespaces())


def _cgroups() -> Finding:
    root = Path("/sys/fs/cgroup")
    if (root / "cgroup.controllers").exists():
        return Finding("cgroups", "ok", f"version 2: {(root / 'cgroup.controllers').read_text().strip()}")
    v1 = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if v1:
        return Finding("cgroups", "ok", f"version 1: {' '.join(v1)}")
    return Finding("cgroups", "missing", "not mounted; Docker needs them", "mount -t cgroup2 none /sys/fs/cgroup")


def _descriptors() -> Finding:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    sessions = (hard - _FDS_BESIDES) // _FDS_PER_SESSION
    return _sessions("open files", hard, sessions, "ulimit -Hn 65536 (as root), or LimitNOFILE= of the service")


def _pids() -> Finding:
    limits = {"kernel.pid_max": int(Path("/proc/sys/kernel/pid_max").read_text())}
    if os.geteuid() != 0:
        limits["ulimit -u"] = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    if (own := _cgroup_limit("pids", "pids.max", "pids.max")) is not None:
        limits["this cgroup's pids.max"] = own
    finite = {name: limit for name, limit in limits.items() if limit != resource.RLIM_INFINITY}
    name = min(finite, key=finite.__getitem__)
    return _sessions(f"processes ({name})", finite[name], finite[name] - _PIDS_BESIDES, f"raise {name}")


async def _docker() -> list[Finding]:
    """The daemon, and the image that `auto` would run."""
    # brings aiohttp: late, so that whatever is wrong with it is one line of the report
    from l0fast.sandbox.daemon import daemon
    from l0fast.sandbox.image import DEFAULT_IMAGE, LOCAL_IMAGE, image_info

    config = default_recipe().sandbox
    wanted = (LOCAL_IMAGE, DEFAULT_IMAGE) if config.image == "auto" else (config.image,)
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S), daemon(timeout_s=PROBE_TIMEOUT_S / 3) as found:
            lacks = [name for name, has in (("memory", found.memory_limit), ("pids", found.pids_limit)) if not has]
            notes = [found.endpoint, *(["rootless"] if found.rootless else []), *(f"no {name} limit" for name in lacks)]
            docker = Finding("Docker", "ok", f"{found.name}, {', '.join(notes)}; runtimes {' '.join(found.runtimes)}")
            for name in wanted:
                if (info := await image_info(found, name)) is not None:
                    return [docker, Finding("image", "ok", f"{name}, {info['Size'] / 1e6:.0f} MB")]
            fix = f"docker pull {wanted[-1]}; without a registry: python -m l0fast.sandbox.image build"
            return [docker, Finding("image", "missing", f"no {' and no '.join(wanted)}", fix)]
    except TimeoutError:
        return [Finding("Docker", "can't", f"no answer in {PROBE_TIMEOUT_S:g} s", "systemctl restart docker")]
    except SandboxError as e:
        what, _, fix = str(e).rpartition(": ")
        return [Finding("Docker", "missing", what, fix)]


async def _sandbox(kinds: Sequence[str]) -> Finding:
    """A session of the first kind that works, and a cell in it."""
    said: list[str] = []
    why = ""
    for kind in kinds:
        try:
            config = SandboxConfig.model_validate({"kind": kind})
            async with asyncio.timeout(_SLOW_TIMEOUT_S):
                async with open_sandbox(config, max_sessions=1, log=said.append) as sandbox:
                    async with sandbox.session({}, seed=0) as session:
                        result = await session.execute("6 * 7")
            if result.output.strip() == "42":
                image = "" if kind == "auto" else "; docker would come first, were its image there"
                return Finding("sandbox", "ok", said[-1].removeprefix("sandbox: ") + image, needed=True)
            why = f"6 * 7 is {result.output.strip()!r} there"
        except TimeoutError:
            why = f"no session of kind {kind} in {_SLOW_TIMEOUT_S:g} s"
        except L0fastError as e:
            why = str(e)
    return Finding("sandbox", "can't", why, "apt-get install -y bubblewrap, or start Docker", needed=True)


# --- looking ---------------------------------------------------------------------------------------------------------


def _allow_user_namespaces(sysctls: Path = Path("/proc/sys")) -> str:
    wanted = {"kernel.unprivileged_userns_clone": "1", "kernel.apparmor_restrict_unprivileged_userns": "0"}
    files = {name: sysctls / name.replace(".", "/") for name in wanted}
    wrong = [
        f"{name}={wanted[name]}" for name, f in files.items() if f.exists() and f.read_text().strip() != wanted[name]
    ]
    if wrong:
        return f"sysctl -w {' '.join(wrong)}"
    # no setting of the machine's is in the way
    return "in a container: docker run --security-opt seccomp=unconfined --security-opt systempaths=unconfined"


_PROBES: list[tuple[str, Probe, float]] = [
    ("system", _system, PROBE_TIMEOUT_S),
    ("Python", _python, PROBE_TIMEOUT_S),
    ("cores", _cores, PROBE_TIMEOUT_S),
    ("memory", _memory, PROBE_TIMEOUT_S),
    ("disk", _disk, PROBE_TIMEOUT_S),
    ("/dev/shm", _shm, PROBE_TIMEOUT_S),
    ("torch", _package("torch", "pip install 'l0fast[cpu]'", needed=True), PROBE_TIMEOUT_S),
    ("transformers", _package("transformers", "pip install l0fast", needed=True), PROBE_TIMEOUT_S),
    ("policies", _policies, PROBE_TIMEOUT_S),
    ("CUDA", _cuda, _SLOW_TIMEOUT_S),
    ("nvcc", _nvcc, PROBE_TIMEOUT_S),
    ("sglang", _package("sglang", "pip install 'l0fast[gpu]'"), PROBE_TIMEOUT_S),
    ("flash-attn", _package("flash-attn", "pip install --no-build-isolation 'l0fast[flash]'"), PROBE_TIMEOUT_S),
    ("liger-kernel", _package("liger-kernel", "pip install 'l0fast[gpu]'"), PROBE_TIMEOUT_S),
    ("bubblewrap", _bwrap, PROBE_TIMEOUT_S),
    ("seccomp", _seccomp, PROBE_TIMEOUT_S),
    ("Landlock", _landlock, PROBE_TIMEOUT_S),
    ("user namespaces", _user_namespaces, PROBE_TIMEOUT_S),
    ("cgroups", _cgroups, PROBE_TIMEOUT_S),
    ("open files", _descriptors, PROBE_TIMEOUT_S),
    ("processes", _pids, PROBE_TIMEOUT_S),
]


async def _in_thread(name: str, probe: Probe, timeout_s: float) -> Finding:
    """A probe's finding. A thread that hangs (a dead network file system) is left behind; it is a daemon."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Finding] = loop.create_future()

    def look() -> None:
        try:
            finding = probe()
        except (OSError, ValueError, ArithmeticError, LookupError, subprocess.SubprocessError) as e:
            finding = Finding(name, "can't", f"could not be looked at: {type(e).__name__}: {e}")
        try:
            loop.call_soon_threadsafe(lambda: done.done() or done.set_result(finding))
        except RuntimeError:
            # too late: the report is out and the loop closed
            return

    threading.Thread(target=look, name=f"probe {name}", daemon=True).start()
    try:
        async with asyncio.timeout(timeout_s):
            return await done
    except TimeoutError:
        return Finding(name, "can't", f"no answer in {timeout_s:g} s")


def _enough(name: str, has: float, needs: float, what: str, fix: str) -> Finding:
    if has >= needs:
        return Finding(name, "ok", what, needed=True)
    return Finding(name, "missing", f"{what}; the default recipe needs {needs:g} GB", fix, needed=True)


def _sessions(name: str, limit: int, sessions: int, fix: str) -> Finding:
    """Whether a limit allows the sessions of the default recipe."""
    rollout = default_recipe().rollout
    needs = rollout.max_open_groups * rollout.group_size
    if limit == resource.RLIM_INFINITY:
        return Finding(name, "ok", "no limit", needed=True)
    good = sessions >= needs
    what = f"{limit:,}, enough for {max(sessions, 0):,} sessions" + (
        "" if good else f"; the default recipe has {needs:,}"
    )
    return Finding(name, "ok" if good else "missing", what, "" if good else fix, needed=True)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(argv: Sequence[str], timeout_s: float = PROBE_TIMEOUT_S - 1) -> str:
    return subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s).stdout.strip()


def _meminfo(name: str) -> int:
    """[bytes]"""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/meminfo has no {name}")


def _memory_used(cgroup: Path) -> int:
    """[bytes]; without files that were read, which make room."""
    used = next(cgroup / name for name in ("memory.current", "memory.usage_in_bytes") if (cgroup / name).exists())
    stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    return int(used.read_text()) - int(stat.get("total_inactive_file") or stat["inactive_file"])


def _cgroup_limit(controller: str, v1: str, v2: str) -> int | None:
    """The tightest limit from this process's cgroup up to the root; None where there is none."""
    return min((limit for limit, _ in _cgroup_limits(controller, v1, v2)), default=None)


def _cgroup_limits(
    controller: str, v1: str, v2: str, own: Path = OWN, mounted: Path = MOUNTED
) -> Iterator[tuple[int, Path]]:
    """Each limit from this process's cgroup up to the root, with the file `v1` or `v2` that it was read from."""
    for file in cgroup_files(controller, v1, v2, own=own, mounted=mounted):
        # "max", or near 2^63, is none
        if (text := file.read_text().strip()).isdigit() and int(text) < 1 << 60:
            yield int(text), file


# --- saying it -------------------------------------------------------------------------------------------------------

_COLOURS = {"ok": "green", "missing": "yellow", "can't": "red"}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m l0fast.doctor", description="What this machine can run.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    findings = asyncio.run(examine())
    good = can_run(findings)
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    if options.json:
        console.print(json.dumps({"can_run": good, "findings": [asdict(finding) for finding in findings]}))
    elif console.is_terminal:
        console.print(_table(findings))
        console.print(_verdict(findings), style="green" if good else "red")
    else:
        for line in _lines(findings):
            console.print(line)
        console.print(_verdict(findings))
    return 0 if good else 1


def _verdict(findings: Sequence[Finding]) -> str:
    lacks = [finding.name for finding in findings if finding.needed and finding.mark != "ok"]
    if lacks:
        return f"the default recipe can't run here yet: {', '.join(lacks)}"
    return f"the default recipe can run here: {command('l0fast.run')}"


def _table(findings: Sequence[Finding]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for finding in findings:
        text = finding.what + (f"\n-> {finding.fix}" if finding.fix else "")
        table.add_row(Text(finding.mark, style=_COLOURS[finding.mark]), Text(finding.name), Text(text))
    return table


def _lines(findings: Sequence[Finding]) -> Iterator[str]:
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        fix = f"  -> {finding.fix}" if finding.fix else ""
        yield f"{finding.mark:<8} {finding.name:<{width}}  {finding.what}{fix}"


if __name__ == "__main__":
    sys.exit(main())
