"""What a cell may try, each time with a sibling in the same shard that must still answer.

`expected` is the error the attacker's cell ends with, "lost" where the attack costs it its session, or "" where the
cell ends well and prints "held". Afterwards nothing of it may be left: no process, no folder.
"""

import asyncio
import os
import textwrap
import time

import pytest

from l0fast.errors import SandboxError, ToolError
from l0fast.sandbox.base import ToolSpec

CTYPES = """
    import ctypes, errno, platform
    libc = ctypes.CDLL(None, use_errno=True)
    x86 = platform.machine() == "x86_64"
    def denied(number, *args):
        result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(a) for a in args))
        return result == -1 and ctypes.get_errno() in (errno.EPERM, errno.ENOSYS)
"""

ATTACKS = {
    # -- using up what siblings share
    "fork bomb": ("import os\nwhile True: os.fork()", "BlockingIOError"),
    "fork bomb that swallows errors": (
        "import os\nwhile True:\n    try:\n        os.fork()\n    except BaseException:\n        pass",
        "lost|Timeout",
    ),
    "thread bomb": ("import threading\nwhile True: threading.Thread(target=threading.Event().wait).start()", "RuntimeError"),
    "memory bomb": ("held = []\nwhile True: held.append(bytearray(1 << 24))", "MemoryError"),
    "huge repr": ("class R:\n    def __repr__(self): return 'x' * (1 << 30)\nR()", "MemoryError"),
    "zip bomb": ("import zlib\nzlib.decompress(zlib.compress(bytes(1 << 26)) * 1, bufsize=1 << 29)", "MemoryError"),
    "big file": ("open('big', 'wb').write(bytes(33 << 20))", "OSError"),
    "endless output": ("while True: print('x' * 1000)", "Timeout"),
    "endless output of a subprocess": ("import os\nos.system('yes')\nos.system('yes')\nprint('\\nheld')", "held"),
    "open descriptors": ("import os\nwhile True: os.dup(0)", "OSError"),
    "a lot of small files": ("for i in range(300): open(str(i), 'w').close()\nprint('held')", "held"),
    "two hundred levels of folders": (
        "import os\nfor i in range(200):\n    os.mkdir('d')\n    os.chdir('d')\nprint('held')",
        "held",
    ),
    "folder closed to its owner": ("import os\nos.mkdir('a')\nopen('a/f', 'w').close()\nos.chmod('a', 0)\nos.chmod('.', 0)\nprint('held')", "held"),
    "raising its limits": (
        "import resource as r\nr.setrlimit(r.RLIMIT_NPROC, (r.RLIM_INFINITY, r.RLIM_INFINITY))",
        "ValueError",
    ),
    "a better priority": ("import os\nos.nice(-5)", "PermissionError"),
    # -- not ending
    "endless loop": ("while True: pass", "Timeout"),
    "loop in C": ("sum(range(10**12))", "lost"),
    "swallowed timeouts": ("while True:\n    try:\n        while True: pass\n    except BaseException: pass", "lost|Timeout"),
    "ignored signals": ("import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n    except OSError: pass\nwhile True: pass", "lost"),
    "SIGSTOP to itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "lost"),
    "settrace that never returns": (
        "import sys\ndef trace(*a):\n    while True: pass\nsys.settrace(trace)\ndef f(): pass\nf()",
        "Timeout",
    ),
    "a destructor that loops": ("class D:\n    def __del__(self):\n        while True: pass\nd = D()\ndel d\nwhile True: pass", "Timeout"),
    "repr that loops": ("class R:\n    def __repr__(self):\n        while True: pass\nR()", "Timeout"),
    "atexit that loops": ("import atexit\n@atexit.register\ndef stay():\n    while True: pass\nprint('held')", "held"),
    # -- staying behind
    "daemon": (
        "import os, signal, time\nif os.fork() == 0:\n    if os.fork() == 0:\n        for s in (1, 2, 15): signal.signal(s, signal.SIG_IGN)\n"
        "        time.sleep(600)\n    os._exit(0)\nprint('held')",
        "held",
    ),
    "nohup in the background": ("import os\nos.system('nohup sleep 600 >/dev/null 2>&1 &')\nprint('held')", "held"),
    "a stopped child": ("import os, signal\nif os.fork() == 0:\n    os.kill(os.getpid(), signal.SIGSTOP)\nprint('held')", "held"),
    "setsid": ("import os\nif os.fork() == 0:\n    try:\n        os.setsid()\n    except PermissionError:\n        os._exit(7)\n    os._exit(0)\nassert os.wait()[1] >> 8 == 7\nprint('held')", "held"),
    "setpgid": ("import os\nos.setpgid(0, 0)", "PermissionError"),
    "a subprocess in a new session": ("import subprocess\nsubprocess.run(['true'], start_new_session=True)", "PermissionError"),
    # -- leaving the protocol
    "os._exit": ("import os\nos._exit(0)", "lost"),
    "abort": ("import os\nos.abort()", "lost"),
    "segmentation fault": ("import ctypes\nctypes.string_at(0)", "lost"),
    "closing every descriptor": ("import os\nos.closerange(0, 128)", "lost"),
    "garbage to the host": ("import os\nos.write(3, b'\\xff' * 64)", "lost"),
    "half a frame": ("import os\nos.write(3, b'\\x20\\0\\0\\0{')\nos._exit(0)", "lost"),
    "a frame too long": ("import os\nos.write(3, b'\\xff\\xff\\xff\\x7f')\nwhile True: pass", "lost"),
    "a forged second answer": (
        "import json, os\ndef frame(m):\n    b = json.dumps(m).encode()\n    return len(b).to_bytes(4, 'little') + b\n"
        "done = frame({'op': 'done', 'n': 1, 'err': None, 'dropped': 0})\nos.write(3, done + done)\nwhile True: pass",
        "lost",
    ),
    "a forged call of no tool": (
        "import json, os\nb = json.dumps({'op': 'call', 'id': 1, 'name': 'os.system', 'args': ['id'], 'kw': {}}).encode()\n"
        "os.write(3, len(b).to_bytes(4, 'little') + b)\nwhile True: pass",
        "lost",
    ),
    "a flood of calls": ("while True:\n    try: tool()\n    except Exception: pass", "lost"),
    "patched limits of the guest": (
        "import sys\nsys.modules['guest.frames'].MAX_FRAME = 1 << 30\ntool('x' * 200_000)",
        "lost",
    ),
    "an import hook that swallows everything": (
        "import sys\nclass Hook:\n    def find_spec(self, *a): raise SystemExit('mine')\nsys.meta_path.insert(0, Hook())\nsys.modules.clear()\nimport json",
        "SystemExit",
    ),
    "the output file shrunk, sought in and reopened": (
        "import os\nos.ftruncate(4, 0)\nos.lseek(4, 1 << 30, 0)\nos.write(4, b'a')\ntry:\n    os.ftruncate(4, 1 << 40)\n    print('open')\nexcept OSError:\n    os.ftruncate(4, 0)\n    print('held')",
        "held",
    ),
    "the output file grown to the limit": ("import os\nos.ftruncate(4, 32 << 20)\nos.lseek(4, 0, 2)\nprint('\\nheld')", "held"),
    "an answer longer than a frame": ("raise ValueError('x' * 1_000_000)", "ValueError"),
    "a name of an exception longer than a frame": ("raise type('E' * 1_000_000, (Exception,), {})", "E" * 256),
    "patched builtins": (
        "import builtins\nfor name in ('len', 'print', 'isinstance', 'type', 'repr'): delattr(builtins, name)",
        "lost or harmless",
    ),
    # -- reaching the machine
    "sockets": (
        "import socket\nfor family in range(1, 46):\n    for kind in (1, 2, 3, 5):\n        try:\n            socket.socket(family, kind)\n"
        "        except PermissionError:\n            continue\n        raise SystemExit(f'family {family} is open')\nprint('held')",
        "held",
    ),
    "a datagram pair": ("import socket\nsocket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)", "PermissionError"),
    "system calls": (
        CTYPES + """
    calls = dict(ptrace=(101, 117), memfd_create=(319, 279), unshare=(272, 97), setns=(308, 268), mount=(165, 40),
        chroot=(161, 51), pivot_root=(155, 41), bpf=(321, 280), io_uring_setup=(425, 425), keyctl=(250, 219),
        userfaultfd=(323, 282), perf_event_open=(298, 241), process_vm_readv=(310, 270), process_vm_writev=(311, 271),
        kexec_load=(246, 104), init_module=(175, 105), shmget=(29, 194), semget=(64, 190), msgget=(68, 186),
        reboot=(169, 142), open_by_handle_at=(304, 265), pidfd_getfd=(438, 438), clone3=(435, 435), syslog=(103, 116),
        io_setup=(206, 0), inotify_init1=(294, 26))
    allowed = [name for name, numbers in calls.items() if not denied(numbers[0 if x86 else 1], 0, 0, 0, 0, 0, 0)]
    assert not allowed, allowed
    print("held")
""",
        "held",
    ),
    "a namespace by clone": (
        CTYPES + """
    for flag in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert denied(56 if x86 else 220, flag | 17, 0, 0, 0, 0), hex(flag)
    print("held")
""",
        "held",
    ),
    "another architecture's numbers": (
        CTYPES + """
    assert not x86 or denied(0x40000000 + 41, 2, 1, 0)
    print("held")
""",
        "held",
    ),
    "another process's limits": (
        CTYPES + """
    import os
    assert denied(302 if x86 else 261, os.getppid(), 7, 0, 0)
    print("held")
""",
        "held",
    ),
    # where a user has a namespace, root is no number in it
    "becoming root": ("import os\nos.setuid(0) if os.getuid() else 1 / 0", "PermissionError|OSError"),
    "signals to everybody": ("import os\nos.kill(-1, 9)", "PermissionError"),
    "signals to the zygote": ("import os\nos.kill(os.getppid(), 9)", "PermissionError"),
    "signals to any process": (
        "import os\nreached = []\nme = os.getpid()\nfor pid in {*range(1, 3000), *range(max(1, me - 3000), me + 300)}:\n    if pid != os.getpid():\n        try:\n            os.kill(pid, 0)\n            reached.append(pid)\n"
        "        except (PermissionError, ProcessLookupError):\n            pass\nassert not reached, reached\nprint('held')",
        "held",
    ),
    "files of the machine": (
        "import os\nopened = []\nfor path in ('/', '/etc/shadow', '/etc/hostname', '/root', '/home', '/proc/1/environ', '/proc/self/environ', '/proc', '/sys', '/dev/shm', '/dev/mem', '/tmp', '/run', '/var'):\n"
        "    try:\n        os.listdir(path) if os.path.isdir(path) else open(path)\n        opened.append(path)\n"
        "    except (PermissionError, FileNotFoundError):\n        pass\nassert not opened, opened\nprint('held')",
        "held",
    ),
    "writing elsewhere": (
        "import os, random, tempfile\nwrote = []\nfor folder in ('/', '/tmp', '/var/tmp', '/dev/shm', '/usr/local/bin', os.path.dirname(random.__file__), '..'):\n"
        "    try:\n        open(os.path.join(folder, 'mine'), 'w')\n        wrote.append(folder)\n"
        "    except (PermissionError, FileNotFoundError, OSError):\n        pass\nassert not wrote, wrote\nprint('held')",
        "held",
    ),
    "links out of the folder": (
        "import os\nos.symlink('/etc/shadow', 's')\nfor act in (lambda: open('s'), lambda: open('s', 'w'), lambda: os.link('/usr/bin/env', 'h')):\n"
        "    try:\n        act()\n    except (PermissionError, OSError):\n        continue\n    raise SystemExit('reached')\nprint('held')",
        "held",
    ),
    "a link planted for the cleaner": ("import os\nos.symlink('/usr', 'u')\nos.symlink('..', 'up')\nos.mkdir('d')\nos.symlink('/', 'd/root')\nprint('held')", "held"),
    "moving its own folder": ("import os\nhere = os.getcwd()\nos.rename(here, here + 'x')", "PermissionError|OSError"),
    "device files": ("import os\nos.mknod('disk', 0o60600, os.makedev(8, 0))", "PermissionError"),
    "folders of siblings": ("import os\nos.listdir('..')", "PermissionError"),
    "setuid programs": (
        "import subprocess\nsubprocess.run(['su', '-c', 'id'], stdin=subprocess.DEVNULL, check=True)",
        "CalledProcessError|FileNotFoundError|PermissionError",
    ),
    "core dumps": ("import resource\nprint('held' if resource.getrlimit(resource.RLIMIT_CORE) == (0, 0) else 'open')", "held"),
}  # fmt: skip


