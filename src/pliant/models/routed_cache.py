"""The cache of a routed layer: keys and values of the tokens that ran, each row's packed to the left.

What the rest of the model sees of the sequence stays true: lengths and mask sizes count every token. A row that ran
fewer tokens than another is filled up behind; ``columns`` says which token of the sequence a key belongs to.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from pliant.architectures.routing import Selection
from pliant.errors import ConfigError

NO_KEY = -1
KEPT_BACK = 256
"""Tokens by which a cache can be cropped where a router keeps the last states only."""

Columns = Int[Tensor, "batch keys"]
KeyStates = Float[Tensor, "batch heads keys head_dim"]
AllKeys = Float[Tensor, "batch heads width head_dim"]


@dataclass(frozen=True, kw_only=True)
class Remembered:
    """What a router remembers of the last tokens.

    Attributes:
        values: Of those that are kept, (batch, tokens, …).
        seen: Tokens that it has remembered, kept or not.
        most: How many of them it needs; ``None`` for all.
    """

    values: Tensor
    seen: int
    most: int | None


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Where the keys that come next belong.

    Attributes:
        columns: Token of the sequence that each key belongs to, those already there included.
        places: Where each new key goes in its row, which may be behind the last that counts; ``None``: at the end.
        is_ragged: Whether rows hold unequally many.
    """

    columns: Columns
    places: Int[Tensor, "batch k"] | None
    is_ragged: bool


