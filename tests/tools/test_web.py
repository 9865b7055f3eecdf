"""web_search and get_webpage_in_markdown against servers that speak the providers' documented forms."""

import asyncio

import pytest
from aiohttp import web

from l0fast.config import WebConfig
from l0fast.errors import ToolError, UsageError
from l0fast.tools.broker import ToolPolicy, open_broker
from l0fast.tools.convert import open_converter
from l0fast.tools.http import MAX_TURNED_AWAY, open_http
from l0fast.tools.web import PROVIDERS, secrets, web_search_tool, webpage_tool

ANSWERS = {
    "serper": {
        "searchParameters": {"q": "x"},
        "answerBox": {"title": "Oslo", "answer": "Norway", "link": "http://box"},
        "organic": [{"title": "T", "link": "http://a", "snippet": "S", "date": "1 May 2024", "position": 1}],
    },
    "exa": {"results": [{"title": "T", "url": "http://a", "text": "S", "publishedDate": "2024-05-01T00:00:00.000Z"}]},
    "firecrawl": {"success": True, "data": {"web": [{"title": "T", "url": "http://a", "description": "S"}]}},
    "searxng": {"query": "x", "results": [{"title": "T", "url": "http://a", "content": "S", "engine": "e"}]},
}
FOUND = {
    "serper": [
        {"title": "Oslo", "url": "http://box", "snippet": "Norway"},
        {"title": "T", "url": "http://a", "snippet": "1 May 2024 | S"},
    ],
    "exa": [{"title": "T", "url": "http://a", "snippet": "2024-05-01 | S"}],
    "firecrawl": [{"title": "T", "url": "http://a", "snippet": "S"}],
    "searxng": [{"title": "T", "url": "http://a", "snippet": "S"}],
}
KEY = "k-secret-123"


@pytest.fixture(autouse=True)
def keys(monkeypatch):
    for provider in PROVIDERS.values():
        if provider.key_env:
            monkeypatch.setenv(provider.key_env, KEY)


def searching(serving, name, answer, *, file=None, mode="use", query="oslo country", attempts=2):
    """The answer of web_search, and the requests it took."""
    requests = []

    async def take(request):
        requests.append((request, await request.read()))
        return await answer(request)

    async def main():
        async with (
            serving(take) as url,
            open_http(timeout_s=5, max_bytes=100_000) as http,
            open_broker(file, mode) as broker,
        ):
            config = WebConfig(search_provider=name, search_url=url + "/search")
            policy = ToolPolicy(attempts=attempts, backoff_s=0.001, secrets=secrets())
            tool = broker.wrap(web_search_tool(config, http, replay=mode == "replay"), policy)
            return await tool.call(query)

    return asyncio.run(main()), requests


@pytest.mark.parametrize("name", PROVIDERS)
def test_each_provider_is_asked_and_read_as_it_documents(serving, name):
    async def answer(request):
        return web.json_response(ANSWERS[name])

    found, [(request, body)] = searching(serving, name, answer)
    assert found == FOUND[name]
    said = {**dict(request.headers), "body": body.decode(), "query": request.query_string}
    if name == "searxng":
        assert "format=json" in said["query"]
        assert request.query["q"] == "oslo country"
    else:
        assert KEY in str(said)
        assert "oslo country" in said["body"]


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("answer", [b"not json", b"[]", b"3", b'{"organic": 3, "results": 3, "data": 3}'])
def test_malformed_answers_are_an_error_for_the_agent(serving, name, answer):
    async def say(request):
        return web.Response(body=answer)

    with pytest.raises(ToolError):
        searching(serving, name, say)


def test_a_rate_limit_is_waited_out(serving):
    statuses = [429, 200]

    async def answer(request):
        status = statuses.pop(0)
        return web.json_response(ANSWERS["exa"], status=status, headers={"Retry-After": "0"})

    found, requests = searching(serving, "exa", answer)
    assert found == FOUND["exa"]
    assert len(requests) == 2


def test_errors_never_show_the_key(serving):
    async def answer(request):
        return web.Response(status=500, text=f"bad key {KEY}")

    with pytest.raises(ToolError, match="web search answered 500") as caught:
        searching(serving, "serper", answer)
    assert KEY not in str(caught.value)

    async def echo(request):
        return web.json_response({"results": [{"title": f"your key is {KEY}", "url": "http://a", "text": "S"}]})

    found, _ = searching(serving, "exa", echo)
    assert found[0]["title"] == "your key is ***"


