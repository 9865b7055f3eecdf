"""What a sandbox offers an agent: a persistent Python session, and nothing else of this machine.

    async with sandbox.session(tools, seed=7) as session:      # a fork; its folder, its limits, its tools
        result = await session.execute("x = search('Oslo')\\nx")

Every byte that comes back is the model's own words. Tools are coroutines that run on the host; the session asks for
them by RPC, so keys, network, ground truth and scores stay out of its reach.
"""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol

HostTool = Callable[..., Awaitable[Any]]
"""Called with the agent's JSON-like arguments; returns something JSON-like. `ToolError` and `TypeError` reach the agent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSpec:
    """A callable the session finds already defined."""

    name: str
    """Python name; "notepad.add_todo" becomes a method of an object `notepad`."""
    signature: str
    """As a reader would write it, e.g. "(query: str) -> list[str]"."""
    doc: str
    call: HostTool
    version: str = ""
    """Of what it answers from besides its arguments: answers of another version are none of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellError:
    name: str
    """Exception class, e.g. "NameError"; "Timeout" where the cell was stopped."""
    value: str
    traceback: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    output: str
    """stdout, stderr, the last expression's repr and the traceback, in order, truncated in the middle."""
    error: CellError | None
    wall_s: float


CELL_TIMEOUT_S = 30.0
"""Soft limit of a cell that names none [s]."""


class Session(Protocol):
    async def execute(self, code: str, *, timeout_s: float = CELL_TIMEOUT_S) -> CellResult:
        """Run one cell; state stays for the next.

        A cell that fails or times out is a result with an `error`. Raises SandboxError where the session is lost.
        """
        ...

    async def collect(self, *, max_files: int = 64, max_bytes: int = 4 << 20) -> dict[str, bytes]:
        """What the agent has left in its folder, by name ("out/plot.png"), folder by folder.

        Regular files alone, no links; not what was brought along and not changed. The first that is one too many, or would
        pass `max_bytes` with those before it, ends the list. Raises SandboxError where the session is lost.
        """
        ...


class Sandbox(Protocol):
    kind: str
    """"docker", "bwrap" or "process"."""

    def session(
        self, tools: Mapping[str, ToolSpec], *, seed: int, files: Mapping[str, str] = ...
    ) -> AbstractAsyncContextManager[Session]:
        """Lease a fresh session; leaving the block ends it and all it started.

        Args:
            files: copied into its folder, not writable: name there ("data/sales.csv") -> file on this machine.

        Raises:
            SandboxError: none could be had.
            UsageError: a name that leads out of the folder, a file that can't be read, or too many of them.
        """
        ...
