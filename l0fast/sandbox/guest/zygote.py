"""The shard's first process: forks sessions, ends them, and outlives none of them.

    control socket (SEQPACKET, JSON, one message each)
        host -> zygote   config{...}   start{sid, files} + [session socket, output memfd, files ...]   kill{sid}
        zygote -> host   ready{python, landlock, seccomp, problem}   started{sid, pid}   ended{sid, status, error}
    SIGCHLD -> reap: a session's first process -> kill its group -> reap the group -> ended; its folder follows
    end of file or SIGTERM -> end every session, remove every folder, exit

It runs no agent code, has one thread and keeps no descriptor of a session. A session's processes share a process group
that they can't leave (seccomp), and a uid of their own where there is root to give one:

* killpg(SIGKILL) reaches a whole group at once, forks under way included. The first process stays a zombie until then,
  so the group's number can't be anybody else's.
* kill as uid, in case something is out of the group after all: setresuid(uid + OFF, uid, 0), kill(-1), back. Complete in
  one call, can't be answered in kind, and takes no CAP_KILL. uid + OFF is nobody's, so the session has no right over the
  zygote meanwhile.
* waitpid(-group) is complete too: whoever is left is a child of this process (it is PID 1 or the subreaper) by the
  time its own parent can be waited for.
"""

from __future__ import annotations

# signal.signal turns everything into enums, which costs a fork 50 page faults
import _signal  # type: ignore[import-not-found]
import _sitebuiltins
import builtins
import errno
import gc
import importlib
import json
import os
import select
import signal
import site
import socket
import struct
import sys
from typing import Any

from . import at_fork
from .files import bring, remove_tree
from .jail import PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_SET_PDEATHSIG, Jail, prctl
from .session import Session, prepare

MAX_MESSAGE = 64 * 1024
MAX_FDS = 64
_SHARD_NICE = 5
_fd = struct.Struct("=i")
_ANCILLARY = socket.CMSG_SPACE(MAX_FDS * _fd.size)
_decode = json.JSONDecoder().raw_decode
SESSION_SOCKET, OUTPUT_FILE = 3, 4
"""Descriptors of a session, beside 0, 1 and 2."""


class _Session:
    __slots__ = ("ending", "folder", "pid", "sid", "status", "uid")

    def __init__(self, sid: int, pid: int, uid: int | None, folder: str):
        self.sid = sid
        self.pid = pid
        self.uid = uid
        self.folder = folder
        self.ending = False
        self.status: int | None = None


