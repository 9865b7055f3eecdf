"""`inspect_file` and `visual_qa`: what a task brought along, and pictures, for a model that reads text.

A file is one of the task's own, by its name in the session's folder; the host reads its own copy, so an agent can't name
another file of this machine. A picture may also be a public web address. `visual_qa` asks any OpenAI-compatible endpoint
with a model that sees.

Answers are kept by the file's path and its content: a cache outlives the run, and a file may be another one by the next.
"""

import asyncio
import base64
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from l0fast.config import WebConfig
from l0fast.engine.base import Sampling
from l0fast.engine.openai import OpenAIEngine
from l0fast.errors import EngineError, ToolError
from l0fast.sandbox.base import ToolSpec
from l0fast.tools.cache import normaliser
from l0fast.tools.convert import Converter
from l0fast.tools.http import Http
from l0fast.types import Task

IMAGES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif", ".webp": "image/webp"}
MAX_BYTES = 20 << 20
"""Of a file that is looked into."""
ANSWER_TOKENS = 1024
"""Of an answer about a picture [tokens]."""

TaskTool = Callable[[Task], ToolSpec]
"""A tool that is another one for each task."""


def inspect_file_tool(config: WebConfig, converter: Converter) -> ToolSpec:
    """What `inspect_file_of` calls: by path and content, so that its answers can be kept. Never handed to an agent."""

    async def inspect(path: str, content: str, part: int) -> str:
        file = Path(path)
        text = await converter.markdown(await _read(file), "", file.name)
        num_parts = max(1, -(-len(text) // config.page_chars))
        if not 1 <= part <= num_parts:
            raise ToolError(f"{file.name} has {num_parts} parts: part = {part} is none of them")
        more = f"\n[part {part} of {num_parts}]" if num_parts > 1 else ""
        return text[(part - 1) * config.page_chars : part * config.page_chars] + more

    return ToolSpec(name="inspect_file", signature="(path: str, content: str, part: int) -> str", doc="", call=inspect)


def inspect_file_of(inspect: ToolSpec) -> TaskTool:
    """`inspect_file(name, part=1)`: text, tables, PDF; for pictures it points to `visual_qa`."""

    def of(task: Task) -> ToolSpec:
        async def inspect_file(name: str, part: int = 1) -> str:
            path = _own_file(task.files, name)
            if path.suffix.lower() in IMAGES:
                raise ToolError(f"{name} is a picture: ask visual_qa({name!r}, question)")
            return await inspect.call(str(path), await _content(path), part)

        return ToolSpec(
            name="inspect_file",
            signature="(name: str, part: int = 1) -> str",
            doc="A file of this task as text: tables as CSV, PDFs page by page.",
            call=inspect_file,
        )

    return of


def visual_qa_tool(engine: OpenAIEngine, http: Http) -> ToolSpec:
    """What `visual_qa_of` calls: by path and content, or web address. Never handed to an agent."""

    async def look(image: str, content: str, question: str) -> str:
        if image.startswith(("http://", "https://")):
            page = await http.page(image)
            data, kind = page.body, page.content_type
            if kind not in IMAGES.values():
                raise ToolError(f"{image} is no picture but {kind}")
        else:
            data, kind = await _read(Path(image)), IMAGES[Path(image).suffix.lower()]
        url = f"data:{kind};base64,{base64.b64encode(data).decode()}"
        asked: Any = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}]
        sampling = Sampling(max_new_tokens=ANSWER_TOKENS, stop_token_ids=(), temperature=0.0)
        try:
            said = await engine.generate([{"role": "user", "content": asked}], sampling, conversation="visual_qa")
        except EngineError as e:
            raise ToolError(f"the model that sees gave no answer: {e}") from e
        return said.text.rpartition("</think>")[2].strip()

    return ToolSpec(name="visual_qa", signature="(image: str, content: str, question: str) -> str", doc="", call=look)


def visual_qa_of(look: ToolSpec) -> TaskTool:
    """`visual_qa(image, question)`: what a model that sees says about a picture of the task, or of the web."""

    signature = "(image: str, question: str) -> str"
    fits = normaliser("visual_qa", signature)

    def of(task: Task) -> ToolSpec:
        async def visual_qa(image: str, question: str) -> str:
            # no broker has checked them yet
            fits(image, question)
            content = ""
            if not image.startswith(("http://", "https://")):
                path = _own_file(task.files, image)
                if path.suffix.lower() not in IMAGES:
                    raise ToolError(f"{image} is no picture ({', '.join(IMAGES)}): ask inspect_file({image!r})")
                image, content = str(path), await _content(path)
            return await look.call(image, content, question)

        return ToolSpec(
            name="visual_qa",
            signature=signature,
            doc="Ask about a picture: a file of this task by its name, or a web address.",
            call=visual_qa,
        )

    return of


def _own_file(files: Mapping[str, str], name: str) -> Path:
    wanted = str(PurePosixPath(name))
    if wanted not in files:
        there = ", ".join(sorted(files)) or "none"
        raise ToolError(f"this task has no file {name!r}: it has {there}")
    return Path(files[wanted])


async def _content(path: Path) -> str:
    """Stands for the file's content. Not its time: a copy of it is the same file to a replay."""
    try:
        return await asyncio.to_thread(lambda: hashlib.sha256(_bytes(path)).hexdigest())
    except OSError as e:
        raise ToolError(f"{path.name} can't be read ({type(e).__name__}): do without") from e


async def _read(path: Path) -> bytes:
    return await asyncio.to_thread(_bytes, path)


def _bytes(path: Path) -> bytes:
    if path.stat().st_size > MAX_BYTES:
        raise ToolError(f"{path.name} is larger than {MAX_BYTES >> 20} MiB: open it with Python, a part at a time")
    return path.read_bytes()
