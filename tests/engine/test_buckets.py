"""What engines are given is whole, of one version, and named after it. The learner is a stand-in; no SGLang is needed."""

import asyncio
import os
import pickle
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch

from l0fast.engine import buckets as buckets_module
from l0fast.engine.buckets import DiskWeights, GroupWeights, HostWeights, Offer, RankWeights, _in_memory_file
from l0fast.ipc import shared_weights
from l0fast.learner.client import Sending


class Learner:
    """Of four ranks."""

    def __init__(self):
        self.policy_version = 3
        self.said: list[str] = []
        self.steps_while_saving = 0

    async def buckets(self, ranks):
        for part in ("a", "b"):
            self.said.append(part)
            yield [f"{part}{rank} of {self.policy_version}" if rank in ranks else "" for rank in range(4)]

    async def free_memory(self, *, empty_cache: bool) -> None:
        self.said.append("free all" if empty_cache else "free")

    async def save(self, path: Path) -> None:
        self.said.append(f"save {self.policy_version}")
        if self.steps_while_saving:
            self.steps_while_saving -= 1
            self.policy_version += 1
        path.mkdir(exist_ok=True)  # noqa: ASYNC240

    @asynccontextmanager
    async def broadcast(self, engines: int, *, ranks: int, wait_s: float) -> AsyncIterator[Sending]:
        self.said.append(f"offer to {engines} of {ranks} ranks, who have {wait_s:g} s")
        about = {"backend": "gloo", "dtype": "float32", "buckets": [[["a", [2, 3]]]]}
        sending = Sending(policy_version=3, offer={"ports": list(range(100, 100 + engines)), **about})
        yield sending
        self.said.append("sent")
        sending.failures = [None] * (engines - 1) + ["it was late"]


def test_each_engine_reads_from_the_ranks_on_its_gpus():
    learner = Learner()

    async def main():
        async with RankWeights(learner, tensor_parallel=2).weights([0, 1]) as (version, weights):
            assert learner.said == ["a", "b"]
            return version, weights

    version, weights = asyncio.run(main())
    assert version == 3
    assert weights[0] == [["a0 of 3", "a1 of 3"], ["b0 of 3", "b1 of 3"]]
    assert weights[1] == [["a2 of 3", "a3 of 3"], ["b2 of 3", "b3 of 3"]]
    # not before the engines have read them
    assert learner.said == ["a", "b", "free"]


def test_one_engine_that_was_rebuilt_reads_from_its_own_rank():
    async def main():
        async with RankWeights(Learner()).weights([2]) as (_, weights):
            return weights

    assert asyncio.run(main()) == {2: [["a2 of 3"], ["b2 of 3"]]}


def test_before_engines_wake_the_ranks_let_go_of_their_memory():
    learner = Learner()

    async def main():
        async with RankWeights(learner, make_room=True).weights([0]):
            learner.said.append("read")

    asyncio.run(main())
    assert learner.said == ["free all", "a", "b", "read", "free all"]


def test_a_folder_that_a_step_was_taken_over_is_written_again_and_gone_afterwards(tmp_path):
    learner, folder = Learner(), tmp_path / "weights"
    learner.steps_while_saving = 1

    async def main():
        async with DiskWeights(learner, folder).weights([0, 1]) as (version, weights):
            assert folder.is_dir()
            return version, weights

    assert asyncio.run(main()) == (4, {0: folder, 1: folder})
    assert learner.said == ["save 3", "save 4"]
    assert not folder.exists()


def test_each_engine_joins_a_group_of_its_own_and_the_one_that_was_lost_is_named():
    learner, log = Learner(), []

    async def main():
        source = GroupWeights(learner, wait_s=5.0, tensor_parallel=2, log=log.append)
        async with source.weights([1, 3]) as (version, weights):
            assert learner.said == ["offer to 2 of 2 ranks, who have 5 s"]
            return version, weights

    version, weights = asyncio.run(main())
    about = {"backend": "gloo", "ranks": 2, "dtype": "float32", "buckets": [[["a", [2, 3]]]]}
    assert version == 3
    assert weights == {1: Offer(port=100, **about), 3: Offer(port=101, **about)}
    assert learner.said[-1] == "sent"
    assert log == ["the learner could not send its weights to engine 3: it was late"]


def test_what_lies_in_main_memory_takes_nothing_of_dev_shm():
    """Where torch would put it, and of which a container has 64 MB."""
    flat = torch.arange(100, dtype=torch.uint8)
    shared = _in_memory_file(flat)
    assert torch.equal(shared, flat)
    fd, size = shared.untyped_storage()._share_fd_cpu_()
    assert os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:")
    assert size == 100


def buckets_open() -> int:
    """Descriptors of ours, each of which keeps a bucket in memory."""
    # one of them is of the listing, and is gone
    fds = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    return sum(os.readlink(fd).startswith("/memfd:l0fast-bucket") for fd in fds if fd.is_symlink())


@pytest.mark.parametrize("num_read", [4, 1, 0])
def test_what_an_engine_that_died_has_not_read_is_not_kept(folder, monkeypatch, num_read):
    def serialize_for(named_tensors, readers):
        """As SGLang's serializer has it, in bytes."""
        flat = _in_memory_file(torch.cat([tensor.flatten() for _, tensor in named_tensors]))
        return [bytes(ForkingPickler.dumps(flat)) for _ in range(readers)], flat

    async def update(source: HostWeights) -> int:
        weights: Any
        async with source.weights([0, 1]) as (version, weights):
            inside = buckets_open()
            payloads = [payload for buckets in weights.values() for ranks in buckets for payload in ranks]
            read = [await asyncio.to_thread(pickle.loads, payload) for payload in payloads[:num_read]]
            assert all(torch.equal(tensor, read[0]) for tensor in read)
            del read
        return inside

    monkeypatch.setattr(buckets_module, "serialize_for", serialize_for)
    with shared_weights(folder) as shared:
        shared.policy_version = 3
        source = HostWeights(shared, dtype="bfloat16", tensor_parallel=2)
        for _ in range(3):
            assert asyncio.run(update(source)) == 5
            assert buckets_open() == 0
