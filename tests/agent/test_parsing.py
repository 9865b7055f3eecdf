"""parse_action is total, and says exactly why nothing ran."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l0fast.agent.parsing import parse_action

TAGGED = st.lists(
    st.sampled_from(["<think>", "</think>", "<code>", "</code>", "x = 1", "\n", " ", "I should look it up", "<", "é"]),
    max_size=12,
).map("".join)


@given(st.one_of(st.text(), TAGGED))
def test_any_text_gives_code_or_a_complaint_never_both(text: str):
    action = parse_action(text)
    assert bool(action.code.strip()) != (action.complaint is not None)


@given(st.one_of(st.text(), TAGGED))
def test_what_is_well_formed_is_run(text: str):
    action = parse_action(text)
    if action.well_formed:
        assert action.complaint is None


def test_words_around_the_blocks_do_not_matter_to_what_runs():
    action = parse_action("Sure!\n<think>The capital is needed.</think>\nso\n<code>\nx = 1\nx\n</code> done")
    assert action.code == "x = 1\nx"
    assert action.think == "The capital is needed."
    assert action.well_formed


@pytest.mark.parametrize(
    ("code", "run"),
    [
        (" print(1) ", "print(1)"),
        (" x = 1\n if x:\n     x\n", "x = 1\nif x:\n    x"),
        (" import math\nmath.pi", "import math\nmath.pi"),
        ("if x:\n    y", "if x:\n    y"),
        ("\r\n    x = 1\r\n\r\n    x\r\n", "x = 1\n\nx"),
        ("\r\nif x:\r\n    y\r\n", "if x:\n    y"),
    ],
)
def test_spaces_before_the_code_are_no_indentation(code: str, run: str):
    compile(run, "", "exec")
    assert parse_action(f"<code>{code}</code>").code.rstrip() == run


@pytest.mark.parametrize(("text", "complaint"), [
    ("Oslo", "write one <code>"),
    ("<code>search('Oslo')", "not closed"),
    ("<code>a = 1</code><code>b = 2</code>", "found 2 <code> blocks"),
    ("<think>a long enough thought</think><code>\n \n</code>", "is empty"),
])  # fmt: skip
def test_the_complaint_names_what_is_wrong(text: str, complaint: str):
    action = parse_action(text)
    assert complaint in (action.complaint or "")
    assert action.code == ""


@pytest.mark.parametrize("text", [
    "<code>print(1)</code>",
    "<think>short</think><code>print(1)</code>",
    "<think>long enough, really</think><code>x=1</code>",
    "<think>long enough, really</think><think>once more, with feeling</think><code>print(1)</code>",
    "<think>long enough, really</think><think><code>print(1)</code>",
])  # fmt: skip
def test_code_without_exactly_one_long_think_and_code_runs_but_earns_no_format_reward(text: str):
    action = parse_action(text)
    assert action.complaint is None
    assert not action.well_formed
