"""Dense vectors of a corpus: made through an endpoint on loopback that embeds by meaning, kept, gone on with, searched."""

import asyncio
import json
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from aiohttp import web

from l0fast.corpus import dense
from l0fast.corpus.__main__ import main
from l0fast.corpus.embeddings import EmbeddingsConfig, open_embedder
from l0fast.corpus.index import Corpus, open_corpus
from l0fast.errors import ToolError

KEY = "key-that-nobody-may-see"
MEANINGS = ("car automobile vehicle", "doctor physician", "river stream", "king monarch", "bread loaf")
TEXTS = [f"{word} number{i}" for i in range(8) for word in ("car", "doctor", "river", "king", "bread")]


class Endpoint:
    """Counts words by meaning, in an order of its own, and remembers what it was asked."""

    def __init__(self):
        self.asked: list[str] = []
        self.sizes: list[int] = []
        self.keys: set[str | None] = set()
        self.running = self.most = 0
        self.first: list[web.Response] = []
        """What it answers before it begins to work."""
        self.works = 10**9
        """Requests it answers; then 400."""
        self.pairs: asyncio.Barrier | None = None
        """After the first, it answers no request before another one has come, too."""

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert (request.path, body["model"]) == ("/v1/embeddings", "toy")
        self.keys.add(request.headers.get("Authorization"))
        if self.first:
            return self.first.pop(0)
        if len(self.sizes) >= self.works:
            return web.Response(status=400)
        self.running += 1
        self.most = max(self.most, self.running)
        if self.pairs is not None and self.sizes:
            await self.pairs.wait()
        self.running -= 1
        self.asked += body["input"]
        self.sizes.append(len(body["input"]))
        rows = [{"index": i, "embedding": self.vector(text)} for i, text in enumerate(body["input"])]
        return web.json_response({"object": "list", "data": rows[::-1], "model": "toy"})

    def vector(self, text: str) -> list[float]:
        words = text.split()
        # a little of everything, so that no vector is zero and none equals another
        numbers = [sum(map(ord, text)) % 97 / 1000, len(text) / 1000]
        meant = [float(sum(word in meaning.split() for word in words)) for meaning in MEANINGS]
        # some much longer than others, which is to mean nothing
        return [(1 + sum(map(ord, text)) % 7) * number for number in (*meant, *numbers)]


@pytest.fixture
def endpoint(monkeypatch) -> Endpoint:
    monkeypatch.setenv("EMBEDDINGS_API_KEY", KEY)
    monkeypatch.delenv("EMBEDDINGS_URL", raising=False)
    return Endpoint()


@pytest.fixture
def source(tmp_path) -> Path:
    file = tmp_path / "c.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


def commands(serving, endpoint, *many: list[str]) -> list[int]:
    """What `python -m l0fast.corpus` exits with, while the endpoint is there; URL stands for its address."""

    async def all_of_them():
        async with serving(endpoint.answer) as url:
            return [await asyncio.to_thread(main, [word.replace("URL", url) for word in words]) for words in many]

    return asyncio.run(all_of_them())


def built(serving, endpoint, source: Path, *words: str) -> Path:
    folder = source.parent / "index"
    build = ["build", str(source), str(folder), "--embeddings", "URL", "--embedding-model", "toy", *words]
    assert commands(serving, endpoint, build) == [0]
    return folder


@asynccontextmanager
async def opened(serving, endpoint, folder: Path, monkeypatch):
    async with serving(endpoint.answer) as url:
        # not the port of the one that it was built with
        monkeypatch.setenv("EMBEDDINGS_URL", url)
        async with open_corpus(folder) as corpus:
            yield corpus


def test_other_words_for_the_same_are_found_and_names_still_are(serving, endpoint, source, monkeypatch):
    folder = built(serving, endpoint, source)

    async def ask():
        async with opened(serving, endpoint, folder, monkeypatch) as corpus:
            assert corpus.search_now("automobile", 5) == []
            return [
                [found.passage.text for found in await corpus.search(query, 8)]
                for query in ("automobile", "number3 monarch", "  ")
            ]

    meant, both, nothing = asyncio.run(ask())
    assert sorted(meant) == [f"car number{i}" for i in range(8)]
    # first in one ranking and among the first of the other
    assert both[0] == "king number3"
    assert nothing == []


