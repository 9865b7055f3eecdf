"""python -m l0fast.evaluate: what is asked, kept, gone on with, told and compared. A simulated engine, real sandboxes."""

import asyncio
import csv
import errno
import fcntl
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from aiohttp import web

from l0fast.agent.chat import Chat
from l0fast.errors import UsageError
from l0fast.evaluate import evaluate, main, plan_of
from l0fast.evaluation.direct import final_answer
from l0fast.evaluation.episodes import Episodes, fingerprint, read_outcomes
from l0fast.evaluation.report import figures, summary, table
from l0fast.policies import MODELS
from tests.web_server import serving

QUESTIONS = 6
COMMAND = ["geography", "--on", "geography", "--questions", str(QUESTIONS), "--samples", "2"] + (
    "--engine.kind simulated --sandbox.kind process".split()
)


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("evaluation") / "out"
    assert main([*COMMAND, "--out", str(out)]) == 0
    return out


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "episodes.jsonl").read_text().splitlines()]


def test_every_question_is_asked_as_often_as_wanted_and_the_report_counts_them(done):
    rows = lines(done)
    assert len({(row["task"]["id"], row["sample"]) for row in rows}) == len(rows) == 2 * QUESTIONS
    of = json.loads((done / "report.json").read_text())["benchmarks"]["geography"]
    assert (of["questions"], of["samples"], of["failed"]) == (QUESTIONS, 2 * QUESTIONS, 0)
    assert of["accuracy"] == pytest.approx(sum(row["correct"] for row in rows) / len(rows))
    assert of["accuracy"] == of["exact_match"]
    assert of["pass_at_k"]["2"] >= of["pass_at_k"]["1"] == pytest.approx(of["accuracy"])
    [head, row] = csv.reader((done / "report.csv").read_text().splitlines())
    assert dict(zip(head, row, strict=True))["benchmark"] == "geography"
    assert (done / "report.md").read_text().startswith("| benchmark | questions | samples | accuracy | ± |")


def test_the_summary_says_how_late_the_loop_was(done):
    report = json.loads((done / "report.json").read_text())
    p50, p99, most = (report[f"loop/lag_{name}_ms"] for name in ("p50", "p99", "max"))
    assert 0 <= p50 <= p99 <= most
    assert most > 0
    told = f"{2 * QUESTIONS} episodes in {report['wall_s']:.1f} s; the event loop was late by {p50:.1f} ms (p50), "
    assert f"\n\n{told}{p99:.1f} ms (p99), {most:.1f} ms at most" in (done / "report.md").read_text()
    held = summary(report | {"loop/blocked_by": "l0fast/x.py:1 f", "loop/lag_max_ms": 70.0})
    assert held.endswith("70.0 ms at most, held by l0fast/x.py:1 f")
    assert summary(report | {"played": 0}) == table(report)


