"""The data pipeline end to end: exactly the planted rows go, memory stays flat, and a kill changes nothing."""

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from l0fast.data.__main__ import SPLITS, build, main, parser
from l0fast.data.contamination import NGRAM, Contamination, question_key
from l0fast.data.quality import read_quality
from l0fast.errors import EngineError, UsageError
from l0fast.tasks.sources import load_source, parse_source

ROWS = 100_000
DUPLICATE, BROKEN, CONTAMINATED = 11, 997, 503
"""One row in so many; all primes, so that they seldom fall together."""


def question(i: int) -> str:
    return f"In which year was the bridge number {i} over the river {i * 7919 % 1000} opened to the public?"


@pytest.fixture(scope="session")
def planted(tmp_path_factory) -> Path:
    """A large source with rows that must go, and the evaluation set."""
    folder = tmp_path_factory.mktemp("planted")
    with (folder / "big.jsonl").open("w") as file:
        for i in range(ROWS):
            if i % BROKEN == 1:
                file.write('{"question": "cut off\n')
            elif i % CONTAMINATED == 2:
                file.write(json.dumps({"question": f"Tell me: {evaluation(i % 50)} Be brief.", "answer": "x"}) + "\n")
            elif i % DUPLICATE == 3 and i > DUPLICATE:
                # the same words in other clothes
                file.write(json.dumps({"question": question(0).upper() + " ", "answer": "1900"}) + "\n")
            else:
                file.write(json.dumps({"question": question(i), "answer": str(1800 + i % 200)}) + "\n")
    with (folder / "eval.jsonl").open("w") as file:
        for i in range(50):
            file.write(json.dumps({"question": evaluation(i), "answer": "x"}) + "\n")
    return folder


def evaluation(i: int) -> str:
    return f"Who painted the large picture number {i} that hangs in the hall of the old town?"


def expected() -> dict[str, int]:
    counts = {"no_question": 0, "contaminated": 0, "duplicate": 0, "kept": 0}
    seen = set()
    for i in range(ROWS):
        if i % BROKEN == 1:
            counts["no_question"] += 1
        elif i % CONTAMINATED == 2:
            counts["duplicate" if i % 50 in seen else "contaminated"] += 1
            seen.add(i % 50)
        elif i % DUPLICATE == 3 and i > DUPLICATE:
            counts["duplicate"] += 1
        else:
            counts["kept"] += 1
    return counts


def command(planted: Path, out: Path) -> list[str]:
    return ["--source", str(planted / "big.jsonl"), "--against", str(planted / "eval.jsonl"), "--out", str(out)]


def rows_of(out: Path) -> list[dict]:
    return [row for split in SPLITS for row in parquet.read_table(out / f"{split}.parquet").to_pylist()]


@pytest.fixture(scope="session")
def whole(planted, tmp_path_factory) -> tuple[Path, int]:
    """What an uninterrupted run leaves, and its peak memory [KiB]."""
    out = tmp_path_factory.mktemp("whole") / "out"
    child = subprocess.Popen([sys.executable, "-m", "l0fast.data", *command(planted, out)])
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    return out, usage.ru_maxrss


@pytest.mark.slow
def test_exactly_the_planted_rows_go_and_the_others_stay(whole):
    out, _ = whole
    card = json.loads((out / "card.json").read_text())
    wanted = expected()
    assert {name: card["total"][name] for name in wanted} == wanted
    assert card["total"]["rows"] == ROWS
    rows = rows_of(out)
    assert len(rows) == wanted["kept"] == sum(card["splits"].values())
    assert {row["question"] for row in rows} == {
        question(i)
        for i in range(ROWS)
        if not (i % BROKEN == 1 or i % CONTAMINATED == 2 or (i % DUPLICATE == 3 and i > DUPLICATE))
    }
    left_out = [json.loads(line) for line in (out / "left_out.jsonl").read_text().splitlines()]
    assert [row["line"] for row in left_out] == [i + 1 for i in range(ROWS) if i % BROKEN == 1]
    assert 0.005 < card["splits"]["validation"] / wanted["kept"] < 0.015
    assert f"| big | {ROWS:,} |" in (out / "card.md").read_text()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(whole, planted, tmp_path):
    _, peak = whole
    with (planted / "big.jsonl").open() as file:
        (tmp_path / "small.jsonl").write_text("".join(line for _, line in zip(range(2000), file, strict=False)))
    child = subprocess.Popen(
        [sys.executable, "-m", "l0fast.data", "--source", str(tmp_path / "small.jsonl"), "--out", str(tmp_path / "out")]
    )
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    # fifty times the rows, of some 15 MB
    assert peak - usage.ru_maxrss < 30_000, (peak, usage.ru_maxrss)


