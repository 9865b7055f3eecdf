"""What a child is doing, where its driver can see it even when the child can no longer say it: a page both have mapped.

    float64 due | uint64 given | uint16 length | text

The child writes: what it is at, and by when it will have written again. The driver looks when that time has passed, or
when the child has died; a child that was stopped or killed has left its last word there all the same. Writing takes a
microsecond and wakes nobody, so a sign can be given at every layer of a model.

Times are CLOCK_MONOTONIC, the same for all processes of a machine.
"""

import mmap
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

_HEAD = struct.Struct("@dQH")
"""Native: a number is written in one go, and never seen half written."""
_PAGE_BYTES = mmap.PAGESIZE
_TEXT_BYTES = 500


class Sign(NamedTuple):
    doing: str
    """Empty where there is none."""
    due: float
    """When the next is to be there [s, CLOCK_MONOTONIC]; 0: it did not say."""
    given: int
    """Signs since the page was cleared."""


class SignPage:
    """One child's page: it writes, its driver reads. Made by `sign_page`."""

    def __init__(self, fd: int):
        self.fd = fd
        self._map: Any = mmap.mmap(fd, _PAGE_BYTES)
        self._given = 0

    def give(self, doing: str, limit_s: float = 0.0) -> None:
        """Say what is done from now on.

        Args:
            limit_s: time until the next sign, at the latest; 0 promises nothing [s].
        """
        self._given += 1
        text = doing.encode()[:_TEXT_BYTES]
        due = time.monotonic() + limit_s if limit_s else 0.0
        self._map[_HEAD.size : _HEAD.size + len(text)] = text
        _HEAD.pack_into(self._map, 0, due, self._given, len(text))

    def clear(self) -> None:
        """What was asked for is done."""
        self._given = 0
        _HEAD.pack_into(self._map, 0, 0.0, 0, 0)

    def close(self) -> None:
        """Unmap it, which also closes a descriptor; the last sign stays readable."""
        page, self._map = self._map, bytes(self._map)
        page.close()

    def read(self) -> Sign:
        """The last sign. Of a child that is at work the text may be mixed with that of the one before."""
        due, given, length = _HEAD.unpack_from(self._map)
        text = self._map[_HEAD.size : _HEAD.size + length]
        return Sign(text.decode(errors="replace"), due, given)


@contextmanager
def sign_page(name: str) -> Iterator[SignPage]:
    """A page without a sign. Gone when the last process that maps it is."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, _PAGE_BYTES)
        page = SignPage(fd)
        try:
            yield page
        finally:
            page.close()
    finally:
        os.close(fd)
