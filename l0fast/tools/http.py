"""HTTP for tools: pages that a model has named, and services that the user has named. Two sorts, which trust differently.

    public    any http(s) address a model comes up with: its host must resolve to public addresses alone (no loopback,
              private, link-local, shared or reserved ones), the connection goes to an address that was checked, and every
              redirect is checked anew. So nothing on this machine or its network can be read through an agent; nor by
              way of a proxy of the environment, which is not used: it would look the name up again, in its own network.
    service   an address from the settings, with a key: wherever the user says, redirects not followed; by HTTPS_PROXY, if
              the environment has one.

Both: a deadline for all of it, a limit on bytes (after decompression). What may pass
(no connection, 408, 429, 5xx) is `Passing`, an OSError, so the broker asks again, after Retry-After where that was said;
anything else is a ToolError with the status, for the agent to read. Not so where a service turns one request after the other
away for who asks (a key that is wrong, credits that are used up): no agent can help that, and a policy would be trained on
what it can't do. It is a `UsageError`, and ends the run.
"""

import ipaddress
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from l0fast import __version__
from l0fast.engine.openai import complaint
from l0fast.errors import ToolError, UsageError
from l0fast.http_dates import retry_after_s
from l0fast.proxies import proxy_of
from l0fast.tools.broker import Passing
from l0fast.tools.threads import InThread

MAX_REDIRECTS = 5
MAX_URL_CHARS = 2000
MAX_RETRY_AFTER_S = 10.0
"""Longest wait that a service may ask for; one that asks for more is asked no more [s]."""
MAX_TURNED_AWAY = 10
"""Requests in a row that a service may refuse for who asks. Not one: now and then one is refused by mistake."""
MAX_WORDS_CHARS = 200
"""Of what a service says of a refusal [characters]."""
USER_AGENT = f"l0fast/{__version__}"
_UNICAST = ipaddress.ip_network("2000::/3")
"""The part of IPv6 that is handed out as anybody's."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""IPv4 in IPv6's clothes, for anybody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    url: str
    """After redirects."""
    content_type: str
    charset: str | None
    body: bytes


class Http:
    """Made by `open_http`."""

    def __init__(self, public: aiohttp.ClientSession, service: aiohttp.ClientSession, max_bytes: int, private: bool):
        self._public, self._service, self._max_bytes, self._private = public, service, max_bytes, private
        self._turned_away: Counter[str] = Counter()
        """By service, in a row."""

    async def page(self, url: str) -> Page:
        """Fetch what a model has named. Raises ToolError, or Passing."""
        for _ in range(MAX_REDIRECTS + 1):
            target = checked_url(url, private=self._private)
            try:
                async with self._public.get(target, allow_redirects=False) as response:
                    if response.status in (301, 302, 303, 307, 308) and (to := response.headers.get("Location")):
                        url = str(target.join(URL(to)))
                        continue
                    if response.status != 200:
                        raise _refusal(response, str(target))
                    return Page(
                        url=str(target),
                        content_type=response.content_type,
                        charset=response.charset,
                        body=await self._body(response),
                    )
            except (aiohttp.ClientError, OSError, ValueError) as e:
                raise _failure(e, str(target)) from e
        raise ToolError(f"{url} redirects more than {MAX_REDIRECTS} times: try another address")

    async def json(
        self, method: str, url: str, *, headers: Mapping[str, str], name: str, body: Any = None, query: Any = None
    ) -> Any:
        """What a service answers. Raises ToolError, Passing or UsageError, none of which shows the whole address or the key."""
        text = await self.text(method, url, headers=headers, name=name, body=body, query=query)
        try:
            return orjson.loads(text)
        except orjson.JSONDecodeError as e:
            raise ToolError(f"{name} did not answer with JSON: try again later") from e

    async def text(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        name: str,
        body: Any = None,
        query: Any = None,
        turned_away: Collection[int] = (401, 402, 403),
    ) -> bytes:
        """As `json`, but the bytes. `turned_away`: statuses that are about who asks, and not about what was asked for."""
        sent = {"Content-Type": "application/json"} if body is not None else {}
        data = None if body is None else orjson.dumps(body)
        try:
            async with self._service.request(
                method,
                URL(url),
                headers={**sent, **headers},
                data=data,
                params=query,
                allow_redirects=False,
                proxy=proxy_of(url),
            ) as response:
                if response.status != 200:
                    raise await self._refused(response, name, headers, turned_away)
                answer = await self._body(response)
        except UsageError:
            # a ValueError
            raise
        except (aiohttp.ClientError, OSError, ValueError) as e:
            raise _failure(e, name) from e
        del self._turned_away[name]
        return answer

    async def _refused(
        self, response: aiohttp.ClientResponse, name: str, headers: Mapping[str, str], turned_away: Collection[int]
    ) -> Exception:
        """A service's refusal, with its words; time after time for who asks, it is for the user to read."""
        words = complaint(await self._body(response))
        # whoever stands before a service answers with a page
        words = "" if words.lstrip().startswith("<") else words
        for value in headers.values():
            # a service may repeat the key
            words = words.replace(value.rpartition(" ")[2] or "\0", "***")
        words = " ".join(words.split())[:MAX_WORDS_CHARS]
        # Serper has 400 for an account that is empty, and for a query that it can't take
        of_who_asks = response.status in turned_away or (response.status == 400 and "credit" in words.lower())
        self._turned_away[name] += of_who_asks
        if not of_who_asks or self._turned_away[name] < MAX_TURNED_AWAY:
            return _refusal(response, name, words)
        return UsageError(
            f"{response.url.host} has turned {MAX_TURNED_AWAY} requests of {name} in a row away, the last with "
            f"{_status(response, words)}: set its key right, or see what is left on its account, and go on"
        )

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > self._max_bytes:
                raise ToolError(
                    f"{response.url.host} answered with more than {self._max_bytes:,} bytes: take another page"
                )
        return bytes(body)


