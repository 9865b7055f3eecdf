"""A policy folder of the shipped kind: the real tokenizer recipe, a small random model."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# where there is no GPU, kernels run in Triton's interpreter; Triton looks when it is imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# a busy machine is no failure
settings.register_profile("l0fast", deadline=None, max_examples=40)
settings.load_profile("l0fast")


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from l0fast.tasks.geography import geography
    from l0fast.warm_start.__main__ import tokenizer_texts
    from l0fast.warm_start.tokenizer import save_tokenizer, train_tokenizer
    from l0fast.warm_start.train import new_policy, save_policy

    folder = tmp_path_factory.mktemp("policy")
    tokenizer = train_tokenizer(tokenizer_texts(geography(), 0), vocab_size=512)
    save_tokenizer(tokenizer, folder, context_tokens=640)
    model = new_policy(tokenizer, context_tokens=640, seed=0)
    save_policy(model, folder)
    return folder
