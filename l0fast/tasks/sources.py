"""Questions from files and data sets: parquet, JSONL, JSON, or a Hugging Face data set by name, with a column map.

    rows --columns--> Task, or a reason why not, with the row's line number --> Source
    sources, weights, seed --> an endless stream: draw a source by weight, then the next of its shuffled rows

What comes at which place of the stream depends on the sources, their weights and the seed alone, so a run that goes on
passes over as many as were taken and is where it was. A source is shuffled anew each time it has been gone through; no
question comes again before all of its source have come.

A row that can't be asked is never passed over in silence: `Source.problems` has its line and what is wrong with it.
Parquet needs pyarrow, a name on the hub `datasets` (pip install 'l0fast[data]').

A source is written as one text, DATA or DATA?name=value&name=value, with the fields of `SourceConfig` as names:
"nq", "owner/name:subset?split=test", "questions.jsonl?question=prompt&answers=targets&weight=2".
"""

import random
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

import orjson
from pydantic import Field, NonNegativeInt, PositiveFloat, ValidationError

from l0fast.config import Config
from l0fast.errors import UsageError
from l0fast.seeding import derive_seed
from l0fast.tasks.catalog import DATASETS, Columns, DataSet
from l0fast.types import CHECKS, Check, Task

SUFFIXES = (".jsonl", ".json", ".parquet")
SHOWN_PROBLEMS = 5
"""Rows that the one line about a source tells of."""


class SourceConfig(Config):
    data: str
    """A .jsonl, .json or .parquet file, a data set with a ready map (tasks/catalog.py), or owner/name[:subset] on the hub."""
    name: str = ""
    """What its tasks and figures go by; else the file's name, or the data set's."""
    map: str = ""
    """The ready map whose columns a file has."""
    split: str = ""
    """Of a data set on the hub, where it is not the usual one."""
    weight: PositiveFloat = 1.0
    """Share of the questions drawn from this source, relative to the others."""
    limit: NonNegativeInt = 0
    """First so many questions alone; 0 for all [questions]."""
    heldout_share: float = Field(default=0.0, ge=0, lt=1)
    """Deal one file into a training and an evaluation part: the share that is evaluated on."""
    check: Literal["", Check] = ""
    """How an answer is judged, where not as the row's own `check` or else the map says, or else by exact match."""
    question: str = ""
    answers: str = ""
    id: str = ""
    kind: str = ""
    files: str = ""
    files_folder: str = ""
    """Folder that the paths in `files` start from; else the data's own."""
    tests: str = ""


def parse_source(text: str) -> SourceConfig:
    """What DATA?name=value&... says. Raises UsageError."""
    data, _, options = text.partition("?")
    try:
        named = dict(parse_qsl(options, keep_blank_values=True, strict_parsing=True)) if options else {}
        return SourceConfig.model_validate({"data": data, **named})
    except ValidationError as e:
        error = e.errors()[0]
        where = ".".join(map(str, error["loc"]))
        raise UsageError(
            f"the source {text!r} has {where} = {error['input']!r}: {error['msg']}; names are "
            f"{', '.join(SourceConfig.model_fields)}"
        ) from None
    except ValueError as e:
        raise UsageError(f"the source {text!r} is not DATA?name=value&name=value ({e})") from None


