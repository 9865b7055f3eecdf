"""How long an index of passages takes to build and to ask: 10 thousand, 100 thousand, a million.

    python -m bench.corpus [--passages 10000 100000 1000000] [--queries 300] [--dense DIM] [--results bench/results]

Passages of 20 to 100 words drawn from 200,000 by Zipf's law (exponent 1.1), with a hundred English stop words among the
commonest; queries of 3 to 10 words, each from a passage, as a question is: half of them stop words. `p50_ms` is a search on
an event loop, from await to answer, one after the other; `lag_ms` how late the loop was meanwhile, at most. With --dense the
index gets vectors of that many numbers besides, around 1,000 centres, from an embedder that takes no time, and the same
queries are asked once more: `dense_...` is what both rankings and their fusion take. The last line is JSON.
"""

import argparse
import asyncio
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from bench.at_least import at_least
from bench.ending import end_like_ctrl_c
from bench.machine import machine
from bench.results_folder import results_folder, write
from l0fast.corpus.dense import embed
from l0fast.corpus.embeddings import EmbeddingsConfig
from l0fast.corpus.index import Corpus, Passage, build

VOCABULARY = 200_000
STOP_WORDS = (
    "the of and to a in is it that was for on are as with his they at be this from or had by not but what".split()
)


class Text:
    """Words by Zipf's law."""

    def __init__(self, seed: int):
        self._rng = np.random.default_rng(seed)
        weights = 1 / np.arange(1, VOCABULARY + 1) ** 1.1
        self._cumulative = np.cumsum(weights / weights.sum())

    def words(self, n: int) -> list[str]:
        ranks = np.searchsorted(self._cumulative, self._rng.random(n))
        return [STOP_WORDS[r] if r < len(STOP_WORDS) else f"w{r}" for r in ranks.tolist()]

    def passages(self, count: int) -> Iterator[Passage]:
        for start in range(0, count, 1000):
            lengths = self._rng.integers(20, 101, min(1000, count - start)).tolist()
            words = self.words(sum(lengths))
            for i, length in enumerate(lengths):
                yield Passage(id=str(start + i), title=f"w{i}", text=" ".join(words[:length]))
                words = words[length:]

    def query(self) -> str:
        words = self.words(40)
        rare, common = [w for w in words if w not in STOP_WORDS], [w for w in words if w in STOP_WORDS]
        n = int(self._rng.integers(3, 11))
        return " ".join([*rare[: (n + 1) // 2], *common[: n // 2]])


async def ask(corpus: Corpus, queries: list[str]) -> tuple[list[float], float]:
    """Seconds of each search, and how late the loop woke at most [s]."""
    times: list[float] = []
    late = 0.0
    done = False

    async def watch() -> None:
        nonlocal late
        while not done:
            due = time.perf_counter() + 0.001
            await asyncio.sleep(0.001)
            late = max(late, time.perf_counter() - due)

    watching = asyncio.create_task(watch())
    for query in queries:
        started = time.perf_counter()
        await corpus.search(query, 5)
        times.append(time.perf_counter() - started)
    done = True
    await watching
    return times, late


class InstantEmbedder:
    """Vectors around centres, for whatever text."""

    def __init__(self, dim: int):
        self.config = EmbeddingsConfig(url="http://127.0.0.1:1", model="random")
        self._rng = np.random.default_rng(0)
        self._centres = self._rng.standard_normal((1000, dim), np.float32)

    async def passages(self, texts: Sequence[str]) -> np.ndarray:
        centres = self._centres[self._rng.integers(0, len(self._centres), len(texts))]
        rows = centres + 0.7 * self._rng.standard_normal(centres.shape, np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    async def query(self, text: str) -> np.ndarray:
        return (await self.passages([text]))[0]


def measure_dense(folder: Path, dim: int, queries: list[str]) -> dict[str, Any]:
    embedder: Any = InstantEmbedder(dim)
    before = folder_bytes(folder)
    bare = Corpus(folder)
    started = time.perf_counter()
    asyncio.run(embed(folder, bare.keys(), bare.texts, embedder))
    build_s = time.perf_counter() - started
    bare.close()
    corpus = Corpus(folder)
    corpus.embedder = embedder
    uvloop.run(ask(corpus, queries[:20]))
    times, late = uvloop.run(ask(corpus, queries))
    corpus.close()
    return {
        "dim": dim,
        "dense_build_s": round(build_s, 1),
        "dense_mb": round((folder_bytes(folder) - before) / 1e6, 1),
        "dense_p50_ms": round(statistics.median(times) * 1e3, 2),
        "dense_p95_ms": round(statistics.quantiles(times, n=20)[-1] * 1e3, 2),
        "dense_lag_ms": round(late * 1e3, 1),
    }


def folder_bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def measure(count: int, num_queries: int, folder: Path, *, dim: int = 0) -> dict[str, Any]:
    text = Text(0)
    started, cpu = time.perf_counter(), time.process_time()
    build(text.passages(count), folder)
    build_s, build_cpu_s = time.perf_counter() - started, time.process_time() - cpu
    size = folder_bytes(folder)
    started = time.perf_counter()
    corpus = Corpus(folder)
    open_s = time.perf_counter() - started
    queries = [text.query() for _ in range(num_queries)]
    # the first ones read the file
    uvloop.run(ask(corpus, queries[:20]))
    times, late = uvloop.run(ask(corpus, queries))
    corpus.close()
    dense = measure_dense(folder, dim, queries) if dim else {}
    return {
        "passages": count,
        "build_s": round(build_s, 1),
        "build_cpu_s": round(build_cpu_s, 1),
        "index_mb": round(size / 1e6, 1),
        "open_ms": round(open_s * 1e3, 1),
        "p50_ms": round(statistics.median(times) * 1e3, 2),
        "p95_ms": round(statistics.quantiles(times, n=20)[-1] * 1e3, 2),
        "lag_ms": round(late * 1e3, 1),
        **dense,
    }


def main() -> None:
    end_like_ctrl_c()
    parser = argparse.ArgumentParser(prog="python -m bench.corpus", description="Build and query times of a corpus.")
    parser.add_argument("--passages", type=at_least(1), nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--queries", type=at_least(2), default=300)
    parser.add_argument("--dense", type=at_least(0), default=0, metavar="DIM", help="vectors of so many numbers, too")
    parser.add_argument("--results", type=results_folder, help="folder for corpus.json")
    options = parser.parse_args()
    rows = []
    print(f"{'passages':>10} {'build':>9} {'index':>10} {'p50':>9} {'p95':>9} {'loop late':>10}")
    for count in options.passages:
        folder = Path(tempfile.mkdtemp(prefix="l0fast-corpus-"))
        try:
            row = measure(count, options.queries, folder / "index", dim=options.dense)
        finally:
            shutil.rmtree(folder)
        rows.append(row)
        line = "{passages:>10,} {build_s:>7.1f} s {index_mb:>7.1f} MB {p50_ms:>6.2f} ms {p95_ms:>6.2f} ms {lag_ms:>7.1f} ms"
        print(line.format(**row), flush=True)
        if options.dense:
            line = "with dense {dense_build_s:>7.1f} s {dense_mb:>7.1f} MB {dense_p50_ms:>6.2f} ms {dense_p95_ms:>6.2f} ms {dense_lag_ms:>7.1f} ms"
            print(line.format(**row), flush=True)
    result = {"machine": machine(), "sizes": rows, **{f"largest_{k}": v for k, v in rows[-1].items()}}
    write(result, options.results, "corpus.json")


if __name__ == "__main__":
    main()
