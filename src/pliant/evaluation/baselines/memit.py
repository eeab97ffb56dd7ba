"""MEMIT: many associations at once, spread over a range of layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pliant.consolidation.forward import trial
from pliant.errors import EditError
from pliant.evaluation.baselines.prompts import case_rows
from pliant.evaluation.baselines.states import (
    finished,
    layer_at,
    low_rank,
    moments_of,
    settings_of,
    subject_states,
)
from pliant.evaluation.baselines.values import REUSED, ValueSearch
from pliant.evaluation.editing.cases import EditCase
from pliant.key_moments import NUM_TOKENS, KeyMoments
from pliant.models.edits import Delta, Edit, down_proj


@dataclass(frozen=True, kw_only=True)
class Memit(ValueSearch):
    """Writes ``ΔW = R Kᵀ (λ C + K Kᵀ)⁻¹`` into each ``down_proj`` of a range of layers (arXiv 2210.07229).

    K (d_ffn, cases) are the keys at the last tokens of the subjects, C = E[k kᵀ] on neutral text, and R the share of
    this layer, 1/(layers left), in what the hidden state after the last layer still lacks to z = h + δ. δ is found at
    the last layer, as :class:`ValueSearch` says. Solved as ``R (λ I + Kᵀ C⁻¹ K)⁻¹ Kᵀ C⁻¹``, no larger than the batch.

    Attributes:
        depths: First and last layer, as shares of the layers.
        strength: λ, in units of d_ffn, which is about what kᵀ C⁻¹ k is.
        ridge: Share of the mean of C's diagonal that is added to it.
        num_tokens: Tokens that C is taken from.
        moments: C of the layers, in place of those of the default text.
    """

    writer: ClassVar[str] = "memit"
    clamp: float = 1.5
    scale: Literal["value", "hidden"] = "hidden"
    depths: tuple[float, float] = (0.1, 0.23)
    strength: float = 0.02
    ridge: float = 0.01
    num_tokens: int = NUM_TOKENS
    moments: Mapping[int, KeyMoments] | None = field(default=None, repr=False, compare=False)

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, case: EditCase) -> Edit:
        """Returns the edit for one case."""
        return self.batch(model, tokenizer, [case])

    def batch(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: Sequence[EditCase]) -> Edit:
        """Returns one edit for all cases.

        Raises:
            EditError: There are no cases.
        """
        if not cases:
            raise EditError("cases must hold at least one; got none. Give the facts to write.")
        values, saved = self.searched(model, tokenizer, cases, self.layers(model)[-1])
        edit = self.write(model, tokenizer, cases, values)
        return replace(edit, details={**edit.details, REUSED: saved}) if saved else edit

    def layers(self, model: PreTrainedModel) -> list[int]:
        """The layers that are written to."""
        first, last = (layer_at(model, depth) for depth in self.depths)
        if first > last:
            raise EditError(f"depths must rise; got {self.depths}. Give the first layer first.")
        return list(range(first, last + 1))

    def values(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: Sequence[EditCase]
    ) -> Float[Tensor, "d_model cases"]:
        """Returns δ = z − h of each case after the last layer."""
        return self.searched(model, tokenizer, cases, self.layers(model)[-1])[0]

    def write(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cases: Sequence[EditCase],
        values: Float[Tensor, "d_model cases"],
    ) -> Edit:
        """Returns the edit that writes δ for all cases, layer by layer over what is written already."""
        layers = self.layers(model)
        rows = case_rows(tokenizer, cases, self.prefixes(model, tokenizer), answers=False)
        deltas: dict[str, Delta] = {}
        keys: dict[int, Tensor] = {}
        targets: Tensor | None = None
        for index, layer in enumerate(layers):
            with trial(model, deltas):
                states = subject_states(model, rows, [layer], hidden_after=layers[-1])
            assert states.hidden is not None
            targets = states.hidden + values if targets is None else targets
            share = (targets - states.hidden) / (len(layers) - index)
            keys.update(states.keys)
            deltas[down_proj(layer)] = _factors(share, self.right_factor(model, tokenizer, layer, keys[layer]))
        details = {"writer": self.writer, "layers": layers, "settings": settings_of(self)}
        edit = finished(cases, deltas, details)
        self._remember(edit, keys)
        return edit

    def right_factor(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layer: int,
        keys: Float[Tensor, "d_ffn cases"],
    ) -> Float[Tensor, "d_ffn cases"]:
        """Returns G with ``ΔW = R Gᵀ``."""
        whitened = self._moments(model, tokenizer, layer).solve(keys, self.ridge).double()
        return solved(whitened, keys.double(), self.strength * len(keys)).float()

    def _moments(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layer: int) -> KeyMoments:
        moments = self.moments or moments_of(model, tokenizer, self.layers(model), self.num_tokens)
        return moments[layer]

    def _remember(self, edit: Edit, keys: Mapping[int, Float[Tensor, "d_ffn cases"]]) -> None:
        """MEMIT forgets."""


def solved(
    whitened: Float[Tensor, "n cases"], keys: Float[Tensor, "n cases"], damping: float
) -> Float[Tensor, "n cases"]:
    """Returns ``W (damping · I + Kᵀ W)⁻¹`` for symmetric ``Kᵀ W``."""
    system = keys.T @ whitened
    system.diagonal().add_(damping)
    return torch.linalg.solve(system, whitened.T).T


def _factors(left: Float[Tensor, "d_model cases"], right: Float[Tensor, "d_ffn cases"]) -> Delta:
    """``left rightᵀ`` as factors of no more columns than the matrix can have."""
    if left.shape[1] > min(len(left), len(right)):
        return low_rank(left @ right.T)
    return Delta(left=left.contiguous(), right=right.contiguous())
