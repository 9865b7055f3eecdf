"""A Debian with Python in a folder, from a package mirror: no registry, no daemon.

    debootstrap --variant=minbase SUITE FOLDER MIRROR      in mount and pid namespaces of its own
    strip                                                  caches, documentation, locales; setuid bits

debootstrap mounts a /proc inside and starts package scripts; both end with its namespaces, whatever happens. Signatures
are checked always. The mirror is the one that this machine's own apt uses, where that has the suite.
"""

import os
import re
import shutil
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from l0fast.errors import SandboxError, UsageError

DEFAULT_MIRROR = "http://deb.debian.org/debian"
_APT = Path("/etc/apt")
_NEEDED = {"debootstrap": "debootstrap", "unshare": "util-linux", "tar": "tar"}
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_STAGES = {
    "Retrieving InRelease": "reading the mirror's index",
    "Resolving dependencies": "resolving dependencies",
    "Checking component": "downloading packages",
    "Extracting": "unpacking the base system",
    "Unpacking": "unpacking packages",
    "Configuring": "configuring packages",
}
"""What debootstrap's lines begin with, and what to tell of it."""
_USELESS = ("var/cache/apt", "var/lib/apt/lists", "var/log", "usr/share/man", "usr/share/info", "usr/share/locale")


class Source(NamedTuple):
    """A place that apt takes binary packages from."""

    uri: str
    suite: str


def check_can_build() -> None:
    """Raises UsageError where this machine can't make a root file system."""
    missing = [package for program, package in _NEEDED.items() if shutil.which(program) is None]
    missing += [] if _KEYRING.exists() else ["debian-archive-keyring"]
    if missing:
        raise UsageError(
            f"building an image needs {' and '.join(missing)}: apt-get install -y {' '.join(missing)} (as root)"
        )
    if os.geteuid() != 0:
        raise UsageError("building an image needs root, for debootstrap: put sudo in front")


def debian_package(name: str) -> str:
    """Debian's package for a Python library: "numpy" and "python3-numpy" are python3-numpy. Raises UsageError."""
    package = "python3-" + name.strip().lower().replace("_", "-").removeprefix("python3-")
    if not re.fullmatch(r"python3-[a-z0-9][a-z0-9+.-]*", package):
        raise UsageError(f"{name!r} can't be the name of a library: write names such as numpy or pandas")
    return package


def install_debian(
    root: Path, *, suite: str, mirror: str, packages: Iterable[str], log: Callable[[str], None], timeout_s: float
) -> None:
    """Fill `root`, an empty folder or one to be made, with a minimal Debian, Python and `packages`.

    Raises:
        UsageError: no such suite, package or mirror.
        SandboxError: debootstrap failed otherwise, or took longer than `timeout_s`.
    """
    include = ",".join(["python3", *packages])
    argv = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    argv += ["debootstrap", "--variant=minbase", "--force-check-gpg", f"--include={include}", suite, str(root), mirror]
    said: deque[str] = deque(maxlen=20)
    late = threading.Event()
    process = subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", **_proxies()},
        start_new_session=True,
    )

    def give_up() -> None:
        late.set()
        os.killpg(process.pid, signal.SIGKILL)

    watchdog = threading.Timer(timeout_s, give_up)
    watchdog.start()
    assert process.stdout is not None
    try:
        stages = dict(_STAGES)
        for line in process.stdout:
            said.append(line.strip())
            begin = next((begin for begin in stages if line.startswith(f"I: {begin}")), None)
            if begin is not None:
                log(stages.pop(begin))
    finally:
        watchdog.cancel()
        watchdog.join()
        # not waited for so far, so the number is still its own; a group that is gone but for this zombie is fine
        os.killpg(process.pid, signal.SIGKILL)
        # the pipe ends with the last process inside
        process.stdout.read()
        process.stdout.close()
        returncode = process.wait()
    if late.is_set():
        raise SandboxError(
            f"debootstrap of {suite} from {_public(mirror)} was not done in {timeout_s:g} s; it said: {_public(said[-1]) if said else 'nothing'}"
        )
    if returncode != 0:
        raise _failure(said, suite, mirror, root)
    if not (root / "usr/bin/python3").exists():
        raise SandboxError(f"{suite} from {_public(mirror)} came without /usr/bin/python3")


