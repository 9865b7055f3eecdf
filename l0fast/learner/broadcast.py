"""Weights from rank 0 of the learner to engines on other GPUs, by a process group for each engine, made for one update.

    driver                       rank 0                                      an engine's tensor-parallel ranks
    offer ---------------------> listens, on a port for each engine
    <-- ports, what will come --
    send ----------------------> waits until they are there <--------------- init_weights_update_group
                                 flattens bucket after bucket, broadcasts -> update_weights_from_distributed
    <-- whom it did not reach --                                             destroy_weights_update_group

NCCL between GPUs, gloo on the CPU. A group that has lost a member is of no use to the others, so each engine has its own:
one that dies or hangs keeps the others waiting for `wait_s` at most, and takes nobody with it; also between its joining and
its first broadcast, when NCCL waits for it without end. A group is made anew for each update, so that an engine that was
rebuilt is like any other, and no state can get out of step. The price: a group is set up at each update, and the weights leave
rank 0 once for each engine.

NCCL refuses two ranks on one GPU, so engines must be on others than rank 0 (`engine.layout` "split"). Over gloo this is run
against SGLang 0.5.23 on the CPU; over NCCL it is yet to be run.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

IMPORTS_S = 60.0
"""Time that importing SGLang may take [s]."""
_POLL_S = 0.0005
"""Between two looks at whether a broadcast has come through [s]."""


class Broadcast:
    """What rank 0 is to send. One `send` each."""

    def __init__(self, engines: int, *, ranks: int, device: str, wait_s: float):
        """
        Args:
            ranks: of each engine.
            wait_s: time that all have to come, and then to take a bucket [s].
        """
        self.backend = "nccl" if device == "cuda" else "gloo"
        self._ranks, self._wait_s = ranks, wait_s
        self._sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(engines)]
        self.ports: list[int] = [s.getsockname()[1] for s in self._sockets]
        self._groups: dict[int, Any] = {}
        """By engine, as long as it has missed nothing."""
        self.failures: list[str | None] = [None] * engines

        # now, while engines still sample
        import sglang.srt.utils.common  # noqa: F401  # pyright: ignore[reportMissingImports]

    def close(self) -> None:
        for unused in self._sockets:
            unused.close()
        self._sockets = []

    def send(self, buckets: Iterator[list[tuple[str, "Tensor"]]], said: Callable[[str, float], None]) -> None:
        """Goes through all buckets, whoever is lost: to make them is a collective of the learner's ranks.

        Args:
            said: told what is done and how long it may take [s].
        """
        from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket  # pyright: ignore[reportMissingImports]

        try:
            said("waiting for engines to take weights", self._wait_s)
            self._meet()
            for bucket in buckets:
                if self._groups:
                    flat = FlattenedTensorBucket(named_tensors=bucket).get_flattened_tensor()
                    self._send(flat, said)
        finally:
            while self._groups:
                _destroy(self._groups.popitem()[1])

    def _meet(self) -> None:
        """Make the groups of engines whose ranks have come, all of them."""
        if not self.ports:
            return
        # each blocks until then
        with ThreadPoolExecutor(len(self.ports)) as pool:
            stores = [pool.submit(self._store, engine) for engine in range(len(self.ports))]
        for engine, store in enumerate(stores):
            self._unless_lost(engine, lambda engine=engine, store=store: self._join(engine, store.result()))

    def _store(self, engine: int) -> Any:
        """Through which its ranks find each other; returns when they are there."""
        import torch.distributed as dist

        return dist.TCPStore(
            "127.0.0.1",
            self.ports[engine],
            1 + self._ranks,
            is_master=True,
            timeout=timedelta(seconds=self._wait_s),
            master_listen_fd=self._sockets[engine].detach(),
        )

    def _join(self, engine: int, store: Any) -> None:
        import torch.distributed as dist
        from sglang.srt.utils.common import init_custom_process_group  # pyright: ignore[reportMissingImports]

        from l0fast.engine.buckets import group_name

        name = group_name(self.ports[engine])
        self._groups[engine] = init_custom_process_group(
            backend=self.backend,
            store=dist.PrefixStore(name, store),
            # until this gloo's threads can't be freed from a peer that hangs; NCCL's watchdog would end this process at it
            timeout=timedelta(seconds=self._wait_s * (1 if self.backend == "gloo" else 10)),
            world_size=1 + self._ranks,
            rank=0,
            group_name=name,
        )

    def _send(self, flat: "Tensor", said: Callable[[str, float], None]) -> None:
        works: dict[int, Any] = {}

        def start(engine: int) -> None:
            works[engine] = self._start(engine, flat)

        for engine in list(self._groups):
            said("sending weights to engines", self._wait_s)
            self._unless_lost(engine, lambda engine=engine: start(engine))
        said("sending weights to engines", self._wait_s)
        deadline = time.monotonic() + self._wait_s
        for engine, work in works.items():
            self._unless_lost(engine, lambda work=work: self._wait(work, deadline))

    def _start(self, engine: int, flat: "Tensor") -> Any:
        """A broadcast under way. NCCL makes the group's communicator with the first, and does not return from that until all of
        the engine's ranks do the same. So it is a thread that waits for them, and stays behind with those that don't come.
        """
        import torch
        import torch.distributed as dist

        # a thread has another one, and another device
        stream = torch.cuda.stream(torch.cuda.current_stream(flat.device)) if flat.is_cuda else nullcontext()
        started: Future[Any] = Future()

        def start(group: Any) -> None:
            try:
                with stream:
                    started.set_result(dist.broadcast(flat, src=0, group=group, async_op=True))
            except Exception as e:  # noqa: BLE001, for whoever waits
                started.set_exception(e)

        threading.Thread(target=start, args=(self._groups[engine],), daemon=True).start()
        try:
            return started.result(self._wait_s)
        except TimeoutError:
            # nothing can be asked of its group, not even to abort
            del self._groups[engine]
            raise TimeoutError(f"it joined, and did not take its first bucket within {self._wait_s:g} s") from None

    def _wait(self, work: Any, deadline: float) -> None:
        # waiting for NCCL's only has the stream wait, whatever timeout it is given
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise TimeoutError(f"it did not take a bucket in {self._wait_s:g} s")
            time.sleep(_POLL_S)
        work.wait()

    def _unless_lost(self, engine: int, step: Callable[[], None]) -> None:
        """All that torch.distributed says of a peer that is gone or late is a RuntimeError."""
        try:
            step()
        except (RuntimeError, TimeoutError) as e:
            self.failures[engine] = f"{type(e).__name__}: {e}"
            if (group := self._groups.pop(engine, None)) is not None:
                group.abort()
                _destroy(group)


def _destroy(group: Any) -> None:
    import torch.distributed as dist

    dist.destroy_process_group(group)
