"""The host's end of a session: bytes -> frames -> a strict state machine -> the coroutine that waits.

    STARTING -ready-> IDLE -exec-> RUNNING -call-> CALLING -ret-> RUNNING -done-> IDLE          anything else -> LOST
                      IDLE -collect-> COLLECTING -files-> IDLE

`FrameParser` and `SessionState` are pure. `Channel` is the asyncio Protocol around them: a session may say one thing at
a time, so one future is all that ever waits, and every way to lose a session resolves it with SandboxError.
A session is not trusted: what it sends is bounded (128 KiB a frame, one frame per answer), typed, and only ever its
own words.

A cell takes tens of microseconds on either side of the socket, so this path is kept short: no timer a cell, but one that
is left to go off and then looks when the cell that runs now is due; and the answer that nearly every cell ends with is
known before it comes, so it is compared rather than parsed.
"""

import asyncio
import enum
import json
import math
import re
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import orjson

from l0fast.errors import SandboxError

MAX_FRAME = 128 * 1024
"""Longest JSON text taken from a session [bytes]."""
MAX_DEPTH = 500
"""Lists and objects of a frame that lie in each other: what is made of them here recurses, and Python lets it a thousand
times in all [levels]."""

_length = struct.Struct("<I")
_LONG_NUMBER = re.compile(rb"\d{19}")
"""Perhaps an integer beyond 64 bits."""


class ProtocolError(SandboxError):
    """A session said something it must not; it has been ended for it."""


class FrameParser:
    """Cuts a byte stream into frames. Holds at most one frame and what one `feed` brought."""

    def __init__(self, max_frame: int = MAX_FRAME):
        self._max_frame = max_frame
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The frames that `data` completes. Raises ProtocolError; the parser is of no use after that."""
        buffer = self._buffer
        if not buffer and len(data) >= 4 and len(data) - 4 == (size := _length.unpack_from(data)[0]) <= self._max_frame:
            # nearly always: just one, and all of it
            return [_decode(data[4:])]
        buffer += data
        frames = []
        start = 0
        while len(buffer) - start >= 4:
            (size,) = _length.unpack_from(buffer, start)
            if size > self._max_frame:
                raise ProtocolError(f"the session announced a frame of {size} bytes, more than {self._max_frame}")
            end = start + 4 + size
            if len(buffer) < end:
                break
            frames.append(_decode(bytes(buffer[start + 4 : end])))
            start = end
        del buffer[:start]
        return frames

    @property
    def held_bytes(self) -> int:
        return len(self._buffer)


def _decode(body: bytes) -> dict[str, Any]:
    try:
        frame = _with_all_digits(body) if _LONG_NUMBER.search(body) else orjson.loads(body)
    except (ValueError, RecursionError) as e:
        raise ProtocolError(f"the session sent a frame that is no JSON: {e}") from e
    if not isinstance(frame, dict):
        raise ProtocolError(f"the session sent a JSON {type(frame).__name__}, where a frame is an object")
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _depth(frame) > MAX_DEPTH:
        raise ProtocolError(f"the session sent a frame of more than {MAX_DEPTH} levels")
    return frame


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level := [v for v in level if isinstance(v, list | dict)]:
        depth += 1
        level = [inner for v in level for inner in (v.values() if isinstance(v, dict) else v)]
    return depth


def _with_all_digits(body: bytes) -> Any:
    """orjson makes floats of integers beyond 64 bits. All else is refused that it refuses. Raises ValueError, RecursionError."""
    frame = json.loads(body.decode())
    # no infinity, no half of a surrogate pair
    json.dumps(frame, allow_nan=False, ensure_ascii=False).encode()
    return frame


def encode(message: dict[str, Any]) -> bytes:
    """A frame for the session. Raises TypeError where a value isn't JSON-like."""
    body = orjson.dumps(message)
    return _length.pack(len(body)) + body


def usual_end(cell: int) -> bytes:
    """What a session sends at the end of nearly every cell, byte for byte: see `send_done` in guest/frames.py."""
    body = b'{"op":"done","n":%d,"err":null,"dropped":0}' % cell
    return _length.pack(len(body)) + body


@dataclass(frozen=True, slots=True)
class Ready:
    pass


