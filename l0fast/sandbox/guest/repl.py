"""What a cell means.

    code -> ast -> statements run in __main__ -> the last expression's repr, also bound to `_`
                        |- an exception -> its traceback, the cell's own lines only, printed and returned
                        '- time is up  -> Timeout raised inside the cell, and again until it gives in

Tracebacks are short and say the same on every machine: no frames of this program, no addresses, no host paths, no
column marks (they differ between Python versions; so do what Python suggests, from 3.12 on, and its warnings).
"""

from __future__ import annotations

# signal.signal spends longer on enums than a small cell takes
import _signal  # type: ignore[import-not-found]
import ast
import io
import keyword
import linecache
import os
import signal
import sys
import threading
import traceback
import types
from typing import Any

from .output import Output
from .reserve import Reserve
from .tools import Timeout, ToolCalls

GUEST_DIR = os.path.dirname(os.path.abspath(__file__)) + os.sep
MAX_TRACEBACK = 8 * 1024
"""Longest traceback shown [characters]."""
MAX_FRAMES = 12
"""Frames of one exception shown; deeper ones lose their middle [frames]."""
MAX_CHAIN = 3
"""Exceptions shown of a chain of causes."""
TIMER_REPEAT_S = 0.2
"""A cell that swallowed its Timeout gets the next one this much later [s]."""

_NO_MEMORY = {"name": "MemoryError", "value": "", "traceback": "MemoryError\n"}
_STATEMENTS = frozenset(keyword.kwlist) - {"None", "True", "False", "await", "lambda", "not"}
"""Words that begin one, and those that begin nothing."""


class Repl:
    def __init__(self, output: Output, calls: ToolCalls, reserve: Reserve):
        self._output = output
        self._calls = calls
        self._reserve = reserve
        self._armed = False
        self._timeout = 0.0
        self._main = types.ModuleType("__main__")
        self.namespace: dict[str, Any] = self._main.__dict__

    def begin(self) -> None:
        """This process is the session now."""
        sys.modules["__main__"] = self._main
        # errors that Python reports by itself, in the same form as a cell's own
        sys.unraisablehook = lambda e: self._report("Exception ignored", e.exc_value)
        threading.excepthook = lambda e: self._report("Exception in a thread", e.exc_value)

    def run(self, n: int, code: str, timeout: float) -> dict | None:
        """Run one cell; None, or its error as {name, value, traceback}."""
        self._reserve.take()
        self._output.reset()
        _signal.signal(signal.SIGALRM, self._on_alarm)
        self._timeout = timeout
        self._calls.begin()
        error: BaseException | None = None
        try:
            self._run_in_time(f"<cell {n}>", code)
        except BaseException as e:  # noqa: BLE001 - whatever a cell raises is its result, SystemExit too
            self._armed = False
            error = e
        finally:
            self._reserve.check()
            # a thread may still wait for a tool: its answer must come before the cell can end
            self._calls.end()
            signal.setitimer(signal.ITIMER_REAL, 0)
        if error is None:
            return None
        if isinstance(error, MemoryError):
            self._reserve.release()
        told = self._tell(error)
        # frames hold the cell's locals, and the traceback would keep them alive
        error.__traceback__ = None
        return told

    def _run_in_time(self, filename: str, code: str) -> None:
        # A short function, because CPython until 3.13 makes an int of the instruction's number when it raises anew. Those
        # above 256 take memory, and where there is none it tries for ever, deaf to signals.
        try:
            self._armed = True
            signal.setitimer(signal.ITIMER_REAL, self._timeout, TIMER_REPEAT_S)
            self._run(filename, code)
        finally:
            self._armed = False

    def _tell(self, error: BaseException) -> dict:
        name, value = "BaseException", ""
        try:
            try:
                value = _safe_str(error)[:4096]
                name = type(error).__name__[:256]
                shown = format_error(error)
            except MemoryError:
                raise
            except BaseException:  # noqa: BLE001 - what is asked is the cell's to change: the error, sys.path, imports
                shown = f"{name}: {value}\n"
            self._output.write(shown)
        except MemoryError:
            # not even with the reserve: what needs none is said, and not shown
            self._reserve.release()
            return _NO_MEMORY
        return {"name": name, "value": value, "traceback": shown}

    def _run(self, filename: str, code: str) -> None:
        # as Python counts them: `splitlines` knows more ends of a line
        lines = list(io.StringIO(code, None))
        if lines and not lines[-1].endswith("\n"):
            lines[-1] += "\n"
        linecache.cache[filename] = (len(code), None, lines, filename)
        body, last = _compile(code, filename)
        if body is not None:
            exec(body, self.namespace)
        if last is not None:
            value = eval(last, self.namespace)
            if value is not None:
                self.namespace["_"] = value
                self._output.write(repr(value) + "\n")

    def _report(self, what: str, error: BaseException | None) -> None:
        if error is not None and not isinstance(error, SystemExit):
            self._output.write(f"{what}: {format_error(error)}")

    def _on_alarm(self, signum: int, frame: object) -> None:
        if self._armed and not self._calls.waiting:
            raise Timeout(f"the cell ran longer than {self._timeout:g} s")


