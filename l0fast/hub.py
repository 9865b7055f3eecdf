"""Models of the Hugging Face hub by name: `owner/name`. Downloaded once, to the hub's own cache, by huggingface_hub."""

import re
from pathlib import Path

import orjson

from l0fast.errors import UsageError

PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt"]
"""Files of a model that a run reads."""
NO_PATTERNS = ["consolidated*"]
"""Of those, its weights once more, in a form of Mistral's own."""

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_name(path: str) -> bool:
    """Whether this is a name on the hub, and not a folder here."""
    return bool(_NAME.fullmatch(path)) and not Path(path).exists()


def cached_model(name: str) -> Path | None:
    """Its folder, where all of it was downloaded before; asks nobody."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(name, allow_patterns=PATTERNS, ignore_patterns=NO_PATTERNS, local_files_only=True)
        )
    except (LocalEntryNotFoundError, ValueError):
        return None
    return folder if _is_whole(folder) else None


def _is_whole(folder: Path) -> bool:
    """Not left half-way, and not a tokenizer alone: the hub's cache keeps such folders, too."""
    return all(path.exists() for path in (folder / "config.json", *weight_files(folder)))


def weight_files(folder: Path) -> list[Path]:
    """The files with a model folder's weights, as transformers chooses them: there may be others, such as a copy in another
    form. Raises UsageError where the index can't be read.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists() or not index.exists():
        return [whole]
    try:
        return sorted({folder / name for name in orjson.loads(index.read_bytes())["weight_map"].values()})
    except (OSError, ValueError, KeyError) as e:
        raise UsageError(f"{index} can't be read ({e!r}): copy or save the model again") from e


def download_model(name: str) -> Path:
    """Its folder, downloaded where it isn't here. Blocks for as long as that takes. Raises UsageError."""
    if (folder := cached_model(name)) is not None:
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=PATTERNS, ignore_patterns=NO_PATTERNS))
    except Exception as e:
        # the hub's own, its HTTP client's where a line breaks, those of its Rust part
        raise UsageError(
            f"model.path = {name!r} is no folder here and could not be had from the Hugging Face hub ({type(e).__name__}: "
            f"{str(e).splitlines()[0] if str(e) else ''}): give a folder, or `hf auth login` where the model is gated"
        ) from e
