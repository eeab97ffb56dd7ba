"""Tokens by layers in a terminal: the labels, what fits beside each other, and how strong a colour is."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

SHOWN_TOKENS = 40
LABEL_WIDTH = 18
NARROWEST_LABEL = 8
WIDEST_CELL = 4
COLOURS = ("#79b8e8", "#5b93ee", "#7a70ee", "#a455dd", "#cf3d9f")
"""From just above the threshold to far above it; each can be told from a black and from a white background."""
FEW_COLOURS = ("cyan", "blue", "magenta")
"""Where a terminal has no more than sixteen."""
FAR = 0.95
"""Quantile of the values from which on the colour is the strongest."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token of the text; ``is_new`` if the model wrote it."""

    id: int
    text: str
    is_new: bool

    @property
    def label(self) -> str:
        """The text as one line without control characters; white space alone in quotes."""
        return _visible(self.text) if self.text.strip() else repr(self.text)


def token_texts(tokenizer: "PreTrainedTokenizerBase", ids: "Int[Tensor, '1 tokens']") -> Iterator[str]:
    """Yields the text of each token, with the space before a word that some tokenizers drop there."""
    for token in ids[0].tolist():
        piece = str(tokenizer.convert_ids_to_tokens(token))
        text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
        if piece.startswith("▁") and not text.startswith(" "):
            text = f" {text}"
        yield text or piece


def blocks(tokens: Sequence[Token], layers: Sequence[int], width: int) -> Iterator[tuple[list[int], int, int]]:
    """Yields the layers that fit beside each other in ``width`` columns, with the widths of a label and of a cell."""
    longest = max(cell_len(token.label) for token in tokens[:SHOWN_TOKENS])
    label_width = max(NARROWEST_LABEL, min(longest, LABEL_WIDTH, width - 1 - 2 * len(layers)))
    room = max(1, width - label_width - 1)
    cell = max(1, min(WIDEST_CELL, room // len(layers)))
    for start in range(0, len(layers), room // cell):
        yield list(layers[start : start + room // cell]), label_width, cell


def _visible(text: str) -> str:
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def cropped(label: str, width: int) -> str:
    """A label of at most ``width`` columns of a terminal, its end cut off."""
    if cell_len(label) <= width:
        return label
    return set_cell_size(label, width - 1).rstrip() + "…"


def numbers(values: Sequence[int], cell: int) -> list[str]:
    """Numbers side by side in cells, upright where they are too wide."""
    texts = [str(value) for value in values]
    most = max(len(text) for text in texts)
    if most < cell or most == cell == 1:
        return ["".join(f"{text:<{cell}}" for text in texts)]
    return ["".join(f"{text.rjust(most)[digit]:<{cell}}" for text in texts) for digit in range(most)]


def far_of(ordered: Sequence[float]) -> float:
    """Returns the value of ``ordered`` from which on the colour is the strongest; 0 if there is none."""
    return ordered[math.ceil(FAR * len(ordered)) - 1] if ordered else 0.0


def strength(margin: float, far: float) -> float:
    """How strong the colour of a value is: 0 at or below 0, 1 from ``far`` on."""
    if margin <= 0:
        return 0.0
    return margin / far if margin < far else 1.0


def colours_of(system: str | None) -> Sequence[str]:
    """The colours of a terminal, from weak to strong; none where it has none."""
    if system is None:
        return ()
    return COLOURS if system in ("256", "truecolor") else FEW_COLOURS
