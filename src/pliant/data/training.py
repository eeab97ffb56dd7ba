"""The one entry point to training data: settings and a tokenizer → rows to train and to validate on."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from typing import Any

from datasets import Dataset, Features, IterableDataset
from transformers import PreTrainedTokenizerBase

from pliant.config import DataConfig
from pliant.data.chat import check_chat_tokenizer, encode_conversations
from pliant.data.collator import Collator
from pliant.data.conversations import Batch, Record
from pliant.data.loading import FORMAT, AnyDataset, every, generated
from pliant.data.mixture import split_documents
from pliant.data.packing import ENCODED, PACKED_ROW, ROW, Encoded, encode_texts, packed_rows, single_rows
from pliant.data.sources import KINDS
from pliant.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Rows to train and to validate on, and what makes batches of them.

    Attributes:
        train: Rows with ``input_ids``, ``labels``, ``row`` and, if packed, ``position_ids``. A stream is shuffled and
            endless: it goes through the documents again and again, each time in another order.
        validation: At most ``max_validation_windows`` such rows.
        collate: Makes a batch of rows.
        documents: Documents in `train`, before any is left out; unknown (``None``) of a stream, as are the next three.
        dropped: How many of them were left out: blank texts, conversations without an answer that fits in a row.
        rows: Rows of `train`.
        tokens: Tokens of `train`, padding included.
    """

    train: AnyDataset
    validation: Dataset
    collate: Collator
    documents: int | None = None
    dropped: int | None = None
    rows: int | None = None
    tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """How documents become rows; the same for training and validation."""

    kind: str
    packing: bool
    max_length: int
    pad_id: int
    format: int = FORMAT  # part of what the cache goes by

    @property
    def features(self) -> Features:
        return PACKED_ROW if self.packing else ROW

    def encode(self, documents: AnyDataset, tokenizer: PreTrainedTokenizerBase) -> AnyDataset:
        encode = partial(_encode, layout=self, tokenizer=tokenizer)
        columns = ["text" if self.kind == "text" else "messages"]
        # A stream reads no further ahead than it must: few of its documents may be enough.
        size = 64 if isinstance(documents, IterableDataset) else 1000
        return documents.map(encode, batched=True, batch_size=size, remove_columns=columns, features=ENCODED)

    def rows(self, encoded: Any, *, keep_partial: bool) -> Iterator[Record]:
        if not self.packing:
            return single_rows(encoded, max_length=self.max_length)
        return packed_rows(
            encoded,
            max_length=self.max_length,
            split=self.kind == "text",
            pad_id=self.pad_id,
            keep_partial=keep_partial,
        )


def training_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, kind: str, seed: int) -> TrainingData:
    """Opens the data sets of a run, holds documents out, and makes rows of tokens.

    The same settings and seed give the same rows in the same order. What is not streamed is tokenised once and kept in
    the cache of `datasets`. A stream to train on has no end: each pass over the documents shuffles them within
    ``shuffle_buffer``, by ``seed`` plus the number of the pass, before they are cut into rows. So a run of any length
    is one epoch, and one that is resumed skips what it has read, whichever pass that ended in.

    Args:
        config: Which texts are read, and how they are cut.
        tokenizer: That of the model.
        kind: ``text``, or ``chat`` for conversations with labels on what the assistant says.
        seed: Decides the order of a mixture and of a stream.

    Raises:
        ConfigError: `kind` is neither, or a setting does not fit the data set.
        DataError: Data is missing, unreadable, of the other kind or too little.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}.")
    if kind == "chat":
        check_chat_tokenizer(tokenizer)
    layout = _Layout(kind=kind, packing=config.packing, max_length=config.max_length, pad_id=_pad_id(tokenizer))
    training, validating = split_documents(config, kind=kind, seed=seed)
    validation = _validation(validating, layout, tokenizer, config)
    if isinstance(training, IterableDataset):
        train = _endless(training, layout, tokenizer, config=config, seed=seed)
        next(iter(train))  # raises if there is no row
        return TrainingData(train=train, validation=validation, collate=Collator(layout.pad_id))
    encoded: Any = layout.encode(training, tokenizer)
    arguments = {"encoded": encoded, "layout": layout}
    train: Any = generated(_generate, arguments, like=encoded, features=layout.features) if len(encoded) else []
    if not len(train):
        raise _no_rows(config, kind)
    if dropped := len(training) - len(encoded):
        logger.warning("%d of %d documents have nothing to learn from in a row; left out", dropped, len(training))
    return TrainingData(
        train=train,
        validation=validation,
        collate=Collator(layout.pad_id),
        documents=len(training),
        dropped=dropped,
        rows=len(train),
        tokens=sum(len(chunk.flatten()) for chunk in train.data["input_ids"].chunks),
    )


def _encode(batch: Batch, layout: _Layout, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    if layout.kind == "chat":
        return encode_conversations(batch, tokenizer, layout.max_length)
    return encode_texts(batch, tokenizer)


def _generate(encoded: AnyDataset, layout: _Layout) -> Iterator[Record]:
    yield from layout.rows(encoded, keep_partial=False)


def _endless(
    documents: IterableDataset, layout: _Layout, tokenizer: PreTrainedTokenizerBase, *, config: DataConfig, seed: int
) -> AnyDataset:
    arguments = {"documents": documents, "layout": layout, "tokenizer": tokenizer, "config": config, "seed": seed}
    return generated(_passes, arguments, like=documents, features=layout.features)


def _passes(
    documents: IterableDataset, layout: _Layout, tokenizer: PreTrainedTokenizerBase, config: DataConfig, seed: int
) -> Iterator[Record]:
    """Yields the rows of one pass after another, numbered throughout."""
    total = 0
    for number in count():
        shuffled = documents.shuffle(seed=seed + number, buffer_size=config.shuffle_buffer)
        before = total
        encoded = every(layout.encode(shuffled, tokenizer))
        for row in layout.rows(encoded, keep_partial=False):
            yield {**row, "row": total}
            total += 1
        if total == before:
            raise _no_rows(config, layout.kind)


def _validation(
    documents: AnyDataset, layout: _Layout, tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> Dataset:
    """Makes the validation rows, from no more documents than they need."""
    stream = documents if isinstance(documents, IterableDataset) else documents.to_iterable_dataset()
    rows = layout.rows(layout.encode(stream, tokenizer), keep_partial=True)
    taken = list(islice(rows, config.max_validation_windows))
    if not taken:
        raise DataError(
            f"data.validation_fraction={config.validation_fraction:g} must leave some documents to validate on; none "
            "of those held out gives a row. Raise it, add documents, or name data.eval_split or data.eval_dataset_name."
        )
    return Dataset.from_list(taken, features=layout.features)


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The padding token, else the end token; no label or attention ever sees it."""
    candidates: Any = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)


def _no_rows(config: DataConfig, kind: str) -> DataError:
    name = ", ".join(config.dataset_names) if config.mixed else config.dataset_name
    if kind == "chat":
        return DataError(
            f"data.max_length={config.max_length} must leave room for an answer after its prompt; no conversation of "
            f"{name} does. Raise data.max_length, or check that the assistant answers."
        )
    return DataError(f"data.dataset_name={name!r} must hold some text; all of its documents are blank.")
