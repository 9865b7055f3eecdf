"""Ready column maps: where well-known data sets lie on the Hugging Face hub, and which of their columns are what.

"nq" reads the hub, "nq.jsonl?map=nq" a copy on disk with the same columns. Column names are those of the data
sets' own cards and of L0's loaders (github.com/cmriat/l0, Apache-2.0), as of 2025; a data set that was changed since says so
by rows that don't fit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Names of columns. A dot goes into a record ("answer.aliases"); of several names with | between them the first that a row has counts."""

    question: str = "question"
    answers: str = "answers|golden_answers|answer"
    """A text, or a list of them, all right; a text that is a JSON list is one."""
    id: str = "id"
    """Where a row has none, its line number."""
    kind: str = ""
    files: str = ""
    """A file the agent finds in its folder: path of it beside the data, or a mapping from its name there to that path."""
    tests: str = "tests"
    """Python statements that must pass after the answer has run as code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    hub: str
    """owner/name"""
    subset: str = ""
    splits: Mapping[str, str]
    """"train", "eval" -> the split's own name."""
    columns: Columns = field(default_factory=Columns)
    check: str = "exact_match"
    """How an answer is judged; tasks/scoring.py."""


_FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"
_LISTED = Columns(answers="golden_answers")

DATASETS: dict[str, DataSet] = {
    # L0's own training set; its rows keep the answer as verl wants it
    "l0": DataSet(
        hub="cmriat/l0-qa",
        splits={"train": "train", "eval": "test"},
        columns=Columns(answers="reward_model.ground_truth|answer", id="id|extra_info.index", kind="source"),
    ),
    "nq": DataSet(hub=_FLASHRAG, subset="nq", splits={"train": "train", "eval": "test"}, columns=_LISTED),
    "triviaqa": DataSet(hub=_FLASHRAG, subset="triviaqa", splits={"train": "train", "eval": "test"}, columns=_LISTED),
    "hotpotqa": DataSet(
        hub="hotpotqa/hotpot_qa",
        subset="distractor",
        splits={"train": "train", "eval": "validation"},
        columns=Columns(answers="answer", kind="type"),
    ),
    "2wikimultihopqa": DataSet(
        hub=_FLASHRAG,
        subset="2wikimultihopqa",
        splits={"train": "train", "eval": "dev"},
        columns=Columns(answers="golden_answers", kind="metadata.type"),
    ),
    "musique": DataSet(hub=_FLASHRAG, subset="musique", splits={"train": "train", "eval": "dev"}, columns=_LISTED),
    "bamboogle": DataSet(
        hub="chiayewken/bamboogle", splits={"eval": "test"}, columns=Columns(question="Question", answers="Answer")
    ),
    "popqa": DataSet(
        hub="akariasai/PopQA",
        splits={"eval": "test"},
        columns=Columns(answers="possible_answers|obj", kind="prop"),
    ),
    "simpleqa": DataSet(
        hub="basicv8vc/SimpleQA",
        splits={"eval": "test"},
        columns=Columns(question="problem", answers="answer"),
        check="judge",
    ),
    "gaia": DataSet(
        hub="gaia-benchmark/GAIA",
        subset="2023_all",
        splits={"eval": "validation"},
        columns=Columns(
            question="Question", answers="Final answer", id="task_id", kind="Level", files="file_path|file_name"
        ),
    ),
    "math500": DataSet(
        hub="HuggingFaceH4/MATH-500",
        splits={"eval": "test"},
        columns=Columns(question="problem", answers="answer", id="unique_id", kind="subject"),
        check="math",
    ),
    "gsm8k": DataSet(
        hub="openai/gsm8k",
        subset="main",
        splits={"train": "train", "eval": "test"},
        # the number after the last ####
        columns=Columns(answers="answer"),
        check="numeric",
    ),
}