def test_results_are_both_rankings_fused_by_reciprocal_ranks(serving, endpoint, source, monkeypatch):
    folder = built(serving, endpoint, source)
    query = "physician number3 number5 river"

    async def ask():
        async with opened(serving, endpoint, folder, monkeypatch) as corpus:
            return [f.passage.text for f in corpus.search_now(query, 50)], await corpus.search(query, 50)

    by_words, found = asyncio.run(ask())
    vectors = np.array([endpoint.vector(text) for text in TEXTS])
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16).astype(np.float64)
    asked = np.array(endpoint.vector(query))
    asked = (asked / np.linalg.norm(asked)).astype(np.float16).astype(np.float64)
    similar = dict(zip(TEXTS, unit @ asked, strict=True))
    by_meaning = sorted(TEXTS, key=lambda text: -similar[text])
    score = {t: sum(1 / (61 + r.index(t)) for r in (by_words, by_meaning) if t in r) for t in TEXTS}
    # near equals may change places: the sums have to fall, which no other order of much different ones does
    sums = [score[f.passage.text] for f in found]
    assert len(set(f.passage.text for f in found)) == len(TEXTS)
    assert all(a >= b - 2e-4 for a, b in zip(sums, sums[1:], strict=False))
    assert found[0].passage.text == max(score, key=score.__getitem__)


def test_passages_are_asked_in_batches_several_at_once_and_what_passes_is_asked_again(serving, endpoint, source):
    endpoint.first = [
        web.Response(status=429, headers={"Retry-After": "0"}),
        web.Response(status=503, headers={"Retry-After": "0"}),
    ]
    endpoint.pairs = asyncio.Barrier(2)
    folder = built(serving, endpoint, source, "--batch", "5", "--concurrent", "2", "--passage-prefix", "passage: ")
    assert endpoint.sizes == [1] + [5] * 8
    assert sorted(endpoint.asked[1:]) == sorted(f"passage: {text}" for text in TEXTS)
    assert endpoint.most == 2
    assert endpoint.keys == {f"Bearer {KEY}"}
    assert not list(folder.glob("*partial*"))
    assert not any(KEY.encode() in file.read_bytes() for file in folder.iterdir())


def test_no_more_requests_than_allowed_run_at_once(serving):
    running, two, go_on = 0, asyncio.Event(), asyncio.Event()

    async def answer(request):
        nonlocal running
        running += 1
        if running == 2:
            two.set()
        await go_on.wait()
        return web.json_response({"data": [{"index": 0, "embedding": [1.0]}]})

    async def ask():
        async with (
            serving(answer) as url,
            open_embedder(EmbeddingsConfig(url=url, model="toy", max_concurrent=2)) as embedder,
            asyncio.TaskGroup() as tg,
        ):
            for _ in range(6):
                tg.create_task(embedder.query("x"))
            await two.wait()
            # the others would have time to come
            for _ in range(300):
                await asyncio.sleep(0)
            assert running == 2
            go_on.set()
        assert running == 6

    asyncio.run(ask())


