"""Make a training set: read sources, drop duplicates, judge, filter, decontaminate, split, write parquet.

    python -m l0fast.data --source nq --source hotpotqa --source mine.jsonl --against simpleqa --against bamboogle \\
        --judge-endpoint https://api.openai.com/v1 --judge-model NAME --out data/qa

    sources --merge--> rows --judge--> grades --decontaminate--> --filter, split--> OUT/{train,validation,test}.parquet
                       OUT/work.sqlite holds all of it until then            OUT/card.md, card.json, left_out.jsonl

The same command goes on where it was, after anything, to the same files. Judging is left out where no endpoint is named.
Then `python -m l0fast.run RECIPE --task.kind questions --task.train OUT/train.parquet`: its rows know how they are judged. Where
questions come with files, `OUT/train.parquet?files=files`.
"""

import argparse
import asyncio
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import orjson
import uvloop
from rich.console import Console

from l0fast.data.contamination import Contamination
from l0fast.data.quality import judge_quality
from l0fast.data.store import BATCH, Row, Store
from l0fast.engine.base import TextEngine
from l0fast.engine.openai import EndpointConfig, endpoint_url, openai_engine
from l0fast.errors import EngineError, UsageError
from l0fast.files import whole_file, write_whole
from l0fast.first_process import step_back
from l0fast.tasks.sources import Problem, must_differ, parse_source, read_tasks, source_name
from l0fast.types import Task

SPLITS = ("train", "validation", "test")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m l0fast.data",
        description="Make a training set: merge sources, judge, filter, decontaminate, split, write parquet. The same command "
        "goes on where it was.",
    )
    p.add_argument(
        "--source", action="append", required=True, metavar="DATA", help="file, data set or owner/name; repeat"
    )
    p.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="DATA",
        help="evaluation set that no question may be of; repeat",
    )
    p.add_argument("--out", type=Path, required=True, metavar="DIR")
    p.add_argument("--judge-endpoint", default="", metavar="URL", help="OpenAI-compatible API that judges questions")
    p.add_argument("--judge-model", default="", metavar="NAME")
    p.add_argument("--judge-concurrency", type=int, default=64, metavar="N")
    p.add_argument("--min-objectivity", type=int, default=4, choices=range(1, 6), metavar="1-5")
    p.add_argument("--min-stability", type=int, default=4, choices=range(1, 6), metavar="1-5")
    p.add_argument("--validation-share", type=float, default=0.01, metavar="SHARE")
    p.add_argument("--test-share", type=float, default=0.01, metavar="SHARE")
    return p


async def build(options: argparse.Namespace, say: Any = print) -> dict[str, Any]:
    """All stages; the card. Raises UsageError."""
    if not 0 <= options.validation_share + options.test_share < 1:
        raise UsageError("validation and test shares leave nothing to train on: make them smaller")
    if bool(options.judge_endpoint) != bool(options.judge_model):
        raise UsageError("--judge-endpoint and --judge-model belong together: give both, or neither")
    if options.judge_concurrency < 1:
        raise UsageError(f"--judge-concurrency {options.judge_concurrency}: give at least 1")
    if options.judge_endpoint:
        endpoint_url(options.judge_endpoint)
    must_differ("sources", [source_name(parse_source(text)) for text in options.source])
    out: Path = options.out
    if not (out / "work.sqlite").exists():
        # a word that is wrong is told before it claims the folder, or hours were spent on the words before it
        for split, texts in (("train", options.source), ("eval", options.against)):
            for text in texts:
                next(iter(read_tasks(parse_source(text), split)), None)
    plan = orjson.dumps([options.source, options.against]).decode()
    with Store(out / "work.sqlite", plan) as store:
        for text in options.source:
            _merge(store, text, say)
        contamination = Contamination(_questions(options.against))
        say(f"{contamination.num_questions:,} evaluation questions to keep out")
        checked = 0
        while rows := store.unchecked(checked):
            store.checked([(row.number, row.task.question in contamination) for row in rows])
            checked = rows[-1].number
        if options.judge_endpoint:
            await _judge(store, options, say)
        return _write(store, options, say)


def _merge(store: Store, text: str, say: Any) -> None:
    config = parse_source(text)
    name = source_name(config)
    line, taken, done = store.begun(name)
    if done:
        return
    rows = ((n, task) for n, task in read_tasks(config, "train") if n > line)
    if config.limit:
        rows = _until(rows, config.limit - taken)
    while batch := list(islice(rows, BATCH)):
        store.add(name, batch, done=False)
    store.add(name, [], done=True)
    say(f"read {name}")


def _until(rows: Iterator[tuple[int, Task | Problem]], limit: int) -> Iterator[tuple[int, Task | Problem]]:
    """As far as the row that is the last of so many questions."""
    while limit > 0 and (found := next(rows, None)):
        limit -= isinstance(found[1], Task)
        yield found


