"""From the model's words to an action. Total: any text gives code to run, or a complaint to show as the next output.

    <think> why </think> <code> python </code>

The code of exactly one closed <code> block is run, whatever stands around it; the format reward is stricter (as L0's:
exactly one <think> of more than 10 characters and exactly one <code> of more than 5).
"""

from dataclasses import dataclass
from textwrap import dedent

_MIN_THINK_CHARS = 10
_MIN_CODE_CHARS = 5


@dataclass(frozen=True, slots=True)
class Action:
    think: str
    code: str
    """What to run; empty where there is a complaint."""
    complaint: str | None
    """Told to the model instead of an output."""
    well_formed: bool


def parse_action(text: str) -> Action:
    """Read one response.

    >>> parse_action("<think>Look it up first.</think><code>search('Oslo')</code>").code
    "search('Oslo')"
    >>> parse_action("Oslo, I think.").complaint
    'No code was run: write one <code>...</code> block.'
    """
    thinks, codes = _blocks(text, "<think>", "</think>"), _blocks(text, "<code>", "</code>")
    # lines that end in \r\n are the same to Python, but not to dedent
    code = codes[0].replace("\r\n", "\n").strip("\n") if codes else ""
    if code.startswith((" ", "\t")):
        # as it stands, it would be an IndentationError
        code = dedent(code).lstrip(" \t")
    if len(codes) > 1:
        complaint = f"No code was run: found {len(codes)} <code> blocks, write exactly one."
    elif codes and not code.strip():
        complaint = "No code was run: the <code> block is empty."
    elif codes:
        complaint = None
    elif "<code>" in text:
        complaint = "No code was run: <code> is not closed by </code>."
    else:
        complaint = "No code was run: write one <code>...</code> block."
    well_formed = (
        len(thinks) == text.count("<think>") == 1
        and len(codes) == text.count("<code>") == 1
        and len(thinks[0].strip()) > _MIN_THINK_CHARS
        and len(code.strip()) > _MIN_CODE_CHARS
    )
    think = thinks[0].strip() if thinks else ""
    return Action(think=think, code="" if complaint else code, complaint=complaint, well_formed=well_formed)


def _blocks(text: str, opened: str, closed: str) -> list[str]:
    """What stands between the tags, each from an opening one to the next closing one."""
    # a regular expression takes five times as long, and this runs on the event loop for every turn
    blocks, end = [], 0
    while (start := text.find(opened, end)) >= 0 and (end := text.find(closed, start + len(opened))) >= 0:
        blocks.append(text[start + len(opened) : end])
        end += len(closed)
    return blocks
