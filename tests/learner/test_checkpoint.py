"""A checkpoint is whole or is not there; what it holds is everything that the next step depends on."""

import errno
import json
import os
from concurrent.futures import wait

import numpy as np
import pytest
import torch

from l0fast.config import LearnerConfig
from l0fast.errors import UsageError
from l0fast.ipc import Message, shared_bytes
from l0fast.learner import checkpoint
from l0fast.learner.checkpoint import Checkpoints, Unwritten, complete_checkpoints
from l0fast.learner.critic import CriticModel
from l0fast.learner.packing import pack_rows, payload_bytes, row_of, write_payload
from l0fast.learner.policy_model import PolicyModel
from l0fast.learner.rank import Rank
from l0fast.segments import segments_of


@pytest.fixture
def new(model_path):
    return lambda **settings: PolicyModel(
        model_path, LearnerConfig(**{"tis_cap": 0.0} | settings), num_steps=10, temperature=1.0
    )


@pytest.fixture
def keep():
    """Checkpoints of policies, closed afterwards."""
    made = []

    def keep(policy, num=2, critic=None):
        made.append(Checkpoints(policy, num, critic))
        return made[-1]

    yield keep
    for checkpoints in made:
        checkpoints.close()


@pytest.fixture
def packs(make):
    rng = np.random.default_rng(3)
    episodes = [make.episode(rng, 3, index=i) for i in range(3)]
    return pack_rows([[row_of(s, t, rng.normal(size=3)) for t in episodes for s in segments_of(t)]], 64)


def weights_of(policy):
    return {name: tensor.clone() for name, tensor in policy.weights()}


@pytest.mark.parametrize("minibatches", [1, 2])
def test_the_next_step_is_bit_identical_in_another_policy(new, keep, packs, tmp_path, minibatches):
    one = new(minibatches=minibatches)
    one.step(packs)
    torch.manual_seed(5)
    checkpoints = keep(one)
    checkpoints.save(tmp_path / "a", {"position": [1, 2]}, policy_version=7)
    # while it is written
    metrics, drawn = one.step(packs), torch.rand(3)
    checkpoints.wait()
    other = new(minibatches=minibatches)
    # a batch that was begun is none of its
    other.accumulate(packs[:2])
    assert keep(other).load(tmp_path / "a") == 7
    assert torch.equal(torch.rand(3), drawn)
    metrics_again = other.step(packs)
    torch.testing.assert_close(weights_of(other), weights_of(one), rtol=0, atol=0)
    assert {n: v for n, v in metrics_again.items() if n[-2:] != "_s"} == {
        n: v for n, v in metrics.items() if n[-2:] != "_s"
    }
    assert json.loads((tmp_path / "a" / "driver.json").read_text()) == {"position": [1, 2]}


@pytest.mark.parametrize("kind", ["head", "copy"])
def test_the_critic_goes_on_bit_for_bit_and_is_missed_where_there_was_none(new, keep, packs, tmp_path, kind):
    def fit(critic):
        critic.accumulate(packs)
        return critic.finish_step(10.0), {name: p.detach().clone() for name, p in critic.trained.items()}

    one = new(critic=kind)
    critic = CriticModel(one)
    alone = keep(one)
    alone.save(tmp_path / "alone", {}, policy_version=1)
    # two that save at once in one process share its filters of warnings, and a rank never does
    alone.wait()
    fit(critic)
    checkpoints = keep(one, critic=critic)
    checkpoints.save(tmp_path / "a", {}, policy_version=2)
    following = fit(critic)
    checkpoints.wait()
    other = new(critic=kind)
    critic_again = CriticModel(other)
    critic_again.accumulate(packs[:2])
    keep(other, critic=critic_again).load(tmp_path / "a")
    again = fit(critic_again)
    assert again[0] == following[0]
    torch.testing.assert_close(again[1], following[1], rtol=0, atol=0)
    with pytest.raises(UsageError, match=r"lacks critic.* it is of another model or critic"):
        keep(other, critic=critic_again).load(tmp_path / "alone")


def test_a_checkpoint_from_before_the_first_step_starts_anew(new, keep, packs, tmp_path):
    policy = new()
    checkpoints = keep(policy)
    checkpoints.save(tmp_path / "a", {}, policy_version=0)
    policy.step(packs)
    after = weights_of(policy)
    policy.step(packs)
    checkpoints.load(tmp_path / "a")
    policy.step(packs)
    torch.testing.assert_close(weights_of(policy), after, rtol=0, atol=0)


