"""Landlock by raw system calls: a session reads what Python needs and writes in its own folder, nothing else.

    ruleset handles every right that the kernel's ABI knows, so that all of them are denied ...
        rule per path   ... but these: read and execute below the libraries, everything below the session's folder
    TCP                 no bind, no connect                        (ABI 4)
    scope               no signal, no abstract socket to the outside (ABI 6)

Siblings share a uid where there is no root to give them their own; then this is what separates them.
System call numbers are the same on every machine. See Documentation/userspace-api/landlock.rst of the kernel.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_PATH_BENEATH = 1
_GET_VERSION = 1

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_CHAR, _MAKE_BLOCK = 1 << 6, 1 << 11
TRUNCATE, IOCTL_DEV = 1 << 14, 1 << 15
_OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
READ = EXECUTE | READ_FILE | READ_DIR
WRITE = (1 << 16) - 1 & ~(_MAKE_CHAR | _MAKE_BLOCK | IOCTL_DEV)
DEVICE = READ_FILE | WRITE_FILE

_libc = ctypes.CDLL(None, use_errno=True)


def _syscall(number: int, *args) -> int:
    result = _libc.syscall(ctypes.c_long(number), *args)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"landlock call {number}: {os.strerror(code)}")
    return result


def abi() -> int:
    """The kernel's Landlock version; 0 where there is none."""
    return max(0, _libc.syscall(ctypes.c_long(_CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint(_GET_VERSION)))


class Landlock:
    """Holds the paths common to all sessions open, so that a session's own ruleset takes microseconds."""

    def __init__(self, read: Iterable[str], devices: Iterable[str]):
        self.abi = abi()
        # rights by ABI: 1 has 13, 2 adds REFER, 3 TRUNCATE, 5 IOCTL_DEV
        bits = {1: 13, 2: 14, 3: 15, 4: 15}.get(self.abi, 16)
        self._handled = (1 << bits) - 1
        attributes = [self._handled]
        if self.abi >= 4:
            # no TCP bind, no TCP connect
            attributes.append(0b11)
        if self.abi >= 6:
            # neither abstract sockets nor signals leave the session
            attributes.append(0b11)
        self._attributes = struct.pack(f"<{len(attributes)}Q", *attributes)
        self._paths: list[tuple[int, int]] = []
        seen = set()
        for rights, paths in ((READ, read), (DEVICE, devices)):
            for path in paths:
                try:
                    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue
                status = os.fstat(fd)
                if (status.st_dev, status.st_ino) in seen:
                    # /bin is /usr/bin
                    os.close(fd)
                    continue
                seen.add((status.st_dev, status.st_ino))
                self._paths.append((fd, rights if stat.S_ISDIR(status.st_mode) else rights & _OF_FILES))

    def restrict(self, folder: str) -> None:
        """Confine this process for good: everything in `folder`, reading elsewhere. Needs no_new_privs."""
        ruleset = _syscall(_CREATE_RULESET, self._attributes, ctypes.c_size_t(len(self._attributes)), ctypes.c_uint(0))
        own = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        for fd, rights in (*self._paths, (own, WRITE)):
            rule = struct.pack("<Qi", rights & self._handled, fd)
            _syscall(_ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(_PATH_BENEATH), rule, ctypes.c_uint(0))
        _syscall(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint(0))
        os.close(own)
        os.close(ruleset)
