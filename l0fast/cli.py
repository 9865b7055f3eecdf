"""From words on the command line to settings that hold, before anything heavy is imported.

    python -m l0fast.run [RECIPE] [--run-dir DIR] [--seed N] [--smoke] [--dry-run] [--section.key VALUE ...]
    python -m l0fast.run --resume DIR [--dry-run] [--num-steps N] [...]
    python -m l0fast.run [RECIPE] --run-dir DIR --go-on [...]       the first or the second, by what DIR holds

    defaults < recipe (TOML) < --smoke < flags        merged as one tree, validated once, as a whole
    the run's config.toml < flags                     to go on with it; what would make another run of it is refused

The tree of models in config.py says which flags exist, how many values each takes and what they mean. tyro prints it as
`--help`. Reading it back is done here, for two reasons: RECIPE may stand anywhere among the flags, and a bad value in
TOML or on the command line gets the same answer, one sentence with what, the value and the way out.
"""

import difflib
import itertools
import json
import os
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import tyro
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from l0fast import __version__
from l0fast.config import Config, RunConfig
from l0fast.disk import gigabytes, kept_bytes, num_evaluated, step_bytes
from l0fast.errors import UsageError
from l0fast.run_dir import (
    check_free,
    checkpoints,
    is_free,
    new_run_hint,
    read_config,
    read_driver_state,
    read_summary,
)

RECIPES = Path(__file__).parent / "recipes"

SMOKE: dict[str, Any] = {
    "num_steps": 2,
    "rollout": {"groups_per_step": 4, "max_open_groups": 8},
    "eval": {"questions": 48, "every": 0, "curve_questions": 48, "transfer_questions": 24},
}
"""What --smoke changes: the same path, as short as it gets."""


MAY_CHANGE = (
    "num_steps",
    "checkpoint.",
    "engine.",
    "eval.every",
    "eval.curve_questions",
    "eval.share",
    "judge.api_key_env",
    "judge.cache_file",
    "judge.endpoint",
    "judge.max_concurrent",
    "judge.timeout_s",
    "learner.activation_checkpointing",
    "learner.mismatch_",
    "learner.offload",
    "learner.ranks",
    "learner.start_timeout_s",
    "learner.stall_timeout_s",
    "learner.slow_timeout_s",
    "learner.io_timeout_s",
    "learner.stream",
    "learner.threads",
    "reward.timeout_s",
    "rollout.episode_timeout_s",
    "rollout.keep_trajectories",
    "rollout.max_refills",
    "rollout.turn_timeout_s",
    "sandbox.",
    "tools.attempts",
    "tools.cache_",
    "tools.max_concurrent",
    "tools.per_minute",
    "tools.timeout_s",
    "metrics.",
    "plan.",
    "trace.",
    "watchdog.",
    "web.reader_url",
    "web.search_url",
    "web.timeout_s",
    "web.vision_api_key_env",
    "web.vision_endpoint",
)
"""Settings, and beginnings of their names, that a resumed run may have otherwise: how long it goes on, where and how fast
it runs, what is watched. All others say what is learned, from what."""


class _Command(Config):
    recipe: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RECIPE")]] = "geography"
    """A TOML file, or the name of a recipe that ships; may stand anywhere among the flags."""
    run_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder the run is written to; None makes runs/RECIPE-TIME. One that holds something is refused without --go-on."""
    smoke: tyro.conf.FlagCreatePairsOff[bool] = False
    """Two steps of the same path with few questions."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Resolve, validate and print the plan; write nothing."""
    resume: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Go on with the run in DIR from its newest checkpoint, with its settings; --num-steps and those of machinery may change."""
    go_on: tyro.conf.FlagCreatePairsOff[bool] = False
    """Begin the run, or go on with it where --run-dir holds it: one line for a job that is stopped and started again."""


class _CommandLine(RunConfig, _Command):
    """Every word the command understands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Invocation:
    """One command, resolved and valid."""

    recipe: str
    """Name of the recipe, or stem of its file."""
    config: RunConfig
    run_dir: Path
    """Free when parsed: missing, or an empty folder. That of the run to go on with, if there is one."""
    smoke: bool = False
    dry_run: bool = False
    resume: Path | None = None
    """The checkpoint to go on from: the newest when parsed. A run that was still ending then may have left a newer one."""
    anew: bool = False
    """Whether the folder is that of the same run, which left nothing to go on from: it makes way."""
    changes: tuple[str, ...] = ()
    """What the flags changed of the settings of a run that goes on, e.g. "num_steps = 48, was 24"."""


