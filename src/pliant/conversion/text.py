"""The text that a conversion reads: token windows as they are, texts through the model's tokenizer, or the embedded."""

from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pliant.data import calibration_tokens
from pliant.errors import DataError

Text = Int[Tensor, "windows window"] | Sequence[str]
"""Token windows, or texts."""


def windows_of(model: PreTrainedModel, text: Text | None, num_tokens: int) -> Int[Tensor, "windows window"]:
    """Returns token windows for ``model``; those given stay as they are.

    Args:
        model: Its tokenizer is read where ``text`` is not tokens already.
        text: ``None`` for the embedded texts.
        num_tokens: Tokens to take from texts, in windows of 512.

    Raises:
        DataError: There is no tokenizer, or too little text.
    """
    if isinstance(text, Tensor):
        return text
    return calibration_tokens(_tokenizer(model.config._name_or_path), text, num_tokens=num_tokens)


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DataError(
            f"calibration text needs the model's tokenizer; {name!r} has none that can be read ({error}). "
            "Give calibration=<token windows> instead."
        ) from error