@pytest.mark.slow
def test_a_run_killed_in_the_middle_goes_on_to_the_same_files(planted, tmp_path):
    def part(out: Path) -> list[str]:
        return [f"{word}?limit=20000" if word.endswith("big.jsonl") else word for word in command(planted, out)]

    whole, out = tmp_path / "whole", tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-m", "l0fast.data", *part(out)], start_new_session=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and rows_read(out) < 5_000:
        with suppress(subprocess.TimeoutExpired):
            child.wait(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert 5_000 <= rows_read(out) < 20_000
    assert main(part(out)) == main(part(whole)) == 0
    for name in (*(f"{split}.parquet" for split in SPLITS), "card.json", "left_out.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert not (out / "writing").exists()


def rows_read(out: Path) -> int:
    try:
        with closing(sqlite3.connect(f"file:{out / 'work.sqlite'}?mode=ro", uri=True)) as db:
            return db.execute("SELECT sum(rows) FROM sources").fetchone()[0] or 0
    except sqlite3.OperationalError:
        return 0


# --- judging, over real HTTP ---------------------------------------------------------------------------------------------


def judged_by(say, rows, out: Path, *flags: str) -> tuple[dict, list[str]]:
    """The card, and the prompts that it took."""
    source = out.parent / "judged.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts: list[str] = []

    async def complete(request):
        prompt = (await request.json())["messages"][0]["content"]
        prompts.append(prompt)
        said = say(prompt)
        if isinstance(said, BaseException):
            raise said
        return web.json_response({"choices": [{"message": {"content": said}, "finish_reason": "stop"}]})

    async def run():
        app = web.Application()
        app.router.add_post("/v1/chat/completions", complete)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        options = ["--source", str(source), "--out", str(out), "--judge-endpoint", url, "--judge-model", "m", *flags]
        try:
            return await build(parser().parse_args(options), say=lambda text: None)
        finally:
            await runner.cleanup()

    out.mkdir(exist_ok=True)
    return asyncio.run(run()), prompts


ASKED = [{"question": f"Question {i}?", "answer": str(i)} for i in range(20)]


def grade(prompt: str) -> str:
    i = int(prompt.partition("Question: Question ")[2].partition("?")[0])
    return f"OBJECTIVITY: {5 if i % 2 else 2}\nSTABILITY: {5 if i % 3 else 1}"


def test_questions_that_are_judged_unfit_go(tmp_path):
    card, prompts = judged_by(grade, ASKED, tmp_path / "out")
    fit = [i for i in range(20) if i % 2 and i % 3]
    assert sorted(int(row["id"].partition("/")[2]) - 1 for row in rows_of(tmp_path / "out")) == fit
    assert (card["total"]["unfit"], card["total"]["kept"], len(prompts)) == (20 - len(fit), len(fit), 20)
    # other limits need no new judgement
    card, prompts = judged_by(grade, ASKED, tmp_path / "out", "--min-stability", "1")
    assert (card["total"]["kept"], prompts) == (10, [])


def test_what_could_not_be_judged_is_left_out_told_of_and_asked_again(tmp_path):
    def flaky(prompt):
        return (
            web.HTTPBadRequest()
            if "Question 7?" in prompt
            else "no grades"
            if "Question 8?" in prompt
            else grade(prompt)
        )

    card, _ = judged_by(flaky, ASKED, tmp_path / "out", "--min-objectivity", "1", "--min-stability", "1")
    assert (card["total"]["unjudged"], card["total"]["kept"]) == (2, 18)
    card, prompts = judged_by(grade, ASKED, tmp_path / "out", "--min-objectivity", "1", "--min-stability", "1")
    assert (card["total"]["unjudged"], card["total"]["kept"], len(prompts)) == (0, 20, 2)


def test_a_judge_that_lets_nobody_in_is_what_the_person_is_told(tmp_path):
    with pytest.raises(UsageError, match="lets nobody in without a key it knows"):
        judged_by(lambda prompt: web.HTTPUnauthorized(), ASKED, tmp_path / "out")


def test_grades_are_read_from_the_end_of_a_judgement():
    assert read_quality("<think>OBJECTIVITY: 1</think>Objectivity: 4\nSTABILITY: **5**") == read_quality(
        "OBJECTIVITY: 4\nSTABILITY: 5"
    )
    for text in ("OBJECTIVITY: 4", "OBJECTIVITY: 9\nSTABILITY: 5", ""):
        with pytest.raises(EngineError):
            read_quality(text)


# --- duplicates and contamination ---------------------------------------------------------------------------------------


def test_the_work_of_another_command_is_not_continued(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "q", "answer": "a"}) + "\n")
    out = tmp_path / "out"
    assert main(["--source", str(tmp_path / "a.jsonl"), "--out", str(out)]) == 0
    assert main(["--source", str(tmp_path / "a.jsonl"), "--against", "x.jsonl", "--out", str(out)]) == 2
    assert "holds the work of another command" in capsys.readouterr().err
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "work.sqlite").write_text("no database at all, but long enough to look like one" * 10)
    assert main(["--source", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "bad")]) == 2
    assert main(["--source", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "new")]) == 2
    assert "there is no file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--source", "none.jsonl"], "there is no file none.jsonl"),
        (["--source", "a.jsonl", "--source", "none.jsonl"], "there is no file none.jsonl"),
        (["--source", "a.jsonl", "--against", "none.jsonl"], "there is no file none.jsonl"),
        (["--source", "a.jsonl", "--validation-share", "1"], "nothing to train on"),
        (["--source", "a.jsonl", "--judge-model", "m"], "belong together"),
        (["--source", "a.jsonl", "--judge-model", "m", "--judge-endpoint", "nowhere"], "is no address"),
        (
            ["--source", "a.jsonl", "--judge-model", "m", "--judge-endpoint", "http://h", "--judge-concurrency", "0"],
            "--judge-concurrency 0: give at least 1",
        ),
        (["--source", "a.jsonl", "--out", "a.jsonl"], "a.jsonl can't be a folder (File exists)"),
    ],
)
def test_a_wrong_word_is_one_sentence_and_leaves_nothing(words, complaint, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "a.jsonl", [{"question": "q?", "answer": "x"}])
    assert main(["--out", "out", *words]) == 2
    assert complaint in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def written(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_row_keeps_how_it_is_judged_and_its_files(tmp_path):
    (tmp_path / "table.csv").write_text("1")
    plain = written(tmp_path / "plain.jsonl", [{"question": "one?", "answer": "x"}])
    proof = written(tmp_path / "proof.jsonl", [{"question": "two?", "answer": "3/4", "has": {"t.csv": "table.csv"}}])
    tested = written(tmp_path / "tested.jsonl", [{"question": "three?", "tests": ["assert f()"]}])
    out = tmp_path / "out"
    sources = [plain, f"{proof}?check=math&files=has", f"{tested}?check=unit_tests"]
    options = [word for source in sources for word in ("--source", source)]
    assert main([*options, "--validation-share", "0", "--test-share", "0", "--out", str(out)]) == 0
    tasks = load_source(parse_source(f"{out / 'train.parquet'}?files=files"), "train").tasks
    assert [(task.check, dict(task.files)) for task in tasks] == [
        ("exact_match", {}),
        ("math", {"t.csv": str(tmp_path / "table.csv")}),
        ("unit_tests", {}),
    ]


def test_what_is_held_out_of_a_source_is_not_in_it(tmp_path):
    data = written(tmp_path / "mine.jsonl", [{"question": f"question {i}?", "answer": "x"} for i in range(300)])
    dealt, out = f"{data}?heldout_share=0.2", tmp_path / "out"
    assert main(["--source", dealt, "--against", dealt, "--out", str(out)]) == 0
    card = json.loads((out / "card.json").read_text())
    assert (card["total"]["contaminated"], card["total"]["duplicate"]) == (0, 0)
    heldout = {task.question for task in load_source(parse_source(dealt), "eval").tasks}
    assert len(heldout) > 30
    assert {row["question"] for row in rows_of(out)} == {f"question {i}?" for i in range(300)} - heldout


def test_two_sources_of_one_name_are_refused_and_told_apart_by_another(tmp_path, capsys):
    a = written(tmp_path / "a" / "train.jsonl", [{"question": "a?", "answer": "x"}])
    b = written(tmp_path / "b" / "train.jsonl", [{"question": "b?", "answer": "x"}])
    assert main(["--source", a, "--source", b, "--out", str(tmp_path / "out")]) == 2
    assert "two sources are called train" in capsys.readouterr().err
    assert main(["--source", a, "--source", f"{b}?name=other", "--out", str(tmp_path / "out")]) == 0
    assert {row["question"] for row in rows_of(tmp_path / "out")} == {"a?", "b?"}


def test_a_limit_counts_questions_whatever_stands_between_them(tmp_path):
    rows = [{"question": f"{i}?", "answer": "x"} if i % 2 else {"answer": "x"} for i in range(100)]
    data, out = written(tmp_path / "a.jsonl", rows), tmp_path / "out"
    assert main(["--source", f"{data}?limit=20", "--out", str(out)]) == 0
    assert {row["question"] for row in rows_of(out)} == {f"{i}?" for i in range(1, 40, 2)}


LONG = "who was the first person to walk on the far side of the moon"


@pytest.mark.parametrize(
    ("asked", "contaminated"),
    [
        (LONG.upper() + "?!", True),
        (f"Quickly: {LONG}, please", True),
        # articles are no words
        (" ".join(LONG.split()[:10]), True),
        (" ".join(LONG.split()[:9]), False),
        ("who was the first person", False),
        ("Who is she?", True),
        ("Now tell me who is she really", False),
        ("something else", False),
    ],
)
def test_equal_questions_and_long_common_stretches_are_contamination(asked, contaminated):
    assert (asked in Contamination([LONG, "Who is she"])) == contaminated
    assert asked not in Contamination([])


@given(st.lists(st.sampled_from("one two three four five".split()), min_size=NGRAM, max_size=20), st.data())
def test_a_question_is_found_in_whatever_stands_around_it(words, data):
    start = data.draw(st.integers(0, len(words) - NGRAM))
    part = words[start : start + NGRAM]
    assert " ".join(["zero", *part, "nine"]) in Contamination([" ".join(words)])


@given(st.text(), st.text())
def test_keys_are_equal_only_for_the_same_words(a, b):
    from l0fast.tasks.rewards import normalize_answer

    assert (question_key(a) == question_key(b)) == (normalize_answer(a) == normalize_answer(b))
