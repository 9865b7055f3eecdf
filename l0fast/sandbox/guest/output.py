"""stdout and stderr of a session: one file, in order, whose middle is dropped once it is long.

The file is a memfd that the host made. The host reads it after each cell, from the second byte on: the first keeps the
file's page. Descriptors 1 and 2 are it, so subprocesses write there too; it is in append mode, so writers need no
agreement. Python's own writes pass through `BoundedFile`, which cuts the file's middle whenever it outgrows four limits;
subprocesses that flood it meet RLIMIT_FSIZE instead.
"""

from __future__ import annotations

import errno
import io
import os
import sys


class BoundedFile(io.FileIO):
    """Writes to descriptor `fd`; keeps the first and last `limit / 2` bytes of `file_fd`, the file behind it."""

    def __init__(self, fd: int, file_fd: int, limit: int):
        super().__init__(fd, "w", closefd=False)
        self._file_fd = file_fd
        self._half = limit // 2
        self._unchecked = 0
        self.dropped = 0
        """Bytes cut from the middle since the host emptied the file [bytes]."""

    def close(self) -> None:
        """Nothing: a cell that says `sys.stdout.close()` must not take the output of the next ones with it."""

    def write(self, data, fd: int | None = None) -> int:
        """To descriptor `fd`, where it is not this file's own."""
        # what a TextIOWrapper hands over is bytes; others may hand over any buffer
        data = data if isinstance(data, bytes) else bytes(data)
        size = len(data)
        if size > 2 * self._half:
            self._write_all(data[: self._half], fd)
            self._write_all(data[size - self._half :], fd)
            self.dropped += size - 2 * self._half
        else:
            self._write_all(data, fd)
        # others write there too, so its size has to be asked for; but not at every print
        self._unchecked += size
        if self._unchecked > 2 * self._half:
            self._unchecked = 0
            self._compact()
        return size

    def _write_all(self, data, fd: int | None) -> None:
        while data:
            try:
                data = data[super().write(data) if fd is None else os.write(fd, data) :]
            except OSError as e:
                # RLIMIT_FSIZE, reached by a subprocess: make room
                if e.errno != errno.EFBIG or not self._compact():
                    raise

    def _compact(self) -> bool:
        """Cut the middle out of the file if it has grown enough to be worth it."""
        size = os.fstat(self._file_fd).st_size
        if size <= 8 * self._half:
            return False
        tail = os.pread(self._file_fd, self._half, size - self._half)
        os.ftruncate(self._file_fd, self._half)
        os.write(self._file_fd, tail)
        self.dropped += size - self._half - len(tail)
        return True


class _Text(io.TextIOWrapper):
    """Knows whether it still is what `_text` made it."""

    changed = False

    def detach(self):
        self.changed = True
        return super().detach()

    def reconfigure(self, **settings) -> None:
        self.changed = True
        super().reconfigure(**settings)


class Output:
    """The session's standard streams, put back in place before every cell."""

    def __init__(self, file_fd: int, limit: int):
        self._file_fd = file_fd
        self._file = BoundedFile(1, file_fd, limit)
        # the same file, so the order of prints stays
        self._stdout, self._stderr = _text(self._file), _text(self._file)

    def reset(self) -> None:
        """Descriptors 1 and 2, `sys.stdout` and `sys.stderr`, whatever the last cell did to them."""
        for fd in (1, 2):
            os.dup2(self._file_fd, fd, inheritable=True)
        self._file.dropped = 0
        if self._stdout.changed:
            self._stdout = _text(self._file)
        if self._stderr.changed:
            self._stderr = _text(self._file)
        sys.stdout, sys.stderr = self._stdout, self._stderr

    @property
    def dropped(self) -> int:
        return self._file.dropped

    def write(self, text: str) -> None:
        """Past anything the cell did to `sys.stdout` and to descriptor 1."""
        self._file.write(text.encode("utf-8", "backslashreplace"), self._file_fd)


def _text(file: io.FileIO) -> _Text:
    return _Text(file, encoding="utf-8", errors="backslashreplace", newline="\n", write_through=True)  # type: ignore[arg-type]
