"""The host's tools as Python functions.

A stub has the name, signature and docstring that the host sent, checks its arguments against the signature as any
function would, and asks the host. The host's answer is a value, or the name and text of an exception to raise.
One call is under way at a time; threads wait for each other. A call outside a running cell, or from a forked child, is
refused here, because the host would end the session for it.
"""

from __future__ import annotations

import builtins
import functools
import os
import threading
import types
from collections.abc import Callable
from typing import Any

from .frames import Frames, FrameTooLong
from .reserve import Reserve


class Timeout(BaseException):
    """The cell ran out of time. Not an `Exception`, so that a bare retry loop lets it through."""


class ToolError(Exception):
    """A tool could not answer."""


# a reader of tracebacks should see "ToolError", not where it was defined
Timeout.__module__ = ToolError.__module__ = "__main__"
_errors: dict[str, type[BaseException]] = {"Timeout": Timeout, "ToolError": ToolError}


def error_class(name: str) -> type[BaseException]:
    """The exception class of that name: ours, a builtin, or one made for it."""
    known = _errors.get(name) or getattr(builtins, name, None)
    if isinstance(known, type) and issubclass(known, BaseException):
        return known
    made = _errors[name] = type(name, (Exception,), {"__module__": "__main__"})
    return made


class ToolCalls:
    """The RPC: at most one `call` on its way, only while a cell runs."""

    def __init__(self, frames: Frames, reserve: Reserve):
        self._frames = frames
        self._reserve = reserve
        self._lock = threading.Lock()
        self.pid = os.getpid()
        """Of the session."""
        self._next_id = 0
        self._running = False
        self.waiting = False
        """True while the main thread waits for the host, which keeps the cell's time meanwhile."""

    def begin(self) -> None:
        self._running = True

    def end(self) -> None:
        """No call after this; waits for the answer to one that a thread has under way."""
        with self._lock:
            self._running = False

    def call(self, name: str, args: tuple, kw: dict) -> Any:
        if os.getpid() != self.pid:
            raise RuntimeError(f"{name}() can't be called from a child process: call it in the session itself")
        in_main = threading.current_thread() is threading.main_thread()
        if in_main:
            self.waiting = True
        try:
            with self._lock:
                answer = self._ask(name, args, kw)
        finally:
            if in_main:
                self.waiting = False
        error = answer.get("err")
        if error is not None:
            raise error_class(error["name"])(error["value"])
        return answer["val"]

    def _ask(self, name: str, args: tuple, kw: dict) -> dict:
        if not self._running:
            raise RuntimeError(f"{name}() was called after its cell had ended")
        # a call that has been sent must be able to take its answer
        self._reserve.check()
        try:
            self._frames.send({"op": "call", "id": self._next_id + 1, "name": name, "args": args, "kw": kw})
        except FrameTooLong as e:
            raise ValueError(f"{name}() takes shorter arguments: {e}") from None
        except (TypeError, ValueError, RecursionError) as e:
            raise TypeError(f"{name}() takes strings, numbers, booleans, None, lists and dicts: {e}") from None
        self._next_id += 1
        answer = self._frames.recv()
        if answer is None:
            # the host has gone: nothing left to answer to
            os._exit(0)
        return answer


def make_stub(calls: ToolCalls, name: str, signature: str, doc: str) -> Callable:
    short = name.rpartition(".")[2]
    scope: dict[str, Any] = {}
    # a real function of that signature: its arguments are checked by Python, in Python's words
    exec(f"from __future__ import annotations\ndef {short}{signature}:\n    pass\n", scope)
    check = scope[short]
    check.__doc__ = doc
    check.__module__ = "__main__"
    check.__qualname__ = name

    @functools.wraps(check)
    def stub(*args, **kw):
        check(*args, **kw)
        return calls.call(name, args, kw)

    return stub


class _Namespace:
    def __repr__(self) -> str:
        names = ", ".join(n for n in vars(type(self)) if not n.startswith("_"))
        return f"<{type(self).__name__}: {names}>"


def define_tools(calls: ToolCalls, specs: list[dict], namespace: dict[str, Any]) -> None:
    """Put every tool into `namespace`; "a.b" becomes a method of an object `a`."""
    objects: dict[str, dict[str, Any]] = {}
    for spec in specs:
        stub = make_stub(calls, spec["name"], spec["signature"], spec["doc"])
        owner, _, method = spec["name"].rpartition(".")
        if owner:
            objects.setdefault(owner, {})[method] = staticmethod(stub)
        else:
            namespace[method] = stub
    for owner, methods in objects.items():
        namespace[owner] = types.new_class(owner, (_Namespace,), {}, lambda body, m=methods: body.update(m))()
    namespace["ToolError"] = ToolError