@dataclass(frozen=True, slots=True)
class Call:
    id: int
    name: str
    args: list[Any]
    kw: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Done:
    error: tuple[str, str, str] | None
    """Exception class, text, traceback."""
    dropped: int
    """Bytes the session itself cut from the middle of its output [bytes]."""


@dataclass(frozen=True, slots=True)
class Files:
    files: list[tuple[str, int]]
    """Name and size [bytes]; their contents follow each other in the output file."""


Event = Ready | Call | Done | Files


class State(enum.Enum):
    STARTING = "starting"
    IDLE = "idle"
    RUNNING = "running"
    CALLING = "calling"
    COLLECTING = "collecting"
    LOST = "lost"


# on the path of every cell, where Python 3.11 spends as long on a look into the class as on the rest of the line
_IDLE, _RUNNING, _CALLING = State.IDLE, State.RUNNING, State.CALLING
_USUAL_END = Done(None, 0)


class SessionState:
    """Which frame may come next."""

    def __init__(self) -> None:
        self.state = State.STARTING
        self.cell = 0
        self._call_id = 0

    def start_cell(self) -> int:
        assert self.state is _IDLE, f"a cell can't start while the session is {self.state.value}"
        self.state = _RUNNING
        self.cell += 1
        return self.cell

    def end_cell(self) -> Done:
        """The same as to have received `usual_end`."""
        assert self.state is _RUNNING
        self.state = _IDLE
        return _USUAL_END

    def start_collecting(self) -> None:
        assert self.state is State.IDLE, f"files can't be collected while the session is {self.state.value}"
        self.state = State.COLLECTING

    def answer_call(self) -> None:
        assert self.state is State.CALLING, f"nothing to answer while the session is {self.state.value}"
        self.state = State.RUNNING

    def received(self, frame: dict[str, Any]) -> Event:
        """The frame's meaning. Raises ProtocolError where it may not come now, or isn't well formed."""
        if self.state is State.RUNNING:
            event = self._while_running(frame)
        else:
            event = self._otherwise(frame)
        if event is None:
            op = frame.get("op")
            raise ProtocolError(f"the session sent {str(op)[:40]!r} while {self.state.value}, or sent it malformed")
        return event

    def _while_running(self, frame: dict[str, Any]) -> Event | None:
        match frame:
            case {"op": "done", "n": n, "err": err, "dropped": dropped} if (
                _is_count(n) and n == self.cell and _is_count(dropped)
            ):
                match err:
                    case None:
                        self.state = State.IDLE
                        return Done(None, dropped)
                    case {"name": str(name), "value": str(value), "traceback": str(traceback)}:
                        self.state = State.IDLE
                        return Done((name, value, traceback), dropped)
            case {"op": "call", "id": id_, "name": str(name), "args": list(args), "kw": dict(kw)} if _is_count(id_):
                self._call_id += 1
                if id_ != self._call_id:
                    raise ProtocolError(f"the session made call {id_} where call {self._call_id} was next")
                self.state = State.CALLING
                return Call(id_, name, args, kw)
        return None

    def _otherwise(self, frame: dict[str, Any]) -> Event | None:
        match self.state, frame:
            case State.STARTING, {"op": "ready"}:
                self.state = State.IDLE
                return Ready()
            case State.COLLECTING, {"op": "files", "files": list(files)} if all(map(_is_file, files)):
                self.state = State.IDLE
                return Files([(name, size) for name, size in files])
        return None


def _is_file(value: object) -> bool:
    match value:
        case [str(name), size] if _is_count(size):
            # a name that leads elsewhere must never reach whoever writes these files down
            return all(part not in ("", ".", "..") and "\0" not in part for part in name.split("/"))
    return False


def _is_count(value: object) -> bool:
    # True is an int to isinstance, and equal to 1
    return type(value) is int and value >= 0


