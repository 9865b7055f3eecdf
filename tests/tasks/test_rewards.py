"""Rewards against numbers computed with L0's own functions, and where we mean to differ."""

import json
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l0fast.agent.parsing import parse_action
from l0fast.config import RewardConfig
from l0fast.ids import Ids
from l0fast.tasks.rewards import (
    code_score,
    exact_match,
    f1,
    has_answer,
    last_number,
    matches,
    normalize_answer,
    numeric,
    turn_rewards,
)
from l0fast.types import Task, Trajectory, TrajectoryStatus, Turn

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "l0_golden.json").read_text())
TASK = Task(id="t", question="Which city?", answers=("New York City",))


def turn(
    text="<think>Look it up first.</think><code>search('x')</code>", output: str | None = "[]", error=None
) -> Turn:
    return Turn(
        prompt_ids=Ids((1,)),
        response_ids=Ids((2,)),
        sampler_logprobs=(-0.1,),
        finish_reason="stop",
        policy_version=0,
        text=text,
        output=output,
        well_formed=parse_action(text).well_formed,
        error=error,
    )


def l0_rewards(episode: Trajectory) -> tuple[float, ...]:
    """With L0's weights, as the defaults are."""
    right, given = exact_match(episode.answer, episode.task.answers), has_answer(episode.answer)
    return turn_rewards(episode, RewardConfig(), {"correct": right, "has_answer": given}, max_new_tokens=1)


def qa_score(answer, answers) -> float:
    """L0's qa: what an answer earns, of the 0.8 that it can."""
    only = turn("no tags", output=None)
    task = Task(id="t", question="", answers=tuple(answers))
    return sum(l0_rewards(trajectory([only], answer=answer, task=task))) / 0.8


def trajectory(turns, answer=None, task=TASK) -> Trajectory:
    return Trajectory(task=task, index=0, status=TrajectoryStatus.COMPLETED, turns=tuple(turns), answer=answer)


@pytest.mark.parametrize(("answer", "golden"), [(a, g) for a, g in GOLDEN["qa"] if a != ""])
def test_answers_score_as_in_l0(answer, golden):
    scores, parts = golden
    assert qa_score(answer, TASK.answers) == pytest.approx(scores["score"][0], abs=1e-6)
    assert exact_match(answer, TASK.answers) == parts["em_score"]
    assert f1(answer, TASK.answers) == pytest.approx(parts["f1_score"], abs=1e-6)
    assert has_answer(answer) == parts["has_answer_score"]


def test_unlike_in_l0_an_empty_answer_earns_nothing():
    [(scores, _)] = [golden for answer, golden in GOLDEN["qa"] if answer == ""]
    assert scores["score"] == [0.1]
    assert qa_score("", TASK.answers) == qa_score(" \n", TASK.answers) == 0.0


def test_unlike_in_l0_answers_in_other_scripts_are_told_apart():
    assert exact_match("東京", ["東京"])
    assert not exact_match("東京", ["京都"])
    assert exact_match("МОСКВА!", ["Москва"])
    assert f1("город Москва", ["Москва"]) == pytest.approx(2 / 3)


# the same four responses that the golden numbers were computed for: well-formed; both too short; no tags; two blocks
RESPONSES = (
    "<think>a long enough thought</think><code>print(1)</code>",
    "<think>short</think><code>x</code>",
    "no tags at all",
    "<think>a long enough thought</think><code>print(1)</code><code>print(2)</code>",
)


def test_the_format_of_turns_scores_as_in_l0():
    [scores, _] = GOLDEN["fmt"]
    rewards = l0_rewards(trajectory(turn(text, output=None) for text in RESPONSES))
    assert rewards == pytest.approx([0.1 * score for score in scores["score"]], abs=1e-6)


def test_the_outputs_of_cells_score_as_in_l0():
    [scores, _] = GOLDEN["code"]
    errors_and_outputs = [(1, 1), (1, 2), (0, 0), (0, 0)]
    ours = [code_score(*counts) / len(errors_and_outputs) for counts in errors_and_outputs]
    assert ours == pytest.approx(scores["score"], abs=1e-6)


def test_unlike_in_l0_a_cell_that_printed_before_it_failed_has_one_output():
    [only] = l0_rewards(trajectory([turn("no tags", output="7\nNameError: x", error="NameError")]))
    assert only == 0.0


def test_the_reward_of_a_perfect_episode_sums_to_one_and_the_answer_counts_on_the_last_turn():
    rewards = l0_rewards(trajectory([turn(), turn(), turn()], answer="new york city"))
    assert rewards == pytest.approx([0.2 / 3, 0.2 / 3, 0.8 + 0.2 / 3], abs=1e-12)
    assert sum(rewards) == pytest.approx(1.0)


def test_each_part_of_a_turns_reward_has_its_weight():
    wrong = l0_rewards(trajectory([turn("no tags", output=None), turn("no tags", output=None)], answer="Boston"))
    assert wrong == pytest.approx([0.0, 0.08])
    ran = l0_rewards(trajectory([turn("no tags", output="7"), turn("no tags", output="")]))
    assert ran == pytest.approx([0.05, 0.0])
    failed = l0_rewards(trajectory([turn(output="NameError: x", error="NameError")]))
    assert failed == pytest.approx([0.1])


def test_an_episode_without_turns_has_no_rewards():
    assert l0_rewards(trajectory([])) == ()


