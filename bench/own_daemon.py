"""A Docker daemon of one's own for as long as a command runs; nothing of it is left afterwards.

    python -m bench.own_daemon [--image | --image-tar FILE] [--packages NAME ...] COMMAND ...

COMMAND finds the daemon by DOCKER_HOST. dockerd, the containerd it starts and all their state live in one temporary
folder, and in a mount namespace whose /run/containerd and /etc/docker are empty: a daemon of the system is neither used
nor disturbed, and what they mount ends with them. Containers get a cgroup of their own below one parent, by which every
process is found again. There is no bridge and no firewall rule. After kill -9 its folder and empty cgroups are left, and
no process. Needs root, and Debian's docker.io or Docker's own engine.
"""

import argparse
import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.ending import end_like_ctrl_c
from bench.results_folder import results_file
from l0fast.errors import L0fastError, SandboxError, UsageError

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 30.0
_HIDDEN = ("/run/containerd", "/etc/docker")
"""Folders of the system's daemons, empty in the namespace. The first holds the sockets of containers' shims too."""
_ENDS_WITH_US = ("setpriv", "--pdeathsig", "SIGTERM")
_IN_NAMESPACE = f'for folder in {" ".join(_HIDDEN)}; do mount -t tmpfs none $folder || exit 1; done; exec "$@"'


