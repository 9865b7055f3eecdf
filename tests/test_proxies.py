"""Services of the internet by the proxy of the environment; this machine, and what is asked in plain http, without."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from l0fast.engine.base import Sampling
from l0fast.engine.openai import EndpointConfig, openai_engine
from l0fast.errors import EngineError, UsageError
from l0fast.proxies import proxy_of
from l0fast.tools.broker import Passing
from l0fast.tools.http import open_http

PROXY = "http://us:secret@proxy:3128"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("https_proxy", "http_proxy", "no_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", PROXY)
    monkeypatch.setenv("NO_PROXY", "intranet,.lab.example")


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("https://api.example.com/v1", PROXY),
        ("https://api.example.com:8443/v1", PROXY),
        ("http://api.example.com/v1", None),
        ("http://10.1.2.3:8000/v1", None),
        ("https://127.0.0.1:8000/v1", None),
        ("https://[::1]:8000/v1", None),
        ("https://localhost/v1", None),
        ("https://intranet/v1", None),
        ("https://gpu.lab.example:8000/v1", None),
    ],
)
def test_what_goes_by_the_proxy(url: str, proxy: str | None):
    assert proxy_of(url) == proxy


def test_without_one_all_is_straight(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HTTPS_PROXY")
    assert proxy_of("https://api.example.com") is None


def test_a_proxy_may_be_named_without_http(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTPS_PROXY", "proxy:3128")
    assert proxy_of("https://api.example.com") == "http://proxy:3128"


@pytest.mark.parametrize("proxy", ["socks5://us:secret@proxy:1080", "http://us:secret@proxy:port", "http://"])
def test_a_proxy_that_can_not_be_used_is_one_sentence_without_its_password(proxy: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(UsageError, match="name one like http://proxy:3128, or api.example.com in NO_PROXY") as caught:
        proxy_of("https://api.example.com")
    assert "secret" not in str(caught.value)


async def ask_an_endpoint(url: str) -> None:
    config = EndpointConfig(url=url, model="m", attempts=2, backoff_s=0.001)
    async with openai_engine(config) as engine:
        await engine.generate(
            [{"role": "user", "content": "?"}], Sampling(max_new_tokens=8, stop_token_ids=()), conversation="c"
        )


async def ask_a_service(url: str) -> None:
    async with open_http(timeout_s=5.0, max_bytes=1000) as http:
        await http.json("POST", f"{url}/search", headers={}, name="web search", body={})


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        (ask_an_endpoint, EngineError, "the proxy that HTTPS_PROXY names answered 407 Who are you?"),
        (ask_a_service, Passing, "web search"),
    ],
)
def test_services_are_asked_by_way_of_it(
    ask: Callable[[str], Awaitable[None]], error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        asked.append(head.splitlines()[0])
        assert "Proxy-Authorization: Basic dXM6c2VjcmV0" in head
        writer.write(b"HTTP/1.1 407 Who are you?\r\nContent-Length: 0\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    async def main() -> Any:
        async with await asyncio.start_server(proxy, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            monkeypatch.setenv("HTTPS_PROXY", f"http://us:secret@127.0.0.1:{port}")
            with pytest.raises(error, match=words) as caught:
                await ask("https://api.example.com")
        return str(caught.value)

    assert "secret" not in asyncio.run(main())
    assert set(asked) == {"CONNECT api.example.com:443 HTTP/1.1"}
