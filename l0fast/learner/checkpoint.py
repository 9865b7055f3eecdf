"""A checkpoint: everything a run needs to go on as if it had never stopped. torch.distributed.checkpoint of a sharded state.

    save    1. copy this rank's shards to main memory; training may go on
            2. a thread: all ranks write what they copied to path.tmp, rank 0 adds learner.json and driver.json, flushes
               all to the disk, renames path.tmp -> path, deletes the oldest of its kind beyond `keep`
    load    any number of ranks, whatever number saved

    path/.metadata, *.distcp     what is trained (model/NAME), AdamW's moments (optimizer/NAME/...), random states; the
                                 critic's, where there is one (critic/NAME, critic_optimizer/NAME/...)
    path/learner.json            policy version, steps taken, what the model is
    path/driver.json             the driver's own, which is not looked at here

A crash leaves path.tmp behind, which no one takes for a checkpoint and the next save of it overwrites; what was complete stays valid.
A disk that is full ends no run: what was written so far makes room again, `unwritten` says why, and the next save tries anew.
The thread talks to other ranks in a process group of its own, so that its messages and training's do not meet.

Format: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from l0fast.errors import UsageError
from l0fast.learner.critic import CriticModel
from l0fast.learner.policy_model import PolicyModel

LEARNER_FILE = "learner.json"
DRIVER_FILE = "driver.json"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""AdamW's state of a parameter."""


class Unwritten(Exception):
    """A checkpoint could not be written, or an old one not be removed: one sentence."""


class Checkpoints:
    """Saves and loads one policy, and its critic; every rank has one and all make the same calls in the same order.

    Args:
        keep: newest checkpoints that stay in a folder.
    """

    def __init__(self, policy: PolicyModel, keep: int, critic: CriticModel | None = None):
        self._policy, self._critic, self._keep = policy, critic, keep
        place = policy.place
        sharded = place.mesh is not None
        self._group = _own_group() if sharded else None
        self._cpu_mesh = init_device_mesh("cpu", (place.world,)) if sharded else None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._unsaid: str | None = None

    def save(self, path: Path, driver_state: dict[str, Any], policy_version: int) -> None:
        """Returns when the state is copied, once the save before it is over; it is written while training goes on.

        Args:
            path: the folder to make; one that is there is replaced.
            driver_state: JSON-like.
        """
        self._settle()
        policy = self._policy
        state = {name: self._copy(tensor) for name, tensor in _state(policy, self._critic).items()}
        about = {
            "policy_version": policy_version,
            "step_index": policy.step_index,
            "ranks": policy.place.world,
            "lora_rank": policy.config.lora_rank,
        }
        texts = {LEARNER_FILE: json.dumps(about, indent=1), DRIVER_FILE: json.dumps(driver_state)}
        self._writing = self._thread.submit(self._write, path, state, texts)

    def unwritten(self) -> str | None:
        """Why a save could not be written, said once; None as long as it is written, and where it was."""
        if self._writing is not None and self._writing.done():
            self._settle()
        said, self._unsaid = self._unsaid, None
        return said

    def _settle(self) -> None:
        try:
            self.wait()
        except Unwritten as e:
            self._unsaid = (
                f"{e}; the run goes on, and the next one is tried when it is due: make room, or look to its disk"
            )

    def wait(self) -> None:
        """Until the last save is complete. Raises Unwritten where it could not be, once; and a bug."""
        if (writing := self._writing) is not None:
            self._writing = None
            writing.result()

    def close(self) -> None:
        """After the last save; what fails now has no one to tell but the log, by its traceback."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def load(self, path: Path) -> int:
        """Set model, optimizer, schedule and random states as they were; returns the policy version. A batch begun is forgotten.

        Raises:
            UsageError: no checkpoint, or one of another model.
        """
        self.wait()
        policy = self._policy
        about = read_about(path)
        if about["lora_rank"] != policy.config.lora_rank:
            raise UsageError(
                f"{path} was made with learner.lora_rank = {about['lora_rank']}, not {policy.config.lora_rank}: set it to that"
            )
        state = _state(policy, self._critic)
        reader = dcp.FileSystemReader(path)
        try:
            saved = reader.read_metadata().state_dict_metadata
            missing = sorted(name for name in state if name not in saved and not name.startswith("random/"))
            if missing:
                raise UsageError(
                    f"{path} lacks {missing[0]} and {len(missing) - 1} more: it is of another model or critic"
                )
            with _alone_is_fine():
                # another number of ranks has other random states, and none of them is used in training
                dcp.load({name: t for name, t in state.items() if name in saved}, storage_reader=reader)
        except (OSError, ValueError, RuntimeError, CheckpointException) as e:
            raise UsageError(f"{path} can't be loaded as a checkpoint ({e}); take another") from e
        policy.discard()
        if self._critic is not None:
            self._critic.discard()
        policy.step_index = about["step_index"]
        _set_random_states(state, policy.place.rank)
        return about["policy_version"]

    def _copy(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if not isinstance(tensor, DTensor):
            return tensor.to("cpu", copy=True)
        assert self._cpu_mesh is not None, "only a sharded policy has DTensors"
        local = tensor.to_local().to("cpu", copy=True)
        return DTensor.from_local(
            local, self._cpu_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )

    def _write(self, path: Path, state: dict[str, Tensor], texts: dict[str, str]) -> None:
        partial = path.with_name(path.name + ".tmp")

        def make() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

        def complete() -> None:
            # rank 0 wrote .metadata last, when all ranks had written
            for name, text in texts.items():
                _write_flushed(partial / name, text)
            _flush_folder(partial)
            replace_folder(partial, path)

        try:
            self._of_rank_0(make)
            # flushes its files
            writer = dcp.FileSystemWriter(partial, sync_files=True)
            with _alone_is_fine():
                dcp.save(state, storage_writer=writer, process_group=self._group)
            # it is complete for all ranks or for none
            self._of_rank_0(complete)
        except (OSError, CheckpointException) as e:
            if self._policy.place.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise Unwritten(f"the checkpoint {path} could not be written ({_in_one_line(e)})") from e
        try:
            self._of_rank_0(lambda: prune(path.parent, self._keep))
        except OSError as e:
            raise Unwritten(f"a checkpoint older than {path} could not be removed ({_in_one_line(e)})") from e

    def _of_rank_0(self, work: Callable[[], None]) -> None:
        """What rank 0 alone does. A collective: all ranks raise the OSError that it raised."""
        failure: list[OSError | None] = [None]
        if self._policy.place.rank == 0:
            try:
                work()
            except OSError as e:
                failure = [e]
        if self._group is not None:
            dist.broadcast_object_list(failure, src=0, group=self._group)
        if failure[0] is not None:
            raise failure[0]


def read_about(path: Path) -> dict[str, Any]:
    """learner.json of a checkpoint. Raises UsageError where there is none."""
    try:
        return json.loads((path / LEARNER_FILE).read_text())
    except (OSError, ValueError) as e:
        raise UsageError(f"{path} is no complete checkpoint ({e}); name a folder that has a {LEARNER_FILE}") from e


def read_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """What a checkpoint has under names that begin so, whole and on the CPU, by the rest of their names. Raises UsageError."""
    try:
        reader = dcp.FileSystemReader(path)
        saved = reader.read_metadata().state_dict_metadata
        tensors = {
            name: torch.empty(tensor.size, dtype=tensor.properties.dtype)  # pyright: ignore[reportAttributeAccessIssue]
            for name, tensor in saved.items()
            if name.startswith(prefix)
        }
        with _alone_is_fine():
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except (OSError, EOFError, ValueError, RuntimeError, CheckpointException) as e:
        raise UsageError(f"{path} can't be read as a checkpoint ({e}): take another") from e
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, by policy version, oldest first."""
    found = [path.parent for path in folder.glob(f"*/{LEARNER_FILE}") if path.parent.suffix != ".tmp"]
    return sorted(found, key=lambda path: read_about(path)["policy_version"])


