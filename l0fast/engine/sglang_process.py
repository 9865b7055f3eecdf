"""Starting and ending `sglang.Engine` in a process that is not its own, beside a running event loop.

    loop                                    a thread an engine
    sglang_process() ---------------------> settings, SGLang's children            a second or two, and its imports the first time
    tokenizer manager made here <---------- wanted                                 the loop stands still for some 50 ms
    ... other work ...                      waits for the children to load         10 s and more
    engine <------------------------------- ready
                                            lives while the engine lives: its children ask the kernel to be killed with it

SGLang takes a process for its own: it would answer SIGTERM, kill our whole process tree when a child of it fails, and
kill every child of ours at exit. In a thread it can't take signals. What is left is to run the reading task
(`auto_create_handle_loop` is where SGLang takes the signals, so it is not called), to watch the children and to end them
and no others. To that end this is changed, by the engine's thread but for the last two rows; SGLang's modules and classes
stay as they are.

    what is changed                         for how long     why
    `_launching`, a lock: held              the launch       SGLang keeps its settings, and reads the environment, once a process
    handlers, level of the root logger      the launch       SGLang puts its own in their place, and prints what others log
    os.environ                              the launch       what SGLang and its children read there
    of the one `Engine`:
        _launch_subprocesses                its life         its files' names are known before there are any, to remove them
        run_scheduler_process_func,
        run_detokenizer_process_func        its life         `run_child`, in the children: they end with our thread
        init_tokenizer_manager_func         its life         goes to the loop, which will read the manager's sockets
    SGLang's watchdog thread: stopped       once ready       sends us SIGQUIT for a child that died
    the thread's event loop: closed         once ready       SGLang makes it, nobody runs it
    SIGQUIT: does nothing                   until `end`      a failing child sends it, to end us all
    work at exit, `shutdown`: taken back    in `end`         kills every child of ours

The launch ends when the children are started, long before they are ready, or when it is known that none will be.
"""

import asyncio
import atexit
import ctypes
import difflib
import inspect
import itertools
import logging
import multiprocessing
import os
import random
import signal
import socket
import tempfile
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import orjson

from l0fast import nvidia_smi
from l0fast.allocator import without_expandable_segments
from l0fast.config import EngineConfig
from l0fast.errors import EngineError, UsageError
from l0fast.ipc import UNBOUND

_END_S = 20.0
"""Time a killed child has to give its GPU back [s]."""
_KEPT_TOKENS = 6
"""Of a context, and of the room for keys and values: SGLang wants so many left after the longest prompt [tokens]."""
_MOST_OF_FREE = 0.9
"""Of a GPU's free memory, for weights, keys and values: graphs and activations want some of the rest."""
_LEAST_HEAD_DIM = 64
"""Of models that have kernels for each GPU: below, as the policies that ship are, FlashInfer and TensorRT-LLM have none."""
_SOCKET_CHARS, _NAME_CHARS = 107, len("/tmpxxxxxxxx")
"""Of a socket's path, and of what SGLang adds to the folder for temporary files [bytes]."""
_PR_SET_PDEATHSIG = 1
_PORTS = range(22_000, 30_000)
"""Below those that the kernel deals out to whoever asks for any."""
_launching = threading.Lock()
"""Held while an engine's children are started."""
_ports = itertools.islice(itertools.cycle(_PORTS), random.randrange(len(_PORTS)), None)
"""Of this process's engines, from anywhere on."""


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


def import_sglang(config: EngineConfig) -> None:
    """As an engine does when it starts, and look whether it knows the settings in engine.sglang. Blocks for ten seconds and more.

    Raises:
        UsageError: it can't be imported, or doesn't.
    """
    before = dict(os.environ)
    try:
        with _own_logging(), _environment(UNBOUND):
            _imported()
            from sglang.srt.server_args import ServerArgs  # pyright: ignore[reportMissingImports]
    finally:
        # it says where kernels are kept that are compiled; its children import it themselves, and the learner is none of them
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
    known = inspect.signature(ServerArgs).parameters
    for name in more_arguments(config):
        if name not in known:
            like = difflib.get_close_matches(name, known)
            raise UsageError(
                f"engine.sglang has {name}, which this sglang does not know: "
                + (
                    f"is it {' or '.join(like)}?"
                    if like
                    else "`python -m sglang.launch_server --help` lists what it knows"
                )
            )