@dataclass(frozen=True, slots=True)
class Problem:
    line: int
    """Of the file, from 1; of a data set without lines the row's number."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    name: str
    tasks: tuple[Task, ...]
    problems: tuple[Problem, ...]
    """Rows that are no tasks."""
    weight: float = 1.0

    def report(self) -> str:
        """One line for people: how many questions, and what was wrong with which rows."""
        rows = len(self.tasks) + len(self.problems)
        if not self.problems:
            return f"{self.name}: {rows:,} questions"
        shown = "; ".join(f"line {p.line}: {p.reason}" for p in self.problems[:SHOWN_PROBLEMS])
        more = "; ..." if len(self.problems) > SHOWN_PROBLEMS else ""
        return f"{self.name}: {len(self.tasks):,} questions, {len(self.problems):,} of {rows:,} rows left out ({shown}{more})"


def load_source(config: SourceConfig, split: str) -> Source:
    """Read a source. Blocks for as long as its rows take: a thread's work.

    Args:
        split: "train" or "eval": a data set's own. A file has none, and is the same for both, unless `config.heldout_share`
            deals its rows by a hash of their question: the same question is on the same side, whatever file it stands in.

    Raises:
        UsageError: no such file or data set, a format that isn't read here, or not one row that can be asked.
    """
    tasks: list[Task] = []
    problems: list[Problem] = []
    lines: dict[str, int] = {}
    name = source_name(config)
    for line, task in read_tasks(config, split):
        if isinstance(task, Problem):
            problems.append(task)
        elif task.id in lines:
            problems.append(Problem(line, f"its id {task.id!r} is that of line {lines[task.id]}"))
        else:
            lines[task.id] = line
            tasks.append(task)
            if config.limit and len(tasks) == config.limit:
                break
    source = Source(name=name, tasks=tuple(tasks), problems=tuple(problems), weight=config.weight)
    if not tasks:
        raise UsageError(
            f"{config.data} has no question for {split!r} ({source.report()}): name its columns, for example "
            "question = 'prompt', answers = 'targets', or give another file"
        )
    return source


def source_name(config: SourceConfig) -> str:
    return config.name or (config.data if config.data in DATASETS else Path(config.data.partition(":")[0]).stem)


def must_differ(what: str, names: Sequence[str]) -> None:
    """Raises UsageError where two have the same name."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"two {what} are called {', '.join(twice)}: tell them apart with ?name=...")


def read_tasks(config: SourceConfig, split: str) -> Iterator[tuple[int, "Task | Problem"]]:
    """Row by row, with its line number, those of the other side left out; nothing is kept.

    Raises:
        UsageError: as `load_source` does, but for a source without a row that can be asked.
    """
    data_set = _data_set(config)
    columns, name = _columns(config, data_set), source_name(config)
    find, rows = _rows(config, split)
    check, usual = config.check, data_set.check if data_set else "exact_match"
    find = _beside(Path(config.files_folder)) if config.files_folder else find
    for line, row in rows:
        try:
            task = _task(row, columns, name=name, line=line, check=check or _own_check(row) or usual, find=find)
        except _Misfit as e:
            yield line, Problem(line, str(e))
            continue
        if not config.heldout_share or is_heldout(task.question, config.heldout_share) == (split == "eval"):
            yield line, task


def at_hub(config: SourceConfig, split: str) -> tuple[str, str, str]:
    """owner/name, subset and split there of a source that is no file. Raises UsageError."""
    data_set = _data_set(config)
    hub, _, subset = (config.data if data_set is None or "/" in config.data else data_set.hub).partition(":")
    if "/" not in hub:
        raise UsageError(
            f"{config.data!r} is neither a file nor a data set with a ready map ({', '.join(DATASETS)}) nor owner/name on the "
            "hub: give one of them"
        )
    theirs = config.split or (data_set.splits.get(split) if data_set else "train")
    if theirs is None:
        raise UsageError(f"{config.data} has no {split!r} questions: name one of its splits with split = '...'")
    return hub, subset or (data_set.subset if data_set else ""), theirs


