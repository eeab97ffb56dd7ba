"""The logit lens: the words that a state, or a part of one, points at."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pliant.cli.inspect.records import Word
from pliant.cli.token_grid import token_texts
from pliant.statistics import input_device

WORDS = 5
"""Words that are told of a state."""
ROWS_AT_ONCE = 64
TINY = torch.finfo(torch.float32).tiny


@torch.inference_mode()
def nearest_words(
    model: Any, tokenizer: PreTrainedTokenizerBase, states: Float[Tensor, "states d_model"], count: int = WORDS
) -> list[list[Word]]:
    """Returns, for each state, the tokens with the largest logits of ``head(norm(state))``: the logit lens.

    Args:
        model: Whose final norm and LM head to take.
        tokenizer: Its tokenizer.
        states: What lies, or is added, in the stream; its size does not matter.
        count: How many words of each.
    """
    norm, head = model.model.norm, model.lm_head
    found: list[list[Word]] = []
    if len(states) == 0:
        return found
    for part in states.split(ROWS_AT_ONCE):
        unit = part / part.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(TINY)
        hidden = norm(unit.to(device=input_device(model), dtype=model.dtype))
        logits = head(hidden).float()[:, : len(tokenizer)]  # a vocabulary may be padded
        scores = (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, keepdim=True)
        top = scores.topk(min(count, scores.shape[-1]), dim=-1)
        for ids, values in zip(top.indices.cpu(), top.values.tolist(), strict=True):
            texts = token_texts(tokenizer, ids[None])
            found.append([Word(text=text, score=score) for text, score in zip(texts, values, strict=True)])
    return found
