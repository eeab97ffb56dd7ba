"""AlphaEdit: MEMIT's write, kept to directions that the keys of ordinary text hardly use."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pliant.errors import EditError
from pliant.evaluation.baselines.memit import Memit, solved
from pliant.key_moments import KeyMoments
from pliant.models.edits import Edit

_SPECTRA: WeakKeyDictionary[KeyMoments, tuple[Tensor, Tensor]] = WeakKeyDictionary()


class KeyMemory:
    """The keys of earlier edits, which later ones leave alone."""

    def __init__(self) -> None:
        self._keys: dict[str, dict[int, Tensor]] = {}

    def remember(self, edit_id: str, keys: Mapping[int, Float[Tensor, "d_ffn cases"]]) -> None:
        """Keeps the keys of an edit."""
        self._keys[edit_id] = dict(keys)

    def forget(self, edit_id: str) -> None:
        """Drops those of an edit that was taken back."""
        self._keys.pop(edit_id, None)

    def at(self, layer: int) -> Float[Tensor, "d_ffn earlier"] | None:
        """All keys of a layer; ``None`` if there are none."""
        keys = [edit[layer] for edit in self._keys.values() if layer in edit]
        return torch.cat(keys, dim=1) if keys else None


@dataclass(frozen=True, kw_only=True)
class AlphaEdit(Memit):
    """Writes ``ΔW = R Kᵀ P (K_p K_pᵀ P + K Kᵀ P + λ I)⁻¹`` over a range of layers (arXiv 2410.02355).

    P projects on the eigenvectors of C = E[k kᵀ] with small eigenvalues, so that ΔW moves no key of ordinary text that
    lies in the others; K_p are the keys of earlier edits. The rest is as in :class:`Memit`.

    Attributes:
        threshold: Eigenvalues below this are small, in units of their mean.
        strength: λ, in units of the mean eigenvalue.
        memory: Where the keys of earlier edits are kept; without one they are forgotten. One a model.
    """

    writer: ClassVar[str] = "alphaedit"
    threshold: float = 0.6
    strength: float = 1.0
    memory: KeyMemory | None = field(default=None, repr=False, compare=False)

    def right_factor(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layer: int,
        keys: Float[Tensor, "d_ffn cases"],
    ) -> Float[Tensor, "d_ffn cases"]:
        """Returns G with ``ΔW = R Gᵀ``: ``M⁻¹ Q (I + Qᵀ M⁻¹ Q)⁻¹`` for Q = P K and M = P K_p K_pᵀ P + λ I."""
        values, vectors = _spectrum(self._moments(model, tokenizer, layer))
        mean = values.mean()
        kept = vectors[:, values < self.threshold * mean]
        if not kept.shape[1]:
            raise EditError(f"threshold must leave a direction to write to; {self.threshold} leaves none. Raise it.")
        # In the coordinates of the null space, which no solve leaves.
        own, damping = kept.T @ keys.double(), self.strength * mean
        whitened = own / damping
        if self.memory is not None and (earlier := self.memory.at(layer)) is not None:
            past = kept.T @ earlier.double()
            system = past.T @ past
            system.diagonal().add_(damping)
            whitened -= past @ torch.linalg.solve(system, past.T @ own) / damping
        return (kept @ solved(whitened, own, 1.0)).float()

    def _remember(self, edit: Edit, keys: Mapping[int, Float[Tensor, "d_ffn cases"]]) -> None:
        if self.memory is not None:
            self.memory.remember(edit.id, keys)


def _spectrum(moments: KeyMoments) -> tuple[Float[Tensor, " d_ffn"], Float[Tensor, "d_ffn d_ffn"]]:
    """Eigenvalues, rising, and eigenvectors of C in fp64, found once."""
    if moments not in _SPECTRA:
        values, vectors = torch.linalg.eigh(moments.moment.double())
        _SPECTRA[moments] = values, vectors
    return _SPECTRA[moments]