def is_heldout(question: str, share: float) -> bool:
    """Whether a question belongs to the `share` that is never trained on: by its words alone."""
    digest = blake2b(" ".join(question.casefold().split()).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def stream(sources: Sequence[Source], seed: int) -> Iterator[Task]:
    """Endless: which source comes next is drawn by weight, which question of it by its shuffle."""
    rng = random.Random(derive_seed(seed, "sources"))
    orders = [_shuffled(source, seed) for source in sources]
    weights = [source.weight for source in sources]
    while True:
        yield next(rng.choices(orders, weights)[0])


def _shuffled(source: Source, seed: int) -> Iterator[Task]:
    epoch = 0
    while True:
        order = list(range(len(source.tasks)))
        random.Random(derive_seed(seed, "epoch", source.name, epoch)).shuffle(order)
        for i in order:
            yield source.tasks[i]
        epoch += 1


# --- rows --------------------------------------------------------------------------------------------------------------


class _Misfit(Exception):
    """Why a row is no task."""


Rows = Iterable[tuple[int, Any]]
"""Line number, and a row as a mapping, or a `_Misfit`."""
Find = Callable[[str], Path]
"""A file that a row names."""


def _beside(folder: Path) -> Find:
    return lambda name: (folder / name).absolute()


def _data_set(config: SourceConfig) -> DataSet | None:
    name = config.map or (config.data if config.data in DATASETS else "")
    if name and name not in DATASETS:
        raise UsageError(f"map = {name!r} is none that ships: take one of {', '.join(DATASETS)}, or name columns")
    return DATASETS.get(name)


def _columns(config: SourceConfig, data_set: DataSet | None) -> Columns:
    known = data_set.columns if data_set else Columns()
    return Columns(
        question=config.question or known.question,
        answers=config.answers or known.answers,
        id=config.id or known.id,
        kind=config.kind or known.kind,
        files=config.files or known.files,
        tests=config.tests or known.tests,
    )


def _rows(config: SourceConfig, split: str) -> tuple[Find, Rows]:
    """Where the files that rows name are found, and the rows."""
    path = Path(config.data)
    if path.is_file():
        return _beside(path.parent), rows_of_file(path)
    if path.suffix in SUFFIXES:
        raise UsageError(
            f"there is no file {path}: give the path of one, the name of a data set, or owner/name on the hub"
        )
    return _from_hub(config, split)


def rows_of_file(path: Path) -> Rows:
    """(line number, row) of a .jsonl, .json or .parquet file; a line that can't be read is no mapping. Raises UsageError."""
    readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
    if path.suffix not in readers:
        raise UsageError(f"{path} is none of the formats read here ({', '.join(SUFFIXES)}): convert it to one of them")
    return readers[path.suffix](path)


def _jsonl(path: Path) -> Rows:
    with path.open("rb") as file:
        for line, text in enumerate(file, 1):
            text = text.removeprefix(BOM_UTF8) if line == 1 else text
            if text.strip():
                try:
                    yield line, orjson.loads(text)
                except ValueError as e:
                    yield line, _Misfit(f"not JSON ({e})")


def _json(path: Path) -> Rows:
    try:
        rows = orjson.loads(path.read_bytes().removeprefix(BOM_UTF8))
    except ValueError as e:
        raise UsageError(f"{path} is not JSON ({e}): mend it, or give JSON lines as .jsonl") from e
    if not isinstance(rows, list):
        raise UsageError(f"{path} holds no list of rows: give a JSON list of objects, or JSON lines as .jsonl")
    return enumerate(rows, 1)


def _parquet(path: Path) -> Rows:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as e:
        raise UsageError(f"{path} is parquet, which needs pyarrow: pip install 'l0fast[data]'") from e
    line = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                line += 1
                yield line, row
    except (OSError, pa.ArrowException) as e:
        where = f" after row {line:,}" if line else ""
        raise UsageError(f"{path} is no parquet file{where} ({e}): give one that is whole") from e


def _from_hub(config: SourceConfig, split: str) -> tuple[Find, Rows]:
    hub, subset, theirs = at_hub(config, split)
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise UsageError(
            f"{config.data} comes from the Hugging Face hub, which needs `datasets`: pip install 'l0fast[data]'"
        ) from e
    try:
        table = datasets.load_dataset(hub, subset or None, split=theirs)
    except Exception as e:
        # of no common class: for a data set that is a script, a RuntimeError
        raise UsageError(
            f"{hub} could not be had from the hub ({type(e).__name__}: {e}): see its page, `hf auth login` where it is gated, "
            "or give a file"
        ) from e

    def download(name: str) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(hub, name, repo_type="dataset"))

    return download, enumerate(table, 1)


