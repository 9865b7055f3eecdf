"""Starting and ending `sglang.Engine` in a process that is not its own, beside a running event loop.

    loop                                    a thread an engine
    sglang_process() ---------------------> settings, SGLang's children            a second or two, and its imports the first time
    tokenizer manager made here <---------- wanted                                 the loop stands still for some 50 ms
    ... other work ...                      waits for the children to load         10 s and more
    engine <------------------------------- ready
                                            lives while the engine lives: its children ask the kernel to be killed with it

SGLang takes a process for its own: it would answer SIGTERM, kill our whole process tree when a child of it fails, and
kill every child of ours at exit. In a thread it can't take signals. SIGQUIT, by which a failing child asks for the end of
us all, does nothing; the watchdog thread that sends it, too, is stopped, and so is the work at exit. What is left is to run
the reading task (`auto_create_handle_loop` is where SGLang takes the signals, so it is not called), to watch the children
and to end them and no others.

What SGLang keeps once a process, its settings and the environment, is why only one engine at a time is in that first second.
"""

import asyncio
import atexit
import ctypes
import logging
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from l0fast.config import EngineConfig
from l0fast.errors import EngineError, UsageError

_END_S = 20.0
"""Time a killed child has to give its GPU back [s]."""
_KEPT_TOKENS = 6
"""Of a context, and of the room for keys and values: SGLang wants so many left after the longest prompt [tokens]."""
_PR_SET_PDEATHSIG = 1
_launching = threading.Lock()
"""Held while an engine's children are started."""


@asynccontextmanager
async def sglang_process(
    config: EngineConfig, model_path: Path, *, max_tokens: int, slots: int, gpu: int = 0
) -> AsyncIterator[tuple[Any, list[Any]]]:
    """A running `sglang.Engine` and its child processes, for as long as the `async with` body runs.

    Raises:
        UsageError: a setting that can't be used, or no SGLang.
        EngineError: it did not start, or not within `engine.start_timeout_s`.
    """
    starting = _Thread(lambda: _arguments(config, model_path, max_tokens, slots, gpu))
    with sigquit_does_nothing():
        try:
            yield await starting.engine(config.start_timeout_s), starting.children
        finally:
            await starting.end()


@contextmanager
def sigquit_does_nothing() -> Iterator[None]:
    """A child that fails asks for our end by SIGQUIT; we see its death, and live. Around engines that come and go, too."""
    handler = signal.getsignal(signal.SIGQUIT)
    signal.signal(signal.SIGQUIT, _stay)
    try:
        yield
    finally:
        signal.signal(signal.SIGQUIT, handler)


def _stay(number: int, frame: Any) -> None:
    pass


class _Thread:
    """Starts an engine, and is what its children live with."""

    def __init__(self, arguments: Callable[[], tuple[dict[str, Any], dict[str, str]]]):
        self.children: list[Any] = []
        self._arguments = arguments
        self._loop = asyncio.get_running_loop()
        self._engine: asyncio.Future[Any] = self._loop.create_future()
        self._over = threading.Event()
        self._made: Any = None
        self._managers: list[Any] = []
        self._ports: list[Any] = []
        self._thread = threading.Thread(target=self._run, name="an engine's children", daemon=True)
        self._thread.start()

    async def engine(self, timeout_s: float) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._engine
        except TimeoutError as e:
            raise EngineError(
                f"sglang did not start in {timeout_s:g} s: what it said is on stderr; a large model may need a higher "
                "--engine.start-timeout-s"
            ) from e

    async def end(self) -> None:
        """End what was started, as far as it got, and wait until it has."""
        self._over.set()
        if not self._engine.done() or self._engine.cancelled():
            # it waits for them to be ready
            _kill(self.children)
        await asyncio.to_thread(self._thread.join)
        if self._made is not None:
            atexit.unregister(self._made.shutdown)
            if (socket := getattr(self._made, "send_to_rpc", None)) is not None:
                socket.context.destroy(linger=0)
        for manager in self._managers:
            _close_sockets(manager)
        for port_args in self._ports:
            _remove_files(port_args)

    def _run(self) -> None:
        try:
            try:
                engine = self._start()
            except BaseException as e:  # noqa: BLE001, above us is only whoever waits for the engine
                self._tell(e)
            else:
                self._tell(engine)
                self._over.wait()
        finally:
            _end(self.children)

    def _tell(self, what: Any) -> None:
        def resolve() -> None:
            if self._engine.done():
                # nobody waits any more
                return
            if isinstance(what, BaseException):
                self._engine.set_exception(what)
            else:
                self._engine.set_result(what)

        self._loop.call_soon_threadsafe(resolve)

    def _start(self) -> Any:
        # holds the lock and the environment until SGLang's children are started
        launching = ExitStack()
        launching.enter_context(_launching)
        launching.enter_context(_own_logging())
        before: list[Any] = multiprocessing.active_children()

        def launched() -> None:
            self.children += [
                p for p in multiprocessing.active_children() if p not in before and p not in self.children
            ]
            launching.close()

        try:
            arguments, variables = self._arguments()
            Engine, init_tokenizer_manager, PortArgs = _imported()
            launching.enter_context(_environment(variables))

            async def make_manager(*args: Any, **kwargs: Any) -> Any:
                return init_tokenizer_manager(*args, **kwargs)

            class OurEngine(Engine):
                """One whose files, sockets and children are known before it is ready, also where it never will be."""

                run_scheduler_process_func = staticmethod(partial(run_child, "run_scheduler_process_func", os.getpid()))
                run_detokenizer_process_func = staticmethod(
                    partial(run_child, "run_detokenizer_process_func", os.getpid())
                )

                @staticmethod
                def init_tokenizer_manager_func(*args: Any, **kwargs: Any) -> Any:
                    # its sockets belong to the loop that reads them
                    made = asyncio.run_coroutine_threadsafe(make_manager(*args, **kwargs), self._loop).result()
                    self._managers.append(made[0])
                    launched()
                    if self._over.is_set():
                        raise EngineError("sglang was closed while it started")
                    return made

                @classmethod
                def _launch_subprocesses(cls, server_args: Any, *args: Any, **kwargs: Any) -> Any:
                    # newer ones ask for settings that are final
                    getattr(server_args, "resolve_once", lambda: None)()
                    self._ports.append(PortArgs.init_new(server_args))
                    return super()._launch_subprocesses(server_args, *args, **kwargs, port_args=self._ports[0])

            # apart from its making, so that what it registers for exit can be found where that fails
            self._made = engine = OurEngine.__new__(OurEngine)
            engine.__init__(**arguments)
        except (RuntimeError, OSError, EOFError) as e:
            raise EngineError(f"sglang did not start: {e}; what it said of it is on stderr") from e
        finally:
            if not self.children:
                launched()
        engine.tokenizer_manager._subprocess_watchdog.stop()
        if engine.loop is not self._loop:
            # made for this thread
            engine.loop.close()
        return engine