def parse(argv: Sequence[str]) -> Invocation:
    """Resolve the words after `python -m l0fast.run`.

    Raises:
        UsageError: anything a person can set right.
        SystemExit: 0, after `--help` was printed, or that there is nothing left to do.
    """
    if any(word in ("-h", "--help") for word in argv):
        _print_help()
    positionals, flags = _read_flags(argv)
    if len(positionals) > 1:
        raise UsageError(
            f"{len(positionals)} recipes were given ({', '.join(positionals)}), but a run has one: "
            "keep one of them, and put -- before every flag's name"
        )
    command = {name: flags.pop(name) for name in _Command.model_fields if name in flags}
    if (run_dir := command.pop("resume", None)) is not None:
        return _resumed(run_dir, positionals, command, flags)
    recipe = _find_recipe(positionals[0] if positionals else _Command().recipe)
    smoke, dry_run = command.get("smoke", False), command.get("dry_run", False)
    layers = [_read_toml(recipe), SMOKE if smoke else {}, flags]
    config = _validate(layers, recipe)
    run_dir = command.get("run_dir")
    if command.get("go_on"):
        if run_dir is None:
            raise UsageError("--go-on goes on with the run that a folder holds, and there is none: add --run-dir DIR")
        if not is_free(run_dir):
            return _gone_on(run_dir, read_config(run_dir), config, dry_run, recipe=recipe.stem)
    run_dir = run_dir or Path("runs") / f"{recipe.stem}-{datetime.now():%Y%m%d-%H%M%S}"
    check_free(run_dir)
    return Invocation(recipe=recipe.stem, config=config, run_dir=run_dir, smoke=smoke, dry_run=dry_run)


def _resumed(
    run_dir: Path, positionals: Sequence[str], command: Mapping[str, Any], flags: Mapping[str, Any]
) -> Invocation:
    if besides := [*positionals, *(_flag(name) for name, value in command.items() if value and name != "dry_run")]:
        raise UsageError(
            f"--resume {run_dir} goes on with that run as it was set up, so {besides[0]} has no place beside it: "
            "leave one of the two out"
        )
    before = read_config(run_dir)
    config = _validate([before.model_dump(mode="json"), flags], run_dir / "config.toml")
    return _gone_on(run_dir, before, config, command.get("dry_run", False))


def _gone_on(run_dir: Path, before: RunConfig, config: RunConfig, dry_run: bool, *, recipe: str = "") -> Invocation:
    """Go on with the run of a folder. `recipe`: as where it was begun, for a run that may have left nothing to go on from, or
    nothing to do.
    """
    changed = {
        path: (old, new)
        for path, _ in _leaves(RunConfig)
        if (old := attrgetter(path)(before)) != (new := attrgetter(path)(config))
    }
    for path, (old, new) in changed.items():
        if not path.startswith(MAY_CHANGE):
            raise UsageError(
                f"{_flag(path)} {new} would make another run of {run_dir}, which has {old}: leave it out to go on, or "
                f"{new_run_hint(run_dir)}"
            )
    if recipe:
        summary = read_summary(run_dir)
        if summary.get("finished") and summary["steps"] == config.num_steps:
            print(f"{run_dir} is done, with all of its {config.num_steps} steps")  # noqa: T201 - it is the answer
            raise SystemExit(0)
        if not checkpoints(run_dir):
            return Invocation(recipe=recipe, config=config, run_dir=run_dir, dry_run=dry_run, anew=True)
    return Invocation(
        recipe=recipe or f"as in {run_dir / 'config.toml'}",
        config=config,
        run_dir=run_dir,
        dry_run=dry_run,
        resume=newest_checkpoint(run_dir, config.num_steps),
        changes=tuple(f"{path} = {new}, was {old}" for path, (old, new) in changed.items()),
    )


