"""Ranks that share a model compute what one process does, and write the same model; those of ranks.py, run once."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.testing._internal.distributed.fake_pg import FakeStore

from l0fast.engine import buckets as buckets_module
from l0fast.ipc import Message, shared_bytes
from l0fast.learner.checkpoint import Checkpoints, complete_checkpoints
from l0fast.learner.critic import CriticModel
from l0fast.learner.loading import whole
from l0fast.learner.packing import balance, to_bytes
from l0fast.learner.policy_model import PolicyModel
from l0fast.learner.rank import Rank, process_group
from l0fast.learner.rank import run as run_rank

ROOM = Path(__file__).parent


@pytest.fixture(scope="module")
def new(program, model_path):
    return lambda config=program.CONFIG: PolicyModel(model_path, config, num_steps=10, temperature=1.0)


@pytest.fixture(scope="module")
def two(program, new, packs, model_path, tmp_path_factory):
    """What two ranks left in `folder`, and `seen`."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "packs.bin").write_bytes(to_bytes(packs))
    one = new()
    critic = CriticModel(one)
    copy = program.fitted(critic, packs, packs, len(packs))
    one.step(packs)
    checkpoints = Checkpoints(one, 5, critic)
    checkpoints.save(folder / "one", {}, policy_version=1)
    checkpoints.close()
    run(folder, model_path)
    return SimpleNamespace(folder=folder, one_copy=copy, **torch.load(folder / "seen.pt", weights_only=True))


