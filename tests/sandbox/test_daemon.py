"""Finding a Docker daemon: which places are asked, what is refused and in which words. The stand-ins are real servers."""

import asyncio
import os
import socket
from pathlib import Path
from typing import Any

import aiodocker
import pytest
from aiohttp import web

from l0fast.errors import SandboxError
from l0fast.sandbox import daemon as module
from l0fast.sandbox.daemon import daemon, daemon_boundary, endpoints
from l0fast.sandbox.docker import _listen
from tests.sandbox.stand_in import INFO, VERSION, failure, serving


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where DOCKER_HOST says a daemon listens."""
    path = tmp_path / "docker.sock"
    monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
    return path


def _routes(answers: dict[str, Any]) -> dict[str, Any]:
    return {f"GET /{name}": answer for name, answer in answers.items()}


def found(path: Path, **answers: Any) -> module.Daemon:
    async def main() -> module.Daemon:
        async with serving(path, _routes(answers)), daemon() as found:
            return found

    return asyncio.run(main())


def refused(path: Path, timeout_s: float = 10.0, **answers: Any) -> str:
    async def main() -> None:
        async with serving(path, _routes(answers)), daemon(timeout_s=timeout_s):
            pytest.fail("it was taken")

    with pytest.raises(SandboxError) as caught:
        asyncio.run(main())
    return str(caught.value)


def nobody() -> str:
    async def main() -> None:
        async with daemon():
            pytest.fail("it was taken")

    with pytest.raises(SandboxError) as caught:
        asyncio.run(main())
    return str(caught.value)


def sockets_at(monkeypatch: pytest.MonkeyPatch, *paths: Path) -> None:
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.setattr(module, "_usual_places", lambda: [str(path) for path in paths])


def test_a_daemon_is_described(path: Path):
    it = found(path)
    assert (it.endpoint, it.name) == (f"unix://{path}", "Docker 20.10.24")
    assert (it.rootless, it.memory_limit, it.pids_limit, it.cpu_shares) == (False, True, True, True)
    assert it.runtimes == ("runc", "runsc")


@pytest.mark.parametrize("option", ["name=rootless", "name=userns"])
def test_rootless_and_remapped_users_are_told_apart_from_root(path: Path, option: str):
    assert found(path, info={**INFO, "SecurityOptions": [*INFO["SecurityOptions"], option]}).rootless


def test_podman_is_named(path: Path):
    assert (
        found(path, version={**VERSION, "Version": "4.3.1", "Components": [{"Name": "Podman Engine"}]}).name
        == "Podman 4.3.1"
    )


def test_limits_that_are_missing_are_told(path: Path):
    missing = {"MemoryLimit": False, "PidsLimit": False, "CPUShares": False, "Runtimes": None, "SecurityOptions": None}
    it = found(path, info={**INFO, **missing})
    assert (it.memory_limit, it.pids_limit, it.cpu_shares, it.runtimes) == (False, False, False, ())
    assert not found(path, info={name: value for name, value in INFO.items() if name != "CPUShares"}).cpu_shares


def test_docker_host_is_asked_alone(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_usual_places", lambda: pytest.fail("another place was looked at"))
    assert endpoints() == [f"unix://{path}"]


def test_only_places_with_a_socket_are_asked_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one, two, file = tmp_path / "one", tmp_path / "two", tmp_path / "file"
    file.write_text("")
    sockets_at(monkeypatch, two, file, tmp_path / "missing", one)
    with socket.socket(socket.AF_UNIX) as a, socket.socket(socket.AF_UNIX) as b:
        a.bind(str(one))
        b.bind(str(two))
        assert endpoints() == [f"unix://{two}", f"unix://{one}"]


def test_rootless_places_follow_the_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "podman").mkdir()
    with socket.socket(socket.AF_UNIX) as docker, socket.socket(socket.AF_UNIX) as podman:
        podman.bind(str(tmp_path / "podman" / "podman.sock"))
        docker.bind(str(tmp_path / "docker.sock"))
        ours = [endpoint for endpoint in endpoints() if str(tmp_path) in endpoint]
    assert ours == [f"unix://{tmp_path}/docker.sock", f"unix://{tmp_path}/podman/podman.sock"]


def test_a_dead_socket_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dead, living = tmp_path / "dead", tmp_path / "living"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(dead))
    sockets_at(monkeypatch, dead, living)
    assert found(living).endpoint == f"unix://{living}"


def test_nowhere_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sockets_at(monkeypatch, tmp_path / "a", tmp_path / "b")
    assert nobody() == (
        f"no Docker daemon listens at {tmp_path}/a, {tmp_path}/b: start one (systemctl start docker), "
        "or set DOCKER_HOST to unix:///its/socket"
    )


def test_a_socket_that_is_not_there(path: Path):
    assert f"unix://{path}: no such socket" in nobody()


def test_a_socket_nobody_listens_on(path: Path):
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
    assert f"unix://{path}: nobody listens" in nobody()


@pytest.mark.parametrize("host", ["tcp://127.0.0.1:2375", "ssh://me@there", "/var/run/docker.sock", "unix://relative"])
def test_a_daemon_elsewhere_is_refused(host: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DOCKER_HOST", host)
    said = nobody()
    assert repr(host) in said
    assert "on this machine" in said
    assert "unix:///var/run/docker.sock" in said


def test_permission_denied_names_the_group(path: Path):
    async def main() -> None:
        async with serving(path):
            os.chmod(path, 0)
            if root:
                # files of others are closed to anybody else
                os.seteuid(65534)
            try:
                async with daemon():
                    pytest.fail("it was taken")
            finally:
                if root:
                    os.seteuid(0)

    root = os.geteuid() == 0
    with pytest.raises(SandboxError, match=r"permission denied.*usermod -aG docker"):
        asyncio.run(main())


def test_an_old_daemon_is_refused(path: Path):
    assert "speaks API 1.39; 1.40 (Docker 19.03) or newer is needed" in refused(
        path, version={**VERSION, "ApiVersion": "1.39"}
    )


def test_api_versions_are_compared_as_numbers(path: Path):
    assert "speaks API 1.9" in refused(path, version={**VERSION, "ApiVersion": "1.9"})
    assert found(path, version={**VERSION, "ApiVersion": "1.100"}).name


def test_windows_containers_are_refused(path: Path):
    assert "windows containers" in refused(path, info={**INFO, "OSType": "windows"})


@pytest.mark.parametrize("version", [[], {}, {"ApiVersion": "new"}, {"ApiVersion": 1.41}, "text", None])
def test_something_else_that_answers_is_refused(path: Path, version: Any):
    assert "does not answer as a Docker daemon does" in refused(path, version=version)


def test_text_instead_of_json_is_refused(path: Path):
    async def page(request: web.Request) -> web.Response:
        return web.Response(text="<html>", content_type="text/html")

    assert f"unix://{path}: " in refused(path, version=page)


def test_an_error_of_the_daemon_is_told(path: Path):
    async def broken(request: web.Request) -> web.Response:
        return failure(500, "disk full")

    assert "answers with an error: disk full" in refused(path, info=broken)


def test_a_daemon_that_hangs_has_a_deadline(path: Path):
    async def hang(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    assert "no answer in 0.2 s" in refused(path, timeout_s=0.2, version=hang)


def test_every_later_request_has_a_deadline(path: Path, monkeypatch: pytest.MonkeyPatch):
    async def hang(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async def main() -> None:
        async with asyncio.timeout(30), serving(path, {"GET /images/json": hang}), daemon() as found:
            with pytest.raises(SandboxError, match="could not list images: "), daemon_boundary("list images"):
                await found.docker.images.list()

    monkeypatch.setattr(module, "REQUEST_TIMEOUT_S", 0.2)
    asyncio.run(main())


def test_a_daemon_that_hangs_up_is_refused(path: Path):
    async def hang_up(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    assert f"unix://{path}: answers with an error: " in refused(path, version=hang_up)


def test_more_than_a_hundred_requests_wait_at_once(path: Path):
    """aiodocker's own connector would let the 101st wait for ever."""
    num_requests = 150

    async def main() -> None:
        waiting, all_here = 0, asyncio.Event()

        async def together(request: web.Request) -> web.Response:
            nonlocal waiting
            if request.query:
                waiting += 1
                if waiting == num_requests:
                    all_here.set()
                await all_here.wait()
            return web.json_response(INFO)

        async with (
            serving(path, {"GET /info": together}),
            daemon() as found,
            asyncio.timeout(30),
            asyncio.TaskGroup() as tg,
        ):
            for _ in range(num_requests):
                tg.create_task(found.docker._query_json("info?together=1"))

    asyncio.run(main())