def test_only_the_newest_stay(new, keep, tmp_path):
    checkpoints = keep(new(), num=2)
    for version in (9, 10, 11):
        checkpoints.save(tmp_path / f"step_{version}", {}, policy_version=version)
    checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_11"]
    # the same name again
    checkpoints.save(tmp_path / "step_11", {"again": True}, policy_version=11)
    checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_10", "step_11"]
    assert "again" in (tmp_path / "step_11" / "driver.json").read_text()


@pytest.mark.parametrize("part", ["_write_flushed", "_flush_folder", "replace_folder"])
def test_a_save_that_breaks_is_reported_and_leaves_the_one_before(new, keep, packs, tmp_path, monkeypatch, part):
    policy = new()
    checkpoints = keep(policy)
    checkpoints.save(tmp_path / "a", {}, policy_version=1)
    before = weights_of(policy)
    policy.step(packs)
    checkpoints.wait()
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError("no space left")

        patch.setattr(checkpoint, part, full)
        checkpoints.save(tmp_path / "b", {}, policy_version=2)
        with pytest.raises(Unwritten, match=r"checkpoint .*/b could not be written \(OSError: no space left\)"):
            checkpoints.wait()
    assert complete_checkpoints(tmp_path) == [tmp_path / "a"]
    # what there was of it takes no room from others
    assert not (tmp_path / "b.tmp").exists()
    checkpoints.save(tmp_path / "b", {}, policy_version=2)
    checkpoints.load(tmp_path / "a")
    torch.testing.assert_close(weights_of(policy), before, rtol=0, atol=0)
    assert complete_checkpoints(tmp_path) == [tmp_path / "a", tmp_path / "b"]
    assert not (tmp_path / "b.tmp").exists()


def test_a_save_that_broke_is_said_once_and_keeps_nobody_from_the_next(new, keep, tmp_path):
    checkpoints = keep(new())
    file = tmp_path / "file"
    file.write_text("no folder")
    checkpoints.save(file / "a", {}, policy_version=1)
    checkpoints.save(tmp_path / "b", {}, policy_version=2)
    said = checkpoints.unwritten()
    assert said is not None
    assert f"{file}/a could not be written (NotADirectoryError" in said
    assert said.endswith("make room, or look to its disk")
    checkpoints.wait()
    assert checkpoints.unwritten() is None
    assert complete_checkpoints(tmp_path) == [tmp_path / "b"]


def test_a_disk_that_is_full_ends_no_learner_and_is_said_with_the_next_step(new, keep, packs, tmp_path, monkeypatch):
    policy = new()
    checkpoints = keep(policy)
    with shared_bytes("packs") as shared, monkeypatch.context() as patch:
        rank = Rank(policy, None, checkpoints, None, shared, publishes=False)

        def answer(op: str, **fields):
            return rank.answer(Message({"op": op, **fields}, b""))

        def step(version: int):
            write_payload(packs, shared.reserve(payload_bytes(packs)))
            answer("accumulate", num_bytes=payload_bytes(packs), bounds=[[0, len(packs)]])
            return answer("finish_step", denominator=10.0, policy_version=version)["metrics"]

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        # where torch wraps it into what is no Exception
        patch.setattr(torch.distributed.checkpoint.FileSystemWriter, "write_data", full)
        answer("save_checkpoint", path=str(tmp_path / "a"), driver_state={}, policy_version=1)
        wait([checkpoints._writing])
        said = step(2)["checkpoint_warning"]
        assert (
            f"checkpoint {tmp_path}/a could not be written (OSError: [Errno 28] No space left on device); the run"
            in said
        )
        assert "\n" not in said
        assert step(3)["checkpoint_warning"] is None
        patch.undo()
        answer("save_checkpoint", path=str(tmp_path / "b"), driver_state={}, policy_version=3)
        answer("wait_checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_what_is_no_checkpoint_of_this_model_is_refused(new, keep, tmp_path):
    checkpoints = keep(new())
    with pytest.raises(UsageError, match=r"no complete checkpoint .* has a learner\.json"):
        checkpoints.load(tmp_path)
    checkpoints.save(tmp_path / "a", {}, policy_version=1)
    checkpoints.wait()
    other = new()
    other.trained["model.more.weight"] = torch.nn.Parameter(torch.zeros(2))
    other.optimizer.state[other.trained["model.more.weight"]] = dict.fromkeys(checkpoint.MOMENTS, torch.zeros(2))
    with pytest.raises(UsageError, match=r"lacks model/model\.more\.weight and 3 more"):
        keep(other).load(tmp_path / "a")
    for file in (tmp_path / "a").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UsageError, match="can't be loaded as a checkpoint"):
        checkpoints.load(tmp_path / "a")