def test_what_was_interrupted_goes_on_where_it_was_and_gives_the_same(serving, source, endpoint, monkeypatch, capsys):
    whole = built(serving, endpoint, source, "--batch", "4")
    whole.rename(whole.with_name("whole"))
    folder, endpoint = source.parent / "index", Endpoint()
    endpoint.works = 5
    words = ["--embeddings", "URL", "--embedding-model", "toy", "--batch", "4", "--concurrent", "1"]
    assert commands(serving, endpoint, ["build", str(source), str(folder), *words]) == [1]
    assert "the embedding endpoint answered 400" in capsys.readouterr().err
    with (folder / "vectors.partial").open("ab") as file:
        file.write(b"cut")
    # the first one twice: it tells how long vectors are
    assert endpoint.asked == [TEXTS[0], *TEXTS[:16]]
    # by words it can be searched already, and another model doesn't get into it
    assert Corpus(folder).dense is None
    endpoint.works = 10**9
    other = [*words, "--query-prefix", "query: "]
    assert commands(serving, endpoint, ["embed", str(folder), *other], ["embed", str(folder), *words]) == [2, 0]
    said = capsys.readouterr()
    assert "with query_prefix = '' and not 'query: '" in said.err
    assert "16 of 40 passages have their vectors already" in said.out
    assert endpoint.asked.count(TEXTS[5]) == 1
    assert endpoint.asked[-24:] == TEXTS[16:]
    query = np.array(endpoint.vector("physician"), np.float32)
    found = [Corpus(f).dense.nearest(query, 10) for f in (folder, whole.with_name("whole"))]
    assert found[0] == found[1]
    assert commands(serving, endpoint, ["embed", str(folder), *words]) == [2]
    assert "has dense vectors already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ("nonsense", "does not answer as OpenAI's API does"),
        ([], "1 texts with 0 vectors"),
        ([{"index": 1, "embedding": [1.0]}], "numbered them wrongly"),
        ([{"index": 0, "embedding": []}], "or of none"),
        ([{"index": 0, "embedding": [0.0, 0.0]}], "a vector of zeros"),
    ],
)
def test_vectors_that_are_none_are_refused(data, complaint, serving, endpoint, source, capsys):
    endpoint.first = [web.json_response({"data": data})]
    folder = source.parent / "index"
    words = ["build", str(source), str(folder), "--embeddings", "URL", "--embedding-model", "toy"]
    assert commands(serving, endpoint, words) == [1]
    assert complaint in capsys.readouterr().err
    assert not (folder / "dense.json").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--embeddings", "URL"], "both an endpoint and a model"),
        (["--embeddings", "nowhere", "--embedding-model", "toy"], "is no address"),
        (["--embeddings", "URL", "--embedding-model", "toy", "--batch", "0"], "--batch 0"),
    ],
)
def test_what_can_not_embed_is_one_sentence(words, complaint, serving, endpoint, source, capsys):
    assert commands(serving, endpoint, ["build", str(source), str(source.parent / "index"), *words]) == [2]
    assert complaint in capsys.readouterr().err


def test_an_endpoint_that_is_of_no_use_fails_the_search_and_not_the_agent(serving, endpoint, source, monkeypatch):
    folder = built(serving, endpoint, source)

    async def ask():
        async with opened(serving, endpoint, folder, monkeypatch) as corpus:
            endpoint.first = [web.Response(status=404)]
            with pytest.raises(ToolError, match="the embedding endpoint answered 404") as refused:
                await corpus.search("car", 3)
            assert KEY not in str(refused.value)
            row = {"index": 0, "embedding": [1.0, 2.0]}
            endpoint.first = [web.json_response({"data": [row]})]
            with pytest.raises(ToolError, match="vectors of 2 numbers, and the corpus has 7"):
                await corpus.search("car", 3)

    asyncio.run(ask())


def test_the_graph_finds_nearly_what_comparing_all_finds(serving, endpoint, source, monkeypatch):
    """usearch builds it with several threads, in whatever order: one of eight alike is missed now and then."""
    folder = built(serving, endpoint, source)
    query = np.array(endpoint.vector("stream number4"), np.float32)
    corpus = Corpus(folder)
    exact = corpus.dense.nearest(query, 8)
    monkeypatch.setattr(dense, "EXACT", 0)
    assert len({*corpus.dense.nearest(query, 8)} & {*exact}) >= 6
    assert sorted(corpus.texts(exact)) == [f"river number{i}" for i in range(8)]
    corpus.close()


def test_without_usearch_it_says_what_to_install(serving, endpoint, source, monkeypatch, capsys):
    folder = built(serving, endpoint, source)
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    assert main(["search", str(folder), "car"]) == 2
    assert "pip install 'l0fast[dense]'" in capsys.readouterr().err
