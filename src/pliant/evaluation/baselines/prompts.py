"""What the editors read: the prompt of a case under sampled prefixes, and where its subject ends."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pliant.consolidation.kept import Kept, base_of
from pliant.errors import EditError
from pliant.evaluation.editing.cases import EditCase
from pliant.statistics import base_mode, evaluating, input_device

STARTS = ("The", "Therefore", "Because", "I", "You")
"""What sampled prefixes start with, in turn."""
TOP_K = 5
"""Prefixes are sampled from the most likely tokens only, so that they are fluent."""

_PREFIXES: Kept[dict[tuple[int, int, int], tuple[str, ...]]] = Kept()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sequence of tokens.

    Attributes:
        ids: The tokens, the answer's last.
        subject: Index of the last token of the subject.
        answer: How many tokens the answer has.
        owner: Which case it belongs to, by position.
    """

    ids: tuple[int, ...]
    subject: int
    answer: int
    owner: int


def case_rows(
    tokenizer: PreTrainedTokenizerBase, cases: Sequence[EditCase], prefixes: Sequence[str], *, answers: bool = True
) -> list[Row]:
    """Returns a row for each case and each of ``("", *prefixes)``, those of a case together and the bare one first."""
    return [
        encode(tokenizer, case.prompt, case.subject, case.answer if answers else "", prefix=prefix, owner=owner)
        for owner, case in enumerate(cases)
        for prefix in ("", *prefixes)
    ]


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, subject: str, answer: str = "", *, prefix: str = "", owner: int = 0
) -> Row:
    """Tokenises ``prefix. prompt answer`` as one text and finds the subject and the answer by their characters.

    Raises:
        EditError: The prompt does not hold the subject, or the tokenizer cannot say where its tokens lie.
    """
    if not tokenizer.is_fast:
        raise EditError("tokenizer must be a fast one, which says where tokens lie; got a slow one. Use AutoTokenizer.")
    prompt = prompt.rstrip()
    start = prompt.rfind(subject) if subject else -1
    if start < 0:
        raise EditError(f"subject must be a part of the prompt {prompt!r}; got {subject!r}. Correct the case.")
    head = f"{prefix}. {prompt}" if prefix else prompt
    text = f"{head} {answer.strip()}" if answer.strip() else head
    encoded = tokenizer(text, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    subject_end = len(head) - len(prompt) + start + len(subject)
    return Row(
        ids=tuple(encoded["input_ids"]),
        subject=next(index for index, end in enumerate(ends) if end >= subject_end),
        answer=sum(end > len(head) for end in ends),
        owner=owner,
    )


def sampled_prefixes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, count: int, length: int, seed: int
) -> tuple[str, ...]:
    """Returns ``count`` texts of ``length`` tokens sampled from the base, without edits, the same ones every time.

    Args:
        model: The model whose base is sampled from.
        tokenizer: Its tokenizer.
        count: How many.
        length: Tokens that are sampled for each.
        seed: Of the sampling.
    """
    known = _PREFIXES.at(model, base_of(model), dict)
    if (key := (count, length, seed)) not in known:
        known[key] = tuple(_sample(model, tokenizer, STARTS[i % len(STARTS)], length, seed + i) for i in range(count))
    return known[key]


@torch.no_grad()
def _sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, start: str, length: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer(start, return_tensors="pt").input_ids
    with evaluating(model), base_mode(model):
        for _ in range(length):
            logits = model(ids.to(input_device(model)), use_cache=False).logits[0, -1].float().cpu()
            likely, tokens = logits.softmax(-1).topk(min(TOP_K, len(logits)))
            pick = tokens[torch.multinomial(likely, 1, generator=generator)]
            ids = torch.cat((ids, pick[None]), dim=1)
    return " ".join(str(tokenizer.decode(ids[0], skip_special_tokens=True)).split())
