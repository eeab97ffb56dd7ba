"""Labels on what the assistant says, and on nothing else."""

import pytest

from pliant.data.chat import check_chat_tokenizer, encode_conversation, encode_conversations
from pliant.data.packing import IGNORED
from pliant.errors import DataError

QWEN_LIKE = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Writes the thinking block of the last answer only, as Qwen3's does."""


def conversation(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def labelled(messages, tokenizer) -> list[str]:
    """Decode each run of tokens with labels."""
    ids, labels = encode_conversation(messages, tokenizer)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    runs, inside = [], False
    for label in labels:
        if label != IGNORED:
            runs = [*runs[:-1], [*runs[-1], label]] if inside else [*runs, [label]]
        inside = label != IGNORED
    return [tokenizer.decode(run) for run in runs]


def test_every_answer_is_labelled_with_its_end(byte_tokenizer):
    messages = conversation("Hi", "Hello ünïcode 🙂", "And?", "\nNo  more\n", system="Be brief.")
    assert labelled(messages, byte_tokenizer) == ["Hello ünïcode 🙂<|im_end|>", "\nNo  more\n<|im_end|>"]
    ids, _ = encode_conversation(messages, byte_tokenizer)
    assert ids == byte_tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]


def test_what_follows_the_last_answer_is_left_out(byte_tokenizer):
    messages = conversation("Hi", "Hello", "Still there?")
    assert encode_conversation(messages, byte_tokenizer) == encode_conversation(messages[:2], byte_tokenizer)


def test_template_that_changes_earlier_turns_trains_the_last_answer(byte_tokenizer, monkeypatch):
    monkeypatch.setattr(byte_tokenizer, "chat_template", QWEN_LIKE)
    messages = conversation("Hi", "Hello", "And?", "No")
    assert labelled(messages, byte_tokenizer) == ["<think>\n\n</think>\n\nNo<|im_end|>"]


def test_template_without_special_tokens_labels_the_whole_answer(byte_tokenizer, monkeypatch):
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    monkeypatch.setattr(byte_tokenizer, "chat_template", template)
    assert labelled(conversation("Hi", "Hello"), byte_tokenizer) == ["Hello\n"]


def test_conversations_without_room_for_an_answer_are_left_out(byte_tokenizer):
    batch = {"messages": [conversation("Hi", "Hello"), conversation("Hi " * 50, "Hello"), conversation("Hi")]}
    encoded = encode_conversations(batch, byte_tokenizer, 50)
    assert len(encoded["input_ids"]) == 1
    assert len(encode_conversations(batch, byte_tokenizer, 1000)["input_ids"]) == 2
    ids, _ = encode_conversation(batch["messages"][0], byte_tokenizer)
    cut = encode_conversations(batch, byte_tokenizer, len(ids) - 4)
    assert cut["input_ids"][0] == ids[:-4]


def test_tokenizer_without_template_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"chat template; that of this model has none.*instruction-tuned"):
        check_chat_tokenizer(tokenizer)


def test_template_that_refuses_roles_names_them(byte_tokenizer, monkeypatch):
    monkeypatch.setattr(byte_tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"roles user, assistant: roles must alternate"):
        encode_conversation(conversation("Hi", "Hello"), byte_tokenizer)


def test_template_that_writes_backwards_is_refused(byte_tokenizer, monkeypatch):
    template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    monkeypatch.setattr(byte_tokenizer, "chat_template", template)
    with pytest.raises(DataError, match="from left to right"):
        encode_conversation(conversation("Hi", "Hello"), byte_tokenizer)


@pytest.mark.real_model
def test_smollm2_learns_its_answers():
    from transformers import AutoTokenizer

    from pliant.models import bases

    tokenizer = AutoTokenizer.from_pretrained(bases.resolve_base("smollm2-135m"))
    messages = conversation("Capital of France?", "Paris.", "And of Italy?", "Rome, of course.")
    assert labelled(messages, tokenizer) == ["Paris.<|im_end|>", "Rome, of course.<|im_end|>"]
