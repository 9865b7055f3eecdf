"""What a person means by MODEL: a policy that ships, a model folder, a run, or one of its checkpoints.

geography                    shipped                        -> its folder, the settings of its recipe
some/folder                  config.json, weights, ...      -> itself
runs/x                       a run: its newest checkpoint   -> exported to a folder that goes with the block
runs/x/checkpoints/step_N    that one                       -> likewise
"""

import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path

from l0fast.children import child
from l0fast.config import AgentConfig, RunConfig
from l0fast.errors import UsageError
from l0fast.run_dir import checkpoints, read_config

MODELS = Path(__file__).parent / "models"
"""Policies that ship, a folder each."""
GENERAL_AGENT = AgentConfig(
    prompt="full",
    context_tokens=32_000,
    max_new_tokens=3_192,
    output_chars=20_000,
    traceback="full",
    cell_timeout_s=120.0,
)
"""Of a model that nobody says how to ask: as L0 evaluates, and cells that have time for the web."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    name: str
    folder: Path
    """In Hugging Face form."""
    trained_with: RunConfig | None
    """What it was trained with, and so is best used with; None where nobody says."""
    origin: str = field(default="", compare=False)
    """Which weights: where they lie, a checkpoint's too, and what tells them from others that lay there."""


@asynccontextmanager
async def open_policy(word: str) -> AsyncIterator[Policy]:
    """The policy that a word means, its folder there for as long as the `async with` body runs. Raises UsageError."""
    found = _find(word)
    found = replace(found, origin=f"{found.folder} ({_state_of(found.folder)})")
    if not (found.folder / "learner.json").is_file():
        yield found
        return
    async with _exported(found.folder) as folder:
        yield replace(found, folder=folder)


def _find(word: str) -> Policy:
    """The policy; its folder may be that of a checkpoint."""
    shipped, path = sorted(folder.name for folder in MODELS.iterdir()), Path(word).absolute()
    if word in shipped:
        return Policy(name=word, folder=MODELS / word, trained_with=RunConfig())
    if (path / "config.json").is_file():
        return Policy(name=path.name, folder=path, trained_with=_settings_of(path.parent))
    if (path / "learner.json").is_file():
        run_dir = path.parent.parent
        return Policy(name=f"{run_dir.name}-{path.name}", folder=path, trained_with=_settings_of(run_dir))
    if valid := checkpoints(path):
        return Policy(name=path.name, folder=valid[-1], trained_with=_settings_of(path))
    raise UsageError(
        f"{word!r} is no policy that ships ({', '.join(shipped)}), no model folder, and no run that has a checkpoint: give one of them"
    )


def _state_of(folder: Path) -> str:
    """A word that changes with its files. By their sizes and times: to read them all could take minutes."""
    files = [(file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()]
    state = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    return blake2b(repr(state).encode(), digest_size=4).hexdigest()


def _settings_of(run_dir: Path) -> RunConfig | None:
    return read_config(run_dir) if (run_dir / "config.toml").is_file() and (run_dir / "trajectories").is_dir() else None


@asynccontextmanager
async def _exported(checkpoint: Path) -> AsyncIterator[Path]:
    parent = Path(tempfile.mkdtemp(prefix="l0fast-export-"))
    try:
        # in a child: it imports torch, and takes its time
        folder = parent / "model"
        async with child("l0fast.export", str(checkpoint), str(folder), name="the export") as export:
            if code := await export.wait():
                died = await export.died()
                said = export.last_line.removeprefix("l0fast: ")
                if str(parent) in said:
                    said += ", TMPDIR says where"
                raise UsageError(said) if code == 2 else died
        yield folder
    finally:
        shutil.rmtree(parent)
