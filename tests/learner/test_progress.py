"""Signs of progress: what they say of a real model at work, and how long they let it be silent."""

from types import SimpleNamespace

import pytest

from l0fast.config import LearnerConfig
from l0fast.learner import progress as progress_module
from l0fast.learner.packing import dummy_pack
from l0fast.learner.policy_model import PolicyModel
from l0fast.learner.progress import Progress

CONFIG = LearnerConfig(kl_coef=0.1, tis_cap=0.0, stall_timeout_s=10.0, slow_timeout_s=60.0)


@pytest.mark.parametrize("activation_checkpointing", ["off", "on"])
def test_each_layer_says_when_a_pack_gets_to_it_forward_and_back(model_path, activation_checkpointing):
    config = CONFIG.model_copy(update={"activation_checkpointing": activation_checkpointing})
    policy = PolicyModel(model_path, config, num_steps=3, temperature=1.0)
    said = []
    policy.progress.report_to(lambda doing, limit_s: said.append((doing, limit_s)), 10.0, 60.0)
    policy.accumulate([dummy_pack()], num_packs=2)
    expected = [
        f"{what}, pack {number} of 2"
        for number in (1, 2)
        for what in (
            "forward of the reference, embedding",
            "forward of the reference, layer 1 of 2",
            "forward of the reference, layer 2 of 2",
            "forward of the reference, head",
            "forward of the policy, embedding",
            "forward of the policy, layer 1 of 2",
            "forward of the policy, layer 2 of 2",
            "forward of the policy, head",
            "backward of the policy, layer 2 of 2",
            "backward of the policy, layer 1 of 2",
            "passed",
        )
    ]
    # computed again, a layer says so twice
    assert list(dict.fromkeys(doing for doing, _ in said)) == expected
    said.clear()
    list(policy.weights())
    assert [doing for doing, _ in said] == [f"weights out, {name}" for name, _ in policy.model.named_parameters()]


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_the_first_step_may_be_slow_and_later_ones_four_times_as_slow_as_the_one_before(clock):
    limits = []
    progress = Progress()
    progress.report_to(lambda doing, limit_s: limits.append(limit_s), 10.0, 60.0)

    def step(*seconds_a_pack):
        limits.clear()
        for seconds in progress.packs(seconds_a_pack):
            clock.now += seconds
        within = list(limits)
        progress.optimizer_step()
        assert limits[-1] == 60.0
        progress.step_taken()
        # nobody asks anything of it
        clock.now += 1000.0
        return within

    assert step(1.0, 5.0, 1.0) == [60.0] * 3
    assert step(0.1, 0.1) == [20.0] * 2, "four times the five seconds"
    assert step(0.1, 4.0, 0.1) == [10.0, 16.0, 16.0], "this step's own count at once"
    assert step(1.0, 40.0) == [16.0, 60.0]
    assert step(0.1) == [60.0]
    assert step(0.1) == [10.0]


def test_a_stall_timeout_above_the_slow_one_is_the_slow_one(clock):
    limits = []
    progress = Progress()
    progress.report_to(lambda doing, limit_s: limits.append(limit_s), 100.0, 60.0)
    progress.optimizer_step()
    progress.step_taken()
    list(progress.packs([0]))
    assert limits == [100.0, 100.0]
