"""Address space that cells can't have: what a session says once a cell has taken all the rest needs some.

Nobody touches it, so it costs no memory; and it is taken anew only after it was needed, so it costs a cell hardly any time.
"""

from __future__ import annotations

import mmap

RESERVE_BYTES = 16 << 20
"""To say something takes up to one of CPython's arenas, 1 MiB. What cells keep stays, so there have to be some [bytes]."""
_STEP_BYTES = 1 << 20
_CELL_BYTES = 512 << 10
"""What a cell gets of the last there is: it may want to let go of what others have kept [bytes]."""
_MESSAGE_BYTES = 16 << 10
"""A usual message, there and back, and what it takes to make one [bytes]."""


class Reserve:
    def __init__(self) -> None:
        self._kept: mmap.mmap | None = None
        self._size = 0
        self.take()

    def take(self) -> None:
        """Have all of it, or as much as there is."""
        if self._size == RESERVE_BYTES:
            return
        self.release()
        for size in range(RESERVE_BYTES, 0, -_STEP_BYTES):
            try:
                _map(size + _CELL_BYTES).close()
                self._kept, self._size = _map(size), size
                return
            except (OSError, MemoryError):
                # cells keep too much for that
                continue

    def release(self) -> None:
        if self._kept is not None:
            self._kept.close()
            self._kept, self._size = None, 0

    def check(self) -> None:
        """Release it where there is no memory left for a message."""
        try:
            bytes(_MESSAGE_BYTES)
        except MemoryError:
            self.release()


def _map(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0)
