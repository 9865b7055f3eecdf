"""Numbers that a benchmark can do with: a wrong one is one sentence at once, not a traceback after the measurement."""

import argparse
import math
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type."""

    def number(value: str) -> int:
        try:
            found = int(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{value!r} is no whole number: give at least {least}") from None
        if found < least:
            raise argparse.ArgumentTypeError(f"{value}: give at least {least}")
        return found

    return number


def more_than_0(value: str) -> float:
    """An argparse type."""
    found = _number(value, "one above 0")
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"{value}: give a number above 0")
    return found


def not_below_0(value: str) -> float:
    """An argparse type."""
    found = _number(value, "0 or more")
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"{value}: give 0 or more")
    return found


def _number(value: str, wanted: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is no number: give {wanted}") from None
