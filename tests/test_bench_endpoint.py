"""The benchmark of an endpoint asks its policy as it was trained."""

import pytest

from bench import endpoint
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


@pytest.mark.parametrize(("words", "model"), [(["runs/a"], "runs/a"), ([], "geography")])
def test_the_value_of_a_setting_is_not_taken_for_the_model(monkeypatch: pytest.MonkeyPatch, words, model):
    asked = []

    async def measure(plan, temperatures, flags):
        asked.append((plan.model, plan.questions, flags))
        raise KeyboardInterrupt

    monkeypatch.setattr(endpoint, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        endpoint.main([*words, "--questions", "5", "--rollout.max-turns", "3"])
    assert asked == [(model, 5, ["--rollout.max-turns", "3"])]