async def tool(*args):
    raise ToolError("no")


TOOLS = {"tool": ToolSpec(name="tool", signature="(*args)", doc="Says no.", call=tool)}


@pytest.fixture(scope="module")
def pool(kind, run, new_pool):
    pool = new_pool(kind)
    run(pool.start())
    yield pool
    run(pool.close())


async def cells_until_lost(session):
    code = "import os\nif os.path.exists('wait'): os.unlink('wait')"
    while True:
        await session.execute(code)


def test_an_answer_submitted_by_a_daemon_after_its_cell_costs_the_session(pool, run):
    """A forged frame of a process left behind."""
    submitted = []

    async def submit(answer):
        submitted.append(answer)

    tools = {"submit": ToolSpec(name="submit", signature="(answer)", doc="", call=submit)}
    code = """
        import json, os, time
        frame = json.dumps({"op": "call", "id": 1, "name": "submit", "args": ["late"], "kw": {}}).encode()
        if os.fork() == 0:
            while os.path.exists("wait"): pass
            while True: os.write(3, len(frame).to_bytes(4, "little") + frame)
        """

    async def main():
        async with pool.session(tools, seed=1) as session:
            await session.execute("open('wait', 'w').close()")
            assert (await session.execute(textwrap.dedent(code))).error is None
            with pytest.raises(SandboxError):
                await cells_until_lost(session)

    run(main())
    # in the middle of a cell its word is as good as the cell's own; between cells it is none
    assert len(submitted) <= 1


