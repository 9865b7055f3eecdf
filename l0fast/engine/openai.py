"""Any OpenAI-compatible endpoint: messages in, text out. For evaluation and for NB-Agent on its own.

    messages -> POST URL/chat/completions -> text (while it comes, where someone listens), token counts

It refuses to train. A gradient needs the log-prob of exactly the token ids that were sampled; an endpoint returns text,
and encoding text again gives other ids for about half of all sampled sequences.

What goes wrong:
    no connection, a lost or cut one, 408, 409, 429, 5xx   asked again: after Retry-After, else with growing waits,
                                                           until `attempts` or `timeout_s` are used up: EngineError
    401, 402, 404, a redirect; 403 before any answer;      UsageError: what to set right
    nothing but "insufficient_quota" for `SPENT_S`
    other refusals, answers that are none, or too long     EngineError, with the endpoint's own words
Its dialect is learned from a refusal that names a word: `max_tokens` is called `max_completion_tokens` by newer servers; older
ones don't know `stream_options`, some no `seed`, and models that reason no `stop`: their answers are cut here. A temperature
that a model doesn't take is the user's to change, but for judges and the like (`own_temperature`).

The key comes from the environment and goes nowhere else: not into settings, logs or errors (blanked, should an endpoint
repeat it), not to where a redirect points, and not over plain http to another machine unless its variable was named.
"""

import asyncio
import codecs
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson
import stamina
from pydantic import BaseModel, PositiveFloat, PositiveInt, ValidationError

from l0fast.config import ENDPOINT_CAN_NOT_TRAIN, Config
from l0fast.engine.base import EngineLoad, Message, SampledText, Sampling
from l0fast.errors import EngineError, UsageError
from l0fast.http_dates import retry_after_s
from l0fast.proxies import is_loopback, proxy_of

DEFAULT_KEY = "OPENAI_API_KEY"
BYTES_PER_TOKEN = 1024
"""What a token may take in an answer, its event included; more than all of them is too long [bytes]."""
SPARE_BYTES = 1 << 20
"""Room in an answer for what isn't text [bytes]."""
ERROR_CHARS = 300
"""What is shown of an endpoint's complaint [characters]."""
MAX_WAIT_S = 30.0
"""Longest wait of our own between two tries; Retry-After may ask for more [s]."""
SPENT_S = 120.0
"""Time without an answer after which a 429 of insufficient_quota is believed. OpenAI means an account that is empty, but others
say so, in the same words, of a limit on tokens a minute [s]."""

# stamina logs every retry as a warning, errors and all; retries are counted here
logging.getLogger("stamina").addHandler(logging.NullHandler())


class EndpointConfig(Config):
    url: str
    """Where it is, e.g. http://127.0.0.1:8000 or https://api.example.com/v1; /chat/completions is added."""
    model: str
    """The model's name there."""
    api_key_env: str = ""
    """Environment variable that holds the key; empty takes OPENAI_API_KEY where it is set."""
    timeout_s: PositiveFloat = 600.0
    """Time one answer may take, all tries and waits included [s]."""
    connect_timeout_s: PositiveFloat = 10.0
    """Time a connection may take [s]."""
    silence_timeout_s: PositiveFloat = 120.0
    """Time a stream may go without a byte [s]."""
    attempts: PositiveInt = 5
    """Tries of a request that fails in passing."""
    backoff_s: PositiveFloat = 0.5
    """Wait before the second try, doubled for each further; a random share of as much is added [s]."""
    max_concurrent: PositiveInt = 64
    """Requests that run at once [requests]."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer and are part of it. </code> keeps a model from inventing the output of its own code."""
    own_temperature: bool = False
    """Ask a model that takes no temperature but its own without one; else that is told to the user."""
    body: Mapping[str, Any] = {}
    """Further fields of a request, e.g. {"top_p": 0.9}; they win over ours, and None leaves one out."""


