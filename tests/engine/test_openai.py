"""The engine for endpoints, against a real server on loopback that speaks the documented form, and breaks it."""

import asyncio
import codecs
import gzip
import time
from collections.abc import Callable, Sequence
from email.utils import formatdate
from typing import Any

import orjson
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from l0fast.engine import openai
from l0fast.engine.base import SampledText, Sampling
from l0fast.engine.openai import (
    SPENT_S,
    Account,
    EndpointConfig,
    Events,
    OpenAIEngine,
    api_key,
    as_written,
    ended,
    endpoint_url,
    openai_engine,
)
from l0fast.errors import EngineError, UsageError
from l0fast.http_dates import retry_after_s

ASK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital of Norway?"}]
SAMPLING = Sampling(max_new_tokens=8, stop_token_ids=(), temperature=0.5, seed=2**40 + 7)
KEY = "sk-not-to-be-seen"

Reply = Callable[[web.Request], Any]


def whole(text: Any = "Oslo", **more: Any) -> dict[str, Any]:
    """A whole answer, as documented."""
    return {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}},
    } | more


def status(code: int, message: str = "no", **headers: str) -> Reply:
    async def reply(request: web.Request) -> web.Response:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.json_response({"error": {"message": message}}, status=code, headers=names)

    return reply


def data(body: bytes | dict[str, Any], **more: Any) -> Reply:
    async def reply(request: web.Request) -> web.Response:
        raw = body if isinstance(body, bytes) else orjson.dumps(body)
        return web.Response(body=raw, **{"content_type": "application/json"} | more)

    return reply


def stream(*parts: dict[str, Any] | bytes, end: bytes = b"data: [DONE]\n\n", cut: bool = False) -> Reply:
    """Server-sent events; `cut` closes the connection in the middle of the body."""

    async def reply(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for part in parts:
            await response.write(part if isinstance(part, bytes) else b"data: " + orjson.dumps(part) + b"\n\n")
        if cut:
            assert request.transport is not None
            request.transport.abort()
        else:
            await response.write(end)
        return response

    return reply


def delta(finish_reason: str | None = None, **said: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": said, "finish_reason": finish_reason}]}


def ask(
    replies: Sequence[Reply],
    *,
    use: Callable[[OpenAIEngine], Any] | None = None,
    told: list[str] | None = None,
    **config: Any,
) -> tuple[Any, list[dict[str, Any]], OpenAIEngine]:
    """What `use` made of an endpoint that gives these replies in turn, the last one again and again."""
    requests: list[dict[str, Any]] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        requests.append(await request.json() | {"Authorization": request.headers.get("Authorization")})
        return await replies[min(len(requests), len(replies)) - 1](request)

    async def main() -> tuple[Any, OpenAIEngine]:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            assert site._server is not None
            port = site._server.sockets[0].getsockname()[1]
            settings = {"url": f"http://127.0.0.1:{port}", "model": "m", "backoff_s": 0.001, "timeout_s": 10.0} | config
            on_text = None if told is None else lambda conversation, text: told.append(text)
            async with openai_engine(EndpointConfig(**settings), on_text=on_text) as engine:
                result = await (use(engine) if use else engine.generate(ASK, SAMPLING, conversation="c"))
        finally:
            await runner.cleanup()
        return result, engine

    result, engine = asyncio.run(main())
    return result, requests, engine


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def test_a_whole_answer_is_text_and_counts():
    result, (request,), engine = ask([data(whole())])
    assert result == SampledText(text="Oslo", finish_reason="stop", prompt_tokens=9, completion_tokens=2)
    assert request.pop("Authorization") == f"Bearer {KEY}"
    # nothing else is sent: servers refuse what they don't know
    assert request == {"model": "m", "messages": ASK, "max_tokens": 8, "temperature": 0.5, "seed": 7}
    usage = engine.usage
    assert (usage.answers, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (1, 9, 4, 2)
    assert (usage.retries, usage.uncounted) == (0, 0)


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        (None, (None, None)),
        ({}, (None, None)),
        ({"prompt_tokens": None, "completion_tokens": None, "total_tokens": 11}, (None, None)),
        ({"prompt_tokens": 9}, (9, None)),
    ],
)
def test_an_answer_whose_tokens_are_not_counted_is_one(usage: Any, counted: tuple[int | None, int | None]):
    said, _, engine = ask([data(whole(usage=usage))])
    assert (said.text, said.prompt_tokens, said.completion_tokens) == ("Oslo", *counted)
    assert (engine.usage.answers, engine.usage.uncounted, engine.usage.completion_tokens) == (1, 1, 0)


def test_fields_of_the_user_win_and_none_leaves_one_out():
    _, (request,), _ = ask([data(whole())], body={"top_p": 0.9, "seed": None, "max_tokens": 5}, stop=("</code>",))
    assert (request["top_p"], request["max_tokens"], request["stop"]) == (0.9, 5, ["</code>"])
    assert "seed" not in request


def test_a_stream_is_told_as_it_comes_with_thinking_in_its_place():
    told: list[str] = []
    parts = [
        b": a comment\r\n\r\n",
        delta(role="assistant"),
        delta(reasoning_content="Nor"),
        delta(reasoning_content="way."),
        delta(content="<code>sub"),
        delta(content="mit()</code>"),
        delta("stop"),
        {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 6}},
    ]
    result, (request,), _ = ask([stream(*parts)], told=told)
    assert result.text == "<think>Norway.</think><code>submit()</code>"
    assert (result.finish_reason, result.completion_tokens) == ("stop", 6)
    assert told == ["<think>Nor", "way.", "</think><code>sub", "mit()</code>"]
    assert request["stream_options"] == {"include_usage": True}


