"""Files that are there whole or not at all, and that one process writes at a time."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_NO_LOCKS = frozenset((errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP))
UNLOCKED = (
    "the file system of {} has no locks, so nothing keeps another process from writing there, too: start no second one"
)
""""{}" is a folder."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """What to write in the block; it takes the place of `path` at its end, and is gone where that fails.

    A reader finds the old file or the new one, never half of it. Of a process that is killed a `.NAME.partial` stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, data: bytes) -> None:
    with whole_file(path) as partial:
        partial.write_bytes(data)


def lock(file: IO[Any]) -> bool:
    """Have a file to ourselves until it is closed. The lock is the kernel's, so that a process that is killed leaves none.

    False where its file system has no locks: Lustre that is mounted without `flock`, NFS without a lock daemon.

    Raises:
        BlockingIOError: another process has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in _NO_LOCKS:
            raise
        return False
    return True


def weights_for_all(folder: Path) -> None:
    """Let the weights of a model folder be read by whom its config.json may be: safetensors writes for the owner alone."""
    mode = (folder / "config.json").stat().st_mode & 0o777
    for file in folder.glob("*.safetensors"):
        if file.stat().st_mode & 0o777 != mode:
            file.chmod(mode)
