"""What selected tokens may look at: those of their own document that ran before them, within the window."""

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pliant.architectures.routing.selection import Selection
from pliant.errors import ConfigError

Mask = Float[Tensor, "batch 1 k keys"] | Bool[Tensor, "batch 1 k keys"]


@runtime_checkable
class Memory(Protocol):
    """What a routed layer keeps of earlier forwards: keys and values of the tokens that ran, and the router's state."""

    seen: int
    """Tokens that have passed, run or not."""

    @property
    def is_full(self) -> bool:
        """Whether every token so far ran."""
        ...

    @property
    def begun(self) -> Bool[Tensor, " batch"] | bool:
        """Rows in which a token has run; ``True`` for all of them, ``False`` for none."""
        ...

    def expect(self, selection: Selection) -> tuple[Tensor, Tensor]:
        """Announces the tokens whose keys come next; returns the columns of all keys and of the queries.

        A column counts all tokens from the start of the sequence; −1 stands for no key.
        """
        ...

    def advance(self, length: int) -> None:
        """Counts ``length`` tokens as passed."""
        ...

    def holds(self, name: str) -> bool:
        """Whether anything was remembered under this name."""
        ...

    def recall(self, name: str) -> Tensor | None:
        """Returns what :meth:`remember` kept, (batch, tokens, …)."""
        ...

    def remember(self, name: str, values: Tensor, *, most: int | None = None) -> None:
        """Appends the values of new tokens, and keeps the last ``most``."""
        ...


def attention_arguments(
    selection: Selection,
    documents: Int[Tensor, "batch seq"] | None,
    memory: Memory | None,
    arguments: dict[str, Any],
    *,
    length: int,
    implementation: str,
    window: int | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Returns the arguments of a decoder layer as they are for the selected tokens alone.

    Selected tokens stand in order of time, and fill behind them: no token that counts ever looks at fill. Where plain
    causal attention is all that is needed there is no mask. Flash attention takes none for documents either: it finds
    them in a single row by the positions, which start anew at each.

    Args:
        selection: The tokens that run.
        documents: Document of each token, −1 for padding; ``None`` for one document and no padding.
        memory: Earlier keys; ``None`` without a cache.
        arguments: Those for all tokens.
        length: Tokens of this forward.
        implementation: The family's attention function.
        window: Tokens that attention may look back, or ``None``.
        dtype: Of a mask that is added.

    Raises:
        ConfigError: The implementation cannot take the mask that is needed.
    """
    cosine, sine = arguments["position_embeddings"]
    own = None if documents is None else documents.gather(1, selection.places)
    mask = positions = None
    if memory is None and own is not None and implementation.startswith("flash") and len(own) == 1 and window is None:
        positions = _ranks(own)
    else:
        allowed = _allowed(selection, own, memory, length, window, always=implementation == "eager")
        mask = None if allowed is None else _as_mask(allowed[:, None], implementation, dtype)
    return {
        **arguments,
        "attention_mask": mask,
        "position_embeddings": (selection.gather(cosine), selection.gather(sine)),
        "position_ids": positions,  # those of the tokens have gaps, which would be taken for ends of documents
    }


def _allowed(
    selection: Selection,
    own: Int[Tensor, "batch k"] | None,
    memory: Memory | None,
    length: int,
    window: int | None,
    *,
    always: bool,
) -> Bool[Tensor, "batch k keys"] | None:
    """Which keys each selected token may look at; ``None`` where plain causal attention says the same."""
    if memory is None:
        keys = queries = selection.places  # columns
        is_causal = own is None and (window is None or length <= window)
    else:
        past = memory.seen
        keys, queries = memory.expect(selection)
        is_new = keys.shape[1] == queries.shape[1] and past == 0  # fill stands behind, as it does without a cache
        is_alone = len(queries) == 1 and (queries.shape[1] == 1 or keys.shape[1] == queries.shape[1])
        is_causal = (is_new or is_alone) and (window is None or past + length <= window)
    if is_causal and not always:
        return None
    if memory is None:  # by order: a column of fill can be before those that run
        order = torch.arange(keys.shape[1], device=keys.device)
        allowed = (order <= order[:, None]).expand(len(keys), -1, -1)
    else:
        allowed = (keys[:, None, :] <= queries[:, :, None]) & (keys >= 0)[:, None, :]
    if window is not None:
        allowed = allowed & (queries[:, :, None] - keys[:, None, :] < window)
    if memory is None and own is not None:
        allowed = allowed & (own[:, None, :] == own[:, :, None])
    return allowed


def _as_mask(allowed: Bool[Tensor, "batch 1 k keys"], implementation: str, dtype: torch.dtype) -> Mask:
    if implementation == "sdpa":
        return allowed
    if implementation == "eager":
        nothing = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
        return nothing.masked_fill(~allowed, torch.finfo(dtype).min)
    raise ConfigError(
        "attn_implementation must be sdpa or eager where a routed layer sees padding, several rows of packed "
        f"documents, a sliding window or several rows with a cache; got {implementation!r}. Load the model with "
        "attn_implementation='sdpa'."
    )


def _ranks(documents: Int[Tensor, "1 k"]) -> Int[Tensor, "1 k"]:
    """The place of each token in its document, counted among the selected ones."""
    order = torch.arange(documents.shape[1], device=documents.device)[None]
    is_first = torch.nn.functional.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return order - torch.where(is_first, order, 0).cummax(1).values
