"""Vectors of a corpus, and the passages whose vectors are nearest to a query's.

    FOLDER's passages, in order -> batches -> embedder, several at once -> FOLDER/vectors.partial (fp16, appended in order)
                                                                        -> usearch -> FOLDER/vectors.usearch, dense.json

What was interrupted goes on where `vectors.partial` ends. The index is a graph (HNSW: Malkov and Yashunin,
arXiv 1603.09320), read from a memory map; up to `EXACT` vectors are all compared instead. Some 0.5 ms of a core a vector to
build, and as much a search. It is there when dense.json is.
"""

import asyncio
import os
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson

from l0fast.corpus.embeddings import Embedder, EmbeddingsConfig
from l0fast.errors import ToolError, UsageError
from l0fast.files import whole_file, write_whole

FORMAT = 1
EXACT = 10_000
"""Vectors that are all compared, which takes as long as the graph does [vectors]."""
EXPANSION = 128
"""Candidates that a search keeps; more find more of the nearest and take longer."""
ADD_AT_ONCE = 10_000
SETTINGS = ("model", "passage_prefix", "query_prefix")
"""What vectors depend on."""


def _usearch() -> Any:
    try:
        import usearch.index
    except ImportError as e:
        raise UsageError("dense vectors need usearch: pip install 'l0fast[dense]'") from e
    return usearch.index


class Dense:
    """The index of a folder that has one."""

    def __init__(self, folder: Path, num_passages: int):
        """Raises UsageError, OSError, ValueError, KeyError: it can't be read."""
        about = orjson.loads((folder / "dense.json").read_bytes())
        if about["format"] != FORMAT:
            raise UsageError(f"{folder} was embedded by another version: remove its dense.json and embed it again")
        self.config = EmbeddingsConfig(url=about["url"], **{name: about[name] for name in SETTINGS})
        self._index = _usearch().Index.restore(str(folder / "vectors.usearch"), view=True)
        if self._index is None or len(self._index) != num_passages:
            raise UsageError(
                f"{folder}/vectors.usearch is not of this corpus: remove its dense.json and embed it again"
            )
        self._index.expansion_search = EXPANSION

    def nearest(self, vector: np.ndarray, k: int) -> list[int]:
        """Keys of the at most `k` nearest, nearest first. Raises ToolError for a vector of another length."""
        if len(vector) != self._index.ndim:
            raise ToolError(
                f"the embedding endpoint answers with vectors of {len(vector)} numbers, and the corpus has {self._index.ndim}"
            )
        exact = len(self._index) <= EXACT
        return self._index.search(vector.astype(np.float16), k, exact=exact, threads=1).keys.tolist()