def parts(thought: str = "", said: str = "") -> list[dict[str, Any]]:
    """As Mistral's models tell what they think."""
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": thought}], "closed": True}
    return [thinking] * bool(thought) + [{"type": "text", "text": said}] * bool(said)


def test_thinking_that_comes_in_parts_is_thinking():
    answer = whole(parts("Look it up.", "<code>1</code>"))
    assert ask([data(answer)])[0].text == "<think>Look it up.</think><code>1</code>"
    told: list[str] = []
    deltas = [parts("Look "), parts("it up."), parts(said="<code>"), "1</code>"]
    result, *_ = ask([stream(*(delta(content=content) for content in deltas), delta("stop"))], told=told)
    assert result.text == "".join(told) == "<think>Look it up.</think><code>1</code>"


@pytest.mark.parametrize(
    ("text", "by", "whole_text"),
    [
        ("<code>x", None, "<code>x</code>"),
        ("<code>x</code>", None, "<code>x</code>"),
        ("<code>x</code>", "</code>", "<code>x</code>"),
        ("no code", None, "no code"),
        ("no code", "</code>", "no code</code>"),
        # by a token: the model did not close it
        ("<code>x", 2, "<code>x"),
        ("<code>x", "###", "<code>x"),
    ],
)
def test_the_text_that_ended_an_answer_is_part_of_it(text: str, by: int | str | None, whole_text: str):
    assert ended(text, ("</code>", "."), by) == whole_text
    told: list[str] = []
    last = delta("stop")
    last["choices"][0]["matched_stop"] = by
    result, *_ = ask([stream(delta(content=text), last)], told=told, stop=("</code>", "."))
    assert result.text == "".join(told) == whole_text
    result, *_ = ask([stream(delta(content=text), delta("length"))], told=[], stop=("</code>",))
    assert result.text == text


def test_a_stream_that_only_thinks_is_closed():
    told: list[str] = []
    result, *_ = ask([stream(delta(reasoning="hm"), delta("length"))], told=told)
    assert (result.text, result.finish_reason, "".join(told)) == ("<think>hm</think>", "length", "<think>hm</think>")


@given(st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=("Cs",)), max_size=8)), st.data())
def test_events_are_the_same_however_their_bytes_are_cut(texts: list[str], draws: st.DataObject):
    def end() -> bytes:
        return draws.draw(st.sampled_from([b"\n", b"\r\n", b"\r"]))

    raw = bytearray()
    for text in texts:
        raw += b"event: x" + end() + b"data: " + text.encode() + end() + b"data:" + text.encode() + end()
        # a \r\n must not become the end of two lines by chance
        raw += b": x" + end() + b"\r\n"
    cuts = sorted(draws.draw(st.lists(st.integers(0, len(raw)), max_size=6)))
    events = Events()
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    found = [event.decode() for piece in pieces for event in events.feed(bytes(piece))]
    assert found == [f"{text}\n{text.removeprefix(' ')}" for text in texts]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_no_place_to_cut_events_changes_them(end: bytes):
    raw = end.join([b"data: a", b"data: b", b"", b"data: c", b"", b""])
    for cut in range(len(raw) + 1):
        events = Events()
        # a lone \r ends its line only once it is seen that no \n follows
        assert [event for part in (raw[:cut], raw[cut:], b":") for event in events.feed(part)] == [b"a\nb", b"c"]


