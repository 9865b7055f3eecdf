"""What one optimizer step does inside of a rank, as torch.profiler sees it: a file that trace.py merges into the run's trace.

From the step's first request (accumulate, values or fit) to the end of its finish_step, what is between two requests
included. One step, for a profile holds every operator of it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l0fast.ipc import Message

if TYPE_CHECKING:
    from torch.profiler import profile

_WORK = ("accumulate", "values", "fit", "finish_step")


class StepProfile:
    """Answers like `answer`, and records one step of it."""

    def __init__(self, answer: Callable[[Message], dict[str, Any]], path: Path, step: int, say: Callable[[], None]):
        """
        Args:
            path: where the profile goes.
            step: the policy version that it leads to.
            say: called before the profile is written, which takes its time.
        """
        self._answer, self._path, self._step, self._say = answer, path, step, say
        self._version = 0
        self._profile: profile | None = None

    def answer(self, message: Message) -> dict[str, Any]:
        op = message.header["op"]
        if op in _WORK and self._version + 1 == self._step and self._profile is None:
            self._profile = self._started()
        answered = self._answer(message)
        if op == "load_checkpoint":
            self._version = answered["policy_version"]
        elif op == "finish_step":
            self._version = message.header["policy_version"]
            if self._version == self._step and self._profile is not None:
                self._profile.stop()
                self._say()
                self._profile.export_chrome_trace(str(self._path))
        return answered

    @staticmethod
    def _started() -> "profile":
        import torch
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        started = profile(activities=activities)
        started.start()
        return started
