"""A checkpoint as a model folder in Hugging Face form, which transformers and every engine load.

    python -m l0fast.export CHECKPOINT OUT [--dtype float32|bfloat16|float16] [--model DIR]

CHECKPOINT is one of RUN_DIR/checkpoints, or RUN_DIR itself: then its newest. However many ranks saved it, one process
reads it, and of it the weights alone; neither ranks nor a GPU are needed. What training does not change, configuration
and tokenizer, comes from the model that the run began with; so do, with LoRA, the weights that the additions are merged
into.
"""

import argparse
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l0fast.config import RunConfig
from l0fast.errors import UsageError
from l0fast.hub import weight_files
from l0fast.ipc import tensor_shapes
from l0fast.run_dir import checkpoints, read_driver_state

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = ("float32", "bfloat16", "float16")


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a person means: this folder, or the newest of this run. Raises UsageError."""
    if (path / "learner.json").exists():
        return path
    if valid := checkpoints(path):
        return valid[-1]
    raise UsageError(
        f"{path} is neither a complete checkpoint nor a run that has one: name RUN_DIR or one of its checkpoints"
    )


def check_out(out: Path) -> None:
    """Raise UsageError unless `out` is missing or an empty folder, and not the one this is run in."""
    if not out.name:
        raise UsageError(f"an export makes its folder, and {out} is there already: give OUT a name")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there already, and an export never overwrites: choose another, or move it")


def export(checkpoint: Path, out: Path, *, dtype: str = "float32", model: Path | None = None) -> None:
    """Write the model folder.

    Args:
        out: missing or empty; whole when it is there, it is written under another name.
        dtype: of the weights written, one of DTYPES.
        model: the folder the run began with, where that has moved.

    Raises:
        UsageError: one of them can't be used.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    from l0fast.learner.policy_model import write_model

    check_out(out)
    state = read_driver_state(checkpoint)
    model = model or Path(state["model_path"])
    if not (model / "config.json").is_file():
        raise UsageError(
            f"{model}, the model that this run began with, is no model folder any more: give it with --model"
        )
    to = getattr(torch, dtype)
    weights = {name: tensor.to(to) for name, tensor in trained_weights(checkpoint, model, state["config"]).items()}
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model, local_files_only=True), dtype=to)
    _check_names(weights, {name: tuple(p.shape) for name, p in shell.named_parameters()}, checkpoint, model)
    # where it is a link to an empty folder, that folder is replaced: no folder can be renamed over a link
    out = out.resolve()
    partial = out.with_name(f".{out.name}.partial")
    try:
        # of one that was killed
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            write_model(shell, weights, model, partial, to)
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial)
            raise
    except (OSError, SafetensorError) as e:
        why = getattr(e, "strerror", None) or e
        raise UsageError(f"{out} can't be written ({why}): choose another place") from e


def trained_weights(checkpoint: Path, model: Path, config: Mapping[str, Any]) -> "dict[str, Tensor]":
    """The policy's weights by the names of the model folder, fp32; tied ones once, LoRA merged.

    Args:
        config: all settings of the run.
    """
    from l0fast.learner.checkpoint import read_tensors

    saved = read_tensors(checkpoint, "model/")
    learner = RunConfig.model_validate(config).learner
    if not learner.lora_rank:
        return saved
    from safetensors.torch import load_file

    from l0fast.learner import lora

    names = tensor_shapes(model)
    weights = {n: tensor for file in weight_files(model) for n, tensor in load_file(file).items() if n in names}
    for name in [name for name in weights if name.endswith(".weight")]:
        a, b = lora.adapters_of(f"{name.removesuffix('.weight')}.base_layer.weight") or ("", "")
        if a in saved:
            weights[name] = lora.merged(weights[name].float(), saved.pop(a), saved.pop(b), learner)
    if saved:
        raise UsageError(
            f"{checkpoint} adds to {min(saved)}, which {model} lacks: give the model it began with as --model"
        )
    return weights


def _check_names(
    weights: "Mapping[str, Tensor]", wanted: Mapping[str, tuple[int, ...]], checkpoint: Path, model: Path
) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if differing := sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name)):
        raise UsageError(
            f"{checkpoint} does not fit {model}: {differing[0]} is {found.get(differing[0], 'missing')} there and "
            f"{wanted.get(differing[0], 'missing')} here; give the model that the run began with as --model"
        )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m l0fast.export", description="A checkpoint as a model folder.")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, or RUN_DIR for its newest")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")
    parser.add_argument("--model", type=Path, metavar="DIR", help="the model the run began with, where that has moved")
    args = parser.parse_args(argv)
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        checkpoint = find_checkpoint(args.checkpoint)
        export(checkpoint, args.out, dtype=args.dtype, model=args.model)
    except UsageError as e:
        print(f"l0fast: {e}", file=sys.stderr)  # noqa: T201
        return 2
    print(f"{checkpoint} -> {args.out}, {args.dtype}")  # noqa: T201 - it is the answer
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
