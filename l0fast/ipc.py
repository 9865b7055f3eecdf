"""Child processes driven from the event loop: calls over a socketpair, weights in shared memory.

    driver (asyncio)                                child (`python -m module`, plain blocking code)
    async with spawn_worker(module, ...) as worker  channel, args = Channel.open()
        <-------- first message -----------------   channel.ready(vocab_size=640)
        await worker.call("step", payload) ------>  message = channel.recv()
        <-- (header, payload), matched by id -----  channel.reply(message, payload, loss=0.1)
    leaving the block closes the socket             recv() raises EOFError: the child returns, or is killed

A message is `u32 header length | u32 payload length | header (JSON object) | payload (raw bytes)`, both ways. Requests
carry `id` and `op`; many may be in flight and may be answered in any order. A child that dies fails every pending call at
once, with its exit status and the last lines it wrote. It has a session of its own, so Ctrl-C reaches only the driver; where
all processes of a job are told to end at once, as by systemd and LSF, it leaves that to the driver, which wants to save first.
It asks the kernel to be killed with its parent, so a killed driver leaves nothing behind.

A child that works on one request at a time may say what it is at, and how long that may take (`Channel.progress`, a page
of shared memory: signs.py). Its request is then late when a sign is, however long all of it takes. One that is late is
asked for its stacks, by SIGUSR1; they, its last sign and whether it is stopped are in the error.

What is large does not travel. It lies in an anonymous memory file (memfd) that children inherit as a descriptor: in
`SharedWeights` what the learner writes and the engine reads, in `SharedBytes` what the driver writes and all ranks of the
learner read. Such a file has no name, so there is nothing to unlink.
"""

import asyncio
import ctypes
import faulthandler
import itertools
import json
import math
import mmap
import os
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import orjson

from l0fast.errors import UsageError, WorldError
from l0fast.hub import weight_files
from l0fast.signs import Sign, SignPage, sign_page

if TYPE_CHECKING:
    from torch import Tensor

_FRAME = struct.Struct("<II")
_TAIL_BYTES = 2000
_STACKS_S = 0.3
"""Time a silent child gets to write down where it is [s]."""
_STACK_CHARACTERS = 3000
_START = "start"
_LINGER_S = 5.0
"""Time to end of one that has hung up: an interpreter that has loaded much takes a while on a full machine [s]."""
_LAST_LOOK_S = 0.3
"""Time that one who is late gets nevertheless: this process may have been held up itself, by Ctrl-Z for one [s]."""
_HELD = {
    "T": "it is stopped, by a SIGSTOP or the like",
    "t": "it is held by a debugger",
    "D": "it waits in the kernel for a disk or a device",
}
"""States of a process that is not its own master, as in /proc/PID/stat."""
_PR_SET_PDEATHSIG = 1
UNBOUND = {"OMP_PROC_BIND": "false"}
"""For children that load torch: where the environment binds OpenMP's threads to cores, as for a job of one process, importing torch
leaves each of them the first core alone."""
_LEFT_TO_THE_DRIVER = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
"""That ask a process to end: a child does when its driver does."""


class Message(NamedTuple):
    header: dict[str, Any]
    payload: bytes


def _encode(header: dict[str, Any], payload: bytes | memoryview) -> bytes:
    head = orjson.dumps(header)
    return b"".join((_FRAME.pack(len(head), len(payload)), head, payload))


# --- driver side ---------------------------------------------------------------------------------------------------


