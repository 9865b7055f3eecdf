"""Ask NB-Agent one question, watch it work, keep the notebook.

    python -m l0fast.agent "QUESTION" --endpoint URL --model NAME [--tools search=FOLDER] [--file data.csv]
    python -m l0fast.agent "QUESTION" [--model FOLDER]                       # the model runs here

Every other setting of AskConfig may stand among the flags, as --web.search-provider searxng. --answer FILE keeps the
answer as it is, for one that is a report.

What it thinks, runs and sees comes to the terminal as it comes; the whole is saved as a notebook that runs again, and what
there is when Ctrl-C or an endpoint ends it, too. The key of an endpoint is read from OPENAI_API_KEY, or the variable that --api-key-env names.

Exit codes: 0 answered, 1 not answered, 2 something to set right, 130 interrupted.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from l0fast.agent.parsing import parse_action
from l0fast.ask import ask, task_of
from l0fast.engine.openai import EndpointConfig
from l0fast.errors import L0fastError, UsageError
from l0fast.first_process import step_back
from l0fast.ids import Ids
from l0fast.report.notebook import INTERRUPTED, save_notebook
from l0fast.tools.registry import known_tools
from l0fast.tools.toolbox import OWN as OWN_TOOLS
from l0fast.trajectory import plain, spell_out
from l0fast.types import Task, Trajectory, TrajectoryStatus, Turn


def main(argv: Sequence[str]) -> int:
    # first: argparse would take the value of a flag that it does not know for the question
    settings_words, own_words = _split(argv)
    args, unknown = _parser().parse_known_args(own_words)
    spell_out()
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)
    notebook = args.notebook or Path(f"agent-{time.strftime('%Y%m%d-%H%M%S')}.ipynb")
    seen = _Seen()
    try:
        settings = _merged(_settings(args), _further([*settings_words, *unknown]))
        for flag, file in (("--notebook", notebook), ("--answer", args.answer)):
            if file is not None and not file.parent.is_dir():
                raise UsageError(f"{flag} {file}: there is no folder {file.parent}: make it, or name another")
        if args.answer is not None and args.answer.is_dir():
            raise UsageError(f"--answer {args.answer} is a folder: name a file in it")
        if notebook.exists():
            raise UsageError(f"{notebook} is there already, and a notebook never overwrites: name another, or move it")
        try:
            trajectory = asyncio.run(_ask(args, settings, console, errors, seen))
        except KeyboardInterrupt:
            return _interrupted(seen.trajectory(task_of(args.question, args.file)), notebook, errors)
        except L0fastError:
            # a key that is refused from some turn on, say: what there is took its time
            if seen.turns:
                _interrupted(seen.trajectory(task_of(args.question, args.file)), notebook, errors)
            raise
        save_notebook(notebook, trajectory)
        if args.answer is not None and trajectory.answer is not None:
            try:
                args.answer.write_text(trajectory.answer, encoding="utf-8")
            except OSError as e:
                raise UsageError(
                    f"--answer {args.answer} can't be written ({e.strerror}): the answer is in {notebook}"
                ) from e
    except L0fastError as e:
        errors.print(Text(f"l0fast: {plain(str(e))}"), soft_wrap=True)
        return 2 if isinstance(e, UsageError) else 1
    return _conclude(trajectory, notebook, console)


@dataclass
class _Seen:
    """What came to the terminal so far."""

    turns: list[Turn] = field(default_factory=list)
    text: str = ""
    """Of the turn under way."""
    started: float = field(default_factory=time.monotonic)

    def trajectory(self, task: Task) -> Trajectory:
        """Of an episode that ends here."""
        turns = tuple(self.turns)
        if self.text.strip():
            runs = parse_action(self.text).complaint is None
            unfinished = Turn(
                prompt_ids=Ids(),
                response_ids=Ids(),
                sampler_logprobs=(),
                finish_reason="abort",
                policy_version=0,
                text=self.text,
                output="" if runs else None,
                complaint=None if runs else "interrupted here",
                well_formed=False,
                error=INTERRUPTED if runs else None,
            )
            turns = (*turns, unfinished)
        return Trajectory(
            task=task,
            index=0,
            status=TrajectoryStatus.FAILED_INTERRUPTED,
            turns=turns,
            answer=None,
            cause=f"interrupted in turn {len(self.turns) + 1}",
            wall_s=time.monotonic() - self.started,
        )


def _interrupted(trajectory: Trajectory, notebook: Path, errors: Console) -> int:
    if trajectory.turns:
        save_notebook(notebook, trajectory)
        errors.print(Text(f"\n{trajectory.cause}: what there is was written to {notebook}"), soft_wrap=True)
    else:
        errors.print("\ninterrupted before it said anything: nothing was saved", soft_wrap=True)
    return 130


async def _ask(
    args: argparse.Namespace, settings: Mapping[str, Any], console: Console, errors: Console, seen: _Seen
) -> Trajectory:
    def on_text(text: str) -> None:
        seen.text += text
        console.print(Text(plain(text)), end="", soft_wrap=True)

    def on_turn(turn: Turn) -> None:
        seen.turns.append(turn)
        seen.text = ""
        shown = turn.complaint if turn.output is None else turn.output
        console.print(Text(f"\n<output>\n{plain(shown or '').strip()}\n</output>\n", "yellow"), soft_wrap=True)

    return await ask(
        args.question,
        model=args.model,
        endpoint=_endpoint(args),
        tools=args.tools,
        files=args.file,
        settings=settings,
        on_text=on_text,
        on_turn=on_turn,
        log=lambda line: errors.print(Text(line, "dim"), soft_wrap=True),
    )


def _conclude(trajectory: Trajectory, notebook: Path, console: Console) -> int:
    answer = trajectory.answer
    if answer is not None:
        console.print(Text(f"answer: {plain(answer)}", "bold green"), soft_wrap=True)
    else:
        why = plain(trajectory.cause or trajectory.status.value.replace("_", " "))
        console.print(Text(f"no answer: {why}", "bold red"), soft_wrap=True)
    turns = f"{len(trajectory.turns)} turn{'s' * (len(trajectory.turns) != 1)}"
    console.print(Text(f"{turns} in {trajectory.wall_s:.1f} s, written to {notebook}", "dim"), soft_wrap=True)
    return 0 if answer is not None else 1


def _endpoint(args: argparse.Namespace) -> EndpointConfig | None:
    if args.endpoint is None:
        if args.api_key_env or args.body:
            raise UsageError("--api-key-env and --body are an endpoint's: give --endpoint URL, or leave them out")
        return None
    return EndpointConfig(url=args.endpoint, model=args.model, api_key_env=args.api_key_env or "", body=dict(args.body))


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say, as `ask` takes it."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    settings: dict[str, Any] = {name: given[name] for name in OWN if name in given}
    settings["agent"] = {name: given[name] for name in AGENT if name in given}
    if args.sandbox is not None:
        settings["sandbox"] = {"kind": args.sandbox}
    return settings


OWN = ("max_turns", "timeout_s", "temperature", "seed")
AGENT = ("prompt", "context_tokens", "max_new_tokens", "cell_timeout_s")


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Every --section.key with its value, and all other words."""
    settings: list[str] = []
    own: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, _ = word.partition("=")
        if not (flag.startswith("--") and "." in flag):
            own.append(word)
        else:
            settings.append(word)
            if not equals and (value := next(words, None)) is not None:
                settings.append(value)
    return settings, own