@pytest.mark.parametrize("cut", range(5))
def test_a_byte_order_mark_costs_no_event(cut: int):
    raw = codecs.BOM_UTF8 + b"data: a\n\ndata: b\n\n"
    events = Events()
    assert [event for part in (raw[:cut], raw[cut:]) for event in events.feed(part)] == [b"a", b"b"]


@pytest.mark.parametrize("code", [408, 409, 429, 500, 502, 503])
def test_what_may_pass_is_asked_again(code: int):
    result, requests, engine = ask([status(code), status(code), data(whole())])
    assert (result.text, len(requests), engine.usage.retries, engine.usage.answers) == ("Oslo", 3, 2, 1)


def test_retry_after_is_waited_for():
    began = time.monotonic()
    result, requests, _ = ask([status(429, Retry_After="0.3"), data(whole())])
    assert (result.text, len(requests)) == ("Oslo", 2)
    assert time.monotonic() - began >= 0.3


@pytest.mark.parametrize("value", ["0", "Thu, 01 Jan 1970 00:00:00 GMT"])
def test_who_may_come_at_once_comes_later_and_later(value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("l0fast.engine.openai.MAX_WAIT_S", 0.1)
    began = time.monotonic()
    result, requests, _ = ask([status(429, Retry_After=value)] * 3 + [data(whole())], backoff_s=0.1)
    assert (result.text, len(requests)) == ("Oslo", 4)
    assert time.monotonic() - began >= 0.3


def test_a_wait_beyond_the_deadline_is_not_begun():
    began = time.monotonic()
    with pytest.raises(EngineError, match="in 1 try: it answered 429.*try again in 3600 s"):
        ask([status(429, Retry_After="3600")], timeout_s=60.0)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("value", "wait_s"),
    [(None, None), ("7", 7.0), ("0", 0.0), ("-3", 0.0), ("soon", None), ("inf", None), ("nan", None)],
)
def test_retry_after_in_seconds(value: str | None, wait_s: float | None):
    assert retry_after_s(value, 1000.0) == wait_s


def test_retry_after_as_a_date():
    assert retry_after_s(formatdate(1_700_000_060, usegmt=True), 1_700_000_000.0) == 60.0
    assert retry_after_s(formatdate(1_600_000_000, usegmt=True), 1_700_000_000.0) == 0.0
    # a year that no date has
    assert retry_after_s("Fri, 31 Dec 99999999999 23:59:59 GMT", 0.0) is None


def test_what_stays_is_given_up_with_its_words_and_without_the_key():
    with pytest.raises(EngineError, match="in 3 tries: it answered 503.*over [*]{3} capacity") as caught:
        ask([status(503, f"over {KEY}\ncapacity")], attempts=3)
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)


async def reasoned(request: web.Request) -> web.Response:
    return web.Response(status=400, reason=f"not {KEY}")


@pytest.mark.parametrize(
    "reply",
    [
        status(400, "x" * 295 + KEY),
        data(b"x" * 295 + KEY.encode()),
        status(302, Location=f"http://a.b/{KEY}"),
        reasoned,
    ],
    ids=["where a complaint is cut", "where no answer is cut", "in an address", "in a reason"],
)
def test_no_part_of_the_key_is_shown_wherever_it_is_repeated(reply: Reply):
    with pytest.raises((EngineError, UsageError)) as caught:
        ask([reply])
    assert KEY[:5] not in str(caught.value)


@pytest.mark.parametrize("streams", [True, False])
def test_a_connection_that_is_lost_is_asked_again(streams: bool):
    told: list[str] | None = [] if streams else None
    replies = [stream(delta(content="Os"), cut=True), stream(delta(content="Oslo"), delta("stop"))]
    result, requests, _ = ask(replies, told=told)
    assert (result.text, len(requests)) == ("Oslo", 2)
    if told is not None:
        assert "asked again" in told[1]