def prune(folder: Path, keep: int) -> None:
    """Delete all but the `keep` newest complete checkpoints of a folder."""
    for path in complete_checkpoints(folder)[:-keep]:
        # first no longer complete, then no longer there
        (path / LEARNER_FILE).unlink()
        shutil.rmtree(path)


def replace_folder(new: Path, path: Path) -> None:
    """Rename `new` to `path`; a folder of that name makes way. On the disk when it returns."""
    old = path.with_name(path.name + ".old.tmp")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    new.rename(path)
    _flush_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _state(policy: PolicyModel, critic: CriticModel | None) -> dict[str, Tensor]:
    """All that is saved, by name; tensors that are in use, so loading into them is loading."""
    state: dict[str, Tensor] = {}
    learners = [("model", "optimizer", policy), *([("critic", "critic_optimizer", critic)] if critic else [])]
    for trained, optimizer, learner in learners:
        for name, parameter in learner.trained.items():
            state[f"{trained}/{name}"] = parameter.detach()
            for moment in MOMENTS:
                state[f"{optimizer}/{name}/{moment}"] = learner.optimizer.state[parameter][moment]
    state[f"random/{policy.place.rank}/cpu"] = torch.get_rng_state()
    if policy.place.device.type == "cuda":
        state[f"random/{policy.place.rank}/cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_states(state: dict[str, Tensor], rank: int) -> None:
    torch.set_rng_state(state[f"random/{rank}/cpu"])
    if f"random/{rank}/cuda" in state:
        torch.cuda.set_rng_state(state[f"random/{rank}/cuda"])


def _in_one_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        # that of a rank; its own words are the frames it passed in all of them
        _, (error, _) = min(error.failures.items())
        # torch hides what the disk said behind its own
        cause = error.__cause__ or error.__context__
        error = cause if isinstance(cause, OSError) else error
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _own_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup), "all ranks are in it"
    return group


@contextmanager
def _alone_is_fine() -> Iterator[None]:
    """DCP warns where there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _write_flushed(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