def _questions(texts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        for _, task in read_tasks(parse_source(text), "eval"):
            if not isinstance(task, Problem):
                yield task.question


async def _judge(store: Store, options: argparse.Namespace, say: Any) -> None:
    config = EndpointConfig(
        url=options.judge_endpoint,
        model=options.judge_model,
        max_concurrent=options.judge_concurrency,
        own_temperature=True,
    )
    after = judged = 0
    async with openai_engine(config) as engine:
        while rows := store.unjudged(after):
            # a kill costs what is asked for at once, no more
            for part in (
                rows[i : i + 4 * options.judge_concurrency] for i in range(0, len(rows), 4 * options.judge_concurrency)
            ):
                try:
                    async with asyncio.TaskGroup() as tg:
                        asked = [tg.create_task(_grades(engine, row)) for row in part]
                except ExceptionGroup as e:
                    # a key or a model that is wrong is so for all of them
                    raise e.exceptions[0] from e
                store.judged([task.result() for task in asked])
                judged += len(part)
                say(f"judged {judged:,} questions")
            after = rows[-1].number


async def _grades(engine: TextEngine, row: Row) -> tuple[int, int | None, int | None, str | None]:
    try:
        quality = await judge_quality(engine, row.task.question, row.task.answers)
    except EngineError as e:
        # no judgement is not a bad one: the row is left out, told of, and asked about again by the next command
        return row.number, None, None, str(e)
    return row.number, quality.objectivity, quality.stability, None


def _split(key: bytes, validation: float, test: float) -> str:
    at = int.from_bytes(key[:8], "little") / 2**64
    return "validation" if at < validation else "test" if at < validation + test else "train"


def _write(store: Store, options: argparse.Namespace, say: Any) -> dict[str, Any]:
    judged = bool(options.judge_endpoint)
    limits = {"min_objectivity": options.min_objectivity, "min_stability": options.min_stability, "judged": judged}
    counts = {split: 0 for split in SPLITS}
    out: Path = options.out
    with _parquet_writers(out) as write:
        rows = store.kept(**limits)
        while batch := list(islice(rows, BATCH)):
            by_split: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
            for row in batch:
                split = _split(row.key, options.validation_share, options.test_share)
                by_split[split].append(_record(row))
            for split, records in by_split.items():
                counts[split] += len(records)
                write(split, records)
    sources = store.counts(**limits)
    card = {
        "sources": sources,
        "total": {name: sum(of[name] for of in sources.values()) for name in next(iter(sources.values()))},
        "splits": counts,
        "against": options.against,
        "judge": options.judge_model or None,
        **({k: v for k, v in limits.items() if k != "judged"} if judged else {}),
    }
    with whole_file(out / "left_out.jsonl") as partial, partial.open("wb") as file:
        file.writelines(orjson.dumps({"source": s, "line": n, "reason": r}) + b"\n" for s, n, r in store.problems())
    write_whole(out / "card.json", orjson.dumps(card, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    write_whole(out / "card.md", _card_text(card).encode())
    say(f"{card['total']['kept']:,} of {card['total']['rows']:,} rows kept: {out / 'card.md'}")
    return card


def _record(row: Row) -> dict[str, Any]:
    task = row.task
    return {
        "id": task.id,
        "question": task.question,
        "answers": list(task.answers),
        "tests": list(task.tests),
        "check": task.check,
        "files": list(task.files.items()),
        "source": row.source,
        "kind": task.kind,
        "objectivity": row.objectivity,
        "stability": row.stability,
    }


@contextmanager
def _parquet_writers(out: Path) -> Iterator[Any]:
    """`write(split, records)`; the files have their names when all is written."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as e:
        raise UsageError("writing parquet needs pyarrow: pip install 'l0fast[data]'") from e
    texts = pa.list_(pa.string())
    schema = pa.schema(
        {
            "id": pa.string(),
            "question": pa.string(),
            "answers": texts,
            "tests": texts,
            "check": pa.string(),
            "files": pa.map_(pa.string(), pa.string()),
            "source": pa.string(),
            "kind": pa.string(),
            "objectivity": pa.int8(),
            "stability": pa.int8(),
        }
    )
    folder = out / "writing"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    writers = {split: parquet.ParquetWriter(folder / f"{split}.parquet", schema) for split in SPLITS}
    try:
        yield lambda split, records: records and writers[split].write_table(pa.Table.from_pylist(records, schema))
    finally:
        for writer in writers.values():
            writer.close()
    for split in SPLITS:
        os.replace(folder / f"{split}.parquet", out / f"{split}.parquet")
    folder.rmdir()


def _card_text(card: dict[str, Any]) -> str:
    columns = list(card["total"])
    lines = [
        "# A training set",
        "",
        "| source | " + " | ".join(name.replace("_", " ") for name in columns) + " |",
        "|" + "---|" * (len(columns) + 1),
        *(
            f"| {name} | " + " | ".join(f"{of[column]:,}" for column in columns) + " |"
            for name, of in [*card["sources"].items(), ("together", card["total"])]
        ),
        "",
        "Splits: " + ", ".join(f"{split} {n:,}" for split, n in card["splits"].items()) + ".",
        f"Kept apart from: {', '.join(card['against']) or 'no evaluation set'}.",
        f"Judged by {card['judge']}: objectivity >= {card['min_objectivity']}, stability >= {card['min_stability']}."
        if card["judge"]
        else "Not judged.",
        "",
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    console = Console(stderr=True, highlight=False)
    try:
        uvloop.run(build(options, lambda text: console.print(text, markup=False)))
    except UsageError as e:
        console.print(f"l0fast: {e}", markup=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on", markup=False)
        return 130
    return 0


if __name__ == "__main__":
    step_back()
    sys.exit(main(sys.argv[1:]))
