"""Models of the hub: what of its cache counts as downloaded."""

import json
from pathlib import Path

import pytest

from l0fast.hub import cached_model


@pytest.fixture
def snapshot(tmp_path, monkeypatch) -> Path:
    """A snapshot of "owner/name" in the hub's cache, as its library lays it out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--owner--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("c" * 40)
    (folder / "snapshots" / ("c" * 40)).mkdir(parents=True)
    return folder / "snapshots" / ("c" * 40)


def test_a_tokenizer_alone_is_no_model(snapshot):
    for name in ("config.json", "tokenizer.json"):
        (snapshot / name).write_text("{}")
    assert cached_model("owner/name") is None
    (snapshot / "model.safetensors").write_bytes(b"")
    assert cached_model("owner/name") == snapshot
    assert cached_model("owner/other") is None


def test_a_model_in_parts_has_all_of_them(snapshot):
    (snapshot / "config.json").write_text("{}")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot / "model-1.safetensors").write_bytes(b"")
    assert cached_model("owner/name") is None
    (snapshot / "model-2.safetensors").write_bytes(b"")
    assert cached_model("owner/name") == snapshot
