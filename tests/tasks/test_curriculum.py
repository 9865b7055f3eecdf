"""What a run asks: worlds with their scopes, and sources mixed and dealt."""

import json
from itertools import islice

import pytest

from l0fast.config import RunConfig, TaskConfig
from l0fast.errors import UsageError
from l0fast.tasks.curriculum import NAMED_TOOLS, load_curriculum
from l0fast.types import Trajectory, TrajectoryStatus


def curriculum(**task):
    return load_curriculum(RunConfig(task=TaskConfig(**task)))


@pytest.fixture
def files(tmp_path):
    for name, n in (("a", 6), ("b", 2)):
        rows = [{"question": f"{name} {i}?", "answer": str(i)} for i in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(tmp_path / f"{name}.jsonl") for name in ("a", "b")]


def test_the_questions_of_a_world_are_searched_for_in_a_corpus_of_their_scope():
    invented = curriculum(kind="invented", num_variants=2)
    for task in islice(invented.questions(0), 50):
        assert invented.scope(task) in invented.corpora
    assert set(invented.corpora[invented.scope(next(invented.questions(0)))]) < set(
        invented.corpora[invented.evaluation]
    ) | set().union(*map(set, invented.corpora.values()))
    scope, tasks = invented.transfer(5)["other_world"]
    assert scope in invented.corpora
    assert len(tasks) == 5


def test_questions_from_files_have_the_recipes_tools(files):
    asked = curriculum(kind="questions", train=files, eval=files[1:])
    task = next(asked.questions(0))
    assert asked.scope(task) == asked.evaluation == NAMED_TOOLS
    assert NAMED_TOOLS not in asked.corpora
    assert (asked.worlds, asked.transfer(3)) == ((), {})
    assert asked.reports[:3] == ("a: 6 questions", "b: 2 questions", "b: 2 questions")
    [shared] = asked.reports[3:]
    assert "b: 2 of 2 questions to evaluate on are trained on as well" in shared


def test_a_question_that_stands_twice_counts_twice_of_those_that_are_trained_on(tmp_path):
    rows = [{"question": f"{i % 14}?", "answer": str(i)} for i in range(16)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    same = [str(tmp_path / "a.jsonl")]
    assert "a: 16 of 16 questions to evaluate on" in curriculum(kind="questions", train=same, eval=same).reports[-1]


def test_a_file_dealt_in_two_is_not_called_shared(tmp_path):
    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dealt = [f"{tmp_path / 'a.jsonl'}?heldout_share=0.3"]
    assert len(curriculum(kind="questions", train=dealt, eval=dealt).reports) == 2


def test_held_out_questions_are_of_each_source_alike_many_and_always_the_same(files):
    asked = curriculum(kind="questions", train=files[:1], eval=files)
    four = [task.id for task in asked.heldout(4)]
    assert sorted(i[0] for i in four) == ["a", "a", "b", "b"]
    assert four == [task.id for task in curriculum(kind="questions", train=files[:1], eval=files).heldout(4)]
    assert len(asked.heldout(100)) == 8


def test_what_became_of_them_is_told_in_shares(files):
    asked = curriculum(kind="questions", train=files, eval=files)
    task = next(asked.questions(0))

    def played(status=TrajectoryStatus.COMPLETED, answer="x", right=False):
        return Trajectory(task=task, index=0, status=status, turns=(), answer=answer, correct=right)

    shares = asked.outcomes(
        [played(right=True), played(), played(answer=" "), played(status=TrajectoryStatus.FAILED_ENGINE)]
    )
    assert shares == {"right": 0.25, "wrong": 0.25, "no_answer": 0.25, "failed": 0.25}


def test_sources_of_one_name_are_refused(files):
    with pytest.raises(UsageError, match="two sources are called a"):
        curriculum(kind="questions", train=(files[0], files[0]), eval=files)
    with pytest.raises(UsageError, match="two sources are called b"):
        curriculum(kind="questions", train=files, eval=(files[1], files[1]))