REFUSALS = [
    ("serper", 403, {"message": "Unauthorized.", "statusCode": 403}, "403 Forbidden (Unauthorized.)"),
    ("serper", 400, {"message": "Not enough credits", "statusCode": 400}, "400 Bad Request (Not enough credits)"),
    ("exa", 402, {"error": "No more credits", "tag": "NO_MORE_CREDITS"}, "402 Payment Required (No more credits)"),
    ("firecrawl", 401, {"success": False, "error": "Unauthorized: Invalid token"}, "401 Unauthorized (Unauthorized: I"),
]
"""As they answer where the key is wrong or the account empty."""


def searches(serving, name, answers):
    """What a search said each time, the service having these answers one after the other."""
    waiting = iter(answers)

    async def take(request):
        status, said = next(waiting)
        return web.json_response(said, status=status)

    async def main():
        said = []
        async with serving(take) as url, open_http(timeout_s=5, max_bytes=100_000) as http, open_broker() as broker:
            config = WebConfig(search_provider=name, search_url=url + "/search")
            tool = broker.wrap(web_search_tool(config, http), ToolPolicy(secrets=secrets()))
            for number in range(len(answers)):
                try:
                    said.append(await tool.call(f"question {number}"))
                except ToolError as e:
                    said.append(str(e))
        return said

    return asyncio.run(main())


@pytest.mark.parametrize(("name", "status", "answer", "told"), REFUSALS)
def test_a_service_that_turns_everybody_away_ends_the_run_in_its_own_words(serving, name, status, answer, told):
    refused = [(status, answer)] * MAX_TURNED_AWAY
    assert all(said.startswith(f"web search answered {told}") for said in searches(serving, name, refused[:-1]))
    with pytest.raises(UsageError, match="127.0.0.1 has turned 10 requests of web search in a row away") as caught:
        searches(serving, name, refused)
    assert told in str(caught.value)


def test_a_key_that_a_service_repeats_is_not_shown_to_the_user_either(serving):
    with pytest.raises(UsageError, match="no such key: \\*\\*\\*") as caught:
        searches(serving, "exa", [(401, {"error": f"no such key: {KEY}"})] * MAX_TURNED_AWAY)
    assert KEY not in str(caught.value)


def test_a_service_that_turns_one_away_now_and_then_goes_on(serving):
    refused, found = (403, {"message": "Unauthorized."}), (200, ANSWERS["serper"])
    said = searches(serving, "serper", [*[refused] * (MAX_TURNED_AWAY - 1), found] * 2)
    assert said.count(FOUND["serper"]) == 2


def test_a_query_that_a_service_can_not_take_is_the_agents_own(serving):
    refused = (400, {"message": "Query is too long", "statusCode": 400})
    said = searches(serving, "serper", [refused] * 2 * MAX_TURNED_AWAY)
    assert set(said) == {"web search answered 400 Bad Request (Query is too long)"}


def test_a_searxng_that_is_turned_away_itself_has_not_found_nothing(serving, tmp_path):
    silent = {"results": [], "unresponsive_engines": [["brave", "Suspended: too many requests"], ["qwant", "CAPTCHA"]]}
    answers = [silent, {"results": [], "unresponsive_engines": []}, ANSWERS["searxng"] | silent | ANSWERS["searxng"]]

    async def answer(request):
        return web.json_response(answers.pop(0))

    file = tmp_path / "kept.sqlite"
    with pytest.raises(ToolError, match="no answer from brave: Suspended: too many requests, qwant: CAPTCHA"):
        searching(serving, "searxng", answer, file=file)
    # nor is that kept, as what was not found is
    assert searching(serving, "searxng", answer, file=file)[0] == []
    assert searching(serving, "searxng", answer, query="another")[0] == FOUND["searxng"]


def test_a_page_before_a_service_is_not_quoted(serving):
    async def answer(request):
        return web.Response(status=403, text="<!DOCTYPE html>\n<title>Just a moment...</title>")

    with pytest.raises(ToolError, match="web search answered 403 Forbidden$"):
        searching(serving, "serper", answer)


def test_what_was_recorded_is_replayed_with_the_service_gone_and_no_key(serving, tmp_path, monkeypatch):
    async def answer(request):
        return web.json_response(ANSWERS["serper"])

    async def gone(request):
        raise web.HTTPGone

    file = tmp_path / "answers.sqlite"
    searching(serving, "serper", answer, file=file, mode="record")
    monkeypatch.delenv("SERPER_API_KEY")
    found, requests = searching(serving, "serper", gone, file=file, mode="replay")
    assert (found, requests) == (FOUND["serper"], [])
    with pytest.raises(ToolError, match="the recording has no answer"):
        searching(serving, "serper", gone, file=file, mode="replay", query="something else")


