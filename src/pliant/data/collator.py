"""Rows → a batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pliant.data.packing import IGNORED


@dataclass(frozen=True)
class Collator:
    """Pads rows on the right to the longest of the batch; all tensors are int64.

    Packed rows keep their ``position_ids`` and get no attention mask (see `packing`); others get an ``attention_mask``.
    ``row`` (batch) says which rows of the data set these are; a model does not take it.

    Attributes:
        pad_id: Token to pad with.
        flatten: Make one long row of all packed ones. Flash attention needs this: `transformers` looks for documents
            in ``position_ids`` only where the batch is one row, and else lets them attend to each other, silently.
    """

    pad_id: int
    flatten: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Returns ``input_ids``, ``labels``, ``row`` and ``position_ids`` or ``attention_mask``."""
        packed = all("position_ids" in row for row in rows)
        batch = {
            "input_ids": _padded([row["input_ids"] for row in rows], self.pad_id),
            "labels": _padded([row["labels"] for row in rows], IGNORED),
        }
        if packed:
            batch["position_ids"] = _padded([row["position_ids"] for row in rows], 0)  # each pad a document of its own
        else:
            batch["attention_mask"] = _padded([[1] * len(row["input_ids"]) for row in rows], 0)
        if packed and self.flatten:
            batch = {name: tensor.reshape(1, -1) for name, tensor in batch.items()}
        return batch | {"row": torch.tensor([row["row"] for row in rows])}


def _padded(values: list[list[int]], fill: int) -> Tensor:
    longest = max(len(value) for value in values)
    return torch.tensor([[*value, *[fill] * (longest - len(value))] for value in values])
