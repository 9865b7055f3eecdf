"""Make and ask an index of passages.

    python -m l0fast.corpus build SOURCE FOLDER [--limit N]     a folder of texts, .jsonl or .parquet
    python -m l0fast.corpus search FOLDER QUERY [-k 5]

Then agents search it: --tools.use corpus=FOLDER.
"""

import argparse
import sys
import time
from itertools import islice
from pathlib import Path

from rich.console import Console

from l0fast.corpus.index import Corpus, build
from l0fast.corpus.read import Reader
from l0fast.errors import UsageError


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m l0fast.corpus", description="An index of passages for agents.")
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("build", help="index a folder of texts, .jsonl or .parquet")
    making.add_argument("source", type=Path)
    making.add_argument("folder", type=Path, help="where the index goes")
    making.add_argument("--limit", type=int, default=None, metavar="N", help="first so many passages alone")
    asking = commands.add_parser("search", help="ask it something")
    asking.add_argument("folder", type=Path)
    asking.add_argument("query")
    asking.add_argument("-k", type=int, default=5)
    options = parser.parse_args(argv)
    console = Console(highlight=False)
    try:
        if options.command == "build":
            started, reader = time.monotonic(), Reader(options.source)
            count = build(
                islice(reader, options.limit),
                options.folder,
                source=str(options.source),
                say=lambda text: console.print(text),
            )
            left_out = (
                f"; {reader.left_out:,} rows without text, first {reader.first_left_out}" if reader.left_out else ""
            )
            console.print(f"{count:,} passages in {time.monotonic() - started:.1f} s{left_out}: {options.folder}")
        else:
            corpus = Corpus(options.folder)
            for found in corpus.search_now(options.query, options.k):
                console.print(f"{found.score:6.2f}  {found.passage.title}: {found.passage.text}", markup=False)
            corpus.close()
    except UsageError as e:
        Console(stderr=True, highlight=False).print(f"l0fast: {e}", markup=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
