"""python -m l0fast.run: train an agent by reinforcement learning, in one process, on one event loop.

The command itself: words in, exit code out. What a run does is in training.py, loaded once the words hold.

Exit codes: 0 done, 1 the run failed, 2 something to set right, 130 interrupted.
"""

import asyncio
import sys
from collections.abc import Iterator, Sequence

from l0fast.cli import parse
from l0fast.errors import L0fastError, UsageError


def main(argv: Sequence[str] | None = None) -> int:
    try:
        invocation = parse(sys.argv[1:] if argv is None else argv)

        import uvloop

        if invocation.dry_run:
            from l0fast.dry_run import dry_run

            print(dry_run(invocation).text())  # noqa: T201 - it is the answer
            return 0

        from l0fast.training import run

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(run(invocation))
    except KeyboardInterrupt:
        # before the run or after it; or the second one, that ends it at once
        return 130
    except L0fastError as e:
        return _complain(e)
    except BaseExceptionGroup as group:
        # what the world does is one sentence, a bug keeps its traceback
        known, bugs = group.split(L0fastError)
        if known is None or bugs is not None:
            raise
        return _complain(next(_leaves(known)), group)


def _complain(error: BaseException, group: BaseException | None = None) -> int:
    # a note says how to go on
    for line in (f"l0fast: {error}", *getattr(group or error, "__notes__", ())):
        print(line, file=sys.stderr)  # noqa: T201
    return 2 if isinstance(error, UsageError) else 1


def _leaves(group: BaseExceptionGroup) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


if __name__ == "__main__":
    sys.exit(main())
