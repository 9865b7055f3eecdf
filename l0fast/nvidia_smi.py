"""What nvidia-smi knows of this machine's GPUs: torch, asked for the same, would take memory of each of them."""

import os
import subprocess
from collections.abc import Iterable, Sequence

from l0fast.errors import L0fastError


def ask(fields: Sequence[str], what: str, error: type[L0fastError], *, gpus: Sequence[str] = ()) -> list[list[float]]:
    """The fields of each GPU, numbers in nvidia-smi's units.

    Args:
        what: they say, for the error.
        gpus: their numbers or uuids; none for all.

    Raises:
        L0fastError: of class `error`, where nvidia-smi does not work.
    """
    query = [f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    command = ["nvidia-smi", *([f"--id={','.join(gpus)}"] if gpus else []), *query]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        return [[float(value) for value in line.split(",")] for line in said.splitlines()]
    except (OSError, subprocess.SubprocessError, ValueError) as e:
        raise error(f"{' '.join(command)} does not say {what} ({e}): is the NVIDIA driver in order?") from e


def names(gpus: Iterable[int]) -> list[str]:
    """What GPUs are called there that are numbers to CUDA, for which CUDA_VISIBLE_DEVICES chooses among all of the machine's."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(gpu) if visible is None else visible.split(",")[gpu].strip() for gpu in gpus]
