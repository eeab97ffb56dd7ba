"""How a fact is asked for: prefixes that the model writes, cuts of the statement, its own questions, other subjects."""

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from pliant.consolidation.kept import Kept, state_of
from pliant.consolidation.rows import fill_token
from pliant.errors import EditError
from pliant.statistics import input_device

QUESTION = "Question: {}\nAnswer:"
"""How a question is put in plain text."""

OTHER_SUBJECTS = (
    "Isaac Newton", "Marie Curie", "Jorge Luis Borges", "Serena Williams", "Nelson Mandela", "Akira Kurosawa",
    "Ada Lovelace", "Diego Maradona", "Virginia Woolf", "Ludwig van Beethoven", "Indira Gandhi", "Miles Davis",
    "Toyota", "Siemens", "Nintendo", "Petrobras", "Ericsson", "Samsung", "Boeing", "Nestlé",
    "Lisbon", "Nairobi", "Vancouver", "Kyoto", "Buenos Aires", "Helsinki", "the Danube", "Mount Kenya",
    "Portugal", "Vietnam", "Chile", "Norway", "The Economist", "Star Trek", "Swan Lake", "the Eiffel Tower",
    "Windows XP", "the violin", "photosynthesis", "the Roman Empire", "UNESCO", "Manchester United", "the Beatles",
    "Robert Koch", "Simone de Beauvoir", "Kofi Annan", "Pablo Neruda", "Lufthansa",
)  # fmt: skip
"""Subjects of many kinds, to ask the same of: what is learned about one must not spread to them."""

_SENTENCE = re.compile(
    r"(?<=\w\w\w[.!?])(?<!\b(?:Mrs|Inc|Ltd|etc)\.)\s+|(?<=[)\]\"'][.!?])\s+|(?<=[.!?]\")\s+|\s*\n\s*"
)
"""A full stop after fewer than three letters ends an abbreviation more often than a sentence."""
_WORD = re.compile(r"\S+")

_ANSWERS: Kept[dict[str, str]] = Kept()


@torch.no_grad()
def sampled_prefixes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, count: int, length: int = 8, seed: int = 0
) -> tuple[str, ...]:
    """Returns short beginnings of text that the model writes, the same ones on every call; the first is empty.

    Raises:
        EditError: The model's logits are not finite.
    """
    start = torch.tensor(_line_break(tokenizer)[-1:])
    device, generator = input_device(model), torch.Generator().manual_seed(seed)
    ids = start.repeat(count - 1, 1)
    for _ in range(length if count > 1 else 0):
        hidden = model.model(ids.to(device), use_cache=False).last_hidden_state[:, -1]
        logits = (model.lm_head(hidden).float() / 0.8).cpu()
        if not logits.isfinite().all():
            raise EditError(
                "the model's logits must be finite to write text with; they are not. Load the model in bfloat16 or "
                "float32, or check its weights."
            )
        ids = torch.cat((ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)), dim=1)
    texts = (str(tokenizer.decode(some[1:], skip_special_tokens=True)).strip() for some in ids)
    return ("", *(f"{text}. " for text in texts))


