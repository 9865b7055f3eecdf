"""What makes two calls of a tool the same, and where answers are kept: in memory, and in a file that outlives the run.

    normaliser  arguments, however they were passed -> one JSON text
    Memory      within two bounds, least recently used first out
    CacheFile   one connection in one thread of its own; the event loop only ever waits for that thread's answers

A row is (tool, version, arguments) -> value, both sides JSON. The file says whose it is (`application_id`) and which
layout it has (`user_version`); any other file is refused and left as it was. Several processes may use one file: it is in
WAL mode meanwhile, and who has to wait for a lock waits at most `BUSY_S`. The last to leave puts everything back into the
one file, which can then be copied, or replayed from a folder that can't be written. SQLite alone would now and then fail
to change the mode, or leave its -wal file, where two come or leave at once: so they do that one at a time, under a flock
of the folder.
"""

import ast
import asyncio
import contextlib
import fcntl
import inspect
import os
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Dict, List, Literal, NamedTuple, Optional, TypeVar, Union, get_args, get_origin  # noqa: UP035

import orjson
from pydantic import ConfigDict, PydanticUserError, ValidationError, validate_call

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


def normaliser(name: str, signature: str) -> Callable[..., str]:
    """A function that takes a call's arguments and returns them as JSON: by name, defaults filled in, keys sorted.

    Equal texts mean equal calls: 1, 1.0 and True differ. It raises TypeError for arguments that don't fit the signature
    or aren't JSON-like, which they are if JSON gives back the same. Raises ValueError for a signature that is no Python or
    has arguments of other than JSON's types, those too that JSON never brings: a tuple, a set, a dict by number.
    """
    scope: dict[str, Any] = {kind.__name__: kind for kind in (Any, Literal, Optional, Union, List, Dict)}  # noqa: UP006
    scope["__name__"] = __name__
    try:
        module = ast.parse(f"def fits{signature}: return locals()")
        for function in module.body:
            if isinstance(function, ast.FunctionDef):
                # arguments alone are checked: what it returns may be of a type whose name says nothing here
                function.returns = None
        exec(compile(module, "<signature>", "exec"), scope)
        fits = validate_call(config=ConfigDict(strict=True))(scope["fits"])
        for parameter in inspect.signature(scope["fits"]).parameters.values():
            if not _is_of_json(parameter.annotation):
                given = inspect.formatannotation(parameter.annotation)
                raise TypeError(
                    f"{parameter.name}: {given} is nothing that agents' arguments, which come as JSON, can be"
                )
    except (SyntaxError, NameError, TypeError, PydanticUserError) as e:
        raise ValueError(
            f"tool {name!r} has the signature {signature!r}, which can't be checked: {e}; annotate arguments with str, int, "
            "float, bool, None, list[...], dict[str, ...], Any, Literal[...], and A | B of them"
        ) from e
    parameters = list(inspect.signature(scope["fits"]).parameters)

    def normalise(*args: Any, **kw: Any) -> str:
        try:
            bound = fits(*args, **kw)
        except ValidationError as e:
            error = e.errors(include_url=False, include_context=False, include_input=False)[0]
            at = error["loc"][0]
            if isinstance(at, int):
                at = parameters[at] if at < len(parameters) else f"argument {at + 1}"
            raise TypeError(f"{name}() does not take these arguments: {at}: {error['msg']}") from None
        # *args arrive as a tuple
        bound = {name: list(value) if isinstance(value, tuple) else value for name, value in bound.items()}
        problem = "JSON has no such value"
        try:
            text = orjson.dumps(bound, option=orjson.OPT_SORT_KEYS)
            if orjson.loads(text) == bound:
                return text.decode()
        except (TypeError, ValueError) as e:
            problem = str(e)
        raise TypeError(f"{name}() takes strings, finite numbers, booleans, None, lists and dicts: {problem}")

    return normalise


def _is_of_json(annotation: Any) -> bool:
    """Whether there is JSON that is read as such a value."""
    origin, args = get_origin(annotation) or annotation, get_args(annotation)
    if origin in (Literal, inspect.Parameter.empty, Any, object, str, int, float, bool, None, NoneType):
        return True
    if origin is dict and args:
        return (get_origin(args[0]) is Literal or args[0] in (str, Any, object)) and _is_of_json(args[1])
    return origin in (list, dict, Union, UnionType) and all(map(_is_of_json, args))


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
        # a copy: what orjson makes holds on to the 4 KB that it began with, however little was said
        self._values[key] = bytes(memoryview(value))
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
            file._db = await file._do(lambda: _alone(path, lambda: _open(path, mode)))
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
        closed = self._do(lambda: _close(self.path, self._db))
        # what was asked for is still done, then the thread ends, whether or not this coroutine is cancelled
        self._thread.shutdown(wait=False)
        await closed

    def _do(self, work: Callable[[], T]) -> "asyncio.Future[T]":
        return asyncio.get_running_loop().run_in_executor(self._thread, self._told, work)

    def _told(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except (sqlite3.Error, OSError) as e:
            raise UsageError(
                f"the tool cache {str(self.path)!r} can't be used: {e}; name another file, or delete it"
            ) from e


def _alone(path: Path, work: Callable[[], T]) -> T:
    """Do `work` while nobody else opens or closes a cache of that folder."""
    folder = os.open(path.absolute().parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        deadline = time.monotonic() + BUSY_S
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.002)
        return work()
    finally:
        os.close(folder)


def _open(path: Path, mode: Mode) -> sqlite3.Connection:
    replay = mode == "replay"
    # rw of a file that can't be written is ro
    uri = f"{path.absolute().as_uri()}?mode={'rw' if replay else 'rwc'}"
    db = sqlite3.connect(uri, uri=True, timeout=BUSY_S, isolation_level=None)
    try:
        # the file is made whole or not at all
        db.execute("BEGIN")
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


def _close(path: Path, db: sqlite3.Connection) -> None:
    def close() -> None:
        db.execute("PRAGMA busy_timeout = 0")
        # refused while another process has the file open, which then does it when it leaves
        with contextlib.suppress(sqlite3.OperationalError):
            db.execute("PRAGMA journal_mode = DELETE")
        db.close()

    try:
        _alone(path, close)
    finally:
        db.close()
