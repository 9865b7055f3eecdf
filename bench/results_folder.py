"""Where a benchmark's figures go."""

import argparse
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any


def results_folder(value: str) -> Path:
    """An argparse type. The folder is made at once: a measurement must not be lost to the want of one at its end."""
    path = Path(value)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise argparse.ArgumentTypeError(f"{value} can't be made ({e.strerror}): name another folder") from e
    if not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{value} can't be written to: name another folder")
    return path


def results_file(value: str) -> Path:
    """The same of a file's folder."""
    path = Path(value)
    results_folder(str(path.parent))
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{value} is a folder: name a file in it")
    return path


def write(result: Mapping[str, Any], folder: Path | None, name: str, *, leave_out: Collection[str] = ()) -> None:
    """The last line, without what is too long for one, and where it was asked for the file."""
    if folder is not None:
        (folder / name).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key not in leave_out}))
