"""The sandbox image: which one is taken, pulled, loaded; and the parts of making one. A whole build takes a minute: CI."""

import asyncio
import json
import os
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from l0fast.errors import SandboxError, UsageError
from l0fast.sandbox import debian
from l0fast.sandbox import image as module
from l0fast.sandbox.daemon import Daemon, daemon
from l0fast.sandbox.debian import Source, apt_sources, debian_package, find_mirror, install_debian, strip
from l0fast.sandbox.image import DEFAULT_IMAGE, LOCAL_IMAGE, ensure_image, image_info, load_image, main
from tests.sandbox.stand_in import failure, serving

HERE = {"Id": "sha256:1", "RepoTags": [LOCAL_IMAGE], "Size": 1}


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "docker.sock"
    monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
    return path


def with_daemon(path: Path, answers: dict[str, Any], body: Callable[[Daemon], Coroutine[Any, Any, Any]]) -> Any:
    async def main() -> Any:
        async with asyncio.timeout(30), serving(path, answers), daemon() as found:
            return await body(found)

    return asyncio.run(main())


def ensure(path: Path, wanted: str, answers: dict[str, Any], timeout_s: float = 10.0) -> tuple[str, list[str]]:
    said: list[str] = []

    async def body(found: Daemon) -> str:
        return await ensure_image(found, wanted, pull_timeout_s=timeout_s, log=said.append)

    return with_daemon(path, answers, body), said