def test_a_stream_that_ends_early_is_asked_again():
    early = stream(delta(content="Os"), end=b"")
    result, requests, _ = ask([early, stream(delta(content="Oslo"))], told=[])
    assert (result.text, result.finish_reason, len(requests)) == ("Oslo", "stop", 2)


def test_an_error_in_a_stream_is_asked_again():
    broken = stream(delta(content="Os"), {"error": {"message": "worker died"}})
    with pytest.raises(EngineError, match="worker died"):
        ask([broken], told=[], attempts=2)


def test_nobody_there_is_an_engine_error():
    with pytest.raises(EngineError, match="in 2 tries: ClientConnectorError"):
        ask([data(whole())], url="http://127.0.0.1:1", attempts=2)


def test_silence_ends_at_the_deadline():
    async def silent(request: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(EngineError, match="within 0.2 s: it answered 503"):
        ask([status(503), silent], timeout_s=0.2)


def test_a_stream_that_falls_silent_is_left():
    async def silent(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: {}\n\n")
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(EngineError, match="in 1 try: .*[Tt]imeout"):
        ask([silent], told=[], silence_timeout_s=0.1, attempts=1)


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (data(b"<html>hello</html>", content_type="text/html"), "does not answer as OpenAI's API does.*<html>hello"),
        (data(b'{"choices": [{"message": {"content": 7}}]}'), "choices.0.message.content"),
        (data(b"[]"), "does not answer"),
        (data(b'{"choices": []}'), "without a choice"),
        (data(b"{}"), "without a choice"),
        (data(b"\xff\xfe"), "does not answer"),
        (
            status(400, "context length is 4096"),
            "refused a request: it answered 400 Bad Request: context length is 4096",
        ),
    ],
)
def test_what_is_no_answer_is_one_sentence_at_once(reply: Reply, words: str):
    with pytest.raises(EngineError, match=words):
        ask([reply, data(whole())])


def test_broken_events_are_one_sentence():
    with pytest.raises(EngineError, match="does not answer"):
        ask([stream(b"data: {oh\n\n")], told=[])


@pytest.mark.parametrize("told", [None, []])
def test_an_answer_without_end_is_left(told: list[str] | None):
    sent = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream" if told == [] else "text/html"})
        await response.prepare(request)
        for _ in range(1000):
            await response.write(b"data: " + b"x" * 65536)
            sent += 65536
        return response

    with pytest.raises(EngineError, match="more than 1,056,768 bytes"):
        ask([endless], told=told)
    assert sent < 30e6


def test_an_answer_that_unpacks_without_end_is_left():
    bomb = data(gzip.compress(b" " * (8 << 20)), headers={"Content-Encoding": "gzip"})
    with pytest.raises(EngineError, match="more than 1,056,768 bytes"):
        ask([bomb])


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (status(401, f"wrong key {KEY}"), "OPENAI_API_KEY holds another key"),
        (status(402, "Insufficient Balance"), "402 Payment Required: Insufficient Balance.*top it up"),
        (status(403), "without a key"),
        (status(404), "no model 'm'"),
        (status(307, Location="https://example.com/v1"), "redirects to https://example.com/v1"),
    ],
)
def test_what_a_person_can_set_right_is_a_usage_error(reply: Reply, words: str):
    with pytest.raises(UsageError, match=words) as caught:
        ask([reply, data(whole())])
    assert KEY not in str(caught.value)


SPENT = {
    "message": "You exceeded your current quota, please check your plan and billing details.",
    "type": "insufficient_quota",
    "code": "insufficient_quota",
}
"""In OpenAI's words, which Alibaba's endpoint has, too, where a minute's tokens are used up."""


