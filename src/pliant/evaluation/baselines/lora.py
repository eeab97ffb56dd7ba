"""LoRA by peft, trained on a mini-batch of the prompt under prefixes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pliant.errors import EditError
from pliant.evaluation.baselines.prompts import case_rows, sampled_prefixes
from pliant.evaluation.baselines.states import finished, layer_at, searching, settings_of
from pliant.evaluation.baselines.training import Training, descend
from pliant.evaluation.editing.cases import EditCase
from pliant.models.edits import Delta, Edit

ADAPTER = "edit"
"""peft's name of the adapter, while there is one."""


@dataclass(frozen=True, kw_only=True)
class Lora(Training):
    """Trains ``W + (alpha/rank) B A`` in a range of layers by peft (arXiv 2106.09685).

    Attributes:
        rank: Of A and B.
        alpha: Strength.
        targets: Names of the projections, of the MLP or of attention (``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``).
        depths: First and last layer, as shares of the layers.
    """

    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    depths: tuple[float, float] = (0.07, 0.23)
    epochs: int = 12

    def __call__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, case: EditCase) -> Edit:
        """Returns the edit for one case."""
        return self.batch(model, tokenizer, [case])

    def batch(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cases: Sequence[EditCase]) -> Edit:
        """Returns one edit for all cases.

        Raises:
            EditError: There are no cases, training did not stay finite, peft is missing, or it holds the model already.
        """
        if not cases:
            raise EditError("cases must hold at least one; got none. Give the facts to write.")
        prefixes = sampled_prefixes(
            model, tokenizer, count=self.num_prefixes, length=self.prefix_length, seed=self.seed
        )
        rows = case_rows(tokenizer, cases, prefixes)
        first, last = (layer_at(model, depth) for depth in self.depths)
        with searching(model), self._injected(model, list(range(first, last + 1))) as layers:
            parameters = [p for layer in layers.values() for p in _factors(layer)]
            for parameter in parameters:
                parameter.requires_grad_(True)
            steps = descend(self, model, rows, parameters)
            deltas = {path: _delta(layer) for path, layer in layers.items()}
        details = {"writer": "lora", "layers": [first, last], "steps": steps, "settings": settings_of(self)}
        return finished(cases, deltas, details)

    @contextmanager
    def _injected(self, model: PreTrainedModel, layers: list[int]) -> Iterator[dict[str, Any]]:
        """Within the block projections are peft's, by path in the inner model; after it they are the old modules."""
        try:
            from peft import LoraConfig, inject_adapter_in_model
            from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype
        except ImportError:
            raise EditError("LoRA needs peft, which is not installed: pip install 'pliant[peft]'.") from None
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise EditError("model must hold no adapters of peft; it does. Merge or unload them.")
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=list(self.targets), layers_to_transform=layers
        )
        modules, attributes = dict(model.named_modules()), dict(vars(model))
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                inject_adapter_in_model(config, model, ADAPTER)
            cast_adapter_dtype(model, ADAPTER)  # to fp32, in which every editor searches
            yield {p.removeprefix("model."): m for p, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
        finally:
            for path in [path for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)]:
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, modules[path])
            for name in vars(model).keys() - attributes.keys():
                delattr(model, name)


def _factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def _delta(layer: Any) -> Delta:
    a, b = (factor.detach().float().cpu() for factor in _factors(layer))
    return Delta(left=layer.scaling[ADAPTER] * b, right=a.T.contiguous())