def pulling(name: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """A registry that knows `name`: the image is there once it was pulled, unless a line says error."""
    pulled = False

    async def inspect(request: web.Request) -> web.Response:
        return web.json_response(HERE) if pulled else failure(404, "No such image")

    async def create(request: web.Request) -> web.Response:
        nonlocal pulled
        image, _, tag = name.partition(":")
        assert request.query["fromImage"] in (name, image)
        assert request.query.get("tag", tag) == tag
        assert "X-Registry-Auth" not in request.headers
        pulled = not any("error" in line for line in lines)
        return web.Response(text="".join(json.dumps(line) + "\r\n" for line in lines), content_type="application/json")

    return {f"GET /images/{name}/json": inspect, "POST /images/create": create}


# --- which image -----------------------------------------------------------------------------------------------------


def test_auto_takes_the_image_built_here(path: Path):
    answers = {f"GET /images/{LOCAL_IMAGE}/json": HERE, f"GET /images/{DEFAULT_IMAGE}/json": HERE}
    assert ensure(path, "auto", answers) == (LOCAL_IMAGE, [])


def test_auto_takes_the_registrys_where_nothing_was_built(path: Path):
    assert ensure(path, "auto", {f"GET /images/{DEFAULT_IMAGE}/json": HERE}) == (DEFAULT_IMAGE, [])


def test_a_name_is_taken_as_it_is(path: Path):
    answers = {"GET /images/mine:1/json": HERE, f"GET /images/{LOCAL_IMAGE}/json": HERE}
    assert ensure(path, "mine:1", answers) == ("mine:1", [])


@pytest.mark.parametrize("wanted", ["auto", "mine:1"])
def test_what_is_missing_is_pulled_after_one_line(path: Path, wanted: str):
    name = DEFAULT_IMAGE if wanted == "auto" else wanted
    taken, said = ensure(path, wanted, pulling(name, [{"status": "Pulling"}, {"status": "Done"}]))
    assert taken == name
    assert said == [f"image {name} is not there: pulling it, for at most 10 s"]


def test_a_failed_pull_says_which_why_and_the_way_out(path: Path):
    answers = pulling(
        DEFAULT_IMAGE,
        [{"status": "Pulling"}, {"error": "no route\n to host", "errorDetail": {"message": "no route\n to host"}}],
    )
    with pytest.raises(SandboxError) as caught:
        ensure(path, "auto", answers)
    assert DEFAULT_IMAGE in str(caught.value)
    assert "no route to host" in str(caught.value)
    assert "python -m l0fast.sandbox.image build" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_refused_pull_says_so(path: Path):
    async def create(request: web.Request) -> web.Response:
        return failure(404, "pull access denied for mine")

    with pytest.raises(SandboxError, match=r"mine:1.*pull access denied.*image build"):
        ensure(path, "mine:1", {"POST /images/create": create})


def test_a_pull_that_brings_nothing_is_a_failure(path: Path):
    answers = pulling("mine:1", [{"status": "Done"}]) | {"GET /images/mine:1/json": _missing}
    with pytest.raises(SandboxError, match="it is not there"):
        ensure(path, "mine:1", answers)


async def _missing(request: web.Request) -> web.Response:
    return failure(404, "No such image")


def test_a_pull_has_a_deadline(path: Path):
    async def create(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(SandboxError, match=r"mine:1.*not done in 0.2 s.*image build"):
        ensure(path, "mine:1", {"POST /images/create": create}, timeout_s=0.2)


def test_a_daemon_in_trouble_is_no_missing_image(path: Path):
    async def broken(request: web.Request) -> web.Response:
        return failure(500, "disk full")

    with pytest.raises(SandboxError, match="could not ask for image mine:1: disk full"):
        ensure(path, "mine:1", {"GET /images/mine:1/json": broken})


# --- an image's archive ----------------------------------------------------------------------------------------------


def archive_of(folder: Path, tag: str, text: str) -> Path:
    """A tiny image: one file, as `build --save` writes it."""
    root, layer, archive = folder / "root", folder / "layer.tar", folder / "image.tar"
    root.mkdir(exist_ok=True)
    (root / "text").write_text(text)
    module._pack(root, layer)
    module._write_archive(archive, layer, tag, ["python3-numpy"])
    return archive


def test_an_archive_names_what_it_holds(tmp_path: Path):
    archive = archive_of(tmp_path, "name:tag", "hello")
    assert module._names(archive) == ["name:tag"]
    with tarfile.open(archive) as tar:
        assert {"manifest.json", "layer.tar"} < set(tar.getnames())


@pytest.mark.parametrize("content", [b"", b"no archive", b"\0" * 1024])
def test_a_file_that_is_no_archive_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UsageError, match="no image archive"):
        module._names(tmp_path / "file")
    with pytest.raises(UsageError, match="no image archive"):
        module._names(tmp_path / "missing")


def test_devices_and_processes_stay_out_of_a_layer(tmp_path: Path):
    for name in ("dev/null", "proc/1", "sys/x", "etc/passwd"):
        (tmp_path / "root" / name).parent.mkdir(parents=True)
        (tmp_path / "root" / name).write_text("")
    module._pack(tmp_path / "root", tmp_path / "layer.tar")
    with tarfile.open(tmp_path / "layer.tar") as tar:
        assert {"./dev", "./proc", "./sys", "./etc/passwd"} <= set(tar.getnames())
        assert not {"./dev/null", "./proc/1", "./sys/x"} & set(tar.getnames())


@pytest.mark.parametrize("kind", ["docker"], indirect=True)
def test_a_real_daemon_loads_an_image_and_forgets_the_one_before(kind: str, tmp_path: Path):
    name = f"l0fast-test-{os.getpid()}:latest"

    async def body() -> None:
        async with asyncio.timeout(60), daemon() as found:
            try:
                assert await load_image(found, archive_of(tmp_path, name, "one")) == [name]
                first = await image_info(found, name)
                assert first is not None
                assert first["Config"]["Labels"]["l0fast.sandbox.packages"] == "python3-numpy"
                await load_image(found, archive_of(tmp_path, name, "two"))
                second = await image_info(found, name)
                assert second is not None
                assert second["Id"] != first["Id"]
                assert await image_info(found, first["Id"]) is None
            finally:
                await found.docker.images.delete(name, force=True)

    asyncio.run(body())


@pytest.mark.parametrize("kind", ["docker"], indirect=True)
def test_a_real_daemon_lists_images(kind: str, capsys: pytest.CaptureFixture[str]):
    assert main(["list"]) == 0
    assert 'sandbox.image = "auto" takes ' in capsys.readouterr().out


# --- a mirror --------------------------------------------------------------------------------------------------------

LIST = """\
# deb http://no/debian bookworm main
deb-src http://no/debian bookworm main
deb [arch=amd64 signed-by=/usr/share/keyrings/x.gpg] http://one/debian bookworm main contrib # comment
deb http://one/debian-security bookworm-security main
deb cdrom:[Debian] bookworm main
"""
SOURCES = """\
# comment
Types: deb deb-src
URIs: http://two/debian
  http://three/debian
Suites: trixie trixie-updates
Components: main

Types: deb-src
URIs: http://no/debian
Suites: trixie

Types: deb
Enabled: no
URIs: http://no/debian
Suites: trixie
"""


def apt_folder(folder: Path, **files: str) -> Path:
    (folder / "sources.list.d").mkdir()
    for name, text in files.items():
        path = folder / "sources.list" if name == "main" else folder / "sources.list.d" / name.replace("_", ".")
        path.write_text(text)
    return folder


def test_apts_sources_are_read_in_both_forms(tmp_path: Path):
    assert list(
        apt_sources(apt_folder(tmp_path, main=LIST, b_sources=SOURCES, a_list="deb http://four/debian sid main"))
    ) == [
        Source("http://one/debian", "bookworm"),
        Source("http://one/debian-security", "bookworm-security"),
        Source("cdrom:", "bookworm"),
        Source("http://four/debian", "sid"),
        Source("http://two/debian", "trixie"),
        Source("http://two/debian", "trixie-updates"),
        Source("http://three/debian", "trixie"),
        Source("http://three/debian", "trixie-updates"),
    ]


def test_the_mirror_is_the_one_that_has_the_suite(tmp_path: Path):
    apt = apt_folder(tmp_path, main=LIST, b_sources=SOURCES)
    assert find_mirror("trixie", apt) == "http://two/debian"
    assert find_mirror("bookworm", apt) == "http://one/debian"


def test_a_mirror_of_debian_has_every_suite(tmp_path: Path):
    apt = apt_folder(tmp_path, b_sources=SOURCES)
    assert find_mirror("bookworm", apt) == "http://two/debian"


def test_another_systems_mirror_is_not_taken(tmp_path: Path):
    apt = apt_folder(tmp_path, main="deb http://one/ubuntu noble main\ndeb http://one/debian-security x main")
    assert find_mirror("bookworm", apt) == debian.DEFAULT_MIRROR
    assert find_mirror("bookworm", tmp_path / "missing") == debian.DEFAULT_MIRROR


@given(st.text(), st.text())
def test_any_text_is_some_sources(tmp_path_factory: pytest.TempPathFactory, one: str, two: str):
    apt = apt_folder(tmp_path_factory.mktemp("apt"), main="", b_sources="")
    (apt / "sources.list").write_bytes(one.encode("utf-8", "surrogatepass"))
    (apt / "sources.list.d" / "b.sources").write_bytes(two.encode("utf-8", "surrogatepass"))
    assert all(isinstance(source, Source) for source in apt_sources(apt))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"http_proxy": "http://p:1", "NO_PROXY": "a,b"}, {"http_proxy": "http://p:1", "no_proxy": "a,b"}),
        ({"HTTPS_PROXY": "http://p:2"}, {"http_proxy": "http://apt:3", "https_proxy": "http://p:2"}),
        ({}, {"http_proxy": "http://apt:3"}),
    ],
)
def test_downloads_take_the_environments_proxy_then_apts(
    environment: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    for name in ("http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    apts = {"Acquire::http::Proxy": "http://apt:3", "Acquire::https::Proxy": "DIRECT"}
    monkeypatch.setattr(debian, "_apt_setting", apts.__getitem__)
    assert debian._proxies() == expected


# --- a root file system ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("numpy", "python3-numpy"),
        ("python3-numpy", "python3-numpy"),
        ("Typing_Extensions", "python3-typing-extensions"),
    ],
)
def test_libraries_have_debians_names(name: str, package: str):
    assert debian_package(name) == package


