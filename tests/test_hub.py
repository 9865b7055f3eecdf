"""Models of the hub: what of its cache counts as downloaded."""

import json
from pathlib import Path

import httpx2
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from l0fast.errors import UsageError
from l0fast.hub import cached_model, download_model


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


@pytest.mark.parametrize(
    "error",
    [
        httpx2.RemoteProtocolError("peer closed connection without sending complete message body"),
        RuntimeError("Data processing error: No space left on device"),
    ],
    ids=["a line that breaks", "of hf_xet"],
)
def test_a_download_that_breaks_off_is_told_in_a_sentence(snapshot, monkeypatch, error):
    def download(name, *, allow_patterns, ignore_patterns, local_files_only=False):
        raise LocalEntryNotFoundError("not here") if local_files_only else error

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UsageError, match=rf"'owner/name' .*{type(error).__name__}: {error}"):
        download_model("owner/name")


def test_weights_are_downloaded_once(snapshot, monkeypatch):
    """Mistral-7B-Instruct-v0.3 holds them twice."""
    weights = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    files = ["config.json", "model.safetensors.index.json", "consolidated.safetensors", *weights]
    downloaded = []

    def download(name, *, allow_patterns, ignore_patterns, local_files_only=False):
        if local_files_only:
            raise LocalEntryNotFoundError("not here")
        downloaded.extend(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return snapshot

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert download_model("owner/name") == snapshot
    assert downloaded == ["config.json", "model.safetensors.index.json", *weights]
