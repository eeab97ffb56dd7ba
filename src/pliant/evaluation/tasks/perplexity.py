"""Perplexity of a model on one text, and how far its predictions are from its base's, window by window."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pliant.data import documents, read_text, token_windows
from pliant.errors import ConfigError, DataError
from pliant.evaluation.editing.figures import as_json
from pliant.evaluation.intervals import ratio_of_sums
from pliant.evaluation.records import Record, Records
from pliant.metrics import window_sums
from pliant.models import DynamicCausalLM
from pliant.statistics import Progress, evaluating

NUM_TOKENS, WINDOW = 12_288, 512
EMBEDDED_TEXT = "embedded validation text"


def text_tokens(
    tokenizer: PreTrainedTokenizerBase, data: str | os.PathLike | None, *, num_tokens: int, window: int
) -> Int[Tensor, " tokens"]:
    """Returns the first tokens of a file, or of the embedded texts' validation split, in full windows.

    Raises:
        DataError: The file cannot be read, or the text is too short.
    """
    texts = documents("validation") if data is None else [read_text(data)]
    return token_windows(texts, tokenizer, num_tokens=num_tokens, window=window).flatten()


def check_windows(num_tokens: int, window: int, stride: int | None) -> None:
    """Checks how a text is read.

    Raises:
        ConfigError: A number is out of range.
    """
    if window < 2:
        raise ConfigError(f"window must be at least 2 (tokens); got {window}. 512 is usual.")
    if num_tokens < window:
        raise ConfigError(f"num_tokens must be at least window={window}; got {num_tokens}. 12,288 is usual.")
    if stride is not None and not 1 <= stride <= window:
        raise ConfigError(f"stride must be in 1..{window} (window); got {stride}. Leave it out to read no token twice.")


def strided(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yields (first, end, scored): where each window lies, and how many of its last tokens no window before scored.

    The first token of a text, and with ``stride = window`` of every window, has nothing before it and is not scored.
    """
    before = 0
    for first in range(0, length, stride):
        end = min(first + window, length)
        if end - max(before, first + 1) > 0:
            yield first, end, end - max(before, first + 1)
        before = end
        if end == length:
            return


def measure_windows(
    model: DynamicCausalLM,
    tokens: Int[Tensor, " tokens"],
    records: Records,
    *,
    window: int = WINDOW,
    stride: int | None = None,
    with_base: bool = True,
    progress: Progress | None = None,
) -> list[Record]:
    """Reads a text through a sliding window and appends to ``records``, a record a window that is not there yet.

    A record holds, summed over the ``tokens`` that the window scores, ``nll = Σ −log p(x_t | x_<t)`` in nats; and with
    the base its ``base_nll``, ``kl = Σ KL(base ‖ model)`` and ``agreement``, how often both have the same most likely
    token.

    Raises:
        DataError: A prediction is not finite.
    """
    step = window if stride is None else stride
    places = list(strided(len(tokens), window, step))
    names = [f"{first}-{end}" for first, end, _ in places]
    for done, (name, (first, end, scored)) in enumerate(zip(names, places, strict=True), start=1):
        if name not in records:
            with evaluating(model):
                base = model if with_base else None
                found = window_sums(model, tokens[first:end], scored=scored, base=base)
            if not np.isfinite(found["nll"]):
                raise DataError(
                    f"the negative log-likelihood must be finite; got {found['nll']} for tokens {name}. Load the "
                    "model in bfloat16."
                )
            records.append({"id": name, "tokens": scored, **found})
        if progress is not None:
            progress("Reading held-out text", done, len(places))
    return [records[name] for name in names]


def perplexity_figures(records: list[Record]) -> dict[str, Any]:
    """Returns perplexities, and where there is a base, their ``ratio``, ``kl`` and ``agreement`` a token.

    Intervals are of resampled windows, model and base together.
    """
    found = {"tokens": sum(record["tokens"] for record in records), "windows": len(records)}
    figures = {"perplexity": ratio_of_sums(records, "nll", "tokens", transform=np.exp)}
    if all("base_nll" in record for record in records):
        gains = [{**record, "gain": record["nll"] - record["base_nll"]} for record in records]
        figures["base_perplexity"] = ratio_of_sums(records, "base_nll", "tokens", transform=np.exp)
        figures["ratio"] = ratio_of_sums(gains, "gain", "tokens", transform=np.exp)
        figures["kl"] = ratio_of_sums(records, "kl", "tokens")
        figures["agreement"] = ratio_of_sums(records, "agreement", "tokens")
    return {**found, **{name: as_json(value) for name, value in figures.items()}}
