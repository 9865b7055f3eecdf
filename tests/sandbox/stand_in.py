"""A stand-in for a Docker daemon: a real server on a Unix socket, which answers as a test wants it to."""

import inspect
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]] | Any
"""What is sent as JSON, or a coroutine function that answers for itself."""

VERSION = {"Version": "20.10.24+dfsg1", "ApiVersion": "1.41", "Components": [{"Name": "Engine"}]}
INFO = {
    "OSType": "linux",
    "SecurityOptions": ["name=seccomp,profile=default"],
    "MemoryLimit": True,
    "PidsLimit": True,
    "CPUShares": True,
    "Runtimes": {"runsc": {}, "runc": {}},
}


def failure(status: int, message: str) -> web.Response:
    """As Docker says it: JSON without a charset."""
    body = json.dumps({"message": message}).encode()
    return web.Response(status=status, body=body, headers={"Content-Type": "application/json"})


@asynccontextmanager
async def serving(path: Path, answers: Mapping[str, Answer] | None = None) -> AsyncIterator[list[str]]:
    """Serve for as long as the block runs.

    Args:
        answers: by "METHOD /path", without the API version; beside those of /version and /info.

    Yields:
        "METHOD /path" of the requests so far.
    """
    known = {"GET /version": VERSION, "GET /info": INFO, **(answers or {})}
    asked: list[str] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        path = request.path
        if path.startswith("/v1."):
            path = path[path.index("/", 1) :]
        asked.append(f"{request.method} {path}")
        if asked[-1] not in known:
            return failure(404, f"no such thing: {path}")
        what = known[asked[-1]]
        return await what(request) if inspect.iscoroutinefunction(what) else web.json_response(what)

    app = web.Application(client_max_size=0)
    app.router.add_route("*", "/{path:.*}", answer)
    # an answer that nobody waits for any more ends
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.UnixSite(runner, str(path)).start()
        yield asked
    finally:
        await runner.cleanup()
