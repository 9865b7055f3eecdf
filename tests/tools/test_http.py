"""HTTP for tools, against a real server on loopback: what is reached, what is refused, and what is asked again."""

import asyncio
import socket
import threading

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from l0fast.errors import ToolError
from l0fast.tools.broker import Passing
from l0fast.tools.http import NotPublic, PublicResolver, checked_url, is_public, open_http

LIMITS = {"timeout_s": 5.0, "max_bytes": 10_000}


def fetched(serving, answer, path="/", *, private=True, **limits):
    async def main():
        async with serving(answer) as url, open_http(**LIMITS | limits, allow_private=private) as http:
            return await http.page(url + path)

    return asyncio.run(main())


def test_a_page_comes_with_its_type_and_where_it_was(serving):
    async def answer(request):
        if request.path == "/old":
            raise web.HTTPFound("/new#part")
        return web.Response(text="hällo", content_type="text/html")

    page = fetched(serving, answer, "/old")
    assert (page.content_type, page.charset, page.body.decode()) == ("text/html", "utf-8", "hällo")
    assert page.url.endswith("/new")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1"]
)
def test_this_machine_is_not_reached_by_any_of_its_names(serving, host):
    asked = []

    async def answer(request):
        asked.append(request.path)
        return web.Response()

    async def main():
        async with serving(answer) as url, open_http(**LIMITS) as http:
            await http.page(f"http://{host}:{url.rpartition(':')[2]}/")

    with pytest.raises(ToolError, match="not a public host"):
        asyncio.run(main())
    assert asked == []


def test_a_redirect_to_this_machine_is_refused_too(serving, monkeypatch):
    """The first host is public as far as the check goes, and is this server; the second one is named as it is."""
    asked = []

    async def answer(request):
        asked.append(request.path)
        raise web.HTTPFound("http://127.0.0.1:9/secret")

    async def resolve(self, host, port=0, family=socket.AF_INET):
        assert host == "public.example"
        return [{"hostname": host, "host": "127.0.0.1", "port": port, "family": socket.AF_INET, "proto": 6, "flags": 0}]

    async def main():
        async with serving(answer) as url, open_http(**LIMITS) as http:
            monkeypatch.setattr(PublicResolver, "resolve", resolve)
            await http.page(f"http://public.example:{url.rpartition(':')[2]}/start")

    with pytest.raises(ToolError, match=r"127\.0\.0\.1 is not a public host"):
        asyncio.run(main())
    assert asked == ["/start"]


def test_a_name_that_resolves_to_a_private_address_is_refused(monkeypatch):
    async def main(address):
        def getaddrinfo(*args, **kwargs):
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 80)) for a in address]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        return await PublicResolver().resolve("name.example", 80)

    assert [r["host"] for r in asyncio.run(main(["93.184.215.14"]))] == ["93.184.215.14"]
    with pytest.raises(NotPublic):
        asyncio.run(main(["93.184.215.14", "10.0.0.1"]))


def test_names_that_take_long_to_look_up_hold_no_other_up(monkeypatch):
    answered = threading.Event()

    def getaddrinfo(host, port, **kwargs):
        if host != "fast.example":
            answered.wait()
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.215.14", port))]

    async def main():
        resolver = PublicResolver()
        slow = [asyncio.create_task(resolver.resolve(f"slow-{n}.example")) for n in range(40)]
        try:
            await asyncio.sleep(0)
            assert [found["hostname"] for found in await resolver.resolve("fast.example", 80)] == ["fast.example"]
            assert not any(task.done() for task in slow)
        finally:
            answered.set()
        assert len(await asyncio.gather(*slow)) == 40

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize(
    "ip",
    [
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "::1",
        "fe80::1%eth0",
    ]
    + ["fc00::1", "::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::a00:1", "ff02::1", "255.255.255.255"]
    # site-local, NAT64 of a network's own, translated and compatible IPv4, handed out to nobody
    + ["fec0::1", "64:ff9b:1::a00:1", "::ffff:0:127.0.0.1", "::127.0.0.1", "4000::1", "2001::1"],
)
def test_addresses_of_this_network_are_not_public(ip):
    assert not is_public(ip)


@pytest.mark.parametrize("ip", ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "2002:808:808::1"])
def test_addresses_of_the_internet_are_public(ip):
    assert is_public(ip)


@given(st.text())
def test_any_text_is_an_address_or_refused(text):
    try:
        url = checked_url(text)
    except ToolError:
        return
    assert url.scheme in ("http", "https")


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://example.com", "gopher://x", "example.com", "http://", "http://a:b@example.com", ""],
)
def test_what_is_no_plain_web_address_is_refused(url):
    with pytest.raises(ToolError):
        checked_url(url)


@pytest.mark.parametrize(("status", "passes"), [(404, False), (403, False), (429, True), (500, True), (503, True)])
def test_a_status_is_told_and_only_passing_ones_are_asked_again(serving, status, passes):
    async def answer(request):
        return web.Response(status=status, headers={"Retry-After": "3"})

    with pytest.raises(Passing if passes else ToolError, match=str(status)) as caught:
        fetched(serving, answer)
    assert getattr(caught.value, "retry_after_s", None) == (3.0 if passes else None)


def test_a_reason_in_bytes_that_are_no_text_is_told_as_text():
    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 No\xff\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.close()

    async def main():
        async with (
            await asyncio.start_server(answer, "127.0.0.1", 0) as server,
            open_http(**LIMITS, allow_private=True) as http,
        ):
            await http.page(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")

    with pytest.raises(ToolError, match=r"answered 404 No\?$"):
        asyncio.run(main())


def test_a_service_that_wants_to_be_left_alone_for_long_is_left_alone(serving):
    async def answer(request):
        return web.Response(status=429, headers={"Retry-After": "3600"})

    with pytest.raises(ToolError, match="3600 s"):
        fetched(serving, answer)


def test_answers_that_are_too_long_too_slow_or_go_round_in_circles_end(serving):
    async def huge(request):
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(100):
            await response.write(b"x" * 1000)
        return response

    async def silent(request):
        await asyncio.Event().wait()

    async def circle(request):
        raise web.HTTPFound("/")

    with pytest.raises(ToolError, match="more than 10,000 bytes"):
        fetched(serving, huge)
    with pytest.raises(Passing, match="Timeout"):
        fetched(serving, silent, timeout_s=0.05)
    with pytest.raises(ToolError, match="redirects more than 5 times"):
        fetched(serving, circle)


def test_a_small_answer_that_unpacks_to_a_large_one_is_too_long(serving):
    async def bomb(request):
        response = web.Response(body=b"\0" * 1_000_000)
        response.enable_compression(web.ContentCoding.gzip)
        return response

    with pytest.raises(ToolError, match="more than"):
        fetched(serving, bomb)


def test_nobody_there_may_pass():
    async def main():
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        async with open_http(**LIMITS, allow_private=True) as http:
            await http.page(f"http://127.0.0.1:{port}/")

    with pytest.raises(Passing):
        asyncio.run(main())