@dataclass(slots=True)
class Usage:
    """Sums since the start."""

    answers: int = 0
    retries: int = 0
    """Tries after a first."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompts', those the endpoint had computed before."""
    completion_tokens: int = 0
    uncounted: int = 0
    """Answers without counts: their tokens are in no sum."""


class _Passing(Exception):
    """A try failed in a way that may pass."""

    def __init__(self, how: str, wait_s: float | None = None):
        super().__init__(how)
        self.wait_s = wait_s


class Account:
    """Whether one that is said to be empty is believed to be. Times are of any clock [s]."""

    def __init__(self):
        self._first = self._last = float("-inf")

    def is_empty(self, now: float) -> bool:
        """It is said to be. True where it has been for `SPENT_S`, again and again, and nobody was answered."""
        if now - self._last > SPENT_S / 2:
            # a while ago: of another limit, perhaps
            self._first = now
        self._last = now
        return now - self._first >= SPENT_S

    def answered(self) -> None:
        self._last = float("-inf")


class OpenAIEngine:
    """The `TextEngine` protocol over HTTP. Made by `openai_engine`."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        config: EndpointConfig,
        key: str,
        on_text: Callable[[str, str], None] | None,
    ):
        self.usage = Usage()
        self._session, self._config, self._key, self._on_text = session, config, key, on_text
        self._url = endpoint_url(config.url)
        self._slots = asyncio.Semaphore(config.max_concurrent)
        self._running = self._waiting = 0
        self._account = Account()
        self._renamed: dict[str, str] = {}
        self._unknown: set[str] = set()

    async def generate(self, messages: Sequence[Message], sampling: Sampling, *, conversation: str) -> SampledText:
        config = self._config
        limit, last = asyncio.timeout(config.timeout_s), "it has not answered yet"
        deadline = asyncio.get_running_loop().time() + config.timeout_s

        def again(error: Exception) -> bool | float:
            nonlocal last
            if not isinstance(error, _Passing):
                return False
            last = str(error)
            if error.wait_s is None:
                return True
            # a wait past the deadline is not begun
            return error.wait_s if error.wait_s < deadline - asyncio.get_running_loop().time() else False

        num = 0
        try:
            async with limit, self._slot():
                async for attempt in stamina.retry_context(
                    again,
                    attempts=config.attempts,
                    timeout=None,
                    wait_initial=config.backoff_s,
                    wait_jitter=config.backoff_s,
                    wait_max=MAX_WAIT_S,
                ):
                    num += 1
                    self.usage.retries += num > 1
                    with attempt:
                        return await self._try(messages, sampling, conversation, first=num == 1)
        except _Passing as e:
            tries = "1 try" if num == 1 else f"{num} tries"
            raise EngineError(f"{self._url} gave no answer in {tries}: {e}") from e
        except TimeoutError as e:
            if not limit.expired():
                raise
            raise EngineError(f"{self._url} gave no answer within {config.timeout_s:g} s: {last}") from e
        raise AssertionError("stamina ended without an outcome")

    async def update_weights(self, policy_version: int) -> None:
        """Raises UsageError: it refuses to train."""
        raise UsageError(ENDPOINT_CAN_NOT_TRAIN)

    def forget(self, conversation: str) -> None:
        """Nothing to do: an endpoint knows no conversations."""

    async def load(self) -> EngineLoad:
        usage = self.usage
        return EngineLoad(
            running=self._running,
            waiting=self._waiting,
            used_tokens=0,
            max_tokens=0,
            prefill_tokens=usage.prompt_tokens - usage.cached_tokens,
            cached_tokens=usage.cached_tokens,
            decoded_tokens=usage.completion_tokens,
        )

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            self._slots.release()

    async def _try(
        self, messages: Sequence[Message], sampling: Sampling, conversation: str, *, first: bool
    ) -> SampledText:
        told = None if self._on_text is None else _Telling(self._on_text, conversation)
        if told and not first:
            told.say("\n[the answer broke off: asked again]\n")
        body = self._body(messages, sampling)
        max_bytes = SPARE_BYTES + BYTES_PER_TOKEN * sampling.max_new_tokens
        try:
            async with self._session.post(self._url, data=orjson.dumps(body), allow_redirects=False) as response:
                if response.status != 200:
                    raise self._refused(response, await _limited(response, SPARE_BYTES, cut=True), body)
                if response.content_type == "text/event-stream":
                    answer = await self._streamed(response, max_bytes, told)
                else:
                    answer = _Answer(told)
                    answer.add(self._read(await _limited(response, max_bytes)))
        except aiohttp.ClientSSLError as e:
            raise UsageError(f"{self._url} has no certificate that holds here ({self._clean(str(e))}): check it") from e
        except aiohttp.ClientHttpProxyError as e:
            # its text may hold the proxy's address, with a password in it
            raise _Passing(self._clean(f"the proxy that HTTPS_PROXY names answered {e.status} {e.message}")) from e
        except (aiohttp.ClientError, OSError) as e:
            # TimeoutError is an OSError: a connection or a stream that kept silent
            raise _Passing(self._clean(f"{type(e).__name__}: {e}" if str(e) else type(e).__name__)) from e
        if told:
            told.say(answer.rest(self._config.stop))
        return self._counted(answer)

    def _body(self, messages: Sequence[Message], sampling: Sampling) -> dict[str, Any]:
        streams = self._on_text is not None
        body = {
            "model": self._config.model,
            "messages": list(messages),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "seed": sampling.seed % 2**31,
            "stop": list(self._config.stop) or None,
            "stream": streams or None,
            "stream_options": {"include_usage": True} if streams else None,
            **self._config.body,
        }
        return {
            self._renamed.get(name, name): value
            for name, value in body.items()
            if value is not None and name not in self._unknown
        }

    def _refused(self, response: aiohttp.ClientResponse, answer: bytes, body: Mapping[str, Any]) -> Exception:
        """What an answer that isn't 200 means."""
        status, said = response.status, self._clean(complaint(answer))
        how = f"it answered {status} {self._clean(response.reason or '')}".rstrip() + (f": {said}" if said else "")
        now = asyncio.get_running_loop().time()
        if status == 402 or (status == 429 and b"insufficient_quota" in answer and self._account.is_empty(now)):
            return UsageError(f"{self._url} answers nobody whose account is empty ({how}): top it up, and go on")
        if status in (408, 409, 429) or status >= 500:
            # none at all, or by a clock that differs from ours: a wait that grows, as without it
            wait_s = retry_after_s(response.headers.get("Retry-After"), time.time()) or None
            return _Passing(how if wait_s is None else f"{how}, try again in {wait_s:g} s", wait_s)
        if 300 <= status < 400:
            return UsageError(
                f"{self._url} redirects to {self._clean(response.headers.get('Location', 'nowhere'))}: give that address"
            )
        # of one that has let us in, 403 is about what was asked: OpenRouter has it for words that a filter holds back
        if status == 401 or (status == 403 and not self.usage.answers):
            which = self._config.api_key_env or DEFAULT_KEY
            held = "holds another key" if self._key else "is not set, or not sent to such an address"
            return UsageError(f"{self._url} lets nobody in without a key it knows ({how}): {which} {held}")
        if status == 404:
            return UsageError(f"{self._url} has no model {self._config.model!r}, or is no such endpoint ({how})")
        if status in (400, 422) and self._learn(said, body):
            return _Passing(how, 0.0)
        if status in (400, 422) and _names(said, "temperature") and "temperature" in body:
            return UsageError(
                f"{self._url} does not take the temperature {body['temperature']:g} ({how}): ask with another --temperature"
            )
        return EngineError(f"{self._url} refused a request: {how}")

    def _learn(self, said: str, body: Mapping[str, Any]) -> bool:
        """Whether the refusal of `body` tells how to say the same in this endpoint's dialect."""
        if "max_completion_tokens" in said and "max_tokens" in body:
            self._renamed["max_tokens"] = "max_completion_tokens"
            return True
        optional = ("stream_options", "seed", "stop", *["temperature"] * self._config.own_temperature)
        refused = [name for name in optional if name in body and _names(said, name)]
        self._unknown.update(refused)
        return bool(refused)

    async def _streamed(self, response: aiohttp.ClientResponse, max_bytes: int, told: "_Telling | None") -> "_Answer":
        answer, events = _Answer(told), Events()
        async for chunk in _bounded(response, max_bytes):
            for data in events.feed(chunk):
                if data == b"[DONE]":
                    answer.finish_reason = answer.finish_reason or "stop"
                    return answer
                answer.add(self._read(data))
        if answer.finish_reason is None:
            raise _Passing("the stream ended before the answer did")
        return answer

    def _read(self, data: bytes) -> "_Completion":
        try:
            completion = _Completion.model_validate_json(data)
        except ValidationError as e:
            error = e.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(map(str, error["loc"]))
            shown = self._clean(data.decode(errors="replace"))
            raise EngineError(
                f"{self._url} does not answer as OpenAI's API does ({where + ': ' if where else ''}{error['msg']}), but "
                f"{shown!r}: is it such an endpoint?"
            ) from None
        if completion.error is not None:
            raise _Passing(f"it broke off with {self._clean(complaint(data))}")
        return completion

    def _counted(self, answer: "_Answer") -> SampledText:
        usage, counts = self.usage, answer.usage
        usage.answers += 1
        self._account.answered()
        if counts is None or counts.prompt_tokens is None or counts.completion_tokens is None:
            usage.uncounted += 1
        else:
            usage.prompt_tokens += counts.prompt_tokens
            usage.completion_tokens += counts.completion_tokens
            details = counts.prompt_tokens_details
            usage.cached_tokens += details.cached_tokens or 0 if details else 0
        if answer.finish_reason is None:
            raise EngineError(
                f"{self._url} returned an answer without a choice: is {self._config.model!r} a chat model?"
            )
        text, finish_reason = answer.text(self._config.stop), answer.finish_reason
        if "stop" in self._unknown and (short := cut(text, self._config.stop)) != text:
            text, finish_reason = short, "stop"
        return SampledText(
            text=text,
            finish_reason=finish_reason,
            prompt_tokens=counts and counts.prompt_tokens,
            completion_tokens=counts and counts.completion_tokens,
        )

    def _clean(self, text: str) -> str:
        """One short line, without the key: what is cut off first may be half of it."""
        return " ".join((text.replace(self._key, "***") if self._key else text).split())[:ERROR_CHARS]


