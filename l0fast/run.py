"""python -m l0fast.run: train an agent by reinforcement learning, in one process, on one event loop.

The command itself: words in, exit code out. What a run does is in training.py, loaded once the words hold.

Exit codes: 0 done, 1 the run failed, 2 something to set right, 130 interrupted.
"""

import sys
from collections.abc import Sequence

from l0fast.errors import L0fastError, UsageError, known
from l0fast.first_process import step_back


def main(argv: Sequence[str] | None = None) -> int:
    try:
        # what takes time to load is loaded here, where Ctrl-C is heard
        from l0fast.cli import parse, until_read

        invocation = parse(sys.argv[1:] if argv is None else argv)

        import asyncio

        import uvloop

        if invocation.dry_run:
            from l0fast.dry_run import dry_run

            plan = dry_run(invocation)
            with until_read():
                print(plan.text())  # noqa: T201 - it is the answer
            return 0

        from l0fast.training import run

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(run(invocation))
    except KeyboardInterrupt:
        # before the run or after it; or the second one, that ends it at once
        return 130
    except (L0fastError, BaseExceptionGroup) as e:
        if (error := known(e)) is None:
            raise
        # a note says how to go on
        for line in (f"l0fast: {error}", *getattr(e, "__notes__", ())):
            print(line, file=sys.stderr)  # noqa: T201
        return 2 if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    step_back()
    sys.exit(main())
