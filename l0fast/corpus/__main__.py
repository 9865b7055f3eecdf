"""Make and ask an index of passages.

    python -m l0fast.corpus build SOURCE FOLDER [--limit N]     a folder of texts, .jsonl or .parquet
                                  [--embeddings URL --embedding-model NAME]
    python -m l0fast.corpus embed FOLDER --embeddings URL --embedding-model NAME
    python -m l0fast.corpus search FOLDER QUERY [-k 5]

Then agents search it: --tools.use corpus=FOLDER. `embed` gives an index dense vectors, or goes on where that was interrupted;
build does it, too, where it is told an endpoint.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from rich.console import Console

from l0fast.corpus.dense import embed
from l0fast.corpus.embeddings import EmbeddingsConfig, open_embedder
from l0fast.corpus.index import Corpus, Found, build, open_corpus
from l0fast.corpus.read import Reader
from l0fast.errors import L0fastError, UsageError
from l0fast.first_process import step_back

Say = Callable[[str], None]


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    console, errors = Console(highlight=False), Console(stderr=True, highlight=False)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    try:
        match options.command:
            case "build":
                embeddings = _embeddings(options) if options.embeddings or options.embedding_model else None
                _build(options, say)
                if embeddings is not None:
                    asyncio.run(_embed(options.folder, embeddings, say))
            case "embed":
                asyncio.run(_embed(options.folder, _embeddings(options), say))
            case "search":
                for found in asyncio.run(_search(options.folder, options.query, options.k)):
                    say(f"{found.score:6.2f}  {found.passage.title}: {found.passage.text}")
    except L0fastError as e:
        errors.print(f"l0fast: {e}", markup=False, soft_wrap=True)
        return 2 if isinstance(e, UsageError) else 1
    except KeyboardInterrupt:
        goes_on = "; the same command goes on" if options.command == "embed" else ""
        errors.print(f"interrupted{goes_on}", markup=False, soft_wrap=True)
        return 130
    return 0


def _build(options: argparse.Namespace, say: Say) -> None:
    started, reader = time.monotonic(), Reader(options.source)
    count = build(islice(reader, options.limit), options.folder, source=str(options.source), say=say)
    left_out = f"; {reader.left_out:,} rows without text, first {reader.first_left_out}" if reader.left_out else ""
    say(f"{count:,} passages in {time.monotonic() - started:.1f} s{left_out}: {options.folder}")


async def _embed(folder: Path, config: EmbeddingsConfig, say: Say) -> None:
    started = time.monotonic()
    corpus = await asyncio.to_thread(Corpus, folder)
    try:
        async with open_embedder(config) as embedder:
            await embed(folder, await asyncio.to_thread(corpus.keys), corpus.texts, embedder, say=say)
    finally:
        corpus.close()
    say(f"{corpus.num_passages:,} passages embedded in {time.monotonic() - started:.1f} s: {folder}")


async def _search(folder: Path, query: str, k: int) -> list[Found]:
    async with open_corpus(folder) as corpus:
        return await corpus.search(query, k)


def _embeddings(options: argparse.Namespace) -> EmbeddingsConfig:
    if not (options.embeddings and options.embedding_model):
        raise UsageError(
            "dense vectors need both an endpoint and a model: give --embeddings URL --embedding-model NAME"
        )
    for name in ("batch", "concurrent"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name} {getattr(options, name)}: give at least 1")
    return EmbeddingsConfig(
        url=options.embeddings,
        model=options.embedding_model,
        passage_prefix=options.passage_prefix,
        query_prefix=options.query_prefix,
        batch=options.batch,
        max_concurrent=options.concurrent,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m l0fast.corpus", description="An index of passages for agents.")
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("build", help="index a folder of texts, .jsonl or .parquet")
    making.add_argument("source", type=Path)
    making.add_argument("folder", type=Path, help="where the index goes")
    making.add_argument("--limit", type=int, default=None, metavar="N", help="first so many passages alone")
    embedding = commands.add_parser("embed", help="give an index dense vectors, or the rest of them")
    embedding.add_argument("folder", type=Path)
    for command in (making, embedding):
        command.add_argument("--embeddings", metavar="URL", help="OpenAI-compatible API that embeds")
        command.add_argument("--embedding-model", metavar="NAME", help="the model's name there")
        command.add_argument("--passage-prefix", default="", metavar="TEXT", help='before each passage, as "passage: "')
        command.add_argument("--query-prefix", default="", metavar="TEXT", help='before each query, as "query: "')
        command.add_argument("--batch", type=int, default=64, metavar="N", help="passages a request")
        command.add_argument("--concurrent", type=int, default=8, metavar="N", help="requests at once")
    asking = commands.add_parser("search", help="ask it something")
    asking.add_argument("folder", type=Path)
    asking.add_argument("query")
    asking.add_argument("-k", type=int, default=5)
    return parser


if __name__ == "__main__":
    step_back()
    sys.exit(main(sys.argv[1:]))