class Zygote:
    def __init__(self, control: socket.socket, config: dict[str, Any], session: Session):
        self._control = control
        self._session = session
        self._root: str = config["root"]
        self._uid_off: int = config["uid_count"] // 2
        self._keep = sorted(fd for fd in config["keep_fds"] if fd > OUTPUT_FILE)
        self._death_signal: int = config["death_signal"]
        self._next = 0
        self._by_sid: dict[int, _Session] = {}
        self._by_pid: dict[int, _Session] = {}
        self._removers: set[int] = set()
        self._unremoved: list[_Session] = []
        self._parent = os.getppid()
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)
        self._stop = False
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._on_term)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        prctl(PR_SET_PDEATHSIG, self._death_signal)
        self._stands_back = False
        self.jail = Jail(config)
        self.jail.enter_zygote()
        # it goes through all the machine's processes where there is no namespace: 5 ms with 4,000 sessions. Where seccomp
        # holds, nothing has left the group
        self._kills_as: bool = config["own_pids"] or not self.jail.seccomp

    def _on_term(self, *_: object) -> None:
        self._stop = True

    def run(self) -> None:
        self._stand_back()
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._wake_r, select.POLLIN)
        try:
            while not self._stop and os.getppid() == self._parent:
                ready = dict(poll.poll())
                if self._wake_r in ready:
                    try:
                        os.read(self._wake_r, 4096)
                    except BlockingIOError:
                        pass
                    self._reap()
                if not self._stands_back:
                    self._stand_back()
                if self._control.fileno() in ready and not self._receive():
                    return
        finally:
            self._end_all()

    def _stand_back(self) -> None:
        """Let this shard's share of the CPU be a third of the driver's.

        Beside eight sessions that compute, the driver's loop woke some 10 ms late without, and 1 ms with it (two cores).
        """
        try:
            with open("/proc/self/autogroup", "w") as f:
                f.write(str(_SHARD_NICE))
        except BlockingIOError:
            # without CAP_SYS_ADMIN the kernel takes ten of these a second, from all of the machine: at the next message
            return
        except OSError:
            # a kernel without autogroups: what is left is the sessions' own nice
            pass
        self._stands_back = True

    def _receive(self) -> bool:
        """Carry out one message; False at the end of file."""
        data, ancillary, _, _ = self._control.recvmsg(MAX_MESSAGE, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        fds = [fd for _, _, several in ancillary for (fd,) in _fd.iter_unpack(several)]
        if not data:
            return False
        message = _decode(data.decode())[0]
        if message["op"] == "start":
            try:
                self._start(message["sid"], message["files"], fds)
            finally:
                for fd in fds:
                    os.close(fd)
        else:
            session = self._by_sid.get(message["sid"])
            if session is not None:
                self._end(session)
        return True

    def _place(self) -> tuple[str, int | None]:
        """Folder and uid of a session that no other has had."""
        number = self._next
        self._next += 1
        uid = None if self.jail.uid_base is None else self.jail.uid_base + number
        # nobody can list the parent, so a name that can't be guessed keeps even same-uid siblings out
        return f"{self._root}/{os.urandom(8).hex()}", uid

    def _start(self, sid: int, files: list[str], fds: list[int]) -> None:
        folder, uid = self._place()
        try:
            pid = os.fork()
        except OSError as e:
            ended = {"ev": "ended", "sid": sid, "status": None, "error": f"fork: {e.strerror}"}
            self._tell(json.dumps(ended).encode())
            return
        if pid == 0:
            self._become_session(folder, uid, files, *fds)
        session = _Session(sid, pid, uid, folder)
        self._by_sid[sid] = self._by_pid[pid] = session
        self._tell(b'{"ev":"started","sid":%d,"pid":%d}' % (sid, pid))

    def _become_session(
        self, folder: str, uid: int | None, files: list[str], sock_fd: int, output_fd: int, *file_fds: int
    ) -> None:
        status = 1
        try:
            _reset_signals()
            _take(sock_fd, output_fd)
            self.jail.enter(folder, uid)
            brought = bring(files, list(file_fds)) if files else {}
            _close_others(self._keep)
            # what a cell writes there as a module, the next can import
            sys.path.insert(0, folder)
            at_fork.register()
            gc.enable()
            self._session.serve(folder, brought)
            status = 0
        except BaseException as e:  # noqa: BLE001 - a fork must never return into the zygote's loop
            os.write(2, f"session: {type(e).__name__}: {e}\n".encode("utf-8", "replace")[:4096])
        finally:
            os._exit(status)

    def trial(self) -> str | None:
        """What is wrong with sessions here, found out by one that tries what it must and must not be able to do."""
        r, w = os.pipe2(os.O_CLOEXEC)
        folder, uid = self._place()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(r)
                signal.set_wakeup_fd(-1)
                os.write(w, (_try_out(self.jail, folder, uid) or "").encode()[:4096])
            finally:
                os._exit(0)
        os.close(w)
        with open(r, "rb") as report:
            problem = report.read().decode()
        session = _Session(-1, pid, uid, folder)
        self._by_sid[-1] = self._by_pid[pid] = session
        self._end(session)
        return problem or None

    def _end(self, session: _Session) -> None:
        """Kill all of it; the rest follows from SIGCHLD."""
        if session.ending:
            return
        session.ending = True
        for kill in (os.kill, os.killpg):
            try:
                kill(session.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                # not yet its own group, or already another uid's: one of the ways reaches it
                pass
        if session.uid is not None and self._kills_as:
            self._kill_as(session.uid)

    def _kill_as(self, uid: int) -> None:
        os.setresuid(uid + self._uid_off, uid, 0)
        try:
            os.kill(-1, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            # nobody left
            pass
        finally:
            os.setresuid(0, 0, 0)
        # a change of uid clears it
        prctl(PR_SET_PDEATHSIG, self._death_signal)

    def _reap(self) -> None:
        unremoved, self._unremoved = self._unremoved, []
        for session in unremoved:
            self._remove(session)
        while True:
            try:
                dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                break
            if dead is None:
                break
            session = self._by_pid.get(dead.si_pid)
            if session is None:
                # somebody's orphan, or a remover
                os.waitpid(dead.si_pid, 0)
                self._removers.discard(dead.si_pid)
                continue
            # while its first process is a zombie, the group's number can't be anybody else's
            self._end(session)
            _, status = os.waitpid(session.pid, 0)
            session.status = os.waitstatus_to_exitcode(status)
            del self._by_pid[session.pid]
        for session in [s for s in self._by_sid.values() if s.status is not None]:
            if not self._drain(session):
                continue
            del self._by_sid[session.sid]
            self._remove(session)
            if session.sid >= 0:
                self._tell(b'{"ev":"ended","sid":%d,"status":%d,"error":null}' % (session.sid, session.status))

    def _drain(self, session: _Session) -> bool:
        """Reap what is left of a killed group; True when nothing is."""
        while True:
            try:
                pid, _ = os.waitpid(-session.pid, os.WNOHANG)
            except ChildProcessError:
                return True
            if pid == 0:
                return False

    def _remove(self, session: _Session) -> None:
        """Remove the folder as its owner; in a fork, for what a session left there can take long to remove."""
        try:
            # the usual case: empty
            os.rmdir(session.folder)
            return
        except OSError:
            # not empty, never made, or only its owner may
            pass
        try:
            pid = os.fork()
        except OSError:
            # its siblings have all the processes there may be, for now: when the next process has ended
            self._unremoved.append(session)
            return
        if pid == 0:
            status = 1
            try:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                self._control.close()
                if session.uid is not None:
                    os.setresgid(session.uid, session.uid, session.uid)
                    os.setresuid(session.uid, session.uid, session.uid)
                remove_tree(session.folder)
                status = 0
            except OSError as e:
                os.write(2, f"{session.folder} could not be removed: {e}\n".encode("utf-8", "replace"))
            finally:
                os._exit(status)
        self._removers.add(pid)

    def _end_all(self) -> None:
        self._control.close()
        for session in self._by_sid.values():
            self._end(session)
        self._reap()
        while self._by_sid or self._removers or self._unremoved:
            # woken by the next SIGCHLD; the timeout is for one that came in between
            select.select([self._wake_r], [], [], 0.05)
            self._reap()
        try:
            os.rmdir(self._root)
        except OSError as e:
            # a mount point goes with its namespace
            if e.errno not in (errno.EBUSY, errno.EROFS, errno.ENOENT, errno.EACCES, errno.EPERM):
                raise

    def _tell(self, message: bytes) -> None:
        try:
            self._control.send(message)
        except OSError:
            # the host has gone, or is closing us; the end of file is next
            pass


def _reset_signals() -> None:
    _signal.set_wakeup_fd(-1)
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)
    _signal.signal(_signal.SIGTERM, _signal.SIG_DFL)


def _take(sock_fd: int, output_fd: int) -> None:
    # through copies above, so that neither target overwrites the other source
    copies = [os.dup(sock_fd), os.dup(output_fd)]
    os.dup2(copies[1], 1)
    os.dup2(copies[1], 2)
    os.dup2(copies[0], SESSION_SOCKET, inheritable=False)
    os.dup2(copies[1], OUTPUT_FILE, inheritable=False)


def _close_others(keep: list[int]) -> None:
    """All of the zygote's descriptors, but these."""
    low = OUTPUT_FILE + 1
    for fd in keep:
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, 4096)


def _try_out(jail: Jail, folder: str, uid: int | None) -> str | None:
    try:
        jail.enter(folder, uid)
    except Exception as e:  # noqa: BLE001 - every session would end of it
        return f"a session can't be confined: {e}"
    try:
        with open("try", "w") as f:
            f.write("x")
    except OSError as e:
        return f"a session can't write in its folder: {e}"
    try:
        with open(os.__file__, "rb") as f:
            f.read(1)
        # has not been imported so far, and needs a folder of the standard library to be readable
        importlib.import_module("colorsys")
    except (OSError, ImportError) as e:
        return f"a session can't read the standard library: {e}"
    if jail.landlock.abi:
        try:
            os.listdir("/")
        except PermissionError:
            pass
        else:
            return "Landlock is there but denies nothing"
    if jail.seccomp:
        try:
            socket.socket().close()
        except PermissionError:
            pass
        else:
            return "seccomp is there but denies nothing"
    return None


def main(where: str) -> None:
    """`where` the host is: an inherited descriptor, or in a container the path of its socket."""
    if where.isdigit():
        control = socket.socket(fileno=int(where))
        control.set_inheritable(False)
    else:
        control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control.connect(where)
    config = json.loads(control.recv(MAX_MESSAGE))
    os.umask(0o077)
    # how this interpreter found its library; another one must not look there
    os.environ.pop("PYTHONHOME", None)
    # the folder this program was found in is no business of the sessions
    sys.path[:] = [p for p in sys.path if p not in ("", config["program"])]
    sys.path += site.getsitepackages() if config["site"] is None else config["site"]
    # what `site` would have defined
    builtins.help = _sitebuiltins._Helper()
    builtins.exit = _sitebuiltins.Quitter("exit", "end of file")
    builtins.quit = _sitebuiltins.Quitter("quit", "end of file")
    for name in config["preload"]:
        importlib.import_module(name)
    session = prepare(SESSION_SOCKET, OUTPUT_FILE, config["output_limit"])
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError(f"importing {', '.join(config['preload'])} started threads, which a fork would lose")
    zygote = Zygote(control, config, session)
    # what exists now is shared by all sessions: keep their collectors from touching, and so copying, it
    gc.collect()
    gc.disable()
    gc.freeze()
    problem = zygote.trial()
    ready = {
        "ev": "ready",
        "python": sys.version.split()[0],
        "landlock": zygote.jail.landlock.abi,
        "seccomp": zygote.jail.seccomp,
        "problem": problem,
    }
    control.send(json.dumps(ready).encode())
    zygote.run()
