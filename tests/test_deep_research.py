"""The page on reports runs as it is printed: its command, its lines of Python, and the report that they leave.

A search, two pages and a model that is a script stand in on loopback; agent, tools, sandbox and HTTP are the real ones.
"""

import asyncio
import json
import os
import re
import sys
from pathlib import Path

import pytest
from aiohttp import web

from tests import web_server

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "l0fast/tasks/deep_research.md").read_text(encoding="utf-8")
COMMAND, PYTHON, REPORT = (
    re.search(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)[1] for kind in ("sh", "python", "markdown")
)  # type: ignore[index]
QUESTION = re.search(r"<<'END'\n(.*?)END\n", COMMAND, re.DOTALL)[1]  # type: ignore[index]

PAGES = {
    "oresund": (
        "The Øresund Bridge",
        "The bridge carries a motorway and a railway between Denmark and Sweden. It is 7,845 m long, and its longest span, "
        "between two pairs of pylons, measures 490 m. Traffic has crossed it since the summer it opened in 2000.",
    ),
    "great-belt": (
        "The East Bridge",
        "The suspension bridge is the eastern part of the link over the Great Belt. It is 6,790 m long, and its longest span, "
        "hung from two towers of 254 m, measures 1,624 m. Cars have crossed it since it opened in 1998.",
    ),
}

TURNS = [
    """<think>First I look for a page on each of the two.</think>
<code>hits = web_search("Øresund Bridge length and span")[:1] + web_search("Great Belt East Bridge length and span")[:1]
for hit in hits:
    print(hit["title"], hit["url"])</code>""",
    """<think>Both are there. I read them and keep the figures.</think>
<code>import re
facts = []
for hit in hits:
    page = get_webpage_in_markdown(hit["url"])
    length = re.search(r"([\\d,]+) m long", page)[1]
    span = re.search(r"longest span[^.]*measures ([\\d,]+) m", page)[1]
    facts.append((length, span, re.search(r"opened in (\\d{4})", page)[1]))
    notepad.add_facts(f"{hit['title']}: {facts[-1]}")
facts</code>""",
    """<think>All figures have a source: I write the report.</think>
<code>(l1, s1, y1), (l2, s2, y2) = facts
times = int(s2.replace(",", "")) / int(s1.replace(",", ""))
report = f\"\"\"# Two bridges

The Øresund Bridge is {l1} m long [1], the East Bridge {l2} m [2]. The longest span of the East Bridge, {s2} m [2], is more than {"three" if 3 < times < 4 else times} times that of the Øresund
Bridge, {s1} m [1].

| | length | longest span | opened |
|---|---|---|---|
| Øresund Bridge | {l1} m [1] | {s1} m [1] | {y1} [1] |
| East Bridge | {l2} m [2] | {s2} m [2] | {y2} [2] |

## Sources

1. {hits[0]["title"]}, {hits[0]["url"]}
2. {hits[1]["title"]}, {hits[1]["url"]}
\"\"\"
notepad.write_draft(report)
submit_final_answer(report)</code>""",
]


async def stand_in(request: web.Request) -> web.StreamResponse:
    """The search, the pages and the model."""
    at = f"http://{request.host}"
    if request.path == "/search":
        assert request.query["format"] == "json"
        name = "oresund" if "Øresund" in request.query["q"] else "great-belt"
        title, text = PAGES[name]
        hit = {"title": title, "url": f"{at}/{name}", "content": text[:80], "engine": "e"}
        return web.json_response({"query": request.query["q"], "results": [hit]})
    if request.path != "/v1/chat/completions":
        title, text = PAGES[request.path[1:]]
        html = f"<html><head><title>{title}</title></head><body><article><h1>{title}</h1><p>{text}</p></article></body></html>"
        return web.Response(text=html, content_type="text/html")
    body = await request.json()
    assert body["messages"][1]["content"].strip() == QUESTION.strip()
    said = TURNS[sum(message["role"] == "assistant" for message in body["messages"])]
    if not body.get("stream"):
        return web.json_response({"choices": [{"message": {"content": said}, "finish_reason": "stop"}]})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for event in ({"delta": {"content": said}}, {"delta": {}, "finish_reason": "stop"}):
        await response.write(b"data: " + json.dumps({"choices": [event]}).encode() + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    return response


def here(block: str, url: str) -> str:
    """With the addresses of this test, and leave to read pages on loopback."""
    for printed, ours in (
        ("http://127.0.0.1:30000/v1", f"{url}/v1"),
        ("http://127.0.0.1:8888/search", f"{url}/search"),
        ("--max-turns 20", "--max-turns 20 --web.allow-private true"),
        ('"search_provider": "searxng"', '"search_provider": "searxng", "allow_private": True'),
    ):
        block = block.replace(printed, ours)
    return block


@pytest.mark.parametrize("kind", ["command", "python"])
def test_the_page_runs_as_it_is_printed(kind: str, tmp_path: Path):
    if kind == "python":
        (tmp_path / "question.txt").write_text(QUESTION, encoding="utf-8")
        words = [sys.executable, "-c", PYTHON]
    else:
        words = ["bash", "-euc", COMMAND]
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "PYTHONUTF8": "1",
    }

    async def run() -> tuple[str, str]:
        async with web_server.serving(stand_in) as url:
            process = await asyncio.create_subprocess_exec(
                *[here(word, url) for word in words],
                cwd=tmp_path,
                env=environment,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            said, _ = await process.communicate()
            assert process.returncode == 0, said.decode()
            return said.decode(), (tmp_path / "report.md").read_text(encoding="utf-8").replace(
                url, "https://example.org"
            )

    said, report = asyncio.run(run())
    assert report == REPORT
    if kind == "command":
        assert "3 turns in" in said
        book = json.loads((tmp_path / "report.ipynb").read_text())
        assert book["metadata"]["l0fast"]["status"] == "completed"