def _further(words: Sequence[str]) -> dict[str, Any]:
    """--section.key VALUE or --section.key=VALUE, as `ask` takes it. Raises UsageError."""
    settings: dict[str, dict[str, Any]] = {}
    rest = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else (word,))]
    for flag, value in zip(rest[::2], [*rest[1::2], None], strict=False):
        section, dot, key = flag.removeprefix("--").replace("-", "_").partition(".")
        if not flag.startswith("--") or not dot or value is None or value.startswith("--"):
            raise UsageError(
                f"{flag} is no flag, or has no value: --help lists flags, and AskConfig what --section.key VALUE sets"
            )
        settings.setdefault(section, {})[key] = _value(value)
    return settings


def _merged(settings: dict[str, Any], further: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return settings | {section: {**settings.get(section, {}), **values} for section, values in further.items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _field(word: str) -> tuple[str, Any]:
    """NAME=JSON"""
    name, equals, value = word.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{word!r} is not NAME=JSON, for example top_p=0.9")
    return name, _value(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m l0fast.agent", description="Ask NB-Agent one question.", allow_abbrev=False
    )
    parser.add_argument("question", metavar="QUESTION")
    parser.add_argument(
        "--model",
        default="geography",
        metavar="NAME",
        help="the endpoint's name for it; without an endpoint a policy that ships, a model folder, a run or a checkpoint (default: %(default)s)",
    )
    parser.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible API, e.g. http://127.0.0.1:8000/v1")
    parser.add_argument(
        "--api-key-env", metavar="NAME", help="environment variable with its key (default: OPENAI_API_KEY)"
    )
    parser.add_argument(
        "--body",
        type=_field,
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="a further field of each request; null leaves one out",
    )
    parser.add_argument(
        "--tools",
        nargs="+",
        default=[],
        metavar="TOOL",
        help=f"{', '.join((*OWN_TOOLS, *known_tools()))}, each with =WHAT where it needs it, or module:function",
    )
    parser.add_argument(
        "--file", action="append", default=[], metavar="FILE", help="copied to where the code runs; may be repeated"
    )
    parser.add_argument(
        "--notebook", type=Path, metavar="OUT", help="where the notebook goes (default: agent-TIME.ipynb)"
    )
    parser.add_argument("--answer", type=Path, metavar="OUT", help="a file that the answer is written to")
    parser.add_argument(
        "--prompt", choices=("compact", "full"), help="full tells a general model all about the session"
    )
    for name, kind, text in (
        ("context-tokens", int, "longest prompt plus response"),
        ("max-new-tokens", int, "longest response of a turn"),
        ("max-turns", int, "turns before it is over"),
        ("cell-timeout-s", float, "seconds one cell may take"),
        ("timeout-s", float, "seconds all of it may take"),
        ("temperature", float, "0 takes the likeliest tokens"),
        ("seed", int, "of the sampling and the session"),
    ):
        parser.add_argument(f"--{name}", type=kind, metavar="N", help=text)
    parser.add_argument(
        "--sandbox", choices=("auto", "docker", "bwrap", "process"), help="default: the strongest that works"
    )
    return parser


if __name__ == "__main__":
    step_back()
    sys.exit(main(sys.argv[1:]))