@asynccontextmanager
async def openai_engine(
    config: EndpointConfig, *, on_text: Callable[[str, str], None] | None = None
) -> AsyncIterator[OpenAIEngine]:
    """An engine for as long as the `async with` body runs; leaving it closes its connections.

    Args:
        on_text: told (conversation, text) while an answer comes; None for whole answers, which cost the event loop less.

    Raises:
        UsageError: an address, a key or a proxy that can't be used.
    """
    url = endpoint_url(config.url)
    key = api_key(config, url)
    # with whole answers nothing comes until all is there
    silence_s = config.timeout_s if on_text is None else config.silence_timeout_s
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=config.max_concurrent),
        proxy=proxy_of(url),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=config.connect_timeout_s, sock_read=silence_s),
        headers={"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})},
    ) as session:
        yield OpenAIEngine(session, config, key, on_text)


def endpoint_url(url: str, last: str = "/chat/completions") -> str:
    """The address to post to, which ends in `last` but for a query. Raises UsageError.

    >>> endpoint_url("http://127.0.0.1:8000")
    'http://127.0.0.1:8000/v1/chat/completions'
    >>> endpoint_url("https://api.example.com/openai/v2/")
    'https://api.example.com/openai/v2/chat/completions'
    >>> endpoint_url("https://api.example.com/embeddings?api-version=1", "/embeddings")
    'https://api.example.com/v1/embeddings?api-version=1'
    """
    try:
        parts = urlsplit(url.strip())
        # reading the port checks it, and spelling the host out for a name server does that
        good = parts.scheme in ("http", "https") and bool((parts.hostname or "").encode("idna")) and parts.port != 0
    except ValueError:
        parts, good = None, False
    if parts is None or not good:
        raise UsageError(f"{url!r} is no address of an endpoint: write it like http://127.0.0.1:8000/v1")
    if parts.username or parts.password:
        raise UsageError(
            f"the address of {parts.hostname} has a name or password in it, which would be shown: put the key into an "
            "environment variable"
        )
    path = parts.path.rstrip("/").removesuffix(last)
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}{last}" + (f"?{parts.query}" * bool(parts.query))


