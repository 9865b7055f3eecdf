"""Where answers of tools are kept: in memory up to two bounds, and in a SQLite file that outlives the run.

    Memory      least recently used first out; synchronous, some 0.3 us a look
    CacheFile   one connection in one thread of its own; the event loop only ever waits for that thread's answers

A row is (tool, version, arguments) -> value, both sides JSON. The file says whose it is (`application_id`) and which
layout it has (`user_version`); any other file is refused and left as it was. Two processes may use one file: it is in WAL
mode meanwhile, and who has to wait for a lock waits at most `BUSY_S`. The last to leave puts everything back into the one
file, which can then be copied, or replayed from a folder that can't be written.
"""

import asyncio
import contextlib
import sqlite3
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from l0fast.errors import UsageError

T = TypeVar("T")
Mode = Literal["use", "record", "replay"]

APPLICATION_ID = int.from_bytes(b"l0fc", "big")
LAYOUT = 1
BUSY_S = 10.0
"""How long a lock of another process is waited for [s]."""


class Key(NamedTuple):
    """What a call is known by."""

    tool: str
    version: str
    arguments: str
    """JSON, sorted keys."""


class Memory:
    """The most recently used values that fit."""

    def __init__(self, max_entries: int, max_bytes: int):
        self.max_entries, self.max_bytes = max_entries, max_bytes
        self.num_bytes = 0
        """Sum over entries of all four texts [bytes]."""
        self._values: OrderedDict[Key, bytes] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Key) -> bytes | None:
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: Key, value: bytes) -> None:
        """Keep `value`, at the cost of the oldest. One that alone is too large is not kept."""
        old = self._values.pop(key, None)
        if old is not None:
            self.num_bytes -= _size(key, old)
        size = _size(key, value)
        if size > self.max_bytes:
            return
        self._values[key] = value
        self.num_bytes += size
        while len(self._values) > self.max_entries or self.num_bytes > self.max_bytes:
            self.num_bytes -= _size(*self._values.popitem(last=False))


def _size(key: Key, value: bytes) -> int:
    return sum(len(part.encode()) for part in key) + len(value)


class CacheFile:
    """An open cache file. Every method raises UsageError where SQLite can't do what it is asked for."""

    def __init__(self, path: Path):
        self.path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tool-cache")
        self._db: sqlite3.Connection

    @classmethod
    async def open(cls, path: Path, mode: Mode) -> "CacheFile":
        """Make the file, or open it; "replay" never makes or changes one."""
        file = cls(path)
        try:
            file._db = await file._do(lambda: _open(path, mode))
        except BaseException:
            file._thread.shutdown(wait=False)
            raise
        return file

    async def get(self, key: Key) -> bytes | None:
        sql = "SELECT value FROM calls WHERE tool = ? AND version = ? AND arguments = ?"
        row = await self._do(lambda: self._db.execute(sql, key).fetchone())
        return row and row[0]

    async def put(self, key: Key, value: bytes) -> None:
        await self._do(lambda: self._db.execute("INSERT OR REPLACE INTO calls VALUES (?, ?, ?, ?)", (*key, value)))

    async def close(self) -> None:
        closed = self._do(lambda: _close(self._db))
        # what was asked for is still done, then the thread ends, whether or not this coroutine is cancelled
        self._thread.shutdown(wait=False)
        await closed

    def _do(self, work: Callable[[], T]) -> "asyncio.Future[T]":
        return asyncio.get_running_loop().run_in_executor(self._thread, self._told, work)

    def _told(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except sqlite3.Error as e:
            raise UsageError(f"the tool cache {str(self.path)!r} can't be used: {e}; name another file") from e


def _open(path: Path, mode: Mode) -> sqlite3.Connection:
    replay = mode == "replay"
    # rw of a file that can't be written is ro
    uri = f"{path.absolute().as_uri()}?mode={'rw' if replay else 'rwc'}"
    db = sqlite3.connect(uri, uri=True, timeout=BUSY_S, isolation_level=None)
    try:
        # what a transaction sees is not half of what another process is just writing
        db.execute("BEGIN" if replay else "BEGIN IMMEDIATE")
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (layout,) = db.execute("PRAGMA user_version").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if not replay and not (application or layout or tables):
            db.execute(
                "CREATE TABLE calls (tool TEXT NOT NULL, version TEXT NOT NULL, arguments TEXT NOT NULL, "
                "value BLOB NOT NULL, PRIMARY KEY (tool, version, arguments))"
            )
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {LAYOUT}")
        elif application != APPLICATION_ID:
            raise UsageError(f"the tool cache {str(path)!r} is a database of another program: name another file")
        elif layout != LAYOUT:
            raise UsageError(
                f"the tool cache {str(path)!r} has layout {layout}, and this version knows {LAYOUT}: "
                "name another file, or delete this one"
            )
        db.execute("COMMIT")
        if replay:
            db.execute("PRAGMA query_only = 1")
        else:
            db.execute("PRAGMA journal_mode = WAL")
            # a power cut may lose the last answers, never the file
            db.execute("PRAGMA synchronous = NORMAL")
    except BaseException:
        db.close()
        raise
    return db


def _close(db: sqlite3.Connection) -> None:
    try:
        db.execute("PRAGMA busy_timeout = 0")
        # refused while another process has the file open, which then does it when it leaves
        with contextlib.suppress(sqlite3.OperationalError):
            db.execute("PRAGMA journal_mode = DELETE")
    finally:
        db.close()
