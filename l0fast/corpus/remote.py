"""Retrievers that run elsewhere: Search-R1's /retrieve form, Elasticsearch and OpenSearch.

    retrieve=URL             POST {"queries": [q], "topk": k, "return_scores": true}
                             -> {"result": [[{"document": {"id", "contents"}, "score"}]]}     github.com/PeterGriffinJin/Search-R1
    elasticsearch=URL/INDEX  POST URL/INDEX/_search {"size": k, "query": {"multi_match": ...}}  -> hits.hits[]._source

ELASTICSEARCH_API_KEY of the environment is sent where it is set.
"""

import os
from collections.abc import Callable
from typing import Any

from l0fast.corpus.read import TEXT, TITLE, first
from l0fast.errors import ToolError
from l0fast.tools.http import Http


async def retrieve(http: Http, url: str, query: str, k: int) -> list[str]:
    """Passages, best first. Raises ToolError."""
    body = {"queries": [query], "topk": k, "return_scores": True}
    said = await http.json("POST", url, headers={}, name="the retriever", body=body)
    return _texts(lambda: [_shown(hit["document"] if "document" in hit else hit) for hit in said["result"][0]][:k])


async def elasticsearch(http: Http, url: str, query: str, k: int) -> list[str]:
    """Passages, best first. Raises ToolError."""
    key = os.environ.get("ELASTICSEARCH_API_KEY", "").strip()
    body = {"size": k, "query": {"multi_match": {"query": query, "fields": [*TITLE, *TEXT]}}}
    headers = {"Authorization": f"ApiKey {key}"} if key else {}
    said = await http.json("POST", f"{url.rstrip('/')}/_search", headers=headers, name="the index", body=body)
    return _texts(lambda: [_shown(hit["_source"]) for hit in said["hits"]["hits"]][:k])


def _texts(take: Callable[[], list[str]]) -> list[str]:
    try:
        return take()
    except (KeyError, TypeError, IndexError, AttributeError) as e:
        raise ToolError("the retriever answered in a form that it does not document") from e


def _shown(document: Any) -> str:
    title, text = first(document, TITLE), first(document, TEXT)
    return f"{title}: {text}" if title else text
