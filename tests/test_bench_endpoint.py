"""The benchmark of an endpoint asks its policy as it was trained."""

from bench.endpoint import TIMEOUT_S, as_trained
from l0fast.cli import changed
from l0fast.config import AgentConfig, RolloutConfig, RunConfig
from l0fast.evaluate import GENERAL


def test_an_endpoint_is_asked_as_its_policy_was_in_training():
    trained = RunConfig(
        agent=AgentConfig(max_new_tokens=50, context_tokens=700, cell_timeout_s=3.5),
        rollout=RolloutConfig(max_turns=3),
    )
    asked = changed(GENERAL, as_trained(trained))
    assert asked.agent == trained.agent != GENERAL.agent
    assert (asked.rollout.max_turns, asked.rollout.episode_timeout_s) == (3, TIMEOUT_S)