@pytest.mark.parametrize("name", ATTACKS)
def test_a_sibling_answers_through_it_and_nothing_is_left(pool, run, processes, name):
    code, expected = ATTACKS[name]
    shard = pool.shards[0]
    # Near for what ends by the hard limit. What ends by itself may take its time on a full machine: the first Timeout is
    # lost in a destructor, and the second comes 0.2 s later.
    pool._grace_s = 0.6 if "lost" in expected else 20.0

    async def attack():
        async with pool.session(TOOLS, seed=1) as session:
            try:
                result = await session.execute(
                    textwrap.dedent(code), timeout_s=0.5 if {"lost", "Timeout"} & {*expected.split("|")} else 20
                )
            except SandboxError as e:
                return "lost", str(e)
            return result.error.name if result.error else "", result.output

    async def main():
        async with pool.session({}, seed=2) as victim:
            attacker = asyncio.create_task(attack())
            answers = 0
            while not attacker.done():
                answers += (await victim.execute("6 * 7", timeout_s=20)).output == "42\n"
                await asyncio.wait([attacker], timeout=0.02)
            assert answers > 0
            assert (await victim.execute("6 * 7")).output == "42\n"
            assert shard.load == 1
            return await attacker

    outcome, said = run(main())
    if expected == "held":
        assert (outcome, said.splitlines()[-1:]) == ("", ["held"]), said
    elif expected == "lost or harmless":
        assert outcome in ("lost", "")
    else:
        assert outcome in expected.split("|"), said
    # the same zygote all along
    assert pool.shards == [shard]
    base, count, root = (shard.config[key] for key in ("uid_base", "uid_count", "root"))

    def left():
        mine = processes(lambda pid, uid, line: base is not None and base <= uid < base + count)
        return mine + (os.listdir(root) if pool.kind == "process" else [])

    # folders are removed behind their sessions' backs, by a process with the session's uid
    deadline = time.monotonic() + 10
    while left():
        assert time.monotonic() < deadline, left()
        time.sleep(0.01)
