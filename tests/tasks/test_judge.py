"""A model as judge, over real HTTP on loopback: what its words mean, what is kept, and what a failing one costs."""

import asyncio
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from l0fast.config import JudgeConfig
from l0fast.errors import ToolError, UsageError, WorldError
from l0fast.tasks.judge import open_judge, read_grade
from l0fast.types import Task
from tests.web_server import serving

TASK = Task(id="t", question="Where is Oslo?", answers=("Norway", "the Kingdom of Norway"))


@asynccontextmanager
async def endpoint(say):
    """An OpenAI-compatible server; `say(prompt, n)` is what it answers to its n-th request, an int a status."""
    prompts = []

    async def complete(request):
        prompt = (await request.json())["messages"][0]["content"]
        prompts.append(prompt)
        said = say(prompt, len(prompts) - 1)
        if isinstance(said, int):
            return web.json_response({"error": {"message": "no"}}, status=said)
        return web.json_response({"choices": [{"message": {"content": said}, "finish_reason": "stop"}]})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1", prompts
    finally:
        await runner.cleanup()


def judged(say, answers, **settings):
    """Grades, and the prompts it took."""

    async def main():
        async with endpoint(say) as (url, prompts):
            async with open_judge(JudgeConfig(endpoint=url, model="j", **settings)) as judge:
                assert judge is not None
                grades = [await judge.grade(TASK.question, TASK.answers, answer) for answer in answers]
                return grades, prompts

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("GRADE: CORRECT", "correct"),
        ("It is not correct.\nGRADE: INCORRECT", "incorrect"),
        ("<think>INCORRECT? no</think>grade: correct", "correct"),
        ("GRADE: NOT ATTEMPTED", "not_attempted"),
        ("**GRADE: NOT_ATTEMPTED**", "not_attempted"),
        ("**Grade:** CORRECT", "correct"),
        ("The answer says Lyon.\nGRADE: INCORRECT\n\n(The correct answer is Paris.)", "incorrect"),
        ("GRADE: INCORRECT (correct answer: Paris)", "incorrect"),
        ("GRADE: CORRECT? No, wait.\nGRADE: INCORRECT", "incorrect"),
    ],
)
def test_the_last_grade_named_counts(text, grade):
    assert read_grade(text) == grade


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GRADE: CORRECTLY done",
        "<think>GRADE: CORRECT</think>",
        "That is not correct.",
        "<think>GRADE: CORRECT would be too kind, and",
    ],
)
def test_words_without_a_grade_are_none(text):
    with pytest.raises(ToolError, match="without a grade"):
        read_grade(text)


def test_the_judge_sees_question_answers_and_answer_and_equal_ones_are_asked_once():
    grades, prompts = judged(lambda prompt, n: "GRADE: CORRECT", ["in Norway", "in Norway", " "])
    assert grades == ["correct", "correct", "not_attempted"]
    [prompt] = prompts
    for part in (TASK.question, *TASK.answers, "in Norway"):
        assert part in prompt


def test_the_commonest_of_several_votes_counts_and_of_equals_the_worse():
    votes = ["GRADE: CORRECT", "GRADE: INCORRECT", "GRADE: CORRECT"]
    assert judged(lambda prompt, n: votes[n], ["x"], votes=3)[0] == ["correct"]
    assert judged(lambda prompt, n: votes[n], ["x"], votes=2)[0] == ["incorrect"]


def test_a_vote_that_fails_is_missing_and_the_others_decide():
    votes = [400, "no grade here", "GRADE: CORRECT"]
    grades, prompts = judged(lambda prompt, n: votes[n], ["x"], votes=3)
    assert grades == ["correct"]
    assert len(prompts) == 3


def test_without_any_vote_there_is_no_grade():
    with pytest.raises(WorldError, match="gave no grade"):
        judged(lambda prompt, n: 400, ["x"])


def test_a_judgement_that_is_cut_off_says_how_to_let_it_end():
    limits = []

    async def complete(request):
        limits.append((await request.json())["max_tokens"])
        message = {"content": "", "reasoning_content": "On the one hand"}
        return web.json_response({"choices": [{"message": message, "finish_reason": "length"}]})

    async def main():
        async with (
            serving(complete) as url,
            open_judge(JudgeConfig(endpoint=url, model="m", max_tokens=9000)) as judge,
        ):
            assert judge is not None
            await judge.grade(TASK.question, TASK.answers, "in Norway")

    with pytest.raises(WorldError, match="cut off at 9,000 tokens: raise --judge.max-tokens"):
        asyncio.run(main())
    assert limits == [9000]


def test_judgements_are_kept_in_a_file(tmp_path):
    file = str(tmp_path / "judge.sqlite")
    grades, prompts = judged(lambda prompt, n: "GRADE: CORRECT", ["x"], cache_file=file)
    assert (grades, len(prompts)) == (["correct"], 1)
    grades, prompts = judged(lambda prompt, n: 400, ["x"], cache_file=file)
    assert (grades, prompts) == (["correct"], [])


def test_no_endpoint_is_no_judge_and_one_without_a_model_is_refused():
    async def main(config):
        async with open_judge(config) as judge:
            return judge

    assert asyncio.run(main(JudgeConfig())) is None
    with pytest.raises(UsageError, match="--judge.model"):
        asyncio.run(main(JudgeConfig(endpoint="http://127.0.0.1:1/v1")))
