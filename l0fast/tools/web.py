"""`web_search` and `get_webpage_in_markdown`: the web as agents see it, through services whose keys stay on the host.

    web_search(query)               Serper (Google) | Exa | Firecrawl | a SearXNG of one's own  -> title, url, snippet
    get_webpage_in_markdown(url)    Jina's reader | fetched here (http.py) and converted in a child (convert.py)

The requests and answers are the services' documented ones: serper.dev /search, exa.ai /search, firecrawl.dev /v2/search,
docs.searxng.org search API, jina.ai/reader. What is returned is cut to what a context can hold.
"""

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from l0fast.config import WebConfig
from l0fast.errors import ToolError, UsageError
from l0fast.sandbox.base import ToolSpec
from l0fast.tools.cache import Key, Memory
from l0fast.tools.convert import Converter
from l0fast.tools.http import Http, checked_url

SNIPPET_CHARS = 600
"""Of one result [characters]."""
MAX_KEPT_PAGES, MAX_KEPT_BYTES = 1000, 64 << 20
"""Pages whose further parts are answered without reading them again [pages], [bytes]."""


@dataclass(frozen=True, slots=True)
class Provider:
    url: str
    """Of the service; "" where the user has to say."""
    key_env: str
    """Environment variable of its key; "" where there is none."""
    needs_key: bool
    search: Callable[[Http, str, str, str, int], Awaitable[Sequence[Mapping[str, Any]]]]
    """(http, url, key, query, number of results) -> title, url, snippet of each."""


async def _serper(http: Http, url: str, key: str, query: str, n: int) -> list[dict[str, Any]]:
    said = await http.json("POST", url, headers={"X-API-KEY": key}, name="web search", body={"q": query, "num": n})
    box = said.get("answerBox") or {}
    answer = box.get("answer") or box.get("snippet")
    first = [{"title": box.get("title", ""), "url": box.get("link", ""), "snippet": answer}] if answer else []
    return first + [
        {"title": hit.get("title"), "url": hit.get("link"), "snippet": _joined(hit.get("date"), hit.get("snippet"))}
        for hit in said.get("organic", [])
    ]


async def _exa(http: Http, url: str, key: str, query: str, n: int) -> list[dict[str, Any]]:
    body = {"query": query, "numResults": n, "contents": {"text": {"maxCharacters": SNIPPET_CHARS}}}
    said = await http.json("POST", url, headers={"x-api-key": key}, name="web search", body=body)
    return [
        {
            "title": hit.get("title"),
            "url": hit.get("url"),
            "snippet": _joined((hit.get("publishedDate") or "")[:10], hit.get("text")),
        }
        for hit in said.get("results", [])
    ]


async def _firecrawl(http: Http, url: str, key: str, query: str, n: int) -> list[dict[str, Any]]:
    headers = {"Authorization": f"Bearer {key}"}
    said = await http.json("POST", url, headers=headers, name="web search", body={"query": query, "limit": n})
    # its first version answered with the list itself
    data = said.get("data") or {}
    hits = data.get("web", []) if isinstance(data, Mapping) else data
    return [{"title": hit.get("title"), "url": hit.get("url"), "snippet": hit.get("description")} for hit in hits]


async def _searxng(http: Http, url: str, key: str, query: str, n: int) -> list[dict[str, Any]]:
    said = await http.json("GET", url, headers={}, name="web search", query={"q": query, "format": "json"})
    if not said.get("results") and (silent := said.get("unresponsive_engines")):
        # those that it asks itself have turned it away: nothing found would be kept as the answer
        raise ToolError(f"web search got no answer from {', '.join(': '.join(map(str, engine)) for engine in silent)}")
    return [
        {
            "title": hit.get("title"),
            "url": hit.get("url"),
            "snippet": _joined(hit.get("publishedDate"), hit.get("content")),
        }
        for hit in said.get("results", [])
    ]


PROVIDERS = {
    "serper": Provider("https://google.serper.dev/search", "SERPER_API_KEY", True, _serper),
    "exa": Provider("https://api.exa.ai/search", "EXA_API_KEY", True, _exa),
    "firecrawl": Provider("https://api.firecrawl.dev/v2/search", "FIRECRAWL_API_KEY", True, _firecrawl),
    "searxng": Provider("", "", False, _searxng),
}
READER_URL = "https://r.jina.ai/"
READER_KEY = "JINA_API_KEY"
RETRIEVER_KEYS = ("ELASTICSEARCH_API_KEY", "EMBEDDINGS_API_KEY")


