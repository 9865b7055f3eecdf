"""What every zygote is given, whatever it runs in: the guest program, its limits, its environment, its uids."""

import random
import socket
from pathlib import Path
from typing import Any

from l0fast.config import SandboxConfig
from l0fast.errors import SandboxError

GUEST = Path(__file__).resolve().parent
"""The folder that holds the package `guest`."""
OUTPUT_BYTES = 32 * 1024
"""What a cell's output is cut to, in its middle [bytes]."""

# appended, not put first: a module of ours must not be taken for one of the standard library
BOOT = "import sys; sys.path.append(sys.argv[1]); from guest.zygote import main; main(sys.argv[2])"
"""What the interpreter runs; its arguments are the folder of `guest`, and the control socket's descriptor or path."""
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
ETC = ("/etc/ld.so.cache", "/etc/localtime", "/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/alternatives")
"""What a session may read, beside its folder and its Python."""
FOLDER_MB_PER_SESSION = 8
"""Size of the sessions' file system [MiB a session]."""


def guest_config(config: SandboxConfig) -> dict[str, Any]:
    """What every zygote is told, whatever it runs in."""
    limits = {
        "AS": config.memory_mb << 20,
        "CPU": 600,
        "NPROC": 32,
        "FSIZE": 32 << 20,
        "NOFILE": 128,
        "STACK": 8 << 20,
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }
    return {
        "limits": limits,
        "shared_nproc": 8 * config.sessions_per_shard + 64,
        "preload": list(config.preload),
        "output_limit": OUTPUT_BYTES,
    }


def environment() -> dict[str, str]:
    """All that a session sees of an environment. Libraries must not start threads before a fork."""
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}
    # of pyarrow, which pandas imports where it is installed
    threads["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
    return {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", **threads}


class Uids:
    """A block of uids no other shard on this machine has, held by an abstract socket's name.

    Args:
        small: below 65,536, all there is in a user namespace.
    """

    def __init__(self, *, small: bool = False) -> None:
        first, last, self.count = (8_192, 65_536, 1_024) if small else (1 << 30, 1 << 31, 1 << 16)
        blocks = range(first, last, self.count)
        for self.base in random.SystemRandom().sample(blocks, min(100, len(blocks))):
            self._lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                self._lock.bind(f"\0l0fast-uids-{self.base}")
                return
            except OSError:
                self._lock.close()
        raise SandboxError("no free block of uids found: too many sandboxes on this machine")

    def close(self) -> None:
        self._lock.close()
