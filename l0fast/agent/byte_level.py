"""A byte-level BPE tokenizer's answers, remembered: what `tokenizers` says, an order of magnitude sooner.

    encode   text -> sections between added tokens -> pieces, as its pattern splits them -> ids, asked for once a piece
    decode   ids -> bytes of each, from a table -> text

On the event loop of thousands of agents, encoding what cells printed is the largest cost of a turn: 1.5 us a token by
`Tokenizer.encode`, 0.15 us here [measured]. Every piece is still the library's: `model.tokenize`, which sees it as it would
inside of the text. Only tokenizers of the form that GPT-2, Llama 3 and Qwen share are taken, and only printable ASCII text,
where no two regular expression engines disagree about letters and spaces; everything else is the library's work.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import regex
from tokenizers import Tokenizer

_MAX_REMEMBERED = 200_000
"""Pieces; with more of them all are forgotten, which costs some milliseconds over the next texts."""
_SHORT_CHARS = 12
_PRINTABLE = re.compile(r"[\t\n\r -~]*")
_NOT_A_BYTE = "\uffff"


class ByteLevel:
    """Made by `of`."""

    def __init__(self, tokenizer: Tokenizer, pattern: str, added: dict[str, int], special: set[int]):
        self._tokenizer, self._model = tokenizer, tokenizer.model
        self._added = added
        # of two tokens that begin at the same place the longer one counts
        tokens = sorted(added, key=len, reverse=True)
        self._sections = re.compile(f"({'|'.join(map(re.escape, tokens))})") if tokens else None
        # more text may make a longer token of these
        self._open = {token for token in tokens if any(token in other[:-1] for other in tokens)}
        self._split = _compiled(f"({pattern})").split
        self._ids: dict[str, tuple[int, ...]] = {"": ()}
        self._short: dict[str, list[int]] = {}
        """Short ones: what a chat form puts around a message."""
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        # None: an id of nothing
        self._bytes: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
        for token, id in vocabulary.items():
            self._bytes[id] = b"" if id in special else _bytes_of(token)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ByteLevel | None":
        """None for a tokenizer of another form."""
        form: dict[str, Any] = json.loads(tokenizer.to_str())
        pattern = _pattern(form["pre_tokenizer"])
        model, normalizer = form["model"], form["normalizer"]
        plain = all(
            not (token["lstrip"] or token["rstrip"] or token["single_word"] or token["normalized"])
            for token in form["added_tokens"]
        )
        if (
            pattern is None
            or not plain
            or model["type"] != "BPE"
            or model.get("dropout")
            or (normalizer is not None and normalizer["type"] not in ("NFC", "NFKC"))  # neither changes ASCII
            or (form["decoder"] or {}).get("type") != "ByteLevel"
            or form["truncation"] is not None
            or form["padding"] is not None
        ):
            return None
        added = {token["content"]: token["id"] for token in form["added_tokens"]}
        special = {token["id"] for token in form["added_tokens"] if token["special"]}
        return cls(tokenizer, pattern, added, special)

    def encode(self, text: str) -> list[int]:
        """As `Tokenizer.encode(text, add_special_tokens=False).ids`."""
        if _PRINTABLE.fullmatch(text) is None:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        if self._sections is None:
            return self._encode_section(text)
        # text, token, text, token ... text
        sections = self._sections.split(text)
        ids = self._encode_section(sections[0])
        for token, section in zip(sections[1::2], sections[2::2], strict=True):
            ids.append(self._added[token])
            if section:
                ids += self._encode_short(section) if len(section) <= _SHORT_CHARS else self._encode_section(section)
        return ids

    def _encode_short(self, text: str) -> list[int]:
        ids = self._short.get(text)
        if ids is None:
            if len(self._short) >= _MAX_REMEMBERED:
                self._short.clear()
            ids = self._short[text] = self._encode_section(text)
        return ids

    def _encode_section(self, text: str) -> list[int]:
        # what the pattern does not match stands between the matches, and is a piece too
        pieces, ids = self._split(text), []
        remembered = self._ids
        try:
            for piece in pieces:
                ids += remembered[piece]
        except KeyError:
            self._ask(pieces)
            return [id for piece in pieces for id in remembered[piece]]
        return ids

    def _ask(self, pieces: Sequence[str]) -> None:
        if len(self._ids) >= _MAX_REMEMBERED:
            self._ids.clear()
            self._ids[""] = ()
        for piece in {*pieces} - self._ids.keys():
            self._ids[piece] = tuple(token.id for token in self._model.tokenize(piece.translate(_CHAR_OF_BYTE)))

    def decode(self, ids: Sequence[int]) -> str:
        """As `Tokenizer.decode(ids)`, special tokens dropped; no id is negative."""
        try:
            # a list and no dictionary: of a large vocabulary less of it has to be in the processor's cache
            return b"".join(map(self._bytes.__getitem__, ids)).decode("utf-8", "replace")  # type: ignore[arg-type]
        except (IndexError, TypeError):
            # an id of nothing: the library's case
            return self._tokenizer.decode(ids)

    def after_last_token(self, text: str) -> int:
        """Where the last added token in `text` ends, 0 without one: ids up to there do not depend on what follows."""
        ends = [m.end() for m in self._sections.finditer(text) if m[0] not in self._open] if self._sections else []
        return ends[-1] if ends else 0


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The regular expression of [Split by it, ByteLevel], where that is what stands before the model."""
    match pre_tokenizer:
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            # its own groups would be pieces of their own
            return pattern if _compiles(pattern) else None
    return None


def _compiles(pattern: str) -> bool:
    try:
        return _compiled(pattern).groups == 0
    except regex.error:
        return False


def _compiled(pattern: str) -> "re.Pattern[str] | regex.Pattern[str]":
    try:
        return re.compile(pattern)
    except re.error:
        # \p{L} and the like, at half the speed
        return regex.compile(pattern)


def _char_of_byte() -> dict[int, str]:
    """GPT-2's: a visible character for each byte."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    chars = {byte: chr(byte) for byte in visible}
    hidden = (byte for byte in range(256) if byte not in chars)
    return chars | {byte: chr(256 + n) for n, byte in enumerate(hidden)}


_CHAR_OF_BYTE = _char_of_byte()
_LATIN_1_OF_CHAR = {byte: _NOT_A_BYTE for byte in range(256)} | {
    ord(char): chr(byte) for byte, char in _CHAR_OF_BYTE.items()
}


def _bytes_of(token: str) -> bytes:
    try:
        return token.translate(_LATIN_1_OF_CHAR).encode("latin-1")
    except UnicodeEncodeError:
        # an added token that is no spelling of bytes is its own text
        return token.encode()
