"""The pool: sessions leased from shards that are started ahead of need and rebuilt when they die.

    SandboxPool.session()  ->  the least loaded shard that is alive and has a place (else wait, with a deadline)
    _keep(slot), one each  ->  start a shard | wait until it is lost or used up | clean up after it | again

A shard is used up when none of its uids is left that was never used, after 32,767 sessions, in a user namespace 511. Those
that it has then go on to their end beside a new one, which gives the rest of its places: all shards may come so far at once,
and an agent that had to wait for the longest episode of one would wait in vain.

Who waits for whom: an episode waits for a place, at most `start_timeout_s`; a place is freed by the zygote's word that
nothing of a session is left. A lost session or shard is SandboxError in the episodes it held and nobody else's; a
shard that fails to start `MAX_FAILURES` times in a row closes its slot, and with the last slot gone every lease says why.
"""

import ast
import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import lru_cache
from types import MappingProxyType

from l0fast.cgroups import cores
from l0fast.errors import SandboxError
from l0fast.sandbox.base import Session, ToolSpec
from l0fast.sandbox.session import PoolSession
from l0fast.sandbox.shard import Backend, Lease, Shard

MAX_FAILURES = 7
"""Failed starts in a row before a slot is given up."""
BACKOFF_S = 0.1
"""Wait after the first failed start, doubled after each: some 6 s in all, in which a daemon may restart [s]."""
LAUNCHES_AT_ONCE = 8
"""Shards being started at once."""
STARTS_AT_ONCE = max(2, cores())
"""Sessions being started at once [sessions]. A start is a processor's work from end to end (a fork, and the page faults
that follow it, most of it in the kernel): more of them than processors come up no sooner, and keep the loop waiting for
one. Two, so that one that hangs doesn't stop the others."""
GRACE_S = 3.0
"""From a cell's soft limit to its hard one [s]."""


