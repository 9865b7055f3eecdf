"""Frames as the session sees them: u32 little-endian length, then that many bytes of JSON with an "op".

    host -> session    open{seed, tools}    exec{n, code, timeout}    ret{id, val | err{name, value}}
                       collect{max_files, max_bytes}
    session -> host    ready{}    call{id, name, args, kw}    done{n, err{name, value, traceback} | null, dropped}
                       files{files: [[name, size], ...]}, the contents in the output file

The host refuses a frame above `MAX_FRAME` and ends the session, so nothing that big may leave here.
"""

from __future__ import annotations

import json
import socket
import struct

MAX_FRAME = 128 * 1024
"""Longest JSON text the host takes [bytes]."""

_length = struct.Struct("<I")


class FrameTooLong(ValueError):
    """The message does not fit in a frame."""


def jsonable(value: object) -> object:
    """numpy's arrays and scalars as lists and numbers; sets as lists."""
    tolist = getattr(value, "tolist", None)
    if tolist is not None:
        return tolist()
    if isinstance(value, (set, frozenset)):
        return list(value)
    raise TypeError(f"{type(value).__name__} is not JSON-like")


# a lone surrogate has no UTF-8 form, and NaN no JSON form: the first becomes "?", the second is refused
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=jsonable).encode
_decode = json.JSONDecoder().decode


class Frames:
    """The session's end of its socket."""

    def __init__(self, sock: socket.socket):
        self._sock = sock
        self._send = sock.sendall
        self._recv = sock.recv

    def send(self, message: dict) -> None:
        body = _encode(message).encode("utf-8", "replace")
        if len(body) > MAX_FRAME:
            raise FrameTooLong(f"{len(body)} bytes, more than the {MAX_FRAME} that fit in a message")
        self._send(_length.pack(len(body)) + body)

    def recv(self) -> dict | None:
        """The next message; None once the host has gone."""
        head = self._exactly(4)
        if head is None:
            return None
        body = self._exactly(_length.unpack(head)[0])
        return None if body is None else _decode(body.decode("utf-8"))

    def _exactly(self, size: int) -> bytes | None:
        data = self._recv(size)
        if len(data) == size:
            return data
        parts = []
        while data:
            parts.append(data)
            size -= len(data)
            if size == 0:
                return b"".join(parts)
            data = self._recv(min(size, 1 << 20))
        return None
