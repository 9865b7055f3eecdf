"""`random` and `threading`, imported so that what they do after every fork is left to the forks of a session.

Both register a function with `os.register_at_fork`: to draw a new seed, and to forget other threads. A session is seeded
by the host and its zygote has one thread, so there is nothing to do; running them costs a session 140 page faults of 220
that a fork causes by itself. To be imported before anything else imports these two.
"""

from __future__ import annotations

import os
from typing import Any

_registered: list[dict[str, Any]] = []
_register = os.register_at_fork
os.register_at_fork = lambda **functions: _registered.append(functions)  # type: ignore[assignment]
try:
    import random  # noqa: F401
    import threading  # noqa: F401
finally:
    os.register_at_fork = _register


def register() -> None:
    """In a session: what they wanted to run after a fork is run after its forks."""
    for functions in _registered:
        _register(**functions)