def run(folder, model_path):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log, socket.create_server(("127.0.0.1", 0)) as server:
        rest = ["2", str(server.getsockname()[1]), str(server.fileno()), folder, model_path]
        ranks = [
            subprocess.Popen(
                [sys.executable, ROOM / "ranks.py", str(rank), *rest],
                env=env,
                stderr=log,
                pass_fds=[] if rank else [server.fileno()],
            )
            for rank in range(2)
        ]
        try:
            codes = [rank.wait(100) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    assert codes == [0, 0], (folder / "log").read_text()


@pytest.mark.parametrize("which", ["gradients", "more"])
def test_two_ranks_make_the_gradients_of_one(two, program, new, packs, which):
    """Also with activations computed again and weights kept on the CPU."""
    num_tokens = sum(len(pack.predictors) for pack in packs)
    ours = {name: grad / num_tokens for name, grad in getattr(two, which).items()}
    theirs = {name: grad / num_tokens for name, grad in program.gradients(new(), packs, len(packs)).items()}
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert grad.abs().max() > 1e-4, f"{name}: a gradient of nothing tests nothing"
        assert (ours[name] - grad).abs().max() < 1e-6, name
        assert (ours[name] - grad).norm() / grad.norm() < 5e-6, name


def test_two_ranks_take_the_step_of_one_and_report_it(two, new, packs):
    policy = new()
    metrics = policy.step(packs)
    assert two.metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        if value is not None and not name.endswith("_s"):
            assert two.metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name
    torch.testing.assert_close(two.weights, dict(policy.weights()), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["head", "copy"])
def test_two_ranks_fit_the_critic_of_one(two, program, new, packs, kind):
    critic = CriticModel(new({"head": program.HEAD, "copy": program.CONFIG}[kind]))
    theirs, ours = program.fitted(critic, packs, packs, len(packs)), getattr(two, kind)
    for metrics, of_one in zip(ours["metrics"], theirs["metrics"], strict=True):
        assert metrics == pytest.approx(of_one, rel=1e-4, abs=1e-6)
    first, second = ours["metrics"]
    assert second["critic_loss"] < first["critic_loss"]
    torch.testing.assert_close(ours["weights"], theirs["weights"], rtol=0, atol=1e-5)
    of_rank_0 = balance(packs, 2)[0]
    np.testing.assert_allclose(ours["values"], critic.values_of(of_rank_0, len(of_rank_0)), atol=1e-5)


def test_two_ranks_train_the_additions_of_one(two, program, new, packs):
    policy = new(program.LORA)
    policy.step(packs)
    torch.testing.assert_close(two.lora, dict(policy.weights()), rtol=0, atol=2e-6)


def test_each_rank_holds_half_of_the_weights(two, new):
    assert two.shard == pytest.approx(new().model.num_parameters() / 2, rel=0.02)


def test_buckets_are_the_exported_model_in_order_tied_weights_once(two, new):
    exported = load_file(two.folder / "exported" / "model.safetensors")
    for dtype, buckets in two.buckets.items():
        names = [name for bucket in buckets for name, _ in bucket]
        assert names == [name for name, _ in new().model.named_parameters()]
        assert set(names) == exported.keys()
        for bucket in buckets:
            assert len(bucket) == 1 or sum(tensor.nbytes for _, tensor in bucket) <= 5000
            for name, tensor in bucket:
                assert torch.equal(tensor, exported[name].to(dtype)), name
        assert 1 < len(buckets) < len(names)


@pytest.mark.parametrize("settings", ["CONFIG", "LORA"])
def test_what_buckets_will_hold_is_known_before_they_are_made(new, program, settings):
    policy = new(getattr(program, settings))
    buckets = list(policy.buckets(5000, torch.bfloat16))
    shapes = [[(name, tuple(tensor.shape)) for name, tensor in bucket] for bucket in buckets]
    assert policy.bucket_shapes(5000, torch.bfloat16) == shapes
    assert len(shapes) > 1


def test_after_a_checkpoint_two_ranks_go_on_bit_for_bit(two):
    assert two.version == 1
    torch.testing.assert_close(two.again, two.next, rtol=0, atol=0)
    assert two.again_copy["metrics"] == two.next_copy["metrics"] != two.copy["metrics"]
    torch.testing.assert_close(two.again_copy["weights"], two.next_copy["weights"], rtol=0, atol=0)


def test_two_ranks_go_on_from_the_checkpoint_of_one(two, new, packs):
    policy = new()
    policy.step(packs)
    torch.testing.assert_close(two.of_one, dict(policy.weights()), rtol=0, atol=0)
    torch.testing.assert_close(two.copy_of_one, two.one_copy["weights"], rtol=0, atol=0)
    policy.step(packs)
    torch.testing.assert_close(two.next_of_one, dict(policy.weights()), rtol=0, atol=2e-6)


def test_one_rank_goes_on_from_the_checkpoint_of_two(two, program, new, packs):
    policy = new()
    critic = CriticModel(policy)
    checkpoints = Checkpoints(policy, 5, critic)
    assert checkpoints.load(two.folder / "two") == 1
    checkpoints.close()
    torch.testing.assert_close(dict(policy.weights()), two.weights, rtol=0, atol=0)
    torch.testing.assert_close(program.weights_of(critic), two.copy["weights"], rtol=0, atol=0)
    policy.step(packs)
    torch.testing.assert_close(dict(policy.weights()), two.next, rtol=0, atol=2e-6)
    goes_on = program.fitted(critic, packs, packs, len(packs))
    assert goes_on["metrics"] == [pytest.approx(m, rel=1e-4, abs=1e-6) for m in two.next_copy["metrics"]]
    assert [path.name for path in complete_checkpoints(two.folder)] == ["one", "two"]


def test_what_is_offloaded_goes_to_the_gpus_before_it_is_gathered(monkeypatch):
    """Engines read buckets where they lie, on their GPU; and gloo, which gathers in main memory, takes minutes for a large model."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = DeviceMesh("cuda", [0, 1])
        meta = TensorMeta(torch.Size([6, 4]), (4, 1), torch.float32)
        offloaded = DTensor(torch.empty(3, 4), DTensorSpec(mesh, (Shard(0),), tensor_meta=meta), requires_grad=False)
        asked = []
        monkeypatch.setattr(DTensor, "to", lambda self, what: asked.append(what) or self)
        assert whole(offloaded, torch.bfloat16).shape == (6, 4)
        assert asked == ["cuda", torch.bfloat16]
    finally:
        dist.destroy_process_group()


class Channel:
    """That of a driver which asks for nothing."""

    def __init__(self):
        self.said: list[tuple[str, float]] = []
        self.progress = lambda doing, limit_s=0.0: self.said.append((doing, limit_s))

    def ready(self, **fields):
        pass

    def recv(self):
        raise EOFError


def test_a_model_is_read_as_long_as_io_timeout_s_says(program, model_path):
    """Of a disk that takes minutes for it: the deadline for a start is that of what comes before."""
    config = program.CONFIG.model_copy(update={"threads": torch.get_num_threads(), "io_timeout_s": 1234.0})
    about = {"rank": 0, "world": 1, "port": 0, "listen_fd": -1, "packs_fd": -1, "weights": None, "profile": None}
    about |= {"on_gpus": False, "meets_engines": False, "lends_memory": False}
    about |= {"num_steps": 10, "temperature": 1.0, "max_row": 0, "seed": 0, "keep_checkpoints": 1}
    about |= {"model_path": str(model_path)}
    channel = Channel()
    run_rank(channel, {"config": config.model_dump(), **about})
    assert ("loading the model", 1234.0) in channel.said


def test_a_rank_that_fails_says_so_instead_of_waiting_for_the_others_to_leave_with_it(monkeypatch):
    """NCCL's way out of a group is one for all ranks, and the others may be inside a collective."""
    monkeypatch.setattr(dist, "TCPStore", lambda *args, **kwargs: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: None)
    left = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append(True))
    with pytest.raises(torch.OutOfMemoryError), process_group("cpu", 1, 2, 0, -1, 60.0):
        raise torch.OutOfMemoryError("someone else is on this GPU")
    assert not left
    with process_group("cpu", 1, 2, 0, -1, 60.0):
        pass
    assert left


