"""LoRA: only the additions are trained, and what is told of the model is the sum."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from l0fast.config import LearnerConfig
from l0fast.errors import UsageError
from l0fast.learner.checkpoint import Checkpoints
from l0fast.learner.lora import without_adapters
from l0fast.learner.packing import dummy_pack
from l0fast.learner.policy_model import PolicyModel

CONFIG = LearnerConfig(lora_rank=3, kl_coef=0.1, tis_cap=0.0, lr=1e-2, warmup_steps=0)


@pytest.fixture
def pack():
    pack = dummy_pack()
    # two different tokens before the one that counts, or attention has no choice
    pack.token_ids[:], pack.predictors[:] = [3, 9], 1
    pack.loss_weights[:] = pack.advantages[:] = 1
    return pack


@pytest.fixture
def new():
    pytest.importorskip("peft")
    return lambda path, config=CONFIG: PolicyModel(path, config, num_steps=10, temperature=1.0)


@pytest.fixture
def untied_path(model_path, tmp_path):
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(model_path)
    config.tie_word_embeddings = False
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "untied")
    return tmp_path / "untied"


def test_what_is_exported_computes_what_is_trained_and_the_reference_stays(new, untied_path, tmp_path, pack):
    policy = new(untied_path)
    plain = new(untied_path, LearnerConfig())
    start = dict(plain.weights())
    torch.testing.assert_close(dict(policy.weights()), start, rtol=0, atol=0)
    assert policy.reference is None, "a second copy of the weights is not needed"
    before = policy.logprobs(pack)
    metrics = [policy.step([pack]) for _ in range(3)]
    assert metrics[0]["kl"] == 0 < metrics[2]["kl"]
    assert policy.logprobs(pack) > before
    torch.testing.assert_close(policy.reference_logprobs(pack), plain.logprobs(pack))
    assert len(policy.trained) == 2 * 7 * 2, "A and B of seven layers in each of two blocks; the head has none"
    changed = {name for name, tensor in policy.weights() if not torch.equal(tensor, start[name])}
    assert changed == {name for name in start if "_proj" in name}

    policy.save(tmp_path / "exported")
    exported = new(tmp_path / "exported", LearnerConfig())
    torch.testing.assert_close(dict(policy.weights()), dict(exported.weights()), rtol=0, atol=0)
    torch.testing.assert_close(policy.logprobs(pack), exported.logprobs(pack), rtol=0, atol=1e-6)


def test_biases_have_the_names_of_the_model_folder(new, tmp_path, pack):
    config = Qwen2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(tmp_path / "qwen2")
    names = [name for name, _ in model.named_parameters()]
    assert any(name.endswith("q_proj.bias") for name in names)
    policy = new(tmp_path / "qwen2")
    policy.step([pack])
    assert [name for name, _ in policy.weights()] == names
    shapes = [[(name, tuple(t.shape)) for name, t in bucket] for bucket in policy.buckets(4096, torch.bfloat16)]
    assert shapes == policy.bucket_shapes(4096, torch.bfloat16)
    published = {name: torch.empty_like(tensor) for name, tensor in policy.weights()}
    policy.publish(published)
    torch.testing.assert_close(published, dict(policy.weights()), rtol=0, atol=0)
    policy.save(tmp_path / "exported")
    exported = new(tmp_path / "exported", LearnerConfig())
    torch.testing.assert_close(policy.logprobs(pack), exported.logprobs(pack), rtol=0, atol=1e-6)


def test_without_its_additions_a_model_trains_the_same_parameters(new, model_path):
    """Else FSDP2, whose first forward may be the reference's, would not know what is trained."""
    policy = new(model_path)
    trained = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    with without_adapters(policy.model):
        assert {name for name, p in policy.model.named_parameters() if p.requires_grad} == trained
    assert {name for name, p in policy.model.named_parameters() if p.requires_grad} == trained


def test_a_checkpoint_holds_the_additions_alone(new, model_path, tmp_path, pack):
    policy = new(model_path)
    policy.step([pack])
    checkpoints = Checkpoints(policy, 2)
    checkpoints.save(tmp_path / "a", {}, 1)
    policy.step([pack])
    other = new(model_path)
    checkpoints.wait()
    of_other = Checkpoints(other, 2)
    of_other.load(tmp_path / "a")
    other.step([pack])
    torch.testing.assert_close(dict(other.weights()), dict(policy.weights()), rtol=0, atol=0)
    with pytest.raises(UsageError, match=r"learner\.lora_rank = 3, not 0"):
        Checkpoints(new(model_path, LearnerConfig()), 2).load(tmp_path / "a")
    checkpoints.close()
    of_other.close()


def test_without_peft_the_way_out_is_named(model_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UsageError, match=r"pip install 'l0fast\[lora\]', or set --learner.lora-rank 0"):
        PolicyModel(model_path, CONFIG, num_steps=10, temperature=1.0)