def test_any_listed_value_is_a_right_answer():
    answers = ("Breton", "French")
    assert exact_match("french", answers)
    assert exact_match("the Breton.", answers)
    assert not exact_match("French Breton", answers)
    assert f1("French Breton", answers) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("given_text", "right"),
    [
        (".fr", "fr"),
        ("+1-268", "1268"),
        ("The Bahamas", "bahamas"),
        ("ＴＯＫＹＯ", "tokyo"),
        ("Straße", "STRASSE"),
        ("ℌelsinki", "helsinki"),
        ("Cote d'Ivoire", "cote divoire"),
        ("«Lyon»", "lyon"),
        ("New\u00a0York", "new york"),
    ],
)
def test_case_width_punctuation_articles_and_spacing_do_not_count(given_text, right):
    assert normalize_answer(given_text) == normalize_answer(right)


def test_answers_of_nothing_but_articles_and_punctuation_are_compared_by_them():
    for choice in ("A", "(A)", "a.", "A)"):
        assert exact_match(choice, ["A"])
        assert not exact_match(choice, ["B"])
    assert exact_match("「A」", ["A"])
    assert not exact_match("the", ["a"])
    assert not exact_match("!", ["?"])


@given(st.text())
def test_normalised_answers_have_no_case_no_outer_space_and_are_equal_to_themselves(text):
    normal = normalize_answer(text)
    assert normal == " ".join(normal.split())
    assert exact_match(text, [text]) == bool(text.strip())
    assert normalize_answer(text.upper().lower()) == normalize_answer(text.upper().lower().casefold())


@given(st.text(), st.lists(st.text(), max_size=4))
def test_scores_are_between_zero_and_one_and_an_exact_match_has_full_f1(answer, answers):
    assert 0 <= f1(answer, answers) <= 1
    assert 0 <= qa_score(answer, answers) <= 1 + 1e-9
    if exact_match(answer, answers):
        assert f1(answer, answers) == 1
        assert qa_score(answer, answers) == pytest.approx(1)


@given(st.text(alphabet=st.characters(categories=("L", "N", "Zs")), min_size=1), st.sampled_from(".,!?'\"-()"))
def test_adding_punctuation_or_an_article_changes_nothing(text, mark):
    kept = [token for token in normalize_answer(text).split() if token not in ("a", "an", "the")]
    if kept:
        assert normalize_answer(f"The {text} {mark}") == normalize_answer(text)


@given(st.text())
def test_composed_and_decomposed_letters_are_equal(text):
    assert normalize_answer(unicodedata.normalize("NFD", text)) == normalize_answer(text)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 1,234.5 km", 1234.5),
        ("$12", 12),
        ("-$12", -12),
        ("+€1,000", 1000),
        ("72 on 5/6/2024", 2024),
        ("3/4/", 0.75),
        ("1e5e5", 5),
        ("12 3456", 3456),
        ("1,2345", 2345),
        ("between 3 and -4.5e3", -4500),
        ("3/4", 0.75),
        ("\u22125", -5),
        (".5", 0.5),
        ("1 000 000 people", 1_000_000),
        ("12%", 12),
        ("7/0", None),
        ("none at all", None),
        ("", None),
        ("١٢", 12),
    ],
)
def test_the_last_number_of_a_text_is_read_as_a_person_would(text, number):
    assert last_number(text) == (None if number is None else pytest.approx(number))


@given(st.text() | st.text(alphabet="0123456789.,/eE+-$ ", max_size=12))
def test_any_text_has_a_number_or_none(text):
    number = last_number(text)
    assert number is None or isinstance(number, float)


@given(st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_a_number_equals_itself_however_it_is_written(number):
    assert numeric(f"It is {number!r}.", [f"{number:,}" if abs(number) < 1e15 else str(number)])


def test_numbers_are_equal_within_the_tolerance_and_not_beyond():
    assert numeric("3.1416", ["3.14159"], tolerance=1e-4)
    assert not numeric("3.1416", ["3.14159"], tolerance=1e-7)
    assert not numeric("no idea", ["3"])
    assert not numeric("3", ["no number"])


def test_a_pattern_must_match_the_whole_answer_and_ends_when_it_backtracks_for_ever():
    assert matches(" 2024-05-01\n", [r"\d{4}-\d\d-\d\d"])
    assert not matches("on 2024-05-01", [r"\d{4}-\d\d-\d\d"])
    assert not matches("a" * 40 + "!", [r"(a+)+"])
    assert matches("b", ["[", "b"])
    assert not matches("", [".*"])


# --- the published rules, written once more from their description ------------------------------------------------------


def squad_normal(text: str) -> str:
    """Lower case, without ASCII punctuation, without articles, single spaces: SQuAD's evaluation, for ASCII texts."""
    import re
    import string

    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


@given(
    st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126)), st.text(alphabet="ab the,.AN", max_size=12)
)
def test_on_ascii_exact_match_and_f1_are_those_of_squad(answer, right):
    a, b = squad_normal(answer), squad_normal(right)
    if a and b:
        assert exact_match(answer, [right]) == (a == b)
        common = sum(min(a.split().count(w), b.split().count(w)) for w in set(a.split()))
        expected = 2 * common / (len(a.split()) + len(b.split()))
        assert f1(answer, [right]) == pytest.approx(expected)


def test_each_reward_of_the_recipe_is_earned_by_its_weight():
    weights = RewardConfig(correct=0.5, has_answer=0, format=0, code=0, length=0.4, f1=0.25)
    scores = {"correct": 1.0, "has_answer": 1.0, "f1": 0.5}
    short, long = turn("no tags"), replace(turn("no tags"), response_ids=Ids((1,) * 10), sampler_logprobs=(0.0,) * 10)
    rewards = turn_rewards(
        trajectory([short, long], answer="x"), weights, scores, max_new_tokens=10, custom=[(2.0, (0.5, 0.0))]
    )
    assert rewards == pytest.approx([0.4 * 0.9 / 2 + 1.0, 0.5 + 0.125])
