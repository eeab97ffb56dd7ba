"""Rows of tokens that a fact is asked with: where the answer is predicted, and where the subject ends."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pliant.errors import EditError


@dataclass(frozen=True, kw_only=True)
class Row:
    """One prompt with the answer that is to follow it.

    Attributes:
        ids: Tokens of the prompt and of the answer.
        length: Tokens of the answer.
        subject: Place of the last token of the subject, if it is in the prompt.
        fact: Which fact of the batch the row belongs to.
    """

    ids: tuple[int, ...]
    length: int
    subject: int | None = None
    fact: int = 0

    @property
    def places(self) -> range:
        """Where the tokens of the answer are predicted."""
        return range(len(self.ids) - self.length - 1, len(self.ids) - 1)

    @property
    def answer(self) -> tuple[int, ...]:
        """The tokens of the answer."""
        return self.ids[len(self.ids) - self.length :]


def row(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, *, subject: str | None = None, fact: int = 0
) -> Row:
    """Returns the row of a prompt and its answer.

    A space is put between them unless the prompt ends in white space. The subject is its last mention in the prompt.

    Raises:
        EditError: The prompt or the answer holds no tokens.
    """
    tokenize: Any = tokenizer
    opening = prompt.rstrip(" ")  # whose spaces are mostly of the next token
    lead = prompt[len(opening) :] or ("" if prompt[-1:].isspace() else " ")
    encoded = tokenize(opening, return_offsets_mapping=True, verbose=False)
    ids, offsets = _open(tokenizer, encoded["input_ids"]), encoded["offset_mapping"]
    joint = _open(tokenizer, tokenize(f"{opening}{lead}{answer.strip()}", verbose=False)["input_ids"])
    if joint[: len(ids)] == ids:
        follow = joint[len(ids) :]
    else:  # the prompt's last token would be another one
        follow = list(tokenize(lead + answer.strip(), add_special_tokens=False, verbose=False)["input_ids"])
    if not ids or not follow or not answer.strip():
        raise EditError(f"queries and answer must hold some text; got {prompt!r} and {answer!r}. Give both.")
    return Row(ids=(*ids, *follow), length=len(follow), subject=subject_place(prompt, subject, offsets), fact=fact)


def open_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the tokens of a text that goes on; at least one, so that something can be read there."""
    tokenize: Any = tokenizer
    return _open(tokenizer, tokenize(text, verbose=False)["input_ids"]) or [fill_token(tokenizer)]


def _open(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """Returns the tokens without the end of the text that some tokenizers add."""
    return list(ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids)


def subject_place(prompt: str, subject: str | None, offsets: Sequence[tuple[int, int]]) -> int | None:
    """Returns the place of the token in which the last mention of ``subject`` ends; None without a mention."""
    start = prompt.rfind(subject) if subject else -1
    if start < 0:
        return None
    end = start + len(subject or "")
    return max((place for place, (first, last) in enumerate(offsets) if first < end and last > first), default=None)


def fill_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns a token to fill rows up with, which no other token ever looks at."""
    token: Any = tokenizer.eos_token_id
    return 0 if token is None else int(token)


def padded(rows: Iterable[Row], fill: int) -> Int[Tensor, "rows tokens"]:
    """Returns the rows as one tensor, filled up on the right, where causal attention never looks."""
    ids = [row.ids for row in rows]
    width = max(map(len, ids))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in ids])


def aligned(rows: Sequence[Row], fill: int) -> tuple[Int[Tensor, "rows tokens"], Bool[Tensor, "rows tokens"], int]:
    """Returns the rows, filled up so that all subjects end in one column, where they are not filled, and that column.

    Every row must have a subject.
    """
    column = max(row.subject or 0 for row in rows)
    lefts = [column - (row.subject or 0) for row in rows]
    width = max(left + len(row.ids) for left, row in zip(lefts, rows, strict=True))
    ids, mask = torch.full((len(rows), width), fill), torch.zeros(len(rows), width, dtype=torch.bool)
    for index, (left, row) in enumerate(zip(lefts, rows, strict=True)):
        ids[index, left : left + len(row.ids)] = torch.tensor(row.ids)
        mask[index, left : left + len(row.ids)] = True
    return ids, mask, column


def gathered(
    values: Float[Tensor, "rows tokens width"], places: Sequence[Sequence[int]]
) -> Float[Tensor, "places width"]:
    """Returns the values of every row at its places, one after another."""
    owners = torch.tensor([index for index, some in enumerate(places) for _ in some])
    return values[
        owners.to(values.device), torch.tensor([place for some in places for place in some]).to(values.device)
    ]
