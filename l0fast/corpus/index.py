"""An index of passages on disk, by tantivy: BM25 (k1 1.2, b 0.75), millions of passages, answered off the event loop.

    passages (id, title, text) --build--> FOLDER: tantivy's segments, corpus.json
    query --the same analyzer--> its words --BM25--> best k, equal scores in the order of the corpus
    query --embedder--> vector --dense.py--> nearest      where there are vectors: both rankings fused, then the best k

Words are runs of letters and digits, without case and accents; English stop words count in neither. A query is words and
nothing else: no operator, field or wildcard in it means anything. Lengths of passages over 40 words enter BM25 rounded, as
in Lucene. Building writes beside the folder and renames at the end: there is a whole index or none.
"""

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import orjson

from l0fast.corpus.dense import Dense, fused
from l0fast.corpus.embeddings import Embedder, open_embedder
from l0fast.errors import ToolError, UsageError

FORMAT = 1
MAX_QUERY_WORDS = 32
"""Different words of a query that count."""
MAX_QUERY_CHARS = 10_000
MAX_RESULTS = 50
FUSED = 100
"""Best of each ranking that are fused [passages]."""
MAX_WORD_CHARS = 40
"""Longer ones are not indexed."""
SEARCH_THREADS = 2
WRITER_BYTES = 256 << 20
"""Memory of building [bytes]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    id: str
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class Found:
    passage: Passage
    score: float
    """BM25's; of fused rankings 1 over the place."""


def _tantivy() -> Any:
    try:
        import tantivy
    except ImportError as e:
        raise UsageError("a corpus needs tantivy: pip install 'l0fast[corpus]'") from e
    return tantivy


def _analyzer(tantivy: Any) -> Any:
    filters = tantivy.Filter
    return (
        tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.simple())
        .filter(filters.remove_long(MAX_WORD_CHARS))
        .filter(filters.lowercase())
        .filter(filters.ascii_fold())
        .filter(filters.stopword("english"))
        .build()
    )


def _open(tantivy: Any, folder: Path, *, create: bool) -> Any:
    builder = tantivy.SchemaBuilder()
    builder.add_integer_field("number", stored=True, indexed=False, fast=True)
    builder.add_text_field("id", stored=True, tokenizer_name="raw", index_option="basic")
    builder.add_text_field("title", stored=True, tokenizer_name="l0fast", index_option="freq")
    # what is searched: title and text together, as one field of one length
    builder.add_text_field("all", stored=False, tokenizer_name="l0fast", index_option="freq")
    builder.add_text_field("text", stored=True, tokenizer_name="raw", index_option="basic")
    index = tantivy.Index(builder.build(), path=str(folder)) if create else tantivy.Index.open(str(folder))
    index.register_tokenizer("l0fast", _analyzer(tantivy))
    return index


def build(passages: Iterable[Passage], folder: Path, *, source: str = "", say: Any = None) -> int:
    """Index passages as they come; returns how many. Blocks; memory stays within `WRITER_BYTES`.

    Raises UsageError: a folder that is there already, or no passages.
    """
    tantivy = _tantivy()
    if folder.exists():
        raise UsageError(f"{folder} is there already: remove it, or build into another folder")
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        index = _open(tantivy, new, create=True)
        # one thread: documents keep their order, and equal scores come in it
        writer = index.writer(heap_size=WRITER_BYTES, num_threads=1)
        count = 0
        try:
            for count, passage in enumerate(passages, 1):
                writer.add_document(
                    tantivy.Document(
                        number=count,
                        id=passage.id,
                        title=passage.title,
                        all=f"{passage.title}\n{passage.text}",
                        text=passage.text,
                    )
                )
                if say is not None and count % 100_000 == 0:
                    say(f"{count:,} passages")
            if not count:
                raise UsageError(f"{source or 'the source'} has no passage: there is nothing to index")
            writer.commit()
        finally:
            # its threads write what they hold, also into a folder that is taken away meanwhile
            writer.wait_merging_threads()
        (new / "corpus.json").write_text(json.dumps({"format": FORMAT, "passages": count, "source": source}) + "\n")
        os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return count