def test_an_account_that_stays_empty_is_a_usage_error_in_the_words_of_the_service(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(openai, "SPENT_S", 0.0)
    with pytest.raises(
        UsageError, match="429 Too Many Requests: You exceeded your current quota.*top it up, and go on"
    ):
        ask([data({"error": SPENT}, status=429), data(whole())])
    # of how fast it is asked
    assert ask([status(429), data(whole())])[0].text == "Oslo"


def test_an_account_that_is_said_to_be_empty_is_asked_again():
    said, requests, engine = ask([data({"error": SPENT}, status=429), data(whole())])
    assert said.text == "Oslo"
    assert len(requests) == 2
    assert engine._account._last == Account()._last, "the answer has to count"


def test_an_account_is_empty_that_was_said_to_be_for_long_with_no_answer_between():
    half, account = SPENT_S / 2, Account()
    assert [account.is_empty(at) for at in (0.0, half, 2 * half - 1, 2 * half)] == [False, False, False, True]
    account.answered()
    assert [account.is_empty(2 * half + at) for at in (1.0, half, 2 * half, 2 * half + 1)] == [
        False,
        False,
        False,
        True,
    ]
    # each may be of a minute whose tokens were used up
    assert not any(account.is_empty(1e6 + 3 * half * n) for n in range(9))


def test_the_dialect_is_learned_once():
    def newer(request: web.Request) -> Any:
        return status(400, "'max_tokens' is not supported, use 'max_completion_tokens'")(request)

    async def twice(engine: OpenAIEngine) -> None:
        await engine.generate(ASK, SAMPLING, conversation="a")
        await engine.generate(ASK, SAMPLING, conversation="b")

    replies = [newer, status(422, "stream_options: extra fields not permitted"), stream(delta("stop", content="Oslo"))]
    _, requests, engine = ask(replies, use=twice, told=[])
    assert [request.get("max_completion_tokens") for request in requests] == [None, 8, 8, 8]
    assert ["stream_options" in request for request in requests] == [True, True, False, False]
    assert engine.usage.uncounted == 2


STOP_REFUSED = "Unsupported parameter: 'stop' is not supported with this model."
TEMPERATURE_REFUSED = (
    "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported."
)
GEMINI = [{"error": {"code": 400, "message": 'Invalid JSON payload received. Unknown name "seed": Cannot find field.'}}]
MISTRAL = {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}


def refused(code: int, said: Any) -> Reply:
    async def reply(request: web.Request) -> web.StreamResponse:
        return web.json_response(said, status=code)

    return reply


@pytest.mark.parametrize("reply", [refused(400, GEMINI), refused(422, MISTRAL)])
def test_an_endpoint_that_knows_no_seed_is_asked_without(reply: Reply):
    said, requests, _ = ask([reply, data(whole())])
    assert [("seed" in request, "stop" in request) for request in requests] == [(True, False), (False, False)]
    assert said.finish_reason == "stop"


def test_what_a_model_says_past_a_text_that_it_can_not_be_stopped_at_is_cut_off():
    async def twice(engine: OpenAIEngine) -> Any:
        return [await engine.generate(ASK, SAMPLING, conversation=name) for name in "ab"]

    goes_on = "<think>or </code>?</think><code>search('Oslo')</code><output>Norway</output><code>submit"
    choice = {"message": {"content": goes_on}, "finish_reason": "length"}
    answers = [data({"choices": [choice]}), data(whole("Oslo"))]
    said, requests, _ = ask(
        [refused(400, {"error": {"message": STOP_REFUSED}}), *answers], use=twice, stop=("</code>",)
    )
    assert ["stop" in request for request in requests] == [True, False, False]
    first, second = said
    assert (first.text, first.finish_reason) == ("<think>or </code>?</think><code>search('Oslo')</code>", "stop")
    assert second.text == "Oslo"


def test_a_word_that_a_refusal_only_uses_is_not_taken_out():
    with pytest.raises(EngineError, match="stop asking"):
        ask([status(400, "stop asking about seed and temperature")], stop=("</code>",))


def test_a_temperature_that_a_model_does_not_take_is_the_users_to_change_or_left_to_a_judge():
    reply = refused(400, {"error": {"message": TEMPERATURE_REFUSED}})
    with pytest.raises(UsageError, match="does not take the temperature 0.5 .*: ask with another --temperature"):
        ask([reply])
    _, requests, _ = ask([reply, data(whole())], own_temperature=True)
    assert ["temperature" in request for request in requests] == [True, False]


def test_what_is_held_back_by_a_filter_costs_one_answer_where_others_came():
    async def thrice(engine: OpenAIEngine) -> str:
        await engine.generate(ASK, SAMPLING, conversation="a")
        with pytest.raises(EngineError, match="403 Forbidden: your input was flagged"):
            await engine.generate(ASK, SAMPLING, conversation="b")
        return (await engine.generate(ASK, SAMPLING, conversation="c")).text

    flagged = refused(403, {"error": {"message": "your input was flagged"}})
    text, _, _ = ask([data(whole("Oslo")), flagged, data(whole("Rome"))], use=thrice)
    assert text == "Rome"


def test_no_more_run_at_once_than_allowed():
    running, most = 0, 0

    async def slow(request: web.Request) -> web.Response:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(20):
            await asyncio.sleep(0)
        running -= 1
        return web.json_response(whole())

    async def many(engine: OpenAIEngine) -> list[int]:
        async with asyncio.TaskGroup() as tg:
            for i in range(12):
                tg.create_task(engine.generate(ASK, SAMPLING, conversation=str(i)))
            await asyncio.sleep(0)
            load = await engine.load()
        return [load.running, load.waiting, (await engine.load()).running]

    loads, requests, engine = ask([slow], use=many, max_concurrent=3)
    assert (most, loads, len(requests), engine.usage.answers) == (3, [3, 9, 0], 12, 12)


def test_a_cancelled_request_is_gone():
    arrived = asyncio.Event()

    async def cancelled(engine: OpenAIEngine) -> None:
        task = asyncio.create_task(engine.generate(ASK, SAMPLING, conversation="c"))
        await asyncio.wait_for(arrived.wait(), 5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await engine.load()).running == 0

    async def hang(request: web.Request) -> web.Response:
        arrived.set()
        await asyncio.Event().wait()
        raise AssertionError

    ask([hang], use=cancelled)


def test_it_refuses_to_train_and_says_why():
    with pytest.raises(UsageError, match="gradient needs the token ids that were sampled, each with its log-prob"):
        ask([data(whole())], use=lambda engine: engine.update_weights(1))


@pytest.mark.parametrize(
    ("url", "posted"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1/chat/completions"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1/chat/completions"),
        ("https://a.b/c/chat/completions", "https://a.b/c/chat/completions"),
        ("https://a.b/d?api-version=2", "https://a.b/d/chat/completions?api-version=2"),
        ("https://a.b/d/chat/completions?api-version=2", "https://a.b/d/chat/completions?api-version=2"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1/chat/completions"),
        ("https://käse.example./v1", "https://käse.example./v1/chat/completions"),
    ],
)
def test_an_address_may_be_given_in_several_ways(url: str, posted: str):
    assert endpoint_url(url) == posted
    # so may that of another part of the API
    others = [address.replace("/chat/completions", "/embeddings") for address in (url, posted)]
    assert endpoint_url(others[0], "/embeddings") == others[1]


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "ftp://a.b", "http://", "http://a.b:x", "http://[::1", "http://a..b/v1"]
)
def test_what_is_no_address_is_one_sentence(url: str):
    with pytest.raises(UsageError, match="write it like"):
        endpoint_url(url)


