"""Rewards against numbers computed with L0's own functions, and where we mean to differ."""

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l0fast.agent.parsing import parse_action
from l0fast.tasks.rewards import (
    code_score,
    exact_match,
    f1,
    has_answer,
    normalize_answer,
    qa_score,
    turn_rewards,
)
from l0fast.types import Task, Trajectory, TrajectoryStatus, Turn

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "l0_golden.json").read_text())
TASK = Task(id="t", question="Which city?", answers=("New York City",))


def turn(
    text="<think>Look it up first.</think><code>search('x')</code>", output: str | None = "[]", error=None
) -> Turn:
    return Turn(
        prompt_ids=(1,),
        response_ids=(2,),
        sampler_logprobs=(-0.1,),
        finish_reason="stop",
        policy_version=0,
        text=text,
        output=output,
        well_formed=parse_action(text).well_formed,
        error=error,
    )


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
    rewards = turn_rewards(trajectory(turn(text, output=None) for text in RESPONSES))
    assert rewards == pytest.approx([0.1 * score for score in scores["score"]], abs=1e-6)


def test_the_outputs_of_cells_score_as_in_l0():
    [scores, _] = GOLDEN["code"]
    errors_and_outputs = [(1, 1), (1, 2), (0, 0), (0, 0)]
    ours = [code_score(*counts) / len(errors_and_outputs) for counts in errors_and_outputs]
    assert ours == pytest.approx(scores["score"], abs=1e-6)


def test_unlike_in_l0_a_cell_that_printed_before_it_failed_has_one_output():
    [only] = turn_rewards(trajectory([turn("no tags", output="7\nNameError: x", error="NameError")]))
    assert only == 0.0


def test_the_reward_of_a_perfect_episode_sums_to_one_and_the_answer_counts_on_the_last_turn():
    rewards = turn_rewards(trajectory([turn(), turn(), turn()], answer="new york city"))
    assert rewards == pytest.approx([0.2 / 3, 0.2 / 3, 0.8 + 0.2 / 3], abs=1e-12)
    assert sum(rewards) == pytest.approx(1.0)


def test_each_part_of_a_turns_reward_has_its_weight():
    wrong = turn_rewards(trajectory([turn("no tags", output=None), turn("no tags", output=None)], answer="Boston"))
    assert wrong == pytest.approx([0.0, 0.08])
    ran = turn_rewards(trajectory([turn("no tags", output="7"), turn("no tags", output="")]))
    assert ran == pytest.approx([0.05, 0.0])
    failed = turn_rewards(trajectory([turn(output="NameError: x", error="NameError")]))
    assert failed == pytest.approx([0.1])


def test_an_episode_without_turns_has_no_rewards():
    assert turn_rewards(trajectory([])) == ()


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


def test_answers_of_nothing_but_articles_and_punctuation_are_compared_as_they_stand():
    assert exact_match("A", ["a"])
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
    assert 0 <= qa_score(answer, answers) <= 1
    if exact_match(answer, answers):
        assert f1(answer, answers) == 1
        assert qa_score(answer, answers) == 1


@given(st.text(alphabet=st.characters(categories=("L", "N", "Zs")), min_size=1), st.sampled_from(".,!?'\"-()"))
def test_adding_punctuation_or_an_article_changes_nothing(text, mark):
    kept = [token for token in normalize_answer(text).split() if token not in ("a", "an", "the")]
    if kept:
        assert normalize_answer(f"The {text} {mark}") == normalize_answer(text)


@given(st.text())
def test_composed_and_decomposed_letters_are_equal(text):
    assert normalize_answer(unicodedata.normalize("NFD", text)) == normalize_answer(text)
