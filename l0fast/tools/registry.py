"""Tools by name: what --tools takes.

    search=notes/            a builder that is registered here, and what it is told
    corpus=wiki/             the same: an index on disk
    my_tools:look_up         a function of the user's own, from a module that Python finds

A function is a tool as it stands: agents are shown its name, its signature and its docstring. It may be async; one that
isn't runs in a thread (threads.py). Annotate its arguments with JSON's types, Any or Literal, return what JSON can say, and
raise ToolError for what it can't do: any other exception is a bug in it, and ends the run, but OSErrors (broker.py).

    def look_up(isbn: str) -> dict:
        "Title, author and year of a book."
        ...
"""

import difflib
import importlib
import inspect
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from l0fast.errors import UsageError
from l0fast.sandbox.base import ToolSpec
from l0fast.tools.cache import normaliser
from l0fast.tools.threads import InThread

Builder = Callable[[str], ToolSpec | AbstractAsyncContextManager[ToolSpec]]
"""What stands after "=", empty where nothing does, -> the tool, or a block that opens and closes it. Raises UsageError."""

MAX_CORPUS_BYTES = 256 << 20
"""Text that `search` indexes in memory; more wants a real index [bytes]."""
PASSAGE_CHARS = 1000
"""Longest passage; a longer paragraph is cut at a space [characters]."""
SEARCH_RESULTS = 5
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".csv", ".html")
"""Files of a folder that are read."""

_builders: dict[str, Builder] = {}
_shown: dict[str, ToolSpec] = {}


def register(name: str, builder: Builder, shown: ToolSpec | None = None) -> None:
    """Make a tool known by a name; the last one of that name counts.

    Args:
        shown: what agents are told of it, for who only looks and has an argument that is a file or folder; not called.
    """
    _builders[name] = builder
    if shown is not None:
        _shown[name] = shown


def known_tools() -> list[str]:
    return sorted(_builders)


def load_tool(word: str) -> ToolSpec | AbstractAsyncContextManager[ToolSpec]:
    """The tool that a word asks for: NAME, NAME=ARGUMENT or module:function. Raises UsageError."""
    name, _, argument = word.partition("=")
    if name in _builders:
        return _builders[name](argument)
    module, colon, function = word.partition(":")
    if colon and "=" not in module:
        return function_tool(_imported(module, function))
    near = difflib.get_close_matches(name, _builders, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(known_tools())}, or write module:function"
    raise UsageError(f"--tools {word}: no tool is called {name!r}; {hint}")


def describe_tool(word: str) -> ToolSpec:
    """As agents are shown it, without opening what it searches. Raises UsageError."""
    name, _, argument = word.partition("=")
    if name in _shown:
        if not argument or not Path(argument).exists():
            raise UsageError(f"--tools {word}: there is no such file or folder: write {name}=FILE or {name}=FOLDER")
        return _shown[name]
    loaded = load_tool(word)
    assert isinstance(loaded, ToolSpec), "what is built from nothing is a function"
    return loaded


def function_tool(function: Callable[..., Any]) -> ToolSpec:
    """A function as a tool. Raises UsageError where agents could not be told what it takes or does."""
    name, doc = function.__name__, inspect.cleandoc(function.__doc__ or "")
    if not doc:
        raise UsageError(f"tool {name} has no docstring, which is all that agents are told of it: write one")
    try:
        signature = re.sub(r"\btyping\.", "", str(inspect.signature(function, eval_str=True)))
        normaliser(name, signature)
    except (NameError, TypeError, ValueError) as e:
        raise UsageError(str(e)) from e
    call = function if inspect.iscoroutinefunction(function) else InThread(function)
    return ToolSpec(name=name, signature=signature, doc=doc, call=call)


def search_files(place: str) -> ToolSpec:
    """`search(query)` over the paragraphs of a text file, or of all text files below a folder."""
    # numpy and bm25s are needed here alone
    from l0fast.tools.local_search import LocalSearch, search_tool

    if not place:
        raise UsageError("--tools search needs something to search: write search=FILE or search=FOLDER")
    passages = list(_passages(Path(place)))
    if not passages:
        raise UsageError(f"--tools search={place}: there is no text in it; it reads {', '.join(TEXT_SUFFIXES)} files")
    return search_tool(LocalSearch(passages), SEARCH_RESULTS)


def _passages(place: Path) -> Iterator[str]:
    """Paragraphs; of a folder's files each begins with the file's name, so that it can be cited."""
    try:
        files = [("", place)] if place.is_file() else text_files(place)
        if not place.exists():
            raise UsageError(f"--tools search={place}: there is no such file or folder")
        if (size := sum(f.stat().st_size for _, f in files)) > MAX_CORPUS_BYTES:
            raise UsageError(
                f"--tools search={place}: {size:,} bytes are more than the {MAX_CORPUS_BYTES:,} that are searched in memory: "
                "choose a part of it"
            )
        for name, file in files:
            yield from (f"{name}: {part}" if name else part for part in paragraphs(file))
    except OSError as e:
        raise UsageError(f"--tools search={place} can't be read: {e}") from e


def text_files(folder: Path) -> list[tuple[str, Path]]:
    """Those below it by name, as text: a name may be in bytes that are none. No folders, no links to what is not there."""
    files = sorted(f for f in folder.rglob("*") if f.suffix in TEXT_SUFFIXES and f.is_file())
    return [(os.fsencode(f.relative_to(folder)).decode(errors="replace"), f) for f in files]


def paragraphs(file: Path) -> Iterator[str]:
    """Of a text file, each cut to PASSAGE_CHARS. Raises OSError."""
    for paragraph in re.split(r"\n\s*\n", file.read_text(encoding="utf-8", errors="replace")):
        yield from _cut(" ".join(paragraph.split()))


def _cut(text: str) -> Iterator[str]:
    while len(text) > PASSAGE_CHARS:
        at = text.rfind(" ", 1, PASSAGE_CHARS) if " " in text[1:PASSAGE_CHARS] else PASSAGE_CHARS
        yield text[:at]
        text = text[at:].lstrip()
    if text:
        yield text


def _imported(module: str, name: str) -> Callable[..., Any]:
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name is None or not f"{module}.".startswith(f"{e.name}."):
            raise
        raise UsageError(f"--tools {module}:{name}: Python finds no module {module!r}: run where it lies") from e
    function = getattr(found, name, None)
    if not callable(function) or not hasattr(function, "__name__"):
        raise UsageError(f"--tools {module}:{name}: {module} has no function {name!r}")
    return function


@asynccontextmanager
async def search_corpus(place: str) -> AsyncIterator[ToolSpec]:
    """`search(query)` over an index that `python -m l0fast.corpus build` has made."""
    from l0fast.corpus.index import open_corpus

    async with open_corpus(Path(place)) as corpus:

        async def search(query: str) -> list[str]:
            found = await corpus.search(query, SEARCH_RESULTS)
            return [f"{f.passage.title}: {f.passage.text}" if f.passage.title else f.passage.text for f in found]

        yield replace(_shown["corpus"], call=search, version=corpus.digest)


async def _not_called(query: str) -> list[str]:
    raise NotImplementedError("this tool is only shown")


def _search(what: str) -> ToolSpec:
    doc = f"The {SEARCH_RESULTS} {what} that match best."
    return ToolSpec(name="search", signature="(query: str) -> list[str]", doc=doc, call=_not_called)


register("search", search_files, _search("sentences"))
register("corpus", search_corpus, _search("passages"))