def more_arguments(config: EngineConfig) -> dict[str, Any]:
    """Those of `sglang.Engine` in engine.sglang. Raises UsageError."""
    arguments = {}
    for text in config.sglang:
        name, _, value = text.partition("=")
        try:
            arguments[name] = orjson.loads(value)
        except ValueError as e:
            raise UsageError(
                f"engine.sglang has {text!r}: write name=value with the value in JSON, e.g. max_total_tokens=8192"
            ) from e
    return arguments


def check_sockets(folder: Path | None = None) -> None:
    """SGLang's processes meet at sockets in the folder for temporary files. Raises UsageError where its name is too long.

    Args:
        folder: that of another process; None for ours.
    """
    folder = folder or Path(tempfile.gettempdir())
    if len(os.fsencode(folder)) + _NAME_CHARS > _SOCKET_CHARS:
        raise UsageError(
            f"TMPDIR = {folder} has {len(os.fsencode(folder))} characters, and those of a folder with sglang's sockets may be "
            f"{_SOCKET_CHARS - _NAME_CHARS}: set TMPDIR to a shorter one, for example /tmp"
        )


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
        self._launch = ExitStack()
        """Of what is changed for the launch alone."""
        self._others: list[Any] = []
        """Children that there were before the launch."""
        # what is left to close and to remove
        self._made: Any = None
        self._manager: Any = None
        self._port_args: Any = None
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
        try:
            await asyncio.to_thread(self._thread.join)
        finally:
            # also for whoever is cancelled a second time meanwhile, as by the death of the learner
            if self._made is not None:
                atexit.unregister(self._made.shutdown)
                if (to_rpc := getattr(self._made, "send_to_rpc", None)) is not None:
                    to_rpc.context.destroy(linger=0)
            if self._manager is not None:
                _close_sockets(self._manager)
            if self._port_args is not None:
                _remove_files(self._port_args)

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
        try:
            arguments = self._make()
            self._made.__init__(**arguments)
        except UsageError:
            raise
        except (RuntimeError, OSError, EOFError, ValueError, TypeError, AssertionError) as e:
            # the latter of a model or a setting that it can't have
            raise EngineError(
                f"sglang did not start: {type(e).__name__}: {e}; what else it said of it is on stderr"
            ) from e
        finally:
            if not self.children:
                self._end_launch()
        self._made.tokenizer_manager._subprocess_watchdog.stop()
        if self._made.loop is not self._loop:
            # made for this thread
            self._made.loop.close()
        return self._made

    def _make(self) -> dict[str, Any]:
        """An engine that is not started yet, with all that is changed before; returns its arguments. The launch begins."""
        self._launch.enter_context(_launching)
        self._launch.enter_context(_own_logging())
        # torch reads it when it is imported, here too
        self._launch.enter_context(_environment(UNBOUND))
        self._others = multiprocessing.active_children()
        arguments, variables = self._arguments()
        Engine, init_tokenizer_manager, PortArgs = _imported()
        self._launch.enter_context(_environment(variables))
        # apart from its start, so that what that registers for exit can be found where it fails
        self._made = engine = Engine.__new__(Engine)
        for function in ("run_scheduler_process_func", "run_detokenizer_process_func"):
            setattr(engine, function, partial(run_child, function, os.getpid()))
        engine._launch_subprocesses = partial(self._launch_subprocesses, Engine._launch_subprocesses, PortArgs)
        engine.init_tokenizer_manager_func = partial(self._init_tokenizer_manager, init_tokenizer_manager)
        return arguments

    def _launch_subprocesses(
        self, launch: Callable[..., Any], PortArgs: Any, *, server_args: Any, **kwargs: Any
    ) -> Any:
        """In the place of SGLang's own, `launch`."""
        # newer ones ask for settings that are final
        getattr(server_args, "resolve_once", lambda: None)()
        self._port_args = PortArgs.init_new(server_args)
        return launch(server_args=server_args, port_args=self._port_args, **kwargs)

    def _init_tokenizer_manager(self, init: Callable[..., Any], *args: Any) -> Any:
        """In the place of SGLang's own, `init`. Called once the children are started, long before they are ready."""

        async def on_the_loop() -> Any:
            return init(*args)

        made = asyncio.run_coroutine_threadsafe(on_the_loop(), self._loop).result()
        self._manager = made[0]
        self._end_launch()
        if self._over.is_set():
            raise EngineError("sglang was closed while it started")
        return made

    def _end_launch(self) -> None:
        """What was changed for the launch is as before, and another engine may be launched."""
        self.children += [child for child in multiprocessing.active_children() if child not in self._others]
        self._launch.close()


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
        except Exception as e:
            # of packages that don't fit each other there is any kind
            raise UsageError(
                f"engine.kind = 'sglang', but it can't be imported ({type(e).__name__}: {e}): pip install 'l0fast[gpu]'"
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
        "nccl_port": _next_port(),
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
        share = _of_free(config.memory_share, range(gpu, gpu + config.tensor_parallel))
        arguments |= {"mem_fraction_static": share, "cuda_graph_max_bs_decode": slots}
        # graphs of prompts, which SGLang makes by default, keep no hold of what attention reads between their pieces: graphs made
        # later may lie there, and what is computed then is wrong without a word (sgl-project/sglang#37606, 0.5.23 included).
        # They also take GiBs beside `mem_fraction_static`, where the learner lives
        arguments["cuda_graph_backend_prefill"] = "disabled"
        arguments |= {"enable_memory_saver": config.layout == "sleep"}
        if has_small_heads(model_path):
            arguments["attention_backend"] = "triton"
        # of its GPUs the learner may hold more of one than of another
        variables["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] = "0"
        # the scheduler itself goes to its GPU's NUMA node; else numactl is put before it by a script in /tmp, which stays, and which
        # any child that we start meanwhile is started by, too
        variables["SGLANG_NUMA_BIND_V2"] = "0"
        variables |= without_expandable_segments(os.environ)
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
    return arguments | more_arguments(config), variables


def _next_port() -> int:
    """Where an engine's tensor-parallel ranks meet: free, and of no other engine of ours. One of them listens there seconds from
    now; SGLang draws it, and two of eight engines had the same in 0.35 % of starts.
    """
    for port in itertools.islice(_ports, len(_PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise EngineError(f"none of the ports {_PORTS.start} to {_PORTS.stop - 1} is free, and sglang needs one")


def has_small_heads(model_path: Path) -> bool:
    """Whether SGLang's default attention may have no kernels for it on a GPU; Triton's has."""
    about = orjson.loads((model_path / "config.json").read_bytes())
    about = about.get("text_config", about)
    # GPT-2 and its kind have other names for them
    head_dim = about.get("head_dim") or about.get("hidden_size", 0) // about.get("num_attention_heads", 1)
    return 0 < head_dim < _LEAST_HEAD_DIM


def _of_free(share: float, gpus: Iterable[int]) -> float:
    """A share of all of a GPU's memory as SGLang counts it, for which all is what a learner has left free when it starts.

    Raises:
        EngineError: nvidia-smi does not work.
    """
    names = nvidia_smi.names(gpus)
    memories = nvidia_smi.ask(("memory.total", "memory.free"), "how much memory is free", EngineError, gpus=names)
    return min(max(share, _MOST_OF_FREE), max(share * total / max(free, 1.0) for total, free in memories))


@contextmanager
def _own_logging() -> Iterator[None]:
    """SGLang puts its handler in the place of all others', and so prints what other packages log.

    It warns of wrong outputs where a context is longer than the model's, as `_KEPT_TOKENS` may make it; nobody gets so far.
    """
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    models, kept = logging.getLogger("sglang.srt.configs.model_config"), "Warning: User-specified context_length"
    quiet = lambda record: not record.getMessage().startswith(kept)  # noqa: E731
    models.addFilter(quiet)
    try:
        yield
    finally:
        models.removeFilter(quiet)
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
    for child in children:
        # through which tensor-parallel ranks spoke, 25 MB
        for path in Path("/dev/shm").glob(f"sgl_shm_*_{child.pid}_*"):
            path.unlink()
            resource_tracker.unregister(f"/{path.name}", "shared_memory")


def _close_sockets(manager: Any) -> None:
    """Left to the garbage collector, their context waits for ever for someone to read what was not sent."""
    for zmq_socket in (manager.recv_from_detokenizer, manager.send_to_scheduler):
        zmq_socket.context.destroy(linger=0)


def _remove_files(port_args: Any) -> None:
    """The sockets and the load table that SGLang leaves in /tmp and /dev/shm."""
    from sglang.srt.managers.load_snapshot import shm_path_for  # pyright: ignore[reportMissingImports]

    names = [getattr(port_args, name) for name in dir(port_args) if name.endswith("_ipc_name")]
    sockets = [name.removeprefix("ipc://") for name in names if isinstance(name, str) and name.startswith("ipc://")]
    for path in (*sockets, shm_path_for(port_args.instance_id)):
        Path(path).unlink(missing_ok=True)