@pytest.mark.parametrize("name", ["", " ", "python3-", "../x", "a b", "a,b", "--help", "a;b", "ä"])
def test_a_name_that_can_be_none_is_refused(name: str):
    with pytest.raises(UsageError, match="can't be the name of a library"):
        debian_package(name)


def test_stripping_takes_setuid_bits_and_leaves_licences(tmp_path: Path):
    outside = tmp_path / "outside"
    outside.write_text("")
    outside.chmod(0o4755)
    root = tmp_path / "root"
    kept = ["usr/bin/python3.11", "usr/share/doc/p/copyright", "usr/lib/x"]
    gone = ["usr/share/doc/p/README", "usr/share/man/man1/x.1", "var/cache/apt/archives/x.deb", "var/lib/apt/lists/x"]
    for name in kept + gone:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    (root / "usr/bin/python3.11").chmod(0o6755)
    (root / "usr/lib").chmod(0o2755)
    (root / "usr/bin/link").symlink_to(outside)
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)
    strip(root)
    assert all((root / name).exists() for name in kept)
    assert not any((root / name).exists() for name in gone)
    assert stat.S_IMODE((root / "usr/bin/python3.11").stat().st_mode) == 0o755
    assert stat.S_IMODE((root / "usr/lib").stat().st_mode) == 0o755
    assert stat.S_IMODE((root / "tmp").stat().st_mode) == 0o1777
    assert stat.S_IMODE(outside.stat().st_mode) == 0o4755, "a link was followed"