def test_a_benchmark_that_has_a_search_of_its_own_is_asked_with_that_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("Nothing of use.")
    words = [*COMMAND, "--questions", "1", "--samples", "1", "--tools", f"search={tmp_path / 'notes.txt'}"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    [row] = lines(tmp_path / "out")
    assert Chat(MODELS / "geography").decode(row["turns"][0]["prompt_ids"]).count("search(query") == 1


def test_the_same_command_goes_on_after_a_kill_that_cut_a_line_off(done, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    whole = (done / "episodes.jsonl").read_bytes().splitlines(keepends=True)
    (out / "evaluation.json").write_bytes((done / "evaluation.json").read_bytes())
    lost = json.loads(whole[3]) | {"status": "failed_engine", "cause": "it died"}
    (out / "episodes.jsonl").write_bytes(b"".join(whole[:3]) + json.dumps(lost).encode() + b"\n" + whole[4][:50])
    assert main([*COMMAND, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert f"3 of {2 * QUESTIONS} episodes are there already" in said.err
    rows = lines(out)
    assert len(rows) == 2 * QUESTIONS + 1
    assert {(r["task"]["id"], r["sample"]) for r in rows} == {(r["task"]["id"], r["sample"]) for r in lines(done)}
    # the same seeds, the same engine: the same answers
    assert {(r["task"]["id"], r["sample"]): r["answer"] for r in rows if r["status"] != "failed_engine"} == {
        (r["task"]["id"], r["sample"]): r["answer"] for r in lines(done)
    }


def test_a_disk_that_is_full_ends_an_evaluation_with_a_sentence(tmp_path, capsys, monkeypatch):
    read = Episodes._read

    def then_full(self: Episodes) -> None:
        read(self)
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, self._file.fileno())
        os.close(full)

    monkeypatch.setattr(Episodes, "_read", then_full)
    assert main([*COMMAND, "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert f"l0fast: could not write {tmp_path}/out/episodes.jsonl: OSError: [Errno 28] No space left on device" in said
    assert "Traceback" not in said


def test_another_evaluation_does_not_go_into_the_same_folder(done, capsys):
    assert main([*COMMAND, "--out", str(done), "--seed", "1"]) == 2
    assert "holds another evaluation, with seed = 0 and not 1" in capsys.readouterr().err.replace("\n", " ")
    assert main([*COMMAND, "--out", str(done.parent)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_the_answers_of_other_weights_are_not_taken_for_those_of_a_model_that_was_trained_on(tmp_path, capsys):
    model = shutil.copytree(MODELS / "geography", tmp_path / "model")
    command = [str(model), *COMMAND[1:], "--questions", "1", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    assert main(command) == 0
    assert "2 of 2 episodes are there already" in capsys.readouterr().err
    os.utime(model / "model.safetensors", (0, 0))
    assert main(command) == 2
    assert f"holds another evaluation, with model = '{model} (" in " ".join(capsys.readouterr().err.split())


def with_task(done: Path, out: Path, **changes) -> Path:
    """The same evaluation with its first task changed, as another file of questions has another under the same id."""
    out.mkdir()
    (out / "evaluation.json").write_bytes((done / "evaluation.json").read_bytes())
    rows = lines(done)
    first = rows[0]["task"] | changes
    changed = [row | {"task": first} if row["task"]["id"] == first["id"] else row for row in rows]
    (out / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in changed))
    return out


@pytest.mark.parametrize(
    "changes", [{"question": "Where?"}, {"answers": ["Atlantis"]}, {"check": "judge"}, {"tests": ["assert True"]}]
)
def test_answers_to_other_questions_are_not_taken_for_those_to_what_is_asked_now(done, tmp_path, capsys, changes):
    out = with_task(done, tmp_path / "out", **changes)
    before = (out / "episodes.jsonl").read_bytes()
    assert main([*COMMAND, "--out", str(out)]) == 2
    task, said = lines(done)[0]["task"], " ".join(capsys.readouterr().err.split())
    assert f"holds another evaluation, in which {task['id']} of geography was not {task['question']!r}, or had" in said
    assert (out / "episodes.jsonl").read_bytes() == before


def test_the_same_questions_are_known_again_however_their_answers_are_sorted(done, tmp_path, capsys):
    answers = [lines(done)[0]["task"]["answers"], ["a", "b"], ["b", "a"]]
    same = [fingerprint(lines(done)[0]["task"] | {"answers": a}) for a in answers]
    assert same[0] != same[1] == same[2]
    assert main([*COMMAND, "--out", str(with_task(done, tmp_path / "out", kind="another"))]) == 0
    assert f"{2 * QUESTIONS} of {2 * QUESTIONS} episodes are there already" in capsys.readouterr().err


def test_different_questions_of_one_id_are_not_compared(done, tmp_path, capsys):
    other = with_task(done, tmp_path / "out", question="Where?")
    assert main(["--compare", str(done), str(other)]) == 0
    assert f"| geography | {QUESTIONS - 1} |" in capsys.readouterr().out


def test_two_evaluations_are_compared_question_by_question(done, capsys):
    assert main(["--compare", str(done), str(done)]) == 0
    said = capsys.readouterr().out
    assert f"| geography | {QUESTIONS} |" in said
    assert said.rstrip().endswith("| no |")
    assert main(["--compare", str(done), str(done / "nowhere")]) == 2


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "there is no model"),
        (["geography"], "nothing to ask"),
        (["geography", "--on", "geography", "--samples", "0"], "--samples 0"),
        (["geography", "--on", "nowhere.jsonl"], "there is no file"),
        (["geography", "--on", "geography", "--on", "geography"], "two benchmarks are called geography"),
        (["nonesuch", "--on", "geography"], "'nonesuch' is no policy"),
        (["geography", "--on", "geography", "--agent.max-turns", "3"], "is not a flag"),
        (["m", "--endpoint", "nowhere", "--on", "geography"], "is no address"),
    ],
)
def test_what_can_not_be_evaluated_is_one_sentence(words, complaint, capsys, tmp_path):
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert complaint in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("check", "words", "absent", "complaint"),
    [
        ("judge", [], "", "some of q is judged by a model, but judge.endpoint is empty"),
        ("exact_match", ["--tools", "web_search"], "", "the environment has no SERPER_API_KEY"),
        ("exact_match", ["--tools", "visual_qa"], "", "name one with --web.vision-endpoint"),
        ("exact_match", ["--tools", "get_webpage_in_markdown"], "trafilatura", "read with trafilatura, which is not inst"),
        ("math", [], "math_verify", "compared by math-verify, which is not installed"),
        ("judge", ["--judge.endpoint", "http://127.0.0.1:9", "--judge.model", "m", "--judge.api-key-env", "NONE"], "", "no NONE"),
    ],
)  # fmt: skip
def test_what_the_first_answer_would_find_missing_is_told_before_anything_is_asked_or_claimed(
    check, words, absent, complaint, tmp_path, capsys, monkeypatch
):
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    monkeypatch.setattr("l0fast.rooms.find_spec", lambda name: None if name == absent else name)
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "2", "check": check}) + "\n")
    command = ["m", "--endpoint", "http://127.0.0.1:9", "--on", str(tmp_path / "q.jsonl")]
    assert main([*command, *words, "--out", str(tmp_path / "out")]) == 2
    assert complaint in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def trial(tmp_path, answer, flags):
    """How an evaluation ended, and which paths its one server was asked for."""
    (tmp_path / "q.jsonl").write_text('{"question": "1 + 1?", "answer": "2", "check": "judge"}\n')
    asked = []

    async def take(request):
        asked.append(request.path)
        return await answer(request)

    async def evaluated():
        async with serving(take) as url:
            words = ["m", "--endpoint", url, "--on", str(tmp_path / "q.jsonl"), "--sandbox.kind", "process"]
            words += ["--judge.endpoint", f"{url}/judge", "--judge.model", "j", "--web.search-url", f"{url}/search"]
            plan, _ = plan_of([*words, "--out", str(tmp_path / "out"), *flags])
            assert plan is not None
            return await evaluate(plan, lambda line: None)

    try:
        return asyncio.run(evaluated()), asked
    except UsageError as e:
        return str(e), asked


