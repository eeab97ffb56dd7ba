"""Conversations → token ids, with labels on what the assistant says.

The tokenizer's own chat template writes the conversation. Templates rarely mark the assistant's turns, so they are
found by rendering: what the first i messages and the header of an answer give is the beginning of the whole, and turn
i follows it. Labels are on each turn up to its last special token, the end of the turn.

Some templates change earlier turns as a conversation goes on (Qwen3's drops their thinking). Their turns cannot be
found that way, nor would the model ever see them so; then only the last answer carries labels.
"""

from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from pliant.data.conversations import Batch, Messages
from pliant.data.packing import IGNORED, Encoded
from pliant.errors import DataError


def check_chat_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that a tokenizer can write conversations.

    Raises:
        DataError: It has no chat template, or does not tell which characters a token stands for.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            "training.objective=sft needs a tokenizer with a chat template; that of this model has none. Start from an "
            "instruction-tuned model, or set tokenizer.chat_template and save the tokenizer with the model."
        )
    if not tokenizer.is_fast:
        raise DataError(
            f"training.objective=sft needs a fast tokenizer, which knows the characters of a token; got "
            f"{type(tokenizer).__name__}. Convert it with AutoTokenizer.from_pretrained(..., use_fast=True)."
        )


def encode_conversations(batch: Batch, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """Returns ``input_ids`` and ``labels`` of conversations, each cut at `max_length` tokens.

    One without a label left is left out: its prompt alone is too long, or nobody answers.

    Raises:
        DataError: The template refuses a conversation.
    """
    encoded: Encoded = {"input_ids": [], "labels": []}
    for messages in batch["messages"]:
        ids, labels = encode_conversation(messages, tokenizer)
        if any(label != IGNORED for label in labels[1:max_length]):
            encoded["input_ids"].append(ids[:max_length])
            encoded["labels"].append(labels[:max_length])
    return encoded


def encode_conversation(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Returns the ids and labels of one conversation up to its last answer; nothing if there is none.

    Raises:
        DataError: The template refuses the conversation, or does not write it from left to right.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        return [], []
    messages = messages[: turns[-1] + 1]
    whole = _render(messages, tokenizer)
    # The template has written the special tokens; a conversation longer than the context is cut afterwards.
    tokens = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids: list[int] = list(tokens["input_ids"])
    labels = [IGNORED] * len(ids)
    for start, end in _answers(messages, turns, whole, tokenizer):
        inside = [i for i, (first, last) in enumerate(tokens["offset_mapping"]) if start <= first < last <= end]
        for i in _through_end_of_turn(inside, ids, tokenizer):
            labels[i] = ids[i]
    return ids, labels


def _answers(
    messages: Messages, turns: list[int], whole: str, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, int]]:
    """Returns where each answer begins and ends in the rendered conversation, or only where the last one does."""
    spans = []
    for turn in turns:
        header = _render(messages[:turn], tokenizer, add_generation_prompt=True)
        through = _render(messages[: turn + 1], tokenizer)
        if whole.startswith(header) and whole.startswith(through) and len(header) < len(through):
            spans.append((len(header), len(through)))
        else:
            spans.append(None)
    if spans[-1] is None:
        raise DataError(
            "the chat template must write a conversation from left to right: what it writes before the last answer is "
            f"not how the whole begins ({whole[:60]!r}…). Use a template with add_generation_prompt."
        )
    return [spans[-1]] if None in spans else spans


def _through_end_of_turn(inside: list[int], ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Leaves out what the template writes after the end of the turn, such as a line end."""
    special = set(tokenizer.all_special_ids)
    ends = [position for position, i in enumerate(inside) if ids[i] in special]
    return inside[: ends[-1] + 1] if ends else inside


def _render(messages: Messages, tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"the chat template refuses a conversation with the roles {roles}: {error}. Leave such conversations "
            "out, or rename their roles."
        ) from error
