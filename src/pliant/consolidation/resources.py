"""What consolidation needs of a base beside its weights: made once, and kept as long as the model lives."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pliant.consolidation.budget import NeutralText
from pliant.consolidation.kept import Kept, base_of, state_of
from pliant.consolidation.queries import sampled_prefixes
from pliant.data import calibration_tokens
from pliant.key_moments import KeyMoments, cached_key_moments
from pliant.models import DynamicCausalLM
from pliant.statistics import Progress

NEUTRAL_WINDOW, NEUTRAL_WINDOWS = 256, 2

Text = str | os.PathLike | Iterable[str]


class Resources:
    """Key moments, prefixes and neutral text of one base.

    Args:
        model: The model; converted or edited, its base is read.
        tokenizer: Its tokenizer.
        text: Neutral text; the embedded texts by default.
        num_tokens: How much of it the key moments are taken from.
    """

    def __init__(
        self, model: DynamicCausalLM, tokenizer: PreTrainedTokenizerBase, text: Text | None, num_tokens: int
    ) -> None:
        self.tokenizer, self.text, self.num_tokens = tokenizer, text, num_tokens
        self._moments: dict[int, KeyMoments] = {}
        self._prefixes: dict[tuple[int, int], tuple[str, ...]] = {}
        self._neutral: Kept[NeutralText] = Kept()
        self.neutral = neutral_tokens(model, tokenizer, text)

    def moments(
        self, model: DynamicCausalLM, layers: Sequence[int], progress: Progress | None = None
    ) -> dict[int, KeyMoments]:
        """Returns the key moments of ``layers``, from memory, from the cache on disk, or by reading the text."""
        if missing := [layer for layer in layers if layer not in self._moments]:
            self._moments |= cached_key_moments(
                model, self.tokenizer, missing, num_tokens=self.num_tokens, text=self.text, progress=progress
            )
        return {layer: self._moments[layer] for layer in layers}

    def neutral_text(self, model: DynamicCausalLM) -> NeutralText:
        """Returns the neutral text with what the model says there now; read again once the model is another one."""
        return self._neutral.at(model, state_of(model), partial(NeutralText, model, self.neutral))

    def prefixes(self, model: DynamicCausalLM, count: int, seed: int) -> tuple[str, ...]:
        """Returns beginnings of text that the base writes."""
        if (count, seed) not in self._prefixes:
            with model.base_mode():
                self._prefixes[count, seed] = sampled_prefixes(model, self.tokenizer, count=count, seed=seed)
        return self._prefixes[count, seed]


def neutral_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: Text | None = None
) -> Int[Tensor, "windows window"]:
    """Returns the tokens of neutral text on which an edit's divergence is measured."""
    size, window = NEUTRAL_WINDOW * NEUTRAL_WINDOWS, min(NEUTRAL_WINDOW, model.config.max_position_embeddings)
    return calibration_tokens(tokenizer, text, num_tokens=size, window=window)


_KEPT: Kept[Resources] = Kept()


def resources_of(
    model: DynamicCausalLM, tokenizer: PreTrainedTokenizerBase, text: Text | None, num_tokens: int
) -> Resources:
    """Returns the resources of a model, the same ones as long as its base and the text are the same."""
    if text is not None and not isinstance(text, str | os.PathLike):
        text = tuple(text)
    state = (base_of(model), text, _content(text), num_tokens)
    return _KEPT.at(model, state, partial(Resources, model, tokenizer, text, num_tokens))


def _content(text: Text | None) -> str | None:
    """What stands for the content of a file; None where there is none."""
    if not isinstance(text, os.PathLike) or not Path(text).is_file():
        return None  # a path that is no file is refused by who reads it
    return hashlib.sha256(Path(text).read_bytes()).hexdigest()
