"""Documents → rows of tokens.

A packed row holds exactly ``max_length`` tokens of several documents after each other. `position_ids` start from 0 at
each, and there is no attention mask: from those positions `transformers` (5.17 to 5.23) builds the mask that keeps
every document to itself. It does so only without a cache: pass ``use_cache=False``, which its Trainer does. The label
of a document's first token is −100, so no document predicts the next one.

Texts are cut at the end of a row, and the rest begins the next one as if it were a document. Conversations are not:
half an answer without its question teaches nothing, so the row is filled with padding (labels −100) instead.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from datasets import Features, List, Value
from transformers import PreTrainedTokenizerBase

from pliant.data.conversations import Batch, Record
from pliant.errors import DataError

IGNORED = -100
"""Label of a token that the loss leaves out."""

Encoded = dict[str, list[list[int]]]
TOKENS = List(Value("int32"))
ENCODED = Features({"input_ids": TOKENS, "labels": TOKENS})
ROW = Features({**ENCODED, "row": Value("int64")})
PACKED_ROW = Features({**ROW, "position_ids": TOKENS})


def encode_texts(batch: Batch, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Returns ``input_ids`` and ``labels`` of texts, each closed with the end-of-sequence token, without blank ones.

    Raises:
        DataError: A record holds something else than text.
    """
    texts = [text for text in batch["text"] if text is not None]
    if odd := [text for text in texts if not isinstance(text, str)]:
        raise DataError(f"data.text_column must name a column of text; got {odd[0]!r}. Name another column.")
    texts = [text for text in texts if text.strip()]
    # `verbose=False`: a text longer than the model's context is cut into rows anyway.
    ids: Any = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    end = tokenizer.eos_token_id
    if end is not None:
        ids = [document if document and document[-1] == end else [*document, end] for document in ids]
    return {"input_ids": ids, "labels": ids}


def packed_rows(
    documents: Iterable[Record], *, max_length: int, split: bool, pad_id: int, keep_partial: bool
) -> Iterator[Record]:
    """Yields rows of exactly `max_length` tokens, filled with documents in their order.

    Args:
        documents: Records with ``input_ids`` and ``labels``.
        max_length: Tokens a row.
        split: Cut a document at the end of a row; else pad the row and begin the next with the whole document, which
            must not be longer than a row.
        pad_id: Token to fill a row with.
        keep_partial: Pad and keep a last row that is not full; else only if it is the only one.
    """
    row = _Row(max_length)
    number = 0
    for document in documents:
        ids, labels, start = document["input_ids"], document["labels"], 0
        assert split or len(ids) <= max_length
        while start < len(ids):
            if not row.space or (not split and len(ids) > row.space):
                yield row.finished(number, pad_id)
                row, number = _Row(max_length), number + 1
            end = start + row.space
            row.add(ids[start:end], labels[start:end])
            start = end
    full = not row.space
    if row.input_ids and (full or keep_partial or number == 0 or not split):
        yield row.finished(number, pad_id)


def single_rows(documents: Iterable[Record], *, max_length: int) -> Iterator[Record]:
    """Yields one row for each document, cut at `max_length` tokens; one of a single token has nothing to predict."""
    longer = (document for document in documents if len(document["input_ids"]) > 1)
    for number, document in enumerate(longer):
        ids, labels = document["input_ids"][:max_length], document["labels"][:max_length]
        yield {"input_ids": ids, "labels": [IGNORED, *labels[1:]], "row": number}


class _Row:
    """A row that is being filled."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.input_ids: list[int] = []
        self.labels: list[int] = []
        self.position_ids: list[int] = []

    @property
    def space(self) -> int:
        return self.max_length - len(self.input_ids)

    def add(self, ids: list[int], labels: list[int]) -> None:
        self.input_ids += ids
        self.labels += [IGNORED, *labels[1:]]
        self.position_ids += range(len(ids))

    def finished(self, number: int, pad_id: int) -> Record:
        if self.space:
            self.add([pad_id] * self.space, [IGNORED] * self.space)
        return {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "position_ids": self.position_ids,
            "row": number,
        }