def newest_checkpoint(run_dir: Path, num_steps: int) -> Path:
    """That to go on from with a run, up to `num_steps`. Raises UsageError where there is none, or nothing left to do."""
    if not (valid := checkpoints(run_dir)):
        raise UsageError(
            f"{run_dir} holds no checkpoint, so there is nothing to go on from (checkpoint.every = "
            f"{read_config(run_dir).checkpoint.every} steps): start the run again"
        )
    step = read_driver_state(valid[-1])["step"]
    if num_steps < step:
        raise UsageError(
            f"num_steps = {num_steps}, but {run_dir} has taken {step} steps already: give --num-steps {step} or more"
        )
    if num_steps == step and read_summary(run_dir).get("finished"):
        raise UsageError(
            f"{run_dir} is done, with all of its {step} steps: give --num-steps {2 * step} or another number above "
            f"{step} to go on"
        )
    return valid[-1]


def changed(config: RunConfig, flags: Sequence[str]) -> RunConfig:
    """`config` with --section.key VALUE flags on top. Raises UsageError."""
    positionals, settings = _read_flags(flags, RunConfig)
    if positionals:
        raise UsageError(f"{positionals[0]!r} is neither a flag nor the value of one: --help lists all")
    return _validate([config.model_dump(mode="json"), settings], Path("these flags"))


def model_and_flags(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """MODEL, wherever it stands among --section.key VALUE flags, and those flags. Raises UsageError.

    `words` is what argparse leaves over: a MODEL argument of its own would swallow the first flag's value.
    """
    fields = dict(_leaves(RunConfig))
    model, flags, rest = None, [], iter(words)
    for word in rest:
        if word.startswith("-"):
            values = 0 if "=" in word else _num_values(fields[_flag_path(word, fields)[0]])
            flags += [word, *itertools.islice(rest, values)]
        elif model is None:
            model = word
        else:
            raise UsageError(
                f"{word!r} is neither a flag nor the value of one, and {model!r} is the model: --help lists all"
            )
    return model, flags


def shipped_recipes() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


@cache
def default_recipe() -> RunConfig:
    """What `python -m l0fast.run` alone runs."""
    recipe = _find_recipe(_Command().recipe)
    return _validate([_read_toml(recipe)], recipe)


def render_plan(invocation: Invocation) -> str:
    """What a run would do, for `--dry-run`."""
    c = invocation.config
    r, e, learner = c.rollout, c.eval, c.learner
    training = c.num_steps * r.groups_per_step * r.group_size
    curve = (c.num_steps - 1) // e.every if e.every else 0
    sourced = c.task.kind == "questions"
    evaluation = num_evaluated(c)
    control = (
        "; advantages permuted over trajectories: a control that can't learn" if learner.permute_advantages else ""
    )
    between = f"; {min(e.curve_questions, e.questions):,} every {e.every} steps" if curve else ""
    lines = {
        "recipe": invocation.recipe + (" (smoke)" if invocation.smoke else ""),
        "run dir": f"{invocation.run_dir} (goes on from {invocation.resume.name})"
        if invocation.resume
        else f"{invocation.run_dir} ({'made again' if invocation.anew else 'not made'})",
        "model": c.model.path,
        "task": f"{len(c.task.train)} sources of training questions, {len(c.task.eval)} of held-out ones; tools: "
        f"{', '.join(c.tools.use) or 'none'}"
        if sourced
        else f"{c.task.kind}, {c.task.two_hop_share:.0%} of the questions need two look-ups",
        "training": f"{c.num_steps} steps x {r.groups_per_step} groups x {r.group_size} episodes = {training:,} episodes "
        f"of at most {r.max_turns} turns",
        "evaluation": f"{e.questions:,} held-out questions before and after, sampled and greedy{between}"
        + ("" if sourced else f"; {e.transfer_questions:,} on chains never trained")
        + f" = {evaluation:,} episodes",
        "disk": f"trajectories {gigabytes(step_bytes(c))} a step, {gigabytes(kept_bytes(c))} in all with those of "
        + (f"evaluations and the newest {r.keep_trajectories:,} steps" if r.keep_trajectories else "evaluations"),
        "sandbox": c.sandbox.kind,
        "engine": f"{c.engine.kind}, {c.engine.slots} slots",
        "learner": f"{learner.advantage}, lr {learner.lr:g}, KL {learner.kl_coef:g}{control}",
        "seed": f"{c.seed}" + (f", world {c.task.world_seed}" if c.task.kind == "invented" else ""),
    }
    width = max(map(len, lines))
    head = f"l0fast {__version__}: the plan; nothing was written"
    return "\n".join([head, *(f"  {name:<{width}}  {text}" for name, text in lines.items())])


@contextmanager
def until_read() -> Iterator[None]:
    """Around what only prints: a reader that has read enough, `head` say, ends the command, with exit code 0."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # at its end Python writes what is left, and would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def _print_help() -> None:
    with until_read():
        tyro.cli(
            _CommandLine,
            prog="python -m l0fast.run",
            description="Train a code-writing agent by reinforcement learning and show it getting better. Flags win over the "
            f"recipe, the recipe over the defaults. Recipes that ship: {', '.join(shipped_recipes())}.",
            default=_CommandLine(),
            args=["--help"],
            config=(tyro.conf.UseAppendAction,),
        )


# --- flags -----------------------------------------------------------------------------------------------------------


def _leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """("rollout.group_size", its field) for every setting below a model."""
    for name, field in model.model_fields.items():
        if section := _section(field):
            yield from _leaves(section, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that groups settings, None for a setting."""
    return field.annotation if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel) else None