def test_a_search_or_a_judge_that_does_not_answer_is_found_before_the_model_is_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "wrong")

    async def refuse(request):
        return web.json_response({"message": "Unauthorized.", "statusCode": 403}, status=403)

    said, asked = trial(tmp_path, refuse, ["--tools", "web_search"])
    assert said.startswith(
        "a first search of the web failed (web search answered 403 Forbidden (Unauthorized.)): see to"
    )
    assert asked == ["/search"]

    async def ramble(request):
        choice = {"message": {"content": "I would say that it is right."}, "finish_reason": "stop"}
        return web.json_response({"choices": [choice]})

    # the folder is not that of a command that came to no answer: its key, say, is another one now
    said, asked = trial(tmp_path, ramble, ["--direct", "--tools", "web_search"])
    assert said.startswith("a first judgement failed (a judgement without a grade")
    # no tool is asked where none can be called
    assert asked == ["/judge/chat/completions"]


def test_what_was_answered_needs_no_search_or_judge_any_more(tmp_path, monkeypatch):
    async def answer(request):
        said = "GRADE: CORRECT" if request.path.startswith("/judge") else "ANSWER: 2"
        return web.json_response({"choices": [{"message": {"content": said}, "finish_reason": "stop"}]})

    # the port is another one: so are the flags
    monkeypatch.setattr("l0fast.evaluate._about", lambda plan, policy: {})
    report, asked = trial(tmp_path, answer, ["--direct"])
    assert report["benchmarks"]["q"]["accuracy"] == 1.0
    assert sorted(asked) == ["/judge/chat/completions", "/judge/chat/completions", "/v1/chat/completions"]
    monkeypatch.setenv("SERPER_API_KEY", "wrong")
    for flags in (["--direct"], ["--direct", "--reward.judge", "0.5"], ["--tools", "web_search"]):
        report, asked = trial(tmp_path, answer, flags)
        assert (report["benchmarks"]["q"]["accuracy"], asked) == (1.0, [])


