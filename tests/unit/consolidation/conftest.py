"""Tokenizers that read real text, made here, and rows of the tiny bases."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from pliant.consolidation.rows import Row
from pliant.key_moments import KeyMoments

TEXT = "Question: What is the capital of France? The capital of France is Paris. Zoë plays the violin in Lisbon."
BYTES = [f"<0x{value:02X}>" for value in range(256)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own."""
    monkeypatch.setenv("PLIANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def byte_level(*, closed: bool = False) -> PreTrainedTokenizerFast:
    """The kind of GPT-2, Llama 3 and Qwen; ``closed`` has it end every text with the end of the text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    if closed:
        backend.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


def sentence_piece() -> PreTrainedTokenizerFast:
    """The kind of Llama 2 and Mistral: a mark before every word, also before the first, and a first token."""
    words = ["▁" + word for word in TEXT.replace(".", " .").replace("?", " ?").split()]
    pieces = ["<unk>", "<s>", "</s>", *BYTES, *sorted({letter for word in words for letter in word})]
    merges: list[tuple[str, str]] = []
    for word in words:
        for stop in range(2, len(word) + 1):
            pair = (word[: stop - 1], word[stop - 1])
            if pair not in merges:
                merges.append(pair)
                pieces.append(word[:stop])
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "byte_level": byte_level,
    "closed": lambda: byte_level(closed=True),
    "sentence_piece": sentence_piece,
}


@pytest.fixture(params=TOKENIZERS)
def speaker(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """A tokenizer of each kind."""
    return TOKENIZERS[request.param]()


@pytest.fixture
def byte_speaker() -> PreTrainedTokenizerFast:
    """One tokenizer, of the kind of Llama 3."""
    return byte_level()


@pytest.fixture(scope="session")
def row_of() -> Callable[..., Row]:
    """A function that makes a row of random tokens with an answer."""

    def make(
        seed: int, *, length: int = 9, answer: Sequence[int] = (7,), subject: int | None = 3, fact: int = 0
    ) -> Row:
        tokens = torch.randint(2, 97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
        return Row(ids=(*tokens, *answer), length=len(answer), subject=subject, fact=fact)

    return make


@pytest.fixture(scope="session")
def moments_of() -> Callable[[Tensor], KeyMoments]:
    """A function that returns the second moment of some keys."""
    return lambda keys: KeyMoments(moment=(keys.T @ keys / len(keys)).float(), tokens=len(keys))
