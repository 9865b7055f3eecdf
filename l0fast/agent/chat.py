"""Text to ids in a model's own chat form, without its Python tokenizer: `tokenizer.json` and the chat template only.

A conversation is never rendered twice. The template is asked once, with sentinels, what stands before a question, and
between an answer and the next one; from there prompts grow by concatenating ids (Qwen3's template drops earlier
thinking when a conversation is rendered again, and decoding then encoding changes about half of sampled sequences).
A template finds what transformers gives it, too; the day it may ask for is the one on which the Chat was made.

Only the template begins and ends messages: where a question or an output spells a special token, or one that the template
puts around messages, as a web page may, a space is put into it ("< |im_end|>").
"""

import json
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from tokenizers import Tokenizer

from l0fast.agent.byte_level import ByteLevel
from l0fast.errors import UsageError
from l0fast.ids import Ids

_SYSTEM = "\x02system\x03"
_QUESTION = "\x02question\x03"
_ANSWER = "\x02answer\x03"
_OUTPUT = "\x02output\x03"
_THINK, _THOUGHT = "<think>", "</think>"
_MAX_HEADS = 64
"""System prompts whose ids are kept; a run has few."""


class Chat:
    """A tokenizer with its chat form.

    Args:
        folder: a model folder with `tokenizer.json`, and a chat template in `chat_template.jinja` or
            `tokenizer_config.json`.

    Raises:
        UsageError: a file is missing or broken.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UsageError(
                f"model folder {folder} has no tokenizer.json: point --model.path at a folder saved with its tokenizer"
            )
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as e:
            raise UsageError(f"{path} is not a tokenizer: {e}; save it again with save_pretrained") from e
        # as it was saved by whoever trained with batches of one length: a prompt would be cut at that length, or filled up to it
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._byte_level = ByteLevel.of(self._tokenizer)
        self._heads: dict[str, tuple[str, Ids]] = {}
        settings = _read_json(folder / "tokenizer_config.json", needed=False)
        self._named = {name: _text_of(settings.get(name)) for name in ("bos_token", "eos_token")}
        """Special tokens that templates know by name."""
        self._template = self._load_template(settings)
        asked = self._try(_message("system", _SYSTEM), _message("user", _QUESTION))
        told = self._try(_message("user", _QUESTION), _message("assistant", _ANSWER), _message("user", _OUTPUT))
        after_answer, _, self._after_output = told.partition(_ANSWER)[2].partition(_OUTPUT)
        # DeepSeek's tokens that begin messages are not called special; nor are Gemma's line breaks, which begin none
        added = self._tokenizer.get_added_tokens_decoder().values()
        around = asked + told
        special = [t.content for t in added if t.special or (t.content.strip() and t.content in around)]
        # (?!): nothing, where there are none
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
        self.stop_token_ids = self._stop_ids(after_answer)
        self._before_output = after_answer.removeprefix(self.decode(self.stop_token_ids[:1], special=True))
        prompt = self._after_output
        self._opening = _THINK if prompt.rfind(_THINK) > prompt.rfind(_THOUGHT) else ""
        """What a prompt says for the model, whose response begins inside of it."""

    def encode(self, text: str) -> list[int]:
        if self._byte_level is not None:
            return self._byte_level.encode(text)
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        if self._byte_level is not None and not special:
            return self._byte_level.decode(ids)
        return self._tokenizer.decode(ids, skip_special_tokens=not special)

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def first_prompt(self, system: str, question: str) -> Ids:
        """Ids up to where the first response starts."""
        text = self._render([_message("system", system), _message("user", self._plain(question))])
        head, head_ids = self._head(system)
        if text.startswith(head):
            return head_ids + self.encode(text[len(head) :])
        return Ids(self.encode(text))

    def _head(self, system: str) -> tuple[str, Ids]:
        """What all first prompts with this system prompt begin with, as far as its ids depend on nothing else."""
        if self._byte_level is None:
            return "", Ids()
        if system not in self._heads:
            if len(self._heads) >= _MAX_HEADS:
                self._heads.clear()
            text = self._render([_message("system", system), _message("user", _QUESTION)]).partition(_QUESTION)[0]
            head = text[: self._byte_level.after_last_token(text)]
            self._heads[system] = head, Ids(self.encode(head))
        return self._heads[system]

    def response(self, text: str) -> list[int]:
        """Ids a policy would have sampled to say `text`, end of turn included."""
        return [*self.encode(text.removeprefix(self._opening)), self.stop_token_ids[0]]

    def said(self, response_ids: Sequence[int]) -> str:
        """A response as text, with the <think> of models that always think, which stands at the end of their prompts."""
        return self._opening + self.decode(response_ids)

    def continuation(self, output: str, *, closed: bool) -> list[int]:
        """Ids from the end of a response to where the next one starts.

        Args:
            closed: the response ended with a stop token; otherwise (cut at its length) that token is put first.
        """
        ids = self.encode(self._before_output + self._plain(output) + self._after_output)
        return ids if closed else [self.stop_token_ids[0], *ids]

    def _plain(self, text: str) -> str:
        return self._special.sub(lambda token: f"{token[0][0]} {token[0][1:]}", text)

    def _try(self, *messages: dict[str, str]) -> str:
        """What a template can't do is said before anything starts, as is what it passes over."""
        text = self._render([*messages])
        if left_out := [message["role"] for message in messages if message["content"] not in text]:
            raise UsageError(
                f"the chat template of {self._folder} leaves out what the {left_out[0]} says: l0fast needs a ChatML-like template"
            )
        return text

    def _render(self, messages: list[dict[str, str]]) -> str:
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, tools=None, documents=None, **self._named
            )
        except Exception as e:
            roles = ", ".join(message["role"] for message in messages)
            raise UsageError(
                f"the chat template of {self._folder} does not take messages of {roles} ({type(e).__name__}: {e}): l0fast needs a "
                "ChatML-like template"
            ) from e

    def _load_template(self, settings: dict[str, Any]) -> jinja2.Template:
        file = self._folder / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
        if isinstance(source, list):
            # several, as for tools
            source = {template.get("name"): template.get("template") for template in source}.get("default")
        if not isinstance(source, str):
            raise UsageError(
                f"model folder {self._folder} has no chat template: add chat_template.jinja (Qwen's ChatML works)"
            )
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        environment.globals["raise_exception"] = _raise_template_error
        # of one day: prompts of a run do not differ in it
        environment.globals["strftime_now"] = datetime.now().strftime
        try:
            return environment.from_string(source)
        except jinja2.TemplateSyntaxError as e:
            raise UsageError(
                f"the chat template of {self._folder} is broken at line {e.lineno}: {e.message}; mend or replace it"
            ) from e

    def _stop_ids(self, after_answer: str) -> tuple[int, ...]:
        """What the template ends an answer with, which also closes a response that was cut; then the model's others."""
        eos = _read_json(self._folder / "generation_config.json", needed=False).get("eos_token_id")
        if eos is None:
            eos = _read_json(self._folder / "config.json", needed=True).get("eos_token_id")
        ids = [eos] if isinstance(eos, int) else list(eos or ())
        # a base model's settings know of no turns
        by_name = map(self._tokenizer.token_to_id, ("<|im_end|>", self._named["eos_token"]))
        ends = {id: self._tokenizer.id_to_token(id) or "" for id in (*ids, *by_name) if id is not None}
        if not ends:
            raise UsageError(f"model folder {self._folder} names no eos_token_id: set it in generation_config.json")
        closing = next((id for id, token in ends.items() if token and after_answer.startswith(token)), None)
        if closing is None:
            raise UsageError(
                f"the chat template of {self._folder} does not end an answer with {' or '.join(map(repr, ends.values()))} "
                f"before the next message, got {after_answer[:40]!r}: add the token that does to eos_token_id in "
                "generation_config.json, or take a ChatML-like template"
            )
        return (closing, *(id for id in ids if id != closing))


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, around what an assistant says, for those who train on it. Text like any other."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _text_of(token: Any) -> str:
    """Of a special token as settings name it: a text, a record of one, or none."""
    return (token["content"] if isinstance(token, dict) else token) or ""


def _raise_template_error(message: str) -> None:
    raise jinja2.TemplateError(message)


def _read_json(path: Path, *, needed: bool) -> dict[str, Any]:
    if not path.is_file():
        if needed:
            raise UsageError(f"{path} is missing: point --model.path at a complete model folder")
        return {}
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise UsageError(f"{path} is not JSON: {e}; restore it from the model's source") from e
