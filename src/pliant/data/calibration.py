"""The default text to calibrate on: English prose for one half, and what prose lacks for the other.

A closed form keeps the directions that attention uses on its calibration text. Prose alone misses those for copying rare
strings, markup and code, so half of the windows hold code, mathematics, text with its punctuation split off, and random
tokens repeated four times, which attention can only copy.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pliant.data.embedded import Record, documents, package_root, records
from pliant.data.text import token_windows

REPEATS = 4
ARROW_FILE = "data-00000-of-00001.arrow"
LANGUAGES = ("cpp", "typescript", "java", "php")
CYCLE = ("random", "code", "mathematics", "split", "prose", "prose", "prose", "prose")
"""What each window in a row of eight holds; a multiple of eight ends in prose."""


def calibration_tokens(
    tokenizer: PreTrainedTokenizerBase, *, num_tokens: int = 32_768, window: int = 512
) -> Int[Tensor, "windows window"]:
    """Returns at least `num_tokens` tokens in windows of the kinds above, the same ones on every call.

    Raises:
        ConfigError: `num_tokens` or `window` is below 1.
        DataError: The embedded texts are not installed (the message says how to get them) or hold too little.
    """
    num_windows = max(-(-num_tokens // window), 1)
    kinds = [CYCLE[i % len(CYCLE)] for i in range(num_windows)]
    texts: dict[str, Callable[[], Iterable[str]]] = {
        "prose": documents,
        "code": _code,
        "mathematics": _mathematics,
        "split": _split,
    }
    windows: dict[str, Iterator[Tensor]] = {}
    for kind in dict.fromkeys(kinds):
        count = kinds.count(kind)
        windows[kind] = iter(
            _random(tokenizer, count, window)
            if kind == "random"
            else token_windows(texts[kind](), tokenizer, num_tokens=count * window, window=window)
        )
    return torch.stack([next(windows[kind]) for kind in kinds])


def _random(tokenizer: PreTrainedTokenizerBase, count: int, window: int) -> Int[Tensor, "count window"]:
    """Random ordinary tokens, each window a sequence four times over."""
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
    picks = torch.randint(len(ordinary), (count, -(-window // REPEATS)), generator=torch.Generator().manual_seed(0))
    return ordinary[picks].repeat(1, REPEATS)[:, :window]


def _requests(task: str, extract: Callable[[Record], str]) -> Iterator[str]:
    for record in records(package_root() / "oe_eval_tasks" / task / "requests.jsonl.gz"):
        yield extract(record["doc"])


def _in_turn(streams: list[Iterator[str]]) -> Iterator[str]:
    for group in zip_longest(*streams):
        yield from (text for text in group if text)


def _code() -> Iterator[str]:
    """MBPP tasks and their solutions in four languages (CC BY 4.0)."""
    return _in_turn(
        [
            _requests(f"mt_mbpp_{language}/gold_bpb_3shot", lambda doc: f"{doc['text']}\n{doc['code']}")
            for language in LANGUAGES
        ]
    )


def _mathematics() -> Iterator[str]:
    """GSM8K problems and their worked answers (MIT)."""
    return _requests("gsm8k/gold_bpb_5shot", lambda doc: f"{doc['question']}\n{doc['answer']}")


def _split() -> Iterator[str]:
    """News and reviews whose punctuation is split off, from MRPC and SST-2."""
    return _in_turn([_column("mrpc", "sentence1"), _column("sst2", "sentence")])


def _column(name: str, column: str) -> Iterator[str]:
    for record in records(package_root() / "hf_datasets" / "glue" / name / "validation" / ARROW_FILE):
        yield record[column]
