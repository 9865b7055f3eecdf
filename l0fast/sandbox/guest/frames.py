"""Frames as the session sees them: u32 little-endian length, then that many bytes of JSON with an "op".

    host -> session    open{seed, tools}    exec{n, code, timeout}    ret{id, val | err{name, value}}
                       collect{max_files, max_bytes}
    session -> host    ready{}    call{id, name, args, kw}    done{n, err{name, value, traceback} | null, dropped}
                       files{files: [[name, size], ...]}, the contents in the output file

The host refuses a frame above `MAX_FRAME` and ends the session, so nothing that big may leave here.
"""

from __future__ import annotations

import json
import os
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
# without the look for white space at either end that `decode` takes, which is as long as all the rest
_decode = json.JSONDecoder().raw_decode
_RECV_BYTES = 4096
"""Asked for at once: head and body of nearly every frame."""


class Frames:
    """The session's end of its socket, a blocking one, by its descriptor."""

    def __init__(self, fd: int):
        self._fd = fd
        self._rest = b""
        """Received, and of the frame after the last."""

    def send(self, message: dict) -> None:
        body = _encode(message).encode("utf-8", "replace")
        if len(body) > MAX_FRAME:
            raise FrameTooLong(f"{len(body)} bytes, more than the {MAX_FRAME} that fit in a message")
        self._write(_length.pack(len(body)) + body)

    def send_done(self, n: int, error: dict | None, dropped: int) -> None:
        """The end of cell `n`. The host knows the usual one by its bytes, which is why they are written here."""
        if error is None:
            body = b'{"op":"done","n":%d,"err":null,"dropped":%d}' % (n, dropped)
            self._write(_length.pack(len(body)) + body)
        else:
            self.send({"op": "done", "n": n, "err": error, "dropped": dropped})

    def recv(self) -> dict | None:
        """The next message; None once the host has gone."""
        data = self._rest or os.read(self._fd, _RECV_BYTES)
        end = 4
        while len(data) < end or len(data) < (end := 4 + _length.unpack_from(data)[0]):
            more = data and os.read(self._fd, max(_RECV_BYTES, min(end - len(data), 1 << 20)))
            if not more:
                return None
            data += more
        self._rest = data[end:]
        return _decode(data[4:end].decode("utf-8"))[0]

    def _write(self, data: bytes) -> None:
        sent = os.write(self._fd, data)
        # a signal between two pieces may end a write early
        while sent < len(data):
            sent += os.write(self._fd, data[sent:])
