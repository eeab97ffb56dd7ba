"""ROME: one association in one layer, by a rank-one write."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pliant.evaluation.baselines.prompts import case_rows
from pliant.evaluation.baselines.states import finished, layer_at, moments_of, settings_of, subject_states
from pliant.evaluation.baselines.values import ValueSearch
from pliant.evaluation.editing.cases import EditCase
from pliant.key_moments import NUM_TOKENS, KeyMoments
from pliant.models.edits import Delta, Edit, down_proj


@dataclass(frozen=True, kw_only=True)
class Rome(ValueSearch):
    """Writes ``ΔW = (v* − W k)(C⁻¹ k)ᵀ / (kᵀ C⁻¹ k)`` into one ``down_proj`` (arXiv 2202.05262).

    k is the key at the last token of the subject, averaged over prefixes, C = E[k kᵀ] on neutral text, and v* = W k + δ
    with δ as :class:`ValueSearch` finds it. Afterwards (W + ΔW) k = v*.

    Attributes:
        depth: Which layer, as a share of the layers.
        ridge: Share of the mean of C's diagonal that is added to it.
        num_tokens: Tokens that C is taken from.
        moments: C of the layers, in place of those of the default text.
    """

    depth: float = 0.17
    ridge: float = 0.01
    num_tokens: int = NUM_TOKENS
    moments: Mapping[int, KeyMoments] | None = field(default=None, repr=False, compare=False)

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, case: EditCase) -> Edit:
        """Returns the edit for one case."""
        return self.write(model, tokenizer, case, self.values(model, tokenizer, [case]))

    def values(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: Sequence[EditCase]
    ) -> Float[Tensor, "d_model cases"]:
        """Returns δ = v* − W k of each case."""
        return self.searched(model, tokenizer, cases, layer_at(model, self.depth))[0]

    def write(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        case: EditCase,
        value: Float[Tensor, "d_model 1"],
    ) -> Edit:
        """Returns the edit that writes δ for one case."""
        layer = layer_at(model, self.depth)
        rows = case_rows(tokenizer, [case], self.prefixes(model, tokenizer), answers=False)
        key = subject_states(model, rows, [layer]).keys[layer]  # (f, 1)
        moments = self.moments or moments_of(model, tokenizer, [layer], self.num_tokens)
        whitened = moments[layer].solve(key, self.ridge)
        right = whitened / (key.T @ whitened)
        details = {"writer": "rome", "layers": [layer], "settings": settings_of(self)}
        return finished([case], {down_proj(layer): Delta(left=value.clone(), right=right)}, details)
