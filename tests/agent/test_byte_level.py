"""ByteLevel says what the tokenizer says, whatever the text."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from l0fast.agent import byte_level
from l0fast.agent.byte_level import ByteLevel
from l0fast.warm_start.tokenizer import train_tokenizer

TEXTS = ["The capital of Norway is Oslo.", "search('Oslo')\nprint(x)\n", "it's 1234 or 5\t 6", "naïve 東京"] * 3
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PIECES = [
    "<|im_end|>",
    "<|im_start|>",
    "<think>",
    "</think>",
    "<code>",
    "<|",
    "</",
    "user\n",
    "'S",
    "’s",
    "\x1c",
    "\x85",
]
PIECES += [" ", "  ", "\n", "\r\n", "\t", "Oslo", " oslo", "it's", "12", "x=[1]", "é", "東京", "…", "\u00a0"]
ANY = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=12).map("".join))


def qwen_like(**added: bool) -> Tokenizer:
    """The form of Qwen's tokenizer; `added` changes how its special tokens are found."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", **added), AddedToken("<|im_end|>", normalized=False)])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("<think>\n", normalized=False)])
    return tokenizer


@pytest.fixture(scope="module", params=["ours", "qwen"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=320) if request.param == "ours" else qwen_like(normalized=False)


@pytest.fixture(scope="module")
def remembering(tokenizer: Tokenizer) -> ByteLevel:
    """One for all texts, so that what it remembers of some is used for others."""
    found = ByteLevel.of(tokenizer)
    assert found is not None
    return found


@given(ANY)
def test_encodes_as_the_tokenizer_does(tokenizer: Tokenizer, remembering: ByteLevel, text: str):
    for _ in range(2):
        assert remembering.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids


@given(st.lists(st.integers(0, 400)))
def test_decodes_as_the_tokenizer_does(tokenizer: Tokenizer, remembering: ByteLevel, ids: list[int]):
    """Ids that are no character, special ones, and ids of nothing included."""
    assert remembering.decode(ids) == tokenizer.decode(ids)


@given(ANY, ANY)
@example(text="a<think>", more="\n")  # a longer token begins with this one
def test_ids_up_to_the_last_token_do_not_depend_on_what_follows(remembering: ByteLevel, text: str, more: str):
    end = remembering.after_last_token(text)
    head = remembering.encode(text[:end])
    assert remembering.encode(text[:end] + more)[: len(head)] == head
    assert remembering.encode(text) == head + remembering.encode(text[end:])


def test_what_it_remembers_is_bounded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(byte_level, "_MAX_REMEMBERED", 10)
    found = ByteLevel.of(tokenizer)
    assert found is not None
    texts = [f"word{chr(97 + n)}{chr(98 + n)} and<|im_end|>{chr(97 + n)}" for n in range(20)]
    for text in texts * 2:
        assert found.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids
    assert len(found._ids) <= 10 + 4  # those of the last text
    assert len(found._short) <= 10


def other_decoder() -> Tokenizer:
    tokenizer = qwen_like(normalized=False)
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def other_pattern() -> Tokenizer:
    tokenizer = qwen_like(normalized=False)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def grouping() -> Tokenizer:
    tokenizer = qwen_like(normalized=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"(\s)|\w+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def lowercase() -> Tokenizer:
    tokenizer = qwen_like(normalized=False)
    tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def truncating() -> Tokenizer:
    tokenizer = qwen_like(normalized=False)
    tokenizer.enable_truncation(8)
    return tokenizer


@pytest.mark.parametrize(
    "make",
    [
        other_decoder,
        other_pattern,
        grouping,
        lowercase,
        truncating,
        lambda: qwen_like(normalized=True),
        lambda: qwen_like(normalized=False, lstrip=True),
        lambda: qwen_like(normalized=False, single_word=True),
    ],
)
def test_a_tokenizer_of_another_form_is_left_to_the_library(make):
    assert ByteLevel.of(make()) is None
