"""python -m l0fast.sandbox.image: the image that shards run, with or without a registry.

    build [--packages numpy pandas ...] [--suite bookworm] [--mirror URL] [--tag NAME] [--save FILE]
                                        Debian's Python, and Debian's builds of those libraries; no registry
    load FILE                           what `build --save` wrote, on this machine or another
    list                                what is there, and which one "auto" takes

"auto" takes the image built here where there is one, else a slim Python from the registry, pulled when it is missing.
An image is one layer in the form of `docker save`, so that Docker, podman and `docker load` all take it.
"""

import argparse
import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import aiodocker
import aiohttp
from rich.console import Console

from l0fast.errors import L0fastError, SandboxError, UsageError
from l0fast.sandbox.daemon import Daemon, daemon, daemon_boundary
from l0fast.sandbox.debian import check_can_build, debian_package, find_mirror, install_debian, strip
from l0fast.sandbox.guest.files import remove_tree

LOCAL_IMAGE = "l0fast-sandbox:latest"
"""What `build` makes."""
DEFAULT_IMAGE = "python:3.12-slim"
"""Taken from the registry where nothing was built."""

_BUILD_TIMEOUT_S = 1800.0
_LOAD_TIMEOUT_S = 600.0
_CHUNK_BYTES = 1 << 20
_LABEL = "l0fast.sandbox.packages"
_BUILD = "python -m l0fast.sandbox.image build"


async def ensure_image(daemon: Daemon, wanted: str, *, pull_timeout_s: float, log: Callable[[str], None]) -> str:
    """Name of an image that is there when this returns.

    Args:
        wanted: an image's name, or "auto" for LOCAL_IMAGE where it is there, else DEFAULT_IMAGE.
        pull_timeout_s: time a pull may take [s].
        log: gets one line before a pull begins.

    Raises:
        SandboxError: it is not there and can't be pulled.
    """
    candidates = (LOCAL_IMAGE, DEFAULT_IMAGE) if wanted == "auto" else (wanted,)
    for name in candidates:
        if await image_info(daemon, name) is not None:
            return name
    name = candidates[-1]
    log(f"image {name} is not there: pulling it, for at most {pull_timeout_s:g} s")
    try:
        async with asyncio.timeout(pull_timeout_s):
            # its own timeout off: the deadline is ours
            await daemon.docker.images.pull(name, timeout=None)
            if await image_info(daemon, name) is None:
                raise SandboxError(_not_pulled(name, "the daemon says it is done, but it is not there"))
    except TimeoutError as e:
        raise SandboxError(_not_pulled(name, f"not done in {pull_timeout_s:g} s")) from e
    except aiodocker.DockerError as e:
        raise SandboxError(_not_pulled(name, _one_line(e.message))) from e
    except (OSError, aiohttp.ClientError) as e:
        raise SandboxError(_not_pulled(name, _one_line(f"{type(e).__name__}: {e}"))) from e
    return name


async def image_info(daemon: Daemon, name: str) -> dict[str, Any] | None:
    """What the daemon knows of an image, None where it has none of that name. Raises SandboxError."""
    with daemon_boundary(f"ask for image {name}"):
        try:
            return await daemon.docker.images.inspect(name)
        except aiodocker.DockerError as e:
            if e.status == 404:
                return None
            raise


async def load_image(daemon: Daemon, archive: Path) -> list[str]:
    """Give a `docker save` archive to the daemon. Returns the names it has there. Raises SandboxError, UsageError."""
    names = _names(archive)
    before = [await image_info(daemon, name) for name in names]
    with daemon_boundary(f"load {archive} into {daemon.name}"):
        async with asyncio.timeout(_LOAD_TIMEOUT_S):
            await cast(Awaitable[Any], daemon.docker.images.import_image(_chunks(archive), timeout=None))
    after = [await image_info(daemon, name) for name in names]
    if None in after:
        raise SandboxError(f"{daemon.name} took {archive}, but has no image {names[after.index(None)]}")
    for old in {info["Id"] for info in before if info} - {info["Id"] for info in after if info}:
        await _drop_nameless(daemon, old)
    return names


