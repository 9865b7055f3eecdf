"""Mathematical expressions compared by math-verify; what runs in the child process that scoring.py keeps for it."""

import logging
from typing import Any

from l0fast.errors import UsageError


def start_child() -> None:
    try:
        import math_verify
    except ImportError:
        # the first comparison says so
        return

    # it warns at each call that its own time limits, signals, are off
    logging.getLogger(math_verify.__name__).setLevel(logging.ERROR)


def any_equal(answer: str, rights: tuple[str, ...]) -> bool:
    """Whether `answer` can be read as an expression equal to one of `rights`."""
    try:
        from math_verify import verify
    except ImportError as e:
        raise UsageError("comparing expressions needs math-verify: pip install 'l0fast[math]'") from e
    given = _readings(answer)
    return any(
        verify(right_reading, reading, timeout_seconds=None)
        for right in rights
        for right_reading in _readings(right)
        for reading in given
    )


def _readings(text: str) -> list[Any]:
    """What a text may mean: all of it as LaTeX, where it is not marked which part is, and what is found in it."""
    from math_verify import parse

    texts = [text] if "$" in text or r"\boxed" in text or r"\(" in text else [f"${text}$", text]
    # 0: its own time limits are signals, and whoever called has one
    readings = [parse(t, parsing_timeout=0) for t in texts]
    return [reading for reading in readings if reading]
