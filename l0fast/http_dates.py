"""How long a server asks to be left alone."""

import email.utils


def retry_after_s(value: str | None, now: float) -> float | None:
    """The wait that a Retry-After header asks for, in seconds or as a date; None where it asks for none.

    Args:
        now: seconds since the epoch.
    """
    if value is None:
        return None
    try:
        wait_s = float(value)
    except ValueError:
        try:
            wait_s = email.utils.parsedate_to_datetime(value).timestamp() - now
        except (ValueError, OverflowError):
            return None
    return max(wait_s, 0.0) if wait_s < float("inf") else None