def _line_break(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens of a line break; the one of the end of text where the tokenizer drops it."""
    return tokenizer("\n", add_special_tokens=False)["input_ids"] or [fill_token(tokenizer)]


def sentences(text: str) -> list[str]:
    """Returns the sentences of a text, cut after a full stop, a question mark or an exclamation mark."""
    return [part.strip() for part in _SENTENCE.split(text.strip()) if part.strip()]


@torch.no_grad()
def word_surprise(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str
) -> list[tuple[int, int, float]]:
    """Returns start, end and surprise in nats of every word of ``text``, which follows a line break."""
    tokenize: Any = tokenizer
    lead = _line_break(tokenizer)
    encoded = tokenize(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = torch.tensor([[*lead, *encoded["input_ids"]]])
    hidden = model.model(ids.to(input_device(model)), use_cache=False).last_hidden_state[0]
    log_p = model.lm_head(hidden[len(lead) - 1 : -1]).float().log_softmax(-1).cpu()
    nats = -log_p.gather(1, ids[0, len(lead) :, None])[:, 0]
    words = [(match.start(), match.end()) for match in _WORD.finditer(text)]
    total = [0.0] * len(words)
    for (_, last), value in zip(encoded["offset_mapping"], nats.tolist(), strict=True):
        owner = max((i for i, (start, _) in enumerate(words) if start < last), default=0)
        total[owner] += value
    return [(start, end, value) for (start, end), value in zip(words, total, strict=True)]


def likely_subject(words: Sequence[tuple[int, int, float]], text: str) -> str:
    """Returns the words of ``text`` that surprise most together: the run with the largest sum above the mean.

    The first word does not count, as anything may begin a text.
    """
    if not words:
        return ""
    later = [value for *_, value in words[1:]]
    mean = sum(later) / max(1, len(later))
    best, best_sum, start, running = (0, 0), float("-inf"), 0, 0.0
    for index, (_, _, value) in enumerate(words):
        if running <= 0:
            start, running = index, 0.0
        running += value - mean if index else 0.0
        if running > best_sum:
            best, best_sum = (start, index), running
    return text[words[best[0]][0] : words[best[1]][1]].strip(" ,.;:!?\"'()")


def cloze_cuts(words: Sequence[tuple[int, int, float]], text: str, *, count: int = 2) -> list[tuple[str, str]]:
    """Returns cuts of a sentence into what asks and what answers: before its most surprising words past the middle."""
    later = [index for index in range(1, len(words)) if words[index][0] >= len(text) * 0.4]
    later = later or list(range(1, len(words)))
    chosen = sorted(sorted(later, key=lambda index: -words[index][2])[:count])
    return [(text[: words[i][0]].rstrip(), text[words[i][0] :].rstrip(" .!?")) for i in chosen]


def _chat_marks(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    if tokenizer.chat_template is None:
        return None
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "\0"}], tokenize=False, add_generation_prompt=True
    )
    before, _, after = str(text).partition("\0")
    return before, after


def chat_prompt(tokenizer: PreTrainedTokenizerBase, message: str) -> str | None:
    """Returns a message as the tokenizer's chat template puts it; None without a template."""
    marks = _chat_marks(tokenizer)
    return None if marks is None else marks[0] + message + marks[1]


@torch.no_grad()
def greedy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], *, max_new_tokens: int = 24
) -> list[str]:
    """Returns the model's greedy answers to ``prompts``, up to the end of the first line or sentence.

    They are kept for as long as the model is what it is, so that whoever asks the same again need not wait.
    """
    known = _ANSWERS.at(model, (state_of(model), repr(model.generation_config), max_new_tokens), dict)
    tokenize, generate = cast(Any, tokenizer), cast(Any, model.generate)
    for prompt in prompts:
        if prompt in known:
            continue
        ids: Int[Tensor, "1 tokens"] = tokenize(prompt, return_tensors="pt", verbose=False)["input_ids"]
        out = generate(
            ids.to(input_device(model)),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_token_id,
            stopping_criteria=StoppingCriteriaList([_Answered(tokenizer, ids.shape[1])]),
        )
        text = str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
        lines = text.strip().splitlines()
        known[prompt] = sentences(lines[0])[0].rstrip(".") if lines and sentences(lines[0]) else ""
    return [known[prompt] for prompt in prompts]


class _Answered(StoppingCriteria):
    """Stops once more is written than the first line, or than its first sentence."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: int) -> None:
        self.tokenizer, self.start = tokenizer, start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        text = str(self.tokenizer.decode(input_ids[0, self.start :], skip_special_tokens=True)).lstrip()
        line = text.splitlines()[0] if text else ""
        return torch.tensor([line != text or len(sentences(line)) > 1], device=input_ids.device)
