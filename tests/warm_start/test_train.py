"""Supervised learning: Muon's update, padding without influence, and the command from end to end."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from l0fast.warm_start.muon import Muon, orthogonalize
from l0fast.warm_start.train import Row, TrainSettings, batches, new_policy, train, weighted_loss

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("shape", [(128, 128), (128, 384), (384, 128), (3, 64, 128)])
def test_orthogonalize_brings_singular_values_near_one(shape: tuple[int, ...]):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
    assert values.max() < 1.3
    # a square random matrix has singular values near zero, which need more iterations
    assert (values > 0.6).float().mean() > 0.98


def test_orthogonalize_keeps_the_singular_vectors():
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(32, 32))
    u_out, _, vt_out = torch.linalg.svd(orthogonalize(u @ torch.diag(torch.linspace(0.5, 1, 32)) @ vt))
    torch.testing.assert_close(u_out @ vt_out, u @ vt, atol=1e-3, rtol=0)


def test_muon_moves_every_matrix_by_the_same_rms():
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(64, 64)), torch.nn.Parameter(torch.zeros(64, 192))]
    optimizer = Muon(params, lr=0.01)
    for p, scale in zip(params, (1.0, 1e-4), strict=True):
        p.grad = torch.randn_like(p) * scale
    optimizer.step()
    rms = [p.detach().square().mean().sqrt().item() for p in params]
    assert rms == pytest.approx([0.002, 0.002], rel=0.2)  # 0.2 lr, whatever the gradient's size


@pytest.fixture(scope="module")
def tokenizer(policy_folder: Path):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(policy_folder / "tokenizer.json"))


def rows(n: int) -> list[Row]:
    rng = random.Random(0)
    made = []
    for _ in range(n):
        ids = tuple(rng.randrange(20, 30) for _ in range(rng.randrange(5, 60)))
        made.append(Row(ids, tuple(rng.random() < 0.5 for _ in ids)))
    return made


def test_padding_does_not_change_the_loss(tokenizer):
    model = new_policy(tokenizer, context_tokens=64, seed=0)
    batch = rows(5)
    with torch.no_grad():
        together = weighted_loss(model, batch, 0.3)
        # each row alone, joined by the weights it carries
        parts = [weighted_loss(model, [row], 0.3) for row in batch]
        weights = [sum(1.0 if s else 0.3 for s in row.sampled[1:]) for row in batch]
    expected = sum(p * w for p, w in zip(parts, weights, strict=True)) / sum(weights)
    torch.testing.assert_close(together, expected)


def test_every_row_is_in_exactly_one_batch_of_bounded_size():
    made = rows(700)
    got = list(batches(made, 256, random.Random(1)))
    assert sorted(row.token_ids for batch in got for row in batch) == sorted(row.token_ids for row in made)
    assert all(len(batch) * max(len(row.token_ids) for row in batch) <= 256 for batch in got)


def test_training_learns(tokenizer):
    model = new_policy(tokenizer, context_tokens=64, seed=0)
    losses: list[float] = []
    train(model, rows(300), TrainSettings(batch_tokens=512), lambda done, total, loss, seconds: losses.append(loss))
    # uniform over ten ids is what there is to learn
    assert losses[0] > 5
    assert losses[-1] < 2.6


@pytest.mark.slow
def test_the_command_makes_a_folder_that_transformers_loads(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "l0fast.warm_start", "--out", str(tmp_path / "policy"), "--scale", "0.0003"],
        cwd=ROOT, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>assistant\n")
    assert model(**tokenizer(text, return_tensors="pt")).logits.shape[-1] == len(tokenizer)


def test_a_folder_that_holds_something_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, "-m", "l0fast.warm_start", "--out", str(tmp_path)],
        cwd=ROOT, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "is not empty" in done.stderr + done.stdout
