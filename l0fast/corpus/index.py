"""An index of passages on disk, by tantivy: BM25 (k1 1.2, b 0.75), millions of passages, answered off the event loop.

    passages (id, title, text) --build--> FOLDER: tantivy's segments, corpus.json
    query --the same analyzer--> its words --BM25--> best k, equal scores in the order of the corpus

Words are runs of letters and digits, without case and accents; English stop words count in neither. A query is words and
nothing else: no operator, field or wildcard in it means anything. Lengths of passages over 40 words enter BM25 rounded, as
in Lucene. Building writes beside the folder and renames at the end: there is a whole index or none.
"""

import asyncio
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from l0fast.errors import ToolError, UsageError

FORMAT = 1
MAX_QUERY_WORDS = 32
"""Different words of a query that count."""
MAX_RESULTS = 50
MAX_WORD_CHARS = 40
"""Longer ones are not indexed."""
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
        writer.wait_merging_threads()
        (new / "corpus.json").write_text(json.dumps({"format": FORMAT, "passages": count, "source": source}) + "\n")
        os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return count


class Corpus:
    """An index that is open. Searches run in threads of its own; tantivy lets go of the interpreter meanwhile."""

    def __init__(self, folder: Path, *, threads: int = 2):
        """Raises UsageError for a folder that is none."""
        tantivy = _tantivy()
        try:
            about = orjson.loads((folder / "corpus.json").read_bytes())
            if about["format"] != FORMAT:
                raise UsageError(f"{folder} was built by another version: build it again")
            self._index = _open(tantivy, folder, create=False)
            self._index.config_reader("manual", 0)
            self._index.reload()
        except (OSError, ValueError, KeyError) as e:
            raise UsageError(
                f"{folder} is no corpus ({e}): build one with python -m l0fast.corpus build SOURCE {folder}"
            ) from e
        self.num_passages: int = about["passages"]
        self._tantivy, self._schema, self._searcher = tantivy, self._index.schema, self._index.searcher()
        self._analyzer = _analyzer(tantivy)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="corpus")

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def search(self, query: str, k: int) -> list[Found]:
        """The at most `k` best passages, best first. Raises ToolError for a k that is none."""
        if not isinstance(k, int) or not 1 <= k <= MAX_RESULTS:
            raise ToolError(f"a search returns 1 to {MAX_RESULTS} passages, not {k!r}")
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.search_now, query, k)

    def search_now(self, query: str, k: int) -> list[Found]:
        """The same, in the caller's thread."""
        words = list(dict.fromkeys(self._analyzer.analyze(query[:10_000])))[:MAX_QUERY_WORDS]
        if not words:
            return []
        tantivy = self._tantivy
        wanted = tantivy.Query.boolean_query(
            [(tantivy.Occur.Should, tantivy.Query.term_query(self._schema, "all", word, "freq")) for word in words]
        )
        hits = self._searcher.search(wanted, k, count=False).hits
        return [Found(_passage(self._searcher.doc(address)), float(score)) for score, address in hits]


def _passage(document: Any) -> Passage:
    return Passage(
        id=document.get_first("id"), title=document.get_first("title") or "", text=document.get_first("text")
    )


def numbered(texts: Iterable[str], prefix: str = "") -> Iterator[Passage]:
    """Passages of plain texts."""
    for n, text in enumerate(texts, 1):
        yield Passage(id=f"{prefix}{n}", title="", text=text)
