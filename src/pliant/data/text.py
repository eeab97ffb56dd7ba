"""From texts to windows of tokens."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pliant.errors import ConfigError, DataError

READ_SHARE = 16
"""Times as many tokens are read as windows are spread over."""


def token_windows(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_tokens: int,
    window: int = 512,
) -> Int[Tensor, "windows window"]:
    """Cut texts into non-overlapping windows that hold at least `num_tokens` tokens together.

    Each text is tokenised the tokenizer's own way (with a beginning-of-sequence token only if the
    tokenizer adds one) and closed with its end-of-sequence token, if it has one; all are then
    joined, so a window may hold several texts. Texts are read only until ⌈num_tokens / window⌉
    windows are full. A single string is one text.

    Args:
        texts: documents in order; a generator is consumed no further than needed.
        tokenizer: tokenizer of the model that will read the windows.
        num_tokens: how many tokens to take, rounded up to full windows.
        window: tokens per window.

    Returns:
        int64 token ids, one row a window.

    Raises:
        ConfigError: `num_tokens` or `window` is below 1.
        DataError: the texts do not fill the windows.
    """
    num_windows = _num_windows(num_tokens, window)
    token_ids = _first_ids(texts, tokenizer, num_windows * window)
    if len(token_ids) < num_windows * window:
        raise _too_little(num_tokens, window, len(token_ids))
    return torch.tensor(token_ids).view(num_windows, window)


def spread_windows(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_tokens: int,
    window: int = 512,
) -> Int[Tensor, "windows window"]:
    """Take windows at equal distances from all over texts, of which up to `16 * num_tokens` tokens are read.

    Successive windows of a text are about the same things: as many from all over it stand for more of it. The other
    arguments, the result and the errors are those of `token_windows`.
    """
    num_windows = _num_windows(num_tokens, window)
    token_ids = _first_ids(texts, tokenizer, num_windows * window * READ_SHARE)
    held = len(token_ids) // window
    if held < num_windows:
        raise _too_little(num_tokens, window, len(token_ids))
    places = [i * held // num_windows for i in range(num_windows)]
    return torch.tensor(token_ids[: held * window]).view(held, window)[places]


def _num_windows(num_tokens: int, window: int) -> int:
    for field, value in (("num_tokens", num_tokens), ("window", window)):
        if value < 1:
            raise ConfigError(f"{field} must be at least 1 (tokens); got {value}")
    return -(-num_tokens // window)


def _first_ids(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, most: int) -> list[int]:
    """Returns the first `most` tokens of the texts, or all of them if there are fewer."""
    token_ids: list[int] = []
    for document_ids in _tokenise([texts] if isinstance(texts, str) else texts, tokenizer):
        token_ids.extend(document_ids)
        if len(token_ids) >= most:
            break
    return token_ids[:most]


def _too_little(num_tokens: int, window: int, held: int) -> DataError:
    needed = -(-num_tokens // window) * window
    return DataError(
        f"num_tokens={num_tokens} in full windows of {window} needs {needed} tokens; the texts "
        f"hold {held}. Give more text or lower num_tokens or window."
    )


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 text file.

    Raises:
        DataError: the file is missing, is not UTF-8 or holds nothing but whitespace.
    """
    file = Path(path)
    if not file.is_file():
        fact = "is a directory" if file.is_dir() else "does not exist"
        raise DataError(f"text file {str(file)!r} {fact}; give the path of a UTF-8 text file")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"text file {str(file)!r} must be UTF-8; byte {error.start} is not ({error.reason}). Convert it first."
        ) from error
    if not text.strip():
        raise DataError(f"text file {str(file)!r} must hold some text; it is empty")
    return text


def _tokenise(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yield the ids of each text that is not empty, closed with the end-of-sequence token."""
    end = tokenizer.eos_token_id
    for text in texts:
        # `verbose=False`: a text longer than the model's context is cut into windows anyway.
        ids = tokenizer(text, verbose=False)["input_ids"] if text else []
        if ids and end is not None and ids[-1] != end:
            ids = [*ids, end]
        yield ids
