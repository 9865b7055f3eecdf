"""What a cell printed, from the file it printed into to the text that is shown."""

import fcntl
import os

from l0fast.errors import SandboxError


class OutputFile:
    """A memfd for one session's output, in append mode: its processes need no agreement about positions."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("output", os.MFD_CLOEXEC)
        fcntl.fcntl(self.fd, fcntl.F_SETFL, os.O_APPEND)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def take_bytes(self, limit_bytes: int) -> bytes:
        """Read and empty it: its first `limit_bytes`."""
        if self.fd < 0:
            raise SandboxError("the session has been closed")
        data = os.pread(self.fd, limit_bytes, 0)
        os.ftruncate(self.fd, 0)
        return data

    def take(self, limit_bytes: int, dropped_bytes: int) -> str:
        """Read and empty it: all, or the first and last `limit_bytes / 2` with a line that says what is missing.

        `dropped_bytes` are missing from its middle already. Bytes that are no UTF-8 become U+FFFD.
        """
        if self.fd < 0:
            raise SandboxError("the session has been closed")
        # most often this is all, and asking for its size is spared
        data = os.pread(self.fd, limit_bytes + 1, 0)
        if not data:
            return ""
        if len(data) <= limit_bytes and not dropped_bytes:
            text = data.decode("utf-8", "replace")
        else:
            half, size = limit_bytes // 2, os.fstat(self.fd).st_size
            head = os.pread(self.fd, min(half, size), 0)
            tail = os.pread(self.fd, min(half, size - len(head)), max(len(head), size - half))
            missing = size - len(head) - len(tail) + dropped_bytes
            text = f"{_whole(head)}\n[... {missing} bytes cut ...]\n{_whole(tail)}"
        os.ftruncate(self.fd, 0)
        return text


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
