"""A tiny model directory with tokenizer and chat template, and a way to run the command."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner, Result

from pliant.cli import main

SENTENCES = (
    "A small robot walks over the green hill and looks for water.",
    "Attention finds what matters, and the memory keeps it for later.",
    "The river bends twice before it meets the sea, slow and wide.",
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
Run = Callable[..., Result]


def make_tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    """A byte-level BPE of some hundred pieces."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = chat_template
    return tokenizer


def save_model(folder: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Saves a random Llama of four layers with its tokenizer."""
    tokenizer = make_tokenizer(chat_template)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory, the same for all tests; none may write to it."""
    return save_model(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="session")
def without_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, its tokenizer without a chat template."""
    return save_model(tmp_path_factory.mktemp("plain") / "base", chat_template=None)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Text enough for six windows of 512 tokens."""
    file = tmp_path / "text.txt"
    lines = [f"{index}: {SENTENCES[index % len(SENTENCES)]}" for index in range(400)]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


@pytest.fixture(autouse=True)
def transformers_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the command silences is heard again in the next test."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    level, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    yield
    transformers_logging.set_verbosity(level)
    if bars:
        transformers_logging.enable_progress_bar()


@pytest.fixture
def run() -> Run:
    """A function that runs ``pliant`` in this process and checks its exit code."""

    def call(*arguments: Any, stdin: str | None = None, exit_code: int = 0) -> Result:
        result = CliRunner().invoke(main, [str(a) for a in arguments], input=stdin)
        assert result.exit_code == exit_code, (result.stdout, result.stderr, result.exception)
        return result

    return call


@pytest.fixture
def converted(tiny: Path, tmp_path: Path, run: Run) -> Path:
    """The tiny model with every layer v2, which changes what it says."""
    run("convert", tiny, "--preset", "v2", "--output", tmp_path / "converted")
    return tmp_path / "converted"


@pytest.fixture
def layers_of() -> Callable[[Path], dict[str, dict[str, Any]]]:
    """A function that returns the converted layers that a directory's ``config.json`` lists."""

    def layers(folder: Path) -> dict[str, dict[str, Any]]:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config["pliant"]["layers"]

    return layers
