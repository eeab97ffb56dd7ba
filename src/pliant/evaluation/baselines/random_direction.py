"""The control: an edit as large as another, in random directions."""

from dataclasses import dataclass, replace
from uuid import uuid4

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pliant.evaluation.baselines.states import Editor
from pliant.evaluation.editing.cases import EditCase
from pliant.models.edits import Delta, Edit


@dataclass(frozen=True, kw_only=True)
class RandomDirection:
    """Gives each projection a random change of the norm that another editor's has.

    Attributes:
        editor: The other editor.
        seed: Of the directions.
    """

    editor: Editor
    seed: int = 0

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, case: EditCase) -> Edit:
        """Returns the edit for one case."""
        return randomised(self.editor(model, tokenizer, case), seed=self.seed)


def randomised(edit: Edit, *, seed: int = 0) -> Edit:
    """Returns an edit whose left factors are random, with ``‖left rightᵀ‖`` of each projection as before.

    It reads the same inputs and writes what they do not mean.
    """
    generator = torch.Generator().manual_seed(seed)
    deltas = {path: _randomised(delta, generator) for path, delta in edit.deltas.items()}
    details = {"writer": "random", "seed": seed, "of": dict(edit.details)}
    return replace(edit, deltas=deltas, details=details, kl=None, id=uuid4().hex[:8])


def _randomised(delta: Delta, generator: torch.Generator) -> Delta:
    left = torch.randn(delta.left.shape, generator=generator)
    left *= _norm(delta.left, delta.right) / _norm(left, delta.right).clamp(min=torch.finfo(torch.float32).tiny)
    scale = delta.scale
    if scale is not None:
        drawn = torch.randn(scale.shape, generator=generator)
        scale = drawn * (scale.norm() / drawn.norm())
    return Delta(left=left, right=delta.right.clone(), scale=scale)


def _norm(left: Float[Tensor, "out rank"], right: Float[Tensor, "in rank"]) -> Float[Tensor, ""]:
    """``‖left rightᵀ‖``, without the product."""
    return ((left.T @ left) * (right.T @ right)).sum().clamp(min=0).sqrt()