def needs_debootstrap() -> None:
    try:
        debian.check_can_build()
    except UsageError as e:
        pytest.skip(str(e))


def install(root: Path, **changed: Any) -> list[str]:
    said: list[str] = []
    settings = {"suite": "bookworm", "mirror": "file:///nowhere", "packages": [], "timeout_s": 60.0} | changed
    install_debian(root, log=said.append, **settings)
    return said


@pytest.mark.parametrize("mirror", ["file:///nowhere", "http://me:secret@127.0.0.1:9/debian"])
def test_a_mirror_that_can_not_be_reached_is_named_without_its_password(tmp_path: Path, mirror: str):
    needs_debootstrap()
    with pytest.raises(UsageError) as caught:
        install(tmp_path / "root", mirror=mirror)
    assert "name another mirror with --mirror" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_suite_nobody_knows_is_refused(tmp_path: Path):
    needs_debootstrap()
    with pytest.raises(UsageError, match="knows no suite 'nosuch'"):
        install(tmp_path / "root", suite="nosuch")


def test_a_build_has_a_deadline_and_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    needs_debootstrap()
    # a mirror that takes connections and never answers
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        mirror = f"http://127.0.0.1:{silent.getsockname()[1]}/debian"
        with pytest.raises(SandboxError, match=r"was not done in 1.5 s"):
            install(tmp_path / "root", mirror=mirror, timeout_s=1.5)
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, timeout=20).stdout
    assert not [line for line in listed.splitlines() if str(tmp_path) in line]


def test_packages_that_debian_lacks_are_named():
    said = ["I: Retrieving Packages", "E: Couldn't find these debs: python3-nosuch"]
    error = debian._failure(said, "bookworm", "http://one/debian", Path("/tmp/x/root"))
    assert isinstance(error, UsageError)
    assert "bookworm has no python3-nosuch" in str(error)


def test_a_build_that_fails_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    needs_debootstrap()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(UsageError, match="--mirror"):
        module.build_image(
            tmp_path / "image.tar",
            tag="x:y",
            packages=[],
            suite="bookworm",
            mirror="file:///nowhere",
            log=lambda line: None,
        )
    assert list(tmp_path.iterdir()) == []


# --- the command -----------------------------------------------------------------------------------------------------


def test_without_debootstrap_one_sentence_names_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("shutil.which", lambda name: None if name == "debootstrap" else f"/usr/bin/{name}")
    assert main(["build"]) == 2
    assert "apt-get install -y debootstrap" in capsys.readouterr().err


def test_without_root_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    needs_debootstrap()
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert main(["build"]) == 2
    assert "needs root" in capsys.readouterr().err


def test_a_missing_daemon_is_told_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    needs_debootstrap()
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none")
    monkeypatch.setattr(module, "build_image", lambda *args, **kwargs: pytest.fail("it was built"))
    assert main(["build"]) == 1
    assert "no such socket" in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_told_before_anything_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    needs_debootstrap()
    assert main(["build", "--save", str(tmp_path / "missing" / "image.tar")]) == 2
    assert "make it first" in capsys.readouterr().err


def test_the_command_explains_itself():
    argv = [sys.executable, "-m", "l0fast.sandbox.image", "build", "--help"]
    said = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert said.returncode == 0
    assert "--packages" in said.stdout