def run_child(what: str, parent: int, *args: Any, **kwargs: Any) -> None:
    """The main function of SGLang's children. It takes them seconds to come so far: the parent may have died meanwhile, too
    early for the kernel to tell them, and they would wait for it for ever.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    getattr(_imported()[0], what)(*args, **kwargs)


def _imported() -> tuple[Any, Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from sglang.srt.entrypoints.engine import Engine, init_tokenizer_manager  # pyright: ignore[reportMissingImports]
            from sglang.srt.server_args import PortArgs  # pyright: ignore[reportMissingImports]
        except ImportError as e:
            raise UsageError(
                f"engine.kind = 'sglang', but it can't be imported ({e}): pip install 'l0fast[gpu]'"
            ) from e
    return Engine, init_tokenizer_manager, PortArgs


def _arguments(
    config: EngineConfig, model_path: Path, max_tokens: int, slots: int, gpu: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Of `sglang.Engine`, and what it reads from the environment."""
    import torch

    context = max_tokens + _KEPT_TOKENS
    arguments: dict[str, Any] = {
        "model_path": str(model_path),
        "skip_tokenizer_init": True,
        "grammar_backend": "none",
        "context_length": context,
        "max_running_requests": slots,
        "tp_size": config.tensor_parallel,
        "sleep_on_idle": True,
        "weight_version": "0",
    }
    variables = {
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
        # its children's progress bars and warnings would be all over ours
        "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    if torch.cuda.is_available():
        # bf16 logits alone would move a log-prob by a hundredth
        arguments |= {"base_gpu_id": gpu, "dtype": "bfloat16", "enable_fp32_lm_head": True}
        arguments |= {"mem_fraction_static": config.memory_share, "cuda_graph_max_bs_decode": slots}
        arguments |= {"enable_memory_saver": config.layout == "sleep"}
    else:
        arguments |= {"device": "cpu", "dtype": "float32", "attention_backend": "torch_native"}
        arguments |= {"sampling_backend": "pytorch", "disable_cuda_graph": True}
        arguments |= {"max_total_tokens": slots * context, "mem_fraction_static": 0.3}
        variables |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": str(config.threads or 1)}
        if config.tensor_parallel > 1:
            # which cores each rank computes on
            cores = sorted(os.sched_getaffinity(0))
            ranks = [cores[rank % len(cores) :: config.tensor_parallel] for rank in range(config.tensor_parallel)]
            variables["SGLANG_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, rank)) for rank in ranks)
    for text in config.sglang:
        name, equals, value = text.partition("=")
        try:
            arguments[name] = orjson.loads(value)
        except ValueError as e:
            raise UsageError(
                f"engine.sglang has {text!r}: write name=value with the value in JSON, e.g. max_total_tokens=8192"
            ) from e
    return arguments, variables


@contextmanager
def _own_logging() -> Iterator[None]:
    """SGLang puts its handler in the place of all others', and so prints what other packages log."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _kill(children: Sequence[Any]) -> list[Any]:
    """Kill SGLang's processes and what they started; returns the latter."""
    import psutil

    started: list[Any] = []
    for child in children:
        with suppress(psutil.NoSuchProcess):
            started += psutil.Process(child.pid).children(recursive=True)
    for child in children:
        child.kill()
    for process in started:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return started


def _end(children: Sequence[Any]) -> None:
    """Kill them, and wait until their GPU is free. Blocks."""
    import psutil

    started = _kill(children)
    for child in children:
        child.join(_END_S)
    psutil.wait_procs(started, timeout=_END_S)


def _close_sockets(manager: Any) -> None:
    """Left to the garbage collector, their context waits for ever for someone to read what was not sent."""
    for socket in (manager.recv_from_detokenizer, manager.send_to_scheduler):
        socket.context.destroy(linger=0)


def _remove_files(port_args: Any) -> None:
    """The sockets and the load table that SGLang leaves in /tmp and /dev/shm."""
    from sglang.srt.managers.load_snapshot import shm_path_for  # pyright: ignore[reportMissingImports]

    names = [getattr(port_args, name) for name in dir(port_args) if name.endswith("_ipc_name")]
    sockets = [name.removeprefix("ipc://") for name in names if isinstance(name, str) and name.startswith("ipc://")]
    for path in (*sockets, shm_path_for(port_args.instance_id)):
        Path(path).unlink(missing_ok=True)
