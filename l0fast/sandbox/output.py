"""What a cell printed, from the file it printed into to the text that is shown."""

import fcntl
import os

from l0fast.errors import SandboxError

_FIRST = b"\0"
"""What a file that has only been made longer holds."""


class OutputFile:
    """A memfd for one session's output, in append mode: its processes need no agreement about positions.

    Its first byte is no output. With it the file is never empty and keeps its first page: to free that page and take
    another for the next cell's few lines costs as much as to write and read them.
    """

    def __init__(self) -> None:
        self.fd = os.memfd_create("output", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        # or a session could seal it against being emptied, where vm.memfd_noexec lets every such file be sealed
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL)
        fcntl.fcntl(self.fd, fcntl.F_SETFL, os.O_APPEND)
        os.ftruncate(self.fd, 1)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def take_bytes(self, limit_bytes: int) -> bytes:
        """Read and empty it: its first `limit_bytes`."""
        if self.fd < 0:
            raise SandboxError("the session has been closed")
        data = os.pread(self.fd, limit_bytes, 1)
        self._empty(0)
        return data

    def take(self, limit_bytes: int, dropped_bytes: int) -> str:
        """Read and empty it: all, or the first and last `limit_bytes / 2` with a line that says what is missing.

        `dropped_bytes` are missing from its middle already. Bytes that are no UTF-8 become U+FFFD.
        """
        if self.fd < 0:
            raise SandboxError("the session has been closed")
        # most often this is all, and asking for its size is spared
        data = os.pread(self.fd, limit_bytes + 2, 0)
        if data == _FIRST:
            return ""
        # not there where a cell has opened /dev/stdout as it would a file, which cuts it to nothing
        start = int(data.startswith(_FIRST))
        size = len(data) - start
        if not size or (size <= limit_bytes and not dropped_bytes):
            text = data[start:].decode("utf-8", "replace")
        else:
            # what still runs there may cut the file meanwhile
            half, size = limit_bytes // 2, max(0, os.fstat(self.fd).st_size - start)
            head = os.pread(self.fd, min(half, size), start)
            tail = os.pread(self.fd, min(half, size - len(head)), start + max(len(head), size - half))
            missing = size - len(head) - len(tail) + dropped_bytes
            text = f"{_whole(head)}\n[... {missing} bytes cut ...]\n{_whole(tail)}"
        self._empty(start)
        return text

    def _empty(self, start: int) -> None:
        if not start:
            os.ftruncate(self.fd, 0)
        os.ftruncate(self.fd, 1)


def _whole(data: bytes) -> str:
    """Decode; a character cut in half at either edge is left out, not shown broken."""
    start = 0
    while start < min(3, len(data)) and data[start] & 0xC0 == 0x80:
        start += 1
    end = len(data)
    for back in range(1, min(4, end) + 1):
        byte = data[end - back]
        if byte & 0xC0 == 0xC0:
            wanted = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            if back < wanted:
                end -= back
            break
        if byte < 0x80:
            break
    return data[start:end].decode("utf-8", "replace")
