"""A session's life after its fork: open, cells, the host's end of file."""

from __future__ import annotations

import os
import random
import socket
import sys
import threading

from .files import Brought, collect
from .frames import Frames
from .output import Output
from .repl import Repl
from .reserve import Reserve
from .tools import ToolCalls, define_tools


class Session:
    """Made before the fork: what is new after it touches memory that was shared, and a page costs as much as a call."""

    def __init__(self, socket_fd: int, output_fd: int, output_limit: int):
        self._output_fd = output_fd
        self._frames = Frames(socket_fd)
        self._output = Output(output_fd, output_limit)
        reserve = Reserve()
        self._calls = ToolCalls(self._frames, reserve)
        self._repl = Repl(self._output, self._calls, reserve)

    def serve(self, folder: str, brought: Brought) -> None:
        """Answer the host until it goes away. `folder` holds its files, of which `brought` came with the task."""
        frames, output, repl = self._frames, self._output, self._repl
        first = frames.recv()
        if first is None:
            return
        pid = self._calls.pid = os.getpid()
        repl.begin()
        define_tools(self._calls, first["tools"], repl.namespace)
        _seed(first["seed"])
        frames.send({"op": "ready"})
        while True:
            message = frames.recv()
            if message is None:
                return
            if message["op"] == "collect":
                limits = {name: message[name] for name in ("max_files", "max_bytes")}
                files = collect(folder, brought, self._output_fd, **limits)
                frames.send({"op": "files", "files": files})
                continue
            error = repl.run(message["n"], message["code"], message["timeout"])
            if os.getpid() != pid:
                # a child that the cell forked and that ran to its end: the socket is its parent's
                os._exit(0 if error is None else 1)
            frames.send_done(message["n"], error, output.dropped)


def _seed(seed: int) -> None:
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


def prepare(socket_fd: int, output_fd: int, output_limit: int) -> Session:
    """The session that all forks go on as.

    The whole path is run once before, by another: what it imports and compiles is then shared by all of them.
    """
    ours, theirs = socket.socketpair()
    file_fd = os.memfd_create("warm-up", os.MFD_CLOEXEC)
    saved = {fd: os.dup(fd) for fd in (1, 2)}
    main, stdout, stderr = sys.modules["__main__"], sys.stdout, sys.stderr
    host = Frames(ours.fileno())
    tool = {"name": "notes.add", "signature": "(text: str) -> str", "doc": "Add a note."}
    host.send({"op": "open", "seed": 0, "tools": [tool]})
    host.send({"op": "exec", "n": 1, "code": "x = [notes.add('a')]\nprint(x)\nx", "timeout": 60.0})
    host.send({"op": "ret", "id": 1, "val": "a"})
    host.send({"op": "exec", "n": 2, "code": "import json\njson.loads(nothing)", "timeout": 60.0})
    host.send({"op": "exec", "n": 3, "code": "1 +", "timeout": 60.0})
    ours.shutdown(socket.SHUT_WR)
    try:
        Session(theirs.fileno(), file_fd, 1024).serve(os.curdir, {})
        # with its standard output the kind of file it will be
        return Session(socket_fd, output_fd, output_limit)
    finally:
        for fd in (1, 2):
            os.dup2(saved[fd], fd)
            os.close(saved[fd])
        sys.modules["__main__"], sys.stdout, sys.stderr = main, stdout, stderr
        sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__
        os.close(file_fd)
        ours.close()
        theirs.close()
