"""Questions from files: which rows are tasks, what is said of the others, and in which order questions come."""

import json
import sys
from itertools import islice
from types import SimpleNamespace

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from l0fast.errors import UsageError
from l0fast.tasks.catalog import DATASETS
from l0fast.tasks.sources import Source, is_heldout, load_source, parse_source, stream
from l0fast.types import CHECKS, Task


def write(path, rows) -> str:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(text, split="train") -> Source:
    return load_source(parse_source(text), split)


def test_a_jsonl_row_becomes_a_task_by_its_columns(tmp_path):
    (tmp_path / "table.csv").write_text("1")
    row = {"prompt": " Who? ", "meta": {"gold": ["A", "B", "A"]}, "nr": 7, "level": 2, "attached": "table.csv"}
    data = write(tmp_path / "mine.jsonl", [row])
    [task] = load(f"{data}?question=prompt&answers=meta.gold|answer&id=nr&kind=level&files=attached").tasks
    files = {"table.csv": str(tmp_path / "table.csv")}
    assert task == Task(id="mine/7", question="Who?", answers=("A", "B"), kind="2", files=files)


@pytest.mark.parametrize(
    ("value", "answers"),
    [
        ("Oslo", ("Oslo",)),
        ('["a", "b"]', ("a", "b")),
        ("[sic", ("[sic",)),
        ("[-2, 7]", ("[-2, 7]",)),
        ("[12]", ("[12]",)),
        (["[0, 1)", "[2, 3]", '["x"]'], ("[0, 1)", "[2, 3]", '["x"]')),
        (3, ("3",)),
        (2.5, ("2.5",)),
        (42.0, ("42",)),
        ([42.0, 0.5], ("42", "0.5")),
        (True, ("True",)),
    ],
)
def test_an_answer_may_be_a_text_a_number_a_list_or_a_text_that_is_one(tmp_path, value, answers):
    data = write(tmp_path / "a.jsonl", [{"question": "q", "answer": value}])
    assert load(data).tasks[0].answers == answers


BAD = [
    ("{broken\n", "not JSON"),
    ("3\n", "not a record"),
    ({"question": "  ", "answer": "x"}, "no question in 'question', of the columns 'question', 'answer'"),
    ({"question": 5, "answer": "x"}, "no question"),
    ({"question": "q", "answer": [" "]}, "no answer in 'answers|golden_answers|answer'"),
    ({"question": "q", "answer": {"a": 1}}, "not dict"),
    ({"question": "q", "answer": "x", "id": "one"}, "its id 'questions/one' is that of line 1"),
]


def test_rows_that_do_not_fit_are_told_with_their_lines(tmp_path):
    good = {"question": "q", "answer": "x", "id": "one"}
    data = write(tmp_path / "questions.jsonl", [good, "\n", *(row for row, _ in BAD)])
    source = load(data)
    assert len(source.tasks) == 1
    assert [p.line for p in source.problems] == list(range(3, 3 + len(BAD)))
    for problem, (_, reason) in zip(source.problems, BAD, strict=True):
        assert reason in problem.reason
    assert source.report().startswith("questions: 1 questions, 7 of 8 rows left out (line 3: not JSON")
    assert source.report().endswith("; ...)")


def test_parquet_and_json_are_read_as_jsonl_is(tmp_path):
    rows = [{"question": f"q{i}", "answer": [f"a{i}"], "id": str(i)} for i in range(3000)]
    write(tmp_path / "x.jsonl", rows)
    (tmp_path / "x.json").write_text(json.dumps(rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    read = [load(str(tmp_path / f"x.{suffix}")).tasks for suffix in ("jsonl", "json", "parquet")]
    assert read[0] == read[1] == read[2]
    assert len(read[0]) == 3000


def test_answers_in_bytes_are_told_of_and_not_taken_for_a_list_of_numbers(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"question": ["q", "r"], "answers": [b"Oslo", b""]}), tmp_path / "x.parquet")
    with pytest.raises(UsageError, match="a list of them, not bytes"):
        load(str(tmp_path / "x.parquet"))


def test_a_file_may_begin_with_a_byte_order_mark_and_end_its_lines_as_windows_does(tmp_path):
    row = '{"question": "q", "answer": "x"}'
    (tmp_path / "x.jsonl").write_bytes(f"\ufeff{row}\r\n{row}\r\n".encode())
    (tmp_path / "x.json").write_bytes(f"\ufeff[{row},\r\n{row}]".encode())
    for name in ("x.jsonl", "x.json"):
        source = load(str(tmp_path / name))
        assert (len(source.tasks), source.problems) == (2, ())


def test_parquet_that_is_broken_further_on_is_one_sentence(tmp_path):
    path = tmp_path / "x.parquet"
    rows = [{"question": f"question {i * 7919}?", "answer": str(i)} for i in range(20_000)]
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=5000)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"x.parquet is no parquet file after row [\d,]+ \("):
        load(str(path))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("nowhere.jsonl", "there is no file nowhere.jsonl"),
        ("nothing", "neither a file nor a data set with a ready map"),
        ("nq?weight=-1", "weight = '-1'"),
        ("nq?colour=red", "colour = 'red'"),
        ("nq?weight", "is not DATA"),
        ("x.jsonl?map=nonesuch", "map = 'nonesuch' is none that ships"),
        ("bamboogle", "has no 'train' questions"),
    ],
)
def test_a_source_that_can_not_be_had_says_what_to_write(text, complaint):
    with pytest.raises(UsageError, match=complaint.replace("(", r"\(")):
        load(text)


