"""Texts to vectors, by any OpenAI-compatible endpoint.

    texts -> POST URL/embeddings {"model", "input": [...]} -> {"data": [{"index", "embedding"}, ...]} -> rows of length 1

What may pass (no connection, 408, 429, 5xx) is asked again, after Retry-After where that was said. EMBEDDINGS_API_KEY of the
environment is sent where it is set, and no other key ever is: of a corpus that is searched, it is a file that names the
endpoint. EMBEDDINGS_URL of the environment says where that endpoint is now.
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np
import stamina
from pydantic import BaseModel, PositiveFloat, PositiveInt, ValidationError

from l0fast.config import Config
from l0fast.engine.openai import endpoint_url
from l0fast.errors import ToolError
from l0fast.tools.broker import Passing
from l0fast.tools.http import Http, open_http

KEY, PLACE = "EMBEDDINGS_API_KEY", "EMBEDDINGS_URL"
MAX_BYTES = 64 << 20
"""Longest answer [bytes]."""

# stamina logs every retry as a warning
logging.getLogger("stamina").addHandler(logging.NullHandler())


class EmbeddingsConfig(Config):
    url: str
    """Where it is, e.g. http://127.0.0.1:8000/v1; /embeddings is added."""
    model: str
    """The model's name there."""
    passage_prefix: str = ""
    """Stands before each passage; E5 wants "passage: "."""
    query_prefix: str = ""
    """Stands before each query; E5 wants "query: "."""
    batch: PositiveInt = 64
    """Passages a request [passages]."""
    max_concurrent: PositiveInt = 8
    """Requests that run at once [requests]."""
    timeout_s: PositiveFloat = 60.0
    """Time of one try [s]."""
    attempts: PositiveInt = 5
    """Tries of a request that fails in passing."""


class Embedder:
    """Made by `open_embedder`."""

    def __init__(self, config: EmbeddingsConfig, http: Http, url: str):
        self.config, self._http, self._url = config, http, url
        key = os.environ.get(KEY, "").strip()
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._slots = asyncio.Semaphore(config.max_concurrent)

    async def passages(self, texts: Sequence[str]) -> np.ndarray:
        """[len(texts), dim], fp32, each row of length 1. Raises ToolError."""
        return await self._embed([self.config.passage_prefix + text for text in texts])

    async def query(self, text: str) -> np.ndarray:
        """[dim]. Raises ToolError."""
        return (await self._embed([self.config.query_prefix + text]))[0]

    async def _embed(self, texts: list[str]) -> np.ndarray:
        body, said = {"model": self.config.model, "input": texts}, b""
        try:
            async with self._slots:
                async for attempt in stamina.retry_context(_again, attempts=self.config.attempts, timeout=None):
                    with attempt:
                        said = await self._http.text(
                            "POST", self._url, headers=self._headers, name="the embedding endpoint", body=body
                        )
        except Passing as e:
            raise ToolError(f"{e}, {self.config.attempts} times in a row: try again later") from e
        # megabytes of digits
        return await asyncio.to_thread(_read, said, len(texts))


def _again(error: Exception) -> bool | float:
    if not isinstance(error, Passing):
        return False
    return True if error.retry_after_s is None else error.retry_after_s


@asynccontextmanager
async def open_embedder(config: EmbeddingsConfig) -> AsyncIterator[Embedder]:
    """For as long as the `async with` body runs. Raises UsageError for an address that is none."""
    url = endpoint_url(os.environ.get(PLACE, "").strip() or config.url, "/embeddings")
    async with open_http(timeout_s=config.timeout_s, max_bytes=MAX_BYTES) as http:
        yield Embedder(config, http, url)


class _Row(BaseModel):
    index: int
    embedding: list[float]


class _Answer(BaseModel):
    data: list[_Row]


def _read(said: bytes, num_texts: int) -> np.ndarray:
    try:
        rows = sorted(_Answer.model_validate_json(said).data, key=lambda row: row.index)
    except ValidationError as e:
        raise ToolError("the embedding endpoint does not answer as OpenAI's API does: is it such an endpoint?") from e
    if [row.index for row in rows] != list(range(num_texts)):
        raise ToolError(
            f"the embedding endpoint answered {num_texts} texts with {len(rows)} vectors, or numbered them wrongly"
        )
    if len({len(row.embedding) for row in rows}) != 1 or not rows[0].embedding:
        raise ToolError("the embedding endpoint answered with vectors of different lengths, or of none")
    vectors = np.array([row.embedding for row in rows], np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise ToolError("the embedding endpoint answered with a vector of zeros, or of what is no number")
    return vectors / lengths