def web_search_tool(config: WebConfig, http: Http, *, replay: bool = False) -> ToolSpec:
    """`web_search`. In a replay nothing is called, so no key is needed. Raises UsageError: a key or an address is missing."""
    provider = PROVIDERS[config.search_provider]
    url = config.search_url or provider.url
    key = os.environ.get(provider.key_env, "").strip() if provider.key_env else ""
    if not replay:
        if provider.needs_key and not key:
            raise UsageError(
                f"web_search asks {config.search_provider}, but the environment has no {provider.key_env}: export it, replay a "
                "recording with --tools.cache-mode replay, or take another one with --web.search-provider"
            )
        if not url:
            raise UsageError(
                "web_search asks a SearXNG, but web.search_url is empty: give its address, for example "
                "--web.search-url http://127.0.0.1:8888/search"
            )

    async def web_search(query: str) -> list[dict[str, str]]:
        if not query.strip():
            raise ToolError("web_search needs words to search for")
        try:
            hits = await provider.search(http, url, key, query, config.search_results)
            return [
                {name: str(hit.get(name) or "")[:SNIPPET_CHARS] for name in ("title", "url", "snippet")}
                for hit in hits[: config.search_results]
            ]
        except (AttributeError, KeyError, TypeError) as e:
            raise ToolError(
                f"web search gave an answer in a form that {config.search_provider} does not document"
            ) from e

    return ToolSpec(
        name="web_search",
        signature="(query: str) -> list[dict[str, str]]",
        doc=f"Search the web. Up to {config.search_results} results, each with title, url and snippet.",
        call=web_search,
    )


def webpage_tool(config: WebConfig, http: Http, converter: Converter) -> ToolSpec:
    """`get_webpage_in_markdown`, a part of a page at a time."""
    key = os.environ.get(READER_KEY, "").strip()
    # the broker keeps parts: to read all of a page for each of them would cost as often, and might give another page
    pages = Memory(MAX_KEPT_PAGES, MAX_KEPT_BYTES)

    async def read(url: str) -> str:
        if config.page_reader == "jina":
            # it reads for anybody, but what it is asked for should be something that it can
            target = checked_url(url)
            headers = {"Accept": "text/plain", **({"Authorization": f"Bearer {key}"} if key else {})}
            said = await http.text(
                "GET",
                f"{config.reader_url or READER_URL}{target}",
                headers=headers,
                name="the reader",
                # 403 is for a site that it reads for nobody without a key, for a while: others it reads
                turned_away=(401, 402),
            )
            return said.decode(errors="replace")
        page = await http.page(url)
        return await converter.markdown(page.body, page.content_type, page.url, page.charset)

    async def get_webpage_in_markdown(url: str, part: int = 1) -> str:
        page = Key("page", "", url)
        kept = pages.get(page) if part > 1 else None
        text = await read(url) if kept is None else kept.decode()
        pages.put(page, text.encode())
        num_parts = max(1, -(-len(text) // config.page_chars))
        if not 1 <= part <= num_parts:
            raise ToolError(f"the page has {num_parts} parts: part = {part} is none of them")
        shown = text[(part - 1) * config.page_chars : part * config.page_chars]
        more = f"\n[part {part} of {num_parts}; part={part + 1} goes on]" if part < num_parts else ""
        return shown + more

    return ToolSpec(
        name="get_webpage_in_markdown",
        signature="(url: str, part: int = 1) -> str",
        doc=f"The main text of a web page or PDF as Markdown, {config.page_chars:,} characters a part.",
        call=get_webpage_in_markdown,
    )


def secrets() -> tuple[str, ...]:
    """Every key that these tools may hold; the broker keeps them out of answers and errors."""
    names = [provider.key_env for provider in PROVIDERS.values() if provider.key_env] + [READER_KEY, *RETRIEVER_KEYS]
    return tuple(value for name in names if (value := os.environ.get(name, "").strip()))


def _joined(*parts: Any) -> str:
    return " | ".join(str(part) for part in parts if part)