class OwnDaemon:
    """A running dockerd. `own_daemon()` makes one."""

    def __init__(self, folder: Path, log_file: Path):
        self.folder = folder
        self.log_file = log_file
        self.host = f"unix://{folder}/docker.sock"
        """What DOCKER_HOST has to be."""
        self._cgroup = folder.name
        self._namespace: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """dockerd's."""
        assert self._process is not None, "not started"
        return self._process.pid

    def start(self) -> None:
        """Start dockerd on the same folders, and wait until it answers. Raises SandboxError.

        It ends with the thread that calls this.
        """
        if self._namespace is None:
            prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _IN_NAMESPACE, "sh"]
        else:
            # where the containerd that it left behind lives
            prefix = ["nsenter", f"--mount=/proc/self/fd/{self._namespace}"]
        # who is killed can't stop it: dockerd ends itself and its containers then
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [*_ENDS_WITH_US, *prefix, *self._argv()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=() if self._namespace is None else (self._namespace,),
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(self.folder / "docker.sock"):
            if self._process.poll() is not None:
                raise SandboxError(f"dockerd ended with code {self._process.returncode}: {self._tail()}")
            if time.monotonic() > deadline:
                raise SandboxError(f"dockerd did not answer in {START_TIMEOUT_S:g} s: {self._tail()}")
            time.sleep(0.05)
        if self._namespace is None:
            self._namespace = os.open(f"/proc/{self.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)

    def kill(self) -> None:
        """SIGKILL to dockerd and its containerd; the containers go on."""
        assert self._process is not None, "not started"
        self._process.kill()
        self._process.wait()
        # containerd dies with dockerd, but keeps its number until the machine's first process reaps it: a new dockerd would
        # take it for alive by that number, and wait in vain
        _end(lambda pid: self._ours(pid) and _program(pid) == b"containerd")
        (self.folder / "exec/containerd/containerd.pid").unlink(missing_ok=True)

    def restart(self) -> None:
        """kill -9, then start again on the same folders."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """End everything: containers first, so that dockerd has nobody to wait for. Raises SandboxError if some stay."""
        if self._process is None:
            return
        _end(self._contained)
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        _end(self._ours)
        if self._namespace is not None:
            os.close(self._namespace)
            self._namespace = None
        for pattern in (self._cgroup, f"*/{self._cgroup}"):
            for parent in Path("/sys/fs/cgroup").glob(pattern):
                remove_cgroup(parent)

    def _argv(self) -> list[str]:
        return [
            "dockerd",
            f"--host={self.host}",
            f"--data-root={self.folder}/data",
            f"--exec-root={self.folder}/exec",
            f"--pidfile={self.folder}/dockerd.pid",
            f"--cgroup-parent=/{self._cgroup}",
            "--exec-opt=native.cgroupdriver=cgroupfs",
            "--bridge=none",
            "--iptables=false",
            "--ip-forward=false",
            "--shutdown-timeout=5",
        ]

    def _contained(self, pid: int) -> bool:
        return f"/{self._cgroup}/" in Path(f"/proc/{pid}/cgroup").read_text()

    def _ours(self, pid: int) -> bool:
        """dockerd, containerd and shims by their namespace, and what runs in containers."""
        if self._namespace is None:
            # it never answered: what there is was started in the session of our child
            assert self._process is not None
            return str(self.folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        status = os.stat(f"/proc/{pid}/ns/mnt")
        ours = os.fstat(self._namespace)
        return (status.st_dev, status.st_ino) == (ours.st_dev, ours.st_ino) or self._contained(pid)

    def _tail(self) -> str:
        return " | ".join(self.log_file.read_text(errors="replace").splitlines()[-3:])


@contextmanager
def own_daemon(log_file: Path | None = None) -> Iterator[OwnDaemon]:
    """A dockerd for as long as the block runs.

    Args:
        log_file: where it writes; None puts the log in its folder, which goes with it.

    Raises:
        UsageError: this machine can't have one.
        SandboxError: it did not start, or something of it can't be ended.
    """
    _check()
    folder = Path(tempfile.mkdtemp(prefix="l0fast-docker-"))
    made = [Path(path) for path in _HIDDEN if not os.path.isdir(path)]
    for path in made:
        path.mkdir(parents=True)
    own = OwnDaemon(folder, log_file or folder / "dockerd.log")
    try:
        try:
            own.start()
            yield own
        finally:
            own.stop()
    finally:
        shutil.rmtree(folder)
        for path in made:
            # a daemon that the system has started meanwhile keeps it
            if not any(path.iterdir()):
                path.rmdir()


def main(argv: Sequence[str] | None = None) -> int:
    end_like_ctrl_c()
    parser = argparse.ArgumentParser(
        prog="python -m bench.own_daemon", description="Run a command with a Docker daemon of its own."
    )
    parser.add_argument(
        "--image", action="store_true", help="first build the sandbox image in it (l0fast.sandbox.image)"
    )
    parser.add_argument("--image-tar", type=Path, metavar="FILE", help="first load an image that `build --save` wrote")
    parser.add_argument(
        "--packages", action="append", default=[], metavar="NAME", help="library for --image; may repeat"
    )
    parser.add_argument("--log-file", type=results_file, metavar="FILE", help="dockerd's log; not kept by default")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND ...")
    options = parser.parse_args(argv)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("name the command to run")
    if options.packages and not options.image:
        parser.error(f"--packages {options.packages[0]} goes with --image: add it")
    if options.image and options.image_tar is not None:
        parser.error("--image builds an image and --image-tar loads one: keep one of them")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with own_daemon(options.log_file) as own:
            os.environ["DOCKER_HOST"] = own.host
            if options.image_tar is not None:
                _load(options.image_tar)
            elif options.image:
                from l0fast.sandbox import image

                if code := image.main(["build", "--packages", *options.packages]):
                    return code
            return _run(command)
    except L0fastError as e:
        print(f"own_daemon: {e}", file=sys.stderr)
        return 2 if isinstance(e, UsageError) else 1


def _load(archive: Path) -> None:
    from l0fast.sandbox.daemon import daemon
    from l0fast.sandbox.image import load_image

    async def load() -> list[str]:
        async with daemon() as found:
            return await load_image(found, archive)

    asyncio.run(load())


def _run(command: Sequence[str]) -> int:
    """Exit code of the command; it ends when this process is told to."""
    if shutil.which(command[0]) is None:
        raise UsageError(f"{command[0]} can't be run: name a program that exists")
    process = subprocess.Popen([*_ENDS_WITH_US, *command])
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise


def _check() -> None:
    needed = {"dockerd": "docker.io", "containerd": "containerd"}
    needed |= dict.fromkeys(("unshare", "nsenter", "setpriv"), "util-linux")
    # daemons live in /usr/sbin, which a user's PATH may lack
    os.environ["PATH"] = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    if missing := {package for program, package in needed.items() if shutil.which(program) is None}:
        raise UsageError(f"a daemon of one's own needs {' and '.join(sorted(missing))}: apt-get install -y docker.io")
    if os.geteuid() != 0:
        raise UsageError("a daemon of one's own needs root: put sudo in front, or use the system's daemon")


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5.0)
        try:
            connection.connect(str(path))
            connection.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
            return b" 200 " in connection.recv(64)
        except OSError:
            # not there yet
            return False


def _end(wanted: Callable[[int], Any]) -> None:
    """SIGKILL to every process for which `wanted(pid)` holds, until there is none."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while pids := _find(wanted):
        if time.monotonic() > deadline:
            raise SandboxError(f"processes {pids} are still there after SIGKILL")
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.02)


def _find(wanted: Callable[[int], Any]) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                # "pid (name, which may hold anything) state ..."; a zombie is dead
                state = Path(f"/proc/{entry}/stat").read_bytes().rpartition(b")")[2].split()[0]
                if state not in (b"Z", b"X") and wanted(int(entry)):
                    found.append(int(entry))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                # gone meanwhile; or not even root may look, as at a process 1 of another user namespace
                continue
    return found


def _program(pid: int) -> bytes:
    return os.path.basename(Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0])


def remove_cgroup(parent: Path) -> None:
    """A tree of cgroups without processes, leaves first."""
    for folder, _, _ in os.walk(parent, topdown=False):
        os.rmdir(folder)


if __name__ == "__main__":
    sys.exit(main())