class Worker:
    """A running child, as the driver sees it. Made by `spawn_worker`."""

    def __init__(
        self,
        name: str,
        error: type[WorldError],
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        log: IO[bytes],
        signs: SignPage,
    ):
        self.name, self.pid = name, process.pid
        self.ready: dict[str, Any] = {}
        """What the child said of itself when it was ready."""
        self._error, self._process, self._reader, self._writer, self._log = error, process, reader, writer, log
        self._signs = signs
        self._ids = itertools.count(1)
        # id 0 is the child's first message
        self._pending: dict[int, asyncio.Future[Message]] = {0: asyncio.get_running_loop().create_future()}
        self._failure: WorldError | None = None
        self._closing = False
        self._lingered = False
        """Whether it was we who ended it, after it had hung up or been asked to end."""

    async def call(
        self, op: str, payload: bytes | memoryview = b"", *, timeout_s: float, **fields: Any
    ) -> tuple[dict[str, Any], bytes]:
        """Ask the child for `op` and wait for its answer.

        Args:
            payload: raw bytes, sent as they are.
            timeout_s: time until the answer is here, or the first sign of progress; each says when the next is due [s].
            fields: JSON-like; they become the request's header.

        Returns:
            The answer's header and payload.

        Raises:
            WorldError: the class given to `spawn_worker`: the child failed at this, died, or missed the deadline.
        """
        request = next(self._ids)
        self._pending[request] = asyncio.get_running_loop().create_future()
        try:
            self._send({**fields, "id": request, "op": op}, payload)
            return await self._answer(request, op, timeout_s)
        finally:
            del self._pending[request]

    def kill(self) -> None:
        """End the child, and all it started, at once. Does nothing once it is gone."""
        if self._process.returncode is None:
            # its own process group; gone already if it ended just now
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    @property
    def dead(self) -> bool:
        """Whether it ended without being asked to."""
        return self._failure is not None and not self._closing

    @property
    def sign(self) -> Sign:
        """What it said last of the request it works on."""
        return self._signs.read()

    @property
    def held(self) -> str:
        """Why it can't run, if it can't: it is stopped, or waits in the kernel."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return ""
        return _HELD.get(state, "")

    def notify(self, op: str, **fields: Any) -> None:
        """Tell the child something it does not answer. Does nothing once the child is gone."""
        if self._failure is None:
            self._send({**fields, "id": None, "op": op}, b"")

    def _send(self, header: dict[str, Any], payload: bytes | memoryview) -> None:
        if self._failure is not None:
            raise self._error(str(self._failure))
        self._writer.write(_encode(header, payload))

    async def _answer(self, request: int, op: str, timeout_s: float) -> Message:
        future, late = self._pending[request], time.monotonic() + timeout_s
        is_late = False
        while not future.done():
            was_late, left = is_late, (self.sign.due or late) - time.monotonic()
            is_late = left <= 0
            if is_late and was_late:
                raise await self._silence(op, timeout_s) from TimeoutError()
            # at least so often: a later sign may promise less time than the one just seen
            await asyncio.wait([future], timeout=_LAST_LOOK_S if is_late else min(left, timeout_s))
        answer = future.result()
        if (refused := answer.header.get("refused")) is not None:
            raise UsageError(refused)
        if (error := answer.header.get("error")) is not None:
            raise self._error(f"{self.name} failed at {op!r}: {error}\n{answer.header.get('traceback', '')}".rstrip())
        return answer

    async def _silence(self, op: str, timeout_s: float) -> WorldError:
        """What there is to say of a child that is late."""
        sign, held = self.sign, self.held
        how = f"has been silent for too long at {op!r}" if sign.due else f"did not answer {op!r} in {timeout_s:g} s"
        if op == _START and not sign.due:
            how += " (a slow disk may need a higher start_timeout_s)"
        said = self._with_last_words("; ".join(filter(None, [how + _at(sign), held])))
        stack = ""
        # it has a handler since its first sign, and would die of it before
        if self._process.returncode is None and (self.ready or sign.given):
            end = self._log.seek(0, os.SEEK_END)
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGUSR1)
            await asyncio.sleep(_STACKS_S)
            self._log.seek(end)
            # of its main thread, the innermost frame first; those of other threads come before
            stack = self._log.read().decode(errors="replace")
            stack = stack[max(0, stack.find("Current thread")) :][:_STACK_CHARACTERS].rstrip()
        return self._error(f"{said}\n{stack}" if stack else said)

    async def _read(self) -> None:
        """Hand every answer to its caller, until the child is gone; then fail those who still wait."""
        try:
            while True:
                head_bytes, payload_bytes = _FRAME.unpack(await self._reader.readexactly(_FRAME.size))
                header = orjson.loads(await self._reader.readexactly(head_bytes))
                payload = await self._reader.readexactly(payload_bytes) if payload_bytes else b""
                future = self._pending.get(header["id"])
                # the caller may have given up: its answer is nobody's
                if future is not None and not future.done():
                    future.set_result(Message(header, payload))
        except (asyncio.IncompleteReadError, ConnectionError):
            if not self._closing:
                await self._end(timeout_s=_LINGER_S)
        finally:
            self._fail(self._post_mortem())

    async def _close(self, timeout_s: float) -> None:
        self._closing = True
        self._writer.close()
        await self._end(timeout_s)

    async def _end(self, timeout_s: float) -> None:
        """Wait for the child to exit; kill it, and all it started, where it does not."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._process.wait()
        except TimeoutError:
            self._lingered = True
        finally:
            self.kill()
            await self._process.wait()

    def _post_mortem(self) -> WorldError:
        status = self._process.returncode
        if self._closing or status is None:
            return self._error(f"{self.name} (pid {self.pid}) was closed")
        perhaps = ""
        if status >= 0:
            how = f"ended with exit status {status}"
        elif self._lingered:
            how = f"hung up, and was ended as it had not ended {_LINGER_S:g} s later"
        else:
            how = f"was killed by {signal.Signals(-status).name}"
            if status == -signal.SIGKILL:
                perhaps = ", as the kernel does where memory is short, also that of a container alone"
        return self._error(self._with_last_words(how + _at(self.sign) + perhaps))

    def _with_last_words(self, how: str) -> str:
        end = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, end - _TAIL_BYTES))
        words = self._log.read().decode(errors="replace").strip()
        said = f"; its last words:\n{words}" if words else ", without a word"
        return f"{self.name} (pid {self.pid}) {how}{said}"

    def _fail(self, failure: WorldError) -> None:
        self._failure = failure
        for future in self._pending.values():
            if not future.done():
                future.set_exception(self._error(str(failure)))
                # a caller that was cancelled in the same loop turn never looks at it
                future.exception()


