"""Where the pipeline stands, in one SQLite file: every stage commits what it did together with how far it has come.

    rows       one a question, in the order in which they were read; a second one like it is counted and not kept
    sources    line up to which each was read, and how many rows of what sort
    problems   rows that are no questions: source, line, reason

So a process that was killed goes on where it was, to the same end, and memory holds a batch at most.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import orjson

from l0fast.data.contamination import question_key
from l0fast.errors import UsageError
from l0fast.tasks.sources import Problem
from l0fast.types import Task

BATCH = 1000
"""Rows of a commit."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS plan (text TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS sources (name TEXT PRIMARY KEY, line INTEGER, rows INTEGER, duplicates INTEGER, done INTEGER);
CREATE TABLE IF NOT EXISTS rows (
    number INTEGER PRIMARY KEY, key BLOB UNIQUE NOT NULL, source TEXT NOT NULL, line INTEGER NOT NULL, task BLOB NOT NULL,
    objectivity INTEGER, stability INTEGER, unjudged TEXT, contaminated INTEGER);
CREATE TABLE IF NOT EXISTS problems (source TEXT, line INTEGER, reason TEXT, PRIMARY KEY (source, line));
"""


@dataclass(frozen=True, slots=True)
class Row:
    number: int
    key: bytes
    """As `question_key` makes it."""
    task: Task
    source: str
    objectivity: int | None
    stability: int | None


class Store:
    """Open with `with`, which makes its folder. Raises UsageError for one that can't be or holds another command's work."""

    def __init__(self, path: Path, plan: str):
        self._path, self._plan = path, plan

    def __enter__(self) -> "Store":
        with ExitStack() as failed:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._db = failed.enter_context(closing(sqlite3.connect(self._path, isolation_level=None)))
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.executescript(_SCHEMA)
                [before] = self._db.execute("SELECT max(text) FROM plan").fetchone() or [None]
            except OSError as e:
                raise UsageError(f"{self._path.parent} can't be a folder ({e.strerror}): give another --out") from e
            except sqlite3.DatabaseError as e:
                raise UsageError(f"{self._path} is no work of this pipeline ({e}): give another --out") from e
            if before is None:
                self._db.execute("INSERT INTO plan VALUES (?)", (self._plan,))
            elif before != self._plan:
                raise UsageError(
                    f"{self._path.parent} holds the work of another command ({before}): give another --out, or remove it"
                )
            failed.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._db.close()

    # --- reading ---

    def begun(self, source: str) -> tuple[int, int, bool]:
        """The line up to which a source was read, the questions found by there, and whether that is all of it."""
        found = self._db.execute("SELECT line, rows, done FROM sources WHERE name = ?", (source,)).fetchone()
        if not found:
            return 0, 0, False
        line, rows, done = found
        return line, rows - self._count("problems", "source = ?", source), bool(done)

    def add(self, source: str, batch: Sequence[tuple[int, Task | Problem]], *, done: bool) -> None:
        """Rows of a source, with their lines; one commit."""
        duplicates = 0
        self._db.execute("BEGIN")
        for line, task in batch:
            if isinstance(task, Problem):
                self._db.execute("INSERT INTO problems VALUES (?, ?, ?)", (source, line, task.reason))
                continue
            kept = self._db.execute(
                "INSERT INTO rows (key, source, line, task) VALUES (?, ?, ?, ?) ON CONFLICT (key) DO NOTHING",
                (question_key(task.question), source, line, orjson.dumps(task)),
            )
            duplicates += not kept.rowcount
        self._db.execute(
            "INSERT INTO sources VALUES (:name, :line, :rows, :duplicates, :done) ON CONFLICT (name) DO UPDATE SET "
            "line = max(line, :line), rows = rows + :rows, duplicates = duplicates + :duplicates, done = :done",
            {
                "name": source,
                "line": batch[-1][0] if batch else 0,
                "rows": len(batch),
                "duplicates": duplicates,
                "done": done,
            },
        )
        self._db.execute("COMMIT")

    # --- judging, decontaminating ---

    def unjudged(self, after: int) -> list[Row]:
        """The next batch of rows without grades, beyond row number `after`."""
        return self._rows("objectivity IS NULL AND number > ?", after)

    def judged(self, grades: Sequence[tuple[int, int | None, int | None, str | None]]) -> None:
        """Row number, objectivity and stability, or why there are none; one commit."""
        self._db.execute("BEGIN")
        self._db.executemany(
            "UPDATE rows SET objectivity = ?, stability = ?, unjudged = ? WHERE number = ?",
            [(objectivity, stability, why, number) for number, objectivity, stability, why in grades],
        )
        self._db.execute("COMMIT")

    def unchecked(self, after: int) -> list[Row]:
        """The next batch of rows, beyond row number `after`, that nobody has held against the evaluation sets."""
        return self._rows("contaminated IS NULL AND number > ?", after)

    def checked(self, verdicts: Sequence[tuple[int, bool]]) -> None:
        self._db.execute("BEGIN")
        self._db.executemany(
            "UPDATE rows SET contaminated = ? WHERE number = ?", [(bad, number) for number, bad in verdicts]
        )
        self._db.execute("COMMIT")

    # --- the end ---

    def kept(self, *, min_objectivity: int, min_stability: int, judged: bool) -> Iterator[Row]:
        """Rows to train on, in their order."""
        fit = f"objectivity >= {min_objectivity:d} AND stability >= {min_stability:d} AND" if judged else ""
        after = 0
        while batch := self._rows(f"{fit} NOT contaminated AND number > ?", after):
            yield from batch
            after = batch[-1].number

    def problems(self) -> Iterator[tuple[str, int, str]]:
        yield from self._db.execute("SELECT source, line, reason FROM problems ORDER BY source, line")

    def counts(self, *, min_objectivity: int, min_stability: int, judged: bool) -> dict[str, dict[str, int]]:
        """By source: rows read, left out as no questions, duplicates, contaminated, unjudged, unfit, kept."""
        counts: dict[str, dict[str, int]] = {}
        for name, rows, duplicates in self._db.execute("SELECT name, rows, duplicates FROM sources ORDER BY rowid"):
            of = self._count("problems", "source = ?", name)
            contaminated = self._count("rows", "contaminated AND source = ?", name)
            lost = self._count("rows", "objectivity IS NULL AND NOT contaminated AND source = ?", name) if judged else 0
            low = f"(objectivity < {min_objectivity:d} OR stability < {min_stability:d})"
            unfit = self._count("rows", f"{low} AND NOT contaminated AND source = ?", name) if judged else 0
            counts[name] = {
                "rows": rows,
                "no_question": of,
                "duplicate": duplicates,
                "contaminated": contaminated,
                "unjudged": lost,
                "unfit": unfit,
                "kept": rows - of - duplicates - contaminated - lost - unfit,
            }
        return counts

    def _count(self, table: str, where: str, name: str) -> int:
        return self._db.execute(f"SELECT count(*) FROM {table} WHERE {where}", (name,)).fetchone()[0]

    def _rows(self, where: str, after: int) -> list[Row]:
        found = self._db.execute(
            f"SELECT number, key, task, source, objectivity, stability FROM rows WHERE {where} ORDER BY number LIMIT {BATCH}",
            (after,),
        )
        return [Row(number, key, _task(task), source, o, s) for number, key, task, source, o, s in found]


def _task(data: bytes) -> Task:
    fields = orjson.loads(data)
    return Task(**fields | {"answers": tuple(fields["answers"]), "tests": tuple(fields["tests"])})