# --- a row ---------------------------------------------------------------------------------------------------------------


def _task(row: Any, columns: Columns, *, name: str, line: int, check: str, find: Find) -> Task:
    if isinstance(row, _Misfit):
        raise row
    if not isinstance(row, Mapping):
        raise _Misfit(f"not a record of named columns but {type(row).__name__}")
    question = _column(row, columns.question)
    if not isinstance(question, str) or not question.strip():
        raise _Misfit(f"no question in {columns.question!r}" + _has(row))
    tests = tuple(_texts(_column(row, columns.tests)))
    answers = _answers(_column(row, columns.answers), check)
    if not answers and not (check == "unit_tests" and tests):
        raise _Misfit(f"no answer in {columns.answers!r}" + _has(row))
    if check == "unit_tests" and not tests:
        raise _Misfit(f"no tests in {columns.tests!r}" + _has(row))
    own_id, kind = _column(row, columns.id), _column(row, columns.kind)
    return Task(
        id=f"{name}/{line if own_id in (None, '') else own_id}",
        question=question.strip(),
        answers=answers,
        kind="" if kind is None else str(kind),
        files=_files(_column(row, columns.files), find),
        tests=tests,
        check=check,
    )


def _own_check(row: Any) -> str:
    """As l0fast.data writes it. A column of that name that says something else is somebody else's."""
    check = row.get("check") if isinstance(row, Mapping) else None
    return check if check in CHECKS else ""


def _has(row: Mapping[str, Any]) -> str:
    return f", of the columns {', '.join(map(repr, row))}"


def _column(row: Mapping[str, Any], names: str) -> Any:
    """The first that the row has, and that is not empty."""
    for name in names.split("|"):
        value: Any = row if name else None
        if name in row:
            value = row[name]
        else:
            for key in name.split("."):
                value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None and value != "" and value != []:
            return value
    return None


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value] if (listed := _listed(value)) is None else listed
    if value is None:
        return []
    if isinstance(value, int | float):
        return [_number(value)]
    # bytes are a sequence of numbers, which nobody means
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [text for item in value for text in ([item] if isinstance(item, str) else _texts(item))]
    raise _Misfit(f"an answer is a text, a number or a list of them, not {type(value).__name__}")


def _number(value: float) -> str:
    """As one writes it: a column of whole numbers of which one is missing holds 42.0, which without its mark is 420."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _listed(text: str) -> list[str] | None:
    """A text that is a JSON list of texts. One of numbers is an interval, a point or a pattern."""
    if not text.lstrip().startswith("["):
        return None
    try:
        items = orjson.loads(text)
    except ValueError:
        return None
    return items if all(isinstance(item, str) for item in items) else None


def _answers(value: Any, check: str) -> tuple[str, ...]:
    answers = [text.strip() for text in _texts(value) if text.strip()]
    if check in ("numeric", "math"):
        # GSM8K works its answers out; what is after the marks is the answer
        answers = [text.rpartition("####")[2].strip() for text in answers]
    return tuple(dict.fromkeys(answers))


def _files(value: Any, find: Find) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, Mapping):
        named = value
    elif isinstance(value, Sequence) and all(isinstance(item, tuple) for item in value):
        # a mapping, as parquet has it
        named = dict(value)
    else:
        named = {Path(path).name: path for path in _texts(value)}
    files: dict[str, str] = {}
    for name, given in named.items():
        if given:
            try:
                path = find(str(given))
            except (OSError, ValueError) as e:
                raise _Misfit(f"its file {given} can't be had ({e})") from e
            if not path.is_file():
                raise _Misfit(f"there is no file {path}")
            files[str(name)] = str(path)
    return files