def _at(sign: Sign) -> str:
    return f", at: {sign.doing}" if sign.doing else ""


@asynccontextmanager
async def spawn_worker(
    module: str,
    *,
    args: dict[str, Any],
    name: str,
    error: type[WorldError],
    start_timeout_s: float,
    stderr_path: Path | None = None,
    pass_fds: Sequence[int] = (),
    close_timeout_s: float = 5.0,
) -> AsyncIterator[Worker]:
    """Run `python -m module` as a child for as long as the `async with` body runs.

    Args:
        module: its main program calls `Channel.open()` first of all, then `ready()`.
        args: JSON-like; the child gets them from `Channel.open()`.
        name: how errors call it.
        error: class of every failure, e.g. EngineError.
        start_timeout_s: time until it is ready, imports included [s].
        stderr_path: file that what it prints is appended to; None keeps it for error messages only.
        pass_fds: descriptors it inherits under the same numbers.
        close_timeout_s: time it has to end after its socket was closed, before it is killed [s].

    Yields:
        Worker, ready.

    Raises:
        UsageError: the child refused its `args`.
        WorldError: of class `error`, where it does not start.
    """
    ours, theirs = socket.socketpair()
    with _open_log(stderr_path) as log, ours, theirs, sign_page("l0fast-signs") as signs:
        setup = json.dumps({"fd": theirs.fileno(), "signs_fd": signs.fd, "parent": os.getpid(), "args": args})
        # the child finds what we find, installed or not
        env = os.environ | UNBOUND
        env |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONUNBUFFERED": "1"}
        # before the child: nothing may be awaited between its start and the block that ends it
        reader, writer = await asyncio.open_connection(sock=ours, limit=1 << 22)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                module,
                setup,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                pass_fds=(theirs.fileno(), signs.fd, *pass_fds),
                start_new_session=True,
            )
        except BaseException:
            writer.close()
            raise
        # or its death would not be the end of the stream
        theirs.close()
        worker = Worker(name, error, process, reader, writer, log, signs)
        reading = asyncio.create_task(worker._read(), name=f"answers of {name}")
        try:
            worker.ready = (await worker._answer(0, _START, start_timeout_s)).header
            yield worker
        finally:
            try:
                # one that is still starting does not listen yet
                await worker._close(close_timeout_s if worker.ready else 0)
            finally:
                # ends by itself: the socket is closed and the child is gone; a bug in it surfaces here
                await reading


def _open_log(path: Path | None) -> IO[bytes]:
    return tempfile.TemporaryFile() if path is None else path.open("a+b")


# --- child side ----------------------------------------------------------------------------------------------------