def build_image(
    archive: Path, *, tag: str, packages: Sequence[str], suite: str, mirror: str | None, log: Callable[[str], None]
) -> None:
    """Write an image with Python and Debian's builds of `packages` to `archive`. Raises UsageError, SandboxError."""
    check_can_build()
    debs = [debian_package(name) for name in packages]
    folder = Path(tempfile.mkdtemp(prefix="l0fast-image-"))
    try:
        root, layer = folder / "root", folder / "layer.tar"
        install_debian(
            root, suite=suite, mirror=mirror or find_mirror(suite), packages=debs, log=log, timeout_s=_BUILD_TIMEOUT_S
        )
        log("stripping and packing")
        strip(root)
        _pack(root, layer)
        _write_archive(archive, layer, tag, debs)
    finally:
        remove_tree(str(folder))


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    console, started = Console(soft_wrap=True, highlight=False, markup=False, emoji=False), time.monotonic()

    def log(line: str) -> None:
        console.print(f"[{time.monotonic() - started:5.1f} s] {line}")

    try:
        with _terminated_is_exit():
            match options.command:
                case "build":
                    _build(options, log)
                case "load":
                    log(f"loaded {', '.join(asyncio.run(_load(options.file)))}")
                case "list":
                    for line in asyncio.run(_list()):
                        console.print(line)
    except L0fastError as e:
        Console(stderr=True, soft_wrap=True).print(f"l0fast: {e}", highlight=False, markup=False)
        return 2 if isinstance(e, UsageError) else 1
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    prog = "python -m l0fast.sandbox.image"
    parser = argparse.ArgumentParser(prog=prog, description="The image that sandbox containers run.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="build | load | list")
    build = commands.add_parser("build", help="make one from Debian packages, without a registry (root, debootstrap)")
    build.add_argument("--packages", nargs="*", default=[], metavar="NAME", help="libraries, e.g. numpy pandas sympy")
    build.add_argument("--suite", default="bookworm", help="Debian release (%(default)s)")
    build.add_argument("--mirror", metavar="URL", help="Debian mirror; this machine's own by default")
    build.add_argument("--tag", default=LOCAL_IMAGE, help="name of the image (%(default)s)")
    build.add_argument("--save", type=Path, metavar="FILE", help="write the image to FILE; needs no daemon")
    load = commands.add_parser("load", help="give the daemon an image that build --save wrote")
    load.add_argument("file", type=Path, metavar="FILE")
    commands.add_parser("list", help="images that are there, and which one is taken")
    return parser.parse_args(argv)


def _build(options: argparse.Namespace, log: Callable[[str], None]) -> None:
    check_can_build()
    build = dict(tag=options.tag, packages=options.packages, suite=options.suite, mirror=options.mirror, log=log)
    if options.save is not None:
        if not options.save.parent.is_dir():
            raise UsageError(f"--save {options.save}: there is no folder {options.save.parent}; make it first")
        build_image(options.save, **build)
        log(f"saved {options.tag} in {options.save}, {options.save.stat().st_size / 1e6:.0f} MB")
        return
    # a daemon that isn't there is said now, not in a minute
    where = asyncio.run(_name())
    with tempfile.TemporaryDirectory(prefix="l0fast-image-") as folder:
        archive = Path(folder) / "image.tar"
        build_image(archive, **build)
        log(f"loading {archive.stat().st_size / 1e6:.0f} MB into {where}")
        asyncio.run(_load(archive))
    log(f"built {options.tag}")


async def _name() -> str:
    async with daemon() as found:
        return f"{found.name} at {found.endpoint}"


async def _load(archive: Path) -> list[str]:
    async with daemon() as found:
        return await load_image(found, archive)


async def _list() -> list[str]:
    async with daemon() as found:
        with daemon_boundary("list images"):
            images = await found.docker.images.list()
        lines = []
        for image in images:
            for tag in image.get("RepoTags") or ():
                packages = (image.get("Labels") or {}).get(_LABEL)
                if packages is not None or tag.endswith(DEFAULT_IMAGE):
                    made = f", built here with {packages}" if packages else ", built here" * (packages is not None)
                    lines.append(f"{tag}  {image['Size'] / 1e6:.0f} MB{made}")
        there = [name for name in (LOCAL_IMAGE, DEFAULT_IMAGE) if await image_info(found, name) is not None]
    taken = there[0] if there else f"{DEFAULT_IMAGE}, which is not there and would be pulled; or make one: {_BUILD}"
    return [*sorted(lines), f'sandbox.image = "auto" takes {taken}']


def _pack(root: Path, layer: Path) -> None:
    # devices, processes and the like are the container's own
    own = [f"--exclude=./{folder}/*" for folder in ("dev", "proc", "sys")]
    argv = ["tar", "--numeric-owner", "--one-file-system", *own, "-C", str(root), "-cf", str(layer), "."]
    packed = subprocess.run(argv, capture_output=True, text=True, timeout=600)
    if packed.returncode != 0:
        raise SandboxError(f"tar could not pack the image: {_one_line(packed.stderr)}")


def _write_archive(archive: Path, layer: Path, tag: str, debs: Sequence[str]) -> None:
    """The form of `docker save`: a manifest, a configuration and one layer."""
    with layer.open("rb") as f:
        diff_id = hashlib.file_digest(f, "sha256").hexdigest()
    now = datetime.now(UTC).isoformat()
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    config = json.dumps({
        "architecture": machine,
        "os": "linux",
        "created": now,
        "config": {
            "Env": ["PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "LANG=C.UTF-8"],
            "Cmd": ["python3"],
            "Labels": {_LABEL: " ".join(debs)},
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{diff_id}"]},
        "history": [{"created": now, "created_by": _BUILD}],
    }).encode()  # fmt: skip
    name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = json.dumps([{"Config": name, "RepoTags": [tag], "Layers": ["layer.tar"]}]).encode()
    with tarfile.open(archive, "w") as tar:
        for member, content in ((name, config), ("manifest.json", manifest)):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
        tar.add(layer, arcname="layer.tar")


def _names(archive: Path) -> list[str]:
    """Names of the images in an archive, read from its manifest."""
    try:
        with tarfile.open(archive) as tar:
            member = tar.extractfile("manifest.json")
            manifest = json.load(member) if member else []
        return [name for image in manifest for name in image["RepoTags"]]
    except (OSError, tarfile.TarError, KeyError, TypeError, ValueError) as e:
        raise UsageError(
            f"{archive} is no image archive ({type(e).__name__}: {e}): make one with {_BUILD} --save FILE"
        ) from e


async def _chunks(archive: Path) -> AsyncIterator[bytes]:
    with archive.open("rb") as f:
        while chunk := await asyncio.to_thread(f.read, _CHUNK_BYTES):
            yield chunk


async def _drop_nameless(daemon: Daemon, image_id: str) -> None:
    """Delete what a new image took the name from, unless it has another name or a container still runs it."""
    info = await image_info(daemon, image_id)
    if info is None or info.get("RepoTags"):
        return
    with daemon_boundary(f"delete image {image_id}"):
        try:
            await daemon.docker.images.delete(image_id)
        except aiodocker.DockerError as e:
            if e.status != 409:
                raise


@contextmanager
def _terminated_is_exit():
    """SIGTERM unwinds, so that folders and mounts go."""

    def leave(*_: object) -> None:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _not_pulled(name: str, why: str) -> str:
    return f"image {name} is not there and could not be pulled ({why}): build one without a registry with {_BUILD}, as root"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


if __name__ == "__main__":
    sys.exit(main())
