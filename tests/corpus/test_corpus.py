"""The index against BM25 as it is written down, and what is read, built, asked and refused."""

import asyncio
import json
import math
import os
import re
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from l0fast.config import ToolsConfig, WebConfig
from l0fast.corpus.__main__ import main
from l0fast.corpus.index import Corpus, Passage, build
from l0fast.corpus.read import Reader
from l0fast.errors import ToolError, UsageError
from l0fast.tools.broker import open_broker
from l0fast.tools.toolbox import open_toolbox

WORDS = "river bridge castle market harbour museum forest island tower valley station garden".split()


@pytest.fixture(scope="session")
def texts() -> list[str]:
    import random

    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, weights=range(1, 13), k=rng.randint(3, 35))) for _ in range(300)]


@pytest.fixture(scope="session")
def corpus(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "index"
    build((Passage(id=str(n), title="", text=text) for n, text in enumerate(texts, 1)), folder)
    opened = Corpus(folder)
    yield opened
    opened.close()


def bm25(texts: list[str], query: list[str], k1=1.2, b=0.75) -> list[float]:
    """Robertson and Zaragoza 2009, equation 3.15, with the idf that is never negative."""
    documents = [Counter(text.split()) for text in texts]
    mean = sum(map(Counter.total, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in query:
            n = sum(word in d for d in documents)
            idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
            tf = document[word]
            score += idf * tf * (k1 + 1) / (tf + k1 * (1 - b + b * document.total() / mean))
        scores.append(score)
    return scores


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(query=st.lists(st.sampled_from(WORDS), min_size=1, max_size=4, unique=True), k=st.integers(1, 10))
def test_results_are_those_of_bm25(corpus, texts, query, k):
    found = corpus.search_now(" ".join(query), k)
    expected = bm25(texts, query)
    best = sorted((i for i in range(len(texts)) if expected[i] > 0), key=lambda i: -expected[i])[:k]
    assert [f.score for f in found] == pytest.approx([expected[i] for i in best], rel=1e-4)
    for f in found:
        assert f.score == pytest.approx(expected[int(f.passage.id) - 1], rel=1e-4)


def test_case_accents_and_stop_words_do_not_count_and_nothing_is_an_operator(tmp_path):
    build(
        [Passage(id="1", title="Málaga", text="A port in the south."), Passage(id="2", title="", text="x y")],
        tmp_path / "i",
    )
    corpus = Corpus(tmp_path / "i")
    for query in ("MALAGA", "the málaga", "port", 'text:"port" AND (', "south~2 *"):
        assert [f.passage.id for f in corpus.search_now(query, 5)] == ["1"], query
    for query in ("", "the in a", "*", "AND"):
        assert corpus.search_now(query, 5) == []
    corpus.close()


def test_searches_run_beside_the_loop_and_refuse_an_odd_k(corpus):
    async def ask():
        found = await asyncio.gather(*(corpus.search(word, 3) for word in WORDS))
        for k in (0, 51, "3"):
            with pytest.raises(ToolError, match="1 to 50"):
                await corpus.search("river", k)
        return found

    assert all(len(found) == 3 for found in asyncio.run(ask()))


def test_folders_rows_and_search_r1s_form_are_read(tmp_path):
    folder = tmp_path / "notes"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.md").write_text("First paragraph.\n\nSecond one.")
    (folder / "sub" / "b.txt").write_text("Third.")
    assert [(p.id, p.text) for p in Reader(folder)] == [
        ("a.md#1", "First paragraph."),
        ("a.md#2", "Second one."),
        ("sub/b.txt#1", "Third."),
    ]
    rows = [
        {"id": "7", "contents": '"Oslo"\nOslo is in Norway.'},
        {"title": "T", "text": "x"},
        {"text": " "},
        {"other": 1},
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "broken\n")
    reader = Reader(tmp_path / "c.jsonl")
    assert list(reader) == [
        Passage(id="7", title="Oslo", text="Oslo is in Norway."),
        Passage(id="2", title="T", text="x"),
    ]
    assert (reader.left_out, reader.first_left_out) == (3, "line 3")
    parquet.write_table(pa.Table.from_pylist([{"_id": 3, "passage": "y"}]), tmp_path / "c.parquet")
    assert list(Reader(tmp_path / "c.parquet")) == [Passage(id="3", title="", text="y")]


def test_the_commands_build_ask_and_refuse(tmp_path, capsys):
    (tmp_path / "c.jsonl").write_text('{"text": "Oslo is in Norway."}\n{"text": "Rome is in Italy."}\n{}\n')
    folder = str(tmp_path / "index")
    assert main(["build", str(tmp_path / "c.jsonl"), folder]) == 0
    assert re.search(
        r"2 passages in .* s; 1 rows without text, first line 3", capsys.readouterr().out.replace("\n", " ")
    )
    assert main(["search", folder, "italy"]) == 0
    assert "Rome is in Italy." in capsys.readouterr().out
    for words, complaint in (
        (["build", str(tmp_path / "c.jsonl"), folder], "is there already"),
        (["build", str(tmp_path / "none.jsonl"), folder + "2"], "neither a file nor a folder"),
        (["search", str(tmp_path), "x"], "is no corpus"),
    ):
        assert main(words) == 2
        assert complaint in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "index2").exists()
    assert not (tmp_path / "index2.new").exists()


def test_a_folder_with_a_broken_link_and_a_name_in_other_bytes_is_indexed(tmp_path, capsys):
    (tmp_path / "notes" / "sub.md").mkdir(parents=True)
    (tmp_path / "notes" / ".#a.md").symlink_to("somebody@host.1234")
    Path(os.fsdecode(bytes(tmp_path) + b"/notes/\xe9t\xe9.md")).write_text("Paris is in France.")
    assert main(["build", str(tmp_path / "notes"), str(tmp_path / "index")]) == 0
    assert main(["search", str(tmp_path / "index"), "paris"]) == 0
    assert "\ufffdt\ufffd.md: Paris is in France." in capsys.readouterr().out


def test_a_source_without_a_passage_leaves_nothing(tmp_path):
    with pytest.raises(UsageError, match="no passage"):
        build([], tmp_path / "i", source="x")
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_breaks_off_leaves_nothing(tmp_path):
    def interrupted():
        yield from (Passage(id=str(n), title="", text=f"text {n}") for n in range(5))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(interrupted(), tmp_path / "i")
    assert list(tmp_path.iterdir()) == []


def asked(names, serving=None, answer=None, query="oslo"):
    async def main():
        async with open_broker() as broker:
            if serving is None:
                async with open_toolbox(names, ToolsConfig(), WebConfig(), broker) as box:
                    return await box.common[0].call(query)
            async with serving(answer) as url:
                words = [name.replace("URL", url) for name in names]
                async with open_toolbox(words, ToolsConfig(attempts=1), WebConfig(), broker) as box:
                    return await box.common[0].call(query)

    return asyncio.run(main())


def test_an_agent_searches_a_corpus_by_its_folder(tmp_path):
    build([Passage(id="1", title="Oslo", text="In Norway.")], tmp_path / "i")
    assert asked([f"corpus={tmp_path / 'i'}"]) == ["Oslo: In Norway."]


def test_retrievers_elsewhere_are_asked_in_their_own_forms(serving):
    bodies = []

    async def answer(request):
        bodies.append((request.path, await request.json()))
        if request.path == "/retrieve":
            hits = [{"document": {"id": "1", "contents": '"Oslo"\nIn Norway.'}, "score": 2.0}]
            return web.json_response({"result": [hits]})
        return web.json_response({"hits": {"hits": [{"_source": {"title": "Oslo", "text": "In Norway."}}]}})

    assert asked(["retrieve=URL/retrieve"], serving, answer) == ['"Oslo"\nIn Norway.']
    assert asked(["elasticsearch=URL/wiki"], serving, answer) == ["Oslo: In Norway."]
    assert bodies[0] == ("/retrieve", {"queries": ["oslo"], "topk": 5, "return_scores": True})
    path, body = bodies[1]
    assert path == "/wiki/_search"
    assert (body["size"], body["query"]["multi_match"]["query"]) == (5, "oslo")

    async def odd(request):
        return web.json_response({"result": 3, "hits": []})

    for name in ("retrieve=URL/retrieve", "elasticsearch=URL/wiki"):
        with pytest.raises(ToolError, match="does not document"):
            asked([name], serving, odd)
    with pytest.raises(UsageError, match="write retrieve=http"):
        asked(["retrieve=localhost"])
