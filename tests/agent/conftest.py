"""A tokenizer and chat form of the shipped kind, trained on a few lines."""

import json

import pytest

from l0fast.agent.chat import Chat
from l0fast.warm_start.tokenizer import save_tokenizer, train_tokenizer


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_tokenizer(
        ["The capital of Norway is Oslo.", "search and submit the final answer"] * 3, vocab_size=320
    )
    save_tokenizer(tokenizer, folder, context_tokens=512)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": tokenizer.token_to_id("<|im_end|>")}))
    return folder


@pytest.fixture(scope="session")
def chat(model_folder) -> Chat:
    return Chat(model_folder)
