"""A session's folder: what a task brings into it, what an agent leaves there, and its end.

Removal copes with whatever the owner did: no rights, links, ten thousand levels. A folder inside a folder moves up to the top
before it is looked into, so paths stay short and nothing recurses. Links are unlinked, never followed. Nothing may still write there.
"""

from __future__ import annotations

import os
import stat

MAX_NAME = 300
"""Longest name told to the host; files below longer ones stay [characters]."""

Brought = dict[str, tuple[int, int]]
"""Name -> inode and time of the last change, of what came with the task."""


def bring(names: list[str], fds: list[int]) -> Brought:
    """Copy open files into the working folder, not writable."""
    brought = {}
    for i, fd in enumerate(fds):
        name = names[i]
        if "/" in name:
            os.makedirs(os.path.dirname(name), exist_ok=True)
        copy = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
        # siblings may be reading from the same open file: no shared position
        position = 0
        while True:
            data = os.pread(fd, 1 << 20, position)
            if not data:
                break
            position += len(data)
            while data:
                data = data[os.write(copy, data) :]
        status = os.fstat(copy)
        brought[name] = (status.st_ino, status.st_mtime_ns)
        os.close(copy)
        os.close(fd)
    return brought


def collect(folder: str, brought: Brought, output_fd: int, *, max_files: int, max_bytes: int) -> list[list]:
    """Write what is in `folder` into the output file, one after the other; [[name, size], ...]."""
    told: list[list] = []
    # empty is one byte long: see output.py
    os.ftruncate(output_fd, 0)
    os.ftruncate(output_fd, 1)
    for path, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            where = os.path.join(path, name)
            short = os.path.relpath(where, folder)
            try:
                # O_NONBLOCK: a pipe would wait for its writer
                fd = os.open(where, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError:
                # a link, or the agent has made it unreadable
                continue
            try:
                status = os.fstat(fd)
                unchanged = brought.get(short) == (status.st_ino, status.st_mtime_ns)
                if not stat.S_ISREG(status.st_mode) or unchanged or len(short) > MAX_NAME:
                    continue
                if len(told) == max_files or status.st_size > max_bytes:
                    return told
                data = os.pread(fd, status.st_size, 0)
                max_bytes -= len(data)
                os.write(output_fd, data)
                # a name need not be UTF-8, what is told of it must
                told.append([short.encode("utf-8", "replace").decode(), len(data)])
            finally:
                os.close(fd)
    return told


def remove_tree(path: str) -> None:
    """Remove `path`; a path that isn't there is fine. Raises OSError where the file system says no."""
    try:
        # the usual case: an empty folder
        os.rmdir(path)
        return
    except FileNotFoundError:
        return
    except OSError:
        os.chmod(path, 0o700)
    moved = 0
    while True:
        names = os.listdir(path)
        if not names:
            os.rmdir(path)
            return
        for name in names:
            child = os.path.join(path, name)
            if not _is_folder(child):
                os.unlink(child)
                continue
            os.chmod(child, 0o700)
            for inner in os.listdir(child):
                grandchild = os.path.join(child, inner)
                if _is_folder(grandchild):
                    # moving a folder rewrites its "..", which takes the right to write in it
                    os.chmod(grandchild, 0o700)
                    while True:
                        moved += 1
                        target = os.path.join(path, f".{moved}")
                        if not os.path.lexists(target):
                            break
                    os.rename(grandchild, target)
                else:
                    os.unlink(grandchild)
            os.rmdir(child)


def _is_folder(path: str) -> bool:
    return stat.S_ISDIR(os.lstat(path).st_mode)