class Channel(asyncio.Protocol):
    """One session's frames. What is sent is answered by the one event that may follow, or the session is lost."""

    def __init__(self, sock: socket.socket) -> None:
        """
        Args:
            sock: the one that this is the protocol of, not blocking. Its transport reads it and closes it.
        """
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._due = self._goes_off = math.inf
        self._late: Callable[[], str] = str
        self._timer: asyncio.TimerHandle | None = None
        self._parser = FrameParser()
        self._machine = SessionState()
        self._usual_end = b""
        self._transport: asyncio.Transport | None = None
        self._next: asyncio.Future[Event] | None = None
        self._lost: SandboxError | None = None

    @property
    def state(self) -> State:
        return State.LOST if self._lost is not None else self._machine.state

    @property
    def busy(self) -> bool:
        """Whether a cell runs."""
        return self._lost is None and self._machine.state in (_RUNNING, _CALLING)

    def open(self, tools: list[dict[str, str]], seed: int) -> "asyncio.Future[Event]":
        return self._send(encode({"op": "open", "seed": seed, "tools": tools}))

    def execute(self, code: str, timeout_s: float) -> "asyncio.Future[Event]":
        if self._lost is not None:
            raise self._lost
        n = self._machine.start_cell()
        self._usual_end = usual_end(n)
        return self._send(encode({"op": "exec", "n": n, "code": code, "timeout": timeout_s}))

    def collect(self, max_files: int, max_bytes: int) -> "asyncio.Future[Event]":
        self.check()
        self._machine.start_collecting()
        return self._send(encode({"op": "collect", "max_files": max_files, "max_bytes": max_bytes}))

    def lose_at(self, due: float, late: Callable[[], str]) -> None:
        """Lose the session for a cell, or for files, that it is still at when the loop's clock says `due`.

        Until the next `lose_at`. While the host runs a tool for it nothing is lost.
        """
        self._due, self._late = due, late
        if self._timer is None or due < self._goes_off:
            self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._goes_off = self._due
        self._timer = self._loop.call_at(self._due, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        if self.state in (State.IDLE, State.LOST):
            return
        if self._loop.time() < self._due:
            # it was set for a cell that has ended
            self._set_timer()
        elif self.state is not State.CALLING:
            self.lose(SandboxError(f"the session was ended: {self._late()}"))

    def answer(self, id: int, *, value: Any = None, error: tuple[str, str] | None = None) -> "asyncio.Future[Event]":
        self.check()
        message: dict[str, Any] = {"op": "ret", "id": id}
        if error is None:
            message["val"] = value
        else:
            message["err"] = {"name": error[0], "value": error[1]}
        data = encode(message)
        self._machine.answer_call()
        return self._send(data)

    def lose(self, error: SandboxError) -> None:
        """The session is gone: whoever waits, and whoever asks later, gets `error`. The first cause stays."""
        if self._lost is None:
            self._lost = error
            if self._next is not None and not self._next.done():
                self._next.set_exception(error)
                # nobody waits any more where the asking coroutine was cancelled
                self._next.exception()
            if self._transport is not None:
                self._transport.abort()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            # it holds the session, which holds this and the episode: a cycle that nobody would collect for long
            self._late = str

    def _send(self, data: bytes) -> "asyncio.Future[Event]":
        if self._lost is not None:
            raise self._lost
        assert self._transport is not None
        self._next = future = self._loop.create_future()
        if not self._transport.get_write_buffer_size():
            # now: the transport would do it when the loop has looked at all other sockets once more
            try:
                data = data[self._sock.send(data) :]
            except OSError:
                # full, or closed at the other end: the transport waits for the one and finds the other out by itself
                pass
        if data:
            self._transport.write(data)
        return future

    def check(self) -> None:
        """Raise what the session was lost to, if it was."""
        if self._lost is not None:
            raise self._lost

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no asyncio.Transport by class, only in what they do
        self._transport = cast(asyncio.Transport, transport)
        if self._lost is not None:
            # when there was nothing yet to abort
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._lost is not None:
            return
        try:
            if data == self._usual_end and self._machine.state is _RUNNING and not self._parser.held_bytes:
                # parsed it would mean this
                self._tell(self._machine.end_cell())
            else:
                for frame in self._parser.feed(data):
                    self._tell(self._machine.received(frame))
        except ProtocolError as e:
            self.lose(e)

    def _tell(self, event: Event) -> None:
        assert self._next is not None
        if not self._next.done():
            self._next.set_result(event)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lose(SandboxError("the session ended by itself: its process exited or closed its socket"))