def test_a_password_in_an_address_is_refused_without_showing_it():
    with pytest.raises(UsageError, match="environment variable") as caught:
        endpoint_url("https://me:geheim@a.b/v1")
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "named", "sent"),
    [
        ("https://a.b", False, KEY),
        ("http://localhost:8000", False, KEY),
        ("http://[::1]:8000", False, KEY),
        ("http://a.b", False, ""),
        ("http://127.0.0.1.a.b", False, ""),
        ("http://a.b", True, KEY),
    ],
)
def test_a_key_goes_over_plain_http_only_where_it_was_named(url: str, named: bool, sent: str):
    config = EndpointConfig(url=url, model="m", api_key_env="OPENAI_API_KEY" if named else "")
    assert api_key(config, endpoint_url(url)) == sent


def test_a_named_key_that_is_not_set_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OTHER_KEY", raising=False)
    with pytest.raises(UsageError, match="no OTHER_KEY"):
        ask([data(whole())], api_key_env="OTHER_KEY")


@pytest.mark.parametrize(
    ("reasoning", "content", "text"),
    [
        ("", "plain", "plain"),
        ("a", "b", "<think>a</think>b"),
        ("a", "<think>own</think>b", "<think>own</think>b"),
        ("", "a</think>b", "<think>a</think>b"),
    ],
)
def test_thinking_is_put_back_where_the_model_wrote_it(reasoning: str, content: str, text: str):
    assert as_written(reasoning, content) == text