def test_broken_files_and_files_without_a_question_are_refused(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not")
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "x.csv").write_text("a,b")
    for name, complaint in (("x.parquet", "no parquet file"), ("x.json", "no list"), ("x.csv", "none of the formats")):
        with pytest.raises(UsageError, match=complaint):
            load(str(tmp_path / name))
    data = write(tmp_path / "other.jsonl", [{"prompt": "q"}])
    with pytest.raises(UsageError, match="no question in 'question', of the columns 'prompt'"):
        load(data)


def test_a_name_on_the_hub_needs_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'l0fast\[data\]'"):
        load("hotpotqa")


def test_a_data_set_that_is_a_script_is_refused_in_a_sentence(monkeypatch):
    """As datasets 5 refuses it."""

    def load_dataset(*args, **kwargs):
        raise RuntimeError("Dataset scripts are no longer supported, but found name.py")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(UsageError, match=r"owner/name could not be had .*found name.py\): see its page"):
        load("owner/name")


def test_a_copy_on_disk_is_read_with_a_ready_map(tmp_path):
    row = {"task_id": "g1", "Question": "q", "Final answer": "4", "Level": "2", "file_name": "", "file_path": None}
    [task] = load(write(tmp_path / "gaia.jsonl", [row]) + "?map=gaia").tasks
    assert (task.id, task.kind, task.answers, task.check) == ("gaia/g1", "2", ("4",), "exact_match")
    row = {"question": "q", "answer": "2 + 2 = 4\n#### 4"}
    [task] = load(write(tmp_path / "g.jsonl", [row]) + "?map=gsm8k").tasks
    assert (task.answers, task.check) == (("4",), "numeric")
    verl = {"source": "nq", "question": "q", "reward_model": {"ground_truth": "Oslo"}, "extra_info": {"index": 3}}
    [task] = load(write(tmp_path / "l0.jsonl", [verl]) + "?map=l0").tasks
    assert (task.id, task.kind, task.answers) == ("l0/3", "nq", ("Oslo",))


def test_tasks_with_unit_tests_need_no_answer_but_tests(tmp_path):
    rows = [{"question": "q", "tests": ["assert f(1) == 2"]}, {"question": "r", "answer": "x"}]
    source = load(write(tmp_path / "code.jsonl", rows) + "?check=unit_tests")
    assert source.tasks[0].tests == ("assert f(1) == 2",)
    assert source.problems[0].reason.startswith("no tests")


def test_a_row_may_say_how_it_is_judged(tmp_path):
    rows = [{"question": f"q {i}", "answer": "1", "check": check} for i, check in enumerate(("math", "by eye", None))]
    data = write(tmp_path / "x.jsonl", rows)
    assert [task.check for task in load(data).tasks] == ["math", "exact_match", "exact_match"]
    assert [task.check for task in load(f"{data}?map=gsm8k").tasks] == ["math", "numeric", "numeric"]
    assert {task.check for task in load(f"{data}?check=regex").tasks} == {"regex"}


def test_every_ready_map_names_its_data_set_and_a_check_there_is():
    for data_set in DATASETS.values():
        assert data_set.hub.count("/") == 1
        assert set(data_set.splits) <= {"train", "eval"}
        assert data_set.check in CHECKS


def test_one_file_is_dealt_into_parts_that_share_no_question(tmp_path):
    data = write(tmp_path / "x.jsonl", [{"question": f"q {i}", "answer": "a"} for i in range(2000)])
    train, heldout = (load(f"{data}?heldout_share=0.1", split).tasks for split in ("train", "eval"))
    assert len(train) + len(heldout) == 2000
    assert not {task.question for task in train} & {task.question for task in heldout}
    assert len(load(f"{data}?heldout_share=0.1&limit=20", "eval").tasks) == 20
    assert 150 < len(heldout) < 250
    assert is_heldout("Q  1", 0.5) == is_heldout("q 1", 0.5)


def sources(weights, sizes):
    return [
        Source(
            name=str(i),
            tasks=tuple(Task(id=f"{i}/{j}", question="q", answers=("a",)) for j in range(size)),
            problems=(),
            weight=weight,
        )
        for i, (weight, size) in enumerate(zip(weights, sizes, strict=True))
    ]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 5), st.integers(0, 200))
def test_a_stream_goes_on_exactly_where_it_was(sizes, seed, position):
    made = sources([1.0] * len(sizes), sizes)
    whole = list(islice(stream(made, seed), position + 20))
    assert list(islice(stream(made, seed), position, position + 20)) == whole[position:]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 5))
def test_no_question_comes_again_before_all_of_its_source(sizes, seed):
    taken = list(islice(stream(sources([1.0] * len(sizes), sizes), seed), 150))
    for i, size in enumerate(sizes):
        own = [task.id for task in taken if task.id.startswith(f"{i}/")]
        for start in range(0, len(own) - size + 1, size):
            assert len(set(own[start : start + size])) == size


def test_sources_come_by_their_weights_and_another_seed_shuffles_otherwise():
    made = sources([3.0, 1.0], [50, 50])
    taken = [task.id for task in islice(stream(made, 0), 4000)]
    assert 0.71 < sum(i.startswith("0/") for i in taken) / 4000 < 0.79
    assert taken != [task.id for task in islice(stream(made, 1), 4000)]
