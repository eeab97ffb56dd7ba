"""The documents of a run: one data set or a weighted mixture, and which of them validate.

Weights are shares of *documents*, not of tokens: the next document comes from a member with the probability of its
weight. An epoch ends when every member has been read to its end; smaller ones start over until then, so the weights
hold throughout and no document is left out.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, interleave_datasets

from pliant.config import DataConfig
from pliant.data.conversations import Batch, Record
from pliant.data.loading import AnyDataset, Member, eval_dataset, eval_member, open_documents, train_member
from pliant.errors import DataError


def train_members(config: DataConfig) -> list[Member]:
    """Returns the data sets that the run trains on."""
    if config.mixed:
        return [train_member(config, name, "data.dataset_names") for name in config.dataset_names]
    return [train_member(config, config.dataset_name, "data.dataset_name")]


def eval_members(config: DataConfig) -> list[Member]:
    """Returns the data sets or splits that the run validates on; none if it holds training documents out.

    A mixture validates on the splits of its members if each has one.
    """
    if config.eval_dataset_name is not None:
        return [eval_dataset(config, config.eval_dataset_name)]
    if config.mixed:
        members = [eval_member(config, name, "data.dataset_names") for name in config.dataset_names]
    else:
        members = [eval_member(config, config.dataset_name, "data.dataset_name")]
    known = [member for member in members if member is not None]
    return known if len(known) == len(members) else []


def split_documents(config: DataConfig, *, kind: str, seed: int) -> tuple[AnyDataset, AnyDataset]:
    """Returns the documents to train on and those to validate on; of a stream, both are streams.

    Where there is no validation split, a document is held out if the hash of its text falls below
    ``validation_fraction``: the same ones in every run, streamed or not, and never one that is trained on. If none
    does, as may be in small data, those with the lowest hash are; a text that is alone gives its last part.

    Raises:
        DataError: A member cannot be opened, or too little is there to hold anything out.
    """
    training = _open(config, train_members(config), kind=kind, seed=seed)
    if members := eval_members(config):
        return training, _open(config, members, kind=kind, seed=seed)
    if isinstance(training, IterableDataset):
        held_out = partial(is_held_out, threshold=config.validation_fraction)
        return training.filter(partial(_is_kept, threshold=config.validation_fraction)), training.filter(held_out)
    if len(training) == 1 and kind == "text":
        return _split_text(training, config.validation_fraction)
    return _hold_out(training, config.validation_fraction)


def share(document: Record) -> float:
    """Returns a number in [0, 1) that the document's content alone decides."""
    content = document["text"] if "text" in document else json.dumps(document["messages"], sort_keys=True)
    return int.from_bytes(hashlib.sha256((content or "").encode(errors="replace")).digest()[:6], "big") / 2**48


def is_held_out(document: Record, threshold: float) -> bool:
    """Returns whether a document belongs to the validation set."""
    return share(document) < threshold


def _is_kept(document: Record, threshold: float) -> bool:
    return not is_held_out(document, threshold)


def _open(config: DataConfig, members: Sequence[Member], *, kind: str, seed: int) -> AnyDataset:
    """Opens the members, mixes them if there are several, and takes the first ``max_documents``."""
    opened: list[Any] = [open_documents(member, kind=kind, streaming=config.streaming) for member in members]
    documents: AnyDataset = opened[0]
    if len(opened) > 1:
        documents = interleave_datasets(
            opened, probabilities=list(config.dataset_weights), seed=seed, stopping_strategy="all_exhausted"
        )
    if config.max_documents is None:
        return documents
    if isinstance(documents, IterableDataset):
        return documents.take(config.max_documents)
    return documents.select(range(min(config.max_documents, len(documents))))


def _shares(batch: Batch) -> dict[str, list[float]]:
    column, contents = next(iter(batch.items()))
    return {"share": [share({column: content}) for content in contents]}


def _hold_out(documents: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    hashed = documents.map(_shares, batched=True, remove_columns=documents.column_names)
    shares = np.asarray(hashed["share"][:])
    held_out = shares < max(fraction, np.nextafter(shares.min(), 1.0))
    if held_out.all():
        raise DataError(
            f"data.validation_fraction={fraction:g} needs documents that differ to hold one out; got {len(documents)} "
            "in all, which leaves none to train on. Add documents, or name data.eval_dataset_name."
        )
    return documents.select(np.flatnonzero(~held_out)), documents.select(np.flatnonzero(held_out))


def _split_text(documents: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """Cuts the only text in two at the space or line end nearest before its last part."""
    text = documents[0]["text"]
    place = round(len(text) * (1 - fraction))
    cut = 1 + max(text.rfind(" ", 0, place), text.rfind("\n", 0, place))
    first, last = text[:cut], text[cut:]
    if not first.strip() or not last.strip():
        raise DataError(
            f"data.validation_fraction={fraction:g} of the only document must be some words; it has {len(text)} "
            "characters. Add documents, or name data.eval_dataset_name."
        )
    return Dataset.from_dict({"text": [first]}), Dataset.from_dict({"text": [last]})
