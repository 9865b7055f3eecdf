"""Files a task brings along: opened by the host, passed as descriptors, copied by the session into its own folder.

A session never sees a path of this machine, and what it does to its copy (it may remove it, or put another in its place)
nobody else sees.
"""

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import orjson

from l0fast.errors import UsageError

MAX_FILES = 32
"""Of one task [files]."""
MAX_NAME_BYTES = 1000
"""Of one name as JSON, where a control character is six; all of a task's go to the zygote in one message [bytes]."""
MAX_BYTES = 8 << 20
"""Of all files of one task: as much as a session's share of the disk [bytes]."""


@contextmanager
def opened(files: Mapping[str, str]) -> Iterator[tuple[list[str], list[int]]]:
    """Their names, and descriptors to pass on while the block runs.

    Raises UsageError where a name leads out of the folder, a file can't be read, or they are too many, and OSError where
    this process has no descriptor left for them.
    """
    if len(files) > MAX_FILES:
        raise UsageError(f"a task brings {len(files)} files and at most {MAX_FILES} are allowed: pack them into one")
    fds: list[int] = []
    try:
        total = 0
        for name, path in files.items():
            if not _is_path(name):
                raise UsageError(
                    f"a task's file is named {name!r}: give a path below the session's folder, a/b.csv, of at most "
                    f"{MAX_NAME_BYTES} bytes, 255 a part"
                )
            if inside := next((other for other in files if other.startswith(f"{name}/")), None):
                raise UsageError(f"a task has a file {name!r} and, as if that were a folder, {inside!r}: rename one")
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError as e:
                if e.errno in (errno.EMFILE, errno.ENFILE):
                    # no fault of the file's, and it passes
                    raise
                raise UsageError(f"{path!r}, a task's file, can't be read ({e.strerror}): check the task") from e
            fds.append(fd)
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise UsageError(f"{path!r}, a task's file, is no regular file: name each file of a folder")
            total += status.st_size
            if total > MAX_BYTES:
                raise UsageError(f"a task's files have more than the {MAX_BYTES} bytes allowed, with {path!r}")
        yield list(files), fds
    finally:
        for fd in fds:
            os.close(fd)


def _is_path(name: str) -> bool:
    try:
        told = orjson.dumps(name)
    except orjson.JSONEncodeError:
        # half of a surrogate pair is no text
        return False
    parts = name.split("/")
    return len(told) <= MAX_NAME_BYTES and all(
        part not in ("", ".", "..") and "\0" not in part and len(part.encode()) < 256 for part in parts
    )
