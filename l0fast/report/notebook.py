"""A trajectory as a Jupyter notebook (nbformat 4.5) that runs again: what the agent thought, ran and saw.

    heading       the question, the answer, how it ended
    replay        code: the session's tools, which answer as they did in the run
    a turn        thoughts (Markdown), cell (code) with its output; one that can't run in a notebook is quoted instead

The tools' answers were recorded with the trajectory, so the cells need no network, no keys, no model and no l0fast. Answers
come in the order in which they came, call by call; what the run did not ask has none, and says so. Rewards, advantages
and times are in the metadata, under "l0fast". A cell that raised is tagged, so that running all cells goes on after it.

The words are the model's own. Their Markdown shows no images and holds no HTML: nothing is fetched by looking at it.
Running the cells is another matter: they then have the reader's rights, not a sandbox's, and the heading says so.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import orjson

from l0fast.agent.parsing import parse_action
from l0fast.errors import UsageError
from l0fast.files import whole_file
from l0fast.types import ToolCall, Trajectory, Turn

INTERRUPTED = "Interrupted"
"""What a cell ended with that was running when somebody ended the episode."""
UNFIT = ("SyntaxError", "IndentationError", "TabError", "Timeout", INTERRUPTED)
"""Cells that ended so are quoted: Jupyter would take them for commands of its own, or never come to an end."""
SESSION = (
    "submit_final_answer",
    "notepad.add_todo",
    "notepad.check_todo",
    "notepad.add_facts",
    "notepad.write_draft",
)
"""Defined in every session, called or not."""

_REPLAY = '''\
# The session's tools, as they answered in this run: the cells below run again without network, keys or model. A call that
# the run did not make raises LookupError; to go on by yourself, define real functions in a cell after this one.
def _replay(names, calls):
    import builtins, collections, json, types

    class ToolError(Exception):
        """A tool could not answer."""

    def plain(value):
        return value.tolist() if hasattr(value, "tolist") else list(value)

    def key(name, arguments):
        return name, json.dumps(json.loads(json.dumps(arguments, default=plain)), sort_keys=True)

    answers = collections.defaultdict(collections.deque)
    for name, arguments, answer, error in calls:
        answers[key(name, json.loads(arguments))].append((answer, error))

    def tool(name):
        def call(*args, **kw):
            recorded = answers[key(name, [args, kw])]
            if not recorded:
                raise LookupError(f"{name}() was not called with {args} {kw} in this run: define a real {name}() to go on")
            # the last answer stays, for a cell that is run twice
            answer, error = recorded.popleft() if len(recorded) > 1 else recorded[0]
            if error is not None:
                known = ToolError if error[0] == "ToolError" else getattr(builtins, error[0], Exception)
                raise known(error[1])
            if answer is None:
                raise LookupError(f"the answer of {name}() was too long to be kept: define a real {name}() to go on")
            return json.loads(answer)

        return call

    defined = {"ToolError": ToolError}
    for name in names:
        owner, _, method = name.rpartition(".")
        if owner:
            setattr(defined.setdefault(owner, types.SimpleNamespace()), method, tool(name))
        else:
            defined[name] = tool(name)
    return defined


globals().update(_replay(
    {names},
    [{calls}],
))
'''


def notebook(trajectory: Trajectory, advantages: Sequence[float] = ()) -> dict[str, Any]:
    """The notebook as JSON-like data.

    Args:
        advantages: one a turn, as the learner used them; empty where nothing was learned from it.
    """
    t = trajectory
    cells = [_markdown("heading", _heading(t)), _code("replay", _replay(t.turns), 0, "")]
    for number, turn in enumerate(t.turns, 1):
        about = {"turn": number, **_about(turn)}
        about |= {
            name: values[number - 1]
            for name, values in (("reward", t.rewards), ("advantage", advantages))
            if len(values) >= number
        }
        cells += _turn(number, turn, about)
    return {
        "cells": cells,
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"},
            "l0fast": {
                "task": {"id": t.task.id, "question": t.task.question, "answers": list(t.task.answers)},
                "status": str(t.status),
                "cause": t.cause,
                "answer": t.answer,
                "correct": t.correct,
                "reward": t.reward,
                "rewards": list(t.rewards),
                "advantages": list(advantages),
                "wall_s": t.wall_s,
            },
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def save_notebook(path: Path, trajectory: Trajectory, advantages: Sequence[float] = ()) -> None:
    """Write it to a new file, whole or not at all.

    Raises:
        UsageError: something is there already, or it can't be written.
    """
    try:
        with whole_file(path) as partial:
            partial.write_bytes(orjson.dumps(notebook(trajectory, advantages), option=orjson.OPT_INDENT_2))
            # what takes its place replaces our own file alone; a link never replaces, but many file systems have none
            path.touch(exist_ok=False)
    except FileExistsError as e:
        raise UsageError(f"{path} is there already, and a notebook never overwrites: name another, or move it") from e
    except OSError as e:
        raise UsageError(f"{path} can't be written ({e.strerror}): name another place") from e


def _heading(t: Trajectory) -> str:
    facts = [f"**{t.status.value.replace('_', ' ')}** after {len(t.turns)} turns in {t.wall_s:.1f} s"]
    facts += [f"lost: {_safe(t.cause)}"] if t.cause else []
    facts += [f"answer: {_safe(t.answer)}" if t.answer is not None else "no answer was submitted"]
    if t.task.answers:
        facts += [
            f"right answers: {_safe(', '.join(t.task.answers))}",
            f"{'right' if t.correct else 'wrong'}, reward {t.reward:.3f}",
        ]
    if t.task.files:
        facts += [f"the cells look for these files beside the notebook: {_safe(', '.join(t.task.files))}"]
    warning = "The cells are a model's code. Run here, they have your rights, and no sandbox around them."
    return "\n".join([f"# {_safe(t.task.question)}", "", *(f"- {fact}" for fact in facts), "", f"*{warning}*"])


def _turn(number: int, turn: Turn, about: dict[str, Any]) -> list[dict[str, Any]]:
    action, title = parse_action(turn.text), f"## Turn {number}"
    shown = (turn.output or "").rstrip()
    if turn.output is None:
        said = f"{title}\n\nNo code ran. The model wrote:\n\n{_quoted(turn.text)}\n\n*{_safe(turn.complaint or '')}*"
        return [_markdown(f"turn-{number}", said, about)]
    thoughts = _markdown(f"turn-{number}-think", f"{title}\n\n{_safe(action.think)}".rstrip(), about)
    if turn.error in UNFIT:
        said = f"This cell ended with {turn.error}:\n\n{_quoted(action.code)}\n\n{_quoted(shown)}"
        return [thoughts, _markdown(f"turn-{number}-code", said, about)]
    return [thoughts, _code(f"turn-{number}-code", action.code, number, shown, about, raises=turn.error is not None)]


def _about(turn: Turn) -> dict[str, Any]:
    return {
        "tokens": turn.num_tokens,
        "finish_reason": turn.finish_reason,
        "policy_version": turn.policy_version,
        "well_formed": turn.well_formed,
        "error": turn.error,
        "generate_s": turn.generate_s,
        "execute_s": turn.execute_s,
    }


def _replay(turns: Iterable[Turn]) -> str:
    calls = [call for turn in turns for call in turn.calls]
    names = list(dict.fromkeys((*(call.name for call in calls), *SESSION)))
    lines = "".join(f"\n        {_literal(call)}," for call in calls)
    return _REPLAY.replace("{names}", repr(names)).replace("{calls}", lines + "\n    " * bool(calls)).rstrip("\n")


def _literal(call: ToolCall) -> str:
    return repr((call.name, call.arguments, call.answer, call.error))


def _markdown(id: str, text: str, about: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"cell_type": "markdown", "id": id, "metadata": {"l0fast": about} if about else {}, "source": text}


def _code(
    id: str, code: str, number: int, output: str, about: dict[str, Any] | None = None, *, raises: bool = False
) -> dict[str, Any]:
    return {
        "cell_type": "code",
        "id": id,
        "metadata": ({"l0fast": about} if about else {}) | ({"tags": ["raises-exception"]} if raises else {}),
        "execution_count": number or None,
        "source": code,
        "outputs": [{"output_type": "stream", "name": "stdout", "text": output + "\n"}] if output else [],
    }


def _safe(text: str) -> str:
    """Markdown without HTML and images."""
    return re.sub(r"<(?=[A-Za-z/!?])", r"\\<", text).replace("![", "!\\[")


def _quoted(text: str) -> str:
    """A block of code, whatever it holds."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}\n{text.strip()}\n{fence}"
