"""Fine-tuning of one ``down_proj`` on a mini-batch of the prompt under prefixes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pliant.errors import EditError
from pliant.evaluation.baselines.prompts import case_rows, sampled_prefixes
from pliant.evaluation.baselines.states import finished, hooks, layer_at, low_rank, searching, settings_of
from pliant.evaluation.baselines.training import Training, descend
from pliant.evaluation.editing.cases import EditCase
from pliant.models.edits import Edit, down_proj
from pliant.models.placement import compute_device


@dataclass(frozen=True, kw_only=True)
class FineTune(Training):
    """Trains all of one ``down_proj`` by Adam on the answer tokens, in mini-batches over epochs.

    The change is trained beside the weight, y = W x + D x with D = 0 at the start, and kept as its singular value
    decomposition. Sources: mini-batch fine-tuning of one place, as in LocFT-BF; the bound is that of FT-L (arXiv
    2012.00363).

    Attributes:
        depth: Which layer, as a share of the layers.
        bound: Largest |D| of any entry, in units of the root mean square of W; ``None`` for none.
    """

    depth: float = 0.17
    bound: float | None = None

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, case: EditCase) -> Edit:
        """Returns the edit for one case."""
        return self.batch(model, tokenizer, [case])

    def batch(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: Sequence[EditCase]) -> Edit:
        """Returns one edit for all cases.

        Raises:
            EditError: There are no cases, or training did not stay finite.
        """
        if not cases:
            raise EditError("cases must hold at least one; got none. Give the facts to write.")
        prefixes = sampled_prefixes(
            model, tokenizer, count=self.num_prefixes, length=self.prefix_length, seed=self.seed
        )
        layer = layer_at(model, self.depth)
        projection = model.model.get_submodule(down_proj(layer))
        width = model.config.intermediate_size
        rows = case_rows(tokenizer, cases, prefixes)
        with searching(model):
            limit = None if self.bound is None else self.bound * _root_mean_square(projection, width)
            change = torch.zeros(model.config.hidden_size, width, device=compute_device(projection), requires_grad=True)

            def add(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                return output + nn.functional.linear(args[0], change.to(args[0])).to(output)

            def clip() -> None:
                if limit is not None:
                    change.clamp_(-limit, limit)

            with hooks(projection.register_forward_hook(add)):
                steps = descend(self, model, rows, [change], clip)
        details = {"writer": "finetune", "layers": [layer], "steps": steps, "settings": settings_of(self)}
        return finished(cases, {down_proj(layer): low_rank(change.detach().cpu())}, details)


@torch.no_grad()
def _root_mean_square(projection: nn.Module, width: int) -> float:
    """Of W, by what it makes of random inputs, so that weights of any kind can be measured."""
    weight = next(projection.parameters())
    kind = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
    inputs = torch.randn(64, width, generator=torch.Generator().manual_seed(0)).to(compute_device(projection), kind)
    outputs = projection(inputs) - projection(torch.zeros_like(inputs))  # without a bias
    return (outputs.float().square().mean() / width).sqrt().item()