class SandboxPool:
    """Sandbox of `num_shards` zygotes with `sessions_per_shard` places each."""

    def __init__(
        self,
        backend: Backend,
        *,
        num_shards: int,
        sessions_per_shard: int,
        start_timeout_s: float,
        grace_s: float = GRACE_S,
    ):
        self.kind = backend.kind
        self.backend = backend
        self._num_shards = num_shards
        self._per_shard = sessions_per_shard
        self.start_timeout_s = start_timeout_s
        self._grace_s = grace_s
        self._shards: dict[int, Shard] = {}
        self._retired: dict[int, dict[Shard, asyncio.Task[None]]] = {slot: {} for slot in range(num_shards)}
        """Of each slot those before its shard that have sessions left, and who waits for their end."""
        self._keepers: list[asyncio.Task[None]] = []
        self._starts = asyncio.Semaphore(STARTS_AT_ONCE)
        self._launches = asyncio.Semaphore(LAUNCHES_AT_ONCE)
        self._change = asyncio.Event()
        self._last_failure: SandboxError | None = None

    @property
    def shards(self) -> list[Shard]:
        return list(self._shards.values())

    def load(self) -> dict[str, int]:
        """Sessions that have not ended, by shard: {"shard 0": 31}."""
        return {f"shard {slot}": self._load(slot) for slot in self._shards}

    def _load(self, slot: int) -> int:
        return sum(shard.load for shard in (self._shards[slot], *self._retired[slot]))

    async def start(self) -> None:
        """Start all shards. Raises SandboxError where one can't be, with nothing left behind."""
        shards: list[Shard] = []
        rest: list[asyncio.Task[Shard]] = []
        try:
            await self.backend.open()
            # the first alone: what is wrong with this machine is then said once
            shards.append(await self._start_shard())
            rest += [asyncio.create_task(self._start_shard()) for _ in range(self._num_shards - 1)]
            shards += await asyncio.gather(*rest)
        except BaseException:
            for task in rest:
                task.cancel()
            results = await asyncio.gather(*rest, return_exceptions=True)
            for shard in {*shards, *(r for r in results if isinstance(r, Shard))}:
                await shard.close()
            await self.backend.close()
            raise
        self.report = shards[0].report
        for slot, shard in enumerate(shards):
            self._place(slot, shard)
            self._keepers.append(asyncio.create_task(self._keep(slot), name=f"sandbox shard {slot}"))

    async def _start_shard(self) -> Shard:
        async with self._launches:
            shard = await Shard.start(self.backend, self.start_timeout_s)
        shard.places = self._per_shard
        if self._per_shard == 1:
            # a zygote an agent: the next one gets a new one
            shard.retire_after(1)
        return shard

    async def close(self) -> None:
        """End every session and every zygote; back when nothing is left. Raises what a keeper died of."""
        tasks = [*self._keepers, *(task for retired in self._retired.values() for task in retired.values())]
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        shards = [*self._shards.values(), *(shard for retired in self._retired.values() for shard in retired)]
        results += await asyncio.gather(*(s.close() for s in shards), return_exceptions=True)
        self._shards.clear()
        await self.backend.close()
        for result in results:
            if isinstance(result, Exception):
                raise result

    @asynccontextmanager
    async def session(
        self, tools: Mapping[str, ToolSpec], *, seed: int, files: Mapping[str, str] = MappingProxyType({})
    ) -> AsyncIterator[Session]:
        """Lease a fresh session; leaving the block ends it and all it started. See `Sandbox.session`."""
        shard, lease = await self._lease(tools, seed, files)
        try:
            yield PoolSession(lease, tools, end=lambda: shard.kill(lease), grace_s=self._grace_s)
        finally:
            await shard.end(lease)

    async def _lease(self, tools: Mapping[str, ToolSpec], seed: int, files: Mapping[str, str]) -> tuple[Shard, Lease]:
        for spec in tools.values():
            _check_signature(spec.name, spec.signature)
        limit = asyncio.timeout(self.start_timeout_s)
        try:
            async with limit, self._starts:
                while True:
                    free = [slot for slot, s in self._shards.items() if s.open and self._load(slot) < self._per_shard]
                    if free:
                        shard = self._shards[min(free, key=self._load)]
                        return shard, await shard.lease(tools.values(), seed, self.start_timeout_s, files)
                    if not any(self._alive(keeper) for keeper in self._keepers):
                        raise SandboxError(f"no shard is left: {self._last_failure}") from self._last_failure
                    self._change.clear()
                    await self._change.wait()
        except TimeoutError as e:
            if not limit.expired():
                raise
            raise SandboxError(
                f"no session could be had within {self.start_timeout_s:g} s: {self._num_shards} shards have "
                f"{self._per_shard} places each"
            ) from e

    def _alive(self, keeper: "asyncio.Task[None]") -> bool:
        if keeper.done() and not keeper.cancelled():
            # a bug in there is a bug here
            keeper.result()
        return not keeper.done()

    def _place(self, slot: int, shard: Shard) -> None:
        shard.on_change = self._change.set
        self._shards[slot] = shard
        self._change.set()

    async def _keep(self, slot: int) -> None:
        """Rebuild the slot's shard whenever it is lost or has no uid left to give."""
        failures = 0
        while failures < MAX_FAILURES:
            old = self._shards.get(slot)
            if old is not None:
                await old.retired()
                if old.over:
                    await old.close()
                else:
                    leaving = self._let_leave(slot, old)
                    self._retired[slot][old] = asyncio.create_task(leaving, name=f"retired sandbox shard {slot}")
                del self._shards[slot]
            try:
                self._place(slot, await self._start_shard())
                failures = 0
            except SandboxError as e:
                self._last_failure = e
                failures += 1
                if failures < MAX_FAILURES:
                    await asyncio.sleep(BACKOFF_S * 2 ** (failures - 1))
                elif leaving := [*self._retired[slot].values()]:
                    # what there is too little of may be what it holds, as uids in a user namespace
                    await leaving[0]
                    failures = 0
        self._change.set()

    async def _let_leave(self, slot: int, shard: Shard) -> None:
        """Clean up after a retired shard when its last session has ended."""
        await shard.finished()
        await shard.close()
        del self._retired[slot][shard]
        self._change.set()


@lru_cache(1024)
def _check_signature(full_name: str, signature: str) -> None:
    # every episode of a run has the same few tools
    owner, _, name = full_name.rpartition(".")
    if not (name.isidentifier() and (not owner or owner.isidentifier())):
        raise ValueError(f"tool name {full_name!r} is no Python name: use a name, or owner.name")
    try:
        (function,) = ast.parse(f"def {name}{signature}: pass").body
        if not isinstance(function, ast.FunctionDef) or len(function.body) > 1:
            raise SyntaxError("more than a signature")
    except (SyntaxError, ValueError) as e:
        raise ValueError(
            f"tool {full_name!r} has the signature {signature!r}, which is no Python: write (name: type) -> type"
        ) from e