def test_leaving_the_block_closes_every_connection(path: Path):
    async def main() -> tuple[bool, bool]:
        async with serving(path), daemon() as found:
            pass
        return found.docker.session.closed, found.docker.connector.closed

    # and a connection left open would be a ResourceWarning, which is an error here
    assert asyncio.run(main()) == (True, True)


def test_what_a_body_raises_is_not_taken_for_the_daemons(path: Path):
    async def main() -> None:
        async with serving(path), daemon():
            raise ConnectionRefusedError("mine")

    with pytest.raises(ConnectionRefusedError, match="mine"):
        asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (aiodocker.DockerError(409, "it is in use"), "could not stop it: it is in use"),
        (TimeoutError(), "could not stop it: TimeoutError"),
        (ConnectionResetError("gone"), "could not stop it: ConnectionResetError: gone"),
    ],
)
def test_the_boundary_translates(error: Exception, said: str):
    with pytest.raises(SandboxError) as caught, daemon_boundary("stop it"):
        raise error
    assert str(caught.value) == said
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("kind", ["docker"], indirect=True)
def test_the_real_daemon(kind: str):
    async def main() -> tuple[module.Daemon, str]:
        async with daemon() as found:
            return found, (await found.docker.version())["Version"]

    it, version = asyncio.run(main())
    product, _, its_version = it.name.partition(" ")
    assert product in ("Docker", "Podman")
    assert its_version
    assert version.startswith(its_version)
    assert it.runtimes


def test_a_zygote_finds_its_control_socket_below_a_temporary_folder_with_a_long_name(tmp_path: Path, monkeypatch):
    (folder := tmp_path / ("job-" + "1234567890" * 15)).mkdir()
    # as in the container, where the folder has a short name
    monkeypatch.chdir(folder)
    with _listen(str(folder)) as listener, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as zygote:
        assert (folder / "control").stat().st_mode & 0o777 == 0o666
        zygote.connect("control")
        control, _ = listener.accept()
        with control:
            zygote.send(b"ready")
            assert control.recv(16) == b"ready"