class Corpus:
    """An index that is open. Searches run in threads of its own; tantivy and usearch let go of the interpreter meanwhile.

    Where the folder has vectors, `search` needs what `open_corpus` opens besides.
    """

    def __init__(self, folder: Path):
        """Raises UsageError for a folder that is none."""
        tantivy = _tantivy()
        try:
            about = orjson.loads((folder / "corpus.json").read_bytes())
            if about["format"] != FORMAT:
                raise UsageError(f"{folder} was built by another version: build it again")
            self._index = _open(tantivy, folder, create=False)
            self._index.config_reader("manual", 0)
            self._index.reload()
            self.num_passages: int = about["passages"]
            # each build gives its segments names of their own
            parts = [folder / name for name in ("meta.json", "dense.json")]
            self.digest = blake2b(b"".join(p.read_bytes() for p in parts if p.exists()), digest_size=8).hexdigest()
            """Of the index: the same for a copy, another one once it was built or embedded anew."""
            self.dense = Dense(folder, self.num_passages) if (folder / "dense.json").exists() else None
        except (OSError, ValueError, KeyError) as e:
            if isinstance(e, UsageError):
                raise
            raise UsageError(
                f"{folder} is no corpus ({e}): build one with python -m l0fast.corpus build SOURCE {folder}"
            ) from e
        self._tantivy, self._schema, self._searcher = tantivy, self._index.schema, self._index.searcher()
        self._analyzer = _analyzer(tantivy)
        self._threads = ThreadPoolExecutor(SEARCH_THREADS, thread_name_prefix="corpus")
        self.embedder: Embedder | None = None

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def search(self, query: str, k: int) -> list[Found]:
        """The at most `k` best passages, best first.

        Raises ToolError for a k that is none, and where the endpoint that queries are embedded by is of no use.
        """
        if not isinstance(k, int) or not 1 <= k <= MAX_RESULTS:
            raise ToolError(f"a search returns 1 to {MAX_RESULTS} passages, not {k!r}")
        run = asyncio.get_running_loop().run_in_executor
        if self.dense is None or not query.strip():
            return await run(self._threads, self.search_now, query, k)
        assert self.embedder is not None, "opened by open_corpus"
        vector = await self.embedder.query(query[:MAX_QUERY_CHARS])
        return await run(self._threads, self._search_both, query, vector, k)

    def search_now(self, query: str, k: int) -> list[Found]:
        """The same by BM25 alone, in the caller's thread."""
        return [Found(self._passage(key), score) for key, score in self._ranked(query, k)]

    def _search_both(self, query: str, vector: Any, k: int) -> list[Found]:
        assert self.dense is not None
        by_words = [key for key, _ in self._ranked(query, FUSED)]
        best = fused(by_words, self.dense.nearest(vector, FUSED))[:k]
        return [Found(self._passage(key), 1 / place) for place, key in enumerate(best, 1)]

    def _ranked(self, query: str, k: int) -> list[tuple[int, float]]:
        """(key, BM25)"""
        words = list(dict.fromkeys(self._analyzer.analyze(query[:MAX_QUERY_CHARS])))[:MAX_QUERY_WORDS]
        if not words:
            return []
        tantivy = self._tantivy
        wanted = tantivy.Query.boolean_query(
            [(tantivy.Occur.Should, tantivy.Query.term_query(self._schema, "all", word, "freq")) for word in words]
        )
        return [(_key(at), float(score)) for score, at in self._searcher.search(wanted, k, count=False).hits]

    def keys(self) -> list[int]:
        """Of all passages, in the order of the corpus: what vectors go by."""
        tantivy = self._tantivy
        found = self._searcher.search(
            tantivy.Query.all_query(),
            self.num_passages,
            count=False,
            order_by_field="number",
            order=tantivy.Order.Asc,
        )
        return [_key(at) for _, at in found.hits]

    def texts(self, keys: Sequence[int]) -> list[str]:
        """Of passages, as they are embedded: titles first."""
        passages = map(self._passage, keys)
        return [f"{p.title}\n{p.text}" if p.title else p.text for p in passages]

    def _passage(self, key: int) -> Passage:
        document = self._searcher.doc(self._tantivy.DocAddress(key >> 32, key & 0xFFFF_FFFF))
        return Passage(
            id=document.get_first("id"), title=document.get_first("title") or "", text=document.get_first("text")
        )


@asynccontextmanager
async def open_corpus(folder: Path) -> AsyncIterator[Corpus]:
    """A corpus for as long as the `async with` body runs. Raises UsageError for a folder that is none."""
    corpus = await asyncio.to_thread(Corpus, folder)
    try:
        if corpus.dense is None:
            yield corpus
            return
        async with open_embedder(corpus.dense.config) as embedder:
            corpus.embedder = embedder
            yield corpus
    finally:
        corpus.close()


def _key(address: Any) -> int:
    """Of a document: an index that is never written again has it at the same address for ever."""
    return address.segment_ord << 32 | address.doc