def _num_values(field: FieldInfo) -> int:
    """Words a flag takes after its name. One that may be repeated takes one at a time."""
    if field.annotation is bool:
        return 0
    args = get_args(field.annotation)
    return len(args) if get_origin(field.annotation) is tuple and Ellipsis not in args else 1


def _repeats(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is tuple and Ellipsis in get_args(field.annotation)


def _read_flags(argv: Sequence[str], model: type[BaseModel] = _CommandLine) -> tuple[list[str], dict[str, Any]]:
    """Split words into positionals and a nested dict of typed values; flags are the fields of `model`."""
    fields = {path: field for path, field in _leaves(model) if path != "recipe"}
    positionals: list[str] = []
    raw: dict[str, Any] = {}
    words = iter(argv)
    for word in words:
        if not word.startswith("-") or word == "-":
            positionals.append(word)
            continue
        name, has_equals, text = word.partition("=")
        path, value_if_bare = _flag_path(name, fields)
        field = fields[path]
        if has_equals:
            values = text.split(",") if _num_values(field) > 1 else [text]
        else:
            values = [next(words, None) for _ in range(_num_values(field))]
        for value in values:
            # a negative number is a value, another flag is not
            if value is None or (not has_equals and value.startswith("--")):
                raise UsageError(
                    f"{name} needs {_num_values(field)} value{'s' * (_num_values(field) > 1)}, but "
                    f"{'the line ends' if value is None else value + ' follows'}: write {_example(path, field)}"
                )
        if field.annotation is bool:
            raw[path] = text if has_equals else value_if_bare
        elif _repeats(field):
            raw[path] = (*raw.get(path, ()), *values)
        else:
            raw[path] = tuple(values) if _num_values(field) > 1 else values[0]
    flags: dict[str, Any] = {}
    for path, value in raw.items():
        flags = _merge(flags, _nest(path, _typed(path, fields[path], value)))
    return positionals, flags


def _flag_path(name: str, fields: Mapping[str, FieldInfo]) -> tuple[str, bool]:
    """The setting a flag names, and the value it has where it is a switch."""
    path = name.removeprefix("--").replace("-", "_") if name.startswith("--") else ""
    # a section with a switch of its own: --trace is --trace.on
    for short, value in ((path, True), (path.removeprefix("no_"), False)):
        if f"{short}.on" in fields:
            return f"{short}.on", value
    if path in fields:
        return path, True
    section, dot, last = path.rpartition(".")
    switch = section + dot + last.removeprefix("no_")
    if last.startswith("no_") and switch in fields and fields[switch].annotation is bool:
        return switch, False
    if inside := [f for f in fields if f.startswith(path + ".")]:
        raise UsageError(f"{name} is a section, not a flag: set one of {', '.join(map(_flag, inside))}")
    raise UsageError(f"{name} is not a flag{_suggest(path or name.lstrip('-'), fields, _flag)}")


def _typed(path: str, field: FieldInfo, value: Any) -> Any:
    if isinstance(value, bool):
        return value
    adapter: TypeAdapter[Any] = TypeAdapter(field.rebuild_annotation(), config=Config.model_config)
    try:
        return adapter.validate_python(value)  # lax: words become numbers
    except ValidationError as e:
        text = value if isinstance(value, str) else " ".join(value)
        raise UsageError(f"{_flag(path)} {text}: {_what(e.errors()[0])}, for example {_example(path, field)}") from None


def _flag(path: str) -> str:
    return "--" + path.replace("_", "-")


def _example(path: str, field: FieldInfo) -> str:
    default = field.default
    if field.annotation is bool:
        return f"{_flag(path)} alone, or {_flag(path)}=false"
    if isinstance(default, tuple):
        default = " ".join(map(str, default)) or "NAME"
    return f"{_flag(path)} {'DIR' if default is None else default}"


def _suggest(path: str, known: Mapping[str, FieldInfo], spell: Any) -> str:
    """The way out of a name that does not exist: the nearest settings, or where all of them are listed."""
    last = path.rpartition(".")[2]
    near = [k for k in known if k.rpartition(".")[2] == last] or difflib.get_close_matches(path, known, n=1)
    return f": did you mean {' or '.join(map(spell, near))}?" if near else ": --help lists them all"


# --- recipes ---------------------------------------------------------------------------------------------------------


def _find_recipe(word: str) -> Path:
    """Path of a recipe: the name of one that ships, or a file."""
    if word in shipped_recipes():
        return RECIPES / f"{word}.toml"
    path = Path(word)
    if path.suffix == ".toml" or path.is_file():
        return path
    raise UsageError(
        f"{word!r} is neither a recipe that ships ({', '.join(shipped_recipes())}) nor a .toml file: "
        "name one of those, or give the path of a file"
    )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        # some editors begin UTF-8 with a byte order mark
        settings = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise UsageError(
            f"recipe {path} can't be read ({e.strerror}): give a file that exists, or a name ({', '.join(shipped_recipes())})"
        ) from e
    except tomllib.TOMLDecodeError as e:
        raise UsageError(f"recipe {path} is not TOML: {e}; mend that place") from e
    except UnicodeDecodeError as e:
        raise UsageError(f"recipe {path} is not UTF-8 text (byte {e.start}): save it as UTF-8") from e
    _refuse_unknown_keys(settings, RunConfig, path)
    return settings


def _refuse_unknown_keys(settings: Mapping[str, Any], model: type[BaseModel], file: Path, prefix: str = "") -> None:
    for key, value in settings.items():
        field = model.model_fields.get(key)
        if field is None:
            hint = _suggest(prefix + key, dict(_leaves(RunConfig)), str)
            raise UsageError(f"{prefix}{key} = {value!r} in {file} is not a setting{hint}")
        if (section := _section(field)) is None:
            continue
        if not isinstance(value, Mapping):
            raise UsageError(
                f"{prefix}{key} = {value!r} in {file} is a section: write [{prefix}{key}] and its keys below"
            )
        _refuse_unknown_keys(value, section, file, f"{prefix}{key}.")


# --- the merged tree -------------------------------------------------------------------------------------------------


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        merged[key] = _merge(merged.get(key, {}), value) if isinstance(value, Mapping) else value
    return merged


def _nest(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def _validate(layers: Sequence[Mapping[str, Any]], recipe: Path) -> RunConfig:
    settings: dict[str, Any] = {}
    for layer in layers:
        settings = _merge(settings, layer)
    try:
        # as JSON: there an array may be a tuple, and true is no number; orjson has no whole numbers of more than 64 bits
        return RunConfig.model_validate_json(json.dumps(settings, default=str), strict=True)
    except ValidationError as e:
        error = e.errors()[0]
        if not error["loc"]:
            raise UsageError(str(error.get("ctx", {}).get("error", error["msg"]))) from None
        path = ".".join(str(key) for key in error["loc"] if isinstance(key, str))
        field = dict(_leaves(RunConfig))[path]
        value: Any = settings
        for key in path.split("."):
            value = value[key]
        default = list(field.default) if isinstance(field.default, tuple) else field.default
        raise UsageError(f"{path} = {value!r} in {recipe}: {_what(error)}, for example {default!r}") from None


def _what(error: Any) -> str:
    """pydantic's complaint as part of a sentence."""
    if error["type"] == "missing":
        return "it has too few values"
    return error["msg"].removeprefix("Value error, ").replace("Input should", "it should").partition(", unable to")[0]
