"""Starting and ending `sglang.Engine` in a process that is not its own.

SGLang takes a process for its own: it would answer SIGTERM, kill our whole process tree when a child of it fails, and
kill every child of ours at exit. `sglang_process` undoes that: SIGQUIT, by which a failing child asks for the end of us
all, does nothing, also while it starts; the watchdog thread that sends it, too, is stopped, and so is the work at exit. What is left is to run
the reading task (`auto_create_handle_loop` is where SGLang takes the signals, so it is not called), to watch the children
and to end them and no others.
"""

import asyncio
import atexit
import multiprocessing
import os
import signal
import warnings
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import orjson

from l0fast.config import EngineConfig
from l0fast.errors import EngineError, UsageError

_END_S = 20.0
"""Time a killed child has to give its GPU back [s]."""


@asynccontextmanager
async def sglang_process(
    config: EngineConfig, model_path: Path, *, max_tokens: int, gpu: int
) -> AsyncIterator[tuple[Any, list[Any]]]:
    """A running `sglang.Engine` and its child processes. Blocks the loop while it starts and while it ends."""
    arguments, variables = _arguments(config, model_path, max_tokens, gpu)
    handler = signal.getsignal(signal.SIGQUIT)
    try:
        with _environment(variables):
            engine = _start(arguments)
        engine.tokenizer_manager._subprocess_watchdog.stop()
        atexit.unregister(engine.shutdown)
        children = [p for p in multiprocessing.active_children() if p.pid in engine.get_all_child_pids()]
        try:
            yield engine, children
        finally:
            await asyncio.to_thread(_end, children)
            engine.send_to_rpc.context.destroy(linger=0)
            _close_sockets(engine.tokenizer_manager)
            _remove_files(engine.port_args)
    finally:
        signal.signal(signal.SIGQUIT, handler)


def _stay(number: int, frame: Any) -> None:
    """A child that fails asks for our end by SIGQUIT; we see its death, and live."""


def _start(arguments: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from sglang.srt.entrypoints.engine import Engine, init_tokenizer_manager  # pyright: ignore[reportMissingImports]
            from sglang.srt.server_args import PortArgs  # pyright: ignore[reportMissingImports]
        except ImportError as e:
            raise UsageError(
                f"engine.kind = 'sglang', but it can't be imported ({e}): pip install 'l0fast[gpu]'"
            ) from e
        ports: list[Any] = []
        managers: list[Any] = []

        class OurEngine(Engine):
            """One whose files and sockets are known also where its start fails."""

            @staticmethod
            def init_tokenizer_manager_func(*args: Any, **kwargs: Any) -> Any:
                made = init_tokenizer_manager(*args, **kwargs)
                managers.append(made[0])
                return made

            @classmethod
            def _launch_subprocesses(cls, server_args: Any, *args: Any, **kwargs: Any) -> Any:
                # newer ones ask for settings that are final
                getattr(server_args, "resolve_once", lambda: None)()
                ports.append(PortArgs.init_new(server_args))
                return super()._launch_subprocesses(server_args, *args, **kwargs, port_args=ports[0])

        before = multiprocessing.active_children()
        # apart from its making, so that what it registers for exit can be found where that fails
        engine = OurEngine.__new__(OurEngine)
        try:
            engine.__init__(**arguments)
            return engine
        except BaseException as e:
            _end([child for child in multiprocessing.active_children() if child not in before])
            atexit.unregister(engine.shutdown)
            for manager in managers:
                _close_sockets(manager)
            for port_args in ports:
                _remove_files(port_args)
            if not isinstance(e, (RuntimeError, OSError, EOFError)):
                raise
            raise EngineError(f"sglang did not start: {e}; what it said of it is on stderr") from e


def _arguments(
    config: EngineConfig, model_path: Path, max_tokens: int, gpu: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Of `sglang.Engine`, and what it reads from the environment."""
    import torch

    arguments: dict[str, Any] = {
        "model_path": str(model_path),
        "skip_tokenizer_init": True,
        "grammar_backend": "none",
        # the last two ids of a context SGLang keeps for itself
        "context_length": max_tokens + 2,
        "max_running_requests": config.slots,
        "sleep_on_idle": True,
        "weight_version": "0",
        "custom_sigquit_handler": _stay,
    }
    variables = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    if torch.cuda.is_available():
        # bf16 logits alone would move a log-prob by a hundredth
        arguments |= {"base_gpu_id": gpu, "dtype": "bfloat16", "enable_fp32_lm_head": True}
        arguments |= {"mem_fraction_static": config.memory_share, "cuda_graph_max_bs_decode": config.slots}
    else:
        arguments |= {"device": "cpu", "dtype": "float32", "attention_backend": "torch_native"}
        arguments |= {"sampling_backend": "pytorch", "disable_cuda_graph": True}
        arguments |= {"max_total_tokens": 64 * max_tokens, "mem_fraction_static": 0.3}
        variables |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": str(config.threads or 1)}
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


def _end(children: Sequence[Any]) -> None:
    """Kill SGLang's processes and what they started, and wait until their GPU is free. Blocks."""
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