def test_an_evaluation_that_still_goes_on_is_left_alone(done, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    before = (out / "episodes.jsonl").read_bytes()

    async def beside():
        async with Episodes(out / "episodes.jsonl"):
            return await asyncio.to_thread(main, [*COMMAND, "--out", str(out)])

    assert asyncio.run(beside()) == 2
    assert "by an evaluation that still goes on" in " ".join(capsys.readouterr().err.split())
    assert (out / "episodes.jsonl").read_bytes() == before


@pytest.mark.parametrize("left", ["", '{"model": "geog'])
def test_half_an_evaluation_json_is_one_sentence(tmp_path, left, capsys):
    (tmp_path / "evaluation.json").write_text(left)
    assert main([*COMMAND, "--out", str(tmp_path)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{tmp_path}/evaluation.json is not what an evaluation writes" in said


def test_an_evaluation_that_was_killed_as_it_began_begins_again(tmp_path, monkeypatch):
    replace, out = os.replace, tmp_path / "out"

    def killed(*paths: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    assert main([*COMMAND, "--out", str(out)]) == 130
    assert not (out / "evaluation.json").exists()
    monkeypatch.setattr("os.replace", replace)
    assert main([*COMMAND, "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {
        "evaluation.json", "episodes.jsonl", "report.json", "report.csv", "report.md"
    }  # fmt: skip


def test_a_file_is_no_folder_for_an_evaluation(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main([*COMMAND, "--out", str(out)]) == 2
        assert f"{out} can't hold an evaluation (" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "file").read_text() == "mine"


def test_settings_follow_as_for_a_run():
    plan, _ = plan_of([*COMMAND, "--agent.trim", "hard"])
    assert plan is not None
    assert plan.flags == ("--engine.kind", "simulated", "--sandbox.kind", "process", "--agent.trim", "hard")
    assert str(plan.out) == "evaluations/geography"
    # and stand wherever they like
    settings, rest = ["--agent.trim", "hard", "--no-trace", "--trace.torch-step=5"], COMMAND[1:]
    for words in ([*settings, COMMAND[0], *rest], [*settings[:2], *rest, *settings[2:], COMMAND[0]]):
        elsewhere, _ = plan_of(words)
        assert elsewhere is not None
        assert elsewhere.model == plan.model
        assert set(elsewhere.flags) == {*plan.flags, *settings[2:]}


def test_a_cached_search_answers_with_as_many_sentences_as_are_wanted_now(tmp_path):
    for sentences in (3, 1):
        flags = f"--tools.cache-file {tmp_path}/cache --task.search-results {sentences} --out {tmp_path}/{sentences}"
        assert main([*COMMAND, *flags.split()]) == 0
    # an answer of a search is printed as a list
    found = [turn["output"] for row in lines(tmp_path / "1") for turn in row["turns"] if "search(" in turn["text"]]
    assert found
    assert all(len(output.splitlines()) == 1 for output in found)


def test_a_turn_that_takes_too_long_fails_its_episode(tmp_path):
    flags = ["--rollout.turn-timeout-s", "1e-6", "--out", str(tmp_path / "out")]
    main([*COMMAND, *flags])
    assert {row["status"] for row in lines(tmp_path / "out")} == {"failed_deadline"}


def test_more_questions_than_a_world_has_are_refused_in_a_sentence(tmp_path, capsys):
    assert main([*COMMAND, "--questions", "100000", "--out", str(tmp_path / "out")]) == 2
    assert "--questions 100000: geography has no 100000 held-out questions" in capsys.readouterr().err


def test_who_answers_in_place_of_sglang_is_said(tmp_path, capsys):
    # before anything starts; more questions than there are keep it from that
    words = f"geography --on geography --questions 100000 --engine.kind sglang --out {tmp_path}/out"
    assert main(words.split()) == 2
    assert "'sglang' is for training: transformers answers here" in capsys.readouterr().err


def test_an_evaluation_goes_on_where_there_are_no_locks_and_says_so(tmp_path, capsys, monkeypatch):
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert main([*COMMAND, "--questions", "1", "--out", str(tmp_path / "out")]) == 0
    assert f"the file system of {tmp_path / 'out'} has no locks" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("flag", ["--smoke", "--dry-run", "--resume"])
def test_a_flag_that_only_a_run_has_is_refused_in_a_sentence(flag, tmp_path, capsys):
    assert main([*COMMAND, "--out", str(tmp_path / "out"), flag]) == 2
    assert f"{flag} is not a flag" in capsys.readouterr().err


def test_failed_episodes_have_no_vote(tmp_path, done):
    rows = lines(done)
    broken = [row | {"status": "failed_engine"} if i % 2 else row for i, row in enumerate(rows)]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in broken))
    outcomes = read_outcomes(tmp_path / "e.jsonl")["geography"]
    assert figures(outcomes)["samples"] == QUESTIONS


@pytest.mark.parametrize(("usage", "tokens"), [({"prompt_tokens": 9, "completion_tokens": 40}, 40), (None, None)])
def test_tokens_are_those_that_an_endpoint_counts_and_of_one_that_does_not_unknown(tmp_path, usage, tokens):
    (tmp_path / "q.jsonl").write_text('{"question": "Capital of Norway?", "answer": "Oslo"}\n')

    async def answer(request):
        choice = {"message": {"content": "Oslo"}, "finish_reason": "stop"}
        return web.json_response({"choices": [choice], "usage": usage})

    async def evaluated(url):
        words = ["m", "--endpoint", url, "--on", str(tmp_path / "q.jsonl"), "--direct", "--sandbox.kind", "process"]
        plan, _ = plan_of([*words, "--out", str(tmp_path / "out")])
        assert plan is not None
        return (await evaluate(plan, lambda line: None))["benchmarks"]["q"]

    async def main():
        async with serving(answer) as url:
            # the second one reads what the first has written
            return [await evaluated(url), await evaluated(url)]

    assert [(of["accuracy"], of["tokens"]) for of in asyncio.run(main())] == [(1.0, tokens)] * 2


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>ANSWER: no</think>\nSo it is.\n**ANSWER: Oslo**", "Oslo"),
        ("answer: Oslo\nANSWER: Rome ", "Rome"),
        ("So:\r\n- `ANSWER`:\r\n  **Rome**\r\nIt is.", "Rome"),
        ("Oslo", "Oslo"),
        ("I think\nit is Oslo", None),
        ("", None),
    ],
)
def test_a_direct_answer_is_the_last_one_given(text, answer):
    assert final_answer(text) == answer


def test_no_response_keeps_the_loop_while_its_answer_is_looked_for():
    """A small model may say nothing but line breaks, which had taken some ten seconds."""

    def took(text: str) -> float:
        began = time.process_time()
        assert final_answer(text) is None
        return time.process_time() - began

    for line in ("\n", "|---|---|\n"):
        assert took(f"x{line * 20_000}x") < 0.5