class Channel:
    """The child's end: blocking, single-threaded."""

    def __init__(self, sock: socket.socket, signs: SignPage):
        self._sock, self._signs, self._buffer = sock, signs, bytearray()

    @classmethod
    def open(cls) -> tuple["Channel", dict[str, Any]]:
        """The channel to the driver and the `args` it gave. Call it before slow imports: it ties our life to the driver's."""
        setup = json.loads(sys.argv[1])
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        faulthandler.register(signal.SIGUSR1)
        for number in _LEFT_TO_THE_DRIVER:
            # not ignored: what we start would inherit that
            signal.signal(number, lambda *_: None)
            signal.siginterrupt(number, False)
        if os.getppid() != setup["parent"]:
            # the driver died before we could ask to die with it
            sys.exit(1)
        channel = cls(socket.socket(fileno=setup["fd"]), SignPage(setup["signs_fd"]))
        # tells that there is a handler
        channel.progress("")
        return channel, setup["args"]

    def ready(self, **fields: Any) -> None:
        """Tell the driver that calls may come, with what it should know."""
        self._signs.clear()
        self._sock.sendall(_encode({**fields, "id": 0}, b""))

    def refuse(self, error: UsageError) -> None:
        """Instead of `ready`: the driver raises it, and has no use for us any more."""
        self.reply(0, refused=str(error))

    def recv(self, *, block: bool = True) -> Message | None:
        """The next request; None if there is none yet and `block` is False. Raises EOFError when the driver closed."""
        while (message := self._parse()) is None:
            try:
                data = self._sock.recv(1 << 20, 0 if block else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            if not data:
                raise EOFError("the driver closed the channel")
            self._buffer += data
        return message

    def _parse(self) -> Message | None:
        if len(self._buffer) < _FRAME.size:
            return None
        head_bytes, payload_bytes = _FRAME.unpack_from(self._buffer)
        head_end = _FRAME.size + head_bytes
        end = head_end + payload_bytes
        if len(self._buffer) < end:
            return None
        message = Message(orjson.loads(self._buffer[_FRAME.size : head_end]), bytes(self._buffer[head_end:end]))
        del self._buffer[:end]
        return message

    def reply(self, to: Message | int, payload: bytes | memoryview = b"", **fields: Any) -> None:
        """Answer a request (or the request of that id)."""
        request = to.header["id"] if isinstance(to, Message) else to
        self._signs.clear()
        self._sock.sendall(_encode({**fields, "id": request}, payload))

    def progress(self, doing: str, limit_s: float = 0.0) -> None:
        """Say what is being done for the one request there is; it takes a microsecond.

        Args:
            limit_s: time until the next sign or the answer, from now on instead of the request's own; 0 leaves it that [s].
        """
        self._signs.give(doing, limit_s)

    def fail(self, to: Message | int, error: BaseException, traceback: str = "") -> None:
        """Answer a request with what went wrong; the driver raises it as its own error class."""
        self.reply(to, error=f"{type(error).__name__}: {error}", traceback=traceback)


_NICE = 5
"""A third of the usual weight. The sandboxes have the same: their cells are not to wait for whoever computes here."""
_AUTOGROUP_TRIES = 20


def stand_back() -> None:
    """Leave the processors to the driver's loop where both want them, for good: a third of its share, as sandboxes have.

    For a child that computes on the CPU; one that only feeds a GPU must not wait.
    """
    os.nice(_NICE)
    # and this session of ours, to which the kernel gives the driver's share where it groups processes by session
    for _ in range(_AUTOGROUP_TRIES):
        try:
            Path("/proc/self/autogroup").write_text(str(_NICE))
        except BlockingIOError:
            # without CAP_SYS_ADMIN the kernel takes ten of these a second, from all of the machine
            time.sleep(0.1)
            continue
        except OSError:
            # no autogroups here
            pass
        return


# --- large things --------------------------------------------------------------------------------------------------


class SharedBytes:
    """A memory file that grows: one process writes, others read it where it lies. Made by `shared_bytes`.

    Whoever writes again has been told by all readers that they are done.
    """

    def __init__(self, fd: int):
        self.fd = fd
        self._map = mmap.mmap(-1, 1)

    def reserve(self, num_bytes: int) -> memoryview:
        """Room to write: the first `num_bytes`, with what they held before or zeros."""
        if num_bytes > os.fstat(self.fd).st_size:
            os.ftruncate(self.fd, num_bytes)
        return self.view(num_bytes)

    def view(self, num_bytes: int) -> memoryview:
        """What was written there, as it lies; valid until anyone writes again."""
        if num_bytes > len(self._map):
            # a new map: views of the old one may still be held, and keep it
            self._map = mmap.mmap(self.fd, os.fstat(self.fd).st_size)
        return memoryview(self._map)[:num_bytes]


@contextmanager
def shared_bytes(name: str) -> Iterator[SharedBytes]:
    """An empty one. The memory is gone when the last process that maps it is."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        yield SharedBytes(fd)
    finally:
        os.close(fd)


_HEADER_BYTES = 64
_ALIGN_BYTES = 64
_VERSION = struct.Struct("<q")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    name: str
    """As in the model folder's safetensors."""
    shape: tuple[int, ...]
    offset: int
    """[bytes]"""


class SharedWeights:
    """The policy's tensors, fp32, in one memory file: `int64 policy_version | pad to 64 | tensor | pad to 64 | tensor ...`.

    The learner writes the tensors, then the version, then says so to the driver; the driver then tells the engine, which
    reads. Nobody reads while somebody writes, because the driver does one after the other. Tied weights are there once.
    """

    def __init__(self, fd: int, num_bytes: int, specs: tuple[TensorSpec, ...]):
        self.fd, self.num_bytes, self.specs = fd, num_bytes, specs
        self._map = mmap.mmap(fd, num_bytes)

    def handle(self) -> dict[str, Any]:
        """What a child needs to attach, JSON-like; its `spawn_worker` also passes `fd` in `pass_fds`."""
        return {"fd": self.fd, "num_bytes": self.num_bytes, "specs": [asdict(s) for s in self.specs]}

    @classmethod
    def attach(cls, handle: dict[str, Any]) -> "SharedWeights":
        specs = tuple(TensorSpec(s["name"], tuple(s["shape"]), s["offset"]) for s in handle["specs"])
        return cls(handle["fd"], handle["num_bytes"], specs)

    @property
    def policy_version(self) -> int:
        """Version of the tensors; -1 before the first were published."""
        return _VERSION.unpack_from(self._map)[0]

    @policy_version.setter
    def policy_version(self, version: int) -> None:
        _VERSION.pack_into(self._map, 0, version)

    def tensors(self) -> dict[str, "Tensor"]:
        """Views into the shared memory, by name; no copies. Loads torch."""
        import torch

        views = {}
        for spec in self.specs:
            view = torch.empty(0)
            if count := math.prod(spec.shape):
                view = torch.frombuffer(self._map, dtype=torch.float32, count=count, offset=spec.offset)
            views[spec.name] = view.view(spec.shape)
        return views


@contextmanager
def shared_weights(model_path: Path) -> Iterator[SharedWeights]:
    """Room for every tensor of a model folder in Hugging Face form, in fp32, zeroed, version -1.

    Reads the safetensors headers only, without torch. The memory is gone when the last process that maps it is.

    Raises:
        UsageError: the folder has no readable safetensors.
    """
    specs, end = [], _HEADER_BYTES
    for name, shape in tensor_shapes(model_path).items():
        specs.append(TensorSpec(name, shape, end))
        end += -(-4 * math.prod(shape) // _ALIGN_BYTES) * _ALIGN_BYTES
    fd = os.memfd_create("l0fast-weights", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, end)
        weights = SharedWeights(fd, end, tuple(specs))
        weights.policy_version = -1
        yield weights
    finally:
        os.close(fd)


def tensor_shapes(model_path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model folder's parameters; tied ones once. Raises UsageError."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(model_path):
        try:
            with file.open("rb") as f:
                (head_bytes,) = struct.unpack("<Q", f.read(8))
                if head_bytes > file.stat().st_size - 8:
                    raise ValueError("its header is longer than the file")
                head = orjson.loads(f.read(head_bytes))
        except (OSError, ValueError, struct.error) as e:
            raise UsageError(f"{file} is not a readable safetensors file ({e}): copy or save the model again") from e
        # the frequencies, which the first Llamas' files have, are no parameter
        names = [name for name in head if name != "__metadata__" and not name.endswith(".rotary_emb.inv_freq")]
        shapes |= {name: tuple(head[name]["shape"]) for name in names}
    try:
        tied = orjson.loads((model_path / "config.json").read_bytes()).get("tie_word_embeddings", False)
    except (OSError, ValueError) as e:
        raise UsageError(f"{model_path / 'config.json'} can't be read ({e}): give a complete model folder") from e
    if tied:
        shapes.pop("lm_head.weight", None)
    return shapes