def api_key(config: EndpointConfig, url: str) -> str:
    """The key to send there, empty for none. Raises UsageError."""
    key = os.environ.get(config.api_key_env or DEFAULT_KEY, "").strip()
    if config.api_key_env and not key:
        raise UsageError(f"the environment has no {config.api_key_env}, which should hold the key: export it first")
    if not key.isascii() or not key.isprintable():
        raise UsageError(f"{config.api_key_env or DEFAULT_KEY} holds characters that no key has: set it again")
    parts = urlsplit(url)
    return key if config.api_key_env or parts.scheme == "https" or is_loopback(parts.hostname or "") else ""


def as_written(reasoning: str, content: str) -> str:
    """One text of what an endpoint may return in two fields.

    >>> as_written("Look it up.", "<code>search('Oslo')</code>")
    "<think>Look it up.</think><code>search('Oslo')</code>"
    """
    if "</think>" in content and "<think>" not in content:
        # the opening one stood at the end of the prompt
        content = "<think>" + content
    return content if not reasoning or "<think>" in content else f"<think>{reasoning}</think>{content}"


def ended(text: str, stops: Sequence[str], by: int | str | None) -> str:
    """`text` with the one of `stops` that ended it, which most servers leave out.

    Args:
        by: what ended it, a text or a token id, where the endpoint tells; else an open tag is taken to have been closed.

    >>> ended("<code>search('Oslo')", ["</code>"], None)
    "<code>search('Oslo')</code>"
    """
    if by is None:
        by = next((s for s in stops if s.startswith("</") and text.count("<" + s[2:]) > text.count(s)), None)
    return text + by if isinstance(by, str) and by in stops and not text.endswith(by) else text


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` as far as the first of `stops` after its thinking: what an endpoint that knows no such texts should have ended it at.

    >>> cut("<think></code>?</think><code>1</code><output>2</output>", ["</code>"])
    '<think></code>?</think><code>1</code>'
    """
    thought, closed, said = text.partition("</think>") if "</think>" in text else ("", "", text)
    ends = [said.index(stop) + len(stop) for stop in stops if stop in said]
    return thought + closed + said[: min(ends)] if ends else text


class Events:
    """Server-sent events, from bytes cut anywhere to the data of each."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._data: list[bytes] = []
        self._began = False

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        # before that one there was no end of a line, or it was taken
        new = max(len(self._buffer) - 1, 0)
        self._buffer += chunk
        # a \r at the end may be half of a \r\n
        whole = len(self._buffer) - self._buffer.endswith(b"\r")
        end = max(self._buffer.rfind(b"\n", new, whole), self._buffer.rfind(b"\r", new, whole)) + 1
        lines = bytes(self._buffer[:end]).splitlines()
        del self._buffer[:end]
        if lines and not self._began:
            # a byte-order mark may begin a stream, and is no part of it
            self._began, lines[0] = True, lines[0].removeprefix(codecs.BOM_UTF8)
        for line in lines:
            if not line:
                if self._data:
                    yield b"\n".join(self._data)
                    self._data = []
            elif line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))


class _Part(BaseModel):
    text: str | None = None
    thinking: "list[_Part] | None" = None


class _Told(BaseModel):
    """What a choice says, whole as `message` or in part as `delta`."""

    content: str | list[_Part] | None = None
    """Parts are how Mistral's models tell their thinking."""
    reasoning_content: str | None = None
    reasoning: str | None = None

    def fields(self) -> tuple[str, str]:
        """What was thought, and what was said."""
        reasoning, content = self.reasoning_content or self.reasoning or "", self.content or ""
        if isinstance(content, str):
            return reasoning, content
        thought = (part.text or "" for whole in content for part in whole.thinking or ())
        return reasoning + "".join(thought), "".join(part.text or "" for part in content)


class _Choice(BaseModel):
    message: _Told | None = None
    delta: _Told | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    """vLLM's word for the text or id that ended it."""
    matched_stop: int | str | None = None
    """SGLang's."""


class _Cached(BaseModel):
    cached_tokens: int | None = None


class _Counts(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Cached | None = None


class _Completion(BaseModel):
    choices: list[_Choice] = []
    usage: _Counts | None = None
    error: Any = None


class _Answer:
    """An answer as it is put together."""

    def __init__(self, told: "_Telling | None"):
        self.reasoning = self.content = ""
        self.finish_reason: str | None = None
        self.usage: _Counts | None = None
        self._ended_by: int | str | None = None
        self._told = told

    def text(self, stops: Sequence[str]) -> str:
        text = as_written(self.reasoning, self.content)
        return ended(text, stops, self._ended_by) if self.finish_reason == "stop" else text

    def rest(self, stops: Sequence[str]) -> str:
        """What is told at the end: all that the endpoint did not say."""
        closing = "</think>" if self.reasoning and not self.content else ""
        return closing + self.text(stops)[len(as_written(self.reasoning, self.content)) :]

    def add(self, completion: _Completion) -> None:
        self.usage = completion.usage or self.usage
        for choice in completion.choices[:1]:
            reasoning, content = (choice.message or choice.delta or _Told()).fields()
            if self._told and reasoning:
                self._told.say(reasoning if self.reasoning else "<think>" + reasoning)
            if self._told and content:
                self._told.say("</think>" + content if self.reasoning and not self.content else content)
            self.reasoning += reasoning
            self.content += content
            by = choice.stop_reason if choice.matched_stop is None else choice.matched_stop
            self._ended_by = self._ended_by if by is None else by
            # a whole answer has ended, whatever it says
            self.finish_reason = choice.finish_reason or self.finish_reason or ("stop" if choice.message else None)


@dataclass(frozen=True, slots=True)
class _Telling:
    on_text: Callable[[str, str], None]
    conversation: str

    def say(self, text: str) -> None:
        if text:
            self.on_text(self.conversation, text)


async def _bounded(response: aiohttp.ClientResponse, max_bytes: int) -> AsyncIterator[bytes]:
    num = 0
    async for chunk in response.content.iter_any():
        num += len(chunk)
        if num > max_bytes:
            raise EngineError(f"{response.url} answered with more than {max_bytes:,} bytes: is it such an endpoint?")
        yield chunk


async def _limited(response: aiohttp.ClientResponse, max_bytes: int, *, cut: bool = False) -> bytes:
    data = bytearray()
    async for chunk in response.content.iter_any():
        data += chunk
        if len(data) > max_bytes:
            if cut:
                break
            raise EngineError(f"{response.url} answered with more than {max_bytes:,} bytes: is it such an endpoint?")
    return bytes(data)


def _names(said: str, field: str) -> bool:
    """Whether a refusal speaks of a field of the request, and doesn't only use the word."""
    return field in said if "_" in field else re.search(rf"""['"`]{field}\\?['"`]""", said) is not None


def complaint(body: bytes) -> str:
    """The words of an error, wherever a service puts them."""
    try:
        said = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body.decode(errors="replace")
    for name in ("error", "message", "detail"):
        if isinstance(said, dict) and said.get(name):
            said = said[name]
    return said if isinstance(said, str) else orjson.dumps(said).decode()
