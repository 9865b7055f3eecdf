"""A tiny random Qwen3 in a folder, and trajectories made of random ids."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from l0fast.ids import Ids
from l0fast.learner.packing import pack_rows, row_of
from l0fast.segments import segments_of
from l0fast.types import Group, Task, Trajectory, TrajectoryStatus, Turn

VOCABULARY = 61


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen3")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        initializer_range=0.1,  # far from uniform, so that a mistake shows
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    (path / "tokenizer.json").write_text('{"stands": "for a tokenizer"}')
    (path / "tokenizer_config.json").write_text("{}")
    return path


@pytest.fixture(scope="session")
def make():
    return Make()


@pytest.fixture(scope="session")
def program():
    """The module ranks.py, which is a program."""
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import ranks
    finally:
        sys.path.remove(str(Path(__file__).parent))
    return ranks


@pytest.fixture(scope="session")
def packs(make):
    """Five, so that one of two ranks gets a weightless one."""
    rng = np.random.default_rng(3)
    shapes = [[(3, None), (4, 2), (1, None)], [(5, 3), (2, None)]]
    groups = [[make.episode(rng, n, trim, i) for i, (n, trim) in enumerate(group)] for group in shapes]
    rows = [[row_of(s, t, rng.normal(size=len(t.turns))) for t in group for s in segments_of(t)] for group in groups]
    packs = pack_rows(rows, 30)
    assert len(packs) % 2
    return packs


class Make:
    """Builds records; what a test does not care about has a default."""

    task = Task(id="t0", question="?", answers=("a",))

    def turn(self, prompt_ids, response_ids, sampler_logprobs=None) -> Turn:
        return Turn(
            prompt_ids=Ids(prompt_ids),
            response_ids=Ids(response_ids),
            sampler_logprobs=tuple(sampler_logprobs or [-1.0] * len(response_ids)),
            finish_reason="stop",
            policy_version=0,
            text="",
            output="",
            well_formed=True,
        )

    def trajectory(self, turns, rewards=None, index=0) -> Trajectory:
        return Trajectory(
            task=self.task,
            index=index,
            status=TrajectoryStatus.COMPLETED,
            turns=tuple(turns),
            rewards=tuple(rewards if rewards is not None else [0.0] * len(turns)),
        )

    def group(self, trajectories, failures=(), number=0) -> Group:
        return Group(task=self.task, trajectories=tuple(trajectories), failures=tuple(failures), number=number)

    def episode(
        self, rng: np.random.Generator, num_turns: int, trim_at: int | None = None, index: int = 0
    ) -> Trajectory:
        """Prompts grow by concatenation; turn `trim_at` starts from a fresh prompt."""
        ids = lambda low, high: tuple(int(i) for i in rng.integers(0, VOCABULARY, rng.integers(low, high)))  # noqa: E731
        turns, prompt = [], ids(3, 9)
        for t in range(num_turns):
            if t == trim_at:
                prompt = ids(3, 9)
            response = ids(1, 7)
            turns.append(self.turn(prompt, response, list(rng.normal(-3, 1, len(response)))))
            prompt = (*prompt, *response, *ids(1, 5))
        return self.trajectory(turns, list(rng.random(num_turns)), index)