class RoutedCacheLayer(DynamicLayer):
    """Keys and values of the tokens that ran in one layer, and what its router remembers.

    Attributes:
        seen: Tokens that have passed, run or not.
        columns: Token of the sequence that each key belongs to; −1 behind the last one of a row.
    """

    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.columns: Columns | None = None
        self._is_ragged = False
        self._state: dict[str, Remembered] = {}
        self._expected: Expected | None = None

    @property
    def is_full(self) -> bool:
        """Whether every token so far ran, so that keys stand where any other cache has them."""
        held = 0 if self.columns is None else self.columns.shape[1]
        return held == self.seen and not self._is_ragged

    @property
    def begun(self) -> Bool[Tensor, " batch"] | bool:
        """Rows in which a token has run; ``True`` for all of them, ``False`` for none."""
        if self.columns is None or not self.columns.shape[1]:
            return False
        return self.columns[:, 0] != NO_KEY if self._is_ragged else True

    def expect(self, selection: Selection) -> tuple[Columns, Int[Tensor, "batch k"]]:
        """Announces the tokens whose keys come next; returns the columns of all keys then, and of the queries."""
        queries = selection.places + self.seen
        fresh = queries if selection.valid is None else queries.masked_fill(~selection.valid, NO_KEY)
        held = fresh[:, :0] if self.columns is None else self.columns
        if not self._is_ragged and selection.valid is None:
            self._expected = Expected(columns=torch.cat((held, fresh), dim=1), places=None, is_ragged=False)
        else:
            counts = (held != NO_KEY).sum(1, keepdim=True)
            places = counts + torch.arange(fresh.shape[1], device=fresh.device)
            width = int((counts + (fresh != NO_KEY).sum(1, keepdim=True)).max())
            columns = _filled_up(held, places, fresh, dim=1, fill=NO_KEY)[:, :width]
            self._expected = Expected(columns=columns, places=places, is_ragged=True)
        return self._expected.columns, queries

    def advance(self, length: int) -> None:
        """Counts ``length`` tokens as passed."""
        self.seen += length

    def holds(self, name: str) -> bool:
        """Whether anything was remembered under this name."""
        return name in self._state

    def recall(self, name: str) -> Tensor | None:
        """Returns what :meth:`remember` kept of the tokens so far, (batch, tokens, …).

        Raises:
            ConfigError: Tokens have passed that the router did not see.
        """
        kept = self._state.get(name)
        seen = 0 if kept is None else kept.seen
        if seen != self.seen:
            raise ConfigError(
                f"past_key_values must come from the same routed model, in the same mode; its router saw {seen} of "
                f"{self.seen} tokens. Start with an empty cache."
            )
        return None if kept is None else kept.values

    def remember(self, name: str, values: Shaped[Tensor, "batch tokens ..."], *, most: int | None = None) -> None:
        """Appends the values of the tokens that are passing now; keeps those of the last ``most``, or all.

        Keeping fewer than all still allows to crop by 256 tokens.
        """
        before = self._state.get(name)
        kept = values if before is None else torch.cat((before.values, values), dim=1)
        if most is not None:
            kept = kept[:, -(most + KEPT_BACK) :]
        seen = (0 if before is None else before.seen) + values.shape[1]
        self._state[name] = Remembered(values=kept, seen=seen, most=most)

    def update(
        self, key_states: KeyStates, value_states: KeyStates, *args: Any, **kwargs: Any
    ) -> tuple[AllKeys, AllKeys]:
        """Stores the expected keys and values, and returns all of them; unannounced, those of every token.

        Raises:
            ConfigError: Unannounced keys follow some that left tokens out.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._expected is None:
            self._expect_all(*key_states.shape[::2])
        assert self._expected is not None
        expected, self._expected = self._expected, None
        self.keys = _appended(self.keys, key_states, expected)
        self.values = _appended(self.values, value_states, expected)
        self.columns, self._is_ragged = expected.columns, expected.is_ragged
        return self.keys, self.values

    def _expect_all(self, rows: int, length: int) -> None:
        if not self.is_full:
            raise ConfigError(
                f"past_key_values must hold every one of the {self.seen} tokens so far to go on with all tokens; some "
                "were skipped. Start with an empty cache where routing is switched off or capacity is raised to 1."
            )
        device = self.keys.device if self.keys is not None else None
        fresh = torch.arange(self.seen, self.seen + length, device=device).expand(rows, length)
        columns = fresh if self.columns is None else torch.cat((self.columns, fresh), dim=1)
        self._expected = Expected(columns=columns, places=None, is_ragged=False)
        self.seen += length

    def get_seq_length(self) -> int:
        """Returns how many tokens have passed."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Returns the length and the offset of the keys that a layer which ran every token would have."""
        return self.seen + query_length, 0

    def reset(self) -> None:
        """Forgets everything."""
        self.__init__()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last ``|tokens_to_remove|`` tokens out.

        Raises:
            ConfigError: A positive number, which transformers has given up, or more than the router can go back.
        """
        if tokens_to_remove > 0:
            raise ConfigError(
                f"crop takes the number of tokens to remove as a negative integer; got {tokens_to_remove}. Write "
                f"crop({tokens_to_remove} - cache.get_seq_length())."
            )
        removed = min(-tokens_to_remove, self.seen)
        for kept in self._state.values():
            left = kept.seen - removed
            missing = (left if kept.most is None else min(kept.most, left)) - (kept.values.shape[1] - removed)
            if missing > 0:
                raise ConfigError(
                    f"crop can take back at most {removed - missing} tokens now, as a router keeps the last "
                    f"{KEPT_BACK} states only; got {removed}. Start with an empty cache."
                )
        for name, kept in self._state.items():
            self._state[name] = replace(
                kept, values=kept.values[:, : kept.values.shape[1] - removed], seen=kept.seen - removed
            )
        self.seen -= removed
        if self.columns is None or not removed:
            return
        counts = ((self.columns != NO_KEY) & (self.columns < self.seen)).sum(1)
        width = int(counts.max())
        behind = torch.arange(width, device=counts.device) >= counts[:, None]
        self.columns = self.columns[:, :width].masked_fill(behind, NO_KEY)
        self._is_ragged = bool(behind.any())
        self.keys, self.values = self.keys[:, :, :width], self.values[:, :, :width]

    def reorder_cache(self, beam_idx: Int[Tensor, " batch"]) -> None:
        """Takes the rows that beam search goes on with."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row ``repeats`` times."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows of ``indices``."""
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self._state = {name: replace(kept, values=change(kept.values)) for name, kept in self._state.items()}
        if self.columns is not None:
            self.columns, self.keys, self.values = change(self.columns), change(self.keys), change(self.values)


def _appended(held: Tensor, new: KeyStates, expected: Expected) -> AllKeys:
    """Keys or values with the new ones where they are expected."""
    held = held if held.numel() else new[:, :, :0]
    if expected.places is None:
        return torch.cat((held, new), dim=2)
    places = expected.places[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
    return _filled_up(held, places, new, dim=2)[:, :, : expected.columns.shape[1]]


def _filled_up(
    held: Shaped[Tensor, "..."], places: Int[Tensor, "..."], new: Shaped[Tensor, "..."], *, dim: int, fill: int = 0
) -> Shaped[Tensor, "..."]:
    """Returns ``held`` made longer along ``dim``: the new values at their places, ``fill`` where there are none."""
    longer = torch.cat((held, torch.full_like(new, fill)), dim=dim)
    return longer.scatter_(dim, places, new)


def prepare_cache(cache: Cache, layers: list[int], num_layers: int) -> None:
    """Makes the entries of ``cache`` that belong to routed ``layers`` compact ones, unless they already are.

    Raises:
        ConfigError: The cache is of a kind with fixed shapes, or holds keys of another model.
    """
    while len(cache.layers) < num_layers and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    for index in layers:
        entry = cache.layers[index] if index < len(cache.layers) else None
        if isinstance(entry, RoutedCacheLayer):
            continue
        if not isinstance(entry, DynamicLayer):
            raise ConfigError(
                f"past_key_values must be a DynamicCache for a routed model; got {type(cache).__name__} of "
                f"{type(entry).__name__}. Leave cache_implementation out."
            )
        if entry.get_seq_length():
            raise ConfigError(
                f"past_key_values must be empty, or filled by the same routed model; layer {index} holds "
                f"{entry.get_seq_length()} keys of another one. Start with an empty cache."
            )
        cache.layers[index] = RoutedCacheLayer()


def token_documents(
    attention_mask: Any, position_ids: Int[Tensor, "rows seq"] | None, cache: Cache | None, length: int
) -> Int[Tensor, "batch seq"] | None:
    """Returns the document that each of the last ``length`` tokens belongs to, −1 for padding.

    ``None`` says that every row is one document without padding. As in transformers, documents are told apart by their
    positions only where there is neither a mask nor a cache.

    Args:
        attention_mask: That of the model's forward: two-dimensional, prepared with four dimensions, or by layer type.
        position_ids: Positions of the tokens.
        cache: Earlier keys.
        length: Tokens of this forward.
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values())))
    if attention_mask is None:
        if position_ids is None or cache is not None:
            return None
        breaks = position_ids.diff(dim=1) != 1
        if not breaks.any():
            return None
        return torch.nn.functional.pad(breaks.long().cumsum(1), (1, 0))
    if attention_mask.ndim == 4:  # a token that may not look at itself is padding
        own = attention_mask[:, 0].diagonal(offset=attention_mask.shape[-1] - length, dim1=-2, dim2=-1)
        counts = own if own.dtype == torch.bool else own == 0
    else:
        counts = attention_mask[:, -length:].bool()
    return None if counts.all() else counts.long() - 1