@asynccontextmanager
async def open_http(
    *, timeout_s: float, max_bytes: int, allow_private: bool = False, user_agent: str = ""
) -> AsyncIterator[Http]:
    """For as long as the `async with` body runs.

    Args:
        timeout_s: of one request, redirects not added up [s].
        max_bytes: of one answer.
        allow_private: let models read this machine's network too; for a corpus that is served there.
        user_agent: what pages are told, instead of our name.
    """
    timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(timeout_s, 10.0))
    resolver = None if allow_private else PublicResolver()
    async with (
        aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=resolver),
            timeout=timeout,
            headers={
                "User-Agent": user_agent or USER_AGENT,
                "Accept": "text/html,text/plain,application/pdf,application/json;q=0.9",
            },
            # one agent's cookies are not another's
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as public,
        aiohttp.ClientSession(
            timeout=timeout, headers={"User-Agent": USER_AGENT}, cookie_jar=aiohttp.DummyCookieJar()
        ) as service,
    ):
        yield Http(public, service, max_bytes, allow_private)


class NotPublic(OSError):
    """A host that an agent may not reach."""


class PublicResolver(AbstractResolver):
    """Names to addresses, all of which are public. What it returns is what is connected to: a second look-up can't differ.

    Each look-up has a thread of its own. A model comes up with names whose servers keep silent for half a minute, and uvloop looks up
    two at once, in all of the process (libuv's threadpool.c: slow work takes half of its four threads).
    """

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        look_up = InThread(socket.getaddrinfo)
        found = await look_up(host, port, type=socket.SOCK_STREAM, family=family, flags=socket.AI_ADDRCONFIG)
        results: list[ResolveResult] = []
        for of_family, _, proto, _, address in found:
            ip = str(address[0])
            if not is_public(ip):
                raise NotPublic(f"{host} is not a public host: agents may not reach it")
            results.append(
                ResolveResult(
                    hostname=host, host=ip, port=port, family=of_family, proto=proto, flags=socket.AI_NUMERICHOST
                )
            )
        return results

    async def close(self) -> None:
        """Nothing is kept."""


def is_public(ip: str) -> bool:
    """Whether an address is anybody's, not of this machine or a network behind it.

    >>> [is_public(ip) for ip in ("8.8.8.8", "127.0.0.1", "10.1.2.3", "169.254.169.254", "::ffff:127.0.0.1", "64:ff9b::7f00:1")]
    [True, False, False, False, False, False]
    """
    address = ipaddress.ip_address(ip.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)))
        # by itself no longer global to Python 3.13
        if address.sixtofour:
            return is_public(str(address.sixtofour))
        # what lies outside is nobody's, or of a network: mapped and translated IPv4, site-local, NAT64's own prefixes
        return address in _UNICAST and address.is_global
    return address.is_global and not address.is_multicast


def checked_url(url: str, *, private: bool = False) -> URL:
    """An address that a model may ask for. Raises ToolError."""
    try:
        parts = urlsplit(url.strip())
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        target = URL(url.strip()).with_fragment(None) if good else None
    except ValueError:
        parts, target = None, None
    if parts is None or target is None or len(url) > MAX_URL_CHARS:
        raise ToolError(f"{url[:80]!r} is no web address: give one that begins with http:// or https://")
    if parts.username or parts.password:
        raise ToolError(f"{parts.hostname}: an address with a name or password in it is not fetched")
    host = (target.host or "").rstrip(".")
    try:
        public = is_public(host)
    except ValueError:
        # a name; its addresses are checked when it is resolved. 2130706433 and 0x7f.1 are numbers to some resolvers
        public = not all(part.isdigit() or part.lower().startswith("0x") for part in host.split("."))
    if not (public or private):
        raise ToolError(f"{host} is not a public host: agents may not reach it")
    return target


def _status(response: aiohttp.ClientResponse, words: str) -> str:
    # bytes that are no UTF-8 arrive as halves of surrogate pairs, which JSON does not have
    reason = (response.reason or "").encode(errors="replace").decode()
    return f"{response.status} {reason}".rstrip() + (f" ({words})" if words else "")


def _refusal(response: aiohttp.ClientResponse, name: str, words: str = "") -> Exception:
    status = _status(response, words)
    if response.status in (408, 429) or response.status >= 500:
        wait_s = retry_after_s(response.headers.get("Retry-After"), time.time())
        if wait_s is not None and wait_s > MAX_RETRY_AFTER_S:
            return ToolError(f"{name} answered {status} and wants to be left alone for {wait_s:.0f} s: do without")
        return Passing(f"{name} answered {status}", wait_s)
    return ToolError(f"{name} answered {status}")


def _failure(error: Exception, name: str) -> Exception:
    if isinstance(error, Passing):
        return error
    if isinstance(error, ValueError):
        return ToolError(f"{name} leads to no web address")
    if isinstance(error.__cause__, NotPublic) or isinstance(error, NotPublic):
        return ToolError(str(error.__cause__ or error))
    if isinstance(error, aiohttp.ClientPayloadError):
        return Passing(f"{name} broke off")
    # the text may hold an address with a key in it
    return Passing(f"{name}: {type(error).__name__}")
