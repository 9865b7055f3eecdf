"""What can go wrong outside our own code, as one small tree.

A `WorldError` is data: it fails the episode it happened to (recorded with its cause, no vote, refilled).
A `UsageError` is something the user can set right: `run.py` prints its one sentence and exits with code 2.
Anything else is a bug and ends the run.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class L0fastError(Exception):
    """Base of every error this package raises on purpose."""


class UsageError(L0fastError, ValueError):
    """A setting, file or folder that can't be used: what it is, its value, the way out."""


class WorldError(L0fastError):
    """The world outside the event loop failed: a process died, a deadline passed."""


class SandboxError(WorldError):
    """A session could not be started, reached or kept."""


class EngineError(WorldError):
    """The inference engine failed, refused or lost a request."""


class ToolError(L0fastError):
    """A tool can't answer. Shown to the agent as an exception in its cell; the episode goes on."""


class LearnerError(WorldError):
    """The learner process failed, or stopped answering. Never an episode's fault: it ends the run."""


@contextmanager
def boundary(error: type[WorldError], doing: str) -> Iterator[None]:
    """Turn OSError, EOFError and TimeoutError into `error("could not <doing>: ...")`, keeping the cause."""
    try:
        yield
    except (OSError, EOFError, TimeoutError) as e:
        raise error(
            f"could not {doing}: {type(e).__name__}: {e}" if str(e) else f"could not {doing}: {type(e).__name__}"
        ) from e


def holds(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Whether an error, or one in a group of them, is of a kind."""
    return isinstance(error, kind) or (isinstance(error, BaseExceptionGroup) and error.subgroup(kind) is not None)


def known(error: BaseException) -> L0fastError | None:
    """What a command says in one sentence: of a group the first error. None where there is a bug, which keeps its traceback."""
    if not isinstance(error, BaseExceptionGroup):
        return error if isinstance(error, L0fastError) else None
    errors = [known(e) for e in error.exceptions]
    return None if None in errors else errors[0]
