"""The data sets that pliant knows by name: where each is on the hub, and how its records become documents.

`datasets` runs no loading scripts since version 4, so every row names files that load without one (parquet or json).
A subset is a data set of its own that others drew from the whole, or the first files of the whole.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pliant.data.conversations import Record, best_conversations

KINDS = ("text", "chat")


@dataclass(frozen=True, kw_only=True)
class DatasetSource:
    """One known data set.

    Attributes:
        hub_id: Repository on the hub.
        kind: ``text``, or ``chat`` for conversations.
        columns: Columns that are read: the text's, or those of the conversation's schema.
        config: Configuration, where the repository has several.
        split: Split to train on.
        eval_split: Its own validation split, if it has one.
        data_files: The files of each split, where only some are wanted.
        revision: Branch, where ``main`` still holds a loading script.
        join: Makes documents of records, where one record is not one document.
    """

    hub_id: str
    kind: str
    columns: tuple[str, ...] = ("text",)
    config: str | None = None
    split: str = "train"
    eval_split: str | None = None
    data_files: Mapping[str, str] | None = None
    revision: str | None = None
    join: Callable[[Iterable[Record]], Iterator[Any]] | None = None


def find_source(name: str) -> DatasetSource | None:
    """Returns the data set with this short name or hub id, or nothing."""
    by_id = {source.hub_id.lower(): source for source in reversed(DATASETS.values())}
    return DATASETS.get(name) or by_id.get(name.lower())


def articles(records: Iterable[Record]) -> Iterator[str]:
    """Yields whole articles of WikiText, whose records are lines.

    An article begins at a line ``= Title =`` after an empty line (``= = Section = =`` is deeper). Empty lines are
    stored as empty strings and written `` \\n`` as in the original files, so all articles together are those files.
    """
    lines: list[str] = []
    for record in records:
        line = record["text"]
        starts = TITLE.fullmatch(line.strip()) and not (lines and lines[-1].strip())
        if starts and any(held.strip() for held in lines):
            yield "".join(lines)
            lines = []
        lines.append(line or " \n")
    if any(held.strip() for held in lines):
        yield "".join(lines)


def worked_problems(records: Iterable[Record]) -> Iterator[str]:
    """Yields problems with their solutions, a text each."""
    for record in records:
        yield f"Question: {record['query']} Think step by step.\nAnswer: {record['response']}"


TITLE = re.compile(r"= [^=](.*[^=])? =")

C4_SHARDS = {
    "train": "en/c4-train.0000[0-7]-of-01024.json.gz",
    "validation": "en/c4-validation.00000-of-00008.json.gz",
}
"""The first 8 of 1,024 files (2.9 million pages, 2.4 GiB to download)."""

DATASETS: dict[str, DatasetSource] = {
    "wikitext": DatasetSource(  # `data.dataset_config=wikitext-2-raw-v1` is the small one
        hub_id="Salesforce/wikitext",
        kind="text",
        config="wikitext-103-raw-v1",
        eval_split="validation",
        join=articles,
    ),
    "slimpajama": DatasetSource(  # 59,166 jsonl.zst files (895 GB): stream it; needs the package `zstandard`
        hub_id="cerebras/SlimPajama-627B", kind="text", eval_split="validation"
    ),
    "c4": DatasetSource(hub_id="allenai/c4", kind="text", config="en", eval_split="validation"),
    "openwebtext": DatasetSource(  # `main` held a script (karpathy/nanoGPT#633); the hub's own conversion does not
        hub_id="Skylion007/openwebtext", kind="text", revision="refs/convert/parquet"
    ),
    "pile-subset": DatasetSource(  # MiniPile, arXiv 2304.08442: a million documents chosen from the Pile (3 GB)
        hub_id="JeanKaddour/minipile", kind="text", eval_split="validation"
    ),
    "c4-subset": DatasetSource(hub_id="allenai/c4", kind="text", data_files=C4_SHARDS, eval_split="validation"),
    "redpajama-subset": DatasetSource(
        # RedPajama-Data-1T-Sample loads by a script only; this is a random 1 % of SlimPajama, its deduplicated form.
        hub_id="DKYoon/SlimPajama-6B",
        kind="text",
        eval_split="validation",
    ),
    "ultrachat_200k": DatasetSource(
        hub_id="HuggingFaceH4/ultrachat_200k",
        kind="chat",
        columns=("messages",),
        split="train_sft",
        eval_split="test_sft",
    ),
    "alpaca": DatasetSource(hub_id="tatsu-lab/alpaca", kind="chat", columns=("instruction", "input", "output")),
    "metamathqa": DatasetSource(  # as text, in the form that PEFT's comparison of methods trains on
        hub_id="meta-math/MetaMathQA", kind="text", columns=("query", "response"), join=worked_problems
    ),
    "dolly-15k": DatasetSource(
        hub_id="databricks/databricks-dolly-15k", kind="chat", columns=("instruction", "context", "response")
    ),
    "oasst1": DatasetSource(
        hub_id="OpenAssistant/oasst1",
        kind="chat",
        columns=("message_id", "parent_id", "text", "role", "rank"),
        eval_split="validation",
        join=best_conversations,
    ),
}
"""Every known name; the hub id works as well."""
