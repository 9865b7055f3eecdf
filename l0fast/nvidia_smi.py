"""What nvidia-smi knows of this machine's GPUs: torch, asked for the same, would take memory of each of them."""

import os
import subprocess
from collections.abc import Iterable, Sequence

from l0fast.errors import L0fastError


def ask(fields: Sequence[str], what: str, error: type[L0fastError], *, gpus: Sequence[str]) -> list[list[float]]:
    """The fields of each of these GPUs, in this order; numbers in nvidia-smi's units.

    Args:
        what: they say, for the error.
        gpus: their numbers, or what their uuids begin with, as CUDA_VISIBLE_DEVICES has them.

    Raises:
        L0fastError: of class `error`, where nvidia-smi does not work, or knows no such GPU.
    """
    # of all, by name: nothing promises that those asked for by --id come in the order asked for
    command = ["nvidia-smi", f"--query-gpu=index,uuid,{','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        rows = [[value.strip() for value in line.split(",")] for line in said.splitlines()]
        told = [(index, uuid, [float(value) for value in values]) for index, uuid, *values in rows]
    except (OSError, subprocess.SubprocessError, ValueError) as e:
        raise error(f"{' '.join(command)} does not say {what} ({e}): is the NVIDIA driver in order?") from e
    found = []
    for gpu in gpus:
        of_it = [values for index, uuid, values in told if gpu == index or uuid.startswith(gpu)]
        if not of_it:
            raise error(f"nvidia-smi knows no GPU {gpu}: choose whole ones by number or uuid in CUDA_VISIBLE_DEVICES")
        found.append(of_it[0])
    return found


def names(gpus: Iterable[int]) -> list[str]:
    """What GPUs are called there that are numbers to CUDA, for which CUDA_VISIBLE_DEVICES chooses among all of the machine's."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(gpu) if visible is None else visible.split(",")[gpu].strip() for gpu in gpus]
