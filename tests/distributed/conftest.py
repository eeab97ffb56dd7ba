"""The runs that several tests of a launch look at."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast
from workplace import BROKEN, CASES, STREAMED, Workplace


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory, make_base: Callable[..., Any]) -> Workplace:
    """A tiny base with its tokenizer, sixty documents of counting numbers, and a text to calibrate on."""
    root = tmp_path_factory.mktemp("distributed")
    base = make_base("llama")
    base.save_pretrained(root / "base")
    vocabulary = {"<pad>": 0, "<bos>": 1} | {str(index): index for index in range(2, base.config.vocab_size)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>")
    tokenizer.save_pretrained(root / "base")
    texts = ({"text": " ".join(str(2 + (i + j) % 90) for j in range(10 + i % 17))} for i in range(60))
    (root / "texts.jsonl").write_text("\n".join(json.dumps(text) for text in texts))
    (root / "calibration.txt").write_text(" ".join(str(2 + (7 * i * i + 3 * i) % 90) for i in range(9_000)))
    return Workplace(root)


@pytest.fixture(scope="session")
def pairs(workplace: Workplace) -> dict[str, list[dict[str, Any]]]:
    """All cases in two processes under DDP; at the end a run in which one of them is killed."""
    runs = [workplace.run(f"{name}-2", **options) for name, options in {**CASES, "streamed": STREAMED}.items()]
    runs += [workplace.run("whole-2", **BROKEN), workplace.run("broken-2", worker={"die_at": 6}, **BROKEN)]
    found = workplace.launch(runs, expected=1)
    assert [name for name, each in found.items() if not all(each)] == ["broken-2"]
    return found
