"""What the agent is told. Tools are described from their signatures and docstrings."""

from collections.abc import Iterable
from typing import Literal

from l0fast.sandbox.base import ToolSpec

_FULL = """\
You answer questions by writing Python in a live session, as in a notebook.

Each turn, write exactly two blocks and nothing else:
<think>what you know, what is missing, what you do next</think>
<code>Python to run now</code>
The code runs in a persistent session: variables, imports and functions stay for later turns. What it prints, the value of its last
expression and any error come back as <output>...</output>. One block may call several tools, loop over results and keep them in variables.

Already defined:
{tools}

Check a fact before you rely on it. Long outputs are cut, and old turns may be dropped from the conversation: keep what matters in
variables or in the notepad, which is always shown to you. When you are sure, call submit_final_answer with the shortest text
that answers the question; that ends the session. You have {max_turns} turns."""

_COMPACT = """\
Answer by Python.
{tools}"""


def system_prompt(style: Literal["compact", "full"], tools: Iterable[ToolSpec], *, max_turns: int) -> str:
    if style == "compact":
        return _COMPACT.format(tools="\n".join(tool.name + tool.signature for tool in tools if "." not in tool.name))
    return _FULL.format(
        tools="\n".join(f"{tool.name}{tool.signature}\n    {tool.doc}" for tool in tools), max_turns=max_turns
    )


def output_message(output: str, notepad: str = "") -> str:
    """The message a cell is answered with; `notepad` is given where it changed."""
    return f"<output>\n{output}\n</output>" + (f"\n{notepad}" if notepad else "")


def shorten(text: str, limit: int) -> str:
    """`text`, cut in the middle to about `limit` characters."""
    if len(text) <= limit:
        return text
    head = limit * 2 // 3
    return f"{text[:head]}\n[{len(text) - limit} characters cut]\n{text[len(text) - (limit - head) :]}"
