"""How much of a disk a run's trajectories take, and whether it has that; they are nearly all that a run without a large
model writes, and more than its checkpoints after some hours of long episodes.

    a token       its id, 6; a sampled one's log-prob, 20; text, 4, that of a tool twice, as told and as shown: some 24 bytes
    an episode    half sampled, as long as its context may be
    a run         each step's, or those of its newest `rollout.keep_trajectories` steps; evaluations
"""

import os
import shutil
import tempfile
from pathlib import Path

from l0fast.config import RunConfig
from l0fast.errors import UsageError

BYTES_PER_TOKEN = 24
"""Of a trajectory in its file: 22 where under half of it was sampled, 27 where three quarters were, 30 turns of 20,000 tokens in
all [bytes]."""


def num_evaluated(config: RunConfig) -> int:
    """Episodes of all evaluations of a run: before and after, sampled and greedily, and on the way [episodes]."""
    e = config.eval
    on_the_way = (config.num_steps - 1) // e.every if e.every else 0
    transfer = 0 if config.task.kind == "questions" else 2 * e.transfer_questions
    return 4 * e.questions + on_the_way * min(e.curve_questions, e.questions) + transfer


def trajectory_bytes(config: RunConfig, episodes: float) -> float:
    """Of so many episodes, if they fill their context."""
    return float(episodes * config.agent.context_tokens * BYTES_PER_TOKEN)


def step_bytes(config: RunConfig) -> float:
    """Of one step's episodes."""
    return trajectory_bytes(config, config.rollout.groups_per_step * config.rollout.group_size)


def kept_bytes(config: RunConfig, step: int = 0) -> float:
    """What comes to the folder after `step`, and stays to the end."""
    steps = min(config.num_steps, config.rollout.keep_trajectories or config.num_steps)
    evaluated = num_evaluated(config) * (1 - step / config.num_steps)
    return max(0, steps - step) * step_bytes(config) + trajectory_bytes(config, evaluated)


def no_room(config: RunConfig, run_dir: Path, step: int = 0) -> str | None:
    """None where the disk has room for the trajectories of a run that is after `step`; else a sentence with the way out."""
    folder = run_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    needed, free = kept_bytes(config, step), shutil.disk_usage(folder).free
    if needed <= free:
        return None
    return (
        f"trajectories may take {gigabytes(needed)}, {gigabytes(step_bytes(config))} a step, and the disk of {folder} has "
        f"{gigabytes(free)} free: set --rollout.keep-trajectories to the number of steps whose stay, or make room"
    )


def check_caches(*, with_sglang: bool) -> None:
    """Kernels for GPUs are compiled as they are met, into folders below the user's own: at a first step, or a first prompt.

    Raises:
        UsageError: one can't be written to, as below the HOME of a uid that a container was given, or on a disk that is full.
    """
    if (home := os.path.expanduser("~")) == "~":
        raise UsageError(f"HOME is not set, and uid {os.getuid()} has none: set it to a folder that can be written to")
    # triton/knobs.py: cache_knobs; sglang/srt/environ.py: SGLANG_CACHE_DIR, into which it has all packages that it uses compile
    folders = {"TRITON_CACHE_DIR": f"{os.environ.get('TRITON_HOME') or home}/.triton/cache"}
    if with_sglang:
        folders["SGLANG_CACHE_DIR"] = f"{home}/.cache/sglang"
    for variable, default in folders.items():
        folder = nearest = Path(os.path.expanduser(os.environ.get(variable) or default)).absolute()
        while not os.path.exists(nearest):
            nearest = nearest.parent
        try:
            with tempfile.TemporaryFile(dir=nearest) as file:
                file.write(bytes(4096))
        except OSError as e:
            raise UsageError(
                f"{folder}, where kernels for GPUs are kept once they are compiled, can't be written to ({e.strerror}): set HOME "
                f"or {variable} to a folder that can, on a disk of this machine for choice"
            ) from e


def gigabytes(size: float) -> str:
    """
    >>> gigabytes(1.2e11), gigabytes(2.4e6)
    ('120 GB', '0.0024 GB')
    """
    return f"{size / 1e9:,.0f} GB" if size >= 1e10 else f"{size / 1e9:.2g} GB"
