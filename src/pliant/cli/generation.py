"""Continuing a prompt: encoding, sampling and streaming, for the commands that generate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TextStreamer

from pliant.errors import ConfigError, DataError

Message = dict[str, str]
Listener = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the likeliest."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float | None = None

    def options(self) -> dict[str, Any]:
        """Returns the keywords of ``generate``; nothing is left to the model's own defaults."""
        if self.temperature == 0.0:
            return {"do_sample": False, "max_new_tokens": self.max_new_tokens}
        return {
            "do_sample": True,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": 0,
        }


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a model wrote after a prompt."""

    text: str
    token_ids: list[int]


class _Streamer(TextStreamer):
    """Hands each finished piece of text on, in place of printing it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Listener) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.on_text(text)


def tokenizer_of(model: Any) -> PreTrainedTokenizerBase:
    """Returns the tokenizer that lies beside the model's weights."""
    try:
        return AutoTokenizer.from_pretrained(model.config._name_or_path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{model.config._name_or_path!r} must hold a tokenizer; reading it failed: {error}. "
            "Save one there: tokenizer.save_pretrained(folder)."
        ) from error


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> Int[Tensor, "1 tokens"]:
    """Returns the tokens of a prompt that the model is to continue."""
    ids: list[int] = tokenizer(prompt)["input_ids"]
    if not ids:
        raise DataError(f"a prompt must hold at least one token; got {prompt!r}.")
    return torch.tensor([ids])


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Int[Tensor, "1 tokens"]:
    """Returns the tokens of a conversation, up to where the assistant's next answer begins."""
    if tokenizer.chat_template is None:
        raise ConfigError(
            "the model's tokenizer has no chat template. Use 'pliant generate' without --chat, "
            "or a base that was trained for chat."
        )
    encoded: Any = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    return torch.tensor([encoded["input_ids"]])


@torch.inference_mode()
def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: Int[Tensor, "1 tokens"],
    sampling: Sampling,
    *,
    on_text: Listener | None = None,
) -> Completion:
    """Continues ``ids`` until the end-of-sequence token or the limit; ``on_text`` gets the text as
    it comes.

    Raises:
        DataError: The prompt leaves no room in the model's context.
    """
    longest = model.config.max_position_embeddings
    if ids.shape[1] >= longest:
        raise DataError(f"a prompt must be shorter than the model's {longest} positions; got {ids.shape[1]} tokens.")
    end = tokenizer.eos_token_id
    padding = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = ids.to(model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        pad_token_id=padding,
        streamer=None if on_text is None else _Streamer(tokenizer, on_text),
        **sampling.options(),
    )
    new = output[0, ids.shape[1] :].tolist()
    return Completion(text=str(tokenizer.decode(new, skip_special_tokens=True)), token_ids=new)
