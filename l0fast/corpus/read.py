"""Passages from what people have: a folder of texts, JSON lines, parquet. A row at a time; rows without text are counted.

FOLDER         every text file below it, by paragraphs of at most PASSAGE_CHARS characters; the file's name is the title
rows           columns text (or contents, passage, body), title and id; "contents" of the form "title"\\ntext, as
               Search-R1's corpus has it, is taken apart
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from l0fast.corpus.index import Passage
from l0fast.errors import UsageError
from l0fast.tasks.sources import rows_of_file
from l0fast.tools.registry import paragraphs, text_files

TEXT, TITLE, ID = ("text", "contents", "passage", "body"), ("title",), ("id", "_id", "docid", "pid")


@dataclass(slots=True)
class Reader:
    """Iterate over it; then `left_out` and `first_left_out` tell of rows without text."""

    source: Path
    left_out: int = 0
    first_left_out: str = ""

    def __iter__(self) -> Iterator[Passage]:
        if self.source.is_dir():
            return self._folder()
        if self.source.is_file():
            return self._rows()
        raise UsageError(f"{self.source} is neither a file nor a folder: give a folder of texts, .jsonl or .parquet")

    def _folder(self) -> Iterator[Passage]:
        for name, file in text_files(self.source):
            for n, text in enumerate(paragraphs(file), 1):
                yield Passage(id=f"{name}#{n}", title=name, text=text)

    def _rows(self) -> Iterator[Passage]:
        for line, row in rows_of_file(self.source):
            passage = _passage(row, line)
            if passage is not None:
                yield passage
                continue
            self.left_out += 1
            self.first_left_out = self.first_left_out or f"line {line}"


def _passage(row: Any, line: int) -> Passage | None:
    if not isinstance(row, Mapping):
        return None
    text, title = first(row, TEXT), first(row, TITLE)
    if not text:
        return None
    if not title and text.startswith('"') and '"\n' in text:
        title, _, text = text[1:].partition('"\n')
    return Passage(id=first(row, ID) or str(line), title=title, text=text)


def first(row: Mapping[str, Any], names: tuple[str, ...]) -> str:
    for name in names:
        value = row.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, str) and value.strip():
            return value.strip()
    return ""