def test_groups_with_engines_are_not_split_from_the_learners(monkeypatch):
    """torch makes a group by splitting the default one where that is bound to a GPU, which takes all of its ranks."""
    start, devices = dist.init_process_group, []

    def init_process_group(backend, *, device_id=None, **settings):
        devices.append(device_id)
        start("gloo", **settings)

    monkeypatch.setattr(torch.cuda, "set_device", lambda rank: None)
    monkeypatch.setattr("l0fast.learner.rank._connect", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port, listen_fd = server.getsockname()[1], os.dup(server.fileno())
        with process_group("cuda", 0, 1, port, listen_fd, 60):
            assert devices == [None]


def test_gpus_are_connected_when_ranks_have_met_and_not_at_the_first_step(monkeypatch):
    """What NCCL says where it can't is then told before anything is sampled."""
    zeros, reduced = torch.zeros, []

    def all_reduce(tensor):
        reduced.append(tensor)
        raise dist.DistBackendError("Error while creating shared memory segment /dev/shm/nccl-XqQ1zD (size 9637888)")

    monkeypatch.setattr(torch.cuda, "set_device", lambda rank: None)
    monkeypatch.setattr(torch, "zeros", lambda shape, device: zeros(shape))
    monkeypatch.setattr(dist, "TCPStore", lambda *args, **kwargs: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    with pytest.raises(dist.DistBackendError, match="/dev/shm"), process_group("cuda", 1, 8, 0, -1, 60.0):
        pytest.fail("a rank was set up")
    assert len(reduced) == 1


@pytest.mark.parametrize(("meets", "theirs", "ours"), [(True, None, "0"), (True, "1", "1"), (False, None, None)])
def test_nccl_is_set_up_as_that_of_the_engines_it_meets(monkeypatch, program, meets, theirs, ours):
    class Channel:
        def progress(self, doing, limit_s=0.0):
            if doing == "loading the model":
                raise EOFError

    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", theirs or "")
    if theirs is None:
        monkeypatch.delenv("NCCL_CUMEM_ENABLE")
    channel: Any = Channel()
    args = {"config": program.CONFIG.model_dump(), "rank": 0, "world": 1, "seed": 0, "weights": None}
    args |= {"meets_engines": meets, "lends_memory": False, "on_gpus": False, "port": 0, "listen_fd": -1}
    with pytest.raises(EOFError):
        run_rank(channel, args)
    assert os.environ.get("NCCL_CUMEM_ENABLE") == ours


@pytest.mark.parametrize(("lends", "ours"), [(True, "False"), (False, "True")])
def test_memory_that_an_engine_reads_is_of_no_expandable_segment(monkeypatch, program, lends, ours):
    """Another process can't get at one in most containers."""

    class Channel:
        def progress(self, doing, limit_s=0.0):
            if doing == "loading the model":
                raise EOFError

    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512,expandable_segments:True")
    channel: Any = Channel()
    args = {"config": program.CONFIG.model_dump(), "rank": 0, "world": 1, "seed": 0, "weights": None}
    args |= {"meets_engines": False, "lends_memory": lends, "on_gpus": False, "port": 0, "listen_fd": -1}
    with pytest.raises(EOFError):
        run_rank(channel, args)
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == f"max_split_size_mb:512,expandable_segments:{ours}"


def test_what_nobody_will_read_is_not_told_of(monkeypatch, new):
    """CUDA memory that torch has told another process of is free when that one has read it."""
    monkeypatch.setattr(buckets_module, "serialize_bucket", lambda bucket: (bucket[0][0], bucket))
    monkeypatch.setattr("l0fast.learner.rank.BUCKET_BYTES", 20_000)
    policy, no_checkpoints = new(), cast(Any, None)
    with shared_bytes("packs") as packs:
        rank = Rank(policy, None, no_checkpoints, None, packs, publishes=False)

        def exported(ranks):
            ask = lambda first: rank.answer(Message({"op": "export", "first": first, "ranks": ranks}, b""))["bucket"]  # noqa: E731
            return [ask(True), *iter(lambda: ask(False), None)]

        read = exported([0, 2])
        assert len(read) > 1
        assert all(read)
        assert len(rank._exported) == len(read)
        assert exported([1]) == [""] * len(read)
        assert rank._exported == []