def strip(root: Path) -> None:
    """Take out what a sandbox has no use for, and every setuid and setgid bit."""
    for name in _USELESS:
        if (root / name).is_dir():
            shutil.rmtree(root / name)
    for name in ("var/cache/apt/archives/partial", "var/lib/apt/lists/partial", "var/log"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            path = os.path.join(folder, name)
            mode = os.lstat(path).st_mode
            # licences stay
            if folder.startswith(f"{root}/usr/share/doc/") and name in names and name != "copyright":
                os.unlink(path)
            elif mode & 0o6000:
                # no link has these bits, so none is followed
                os.chmod(path, mode & 0o1777)


def find_mirror(suite: str, apt: Path = _APT) -> str:
    """Where this machine gets Debian packages from, if that has `suite`; else Debian's own mirror."""
    sources = [source for source in apt_sources(apt) if source.uri.startswith(("http://", "https://", "file:/"))]
    for source in sources:
        if source.suite == suite:
            return source.uri
    for source in sources:
        # a mirror of Debian has all of its releases; ".../debian-security" and Ubuntu's have not
        if source.uri.rstrip("/").endswith("/debian"):
            return source.uri
    return DEFAULT_MIRROR


def apt_sources(apt: Path = _APT) -> Iterator[Source]:
    """Binary packages' sources in apt's order: one-line files (.list), then deb822 (.sources). Disabled ones are left out."""
    parts = apt / "sources.list.d"
    for path in (apt / "sources.list", *sorted(parts.glob("*.list"))):
        if path.is_file():
            yield from _one_line(path.read_text(encoding="utf-8", errors="replace"))
    for path in sorted(parts.glob("*.sources")):
        yield from _deb822(path.read_text(encoding="utf-8", errors="replace"))


def _one_line(text: str) -> Iterator[Source]:
    """deb [option=value ...] URI SUITE COMPONENT ..."""
    for line in text.splitlines():
        words = re.sub(r"\[[^]]*\]", " ", line.partition("#")[0]).split()
        if len(words) >= 3 and words[0] == "deb":
            yield Source(words[1], words[2])


def _deb822(text: str) -> Iterator[Source]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    for stanza in re.split(r"\n[ \t]*\n", "\n".join(lines)):
        # a line that begins with a space continues the one above
        fields = re.sub(r"\n[ \t]+", " ", stanza).splitlines()
        values = {name.strip().lower(): value.split() for name, _, value in (field.partition(":") for field in fields)}
        if "deb" not in values.get("types", ()) or values.get("enabled", ["yes"])[:1] in (["no"], ["false"]):
            continue
        for uri in values.get("uris", ()):
            yield from (Source(uri, suite) for suite in values.get("suites", ()))


def _proxies() -> dict[str, str]:
    """The environment's proxies, else apt's: debootstrap's downloads know only the environment."""
    found = {}
    for scheme in ("http", "https"):
        name = f"{scheme}_proxy"
        value = os.environ.get(name) or os.environ.get(name.upper()) or _apt_setting(f"Acquire::{scheme}::Proxy")
        if value and value != "DIRECT":
            found[name] = value
    if no_proxy := os.environ.get("no_proxy") or os.environ.get("NO_PROXY"):
        found["no_proxy"] = no_proxy
    return found


def _apt_setting(name: str) -> str:
    if shutil.which("apt-config") is None:
        return ""
    argv = ["apt-config", "dump", "--format", "%v%n", name]
    return subprocess.run(argv, capture_output=True, text=True, timeout=20, check=True).stdout.partition("\n")[0]


def _failure(said: Iterable[str], suite: str, mirror: str, root: Path) -> SandboxError | UsageError:
    lines = [_public(line) for line in said]
    text = "; ".join(line.removeprefix("E: ") for line in lines if line.startswith("E: "))
    text = text or (lines[-1] if lines else "nothing was said")
    if text.startswith("No such script"):
        return UsageError(f"debootstrap knows no suite {suite!r}: name one with --suite, e.g. bookworm or trixie")
    if "find these debs" in text:
        names = text.rpartition(":")[2].strip()
        return UsageError(
            f"{suite} has no {names}: give libraries by Debian's names, which apt-cache search --names-only '^python3-' lists"
        )
    if "Release" in text:
        return UsageError(
            f"{_public(mirror)} has no {suite}, or can't be reached ({text}): name another mirror with --mirror"
        )
    if "noexec or nodev" in text:
        return UsageError(f"{root.parent} is mounted noexec or nodev: set TMPDIR to a folder of another file system")
    return SandboxError(f"debootstrap of {suite} from {_public(mirror)} failed: {text}")


def _public(text: str) -> str:
    """Without the names and passwords of URLs."""
    return re.sub(r"//[^/@\s]*@", "//", text)