async def embed(
    folder: Path,
    keys: Sequence[int],
    texts: Callable[[Sequence[int]], list[str]],
    embedder: Embedder,
    *,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Give the corpus in `folder` its vectors, or those it still lacks.

    Args:
        keys: what passages go by, in their order.
        texts: of passages; blocks, and runs in a thread.

    Raises:
        UsageError: there are vectors already, or some of another model.
        ToolError: the endpoint is of no use. What came before stays, and the next call goes on.
    """
    usearch, config = _usearch(), embedder.config
    if (folder / "dense.json").exists():
        raise UsageError(f"{folder} has dense vectors already: remove its dense.json to make others")
    partial = folder / "vectors.partial"
    # the first request tells how long vectors are, and whether there is such an endpoint
    [first] = await embedder.passages(await asyncio.to_thread(texts, keys[:1]))
    dim = len(first)
    done = await asyncio.to_thread(_claim, folder, partial, config, dim)
    if done:
        say(f"{done:,} of {len(keys):,} passages have their vectors already")
    with await asyncio.to_thread(partial.open, "ab") as file:
        await _fill(
            file, keys[done:], texts, embedder, dim, lambda n: say(f"{done + n:,} of {len(keys):,} passages embedded")
        )
    await asyncio.to_thread(_index, usearch, folder, partial, keys, dim, say)
    about = {"format": FORMAT, "url": config.url, **{name: getattr(config, name) for name in SETTINGS}, "dim": dim}
    await asyncio.to_thread(write_whole, folder / "dense.json", orjson.dumps(about, option=orjson.OPT_INDENT_2))
    partial.unlink()
    _about_partial(partial).unlink()


async def _fill(
    file: BinaryIO,
    keys: Sequence[int],
    texts: Callable[[Sequence[int]], list[str]],
    embedder: Embedder,
    dim: int,
    say: Callable[[int], None],
) -> None:
    """Append the vectors of `keys`, in order."""

    async def vectors(part: list[str]) -> np.ndarray:
        rows = await embedder.passages(part)
        if rows.shape[1] != dim:
            raise ToolError(
                f"the embedding endpoint answers with vectors of {rows.shape[1]} numbers, and with others of {dim}"
            )
        return rows.astype(np.float16)

    size, written = embedder.config.batch, 0
    parts = deque(keys[start : start + size] for start in range(0, len(keys), size))
    under_way: deque[asyncio.Task[np.ndarray]] = deque()
    try:
        while parts or under_way:
            # some more than run at once, for the one that is waited for may be the slowest
            while parts and len(under_way) < 2 * embedder.config.max_concurrent:
                part = await asyncio.to_thread(texts, parts.popleft())
                under_way.append(asyncio.create_task(vectors(part)))
            rows = await under_way[0]
            under_way.popleft()
            await asyncio.to_thread(file.write, rows.tobytes())
            before, written = written, written + len(rows)
            if before // 10_000 < written // 10_000:
                say(written)
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


def _about_partial(partial: Path) -> Path:
    return partial.with_suffix(".json")


def _claim(folder: Path, partial: Path, config: EmbeddingsConfig, dim: int) -> int:
    """How many vectors of these settings are there. Raises UsageError where there are some of others."""
    about = {name: getattr(config, name) for name in SETTINGS} | {"dim": dim}
    file = _about_partial(partial)
    if not file.exists():
        write_whole(file, orjson.dumps(about))
        partial.unlink(missing_ok=True)
        return 0
    before = orjson.loads(file.read_bytes())
    if before != about:
        name = next(name for name in about if before.get(name) != about[name])
        raise UsageError(
            f"{folder} holds a part of its vectors, with {name} = {before.get(name)!r} and not {about[name]!r}: go on with "
            f"that, or remove {file.name} there"
        )
    done = partial.stat().st_size // (2 * dim) if partial.exists() else 0
    if done:
        # a row that a kill cut off
        os.truncate(partial, done * 2 * dim)
    return done


def _index(
    usearch: Any, folder: Path, partial: Path, keys: Sequence[int], dim: int, say: Callable[[str], None]
) -> None:
    vectors = np.memmap(partial, np.float16, "r", shape=(len(keys), dim))
    index = usearch.Index(ndim=dim, metric=usearch.MetricKind.IP, dtype="f16")
    for start in range(0, len(keys), ADD_AT_ONCE):
        end = min(start + ADD_AT_ONCE, len(keys))
        index.add(np.array(keys[start:end], np.uint64), vectors[start:end])
        if end % (10 * ADD_AT_ONCE) == 0:
            say(f"{end:,} of {len(keys):,} vectors indexed")
    with whole_file(folder / "vectors.usearch") as new:
        index.save(str(new))


def fused(*rankings: Sequence[int]) -> list[int]:
    """Keys by reciprocal rank fusion: the sum over rankings of 1 / (60 + rank). Equals in the order of their first ranking.

    Cormack, Clarke and Büttcher, "Reciprocal rank fusion outperforms Condorcet and individual rank learning methods",
    SIGIR 2009.

    >>> fused([1, 2, 3], [3, 4])
    [3, 1, 2, 4]
    """
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, key in enumerate(ranking, 1):
            scores[key] = scores.get(key, 0.0) + 1 / (60 + rank)
    return sorted(scores, key=lambda key: -scores[key])