def test_a_missing_key_or_address_is_named(monkeypatch):
    monkeypatch.delenv("SERPER_API_KEY")
    with pytest.raises(UsageError, match="no SERPER_API_KEY"):
        web_search_tool(WebConfig(), None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="--web.search-url"):
        web_search_tool(WebConfig(search_provider="searxng"), None)  # pyright: ignore[reportArgumentType]


PAGE = """<html><head><title>Oslo</title></head><body><nav>Menu</nav><article><h1>Oslo</h1>
<p>Oslo is the capital of <a href="/no">Norway</a>, and its largest city by far, with 717,710 people in 2024.</p>
<table><tr><th>Area</th></tr><tr><td>454 km2</td></tr></table></article></body></html>"""


def reading(serving, answer, *calls, **settings):
    async def main():
        async with (
            serving(answer) as url,
            open_http(timeout_s=5, max_bytes=5_000_000, allow_private=True) as http,
            open_converter() as converter,
        ):
            if settings.get("page_reader") == "jina":
                settings["reader_url"] = url + "/r/"
            tool = webpage_tool(WebConfig(**settings), http, converter)
            return [await tool.call(call.replace("URL", url), *parts) for call, *parts in calls]

    return asyncio.run(main())


@pytest.mark.slow
def test_a_page_is_read_as_markdown_a_part_at_a_time_and_other_texts_as_they_are(serving):
    async def answer(request):
        if request.path == "/page":
            return web.Response(text=PAGE, content_type="text/html")
        return web.Response(text="a,b\n1,2", content_type="text/csv")

    whole, first, last, table = reading(
        serving, answer, ("URL/page",), ("URL/page", 1), ("URL/page", 2), ("URL/table",), page_chars=120
    )
    assert "# Oslo" in whole
    assert "Menu" not in whole
    assert "[part 1 of 2; part=2 goes on]" in whole
    assert whole == first
    assert "454 km2" in last
    assert table == "a,b\n1,2"


@pytest.mark.parametrize(("status", "ends"), [(403, False), (401, True), (402, True)])
def test_sites_that_a_reader_reads_for_nobody_end_no_run_and_a_key_that_it_does_not_know_does(serving, status, ends):
    async def answer(request):
        words = "Anonymous access to domain example.com blocked until Sunday"
        return web.json_response({"code": 40305, "message": words}, status=status)

    async def main():
        said = []
        async with (
            serving(answer) as url,
            open_http(timeout_s=5, max_bytes=100_000) as http,
            open_converter() as converter,
        ):
            tool = webpage_tool(WebConfig(page_reader="jina", reader_url=f"{url}/r/"), http, converter)
            for number in range(MAX_TURNED_AWAY):
                try:
                    await tool.call(f"https://example.com/{number}")
                except ToolError as e:
                    said.append(str(e))
        return said

    if ends:
        with pytest.raises(UsageError, match="turned 10 requests of the reader in a row away"):
            asyncio.run(main())
    else:
        told = "the reader answered 403 Forbidden (Anonymous access"
        assert sum(said.startswith(told) for said in asyncio.run(main())) == MAX_TURNED_AWAY


def test_a_page_is_read_once_for_all_of_its_parts(serving):
    asked = []

    async def answer(request):
        asked.append(request.path)
        return web.Response(text=f"page {len(asked)}, part 1; and {len(asked)}.2")

    calls = [(f"https://example.com/{page}", *part) for page, *part in (("a",), ("b", 2), ("a", 2), ("a",))]
    said = reading(serving, answer, *calls, page_reader="jina", page_chars=15)
    assert asked == [f"/r/https://example.com/{page}" for page in "aba"]
    # a part that was asked for before is the broker's to answer
    assert [text[:14] for text in said] == ["page 1, part 1", " and 2.2", " and 1.2", "page 3, part 1"]


def test_jinas_reader_is_asked_for_public_pages_only(serving, monkeypatch):
    monkeypatch.setenv("JINA_API_KEY", KEY)
    asked = []

    async def answer(request):
        asked.append((request.path_qs, request.headers.get("Authorization")))
        return web.Response(text="Title: X\n\nMarkdown Content:\nhello")

    [text] = reading(serving, answer, ("https://example.com/a?b=1",), page_reader="jina")
    assert text.endswith("hello")
    assert asked == [("/r/https://example.com/a?b=1", f"Bearer {KEY}")]
    with pytest.raises(ToolError, match="not a public host"):
        reading(serving, answer, ("http://127.0.0.1/x",), page_reader="jina")