def _compile(code: str, filename: str) -> tuple[types.CodeType | None, types.CodeType | None]:
    """What is run, and the last expression, whose value is shown."""
    if _may_be_an_expression(code):
        try:
            return None, compile(code, filename, "eval", dont_inherit=True)
        except SyntaxError:
            # a statement after all, or an error, which is said below
            pass
    tree = ast.parse(code, filename)
    tail = tree.body[-1] if tree.body else None
    last = None
    if isinstance(tail, ast.Expr):
        tree.body.pop()
        last = ast.Expression(tail.value)
    # all of a cell is compiled before any of it runs
    body = compile(tree, filename, "exec", dont_inherit=True) if tree.body else None
    return body, last and compile(last, filename, "eval", dont_inherit=True)


def _may_be_an_expression(code: str) -> bool:
    """One line that does not look like a statement. To compile it as it is takes half as long as by way of its tree."""
    if "\n" in code or ";" in code or code[:1].isspace():
        return False
    head = code.partition("(")[0]
    return "=" not in head and head.partition(" ")[0] not in _STATEMENTS


def format_error(error: BaseException) -> str:
    """The traceback, oldest cause first."""
    chain = []
    link: BaseException | None = error
    joint = ""
    while link is not None and len(chain) < MAX_CHAIN:
        chain.append(_format_one(link) + joint)
        if link.__cause__ is not None:
            joint = "\nThe above exception was the direct cause of the following exception:\n\n"
            link = link.__cause__
        elif link.__context__ is not None and not link.__suppress_context__ and not isinstance(error, Timeout):
            joint = "\nDuring handling of the above exception, another exception occurred:\n\n"
            link = link.__context__
        else:
            break
    text = "".join(reversed(chain))
    if len(text) > MAX_TRACEBACK:
        half = MAX_TRACEBACK // 2
        text = f"{text[:half]}\n[... {len(text) - 2 * half} characters cut ...]\n{text[-half:]}"
    return text


def _format_one(error: BaseException) -> str:
    frames = []
    for frame, lineno in traceback.walk_tb(error.__traceback__):
        name = frame.f_code.co_filename
        # what called the cell (this program, or the parser) is not its business, nor is the inside of a tool's stub
        if name.startswith(GUEST_DIR) or not (frames or name.startswith("<cell ")):
            continue
        line = linecache.getline(name, lineno).strip()
        where = f'  File "{_short(name)}", line {lineno}, in {frame.f_code.co_name}\n'
        frames.append(where + (f"    {line}\n" if line else ""))
    if len(frames) > MAX_FRAMES:
        half = MAX_FRAMES // 2
        frames[half:-half] = [f"  [... {len(frames) - 2 * half} frames cut ...]\n"]
    head = ["Traceback (most recent call last):\n"] if frames else []
    try:
        last = traceback.format_exception_only(type(error), error)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - a SyntaxError is whatever its cell made it of
        last = [f"{type(error).__name__}: {_safe_str(error)}\n"]
    return "".join(head + frames + last)


def _short(filename: str) -> str:
    """A library's file by its name below sys.path."""
    # a cell may have put a Path there, over which imports pass
    for folder in filter(None, map(str, sys.path)):
        if filename.startswith(folder + os.sep):
            return filename[len(folder) + 1 :]
    return filename if filename.startswith("<") else os.path.basename(filename)


def _safe_str(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as e:  # noqa: BLE001 - the cell's own __str__ may raise anything
        return f"<str() of this exception raised {type(e).__name__}>"
