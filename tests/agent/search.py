"""The tool that agents under test have."""

from l0fast.errors import ToolError
from l0fast.sandbox.base import ToolSpec


async def search(query: str) -> list[str]:
    if not query:
        raise ToolError("search needs a word")
    return [f"The capital of {query} is Oslo."]


SEARCH = ToolSpec(name="search", signature="(query: str) -> list[str]", doc="Looks it up.", call=search)
